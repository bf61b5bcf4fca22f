"""How the tasks of a server change: over the network, in its folder, by servers that share it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from bitfit.errors import BitfitError, UnknownTask
from bitfit.serve.failures import RequestFailed
from bitfit.serve.folder import Change, Folder
from bitfit.serve.logs import log
from bitfit.serve.metrics import Metrics
from bitfit.serve.shelf import Shelf, TaskInfo
from bitfit.serve.uploads import Entry, FolderFile, Listed, Uploads
from bitfit.taskfile import TaskFile


class Changes:
    """Puts tasks on a shelf and takes them from it. One thread at a time uses it.

    Args:
        shelf: the tasks.
        folder: folder or URL of task files that is looked at; None: there is none.
        uploads: where tasks that come over the network are kept; None: in memory only.
        metrics: where changes are counted.
    """

    def __init__(
        self, shelf: Shelf, folder: str | None, uploads: Uploads | None, metrics: Metrics
    ) -> None:
        self.shelf, self.uploads, self.metrics = shelf, uploads, metrics
        self.folder = None if folder is None else Folder(shelf, folder)
        self._applied: dict[str, Entry] = {}
        self._in_folder: dict[str, str] = {}  # fingerprints of the folder's files by name

    # --- over the network -----------------------------------------------------------------------

    def put(
        self, name: str, data: bytes, *, pinned: bool = False, by: str | None = None
    ) -> tuple[TaskInfo, bool]:
        """Add or replace a task by the file in ``data``; return it, and whether it is new.

        Args:
            name: the task's.
            data: the bytes of a task file.
            pinned: keep its row in memory.
            by: a name of this very change: asked for again, at any server of the same folder, it
                is not made again.

        Raises:
            TaskFileError: the file is refused.
            BitfitError: it cannot be kept.
        """
        file = TaskFile.from_bytes(data, "the upload")
        with self._alone():
            if (done := self._made(name, by)) is not None:
                return self.shelf.info(name), len(done.files) == 1 and done.over is None
            is_new = name not in self.shelf
            if self.uploads is None:
                info = self.shelf.put(name, file, pinned=pinned)
            else:
                info = self._put_kept(name, data, file, pinned, by)
        self._count("added" if is_new else "replaced", info)
        return info, is_new

    def _put_kept(
        self, name: str, data: bytes, file: TaskFile, pinned: bool, by: str | None
    ) -> TaskInfo:
        assert self.uploads is not None
        is_new = name not in self.shelf
        digest, is_kept = self.uploads.keep(data)
        source = str(self.uploads.path(digest))
        try:
            info = self.shelf.put(name, file, source=source, pinned=pinned)
        except BitfitError:
            if not is_kept:
                self.uploads.forget(digest)
            raise
        try:
            self._record_file(name, digest, is_kept, info, by)
        except BitfitError:  # neither here nor there
            self.shelf.remove(name) if is_new else self.shelf.rollback(name, is_undo=True)
            raise
        return info

    def rollback(self, name: str, *, by: str | None = None) -> TaskInfo:
        """Make the version before the current one, under a new number, and return it.

        Args:
            name: the task's.
            by: as of :meth:`put`.

        Raises:
            UnknownTask: there is no such task.
            RequestFailed: 409, it has no version before.
        """
        with self._alone():
            if self._made(name, by) is not None:
                return self.shelf.info(name)
            if not self.shelf.info(name).can_roll_back:
                raise RequestFailed(
                    409, f"task {name!r} has no version before this one", code="no_version_before"
                )
            info = self.shelf.rollback(name)
            if self.uploads is not None:
                try:
                    digest, is_kept = self.uploads.keep(bytes_of(self.shelf.file(name)))
                    self._record_file(name, digest, is_kept, info, by)
                except BitfitError:  # neither here nor there
                    self.shelf.rollback(name)
                    raise
        self._count("rolled_back", info)
        return info

    def remove(self, name: str, *, by: str | None = None) -> None:
        """Take a task out.

        Args:
            name: the task's.
            by: as of :meth:`put`.

        Raises:
            UnknownTask: there is no such task.
        """
        with self._alone():
            if self._made(name, by) is not None:
                return
            info = self.shelf.info(name)
            if self.uploads is None:
                self.shelf.remove(name)
            else:  # nobody may still want to read the files that go
                self._record(name, None, info, by, lambda: self.shelf.remove(name))
        self._count("removed", info)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Be the only server that changes tasks, with what the others did taken over.

        Else two that share a folder would give one number to two versions, and remember other
        versions before.
        """
        if self.uploads is None:
            yield
            return
        with self.uploads.locked():
            self.look()
            yield

    def _made(self, name: str, by: str | None) -> Entry | None:
        """Return what a change left that was made already; None: it was not."""
        entry = self._applied.get(name)
        return entry if by is not None and entry is not None and entry.by == by else None

    def _record_file(
        self, name: str, digest: str, is_kept: bool, info: TaskInfo, by: str | None
    ) -> None:
        """Record what a task has now; where that fails, its file goes if it came with the change.

        Else it would stay for ever: only files that the list has had are looked after.
        """
        assert self.uploads is not None
        try:
            self._record(name, digest, info, by)
        except BitfitError:
            if not is_kept:
                self.uploads.forget_unlisted(digest)
            raise

    def _record(
        self, name: str, digest: str | None, info: TaskInfo, by: str | None,
        then: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        assert self.uploads is not None
        over = self._in_folder.get(name)
        self._applied[name] = self.uploads.record(
            name, digest, version=info.version, over=over, pinned=info.pinned, by=by, then=then
        )

    def _count(self, change: str, info: TaskInfo) -> None:
        self.metrics.changed(change)
        _log_task(change, info)

    # --- the folder -----------------------------------------------------------------------------

    def look(self, *, strict: bool = False) -> None:
        """Take over what changed in the folder, and what other servers were sent.

        Args:
            strict: read the list of uploads though it looks unchanged.

        Raises:
            BitfitError: the list of uploaded tasks is damaged.
        """
        if self.folder is not None:
            self._look_at(self.folder)
        if self.uploads is None or not (strict or self.uploads.has_changed()):
            return
        for name, entry in self.uploads.entries().items():
            is_older = name in self._in_folder and entry.over != self._in_folder[name]
            if self._applied.get(name) == entry or is_older:
                continue
            try:
                self._apply(name, entry)
                self._applied[name] = entry
            except BitfitError as error:  # a shared folder may show the list before the file
                self.uploads.look_again()
                log("upload_failed", level=logging.WARNING, task=name, message=str(error))

    @property
    def may_be_behind(self) -> bool:
        """Whether other servers of the folder have been sent something since the last look."""
        return self.uploads is not None and self.uploads.has_changed()

    def _look_at(self, folder: Folder) -> None:
        listed: Listed | None = None

        def number(name: str, fingerprint: str) -> int:
            """Return the version that a file has at least, by what all servers wrote down."""
            nonlocal listed
            if listed is None:
                listed = self.uploads.listed() if self.uploads is not None else Listed()
            return listed.number(name, fingerprint)

        replaced = {}
        for change in folder.look(number):
            self._note(change)
            if change.info is not None and change.info.version > 1:
                replaced[change.name] = FolderFile(change.info.fingerprint, change.info.version)
        if replaced and self.uploads is not None:
            with suppress(BitfitError):  # a folder that may only be read: each counts for itself
                self.uploads.record_folder(replaced)

    def _apply(self, name: str, entry: Entry) -> None:
        """Make of a task what the list of uploads says; its version before can come back too."""
        assert self.uploads is not None
        if not entry.files:
            self.shelf.begin_after(name, entry.version)
            with suppress(UnknownTask):
                self.shelf.remove(name)
            return
        has_before = name in self.shelf and self.shelf.info(name).version >= entry.version - 1
        digests = entry.files[-1:] if has_before else entry.files[-2:]
        for earlier, digest in zip(range(len(digests) - 1, -1, -1), digests, strict=True):
            info = self.shelf.put(
                name, self.uploads.read(digest), source=str(self.uploads.path(digest)),
                pinned=entry.pinned, version=entry.version - earlier,
            )  # fmt: skip
            _log_task("taken_over", info)

    def _note(self, change: Change) -> None:
        """Remember what the folder holds, and say what changed there."""
        if change.info is not None:
            self._in_folder[change.name] = change.info.fingerprint
        elif change.what == "removed":
            self._in_folder.pop(change.name, None)
        self.metrics.changed(change.what)
        level = logging.WARNING if change.what == "refused" else logging.INFO
        log("folder", level=level, change=change.what, task=change.name,
            message=change.message or None)  # fmt: skip


def bytes_of(file: TaskFile) -> bytes:
    """Return a task file as it is sent and kept."""
    return file.to_bytes(file.dtype)


def _log_task(change: str, info: TaskInfo) -> None:
    log("task", change=change, task=info.name, version=info.version,
        fingerprint=info.fingerprint)  # fmt: skip
