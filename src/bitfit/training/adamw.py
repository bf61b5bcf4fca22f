"""The optimizer of the released code, for one run or for rows that are runs, and its schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.optim.adam import adam

from bitfit.batches import upload
from bitfit.training.settings import TrainConfig

BETAS = (0.9, 0.999)


class AdamW:
    """AdamW without decay as in transformers 4.2: epsilon is added before bias correction.

    The paper's code used that one; torch's adds it after, which makes it 30 times smaller in the
    first steps, and Adam then turns rounding noise in b_k into movement (Kingma & Ba 2015).
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.means = [torch.zeros_like(t) for t in tensors]
        self.squares = [torch.zeros_like(t) for t in tensors]
        self._far_steps = [torch.full((), _FAR_STEP, device=t.device) for t in tensors]

    @torch.no_grad()
    def step(self, sizes: Sequence[float], epsilons: Sequence[float]) -> None:
        """Move along the gradients and clear them.

        Args:
            sizes: of each run from :func:`step_size`; one, or as many as the tensors have rows.
            epsilons: of each run.
        """
        moving = [
            (tensor, tensor.grad, mean, square, far_step)
            for tensor, mean, square, far_step in zip(
                self.tensors, self.means, self.squares, self._far_steps, strict=True
            )
            if tensor.grad is not None
        ]
        if len(sizes) == 1:
            _step_alone(moving, sizes[0], epsilons[0])
        else:
            _step_rows(moving, sizes, epsilons)
        for tensor, *_ in moving:
            tensor.grad = None

    def reset(self, slot: int, slots: int) -> None:
        """Forget the moments of the run in ``slot`` of ``slots``."""
        for moment in (*self.means, *self.squares):
            (moment if slots == 1 else moment[slot]).zero_()


Moving: TypeAlias = Sequence[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
"""A tensor, its gradient, its two moments and a far step, for each tensor that moves."""

# The number of a step at which the bias corrections of Adam have long been 1. The kernel counts it
# up, which changes nothing; it is made once, as on a GPU each would be a call in every step.
_FAR_STEP = 1e6


def _step_alone(moving: Moving, size: float, epsilon: float) -> None:
    """Move the tensors of a single run by torch's fused kernel: each number is touched once.

    With plain operations full fine-tuning spends more on this than on its products
    (benchmarks/README.md). The kernel corrects before it adds epsilon; ``size`` has the correction
    in it already, so the kernel is told a step at which its own is 1.
    """
    beta1, beta2 = BETAS
    if moving:
        tensors, grads, means, squares, far = (list(column) for column in zip(*moving, strict=True))
        adam(
            tensors, grads, means, squares, max_exp_avg_sqs=[], state_steps=far, fused=True,
            amsgrad=False, beta1=beta1, beta2=beta2, lr=size, weight_decay=0.0, eps=epsilon,
            maximize=False,
        )  # fmt: skip


def _step_rows(moving: Moving, sizes: Sequence[float], epsilons: Sequence[float]) -> None:
    """Move rows, each by its own run's size and epsilon."""
    beta1, beta2 = BETAS
    for tensor, grad, mean, square, _ in moving:
        mean.mul_(beta1).add_(grad, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        column = upload(torch.tensor([[*sizes], [*epsilons]]), tensor.device)[..., None]
        tensor.sub_(mean.div(square.sqrt().add_(column[1])).mul_(column[0]))


def step_size(learning_rate: float, step: int) -> float:
    """Return the factor of AdamW's step number ``step`` (from 1), bias correction included."""
    beta1, beta2 = BETAS
    return learning_rate * math.sqrt(1 - beta2**step) / (1 - beta1**step)


def learning_rate_at(config: TrainConfig, step: int, total: int) -> float:
    """Return the rate of step number ``step`` (from 1) of ``total``."""
    warmup = round(config.warmup_ratio * total)
    if step <= warmup:
        return config.learning_rate * step / warmup
    share = (step - warmup - 1) / max(1, total - warmup)  # 0 at the first step after warm-up
    if config.schedule == "linear":
        return config.learning_rate * (1 - share)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
    return config.learning_rate
