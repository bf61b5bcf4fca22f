"""Dropout whose masks depend on (seed, step) and the place in a run's own batch only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from bitfit.batches import Batch
from bitfit.side_by_side import SideBySide, side_by_side

Draw: TypeAlias = Callable[[Tensor], Tensor]
"""Gives a factor per element of a tensor: 0 where it is dropped, else 1 / (1 - rate)."""


class DropoutBits:
    """Dropout masks of one run for one step, from random bits that (seed, step) determine.

    Sixteen bits an element give the rate 0.1 as 0.10001; eight would give 0.1016. A step draws the
    same masks whether or not the run was interrupted before it. Of several processes that share the
    sequences of a step each has a rank, and draws its own.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        device: torch.device,
        rank: int = 0,
        attention_rate: float | None = None,
    ) -> None:
        entropy = (seed, step, rank) if rank else (seed, step)
        state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
        self.seed = int(state[0] >> np.uint64(1))
        self.device = device
        self.attention_rate = attention_rate
        """The run's own rate on attention probabilities; None: the base's."""

    @cached_property
    def generator(self) -> torch.Generator:
        """What the bits are drawn with, from its beginning; made when it is first used."""
        return torch.Generator(self.device).manual_seed(self.seed)

    def scale(self, x: Tensor, rate: float) -> Tensor:
        """Return a factor per element of ``x``: 0 with probability ``rate``, else 1/(1 - rate)."""
        bits = draw_bits([self], [x.numel()], x.device)[: x.numel()]
        return factors(bits.view(x.shape), rate, x.dtype)


