"""A group of runs trained together, and what each of them leaves."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from bitfit import __version__
from bitfit.base import TRAINED_ON
from bitfit.bench.memory import give_back, is_known, read_peak, start_peak
from bitfit.bench.timing import describe_versions
from bitfit.comparison import bias_change
from bitfit.doctor import count_parameters, cpu_name
from bitfit.errors import (
    BitfitError,
    CheckpointRefused,
    NotWritten,
    TrainingDiverged,
    TrainingInterrupted,
)
from bitfit.experiments.conditions import Conditions
from bitfit.experiments.material import Material
from bitfit.experiments.runs import Run, command_of, data_config
from bitfit.experiments.store import Result, Store
from bitfit.heads import read_predictions, read_spans
from bitfit.jsonable import jsonable
from bitfit.metrics import majority_score
from bitfit.tasks import contexts, references
from bitfit.training.finetune import data_source
from bitfit.training.lane import Lane, Split
from bitfit.training.methods import RandomMethod, make_method
from bitfit.training.outputs import make_task_file
from bitfit.training.settings import ROW_METHODS
from bitfit.training.train import EpochDone, LaneDropped, StepDone, Trainer

# What fails a run and lets the sweep go on, but for the next two.
_FAULTS = (BitfitError, RuntimeError, MemoryError, ValueError)
# What is no fault of a run: being stopped, a full disk.
_NO_FAULTS = (TrainingInterrupted, NotWritten)


@dataclass(frozen=True)
class Group:
    """Runs that are trained in one go: the unit of a claim and of a checkpoint."""

    id: str
    runs: Sequence[Run]
    lanes: int
    """How many of them side by side."""


@dataclass(frozen=True)
class BegunAnew:
    """A group was begun before, and what was saved of it is of no use here."""

    group: Group
    reason: str


Event: TypeAlias = StepDone | EpochDone | LaneDropped | BegunAnew


def run_group(
    group: Group,
    material: Material,
    store: Store,
    conditions: Conditions,
    *,
    on_event: Callable[[Event], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[Result]:
    """Train a group, from its checkpoint where there is one, and return what each run left.

    Nothing but the group's scratch folder of ``store`` is written. A run that cannot be made, or
    that diverges, is a failed result and does not stop the others.

    Raises:
        TrainingInterrupted: ``should_stop`` said so; the state is saved.
        NotWritten: the scratch folder cannot be written to.
    """
    lanes: dict[str, Lane] = {}
    failed: dict[str, str] = {}
    for run in group.runs:
        try:
            lanes[run.id] = material.lane(run)
        except BitfitError as error:
            failed[run.id] = str(error)
    results = {}
    if lanes:
        try:
            work = _Work(group, material, store, conditions, lanes)
            results = work.done(on_event, should_stop)
        except _NO_FAULTS:
            raise
        except _FAULTS as error:
            failed |= dict.fromkeys(lanes, _told(error))
    lost = {r.record["id"]: r for r in failed_results(group, material, conditions, failed)}
    return [results[run.id] if run.id in results else lost[run.id] for run in group.runs]


def failed_results(
    group: Group, material: Material, conditions: Conditions, errors: Mapping[str, str]
) -> list[Result]:
    """Return what the runs of a group leave that could not be made; ``errors`` says why, by id."""
    return [
        Result(record=_failed(run, material, conditions, errors[run.id]))
        for run in group.runs
        if run.id in errors
    ]


class _Work:
    """The training of a group whose lanes could be made."""

    def __init__(
        self,
        group: Group,
        material: Material,
        store: Store,
        conditions: Conditions,
        lanes: Mapping[str, Lane],
    ) -> None:
        self.group, self.material, self.store, self.conditions = group, material, store, conditions
        self.runs = {run.id: run for run in group.runs}
        self.lanes = lanes
        self.run_of = {id(lane): run_id for run_id, lane in lanes.items()}
        encoder, made = material.encoder, list(lanes.values())
        self.trainer = Trainer(
            encoder=encoder,
            method=make_method(encoder, made, min(group.lanes, len(made))),
            lanes=made,
            checkpoint=store.scratch(group.id) / "state.checkpoint",
            identity={
                "group": group.id,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            },
        )
        self.peak: int | None = None
        # Before a method adds its own, as adapters are.
        self.sizes = {k: count_parameters(encoder, v.head.pooling) for k, v in lanes.items()}

    def done(
        self,
        on_event: Callable[[Event], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> dict[str, Result]:
        """Train what is left of the group, and return what its runs leave."""
        device, trainer = self.material.encoder.device, self.trainer
        give_back()
        before = start_peak(device) if is_known(device) else None
        trainer.method.install()
        try:
            self._resume(on_event)
            self._train(on_event, should_stop)
            if before is not None:
                self.peak = max(0, read_peak(device) - before)
            return {run_id: self._result(run_id, lane) for run_id, lane in self.lanes.items()}
        finally:
            trainer.method.uninstall()

    def _resume(self, on_event: Callable[[Event], None] | None) -> None:
        """Go on from the group's checkpoint; where it cannot be used, from the start.

        The runs are the same: it is damaged, or of a machine that computes in another way.
        """
        try:
            self.trainer.resume()
        except CheckpointRefused as error:
            self.trainer.set_aside_checkpoint()
            if on_event is not None:
                on_event(BegunAnew(self.group, str(error)))

    def _train(
        self,
        on_event: Callable[[Event], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> None:
        try:
            for event in self.trainer.run():
                if isinstance(event, EpochDone):
                    self._keep_predictions(event)
                if on_event is not None:
                    on_event(event)
                if isinstance(event, StepDone) and should_stop is not None and should_stop():
                    self.trainer.save()
                    raise TrainingInterrupted(f"stopped at step {event.step} of {event.total}")
        except TrainingDiverged:  # all of them: each lane says so itself
            return

    def _keep_predictions(self, event: EpochDone) -> None:
        """Write down what an epoch predicts, before the checkpoint that says it is done."""
        lane = event.lane
        assert lane.dev is not None
        predicted = {"dev": _predictions(lane, lane.dev, event.logits)} | {
            name: _predictions(lane, lane.more[name], logits)
            for name, logits in event.more_logits.items()
        }
        self.store.write_epoch(self.group.id, self.run_of[id(lane)], event.epoch, predicted)

    def _result(self, run_id: str, lane: Lane) -> Result:
        """Return what a lane leaves: of one that fails now, by a NaN say, that it failed."""
        run, error = self.runs[run_id], lane.progress.dropped
        if not error:
            assert lane.dev is not None
            try:
                return self._finished(run, lane, lane.dev)
            except _NO_FAULTS:
                raise
            except _FAULTS as fault:
                error = _told(fault)
        return Result(record=_failed(run, self.material, self.conditions, error))

    def _finished(self, run: Run, lane: Lane, dev: Split) -> Result:
        began, trainer = time.perf_counter(), self.trainer
        trainer.keep(lane)
        source = self.material.source(run.task, run.train_rows, run.data_seed)
        file = make_task_file(
            trainer, lane, self.material.splits(run), data_hash=source.hashes["train"],
            train_score=True, source=self._data_source(run), storage="fp32", licence=None,
            description=None,
        )  # fmt: skip
        is_row = run.config.method in ROW_METHODS
        data = file.to_bytes() if is_row else None
        best = lane.progress.history[lane.progress.best_epoch - 1]
        record = _about(run, self.material, self.conditions) | {
            "state": "done",
            "error": None,
            "metric": lane.task.metric,
            "history": lane.progress.history,
            "best_epoch": lane.progress.best_epoch,
            "scores": best["dev"],
            "last": lane.progress.history[-1]["dev"],
            "train_scores": _with_prefix(file.scores, "train_"),
            "more": _mismatched(file.scores),
            "majority": majority_score(lane.task, references(dev.examples)),
            "change": bias_change(file) if run.config.method == "bitfit" else None,
            "trainable": {
                "encoder": trainer.method.encoder_count(lane.layout), "head": lane.head.size,
                "of": self.sizes[run.id],
            },
            "cost": self._cost(lane, began, data),
        }  # fmt: skip
        kept = [
            self.store.read_epoch(self.group.id, run.id, epoch["epoch"])
            for epoch in lane.progress.history
        ]
        names = ("dev", *lane.more)
        predictions = (
            {name: [e.get(name) for e in kept if e] for name in names} if all(kept) else None
        )
        return Result(
            record=jsonable(record), predictions=predictions,
            answers=jsonable(references(dev.examples)), contexts=contexts(dev.examples),
            more_answers={k: jsonable(references(v.examples)) for k, v in lane.more.items()},
            task_file=data,
        )  # fmt: skip

    def _data_source(self, run: Run) -> dict[str, Any]:
        dataset = self.material.source(run.task, run.train_rows, run.data_seed).dataset
        config = data_config(run.task, self.material.data, run.train_rows, run.data_seed)
        return data_source(config, dataset)

    def _cost(self, lane: Lane, began: float, data: bytes | None) -> dict[str, Any]:
        progress, method = lane.progress, self.trainer.method
        if data is not None:
            size = len(data)
        elif isinstance(method, RandomMethod):  # an index and a value of each that was drawn
            size = 12 * method.encoder_count(lane.layout) + 4 * lane.head.size
        else:
            size = sum(tensor.numel() * tensor.element_size() for tensor in lane.best)
        return {
            "train_seconds": progress.seconds,
            "seconds": progress.seconds + time.perf_counter() - began,
            "tokens": progress.tokens,
            "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
            "peak_memory_bytes": self.peak,
            "task_bytes": size,
            "lanes": len(self.trainer.slots),
        }


def _predictions(lane: Lane, split: Split, logits: Sequence[Any]) -> Any:
    """Return what is predicted; of answers in texts, which belong to the data, their places."""
    if lane.task.kind == "span":
        return jsonable(read_spans(split.examples, split.features.items, logits))
    return jsonable(read_predictions(lane.task, split.examples, split.features.items, logits))


def _about(run: Run, material: Material, conditions: Conditions) -> dict[str, Any]:
    """Return what is known of a run before it is made."""
    source = material.source(run.task, run.train_rows, run.data_seed)
    facts = dict(run.facts)
    versions = describe_versions()
    return {
        "id": run.id,
        "row": run.row.name,
        "base": run.base,
        "base_name": material.encoder.base.name,
        "trained_on": TRAINED_ON.get(run.base),
        "task": dataclasses.asdict(source.dataset.task) | {"name": run.task.name},
        "train_rows": run.train_rows,
        "config": run.config.to_json(),
        "data": {"train": facts["train"], "dev": facts["dev"], "seed": run.data_seed},
        "rows": {name: len(rows) for name, rows in source.dataset.splits.items()},
        "environment": {
            "bitfit": __version__, "torch": versions["torch"],
            "transformers": versions["transformers"], "python": versions["python"],
            "device": conditions.device, "machine": _machine(material.encoder.device),
            "threads": conditions.threads, "dtype": conditions.dtype,
        },
        "command": command_of(run, material.data, conditions),
    }  # fmt: skip


def _failed(run: Run, material: Material, conditions: Conditions, error: str) -> dict[str, Any]:
    found: dict[str, Any] = jsonable(
        _about(run, material, conditions) | {"state": "failed", "error": error}
    )
    return found


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return cpu_name()


def _with_prefix(scores: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {k.removeprefix(prefix): v for k, v in scores.items() if k.startswith(prefix)}


def _mismatched(scores: Mapping[str, float]) -> dict[str, dict[str, float]]:
    end = "_mismatched"
    found = {k.removesuffix(end): v for k, v in scores.items() if k.endswith(end)}
    return {"dev_mismatched": found} if found else {}
