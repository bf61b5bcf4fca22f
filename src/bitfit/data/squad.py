"""SQuAD v1.1: questions answered by a piece of their context (Rajpurkar et al. 2016)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bitfit.data.rows import Fault, RowGuard, check_text, file_lines
from bitfit.errors import DataError
from bitfit.tasks import SpanExample

_SHAPE = 'expected SQuAD v1.1: {"data": [{"paragraphs": [{"context": ..., "qas": [...]}]}]}'


def read_squad(path: Path, guard: RowGuard, *, is_test: bool = False) -> list[SpanExample]:
    """Return the questions of a SQuAD v1.1 file in their order; only a test's may lack answers.

    Raises:
        DataError: on a file of another shape; on an answer that does not stand where it says.
    """
    text = "\n".join(line for _, line in file_lines(path))
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: JSON that cannot be read: {error}") from None
    questions = ((0, pair) for pair in _questions(document, str(path)))
    parsed = guard.parse(str(path), questions, lambda q: span_example(*q, is_test=is_test))
    examples = [example for _, example in parsed]
    if not examples and not guard.skipped:
        raise DataError(f"{path}: no questions; {_SHAPE}")
    return examples


def _questions(document: object, file: str) -> Iterator[tuple[Any, Any]]:
    """Yield ``(question, context)`` as they stand in the file."""
    try:
        for article in document["data"]:  # type: ignore[index]
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield question, paragraph["context"]
    except (KeyError, TypeError, IndexError):
        raise DataError(f"{file}: {_SHAPE}") from None


def span_example(question: object, context: object, *, is_test: bool = False) -> SpanExample:
    """Return one question, checked; ``question`` holds question, id and answers.

    In a test an absent ``answers`` means that they are not known; an empty list is SQuAD v2's
    "no answer", which is refused.
    """
    if not isinstance(question, Mapping) or not isinstance(question.get("question"), str):
        raise Fault(f"a question without its text; {_SHAPE}")
    identifier = str(question["id"]) if "id" in question else None
    name = check_text(identifier or "without id")
    if not isinstance(context, str) or not context.strip():
        raise Fault(f"question {name}: the context is no text")
    answers = question.get("answers")
    if answers is not None or not is_test:
        if not isinstance(answers, (list, tuple)) or not answers:
            raise Fault(f"question {name}: no answer; SQuAD v1.1 has one or more, v2 is not read")
        answers = tuple(_answer(answer, context, name) for answer in answers)
    return SpanExample(check_text(question["question"]), check_text(context), answers, identifier)


def _answer(answer: object, context: str, name: str) -> tuple[int, str]:
    start = answer.get("answer_start") if isinstance(answer, Mapping) else None
    text = answer.get("text") if isinstance(answer, Mapping) else None
    if not isinstance(text, str) or not isinstance(start, int) or isinstance(start, bool):
        raise Fault(f"question {name}: an answer without text and answer_start")
    if not text or start < 0 or not context.startswith(text, start):
        found = context[max(start, 0) : max(start, 0) + len(text)]
        raise Fault(f'question {name}: at {start} the context reads "{found}", not "{text}"')
    return start, text
