"""The leaves of the frozen encoder: modules that read what they add from rows of a bank.

They are swapped in for a transformers model's own Linear, LayerNorm and Dropout and keep the names
``weight`` and ``bias``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfit.batches import upload
from bitfit.dropout import StepDropout
from bitfit.fused_dropout import FusedDropout

Masks: TypeAlias = StepDropout | FusedDropout
# How many elements of a segment one thread of a GPU adds up.
PART = 32
# Of how many tokens the products of chosen scalars are in memory at once.
CHOSEN_TOKENS = 1024


class RowIndex:
    """Which row each token (or each sequence of a padded batch) uses.

    Args:
        index: ``(N,)``, a row of the bank for each element of a leaf's token axis.
        rows: K, how many rows there are.
        padded: whether the elements are the sequences of a padded batch ``(B, L, d)``.
        stretches: ``(row, length)`` of each stretch of equal rows; None: they are looked for, which
            waits for a GPU.
    """

    def __init__(
        self,
        index: Tensor,
        rows: int,
        *,
        padded: bool = False,
        stretches: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self.index, self.rows, self.padded = index, rows, padded
        self._given = stretches

    def gather(self, rows: Tensor, like: Tensor) -> Tensor:
        """Return the row of each element, from ``rows`` ``(K, d)``, to be added to ``like``."""
        chosen = rows.to(like.dtype).index_select(0, self.index)
        return chosen[:, None] if self.padded and like.ndim == 3 else chosen

    @cached_property
    def _stretches(self) -> Sequence[tuple[int, int]]:
        """``(row, length)`` of each stretch of equal rows."""
        if self._given is not None:
            return self._given
        rows, counts = torch.unique_consecutive(self.index, return_counts=True)
        return list(zip(rows.tolist(), counts.tolist(), strict=True))

    @cached_property
    def _in_order(self) -> bool:
        """Whether every row has one stretch, and they come in the order of the rows."""
        return [row for row, _ in self._stretches] == list(range(self.rows))

    @cached_property
    def _on_device(self) -> tuple[Tensor, Tensor, Tensor]:
        """The row of each stretch, how many parts it has, and the lengths of all parts."""
        parts: list[int] = []
        counts = []
        for _, length in self._stretches:
            whole, rest = divmod(length, PART)
            own = [PART] * whole + [rest] * (rest > 0)
            counts.append(len(own))
            parts += own
        rows = [row for row, _ in self._stretches]
        sent = upload(torch.tensor([*rows, *counts, *parts]), self.index.device)
        on_device: tuple[Tensor, Tensor, Tensor] = sent.split([len(rows), len(rows), len(parts)])
        return on_device

    def sum_by_row(self, grad: Tensor) -> Tensor:
        """Return ``(K, d)`` in fp32: the sum of ``grad`` ``(N, d)`` over the elements of each row.

        Stretch by stretch, which is how a run alone sums its own: a NaN of one row stays there, as
        it would not in a product with zeros and ones, and scattered additions on a GPU would not be
        reproducible.
        """
        if grad.is_cuda:
            return self._sum_segments(grad)
        dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        total = grad.new_zeros(self.rows, grad.shape[-1], dtype=dtype)
        seen, begin = set(), 0
        for row, length in self._stretches:
            own = grad[begin : begin + length]
            if row in seen:
                total[row] += own.sum(0, dtype=dtype)
            else:
                torch.sum(own, 0, dtype=dtype, out=total[row])
                seen.add(row)
            begin += length
        return total

    def _sum_segments(self, grad: Tensor) -> Tensor:
        """The same in one call, however many stretches there are."""
        rows, counts, parts = self._on_device
        # The kernel goes over a segment element by element, so first over short parts of it, which
        # are many; unsafe: the lengths are ours, and checking them would wait for the GPU.
        sums = torch.segment_reduce(grad.float(), "sum", lengths=parts, axis=0, unsafe=True)
        sums = torch.segment_reduce(sums, "sum", lengths=counts, axis=0, unsafe=True)
        if self._in_order:
            return sums
        return sums.new_zeros(self.rows, grad.shape[-1]).index_add_(0, rows, sums)


@dataclass
class ForwardState:
    """What the leaves read during one forward pass. One thread owns it."""

    shifts: Mapping[str, Tensor] = field(default_factory=dict)
    """By module path: ``(K, length)``, what each row adds to that module's bias."""
    index: RowIndex | None = None
    """The row of each element of a leaf's token axis; None: all use row 0."""
    dropout: Masks | None = None
    """None: evaluation."""
    holds_base: bool = False
    """Whether the base's biases are in ``shifts`` already: one sum for all modules together."""
    recompute: bool = False
    """Keep only the input of each layer, and compute it again in the backward pass."""

    def summed(self, bias: Tensor, shift: Tensor) -> Tensor:
        """Return what a module adds: its ``bias`` and the ``shift`` of the rows, in fp32."""
        return shift if self.holds_base else bias + shift

    def snapshot(self) -> Snapshot:
        """Return what a layer that is computed again must find."""
        places = None if self.dropout is None else self.dropout.places()
        return Snapshot(self.shifts, self.holds_base, self.index, self.dropout, places)

    @contextmanager
    def returned_to(self, seen: Snapshot) -> Iterator[None]:
        """Return a context in which all is as it was at a snapshot, random bits included."""
        now = self.shifts, self.holds_base, self.index, self.dropout
        self.shifts, self.holds_base = seen.shifts, seen.holds_base
        self.index, self.dropout = seen.index, seen.dropout
        if seen.dropout is not None:
            seen.dropout.move_to(seen.places)
        try:
            yield
        finally:
            self.shifts, self.holds_base, self.index, self.dropout = now


