"""What came over the network, kept in the folder of the tasks: files by hash, one list of names.

``DIR/.uploads/<sha256>.bitfit.safetensors`` are the files, ``DIR/.uploads/tasks.json`` says which
task has which. No path is made of a name that came over the network. Several servers may share the
folder: each change is made under a lock, and each reads what the others wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bitfit.errors import BitfitError
from bitfit.identity import is_sha256
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

    def to_json(self) -> dict[str, Any]:
        """Return the entry ready for JSON."""
        return {"files": list(self.files), "version": self.version, "over": self.over}


class Uploads:
    """The files and their list.

    Args:
        directory: the folder of the tasks; ``.uploads`` is made in it when first needed.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory) / FOLDER
        self._list = self.directory / "tasks.json"
        self._seen: tuple[int, int, int] | None = None

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
        then: Callable[[], None] = lambda: None,
    ) -> Entry:  # fmt: skip
        """Write down that ``name`` has this file now, None: that it was removed.

        Args:
            name: of the task.
            digest: SHA-256 of its file's bytes.
            version: its number.
            over: fingerprint of the file of that name in the tasks' folder.
            then: called when it is written, before files that no task has any more are removed.

        Raises:
            BitfitError: the list cannot be read or written.
        """
        with self._locked():
            entries = self._read()
            before = entries.get(name)
            files = before.files if before is not None and before.over == over else ()
            files = () if digest is None else (*files, digest)[-KEPT:]
            entries[name] = Entry(files, version, over)
            document = {"format": FORMAT, "tasks": {n: e.to_json() for n, e in entries.items()}}
            atomic_write(self._list, dump_json(document).encode())
            then()
            self._drop_unused(entries, (() if before is None else before.files))
        return entries[name]

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
        return found

    def forget(self, digest: str) -> None:
        """Remove a file that no task has."""
        with suppress(OSError):
            self.path(digest).unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.directory / "lock", timeout=LOCK_SECONDS)
            lock.acquire()
        except Timeout:
            raise BitfitError(f"{self.directory}: locked by another server; try again") from None
        except OSError as error:
            raise BitfitError(
                f"{self.directory}: cannot be written: {error.strerror or error}"
            ) from error
        try:
            yield
        finally:
            lock.release()

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

    def _read(self) -> dict[str, Entry]:
        try:
            with self._list.open("rb") as file:
                data = file.read(MAX_LIST_BYTES + 1)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise BitfitError(f"{self._list}: cannot be read: {error.strerror or error}") from error
        try:
            return _parse(data)
        except (ValueError, UnicodeDecodeError) as error:
            raise BitfitError(
                f"{self._list}: {error}; restore it, or remove it to forget what was uploaded"
            ) from None


def _parse(data: bytes) -> dict[str, Entry]:
    if len(data) > MAX_LIST_BYTES:
        raise ValueError(f"more than {MAX_LIST_BYTES} bytes")
    match parse_json(data):
        case {"format": int(number), "tasks": dict(tasks)}:
            if number != FORMAT:
                raise ValueError(f"format {number}, this bitfit reads {FORMAT}")
            return {str(name): _parse_entry(name, value) for name, value in tasks.items()}
    raise ValueError("no list of uploaded tasks")


def _parse_entry(name: str, value: object) -> Entry:
    match value:
        case {"files": list(files), "version": int(version), "over": None | str() as over}:
            if all(isinstance(digest, str) and is_sha256(digest) for digest in files):
                return Entry(tuple(files), version, over)
    raise ValueError(f"the entry of {name!r:.80} is damaged")
