"""Two tasks on one base: every text says in one batch which task it is for.

    python examples/mixed_batch.py

The base is loaded once. Each task adds one row of numbers and a small head, and can be taken out
again at any time.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

import bitfit

TASKS = ("urgency", "sentiment")
TEXTS = [
    "The brakes failed on my way to work, I need them fixed today.",
    "What a lovely shop, thank you for the coffee!",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="minilm", help="minilm, a folder, or a name on the hub")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder to write to")
    parser.add_argument("--limit", type=int, default=160, help="training rows of each task")
    args = parser.parse_args()

    encoder = bitfit.open_encoder(args.base)
    example = files("bitfit") / "example"
    paths = []
    for task in TASKS:
        paths.append(args.out / f"{task}.bitfit.safetensors")
        outcome = bitfit.finetune(
            encoder, data=str(example / f"{task}.train.csv"), dev=str(example / f"{task}.dev.csv"),
            name=task, out=paths[-1], limit=args.limit, epochs=3,
            learning_rate=3e-3,
        )  # fmt: skip
        print(f"trained {task}: {outcome.file.task.metric} {outcome.score:.3f} on dev")

    model = bitfit.load(paths, base=encoder)
    # Each text once for each task, all in one call: the batch mixes the two.
    texts = [text for text in TEXTS for _ in TASKS]
    mixed = model.predict(texts, task=[*TASKS] * len(TEXTS))
    for text, answer in zip(texts, mixed, strict=True):
        print(f"{answer.task} = {answer.label} ({answer.confidence:.2f}): {text}")

    # The company that a text has in its batch does not change its answer.
    alone = model.predict(TEXTS[:1], task=TASKS[0])[0]
    assert abs(alone.confidence - mixed[0].confidence) < 0.01
    model.remove("sentiment")
    print(f"tasks left: {', '.join(model.tasks)}")


if __name__ == "__main__":
    main()
