"""Behind ``bitfit train``: options to a run, and its progress."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from rich.progress import Progress, TextColumn

from bitfit.cli import console, options
from bitfit.data import DataConfig, Dataset
from bitfit.data.files import project_name
from bitfit.data.splits import count_shared
from bitfit.errors import BitfitError, MissingExtra
from bitfit.jsonable import jsonable
from bitfit.training.checkpoint import recorded_step
from bitfit.training.finetune import DataRead, Event, RunStarted, finetune
from bitfit.training.lane import Lane
from bitfit.training.outputs import Outcome
from bitfit.training.plan import check_out, checkpoint_path
from bitfit.training.settings import PEFT_METHODS, ROW_METHODS
from bitfit.training.train import EpochDone, StepDone

# What finetune takes beside the data, under the same names as the options.
_PASSED_ON = (
    "name recipe storage dtype device threads low_memory resume train_score licence description "
    "epochs batch_size seed data_seed terms method max_length pooling schedule warmup_ratio "
    "max_grad_norm adam_eps attention_dropout class_weights keep patience revision "
    "trust_remote_code"
).split()


def run(given: Mapping[str, Any]) -> Outcome:
    """Train as the options say and return the outcome; of several processes one shows and logs."""
    if not console.is_main():
        given = {**given, "quiet": True, "log": None, "tensorboard": None}
    arguments = _arguments(given)
    with (
        console.Interruption() as interruption,
        Watch(given, arguments["out"], interruption) as watch,
    ):
        outcome = finetune(**arguments, on_event=watch, should_stop=lambda: interruption.asked)
    if outcome.dataset.skipped and not given["quiet"]:
        _list_skipped(outcome.dataset.skipped)
    return outcome


def _arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    options.check_name(given["name"])
    config = options.data_config(given)
    arguments = {key: given[key] for key in _PASSED_ON}
    arguments["learning_rate"] = options.parse_rate(given["learning_rate"])
    arguments["lanes"] = options.parse_lanes(given["lanes"])
    arguments["data"] = config
    arguments["out"] = given["out"] or _default_out(config, given)
    arguments["base"] = given["base"]
    return arguments


def _default_out(config: DataConfig, given: Mapping[str, Any]) -> Path:
    builtin = config.builtin
    name = given["name"] or (builtin.task.name if builtin else project_name(config))
    method = given["method"] or "bitfit"
    if method in ROW_METHODS:
        return Path(f"{name}.bitfit.safetensors")
    if method in PEFT_METHODS:
        return Path(f"{name}.{method.partition(':')[2]}.safetensors")
    return Path(f"{name}-full" if method == "full" else f"{name}.random.safetensors")


def _tell_data(dataset: Dataset) -> None:
    """Say what of the rows may not be meant, before anything long begins."""
    _tell_kind(dataset)
    train, dev = (dataset.splits.get(split, ()) for split in ("train", "dev"))
    if shared := count_shared(train, dev):
        console.note(
            f"{shared:,} of {console.count(len(dev), 'dev row')} stand among the training rows "
            "too: the dev score says less of new texts"
        )


def _tell_length(event: RunStarted, given: Mapping[str, Any]) -> None:
    """Say that a base takes no texts as long as was asked for."""
    length = event.lanes[0].config.max_length
    if given["max_length"] is not None and length < given["max_length"]:
        console.note(
            f"--max-length {given['max_length']} is more than {event.encoder.base.name} takes: "
            f"texts are cut at {length} tokens"
        )


def _tell_state(out: Path) -> None:
    """Say what ``--resume`` finds."""
    state = checkpoint_path(out)
    assert state is not None
    step = recorded_step(state)
    if step is None:
        console.note(f"no checkpoint beside {out}: --resume starts anew")
    else:
        console.note(f"a checkpoint beside {out}: --resume goes on from step {step}")


def _tell_kind(dataset: Dataset) -> None:
    """Say of numbers that they are measured and not counted as classes, which may not be meant."""
    if dataset.kind_seen_from is not None and dataset.task.kind == "regression":
        console.note(
            f"{dataset.kind_seen_from}: read as regression (a number is predicted); "
            "--kind classification takes them as classes"
        )


def _tell_place(out: Path, given: Mapping[str, Any], set_aside: Path | None) -> None:
    """Say where the file goes, what it replaces, and what is left of an interrupted run.

    Args:
        out: the file.
        given: the options.
        set_aside: where a state is kept that is not gone on from.
    """
    is_task = (given["method"] or "bitfit") in ROW_METHODS
    replaced = f"the {'task ' if is_task else ''}file" if out.is_file() else "what is"
    if given["out"] is None:
        there = f", replaces {replaced} there" if out.exists() else ""
        console.note(f"writing to {out.resolve()}{there} (--out chooses another place)")
    elif out.exists():
        console.note(f"replaces {replaced} {out if out.is_file() else f'in {out}'}")
    state = checkpoint_path(out)
    assert state is not None
    if set_aside is not None:
        console.note(
            f"{state} of an interrupted run is kept as {set_aside}: --resume would have gone on "
            "from it"
        )
    if given["resume"] and not state.exists():
        console.note(f"no checkpoint beside {out}: starting anew")


def _list_skipped(rows: Any, most: int = 20) -> None:
    console.note(f"{console.count(len(rows), 'bad row')} left out:")
    for row in rows[:most]:
        console.note(f"  {row}")
    if len(rows) > most:
        console.note(f"  and {len(rows) - most} more")


# ------------------------------------------------------------------ progress


class Watch:
    """Follows a run: a bar on a terminal, a line per epoch elsewhere, logs where asked for."""

    def __init__(
        self, given: Mapping[str, Any], out: Path, interruption: console.Interruption
    ) -> None:
        self.given, self.out, self.place_is_told = given, out, False
        self.quiet = given["quiet"]
        self.interruption = interruption
        self.board_folder: Path | None = given["tensorboard"]
        self.boards: dict[str, Any] = {}
        self.log = _open_log(given["log"])
        self.bar: Progress | None = None
        self.shown = 0.0
        if self.board_folder is not None:
            _board_class()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.interruption.running = False
        if self.bar is not None:
            self.bar.stop()
        if self.log is not None:
            with suppress(OSError):  # each line was flushed
                self.log.close()
        for board in self.boards.values():
            board.close()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, DataRead):
            if not self.quiet:
                _tell_data(event.dataset)
        elif isinstance(event, RunStarted):
            self._begin(event)
        elif isinstance(event, StepDone):
            self._step(event)
        elif isinstance(event, EpochDone):
            self._epoch(event)
        else:
            self._say(f"{event.lane.label} is given up: {event.reason}")

    def _begin(self, event: RunStarted) -> None:
        self.began, self.tokens = time.perf_counter(), 0
        self.interruption.running = True
        self._open_boards(event.lanes)
        if self.quiet:
            return
        if not self.place_is_told:
            self.place_is_told = True
            _tell_place(self.out, self.given, event.set_aside)
            _tell_length(event, self.given)
        console.note(_headline(event))
        if event.resumed_at:
            console.note(f"resumed at step {event.resumed_at} of {event.total_steps}")
        if not console.messages().is_terminal:
            return
        if self.bar is None:
            columns = ("loss", "speed", "dev")
            self.bar = console.progress(
                *(TextColumn("{task.fields[" + name + "]}", markup=False) for name in columns)
            )
            self.bar.start()
        for old in self.bar.task_ids:
            self.bar.remove_task(old)
        self.row = self.bar.add_task(
            event.lanes[0].task.name, total=event.total_steps, completed=event.resumed_at,
            loss="", speed="", dev="",
        )  # fmt: skip

    def _step(self, event: StepDone) -> None:
        self.tokens += event.tokens
        for lane, loss in event.losses if self.boards else ():
            if lane.progress.step % 10 == 0:
                step = lane.progress.step
                self.boards[lane.label].add_scalar("train/loss", float(loss), step)
        now = time.perf_counter()
        # Reading the loss waits for a GPU: a few times a second is enough.
        if self.bar is None or (now - self.shown < 0.2 and event.step < event.total):
            return
        self.shown = now
        speed = self.tokens / max(now - self.began, 1e-9)
        self.bar.update(
            self.row, completed=event.step, loss=f"loss {float(event.loss):.3f}",
            speed=f"{speed:,.0f} tokens/s",
        )  # fmt: skip

    def _epoch(self, event: EpochDone) -> None:
        lane = event.lane
        metric = lane.task.metric
        score = console.number(event.scores.get(metric)) if event.scores else None
        if self.bar is not None and score is not None:
            self.bar.update(self.row, dev=f"dev {metric} {score}")
        self._record(event)
        seconds = console.duration(time.perf_counter() - self.began)
        parts = [
            lane.label,
            f"epoch {event.epoch}/{lane.config.epochs}: loss {event.train_loss:.4f}",
            f"dev {metric} {score}{' (best so far)' if event.is_best else ''}" if score else "",
            "no better for long: stopped early" if event.stopped else "",
            seconds,
        ]
        self._say(", ".join(part for part in parts if part))

    def _say(self, line: str) -> None:
        if not self.quiet:
            self._show(line)

    def _show(self, line: str) -> None:
        # Above the bar, where there is one.
        if self.bar is not None:
            self.bar.console.print(line, soft_wrap=True)
        else:
            console.note(line)

    def _record(self, event: EpochDone) -> None:
        if self.log is not None:
            self._write_log(self.log, event)
        if self.boards:
            board = self.boards[event.lane.label]
            board.add_scalar("train/epoch_loss", event.train_loss, event.step)
            for name, value in event.scores.items():
                board.add_scalar(f"dev/{name}", value, event.step)

    def _write_log(self, log: IO[str], event: EpochDone) -> None:
        """Write an epoch's line; a log that takes no more is no reason to end a run."""
        lane = event.lane
        line = {
            "task": lane.task.name, "method": lane.config.method,
            "learning_rate": lane.config.learning_rate, "seed": lane.config.seed,
            "epoch": event.epoch, "step": event.step, "train_loss": event.train_loss,
            "scores": event.scores, "is_best": event.is_best, "stopped": event.stopped,
            "seconds": time.perf_counter() - self.began,
        }  # fmt: skip
        try:
            log.write(json.dumps(jsonable(line), allow_nan=False) + "\n")
            log.flush()
        except OSError as problem:
            self.log = None
            with suppress(OSError):  # it would write what is left in its buffer
                log.close()
            self._show(
                f"{self.given['log']}: cannot be written: {problem.strerror or problem}; training "
                "goes on without it"
            )

    def _open_boards(self, lanes: Sequence[Lane]) -> None:
        if self.board_folder is None:
            return
        for lane in lanes:
            below = f"lr-{lane.config.learning_rate:g}" if len(lanes) > 1 else ""
            self.boards[lane.label] = _board_class()(log_dir=str(self.board_folder / below))


