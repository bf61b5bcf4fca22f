"""The training loop: one for all methods, a generator of what happened, resumable at any step.

It trains a queue of runs, the *lanes*, K of them side by side: one forward pass over the batches of
all, each with its own row, head, rate, schedule, clipping, dropout and best epoch. A lane that ends
makes room for the next in the queue, at step counts and never by the clock. One run is K = 1.

So a run that was stopped and resumed ends in the same numbers, bit for bit, as one that was not
(same machine, versions, thread count and K).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfit.batches import Batch, pack
from bitfit.dropout import DropoutBits, StepDropout
from bitfit.encoder import Encoder
from bitfit.errors import TrainingDiverged
from bitfit.fused_dropout import FusedDropout, has_kernels
from bitfit.heads import logits_shape, read_predictions
from bitfit.inference import Logits, TaskHead, compute_logits
from bitfit.leaves import Masks
from bitfit.metrics import compute_metrics
from bitfit.tasks import Task, references
from bitfit.training.adamw import AdamW, learning_rate_at, step_size
from bitfit.training.checkpoint import State, read_state, write_state
from bitfit.training.lane import Lane, Share, Split
from bitfit.training.losses import Pass
from bitfit.training.methods import Method
from bitfit.training.processes import ALONE, Processes

CHECKPOINT_SECONDS = 30.0
# A checkpoint that took t seconds to write is followed by the next after at least so many t: where
# it is large (``full``), writing must not take the time of training.
CHECKPOINT_PAUSE = 20.0
# On a GPU reading the losses waits for it, so divergence is looked for once in so many steps.
LOSS_CHECK_STEPS = 50


@dataclass(frozen=True)
class StepDone:
    """One optimizer step was taken, in every lane that is running."""

    step: int
    """Steps taken so far, summed over all lanes."""
    total: int
    """Steps of all lanes together; fewer are taken where a lane stops early."""
    losses: Sequence[tuple[Lane, Tensor]]
    """Each running lane with its loss, 0-d and still on the device: reading it waits for it."""
    sequences: int
    tokens: int

    @property
    def loss(self) -> Tensor:
        """Mean loss of the running lanes."""
        return torch.stack([loss for _, loss in self.losses]).mean()


@dataclass(frozen=True)
class EpochDone:
    """An epoch of a lane ended and was evaluated on dev."""

    lane: Lane
    epoch: int
    """From 1."""
    step: int
    """Of this lane."""
    train_loss: float
    scores: dict[str, float]
    """On dev; empty without a dev set."""
    is_best: bool
    stopped: bool
    """Whether early stopping ends the run here."""
    logits: Sequence[Logits] = field(repr=False, compare=False)
    """Of dev, one entry per feature of ``lane.dev``; empty without a dev set."""
    more_logits: Mapping[str, Sequence[Logits]] = field(
        default_factory=dict, repr=False, compare=False
    )
    """The same of each split of ``lane.more``; their scores are in the lane's history."""


@dataclass(frozen=True)
class LaneDropped:
    """A lane was given up; its neighbours go on."""

    lane: Lane
    reason: str


def pass_tokens(device: torch.device) -> int:
    """Return the most tokens in one forward pass of several lanes; a lane's batch is never split.

    More fill a CPU's products better until the activations leave its caches (benchmarks/README.md
    has the numbers). A GPU gains as long as its memory suffices: 64 runs of eight pairs are 28,000.
    """
    return 4096 if device.type == "cpu" else 65536


