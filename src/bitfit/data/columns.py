"""From rows and columns to examples: which column is what, which kind of task, which labels."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from bitfit.data.rows import Fault, RowGuard, check_text, did_you_mean, shown
from bitfit.data.squad import span_example
from bitfit.data.tables import Table
from bitfit.errors import DataError, UsageError
from bitfit.tasks import Example, Kind, SpanExample, Task, TextExample, TokenExample

TEXT_NAMES = ("text", "sentence", "body", "content", "words", "tokens")
PAIR_NAMES = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
)
LABEL_NAMES = (
    "label", "intent", "category", "class", "target", "labels", "score", "tags", "ner_tags",
    "pos_tags",
)  # fmt: skip
ID_NAMES = ("id", "idx", "index")

MAX_CLASSES_SEEN_IN_NUMBERS = 20
"""More different numbers than this in the answers, and they are measured, not counted."""


@dataclass(frozen=True)
class Columns:
    """The columns taken."""

    text: str
    text_pair: str | None = None
    label: str | None = None
    id: str | None = None

    def named(self) -> dict[str, str]:
        """Return what is set, by role."""
        return {role: name for role, name in vars(self).items() if name is not None}


@dataclass(frozen=True)
class Spec:
    """What is known of the task before its rows are read; None: to be found out."""

    name: str
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    kind: Kind | None = None
    labels: tuple[str, ...] | None = None
    separator: str = "|"
    task: Task | None = None
    """The built-in task, where it is one."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row cut down to the columns taken; cells are still as the file has them."""

    line: int
    text: object
    text_pair: object
    label: object
    id: str | None


# ------------------------------------------------------------------ columns


def choose_columns(table: Table, spec: Spec, *, needs_label: bool) -> Columns:
    """Return the columns of ``table`` to take: those named, else common names.

    Raises:
        UsageError: where a named column is missing or none can be guessed; lists the columns.
    """
    text, text_pair = spec.text, spec.text_pair
    if text is None and text_pair is None:
        text, text_pair = _guess_pair(table.columns)
    if text is None:
        taken = (text_pair, spec.label)
        text = _guess([c for c in table.columns if c not in taken], TEXT_NAMES)
    if text is None:
        raise _no_column(table, "text")
    label = spec.label
    if label is None:
        label = _guess([c for c in table.columns if c not in (text, text_pair)], LABEL_NAMES)
    if label is None and needs_label:
        raise _no_column(table, "label")
    for name in (text, text_pair, label if needs_label else None):
        _check_column(table, name)
    has_label = label in table.columns
    free = [c for c in table.columns if c not in (text, text_pair, label)]
    return Columns(text, text_pair, label if has_label else None, _guess(free, ID_NAMES))


def _guess(columns: Sequence[str], names: Sequence[str]) -> str | None:
    by_name = {column.lower(): column for column in reversed(columns)}
    return next((by_name[name] for name in names if name in by_name), None)


def _guess_pair(columns: Sequence[str]) -> tuple[str | None, str | None]:
    for first, second in PAIR_NAMES:
        if first in columns and second in columns:
            return first, second
    text = _guess(columns, TEXT_NAMES)
    return text, "text_pair" if text and "text_pair" in columns else None


def _no_column(table: Table, role: str) -> UsageError:
    return UsageError(
        f"{table.file}: which column is the {role}? Say it with {role} (--{role}); "
        f"the columns are {shown(table.columns)}{_other_separator(table)}"
    )


def _other_separator(table: Table) -> str:
    """Return what to say of a header whose columns stand between something else than expected."""
    header = table.columns[0] if len(table.columns) == 1 else ""
    if "\t" in header:
        return (
            ". The header has tabs and no comma: call the file .tsv, or say the format tsv "
            "(--format tsv)"
        )
    if ";" in header:
        return ". The header has ';' and no comma: save the file with commas between its columns"
    return ""


