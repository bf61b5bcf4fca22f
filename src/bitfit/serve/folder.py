"""A folder of task files that a server follows: what comes can be asked, what goes cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from bitfit.errors import BitfitError, UnknownTask, UnreadableTaskFile
from bitfit.serve.shelf import FINGERPRINT, NAME, NAMES, Shelf, TaskInfo
from bitfit.serve.sources import SUFFIX, list_sources, read_source


@dataclass(frozen=True)
class Change:
    """What a look at a folder found of one file."""

    what: Literal["added", "changed", "removed", "refused"]
    name: str
    source: str
    message: str = ""
    """Of a file that was refused: why."""
    info: TaskInfo | None = None
    """Of a task that was added or changed."""


class Folder:
    """A folder whose task files are on a shelf. One thread at a time looks.

    A task is called as its file is, less ``.bitfit.safetensors``.

    Args:
        shelf: where the tasks are put.
        place: path of a folder, or its URL on any file system that fsspec knows.
    """

    def __init__(self, shelf: Shelf, place: str) -> None:
        self.shelf, self.place = shelf, place
        self._seen: dict[str, object] = {}  # path -> sign of its state, or why it is unreadable
        self._seals: dict[str, str] = {}  # path -> of the file that a look last put

    def look(self, number: Callable[[str, str], int] | None = None) -> list[Change]:
        """Look once, and return what was done.

        What is there for the first time or is another file now is put; what is gone is removed,
        unless it was put from elsewhere since. Files that are refused are reported once, and the
        version before stays.

        Args:
            number: of a name and a fingerprint, the version that a file has at least.
        """
        try:
            there = {path: (name, sign) for name, path, sign in list_sources(self.place)}
        except BitfitError as error:
            return [Change("refused", "", self.place, str(error))]
        changes: list[Change] = []
        for path, (file_name, sign) in there.items():
            if self._seen.get(path) == sign:
                continue
            name = file_name.removesuffix(SUFFIX)
            try:
                changes += self._take(name, path, number)
                self._seen[path] = sign
            except UnreadableTaskFile as error:  # perhaps only now: tried at the next look
                if self._seen.get(path) != str(error):
                    changes.append(Change("refused", name, path, str(error)))
                self._seen[path] = str(error)
        for path in [path for path in self._seen if path not in there]:
            del self._seen[path]
            for name in self.shelf.remove_from(path):
                self._seals.pop(path, None)
                changes.append(Change("removed", name, path))
        return changes

    def _take(self, name: str, path: str, number: Callable[[str, str], int] | None) -> list[Change]:
        """Put what is at ``path``, if it is another file than the one that was put before.

        Raises:
            UnreadableTaskFile: the file system does not give it.
        """
        if not NAME.fullmatch(name):
            return [Change("refused", name, path, f"{path}: {NAMES}")]
        try:
            file = read_source(path)
            if self._seals.get(path) == file.seal:
                return []  # what was put or removed since stands
            try:
                old = self.shelf.info(name)
            except UnknownTask:
                old = None
            info = self.shelf.put(
                name, file, source=path, pinned=old is not None and old.pinned,
                version=1 if number is None else number(name, file.seal[:FINGERPRINT]),
            )  # fmt: skip
        except UnreadableTaskFile:
            raise
        except BitfitError as error:
            return [Change("refused", name, path, str(error))]
        self._seals[path] = file.seal
        return [Change("added" if old is None else "changed", name, path, "", info)]
