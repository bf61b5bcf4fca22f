"""Which split is which; holding rows out, taking fewer; a hash that says which rows they were."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

from bitfit.tasks import Example, SpanExample, TextExample, TokenExample

E = TypeVar("E")

SPLIT_NAMES = {
    "train": "train", "validation": "dev", "valid": "dev", "val": "dev", "dev": "dev",
    "validation_matched": "dev", "validation_mismatched": "dev_mismatched",
    "dev_mismatched": "dev_mismatched",
    "test": "test", "test_matched": "test", "test_mismatched": "test_mismatched",
}  # fmt: skip
"""What splits are called, and which of ours they are."""


def splits_by_use(found: Mapping[str, E], named: Mapping[str, str]) -> dict[str, E]:
    """Return splits by what they are used for: first those ``named`` for a use, then by their name.

    A split that is named for one use has no other; one that is named and not there is left out.
    """
    places = {use: _place(found, name) for use, name in named.items()}
    taken = set(places.values())
    for place in found:
        use = SPLIT_NAMES.get(place)
        if use is not None and place not in taken:
            places.setdefault(use, place)
    return {use: found[place] for use, place in places.items() if place is not None}


def _place(found: Iterable[str], name: str) -> str | None:
    """Return the split that ``name`` means: of this very name, else another of the same meaning."""
    known = SPLIT_NAMES.get(name)
    same = [place for place in found if known is not None and SPLIT_NAMES.get(place) == known]
    return name if name in found else next(iter(same), None)


def take_limit(examples: Sequence[E], limit: int, seed: int) -> list[E]:
    """Return ``limit`` of the examples in their order, chosen by ``seed``.

    With one seed a smaller choice is part of every larger one, so that curves over the training
    size compare like with like.
    """
    chosen = np.random.default_rng(seed).permutation(len(examples))[:limit]
    return [examples[i] for i in np.sort(chosen)]


def hold_out(
    examples: Sequence[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Return ``(train, dev)``, both in the original order; dev is about ``fraction`` of the rows.

    Classes keep their shares, and a class of two rows or more has at least one on each side.
    Questions about one context stay together: dev is not to hold contexts seen in training.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(_stratum(example), []).append(i)
    rng = np.random.default_rng(seed)
    if examples and isinstance(examples[0], SpanExample):
        held = set(_whole_groups(list(groups.values()), fraction, rng))
    else:
        held = {i for group in groups.values() for i in _share(group, fraction, rng)}
        if not held and len(examples) > 1:
            held = {int(rng.integers(len(examples)))}
    train = [example for i, example in enumerate(examples) if i not in held]
    return train, [example for i, example in enumerate(examples) if i in held]


def _stratum(example: Example) -> Hashable:
    if isinstance(example, SpanExample):
        return example.context
    if isinstance(example, TextExample) and isinstance(example.label, int):
        return example.label
    return None


def _share(rows: list[int], fraction: float, rng: np.random.Generator) -> list[int]:
    size = min(max(round(len(rows) * fraction), 1), len(rows) - 1)
    return [rows[i] for i in rng.permutation(len(rows))[:size]]


def _whole_groups(
    groups: list[list[int]], fraction: float, rng: np.random.Generator
) -> Iterator[int]:
    wanted = max(round(sum(map(len, groups)) * fraction), 1)
    taken = 0
    for i in rng.permutation(len(groups))[: len(groups) - 1]:
        if taken >= wanted:
            return
        taken += len(groups[i])
        yield from groups[i]


def count_shared(train: Iterable[Example], dev: Iterable[Example]) -> int:
    """Return how many rows of ``dev`` have the very input of a row of ``train``."""
    seen = set(map(_input, train))
    return sum(_input(example) in seen for example in dev)


def _input(example: Example) -> Hashable:
    if isinstance(example, TextExample):
        return example.text, example.text_pair
    if isinstance(example, TokenExample):
        return example.words
    return example.question, example.context


def dataset_hash(examples: Iterable[Example]) -> str:
    """Return the SHA-256 of the examples' texts and answers in their order, in hexadecimal.

    Neither the file's place and format nor the rows' ids count. Every piece goes in with its
    length, so that moving a letter from one field to the next changes the hash.
    """
    digest = hashlib.sha256(b"bitfit data 1\n")
    for example in examples:
        digest.update(b"".join(_encoded(_content(example))))
    return digest.hexdigest()


def _content(example: Example) -> tuple[object, ...]:
    if isinstance(example, TextExample):
        return "text", example.text, example.text_pair, example.label
    if isinstance(example, TokenExample):
        return "tokens", example.words, example.labels
    return "span", example.question, example.context, example.answers


def _encoded(value: object) -> Iterator[bytes]:
    if value is None:
        yield b"N"
    elif isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        yield b"S%d:" % len(text) + text
    elif isinstance(value, int):
        yield b"I%d;" % value
    elif isinstance(value, float):
        yield b"F" + struct.pack(">d", value)
    elif isinstance(value, tuple):
        yield b"T%d:" % len(value)
        for item in value:
            yield from _encoded(item)
    else:
        raise TypeError(f"an example holds a {type(value).__name__}")
