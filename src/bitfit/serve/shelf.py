"""The tasks that can be asked: versions of task files, changed by any thread at any time.

A version is leased for as long as a request needs it. Replacing a task makes a new version;
requests that hold the old one finish on it, and its row is freed with the last of them.
"""

from __future__ import annotations

import math
import re
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType

import torch

from bitfit.bank import unknown_task
from bitfit.encoder import Encoder
from bitfit.errors import BitfitError, TaskFileError, UsageError
from bitfit.held import FittingTask, HeldTask, HeldTasks
from bitfit.inference import TaskHead
from bitfit.rounding import StorageType
from bitfit.serve.sources import read_source
from bitfit.taskfile import TaskFile
from bitfit.tasks import Task

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
NAMES = (
    "a task's name has letters, digits, '_', '.' and '-', at most 100 of them, and begins with a "
    "letter or digit"
)
"""What :data:`NAME` says, for people."""
FINGERPRINT = 16
"""Hex digits of a file's SHA-256 that tell versions apart."""


@dataclass(frozen=True)
class TaskInfo:
    """What is known of a task that can be asked."""

    name: str
    version: int
    """From 1; every change of the task is a new one."""
    kind: str
    labels: tuple[str, ...]
    metric: str
    score: float | None
    """The headline score on dev; None where the file has none."""
    is_pair: bool
    max_length: int
    bytes: int
    """Of its row as it is kept, and of its head."""
    fingerprint: str
    """The first hex digits of its file's SHA-256."""
    pinned: bool
    resident: bool
    """Whether its row is in memory."""
    source: str | None
    """Path or URL of its file."""
    description: str | None
    licence: str | None
    can_roll_back: bool
    last_used: float | None
    """As ``time.time()`` gives it."""


@dataclass(eq=False, slots=True)
class _Version:
    """One version of a task. The lock of its shelf guards what changes in it."""

    name: str
    number: int
    created: int
    """Grows from version to version, over all tasks: no two have the same in memory."""
    fitting: FittingTask
    source: str | None
    pinned: bool
    score: float | None
    description: str | None
    licence: str | None
    before: _Before | None = None
    held: HeldTask | None = None
    """None: not in memory."""
    leases: int = 0
    last_used: float | None = None
    loading: threading.Lock = field(default_factory=threading.Lock)

    @property
    def fingerprint(self) -> str:
        return self.fitting.seal[:FINGERPRINT]


@dataclass(frozen=True)
class _Before:
    """Where the version before can be had again."""

    seal: str
    file: TaskFile | None
    source: str | None
    pinned: bool


class Lease:
    """The right to use one version of a task until it is released; also a context manager."""

    def __init__(self, shelf: Shelf, version: _Version, held: HeldTask) -> None:
        self._shelf, self._version, self._is_released = shelf, version, False
        self.held = held

    @property
    def name(self) -> str:
        """What the task is asked by."""
        return self._version.name

    @property
    def version(self) -> int:
        """The version that was current when it was leased."""
        return self._version.number

    @property
    def fingerprint(self) -> str:
        """The first hex digits of the SHA-256 of that version's file."""
        return self._version.fingerprint

    @property
    def task(self) -> Task:
        """Kind, labels and metrics."""
        return self.held.fitting.task

    @property
    def file_meta(self) -> FittingTask:
        """What is kept of the file beside its row: temperature, length limit, head."""
        return self.held.fitting

    @property
    def head(self) -> TaskHead:
        """The head with its numbers."""
        return self.held.fitting.head

    @property
    def row(self) -> int:
        """The row of the shelf's bank."""
        return self.held.row

    def again(self) -> Lease:
        """Return another lease of the same version; this one must not be released yet."""
        with self._shelf._lock:
            return self._shelf._take(self._version, self.held)

    def release(self) -> None:
        """Give the version back; more than once does nothing."""
        if not self._is_released:
            self._is_released = True
            self._shelf._give_back(self._version)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.release()


