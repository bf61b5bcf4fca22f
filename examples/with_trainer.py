"""Bias tuning with transformers.Trainer, and a task file at the end.

    pip install accelerate
    python examples/with_trainer.py

Trainer optimizes whatever requires a gradient: after select_biases these are the biases and the
head.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from importlib.resources import files
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import bitfit
from bitfit.base import find_base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="minilm", help="minilm, a folder, or a name on the hub")
    parser.add_argument("--out", type=Path, default=Path("runs/trainer.bitfit.safetensors"))
    parser.add_argument("--limit", type=int, default=160, help="training rows")
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    if importlib.util.find_spec("accelerate") is None:
        raise SystemExit("transformers.Trainer needs accelerate: pip install accelerate")

    example = files("bitfit") / "example"
    data = bitfit.read_dataset(bitfit.DataConfig(
        data=str(example / "urgency.train.csv"), dev=str(example / "urgency.dev.csv"),
        limit=args.limit,
    ))  # fmt: skip
    place = str(find_base(args.base))  # "minilm" is a folder of a package
    tokenizer = AutoTokenizer.from_pretrained(place)

    def rows(split: str) -> list[dict]:
        return [
            {**tokenizer(row.text, truncation=True, max_length=64), "labels": row.label}
            for row in data.splits[split]
        ]

    def new_model() -> torch.nn.Module:
        return AutoModelForSequenceClassification.from_pretrained(
            place, num_labels=len(data.task.labels), dtype=torch.float32
        )

    model = new_model()
    bitfit.select_biases(model, "all")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder, num_train_epochs=args.epochs, learning_rate=2e-3,
                adam_epsilon=1e-6, per_device_train_batch_size=8, seed=0, report_to="none",
                save_strategy="no", logging_strategy="no", disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=rows("train"),
            data_collator=DataCollatorWithPadding(tokenizer),
        )  # fmt: skip
        trainer.train()
        result = trainer.predict(rows("dev"))
    accuracy = float((result.predictions.argmax(axis=1) == result.label_ids).mean())
    print(f"accuracy {accuracy:.3f} on dev")

    file = bitfit.task_from_model(
        model, args.base, data.task, terms="all", max_length=64, scores={"accuracy": accuracy},
        recipe={"learning_rate": 2e-3, "epochs": args.epochs, "seed": 0},
    )  # fmt: skip
    file.save(args.out)
    print(f"saved {file.n:,} biases and the head: {args.out.stat().st_size:,} bytes")

    # Back into a fresh model: the same logits.
    model.cpu().eval()
    fresh = new_model().eval()
    bitfit.apply_task(fresh, bitfit.TaskFile.load(args.out), args.base)
    batch = tokenizer(
        ["I need the bike today, please help!", "Thank you for the card."],
        padding=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        logits = model(**batch).logits
        torch.testing.assert_close(fresh(**batch).logits, logits, rtol=1e-4, atol=1e-4)
    print("a fresh model with the task gives the same logits")


if __name__ == "__main__":
    main()
