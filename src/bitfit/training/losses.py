"""The losses of runs that share a forward pass: heads of one shape in one product, not in turn."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitfit.batches import Batch, upload
from bitfit.encoder import Encoder
from bitfit.heads import Head, batch_loss, head_logits, mean_losses
from bitfit.inference import head_inputs
from bitfit.leaves import Masks
from bitfit.training.lane import Lane, Share


@dataclass(frozen=True)
class Pass:
    """One forward pass over the batches of several runs, end to end."""

    encoder: Encoder
    batch: Batch
    """On the encoder's device."""
    index: Tensor | None
    """``(B,)``, the slot of each sequence; None where there is one slot."""
    biases: Mapping[str, Tensor]
    """By module path, ``(K, length)`` for K slots, the base's in them."""
    heads: Tensor
    """``(K, h)``."""
    dropout: Masks

    def losses(self, runs: Sequence[tuple[int, Lane, Share]]) -> list[Tensor]:
        """Return the loss of each run, a slot with what is in it, 0-d, in the order of the batch.

        Runs whose heads have one shape, and as many sequences, are computed together.
        """
        hidden = self.encoder.encode(
            self.batch, self.biases, self.index, self.dropout, holds_base=True
        )
        groups: dict[Hashable, list[int]] = {}
        for place, (_, lane, share) in enumerate(runs):
            groups.setdefault(_group(place, lane, share), []).append(place)
        found: dict[int, Tensor] = {}
        pooled: dict[str, Tensor] = {}
        for members in groups.values():
            if len(members) > 1:
                own = self._together(hidden, runs, members, pooled)
                found |= dict(zip(members, own.unbind(), strict=True))
        if alone := [members[0] for members in groups.values() if len(members) == 1]:
            parts = hidden.split([len(share.batch.input_ids) for _, _, share in runs])
            for place in alone:
                slot, lane, share = runs[place]
                found[place] = self._alone(parts[place], place, slot, lane, share)
        weights = [share.weight for _, _, share in runs]
        return [found[i] if w == 1 else found[i] * w for i, w in enumerate(weights)]

    def _together(
        self,
        hidden: Tensor,
        runs: Sequence[tuple[int, Lane, Share]],
        members: Sequence[int],
        pooled: dict[str, Tensor],
    ) -> Tensor:
        """Return the losses of runs whose heads have one shape, ``(U,)``."""
        head = runs[members[0]][1].head
        if head.pooling not in pooled:
            pooled[head.pooling] = self.encoder.pool(
                hidden, self.batch, head.pooling, self.biases, self.index, holds_base=True
            )
        vectors = pooled[head.pooling]
        counts = [len(share.batch.features) for _, _, share in runs]
        if len(members) < len(runs):
            ends = np.cumsum(counts)
            own = np.concatenate([np.arange(ends[i] - counts[i], ends[i]) for i in members])
            vectors = vectors.index_select(0, upload(torch.from_numpy(own), vectors.device))
        vectors = vectors.view(len(members), counts[members[0]], -1)
        features = [feature for i in members for feature in runs[i][2].batch.features]
        weights = self._weights(head, [runs[i][0] for i in members])
        draw = self.dropout.head(members, head.dropout_rate)
        return mean_losses(head, head_logits(head, weights, vectors, draw), features)

    def _weights(self, head: Head, slots: Sequence[int]) -> dict[str, Tensor]:
        """Return the numbers of heads of one shape by name, with an axis for the runs."""
        flat = self.heads
        if list(slots) != list(range(len(flat))):
            flat = flat.index_select(0, upload(torch.tensor(slots), flat.device))
        return head.split(flat[:, : head.size])

    def _alone(self, hidden: Tensor, place: int, slot: int, lane: Lane, share: Share) -> Tensor:
        """Return a run's loss from its own hidden states ``(T, hidden)``."""
        head, batch = lane.head, share.batch.to(hidden.device)
        pooler = {
            path: biases[slot : slot + 1]
            for path, biases in self.biases.items() if path.startswith("pooler")
        }  # fmt: skip
        vectors, _ = head_inputs(self.encoder, head, hidden, batch, pooler, holds_base=True)
        weights = head.split(self.heads[slot, : head.size])
        draw = self.dropout.head([place], head.dropout_rate)
        logits = head_logits(head, weights, vectors, draw)
        return batch_loss(head, logits, batch, lane.class_weights)


def _group(place: int, lane: Lane, share: Share) -> Hashable:
    """What runs have in common that can be computed together."""
    whole = lane.head.kind not in ("tokens", "span") and lane.class_weights is None
    return (lane.head, len(share.batch.features)) if whole else place
