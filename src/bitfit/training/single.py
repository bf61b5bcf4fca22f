"""What the methods share that change the model itself: one run at a time, and a flat head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from bitfit.bank import Layout
from bitfit.encoder import Encoder
from bitfit.heads import Head

Numbers: TypeAlias = list[Tensor]
"""What one run has trained, as a method reads and writes it."""


class SingleRun:
    """Train tensors of the model, and the head.

    They are no rows, so there is one slot: runs come one after the other. A method says in
    :meth:`numbers` what they are, lets the encoder compute with them between its ``install`` and
    ``uninstall``, and has beside these ``begin`` and ``encoder_count``.

    Args:
        encoder: the base.
        head: of every run that will come.
    """

    slots = 1
    tensors: list[Tensor]
    """What the optimizer moves: the tensors of the model, then the head ``(h,)``."""

    def __init__(self, encoder: Encoder, head: Head) -> None:
        self.layout, self.std = Layout(()), init_std(encoder)
        self.flat = torch.zeros(head.size, device=encoder.device, requires_grad=True)

    def numbers(self) -> Numbers:
        """Return what is trained, the head last; not copies."""
        raise NotImplementedError

    def clear(self, slot: int) -> None:
        """Nothing: the next run begins anew."""

    def read(self, slot: int) -> Numbers:
        """Return a copy of what the run has trained."""
        return [t.detach().clone() for t in self.numbers()]

    @torch.no_grad()
    def write(self, slot: int, numbers: Numbers) -> None:
        """Put back what :meth:`read` gave."""
        for value, number in zip(self.numbers(), numbers, strict=True):
            value.copy_(number)

    def views(self) -> tuple[dict[str, Tensor], Tensor]:
        """Return no row (the model itself changes) and the head, ``(1, h)``."""
        return {}, self.flat[None]

    def trained(self, slot: int, layout: Layout, head: Head) -> tuple[Tensor, dict[str, Tensor]]:
        """Return an empty row and the head's tensors by name, without gradients."""
        flat = self.flat.detach()
        return flat.new_empty(0), head.split(flat)

    def after_backward(self) -> None:
        """Make the gradients of :attr:`tensors` from those of the model; by default they are."""

    def moved(self) -> None:
        """Let the encoder see that :attr:`tensors` moved; by default they are what it reads."""

    @torch.no_grad()
    def clip(self, max_norms: Sequence[float]) -> None:
        """Scale all gradients so that their common norm is at most ``max_norms[0]``; 0: leave."""
        grads = [t.grad for t in self.tensors if t.grad is not None]
        if max_norms[0] > 0 and grads:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            scale = (max_norms[0] / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(grads, scale)


def init_std(encoder: Encoder) -> float:
    """Return the deviation that the base's own fresh weights have."""
    return float(getattr(encoder.base.config, "initializer_range", 0.02))
