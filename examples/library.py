"""Ten lines of bitfit: fine-tune a base on a CSV file, save the task, load it, ask it.

    python examples/library.py

Trains on 150 of the example rows that come with the package; half a minute on two cores.
"""

from __future__ import annotations

import argparse
from importlib.resources import files

import bitfit

TEXTS = [
    "My train leaves in an hour and the rental bike has a flat tyre, please help!",
    "No hurry at all: will you have the blue helmet again next season?",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="minilm", help="minilm, a folder, or a name on the hub")
    parser.add_argument("--out", default="runs/urgency.bitfit.safetensors", help="file to write")
    parser.add_argument("--limit", type=int, default=150, help="training rows")
    args = parser.parse_args()

    folder = files("bitfit") / "example"
    outcome = bitfit.finetune(
        args.base, data=str(folder / "urgency.train.csv"), dev=str(folder / "urgency.dev.csv"),
        text="text", label="label", name="urgency", out=args.out, limit=args.limit, epochs=3,
    )  # fmt: skip
    file = bitfit.TaskFile.load(args.out)
    print(f"{file.task.name}: {file.task.metric} {outcome.score:.3f} on dev")
    print(f"{file.n:,} biases and {file.head_size:,} values of the head in {args.out}")

    model = bitfit.load(args.out, base=args.base)
    for text, answer in zip(TEXTS, model.predict(TEXTS), strict=True):
        print(f"{answer.label} ({answer.confidence:.2f}): {text}")


if __name__ == "__main__":
    main()
