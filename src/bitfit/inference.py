"""Logits of many sequences, each with its own task's row and head, in packed batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfit.bank import Layout
from bitfit.batches import Batch, Feature, length_sorted, pack
from bitfit.encoder import Encoder
from bitfit.heads import Head, head_logits, word_positions

# Padded tokens in one forward pass: enough to fill two cores, small enough to stay in the cache.
DEFAULT_MAX_TOKENS = 2048
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
    rows: Tensor,
    layout: Layout,
    heads: Mapping[int, TaskHead],
    index: Sequence[int] | None = None,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
) -> list[Logits]:
    """Return the logits of each feature, in the order given, fp32 on the CPU.

    A sequence head gives ``(outputs,)``, a token head ``(words that were not cut, outputs)``, a
    span head ``(tokens, 2)``.

    Args:
        encoder: the frozen base.
        features: the sequences.
        rows: ``(K, n)``, rows of a bank.
        layout: what the rows are made of.
        heads: by row, those that ``index`` names.
        index: the row of each feature; None: all use row 0.
        max_tokens: padded tokens in one forward pass.
    """
    index = [0] * len(features) if index is None else index
    found: list[Logits] = [np.empty(0, np.float32)] * len(features)
    for chosen in length_sorted(features, max_tokens):
        # The tokens of a row stand together, so that its values are read once.
        chosen = sorted(chosen, key=lambda i: index[i])
        batch = pack([features[i] for i in chosen]).to(encoder.device)
        used = sorted({index[i] for i in chosen})
        places = [used.index(index[i]) for i in chosen]
        shifts = layout.split(rows[used])  # only the rows that this batch uses: (U, length)
        logits = _batch_logits(encoder, batch, shifts, [heads[row] for row in used], places)
        for place, values in zip(chosen, logits, strict=True):
            found[place] = values
    return found


def _batch_logits(
    encoder: Encoder,
    batch: Batch,
    shifts: Mapping[str, Tensor],
    heads: Sequence[TaskHead],
    places: list[int],
) -> list[Logits]:
    """Logits of a batch in which sequence i uses row ``places[i]``; the rows stand together."""
    if len(heads) == 1:  # one task: its bias folds into the matrix products
        hidden = encoder.encode(batch, shifts)
        return _task_logits(encoder, heads[0], hidden, batch, shifts)
    hidden = encoder.encode(batch, shifts, torch.tensor(places, device=encoder.device))
    found: list[Logits] = []
    begin = 0
    for row, head in enumerate(heads):
        part = pack([f for f, place in zip(batch.features, places, strict=True) if place == row])
        end = begin + len(part.input_ids)
        own = {path: shift[row : row + 1] for path, shift in shifts.items()}
        found += _task_logits(encoder, head, hidden[begin:end], part.to(encoder.device), own)
        begin = end
    return found


def _task_logits(
    encoder: Encoder,
    task_head: TaskHead,
    hidden: Tensor,
    batch: Batch,
    shifts: Mapping[str, Tensor],
) -> list[Logits]:
    vectors, counts = head_inputs(encoder, task_head.head, hidden, batch, shifts)
    logits = head_logits(task_head.head, task_head.weights, vectors, None).cpu().numpy()
    if counts is None:
        return list(logits)
    return np.split(logits, np.cumsum(counts)[:-1])


def head_inputs(
    encoder: Encoder,
    head: Head,
    hidden: Tensor,
    batch: Batch,
    shifts: Mapping[str, Tensor],
) -> tuple[Tensor, list[int] | None]:
    """Return what the head reads and, for heads over tokens, how many vectors each sequence has.

    Pooled vectors ``(B, hidden)``; tokens: the first sub-word of each word; span: every token.
    """
    if head.kind == "tokens":
        positions, counts = word_positions(batch)
        return hidden.index_select(0, positions), counts
    if head.kind == "span":
        return hidden, [len(f) for f in batch.features]
    return encoder.pool(hidden, batch, head.pooling, shifts), None
