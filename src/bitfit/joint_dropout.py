"""Dropout of many runs in few calls: what a device takes on which each call costs, as a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from bitfit.batches import Batch, upload
from bitfit.dropout import (
    Draw,
    DropoutBits,
    attention_rates,
    draw_bits,
    factors,
    stretches,
    whole_words,
)
from bitfit.side_by_side import SideBySide, side_by_side

# How many sites (hidden states) and layers (attention) one call draws for. They are part of what a
# seed means on a GPU: other numbers, other masks.
SITES_AHEAD = 16
LAYERS_AHEAD = 6
_HIDDEN, _ATTENTION, _HEAD = range(3)
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class _Place:
    """Where drawing stands: in which block of bits, and how much of it is used."""

    block: int = -1
    size: int = 0
    used: int = 0


class JointDropout:
    """The masks of one forward pass over the batches of several runs, for all runs together.

    Every run has a stretch in a block of random bits, which its own generator fills in one call for
    several sites of the encoder ahead; a site then takes the bits of all runs at once. What a run's
    stretch holds depends on its (seed, step) and its own sequences only, so its masks are those of
    the run alone. A block can be drawn again: it is seeded by its number.

    Args:
        parts: each run's bits with its batch, in the order of the tokens.
        device: where the bits are drawn.
    """

    def __init__(self, parts: Sequence[tuple[DropoutBits, Batch]], device: torch.device) -> None:
        self.bits = [bits for bits, _ in parts]
        self.device = device
        self.lengths = [[len(f) for f in batch.features] for _, batch in parts]
        self._hidden, self._attention = _Place(), _Place()
        self._blocks: dict[int, tuple[int, Tensor]] = {}
        self._rows: Tensor | None = None

    @property
    def seed(self) -> int:
        """A seed for generators that are not ours; it is the first run's."""
        return self.bits[0].seed

    def places(self) -> tuple[_Place, _Place]:
        """Return where drawing stands, for :meth:`move_to`."""
        return self._hidden, self._attention

    def move_to(self, places: tuple[_Place, _Place]) -> None:
        """Take the random bits back, or on, to where they were: the same masks are drawn again."""
        self._hidden, self._attention = places

    def drop(self, x: Tensor, rate: float) -> Tensor:
        """Return ``x`` ``(1, T, d)`` partly dropped."""
        width, place = x.shape[-1], self._hidden
        if place.used + width > place.size:
            place = _Place(place.block + 1, whole_words(SITES_AHEAD * width))
        block = self._block(_HIDDEN, place.block, [t * place.size for t in self._tokens])
        bits = block.view(-1, place.size)[:, place.used : place.used + width]
        self._hidden = _Place(place.block, place.size, place.used + width)
        return x * factors(bits, rate, x.dtype).view(x.shape)

    def attention(self, batch: Batch, heads: int, rate: float) -> list[tuple[SideBySide, Draw]]:
        """Return that attention goes over the whole batch, and how it draws; empty: it does not."""
        rates = attention_rates(self.bits, rate)
        if not any(rates):
            return []
        layout = side_by_side(batch, heads, in_groups=False)
        return [(layout, lambda weights: self._attention_factors(weights, layout, rates))]

    def head(self, runs: Sequence[int], rate: float) -> Draw:
        """Return how the heads of some runs draw for their vectors ``(runs, N, d)``, in turn."""
        turn = 0

        def draw(x: Tensor) -> Tensor:
            nonlocal turn
            size = whole_words(x[0].numel() if x.ndim == 3 else x.numel())
            flat = self._draw(_HEAD, turn, dict.fromkeys(runs, size))
            turn += 1
            bits = flat.view(len(runs), size)[:, : x.numel() // len(runs)].reshape(x.shape)
            return factors(bits, rate, x.dtype)

        return draw

    def _attention_factors(self, weights: Tensor, layout: SideBySide, rates: list[float]) -> Tensor:
        """Return factors for ``weights``, the squares ``(B * heads, L, L)`` end to end."""
        (group,), heads = layout.groups, layout.heads
        longest = group.width
        place = self._attention
        if place.used == place.size:
            place = _Place(place.block + 1, LAYERS_AHEAD)
        sizes = [whole_words(LAYERS_AHEAD * n) for n in self._scores(heads)]
        block = self._block(_ATTENTION, place.block, sizes, spare=longest)
        self._attention = _Place(place.block, place.size, place.used + 1)
        starts = self._score_rows(longest, heads)[place.used]
        # Past a sequence's end there are bits of others, for weights that the mask makes zero.
        bits = stretches(block, longest).index_select(0, starts).view(weights.shape)
        if len(set(rates)) == 1:
            return factors(bits, rates[0], weights.dtype)
        counts = [heads * len(lengths) * longest**2 for lengths in self.lengths]
        parts = [
            factors(own, rate, weights.dtype)
            for own, rate in zip(bits.split(counts), rates, strict=True)
        ]
        return torch.cat(parts)

    @cached_property
    def _tokens(self) -> list[int]:
        return [sum(lengths) for lengths in self.lengths]

    def _scores(self, heads: int) -> list[int]:
        """How many bits each run needs for the attention of one layer: a row for each token."""
        return [
            tokens * heads * max(lengths)
            for tokens, lengths in zip(self._tokens, self.lengths, strict=True)
        ]

    def _score_rows(self, longest: int, heads: int) -> Tensor:
        """Where in a block the bits of each row of scores begin, ``(layers, B * heads * L)``."""
        if self._rows is None:
            begin, columns = 0, []
            for lengths, size in zip(self.lengths, self._scores(heads), strict=True):
                width = max(lengths)
                first = np.cumsum([0, *lengths[:-1]]) * heads * width + begin
                columns += [(start, width, size) for start in first.tolist()]
                begin += whole_words(LAYERS_AHEAD * size)
            table = upload(torch.tensor(columns).t().contiguous(), self.device)
            start, width, size = table[:, None, :, None, None]  # (1, B, 1, 1) each
            layer, head, token = (
                torch.arange(n, device=self.device).view(shape)
                for n, shape in (
                    (LAYERS_AHEAD, (-1, 1, 1, 1)),
                    (heads, (-1, 1)),
                    (longest, (-1,)),
                )
            )
            rows = start + layer * size + (token * heads + head) * width
            # A sequence's padding has rows past its end, which nobody asks for.
            self._rows = rows.flatten(1).clamp_(max=begin)
        return self._rows

    def _block(self, kind: int, number: int, sizes: Sequence[int], spare: int = 0) -> Tensor:
        """Return a block of bits, drawn when it is not the one at hand."""
        found = self._blocks.get(kind)
        if found is None or found[0] != number:
            self._blocks.pop(kind, None)
            found = None  # its memory goes to the next
            found = number, self._draw(kind, number, dict(enumerate(sizes)), spare)
            self._blocks[kind] = found
        return found[1]

    def _draw(self, kind: int, number: int, sizes: dict[int, int], spare: int = 0) -> Tensor:
        """Return 16 random bits each, of as many elements for each run as ``sizes`` says."""
        runs = [self.bits[run] for run in sizes]
        for run in runs:
            run.generator.manual_seed((run.seed + (3 * number + kind) * _GOLDEN) % 2**63)
        return draw_bits(runs, list(sizes.values()), self.device, spare)


def drawn_bytes(hidden: int, heads: int, length: int) -> int:
    """Return about how many bytes a token's random bits take, drawn ahead as they are.

    Args:
        hidden: the length of a hidden state.
        heads: of the attention.
        length: of the longest sequence, in tokens.
    """
    bits = SITES_AHEAD * hidden + LAYERS_AHEAD * heads * length
    return bits * 2 + LAYERS_AHEAD * heads * 8  # and where each row of scores has its own
