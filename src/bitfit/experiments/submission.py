"""The GLUE server's submission: a file of answers for each of its test sets, in one flat zip.

The server (gluebenchmark.com, Wang et al. 2019) asks for eleven files with the header ``index`` and
``prediction``: labels in the words of the official files, STS-B as numbers of 0 to 5. ``AX.tsv`` is
of the diagnostic set, which the MNLI task answers. WNLI's train and dev sets contradict each other
and the paper leaves it out, so that without a task of one's own its answer is the most frequent
class of train.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bitfit.data import DataConfig, read_dataset
from bitfit.data.files import find_files, split_files
from bitfit.data.rows import file_lines
from bitfit.encoder import Encoder
from bitfit.errors import DataError, UsageError
from bitfit.experiments.protocol import Record, paper_scores
from bitfit.experiments.store import Store
from bitfit.model import Model, Prediction
from bitfit.storage import atomic_write
from bitfit.taskfile import TaskFile
from bitfit.tasks import BUILTIN_TASKS, BuiltinTask, TextExample, builtin_task

HEADER = "index\tprediction\n"
ARCHIVE = "submission.zip"
DIAGNOSTIC = "test_diagnostic"
"""The split of MNLI that is GLUE's diagnostic set; many copies of the data lack it."""
CHUNK = 256
"""Rows answered at a time."""
MAJORITY_TASK = "wnli"
"""The task that is answered without a task file, by its most frequent class."""
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)
_FILE_MODE = 0o100644


