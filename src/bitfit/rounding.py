"""Biases in fewer bits: 16, or 8 with a scale for each bias vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

StorageType = Literal["fp32", "fp16", "bf16", "int8"]
STORAGE_TYPES: dict[StorageType, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
}


def quantize(bias: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return int8 values ``(n,)`` and the fp32 scale of each site: its largest value is 127."""
    parts = torch.split(bias, list(lengths)) if lengths else ()
    peaks = [part.abs().max() / 127 for part in parts]
    scale = torch.stack(peaks) if peaks else bias.new_zeros(0)
    # A site whose scale underflows to zero is stored as zeros.
    safe = torch.where(scale > 0, scale, torch.inf)
    values = bias / safe.repeat_interleave(_counts(bias, lengths))
    return values.round().clamp(-127, 127).to(torch.int8), scale


def dequantize(values: Tensor, scale: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the fp32 values ``(..., n)`` that :func:`quantize` stored."""
    return values.float() * scale.repeat_interleave(_counts(scale, lengths), dim=-1)


def _counts(like: Tensor, lengths: Sequence[int]) -> Tensor:
    return torch.tensor(lengths, dtype=torch.long, device=like.device)
