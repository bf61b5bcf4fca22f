"""A lane: one run among those that train side by side, with its own data, rate, seed and record."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfit.bank import Layout
from bitfit.batches import Batch, Feature, Features, pack
from bitfit.encoder import Encoder
from bitfit.errors import NoBiases, UsageError
from bitfit.heads import Head, loss_weight, make_head
from bitfit.tasks import Example, Task
from bitfit.terms import Site, choose_sites
from bitfit.training.processes import Processes
from bitfit.training.settings import TrainConfig


@dataclass(frozen=True)
class Split:
    """Examples with their features."""

    examples: Sequence[Example]
    features: Features


@dataclass(frozen=True)
class Share:
    """What one process computes of a run's step."""

    batch: Batch
    """On the CPU."""
    weight: float
    """What the mean loss of ``batch`` counts for in that of the whole step."""


@dataclass
class Progress:
    """Where a run stands: all that a checkpoint holds beside tensors."""

    step: int = 0
    best_epoch: int = 0
    best_score: float = -math.inf
    stopped: bool = False
    """Ended by early stopping."""
    dropped: str = ""
    """Why the run was given up, for instance a loss that became NaN; empty: it was not."""
    loss_sum: float = 0.0
    """Sum of the losses of this epoch's steps so far."""
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    """Of training steps; of those taken with others, its share by tokens."""
    sequences: int = 0
    tokens: int = 0


class Lane:
    """One run: what it learns, from what, how, and where it stands.

    What a step does depends on (seed, step) and the numbers before it only: the order of the data
    is drawn from (seed, epoch), dropout from (seed, step).

    Args:
        encoder: the base.
        task: what is learned.
        config: how.
        train: training rows.
        dev: rows to choose the epoch on; None: the last epoch is kept.
        label: what tells it from its neighbours, for messages.
        more: further dev rows by the name of their split, which every epoch is scored on and none
            is chosen by: MNLI's ``dev_mismatched``.

    Raises:
        NoBiases: bias tuning of a base without biases.
        UnknownTerm: terms that this base does not have.
        UsageError: a pooling, terms or attention dropout that this base or head cannot have, or
            class weights of a task without classes.
    """

    def __init__(
        self,
        *,
        encoder: Encoder,
        task: Task,
        config: TrainConfig,
        train: Split,
        dev: Split | None = None,
        label: str = "",
        more: Mapping[str, Split] | None = None,
    ) -> None:
        self.task, self.config, self.train, self.dev = task, config, train, dev
        self.label, self.device, self.more = label, encoder.device, dict(more or {})
        self.head = make_head(task, encoder, config.pooling)
        if config.attention_dropout is not None and not encoder.packed:
            raise UsageError(
                f"base {encoder.base.name!r} does not run packed: attention_dropout cannot be "
                "changed there, leave it out",
                field="attention_dropout",
            )
        self.layout = choose_layout(encoder, self.head, config)
        """The biases that are trained; empty for methods that train matrices."""
        self.progress = Progress()
        self.seconds_before = 0.0
        """Of ``progress.seconds`` those that passed in the processes that this one goes on from."""
        self.best: list[Tensor] = []
        """The numbers of the best epoch so far; once the run has ended, those of the kept one."""
        self._unread_losses: list[Tensor] = []
        self.steps_per_epoch = math.ceil(len(train.features.items) / config.batch_size)
        self.total_steps = self.steps_per_epoch * config.epochs
        self.class_weights = self._class_weights()
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    @property
    def finished(self) -> bool:
        """Whether no step of this run is left, nor an evaluation."""
        p = self.progress
        trained = p.stopped or (p.step >= self.total_steps and not self.epoch_is_due)
        return bool(p.dropped) or trained

    @property
    def epoch_is_due(self) -> bool:
        """Whether an epoch's steps are done and its evaluation is not (a run may stop between)."""
        epochs, rest = divmod(self.progress.step, self.steps_per_epoch)
        return rest == 0 and epochs > len(self.progress.history)

    @property
    def kept_epoch(self) -> int:
        """The epoch (from 1) that the finished run keeps."""
        if self.config.keep == "best" and self.dev is not None:
            return self.progress.best_epoch
        return self.progress.step // self.steps_per_epoch

    @property
    def identity(self) -> dict[str, Any]:
        """What the run depends on, beside its data and base."""
        return {**self.config.to_json(), "task": dataclasses.asdict(self.task)}

    def next_batch(self) -> Batch:
        """Return the sequences of the next step: a slice of the order drawn from (seed, epoch).

        They are on the CPU: with those of other runs they go to the device in one piece.
        """
        epoch, place = divmod(self.progress.step, self.steps_per_epoch)
        items = self.train.features.items
        if self._order[0] != epoch:
            order = np.random.default_rng((self.config.seed, epoch)).permutation(len(items))
            self._order = epoch, order
        size = self.config.batch_size
        chosen = self._order[1][place * size : (place + 1) * size]
        return pack([items[i] for i in chosen])

    def share(self, batch: Batch, processes: Processes) -> Share:
        """Return what this one of ``processes`` computes of a step's ``batch``.

        One that no sequence is left for takes one that counts for nothing, so that it has the same
        to do as the others.
        """
        if processes.count == 1:
            return Share(batch, 1.0)
        own = batch.features[processes.own(len(batch.features))]
        weight = self._weight(own) if own else 0.0
        if not weight:
            own = [next((f for f in batch.features if self._weight([f])), batch.features[0])]
        part = pack(own)
        return Share(part, weight / self._weight(batch.features) if weight else 0.0)

    def _weight(self, features: Sequence[Feature]) -> float:
        return loss_weight(self.head, features, self._class_weight_values)

    def step_taken(self, loss: Tensor, batch: Batch, seconds: float) -> None:
        """Count a step, taken on ``batch`` with ``loss`` (0-d)."""
        if self.progress.step % self.steps_per_epoch == 0:
            self.progress.loss_sum = 0.0
            self.forget_losses()
        self._unread_losses.append(loss)
        self.progress.step += 1
        self.progress.seconds += seconds
        self.progress.sequences += len(batch.lengths)
        self.progress.tokens += len(batch.input_ids)

    def epoch_ended(
        self,
        scores: dict[str, float],
        numbers: list[Tensor],
        more: Mapping[str, dict[str, float]] | None = None,
    ) -> bool:
        """Record an epoch with its scores on dev, and on more; return whether it is the best."""
        progress, epoch = self.progress, self.progress.step // self.steps_per_epoch
        score = scores.get(self.task.metric, math.nan)
        # An undefined score (a constant prediction has no correlation) is worse than any other.
        score = -math.inf if math.isnan(score) else score
        # Of equal scores the later epoch: on a small dev set it has the lower loss by far.
        is_best = progress.best_epoch == 0 or score >= progress.best_score
        if is_best or self.dev is None:
            progress.best_epoch, progress.best_score = epoch, score
            self.best = numbers
        patience, waited = self.config.patience, epoch - progress.best_epoch
        progress.stopped = self.dev is not None and 0 < patience <= waited
        entry: dict[str, Any] = {"epoch": epoch, "train_loss": self.epoch_loss, "dev": scores}
        progress.history.append(entry | ({"more": dict(more)} if more else {}))
        if self.finished and self.kept_epoch == epoch:
            self.best = numbers
        return is_best

    def forget_losses(self) -> None:
        """Leave uncounted what was not read. The list is a new one: copies may share the old."""
        self._unread_losses = []

    def read_losses(self) -> None:
        """Count the losses of the steps since this was last done, which waits for a GPU."""
        if self._unread_losses:
            # One after the other, so that it does not matter when they are read.
            for loss in torch.stack(self._unread_losses).tolist():
                self.progress.loss_sum += loss
            self.forget_losses()

    @property
    def epoch_loss(self) -> float:
        """Mean loss of the epoch's steps."""
        self.read_losses()
        return self.progress.loss_sum / self.steps_per_epoch

    @cached_property
    def _class_weight_values(self) -> NDArray[np.float32] | None:
        return None if self.class_weights is None else self.class_weights.cpu().numpy()

    def _class_weights(self) -> Tensor | None:
        if self.config.class_weights is None:
            return None
        if self.head.kind not in ("classification", "tokens"):
            raise UsageError(
                f"class_weights {self.config.class_weights!r} is for classification and tokens, "
                f"task {self.task.name!r} is {self.head.kind}: leave it out",
                field="class_weights",
            )
        labels = np.concatenate([np.ravel(f.label) for f in self.train.features.items])
        counts = np.bincount(labels.astype(np.int64), minlength=self.head.num_outputs)
        weights = counts.sum() / (len(counts) * np.maximum(counts, 1))
        return torch.tensor(weights, dtype=torch.float32, device=self.device)


