"""What a finished run leaves: a task file, a checkpoint directory, and the line that reports it."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitfit.base import Base, encoder_tensors
from bitfit.batches import make_features
from bitfit.calibration import (
    CALIBRATED_KINDS,
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    expected_calibration_error,
    fit_temperature,
    probabilities,
)
from bitfit.data import Dataset
from bitfit.encoder import Encoder
from bitfit.heads import word_labels
from bitfit.inference import Logits, TaskHead, compute_logits
from bitfit.metrics import indicator, majority_score
from bitfit.model import probe_examples
from bitfit.rounding import StorageType
from bitfit.storage import atomic_write, pack_safetensors, whole_folder
from bitfit.taskfile import TaskFile
from bitfit.tasks import Task, references
from bitfit.training.adapters import AdapterMethod
from bitfit.training.lane import Lane, Split
from bitfit.training.methods import FullMethod, RowMethod
from bitfit.training.plan import CHECKPOINT_MARK
from bitfit.training.train import Trainer

# With fewer, one wrong answer moves the calibration error by more than what is to be measured.
MIN_CALIBRATION_ROWS = 50
# Where sentence-transformers says what a base was made for.
_POOLING = "1_Pooling/config.json"
# What a task answers to these is kept in its file, so that any machine can prove that it works.
# They are neutral on purpose: a file must not carry its user's texts.
_PROBE_TEXTS = (
    ("It came a day early and works well.", "Everything arrived on time."),
    ("This is not what I was promised!", "The promise was kept."),
    ("Where?", "Who asked for it, and when?"),
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished run."""

    file: TaskFile
    """The task, in memory (``full``, ``random``, ``peft:...``: without what they change)."""
    trainer: Trainer
    lane: Lane
    """The run that was kept, of those that the trainer had."""
    dataset: Dataset
    path: Path | None
    """Where it was saved."""
    seconds: float
    """From reading the data to writing the file, in this process: of a run that was resumed, what
    came before is not in it."""

    @property
    def score(self) -> float:
        """The headline score on dev, a fraction; NaN without a dev set."""
        return self.file.score

    def to_json(self) -> dict[str, Any]:
        """Return the run as one object; scores are fractions."""
        trainer, lane, file = self.trainer, self.lane, self.file
        seconds = max(lane.progress.seconds, 1e-9)
        answers = references(lane.dev.examples) if lane.dev is not None else None
        return {
            "task": file.task.name,
            "metric": file.task.metric,
            "score": _number(file.score),
            "scores": {k: _number(v) for k, v in file.scores.items()},
            "majority": (
                {}
                if answers is None
                else {k: _number(v) for k, v in majority_score(file.task, answers).items()}
            ),
            "method": lane.config.method,
            "terms": lane.config.terms,
            "seed": lane.config.seed,
            "learning_rate": lane.config.learning_rate,
            "recipe": lane.config.recipe,
            "epochs": len(lane.progress.history),
            "kept_epoch": lane.kept_epoch,
            "best_epoch": lane.progress.best_epoch,
            "best_score": _number(lane.progress.best_score),
            "history": [
                epoch | {"dev": {k: _number(v) for k, v in epoch["dev"].items()}}
                for epoch in lane.progress.history
            ],
            "base": file.base.name,
            "rows": {k: len(v) for k, v in self.dataset.splits.items()},
            "held_out": self.dataset.held_out,
            "skipped_rows": len(self.dataset.skipped),
            "truncated_share": file.truncated_share,
            "dtype": trainer.encoder.computes_in,
            "device": trainer.encoder.device.type,
            "threads": torch.get_num_threads(),
            "lanes": len(trainer.slots),
            "processes": trainer.processes.count,
            "packed": trainer.encoder.packed,
            "temperature": file.temperature,
            "calibration": file.calibration,
            "seconds": self.seconds,
            "train_seconds": lane.progress.seconds,
            "train_seconds_before": lane.seconds_before,
            "examples_per_second": lane.progress.sequences / seconds,
            "tokens_per_second": lane.progress.tokens / seconds,
            "peak_memory_bytes": peak_memory(trainer.encoder.device),
            "trainable": {
                "encoder": trainer.method.encoder_count(lane.layout),
                "head": lane.head.size,
            },
            "file": None if self.path is None else str(self.path),
            "file_bytes": None if self.path is None else _size(self.path),
        }


