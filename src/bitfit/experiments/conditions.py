"""What all runs of an experiment have in common: precision, device, threads; and moving on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from bitfit.encoder import open_encoder
from bitfit.errors import UsageError
from bitfit.experiments.grid import Grid
from bitfit.precision import precision_here
from bitfit.training.settings import PEFT_METHODS, ROW_METHODS


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What every run has in common, chosen when an experiment begins or moves, and recorded."""

    dtype: str
    """Precision of the frozen weights and of products; part of a run's id."""
    device: str
    """``cpu`` or ``cuda``."""
    threads: int
    """CPU threads."""
    earlier: tuple[Conditions, ...] = ()
    """Those under which the experiment went on before it was moved, the first first. A run that
    was finished under them counts and is not made again."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields; ``earlier`` only where the experiment was moved."""
        found: dict[str, Any] = {
            "dtype": self.dtype, "device": self.device, "threads": self.threads,
        }  # fmt: skip
        return found | ({"earlier": [c.to_json() for c in self.earlier]} if self.earlier else {})

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Conditions:
        """Return the conditions that :meth:`to_json` wrote; other keys are left alone."""
        return cls(
            dtype=value["dtype"], device=value["device"], threads=value["threads"],
            earlier=tuple(map(cls.from_json, value.get("earlier", ()))),
        )  # fmt: skip

    @property
    def earlier_dtypes(self) -> tuple[str, ...]:
        """Other precisions than this one, whose runs count."""
        return tuple(dict.fromkeys(c.dtype for c in self.earlier if c.dtype != self.dtype))

    def moved_to(self, now: Conditions) -> Conditions:
        """Return the conditions of an experiment that goes from these to ``now``."""
        last = replace(self, earlier=())
        if now == last:
            return self
        before = dict.fromkeys((*self.earlier, last))
        return replace(now, earlier=tuple(c for c in before if c != now))

    def __str__(self) -> str:
        """Return them in words, without the earlier ones."""
        return f"device {self.device}, dtype {self.dtype}, threads {self.threads}"


def choose_conditions(
    grid: Grid,
    recorded: Conditions | None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    move: bool = False,
) -> Conditions:
    """Return the conditions of an experiment: those it began with, or moves to.

    Args:
        grid: what is to be run.
        recorded: of the experiment that is there; None: it begins.
        dtype: asked for now; ``auto``: of one that begins fp32 for the paper's recipe and where
            matrices are trained, else what is fastest.
        device: asked for now; ``auto``: of one that begins a GPU where there is one.
        threads: asked for now; None: torch's.
        move: go on under what is asked for now, whatever it began with. What is not asked for
            stays, as far as this machine has it.

    Raises:
        UsageError: others than recorded were asked for, without ``move``; or a row trains weights
            that its precision has not in fp32.
    """
    if recorded is None:
        found = _new(grid, dtype, device, threads)
    elif move:
        found = recorded.moved_to(_here(recorded, dtype, device, threads))
    else:
        found = _same(recorded, dtype, device, threads)
    check_weights(grid, found.dtype)
    return found


def check_weights(grid: Grid, dtype: str) -> None:
    """Refuse rows that train the base's weights in a precision that does not have them in fp32.

    Raises:
        UsageError: there are such rows.
    """
    names = [row.name for row in grid.rows if row.method not in (*ROW_METHODS, *PEFT_METHODS)]
    if dtype == "bf16" and names:
        raise UsageError(
            f"{', '.join(map(repr, names))} cannot run in bf16: weights are trained in fp32. Take "
            "--dtype fp32 (of an experiment that was begun in bf16 with --move), or name the other "
            "rows with --rows"
        )


def _same(recorded: Conditions, dtype: str, device: str, threads: int | None) -> Conditions:
    for name, asked in (("dtype", dtype), ("device", device), ("threads", threads)):
        if asked not in (None, "auto", began := getattr(recorded, name)):
            raise UsageError(
                f"this experiment was begun with {name} {began}, not {asked}: leave --{name} out, "
                f"take another --out, or go on here with --move, which keeps what is finished"
            )
    return recorded


def _new(grid: Grid, dtype: str, device: str, threads: int | None) -> Conditions:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    matrices = any(row.method not in ROW_METHODS for row in grid.rows)
    if dtype == "auto" and (grid.recipe == "paper" or matrices):
        dtype = "fp32"
    elif dtype == "auto":
        dtype = open_encoder(grid.base[0], "auto", device).precision
    return Conditions(dtype=dtype, device=device, threads=threads or torch.get_num_threads())


def _here(before: Conditions, dtype: str, device: str, threads: int | None) -> Conditions:
    if device == "auto":
        there = before.device == "cpu" or torch.cuda.is_available()
        device = before.device if there else "cpu"
    if dtype == "auto":
        dtype = precision_here(before.dtype, device)
    return Conditions(dtype=dtype, device=device, threads=threads or before.threads)