def _check_column(table: Table, name: str | None) -> None:
    if name is not None and name not in table.columns:
        raise UsageError(
            f'{table.file} has no column "{name}".{did_you_mean(name, table.columns)} '
            f"The columns are {shown(table.columns)}{_other_separator(table)}"
        )


def read_records(table: Table, columns: Columns) -> list[Record]:
    """Return the rows of ``table``, keeping the columns taken only: parse trees are large."""

    def cell(row: Mapping[str, object], name: str | None) -> object:
        return row.get(name) if name is not None else None

    return [
        Record(
            line,
            cell(row, columns.text),
            cell(row, columns.text_pair),
            cell(row, columns.label),
            str(row[columns.id]) if columns.id is not None and columns.id in row else None,
        )
        for line, row in table.rows
    ]


# ------------------------------------------------------------------ kind and labels


def infer_kind(records: Sequence[Record]) -> tuple[Kind, str]:
    """Return the kind that the cells speak of, and what the answers are that say so.

    Lists of words: tokens. Lists of labels: multilabel. Numbers with a fraction, or more than
    20 different ones: regression; a few cells that are no numbers do not change that, so that they
    are reported as bad. Otherwise classification.
    """
    if any(isinstance(r.text, (list, tuple)) for r in records[:1]):
        return "tokens", "lists"
    answers = [r.label for r in records if r.label not in (None, "")]
    if any(isinstance(a, (list, tuple)) for a in answers):
        return "multilabel", "lists"
    numbers = [n for n in map(as_number, answers) if n is not None]
    if len(numbers) < 0.9 * len(answers):
        return "classification", "names"
    if any(n % 1 for n in numbers):
        return "regression", "numbers with a fraction"
    different = len(set(numbers))
    many = different > MAX_CLASSES_SEEN_IN_NUMBERS
    return "regression" if many else "classification", f"{different} different numbers"


def as_number(value: object) -> float | None:
    """Return ``value`` as a finite number if it is one, as text or not; truth values are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    # float() reads "1_000" and "nan" too, which nobody means as numbers.
    return number if math.isfinite(number) and "_" not in str(value) else None


def label_name(value: object) -> str:
    """Return the name of the class that a cell holds; 1.0 is "1", JSON's true is "true"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (str, int, float)):
        return check_text(str(value).strip())
    if value is None:
        return ""
    raise Fault(f"a label is a {type(value).__name__}; expected a text or a number")


def label_names(value: object, separator: str) -> list[str]:
    """Return the names of the classes that a multilabel cell holds, possibly none."""
    if value is None:
        raise Fault("the labels are missing; an empty cell or [] says that there are none")
    cells: Iterable[object] = (
        value if isinstance(value, (list, tuple)) else label_name(value).split(separator)
    )
    return [name for name in map(label_name, cells) if name]


