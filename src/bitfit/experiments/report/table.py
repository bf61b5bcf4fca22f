"""A table before it is written in any format, and how its numbers look.

Scores are fractions in a cell's ``value`` (and in JSON) and points, times 100 with one decimal, in
its ``text``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DASH = "–"
"""What stands where nothing is known."""
SHARE = "percent"
"""The key of the column that has the share of the parameters."""
DAGGER = "†"
"""Marks a cell whose runs were not all made under the same conditions."""
DOUBLE_DAGGER = "‡"
"""Marks a cell whose search over the rates is not finished."""


@dataclass(frozen=True)
class Cell:
    """One entry of a table."""

    text: str = DASH
    """What a reader sees."""
    value: Any = None
    """What JSON holds: a number, a text, a mapping; None where nothing is known."""
    runs: tuple[str, ...] = ()
    """The ids of the runs that it is made of."""
    printed: float | None = None
    """What the paper prints here, times 100."""
    write_printed: Callable[[float], str] = "{:.1f}".format
    """How that is written."""
    mark: str = ""
    """A sign that a note below the table explains."""

    @property
    def marked(self) -> str:
        """The text with its mark, for readers; tables for programs have the text alone."""
        return f"{self.text} {self.mark}" if self.mark else self.text

    @property
    def printed_text(self) -> str:
        """The printed number as it is written beside ours; empty where there is none."""
        return "" if self.printed is None else self.write_printed(self.printed)


@dataclass(frozen=True)
class Column:
    """A column: a name for programs and one for readers."""

    key: str
    title: str
    is_number: bool = True


@dataclass(frozen=True)
class Table:
    """A table with its notes."""

    key: str
    """File name and anchor."""
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    heads: int = 1
    """How many columns, from the left, name a row."""
    is_wide: bool = False
    """Whether it has the shape of the paper's tables: methods in rows, tasks in columns."""
    printed_base: str = ""
    """The base of the printed numbers beside ours."""
    printed_only: int = 0
    """How many rows, the last ones, have printed numbers only."""


def text(value: object) -> Cell:
    """Return a cell that holds plain text."""
    return Cell(str(value), value)


def number(value: float | None, form: str = ",.0f") -> Cell:
    """Return a cell that holds a number, written in ``form``."""
    if value is None or not math.isfinite(value):
        return Cell()
    return Cell(format(value, form), value)


def rate(value: float | None) -> Cell:
    """Return a cell that holds a learning rate: ``4e-4``."""
    return Cell() if value is None else Cell(rate_text(value), value)


def rate_text(value: float) -> str:
    """Return ``4e-4`` for 0.0004."""
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def points(value: float | None, *, signed: bool = False) -> str:
    """Return a fraction times 100 with one decimal; a dash where it is not known."""
    if value is None or not math.isfinite(value):
        return DASH
    shown = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
    return "0.0" if float(shown) == 0 else shown


def score(value: float | None, *, signed: bool = False) -> Cell:
    """Return a cell that holds a score, a fraction."""
    return Cell(points(value, signed=signed), none_if_nan(value))


def none_if_nan(value: float | None) -> float | None:
    """Return ``value``, None where it is not finite: JSON has no NaN.

    To ten digits, so that the order in which a machine adds does not show.
    """
    return None if value is None or not math.isfinite(value) else round(float(value), 10)


@dataclass(frozen=True)
class Summary:
    """The scores of one cell over its seeds."""

    scores: tuple[float, ...]
    """One per run; NaN where the metric is not defined."""
    runs: tuple[str, ...] = ()

    @property
    def defined(self) -> tuple[float, ...]:
        """The scores that are numbers."""
        return tuple(s for s in self.scores if math.isfinite(s))

    @property
    def mean(self) -> float:
        """Their mean; NaN without any."""
        return float(np.mean(self.defined)) if self.defined else math.nan

    @property
    def spread(self) -> float:
        """Their standard deviation with n - 1; NaN for fewer than two."""
        return float(np.std(self.defined, ddof=1)) if len(self.defined) > 1 else math.nan

    @property
    def best(self) -> float:
        """The largest; NaN without any."""
        return max(self.defined, default=math.nan)

    @property
    def least(self) -> float:
        """The smallest; NaN without any."""
        return min(self.defined, default=math.nan)

    def mean_text(self, *, signed: bool = False) -> str:
        """Return ``84.6 ± 0.3``; without a spread for one seed; undefined ones are counted."""
        if not self.scores:
            return DASH
        shown = points(self.mean, signed=signed)
        if math.isfinite(self.spread):
            shown += f" ± {points(self.spread)}"
        return shown + self._undefined()

    def mean_alone(self) -> str:
        """Return the mean as in :meth:`mean_text`, without the spread."""
        return Summary((self.mean,) if self.defined else ()).mean_text() + self._undefined()

    def _undefined(self) -> str:
        missing = len(self.scores) - len(self.defined)
        return f" ({missing} of {len(self.scores)} undefined)" if missing else ""

    def cell(self, *, printed: float | None = None, signed: bool = False) -> Cell:
        """Return the cell of the mean with its spread."""
        value = {
            "mean": none_if_nan(self.mean),
            "sd": none_if_nan(self.spread),
            "seeds": len(self.scores),
        }
        return Cell(
            self.mean_text(signed=signed), value if self.scores else None, self.runs, printed
        )


def mean_column(cells: Sequence[float]) -> float:
    """Return the mean over tasks; NaN where one of them is missing, as it would not compare."""
    return float(np.mean(cells)) if cells else math.nan
