"""The training loop: one for all methods, a generator of what happened, resumable at any step.

What a step does depends on (seed, step) and the tensors before it only: the order of the data is
drawn from (seed, epoch), dropout from (seed, step). So a run that was stopped and resumed ends in
the same numbers, bit for bit, as one that was not (same machine, versions and thread count).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitfit.batches import Features, pack
from bitfit.encoder import DropoutBits, Encoder
from bitfit.errors import BitfitError, TrainingDiverged, UsageError
from bitfit.heads import Head, batch_loss, head_logits, read_predictions
from bitfit.inference import Logits, TaskHead, compute_logits, head_inputs
from bitfit.metrics import compute_metrics
from bitfit.storage import atomic_write, pack_safetensors, unpack_safetensors
from bitfit.tasks import Example, Task, references
from bitfit.training.methods import MatrixMethod, RowMethod
from bitfit.training.settings import TrainConfig

BETAS = (0.9, 0.999)
CHECKPOINT_SECONDS = 30.0


@dataclass(frozen=True)
class Split:
    """Examples with their features."""

    examples: Sequence[Example]
    features: Features


@dataclass(frozen=True)
class StepDone:
    """One optimizer step was taken."""

    step: int
    total: int
    loss: Tensor
    """0-d and still on the device: reading it waits for the device."""
    sequences: int
    tokens: int


@dataclass(frozen=True)
class EpochDone:
    """An epoch ended and was evaluated on dev."""

    epoch: int
    """From 1."""
    step: int
    train_loss: float
    scores: dict[str, float]
    """On dev; empty without a dev set."""
    is_best: bool
    stopped: bool
    """Whether early stopping ends the run here."""


@dataclass
class Progress:
    """Where a run stands: all that a checkpoint holds beside tensors."""

    step: int = 0
    best_epoch: int = 0
    best_score: float = -math.inf
    stopped: bool = False
    loss_sum: float = 0.0
    """Sum of the losses of this epoch's steps so far."""
    history: list[dict[str, Any]] = field(default_factory=list)


class AdamW:
    """AdamW without decay as in transformers 4.2: epsilon is added before bias correction.

    The paper's code used that one; torch's adds it after, which makes it 30 times smaller in the
    first steps, and Adam then turns rounding noise in b_k into movement (Kingma & Ba 2015).
    """

    def __init__(self, tensors: Sequence[Tensor], eps: float) -> None:
        self.tensors, self.eps = tensors, eps
        self.means = [torch.zeros_like(t) for t in tensors]
        self.squares = [torch.zeros_like(t) for t in tensors]

    @torch.no_grad()
    def step(self, learning_rate: float, step: int) -> None:
        """Take step number ``step`` (from 1) along the gradients, and clear them."""
        beta1, beta2 = BETAS
        size = learning_rate * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        for tensor, mean, square in zip(self.tensors, self.means, self.squares, strict=True):
            if tensor.grad is None:
                continue
            mean.mul_(beta1).add_(tensor.grad, alpha=1 - beta1)
            square.mul_(beta2).addcmul_(tensor.grad, tensor.grad, value=1 - beta2)
            tensor.addcdiv_(mean, square.sqrt().add_(self.eps), value=-size)
            tensor.grad = None


def learning_rate_at(config: TrainConfig, step: int, total: int) -> float:
    """Return the rate of step number ``step`` (from 1) of ``total``."""
    warmup = round(config.warmup_ratio * total)
    if step <= warmup:
        return config.learning_rate * step / warmup
    share = (step - warmup - 1) / max(1, total - warmup)  # 0 at the first step after warm-up
    if config.schedule == "linear":
        return config.learning_rate * (1 - share)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
    return config.learning_rate


def clip_gradients(tensors: Sequence[Tensor], max_norm: float) -> None:
    """Scale all gradients so that their common norm is at most ``max_norm``; 0 leaves them."""
    grads = [t.grad for t in tensors if t.grad is not None]
    if max_norm > 0 and grads:
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in grads]))
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(scale)


