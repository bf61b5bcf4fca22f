"""Task files at a path or at any URL that fsspec knows: ``s3://``, ``gs://``, ``memory://``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitfit.errors import MissingExtra, TaskFileError, UnreadableTaskFile
from bitfit.taskfile import MAX_BYTES, TaskFile

SUFFIX = ".bitfit.safetensors"


def is_url(place: str) -> bool:
    """Whether ``place`` is a URL and no path."""
    return "://" in place


def read_source(source: str) -> TaskFile:
    """Return the task file at a path or URL.

    Raises:
        UnreadableTaskFile: it cannot be read.
        TaskFileError: it is no good task file.
    """
    if not is_url(source):
        return TaskFile.load(source)
    system, path = _open(source)
    try:
        with system.open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except Exception as error:  # every file system has errors of its own
        raise UnreadableTaskFile(
            f"{source}: cannot be read: {error or type(error).__name__}"
        ) from error
    return TaskFile.from_bytes(data, source=source)


def list_sources(directory: str) -> Iterator[tuple[str, str, object]]:
    """Yield file name, path or URL, and a sign of its state of every task file in a directory.

    The sign differs when the file was written again.

    Raises:
        TaskFileError: the directory cannot be read.
    """
    try:
        yield from _list_url(directory) if is_url(directory) else _list_folder(Path(directory))
    except TaskFileError:
        raise
    except Exception as error:  # every file system has errors of its own
        raise TaskFileError(f"{directory}: cannot be read: {error}") from error


def _list_folder(folder: Path) -> Iterator[tuple[str, str, object]]:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            if _is_task(entry.name) and entry.is_file():
                found = os.stat(entry.path)  # entry.stat() of a link is the link's on some systems
                yield entry.name, entry.path, (found.st_mtime_ns, found.st_size, found.st_ino)


def _list_url(url: str) -> Iterator[tuple[str, str, object]]:
    system, path = _open(url)
    for found in sorted(system.ls(path, detail=True), key=lambda f: str(f["name"])):
        name = str(found["name"]).rstrip("/").rpartition("/")[2]
        if _is_task(name) and found.get("type") == "file":
            keys = ("size", "mtime", "created", "ETag", "etag", "LastModified", "md5Hash")
            sign = tuple(str(found.get(key)) for key in keys)
            yield name, system.unstrip_protocol(found["name"]), sign


def _is_task(name: str) -> bool:
    return name.endswith(SUFFIX) and not name.startswith(".")


def _open(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise MissingExtra("reading tasks from a URL", "serve") from None
    try:
        system, path = url_to_fs(url)
    except Exception as error:  # an unknown protocol, or a package that is not installed
        raise TaskFileError(f"{url}: cannot be opened: {error}") from error
    # A file system may keep what it listed before.
    system.invalidate_cache()
    return system, path
