"""Attention over packed batches: the only place that must know where each sequence begins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from bitfit.batches import Batch
from bitfit.dropout import Draw
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
    padded to the longest. With dropout each run's sequences are by themselves on a CPU, in the
    shape that they have when the run is alone, and all together on a GPU.
    """
    if others.get("sliding_window") is not None:
        raise ValueError("packed attention sees whole sequences; this model attends in windows")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # (1, heads, T, head_dim) -> (T, heads, head_dim), as the projections made them.
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    drops = bitfit_state.dropout
    parts = [] if drops is None else drops.attention(bitfit_batch, dropout)
    if not parts:
        return _attend(q, k, v, bitfit_batch, scaling)[None], None
    if len(parts) == 1:
        own: Iterable[Sequence[Tensor]] = [(q, k, v)]
    else:
        counts = [len(batch.input_ids) for batch, _ in parts]
        # A split and not slices: the backward of each slice writes zeros for all other runs.
        own = zip(*(x.split(counts) for x in (q, k, v)), strict=True)
    contexts = [
        _DroppedAttention.apply(*qkv, batch, scaling, draw)  # type: ignore[no-untyped-call]
        for qkv, (batch, draw) in zip(own, parts, strict=True)
    ]
    context = contexts[0] if len(contexts) == 1 else torch.cat(contexts)
    return context[None], None


def _attend(q: Tensor, k: Tensor, v: Tensor, batch: Batch, scaling: float) -> Tensor:
    """Attention without dropout, by torch's fused function; ``(T, heads, head_dim)``."""
    q, k, v = (_side_by_side(x, batch) for x in (q, k, v))  # (B, heads, L, head_dim)
    mask = batch.mask[:, None, None, :]
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    return _end_to_end(context.flatten(0, 2), batch, context.shape[1])


class _DroppedAttention(torch.autograd.Function):
    """Attention with dropout on its weights, by plain products, forward and backward.

    torch's fused attention falls to a slow path on the CPU when it drops. Written out, no copy is
    made that autograd would need and the products do not: the scale is part of the product, the
    mask is what the product is added to, and gradients of the padding, which are zero, are never
    scattered.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scaling: float, draw: Draw
    ) -> Tensor:
        heads = q.shape[1]
        q, k, v = (_side_by_side(x, batch).flatten(0, 1) for x in (q, k, v))  # (B * H, L, hd)
        scores = torch.baddbmm(batch.score_mask(heads, q.dtype), q, k.mT, alpha=scaling)
        weights = torch.softmax(scores, dim=-1)
        factor = draw(weights)
        context = torch.bmm(weights * factor, v)
        ctx.save_for_backward(q, k, v, weights, factor)
        ctx.batch, ctx.heads, ctx.scaling = batch, heads, scaling
        return _end_to_end(context.flatten(0, 1), batch, heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, factor = ctx.saved_tensors
        rows = ctx.batch.head_rows(ctx.heads)
        # Zero at the padding: what stands there has no gradient and must give none.
        grad = torch.zeros_like(q)
        grad.flatten(0, 1).index_copy_(0, rows, grads[0].reshape(len(rows), -1))
        grad_v = torch.bmm((weights * factor).mT, grad)
        grad_weights = torch.bmm(grad, v.mT).mul_(factor)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        # beta 0: what the product is added to is not read.
        grad_q = torch.baddbmm(grad, grad_scores, k, beta=0, alpha=ctx.scaling)
        grad_k = torch.baddbmm(grad, grad_scores.mT, q, beta=0, alpha=ctx.scaling)
        packed = (_end_to_end(x.flatten(0, 1), ctx.batch, ctx.heads)
                  for x in (grad_q, grad_k, grad_v))  # fmt: skip
        return (*packed, None, None, None)


def _side_by_side(x: Tensor, batch: Batch) -> Tensor:
    """``(T, H, hd)`` packed -> ``(B, H, L, hd)`` padded, contiguous, in one gather."""
    tokens, heads, dim = x.shape
    index = batch.padded_head_rows(heads)
    return x.reshape(tokens * heads, dim).index_select(0, index.flatten()).view(*index.shape, dim)


def _end_to_end(x: Tensor, batch: Batch, heads: int) -> Tensor:
    """``(B * H * L, hd)`` padded -> ``(T, H, hd)`` packed, in one gather."""
    return x.index_select(0, batch.head_rows(heads)).view(-1, heads, x.shape[-1])


def _no_mask(*_: Any, **__: Any) -> None:
    """Tell transformers to build no attention mask: packed_attention knows the sequences."""


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _no_mask)
