"""The bank: many tasks' bias vectors as the rows of one matrix.

A row is the *difference* to the base, all sites end to end, so a zero row is the base. The layout
says which stretch of a row belongs to which site.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfit.errors import TaskFileError, UnknownTask, UsageError
from bitfit.rounding import STORAGE_TYPES, StorageType, dequantize, quantize
from bitfit.terms import Site

NEAR_NAMES = 200


@dataclass(frozen=True)
class Layout:
    """Which stretch of a row belongs to which site; the sites stand in the row in this order."""

    sites: tuple[Site, ...]

    @cached_property
    def lengths(self) -> list[int]:
        """The number of values of each site."""
        return [site.length for site in self.sites]

    @cached_property
    def n(self) -> int:
        """The number of values in a row."""
        return sum(self.lengths)

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the views ``(K, length)`` of ``rows`` ``(K, n)`` by module path.

        One ``split`` and not a slice at each site: the backward of a slice writes a full-size
        tensor of zeros, that of a split one tensor for all sites.
        """
        parts = torch.split(rows, self.lengths, dim=-1) if self.sites else ()
        return {site.path: part for site, part in zip(self.sites, parts, strict=True)}

    def expand(self, row: Tensor, into: Layout) -> Tensor:
        """Return ``row`` ``(n,)`` in the order of the layout ``into``, zero at the sites it lacks.

        Raises:
            UsageError: a site of this layout is not in ``into``.
        """
        mine = self.split(row)
        theirs = {site.path for site in into.sites}
        if missing := [s.label for s in self.sites if s.path not in theirs]:
            raise UsageError(f"the bank has no place for {', '.join(missing)}")
        parts = [mine.get(s.path, row.new_zeros(s.length)) for s in into.sites]
        return torch.cat(parts) if parts else row.new_zeros(0)

    def take(self, row: Tensor, of: Layout) -> Tensor:
        """Return the values ``(n,)`` of this layout's sites from a ``row`` of the layout ``of``."""
        if self.sites == of.sites:
            return row
        theirs = of.split(row)
        parts = [theirs[site.path] for site in self.sites]
        return torch.cat(parts) if parts else row.new_zeros(0)

    def to_json(self) -> list[list[Any]]:
        """Return ``[[term, layers, length], ...]``: layers is ``"0-5"``, ``"1,3"`` or null."""
        groups: dict[tuple[str, int], list[int | None]] = {}
        for site in self.sites:
            groups.setdefault((site.term, site.length), []).append(site.layer)
        return [[term, _join_layers(layers), length] for (term, length), layers in groups.items()]

    @classmethod
    def from_json(cls, value: object, known: Iterable[Site]) -> Layout:
        """Return the layout that ``value`` describes, its sites looked up among ``known``.

        Raises:
            TaskFileError: a site that the base does not have, or not in that length.
        """
        by_name = {(s.term, s.layer): s for s in known}
        sites = []
        for term, layers, length in parse_layout(value):
            for layer in layers:
                site = by_name.get((term, layer))
                where = term if layer is None else f"{term}@{layer}"
                if site is None:
                    raise TaskFileError(f"the file has a bias {where}, this base has none there")
                if site.length != length:
                    raise TaskFileError(
                        f"the file's {where} has {length} values, this base's {site.length}"
                    )
                sites.append(site)
        return cls(tuple(sites))


def parse_layout(value: object) -> list[tuple[str, list[int | None], int]]:
    """Return ``(term, layers, length)`` of each entry of a layout as a task file holds it.

    Raises:
        TaskFileError: anything that :meth:`Layout.to_json` cannot have written.
    """
    entries = []
    if not isinstance(value, list) or len(value) > 1000:
        raise TaskFileError("the layout in the file is not a list of at most 1000 terms")
    for entry in value:
        match entry:
            case [str(term), None | str() as layers, int(length)] if 0 < length <= 1 << 20:
                entries.append((term, _split_layers(layers), length))
            case _:
                raise TaskFileError(f"the layout in the file has a bad entry {entry!r:.80}")
    seen = [(term, layer) for term, layers, _ in entries for layer in layers]
    if len(set(seen)) != len(seen):
        raise TaskFileError("the layout in the file names a bias twice")
    return entries


def _join_layers(layers: Sequence[int | None]) -> str | None:
    """``[0, 1, 2]`` -> ``"0-2"``, ``[1, 3]`` -> ``"1,3"``, ``[None]`` -> None."""
    numbers = [layer for layer in layers if layer is not None]
    if not numbers:
        return None
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _split_layers(layers: str | None) -> list[int | None]:
    if layers is None:
        return [None]
    found: list[int | None] = []
    for run in layers.split(","):
        first, dash, last = run.partition("-")
        if not (first.isascii() and first.isdigit() and len(first) < 4):
            raise TaskFileError(f"the layout in the file has bad layers {layers!r:.80}")
        if dash and not (last.isascii() and last.isdigit() and len(last) < 4):
            raise TaskFileError(f"the layout in the file has bad layers {layers!r:.80}")
        found.extend(range(int(first), int(last if dash else first) + 1))
        if len(found) > 1000:  # numbers have three digits: one is there twice
            raise TaskFileError("the layout in the file names a bias twice")
    return found


