"""The sequences of a packed batch laid side by side for attention, in groups of like length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfit.batches import Batch, upload

# What a group costs beside its scores, counted in scores of one head: its calls. And what a row of
# scores costs beside them: it is gathered, multiplied and put back. Measured on a CPU; they choose
# the groups, and no result depends on them.
GROUP_COST = 30_000
ROW_COST = 24


@dataclass(frozen=True)
class Group:
    """Some sequences of a batch, padded to the longest of them."""

    members: Sequence[int]
    """Which sequences, in their order in the rectangle."""
    width: int
    mask: Tensor | None
    """``(sequences, width)``: true where there is a token; None: everywhere."""

    @property
    def sequences(self) -> int:
        """How many there are."""
        return len(self.members)


class SideBySide:
    """Where the heads of each token stand when attention lays sequences side by side.

    Scores grow with the square of the length, so padding all sequences to the longest would spend
    most of a mixed batch on padding. Here every group of like length has a rectangle of its own,
    ``(sequences, heads, width)``, and the rectangles stand end to end: to lay tokens into all of
    them is one gather, to take them out is another, however many groups there are.

    Args:
        batch: the sequences.
        heads: of the attention.
    """

    def __init__(self, batch: Batch, heads: int) -> None:
        # Not the batch itself, which keeps this: who waits for the garbage collector keeps tensors.
        self.heads = heads
        self.lengths = sizes = [len(feature) for feature in batch.features]
        """Tokens of each sequence, in the order of the batch."""
        self.tokens = len(batch.input_ids)
        self._sequence_of_token, self._positions = batch.sequence_of_token, batch.positions
        members = group_by_length(sizes, heads)
        self.groups: list[Group] = []
        rows = []
        for group in members:
            width = max(sizes[i] for i in group)
            index, mask = self._gather(batch, group if len(members) > 1 else None, width)
            rows.append(index)
            even = all(sizes[i] == width for i in group)
            self.groups.append(Group(group, width, None if even else mask))
        self._rows = rows[0] if len(rows) == 1 else torch.cat(rows)
        """``(R,)``: which row of ``(T * heads, ...)`` stands at each place of the rectangles."""
        self._stacks = [(group.sequences * heads, group.width) for group in self.groups]
        self._row_counts = [count * width for count, width in self._stacks]
        self._score_counts = [count * width * width for count, width in self._stacks]
        self.scores = sum(self._score_counts)
        """How many scores there are, padding included."""
        self._score_masks: dict[torch.dtype, list[Tensor | None]] = {}

    def _gather(
        self, batch: Batch, group: Sequence[int] | None, width: int
    ) -> tuple[Tensor, Tensor]:
        """Return the rows of one rectangle and its mask; None: of all sequences."""
        starts, lengths = batch.starts[:, None], batch.lengths[:, None]
        if group is not None:
            chosen = upload(torch.tensor(group), starts.device)
            starts, lengths = starts[chosen], lengths[chosen]
        columns = torch.arange(width, device=starts.device)
        mask = columns < lengths
        # At the padding a sequence's own first token: a NaN in one sequence, weighed by zero,
        # would otherwise reach its neighbours.
        tokens = starts + torch.where(mask, columns, 0)
        heads = torch.arange(self.heads, device=starts.device)[:, None]
        return (tokens[:, None, :] * self.heads + heads).flatten(), mask

    @cached_property
    def places(self) -> Tensor:
        """``(T * heads,)``: where each head of each token stands in the rectangles."""
        corners = upload(torch.from_numpy(self._corners(1)), self._rows.device)
        begin, width = corners[:, self._sequence_of_token, None]  # (T, 1) each
        heads = torch.arange(self.heads, device=corners.device)
        places: Tensor = begin + heads * width + self._positions[:, None]
        return places.flatten()

    def lay(self, x: Tensor) -> Tensor:
        """``(T, heads, d)`` packed -> ``(R, d)``, the rectangles end to end."""
        return x.reshape(-1, x.shape[-1]).index_select(0, self._rows)

    def take(self, x: Tensor) -> Tensor:
        """``(R, d)``, the rectangles end to end -> ``(T, heads, d)`` packed."""
        return x.index_select(0, self.places).view(-1, self.heads, x.shape[-1])

    def split_rows(self, x: Tensor) -> list[Tensor]:
        """``(R, d)`` -> for each group its rectangle, ``(sequences * heads, width, d)``."""
        return self._split(x, self._row_counts)

    def split_scores(self, x: Tensor) -> list[Tensor]:
        """``(scores,)`` -> for each group its squares, ``(sequences * heads, width, width)``."""
        return self._split(x, self._score_counts)

    def _split(self, x: Tensor, counts: list[int]) -> list[Tensor]:
        parts = [x] if len(counts) == 1 else x.split(counts)  # one group: a call less
        return [part.view(*stack, -1) for part, stack in zip(parts, self._stacks, strict=True)]

    def rows_in(self, parts: Sequence[SideBySide], begins: Sequence[int]) -> list[Tensor]:
        """Return where each row of this batch's scores begins among the scores of its parts.

        For each group ``(sequences * heads * width,)``. A row's scores are there from its beginning
        on; past the end of its sequence stands something else.

        Args:
            parts: the same sequences in several batches, in the same order; on a CPU.
            begins: where each part's scores begin.
        """
        corners = np.concatenate([part._corners(2) for part in parts], axis=1)
        corners[0] += np.repeat(begins, [len(part.lengths) for part in parts])
        rows = []
        for group in self.groups:
            begin, width = corners[:, group.members][..., None, None]  # (sequences, 1, 1) each
            heads = np.arange(self.heads)[:, None]
            # Rows of the padding begin where the last of the sequence does: nobody reads them.
            tokens = np.minimum(np.arange(group.width), width - 1)
            rows.append(torch.from_numpy((begin + (heads * width + tokens) * width).ravel()))
        return rows

    def _corners(self, power: int) -> NDArray[np.int64]:
        """``(2, B)``: where each sequence's rows (1) or scores (2) begin, and how wide it is."""
        corners = np.empty((2, len(self.lengths)), dtype=np.int64)
        begin = 0
        for group in self.groups:
            size = self.heads * group.width**power
            corners[0, group.members] = begin + np.arange(group.sequences) * size
            corners[1, group.members] = group.width
            begin += group.sequences * size
        return corners

    def score_masks(self, dtype: torch.dtype) -> list[Tensor | None]:
        """For each group ``(sequences * heads, 1, width)``: the least number at the padding.

        Zero elsewhere; None where there is no padding.
        """
        if dtype not in self._score_masks:
            self._score_masks[dtype] = [self._score_mask(group, dtype) for group in self.groups]
        return self._score_masks[dtype]

    def _score_mask(self, group: Group, dtype: torch.dtype) -> Tensor | None:
        if group.mask is None:
            return None
        mask = torch.zeros(group.mask.shape, dtype=dtype, device=group.mask.device)
        mask.masked_fill_(~group.mask, torch.finfo(dtype).min)
        return mask.repeat_interleave(self.heads, 0)[:, None]


