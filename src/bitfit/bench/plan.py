"""What a bench is about to do, and how long that takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitfit.bench.memory import is_known
from bitfit.bench.runs import Variant, estimate, product_tokens
from bitfit.bench.timing import describe_machine, describe_versions, slow_precisions
from bitfit.bench.work import MAX_LENGTH, SEQUENCES_A_TURN, Table
from bitfit.encoder import Encoder
from bitfit.errors import UsageError
from bitfit.precision import DTYPES, dtype_name, measure_precision

# For the estimate: starting a process and loading the base.
MEMORY_SECONDS = 12.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a bench is about to do."""

    encoder: Encoder
    """The base in fp32, for its shapes and its tokenizer."""
    variants: Sequence[Variant]
    groups: Sequence[Sequence[Table]]
    """Each variant runs on each table; those of a group are timed in the same rounds."""
    rounds: int
    memory: Sequence[str]
    """The variants whose memory is measured too."""
    slow: frozenset[str]
    """Precisions several times slower than fp32 here: timed in one round, on one step."""
    seconds: float
    """About how long it takes."""

    @property
    def tables(self) -> Sequence[Table]:
        """All tables, of all groups."""
        return [table for group in self.groups for table in group]

    @property
    def turns(self) -> int:
        """How often it is told whose turn it is where every variant is there."""
        products = sum(
            len({(v.precision, product_tokens(table)) for v in self.variants for table in group})
            for group in self.groups
        )
        runs = len(self.tables) * len(self.variants)
        return (runs + products) * (self.rounds + 1) + len(self.tables) * len(self.memory)


Choose = Callable[[Mapping[str, float], str], Sequence[Variant]]
"""From this machine's GFLOP/s by precision, and the precision to favour, to the variants."""


def check_choices(dtype: str, *numbers: int) -> None:
    """Refuse what cannot be meant.

    Raises:
        UsageError: a precision that there is not, or a number below 1.
    """
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    if min(numbers, default=0) < 1:
        raise UsageError("rounds, batch sizes and lanes are numbers from 1 up")


def plan_groups(
    encoder: Encoder,
    groups: Sequence[Sequence[Table]],
    choose: Choose,
    rounds: int,
    memory: Sequence[str] | None,
) -> Plan:
    """Look at the machine and return what would be run.

    Args:
        encoder: the base in fp32.
        groups: what is run in the same rounds.
        choose: which variants, on this machine.
        rounds: how often every variant has its turn, beside one to warm up.
        memory: groups of variants whose peak memory is measured too; None: of all.
    """
    precision = measure_precision(encoder.device, encoder.hidden_size)
    gflops = dict(precision.gflops)
    variants = choose(gflops, dtype_name(precision.dtype))
    slow = slow_precisions(gflops) & {v.precision for v in variants}
    tables = [table for group in groups for table in group]
    entries = [(variant, table) for table in tables for variant in variants]
    seconds = estimate(encoder.weights, entries, gflops, slow)
    weighed = [v for v in variants if memory is None or v.group in memory]
    weighed = weighed if is_known(encoder.device) else []
    for table in tables:
        two_steps = [(v, dataclasses.replace(table, work=table.work.first(2))) for v in weighed]
        seconds += estimate(encoder.weights, two_steps, gflops) + len(weighed) * MEMORY_SECONDS
    return Plan(
        encoder=encoder, variants=variants, groups=groups, rounds=rounds,
        memory=[v.name for v in weighed], slow=slow, seconds=seconds,
    )  # fmt: skip


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
