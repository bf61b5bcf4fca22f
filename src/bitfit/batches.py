"""From examples to packed batches: token ids of many sequences end to end, without padding."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfit.errors import UsageError
from bitfit.tasks import Example, SpanExample, Task, TextExample, TokenExample

E = TypeVar("E")
Ints = NDArray[np.int64]
# The original BERT cuts a question here, so that a long one leaves room for the context.
MAX_QUESTION_TOKENS = 64
SPAN_STRIDE = 128


@dataclass(slots=True)
class Feature:
    """One tokenized sequence and what its head needs; all arrays are 1-D."""

    input_ids: Ints
    token_type_ids: Ints
    example: int
    """Index of the example it was made from (a long span example makes several)."""
    label: Any = None
    word_starts: Ints | None = None
    """tokens: position of each word's first sub-word, -1 where it was cut off."""
    offsets: NDArray[np.int64] | None = None
    """span: ``(length, 2)`` characters of the context, -1 outside of it."""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Batch:
    """Sequences end to end. ``input_ids`` is ``(T,)``, T the sum of ``lengths`` ``(B,)``."""

    input_ids: Tensor
    token_type_ids: Tensor
    lengths: Tensor
    features: Sequence[Feature] = field(repr=False)

    @cached_property
    def max_length(self) -> int:
        """The longest sequence, in tokens."""
        return max(len(f) for f in self.features)

    @cached_property
    def starts(self) -> Tensor:
        """``(B,)``: where each sequence begins."""
        return torch.cumsum(self.lengths, 0) - self.lengths

    @cached_property
    def sequence_of_token(self) -> Tensor:
        """``(T,)``: which sequence a token belongs to."""
        return torch.repeat_interleave(
            torch.arange(len(self.lengths), device=self.lengths.device),
            self.lengths,
            output_size=len(self.input_ids),
        )

    @cached_property
    def positions(self) -> Tensor:
        """``(T,)``: place of a token in its own sequence, from 0."""
        tokens = torch.arange(len(self.input_ids), device=self.lengths.device)
        return tokens - self.starts[self.sequence_of_token]

    @cached_property
    def mask(self) -> Tensor:
        """``(B, max_length)``: true where a padded batch has a token."""
        columns = torch.arange(self.max_length, device=self.lengths.device)
        return columns < self.lengths[:, None]

    @cached_property
    def padded_index(self) -> Tensor:
        """``(B, max_length)``: the token at each place of a padded batch.

        At the padding a sequence's own first token: a NaN in one sequence, weighed by zero, would
        otherwise reach its neighbours.
        """
        columns = torch.arange(self.max_length, device=self.lengths.device)
        return self.starts[:, None] + torch.where(self.mask, columns, 0)

    @cached_property
    def derived(self) -> dict[Hashable, object]:
        """What others make of the batch once and ask for in every layer."""
        return {}

    @cached_property
    def unpadded_index(self) -> Tensor:
        """``(T,)``: where each token stands in a flattened padded batch."""
        return self.sequence_of_token * self.max_length + self.positions

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``; to a GPU it goes in one piece."""
        if self.input_ids.device == device:
            return self
        tensors = self.input_ids, self.token_type_ids, self.lengths
        ids, types, lengths = upload(torch.cat(tensors), device).split([len(t) for t in tensors])
        return Batch(ids, types, lengths, self.features)


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Return ``x`` on ``device``; one of the CPU without waiting for what a GPU is doing."""
    if x.device.type != "cpu":
        return x.to(device)
    # From pageable memory the copy would wait until the GPU has done all that was asked before.
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def pack(features: Sequence[Feature]) -> Batch:
    """Return the features end to end, in their order."""
    return Batch(
        input_ids=torch.from_numpy(np.concatenate([f.input_ids for f in features])),
        token_type_ids=torch.from_numpy(np.concatenate([f.token_type_ids for f in features])),
        lengths=torch.tensor([len(f) for f in features]),
        features=features,
    )


def length_sorted(features: Sequence[Feature], max_tokens: int) -> Iterator[list[int]]:
    """Yield indices of features of like length, at most ``max_tokens`` padded tokens a time.

    Each index comes exactly once; a feature longer than ``max_tokens`` comes alone. The longest
    come first, so that what does not fit in memory fails at once.
    """
    chunk: list[int] = []
    for index in sorted(range(len(features)), key=lambda i: (-len(features[i]), i)):
        if chunk and (len(chunk) + 1) * len(features[chunk[0]]) > max_tokens:
            yield chunk
            chunk = []
        chunk.append(index)
    if chunk:
        yield chunk


@dataclass(frozen=True)
class Features:
    """All features of some examples, with how many examples the length limit cut."""

    items: list[Feature]
    examples: int
    truncated: int
    cut: frozenset[int] = frozenset()
    """The examples whose end was cut off. None is where a long one has several windows."""

    @property
    def truncated_share(self) -> float:
        """Share of examples cut by the length limit, 0 to 1."""
        return self.truncated / self.examples if self.examples else 0.0


