"""What parts of answering many tasks at once are worth, each by CPU time on one thread, in turns.

python benchmarks/inference.py sharing --data glue_data      # 20 tasks on one text
python benchmarks/inference.py operations                    # mixed beside folded, one by one
python benchmarks/inference.py attention --data glue_data    # groups of like length, or padded
python benchmarks/inference.py storage --data glue_data --task sst2.bitfit.safetensors
python benchmarks/inference.py int8 --data glue_data --task sst2.bitfit.safetensors
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from step import all_padded_to_the_longest
from torch import Tensor

import bitfit
from bitfit.bank import Bank, Layout
from bitfit.batches import Feature, pack
from bitfit.bench.contenders import random_task
from bitfit.bench.serve import make_plan
from bitfit.bench.work import choose_sources, read_source
from bitfit.encoder import Encoder, open_encoder
from bitfit.held import HeldTasks
from bitfit.leaves import BankedLinear
from bitfit.rounding import STORAGE_TYPES
from bitfit.terms import choose_sites

TASKS, TEXTS, ROUNDS = 20, 4, 12
TERMS = ("all", "all@2-5", "all@4-5", "all@5")


def in_turns(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median CPU seconds of each call; one round warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            began = time.thread_time()
            call()
            if number:
                times[name].append(time.thread_time() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def show_sharing(args: argparse.Namespace) -> None:
    """Several tasks on one text, with the layers shared that none of them touches, and without."""
    plan = make_plan(dtype="fp32", data=args.data)
    encoder, features = plan.encoder, plan.requests[0].features[:TEXTS]
    share = encoder.share
    for terms in TERMS:
        tasks, held = HeldTasks(encoder), []
        layout = Layout(choose_sites(encoder.sites, terms, inert=encoder.inert_terms))
        for seed in range(TASKS):
            bias = torch.randn(layout.n, generator=torch.Generator().manual_seed(seed)) * 0.01
            file = dataclasses.replace(
                random_task(encoder, seed), layout=layout.to_json(), bias=bias
            )
            held.append(tasks.hold(f"t{seed}", tasks.fit(file), bias))
        each = [feature for feature in features for _ in held]

        def run(how: Any, tasks: Any = tasks, each: Any = each, held: Any = held) -> None:
            encoder.share = how
            tasks.logits(each, held * TEXTS)

        took = in_turns(
            {"shared": lambda r=run: r(share), "apart": lambda r=run: r(lambda *_: None)}, ROUNDS
        )
        print(f"{terms:10} with sharing to without: {took['apart'] / took['shared']:.2f}")


def show_operations(args: argparse.Namespace) -> None:
    """A row's bias in place of one that all tokens have, operation by operation."""
    lengths = torch.from_numpy(np.random.default_rng(0).integers(6, 40, 32))
    tokens, index = int(lengths.sum()), torch.repeat_interleave(torch.arange(32), lengths)
    ones = F.one_hot(index, 32).float()
    x, y = torch.randn(tokens, 384), torch.randn(tokens, 384)
    rows, bias = torch.randn(32, 384), torch.randn(384)
    wide_rows, wide_bias = torch.randn(32, 1536), torch.randn(1536)
    weight, wide = torch.randn(384, 384), torch.randn(1536, 384)
    encoder = open_encoder("minilm", "fp32", "cpu")
    bank = Bank(Layout(encoder.sites), encoder.device)
    for task in range(1000):
        bank.add(str(task), torch.randn(bank.layout.n) * 0.01)
    chosen, base = range(0, 1000, 32), encoder.biases(bank.layout)

    def stretch_by_stretch() -> None:
        for part, row in zip(y.split(lengths.tolist()), rows.unbind(0), strict=True):
            part.add_(row)

    took = in_turns({
        "384 x 384, a bias": lambda: F.linear(x, weight, bias),
        "384 x 384, gathered rows": lambda: rows.index_select(0, index).addmm_(x, weight.t()),
        "384 x 1536, a bias": lambda: F.linear(x, wide, wide_bias),
        "384 x 1536, gathered rows": lambda: wide_rows.index_select(0, index).addmm_(x, wide.t()),
        "rows added: gathered": lambda: y.add_(rows.index_select(0, index)),
        "rows added: stretch by stretch": stretch_by_stretch,
        "rows added: a product with ones": lambda: y.addmm_(ones, rows),
        "biases of 32 of 1,000 tasks": lambda: bank.biases(chosen, base),
    }, 60)  # fmt: skip
    for name, seconds in took.items():
        print(f"{name:34} {1000 * seconds:6.2f} ms")


