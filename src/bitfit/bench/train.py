"""``bitfit bench train``: training steps of ours and of others, in turns on the same batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bitfit.bench.memory import peak_memory
from bitfit.bench.plan import Plan, check_choices, plan_groups
from bitfit.bench.runs import (
    Variant,
    count_bytes,
    product_tokens,
    products_name,
    ratio,
    time_in_turns,
)
from bitfit.bench.timing import medians
from bitfit.bench.variants import choose_variants
from bitfit.bench.work import Table, choose_sources, make_table, read_source
from bitfit.demo import TASKS as EXAMPLE_TASKS
from bitfit.encoder import open_encoder

PAPER_TASKS = ("mrpc", "sst2", "stsb")
BATCH_SIZES = (8, 32)


def make_plan(
    *,
    base: str = "minilm",
    data: str | None = None,
    tasks: Sequence[str] = (),
    batch_sizes: Sequence[int] = BATCH_SIZES,
    rounds: int = 5,
    memory: bool = True,
    dtype: str = "auto",
    device: str = "auto",
) -> Plan:
    """Read the data, look at the machine, and return what would be run.

    Args:
        base: ``"minilm"``, a directory, or a name on the model hub.
        data: a GLUE directory; None: the example's sentences that come with the package.
        tasks: built-in tasks, or the example's; empty: MRPC, SST-2 and STS-B, or all the example's.
        batch_sizes: sequences in a step.
        rounds: how often every variant has its turn, beside one to warm up.
        memory: measure peak memory too, each variant in a process of its own.
        dtype: ``auto``, ``fp32`` or ``bf16``, of ours; see :func:`choose_variants`.
        device: ``auto``, ``cpu``, ``cuda``.

    Raises:
        UsageError: a task, a number or a precision that cannot be meant.
        DataError: data that cannot be read.
        BaseModelError: a base that cannot be loaded.
    """
    check_choices(dtype, rounds, min(batch_sizes, default=0))
    sources = choose_sources(data, tasks, PAPER_TASKS, tuple(EXAMPLE_TASKS))
    encoder = open_encoder(base, "fp32", device)
    groups = [
        [make_table(base, encoder.device, task, features, size, rounds)]
        for task, features in (read_source(encoder, source) for source in sources)
        for size in batch_sizes
    ]

    def choose(gflops: Mapping[str, float], favoured: str) -> Sequence[Variant]:
        return choose_variants(dtype, gflops, favoured)

    return plan_groups(encoder, groups, choose, rounds, None if memory else ())


def run_tables(
    plan: Plan, on_turn: Callable[[str], None] = lambda what: None
) -> Iterator[dict[str, Any]]:
    """Run the plan and yield each table, ready for JSON, when it is done."""
    for table in plan.tables:
        yield _run_table(plan, table, on_turn)


def _run_table(plan: Plan, table: Table, on_turn: Callable[[str], None]) -> dict[str, Any]:
    work, tokens = table.work, product_tokens(table)
    where = f"{work.task.name}, batch {table.batch_size}"
    timed = time_in_turns(
        plan.encoder, {v.name: (v, table) for v in plan.variants}, plan.rounds, plan.slow,
        lambda name: on_turn(f"{where}: {name}"),
    )  # fmt: skip
    peaks: dict[str, int | None] = {}
    for variant in plan.variants:
        if variant.name in plan.memory and variant.name not in timed.notes:
            on_turn(f"{where}: memory of {variant.name}")
            peaks[variant.name] = peak_memory(variant, work)
    found = medians(timed.values)
    gflops = {v.precision: found[products_name(v.precision, tokens)] for v in plan.variants}
    rows = make_rows(plan.variants, found, gflops, plan.encoder.weights)
    for row in rows:
        name = row["variant"]
        row |= {
            "peak_memory_bytes": peaks.get(name), **timed.sizes.get(name, count_bytes(None)),
            "rounds": timed.values.get(name, []), "note": timed.notes.get(name),
        }  # fmt: skip
    return {
        "task": work.task.name,
        "batch_size": table.batch_size,
        "tokens_per_batch": table.mean_tokens,
        "gflops": gflops,
        "best_stock": fastest(plan.variants, found, "stock"),
        "best_full": fastest(plan.variants, found, "full"),
        "rows": rows,
    }


def fastest(variants: Sequence[Variant], rates: Mapping[str, float], group: str) -> str | None:
    """Return the name of the fastest variant of a group; None: none was measured."""
    names = [v.name for v in variants if v.group == group and v.name in rates]
    return max(names, key=lambda name: rates[name], default=None)


def make_rows(
    variants: Sequence[Variant],
    rates: Mapping[str, float],
    gflops: Mapping[str, float],
    weights: int,
) -> list[dict[str, Any]]:
    """Return a row per variant from the medians; what was not measured is None.

    Args:
        variants: in the order of the rows.
        rates: real tokens per second, by variant.
        gflops: of the encoder's matrix products, by precision.
        weights: numbers in the encoder's matrices.
    """
    stock = fastest(variants, rates, "stock")
    rows = []
    for variant in variants:
        rate = rates.get(variant.name)
        bound = gflops[variant.precision] * 1e9 / (variant.flops * weights)
        rows.append({
            "variant": variant.name,
            "title": variant.title,
            "precision": variant.precision,
            "tokens_per_second": rate,
            "ratio": ratio(rate, rates.get("released")),
            "ratio_to_best_stock": ratio(rate, rates.get(stock or "")),
            "roofline_tokens_per_second": bound,
            "roofline_fraction": ratio(rate, bound),
        })  # fmt: skip
    return rows
