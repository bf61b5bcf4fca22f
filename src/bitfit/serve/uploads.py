"""What came over the network, kept in the folder of the tasks: files by hash, one list of names.

``DIR/.uploads/<sha256>.bitfit.safetensors`` are the files, ``DIR/.uploads/tasks.json`` says which
task has which. No path is made of a name that came over the network. Several servers may share the
folder: each change is made under a lock, and each reads what the others wrote. The list also has
the version numbers of files that were replaced in the folder itself, so that all servers, and one
that is started again, call a file's version by the same number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bitfit.errors import BitfitError
from bitfit.identity import is_sha256
from bitfit.serve.failures import FolderBusy
from bitfit.storage import atomic_write, dump_json, parse_json
from bitfit.taskfile import TaskFile

FOLDER = ".uploads"
FORMAT = 1
KEPT = 5
"""Versions of a task whose files are kept."""
LOCK_SECONDS = 10.0
MAX_LIST_BYTES = 64 << 20


@dataclass(frozen=True)
class Entry:
    """What the last change over the network made of a task."""

    files: tuple[str, ...]
    """SHA-256 of its files' bytes by version, the last is the one in use; none: removed."""
    version: int
    """Version of the one in use."""
    over: str | None
    """Fingerprint of the file of that name in the tasks' folder at that time.

    Where that folder has another by now, it is newer and the entry counts no more.
    """
    by: str | None = None
    """Who asked for the change, where it may be asked for again: it is made once."""
    pinned: bool = False
    """Whether its row stays in memory."""

    def to_json(self) -> dict[str, Any]:
        """Return the entry ready for JSON."""
        found = {"files": list(self.files), "version": self.version, "over": self.over}
        if self.pinned:
            found["pinned"] = True
        return found if self.by is None else found | {"by": self.by}


@dataclass(frozen=True)
class FolderFile:
    """A file that a look found in the tasks' folder."""

    fingerprint: str
    version: int


@dataclass
class Listed:
    """What the list has."""

    entries: dict[str, Entry] = field(default_factory=dict)
    folder: dict[str, FolderFile] = field(default_factory=dict)

    def number(self, name: str, fingerprint: str) -> int:
        """Return the version that a file found in the folder has at least."""
        last, entry = self.folder.get(name), self.entries.get(name)
        if last is not None and last.fingerprint == fingerprint:
            return last.version
        before = 0 if last is None else last.version
        if entry is not None and entry.over != fingerprint:  # it came after that change
            before = max(before, entry.version)
        return before + 1

    def to_bytes(self) -> bytes:
        """Return it as it is written."""
        document = {
            "format": FORMAT,
            "tasks": {name: entry.to_json() for name, entry in self.entries.items()},
            "folder": {name: [f.fingerprint, f.version] for name, f in self.folder.items()},
        }
        return dump_json(document).encode()


