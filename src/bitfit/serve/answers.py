"""What logits say, ready for JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfit.batches import Feature
from bitfit.calibration import probabilities
from bitfit.heads import best_span
from bitfit.inference import Logits
from bitfit.tasks import Example, SpanExample, Task
from bitfit.words import find_words


def best_window(features: Sequence[Feature], logits: Sequence[Logits]) -> tuple[Feature, Logits]:
    """Return the window of a long context that has the best answer; else the only one."""
    if len(features) == 1:
        return features[0], logits[0]
    scores = [best_span(f, values)[0] for f, values in zip(features, logits, strict=True)]
    best = int(np.argmax(scores))
    return features[best], logits[best]


def make_result(
    task: Task,
    temperature: float | None,
    text: str,
    example: Example,
    feature: Feature,
    logits: Logits,
    top_k: int | None,
    min_confidence: float,
) -> dict[str, Any]:
    """Return what a task says of one input.

    Returns:
        classification: ``label`` (None where it abstains), ``confidence``, ``abstained`` and
        ``scores``, the best first; multilabel: ``labels`` and ``scores``; regression: ``value``;
        tokens: ``spans``, one per word, and ``entities``, those of BIO tags put together; span:
        ``answer``, ``start``, ``end`` and ``score``. Confidences and scores are calibrated
        probabilities, but for the score of a span, which is the sum of two logits. Places are
        characters of the text, or of the context.
    """
    heat = temperature or 1.0
    if task.kind == "regression":
        return {"value": float(logits[0])}
    if task.kind == "span":
        assert isinstance(example, SpanExample)
        score, begin, end = best_span(feature, logits)
        return {
            "answer": example.context[begin:end], "start": begin, "end": end,
            "score": float(score) if np.isfinite(score) else None,
        }  # fmt: skip
    if task.kind == "tokens":
        return _tagged(task, text, feature, probabilities(logits, heat), min_confidence)
    chances = probabilities(logits, heat, multilabel=task.kind == "multilabel")
    scores = _scores(task, chances, top_k)
    if task.kind == "multilabel":
        chosen = [
            label for label, p in zip(task.labels, chances, strict=True)
            if p > 0.5 and p >= min_confidence
        ]  # fmt: skip
        return {"labels": chosen, "scores": scores}
    best = int(chances.argmax())
    confidence = float(chances[best])
    abstained = confidence < min_confidence
    return {
        "label": None if abstained else task.labels[best],
        "confidence": confidence, "abstained": abstained, "scores": scores,
    }  # fmt: skip


def _scores(task: Task, chances: NDArray[Any], top_k: int | None) -> list[dict[str, Any]]:
    order = np.argsort(-chances, kind="stable")[:top_k]
    return [{"label": task.labels[i], "score": float(chances[i])} for i in order]


def _tagged(
    task: Task, text: str, feature: Feature, chances: NDArray[Any], min_confidence: float
) -> dict[str, Any]:
    """Return a span for every word that was not cut off, and the entities."""
    assert feature.word_starts is not None
    words = find_words(text)
    kept = np.flatnonzero(feature.word_starts >= 0)
    spans = []
    for word, row in zip(kept, chances, strict=True):
        best, (begin, end) = int(row.argmax()), words[word]
        if row[best] >= min_confidence:
            spans.append({
                "start": begin, "end": end, "text": text[begin:end],
                "label": task.labels[best], "confidence": float(row[best]),
            })  # fmt: skip
    return {"spans": spans, "entities": merge_entities(spans, text)}


def merge_entities(spans: Sequence[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Return the entities of words tagged ``B-NAME``, ``I-NAME`` and ``O``; of other tags none.

    An ``I`` that follows nothing of its name begins an entity. The confidence is the least of its
    words'.
    """
    entities: list[dict[str, Any]] = []
    open_name = None
    for span in spans:
        tag = re.fullmatch(r"([BI])-(.+)", span["label"])
        if tag is None:
            open_name = None
            continue
        place, name = tag.groups()
        between = text[entities[-1]["end"] : span["start"]] if entities else ""
        if place == "I" and name == open_name and not between.strip():
            last = entities[-1]
            last |= {
                "end": span["end"], "text": text[last["start"] : span["end"]],
                "confidence": min(last["confidence"], span["confidence"]),
            }  # fmt: skip
        else:
            entities.append({**span, "label": name})
        open_name = name
    return entities
