"""How many operations one training step hands to the device, by lanes: what a GPU has to launch.

    python benchmarks/launches.py
    python benchmarks/launches.py --lanes 1,64 --layers 24 --operations

A step of eight sentences is bound by launches on a GPU, and lanes help as far as one launch serves
all of them. The count does not depend on the width of the base nor on the hardware, so it is made
on the CPU, on a narrow base with random weights, with the form of the step that a GPU takes
(``--form cpu``: the form that a CPU takes). An operation of torch that is no view and allocates no
more than memory counts as one; a few launch two or three kernels.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from gpu import TASK, Scale, Size, make_checkpoint, random_features
from torch.utils._python_dispatch import TorchDispatchMode

from bitfit.bench.ours import side_by_side
from bitfit.bench.work import Work
from bitfit.encoder import Encoder, open_encoder
from bitfit.leaves import RowIndex
from bitfit.training import train
from bitfit.training.train import pass_tokens

FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach",
        "alias", "_unsafe_view", "lift_fresh", "resize_"}  # fmt: skip
WAITS = {"_local_scalar_dense", "nonzero", "unique_consecutive", "_unique2", "unique_dim"}
WARM_UP, HIDDEN, HEADS = 2, 32, 4


class Counted(TorchDispatchMode):
    """Counts operations that a device would run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in FREE:
            self.operations[name] += 1
        return func(*args, **(kwargs or {}))


def count(
    encoder: Encoder, base: str, lanes: int, batch_size: int, vocabulary: int
) -> Counter[str]:
    """Return the operations of one step, after some others."""
    features = random_features("mrpc", (WARM_UP + 1) * lanes * batch_size, vocabulary)
    batches = [features[i : i + batch_size] for i in range(0, len(features), batch_size)]
    work = Work(base=base, device=encoder.device, task=TASK, batches=batches, lanes=lanes)
    run = side_by_side(work, encoder)
    for number in range(WARM_UP):
        run.step(number)
    with Counted() as counted:
        run.step(WARM_UP)
    return counted.operations


@contextmanager
def as_on(form: str) -> Iterator[None]:
    """Let the CPU take the form of step that a device takes."""
    if form == "cpu":
        yield
        return
    tokens = pass_tokens(torch.device("cuda"))
    with (
        patch.object(train, "draws_jointly", lambda device: True),
        patch.object(train, "pass_tokens", lambda device: tokens),
        patch.object(RowIndex, "sum_by_row", RowIndex._sum_segments),
    ):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lanes", default="1,4,16,64", help="between commas")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--form", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--operations", action="store_true", help="also by name, the most first")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    numbers = args.lanes.split(",")
    if not all(number.isdecimal() and int(number) for number in numbers):
        parser.error(f"--lanes {args.lanes}: expected numbers from 1 between commas, as 1,64")
    scale = Scale(sizes={}, vocabulary=120)
    config = {"hidden_size": HIDDEN, "num_hidden_layers": args.layers,
              "num_attention_heads": HEADS, "intermediate_size": 4 * HIDDEN}  # fmt: skip
    found: dict[int, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "base"
        make_checkpoint(path, scale, Size(name="narrow", config=config), torch.device("cpu"))
        encoder = open_encoder(str(path), "fp32", "cpu")
        with as_on(args.form):
            for lanes in map(int, numbers):
                found[lanes] = count(encoder, str(path), lanes, args.batch_size, scale.vocabulary)
    if args.json:
        print(json.dumps({"layers": args.layers, "operations": found}))
        return
    for lanes, operations in found.items():
        waits = sum(operations[name] for name in WAITS)
        total = operations.total()
        each = total / lanes
        print(f"{lanes:4d} lanes: {total:6,} operations, {each:8,.1f} a lane, {waits} waits")
        if args.operations:
            for name, number in operations.most_common(25):
                print(f"{number:12,} {name}")


if __name__ == "__main__":
    main()
