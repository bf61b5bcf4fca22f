"""A variant of a bench, what it needs, and its speed beside the others'."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from bitfit.batches import Feature
from bitfit.bench.timing import PRODUCT_REPEATS, Products, in_turns, timed
from bitfit.bench.work import MAX_LENGTH, Table, Work
from bitfit.encoder import Encoder
from bitfit.training.train import pass_tokens

MAX_GRAD_NORM = 1.0
# For the estimate only: the share of the products' rate that a step reaches, as first measured.
USUAL_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Run:
    """A variant that is ready to train."""

    step: Callable[[int], None]
    """Train on the batches of the step of this number."""
    trained: Sequence[Tensor]
    """What is trained and has to be saved."""
    optimizer_state: Callable[[], Iterable[Tensor]]
    """The optimizer's tensors; torch's has none before its first step."""
    modules: Sequence[nn.Module] = field(repr=False)
    """The loaded model."""


class Unavailable(Exception):
    """A variant that cannot run here; the message is what its row says."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to train."""

    name: str
    title: str
    group: str
    """``ours``, ``released``, ``stock``, ``full-released``, ``full``, ``lora`` or ``beft``: of a
    group with several precisions the faster counts."""
    precision: str
    pads_to: str
    """``packed``, ``longest`` (of the batch) or ``128``."""
    flops: int
    """Floating-point operations per encoder weight and token that cannot be avoided."""
    build: Callable[[Work], Run]


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What variants reached, by name."""

    values: Mapping[str, Sequence[float]]
    """In each round: real tokens per second; of products (see :func:`products_name`) GFLOP/s."""
    sizes: Mapping[str, dict[str, int | None]]
    notes: Mapping[str, str]
    """Why a variant is missing."""


def products_name(precision: str, tokens: int) -> str:
    """Return what the products of a precision on so many tokens are called in :class:`Timed`."""
    return f"products in {precision} of {tokens} tokens"


def product_tokens(table: Table) -> int:
    """Return how many tokens a step multiplies at a time."""
    whole = table.work.lanes * table.mean_tokens
    return round(min(whole, max(pass_tokens(table.work.device), table.mean_tokens)))


def time_in_turns(
    encoder: Encoder,
    entries: Mapping[str, tuple[Variant, Table]],
    rounds: int,
    slow: Collection[str],
    on_turn: Callable[[str], None],
) -> Timed:
    """Time variants by turns, and in the same rounds the products that they cannot do without.

    Args:
        encoder: the base, for its shapes.
        entries: by name, each on the steps of its own table.
        rounds: how often each has its turn, beside one to warm up.
        slow: precisions that are timed in one round only, on one step.
        on_turn: is told whose turn it is.
    """
    measures: dict[str, Callable[[int], float]] = {}
    once: set[str] = set()
    for variant, table in entries.values():
        precision, tokens = variant.precision, product_tokens(table)
        name = products_name(precision, tokens)
        if name not in measures:
            product, repeats = Products(encoder, tokens, precision), PRODUCT_REPEATS
            repeats = 1 if precision in slow else repeats
            measures[name] = partial(_gflops, product, repeats)
            once |= {name} if precision in slow else set()
    runs: dict[str, Run] = {}
    notes: dict[str, str] = {}
    for name, (variant, table) in entries.items():
        try:
            runs[name] = run = variant.build(table.work)
        except Unavailable as reason:
            notes[name] = str(reason)
            continue
        is_slow = variant.precision in slow
        measures[name] = partial(_rate, run, table, 1 if is_slow else table.steps)
        once |= {name} if is_slow else set()
    values = in_turns(measures, rounds, once, on_turn)
    sizes = {name: count_bytes(run) for name, run in runs.items()}
    return Timed(values=values, sizes=sizes, notes=notes)


def _gflops(product: Products, repeats: int, turn: int) -> float:
    return product.gflops(repeats)


def _rate(run: Run, table: Table, steps: int, turn: int) -> float:
    """Return the real tokens per second of the first steps of a turn."""
    numbers = table.numbers(turn)[:steps]

    def take() -> None:
        for number in numbers:
            run.step(number)

    seconds = timed(take, table.work.device)
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


def ratio(value: float | None, other: float | None) -> float | None:
    """Return ``value / other``; None where one of them is not known."""
    return None if value is None or not other or not math.isfinite(other) else value / other


def estimate(
    weights: int,
    entries: Iterable[tuple[Variant, Table]],
    gflops: Mapping[str, float],
    slow: Collection[str] = (),
) -> float:
    """Return about how many seconds the turns take: padding included, half the products' rate."""
    seconds = 0.0
    for variant, table in entries:
        work = table.work.first(1) if variant.precision in slow else table.work
        tokens = sum(_computed_tokens(batch, variant.pads_to) for batch in work.batches)
        rate = USUAL_SHARE * gflops[variant.precision] * 1e9
        seconds += variant.flops * weights * tokens / rate
    return seconds


def _computed_tokens(batch: Sequence[Feature], pads_to: str) -> int:
    """Return the tokens of a batch with its padding."""
    lengths = [len(feature) for feature in batch]
    if pads_to == "packed":
        return sum(lengths)
    return len(lengths) * (max(lengths) if pads_to == "longest" else MAX_LENGTH)
