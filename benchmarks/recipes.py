"""The default recipe against the paper's, at the same number of epochs, on the shipped example.

    python benchmarks/recipes.py           # runs what is not in the results file yet
    python benchmarks/recipes.py --table

``paper`` keeps a constant rate and the last epoch, ``default`` warms up, decays and keeps the best.
"""

from __future__ import annotations

import argparse
import json
import statistics
from importlib import resources
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "recipes.jsonl"
TASKS = ("intent", "urgency", "sentiment")
RECIPES = ("paper", "default")
SEEDS = (0, 1, 2)
EPOCHS = 5


def run_all(threads: int) -> None:
    """Train every run that has no line yet."""
    import bitfit

    encoder = bitfit.open_encoder("minilm", "fp32")
    folder = resources.files("bitfit") / "example"
    for seed in SEEDS:
        for task in TASKS:
            for recipe in RECIPES:
                done = {(r["task"], r["recipe"], r["seed"]) for r in read_results()}
                if (task, recipe, seed) in done:
                    continue
                outcome = bitfit.finetune(
                    encoder, data=str(folder / f"{task}.train.csv"), name=task, recipe=recipe,
                    dev=str(folder / f"{task}.dev.csv"), epochs=EPOCHS, seed=seed, threads=threads,
                )  # fmt: skip
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(outcome.to_json()) + "\n")


def read_results() -> list[dict]:
    """Return the result lines so far."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def print_table() -> None:
    """Print a Markdown table: saved score, mean and standard deviation over seeds."""
    print("| task | recipe | seeds | dev accuracy of the saved file | best epoch's | seconds |")
    print("|---|---|---|---|---|---|")
    for task in TASKS:
        for recipe in RECIPES:
            runs = [r for r in read_results() if (r["task"], r["recipe"]) == (task, recipe)]
            if runs:
                saved = [100 * r["score"] for r in runs]
                best = statistics.mean(100 * r["best_score"] for r in runs)
                spread = statistics.stdev(saved) if len(saved) > 1 else 0.0
                seconds = statistics.median(r["train_seconds"] for r in runs)
                print(f"| {task} | {recipe} | {len(runs)} | {statistics.mean(saved):.1f} ± "
                      f"{spread:.1f} | {best:.1f} | {seconds:.0f} |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        run_all(args.threads)
    print_table()


if __name__ == "__main__":
    main()
