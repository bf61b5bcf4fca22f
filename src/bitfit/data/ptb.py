r"""The Penn Treebank (Marcus et al. 1993), which is licensed and read where the user has it.

Two forms: tagged, ``[ The/DT cat/NN ] sat/VBD``, where a slash inside a word is written ``\/``;
and bracketed, ``( (S (NP (DT The) …``, whose traces ``(-NONE- *)`` are no words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from bitfit.data.rows import Fault, RowGuard, file_lines
from bitfit.data.tagged import Sentence
from bitfit.errors import DataError

PTB_SUFFIXES = (".mrg", ".pos", ".tagged")
"""First the bracketed trees: where a folder has both forms, results are reported on these."""

SECTIONS = {"train": range(19), "dev": range(19, 22), "test": range(22, 25)}
"""Collins 2002's division of the Wall Street Journal, standard for tagging."""

_BRACKETS = {
    "-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-LCB-": "{", "-RCB-": "}",
}  # fmt: skip
_TOKEN = re.compile(r"[()]|[^\s()]+")
_RULE = re.compile(r"=+")
_SECTION_FOLDER = re.compile(r"[0-9]{2}")
_WSJ_FILE = re.compile(r"wsj_([0-9]{2})[0-9]{2}", re.IGNORECASE)


def section_files(folder: Path) -> dict[str, tuple[Path, ...]]:
    """Return the files of ``folder`` by split, in order; sections are folders 07 or files wsj_07….

    Empty where the folder holds no such files.
    """
    for suffix in PTB_SUFFIXES:
        found: dict[str, list[Path]] = {split: [] for split in SECTIONS}
        for path in sorted(folder.rglob(f"*{suffix}")):
            section = _section(path)
            for split, sections in SECTIONS.items():
                if section in sections:
                    found[split].append(path)
        if any(found.values()):
            return {split: tuple(paths) for split, paths in found.items() if paths}
    return {}


def _section(path: Path) -> int | None:
    if named := _WSJ_FILE.match(path.name):
        return int(named[1])
    is_section = _SECTION_FOLDER.fullmatch(path.parent.name)
    return int(path.parent.name) if is_section else None


def read_ptb(path: Path, guard: RowGuard) -> list[Sentence]:
    """Return the sentences of a tagged or bracketed file; the first character tells which it is."""
    lines = [(n, text) for n, text in file_lines(path) if not text.startswith("*x*")]
    first = next((text.strip() for _, text in lines if text.strip()), "")
    is_bracketed = first.startswith("(") and "/" not in first.split()[0]
    if is_bracketed:
        found = list(_bracketed(path, lines, guard))
    else:
        blocks = _tagged_blocks(lines)
        parsed = guard.parse(str(path), blocks, lambda words: [_word_and_tag(w) for w in words])
        found = [_sentence(path, line, pairs) for line, pairs in parsed]
    if not found and not guard.skipped:
        raise DataError(f"{path}: no sentences; expected word/TAG or bracketed trees")
    return found


def _sentence(path: Path, line: int, pairs: list[tuple[str, str]]) -> Sentence:
    return Sentence(str(path), line, tuple(w for w, _ in pairs), tuple(t for _, t in pairs))


def _plain(word: str) -> str:
    r"""Return the word as a newspaper prints it: ``-LRB-`` is "(", ``1\/2`` is "1/2"."""
    return _BRACKETS.get(word, word.replace("\\/", "/").replace("\\*", "*"))


# ------------------------------------------------------------------ tagged


def _tagged_blocks(lines: list[tuple[int, str]]) -> Iterator[tuple[int, list[str]]]:
    """Yield the ``word/TAG`` pieces of each sentence with its first line.

    The treebank's own files spread a sentence over lines of ``[ noun phrases ]`` and part
    sentences by ``====`` or empty lines. Files without either hold one sentence per line.
    """
    is_spread = any(_RULE.fullmatch(t.strip()) or t.startswith("[ ") for _, t in lines)
    block: list[str] = []
    start = 0
    for line, text in [*lines, (0, "")]:
        pieces = [p for p in text.split() if p not in ("[", "]")]
        is_break = not pieces or bool(_RULE.fullmatch(text.strip()))
        if block and (is_break or not is_spread):
            yield start, block
            block = []
        if not is_break:
            start = start if block else line
            block.extend(pieces)


def _word_and_tag(piece: str) -> tuple[str, str]:
    word, slash, tag = piece.rpartition("/")
    if not slash or not word or not tag or word.endswith("\\"):
        raise Fault(f'"{piece}" is not word/TAG')
    # "NN|NNS": the annotators were not sure; the first is their preference.
    return _plain(word), tag.split("|")[0] or tag


# ------------------------------------------------------------------ bracketed


def _bracketed(path: Path, lines: Iterable[tuple[int, str]], guard: RowGuard) -> Iterator[Sentence]:
    """Yield the leaves of each tree. Without recursion: a hostile file nests without end."""
    stack: list[list[str]] = []  # the atoms seen in each open bracket
    pairs: list[tuple[str, str]] = []
    start = line = 0
    for line, text in lines:
        for token in _TOKEN.findall(text):
            if token == "(":
                start = start if stack else line
                stack.append([])
            elif not stack:
                guard.reject(str(path), line, Fault(f'"{token}" outside of any bracket'))
            elif token == ")":
                atoms = stack.pop()
                if len(atoms) == 2 and atoms[0] != "-NONE-":
                    pairs.append((_plain(atoms[1]), atoms[0].split("|")[0] or atoms[0]))
                if not stack and pairs:
                    yield _sentence(path, start, pairs)
                    pairs = []
            else:
                stack[-1].append(token)
    if stack:
        guard.reject(str(path), start, Fault("a bracket is opened here and never closed"))
