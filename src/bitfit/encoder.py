"""The frozen encoder: a transformers model whose leaves read what they add from a bank.

No architecture is written again. Leaf modules (Linear, LayerNorm, Dropout) are swapped in place and
keep the names ``weight`` and ``bias``; attention goes through a function registered with
transformers, the only place that must know where each sequence of a packed batch begins. One
definition of the forward pass serves training (one row), lanes and mixed batches (many rows).
"""

from __future__ import annotations

import inspect
import itertools
import operator
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitfit.attention import PACKED
from bitfit.bank import Layout
from bitfit.base import (
    Base,
    classifier_dropout,
    load_base,
    max_positions,
    position_offset,
    quiet_transformers,
)
from bitfit.batches import Batch, Feature, pack, upload
from bitfit.leaves import (
    BankedLayerNorm,
    BankedLinear,
    ForwardState,
    Masks,
    RowIndex,
    swap_leaves,
    swapped,
)
from bitfit.precision import (
    PRECISIONS,
    choose_place,
    dtype_name,
    exact_as,
    measure_precision,
)
from bitfit.recompute import recompute_layers
from bitfit.sharing import Layers, Shared, share
from bitfit.terms import Site

# A probe passes below this, relative to the largest value. Rounding gives 1e-6, a fault 1e-1.
PROBE_TOLERANCE = 1e-4