def make_task_file(
    trainer: Trainer,
    lane: Lane,
    splits: Mapping[str, Split],
    *,
    data_hash: str,
    train_score: bool,
    source: Mapping[str, Any],
    storage: StorageType,
    licence: str | None,
    description: str | None,
) -> TaskFile:
    """Return the task file of a finished run: the kept epoch, scored, calibrated and probed.

    ``source`` says how the data is read; kept in the recipe, so that its rows are found again.
    """
    base = trainer.encoder.base
    scores: dict[str, float] = {}
    temperature, calibration = None, None
    if lane.dev is not None:
        scores, logits = trainer.evaluate(lane, lane.dev)
        temperature, calibration = calibrate(lane.task, lane.dev, logits)
    if "dev_mismatched" in splits:
        more, _ = trainer.evaluate(lane, splits["dev_mismatched"])
        scores |= {f"{key}_mismatched": value for key, value in more.items()}
    if train_score:
        more, _ = trainer.evaluate(lane, splits["train"])
        scores |= {f"train_{key}": value for key, value in more.items()}
    row, weights = trainer.method.trained(0, lane.layout, lane.head)
    recipe: dict[str, Any] = lane.config.to_json() | {
        "epochs_run": len(lane.progress.history),
        "kept_epoch": lane.kept_epoch,
        "best_epoch": lane.progress.best_epoch,
        "best_dev_score": _number(lane.progress.best_score),
        "stopped_early": lane.progress.stopped,
        "dtype": trainer.encoder.computes_in,
        "threads": torch.get_num_threads(),
        "lanes": len(trainer.slots),
        "train_rows": len(lane.train.examples),
        "dev_rows": 0 if lane.dev is None else len(lane.dev.examples),
        **source,
    }
    if trainer.processes.count > 1:
        recipe["processes"] = trainer.processes.count
    if len(trainer.lanes) > 1:
        recipe["rates_tried"] = [
            {"learning_rate": run.config.learning_rate, "score": _number(run.progress.best_score)}
            for run in trainer.lanes
        ]
    return TaskFile(
        task=lane.task,
        bias=row.cpu().clone(),
        layout=lane.layout.to_json(),
        head={name: tensor.cpu().clone() for name, tensor in weights.items()},
        head_style=lane.head.style,
        pooling=lane.head.pooling,
        max_length=lane.config.max_length,
        base=base.identity,
        tokenizer=base.tokenizer_sha256,
        method="frozen" if lane.config.method == "frozen" else "bitfit",
        terms=lane.config.terms,
        recipe=recipe,
        scores=scores,
        temperature=temperature,
        calibration=calibration,
        truncated_share=lane.train.features.truncated_share,
        data_hash=data_hash,
        licence=licence,
        description=description,
        probes=_probes(trainer, lane),
        dtype=storage,
    )


def calibrate(
    task: Task, dev: Split, logits: list[Logits]
) -> tuple[float | None, dict[str, float] | None]:
    """Return the temperature fitted on dev and the calibration error before and after it.

    Of several labels every label of a row counts, of tokens every word that was not cut. None of
    the other kinds, and none with too few dev rows or where the best temperature is at the end of
    its range (every answer right, or none), which says nothing: (None, None).
    """
    if task.kind not in CALIBRATED_KINDS or len(dev.examples) < MIN_CALIBRATION_ROWS:
        return None, None
    table, labels = _calibration_rows(task, dev, logits)
    if not len(table):
        return None, None
    temperature = fit_temperature(table, labels)
    if not 1.01 * MIN_TEMPERATURE < temperature < 0.99 * MAX_TEMPERATURE:
        return None, None
    before, after = (
        expected_calibration_error(
            probabilities(table, t, multilabel=task.kind == "multilabel"), labels
        )
        for t in (1.0, temperature)
    )
    return temperature, {"ece_before": before, "ece_after": after}


