"""Where the time of a training step goes, and what single changes to it were worth.

    python benchmarks/step.py --data glue_data                       # a profile of MRPC's steps
    python benchmarks/step.py --data glue_data --task sst2 --lanes 8
    python benchmarks/step.py --data glue_data --task sst2 --method full
    python benchmarks/step.py --data glue_data --method random --cpu-time    # no profiler
    python benchmarks/step.py --data glue_data --alternatives        # changes, in turns

Without ``--data`` on the sentences of the shipped example.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bitfit import attention, dropout, side_by_side
from bitfit.batches import Batch
from bitfit.bench import ours
from bitfit.bench.work import Table, choose_sources, make_table, read_source
from bitfit.dropout import Draw, StepDropout
from bitfit.encoder import open_encoder
from bitfit.side_by_side import SideBySide
from bitfit.training import train

GROUPS = {
    "products of the encoder": ("aten::addmm", "aten::addmm_", "aten::mm"),
    "products of attention": ("aten::bmm", "aten::baddbmm"),
    "GELU and its backward": ("aten::gelu", "aten::gelu_backward"),
    "random bits": ("aten::random_",),
    "copies": ("aten::copy_",),
    "softmax and its backward": ("aten::_softmax", "aten::_softmax_backward_data"),
    "gathers": ("aten::index_select", "aten::index_copy_"),
    "filling (gradients of embeddings)": ("aten::fill_",),
    "AdamW": ("aten::_fused_adam_",),
}
WARM_UP = 2


def attention_by_autograd(
    q: Tensor, k: Tensor, v: Tensor, layout: SideBySide, scaling: float, draw: Draw
) -> Tensor:
    """What ``_DroppedAttention`` took the place of: the same with autograd's own backward."""
    rows = [layout.split_rows(layout.lay(x)) for x in (q, k, v)]
    weights = []
    for q_, k_, mask in zip(*rows[:2], layout.score_masks(q.dtype), strict=True):
        scores = torch.matmul(q_ * scaling, k_.mT)
        weights.append(torch.softmax(scores if mask is None else scores + mask, dim=-1).flatten())
    dropped = torch.cat(weights)
    dropped = dropped * draw(dropped)
    contexts = [
        torch.matmul(kept, v_).flatten(0, 1)
        for kept, v_ in zip(layout.split_scores(dropped), rows[2], strict=True)
    ]
    return layout.take(torch.cat(contexts))


def all_padded_to_the_longest() -> Any:
    """Attention of a batch as one rectangle."""

    def one_group(sizes: Sequence[int], heads: int) -> list[list[int]]:
        return [list(range(len(sizes)))]

    return patch.object(side_by_side, "group_by_length", one_group)


def attention_lane_by_lane(
    masks: StepDropout, batch: Batch, heads: int, rate: float
) -> list[tuple[SideBySide, Draw]]:
    """Attention of each lane's batch by itself."""
    return masks.run_by_run(heads, dropout.attention_rates(masks.runs, rate))


def masks_of_bools(bits: Tensor, rate: float, dtype: torch.dtype) -> Tensor:
    """Dropout factors by way of a mask of bools."""
    dropped = round(rate * 65536)
    return (bits >= dropped - 32768).to(dtype).mul_(65536 / (65536 - dropped))


def passes_of(tokens: int) -> Callable[[], Any]:
    """Forward passes of several lanes that take so many tokens."""
    return lambda: patch.object(train, "pass_tokens", lambda device: tokens)


# What stands in for what, by name. Each is worth what the step loses by it.
ALTERNATIVES: dict[str, Callable[[], Any]] = {
    "attention by autograd": lambda: patch.object(
        attention._DroppedAttention, "apply", attention_by_autograd
    ),
    "attention padded to the longest of the batch": all_padded_to_the_longest,
    "attention lane by lane": lambda: patch.object(
        StepDropout, "attention", attention_lane_by_lane
    ),
    "dropout masks by way of bools": lambda: patch.object(dropout, "factors", masks_of_bools),
    "passes of up to 1,024 tokens": passes_of(1024),
    "passes of up to 2,048 tokens": passes_of(2048),
    "passes of up to 8,192 tokens": passes_of(8192),
    "all lanes in one pass": passes_of(1 << 30),
}