def show_attention(args: argparse.Namespace) -> None:
    """A batch encoded with attention in groups of like length, and padded to its longest."""
    encoder = open_encoder("minilm", "fp32", "cpu")
    made: dict[str, list[list[Feature]]] = {}
    for source in choose_sources(args.data, (), ("sst2", "mrpc"), ("intent",)):
        _, found = read_source(encoder, source)
        for count in (8, 32, 128):
            made[f"{count} of {source[0]}"] = [
                found[i * count : (i + 1) * count] for i in range(ROUNDS + 1)
            ]
    long, short = (
        Feature(np.full(n, 1000), np.zeros(n, dtype=np.int64), 0) for n in (128, 15)
    )  # fmt: skip
    made["one of 128 tokens, 60 of 15"] = [[long, *[short] * 60]] * (ROUNDS + 1)

    def encode(batches: Iterator[list[Feature]], form: Callable[[], Any]) -> None:
        with form():
            encoder.encode(pack(next(batches)), {})

    for title, batches in made.items():
        took = in_turns({
            "groups": partial(encode, iter(batches), nullcontext),
            "padded": partial(encode, iter(batches), all_padded_to_the_longest),
        }, ROUNDS)  # fmt: skip
        grouped, one = (1000 * took[name] for name in ("groups", "padded"))
        print(f"{title:28} {grouped:7.1f} ms in groups, {one:7.1f} ms padded: {one / grouped:.2f}")


def show_storage(args: argparse.Namespace) -> None:
    """What keeping rows in fewer bits changes in the answers of a task."""
    encoder = open_encoder("minilm", "fp32")
    first: Any = None
    for storage in STORAGE_TYPES:
        model = bitfit.load(args.task, base=encoder, storage=storage)
        first = show_answers(storage, model, args, first)


def show_answers(name: str, model: Any, args: argparse.Namespace, first: Any) -> Any:
    """Print a model's accuracy on dev and how it differs from ``first``; return what that is."""
    task = next(iter(model.tasks))
    config = bitfit.DataConfig(data=args.data, task=task, splits=("dev",))
    rows = bitfit.read_dataset(config).splits["dev"]
    began = time.thread_time()
    logits = np.stack(model.logits(rows, [task] * len(rows))[1])
    seconds, found = time.thread_time() - began, logits.argmax(1)
    first = logits if first is None else first
    right = np.mean([answer == row.label for answer, row in zip(found, rows, strict=True)])
    changed = (found != first.argmax(1)).sum()
    print(
        f"{name:24} accuracy {100 * right:.2f}, answers changed {changed}, largest "
        f"difference of a logit {np.abs(logits - first).max():.5f}, {seconds:.1f} CPU s"
    )
    return first


def show_int8(args: argparse.Namespace) -> None:
    """Frozen weights in int8 on the CPU: answers of a task, and the time they take."""
    warnings.simplefilter("ignore")
    encoder = open_encoder("minilm", "fp32")
    first = show_answers("fp32", bitfit.load(args.task, base=encoder), args, None)
    for name, product_of in (
        ("int8, scale of a matrix", lambda w: dynamic(w, per_row=False)),
        ("int8, of a row", lambda w: dynamic(w, per_row=True)),
        ("and of a token", by_token),
    ):
        encoder = open_encoder("minilm", "fp32")
        quantize(encoder, product_of)
        show_answers(name, bitfit.load(args.task, base=encoder), args, first)


def dynamic(weight: Tensor, *, per_row: bool) -> Callable[[Tensor], Tensor]:
    """Return torch's own int8 product: one scale of the inputs for all tokens of a batch."""
    plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    plain.weight.data = weight.clone()
    quantization = torch.ao.quantization
    config = (
        quantization.per_channel_dynamic_qconfig
        if per_row
        else quantization.default_dynamic_qconfig
    )
    made = quantization.quantize_dynamic(torch.nn.Sequential(plain), {torch.nn.Linear: config})
    product: Callable[[Tensor], Tensor] = made[0]
    return product


def by_token(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Return an int8 product in which no token's rounding depends on the others of its batch."""
    rows = torch.zeros(len(weight), dtype=torch.long)
    rounded = torch.quantize_per_channel(weight, weight.abs().amax(1) / 127, rows, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(rounded, None)

    def product(x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True)
        # Seven bits: without VNNI the products of eight overflow the 16 bits they are summed in.
        y: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / largest, 1 / 63, 64, packed
        )
        return y.mul_(largest)

    return product


def quantize(encoder: Encoder, product_of: Callable[[Tensor], Callable[[Tensor], Tensor]]) -> None:
    """Let the matrix products of an encoder run in int8; good for one task at a time only."""
    for leaf in encoder.model.modules():
        if not isinstance(leaf, BankedLinear):
            continue
        product = product_of(leaf.weight)

        def forward(x: Any, leaf: Any = leaf, product: Any = product) -> Any:
            shift = leaf.state.shifts.get(leaf.path)
            return product(x) + (
                leaf.bias if shift is None else leaf.state.summed(leaf.bias, shift[0])
            )

        leaf.forward = forward


PARTS = {
    "sharing": show_sharing, "operations": show_operations, "attention": show_attention,
    "storage": show_storage, "int8": show_int8,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--data", help="the GLUE directory")
    parser.add_argument("--task", help="a task file of minilm on SST-2")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        PARTS[args.part](args)


if __name__ == "__main__":
    main()
