"""Answers to items of any tasks mixed: tokenized by any thread, computed by one."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitfit.batches import Feature, make_features
from bitfit.errors import BitfitError, UnknownTask, UsageError
from bitfit.held import FittingTask
from bitfit.inference import DEFAULT_MAX_TOKENS, Logits
from bitfit.model import as_example
from bitfit.serve.answers import best_window, make_result
from bitfit.serve.failures import NotFinite
from bitfit.serve.shelf import Lease, Shelf
from bitfit.tasks import Example, Task

PART_CHARS = 1 << 18
"""Characters of a part: until a call ends, a tokenizer keeps all that it cuts off too."""


@dataclass(frozen=True)
class Item:
    """One text for one task."""

    task: str
    text: str
    text_pair: str | None = None
    """The second text, or the context where ``text`` is a question."""
    id: str | None = None
    top_k: int | None = None
    """How many scores are given, the best first; None: all."""
    min_confidence: float = 0.0
    """No label is given below this calibrated probability."""


@dataclass
class Ready:
    """An item that was tokenized and holds its task's version."""

    lease: Lease
    item: Item
    example: Example
    features: Sequence[Feature]
    """Several where a long context has several windows."""
    tokens: int
    truncated: bool

    @property
    def scores(self) -> int:
        """How many scores its answer will have."""
        task = self.lease.task
        if task.kind not in ("classification", "multilabel"):
            return 0
        return min(len(task.labels), self.item.top_k or len(task.labels))


@dataclass(frozen=True)
class Answer:
    """What a version of a task says of an item."""

    task: str
    version: int
    fingerprint: str
    kind: str
    id: str | None
    tokens: int
    truncated: bool
    """Whether the text was longer than the task reads."""
    result: dict[str, Any]
    """Ready for JSON; its keys depend on the kind: see :func:`bitfit.serve.answers.make_result`."""


class Engine:
    """Prepares items in any thread and answers them in one.

    Args:
        shelf: the tasks.
        max_tokens: padded tokens in one forward pass.
    """

    def __init__(self, shelf: Shelf, *, max_tokens: int = DEFAULT_MAX_TOKENS) -> None:
        self.shelf, self.max_tokens = shelf, max_tokens
        # A tokenizer is told where to cut before it is called: two threads must not both do so.
        self._tokenizing = threading.Lock()

    def prepare(self, items: Sequence[Item]) -> list[Ready | BitfitError]:
        """Return each item tokenized, with a lease on its task; what fails in the place of an item.

        Equal texts are tokenized once for all tasks that cut at the same length. Whoever does not
        pass a :class:`Ready` on to :meth:`answer` must release its lease.
        """
        found: list[Ready | BitfitError | None] = [None] * len(items)
        leases: dict[str, Lease | BitfitError] = {}
        groups: dict[tuple[str, bool, int], list[tuple[int, Lease, Example]]] = {}
        try:
            for place, item in enumerate(items):
                try:
                    lease = self._lease(item.task, leases)
                    example = _example(lease.task, item)
                except BitfitError as error:
                    found[place] = error
                    continue
                kind = lease.task.kind
                shape = kind if kind in ("tokens", "span") else "text"
                key = (shape, lease.task.is_pair, lease.file_meta.max_length)
                groups.setdefault(key, []).append((place, lease, example))
            for (_, _, max_length), members in groups.items():
                self._tokenize(items, members, max_length, found)
        except BaseException:
            for entry in found:
                if isinstance(entry, Ready):
                    entry.lease.release()
            raise
        finally:
            for kept in leases.values():
                if isinstance(kept, Lease):
                    kept.release()
        assert all(entry is not None for entry in found)
        return [entry for entry in found if entry is not None]

    def _lease(self, name: str, leases: dict[str, Lease | BitfitError]) -> Lease:
        """Return the lease that all items of one call have in common, one for each task."""
        if name not in leases:
            try:
                if name not in self.shelf and any(_is_unknown(kept) for kept in leases.values()):
                    # The nearest name is looked for once: in a long list it takes long.
                    raise UnknownTask(f"unknown task {name!r:.120}.")
                leases[name] = self.shelf.lease(name)
            except BitfitError as error:
                leases[name] = error
        known = leases[name]
        if isinstance(known, BitfitError):
            raise known
        return known

    def _tokenize(
        self, items: Sequence[Item], members: Sequence[tuple[int, Lease, Example]],
        max_length: int, found: list[Ready | BitfitError | None],
    ) -> None:  # fmt: skip
        tokenizer = self.shelf.encoder.base.tokenizer
        distinct: dict[tuple[str, str | None], int] = {}
        chosen = []
        for place, _, example in members:
            text = (items[place].text, items[place].text_pair)
            if text not in distinct:
                distinct[text] = len(distinct)
                chosen.append(example)
        try:
            with self._tokenizing:
                made = make_features(tokenizer, members[0][1].task, chosen, max_length)
        except UsageError as error:  # a length limit that leaves no room for a context
            for place, _, _ in members:
                found[place] = error
            return
        features: list[list[Feature]] = [[] for _ in chosen]
        for feature in made.items:
            features[feature.example].append(feature)
        for place, lease, example in members:
            item = items[place]
            own = features[distinct[item.text, item.text_pair]]
            found[place] = Ready(
                lease.again(), item, example, own, sum(map(len, own)), own[0].example in made.cut
            )

    def answer(self, ready: Sequence[Ready]) -> list[Answer | BitfitError]:
        """Return the answers, in order, and release the leases, whatever happens.

        One forward pass takes up to ``max_tokens``, whichever tasks the items name. In the place of
        an answer that is not finite is :class:`NotFinite`.
        """
        try:
            features = [feature for each in ready for feature in each.features]
            tasks = [each.lease.held for each in ready for _ in each.features]
            logits = self.shelf.tasks.logits(features, tasks, self.max_tokens)
            answers: list[Answer | BitfitError] = []
            begin = 0
            for each in ready:
                end = begin + len(each.features)
                answers.append(_answer(each, logits[begin:end]))
                begin = end
            return answers
        finally:
            for each in ready:
                each.lease.release()