class Trainer:
    """Runs, what trains them, the optimizer's state, and where they stand.

    Args:
        encoder: the base.
        method: what is trained; its ``slots`` say how many lanes run side by side.
        lanes: the queue.
        checkpoint: where the state is saved, every half minute and at each epoch; None: nowhere.
        identity: what else the runs depend on; a checkpoint of others is refused.
        processes: who shares the sequences of each step; all have the same lanes and the same
            numbers, and the main one writes.
    """

    def __init__(
        self,
        *,
        encoder: Encoder,
        method: Method,
        lanes: Sequence[Lane],
        checkpoint: Path | None = None,
        identity: Mapping[str, Any] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.encoder, self.method, self.lanes = encoder, method, list(lanes)
        self.checkpoint, self.processes = checkpoint, processes
        whole = {**_common([lane.identity for lane in lanes]), **(identity or {})}
        whole |= {"lanes": method.slots}
        if encoder.packed and has_kernels(encoder.device):
            whole["masks"] = "kernels"  # other masks for a seed than without them
        if processes.count > 1:
            whole["processes"] = processes.count
        # Through JSON, so that it compares equal to what a checkpoint gives back.
        self.identity = json.loads(json.dumps(whole))
        self.optimizer = AdamW(method.tensors)
        self.slots: list[int | None] = [None] * method.slots
        """The lane (its place in the queue) of each slot."""
        self.next_lane = 0
        self._save_due_at = time.monotonic() + CHECKPOINT_SECONDS

    @property
    def total_steps(self) -> int:
        """Steps of all lanes, if none stops early."""
        return sum(lane.total_steps for lane in self.lanes)

    @property
    def steps(self) -> int:
        """Steps taken so far, summed over the lanes."""
        return sum(lane.progress.step for lane in self.lanes)

    def run(self) -> Iterator[StepDone | EpochDone | LaneDropped]:
        """Train from where the runs stand, yielding each step and each epoch.

        Epochs that end together are saved once the consumer asks for what comes after them: one
        that writes down what they gave, and is killed before that is done, sees them again when it
        resumes. A consumer that stops iterating leaves the runs resumable: call :meth:`save` then.

        Raises:
            TrainingDiverged: the loss of the only run, or of every one, became NaN or infinite.
        """
        while True:
            self._refill()
            running = self._running()
            if not running:
                return
            if due := [(slot, lane) for slot, lane in running if lane.epoch_is_due]:
                for slot, lane in due:
                    yield self._end_epoch(slot, lane)
                self.save()
                continue
            done = self._step(running)
            yield from self._drop_diverged(running, done)
            if time.monotonic() > self._save_due_at:
                self.save()
            yield done

    def steps_only(self) -> Iterator[StepDone]:
        """Take steps for ever, without evaluating or saving anything: to measure their speed."""
        self._refill()
        while True:
            yield self._step(self._running())

    def _running(self) -> list[tuple[int, Lane]]:
        return [(s, self.lanes[i]) for s, i in enumerate(self.slots) if i is not None]

    def _refill(self) -> None:
        """Give free slots to the next lanes of the queue, in its order."""
        for slot, place in enumerate(self.slots):
            if place is None and self.next_lane < len(self.lanes):
                lane = self.lanes[self.next_lane]
                self.method.begin(slot, lane.layout, lane.head, lane.config.seed)
                self.optimizer.reset(slot, len(self.slots))
                lane.best = self.method.read(slot)
                self.slots[slot] = self.next_lane
                self.next_lane += 1

    def _step(self, running: Sequence[tuple[int, Lane]]) -> StepDone:
        """Take one step in every running lane."""
        began = time.perf_counter()
        batches = [lane.next_batch() for _, lane in running]
        shares = [
            lane.share(batch, self.processes)
            for (_, lane), batch in zip(running, batches, strict=True)
        ]
        device, rank = self.encoder.device, self.processes.rank
        bits = [
            DropoutBits(
                lane.config.seed,
                lane.progress.step + 1,
                device,
                rank,
                lane.config.attention_dropout,
            )
            for _, lane in running
        ]
        losses: list[Tensor] = []
        for part in self._passes(shares):
            with self.encoder.exactness():
                own = self._losses(running[part], shares[part], bits[part])
                torch.stack(own).sum().backward()
            losses += (loss.detach() for loss in own)
        self.method.after_backward()
        losses = self.processes.sum_gradients(self.method.tensors, losses)
        norms, sizes, epsilons = ([value] * len(self.slots) for value in (0.0, 0.0, 1.0))
        for slot, lane in running:
            step, config = lane.progress.step + 1, lane.config
            sizes[slot] = step_size(learning_rate_at(config, step, lane.total_steps), step)
            norms[slot], epsilons[slot] = config.max_grad_norm, config.adam_eps
        self.method.clip(norms)
        self.optimizer.step(sizes, epsilons)
        self.method.moved()
        seconds, tokens = time.perf_counter() - began, sum(len(b.input_ids) for b in batches)
        for (_, lane), loss, batch in zip(running, losses, batches, strict=True):
            lane.step_taken(loss, batch, seconds * len(batch.input_ids) / tokens)
        return StepDone(
            self.steps, self.total_steps,
            [(lane, loss) for (_, lane), loss in zip(running, losses, strict=True)],
            sum(len(b.lengths) for b in batches), tokens,
        )  # fmt: skip

    def _passes(self, shares: Sequence[Share]) -> Iterator[slice]:
        """Split the running lanes into forward passes, as many in each as help the hardware."""
        most = pass_tokens(self.encoder.device)
        begin, tokens = 0, 0
        for place, share in enumerate(shares):
            tokens += len(share.batch.input_ids)
            if place > begin and tokens > most:
                yield slice(begin, place)
                begin, tokens = place, len(share.batch.input_ids)
        yield slice(begin, len(shares))

    def _losses(
        self,
        running: Sequence[tuple[int, Lane]],
        shares: Sequence[Share],
        bits: Sequence[DropoutBits],
    ) -> list[Tensor]:
        """One forward pass over the batches end to end, then the heads and the losses."""
        device = self.encoder.device
        biases, heads = self.method.views()
        batches = [share.batch for share in shares]
        whole, index = batches[0], None
        if len(self.slots) > 1:
            whole = pack([f for own in batches for f in own.features])
            slots = torch.tensor([slot for slot, _ in running])
            counts = torch.tensor([len(own.features) for own in batches])
            index = slots.repeat_interleave(counts)
        parts = list(zip(bits, batches, strict=True))
        step = Pass(
            encoder=self.encoder, batch=whole.to(device), index=index, biases=biases, heads=heads,
            dropout=self._masks(parts),
        )  # fmt: skip
        return step.losses([
            (slot, lane, share) for (slot, lane), share in zip(running, shares, strict=True)
        ])  # fmt: skip

    def _masks(self, parts: Sequence[tuple[DropoutBits, Batch]]) -> Masks:
        """Return the form of dropout that the hardware takes best."""
        device = self.encoder.device
        if self.encoder.packed and has_kernels(device):
            return FusedDropout(parts, device)
        return StepDropout([(bits, batch.to(device)) for bits, batch in parts])

    def _drop_diverged(
        self, running: Sequence[tuple[int, Lane]], done: StepDone
    ) -> Iterator[LaneDropped]:
        """Give up the lanes whose loss is no number any more; the others never saw it."""
        if self.encoder.device.type != "cpu" and running[0][1].progress.step % LOSS_CHECK_STEPS:
            return
        values = torch.stack([loss for _, loss in done.losses]).tolist()
        for (slot, lane), value in zip(running, values, strict=True):
            if not math.isfinite(value):
                yield self._drop(slot, lane, value)

    def _drop(self, slot: int, lane: Lane, loss: float) -> LaneDropped:
        lane.progress.dropped = (
            f"the loss became {loss} at step {lane.progress.step} of {lane.total_steps} with "
            f"learning rate {lane.config.learning_rate:g}: try a smaller one"
        )
        self._free(slot)
        if all(other.progress.dropped for other in self.lanes):
            raise TrainingDiverged(lane.progress.dropped)
        return LaneDropped(lane, lane.progress.dropped)

    def _free(self, slot: int) -> None:
        self.slots[slot] = None
        self.method.clear(slot)
        self.optimizer.reset(slot, len(self.slots))

    def _end_epoch(self, slot: int, lane: Lane) -> EpochDone | LaneDropped:
        began = time.perf_counter()
        train_loss = lane.epoch_loss  # waits until a GPU has done the steps that were asked for
        lane.progress.seconds += time.perf_counter() - began
        if not math.isfinite(train_loss):
            return self._drop(slot, lane, train_loss)
        scores, logits = ({}, []) if lane.dev is None else self.evaluate(lane, lane.dev, slot)
        more = {name: self.evaluate(lane, split, slot) for name, split in lane.more.items()}
        is_best = lane.epoch_ended(
            scores, self.method.read(slot), {name: found for name, (found, _) in more.items()}
        )
        if lane.finished:
            self._free(slot)
        return EpochDone(
            lane, len(lane.progress.history), lane.progress.step, train_loss, scores, is_best,
            lane.progress.stopped, logits, {name: found for name, (_, found) in more.items()},
        )  # fmt: skip

    def evaluate(
        self, lane: Lane, split: Split, slot: int = 0
    ) -> tuple[dict[str, float], list[Logits]]:
        """Return the scores and the logits of a split, at evaluation mode, in every process.

        Args:
            lane: whose task it is.
            split: what to score.
            slot: where its numbers are; 0 after :meth:`keep`.
        """
        row, weights = self.method.trained(slot, lane.layout, lane.head)
        heads = {0: TaskHead(lane.head, weights)}
        items, processes = split.features.items, self.processes
        places = processes.dealt([len(f) for f in items])
        own = [items[place] for place in places]
        logits = processes.collect(
            compute_logits(self.encoder, own, row[None], lane.layout, heads),
            places, [logits_shape(lane.head, f) for f in items],
        )  # fmt: skip
        return score_logits(lane.task, split, logits), logits

    def keep(self, lane: Lane) -> None:
        """Put the kept epoch's numbers of a finished run in slot 0, to evaluate and save them."""
        self.method.write(0, lane.best)

    def save(self) -> None:
        """Write the state, atomically; the loss of power costs at most the steps since then."""
        began = time.monotonic()
        if self.checkpoint is not None and self.processes.is_main:
            self._write(self.checkpoint)
        now = time.monotonic()
        self._save_due_at = now + max(CHECKPOINT_SECONDS, CHECKPOINT_PAUSE * (now - began))

    def _write(self, checkpoint: Path) -> None:
        for lane in self.lanes:
            lane.read_losses()
        progress, best = [lane.progress for lane in self.lanes], [lane.best for lane in self.lanes]
        state = State(self.slots, self.next_lane, progress, best, self._moving())
        write_state(checkpoint, self.identity, state)

    def resume(self) -> bool:
        """Go on from the checkpoint where there is one; return whether there was.

        Raises:
            CheckpointRefused: it is damaged, or of runs with other settings or data; nothing of it
                was taken.
        """
        if self.checkpoint is None or not self.checkpoint.exists():
            return False
        state = read_state(
            self.checkpoint, self.identity, moving=self._moving(), numbers=self.method.read(0),
            slots=len(self.slots), lanes=len(self.lanes),
        )  # fmt: skip
        self._take(state)
        return True

    def _take(self, state: State) -> None:
        """Go on from a state that was checked."""
        self.slots, self.next_lane = state.slots, state.next_lane
        for lane, progress, best in zip(self.lanes, state.progress, state.best, strict=True):
            lane.progress, lane.seconds_before = progress, progress.seconds
            lane.forget_losses()
            lane.best = [tensor.to(self.encoder.device) for tensor in best]
        for slot, lane in self._running():
            self.method.begin(slot, lane.layout, lane.head, lane.config.seed)
        with torch.no_grad():
            for name, tensor in self._moving().items():
                tensor.copy_(state.moving[name])
        self.method.moved()

    def set_aside_checkpoint(self) -> Path | None:
        """Keep the checkpoint of an earlier run that is not resumed; return where, if any was."""
        if self.checkpoint is None or not self.processes.is_main or not self.checkpoint.exists():
            return None
        return self.checkpoint.replace(f"{self.checkpoint}.old")

    def _moving(self) -> dict[str, Tensor]:
        groups = {
            "trained": self.method.tensors,
            "mean": self.optimizer.means,
            "square": self.optimizer.squares,
        }
        return {
            f"{group}.{i}": tensor.detach()
            for group, tensors in groups.items()
            for i, tensor in enumerate(tensors)
        }


def _common(identities: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join what several runs depend on: a value where all agree, else one for each run."""
    joined: dict[str, Any] = {}
    for key in identities[0]:
        values = [identity[key] for identity in identities]
        joined[key] = values[0] if all(v == values[0] for v in values) else values
    return joined


def score_logits(task: Task, split: Split, logits: Sequence[Logits]) -> dict[str, float]:
    """Return the task's metrics of ``logits``, one entry per feature of ``split``."""
    items = split.features.items
    predictions = read_predictions(task, split.examples, items, logits)
    return compute_metrics(task, predictions, references(split.examples))