def side_by_side(batch: Batch, heads: int) -> SideBySide:
    """Return how attention lays a batch side by side; every layer asks for the same."""
    if heads not in batch.derived:
        batch.derived[heads] = SideBySide(batch, heads)
    found = batch.derived[heads]
    assert isinstance(found, SideBySide)
    return found


def group_by_length(sizes: Sequence[int], heads: int) -> list[list[int]]:
    """Return the sequences in the groups that cost least, the shortest first.

    A group is as wide as its longest sequence, so the best groups are stretches of the sequences
    in the order of their lengths: dynamic programming over the distinct lengths finds where to cut.

    Args:
        sizes: tokens of each sequence.
        heads: of the attention.
    """
    widths, counts = np.unique(sizes, return_counts=True)
    below = np.concatenate([[0], counts.cumsum()])
    score_cost = heads * widths * (widths + ROW_COST)
    best, cuts = np.zeros(len(widths) + 1), []
    for last in range(len(widths)):
        # The last group begins at each of the lengths up to this one.
        costs = best[: last + 1] + (below[last + 1] - below[: last + 1]) * score_cost[last]
        cuts.append(int(costs.argmin()))
        best[last + 1] = costs[cuts[-1]] + GROUP_COST
    order = np.argsort(sizes, kind="stable")
    groups, end = [], len(widths)
    while end:
        first = cuts[end - 1]
        # In the order of the batch: neighbours stay neighbours.
        groups.append(sorted(order[below[first] : below[end]].tolist()))
        end = first
    return groups[::-1]
