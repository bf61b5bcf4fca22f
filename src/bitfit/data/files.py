"""Which files hold which split, and in which format."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from bitfit.data.config import DataConfig
from bitfit.data.ptb import section_files
from bitfit.data.splits import splits_by_use
from bitfit.errors import DataError, UsageError
from bitfit.tasks import BuiltinTask

SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".conllu": "conllu",
    ".conll": "conll",
    ".iob": "conll",
    ".iob2": "conll",
    ".bio": "conll",
    ".json": "squad",
    ".pos": "ptb",
    ".tagged": "ptb",
    ".mrg": "ptb",
}
_SPLIT_FILE = re.compile(
    r"(?:(?P<name>.*)[-_.])?(?P<split>train|dev|validation|valid|val|test)(?:-v1\.1)?"
)
_SPLIT_WORDS = {"train": "train", "test": "test"}

Files = dict[str, tuple[Path, ...]]


@dataclass(frozen=True)
class Layout:
    """The format and the files of each split that is there."""

    format: str
    files: Files
    looked_in: str
    """For messages: where a missing split was looked for."""


def find_files(config: DataConfig) -> Layout:
    """Return the format and files that ``config`` speaks of; nothing is opened yet.

    Raises:
        DataError: where nothing is at the path.
        UsageError: where the format cannot be told.
    """
    data = Path(config.data)
    if not data.exists():
        hint = f"; a data set of the hub is written hub:{config.data}"
        raise DataError(f"no such file or folder: {data}{hint if not data.suffix else ''}")
    if not (data.is_file() or data.is_dir()):
        raise DataError(f"{data} is no regular file; save the rows to a file first")
    builtin = config.builtin
    if data.is_file():
        layout = Layout(_file_format(data, config), _single_file(data, config), str(data.parent))
    elif builtin is not None and config.format in ("auto", builtin.layout):
        layout = _builtin_layout(data, config, builtin)
    else:
        layout = _folder_layout(data, config)
    files = layout.files
    if config.train_split != "train":
        if data.is_file():
            raise UsageError(
                f"train_split is {config.train_split!r}, but {data} is one file: it "
                "chooses among the splits of a folder or of a hub data set",
                field="train_split",
            )
        files = splits_by_use(files, {"train": config.train_split})
    named = _named_files(config)
    _check_dev_is_other(files.get("train", ()), named.get("dev", ()))
    return Layout(layout.format, files | named, layout.looked_in)


def project_name(config: DataConfig) -> str:
    """Return a name for a task of the user's own: that of its file or folder."""
    path = Path(str(config.data)).resolve()
    split = _SPLIT_FILE.fullmatch(path.stem)
    # "intent.train.csv" is called intent, "tickets/train.csv" tickets
    stem = path.stem if split is None else split["name"] or path.parent.name
    stem = stem.replace(":", "-")
    return re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "task"


def _single_file(data: Path, config: DataConfig) -> Files:
    only = config.splits[0] if config.splits and len(config.splits) == 1 else "train"
    is_named = {"dev": config.dev, "test": config.test}.get(only) is not None
    return {"train" if is_named else only: (data,)}


def _named_files(config: DataConfig) -> Files:
    named: Files = {}
    for split, path in (("dev", config.dev), ("test", config.test)):
        if path is not None:
            if not Path(path).is_file():
                raise DataError(f"no such file: {path} ({split})")
            named[split] = (Path(path),)
    return named


def _check_dev_is_other(train: Iterable[Path], dev: Iterable[Path]) -> None:
    """Refuse to choose and score on what is trained on.

    Raises:
        UsageError: one file is named for both.
    """
    for path in dev:
        if any(path.samefile(own) for own in train):
            raise UsageError(
                f"dev {path} is the file that is trained on: its rows would choose the epoch and "
                "give the score; leave dev out, and rows of train are held out",
                field="dev",
            )


