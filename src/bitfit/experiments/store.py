"""One directory per experiment: what is finished, what is being worked on, and by whom.

Everything in it is a file of its own, written whole: a process that is killed at any moment leaves
nothing that is half there, and several processes may share a directory. Names of files are made of
run ids, which are hashes, never of names that a user gave.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bitfit.errors import BitfitError, TrainingInterrupted, UsageError
from bitfit.storage import atomic_write, writing

FORMAT = 1
_EXPERIMENT_KEYS = ("name", "grid", "base", "rows", "tasks", "seeds", "conditions")
_RECORD_KEYS = ("id", "state", "row", "base", "task", "train_rows", "config")
# A group whose process has not said for so long that it lives is taken over by another.
STALE_SECONDS = 600.0
# How often a running process says so.
HEARTBEAT_SECONDS = 60.0
# How long to wait for the lock before asking again whether to stop.
_GLANCE_SECONDS = 0.2
# The claims that this process holds. Host name and process id do not tell it from all others: a
# container that is started again has those of the one that was killed.
_own: set[Path] = set()


@dataclass(frozen=True)
class Claim:
    """A group of runs that a process works on, or worked on until it was killed."""

    group: str
    runs: Sequence[str]
    """Ids, in the order of the lanes."""
    lanes: int
    host: str
    pid: int
    is_alive: bool


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a finished or failed run leaves."""

    record: Mapping[str, Any]
    predictions: Mapping[str, Any] | None = None
    """Of dev, epoch by epoch; None for a failed run. An answer in a text is kept as its place,
    ``[begin, end]`` in characters: the text belongs to the data."""
    answers: Sequence[Any] | None = None
    """What is right on dev."""
    contexts: Sequence[str] | None = None
    """The texts that answers stand in; None for other kinds of tasks."""
    more_answers: Mapping[str, Sequence[Any]] | None = None
    """What is right on further dev rows, by the name of their split."""
    task_file: bytes | None = None


