"""The numbers that the paper prints (``paper.toml``), by experiment, row, base and task."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

ANY_TASK = "*"


@dataclass(frozen=True)
class PrintedRow:
    """One row of one of the paper's tables."""

    experiment: str
    """``table1``, ``table2``, ``table3`` or ``pos``."""
    name: str
    """The method, as our grids name it."""
    base: str
    """``BERT-base``, ``BERT-large`` or ``RoBERTa-base``."""
    split: str
    """``dev`` or ``test``."""
    percent: float
    """The share of the parameters that the paper says is trained, in percent."""
    scores: Mapping[str, float]
    """Task (``mnli-mm``: MNLI's mismatched half) -> the score as printed, times 100."""
    source: str
    """Where it stands in the paper."""

    @property
    def can_be_ours(self) -> bool:
        """Whether a run can stand beside it: on dev, and not taken from another paper."""
        return self.split == "dev" and "taken there from" not in self.source


@cache
def _file() -> dict[str, Any]:
    text = resources.files("bitfit.experiments.report").joinpath("paper.toml").read_text("utf-8")
    return tomllib.loads(text)


def paper_source() -> str:
    """Return the title and version of the paper that the numbers are of."""
    return str(_file()["source"])


def paper_tasks() -> tuple[str, ...]:
    """Return the columns of the paper's tables in their order."""
    return tuple(_file()["tasks"])


def task_title(task: str) -> str:
    """Return what the paper calls a task, or its name where the paper does not know it."""
    return str(_file()["titles"].get(task, task))


@cache
def printed_rows(experiment: str | None, split: str = "dev") -> tuple[PrintedRow, ...]:
    """Return the printed rows of an experiment in the order of ``paper.toml``; () for others.

    Table 6 has the rates of what Table 2 scores, so ``table6`` has the rows of ``table2``.
    """
    wanted = "table2" if experiment == "table6" else experiment
    return tuple(
        PrintedRow(
            **{key: row[key] for key in ("experiment", "name", "base", "split", "source")},
            percent=float(row["percent"]),
            scores=_scores(row["scores"]),
        )
        for row in _file()["row"]
        if (row["experiment"], row["split"]) == (wanted, split)
    )


def printed_row(
    experiment: str | None, row: str, base: str = "", split: str = "dev"
) -> PrintedRow | None:
    """Return the printed row to set beside ours, or None.

    The row of the same base where the paper has it; else that of BERT-base, or of the only base
    that the table has. Row names are compared without case, order of terms and "only".

    Args:
        experiment: the key of the experiment's ``paper``.
        row: the name of our row.
        base: our base, any name; ``bert-base-cased`` is the paper's BERT-base.
        split: ``dev`` or ``test``.
    """
    found = [r for r in printed_rows(experiment, split) if _same_name(r.name, row)]
    ours = paper_base(base)
    return next((r for r in found if r.base == ours), found[0] if found else None)


def printed_score(
    experiment: str | None, row: str, task: str, base: str = "", split: str = "dev"
) -> float | None:
    """Return one printed score times 100, or None; arguments as in :func:`printed_row`.

    Example:
        >>> printed_score("table3", "b_q only", "mrpc")
        86.4
    """
    found = printed_row(experiment, row, base, split)
    return found.scores.get(task, found.scores.get(ANY_TASK)) if found else None


def printed_rates(row: str, base: str = "") -> tuple[str, Mapping[str, float]]:
    """Return the best rates that Table 6 prints for ``row``, by task, and the base they are of.

    The base is chosen as in :func:`printed_row`; ``("", {})`` for a row that Table 6 lacks.
    """
    found = [entry for entry in _file()["rates"] if _same_name(entry["name"], row)]
    ours = paper_base(base)
    entry = next((e for e in found if e["base"] == ours), found[0] if found else None)
    return (entry["base"], entry["rates"]) if entry else ("", {})


def paper_base(base: str) -> str | None:
    """Return which of the paper's three bases ``base`` is, None for any other."""
    name = re.split(r"[/\\]", base.lower().rstrip("/\\"))[-1]
    for known in ("BERT-base", "BERT-large", "RoBERTa-base"):
        if re.match(rf"{known.lower()}(?![a-z])", name):
            return known
    return None


def _scores(written: Any) -> dict[str, float]:
    if isinstance(written, Mapping):
        return {task: float(score) for task, score in written.items()}
    return dict(zip(paper_tasks(), map(float, written), strict=True))


def _same_name(one: str, other: str) -> bool:
    return _plain(one) == _plain(other)


def _plain(name: str) -> list[str]:
    parts = re.split(r"[+,]", re.sub(r"\bonly\b", "", name.lower()))
    return sorted(part.strip() for part in parts)
