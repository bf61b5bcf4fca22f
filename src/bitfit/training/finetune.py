"""The whole run on one page: data -> features -> encoder -> training -> task file and scores."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from bitfit.batches import make_features
from bitfit.data import DataConfig, Dataset, dataset_hash, read_dataset
from bitfit.encoder import DTYPES, Encoder, open_encoder
from bitfit.errors import TrainingInterrupted, UsageError
from bitfit.heads import make_head
from bitfit.tasks import Task
from bitfit.training.methods import make_method
from bitfit.training.outputs import Outcome, make_task_file, save_outcome
from bitfit.training.plan import (
    check_dtype,
    check_out,
    checkpoint_path,
    plan_run,
    resume_conditions,
)
from bitfit.training.settings import TrainConfig
from bitfit.training.train import EpochDone, Split, StepDone, Trainer


@dataclass(frozen=True)
class DataRead:
    """The rows are there, and nothing else yet."""

    dataset: Dataset


@dataclass(frozen=True)
class RunStarted:
    """Training begins, or begins again with the next of several rates."""

    task: Task
    config: TrainConfig
    encoder: Encoder
    encoder_count: int
    head_count: int
    train: Split
    dev: Split | None
    resumed_at: int
    """The step that a checkpoint goes on from, 0 for a fresh start."""
    total_steps: int


Event: TypeAlias = DataRead | RunStarted | StepDone | EpochDone


def finetune(
    base: str | Encoder = "minilm",
    *,
    data: str | Path | DataConfig,
    out: str | Path | None = None,
    learning_rate: float | str | None = None,
    recipe: str = "default",
    name: str | None = None,
    storage: Any = "fp32",
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    threads: int | None = None,
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
    head is trained with them.

    Args:
        base: ``"minilm"``, a directory, a name on the model hub, or an open :class:`Encoder`.
        data: a file, a folder, a name on the data hub, or a whole :class:`DataConfig`.
        out: the task file to write (for ``full`` a directory).
        learning_rate: a rate, or ``"auto"``: the paper's four rates, chosen on dev.
        recipe: ``"default"`` or ``"paper"``.
        name: what the task is called; by default after the built-in task or the data file.
        storage: how the file keeps its biases: ``fp32``, ``fp16``, ``bf16`` or ``int8``.
        dtype: precision of the frozen weights: ``fp32``, ``bf16``, or ``auto``: measured.
        device: ``auto``, ``cpu``, ``cuda``.
        revision: branch, tag or commit of a base on the hub.
        trust_remote_code: run code that comes with the base. Only where you trust its author.
        threads: CPU threads; None leaves torch's choice.
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
    data_config, config, rates = plan_run(data, recipe, learning_rate, options)
    check_out(out, storage, config)
    before = resume_conditions(out, rates) if resume else {}
    if threads or "threads" in before:
        torch.set_num_threads(threads or before["threads"])

    dataset = read_dataset(data_config, with_test=False)
    if on_event is not None:
        on_event(DataRead(dataset))
    task = dataset.task if name is None else dataclasses.replace(dataset.task, name=name)
    if dtype == "auto" and "dtype" in before:
        dtype = before["dtype"]
    elif dtype == "auto" and (recipe == "paper" or config.method not in ("bitfit", "frozen")):
        dtype = "fp32"  # part of the paper's recipe, and of methods that train matrices
    encoder = base if isinstance(base, Encoder) else open_encoder(
        base, dtype, device, revision=revision, trust_remote_code=trust_remote_code
    )  # fmt: skip
    check_dtype(encoder, dtype)
    config = config.replace(max_length=encoder.clamp_length(config.max_length))
    splits = {
        split: _featurize(encoder, task, examples, config.max_length)
        for split, examples in dataset.splits.items()
        if split.startswith(("train", "dev"))
    }

    if rates and "dev" not in splits:
        raise UsageError(
            "learning_rate 'auto' (--lr auto) chooses on dev rows and there are none: name a dev "
            "file, let dev_fraction be above 0, or give one rate"
        )
    hashes = {split: dataset_hash(dataset.splits[split]) for split in splits}
    best: Trainer | None = None
    candidates: list[dict[str, Any]] = []
    checkpoints: list[Path | None] = []
    for rate in rates or (config.learning_rate,):
        trainer = _make_trainer(
            encoder, task, config.replace(learning_rate=rate), splits, hashes,
            checkpoint_path(out, rate if rates else None),
        )  # fmt: skip
        checkpoints.append(trainer.checkpoint)
        _train(trainer, resume, on_event, should_stop)
        candidates.append({"learning_rate": rate, "score": trainer.progress.best_score})
        if best is None or trainer.progress.best_score > best.progress.best_score:
            best = trainer
    assert best is not None

    best.method.install()
    try:
        file = make_task_file(
            best, splits, data_hash=hashes["train"],
            candidates=candidates if rates else None, train_score=train_score,
            source=_source(data_config, dataset), storage=storage, licence=licence,
            description=description,
        )  # fmt: skip
        if out is not None:
            save_outcome(Path(out), best, file)
            for checkpoint in checkpoints:
                if checkpoint is not None:
                    checkpoint.unlink(missing_ok=True)
    finally:
        best.method.uninstall()
    return Outcome(
        file=file, trainer=best, dataset=dataset, path=None if out is None else Path(out),
        seconds=time.perf_counter() - began,
    )  # fmt: skip


def _source(config: DataConfig, dataset: Dataset) -> dict[str, Any]:
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
    if resume:
        trainer.resume()
    else:
        trainer.set_aside_checkpoint()
    if on_event is not None:
        on_event(RunStarted(
            trainer.task, trainer.config, trainer.encoder, trainer.method.encoder_count,
            trainer.method.head_count, trainer.train, trainer.dev, trainer.progress.step,
            trainer.total_steps,
        ))  # fmt: skip
    for event in trainer.run():
        if on_event is not None:
            on_event(event)
        if should_stop is not None and isinstance(event, StepDone) and should_stop():
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


def _make_trainer(
    encoder: Encoder,
    task: Task,
    config: TrainConfig,
    splits: dict[str, Split],
    hashes: dict[str, str],
    checkpoint: Path | None,
) -> Trainer:
    head = make_head(task, encoder, config.pooling)
    return Trainer(
        encoder=encoder, task=task, head=head, method=make_method(encoder, head, config),
        config=config, train=splits["train"], dev=splits.get("dev"), checkpoint=checkpoint,
        identity={
            "task": dataclasses.asdict(task),
            "base": encoder.base.identity.sha256,
            "tokenizer": encoder.base.tokenizer_sha256,
            "train rows": hashes["train"],
            "dev rows": hashes.get("dev"),
            "dtype": next(name for name, value in DTYPES.items() if value == encoder.dtype),
            "device": encoder.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    )  # fmt: skip


def _featurize(encoder: Encoder, task: Task, examples: Sequence[Any], max_length: int) -> Split:
    return Split(examples, make_features(encoder.base.tokenizer, task, examples, max_length))
