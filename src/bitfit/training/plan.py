"""From what a user asked for to a run: which options are whose, which rates, which files."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args

from bitfit.data import DataConfig
from bitfit.encoder import Encoder
from bitfit.errors import UsageError
from bitfit.rounding import StorageType
from bitfit.storage import check_folder, unfinished_in
from bitfit.training.adapters import check_installed
from bitfit.training.settings import TrainConfig, rates_to_try, resolve_config

# The file by which a folder is known as one that ``full`` wrote; the last that it writes.
CHECKPOINT_MARK = "bitfit.json"


def plan_run(
    data: str | Path | DataConfig,
    recipe: str,
    learning_rate: float | str | None,
    options: dict[str, Any],
    data_seed: int | None = None,
) -> tuple[DataConfig, TrainConfig, tuple[float, ...] | None]:
    """Return what to read, how to train, and the rates to search over (None: one rate).

    Which rows are taken and which are held out is drawn from ``data_seed``; None: from that of a
    :class:`DataConfig`, or else from the run's own.

    Raises:
        UsageError: an option that does not exist or cannot be meant.
        MissingExtra: a method that needs peft, without it.
    """
    data_options, train_options = _sort_options(options)
    if data_seed is not None:
        if data_seed < 0:  # here, where its name is known
            raise UsageError(f"data_seed is {data_seed}; expected 0 or more", field="data_seed")
        data_options["seed"] = data_seed
    if isinstance(data, DataConfig):
        data_config = dataclasses.replace(data, **data_options)
    else:
        data_options.setdefault("seed", train_options.get("seed", 0))
        data_config = DataConfig(data=data, **data_options)
    rates, learning_rate = _rates(learning_rate, train_options.get("method", "bitfit"))
    config = resolve_config(recipe, learning_rate=learning_rate, **train_options)
    check_installed(config.method)
    return data_config, config, rates


def _sort_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword options into those of the data and those of the training."""
    of_data = {f.name for f in dataclasses.fields(DataConfig)} - {"seed", "data"}
    of_training = {f.name for f in dataclasses.fields(TrainConfig)} - {"recipe"}
    for key in options:
        if key not in of_data | of_training:
            near = difflib.get_close_matches(key, of_data | of_training, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"unknown option {key!r}.{hint}")
    given = {key: value for key, value in options.items() if value is not None}
    return (
        {key: value for key, value in given.items() if key in of_data},
        {key: value for key, value in given.items() if key in of_training},
    )


def _rates(
    learning_rate: float | str | None, method: str
) -> tuple[tuple[float, ...] | None, float | None]:
    """Return the rates to search over (None: no search) and the one that was given."""
    if learning_rate == "auto":
        return rates_to_try(method), None
    if isinstance(learning_rate, str):
        raise UsageError(
            f"learning_rate {learning_rate!r} is neither a number nor 'auto'", field="learning_rate"
        )
    return None, learning_rate


def check_out(out: str | Path | None, storage: str, method: str) -> None:
    """Refuse what cannot be written before anything long begins; nothing is left there.

    Raises:
        UsageError: a way to store that there is not; something of another kind is in the place, or
            no file can be made there.
    """
    if storage not in get_args(StorageType):
        known = ", ".join(get_args(StorageType))
        raise UsageError(f"storage {storage!r} is not one of {known}", field="storage")
    if out is None:
        return
    path = Path(out)
    try:
        _check_replaces(path, method)
    except OSError as error:  # a name too long, a folder that may not be looked into
        raise UsageError(
            f"out {path}: cannot be written: {error.strerror or error}", field="out"
        ) from error
    # A link is written through; its state stands beside the link.
    for place in dict.fromkeys((path, Path(os.path.realpath(path)))):
        check_out_folder(path, place.parent)
    if path.is_dir():
        check_out_folder(path, path)


def _check_replaces(path: Path, method: str) -> None:
    """Refuse to write over what is no result of an earlier run."""
    state = checkpoint_path(path)
    assert state is not None
    if state.is_dir():
        raise UsageError(
            f"out {path}: the state of the run goes to {state}, and that is a folder; take another",
            field="out",
        )
    if method != "full":
        if path.is_dir():
            raise UsageError(f"out {path} is a directory; expected a file to write", field="out")
        if path.exists() and not _is_ours(path):
            raise UsageError(
                f"out {path} exists and was not written by bitfit: it would be lost; take another",
                field="out",
            )
    elif path.is_file():
        raise UsageError(f"out {path} is a file; the method full writes a directory", field="out")
    elif path.is_dir() and any(path.iterdir()) and not _is_our_folder(path):
        raise UsageError(
            f"out {path} exists and is no checkpoint of bitfit's: take another", field="out"
        )


def check_out_folder(path: Path, folder: Path) -> None:
    """Refuse a folder for the ``out`` that is ``path`` where no file can be made, there or not.

    Raises:
        UsageError: with the folder, or the file in its place, and the system's reason.
    """
    try:
        check_folder(folder)
    except OSError as error:
        raise UsageError(
            f"out {path}: the folder {error.filename} cannot be written to "
            f"({error.strerror or error}); choose another",
            field="out",
        ) from error


def _is_ours(path: Path) -> bool:
    """Whether a file begins as bitfit's own do: a safetensors header whose metadata has our key."""
    with path.open("rb") as file:
        begin = file.read(4096)
    return begin[8:9] == b"{" and b'"bitfit' in begin


def _is_our_folder(path: Path) -> bool:
    """Whether ``full`` wrote a folder, or was killed while it did."""
    return (path / CHECKPOINT_MARK).is_file() or bool(unfinished_in(path))


def check_dtype(encoder: Encoder, dtype: str) -> None:
    """Refuse a precision that an encoder, opened before, does not compute in."""
    if dtype not in ("auto", encoder.precision):
        raise UsageError(
            f"this run is to compute in {dtype!r}, but the open encoder computes in "
            f"{encoder.precision!r}: open it with bitfit.open_encoder(base, {dtype!r})"
        )


def check_rates(rates: tuple[float, ...] | None, splits: Collection[str]) -> None:
    """Refuse a search over rates without rows to choose on."""
    if rates and "dev" not in splits:
        raise UsageError(
            "learning_rate 'auto' (--lr auto) chooses on dev rows and there are none: name a dev "
            "file, let dev_fraction be above 0, or give one rate"
        )


def check_lanes(lanes: int | str) -> None:
    """Refuse a number of lanes that cannot be meant."""
    if lanes != "auto" and not (isinstance(lanes, int) and 1 <= lanes <= 1024):
        raise UsageError(f"lanes is {lanes!r}; expected 'auto' or 1 to 1024", field="lanes")


def checkpoint_path(out: str | Path | None) -> Path | None:
    """Return where the runs that end in ``out`` keep their state."""
    return None if out is None else Path(f"{out}.checkpoint")