class Encoder:
    """A frozen base, ready to run any rows of a bank: packed where that holds, else padded.

    Args:
        base: from :func:`bitfit.base.load_base`; its model is taken over and changed in place.
        dtype: precision of the frozen weights and the activations; biases stay fp32.
        device: where it runs.
        packed: False forces padded batches.
        tf32: whether a GPU may round the factors of fp32 products to 10 bits, for its tensor cores.
    """

    def __init__(
        self,
        base: Base,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        packed: bool = True,
        tf32: bool = False,
    ) -> None:
        self.base, self.pooler = base, base.pooler
        self.model: Any = base.model  # transformers' own classes are not typed
        self.dtype = dtype
        self.tf32 = False  # the probes below are of exact products
        # As tensors name it: "cuda" alone is not equal to their "cuda:0".
        self.device = torch.empty(0, device=device or torch.device("cpu")).device
        self.sites: tuple[Site, ...] = base.sites
        self.state = ForwardState()
        self._lock = threading.RLock()
        self._biases: dict[Layout, Tensor] = {}
        self._accepts = set(inspect.signature(self.model.forward).parameters)
        swap_leaves(self.model, "", self.state)
        self.layers = Layers(self.model, self.sites)
        recompute_layers(self.model, self.state)
        if self.pooler is not None:
            self.pooler = swapped(self.pooler, "pooler", self.state)
            swap_leaves(self.pooler, "pooler.", self.state)
        self._cast(torch.float32)
        self.packed = packed and "position_ids" in self._accepts and self._probe_packing()
        self._set_attention(packed=self.packed)
        self.mixes = self._probe_mixing()
        self.inert_terms = ("key",) if self._probe_key_inert() else ()
        self._cast(dtype)
        self.tf32 = tf32

    @property
    def hidden_size(self) -> int:
        """The length of a hidden state."""
        return int(self.base.config.hidden_size)

    @property
    def shares_passes(self) -> bool:
        """Whether runs that train side by side can be in one forward pass."""
        return self.packed and self.mixes

    @property
    def precision(self) -> str:
        """The name of what it computes in, among :data:`PRECISIONS`."""
        return "tf32" if self.tf32 else dtype_name(self.dtype)

    @property
    def computes_in(self) -> str:
        """What it computes in, as reports and files say it: a type of torch's, or ``tf32``."""
        return "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")

    def exactness(self) -> AbstractContextManager[None]:
        """Return a context in which products are as exact as this encoder's precision says.

        Enter it before taking the encoder's own lock.
        """
        return exact_as(self.device, tf32=self.tf32)

    @property
    def low_memory(self) -> bool:
        """Whether training keeps only the input of each layer and computes the layer again."""
        return self.state.recompute

    @low_memory.setter
    def low_memory(self, wanted: bool) -> None:
        self.state.recompute = wanted

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
        dropout: Masks | None = None,
        *,
        holds_base: bool = False,
        shared: Shared | None = None,
    ) -> Tensor:
        """Return the last hidden states ``(T, hidden)`` of a batch, sequences end to end, in fp32.

        Args:
            batch: the sequences, on the encoder's device.
            shifts: rows of the bank by module path, each ``(K, length)``: ``Layout.split(rows)``.
            index: ``(B,)``, the row of each sequence; None when all use row 0. In training it is
                best on the CPU: nothing has to wait for a GPU then.
            dropout: the step's masks, for all sequences of the batch in their order; None
                evaluates. Several runs in one batch need an encoder that is packed.
            holds_base: ``shifts`` has the base's biases in it, as :meth:`biases` gives it.
            shared: the same batch with each text once, for the layers that no row touches; see
                :meth:`share`. Evaluation only.
        """
        if index is not None and not self.mixes:
            return self._encode_by_row(batch, shifts, index, dropout, holds_base)
        with self.exactness(), self._lock:
            if self.model.training != (dropout is not None):
                self.model.train(dropout is not None)
            self.state.shifts, self.state.dropout = shifts, dropout
            self.state.holds_base = holds_base
            try:
                if shared is not None:
                    return self._run_shared(batch, index, shared).float()
                run = self._run_packed if self.packed else self._run_padded
                return run(batch, index).float()
            finally:
                self.state.shifts, self.state.index, self.state.dropout = {}, None, None
                self.state.holds_base = False

    def share(self, features: Sequence[Feature], touched: Iterable[str]) -> Shared | None:
        """Return the shared form of a batch, or None where sharing gains nothing.

        Args:
            features: the sequences of the batch.
            touched: module paths of the biases that are not the base's in any row.
        """
        if not (self.packed and self.mixes):
            return None
        return share(features, self.layers.depth(touched), self.device)

    def biases(self, layout: Layout) -> Tensor:
        """Return the base's own biases ``(n,)`` in the order of ``layout``, on the device."""
        if layout not in self._biases:
            parts = [self._bias_of(site) for site in layout.sites]
            self._biases[layout] = torch.cat(parts or [torch.zeros(0, device=self.device)])
        return self._biases[layout]

    def _bias_of(self, site: Site) -> Tensor:
        """Return the bias that stands at ``site``, in fp32."""
        owner, path = self.model, f"{site.path}.bias"
        if site.path.partition(".")[0] == "pooler" and self.pooler is not None:
            owner, path = self.pooler, path.removeprefix("pooler.")
        found: Tensor = owner.get_parameter(path).detach()
        return found

    def pool(
        self,
        hidden: Tensor,
        batch: Batch,
        pooling: str,
        shifts: Mapping[str, Tensor],
        index: Tensor | None = None,
        *,
        holds_base: bool = False,
    ) -> Tensor:
        """Return one vector per sequence, ``(B, hidden)``; arguments as of :meth:`encode`.

        ``pooler`` is the pretrained layer over [CLS], whose bias belongs to the sequence and not to
        its tokens; ``cls`` the first token; ``mean`` the mean over the tokens, specials included.
        """
        if pooling == "mean":
            # unsafe: the lengths are ours, and checking them would wait for a GPU.
            return torch.segment_reduce(hidden, "mean", lengths=batch.lengths, axis=0, unsafe=True)
        first = hidden.index_select(0, batch.starts)
        if pooling == "cls":
            return first
        assert self.pooler is not None  # make_head has seen to it
        first = first.to(self.dtype)
        with self.exactness(), self._lock:
            self.state.shifts, self.state.holds_base = shifts, holds_base
            if index is not None:
                each = None
                if index.device.type == "cpu" and torch.is_grad_enabled():
                    each = _stretches(index.tolist(), [1] * len(index))
                rows = _row_count(shifts)
                self.state.index = RowIndex(upload(index, self.device), rows, stretches=each)
            try:
                # transformers' poolers look at hidden[:, 0]; ALBERT's is a bare Linear.
                if isinstance(self.pooler, BankedLinear):
                    return torch.tanh(self.pooler(first)).float()
                pooled: Tensor = self.pooler(first[:, None])
                return pooled.float()
            finally:
                self.state.shifts, self.state.index = {}, None
                self.state.holds_base = False

    def _run_packed(self, batch: Batch, index: Tensor | None) -> Tensor:
        if index is not None:
            self.state.index = self._row_index(index, batch)
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

    def _row_index(self, index: Tensor, batch: Batch) -> RowIndex:
        """Return the row of each token, from that of each sequence."""
        stretches = None
        if index.device.type == "cpu" and torch.is_grad_enabled():
            stretches = _stretches(index.tolist(), [len(feature) for feature in batch.features])
        rows = _row_count(self.state.shifts)
        index = upload(index, self.device)
        return RowIndex(index[batch.sequence_of_token], rows, stretches=stretches)

    def _run_shared(self, batch: Batch, index: Tensor | None, shared: Shared) -> Tensor:
        rows = None if index is None else self._row_index(index, batch)
        with self.layers.repeating(shared, batch, self.state, rows):
            hidden = self._run_packed(shared.distinct, None)
        whole = shared.depth == len(self.layers.modules)
        return hidden.index_select(0, shared.tokens) if whole else hidden

    def _run_padded(self, batch: Batch, index: Tensor | None) -> Tensor:
        if index is not None:
            index = upload(index, self.device)
            self.state.index = RowIndex(index, _row_count(self.state.shifts), padded=True)
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
        dropout: Masks | None,
        holds_base: bool,
    ) -> Tensor:
        """A mixed batch, one row after the other, for families whose leaves see no batch axis."""
        parts, places = [], []
        index = upload(index, self.device)
        for row in index.unique().tolist():
            chosen = torch.nonzero(index == row).flatten().tolist()
            part = pack([batch.features[i] for i in chosen]).to(self.device)
            own = {path: shift[row : row + 1] for path, shift in shifts.items()}
            parts.append(self.encode(part, own, None, dropout, holds_base=holds_base))
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
        with self.exactness():
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


def _row_count(shifts: Mapping[str, Tensor]) -> int:
    return next((len(shift) for shift in shifts.values()), 1)


def _stretches(index: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return ``(row, length)`` of each stretch of equal rows, from those of each sequence."""
    pairs = zip(index, lengths, strict=True)
    return [
        (row, sum(length for _, length in group))
        for row, group in itertools.groupby(pairs, key=operator.itemgetter(0))
    ]


def _near(found: Tensor, expected: Tensor) -> bool:
    scale = expected.abs().max().clamp_min(1e-6)
    return bool((found - expected).abs().max() <= PROBE_TOLERANCE * scale)


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
        UsageError: an unknown precision, or one that the device does not have.
        BaseModelError: the base cannot be loaded.
    """
    place = choose_place(dtype, device)
    loaded = load_base(base, revision=revision, trust_remote_code=trust_remote_code)
    if dtype != "auto":
        chosen = PRECISIONS[dtype]
    else:
        chosen = measure_precision(place, loaded.config.hidden_size).dtype
    return Encoder(loaded, dtype=chosen, device=place, tf32=dtype == "tf32")