class Uploads:
    """The files and their list.

    Args:
        directory: the folder of the tasks; ``.uploads`` is made in it when first needed.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory) / FOLDER
        self._list = self.directory / "tasks.json"
        self._seen: tuple[int, int, int] | None = None
        self._lock = FileLock(self.directory / "lock", timeout=LOCK_SECONDS)

    def path(self, digest: str) -> Path:
        """Return where the file with this SHA-256 is."""
        assert is_sha256(digest)
        return self.directory / f"{digest}.bitfit.safetensors"

    def keep(self, data: bytes) -> tuple[str, bool]:
        """Write a file's bytes, whole or not at all.

        Returns:
            Their SHA-256, and whether the file was there already.

        Raises:
            BitfitError: it cannot be written.
        """
        digest = sha256(data).hexdigest()
        is_there = self.path(digest).exists()
        if not is_there:
            atomic_write(self.path(digest), data)
        return digest, is_there

    def read(self, digest: str) -> TaskFile:
        """Return the task in a kept file, checked as any task file.

        Raises:
            TaskFileError: it is missing or damaged.
        """
        return TaskFile.load(self.path(digest))

    def record(
        self, name: str, digest: str | None, *, version: int, over: str | None,
        by: str | None = None, pinned: bool = False, then: Callable[[], None] = lambda: None,
    ) -> Entry:  # fmt: skip
        """Write down that ``name`` has this file now, None: that it was removed.

        Args:
            name: of the task.
            digest: SHA-256 of its file's bytes.
            version: its number.
            over: fingerprint of the file of that name in the tasks' folder.
            by: a name of the change, by which it is made once.
            pinned: whether its row stays in memory.
            then: called when it is written, before files that no task has any more are removed.

        Raises:
            BitfitError: the list cannot be read or written.
        """
        with self.locked():
            found = self._read()
            entries = found.entries
            before = entries.get(name)
            files = before.files if before is not None and before.over == over else ()
            files = () if digest is None else (*files, digest)[-KEPT:]
            entries[name] = Entry(files, version, over, by, pinned)
            atomic_write(self._list, found.to_bytes())
            then()
            self._drop_unused(entries, (() if before is None else before.files))
        return entries[name]

    def record_folder(self, files: Mapping[str, FolderFile]) -> None:
        """Write down which versions the folder's files are, where that is not known already.

        Raises:
            BitfitError: the list cannot be read or written.
        """
        with self.locked():
            found = self._read()
            if any(found.folder.get(name) != file for name, file in files.items()):
                found.folder |= files
                atomic_write(self._list, found.to_bytes())

    def listed(self) -> Listed:
        """Return all that the list has now.

        Raises:
            BitfitError: the list is damaged, or cannot be read.
        """
        return self._read()

    def has_changed(self) -> bool:
        """Return whether the list was written since :meth:`entries` was last called."""
        return self._signature() != self._seen

    def look_again(self) -> None:
        """Let :meth:`has_changed` say so, though the list was read."""
        self._seen = None

    def entries(self) -> dict[str, Entry]:
        """Return every task that was changed over the network, by name.

        Raises:
            BitfitError: the list is damaged, or cannot be read.
        """
        seen = self._signature()
        found = self._read()
        self._seen = seen
        return found.entries

    def forget(self, digest: str) -> None:
        """Remove a file that no task has."""
        with suppress(OSError):
            self.path(digest).unlink(missing_ok=True)

    def forget_unlisted(self, digest: str) -> None:
        """Remove a file whose recording failed, unless the list has it none the less."""
        with suppress(BitfitError):  # a list that cannot be read may have it
            self._drop_unused(self._read().entries, (digest,))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Return a context in which no other server changes anything; within another it is none.

        Raises:
            FolderBusy: other servers hold it for long.
            BitfitError: it cannot be written.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            raise FolderBusy(
                f"{self.directory}: another server has been changing tasks for {LOCK_SECONDS:g} s; "
                "try again"
            ) from None
        except OSError as error:
            raise BitfitError(
                f"{self.directory}: cannot be written: {error.strerror or error}"
            ) from error
        try:
            yield
        finally:
            self._lock.release()

    def _drop_unused(self, entries: Mapping[str, Entry], before: tuple[str, ...]) -> None:
        used = {digest for entry in entries.values() for digest in entry.files}
        for digest in before:
            if digest not in used:
                self.forget(digest)

    def _signature(self) -> tuple[int, int, int] | None:
        try:
            status = self._list.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _read(self) -> Listed:
        try:
            with self._list.open("rb") as file:
                data = file.read(MAX_LIST_BYTES + 1)
        except FileNotFoundError:
            return Listed()
        except OSError as error:
            raise BitfitError(f"{self._list}: cannot be read: {error.strerror or error}") from error
        try:
            return _parse(data)
        except (ValueError, UnicodeDecodeError) as error:
            raise BitfitError(
                f"{self._list}: {error}; restore it, or remove it to forget what was uploaded"
            ) from None


def _parse(data: bytes) -> Listed:
    if len(data) > MAX_LIST_BYTES:
        raise ValueError(f"more than {MAX_LIST_BYTES} bytes")
    match parse_json(data):
        case {"format": int(number), "tasks": dict(tasks), **more}:
            if number != FORMAT:
                raise ValueError(f"format {number}, this bitfit reads {FORMAT}")
            return Listed(
                {str(name): _parse_entry(name, value) for name, value in tasks.items()},
                _parse_folder(more.get("folder", {})),
            )
    raise ValueError("no list of uploaded tasks")


def _parse_entry(name: str, value: object) -> Entry:
    match value:
        case {
            "files": list(files), "version": int(version), "over": None | str() as over, **more
        }:  # fmt: skip
            if all(isinstance(digest, str) and is_sha256(digest) for digest in files):
                by = more.get("by")
                return Entry(
                    tuple(files), version, over, by if isinstance(by, str) else None,
                    more.get("pinned") is True,
                )  # fmt: skip
    raise ValueError(f"the entry of {name!r:.80} is damaged")


def _parse_folder(value: object) -> dict[str, FolderFile]:
    found = {}
    if not isinstance(value, dict):
        raise ValueError("the versions of the folder's files are damaged")
    for name, one in value.items():
        match one:
            case [str(fingerprint), int(version)]:
                found[str(name)] = FolderFile(fingerprint, version)
            case _:
                raise ValueError(f"the version of the file of {name!r:.80} is damaged")
    return found