class Shelf:
    """Tasks by name, each in versions. Every method may be called from any thread.

    Args:
        encoder: the base.
        storage: how rows are kept: ``fp32``, ``fp16``, ``bf16`` or ``int8``.
        max_resident: the most rows in memory, beside those that are pinned, have no file to be read
            again from, or are in use; the least recently used is dropped first. None: all stay.
    """

    def __init__(
        self, encoder: Encoder, *, storage: StorageType = "fp32", max_resident: int | None = None
    ) -> None:
        if max_resident is not None and max_resident < 1:
            raise UsageError(f"max_resident is {max_resident}; expected a number from 1 up")
        self.encoder, self.max_resident = encoder, max_resident
        self.tasks = HeldTasks(encoder, storage)
        self._lock = threading.RLock()
        self._current: dict[str, _Version] = {}
        self._numbers: dict[str, int] = {}  # of removed tasks too: a version comes once
        self._created = 0
        self._resident: dict[str, _Version] = {}  # those that may be dropped, last used last

    def __len__(self) -> int:
        return len(self._current)

    def __contains__(self, name: str) -> bool:
        return name in self._current

    @property
    def resident(self) -> int:
        """How many rows are in memory, those of versions that were replaced in use included."""
        return len(self.tasks.bank)

    # ------------------------------------------------------------------ changes

    def put(
        self, name: str, file: TaskFile, *, source: str | None = None, pinned: bool = False,
        version: int = 1,
    ) -> TaskInfo:  # fmt: skip
        """Add a task, or replace it by a new version, at once for whoever asks from then on.

        Args:
            name: what it will be asked by.
            file: the task.
            source: path or URL that the same file can be read again from; None: the row stays in
                memory.
            pinned: its row is never dropped.
            version: number that it has at least, as after a restart; never less than the next.

        Raises:
            WrongBase: the file was made for another base.
            WrongTokenizer: it was made with another tokenizer.
            TaskFileError: it does not fit this base.
            UsageError: a bias that does not fit into the storage type.
        """
        fitting = self.tasks.fit(file)
        with self._lock:
            old = self._current.get(name)
            before = None if old is None else self._before(old, source)
            self._numbers[name] = max(self._numbers.get(name, 0), version - 1)
            return self._info(self._add(name, file, fitting, source, pinned, before))

    def rollback(self, name: str, *, is_undo: bool = False) -> TaskInfo:
        """Make the version before the current one, under a new version number, and return it.

        Args:
            name: the task's.
            is_undo: the current version was never to be there: it cannot be brought back.

        Raises:
            UnknownTask: there is no such task.
            UsageError: there is no version before.
            TaskFileError: its file is not there any more, or is another by now.
        """
        while True:
            with self._lock:
                now = self._find(name)
            if now.before is None:
                raise UsageError(f"task {name!r} has no version before {now.number}")
            file = now.before.file or self._read(now.before.source, now.before.seal, name)
            fitting = self.tasks.fit(file)
            with self._lock:
                if self._current.get(name) is not now:
                    continue  # changed meanwhile: once more, with what is there
                old = now.before
                before = None if is_undo else self._before(now, old.source)
                version = self._add(name, file, fitting, old.source, old.pinned, before)
                return self._info(version)

    def remove(self, name: str) -> None:
        """Take a task out; requests that hold it finish.

        Raises:
            UnknownTask: there is no such task.
        """
        with self._lock:
            self._retire(self._find(name))
            del self._current[name]

    def remove_from(self, source: str) -> list[str]:
        """Take out the tasks whose file was at ``source``, and return their names."""
        with self._lock:
            names = [v.name for v in self._current.values() if v.source == source]
            for name in names:
                self.remove(name)
            return names

    def begin_after(self, name: str, version: int) -> None:
        """Let the next version of a task, which may not be there yet, be above ``version``."""
        with self._lock:
            self._numbers[name] = max(self._numbers.get(name, 0), version)

    def _add(
        self, name: str, file: TaskFile, fitting: FittingTask, source: str | None, pinned: bool,
        before: _Before | None,
    ) -> _Version:  # fmt: skip
        self._created += 1
        version = _Version(
            name, self._numbers.get(name, 0) + 1, self._created, fitting, source, pinned,
            None if math.isnan(file.score) else file.score, file.description, file.licence, before,
        )  # fmt: skip
        self._hold(version, file.bias)  # first: where it fails all is as it was
        if (old := self._current.get(name)) is not None:
            self._retire(old)
        self._numbers[name] = version.number
        self._current[name] = version
        self._make_room()
        return version

    def _before(self, old: _Version, new_source: str | None) -> _Before | None:
        """Return how ``old`` can be had again when it is replaced by what ``new_source`` holds."""
        seal = old.fitting.seal
        if old.source is not None and old.source != new_source:
            return _Before(seal, None, old.source, old.pinned)
        if old.held is None:  # its file was overwritten by the new one
            return None
        return _Before(seal, self.tasks.restore(old.held), None, old.pinned)

    # ------------------------------------------------------------------ looking

    def info(self, name: str) -> TaskInfo:
        """Return what is known of a task.

        Raises:
            UnknownTask: there is no such task; the message has the nearest name.
        """
        with self._lock:
            return self._info(self._find(name))

    def infos(self) -> list[TaskInfo]:
        """Return what is known of all tasks, in the order of their names."""
        with self._lock:
            return [self._info(self._current[name]) for name in sorted(self._current)]

    def file(self, name: str) -> TaskFile:
        """Return the file of a task: from its source, or put together from what is in memory.

        In the second case its biases are as they are kept: rounded where storage is not fp32.

        Raises:
            UnknownTask: there is no such task.
            TaskFileError: its source cannot be read any more, and its row is not in memory.
        """
        with self._lock:
            version = self._find(name)
        if version.source is not None:
            try:
                return self._read(version.source, version.fitting.seal, name)
            except BitfitError:
                if version.held is None:
                    raise
        with self.lease(name) as lease:
            return self.tasks.restore(lease.held)

    # ------------------------------------------------------------------ use

    def lease(self, name: str) -> Lease:
        """Return the right to use the current version; a row that was dropped is read again.

        Raises:
            UnknownTask: there is no such task; the message has the nearest name.
            TaskFileError: the row was dropped, and its file is not there or not the same any more.
        """
        while True:
            with self._lock:
                version = self._find(name)
                if version.held is not None:
                    return self._take(version, version.held)
            # Whoever else wants this task waits; no one who wants another does.
            with version.loading:
                lease = self._load(version)
            if lease is not None:
                return lease

    def _load(self, version: _Version) -> Lease | None:
        """Read the row of ``version`` again; None: it was replaced or loaded meanwhile."""
        with self._lock:
            if version.held is not None or self._current.get(version.name) is not version:
                return None
        try:
            file = self._read(version.source, version.fitting.seal, version.name)
        except TaskFileError:
            with self._lock:
                if self._current.get(version.name) is not version:
                    return None  # its file went with it
            raise
        with self._lock:
            if self._current.get(version.name) is not version:
                return None
            lease = self._take(version, self._hold(version, file.bias))
            self._make_room()
            return lease

    def _take(self, version: _Version, held: HeldTask) -> Lease:
        version.leases += 1
        version.last_used = time.time()
        if version.name in self._resident:  # to the end: the last used
            self._resident[version.name] = self._resident.pop(version.name)
        return Lease(self, version, held)

    def _give_back(self, version: _Version) -> None:
        with self._lock:
            version.leases -= 1
            if version.leases == 0:
                if self._current.get(version.name) is not version:
                    self._free(version)
                else:
                    self._make_room()

    # ------------------------------------------------------------------ rows, under the lock

    def _find(self, name: str) -> _Version:
        version = self._current.get(name)
        if version is None:
            raise unknown_task(name, self._current)
        return version

    def _hold(self, version: _Version, bias: torch.Tensor) -> HeldTask:
        key = f"{version.name}@{version.created}"
        version.held = self.tasks.hold(key, version.fitting, bias)
        if version.source is not None and not version.pinned:
            self._resident.pop(version.name, None)  # to the end: the last used
            self._resident[version.name] = version
        return version.held

    def _retire(self, version: _Version) -> None:
        """Make a version one that no one can lease any more."""
        if self._resident.get(version.name) is version:
            del self._resident[version.name]
        if version.leases == 0:
            self._free(version)

    def _free(self, version: _Version) -> None:
        if version.held is not None:
            self.tasks.drop(version.held)
            version.held = None

    def _make_room(self) -> None:
        if self.max_resident is None:
            return
        over = len(self._resident) - self.max_resident
        if over <= 0:
            return
        for name in [n for n, v in self._resident.items() if v.leases == 0][:over]:
            self._free(self._resident.pop(name))

    def _info(self, version: _Version) -> TaskInfo:
        fitting, task = version.fitting, version.fitting.task
        return TaskInfo(
            name=version.name, version=version.number, kind=task.kind, labels=task.labels,
            metric=task.metric, score=version.score, is_pair=task.is_pair,
            max_length=fitting.max_length,
            bytes=self.tasks.bank.row_bytes + fitting.head_bytes,
            fingerprint=version.fingerprint, pinned=version.pinned,
            resident=version.held is not None, source=version.source,
            description=version.description, licence=version.licence,
            can_roll_back=version.before is not None, last_used=version.last_used,
        )  # fmt: skip

    def _read(self, source: str | None, seal: str, name: str) -> TaskFile:
        """Return the file at ``source``, which has to be the one that ``seal`` is of."""
        assert source is not None  # rows without a source are never dropped
        file = read_source(source)
        if file.seal != seal:
            raise TaskFileError(
                f"{source}: was task {name!r} with SHA-256 {seal[:12]}…, is now "
                f"{file.seal[:12]}…; put the task again"
            )
        return file
