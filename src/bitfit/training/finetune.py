"""The whole run on one page: data -> features -> encoder -> training -> task file and scores."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from bitfit.base import choose_device
from bitfit.batches import make_features
from bitfit.data import DataConfig, Dataset, dataset_hash, read_dataset
from bitfit.encoder import Encoder, open_encoder
from bitfit.errors import TrainingInterrupted
from bitfit.precision import PRECISIONS
from bitfit.tasks import Task
from bitfit.training.checkpoint import recorded_conditions
from bitfit.training.lane import Lane, Split
from bitfit.training.lane_count import choose_lane_count
from bitfit.training.methods import make_method
from bitfit.training.outputs import Outcome, make_task_file, save_outcome
from bitfit.training.plan import (
    check_dtype,
    check_lanes,
    check_out,
    check_rates,
    checkpoint_path,
    plan_run,
)
from bitfit.training.processes import Processes, join_processes, own_device
from bitfit.training.settings import ROW_METHODS, SPAN_MAX_LENGTH, TrainConfig
from bitfit.training.train import EpochDone, LaneDropped, StepDone, Trainer


@dataclass(frozen=True)
class DataRead:
    """The rows are there, and nothing else yet."""

    dataset: Dataset


@dataclass(frozen=True)
class RunStarted:
    """Training begins: of one run, or of several rates."""

    encoder: Encoder
    lanes: Sequence[Lane]
    slots: int
    """How many of the lanes train side by side."""
    encoder_count: int
    """Values of the encoder that each trains."""
    resumed_at: int
    """The step that a checkpoint goes on from, 0 for a fresh start."""
    total_steps: int
    set_aside: Path | None
    """Where the checkpoint of an earlier run is kept, which is not gone on from; None: none was."""


Event: TypeAlias = DataRead | RunStarted | StepDone | EpochDone | LaneDropped


def finetune(
    base: str | Encoder = "minilm",
    *,
    data: str | Path | DataConfig,
    out: str | Path | None = None,
    learning_rate: float | str | None = None,
    data_seed: int | None = None,
    recipe: str = "default",
    name: str | None = None,
    storage: Any = "fp32",
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    threads: int | None = None,
    lanes: int | str = "auto",
    low_memory: bool = False,
    resume: bool = False,
    train_score: bool = False,
    licence: str | None = None,
    description: str | None = None,
    on_event: Callable[[Event], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    **options: Any,
) -> Outcome:
    """Fine-tune ``base`` on ``data`` and return what came out, saved to ``out`` if given.

    Ben Zaken et al. 2022, section 3: the encoder is frozen but for its bias vectors, and a small
    head is trained with them. In processes that torchrun or accelerate's launcher started, all call
    this with the same arguments and train one run; the main one writes it.

    Args:
        base: ``"minilm"``, a directory, a name on the model hub, or an open :class:`Encoder`.
        data: a file, a folder, a name on the data hub, or a whole :class:`DataConfig`.
        out: the task file to write (for ``full`` a directory).
        learning_rate: a rate, or ``"auto"``: the method's four rates, chosen on dev.
        data_seed: what ``limit`` and the rows held out for dev are drawn from; None: the seed of
            ``data`` where that is a :class:`DataConfig`, else the run's own ``seed``.
        recipe: ``"default"`` or ``"paper"``.
        name: what the task is called; by default after the built-in task or the data file.
        storage: how the file keeps its biases: ``fp32``, ``fp16``, ``bf16`` or ``int8``.
        dtype: precision of the frozen weights: ``fp32``, ``bf16``, ``tf32`` (fp32 with the products
            of a GPU rounded), or ``auto``: measured.
        device: ``auto``, ``cpu``, ``cuda``.
        revision: branch, tag or commit of a base on the hub.
        trust_remote_code: run code that comes with the base. Only where you trust its author.
        threads: CPU threads; None leaves torch's choice.
        low_memory: compute each layer again in the backward pass: the same numbers for less
            memory and about a third more time.
        lanes: how many of several rates train side by side; ``"auto"`` measures it.
        resume: go on from the checkpoint beside ``out``, if there is one.
        train_score: also score the training rows (the paper's generalization gap).
        licence: licence of the task file, kept in it.
        description: a model card in free text, kept in the file.
        on_event: told of the data that was read, and of every step and epoch.
        should_stop: asked after every step; True saves a checkpoint and ends.
        **options: fields of :class:`DataConfig` (``task``, ``text``, ``label``, ``limit``, ...) and
            of :class:`TrainConfig` (``epochs``, ``terms``, ``method``, ``seed``, ...).

    Raises:
        UsageError: an option that cannot be meant.
        DataError: a row that cannot be read, with file and line.
        TrainingDiverged: the loss became NaN or infinite.
        TrainingInterrupted: ``should_stop`` said so; the message says how to go on.

    Example:
        >>> outcome = finetune("minilm", data="tickets.csv", text="body", label="intent",
        ...                    out="intent.bitfit.safetensors")  # doctest: +SKIP
        >>> outcome.score  # doctest: +SKIP
        0.93
    """
    began = time.perf_counter()
    data_config, config, rates = plan_run(data, recipe, learning_rate, options, data_seed)
    check_out(out, storage, config.method)
    check_lanes(lanes)
    before = recorded_conditions(checkpoint_path(out)) if resume else {}
    if threads or "threads" in before:
        torch.set_num_threads(threads or before["threads"])

    dataset = read_dataset(data_config, with_test=False)
    if on_event is not None:
        on_event(DataRead(dataset))
    check_rates(rates, dataset.splits)
    task = dataset.task if name is None else dataclasses.replace(dataset.task, name=name)
    dtype = _precision(dtype, before, config, base)
    encoder, processes = _open(base, dtype, own_device(device), revision, trust_remote_code)
    check_dtype(encoder, dtype)
    encoder.low_memory = low_memory
    if task.kind == "span" and options.get("max_length") is None:
        config = config.replace(max_length=SPAN_MAX_LENGTH)
    config = config.replace(max_length=encoder.clamp_length(config.max_length))
    splits = {
        split: _featurize(encoder, task, examples, config.max_length)
        for split, examples in dataset.splits.items()
    }
    runs = _make_lanes(encoder, task, config, rates, splits)
    hashes = {split: dataset_hash(examples) for split, examples in dataset.splits.items()}
    if lanes == "auto":
        lanes = before.get("lanes") or choose_lane_count(encoder, runs, processes=processes)
    trainer = Trainer(
        encoder=encoder, lanes=runs, method=make_method(encoder, runs, min(int(lanes), len(runs))),
        checkpoint=checkpoint_path(out), identity=_conditions(encoder, hashes),
        processes=processes,
    )  # fmt: skip
    _train(trainer, resume, on_event, should_stop)

    best = max(runs, key=lambda lane: (not lane.progress.dropped, lane.progress.best_score))
    trainer.method.install()
    try:
        trainer.keep(best)
        file = make_task_file(
            trainer, best, splits, data_hash=hashes["train"], train_score=train_score,
            source=data_source(data_config, dataset), storage=storage, licence=licence,
            description=description,
        )  # fmt: skip
        if out is not None and processes.is_main:
            save_outcome(Path(out), trainer, file)
            if trainer.checkpoint is not None:
                trainer.checkpoint.unlink(missing_ok=True)
        processes.wait()  # who returns finds the file
    finally:
        trainer.method.uninstall()
    return Outcome(
        file=file, trainer=trainer, lane=best, dataset=dataset,
        path=None if out is None else Path(out), seconds=time.perf_counter() - began,
    )  # fmt: skip


def _precision(
    dtype: str, before: Mapping[str, Any], config: TrainConfig, base: str | Encoder
) -> str:
    """Return what a run computes in, before anything is measured: that of the run it goes on."""
    if dtype == "auto" and "dtype" in before:
        return str(before["dtype"])
    if dtype == "auto" and (config.recipe == "paper" or config.method not in ROW_METHODS):
        # Part of the paper's recipe, and of methods that train matrices; whoever has opened the
        # base in tf32 has chosen how its products are done.
        return "tf32" if isinstance(base, Encoder) and base.tf32 else "fp32"
    return dtype


def _open(
    base: str | Encoder, dtype: str, device: str, revision: str | None, trust: bool
) -> tuple[Encoder, Processes]:
    """Return the base, in the precision of the main process where each measured it, and all."""
    if isinstance(base, Encoder):
        return base, join_processes(base.device)
    processes = join_processes(choose_device(device))
    encoder = open_encoder(base, dtype, device, revision=revision, trust_remote_code=trust)
    names = tuple(PRECISIONS)
    agreed = names[processes.first(names.index(encoder.precision))]
    if agreed != encoder.precision:
        encoder = open_encoder(base, agreed, device, revision=revision, trust_remote_code=trust)
    return encoder, processes


def _make_lanes(
    encoder: Encoder,
    task: Task,
    config: TrainConfig,
    rates: Sequence[float] | None,
    splits: Mapping[str, Split],
) -> list[Lane]:
    """Return the one run, or one for each of several ``rates``."""
    return [
        Lane(
            encoder=encoder, task=task, config=config.replace(learning_rate=rate),
            train=splits["train"], dev=splits.get("dev"),
            label=f"learning rate {rate:g}" if rates else "",
        )
        for rate in rates or (config.learning_rate,)
    ]  # fmt: skip


def data_source(config: DataConfig, dataset: Dataset) -> dict[str, Any]:
    """Return what ``bitfit eval`` needs to read the same data, and to find the rows held out."""
    found: dict[str, Any] = {}
    if config.builtin is not None:  # the task may go by another name
        found["builtin_task"] = config.builtin.task.name
    if config.train_split != "train":
        found["train_split"] = config.train_split
    if dataset.held_out:
        found |= {"dev_fraction": config.dev_fraction, "dev_seed": config.seed}
    return found


def _train(
    trainer: Trainer,
    resume: bool,
    on_event: Callable[[Event], None] | None,
    should_stop: Callable[[], bool] | None,
) -> None:
    """Run a trainer to its end; the encoder is as before afterwards."""
    trainer.method.install()
    try:
        _run(trainer, resume, on_event, should_stop)
    finally:
        trainer.method.uninstall()


def _run(
    trainer: Trainer,
    resume: bool,
    on_event: Callable[[Event], None] | None,
    should_stop: Callable[[], bool] | None,
) -> None:
    set_aside = None
    if resume:
        trainer.resume()
    else:
        set_aside = trainer.set_aside_checkpoint()
    processes = trainer.processes
    processes.check_same(json.dumps([trainer.identity, trainer.steps], sort_keys=True))
    if on_event is not None:
        on_event(RunStarted(
            trainer.encoder, trainer.lanes, len(trainer.slots),
            trainer.method.encoder_count(trainer.lanes[0].layout), trainer.steps,
            trainer.total_steps, set_aside,
        ))  # fmt: skip
    for event in trainer.run():
        if on_event is not None:
            on_event(event)
        if not isinstance(event, StepDone):
            continue
        if processes.any(should_stop is not None and should_stop()):
            trainer.save()
            where = f"at step {event.step} of {event.total}"
            if trainer.checkpoint is None:
                raise TrainingInterrupted(
                    f"stopped {where}; nothing was saved, as no out was given"
                )
            raise TrainingInterrupted(
                f"stopped {where}, saved to {trainer.checkpoint}; the same command with --resume "
                "goes on from there"
            )


def _conditions(encoder: Encoder, hashes: dict[str, str]) -> dict[str, Any]:
    """What the numbers of a run depend on, beside its task and settings."""
    return {
        "base": encoder.base.identity.sha256,
        "tokenizer": encoder.base.tokenizer_sha256,
        "train rows": hashes["train"],
        "dev rows": hashes.get("dev"),
        "dtype": encoder.precision,
        "device": encoder.device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _featurize(encoder: Encoder, task: Task, examples: Sequence[Any], max_length: int) -> Split:
    return Split(examples, make_features(encoder.base.tokenizer, task, examples, max_length))
