"""Kernels for a GPU, in Triton: attention over packed sequences, and dropout drawn on the spot.

Attention with dropout by torch's own functions writes and reads the square of scores some twenty
times, and lays all sequences side by side, as wide as the longest. Here a program has some rows of
one head of one sequence, goes over its keys block by block, and the scores never leave the chip
(Dao et al. 2022, FlashAttention). Nothing is padded and nothing is gathered: a sequence is read
where it stands in the packed batch.

Random bits are those of Philox (Salmon et al. 2011): a pure function of a seed and of where an
element stands in its own run's batch, so that the backward pass draws them again in place of
reading them, and a run's masks do not depend on which other runs are beside it.

Importing this module imports Triton, which comes with torch's builds for CUDA.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitfit.fused_dropout import Where

# Numbers of a block of queries, or of keys, that a program has at a time. The backward pass needs
# 98,816 bytes of a multiprocessor's shared memory with the larger ones, 49,152 with the smaller.
BLOCK_NUMBERS, SMALL_BLOCK_NUMBERS = 64 * 64, 32 * 64
LEAST_SHARED_MEMORY = 98_816


@triton.jit
def _kept(seed, row, column, kind, site, threshold):  # type: ignore[no-untyped-def]
    """Return where elements are kept: at places ``row``, ``column`` of a site, blocks of int32."""
    zero = (row + column) * 0
    bits, _, _, _ = tl.philox(seed, column + zero, row + zero, kind + zero, site + zero)
    return (bits >> 1).to(tl.int32) >= threshold


@triton.jit
def _scale(threshold):  # type: ignore[no-untyped-def]
    """Return what kept elements are multiplied with."""
    return 2147483648.0 / (2147483648.0 - threshold.to(tl.float32))


@triton.jit
def _factors(DRAWS, sequence, sequences, rows, columns, head, site):  # type: ignore[no-untyped-def]
    """Return what a block of attention weights is multiplied with."""
    seed = tl.load(DRAWS + sequence)
    own = tl.load(DRAWS + sequences + sequence).to(tl.int32) + rows
    threshold = tl.load(DRAWS + 2 * sequences + sequence).to(tl.int32)
    kept = _kept(seed, own[:, None], columns[None, :], head, site, threshold)
    return tl.where(kept, _scale(threshold), 0.0)


@triton.jit
def _load(pointer, rows, dims, length, head_dim, stride):  # type: ignore[no-untyped-def]
    """Return the rows of a head, zero past the end of the sequence."""
    mask = (rows[:, None] < length) & (dims[None, :] < head_dim)
    return tl.load(pointer + rows[:, None] * stride + dims[None, :], mask=mask, other=0.0)


@triton.jit
def _store(pointer, x, rows, dims, length, head_dim, stride):  # type: ignore[no-untyped-def]
    mask = (rows[:, None] < length) & (dims[None, :] < head_dim)
    place = pointer + rows[:, None] * stride + dims[None, :]
    tl.store(place, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["sequences", "site"])
def _attend(  # type: ignore[no-untyped-def]
    Q, K, V, OUT, LOG_SUMS, STARTS, LENGTHS, DRAWS, sequences, heads, head_dim, scaling, site,
    BLOCK: tl.constexpr, DIM: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the attention of some rows of one head of one sequence, and their log-sums."""
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    length = tl.load(LENGTHS + sequence).to(tl.int32)
    first = tl.program_id(1) * BLOCK
    if first < length:
        rows, dims = first + tl.arange(0, BLOCK), tl.arange(0, DIM)
        place = tl.load(STARTS + sequence).to(tl.int64) * heads + head
        base, stride = place * head_dim, heads * head_dim
        q = _load(Q + base, rows, dims, length, head_dim, stride)
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        context = tl.zeros([BLOCK, DIM], tl.float32)
        for begin in range(0, length, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            k = _load(K + base, columns, dims, length, head_dim, stride)
            v = _load(V + base, columns, dims, length, head_dim, stride)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
            scores = tl.where(columns[None, :] < length, scores, float("-inf"))
            new_best = tl.maximum(best, tl.max(scores, 1))
            weights = tl.exp(scores - new_best[:, None])
            shrink = tl.exp(best - new_best)
            total = total * shrink + tl.sum(weights, 1)
            if DROPS:
                weights *= _factors(DRAWS, sequence, sequences, rows, columns, head, site)
            context = context * shrink[:, None]
            context += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            best = new_best
        _store(OUT + base, context / total[:, None], rows, dims, length, head_dim, stride)
        tl.store(LOG_SUMS + place + rows * heads, best + tl.log(total), mask=rows < length)


@triton.jit(do_not_specialize=["sequences", "site"])
def _attend_backward_queries(  # type: ignore[no-untyped-def]
    Q, K, V, OUT, GRAD, LOG_SUMS, GRAD_Q, STARTS, LENGTHS, DRAWS, sequences, heads, head_dim,
    scaling, site,
    BLOCK: tl.constexpr, DIM: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradient of some rows of queries of one head of one sequence."""
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    length = tl.load(LENGTHS + sequence).to(tl.int32)
    first = tl.program_id(1) * BLOCK
    if first < length:
        rows, dims = first + tl.arange(0, BLOCK), tl.arange(0, DIM)
        place = tl.load(STARTS + sequence).to(tl.int64) * heads + head
        base, stride = place * head_dim, heads * head_dim
        q = _load(Q + base, rows, dims, length, head_dim, stride)
        grad = _load(GRAD + base, rows, dims, length, head_dim, stride)
        out = _load(OUT + base, rows, dims, length, head_dim, stride)
        # What the gradients of a row's weights have in common: sum of weight x gradient.
        common = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
        log_sum = tl.load(LOG_SUMS + place + rows * heads, mask=rows < length, other=0.0)
        grad_q = tl.zeros([BLOCK, DIM], tl.float32)
        for begin in range(0, length, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            k = _load(K + base, columns, dims, length, head_dim, stride)
            v = _load(V + base, columns, dims, length, head_dim, stride)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
            weights = tl.exp(scores - log_sum[:, None])
            weights = tl.where(columns[None, :] < length, weights, 0.0)
            grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            if DROPS:
                grad_weights *= _factors(DRAWS, sequence, sequences, rows, columns, head, site)
            grad_scores = weights * (grad_weights - common[:, None])
            grad_q += tl.dot(grad_scores.to(k.dtype), k, input_precision=PRECISION)
        _store(GRAD_Q + base, grad_q * scaling, rows, dims, length, head_dim, stride)


@triton.jit(do_not_specialize=["sequences", "site"])
def _attend_backward_keys(  # type: ignore[no-untyped-def]
    Q, K, V, OUT, GRAD, LOG_SUMS, GRAD_K, GRAD_V, STARTS, LENGTHS, DRAWS, sequences, heads,
    head_dim, scaling, site,
    BLOCK: tl.constexpr, DIM: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of some rows of keys and values of one head of one sequence."""
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    length = tl.load(LENGTHS + sequence).to(tl.int32)
    first = tl.program_id(1) * BLOCK
    if first < length:
        columns, dims = first + tl.arange(0, BLOCK), tl.arange(0, DIM)
        place = tl.load(STARTS + sequence).to(tl.int64) * heads + head
        base, stride = place * head_dim, heads * head_dim
        k = _load(K + base, columns, dims, length, head_dim, stride)
        v = _load(V + base, columns, dims, length, head_dim, stride)
        grad_k = tl.zeros([BLOCK, DIM], tl.float32)
        grad_v = tl.zeros([BLOCK, DIM], tl.float32)
        for begin in range(0, length, BLOCK):
            rows = begin + tl.arange(0, BLOCK)
            q = _load(Q + base, rows, dims, length, head_dim, stride)
            grad = _load(GRAD + base, rows, dims, length, head_dim, stride)
            out = _load(OUT + base, rows, dims, length, head_dim, stride)
            common = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
            log_sum = tl.load(LOG_SUMS + place + rows * heads, mask=rows < length, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
            weights = tl.exp(scores - log_sum[:, None])
            inside = (rows[:, None] < length) & (columns[None, :] < length)
            weights = tl.where(inside, weights, 0.0)
            grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            kept_weights = weights
            if DROPS:
                factors = _factors(DRAWS, sequence, sequences, rows, columns, head, site)
                kept_weights = weights * factors
                grad_weights *= factors
            grad_v += tl.dot(tl.trans(kept_weights).to(v.dtype), grad, input_precision=PRECISION)
            grad_scores = weights * (grad_weights - common[:, None])
            grad_k += tl.dot(tl.trans(grad_scores).to(k.dtype), q, input_precision=PRECISION)
        _store(GRAD_K + base, grad_k * scaling, columns, dims, length, head_dim, stride)
        _store(GRAD_V + base, grad_v, columns, dims, length, head_dim, stride)


@triton.jit(do_not_specialize=["rows", "kind", "site", "threshold"])
def _drop(  # type: ignore[no-untyped-def]
    X, OUT, DRAWS, rows, width, kind, site, threshold, BLOCK: tl.constexpr
):  # fmt: skip
    """Write one row with its elements dropped or scaled."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(DRAWS + row)
    own = tl.load(DRAWS + rows + row).to(tl.int32)
    x = tl.load(X + row * width + columns, mask=columns < width, other=0.0)
    kept = _kept(seed, own, columns, kind, site, threshold)
    # A block of thresholds, as the interpreter has a bare number here, which cannot be cast.
    dropped = tl.where(kept, x.to(tl.float32) * _scale(threshold + 0 * columns), 0.0)
    tl.store(OUT + row * width + columns, dropped.to(x.dtype), mask=columns < width)


class PackedAttention(torch.autograd.Function):
    """Attention of each sequence over itself: ``(T, heads, head_dim)`` in and out."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, where: Where, scaling: float) -> Tensor:
        """Return the contexts, and keep one number a row for the backward pass."""
        q, k, v = (x.contiguous() for x in (q, k, v))
        out = torch.empty_like(q)
        log_sums = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        ctx.options = _options(q)
        ctx.options["DROPS"] = where.draws is not None
        with launching_on(q.device):
            _attend[_grid(q, where)](
                q, k, v, out, log_sums, *_places(where), *_numbers(q, where, scaling), **ctx.options
            )
        ctx.save_for_backward(q, k, v, out, log_sums)
        ctx.where, ctx.scaling = where, scaling
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of queries, keys and values."""
        q, k, v, out, log_sums = ctx.saved_tensors
        grad, where = grads[0].contiguous(), ctx.where
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
        rest = *_places(where), *_numbers(q, where, ctx.scaling)
        grid = _grid(q, where)
        with launching_on(q.device):
            _attend_backward_queries[grid](
                q, k, v, out, grad, log_sums, grad_q, *rest, **ctx.options
            )
            _attend_backward_keys[grid](
                q, k, v, out, grad, log_sums, grad_k, grad_v, *rest, **ctx.options
            )
        return grad_q, grad_k, grad_v, None, None


def launching_on(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which Triton launches on ``device``: it takes the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _grid(q: Tensor, where: Where) -> tuple[int, int]:
    return len(where.lengths) * q.shape[1], triton.cdiv(where.longest, _sizes(q)[0])


def _sizes(q: Tensor) -> tuple[int, int]:
    """Return how many rows a block has, and how wide it is."""
    width = max(16, triton.next_power_of_2(q.shape[2]))
    return max(16, min(64, _block_numbers(q.device) // width)), width


@cache
def _block_numbers(device: torch.device) -> int:
    if device.type != "cuda":
        return BLOCK_NUMBERS
    properties: Any = torch.cuda.get_device_properties(device)
    shared = properties.shared_memory_per_block_optin
    return BLOCK_NUMBERS if shared >= LEAST_SHARED_MEMORY else SMALL_BLOCK_NUMBERS


def _places(where: Where) -> tuple[Tensor, Tensor, Tensor]:
    draws = where.lengths if where.draws is None else where.draws  # read only where it drops
    return where.starts, where.lengths, draws


def _numbers(q: Tensor, where: Where, scaling: float) -> tuple[int, int, int, float, int]:
    return len(where.lengths), q.shape[1], q.shape[2], scaling, where.site


def _options(q: Tensor) -> dict[str, Any]:
    switch: Any = torch.backends.cuda.matmul
    precision = "tf32" if switch.fp32_precision == "tf32" else "ieee"
    block, width = _sizes(q)
    return {
        "BLOCK": block, "DIM": width, "PRECISION": precision,
        "num_stages": 1,  # most sequences are one or two blocks long: nothing to fetch ahead
    }  # fmt: skip


class Dropped(torch.autograd.Function):
    """Rows ``(N, d)`` with elements dropped; the backward pass draws the same again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, draws: Tensor, kind: int, site: int, threshold: int) -> Tensor:
        """Return the rows; ``draws`` is ``(2, N)`` int64: seed and place of each."""
        ctx.save_for_backward(draws)
        ctx.numbers = kind, site, threshold
        return drop(x, draws, kind, site, threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the rows."""
        (draws,) = ctx.saved_tensors
        return drop(grads[0], draws, *ctx.numbers), None, None, None, None


def drop(x: Tensor, draws: Tensor, kind: int, site: int, threshold: int) -> Tensor:
    """Return rows ``(N, d)`` with elements dropped, each else scaled.

    Args:
        x: the rows.
        draws: ``(2, N)`` int64: the seed of each row, and its place in its own run's batch.
        kind: what is dropped; two kinds of one site draw other bits.
        site: which of a pass it is.
        threshold: of :func:`threshold_of`.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    rows, width = x.shape
    assert draws.shape == (2, rows)
    block = min(1024, triton.next_power_of_2(width))
    grid = rows, triton.cdiv(width, block)
    with launching_on(x.device):
        _drop[grid](x, out, draws, rows, width, kind, site, threshold, BLOCK=block)
    return out