def _open_log(path: Path | None) -> IO[str] | None:
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise BitfitError(f"{path}: cannot be written: {error.strerror}") from error


def _board_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtra("--tensorboard", "tensorboard") from None
    return SummaryWriter


def _headline(event: RunStarted) -> str:
    lane = event.lanes[0]
    dev = "no dev rows" if lane.dev is None else console.count(len(lane.dev.examples), "dev row")
    side = f", {event.slots} side by side" if event.slots > 1 else ""
    runs = f" ({len(event.lanes)} learning rates{side})" if len(event.lanes) > 1 else ""
    return (
        f"{lane.task.name}: {console.count(len(lane.train.examples), 'training row')}, {dev}; "
        f"training {console.count(event.encoder_count, 'value')} of {event.encoder.base.name} and "
        f"a head of {lane.head.size:,} in {console.count(event.total_steps, 'step')}{runs}, in "
        f"{_how_it_runs(event)}"
    )


def _how_it_runs(event: RunStarted) -> str:
    encoder = event.encoder
    padded = "" if encoder.packed else ", in padded batches: packing does not hold for this family"
    dtype = encoder.computes_in
    return f"{dtype} on {encoder.device.type}{padded}"


# ------------------------------------------------------------------ before and after


class _Planned(Exception):
    """Raised where training would begin."""

    def __init__(self, event: RunStarted) -> None:
        super().__init__("planned")
        self.event = event


