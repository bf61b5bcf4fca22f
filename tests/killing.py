"""A training process for test_resume to kill; imported once by the fork server, then forked."""

from __future__ import annotations

import torch

from bitfit.training import train
from bitfit.training.finetune import finetune


def train_task(base: str, data: str, out: str) -> None:
    """Train a small task, saving the state after every step so that a kill often hits a write."""
    torch.set_num_threads(1)
    train.CHECKPOINT_SECONDS = train.CHECKPOINT_PAUSE = 0.0
    finetune(
        base, data=data, text="body", label="intent", out=out, epochs=6, learning_rate=1e-2,
        dtype="fp32", dev_fraction=0.3, resume=True,
    )  # fmt: skip
