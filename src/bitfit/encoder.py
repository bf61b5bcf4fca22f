"""The frozen encoder: a transformers model whose leaves read what they add from a bank.

No architecture is written again. Leaf modules (Linear, LayerNorm, Dropout) are swapped in place and
keep the names ``weight`` and ``bias``; attention goes through a function registered with
transformers, the only place that must know where each sequence of a packed batch begins. One
definition of the forward pass serves training (one row), lanes and mixed batches (many rows).
"""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from bitfit.bank import Layout
from bitfit.base import (
    Base,
    choose_device,
    classifier_dropout,
    load_base,
    max_positions,
    position_offset,
    quiet_transformers,
)
from bitfit.batches import Batch, Feature, pack
from bitfit.errors import UsageError
from bitfit.terms import Site

PACKED = "bitfit_packed"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# A probe passes below this, relative to the largest value. Rounding gives 1e-6, a fault 1e-1.
PROBE_TOLERANCE = 1e-4


class DropoutBits:
    """Dropout masks for one step, from random bits that depend on (seed, step) only.

    Sixteen bits an element give the rate 0.1 as 0.10001; eight would give 0.1016. A step draws the
    same masks whether or not the run was interrupted before it.
    """

    def __init__(self, seed: int, step: int, device: torch.device) -> None:
        state = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)
        self.seed = int(state[0] >> np.uint64(1))
        self.generator = torch.Generator(device).manual_seed(self.seed)

    def scale(self, x: Tensor, rate: float) -> Tensor:
        """Return a factor per element of ``x``: 0 with probability ``rate``, else 1/(1 - rate)."""
        words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
        # The whole range: without bounds the sign bit is always 0 and every fourth draw biased.
        words.random_(-(2**63), None, generator=self.generator)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)
        dropped = round(rate * 65536)
        keep = bits >= dropped - 32768
        return keep.to(x.dtype).mul_(65536 / (65536 - dropped))


@dataclass
class ForwardState:
    """What the leaves read during one forward pass. One thread owns it."""

    shifts: Mapping[str, Tensor] = field(default_factory=dict)
    """By module path: ``(K, length)``, what each row adds to that module's bias."""
    index: Tensor | None = None
    """The row of each element of a leaf's leading axes; None: all use row 0."""
    dropout: DropoutBits | None = None
    """None: evaluation."""


class BankedLinear(nn.Module):
    """A Linear that adds ``bias + shift``, summed in fp32, with the shift of each token's row."""

    def __init__(self, linear: nn.Linear, path: str, state: ForwardState) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.path, self.state = path, state

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W^T + b``, shape ``(..., out_features)``."""
        shift = self.state.shifts.get(self.path)
        if self.bias is None:
            return F.linear(x, self.weight)
        if shift is None:
            return F.linear(x, self.weight, self.bias.to(x.dtype))
        if self.state.index is None:
            # All rows agree: the bias folds into the matrix product.
            return F.linear(x, self.weight, (self.bias + shift[0]).to(x.dtype))
        return F.linear(x, self.weight) + _per_row(self.bias + shift, self.state.index, x)


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
        weight = None if self.weight is None else self.weight.to(x.dtype)
        if shift is not None and self.state.index is not None:
            plain = F.layer_norm(x, self.normalized_shape, weight, None, self.eps)
            return plain + _per_row(self.bias + shift, self.state.index, x)
        bias = self.bias if shift is None else self.bias + shift[0]
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
        return x * self.state.dropout.scale(x, self.p)


def _per_row(bias: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """Return the bias ``(K, d)`` of each token: ``(T, d)`` packed, ``(B, 1, d)`` padded."""
    chosen = bias.to(x.dtype).index_select(0, index)
    return chosen[:, None] if x.ndim == 3 and x.shape[0] != 1 else chosen


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
    padded to the longest of the batch. Without dropout torch's fused attention runs, with dropout
    plain products do, since the fused one falls back to a slow path on the CPU.
    """
    if others.get("sliding_window") is not None:
        raise ValueError("packed attention sees whole sequences; this model attends in windows")
    q, k, v = (_side_by_side(x, bitfit_batch) for x in (query, key, value))  # (B, H, L, hd)
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    mask = bitfit_batch.mask[:, None, None, :]
    bits = bitfit_state.dropout
    if bits is None or not dropout:
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    else:
        scores = torch.matmul(q * scaling, k.transpose(2, 3))
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1)
        context = torch.matmul(weights * bits.scale(weights, dropout), v)
    b, h, length, d = context.shape
    tokens = context.transpose(1, 2).reshape(b * length, h * d)
    packed = tokens.index_select(0, bitfit_batch.unpadded_index)
    return packed.view(1, -1, h, d), None


