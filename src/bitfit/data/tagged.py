"""Words with tags: CoNLL-U, CoNLL columns, and what turns tagged sentences into examples."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitfit.data.columns import sorted_labels
from bitfit.data.rows import Fault, RowGuard, did_you_mean, file_lines, shown
from bitfit.errors import DataError, UsageError
from bitfit.tasks import Example, Task, TokenExample

CONLLU_COLUMNS = {"upos": 3, "xpos": 4}
_CONLLU_WIDTH = 10
_WORD_ID = re.compile(r"[0-9]+")
_OTHER_ID = re.compile(r"[0-9]+[-.][0-9]+")

Block = list[tuple[int, str]]
"""The lines of one sentence, each with its number."""


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence with its tags still as text."""

    file: str
    line: int
    words: tuple[str, ...]
    tags: tuple[str, ...]
    id: str | None = None


def read_conllu(path: Path, column: str, guard: RowGuard) -> list[Sentence]:
    """Return the sentences of a CoNLL-U file with the tags of ``column``, xpos or upos.

    Words are the syntactic ones, the lines numbered 1, 2, …: the ranges of multiword tokens (1-2)
    and the empty nodes of enhanced graphs (1.1) have no tag of their own.
    """
    index = CONLLU_COLUMNS[column]

    def parse(block: Block) -> Sentence | None:
        name, words, tags = None, [], []
        for line, text in block:
            if text.startswith("#"):
                key, _, value = text[1:].partition("=")
                name = value.strip() if key.strip() == "sent_id" else name
                continue
            fields = _conllu_fields(text, line)
            if _WORD_ID.fullmatch(fields[0]):
                words.append(_filled(fields[1], "form", line))
                tags.append(_tag(fields[index], column, line))
        return _sentence(path, block, words, tags, name)

    return _sentences(path, guard, _blocks(file_lines(path)), parse)


def _conllu_fields(text: str, line: int) -> list[str]:
    fields = text.split("\t")
    if len(fields) != _CONLLU_WIDTH:
        raise Fault(f"{len(fields)} columns; CoNLL-U has {_CONLLU_WIDTH}, between tabs", line=line)
    if not (_WORD_ID.fullmatch(fields[0]) or _OTHER_ID.fullmatch(fields[0])):
        raise Fault(f'"{fields[0]}" is no word number such as 1, 1-2 or 1.1', line=line)
    return fields


def _tag(tag: str, column: str, line: int) -> str:
    if tag in ("", "_"):
        other = "upos" if column == "xpos" else "xpos"
        raise Fault(f"no {column} tag; try token_column {other}", line=line)
    return tag


def _filled(word: str, what: str, line: int) -> str:
    if not word.strip():
        raise Fault(f"an empty {what}", line=line)
    return word


def read_conll(path: Path, column: int, guard: RowGuard) -> list[Sentence]:
    """Return the sentences of a file of columns: the word first, the tag in ``column``.

    Columns stand between spaces or tabs, an empty line ends a sentence, ``-DOCSTART-`` lines are
    left out.
    """

    def parse(block: Block) -> Sentence | None:
        words, tags = [], []
        for line, text in block:
            fields = text.split()
            if not -len(fields) <= column < len(fields) or len(fields) < 2:
                raise Fault(
                    f"{len(fields)} columns; the tag is to be in column {column}", line=line
                )
            words.append(fields[0])
            tags.append(fields[column])
        return _sentence(path, block, words, tags)

    lines = ((n, "" if text.startswith("-DOCSTART-") else text) for n, text in file_lines(path))
    return _sentences(path, guard, _blocks(lines), parse)


def _blocks(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Block]]:
    """Yield the lines between empty lines, each time with the number of the first."""
    block: Block = []
    for line, text in lines:
        if text.strip():
            block.append((line, text))
        elif block:
            yield block[0][0], block
            block = []
    if block:
        yield block[0][0], block


def _sentence(
    path: Path, block: Block, words: Sequence[str], tags: Sequence[str], name: str | None = None
) -> Sentence | None:
    """Return the sentence, or None for a block of comments only."""
    return Sentence(str(path), block[0][0], tuple(words), tuple(tags), name) if words else None


def _sentences(
    path: Path,
    guard: RowGuard,
    blocks: Iterable[tuple[int, Block]],
    parse: Callable[[Block], Sentence | None],
) -> list[Sentence]:
    found = [s for _, s in guard.parse(str(path), blocks, parse) if s is not None]
    if not found and not guard.skipped:
        raise DataError(f"{path}: no sentences; expected words with tags")
    return found


# ------------------------------------------------------------------ examples


def read_sentences(
    sentences: Mapping[str, Sequence[Sentence]],
    name: str,
    labels: tuple[str, ...] | None,
    guard: RowGuard,
) -> tuple[Task, dict[str, list[Example]]]:
    """Return the task and the examples by split.

    Without ``labels`` the tags of all splits count: a tag set belongs to the annotation scheme,
    and a rare tag may well stand in dev only.

    Raises:
        UsageError: without ``labels`` where there is no training split.
    """
    if labels is None:
        if "train" not in sentences:
            raise UsageError(
                "labels are needed to read tokens without the training split: "
                "their order is that of the logits"
            )
        labels = sorted_labels(t for part in sentences.values() for s in part for t in s.tags)
    if len(labels) < 2:
        where = next((s.file for part in sentences.values() for s in part), "the data")
        raise DataError(f"{where}: {len(labels)} different tags; expected two or more")
    task = Task(name=name, kind="tokens", labels=labels)
    index = {label: i for i, label in enumerate(labels)}
    return task, {split: _examples(part, index, guard) for split, part in sentences.items()}


def _examples(
    sentences: Sequence[Sentence], index: Mapping[str, int], guard: RowGuard
) -> list[Example]:
    examples: list[Example] = []
    for sentence in sentences:
        unknown = next((tag for tag in sentence.tags if tag not in index), None)
        if unknown is None:
            tags = tuple(index[tag] for tag in sentence.tags)
            examples.append(TokenExample(sentence.words, tags, sentence.id))
            continue
        hint = did_you_mean(unknown, tuple(index))
        fault = Fault(f'tag "{unknown}" is not one of {shown(tuple(index))}{hint}')
        guard.reject(sentence.file, sentence.line, fault)
    return examples
