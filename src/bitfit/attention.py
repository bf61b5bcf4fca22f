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
from bitfit.fused_dropout import FusedDropout, Where, has_kernels
from bitfit.leaves import ForwardState
from bitfit.side_by_side import SideBySide, side_by_side

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

    Projections, norms and the MLP see packed tokens; only here are sequences laid side by side.
    Those of runs that train side by side go together, or run by run where their rates of dropout on
    probabilities differ.
    """
    if others.get("sliding_window") is not None:
        raise ValueError("packed attention sees whole sequences; this model attends in windows")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # (1, heads, T, head_dim) -> (T, heads, head_dim), as the projections made them.
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    drops, heads = bitfit_state.dropout, q.shape[1]
    if isinstance(drops, FusedDropout) or (drops is None and has_kernels(q.device)):
        return _attend_fused(q, k, v, bitfit_batch, drops, scaling, dropout)[None], None
    parts = [] if drops is None else drops.attention(bitfit_batch, heads, dropout)
    if not parts:
        return _attend(q, k, v, side_by_side(bitfit_batch, heads), scaling)[None], None
    if len(parts) == 1:
        own: Iterable[Sequence[Tensor]] = [(q, k, v)]
    else:
        counts = [layout.tokens for layout, _ in parts]
        # A split and not slices: the backward of each slice writes zeros for all other runs.
        own = zip(*(x.split(counts) for x in (q, k, v)), strict=True)
    contexts = [
        _DroppedAttention.apply(*qkv, layout, scaling, draw)  # type: ignore[no-untyped-call]
        for qkv, (layout, draw) in zip(own, parts, strict=True)
    ]
    context = contexts[0] if len(contexts) == 1 else torch.cat(contexts)
    return context[None], None


def _attend_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: Batch,
    drops: FusedDropout | None,
    scaling: float,
    rate: float,
) -> Tensor:
    """Attention by a kernel that reads the sequences where they stand."""
    from bitfit.kernels import PackedAttention

    if drops is None:
        where = Where(batch.starts, batch.lengths, batch.max_length)
    else:
        where = drops.where(batch, rate)
    context: Tensor = PackedAttention.apply(q, k, v, where, scaling)  # type: ignore[no-untyped-call]
    return context


def _attend(q: Tensor, k: Tensor, v: Tensor, layout: SideBySide, scaling: float) -> Tensor:
    """Attention without dropout, by torch's fused function; ``(T, heads, head_dim)``."""
    laid = (layout.split_rows(layout.lay(x)) for x in (q, k, v))
    contexts = []
    for group, *qkv in zip(layout.groups, *laid, strict=True):
        q, k, v = (x.unflatten(0, (group.sequences, -1)) for x in qkv)
        mask = None if group.mask is None else group.mask[:, None, None, :]
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        contexts.append(context.flatten(0, 2))
    return layout.take(contexts[0] if len(contexts) == 1 else torch.cat(contexts))


class _DroppedAttention(torch.autograd.Function):
    """Attention with dropout on its weights, by plain products, forward and backward.

    torch's fused attention falls to a slow path on the CPU when it drops. Written out, no copy is
    made that autograd would need and the products do not: the scale is part of the product, the
    mask is what the product is added to, and gradients of the padding, which are zero, are never
    scattered. All groups' weights are in one tensor, and so are their factors and contexts: what
    goes over single elements is one call.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: SideBySide, scaling: float, draw: Draw
    ) -> Tensor:
        q, k, v = (layout.lay(x) for x in (q, k, v))
        weights, context = q.new_empty(layout.scores), torch.empty_like(v)
        rows, squares = layout.split_rows, layout.split_scores
        masks = layout.score_masks(q.dtype)
        for own, q_, k_, mask in zip(squares(weights), rows(q), rows(k), masks, strict=True):
            # Without a mask nothing is added: what the product is added to is not read.
            beta, base = (0, own) if mask is None else (1, mask)
            scores = torch.baddbmm(base, q_, k_.mT, beta=beta, alpha=scaling)
            torch.softmax(scores, dim=-1, out=own)
        factor = draw(weights)
        for kept, v_, out in zip(squares(weights * factor), rows(v), rows(context), strict=True):
            torch.bmm(kept, v_, out=out)
        ctx.save_for_backward(q, k, v, weights, factor)
        ctx.layout, ctx.scaling = layout, scaling
        return layout.take(context)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, factor = ctx.saved_tensors
        layout: SideBySide = ctx.layout
        rows, squares = layout.split_rows, layout.split_scores
        # Zero at the padding: what stands there has no gradient and must give none.
        grad = torch.zeros_like(q)
        grad.index_copy_(0, layout.places, grads[0].reshape(len(layout.places), -1))
        grad_weights = torch.empty_like(weights)
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
        for grad_, kept, v_, out, out_v in zip(
            rows(grad), squares(weights * factor), rows(v), squares(grad_weights), rows(grad_v),
            strict=True,
        ):  # fmt: skip
            torch.bmm(kept.mT, grad_, out=out_v)
            torch.bmm(grad_, v_.mT, out=out)
        grad_weights.mul_(factor)
        for grad_, own, q_, k_, out_q, out_k in zip(
            squares(grad_weights), squares(weights), rows(q), rows(k), rows(grad_q), rows(grad_k),
            strict=True,
        ):  # fmt: skip
            scores = torch._softmax_backward_data(grad_, own, -1, own.dtype)
            torch.baddbmm(out_q, scores, k_, beta=0, alpha=ctx.scaling, out=out_q)
            torch.baddbmm(out_k, scores.mT, q_, beta=0, alpha=ctx.scaling, out=out_k)
        return *(layout.take(x) for x in (grad_q, grad_k, grad_v)), None, None, None


def _no_mask(*_: Any, **__: Any) -> None:
    """Tell transformers to build no attention mask: packed_attention knows the sequences."""


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _no_mask)