class Bank:
    """Tasks by name, each a row ``(n,)``, kept in fp32 or less.

    Rows stand in blocks that never move: growing copies nothing, and a row that is read by one
    thread stays where it is while another thread adds and removes others. Blocks grow by an eighth
    of what there is, so that memory stays near what the rows need.

    Args:
        layout: what the rows are made of.
        device: where they are.
        storage: how they are kept. ``int8`` has a scale for each site of each row, as in task
            files. Computed is always in fp32.
    """

    BLOCK = 64
    """The most rows of one block."""

    def __init__(
        self,
        layout: Layout,
        device: torch.device | str = "cpu",
        storage: StorageType = "fp32",
    ) -> None:
        if storage not in STORAGE_TYPES:
            raise UsageError(f"storage type {storage!r} is not one of {', '.join(STORAGE_TYPES)}")
        self.layout, self.device, self.storage = layout, torch.device(device), storage
        self._blocks: list[Tensor] = []
        self._scales: list[Tensor] = []
        self._places: list[tuple[int, int]] = []  # index -> block, row in it
        self._touched: list[NDArray[np.bool_]] = []  # index -> (sites,): is any value not zero
        self._index: dict[str, int] = {}
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, name: str) -> bool:
        return name in self._index

    @property
    def names(self) -> list[str]:
        """The tasks in the bank, in the order they were added."""
        return list(self._index)

    @property
    def capacity(self) -> int:
        """The rows that there is memory for."""
        return len(self._places)

    @property
    def row_bytes(self) -> int:
        """The bytes of one row, with its scales."""
        scales = 4 * len(self.layout.sites) if self.storage == "int8" else 0
        return self.layout.n * STORAGE_TYPES[self.storage].itemsize + scales

    def add(self, name: str, row: Tensor) -> int:
        """Copy ``row`` ``(n,)`` in under ``name`` and return its index.

        Raises:
            UsageError: the name is taken, or the row has another length or does not fit into the
                storage type.
        """
        if name in self._index:
            raise UsageError(f"the bank already has a task {name!r}; remove it first")
        if row.shape != (self.layout.n,):
            raise UsageError(f"a row of this bank has {self.layout.n} values, not {row.numel()}")
        row = row.detach().float()
        values, scale = (
            quantize(row, self.layout.lengths)
            if self.storage == "int8"
            else (row.to(STORAGE_TYPES[self.storage]), None)
        )
        if not torch.isfinite(values).all():
            raise UsageError(
                f"task {name!r} cannot be kept in {self.storage}: its largest bias is "
                f"{row.abs().max():.3g}"
            )
        if not self._free:
            self._grow()
        index = self._free.pop()
        block, place = self._places[index]
        self._blocks[block][place].copy_(values)
        if scale is not None:
            self._scales[block][place].copy_(scale)
        self._touched[index] = self._sites_of(row)
        self._index[name] = index
        return index

    def _sites_of(self, row: Tensor) -> NDArray[np.bool_]:
        """Return, for each site, whether ``row`` has a value there that is not zero."""
        if not self.layout.sites:
            return np.zeros(0, bool)
        starts = np.cumsum([0, *self.layout.lengths[:-1]])
        found: NDArray[np.bool_] = np.logical_or.reduceat(row.cpu().numpy() != 0, starts)
        return found

    def _grow(self) -> None:
        size = max(1, min(self.BLOCK, self.capacity // 8))
        dtype = STORAGE_TYPES[self.storage]
        block, old = len(self._blocks), self.capacity
        self._blocks.append(torch.zeros(size, self.layout.n, dtype=dtype, device=self.device))
        if self.storage == "int8":
            sites = len(self.layout.sites)
            self._scales.append(torch.zeros(size, sites, device=self.device))
        self._places += [(block, place) for place in range(size)]
        self._touched += [np.zeros(0, bool)] * size
        self._free = list(range(old + size - 1, old - 1, -1))

    def remove(self, name: str) -> None:
        """Forget ``name``; its row is zeroed and free for another.

        Raises:
            UnknownTask: there is no such task.
        """
        index = self.index(name)
        del self._index[name]
        block, place = self._places[index]
        self._blocks[block][place].zero_()
        self._free.append(index)

    def index(self, name: str) -> int:
        """Return the row of the task called ``name``.

        Raises:
            UnknownTask: there is no such task; the message has the nearest name. Never the base.
        """
        if name not in self._index:
            raise unknown_task(name, self._index)
        return self._index[name]

    def gather(self, indices: Sequence[int]) -> Tensor:
        """Return rows ``(len(indices), n)`` in fp32, as copies."""
        places = [self._places[index] for index in indices]
        rows = torch.stack([self._blocks[block][place] for block, place in places])
        if self.storage != "int8":
            return rows.float()
        scales = torch.stack([self._scales[block][place] for block, place in places])
        return dequantize(rows, scales, self.layout.lengths)

    def biases(self, indices: Sequence[int], base: Tensor) -> dict[str, Tensor]:
        """Return what these rows make of the biases, ``(len(indices), length)`` by module path.

        Sites that are zero in all of them are left out: there all are the base.

        Args:
            indices: the rows.
            base: the base's own biases ``(n,)``.
        """
        touched = np.logical_or.reduce([self._touched[index] for index in indices])
        parts = self.layout.split(self.gather(indices).add_(base))
        return {
            path: part for (path, part), is_used in zip(parts.items(), touched, strict=True)
            if is_used
        }  # fmt: skip


def unknown_task(name: str, known: Collection[str]) -> UnknownTask:
    """Return the error of a name that nothing is known under, with the nearest that is."""
    # Among very many names the search for the nearest would take longer than an answer.
    near = difflib.get_close_matches(name, known, n=1) if len(known) <= NEAR_NAMES else []
    hint = f" Did you mean {near[0]!r}?" if near else ""
    shown = ", ".join([*islice(known, 10), *(["..."] if len(known) > 10 else [])]) or "none"
    return UnknownTask(f"unknown task {name!r:.120}.{hint} Loaded ({len(known)}): {shown}.")