def plan(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run would do, without a step of it and without writing anything."""
    arguments = _arguments(given)
    # Not passed on: a run moves what it finds there.
    out = arguments.pop("out")
    check_out(out, given["storage"], given["method"] or "bitfit")
    read: list[Dataset] = []

    def stop(event: Event) -> None:
        if isinstance(event, DataRead):
            read.append(event.dataset)
        else:
            assert isinstance(event, RunStarted)
            raise _Planned(event)

    try:
        finetune(**arguments | {"lanes": 1}, on_event=stop)
    except _Planned as planned:
        event = planned.event
    lane = event.lanes[0]
    [dataset], encoder = read, event.encoder
    if not given["quiet"]:
        _tell_data(dataset)
        _tell_length(event, given)
        if given["resume"]:
            _tell_state(out)
    return {
        "task": lane.task.name, "kind": lane.task.kind, "labels": list(lane.task.labels),
        "metric": lane.task.metric, "columns": dict(dataset.columns),
        "rows": {split: len(examples) for split, examples in dataset.splits.items()},
        "held_out": dataset.held_out, "skipped_rows": [str(row) for row in dataset.skipped],
        "sources": {split: list(files) for split, files in dataset.sources.items()},
        "truncated_share": lane.train.features.truncated_share,
        "base": encoder.base.name, "packed": encoder.packed,
        "dtype": encoder.computes_in, "device": encoder.device.type,
        "threads": torch.get_num_threads(),
        "trainable": {"encoder": event.encoder_count, "head": lane.head.size},
        "steps": lane.total_steps, "runs": len(event.lanes), "config": lane.config.to_json(),
        "file": str(out),
    }  # fmt: skip