def _side_by_side(x: Tensor, batch: Batch) -> Tensor:
    """``(1, H, T, hd)`` packed -> ``(B, H, L, hd)`` padded, contiguous, in one gather."""
    _, heads, tokens, dim = x.shape
    flat = x.transpose(1, 2).reshape(tokens * heads, dim)
    rows = batch.padded_index * heads  # (B, L)
    index = rows[:, None, :] + torch.arange(heads, device=rows.device)[None, :, None]
    return flat.index_select(0, index.flatten()).view(*index.shape, dim)


def _no_mask(*_: Any, **__: Any) -> None:
    """Tell transformers to build no attention mask: packed_attention knows the sequences."""


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _no_mask)


class Encoder:
    """A frozen base, ready to run any rows of a bank: packed where that holds, else padded.

    Args:
        base: from :func:`bitfit.base.load_base`; its model is taken over and changed in place.
        dtype: precision of the frozen weights and the activations; biases stay fp32.
        device: where it runs.
        packed: False forces padded batches.
    """

    def __init__(
        self,
        base: Base,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        packed: bool = True,
    ) -> None:
        self.base, self.pooler = base, base.pooler
        self.model: Any = base.model  # transformers' own classes are not typed
        self.dtype, self.device = dtype, device or torch.device("cpu")
        self.sites: tuple[Site, ...] = base.sites
        self.state = ForwardState()
        self._lock = threading.RLock()
        self._accepts = set(inspect.signature(self.model.forward).parameters)
        _swap_leaves(self.model, "", self.state)
        if self.pooler is not None:
            self.pooler = _swapped(self.pooler, "pooler", self.state)
            _swap_leaves(self.pooler, "pooler.", self.state)
        self._cast(torch.float32)
        self.packed = packed and "position_ids" in self._accepts and self._probe_packing()
        self._set_attention(packed=self.packed)
        self.mixes = self._probe_mixing()
        self.inert_terms = ("key",) if self._probe_key_inert() else ()
        self._cast(dtype)

    @property
    def hidden_size(self) -> int:
        """The length of a hidden state."""
        return int(self.base.config.hidden_size)

    def clamp_length(self, max_length: int) -> int:
        """Return ``max_length``, or what the base's position table holds where that is less."""
        return min(max_length, max_positions(self.base.config))

    @property
    def dropout_rate(self) -> float:
        """The base's own dropout on hidden states, which its classifier head uses too."""
        return classifier_dropout(self.base.config)

    @property
    def weights(self) -> int:
        """Numbers in the matrices that a token is multiplied with (embeddings are looked up)."""
        return sum(m.weight.numel() for m in self.model.modules() if isinstance(m, BankedLinear))

    def encode(
        self,
        batch: Batch,
        shifts: Mapping[str, Tensor],
        index: Tensor | None = None,
        dropout: DropoutBits | None = None,
    ) -> Tensor:
        """Return the last hidden states ``(T, hidden)`` of a batch, sequences end to end, in fp32.

        Args:
            batch: the sequences, on the encoder's device.
            shifts: rows of the bank by module path, each ``(K, length)``: ``Layout.split(rows)``.
            index: ``(B,)``, the row of each sequence; None when all use row 0.
            dropout: the step's random bits; None evaluates.
        """
        if index is not None and not self.mixes:
            return self._encode_by_row(batch, shifts, index, dropout)
        with self._lock:
            self.model.train(dropout is not None)
            self.state.shifts, self.state.dropout = shifts, dropout
            try:
                run = self._run_packed if self.packed else self._run_padded
                return run(batch, index).float()
            finally:
                self.state.shifts, self.state.index, self.state.dropout = {}, None, None

    def pool(
        self, hidden: Tensor, batch: Batch, pooling: str, shifts: Mapping[str, Tensor]
    ) -> Tensor:
        """Return one vector per sequence, ``(B, hidden)``, of a batch whose rows all agree.

        ``pooler`` is the pretrained layer over [CLS], whose bias belongs to the sequence and not to
        its tokens; ``cls`` the first token; ``mean`` the mean over the tokens, specials included.
        """
        if pooling == "mean":
            return torch.segment_reduce(hidden, "mean", lengths=batch.lengths, axis=0)
        first = hidden.index_select(0, batch.starts)
        if pooling == "cls":
            return first
        assert self.pooler is not None  # make_head has seen to it
        first = first.to(self.dtype)
        with self._lock:
            self.state.shifts = shifts
            try:
                # transformers' poolers look at hidden[:, 0]; ALBERT's is a bare Linear.
                if isinstance(self.pooler, BankedLinear):
                    return torch.tanh(self.pooler(first)).float()
                pooled: Tensor = self.pooler(first[:, None])
                return pooled.float()
            finally:
                self.state.shifts = {}

    def _run_packed(self, batch: Batch, index: Tensor | None) -> Tensor:
        self.state.index = None if index is None else index[batch.sequence_of_token]
        inputs = {
            "input_ids": batch.input_ids[None],
            "token_type_ids": batch.token_type_ids[None],
            "position_ids": (batch.positions + position_offset(self.base.config))[None],
        }
        output = self.model(
            **{name: value for name, value in inputs.items() if name in self._accepts},
            bitfit_batch=batch,
            bitfit_state=self.state,
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def _run_padded(self, batch: Batch, index: Tensor | None) -> Tensor:
        self.state.index = index
        padding = self.base.config.pad_token_id or 0
        inputs = {
            "input_ids": torch.where(batch.mask, batch.input_ids[batch.padded_index], padding),
            "token_type_ids": torch.where(batch.mask, batch.token_type_ids[batch.padded_index], 0),
            "attention_mask": batch.mask.long(),
        }
        with torch.random.fork_rng(enabled=self.state.dropout is not None):
            if self.state.dropout is not None:
                # Some families drop inside their attention with torch's global generator.
                torch.manual_seed(self.state.dropout.seed)
            output = self.model(**{k: v for k, v in inputs.items() if k in self._accepts})
        hidden: Tensor = output.last_hidden_state
        return hidden.flatten(0, 1).index_select(0, batch.unpadded_index)

    def _encode_by_row(
        self,
        batch: Batch,
        shifts: Mapping[str, Tensor],
        index: Tensor,
        dropout: DropoutBits | None,
    ) -> Tensor:
        """A mixed batch, one row after the other, for families whose leaves see no batch axis."""
        parts, places = [], []
        for row in index.unique().tolist():
            chosen = torch.nonzero(index == row).flatten().tolist()
            part = pack([batch.features[i] for i in chosen]).to(self.device)
            own = {path: shift[row : row + 1] for path, shift in shifts.items()}
            parts.append(self.encode(part, own, None, dropout))
            places.append(torch.nonzero(index[batch.sequence_of_token] == row).flatten())
        order = torch.cat(places)
        return torch.cat(parts).index_select(0, torch.argsort(order))

    def _cast(self, dtype: torch.dtype) -> None:
        """Put weights in ``dtype`` on the device; the biases of leaves stay fp32 for exact sums."""
        for module in (self.model, *([self.pooler] if self.pooler is not None else [])):
            nn.Module.to(module, self.device)
            for leaf in module.modules():
                banked = isinstance(leaf, BankedLinear | BankedLayerNorm)
                for name, parameter in leaf.named_parameters(recurse=False):
                    keep = banked and name == "bias"
                    parameter.data = parameter.data.to(torch.float32 if keep else dtype)

    def _set_attention(self, *, packed: bool) -> None:
        with quiet_transformers():  # it warns of families that have one implementation only
            self.model.set_attn_implementation(PACKED if packed else "eager")

    @torch.no_grad()
    def _probe_packing(self) -> bool:
        """Whether packed sequences give what padded ones do, tried on a probe batch."""
        batch = self._probe_batch()
        self._set_attention(packed=False)
        expected = self._run_padded(batch, None)
        try:
            self._set_attention(packed=True)
            found = self._run_packed(batch, None)
        except (TypeError, ValueError, RuntimeError, IndexError, KeyError):
            return False
        return _near(found, expected)

    @torch.no_grad()
    def _probe_mixing(self) -> bool:
        """Whether a batch of different rows gives what each row gives alone."""
        batch, layout = self._probe_batch(), Layout(self.sites)
        if not self.sites:
            return True
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(len(batch.lengths), layout.n, generator=generator).mul_(0.1)
        shifts = layout.split(rows.to(self.device))
        index = torch.arange(len(batch.lengths), device=self.device)
        self.mixes = False
        expected = self.encode(batch, shifts, index)
        self.mixes = True
        try:
            return _near(self.encode(batch, shifts, index), expected)
        except RuntimeError:  # a leaf without a batch axis does not even broadcast
            return False

    @torch.no_grad()
    def _probe_key_inert(self) -> bool:
        """Whether adding noise to every b_k changes nothing (softmax is blind to it)."""
        layout = Layout(tuple(s for s in self.sites if s.term == "key"))
        if not layout.sites:
            return False
        batch = self._probe_batch()
        noise = torch.randn(1, layout.n, generator=torch.Generator().manual_seed(0))
        plain = self.encode(batch, {})
        return _near(self.encode(batch, layout.split(noise.to(self.device))), plain)

    def _probe_batch(self) -> Batch:
        random = np.random.default_rng(0)
        pad = self.base.config.pad_token_id or 0
        features = []
        for length in (5, 9, 3):
            ids = random.integers(0, self.base.config.vocab_size - 1, length)
            ids += ids >= pad  # every token but the padding
            features.append(Feature(ids, np.zeros_like(ids), 0))
        return pack(features).to(self.device)


def _near(found: Tensor, expected: Tensor) -> bool:
    scale = expected.abs().max().clamp_min(1e-6)
    return bool((found - expected).abs().max() <= PROBE_TOLERANCE * scale)


def _swapped(module: nn.Module, path: str, state: ForwardState) -> nn.Module:
    if isinstance(module, nn.Linear):
        return BankedLinear(module, path, state)
    if isinstance(module, nn.LayerNorm):
        return BankedLayerNorm(module, path, state)
    return BankedDropout(module, state) if isinstance(module, nn.Dropout) else module


def _swap_leaves(module: nn.Module, prefix: str, state: ForwardState) -> None:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        setattr(module, name, _swapped(child, path, state))
        _swap_leaves(child, f"{path}.", state)


@dataclass(frozen=True)
class Precision:
    """Which precision this machine multiplies fastest in, as measured."""

    dtype: torch.dtype
    gflops: Mapping[str, float]
    """Billions of floating-point operations per second, by precision."""


def measure_precision(device: torch.device, hidden: int = 384, tokens: int = 512) -> Precision:
    """Time fp32 and bf16 matrix products of the encoder's shape; takes some 50 ms.

    bf16 is chosen where it is at least 1.3 times as fast: below that, its rounding buys nothing.
    """
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x = torch.ones(tokens, hidden, dtype=dtype, device=device)
        w = torch.ones(4 * hidden, hidden, dtype=dtype, device=device)
        seconds = _best_time(lambda x=x, w=w: F.linear(x, w), device)  # type: ignore[misc]
        rates[name] = 2 * tokens * hidden * 4 * hidden / seconds / 1e9
    best = torch.bfloat16 if rates["bf16"] > 1.3 * rates["fp32"] else torch.float32
    return Precision(best, rates)


def open_encoder(
    base: str,
    dtype: str = "auto",
    device: str = "auto",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Encoder:
    """Load ``base`` and return it as an encoder in the precision asked for.

    ``auto`` measures this machine for some milliseconds.

    Raises:
        UsageError: an unknown precision.
        BaseModelError: the base cannot be loaded.
    """
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    place = choose_device(device)
    loaded = load_base(base, revision=revision, trust_remote_code=trust_remote_code)
    if dtype != "auto":
        chosen = DTYPES[dtype]
    else:
        chosen = measure_precision(place, loaded.config.hidden_size).dtype
    return Encoder(loaded, dtype=chosen, device=place)


def _best_time(call: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)
