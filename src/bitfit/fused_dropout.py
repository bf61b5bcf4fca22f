"""Dropout of many runs in kernels that draw their bits where they are used: what a GPU takes."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from bitfit.batches import Batch, upload
from bitfit.dropout import Draw, DropoutBits, attention_rates

# What is dropped is a part of what a bit depends on. Attention has the number of its head there.
_HIDDEN, _HEAD = 1 << 20, 1 << 21


def has_kernels(device: torch.device) -> bool:
    """Return whether the kernels run there: on a GPU, with the Triton that torch brings for it.

    Triton compiles them when they are first used, for which it wants a C compiler with Python's
    headers, and a folder it may write to. Where it cannot, a warning says why.
    """
    return device.type == "cuda" and _can_launch(device)


@cache
def _can_launch(device: torch.device) -> bool:
    """Return whether a kernel can be launched on a GPU, tried once."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from bitfit.kernels import drop

        draws = torch.zeros(2, 1, dtype=torch.int64, device=device)
        drop(torch.zeros(1, 16, device=device), draws, 0, 0, 0)
        torch.cuda.synchronize(device)
    except Exception as error:  # of Triton, a compiler or the driver: training goes on without
        reason = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(
            f"Triton cannot compile bitfit's kernels for {device} ({reason[0]}): training there is "
            "slower. It needs a C compiler, Python's headers, and a cache folder it may write to "
            "(TRITON_CACHE_DIR)",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def threshold_of(rate: float) -> int:
    """Return the number below which 31 random bits mean that an element is dropped."""
    return round(rate * 2**31)


@dataclass(frozen=True)
class Where:
    """Where the sequences of a packed batch stand, and how their attention weights are dropped."""

    starts: Tensor
    """``(B,)`` int64: the first token of each."""
    lengths: Tensor
    """``(B,)`` int64."""
    longest: int
    draws: Tensor | None = None
    """``(3, B)`` int64: seed, place in its own run's batch, threshold; None: nothing is dropped."""
    site: int = 0
    """Which attention of the pass it is."""


class FusedDropout:
    """The masks of one forward pass over the batches of several runs, for all runs together.

    A bit depends on its run's (seed, step), the site, and its place in the run's own batch only, so
    a run's masks are those of the run alone, and the backward pass draws them again.

    Args:
        parts: each run's bits with its batch, in the order of the tokens.
        device: where the masks are drawn.
    """

    def __init__(self, parts: Sequence[tuple[DropoutBits, Batch]], device: torch.device) -> None:
        self.bits = [bits for bits, _ in parts]
        self.device = device
        self.lengths = [[len(f) for f in batch.features] for _, batch in parts]
        self._hidden = self._attention = 0
        self._sequence_draws: dict[float, Tensor | None] = {}

    @property
    def seed(self) -> int:
        """A seed for generators that are not ours; it is the first run's."""
        return self.bits[0].seed

    def places(self) -> tuple[int, int]:
        """Return which sites are next, for :meth:`move_to`."""
        return self._hidden, self._attention

    def move_to(self, places: tuple[int, int]) -> None:
        """Go back, or on, to sites: the same masks are drawn again."""
        self._hidden, self._attention = places

    def drop(self, x: Tensor, rate: float) -> Tensor:
        """Return ``x`` ``(1, T, d)`` partly dropped."""
        from bitfit.kernels import Dropped

        site, self._hidden = self._hidden, self._hidden + 1
        rows = x.view(-1, x.shape[-1])
        dropped: Tensor = Dropped.apply(  # type: ignore[no-untyped-call]
            rows, self._token_draws, _HIDDEN, site, threshold_of(rate)
        )
        return dropped.view(x.shape)

    def where(self, batch: Batch, rate: float) -> Where:
        """Return how attention goes over the whole batch, and how it drops; ``rate``: the base's.

        Every call is of the next layer.
        """
        if rate not in self._sequence_draws:
            self._sequence_draws[rate] = self._draws_of_sequences(rate)
        site, self._attention = self._attention, self._attention + 1
        return Where(
            batch.starts, batch.lengths, batch.max_length, self._sequence_draws[rate], site
        )

    def head(self, runs: Sequence[int], rate: float) -> Draw:
        """Return how the heads of some runs draw for their vectors ``(runs, N, d)``, in turn."""
        from bitfit.kernels import drop

        turn = 0

        def draw(x: Tensor) -> Tensor:
            nonlocal turn
            ones = torch.ones_like(x).view(-1, x.shape[-1])
            count = len(ones) // len(runs)
            seeds = np.repeat([self.bits[run].seed for run in runs], count)
            draws = np.stack([seeds, np.tile(np.arange(count), len(runs))])
            factors = drop(
                ones, upload(torch.from_numpy(draws), self.device), _HEAD, turn, threshold_of(rate)
            )
            turn += 1
            return factors.view(x.shape)

        return draw

    @cached_property
    def _token_draws(self) -> Tensor:
        """``(2, T)``: the seed of each token's run, and the token's place in the run's batch."""
        counts = [sum(lengths) for lengths in self.lengths]
        begins = np.cumsum([0, *counts[:-1]])
        table = torch.tensor([[bits.seed for bits in self.bits], begins.tolist(), counts])
        seeds, begin, count = upload(table, self.device)
        total = sum(counts)
        each = torch.stack([seeds, begin]).repeat_interleave(count, dim=1, output_size=total)
        each[1].neg_().add_(torch.arange(total, device=self.device))
        return each

    def _draws_of_sequences(self, rate: float) -> Tensor | None:
        """Return ``(3, B)``: seed, place in the run's batch and threshold; None: no dropout."""
        thresholds = [threshold_of(own) for own in attention_rates(self.bits, rate)]
        if not any(thresholds):
            return None
        counts = [len(lengths) for lengths in self.lengths]
        places = [np.cumsum([0, *lengths[:-1]]) for lengths in self.lengths]
        rows = [
            np.repeat([bits.seed for bits in self.bits], counts),
            np.concatenate(places),
            np.repeat(thresholds, counts),
        ]
        return upload(torch.from_numpy(np.stack(rows).astype(np.int64)), self.device)
