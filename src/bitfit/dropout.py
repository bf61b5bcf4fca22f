"""Dropout whose masks depend on (seed, step) and the place in a run's own batch only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
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
        self.generator = torch.Generator(device).manual_seed(self.seed)
        self.attention_rate = attention_rate
        """The run's own rate on attention probabilities; None: the base's."""

    def scale(self, x: Tensor, rate: float) -> Tensor:
        """Return a factor per element of ``x``: 0 with probability ``rate``, else 1/(1 - rate)."""
        words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
        # The whole range: without bounds the sign bit is always 0 and every fourth draw biased.
        words.random_(-(2**63), None, generator=self.generator)
        return factors(words.view(torch.int16)[: x.numel()].view(x.shape), rate, x.dtype)


def factors(bits: Tensor, rate: float, dtype: torch.dtype) -> Tensor:
    """Return a factor per element from its 16 random ``bits``."""
    dropped = round(rate * 65536)
    factor = torch.empty(bits.shape, dtype=dtype, device=bits.device)
    # Compared straight into the type it is used in: a third of the time of a mask of bools first.
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
        self.parts = list(parts)

    @property
    def seed(self) -> int:
        """A seed for generators that are not ours; it is the first run's."""
        return self.parts[0][0].seed

    def places(self) -> list[Tensor]:
        """Return where each run's random bits are, for :meth:`move_to`."""
        return [bits.generator.get_state() for bits, _ in self.parts]

    def move_to(self, places: Sequence[Tensor]) -> None:
        """Take the random bits back, or on, to where they were: the same masks are drawn again."""
        for (bits, _), place in zip(self.parts, places, strict=True):
            bits.generator.set_state(place)

    def attention(self, batch: Batch, heads: int, rate: float) -> list[tuple[SideBySide, Draw]]:
        """Return in which parts attention goes over a batch, and how each draws for its scores.

        Empty where nothing is dropped.

        Args:
            batch: the sequences of all runs.
            heads: of the attention.
            rate: the base's; a run may have its own.
        """
        rates = attention_rates([bits for bits, _ in self.parts], rate)
        if not any(rates):
            return []
        return [
            (side_by_side(own, heads), partial(bits.scale, rate=its))
            for (bits, own), its in zip(self.parts, rates, strict=True)
        ]

    def drop(self, x: Tensor, rate: float) -> Tensor:
        """Return ``x`` ``(1, T, d)``, or of any shape where there is one run, partly dropped."""
        if len(self.parts) == 1:
            return x * self.parts[0][0].scale(x, rate)
        factor, begin = torch.empty_like(x), 0
        for bits, batch in self.parts:
            own = slice(begin, begin + len(batch.input_ids))
            factor[:, own] = bits.scale(x[:, own], rate)
            begin = own.stop
        return x * factor

    def head(self, runs: Sequence[int], rate: float) -> Draw:
        """Return how the heads of some runs draw for their vectors ``(runs, N, d)``, in turn."""

        def draw(x: Tensor) -> Tensor:
            if x.ndim == 2:
                return self.parts[runs[0]][0].scale(x, rate)
            drawn = [self.parts[run][0].scale(own, rate) for run, own in zip(runs, x, strict=True)]
            return torch.stack(drawn)

        return draw


def attention_rates(bits: Sequence[DropoutBits], rate: float) -> list[float]:
    """Return each run's rate on attention probabilities; ``rate`` is the base's."""
    return [rate if b.attention_rate is None else b.attention_rate for b in bits]