def make_features(
    tokenizer: Any, task: Task, examples: Sequence[Example], max_length: int
) -> Features:
    """Tokenize ``examples`` of ``task``, cut at ``max_length`` tokens, specials included.

    Raises:
        UsageError: the examples are not of the task's kind, or the tokenizer is not a fast one.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(f"{type(tokenizer).__name__} is no fast tokenizer; bitfit needs one")
    if not examples:
        return Features([], 0, 0)
    if task.kind == "span":
        return _span_features(tokenizer, _all(SpanExample, examples, task), max_length)
    if task.kind == "tokens":
        return _token_features(tokenizer, _all(TokenExample, examples, task), max_length)
    return _text_features(tokenizer, _all(TextExample, examples, task), max_length)


def _all(kind: type[E], examples: Sequence[Any], task: Task) -> Sequence[E]:
    for example in examples:
        if not isinstance(example, kind):
            raise UsageError(
                f"task {task.name!r} ({task.kind}) takes {kind.__name__}, "
                f"not {type(example).__name__}"
            )
    return examples


def _types(encoding: Any) -> Ints:
    return np.asarray(encoding.type_ids, dtype=np.int64)


def _text_features(tokenizer: Any, examples: Sequence[TextExample], max_length: int) -> Features:
    pairs = [e.text_pair for e in examples]
    if any(p is None for p in pairs) and not all(p is None for p in pairs):
        raise UsageError("some examples have a second text and some have none")
    encoded = tokenizer(
        [e.text for e in examples],
        None if pairs[0] is None else pairs,
        truncation=True,
        max_length=max_length,
    ).encodings
    items = [
        Feature(np.asarray(enc.ids, dtype=np.int64), _types(enc), i, label=example.label)
        for i, (enc, example) in enumerate(zip(encoded, examples, strict=True))
    ]
    cut = frozenset(i for i, enc in enumerate(encoded) if enc.overflowing)
    return Features(items, len(examples), len(cut), cut)


def _token_features(tokenizer: Any, examples: Sequence[TokenExample], max_length: int) -> Features:
    encoded = tokenizer(
        [list(e.words) for e in examples],
        is_split_into_words=True,
        truncation=True,
        max_length=max_length,
    ).encodings
    items = []
    for i, (enc, example) in enumerate(zip(encoded, examples, strict=True)):
        starts = np.full(len(example.words), -1, dtype=np.int64)
        for position, word in reversed(list(enumerate(enc.word_ids))):
            if word is not None:
                starts[word] = position
        labels = None if example.labels is None else np.asarray(example.labels, dtype=np.int64)
        ids = np.asarray(enc.ids, dtype=np.int64)
        items.append(Feature(ids, _types(enc), i, label=labels, word_starts=starts))
    cut = frozenset(i for i, enc in enumerate(encoded) if enc.overflowing)
    return Features(items, len(examples), len(cut), cut)


def _span_features(tokenizer: Any, examples: Sequence[SpanExample], max_length: int) -> Features:
    """Sliding windows over long contexts; the label is the (start, end) token, or (0, 0)."""
    room = max_length - MAX_QUESTION_TOKENS - 4
    if room < 8:
        raise UsageError(
            f"max_length {max_length} leaves no room for a context beside a question of up to "
            f"{MAX_QUESTION_TOKENS} tokens; use at least {MAX_QUESTION_TOKENS + 12}"
        )
    encoded = tokenizer(
        _cut_questions(tokenizer, [e.question for e in examples]),
        [e.context for e in examples],
        truncation="only_second",
        max_length=max_length,
        stride=min(SPAN_STRIDE, room // 2),
        return_overflowing_tokens=True,
    )
    items = []
    for enc, index in zip(encoded.encodings, encoded["overflow_to_sample_mapping"], strict=True):
        offsets = np.asarray(enc.offsets, dtype=np.int64)
        offsets[np.asarray([s != 1 for s in enc.sequence_ids])] = -1
        feature = Feature(np.asarray(enc.ids, dtype=np.int64), _types(enc), index, offsets=offsets)
        answers = examples[index].answers
        if answers is not None:
            feature.label = _answer_tokens(offsets, answers)
        items.append(feature)
    windows = np.bincount(encoded["overflow_to_sample_mapping"], minlength=len(examples))
    return Features(items, len(examples), int((windows > 1).sum()))


def _cut_questions(tokenizer: Any, questions: list[str]) -> list[str]:
    # Some real questions begin with spaces, which some tokenizers count as tokens.
    questions = [q.lstrip() for q in questions]
    encodings = tokenizer(questions, add_special_tokens=False).encodings
    return [
        q if len(enc) <= MAX_QUESTION_TOKENS else q[: enc.offsets[MAX_QUESTION_TOKENS - 1][1]]
        for q, enc in zip(questions, encodings, strict=True)
    ]


def _answer_tokens(offsets: Ints, answers: Sequence[tuple[int, str]]) -> tuple[int, int]:
    """Return the first and last token of the first answer, (0, 0) if it is not in this window."""
    if not answers:
        return 0, 0
    begin, end = answers[0][0], answers[0][0] + len(answers[0][1])
    inside = (offsets[:, 0] >= 0) & (offsets[:, 1] > begin) & (offsets[:, 0] < end)
    found = np.flatnonzero(inside)
    whole = len(found) and offsets[found[0], 0] <= begin and offsets[found[-1], 1] >= end
    return (int(found[0]), int(found[-1])) if whole else (0, 0)