def trained_sites(encoder: Encoder, head: Head, config: TrainConfig) -> tuple[Site, ...]:
    """Return the biases that ``config.terms`` names, without those that change nothing.

    Those are b_k, which the paper's recipe keeps, and a pooler that the head does not read.

    Raises:
        UnknownTerm: terms that this base does not have.
        UsageError: terms that name a pooler which this head does not read.
    """
    inert = () if config.recipe == "paper" else encoder.inert_terms
    sites = choose_sites(encoder.sites, config.terms, inert=inert)
    return sites if head.pooling == "pooler" else _without_pooler(sites, config.terms, head)


def choose_layout(encoder: Encoder, head: Head, config: TrainConfig) -> Layout:
    """Return the biases that a run of ``config`` trains; empty for all methods but ``bitfit``.

    Raises:
        NoBiases: bias tuning of a base without biases.
        UnknownTerm: terms that this base does not have.
        UsageError: terms that name a pooler which this head does not read.
    """
    if config.method != "bitfit":
        return Layout(())
    sites = trained_sites(encoder, head, config)
    if not sites:
        raise NoBiases("no bias is selected: use --method frozen to train the head alone")
    return Layout(sites)


def _without_pooler(sites: tuple[Site, ...], terms: str, head: Head) -> tuple[Site, ...]:
    """Leave out a pooler that this head does not read: its bias would never get a gradient."""
    if "pooler" in (item.strip() for item in terms.split(",")):
        raise UsageError(
            f"terms {terms!r} names the pooler, but this task pools by {head.pooling!r} and never "
            "uses it: add --pooling pooler, or leave the term out",
            field="terms",
        )
    return tuple(s for s in sites if s.term != "pooler")
