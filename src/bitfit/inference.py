"""Logits of many sequences, each with its own task's row and head, in packed batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfit.bank import Bank, Layout
from bitfit.batches import Batch, Feature, length_sorted, pack
from bitfit.encoder import Encoder
from bitfit.heads import Head, head_logits, word_positions

# Padded tokens in one forward pass: enough to fill two cores, small enough to stay in the cache.
DEFAULT_MAX_TOKENS = 2048
GPU_MAX_TOKENS = 16384  # unmeasured
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class TaskHead:
    """A head's shape with its numbers."""

    head: Head
    weights: Mapping[str, Tensor]


@torch.no_grad()
def compute_logits(
    encoder: Encoder,
    features: Sequence[Feature],
    rows: Tensor | Bank,
    layout: Layout,
    heads: Mapping[int, TaskHead],
    index: Sequence[int] | None = None,
    *,
    max_tokens: int | None = None,
) -> list[Logits]:
    """Return the logits of each feature, in the order given, fp32 on the CPU.

    A sequence head gives ``(outputs,)``, a token head ``(words that were not cut, outputs)``, a
    span head ``(tokens, 2)``.

    Args:
        encoder: the frozen base.
        features: the sequences.
        rows: ``(K, n)``, or a bank.
        layout: what the rows are made of.
        heads: by row, those that ``index`` names.
        index: the row of each feature; None: all use row 0.
        max_tokens: padded tokens in one forward pass; None: as many as suit the device.
    """
    if max_tokens is None:
        max_tokens = DEFAULT_MAX_TOKENS if encoder.device.type == "cpu" else GPU_MAX_TOKENS
    index = [0] * len(features) if index is None else index
    found: list[Logits] = [np.empty(0, np.float32)] * len(features)
    for chosen in length_sorted(features, max_tokens):
        # The tokens of a row stand together, so that its values are read once.
        chosen = sorted(chosen, key=lambda i: index[i])
        used = sorted({index[i] for i in chosen})
        number = {row: place for place, row in enumerate(used)}
        # Only the rows that this batch uses, each with the base added once for all sites.
        base = encoder.biases(layout)
        biases = (
            rows.biases(used, base)
            if isinstance(rows, Bank)
            else layout.split(rows[used].float() + base)
        )
        with encoder.exactness():
            logits = mixed_logits(
                encoder,
                [features[i] for i in chosen],
                biases,
                [heads[row] for row in used],
                [number[index[i]] for i in chosen],
            )
        for place, values in zip(chosen, logits, strict=True):
            found[place] = values
    return found


def mixed_logits(
    encoder: Encoder,
    features: Sequence[Feature],
    biases: Mapping[str, Tensor],
    heads: Sequence[TaskHead],
    places: Sequence[int],
) -> list[Logits]:
    """Return the logits of one forward pass: no loop over tasks, in the encoder nor in the heads.

    Args:
        encoder: the frozen base.
        features: the sequences, those of a row together.
        biases: those of each of U rows, the base's in them, ``(U, length)`` by module path.
        heads: the head of each row.
        places: the row of each sequence, not falling.
    """
    batch = pack(features).to(encoder.device)
    index = None if len(heads) == 1 else torch.tensor(places, device=encoder.device)
    shared = encoder.share(features, biases)
    hidden = encoder.encode(batch, biases, index, holds_base=True, shared=shared)
    found: list[Logits] = [np.empty(0, np.float32)] * len(features)
    groups: dict[Head, list[int]] = {}
    for sequence, place in enumerate(places):
        groups.setdefault(heads[place].head, []).append(sequence)
    pooled: dict[str, Tensor] = {}
    for head, members in groups.items():
        if head.pooling not in pooled and head.kind not in ("tokens", "span"):
            pooled[head.pooling] = encoder.pool(
                hidden, batch, head.pooling, biases, index, holds_base=True
            )
        vectors, counts = _group_inputs(head, hidden, batch, pooled, members)
        logits = _group_logits(head, vectors, counts, [places[i] for i in members], heads)
        whole = head.kind not in ("tokens", "span")
        parts = logits if whole else np.split(logits, np.cumsum(counts)[:-1])
        for sequence, values in zip(members, parts, strict=True):
            found[sequence] = values
    return found


def _group_inputs(
    head: Head,
    hidden: Tensor,
    batch: Batch,
    pooled: Mapping[str, Tensor],
    members: Sequence[int],
) -> tuple[Tensor, list[int]]:
    """Return what the head reads of its sequences, and how many vectors each of them has."""
    if head.kind not in ("tokens", "span"):
        vectors = pooled[head.pooling]
        return _chosen(vectors, np.asarray(members)), [1] * len(members)
    starts = batch.starts.tolist()
    positions = []
    for sequence in members:
        feature = batch.features[sequence]
        within = np.arange(len(feature)) if head.kind == "span" else _words(feature)
        positions.append(starts[sequence] + within)
    return _chosen(hidden, np.concatenate(positions)), [len(p) for p in positions]


def _words(feature: Feature) -> NDArray[np.int64]:
    """The first token of each word that was not cut off."""
    assert feature.word_starts is not None
    return feature.word_starts[feature.word_starts >= 0]


def _chosen(x: Tensor, positions: NDArray[np.int64]) -> Tensor:
    if len(positions) == len(x) and (np.diff(positions) == 1).all():
        return x
    return x.index_select(0, torch.from_numpy(positions).to(x.device))


def _group_logits(
    head: Head,
    vectors: Tensor,
    counts: Sequence[int],
    places: Sequence[int],
    heads: Sequence[TaskHead],
) -> Logits:
    """Return logits ``(N, outputs)`` of heads of one shape, by one batched product.

    Args:
        head: their shape.
        vectors: ``(N, hidden)``, those of a task together.
        counts: the vectors of each sequence.
        places: the task of each sequence.
        heads: all tasks' heads.
    """
    tasks = list(dict.fromkeys(places))
    if len(tasks) == 1:
        return head_logits(head, heads[tasks[0]].weights, vectors, None).cpu().numpy()
    lengths = np.zeros(len(tasks), np.int64)
    number = {task: i for i, task in enumerate(tasks)}
    np.add.at(lengths, [number[place] for place in places], counts)
    weights = {name: torch.stack([heads[t].weights[name] for t in tasks]) for name in head.shapes}
    longest = int(lengths.max())
    # (tasks, longest): where each task's vectors stand; past its end the last of all, unread
    index = (np.cumsum(lengths) - lengths)[:, None] + np.arange(longest)
    real = np.arange(longest) < lengths[:, None]
    index = np.minimum(index, len(vectors) - 1)
    padded = vectors if longest == 1 and real.all() else _chosen(vectors, index.ravel())
    logits = head_logits(head, weights, padded.view(len(tasks), longest, -1), None)
    return logits.flatten(0, 1).cpu().numpy()[real.ravel()]


def head_inputs(
    encoder: Encoder,
    head: Head,
    hidden: Tensor,
    batch: Batch,
    shifts: Mapping[str, Tensor],
    *,
    holds_base: bool = False,
) -> tuple[Tensor, list[int] | None]:
    """Return what the head reads and, for heads over tokens, how many vectors each sequence has.

    Pooled vectors ``(B, hidden)``; tokens: the first sub-word of each word; span: every token.
    """
    if head.kind == "tokens":
        positions, counts = word_positions(batch)
        return hidden.index_select(0, positions), counts
    if head.kind == "span":
        return hidden, [len(f) for f in batch.features]
    return encoder.pool(hidden, batch, head.pooling, shifts, holds_base=holds_base), None
