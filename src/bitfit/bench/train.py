"""``bitfit bench train``: training steps of ours and of others, in turns on the same batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitfit.base import choose_device
from bitfit.batches import Feature, make_features
from bitfit.bench.memory import is_known, peak_memory
from bitfit.bench.timing import (
    PRODUCT_REPEATS,
    Products,
    describe_machine,
    describe_versions,
    in_turns,
    medians,
    slow_precisions,
    timed,
)
from bitfit.bench.variants import MAX_LENGTH, Run, Unavailable, Variant, Work, choose_variants
from bitfit.data import DataConfig, read_dataset
from bitfit.demo import TASKS as EXAMPLE_TASKS
from bitfit.demo import example_files
from bitfit.encoder import DTYPES, Encoder, measure_precision, open_encoder
from bitfit.errors import UsageError
from bitfit.tasks import Task, builtin_task

PAPER_TASKS = ("mrpc", "sst2", "stsb")
BATCH_SIZES = (8, 32)
SEQUENCES_A_TURN = 40
# For the estimate only: the share of the products' rate that a step reaches, as first measured.
USUAL_SHARE = 0.5
MEMORY_SECONDS = 12.0


@dataclass(frozen=True, kw_only=True)
class Table:
    """One task at one batch size: what is run there."""

    work: Work
    batch_size: int
    steps: int
    """In a turn; the batches of round r are ``r * steps`` up to ``(r + 1) * steps``."""

    @property
    def mean_tokens(self) -> float:
        """Real tokens of a batch, on average."""
        return sum(map(self.work.tokens, range(len(self.work.batches)))) / len(self.work.batches)

    def numbers(self, turn: int) -> range:
        """Return the batches of a round."""
        return range(turn * self.steps, (turn + 1) * self.steps)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that ``bitfit bench train`` is about to do."""

    encoder: Encoder
    """The base in fp32, for its shapes and its tokenizer."""
    variants: Sequence[Variant]
    tables: Sequence[Table]
    rounds: int
    memory: bool
    slow: frozenset[str]
    """Precisions several times slower than fp32 here: timed in one round, on one step."""
    seconds: float
    """About how long it takes."""

    @property
    def turns(self) -> int:
        """How often ``on_turn`` is called by :func:`run_tables` where every variant is there."""
        each = len(self.variants) * (self.rounds + 1 + self.memory)
        products = len({v.precision for v in self.variants}) * (self.rounds + 1)
        return len(self.tables) * (each + products)


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
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    if rounds < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise UsageError("rounds and batch sizes are numbers from 1 up")
    place = choose_device(device)
    sources = [_source(name, data) for name in tasks or (PAPER_TASKS if data else EXAMPLE_TASKS)]
    encoder = open_encoder(base, "fp32", device)
    tables = [
        _make_table(task, features, size, rounds, base, place)
        for task, features in (_read(encoder, config) for config in sources)
        for size in batch_sizes
    ]
    precision = measure_precision(place, encoder.hidden_size)
    gflops = dict(precision.gflops)
    favoured = next(name for name, kind in DTYPES.items() if kind == precision.dtype)
    variants = choose_variants(dtype, gflops, favoured)
    memory = memory and is_known(place)
    slow = slow_precisions(gflops)
    seconds = estimate(encoder.weights, variants, tables, gflops, slow)
    seconds += memory * len(tables) * len(variants) * MEMORY_SECONDS
    return Plan(
        encoder=encoder, variants=variants, tables=tables, rounds=rounds, memory=memory,
        slow=slow, seconds=seconds,
    )  # fmt: skip


def _source(name: str, data: str | None) -> tuple[str, DataConfig]:
    if data is not None:
        kind = builtin_task(name).task.kind
        if kind not in ("classification", "regression"):
            raise UsageError(f"task {name!r} is {kind}; bench trains classification and regression")
        return name, DataConfig(data=data, task=name, splits=("train",))
    if name not in EXAMPLE_TASKS:
        raise UsageError(
            f"task {name!r} is none of the example's ({', '.join(EXAMPLE_TASKS)}); "
            "for those of GLUE give --data with the GLUE folder"
        )
    train, _ = example_files(name)
    return name, DataConfig(data=train, text="text", label="label", dev_fraction=0.0)


def _read(encoder: Encoder, source: tuple[str, DataConfig]) -> tuple[Task, list[Feature]]:
    name, config = source
    dataset = read_dataset(config)
    length = encoder.clamp_length(MAX_LENGTH)
    # A few thousand rows have the lengths of all; QQP has 364,000.
    order = np.random.default_rng(0).permutation(len(dataset.splits["train"]))[:4000]
    examples = [dataset.splits["train"][i] for i in order]
    features = make_features(encoder.base.tokenizer, dataset.task, examples, length).items
    return dataclasses.replace(dataset.task, name=name), features