def make_step(args: argparse.Namespace, steps: int) -> tuple[Callable[[int], None], Table]:
    """Return our training step on given batches, and those."""
    encoder = open_encoder(args.base, "fp32", "cpu")
    (source,) = choose_sources(args.data, (args.task,) if args.task else (), ("mrpc",), ("intent",))
    task, features = read_source(encoder, source)
    table = make_table(
        args.base, encoder.device, task, features, args.batch_size, steps, args.lanes
    )
    return ours.side_by_side(table.work, encoder, args.method).step, table


def show_profile(args: argparse.Namespace) -> None:
    """Print the share of a step's time that each group of operations takes by itself."""
    step, table = make_step(args, WARM_UP + args.steps)
    for number in range(WARM_UP):
        step(number)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for number in range(WARM_UP, WARM_UP + args.steps):
            step(number)
    spent = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    total = sum(spent.values())
    print(f"{_about(args, table)}: {total / args.steps / 1000:.0f} ms a step\n")
    print("| operations | share |\n|---|---|")
    rest = total
    for name, keys in GROUPS.items():
        time_of = sum(spent.get(key, 0.0) for key in keys)
        rest -= time_of
        print(f"| {name} | {time_of / total:.1%} |")
    print(f"| all others | {rest / total:.1%} |")


def show_cpu_time(args: argparse.Namespace) -> None:
    """Print the CPU time of a step, without the profiler's own."""
    step, table = make_step(args, WARM_UP + args.steps)
    for number in range(WARM_UP):
        step(number)
    began = time.process_time()
    for number in range(WARM_UP, WARM_UP + args.steps):
        step(number)
    spent = (time.process_time() - began) / args.steps
    print(f"{_about(args, table)}: {1000 * spent:.0f} ms of CPU a step")


def show_alternatives(args: argparse.Namespace) -> None:
    """Print how much longer a step takes with something else in place of what is there."""
    step, table = make_step(args, WARM_UP + args.steps)
    seconds: dict[str, list[float]] = {name: [] for name in ("as it is", *ALTERNATIVES)}
    names = list(seconds)
    for number in range(WARM_UP + args.steps):
        first = number % len(names)  # none always follows the same
        for name in names[first:] + names[:first]:
            with _replaced(name):
                began = time.perf_counter()
                step(number)
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - began)
    print(f"{_about(args, table)}: median of {args.steps} steps in turns\n")
    print("| in its place | time of a step, median ratio |\n|---|---|")
    for name in ALTERNATIVES:
        pairs = zip(seconds[name], seconds["as it is"], strict=True)
        print(f"| {name} | {statistics.median(a / b for a, b in pairs):.2f} |")


@contextmanager
def _replaced(name: str) -> Iterator[None]:
    if name not in ALTERNATIVES:
        yield
        return
    with ALTERNATIVES[name]():
        yield


def _about(args: argparse.Namespace, table: Table) -> str:
    return (
        f"{table.work.task.name}, {args.method}, batch {args.batch_size}, {args.lanes} lane(s), "
        f"{table.mean_tokens:.0f} tokens a batch, {torch.get_num_threads()} thread(s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="the GLUE directory")
    parser.add_argument("--task", help="a built-in task, or one of the example's")
    parser.add_argument("--base", default="minilm")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--method", default="bitfit", help="one that has no lanes: --lanes 1")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--alternatives", action="store_true", help="changes and not a profile")
    other.add_argument("--cpu-time", action="store_true", help="the time of a step alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shows = {"alternatives": show_alternatives, "cpu_time": show_cpu_time}
    next((show for name, show in shows.items() if getattr(args, name)), show_profile)(args)


if __name__ == "__main__":
    main()
