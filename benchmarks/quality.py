"""Score of bias tuning against a frozen encoder and full fine-tuning, on real data.

Runs what is not yet in the results file, so it can be stopped and started again at any time:

    python benchmarks/quality.py --data glue_data                 # every run, one after the other
    python benchmarks/quality.py --data glue_data --workers 12    # twelve processes, on a GPU
    python benchmarks/quality.py --plan main                      # the three methods only
    python benchmarks/quality.py --table                          # the tables of docs/quality.md
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
SEEDS = (0, 1, 2, 3, 4)
# task -> (training rows, epochs)
TASKS = {"mrpc": (None, 3), "stsb": (None, 1), "sst2": (12_000, 1)}
# The largest rate of the paper's grid for each method (appendix A.2); frozen: that of bias tuning.
RATES = {"bitfit": 1e-3, "frozen": 1e-3, "full": 5e-5}
METHODS = tuple(RATES)
# What else is compared, all with bias tuning: name -> options of finetune.
VARIANTS: dict[str, dict[str, Any]] = {
    "main": {},
    "default recipe": {"recipe": "default"},
    "default recipe, 2e-3": {"recipe": "default", "learning_rate": 2e-3},
    "pooler": {"pooling": "pooler"},
    "cls": {"pooling": "cls"},
    "released terms, pooler": {"terms": "released:all", "pooling": "pooler"},
    "bf16": {"dtype": "bf16"},
}
CHOICES = ("default recipe", "default recipe, 2e-3", "pooler", "cls", "released terms, pooler")
LONG_EPOCHS = 10


@dataclass(frozen=True)
class Run:
    """One line of the results."""

    variant: str
    task: str
    method: str
    seed: int


def plan(part: str = "all") -> list[Run]:
    """Return every run; bias tuning against frozen first, so that an early stop leaves rows."""
    main = [
        Run("main", task, method, seed)
        for methods in (("bitfit", "frozen"), ("full",))
        for seed in SEEDS
        for task in TASKS
        for method in methods
    ]
    precision = [
        Run(variant, task, "bitfit", seed)
        for seed in SEEDS
        for variant in ("plain", "bf16")
        for task in ("mrpc", "stsb")
    ]
    choices = [
        Run(variant, task, "bitfit", seed)
        for seed in SEEDS
        for variant in ("default recipe", "default recipe, 2e-3", "pooler", "cls")
        for task in TASKS
    ]
    long = [
        Run("long", task, method, seed)
        for seed in SEEDS[:3]
        for task in ("mrpc", "stsb")
        for method in METHODS
    ]
    released = [Run("released terms, pooler", "mrpc", "bitfit", seed) for seed in SEEDS]
    parts = {
        "main": main, "precision": precision, "choices": choices, "released": released,
        "long": long,
    }  # fmt: skip
    return [run for runs in parts.values() for run in runs] if part == "all" else parts[part]


def run_one(run: Run, data: str, threads: int, results: Path) -> None:
    """Train one run and append its line to the results."""
    import torch

    import bitfit

    torch.set_num_threads(threads)
    limit, epochs = TASKS[run.task]
    epochs = LONG_EPOCHS if run.variant == "long" else epochs
    options: dict[str, Any] = {
        "task": run.task, "seed": run.seed, "limit": limit, "epochs": epochs, "recipe": "paper",
        "keep": "best", "learning_rate": RATES[run.method], "dtype": "fp32",
    } | VARIANTS.get(run.variant, {})  # fmt: skip
    if run.variant == "plain":
        line = plain_run(data, options)
    else:
        line = bitfit.finetune(
            "minilm", data=data, method=run.method, train_score=True, **options
        ).to_json()
    cuda = torch.cuda.is_available()
    line |= asdict(run) | {
        "limit": limit,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "version": bitfit.__version__,
    }
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def plain_run(data: str, options: dict[str, Any]) -> dict[str, Any]:
    """Train the same with nothing of ours below the data: what the fast path must not differ from.

    transformers' model in fp32 with its own attention and dropout, padded batches, torch's AdamW,
    biases that require gradients, and the mean of the last hidden states under a linear layer.
    """
    import numpy as np
    import torch
    from transformers import AutoModel, AutoTokenizer

    import bitfit
    from bitfit.base import find_base
    from bitfit.metrics import compute_metrics

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset = bitfit.read_dataset(
        bitfit.DataConfig(data=data, task=options["task"], limit=options["limit"])
    )
    task, seed = dataset.task, options["seed"]
    torch.manual_seed(seed)
    source = find_base("minilm")
    model = AutoModel.from_pretrained(source, add_pooling_layer=False).to(device).train()
    tokenizer = AutoTokenizer.from_pretrained(source)
    head = torch.nn.Linear(model.config.hidden_size, task.num_outputs).to(device)
    torch.nn.init.normal_(head.weight, std=0.02)
    torch.nn.init.zeros_(head.bias)
    trained = [*bitfit.select_biases(model, "all").values(), *head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=options["learning_rate"], eps=1e-6, weight_decay=0.0)

    def logits_of(examples: list[Any]) -> torch.Tensor:
        pairs = [e.text_pair for e in examples]
        batch = tokenizer(
            [e.text for e in examples], None if pairs[0] is None else pairs, truncation=True,
            max_length=128, padding=True, return_tensors="pt",
        ).to(device)  # fmt: skip
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][:, :, None]
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        return head(torch.nn.functional.dropout(pooled, 0.1, model.training))

    def score() -> dict[str, float]:
        model.eval()
        rows = dataset.splits["dev"]
        with torch.no_grad():
            logits = torch.cat([logits_of(rows[i : i + 64]) for i in range(0, len(rows), 64)])
        model.train()
        found = logits[:, 0] if task.kind == "regression" else logits.argmax(1)
        return compute_metrics(task, found.tolist(), [e.label for e in rows])

    rows, history, began = dataset.splits["train"], [], time.perf_counter()
    for epoch in range(options["epochs"]):
        order = np.random.default_rng((seed, epoch)).permutation(len(rows))
        for start in range(0, len(rows), 8):
            chosen = [rows[i] for i in order[start : start + 8]]
            logits = logits_of(chosen)
            labels = torch.tensor([e.label for e in chosen], device=device)
            if task.kind == "regression":
                loss = torch.nn.functional.mse_loss(logits[:, 0], labels.float())
            else:
                loss = torch.nn.functional.cross_entropy(logits, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        history.append({"epoch": epoch + 1, "dev": score()})
    best = max(history, key=lambda e: e["dev"][task.metric])
    return {
        "metric": task.metric, "score": best["dev"][task.metric], "scores": best["dev"],
        "history": history, "train_seconds": time.perf_counter() - began,
        "learning_rate": options["learning_rate"], "recipe": "paper",
        "trainable": {
            "encoder": sum(p.numel() for p in trained[:-2]),
            "head": sum(p.numel() for p in trained[-2:]),
        },
    }  # fmt: skip


def read_results(results: Path) -> list[dict[str, Any]]:
    """Return the result lines so far."""
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def print_tables(runs: list[dict[str, Any]]) -> None:
    """Print Markdown tables: mean and standard deviation over seeds, train beside dev."""
    for variant in ("main", "long"):
        print(f"\n{variant}\n")
        print("| task | method | rate | seeds | dev | train | gap | seconds | trained |")
        print("|---|---|---|---|---|---|---|---|---|")
        for task in TASKS:
            for method in METHODS:
                mine = _of(runs, variant, task, method)
                if mine:
                    print(_row(task, method, mine))
    print("\nbias tuning, dev score less that of main with the same seed (mean, 90 % interval)\n")
    print("| task | variant | seeds | dev | difference to main |")
    print("|---|---|---|---|---|")
    for task in TASKS:
        for variant in CHOICES:
            mine = _of(runs, variant, task, "bitfit")
            if mine:
                difference = _difference(mine, _of(runs, "main", task, "bitfit"))
                print(f"| {task} | {variant} | {len(mine)} | {_mean(mine)} | {difference} |")
    print(
        "\nthe fast path less transformers' own model in fp32, same seeds (mean, 90 % interval)\n"
    )
    print("| task | path | seeds | dev | difference to plain |")
    print("|---|---|---|---|---|")
    for task in ("mrpc", "stsb"):
        plain = _of(runs, "plain", task, "bitfit")
        for variant, name in (("main", "fp32"), ("bf16", "bf16 weights")):
            mine = _of(runs, variant, task, "bitfit")
            if mine and plain:
                difference = _difference(mine, plain)
                print(f"| {task} | {name} | {len(mine)} | {_mean(mine)} | {difference} |")


def _of(runs: list[dict[str, Any]], variant: str, task: str, method: str) -> list[dict[str, Any]]:
    return [r for r in runs if (r["variant"], r["task"], r["method"]) == (variant, task, method)]


def _mean(runs: list[dict[str, Any]]) -> str:
    scores = [100 * r["score"] for r in runs]
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.1f}{spread}"


def _difference(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> str:
    """Mean of the paired differences, with Student's 90 % interval."""
    from scipy.stats import t

    other = {r["seed"]: r["score"] for r in others}
    pairs = [100 * (r["score"] - other[r["seed"]]) for r in runs if r["seed"] in other]
    if len(pairs) < 2:
        return "?"
    half = float(t.ppf(0.95, len(pairs) - 1)) * statistics.stdev(pairs) / math.sqrt(len(pairs))
    mean = statistics.mean(pairs)
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"


