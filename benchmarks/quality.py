"""Score of bias tuning against a frozen encoder and full fine-tuning, on real data.

Runs what is not yet in the results file, so it can be stopped and started again at any time:

    python benchmarks/quality.py --data glue_data            # every run, one after the other
    python benchmarks/quality.py --data glue_data --part 1/2 # every second run (two processes)
    python benchmarks/quality.py --table                     # the table of docs/quality.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
# task -> (training rows, epochs)
TASKS = {"mrpc": (None, 3), "stsb": (None, 1), "sst2": (12_000, 1)}
# The largest rate of the paper's grid for each method (appendix A.2); frozen: that of bias tuning.
RATES = {"bitfit": 1e-3, "frozen": 1e-3, "full": 5e-5}
SEEDS = (0, 1, 2)


def plan() -> list[tuple[str, str, int]]:
    """Return every run; bias tuning against frozen first, so that an early stop leaves rows."""
    return [
        (task, method, seed)
        for methods in (("bitfit", "frozen"), ("full",))
        for seed in SEEDS
        for task in TASKS
        for method in methods
    ]


def run_one(task: str, method: str, seed: int, data: str, threads: int) -> None:
    """Train one run and append its line to the results."""
    import bitfit

    limit, epochs = TASKS[task]
    outcome = bitfit.finetune(
        "minilm", data=data, task=task, method=method, seed=seed, limit=limit, epochs=epochs,
        recipe="paper", keep="best", learning_rate=RATES[method], dtype="fp32", threads=threads,
        train_score=True,
    )  # fmt: skip
    line = json.dumps(outcome.to_json() | {"limit": limit, "version": bitfit.__version__})
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_results() -> list[dict[str, object]]:
    """Return the result lines so far."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def print_table() -> None:
    """Print a Markdown table: mean and standard deviation over seeds, train beside dev."""
    print("| task | method | rate | seeds | dev | train | gap | seconds | trained |")
    print("|---|---|---|---|---|---|---|---|---|")
    runs = read_results()
    for task in TASKS:
        for method in RATES:
            mine = [r for r in runs if (r["task"], r["method"]) == (task, method)]
            if mine:
                print(_row(task, method, mine))


def _row(task: str, method: str, runs: list[dict]) -> str:
    metric = runs[0]["metric"]
    dev = [100 * r["score"] for r in runs]
    train = [100 * r["scores"][f"train_{metric}"] for r in runs]
    spread = f" ± {statistics.stdev(dev):.1f}" if len(dev) > 1 else ""
    trained = sum(runs[0]["trainable"].values())
    seconds = statistics.median(r["train_seconds"] for r in runs)
    return (
        f"| {task} ({metric}) | {method} | {runs[0]['learning_rate']:g} | {len(runs)} | "
        f"{statistics.mean(dev):.1f}{spread} | {statistics.mean(train):.1f} | "
        f"{statistics.mean(train) - statistics.mean(dev):+.1f} | {seconds:.0f} | {trained:,} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="glue_data", help="the GLUE directory")
    parser.add_argument("--part", default="0/1", help="run every N-th run: K/N")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a run")
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    parser.add_argument("--one", nargs=3, metavar=("TASK", "METHOD", "SEED"), help="one run")
    args = parser.parse_args()
    if args.table:
        print_table()
    elif args.one:
        run_one(args.one[0], args.one[1], int(args.one[2]), args.data, args.threads)
    else:
        part, parts = map(int, args.part.split("/"))
        for task, method, seed in plan()[part::parts]:
            if (task, method, seed) in {
                (r["task"], r["method"], r["seed"]) for r in read_results()
            }:
                continue
            # A process of its own: peak memory is a process's.
            command = [sys.executable, __file__, "--one", task, method, str(seed)]
            subprocess.run(
                [*command, "--data", args.data, "--threads", str(args.threads)], check=True
            )


if __name__ == "__main__":
    main()