def _calibration_rows(
    task: Task, dev: Split, logits: list[Logits]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return logits ``(rows, labels)`` with the right answers, as ``fit_temperature`` takes them.

    A row is an example; of tokens it is a word. The answers of multilabel are 0/1 for each label.
    """
    if task.kind == "tokens":
        return np.concatenate(logits).astype(np.float64), word_labels(dev.features.items)
    table, answers = np.stack(logits).astype(np.float64), references(dev.examples)
    if task.kind == "multilabel":
        return table, indicator(answers, len(task.labels))
    return table, np.asarray(answers)


def _probes(trainer: Trainer, lane: Lane) -> list[dict[str, Any]]:
    asked = [{"text": a, "text_pair": b if lane.task.is_pair else None} for a, b in _PROBE_TEXTS]
    examples = probe_examples(lane.task, asked)
    row, weights = trainer.method.trained(0, lane.layout, lane.head)
    features = make_features(
        trainer.encoder.base.tokenizer, lane.task, examples, lane.config.max_length
    )
    heads = {0: TaskHead(lane.head, weights)}
    layout = lane.layout
    logits = compute_logits(trainer.encoder, features.items, row[None], layout, heads)
    return [
        probe | {"logits": values.tolist()} for probe, values in zip(asked, logits, strict=True)
    ]


def save_outcome(out: Path, trainer: Trainer, file: TaskFile) -> None:
    """Save a finished run: a task file, or what another method trained, which is none.

    ``full`` gives an ordinary checkpoint directory, which transformers and bitfit load as a base,
    with the head beside it; ``random`` one safetensors file of indices and values; ``peft:...`` one
    of the adapters' tensors, under the names that peft gives them. The latter two have the head's
    tensors in them as ``head.…``.
    """
    method = trainer.method
    if isinstance(method, RowMethod):
        file.save(out, dtype=file.dtype)
        return
    facts = {
        "task": file.task.name, "labels": file.task.labels, "scores": file.scores,
        "recipe": file.recipe, "base": file.base.to_json(), "pooling": file.pooling,
    }  # fmt: skip
    if isinstance(method, AdapterMethod):
        facts["adapter"] = method.description
    note = json.dumps(facts, sort_keys=True, default=list)
    heads = {f"head.{name}": tensor for name, tensor in file.head.items()}
    if isinstance(method, AdapterMethod):
        atomic_write(out, pack_safetensors(method.named() | heads, "bitfit_adapter", note))
        return
    if isinstance(method, FullMethod):
        with whole_folder(out, last=CHECKPOINT_MARK) as folder:
            _save_model(folder, trainer.encoder, replaces_pooling=(out / _POOLING).exists())
            (folder / "head.safetensors").write_bytes(
                pack_safetensors(file.head, "bitfit_run", note)
            )
            (folder / CHECKPOINT_MARK).write_bytes(note.encode())
        return
    values = {f"values.{name}": numbers.cpu() for name, numbers in method.named().items()}
    chosen = values | {f"indices.{name}": index.cpu() for name, index in method.places.items()}
    atomic_write(out, pack_safetensors(chosen | heads, "bitfit_random", note))


def _save_model(folder: Path, encoder: Encoder, *, replaces_pooling: bool) -> None:
    """Write a base with the numbers that it has now.

    Args:
        folder: where.
        encoder: the base.
        replaces_pooling: whether a pooling's file, of an earlier run, is there to be replaced.
    """
    base = encoder.base
    base.config.save_pretrained(folder)
    _save_tokenizer(base.tokenizer, folder)
    tensors = encoder_tensors(encoder.model, encoder.pooler)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    (folder / "model.safetensors").write_bytes(pack_safetensors(tensors, "format", "pt"))
    # Without it a checkpoint with a pooler is made for that, and one without for [CLS].
    says_itself = base.pooling == ("pooler" if base.pooler is not None else "cls")
    if replaces_pooling or not says_itself:
        _save_pooling(folder / _POOLING, base)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the Rust library knows no OSError
        if type(error) is not Exception or "(os error" not in str(error):
            raise
        raise OSError(str(error)) from error


def _save_pooling(path: Path, base: Base) -> None:
    """Write what the base was made for as sentence-transformers does."""
    modes = {
        "word_embedding_dimension": base.config.hidden_size,
        "pooling_mode_cls_token": base.pooling == "cls",
        "pooling_mode_mean_tokens": base.pooling == "mean",
    }
    path.parent.mkdir()
    path.write_text(json.dumps(modes), encoding="utf-8")


def peak_memory(device: torch.device) -> int:
    """Return the most memory this process has held, in bytes: the GPU's, or the CPU's."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(p.stat().st_size for p in path.iterdir() if p.is_file())
    return path.stat().st_size


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
