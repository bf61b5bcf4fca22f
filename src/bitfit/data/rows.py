"""Lines of strict UTF-8, and what becomes of a row that cannot be used."""

from __future__ import annotations

import codecs
import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from bitfit.errors import DataError

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was left out."""

    file: str
    line: int
    """Physical line on which the row starts, from 1; in Parquet and on the hub the row; 0: none."""
    reason: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {self.reason}"


class Fault(Exception):
    """What is wrong with one row; :class:`RowGuard` adds the file and decides."""

    def __init__(self, reason: str, *, line: int | None = None, is_known: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.line = line
        # Known faults of an official file: everyone who reads that file leaves these rows out.
        self.is_known = is_known


class RowGuard:
    """Raises on a bad row, or with ``skip_bad_rows`` notes it and goes on."""

    def __init__(self, skip_bad_rows: bool = False) -> None:
        self.skip_bad_rows = skip_bad_rows
        self.skipped: list[BadRow] = []

    def parse(
        self, file: str, items: Iterable[tuple[int, A]], parse: Callable[[A], B]
    ) -> Iterator[tuple[int, B]]:
        """Yield every item that ``parse`` does not call a fault, parsed, with its line."""
        for line, item in items:
            try:
                parsed = parse(item)
            except Fault as fault:
                self.reject(file, line, fault)
            else:
                yield line, parsed

    def reject(self, file: str, line: int, fault: Fault) -> None:
        """Raise ``fault`` as a :class:`DataError`, or note it."""
        row = BadRow(file, line if fault.line is None else fault.line, fault.reason)
        if not (self.skip_bad_rows or fault.is_known):
            raise DataError(str(row))
        self.skipped.append(row)


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open ``path`` for reading bytes; what the system refuses is a :class:`DataError`."""
    try:
        stream = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    with stream:
        yield stream


def numbered_lines(stream: Iterable[bytes], file: str) -> Iterator[tuple[int, str]]:
    r"""Yield ``(line number, line with its ending)`` of UTF-8 bytes, without a byte-order mark.

    Only ``\n`` ends a line: texts hold U+2028, U+0085 and even lone ``\r``, at which
    ``str.splitlines`` would cut them. A bad byte is never skipped, as it speaks of the whole file.

    Raises:
        DataError: on bytes that are not UTF-8, and on NUL.
    """
    for number, raw in enumerate(stream, 1):
        if number == 1:
            if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise DataError(f"{file}:1: this is UTF-16; save the file as UTF-8")
            raw = raw.removeprefix(codecs.BOM_UTF8)
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file}:{number}: byte 0x{raw[error.start]:02x} at position {error.start + 1} "
                "is not UTF-8; save the file as UTF-8"
            ) from None
        if "\0" in line:
            raise DataError(f"{file}:{number}: a NUL byte; expected a text file in UTF-8")
        yield number, line


def file_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield ``(line number, line without its ending)`` of a UTF-8 file."""
    with open_file(path) as stream:
        for number, line in numbered_lines(stream, str(path)):
            yield number, line.removesuffix("\n").removesuffix("\r")


def check_text(text: str) -> str:
    r"""Return ``text`` if it can be written as UTF-8: JSON's ``\ud800`` cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Fault("half of a surrogate pair in a text, which is no character") from None
    return text


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """Return `` Did you mean "x"?`` with the nearest choice, or nothing."""
    near = difflib.get_close_matches(word, choices, n=1)
    return f' Did you mean "{near[0]}"?' if near else ""


def shown(names: Sequence[str], most: int = 12) -> str:
    """Return names separated by commas, a long list cut short."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])}, … ({len(names)} in all)"