def _file_format(path: Path, config: DataConfig) -> str:
    if config.format != "auto":
        return config.format
    builtin = config.builtin
    if builtin is not None and builtin.layout == "glue" and path.suffix == ".tsv":
        return "glue"
    if path.suffix.lower() in SUFFIXES:
        return SUFFIXES[path.suffix.lower()]
    raise UsageError(
        f"{path}: the format cannot be told from the name; name it with format: "
        "csv, tsv, jsonl, parquet, conllu, conll, ptb or squad"
    )


def split_files(builtin: BuiltinTask) -> dict[str, tuple[str, ...]]:
    """Return where each split of a built-in task may lie, from the task's folder."""
    names = {"train": builtin.train, "dev": builtin.dev, "test": builtin.test}
    found = {split: (name,) for split, name in names.items() if name}
    return found | {extra.name: extra.files for extra in builtin.extra_splits}


def _builtin_layout(data: Path, config: DataConfig, builtin: BuiltinTask) -> Layout:
    """Return the official files, in the task's folder below ``data`` or in ``data`` itself."""
    below = _task_folder(data, builtin)
    folder = data if below is None else below
    if builtin.layout in ("conllu", "ptb"):  # known by split or section, whatever their names
        return _folder_layout(folder, replace(config, format=builtin.layout))
    files: Files = {}
    for split, names in split_files(builtin).items():
        paths = [Path(os.path.normpath(folder / name)) for name in names]
        there = [path for path in paths if path.is_file()]
        if there:
            files[split] = (there[0],)
    missing = " or ".join(map(str, _task_places(data, builtin)))
    looked = f"{data} (there is no folder {missing} either)" if below is None else str(below)
    return Layout(builtin.layout, files, looked)


def _task_folder(data: Path, builtin: BuiltinTask) -> Path | None:
    """Return the task's folder below ``data``, if it is there."""
    return next((place for place in _task_places(data, builtin) if place.is_dir()), None)


def _task_places(data: Path, builtin: BuiltinTask) -> list[Path]:
    """Return where a task's folder may be; that of a GLUE task also below a glue_data."""
    places = [data, data / "glue_data"] if builtin.layout == "glue" else [data]
    return [place / builtin.folder for place in places]


def _folder_layout(data: Path, config: DataConfig) -> Layout:
    by_format: dict[str, Files] = {}
    for path in sorted(data.iterdir()):
        table_format = _listed_format(path, config.format)
        match = _SPLIT_FILE.fullmatch(path.stem.lower())
        if table_format is None or match is None or not path.is_file():
            continue
        split = _SPLIT_WORDS.get(match["split"], "dev")
        files = by_format.setdefault(table_format, {})
        if split in files:
            raise DataError(
                f"{data}: both {files[split][0].name} and {path.name} look like {split}"
            )
        files[split] = (path,)
    if config.format in ("auto", "ptb") and not by_format:
        sections = section_files(data)
        if sections:
            by_format["ptb"] = sections
    return _only_format(by_format, data, config)


def _listed_format(path: Path, wanted: str) -> str | None:
    found = SUFFIXES.get(path.suffix.lower())
    if wanted == "glue" and found == "tsv":
        return "glue"
    if wanted == "conll" and found is None and path.suffix.lower() == ".txt":
        return "conll"
    return found if wanted in ("auto", found) else None


def _only_format(by_format: dict[str, Files], data: Path, config: DataConfig) -> Layout:
    if not by_format:
        raise DataError(
            f"{data}: no files such as train.csv, en-ud-train.conllu, train-v1.1.json or "
            f"00/wsj_0001.pos{_names_in(data)}"
        )
    if len(by_format) > 1:
        raise UsageError(f"{data} holds {' and '.join(sorted(by_format))}; name one with format")
    found, files = next(iter(by_format.items()))
    return Layout(found, files, str(data))


def _names_in(data: Path, most: int = 8) -> str:
    names: Iterable[str] = sorted(path.name for path in data.iterdir())
    return f"; it holds {', '.join([*names][:most])}" if names else "; it is empty"
