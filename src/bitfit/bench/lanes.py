"""``bitfit bench lanes``: runs side by side against the same runs one after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from bitfit.bench.memory import peak_memory
from bitfit.bench.ours import one_after_another, side_by_side
from bitfit.bench.plan import Plan, check_choices, plan_groups
from bitfit.bench.runs import Timed, Variant, product_tokens, products_name, ratio, time_in_turns
from bitfit.bench.timing import medians
from bitfit.bench.variants import choose_ours
from bitfit.bench.work import Table, choose_sources, make_table, read_source
from bitfit.demo import TASKS as EXAMPLE_TASKS
from bitfit.encoder import Encoder, open_encoder
from bitfit.errors import UsageError

GLUE_TASKS = ("sst2", "mrpc")
LANES = (1, 4, 16, 64)
BATCH_SIZE = 8


def make_plan(
    *,
    base: str = "minilm",
    data: str | None = None,
    tasks: Sequence[str] = (),
    lanes: Sequence[int] = LANES,
    batch_size: int = BATCH_SIZE,
    rounds: int = 5,
    memory: bool = True,
    dtype: str = "auto",
    device: str = "auto",
) -> Plan:
    """Read the data, look at the machine, and return what would be run.

    Args:
        base: ``"minilm"``, a directory, or a name on the model hub.
        data: a GLUE directory; None: the example's sentences that come with the package.
        tasks: built-in tasks, or the example's; empty: SST-2 and MRPC, or all the example's.
        lanes: numbers of runs.
        batch_size: sequences in a step of one run.
        rounds: how often all have their turn, beside one to warm up.
        memory: measure peak memory too, each number of lanes in a process of its own.
        dtype: ``auto``, ``fp32`` or ``bf16``; see :func:`choose_ours`.
        device: ``auto``, ``cpu``, ``cuda``.

    Raises:
        UsageError: a task, a number or a precision that cannot be meant, or a base whose runs
            cannot share a forward pass.
        DataError: data that cannot be read.
        BaseModelError: a base that cannot be loaded.
    """
    check_choices(dtype, rounds, batch_size, min(lanes, default=0))
    sources = choose_sources(data, tasks, GLUE_TASKS, tuple(EXAMPLE_TASKS))
    encoder = open_encoder(base, "fp32", device)
    if not encoder.shares_passes:
        raise UsageError(f"base {base!r} does not run packed: its runs cannot share a forward pass")
    groups = [
        [
            make_table(base, encoder.device, task, features, batch_size, rounds, count)
            for count in dict.fromkeys(lanes)
        ]
        for task, features in (read_source(encoder, source) for source in sources)
    ]

    def choose(gflops: Mapping[str, float], favoured: str) -> Sequence[Variant]:
        ours = choose_ours(dtype, favoured)
        return [v for of_bitfit in ours for v in _both_ways(of_bitfit, encoder, base)]

    return plan_groups(encoder, groups, choose, rounds, ("ours",) if memory else ())


def _both_ways(ours: Variant, fp32: Encoder, base: str) -> tuple[Variant, Variant]:
    """Return the runs side by side and one after another, over one encoder."""

    @cache
    def encoder() -> Encoder:
        if ours.precision == "fp32":
            return fp32
        return open_encoder(base, ours.precision, str(fp32.device))

    return (
        dataclasses.replace(ours, build=lambda work: side_by_side(work, encoder())),
        dataclasses.replace(
            ours, name=_alone(ours.precision), group="alone",
            build=lambda work: one_after_another(work, encoder()),
        ),
    )  # fmt: skip


def _alone(precision: str) -> str:
    return f"alone-{precision}"


def run_tables(
    plan: Plan, on_turn: Callable[[str], None] = lambda what: None
) -> Iterator[dict[str, Any]]:
    """Run the plan and yield a table for each task, ready for JSON, when it is done."""
    for group in plan.groups:
        yield _run_group(plan, group, on_turn)


def _run_group(
    plan: Plan, group: Sequence[Table], on_turn: Callable[[str], None]
) -> dict[str, Any]:
    task = group[0].work.task.name
    timed = time_in_turns(
        plan.encoder,
        {_entry(v.name, table): (v, table) for table in group for v in plan.variants},
        plan.rounds, plan.slow, lambda name: on_turn(f"{task}: {name}"),
    )  # fmt: skip
    ours = [variant for variant in plan.variants if variant.group == "ours"]
    rows = make_rows(ours, group, timed, plan.encoder.weights)
    places = [(variant, table) for variant in ours for table in group]
    for row, (variant, table) in zip(rows, places, strict=True):
        if variant.name in plan.memory:
            on_turn(f"{task}: memory of {_entry(variant.name, table)}")
            row["peak_memory_bytes"] = peak_memory(variant, table.work)
    return {
        "task": task,
        "batch_size": group[0].batch_size,
        "tokens_per_batch": max(group, key=lambda table: len(table.work.batches)).mean_tokens,
        "rows": rows,
    }


def _entry(variant: str, table: Table) -> str:
    return f"{variant}, {table.work.lanes} lane{'s' if table.work.lanes > 1 else ''}"


def make_rows(
    ours: Sequence[Variant], group: Sequence[Table], timed: Timed, weights: int
) -> list[dict[str, Any]]:
    """Return a row per precision and number of lanes, from the medians.

    Args:
        ours: the runs side by side, one variant a precision.
        group: the tables of a task, one a number of lanes.
        timed: what was measured, of these and of the same runs one after another.
        weights: numbers in the encoder's matrices.
    """
    found = medians(timed.values)
    rows = []
    for variant in ours:
        rates = {table.work.lanes: found[_entry(variant.name, table)] for table in group}
        for table in group:
            name = _entry(variant.name, table)
            alone = _entry(_alone(variant.precision), table)
            rate, tokens = found[name], product_tokens(table)
            gflops = found[products_name(variant.precision, tokens)]
            bound = gflops * 1e9 / (variant.flops * weights)
            rows.append({
                "lanes": table.work.lanes,
                "precision": variant.precision,
                "tokens_per_second": rate,
                "alone_tokens_per_second": found[alone],
                "ratio": ratio(rate, found[alone]),
                "ratio_to_one_lane": ratio(rate, rates.get(1)),
                "product_tokens": tokens,
                "gflops": gflops,
                "roofline_tokens_per_second": bound,
                "roofline_fraction": ratio(rate, bound),
                "peak_memory_bytes": None,
                **timed.sizes[name],
                "rounds": timed.values[name],
                "alone_rounds": timed.values[alone],
            })  # fmt: skip
    return rows
