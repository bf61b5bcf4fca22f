"""Texts to predict on: rows without answers, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any

from bitfit.data.columns import Columns, Spec, choose_columns
from bitfit.data.rows import Fault, RowGuard, check_text, numbered_lines, open_file
from bitfit.data.tables import Row, Table, csv_delimiter, csv_table, jsonl_table, parquet_table
from bitfit.errors import DataError, UsageError
from bitfit.tasks import TextExample

INPUT_FORMATS = ("auto", "text", "csv", "tsv", "jsonl", "parquet")
_BY_SUFFIX = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl"}


def iter_texts(
    source: str | Path | IO[bytes] | IO[str],
    format: str = "auto",
    text: str | None = None,
    text_pair: str | None = None,
) -> Iterator[TextExample]:
    r"""Yield one example without an answer per row of ``source``, in its order, as they are read.

    Args:
        source: A file, or an open stream such as ``sys.stdin``.
        format: ``text`` is one text per line, a tab before the second text of a pair; an empty
            line is an empty text, so that answers stay in line with the input. ``csv`` and ``tsv``
            have a header, ``jsonl`` one object per line. ``auto``: by file name, else ``text``.
        text: Column of the text; None: guessed from common names.
        text_pair: Column of the second text.

    Raises:
        UsageError: on an unknown format or a column that is not there.
        DataError: with file and line, on a row that cannot be used.

    Example:
        >>> import io
        >>> [row.text for row in iter_texts(io.StringIO("one\ntwo\n"))]
        ['one', 'two']
    """
    if format not in INPUT_FORMATS:
        raise UsageError(f'unknown format "{format}". Known: {", ".join(INPUT_FORMATS)}')
    is_path = isinstance(source, (str, Path))
    path = Path(source) if isinstance(source, (str, Path)) else None
    if format == "auto":
        suffix = path.suffix.lower() if path is not None else ""
        format = "parquet" if suffix == ".parquet" else _BY_SUFFIX.get(suffix, "text")
    if format == "parquet":
        if path is None:
            raise UsageError("Parquet is read from a file, not from a stream")
        return _table_texts(parquet_table(path), text, text_pair)
    file = str(source) if is_path else str(getattr(source, "name", "input"))
    return _stream_texts(source, file, format, text, text_pair)


def _stream_texts(
    source: Any, file: str, format: str, text: str | None, text_pair: str | None
) -> Iterator[TextExample]:
    is_path = isinstance(source, (str, Path))
    opened: AbstractContextManager[Any] = (
        open_file(Path(source)) if is_path else nullcontext(source)
    )
    with opened as stream:
        lines = numbered_lines(map(_as_bytes, stream), file)
        if format == "text":
            yield from _line_texts(lines, file)
        elif format == "jsonl":
            yield from _table_texts(jsonl_table(lines, file, RowGuard()), text, text_pair)
        else:
            table = csv_table(lines, file, RowGuard(), csv_delimiter(format))
            yield from _table_texts(table, text, text_pair)


def _as_bytes(line: str | bytes) -> bytes:
    # A text stream may hold escaped bad bytes; encoding them again lets the check below see them.
    return line if isinstance(line, bytes) else line.encode("utf-8", "surrogateescape")


def _line_texts(lines: Iterable[tuple[int, str]], file: str) -> Iterator[TextExample]:
    for number, line in lines:
        fields = line.removesuffix("\n").removesuffix("\r").split("\t")
        if len(fields) > 2:
            raise DataError(f"{file}:{number}: {len(fields) - 1} tabs; expected a text or a pair")
        yield TextExample(fields[0], fields[1] if len(fields) == 2 else None)


def _table_texts(table: Table, text: str | None, text_pair: str | None) -> Iterator[TextExample]:
    columns = choose_columns(table, Spec("input", text, text_pair), needs_label=False)
    for _, example in RowGuard().parse(table.file, table.rows, _row_parser(columns)):
        yield example


def _row_parser(columns: Columns) -> Callable[[Row], TextExample]:
    def parse(row: Row) -> TextExample:
        pair = _cell(row, columns.text_pair) if columns.text_pair is not None else None
        name = str(row[columns.id]) if columns.id is not None and columns.id in row else None
        return TextExample(_cell(row, columns.text), pair, None, name)

    return parse


def _cell(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        what = "missing" if value is None else f"a {type(value).__name__}"
        raise Fault(f'column "{column}" is {what}; expected a text')
    return check_text(value)