class Store:
    """The directory of an experiment.

    Args:
        directory: where; made when something is first written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)

    # ------------------------------------------------------------------ what it is of

    def experiment(self) -> dict[str, Any]:
        """Return ``experiment.json``.

        Raises:
            BitfitError: there is none, or it is of a newer format.
        """
        path = self.directory / "experiment.json"
        if not path.is_file():
            raise BitfitError(
                f"{self.directory} is no experiment: it has no experiment.json. Expected a "
                "directory that 'bitfit sweep' or 'bitfit reproduce' made"
            )
        found = _read_json(path)
        if found.get("format") != FORMAT:
            raise BitfitError(
                f"{path}: format {found.get('format')!r}; this version reads format {FORMAT}"
            )
        _with_keys(found, _EXPERIMENT_KEYS, path, "an experiment")
        if wrong := [key for key in ("base", "rows", "tasks") if not isinstance(found[key], list)]:
            raise BitfitError(f"{path}: not the record of an experiment: {wrong[0]} is no list")
        return found

    def write_experiment(self, value: Mapping[str, Any]) -> None:
        """Write ``experiment.json``."""
        _write_json(self.directory / "experiment.json", {"format": FORMAT, **value}, indent=1)

    @property
    def exists(self) -> bool:
        """Whether an experiment was begun here."""
        return (self.directory / "experiment.json").is_file()

    @contextmanager
    def lock(self, should_stop: Callable[[], bool] | None = None) -> Iterator[None]:
        """Hold the lock that one process at a time holds while it looks and claims.

        Args:
            should_stop: asked while another holds it.

        Raises:
            UsageError: the directory is a file, or below one.
            NotWritten: it cannot be made or written to.
            TrainingInterrupted: ``should_stop`` said so.
        """
        lock = FileLock(self.directory / ".lock")
        self._make()
        while not self._acquires(lock):
            if should_stop is not None and should_stop():
                raise TrainingInterrupted(
                    f"stopped while another process looks for work in {self.directory}; the same "
                    "command with --resume goes on from there"
                )
        try:
            yield
        finally:
            lock.release()

    def _make(self) -> None:
        with writing(self.directory):
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise UsageError(
                    f"{self.directory} is a file or below one; expected a directory, or the name "
                    "of a new one"
                ) from error

    def _acquires(self, lock: FileLock) -> bool:
        with writing(self.directory):
            try:
                lock.acquire(timeout=_GLANCE_SECONDS)
            except Timeout:
                return False
        return True

    # ------------------------------------------------------------------ finished runs

    def records(self) -> list[dict[str, Any]]:
        """Return the record of every finished or failed run.

        By row and task in the experiment's order, then by training rows, rate and seed.
        """
        experiment = self.experiment()
        rows, tasks = experiment["rows"], experiment["tasks"]

        def place(record: Mapping[str, Any]) -> tuple[Any, ...]:
            config, name = record["config"], record["task"]["name"]
            row = rows.index(record["row"]) if record["row"] in rows else len(rows)
            task = tasks.index(name) if name in tasks else len(tasks)
            rate, seed = config["learning_rate"], config["seed"]
            return record["base"], row, task, record["train_rows"] or 0, rate, seed, record["id"]

        return sorted(map(_read_record, self._files("runs", ".json")), key=place)

    def finished(self) -> dict[str, str]:
        """Return the state, ``done`` or ``failed``, of each run by its id."""
        found = {}
        for path in self._files("runs", ".json"):
            # Asked for at every claim. What is done stays so; what failed another may try again.
            if path.stem in self._done:
                found[path.stem] = "done"
                continue
            try:
                found[path.stem] = _read_record(path)["state"]
            except BitfitError:
                if path.exists():
                    raise
                continue  # another process forgot it since the folder was listed
            if found[path.stem] == "done":
                self._done.add(path.stem)
        return found

    def is_finished(self, run_id: str) -> bool:
        """Whether a run has a record, of success or failure."""
        return (self.directory / "runs" / f"{run_id}.json").is_file()

    def record(self, run_id: str) -> dict[str, Any]:
        """Return the record of one finished or failed run."""
        return _read_record(self.directory / "runs" / f"{run_id}.json")

    def write(self, result: Result) -> None:
        """Keep what a run left: the record last, so that a run with a record is whole."""
        record = result.record
        run_id = record["id"]
        if result.answers is not None:
            self.write_answers(record, result.answers, result.contexts, result.more_answers)
        if result.predictions is not None:
            _write_packed(self._packed("predictions", run_id), result.predictions)
        if result.task_file is not None:
            path = self.task_file(run_id)
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, result.task_file)
        _write_json(self.directory / "runs" / f"{run_id}.json", record)

    def write_answers(
        self, record: Mapping[str, Any], answers: Sequence[Any],
        contexts: Sequence[str] | None = None,
        more: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:  # fmt: skip
        """Keep what is right on a run's dev rows, once for all runs that have them."""
        path = self._answers_path(record)
        found = {"answers": list(answers)}
        found |= {} if contexts is None else {"contexts": list(contexts)}
        found |= {name: list(right) for name, right in (more or {}).items()}
        # Earlier versions kept the answers alone.
        if not path.is_file() or found.keys() - (self._reference(record) or {}).keys():
            _write_packed(path, found)
        self._references.pop(path, None)

    def forget(self, run_id: str) -> None:
        """Remove a record, so that the run is made again."""
        (self.directory / "runs" / f"{run_id}.json").unlink(missing_ok=True)
        self._done.discard(run_id)

    def predictions(self, record: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return a run's predictions of dev, epoch by epoch, as the metrics take them.

        None where they, or the texts that they are places in, are not kept here.
        """
        found = self.kept_predictions(record["id"])
        if found is None or record["task"].get("kind") != "span":
            return found
        contexts = self.contexts(record)
        epochs = [_answer_texts(epoch, contexts, record["id"]) for epoch in found["dev"]]
        return None if None in epochs else found | {"dev": epochs}

    def kept_predictions(self, run_id: str) -> dict[str, Any] | None:
        """Return a run's predictions as they are kept: of answers in texts, their places."""
        path = self._packed("predictions", run_id)
        found = _read_packed(path)
        if found is not None and not _are_lists(found.get("dev")):
            raise BitfitError(f"{path}: no predictions: expected a list of each epoch's")
        return found

    def answers(self, record: Mapping[str, Any]) -> list[Any] | None:
        """Return what is right on the dev rows of a run; None where it is not kept here."""
        found = self._reference(record)
        return None if found is None else found["answers"]

    def more_answers(self, record: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Return what is right on a run's further dev rows, by the name of their split."""
        found = self._reference(record) or {}
        return {name: right for name, right in found.items() if name.startswith("dev_")}

    def contexts(self, record: Mapping[str, Any]) -> list[str] | None:
        """Return the texts that the answers of a run's dev rows stand in; None as for answers."""
        found = self._reference(record)
        return None if found is None else found.get("contexts")

    def _reference(self, record: Mapping[str, Any]) -> dict[str, Any] | None:
        if "data" not in record:
            return None
        path = self._answers_path(record)
        if path not in self._references:
            found = _read_packed(path)
            if found is not None and not isinstance(found.get("answers"), list):
                raise BitfitError(f"{path}: no answers: expected a list of them")
            self._references[path] = found
        return self._references[path]

    def task_file(self, run_id: str) -> Path:
        """Return where a run's task file is, if it left one."""
        return self.directory / "tasks" / f"{run_id}.bitfit.safetensors"

    def reuse(self, other: Store, run_ids: Iterable[str], place: Mapping[str, Any]) -> str | None:
        """Copy a finished run from another experiment; return its id, None where it is not there.

        Args:
            other: where to look.
            run_ids: of the run, in each form that counts; the first that is there is copied.
            place: ``row``, ``base``, ``task`` (its name) and ``train_rows`` of the run here: the
                other experiment may call it otherwise.
        """
        for run_id in run_ids:
            if not other.is_finished(run_id):
                continue
            record = other.record(run_id)
            if record["state"] != "done":
                continue
            record |= dict(place) | {"task": record["task"] | {"name": place["task"]}}
            task_file = other.task_file(run_id)
            self.write(Result(
                record=record, predictions=other.kept_predictions(run_id),
                answers=other.answers(record), contexts=other.contexts(record),
                more_answers=other.more_answers(record),
                task_file=task_file.read_bytes() if task_file.is_file() else None,
            ))  # fmt: skip
            return run_id
        return None

    # ------------------------------------------------------------------ work in progress

    def claims(self) -> list[Claim]:
        """Return the groups that were begun and are not finished, the oldest first."""
        found = [(claim, since) for p in self._files("work", ".json") for claim, since in _claim(p)]
        return [claim for claim, _ in sorted(found, key=lambda each: each[1])]

    def is_claimed_by(self, group: str, host: str, pid: int) -> bool:
        """Whether a process has the group, as far as this directory shows."""
        note = _read_if_there(self._manifest(group))
        return note is not None and (note["host"], note["pid"]) == (host, pid)

    def _is_ours(self, group: str) -> bool:
        return self.is_claimed_by(group, host_name(), os.getpid())

    def claim(self, group: str, runs: Sequence[str], lanes: int) -> None:
        """Take a group, or take it over from a process that is no more. Hold the lock for this."""
        note = {
            "runs": list(runs),
            "lanes": lanes,
            "host": host_name(),
            "pid": os.getpid(),
        }
        _write_json(self._manifest(group), note)
        _own.add(self._manifest(group).resolve())

    def beat(self, group: str) -> None:
        """Say that the process that claimed the group lives."""
        with suppress(OSError, BitfitError):  # a network folder may fail now and not at the next
            if self._is_ours(group):
                os.utime(self._manifest(group))

    def end(self, group: str) -> None:
        """Release a group of ours, once its results are written.

        One that another took over, as this process slept, is the other's to release.
        """
        _own.discard(self._manifest(group).resolve())
        if self._is_ours(group):
            self.release(group)

    def release(self, group: str) -> None:
        """Remove a claim, whoever's it is, and all that the work left."""
        _own.discard(self._manifest(group).resolve())
        self._manifest(group).unlink(missing_ok=True)
        shutil.rmtree(self.scratch(group), ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Remove what is left of groups that nobody has. Hold the lock for this.

        A worker whose driver was killed may write once more when another has finished its group.
        """
        work = self.directory / "work"
        for path in work.iterdir() if work.is_dir() else ():
            if path.is_dir() and not self._manifest(path.name).exists():
                shutil.rmtree(path, ignore_errors=True)

    def let_go(self, group: str) -> None:
        """Leave a group as it stands, to be gone on with by whoever comes."""
        _own.discard(self._manifest(group).resolve())
        if self._is_ours(group):
            path = self._manifest(group)
            _write_json(path, _read_json(path) | {"host": "", "pid": 0})

    def scratch(self, group: str) -> Path:
        """Return the folder of a group's checkpoint and of the predictions of its epochs."""
        return self.directory / "work" / group

    def write_epoch(self, group: str, run_id: str, epoch: int, value: Mapping[str, Any]) -> None:
        """Keep what an epoch predicted until the run is finished."""
        _write_packed(self.scratch(group) / f"{run_id}-{epoch}.json.gz", value)

    def read_epoch(self, group: str, run_id: str, epoch: int) -> dict[str, Any] | None:
        """Return what :meth:`write_epoch` kept."""
        return _read_packed(self.scratch(group) / f"{run_id}-{epoch}.json.gz")

    # ------------------------------------------------------------------ places

    @cached_property
    def _done(self) -> set[str]:
        return set()

    @cached_property
    def _references(self) -> dict[Path, dict[str, Any] | None]:
        return {}

    def _files(self, folder: str, suffix: str) -> list[Path]:
        place = self.directory / folder
        # A file that is being written begins with a dot.
        found = place.iterdir() if place.is_dir() else ()
        return sorted(p for p in found if p.name.endswith(suffix) and p.name[0] != ".")

    def _packed(self, folder: str, name: str) -> Path:
        return self.directory / folder / f"{name}.json.gz"

    def _answers_path(self, record: Mapping[str, Any]) -> Path:
        return self._packed("references", record["data"]["dev"])

    def _manifest(self, group: str) -> Path:
        return self.directory / "work" / f"{group}.json"


def _claim(path: Path) -> list[tuple[Claim, float]]:
    """Return the claim in a file and when its process last said that it lives; none: released."""
    note = _read_if_there(path)
    try:
        since = path.stat().st_mtime
    except FileNotFoundError:
        return []
    if note is None:
        return []
    alive = bool(note["host"]) and time.time() - since < STALE_SECONDS
    if note["host"] == host_name():
        is_ours = note["pid"] == os.getpid()
        alive = alive and (path.resolve() in _own if is_ours else _is_running(note["pid"]))
    claim = Claim(path.stem, note["runs"], note["lanes"], note["host"], note["pid"], alive)
    return [(claim, since)]


@lru_cache
def host_name() -> str:
    """Return this machine's name, the same for as long as the process lives.

    A laptop may have another on another network, and its claims are still its own.
    """
    return socket.gethostname()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user, and there
        return True
    return True


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise BitfitError(f"{path}: cannot be read as JSON: {error}") from error
    except (OSError, ValueError) as error:
        raise BitfitError(f"{path}: cannot be read as JSON: {error}. {_way_out(path)}") from error
    return _an_object(found, path)


def _way_out(path: Path) -> str:
    """Return what to do about a file of an experiment that is damaged."""
    if path.parent.name == "runs":
        return "Remove the file: --resume makes the run again, and a report does without it"
    if path.parent.name == "predictions":
        record = f"runs/{path.name.partition('.')[0]}.json"
        return (
            f"Remove the file, and a report does without it; with {record} removed too, --resume "
            "makes the run again"
        )
    if path.parent.name == "references":
        return "Remove the file: 'bitfit report DIR --data DATA' reads it from the data again"
    if path.parent.name == "work":
        return "Remove the file: --resume begins its runs again"
    return "Put back what was there: a copy, or that of another machine"


def _read_record(path: Path) -> dict[str, Any]:
    record = _with_keys(_read_json(path), _RECORD_KEYS, path, "a run")
    is_whole = record["state"] != "done" or isinstance(record.get("history"), list)
    if not (isinstance(record["task"], dict) and isinstance(record["config"], dict) and is_whole):
        raise BitfitError(f"{path}: not the record of a run: its task, config or history is none")
    # Earlier versions kept the size that a learning curve asked for, though there were fewer rows.
    there = (record.get("rows") or {}).get("train")
    if record["train_rows"] is not None and there:
        record["train_rows"] = min(record["train_rows"], there)
    return record


def _an_object(found: Any, path: Path) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise BitfitError(f"{path}: holds {type(found).__name__}, expected an object")
    return found


def _with_keys(found: dict[str, Any], keys: Sequence[str], path: Path, what: str) -> dict[str, Any]:
    lacking = [key for key in keys if key not in found]
    if lacking:
        raise BitfitError(
            f"{path}: not the record of {what}: lacks {', '.join(lacking)}; put back what was there"
        )
    return found


def _are_lists(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, list) for each in value)


def _answer_texts(
    epoch: Sequence[Any], contexts: Sequence[str] | None, run_id: str
) -> list[str] | None:
    """Return the texts of answers from their places; None without the texts they stand in."""
    if all(isinstance(answer, str) for answer in epoch):
        return list(epoch)  # as earlier versions kept them
    if contexts is None:
        return None
    try:
        return [text[begin:end] for text, (begin, end) in zip(contexts, epoch, strict=True)]
    except (TypeError, ValueError) as error:
        raise BitfitError(
            f"run {run_id}: its predictions are no places in the {len(contexts)} texts of dev: "
            "expected [begin, end] for each"
        ) from error


def _read_if_there(path: Path) -> dict[str, Any] | None:
    try:
        return _read_json(path)
    except BitfitError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def _write_json(path: Path, value: Mapping[str, Any], indent: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, indent=indent)
    atomic_write(path, f"{text}\n".encode())


def _read_packed(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(gzip.decompress(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise BitfitError(f"{path}: cannot be read: {error}. {_way_out(path)}") from error
    return _an_object(found, path)


def _write_packed(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    atomic_write(path, gzip.compress(text.encode(), compresslevel=6, mtime=0))