@dataclass(frozen=True, kw_only=True)
class SubmittedFile:
    """One file of a submission."""

    name: str
    """As the server asks for it: ``MNLI-m.tsv``."""
    rows: int
    """How many answers it holds, as many as the test file has rows."""
    task: str
    """The built-in task that it is of."""
    source: Path | None
    """The task file that answered; None: every row has the answer :attr:`constant`."""
    constant: str | None = None
    """The one answer of all rows, where no task file was given."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What :func:`write_submission` wrote, and what it left out."""

    folder: Path
    archive: Path
    """The zip that the server takes."""
    files: tuple[SubmittedFile, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Why, by the name of the file that the server asks for."""


def server_files(builtin: BuiltinTask) -> dict[str, str]:
    """Return the name of the file that the server asks for, by the split that it answers."""
    extra = {split.name: split.submission for split in builtin.extra_splits if split.submission}
    return ({"test": builtin.submission} if builtin.submission else {}) | extra


GLUE_TASKS = tuple(builtin for builtin in BUILTIN_TASKS.values() if builtin.submission)
SERVER_FILES = tuple(name for builtin in GLUE_TASKS for name in server_files(builtin).values())
"""All the files of a whole submission."""


def match_files(paths: Iterable[str | Path]) -> dict[str, Path]:
    """Return task files by the GLUE task that each was trained on, whatever its name is.

    Raises:
        UsageError: a file of another task than GLUE's, or two of one.
        TaskFileError: a file that is refused.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        builtin = TaskFile.load(path).builtin
        if builtin is None or not builtin.submission:
            raise UsageError(f"{path} was trained on none of GLUE's tasks")
        earlier = found.setdefault(builtin.task.name, path)
        if earlier is not path:
            raise UsageError(f"{earlier} and {path} are both of {builtin.task.name}: give one")
    return found


def official_answer(prediction: Prediction) -> str:
    """Return an answer as the server takes it: a label of the official files, or 0 to 5."""
    if prediction.value is not None:
        return f"{min(max(prediction.value, 0.0), 5.0):.3f}"
    assert prediction.label is not None  # without min_confidence there always is one
    return prediction.label


def answer_lines(
    model: Model, examples: Sequence[TextExample], task: str | None = None
) -> Iterator[list[str]]:
    """Yield the lines of a server's file below its header, :data:`CHUNK` at a time.

    Args:
        model: holds the task.
        examples: the rows of a test split, in their order.
        task: the task's name in the model; None where it holds one.
    """
    for begin in range(0, len(examples), CHUNK):
        part = examples[begin : begin + CHUNK]
        yield [
            f"{example.id or i}\t{official_answer(answer)}\n"
            for i, (example, answer) in enumerate(
                zip(part, model.predict(part, task), strict=True), begin
            )
        ]


def read_tests(
    builtin: BuiltinTask, data: str | Path, splits: Sequence[str] | None = None
) -> tuple[dict[str, list[TextExample]], dict[str, Sequence[str]]]:
    """Return the rows of a task's test splits, and the files that they were read from.

    Args:
        builtin: the task.
        data: its folder, the GLUE directory, or what else :class:`bitfit.DataConfig` takes.
        splits: which splits; None: those that the server asks for, of the diagnostic set only
            where it is there.

    Raises:
        DataError: a row that cannot be read or has the id of another: the server takes an answer
            to every row.
    """
    if splits is None:
        there = {} if str(data).startswith("hub:") else _found_splits(builtin, data)
        splits = [s for s in server_files(builtin) if s != DIAGNOSTIC or s in there]
    dataset = read_dataset(DataConfig(data=data, task=builtin.task.name, splits=tuple(splits)))
    if dataset.skipped:
        raise DataError(
            f"{dataset.skipped[0]}; the server takes an answer to every row: fetch the file again"
        )
    rows = {
        split: [example for example in dataset.splits[split] if isinstance(example, TextExample)]
        for split in splits
    }
    for split, examples in rows.items():
        _check_ids(examples, ", ".join(dataset.sources[split]))
    return rows, dict(dataset.sources)


def _found_splits(builtin: BuiltinTask, data: str | Path) -> dict[str, tuple[Path, ...]]:
    return find_files(DataConfig(data=data, task=builtin.task.name)).files


def _check_ids(examples: Sequence[TextExample], where: str) -> None:
    """Refuse two rows of one id: the server would take one answer for both."""
    if not examples:
        raise DataError(f"{where}: no rows; fetch the file again")
    [[most, count]] = Counter(
        example.id or str(i) for i, example in enumerate(examples)
    ).most_common(1)
    if count > 1:
        raise DataError(f"{where}: {count} rows have the index {most}: fetch the file again")


# ------------------------------------------------------------------ the whole submission


@dataclass(frozen=True)
class _Planned:
    """One file to write."""

    name: str
    builtin: BuiltinTask
    split: str
    test: Path
    source: Path | None


def write_submission(
    base: Encoder | Model,
    files: Mapping[str, str | Path],
    data: str | Path,
    out: str | Path,
    *,
    partial: bool = False,
    on_answers: Callable[[int], None] | None = None,
) -> Submission:
    """Answer GLUE's test sets and write the server's files and their zip to the folder ``out``.

    What is missing is found before anything is answered; each file is written whole or not at all,
    and the same answers make the same bytes.

    Args:
        base: the open base, or a model on it.
        files: task files by the name of their task; :func:`match_files` finds the names.
        data: the GLUE directory.
        out: the folder to write to.
        partial: leave out what is missing, and say so, in place of refusing.
        on_answers: told how many more rows are answered.

    Raises:
        UsageError: a file of the submission cannot be made, and ``partial`` is not set; a task file
            of another task.
        DataError: a test file that cannot be read whole.
        TaskFileError: a task file that is refused, or of another base.
    """
    named = {builtin_task(name).task.name: Path(path) for name, path in files.items()}
    planned, left_out = _plan(named, data)
    if left_out and not (partial and planned):
        reasons = "".join(f"\n  {name}: {why}" for name, why in left_out.items())
        raise UsageError(f"the submission would lack{reasons}")
    folder = Path(out)
    for plan in planned:
        if os.path.realpath(folder / plan.name) == os.path.realpath(plan.test):
            raise UsageError(f"{plan.test} would be written over: name another folder than {out}")
    model = Model(base.encoder if isinstance(base, Model) else base)
    for name, path in named.items():
        model.add(_checked(TaskFile.load(path), builtin_task(name), path), name)
    written: list[SubmittedFile] = []
    contents: dict[str, bytes] = {}
    for plan in planned:
        file, contents[plan.name] = _answer(plan, model, data, on_answers)
        atomic_write(folder / plan.name, contents[plan.name])
        written.append(file)
    atomic_write(folder / ARCHIVE, _zipped(contents))
    return Submission(
        folder=folder, archive=folder / ARCHIVE, files=tuple(written), left_out=left_out
    )


def glue_folder(data: Path) -> Path:
    """Return the GLUE directory: ``data`` itself, or the ``glue_data`` in it."""
    inner = data / "glue_data"
    return inner if inner.is_dir() else data


def best_runs(store: Store) -> dict[str, dict[str, Record]]:
    """Return for each base the record of the best run of bias tuning on each GLUE task.

    The best on dev, whatever its row, rate and seed, as the paper submits, of those whose task
    file is there.
    """
    best: dict[str, dict[str, tuple[float, Record]]] = {}
    names = {builtin.task.name for builtin in GLUE_TASKS}
    for record in store.records():
        name = record["task"]["name"]
        of_biases = record["config"]["method"] == "bitfit" and record["state"] == "done"
        if not of_biases or name not in names or not store.task_file(record["id"]).is_file():
            continue
        scores = paper_scores(record)
        score = scores.choosing[scores.best]
        mine = best.setdefault(record["base"], {})
        if name not in mine or score > mine[name][0] or math.isnan(mine[name][0]):
            mine[name] = score, record
    return {base: {name: run for name, (_, run) in of.items()} for base, of in best.items()}


def _plan(named: Mapping[str, Path], data: str | Path) -> tuple[list[_Planned], dict[str, str]]:
    """Return what can be written, and why the rest cannot."""
    strangers = [name for name in named if not BUILTIN_TASKS[name].submission]
    if strangers:
        raise UsageError(f"task {strangers[0]!r} is none of GLUE's")
    if not Path(data).is_dir():
        raise DataError(f"no such folder: {data}; expected the GLUE directory")
    planned, left_out = [], {}
    for builtin in GLUE_TASKS:
        there = _found_splits(builtin, data)
        source = named.get(builtin.task.name)
        for split, name in server_files(builtin).items():
            why = _missing(builtin, split, there, source is not None, data)
            if why is None:
                planned.append(_Planned(name, builtin, split, there[split][0], source))
            else:
                left_out[name] = why
    return planned, left_out


def _missing(
    builtin: BuiltinTask, split: str, there: Container[str], has_file: bool, data: str | Path
) -> str | None:
    """Return why the file of a split cannot be written, or None."""
    name = builtin.task.name
    if not has_file and name != MAJORITY_TASK:
        return f"no task file of {name}"
    if split not in there:
        places = " or ".join(f"{builtin.folder}/{file}" for file in split_files(builtin)[split])
        return f"no test file {places} in {data}"
    if not has_file and "train" not in there:
        return f"no task file of {name}, and no {builtin.folder}/{builtin.train} for its majority"
    return None


def _checked(file: TaskFile, builtin: BuiltinTask, path: Path) -> TaskFile:
    """Return ``file`` if it can answer the task that it was given for."""
    known = file.builtin
    same = (file.task.kind, file.task.labels, file.task.is_pair) == (
        builtin.task.kind, builtin.task.labels, builtin.task.is_pair,
    )  # fmt: skip
    if not same or known not in (None, builtin):
        trained = known.task.name if known is not None else file.task.name
        raise UsageError(f"{path} is of the task {trained!r}, not {builtin.task.name!r}")
    return file


def _answer(
    plan: _Planned, model: Model, data: str | Path, on_answers: Callable[[int], None] | None
) -> tuple[SubmittedFile, bytes]:
    """Return one file of the submission and its bytes."""
    rows, _ = read_tests(plan.builtin, data, [plan.split])
    examples = rows[plan.split]
    _check_count(examples, plan.test)
    task = plan.builtin.task
    constant, chunks = None, answer_lines(model, examples, task.name)
    if plan.source is None:
        constant = _majority(plan.builtin, data)
        chunks = iter([[f"{e.id or i}\t{constant}\n" for i, e in enumerate(examples)]])
    lines = [HEADER]
    for chunk in chunks:
        lines += chunk
        if on_answers is not None:
            on_answers(len(chunk))
    file = SubmittedFile(
        name=plan.name, rows=len(lines) - 1, task=task.name, source=plan.source, constant=constant
    )
    return file, "".join(lines).encode()


def _check_count(examples: Sequence[TextExample], path: Path) -> None:
    """Refuse where the rows that were read are not the lines of the file below its header."""
    lines = sum(1 for _, line in file_lines(path) if line) - 1
    if lines != len(examples):
        raise DataError(f"{path}: {lines} lines below the header, but {len(examples)} rows")


def _majority(builtin: BuiltinTask, data: str | Path) -> str:
    """Return the most frequent label of train, of equals the first."""
    config = DataConfig(data=data, task=builtin.task.name, splits=("train",))
    rows = read_dataset(config).splits["train"]
    counts = Counter(row.label for row in rows if isinstance(row, TextExample))
    best = max(range(len(builtin.task.labels)), key=lambda i: counts[i])
    return builtin.task.labels[best]


def _zipped(contents: Mapping[str, bytes]) -> bytes:
    """Return a flat zip of the files, without the time and the user of its making."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in sorted(contents):
            info = zipfile.ZipInfo(name, _ZIP_DATE)
            info.create_system, info.external_attr = 3, _FILE_MODE << 16
            archive.writestr(info, contents[name], zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