@dataclass(frozen=True)
class Snapshot:
    """A moment of a :class:`ForwardState`."""

    shifts: Mapping[str, Tensor]
    holds_base: bool
    index: RowIndex | None
    dropout: Masks | None
    places: Any
    """Where the random bits were, as the masks say it."""


def _only(rows: Tensor) -> Tensor:
    """Return row 0. A view of an only row has a gradient that nobody has to copy."""
    return rows.view(-1) if len(rows) == 1 else rows[0]


def _linear_by_row(x: Tensor, weight: Tensor, rows: Tensor, index: RowIndex) -> Tensor:
    """What :class:`_LinearByRow` computes: the rows are what the product is added to."""
    y = index.gather(rows, x)
    return y.addmm_(x.flatten(0, -2), weight.t()).view(*x.shape[:-1], -1)


def _add_by_row(x: Tensor, rows: Tensor, index: RowIndex) -> Tensor:
    """What :class:`_AddByRow` computes, in place."""
    x.view(-1, x.shape[-1]).add_(index.gather(rows, x))
    return x


class _LinearByRow(torch.autograd.Function):
    """``x W^T + rows[index]`` of frozen ``W``: nothing of x is kept, the sum goes into the product.

    Backward: the gradient carried through W, and for each row the sum over its tokens.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rows: Tensor, index: RowIndex) -> Tensor:
        ctx.index = index
        ctx.save_for_backward(weight)
        return _linear_by_row(x, weight, rows, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (weight,) = grads, ctx.saved_tensors
        flat = grad.flatten(0, -2)
        x = (flat @ weight).view(*grad.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        return x, None, ctx.index.sum_by_row(flat) if ctx.needs_input_grad[2] else None, None


class _AddByRow(torch.autograd.Function):
    """``x + rows[index]``, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, index: RowIndex) -> Tensor:
        ctx.index = index
        ctx.mark_dirty(x)
        return _add_by_row(x, rows, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        needed = ctx.needs_input_grad[1]
        return grad, ctx.index.sum_by_row(grad.flatten(0, -2)) if needed else None, None


@dataclass(frozen=True)
class ChosenScalars:
    """Some scalars of a matrix, which are trained while all others stay."""

    values: Tensor
    """``(c,)``: what the gradients go to. The matrix has the same numbers."""
    rows: Tensor
    """``(c,)``: the row of each."""
    columns: Tensor
    """``(c,)``: the column of each."""


class _LinearOfChosen(torch.autograd.Function):
    """``x W^T + b``, which gives gradients of some scalars of ``W`` and of no others.

    The gradient of all of ``W`` is a product as large as that of the forward pass; that of a scalar
    is one sum over the tokens.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None,
        values: Tensor, rows: Tensor, columns: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, rows, columns)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, weight, rows, columns) = grads, ctx.saved_tensors
        of_x, _, of_bias, *_ = ctx.needs_input_grad
        flat = grad.flatten(0, -2)
        values = flat.new_zeros(len(rows))
        for part, inputs in zip(
            flat.split(CHOSEN_TOKENS), x.flatten(0, -2).split(CHOSEN_TOKENS), strict=True
        ):
            values += (part.index_select(1, rows) * inputs.index_select(1, columns)).sum(0)
        return (
            grad @ weight if of_x else None,
            None,
            flat.sum(0) if of_bias else None,
            values,
            None,
            None,
        )


class BankedLinear(nn.Linear):
    """A Linear that adds ``bias + shift``, summed in fp32, with the shift of each token's row."""

    chosen: ChosenScalars | None = None
    """Which of its scalars get gradients, though the matrix is frozen."""

    def __init__(self, linear: nn.Linear, path: str, state: ForwardState) -> None:
        nn.Module.__init__(self)  # Linear's own would make a matrix
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.path, self.state = path, state

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W^T + b``, shape ``(..., out_features)``."""
        shift, index = self.state.shifts.get(self.path), self.state.index
        if self.chosen is not None and torch.is_grad_enabled():
            return self._with_chosen(x, self.chosen)
        if self.bias is None:
            return F.linear(x, self.weight)
        if shift is None:
            return F.linear(x, self.weight, self.bias.to(x.dtype))
        if index is None:
            # All rows agree: the bias folds into the matrix product.
            return F.linear(x, self.weight, self.state.summed(self.bias, _only(shift)).to(x.dtype))
        rows = self.state.summed(self.bias, shift)
        if index.padded:
            return F.linear(x, self.weight) + index.gather(rows, x)
        if not torch.is_grad_enabled():
            return _linear_by_row(x, self.weight, rows, index)
        linear: Tensor = _LinearByRow.apply(x, self.weight, rows, index)  # type: ignore[no-untyped-call]
        return linear

    def _with_chosen(self, x: Tensor, chosen: ChosenScalars) -> Tensor:
        linear: Tensor = _LinearOfChosen.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias, chosen.values, chosen.rows, chosen.columns
        )
        return linear


class BankedLayerNorm(nn.Module):
    """A LayerNorm whose bias is read from the bank; the gain stays the base's."""

    def __init__(self, norm: nn.LayerNorm, path: str, state: ForwardState) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.normalized_shape, self.eps = norm.normalized_shape, norm.eps
        self.path, self.state = path, state

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised ``x`` of unchanged shape."""
        shift = self.state.shifts.get(self.path) if self.bias is not None else None
        index = self.state.index
        weight = None if self.weight is None else self.weight.to(x.dtype)
        if shift is not None and index is not None:
            rows = self.state.summed(self.bias, shift)
            plain = F.layer_norm(x, self.normalized_shape, weight, None, self.eps)
            if index.padded:
                return plain + index.gather(rows, x)
            if not torch.is_grad_enabled():
                return _add_by_row(plain, rows, index)
            summed: Tensor = _AddByRow.apply(plain, rows, index)  # type: ignore[no-untyped-call]
            return summed
        bias = self.bias if shift is None else self.state.summed(self.bias, _only(shift))
        bias = None if bias is None else bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class BankedDropout(nn.Module):
    """A Dropout that draws from the step's own random bits."""

    def __init__(self, dropout: nn.Dropout, state: ForwardState) -> None:
        super().__init__()
        self.p, self.state = dropout.p, state

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with elements dropped in training, ``x`` itself in evaluation."""
        if self.state.dropout is None or self.p == 0:
            return x
        return self.state.dropout.drop(x, self.p)


def swapped(module: nn.Module, path: str, state: ForwardState) -> nn.Module:
    """Return the leaf that stands in for ``module``, or ``module`` itself if it is none."""
    if isinstance(module, nn.Linear):
        return BankedLinear(module, path, state)
    if isinstance(module, nn.LayerNorm):
        return BankedLayerNorm(module, path, state)
    return BankedDropout(module, state) if isinstance(module, nn.Dropout) else module


def swap_leaves(module: nn.Module, prefix: str, state: ForwardState) -> None:
    """Swap every leaf below ``module``, in place; ``prefix`` is its path with a dot, or empty."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        setattr(module, name, swapped(child, path, state))
        swap_leaves(child, f"{path}.", state)