def _make_table(
    task: Task, features: Sequence[Feature], size: int, rounds: int, base: str, device: torch.device
) -> Table:
    steps = max(1, SEQUENCES_A_TURN // size)
    count = steps * (rounds + 1)
    batches = [
        [features[(number * size + i) % len(features)] for i in range(size)]
        for number in range(count)
    ]
    work = Work(base=base, device=device, task=task, batches=batches)
    return Table(work=work, batch_size=size, steps=steps)


def estimate(
    weights: int,
    variants: Sequence[Variant],
    tables: Sequence[Table],
    gflops: Mapping[str, float],
    slow: Collection[str] = (),
) -> float:
    """Return about how many seconds the turns take: padding included, half the products' rate."""
    seconds = 0.0
    for table in tables:
        for variant in variants:
            batches = table.work.batches[:1] if variant.precision in slow else table.work.batches
            tokens = sum(_computed_tokens(batch, variant.pads_to) for batch in batches)
            rate = USUAL_SHARE * gflops[variant.precision] * 1e9
            seconds += variant.flops * weights * tokens / rate
    return seconds


def _computed_tokens(batch: Sequence[Feature], pads_to: str) -> int:
    """Return the tokens of a batch with its padding."""
    lengths = [len(feature) for feature in batch]
    if pads_to == "packed":
        return sum(lengths)
    return len(lengths) * (max(lengths) if pads_to == "longest" else MAX_LENGTH)


def run_tables(
    plan: Plan, on_turn: Callable[[str], None] = lambda what: None
) -> Iterator[dict[str, Any]]:
    """Run the plan and yield each table, ready for JSON, when it is done."""
    for table in plan.tables:
        yield _run_table(plan, table, on_turn)


def describe(plan: Plan, command: str) -> dict[str, Any]:
    """Return what stands above the tables: machine, versions, command, and how it was measured."""
    return {
        "command": command,
        "hardware": describe_machine(plan.encoder.device),
        "versions": describe_versions(),
        "base": plan.encoder.base.name,
        "encoder_weights": plan.encoder.weights,
        "max_length": MAX_LENGTH,
        "rounds": plan.rounds,
        "sequences_a_turn": SEQUENCES_A_TURN,
    }


def _run_table(plan: Plan, table: Table, on_turn: Callable[[str], None]) -> dict[str, Any]:
    work = table.work
    where = f"{work.task.name}, batch {table.batch_size}"
    values, sizes, notes = _time_table(plan, table, lambda name: on_turn(f"{where}: {name}"))
    peaks: dict[str, int | None] = {}
    if plan.memory:
        for variant in plan.variants:
            if variant.name not in notes:
                on_turn(f"{where}: memory of {variant.name}")
                peaks[variant.name] = peak_memory(variant, work)
    found = medians(values)
    gflops = {p: found.pop(_products(p)) for p in DTYPES if _products(p) in found}
    rows = make_rows(plan.variants, found, gflops, plan.encoder.weights)
    for row in rows:
        name = row["variant"]
        row |= {
            "peak_memory_bytes": peaks.get(name), **sizes.get(name, count_bytes(None)),
            "rounds": values.get(name, []), "note": notes.get(name),
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


def _products(precision: str) -> str:
    return f"products in {precision}"


def _time_table(
    plan: Plan, table: Table, on_turn: Callable[[str], None]
) -> tuple[dict[str, list[float]], dict[str, dict[str, int | None]], dict[str, str]]:
    """Return by name what was measured in each round, the bytes, and why a variant is missing."""
    device, tokens = plan.encoder.device, round(table.mean_tokens)
    measures: dict[str, Callable[[int], float]] = {}
    once: set[str] = set()
    for precision in {v.precision: None for v in plan.variants}:
        product, is_slow = Products(plan.encoder, tokens, precision), precision in plan.slow
        measures[_products(precision)] = partial(
            _gflops, product, 1 if is_slow else PRODUCT_REPEATS
        )
        once |= {_products(precision)} if is_slow else set()
    runs: dict[str, Run] = {}
    notes: dict[str, str] = {}
    for variant in plan.variants:
        try:
            runs[variant.name] = run = variant.build(table.work)
        except Unavailable as reason:
            notes[variant.name] = str(reason)
            continue
        is_slow = variant.precision in plan.slow
        measures[variant.name] = partial(_rate, run, table, 1 if is_slow else table.steps, device)
        once |= {variant.name} if is_slow else set()
    values = in_turns(measures, plan.rounds, once, on_turn)
    return values, {name: count_bytes(run) for name, run in runs.items()}, notes


def _gflops(product: Products, repeats: int, turn: int) -> float:
    return product.gflops(repeats)


def _rate(run: Run, table: Table, steps: int, device: torch.device, turn: int) -> float:
    """Return the real tokens per second of the first steps of a turn."""
    numbers = table.numbers(turn)[:steps]

    def take() -> None:
        for number in numbers:
            run.step(number)

    seconds = timed(take, device)
    return sum(map(table.work.tokens, numbers)) / seconds


def count_bytes(run: Run | None) -> dict[str, int | None]:
    """Return the bytes of a run's optimizer, and of all that must be saved to go on from here."""
    if run is None:
        return {"trained_numbers": None, "optimizer_bytes": None, "checkpoint_bytes": None}
    state, trained = _bytes(run.optimizer_state()), _bytes(run.trained)
    return {
        "trained_numbers": sum(tensor.numel() for tensor in run.trained),
        "optimizer_bytes": state,
        "checkpoint_bytes": trained + state,
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


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
            "ratio": _ratio(rate, rates.get("released")),
            "ratio_to_best_stock": _ratio(rate, rates.get(stock or "")),
            "roofline_tokens_per_second": bound,
            "roofline_fraction": _ratio(rate, bound),
        })  # fmt: skip
    return rows


def _ratio(value: float | None, other: float | None) -> float | None:
    return None if value is None or not other or not math.isfinite(other) else value / other
