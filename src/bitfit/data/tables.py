"""Files of rows and columns: CSV, TSV, GLUE's unquoted TSV, JSON Lines, Parquet."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from bitfit.data.rows import Fault, RowGuard, file_lines, numbered_lines, open_file
from bitfit.errors import DataError, MissingExtra

Row = Mapping[str, object]

MAX_FIELD_BYTES = 2**27
"""Longest CSV field: a bound for a quote never closed, far above any text."""

COLA_COLUMNS = ("source", "label", "mark", "sentence")


@dataclass(frozen=True)
class Table:
    """A file with its rows still to come: ``rows`` yields ``(line, row)`` once."""

    file: str
    columns: tuple[str, ...]
    rows: Iterator[tuple[int, Row]]


def open_table(path: Path, table_format: str, guard: RowGuard) -> Table:
    """Return the table in ``path``; ``table_format`` is csv, tsv, jsonl or parquet."""
    if table_format == "parquet":
        return parquet_table(path)
    if table_format == "jsonl":
        return jsonl_table(file_lines(path), str(path), guard)
    return csv_table(_lines_with_ends(path), str(path), guard, csv_delimiter(table_format))


def csv_delimiter(table_format: str) -> str:
    """Return what separates the columns of ``csv`` or ``tsv``."""
    return "\t" if table_format == "tsv" else ","


def csv_table(
    lines: Iterable[tuple[int, str]], file: str, guard: RowGuard, delimiter: str
) -> Table:
    """Return the table of quoted text whose first record names the columns."""
    return _headed_table(_csv_records(lines, file, delimiter), file, guard)


def glue_table(path: Path, guard: RowGuard, *, is_cola: bool, is_qqp: bool) -> Table:
    """Return the table of an official GLUE file: cut at tabs, quotes are text.

    CoLA's train and dev have no header. QQP has records cut short by a line feed, which everyone
    leaves out.
    """
    records: Iterator[tuple[int, list[str]]] = (
        (n, line.split("\t")) for n, line in file_lines(path) if line
    )
    if is_cola:
        records = _with_cola_header(records)
    return _headed_table(records, str(path), guard, ragged_is_known=is_qqp)


def _with_cola_header(
    records: Iterator[tuple[int, list[str]]],
) -> Iterator[tuple[int, list[str]]]:
    first = next(records, None)
    if first is None:
        return iter(())
    is_header = "sentence" in first[1]
    head = [first] if is_header else [(0, list(COLA_COLUMNS)), first]
    return chain(head, records)


def _headed_table(
    records: Iterator[tuple[int, list[str]]],
    file: str,
    guard: RowGuard,
    *,
    ragged_is_known: bool = False,
) -> Table:
    first = next(records, None)
    if first is None:
        raise DataError(f"{file}: the file is empty; expected a header and rows")
    columns = tuple(name.strip() for name in first[1])
    _check_header(columns, f"{file}:{first[0]}")

    def row(fields: list[str]) -> Row:
        if len(fields) != len(columns):
            raise Fault(
                f"{len(fields)} columns where the header has {len(columns)}",
                is_known=ragged_is_known,
            )
        return dict(zip(columns, fields, strict=True))

    return Table(file, columns, guard.parse(file, records, row))


def _check_header(columns: Sequence[str], where: str) -> None:
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise DataError(f'{where}: the header names "{twice[0]}" more than once')


def _lines_with_ends(path: Path) -> Iterator[tuple[int, str]]:
    with open_file(path) as stream:
        yield from numbered_lines(stream, str(path))


def _csv_records(
    lines: Iterable[tuple[int, str]], file: str, delimiter: str
) -> Iterator[tuple[int, list[str]]]:
    """Yield ``(line on which the record starts, fields)``, blank lines left out."""
    # The limit is one for the process; it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD_BYTES))
    reader = csv.reader((line for _, line in lines), delimiter=delimiter, strict=True)
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            # Never skipped: after a wrong quote nobody knows where the next record starts.
            raise DataError(f"{file}:{start}: {_csv_complaint(error, delimiter)}") from None
        if fields is None:
            return
        if fields:
            yield start, fields


def _csv_complaint(error: csv.Error, delimiter: str) -> str:
    text = str(error)
    if "unexpected end of data" in text:
        return "a quote is opened here and never closed"
    if "new-line character" in text:
        return "a carriage return outside of quotes; end lines with a line feed"
    hint = '; if quotes are plain text in this file, say format "glue"' if delimiter == "\t" else ""
    return f"{text.replace(chr(9), 'a tab')}{hint}"


# ------------------------------------------------------------------ JSON Lines


def jsonl_table(lines: Iterable[tuple[int, str]], file: str, guard: RowGuard) -> Table:
    """Return the table of one JSON object per line; the first names the columns."""
    filled = ((n, line) for n, line in lines if line.strip())
    rows = guard.parse(file, filled, parse_object)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{file}: the file is empty; expected one JSON object per line")
    return Table(file, tuple(first[1]), chain([first], rows))


def parse_object(text: str) -> dict[str, Any]:
    """Return the JSON object in ``text``, or raise a :class:`Fault`."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise Fault(f"not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        # Numbers of thousands of digits, and brackets nested without end.
        raise Fault(f"JSON that cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise Fault(f"a JSON {type(value).__name__}; expected an object such as {{...}}")
    return value


# ------------------------------------------------------------------ Parquet


def parquet_table(path: Path) -> Table:
    """Return the table of a Parquet file; its rows are numbered from 1.

    Raises:
        MissingExtra: without pyarrow.
        DataError: on a file that pyarrow refuses.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingExtra("reading Parquet", "data") from None
    failures = (pa.ArrowException, OSError, ValueError)

    def rows(batches: Iterator[Any]) -> Iterator[tuple[int, Row]]:
        try:
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
        except failures as error:
            raise DataError(f"{path}: not readable as Parquet: {error}") from None

    try:
        # In memory: an open file would have to be closed by whoever stops reading half-way.
        file = pq.ParquetFile(pa.BufferReader(path.read_bytes()))
        columns = tuple(file.schema_arrow.names)
    except failures as error:
        raise DataError(f"{path}: not readable as Parquet: {error}") from None
    _check_header(columns, str(path))
    return Table(str(path), columns, rows(file.iter_batches()))