def _row(task: str, method: str, runs: list[dict[str, Any]]) -> str:
    metric = runs[0]["metric"]
    train = statistics.mean(100 * r["scores"][f"train_{metric}"] for r in runs)
    gap = train - statistics.mean(100 * r["score"] for r in runs)
    trained = sum(runs[0]["trainable"].values())
    seconds = statistics.median(r["train_seconds"] for r in runs)
    return (
        f"| {task} ({metric}) | {method} | {runs[0]['learning_rate']:g} | {len(runs)} | "
        f"{_mean(runs)} | {train:.1f} | {gap:+.1f} | {seconds:.0f} | {trained:,} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="glue_data", help="the GLUE directory")
    parser.add_argument("--plan", default="all", help="all or one part of it")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file of result lines")
    parser.add_argument("--table", action="store_true", help="print the tables and stop")
    parser.add_argument("--one", nargs=4, metavar=("VARIANT", "TASK", "METHOD", "SEED"))
    args = parser.parse_args()
    if args.table:
        print_tables(read_results(args.results))
        return
    if args.one:
        variant, task, method, seed = args.one
        run_one(Run(variant, task, method, int(seed)), args.data, args.threads, args.results)
        return
    done = {
        Run(r["variant"], r["task"], r["method"], r["seed"]) for r in read_results(args.results)
    }
    runs = [run for run in plan(args.plan) if run not in done]

    def start(run: Run) -> None:
        # A process of its own: peak memory is a process's.
        one = [run.variant, run.task, run.method, str(run.seed)]
        subprocess.run(
            [sys.executable, __file__, "--one", *one, "--data", args.data, "--threads",
             str(args.threads), "--results", str(args.results)],
            check=True,
        )  # fmt: skip
        print(f"{run} done", flush=True)

    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(start, runs))


if __name__ == "__main__":
    main()
