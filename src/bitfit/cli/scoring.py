"""Behind ``bitfit eval``, and how every command opens task files on their base."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bitfit.cli import console, options
from bitfit.data import DataConfig, dataset_hash, hold_out, read_dataset, take_limit
from bitfit.data.files import find_files
from bitfit.encoder import open_encoder
from bitfit.errors import BaseModelError, UsageError
from bitfit.metrics import majority_score
from bitfit.model import Model
from bitfit.precision import DTYPES, PRECISIONS, precision_here
from bitfit.taskfile import TaskFile
from bitfit.tasks import Example, references


def open_model(
    files: Sequence[TaskFile],
    base: str | None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    names: Sequence[str] | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Return a model with ``files`` on their base, under ``names`` or their own.

    Raises:
        BaseModelError: the base cannot be loaded; says how to name it.
        UsageError: remote code is trusted, and a file would say whose.
    """
    if trust_remote_code and base is None:
        raise UsageError(
            "--trust-remote-code runs code of the base: say which with --base, for the name in a "
            "task file is its author's choice"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    wanted = files[0].base
    try:
        encoder = open_encoder(
            base or wanted.name, dtype, device, revision=wanted.revision,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    except BaseModelError as error:
        if base is not None:
            raise
        raise BaseModelError(
            f"{error} The task file says that its base is {wanted.name!r}; where that is a folder "
            "of yours, name it with --base FOLDER."
        ) from error
    model = Model(encoder)
    for file, name in zip(files, names or [f.task.name for f in files], strict=True):
        model.add(file, name)
    return model


def trained_dtype(file: TaskFile, dtype: str, device: str) -> str:
    """Return ``dtype``, for ``auto`` the precision that the file was trained in, if it says so.

    Where the device has no tf32, fp32 stands in for it.
    """
    if dtype != "auto":
        return dtype
    trained = str(file.recipe.get("dtype"))
    known = {str(value).removeprefix("torch."): name for name, value in DTYPES.items()}
    return precision_here(known.get(trained, trained if trained in PRECISIONS else "auto"), device)


def evaluate(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scores of a task file on a split of some data."""
    began = time.perf_counter()
    file = TaskFile.load(given["file"])
    config = _data_config(file, given)
    splits, notes = _read(file, config)
    dtype = trained_dtype(file, given["dtype"], given["device"])
    model = open_model(
        [file], given["base"], dtype=dtype, device=given["device"], threads=given["threads"],
        trust_remote_code=given["trust_remote_code"],
    )  # fmt: skip
    scores: dict[str, float] = {}
    for split, examples in splits.items():
        more = "_mismatched" if split != given["split"] else ""
        scores |= {f"{key}{more}": v for key, v in model.evaluate(examples).items()}
    examples = splits[given["split"]]
    return {
        "task": file.task.name, "metric": file.task.metric,
        "score": scores.get(file.task.metric, math.nan), "scores": scores,
        "majority": majority_score(file.task, references(examples)),
        "trained_scores": file.scores, "split": given["split"], "rows": len(examples),
        "notes": notes, "base": file.base.name,
        "dtype": model.encoder.computes_in,
        "device": model.encoder.device.type, "seconds": time.perf_counter() - began,
        "file": str(given["file"]),
    }  # fmt: skip


def _data_config(file: TaskFile, given: Mapping[str, Any]) -> DataConfig:
    """The same data as in training: the file knows the task, the labels and what was held out."""
    builtin, recipe = file.builtin, file.recipe
    # Files of 0.1.0 have no dev_seed: the seed of the training stands in for it.
    seeds = (recipe.get(name) for name in ("dev_seed", "seed"))
    own: dict[str, Any] = {"seed": next((seed for seed in seeds if isinstance(seed, int)), 0)}
    fraction = recipe.get("dev_fraction")
    if given["dev_fraction"] and isinstance(fraction, float) and 0 < fraction < 1:
        own["dev_fraction"] = fraction  # 0 on the command line: score the rows as they are
    # One file is the split that is asked for, whichever split of a folder was trained on.
    if isinstance(recipe.get("train_split"), str) and not Path(given["data"]).is_file():
        own["train_split"] = recipe["train_split"]
    if given["task"] is None and builtin is not None:
        own["task"] = builtin.task.name
        if builtin.open_labels:
            own["labels"] = file.task.labels
    elif given["task"] is None:
        own |= {"kind": file.task.kind, "labels": file.task.labels or None}
    split = given["split"]
    found = options.data_config(given, **own, splits=(split,))
    extra = found.builtin is not None and found.builtin.extra_splits and split == "dev"
    if extra and Path(found.data).is_dir() and "dev_mismatched" in find_files(found).files:
        own["splits"] = ("dev", "dev_mismatched")
        found = options.data_config(given, **own)
    return found


def _read(file: TaskFile, config: DataConfig) -> tuple[dict[str, Sequence[Example]], list[str]]:
    """Return the splits to score, without rows that the task was trained on."""
    dataset = read_dataset(config)
    if (dataset.task.kind, dataset.task.labels) != (file.task.kind, file.task.labels):
        raise UsageError(
            f"this data is {dataset.task.kind} with the labels {', '.join(dataset.task.labels)}; "
            f"the task file is {file.task.kind} with {', '.join(file.task.labels)}"
        )
    splits, notes = dict(dataset.splits), []
    if dataset.skipped:
        notes.append(f"{console.count(len(dataset.skipped), 'bad row')} left out")
    if "dev" in splits and Path(config.data).is_file() and config.dev is None:
        held = _held_out(file, splits["dev"], config)
        if held is not None:
            splits["dev"] = held
            notes.append("the file it was trained on: scored on the rows that were held out")
    if any(dataset_hash(part) == file.data_hash for part in splits.values()):
        notes.append("these are the rows it was trained on")
    return splits, notes


def _held_out(
    file: TaskFile, examples: Sequence[Example], config: DataConfig
) -> Sequence[Example] | None:
    """Return the rows that training held out of ``examples``; None where it trained on others."""
    if config.dev_fraction == 0:
        return None
    rest, held = hold_out(examples, config.dev_fraction, config.seed)
    rows = file.recipe.get("train_rows")  # as whoever wrote the file has it
    kept = take_limit(rest, rows if isinstance(rows, int) and rows > 0 else len(rest), config.seed)
    return held if held and dataset_hash(kept) == file.data_hash else None


def show(report: Mapping[str, Any]) -> None:
    """Print what ``evaluate`` returned."""
    title = f"{report['task']}: {console.count(report['rows'], 'row')} of {report['split']}"
    rows = [
        (name, console.number(value), console.number(report["majority"].get(name)),
         console.number(report["trained_scores"].get(name)))
        for name, value in report["scores"].items()
    ]  # fmt: skip
    console.print_table(("metric", ">score", ">majority", ">in the file"), rows, title=title)
    for line in report["notes"]:
        console.note(f"note: {line}")
    console.say(
        f"{report['base']}, {report['dtype']} on {report['device']}, "
        f"{console.duration(report['seconds'])}"
    )