def draw_bits(
    runs: Sequence[DropoutBits], sizes: Sequence[int], device: torch.device, spare: int = 0
) -> Tensor:
    """Return 16 random bits an element: each run's own, each stretch in whole words of 64 bits.

    Args:
        runs: who draw, in their order.
        sizes: how many elements each draws for.
        device: where.
        spare: how many more there are at the end, of any value.
    """
    words = [whole_words(size) // 4 for size in (*sizes, spare)]
    flat = torch.empty(sum(words), dtype=torch.int64, device=device)
    for run, stretch in zip(runs, flat.split(words), strict=False):
        # The whole range: without bounds the sign bit is always 0 and every fourth draw biased.
        stretch.random_(-(2**63), None, generator=run.generator)
    return flat.view(torch.int16)


def stretches(bits: Tensor, width: int) -> Tensor:
    """Return every stretch of ``width`` bits as a row, so that one gather takes those wanted."""
    return bits.as_strided((len(bits) - width + 1, width), (1, 1))


def whole_words(size: int) -> int:
    """Round a number of elements of 16 bits up to what fills words of 64 bits."""
    return -(-size // 4) * 4


def factors(bits: Tensor, rate: float, dtype: torch.dtype) -> Tensor:
    """Return a factor per element from its 16 random ``bits``."""
    dropped = round(rate * 65536)
    factor = torch.empty(bits.shape, dtype=dtype, device=bits.device)
    # Compared straight into the type it is used in: no mask of bools is made first.
    torch.ge(bits, dropped - 32768, out=factor)
    return factor.mul_(65536 / (65536 - dropped))


class StepDropout:
    """The masks of one forward pass over the batches of several runs, end to end, run by run.

    Each run draws for its own tokens, in the shape they have when it trains alone, so that its
    masks do not depend on which other runs are beside it. Drawing where and when the bits are used
    keeps them in a CPU's caches.

    Args:
        parts: each run's bits with its batch, in the order of the tokens.
    """

    def __init__(self, parts: Sequence[tuple[DropoutBits, Batch]]) -> None:
        self.runs = [bits for bits, _ in parts]
        self.batches = [batch for _, batch in parts]
        self._score_rows: dict[int, list[Tensor]] = {}

    @property
    def seed(self) -> int:
        """A seed for generators that are not ours; it is the first run's."""
        return self.runs[0].seed

    def places(self) -> list[Tensor]:
        """Return where each run's random bits are, for :meth:`move_to`."""
        return [run.generator.get_state() for run in self.runs]

    def move_to(self, places: Sequence[Tensor]) -> None:
        """Take the random bits back, or on, to where they were: the same masks are drawn again."""
        for run, place in zip(self.runs, places, strict=True):
            run.generator.set_state(place)

    def attention(self, batch: Batch, heads: int, rate: float) -> list[tuple[SideBySide, Draw]]:
        """Return in which parts attention goes over a batch, and how each draws for its scores.

        All runs together where they have one rate, on a CPU. Empty where nothing is dropped.

        Args:
            batch: the sequences of all runs.
            heads: of the attention.
            rate: the base's; a run may have its own.
        """
        rates = attention_rates(self.runs, rate)
        if not any(rates):
            return []
        together = len(rates) > 1 and len(set(rates)) == 1
        if together and batch.lengths.device.type == "cpu":
            whole = side_by_side(batch, heads)
            return [(whole, partial(self._scale_scores, whole=whole, rate=rates[0]))]
        return self.run_by_run(heads, rates)

    def run_by_run(self, heads: int, rates: Sequence[float]) -> list[tuple[SideBySide, Draw]]:
        """Return that attention goes over each run's batch by itself, and how each draws."""
        return [
            (side_by_side(own, heads), partial(run.scale, rate=rate))
            for run, own, rate in zip(self.runs, self.batches, rates, strict=True)
        ]

    def _scale_scores(self, weights: Tensor, whole: SideBySide, rate: float) -> Tensor:
        """Return factors for the scores of all runs, from the bits that each draws when alone."""
        parts = [side_by_side(own, whole.heads) for own in self.batches]
        sizes = [part.scores for part in parts]
        spare = max(group.width for group in whole.groups)
        drawn = draw_bits(self.runs, sizes, weights.device, spare)
        if whole.heads not in self._score_rows:
            begins = np.cumsum([0, *(whole_words(size) for size in sizes[:-1])]).tolist()
            self._score_rows[whole.heads] = whole.rows_in(parts, begins)
        bits = torch.empty(weights.shape, dtype=drawn.dtype, device=drawn.device)
        for own, rows in zip(whole.split_scores(bits), self._score_rows[whole.heads], strict=True):
            # Past a sequence's end there are bits of others, for weights that the mask makes zero.
            width = own.shape[-1]
            torch.index_select(stretches(drawn, width), 0, rows, out=own.view(-1, width))
        return factors(bits, rate, weights.dtype)

    def drop(self, x: Tensor, rate: float) -> Tensor:
        """Return ``x`` ``(1, T, d)``, or of any shape where there is one run, partly dropped."""
        if len(self.runs) == 1:
            return x * self.runs[0].scale(x, rate)
        sizes = [len(batch.input_ids) * x.shape[-1] for batch in self.batches]
        bits = draw_bits(self.runs, sizes, x.device)
        if len(bits) > x.numel():  # stretches that end within a word
            drawn = bits.split([whole_words(size) for size in sizes])
            bits = torch.cat([own[:size] for own, size in zip(drawn, sizes, strict=True)])
        return x * factors(bits.view(x.shape), rate, x.dtype)

    def head(self, runs: Sequence[int], rate: float) -> Draw:
        """Return how the heads of some runs draw for their vectors ``(runs, N, d)``, in turn."""

        def draw(x: Tensor) -> Tensor:
            if x.ndim == 2:
                return self.runs[runs[0]].scale(x, rate)
            drawn = [self.runs[run].scale(own, rate) for run, own in zip(runs, x, strict=True)]
            return torch.stack(drawn)

        return draw


def attention_rates(bits: Sequence[DropoutBits], rate: float) -> list[float]:
    """Return each run's rate on attention probabilities; ``rate`` is the base's."""
    return [rate if b.attention_rate is None else b.attention_rate for b in bits]