def sorted_labels(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names sorted: as whole numbers if all of them are, else as text."""
    unique = sorted(set(names))
    if all(re.fullmatch(r"[+-]?[0-9]{1,18}", name) for name in unique):
        unique.sort(key=int)
    return tuple(unique)


def infer_labels(
    records: Iterable[Record], kind: Kind, separator: str, where: str
) -> tuple[str, ...]:
    """Return the labels that occur, sorted.

    Raises:
        DataError: where fewer than two occur (multilabel: none).
    """

    def names(record: Record) -> Iterator[str]:
        try:
            if kind == "classification":
                yield label_name(record.label)
            else:
                yield from label_names(record.label, separator)
        except Fault:
            return  # told, with its line, when the rows are read

    labels = sorted_labels(n for record in records for n in names(record) if n)
    if not labels:
        raise DataError(f"{where} is empty in every row; expected a label")
    if len(labels) == 1 and kind != "multilabel":
        raise DataError(f'{where} holds one class only, "{labels[0]}"; expected two or more')
    return labels


# ------------------------------------------------------------------ examples


def read_tables(
    tables: Mapping[str, Table], spec: Spec, guard: RowGuard
) -> tuple[Task, dict[str, list[Example]], Columns, str | None]:
    """Return the task, the examples by split, the columns taken, and what told the kind, if asked.

    The first table decides on columns and labels: it is the training split where there is one.
    """
    first = next(iter(tables))
    spans = _span_splits(tables, spec, guard)
    if spans is not None:
        task = spec.task or Task(name=spec.name, kind="span", is_pair=True)
        return task, spans, Columns("question", "context", "answers", "id"), None
    columns, records = _all_records(tables, spec)
    if spec.task is not None and spec.task.is_pair != (columns.text_pair is not None):
        raise _other_count_of_texts(spec.task, columns, tables[first])
    kind, seen_from = spec.kind, None
    if kind is None:
        kind, answers = infer_kind(records[first])
        seen_from = f'column "{columns.label}" holds {answers}'
        if spec.labels and kind == "regression":
            # Who lists labels means classes, however many numbers there are.
            kind, seen_from = "classification", None
    labels = spec.labels
    if labels is None and kind not in ("regression", "span"):
        _check_train_is_there(first, kind)
        where = f'{tables[first].file}: column "{columns.label}"'
        labels = infer_labels(records[first], kind, spec.separator, where)
    task = spec.task or Task(
        name=spec.name, kind=kind, labels=labels or (), is_pair=columns.text_pair is not None
    )
    splits = {}
    for split, rows in records.items():
        parse = _example_parser(task, columns, spec, is_test=split.startswith("test"))
        numbered = ((record.line, record) for record in rows)
        splits[split] = [e for _, e in guard.parse(tables[split].file, numbered, parse)]
    return task, splits, columns, seen_from


def _other_count_of_texts(task: Task, columns: Columns, table: Table) -> UsageError:
    if task.is_pair:
        return UsageError(
            f"task {task.name!r} has two texts, and {table.file} seems to have one: name their "
            "columns with text and text_pair (--text, --text-pair); "
            f"the columns are {shown(table.columns)}"
        )
    return UsageError(
        f'task {task.name!r} has one text, but two were taken, "{columns.text}" and '
        f'"{columns.text_pair}": name its column with text (--text)'
    )


def _all_records(
    tables: Mapping[str, Table], spec: Spec
) -> tuple[Columns, dict[str, list[Record]]]:
    first = next(iter(tables))
    columns = choose_columns(tables[first], spec, needs_label=not first.startswith("test"))
    # The other files have to have the same columns, but for the answers of a test file.
    same = Spec(spec.name, columns.text, columns.text_pair, columns.label or spec.label)
    records = {}
    for split, table in tables.items():
        own = choose_columns(table, same, needs_label=not split.startswith("test"))
        records[split] = read_records(table, own)
        if not records[split]:
            raise DataError(f"{table.file}: no rows below the header; expected at least one")
    return columns, records


def _check_train_is_there(first: str, kind: Kind) -> None:
    if first != "train":
        raise UsageError(
            f"labels are needed to read {kind} without its training split: "
            "their order is that of the logits"
        )


def _span_splits(
    tables: Mapping[str, Table], spec: Spec, guard: RowGuard
) -> dict[str, list[Example]] | None:
    """Return question answering rows in the hub's columns, or None if these are something else."""
    needed = {"question", "context", "answers"}
    if spec.kind not in (None, "span") or not all(
        needed <= set(t.columns) for t in tables.values()
    ):
        if spec.kind == "span":
            raise UsageError("span needs the columns question, context and answers")
        return None

    def parse(row: Mapping[str, object], is_test: bool) -> SpanExample:
        answers = row["answers"]
        if isinstance(answers, Mapping):  # the hub's layout: a list per field
            texts, starts = answers.get("text") or (), answers.get("answer_start") or ()
            answers = [{"text": t, "answer_start": s} for t, s in zip(texts, starts, strict=False)]
        return span_example({**row, "answers": answers}, row["context"], is_test=is_test)

    return {
        s: [e for _, e in guard.parse(t.file, t.rows, partial(parse, is_test=s.startswith("test")))]
        for s, t in tables.items()
    }


def _example_parser(
    task: Task, columns: Columns, spec: Spec, *, is_test: bool
) -> Callable[[Record], Example]:
    """Return the function from a record to an example of ``task``."""
    index = {name: i for i, name in enumerate(task.labels)}
    # The hub writes -1 for an answer that GLUE keeps secret.
    secret = (None, "", -1, "-1") if spec.task is not None else (None, "")

    def parse(record: Record) -> Example:
        check_text(record.id or "")
        has_label = not (is_test and record.label in secret)
        if task.kind == "tokens":
            return _token_example(record, index, has_labels=has_label)
        # Official texts are taken as they are: QQP has a few that are empty.
        text = _text(record.text, columns.text, may_be_empty=spec.task is not None)
        pair = None
        if columns.text_pair is not None:
            pair = _text(record.text_pair, columns.text_pair, may_be_empty=True)
        label = _label(record.label, task.kind, index, columns, spec) if has_label else None
        return TextExample(text, pair, label, record.id)

    return parse


def _label(
    cell: object, kind: Kind, index: Mapping[str, int], columns: Columns, spec: Spec
) -> int | float | tuple[int, ...]:
    if kind == "regression":
        return _measure(cell, columns.label)
    if kind == "multilabel":
        return _class_indices(cell, index, spec.separator)
    return _class_index(cell, index, columns.label)


def _text(cell: object, column: str, *, may_be_empty: bool = False) -> str:
    if cell is None:
        raise Fault(f'column "{column}" is missing')
    if not isinstance(cell, str):
        raise Fault(f'column "{column}" is a {type(cell).__name__}; expected a text')
    if not (may_be_empty or cell.strip()):
        raise Fault(f'column "{column}" is empty; expected a text')
    return check_text(cell)


def _class_index(cell: object, index: Mapping[str, int], column: str | None) -> int:
    name = label_name(cell)
    if not name:
        raise Fault(f'column "{column}" is empty; expected one of {shown(tuple(index))}')
    if name not in index:
        # GLUE's MNLI: the five annotators did not agree. Nobody trains or scores on these.
        is_known = name == "-" and set(index) == {"contradiction", "entailment", "neutral"}
        raise _unknown_label(name, index, is_known=is_known)
    return index[name]


def _unknown_label(name: str, index: Mapping[str, int], *, is_known: bool = False) -> Fault:
    hint = did_you_mean(name, tuple(index))
    return Fault(
        f'label "{name}" is not one of {shown(tuple(index))}{"." + hint if hint else ""}',
        is_known=is_known,
    )


def _class_indices(cell: object, index: Mapping[str, int], separator: str) -> tuple[int, ...]:
    names = label_names(cell, separator)
    for name in names:
        if name not in index:
            raise _unknown_label(name, index)
    return tuple(sorted({index[name] for name in names}))


def _measure(cell: object, column: str | None) -> float:
    number = as_number(cell)
    if number is None:
        raise Fault(f'column "{column}": "{cell}" is not a number')
    return number


def _token_example(record: Record, index: Mapping[str, int], *, has_labels: bool) -> TokenExample:
    words = record.text
    if not isinstance(words, (list, tuple)) or not words:
        raise Fault('the words are no list; expected one such as ["A", "word"]')
    texts = tuple(_text(word, "words") for word in words)
    if not has_labels:
        return TokenExample(texts, None, record.id)
    cells = record.label
    if not isinstance(cells, (list, tuple)) or len(cells) != len(texts):
        raise Fault(f"{len(texts)} words; expected a list of as many labels")
    return TokenExample(texts, tuple(_class_index(c, index, "labels") for c in cells), record.id)
