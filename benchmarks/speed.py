"""Training speed of one run against the paper's released recipe and the usual stock set-up.

    python benchmarks/speed.py                      # the shipped example's sentences
    python benchmarks/speed.py --data glue_data     # MRPC's lengths, as in the paper

All three train the same biases of the same base on the same batches, interleaved, and the median of
real (not padding) tokens per second is reported, beside the share of the roofline: 4 floating-point
operations per encoder weight and token at the rate of this machine's matrix product.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib import resources

import torch
import transformers

import bitfit
from bitfit.batches import make_features
from bitfit.encoder import measure_precision
from bitfit.heads import make_head
from bitfit.training.methods import make_method
from bitfit.training.settings import TrainConfig
from bitfit.training.train import Split, Trainer

BATCH = 8


def our_step(dataset: bitfit.Dataset, base: str) -> tuple[Callable[[int], int], Trainer]:
    """Return a function that takes one step and returns its real tokens."""
    encoder = bitfit.open_encoder(base, "fp32")
    config = TrainConfig(batch_size=BATCH, recipe="paper", schedule="constant", warmup_ratio=0.0)
    head = make_head(dataset.task, encoder, "auto")
    examples = dataset.splits["train"]
    features = make_features(encoder.base.tokenizer, dataset.task, examples, config.max_length)
    trainer = Trainer(
        encoder=encoder, task=dataset.task, head=head, method=make_method(encoder, head, config),
        config=config, train=Split(examples, features), dev=None,
    )  # fmt: skip

    def step(_: int) -> int:
        return trainer._step().tokens

    return step, trainer


def stock_step(trainer: Trainer, base: str, padding: str) -> Callable[[int], int]:
    """Return a step of stock parts: transformers' model, torch's AdamW, biases trainable."""
    source = bitfit.base.find_base(base)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=max(2, trainer.task.num_outputs)
    ).train()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    bitfit.select_biases(model, "all")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, eps=1e-6, weight_decay=0.0)

    def step(number: int) -> int:
        examples = [trainer.train.examples[i] for i in trainer._chosen(number)]
        pairs = [e.text_pair for e in examples]
        batch = tokenizer(
            [e.text for e in examples], None if pairs[0] is None else pairs, truncation=True,
            max_length=128, padding=padding, return_tensors="pt",
        )  # fmt: skip
        labels = torch.tensor([int(e.label) for e in examples])
        model(**batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return int(batch["attention_mask"].sum())

    return step


def measure(steps: dict[str, Callable[[int], int]], rounds: int) -> dict[str, float]:
    """Return the median real tokens per second of each, five steps of each in turn."""
    rates: dict[str, list[float]] = {name: [] for name in steps}
    number = 1
    for turn in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            tokens = sum(step(number + i) for i in range(5))
            if turn:  # the first turn warms up
                rates[name].append(tokens / (time.perf_counter() - began))
        number += 5
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a GLUE directory: MRPC's lengths")
    parser.add_argument("--base", default="minilm")
    parser.add_argument("--rounds", type=int, default=7, help="turns of five steps each")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.data:
        config = bitfit.DataConfig(data=args.data, task="mrpc")
    else:
        example = resources.files("bitfit") / "example" / "intent.train.csv"
        config = bitfit.DataConfig(data=str(example), dev_fraction=0.0)
    dataset = bitfit.read_dataset(config)
    ours, trainer = our_step(dataset, args.base)
    rates = measure(
        {
            "released recipe: fp32, padded to 128": stock_step(trainer, args.base, "max_length"),
            "stock: fp32, padded to the longest": stock_step(trainer, args.base, "longest"),
            "bitfit: fp32, packed": ours,
        },
        args.rounds,
    )
    gflops = measure_precision(trainer.encoder.device, trainer.encoder.hidden_size).gflops["fp32"]
    roofline = gflops * 1e9 / (4 * trainer.encoder.weights)
    slowest = rates["released recipe: fp32, padded to 128"]
    report = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "transformers": transformers.__version__,
        "task": dataset.task.name, "batch": BATCH, "gflops": gflops,
        "rows": [
            {"variant": name, "tokens_per_second": rate, "ratio": rate / slowest,
             "roofline": rate / roofline}
            for name, rate in rates.items()
        ],
    }  # fmt: skip
    if args.json:
        print(json.dumps(report))
        return
    print(f"{report['machine']}, torch {report['torch']}, {gflops:.0f} GFLOP/s, "
          f"{dataset.task.name}, batch {BATCH}")  # fmt: skip
    print("\n| variant | tokens/s | ratio | roofline |\n|---|---|---|---|")
    for row in report["rows"]:
        print(f"| {row['variant']} | {row['tokens_per_second']:,.0f} | {row['ratio']:.2f} | "
              f"{row['roofline']:.0%} |")  # fmt: skip


if __name__ == "__main__":
    main()