class Trainer:
    """One run: what is trained, the optimizer's state, and where it stands.

    Args:
        encoder: the base.
        task: what is learned.
        head: its head.
        method: what is trained.
        config: how.
        train: training rows.
        dev: rows to choose the epoch on; None: the last epoch is kept.
        checkpoint: where the state is saved, every half minute and at each epoch; None: nowhere.
        identity: what else the run depends on; a checkpoint of another run is refused.
    """

    def __init__(
        self,
        *,
        encoder: Encoder,
        task: Task,
        head: Head,
        method: RowMethod | MatrixMethod,
        config: TrainConfig,
        train: Split,
        dev: Split | None,
        checkpoint: Path | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.encoder, self.task, self.head, self.method = encoder, task, head, method
        self.config, self.train, self.dev = config, train, dev
        self.checkpoint = checkpoint
        # Through JSON, so that it compares equal to what a checkpoint gives back.
        self.identity = json.loads(json.dumps({**config.to_json(), **(identity or {})}))
        self.optimizer = AdamW(method.tensors, config.adam_eps)
        self.progress = Progress()
        self.best = [t.detach().clone() for t in method.tensors]
        self.steps_per_epoch = math.ceil(len(train.features.items) / config.batch_size)
        self.total_steps = self.steps_per_epoch * config.epochs
        self.class_weights = self._class_weights()
        self.kept_epoch = 0
        self.seconds, self.sequences, self.tokens = 0.0, 0, 0
        self._saved_at = time.monotonic()
        self._order: tuple[int, list[int]] = (-1, [])
        self._epoch_loss = torch.zeros((), device=encoder.device)

    def run(self) -> Iterator[StepDone | EpochDone]:
        """Train from where the run stands, yielding each step and each epoch.

        A consumer that stops iterating leaves the run resumable: call :meth:`save` then.

        Raises:
            TrainingDiverged: the loss became NaN or infinite.
        """
        while not self.progress.stopped:
            if self._epoch_is_due():
                epoch = self._end_epoch()
                self.save()
                yield epoch
            elif self.progress.step < self.total_steps:
                began = time.perf_counter()
                done = self._step()
                self.seconds += time.perf_counter() - began
                self.sequences += done.sequences
                self.tokens += done.tokens
                if time.monotonic() - self._saved_at > CHECKPOINT_SECONDS:
                    self.save()
                yield done
            else:
                return

    def _epoch_is_due(self) -> bool:
        """Whether an epoch's steps are done and its evaluation is not (a run may stop between)."""
        epochs, rest = divmod(self.progress.step, self.steps_per_epoch)
        return rest == 0 and epochs > len(self.progress.history)

    def _step(self) -> StepDone:
        step, config = self.progress.step + 1, self.config
        batch = pack([self.train.features.items[i] for i in self._chosen(step)])
        batch = batch.to(self.encoder.device)
        bits = DropoutBits(config.seed, step, self.encoder.device)
        shifts, weights = self.method.views()
        hidden = self.encoder.encode(batch, shifts, None, bits)
        vectors, _ = head_inputs(self.encoder, self.head, hidden, batch, shifts)
        logits = head_logits(self.head, weights, vectors, bits)
        loss = batch_loss(self.head, logits, batch, self.class_weights)
        loss.backward()
        self.method.after_backward()
        clip_gradients(self.method.tensors, config.max_grad_norm)
        self.optimizer.step(learning_rate_at(config, step, self.total_steps), step)
        self.progress.step = step
        loss = loss.detach()
        # Reading the loss waits for a GPU; on the CPU it is free and divergence shows at once.
        if self.encoder.device.type == "cpu" or step % 50 == 0:
            self._check_finite(float(loss), step)
        self._epoch_loss = loss if self._begins_epoch(step) else self._epoch_loss + loss
        return StepDone(step, self.total_steps, loss, len(batch.lengths), len(batch.input_ids))

    def _begins_epoch(self, step: int) -> bool:
        return (step - 1) % self.steps_per_epoch == 0

    def _chosen(self, step: int) -> list[int]:
        """The features of a step: a slice of the epoch's order, drawn from (seed, epoch)."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        if self._order[0] != epoch:
            count = len(self.train.features.items)
            order = np.random.default_rng((self.config.seed, epoch)).permutation(count)
            self._order = epoch, order.tolist()
        size = self.config.batch_size
        return self._order[1][place * size : (place + 1) * size]

    def _check_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"the loss became {loss} at step {step} of {self.total_steps} with learning rate "
                f"{self.config.learning_rate:g}: try a smaller one"
            )

    def _end_epoch(self) -> EpochDone:
        progress, epoch = self.progress, self.progress.step // self.steps_per_epoch
        train_loss = float(self._epoch_loss) / self.steps_per_epoch
        self._check_finite(train_loss, progress.step)
        scores = self.evaluate(self.dev)[0] if self.dev is not None else {}
        score = scores.get(self.task.metric, math.nan)
        # An undefined score (a constant prediction has no correlation) is worse than any other.
        score = -math.inf if math.isnan(score) else score
        # Of equal scores the later epoch: on a small dev set it has the lower loss by far.
        is_best = progress.best_epoch == 0 or score >= progress.best_score
        if is_best or self.dev is None:
            progress.best_epoch, progress.best_score = epoch, score
            self.best = [t.detach().clone() for t in self.method.tensors]
        patience = self.config.patience
        waited = epoch - progress.best_epoch
        progress.stopped = self.dev is not None and 0 < patience <= waited
        progress.history.append({"epoch": epoch, "train_loss": train_loss, "dev": scores})
        return EpochDone(epoch, progress.step, train_loss, scores, is_best, progress.stopped)

    def evaluate(self, split: Split) -> tuple[dict[str, float], list[Logits]]:
        """Return the scores and the logits of a split, at evaluation mode."""
        row, weights = self.method.trained()
        logits = compute_logits(
            self.encoder,
            split.features.items,
            row[None],
            self.method.layout,
            {0: TaskHead(self.head, weights)},
        )
        return score_logits(self.task, split, logits), logits

    def keep(self) -> int:
        """Put the kept epoch's numbers in place and return that epoch (from 1)."""
        self.kept_epoch = self.progress.step // self.steps_per_epoch
        if self.config.keep == "best" and self.dev is not None:
            self.kept_epoch = self.progress.best_epoch
            with torch.no_grad():
                for tensor, best in zip(self.method.tensors, self.best, strict=True):
                    tensor.copy_(best)
        return self.kept_epoch

    def _class_weights(self) -> Tensor | None:
        if self.config.class_weights is None:
            return None
        if self.head.kind not in ("classification", "tokens"):
            raise UsageError(
                f"class_weights {self.config.class_weights!r} is for classification and tokens, "
                f"task {self.task.name!r} is {self.head.kind}: leave it out"
            )
        labels = np.concatenate([np.ravel(f.label) for f in self.train.features.items])
        counts = np.bincount(labels.astype(np.int64), minlength=self.head.num_outputs)
        weights = counts.sum() / (len(counts) * np.maximum(counts, 1))
        return torch.tensor(weights, dtype=torch.float32, device=self.encoder.device)

    # Checkpoints: the trained tensors, the optimizer's two, the best so far, and the progress.

    def save(self) -> None:
        """Write the state, atomically; the loss of power costs at most the steps since then."""
        self._saved_at = time.monotonic()
        if self.checkpoint is None:
            return
        self.progress.loss_sum = float(self._epoch_loss)
        note = {"identity": self.identity, "progress": vars(self.progress)}
        data = pack_safetensors(self._state(), CHECKPOINT_KEY, json.dumps(note))
        atomic_write(self.checkpoint, data)

    def resume(self) -> bool:
        """Go on from the checkpoint where there is one; return whether there was.

        Raises:
            BitfitError: the checkpoint is damaged, or of a run with other settings or data.
        """
        if self.checkpoint is None or not self.checkpoint.exists():
            return False
        tensors, note = _read_checkpoint(self.checkpoint)
        differs = [k for k, v in self.identity.items() if note["identity"].get(k) != v]
        if differs:
            raise BitfitError(
                f"{self.checkpoint} is of another run: {', '.join(differs)} differ(s). Repeat the "
                "command as it was, or delete the file to start anew"
            )
        with torch.no_grad():
            for name, tensor in self._state().items():
                tensor.copy_(tensors[name])
        self.progress = Progress(**note["progress"])
        self._epoch_loss = torch.tensor(self.progress.loss_sum, device=self.encoder.device)
        return True

    def set_aside_checkpoint(self) -> None:
        """Keep the checkpoint of an earlier run that is not resumed, under another name."""
        if self.checkpoint is not None and self.checkpoint.exists():
            self.checkpoint.replace(f"{self.checkpoint}.old")

    def _state(self) -> dict[str, Tensor]:
        groups = {
            "trained": self.method.tensors,
            "mean": self.optimizer.means,
            "square": self.optimizer.squares,
            "best": self.best,
        }
        return {
            f"{group}.{i}": tensor.detach()
            for group, tensors in groups.items()
            for i, tensor in enumerate(tensors)
        }


def recorded_conditions(checkpoint: Path | None) -> dict[str, Any]:
    """Return what a checkpoint's run depended on (``dtype``, ``threads``, ...); empty without one.

    Raises:
        BitfitError: the checkpoint is damaged.
    """
    if checkpoint is None or not checkpoint.exists():
        return {}
    return dict(_read_checkpoint(checkpoint)[1]["identity"])


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, text = unpack_safetensors(
        path.read_bytes(), CHECKPOINT_KEY, source=str(path), what="checkpoint", error=BitfitError
    )
    return tensors, json.loads(text)


CHECKPOINT_KEY = "bitfit_checkpoint"


def score_logits(task: Task, split: Split, logits: Sequence[Logits]) -> dict[str, float]:
    """Return the task's metrics of ``logits``, one entry per feature of ``split``."""
    items = split.features.items
    predictions = read_predictions(task, split.examples, items, logits)
    return compute_metrics(task, predictions, references(split.examples))