def parts(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """Yield ``items`` in parts for :meth:`Engine.prepare`: ``PART_CHARS`` at most, or one item."""
    begin = chars = 0
    for end, item in enumerate(items):
        size = len(item.text) + len(item.text_pair or "")
        if end > begin and chars + size > PART_CHARS:
            yield items[begin:end]
            begin, chars = end, 0
        chars += size
    if items:
        yield items[begin:]


def _is_unknown(found: Lease | BitfitError) -> bool:
    return isinstance(found, UnknownTask)


def _example(task: Task, item: Item) -> Example:
    if task.is_pair and item.text_pair is None:
        raise UsageError(f"task {item.task!r} takes a pair of texts: text and text_pair")
    if not task.is_pair and item.text_pair is not None:
        raise UsageError(f"task {item.task!r} takes one text: leave text_pair out")
    if not 0 <= item.min_confidence <= 1:
        raise UsageError(f"min_confidence is {item.min_confidence}; expected 0 to 1")
    if item.top_k is not None and item.top_k < 1:
        raise UsageError(f"top_k is {item.top_k}; expected a number from 1 up")
    return as_example(task, item.text if item.text_pair is None else (item.text, item.text_pair))


def _answer(ready: Ready, logits: Sequence[Logits]) -> Answer | BitfitError:
    lease, item = ready.lease, ready.item
    fitting: FittingTask = lease.file_meta
    feature, values = best_window(ready.features, logits)
    if not np.isfinite(values).all():  # JSON has no form for it, and it says nothing
        return NotFinite(
            f"task {item.task!r} computes numbers that are not finite of this text: the values in "
            "its file are too large; train it again, or roll it back"
        )
    return Answer(
        task=item.task, version=lease.version, fingerprint=lease.fingerprint,
        kind=fitting.task.kind, id=item.id, tokens=ready.tokens, truncated=ready.truncated,
        result=make_result(
            fitting.task, fitting.temperature, item.text, ready.example, feature, values,
            item.top_k, item.min_confidence,
        ),
    )  # fmt: skip
