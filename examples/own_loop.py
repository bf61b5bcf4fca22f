"""A training loop of your own, on a plain transformers model, with a task file at the end.

    python examples/own_loop.py

bitfit chooses the parameters (select_biases) and keeps the result (task_from_model, apply_task).
Model, batches, optimizer and loop are plain torch and transformers.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import bitfit
from bitfit.base import find_base

BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="minilm", help="minilm, a folder, or a name on the hub")
    parser.add_argument("--out", type=Path, default=Path("runs/own.bitfit.safetensors"))
    parser.add_argument("--limit", type=int, default=160, help="training rows")
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()
    torch.manual_seed(0)

    example = files("bitfit") / "example"
    data = bitfit.read_dataset(bitfit.DataConfig(
        data=str(example / "urgency.train.csv"), dev=str(example / "urgency.dev.csv"),
        limit=args.limit,
    ))  # fmt: skip
    train, dev, labels = data.splits["train"], data.splits["dev"], data.task.labels

    place = str(find_base(args.base))  # "minilm" is a folder of a package
    tokenizer = AutoTokenizer.from_pretrained(place)

    def new_model() -> torch.nn.Module:
        return AutoModelForSequenceClassification.from_pretrained(
            place, num_labels=len(labels), dtype=torch.float32
        )

    def tokens(rows: list) -> dict[str, torch.Tensor]:
        texts = [row.text for row in rows]
        return tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")

    model = new_model()
    biases = bitfit.select_biases(model, "all")  # all else in the encoder is frozen now
    trained = [p for p in model.parameters() if p.requires_grad]  # the biases and the head
    optimizer = torch.optim.AdamW(trained, lr=2e-3, eps=1e-6, weight_decay=0.0)
    for epoch in range(args.epochs):
        model.train()
        order = torch.randperm(len(train)).tolist()
        for begin in range(0, len(order), BATCH):
            rows = [train[i] for i in order[begin : begin + BATCH]]
            loss = model(**tokens(rows), labels=torch.tensor([row.label for row in rows])).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.inference_mode():
            logits = model(**tokens(dev)).logits
        right = logits.argmax(dim=1) == torch.tensor([row.label for row in dev])
        accuracy = right.float().mean().item()
        print(f"epoch {epoch + 1}: accuracy {accuracy:.3f} on dev")

    file = bitfit.task_from_model(
        model, args.base, data.task, terms="all", max_length=64, scores={"accuracy": accuracy},
        recipe={"learning_rate": 2e-3, "epochs": args.epochs, "seed": 0},
    )  # fmt: skip
    file.save(args.out)
    count = sum(bias.numel() for bias in biases.values())
    print(f"saved {count:,} biases and the head: {args.out.stat().st_size:,} bytes")

    # Back into a fresh model: the same logits.
    fresh = new_model().eval()
    bitfit.apply_task(fresh, bitfit.TaskFile.load(args.out), args.base)
    with torch.inference_mode():
        torch.testing.assert_close(fresh(**tokens(dev)).logits, logits, rtol=1e-4, atol=1e-4)
    print("a fresh model with the task gives the same logits")

    # Or into bitfit's own model, beside other tasks of the same base.
    answer = bitfit.load(args.out, base=args.base).predict(["I need the bike today, please help!"])[
        0
    ]
    print(f"{answer.label} ({answer.confidence:.2f}): I need the bike today, please help!")


if __name__ == "__main__":
    main()
