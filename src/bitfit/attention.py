"""Attention over packed batches: the only place that must know where each sequence begins."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from bitfit.batches import Batch
from bitfit.dropout import DropoutBits
from bitfit.leaves import ForwardState

PACKED = "bitfit_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    bitfit_batch: Batch,
    bitfit_state: ForwardState,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return the attention of each sequence over itself, ``(1, T, heads, head_dim)``.

    Projections, norms and the MLP see packed tokens; only here are sequences laid side by side,
    padded to the longest of the batch. In training each run's sequences are by themselves: they
    have the shape, and so the dropout, that they have when the run is alone.
    """
    if others.get("sliding_window") is not None:
        raise ValueError("packed attention sees whole sequences; this model attends in windows")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # (1, heads, T, head_dim) -> (T, heads, head_dim), as the projections made them.
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if bitfit_state.dropout is None or not dropout:
        return _attend(q, k, v, bitfit_batch, scaling)[None], None
    contexts, begin = [], 0
    for bits, batch in bitfit_state.dropout.parts:
        own = slice(begin, begin + len(batch.input_ids))
        contexts.append(_attend_dropped(q[own], k[own], v[own], batch, scaling, bits, dropout))
        begin = own.stop
    context = contexts[0] if len(contexts) == 1 else torch.cat(contexts)
    return context[None], None


def _attend(q: Tensor, k: Tensor, v: Tensor, batch: Batch, scaling: float) -> Tensor:
    """Attention without dropout, by torch's fused function; ``(T, heads, head_dim)``."""
    q, k, v = (_side_by_side(x, batch) for x in (q, k, v))  # (B, heads, L, head_dim)
    mask = batch.mask[:, None, None, :]
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    return _end_to_end(context, batch)


def _attend_dropped(
    q: Tensor, k: Tensor, v: Tensor, batch: Batch, scaling: float, bits: DropoutBits, rate: float
) -> Tensor:
    """Attention with dropout by plain products: the fused one falls to a slow path on the CPU."""
    q, k, v = (_side_by_side(x, batch) for x in (q, k, v))
    scores = torch.matmul(q * scaling, k.transpose(2, 3))
    scores = scores.masked_fill(~batch.mask[:, None, None, :], torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1)
    return _end_to_end(torch.matmul(weights * bits.scale(weights, rate), v), batch)


def _side_by_side(x: Tensor, batch: Batch) -> Tensor:
    """``(T, H, hd)`` packed -> ``(B, H, L, hd)`` padded, contiguous, in one gather."""
    tokens, heads, dim = x.shape
    rows = batch.padded_index * heads  # (B, L)
    index = rows[:, None, :] + torch.arange(heads, device=rows.device)[None, :, None]
    return x.reshape(tokens * heads, dim).index_select(0, index.flatten()).view(*index.shape, dim)


def _end_to_end(x: Tensor, batch: Batch) -> Tensor:
    """``(B, H, L, hd)`` padded -> ``(T, H, hd)`` packed."""
    b, heads, length, dim = x.shape
    tokens = x.transpose(1, 2).reshape(b * length, heads * dim)
    return tokens.index_select(0, batch.unpadded_index).view(-1, heads, dim)


def _no_mask(*_: Any, **__: Any) -> None:
    """Tell transformers to build no attention mask: packed_attention knows the sequences."""


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _no_mask)
