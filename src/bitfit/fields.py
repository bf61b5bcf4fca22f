"""The fields of a task file's JSON document: each is checked as it is read.

Every function takes the document and the name of a field, and raises
:class:`~bitfit.errors.TaskFileError` with that name and what was expected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bitfit.errors import TaskFileError, UsageError
from bitfit.tasks import DEFAULT_METRICS, Task


def wrong(name: str, expected: str, value: object) -> TaskFileError:
    """Return the error of a field that holds something else."""
    return TaskFileError(f"field {name!r}: expected {expected}, got {value!r:.60}")


def text_of(document: Mapping[str, Any], name: str) -> str:
    """Return a text."""
    value = document[name]
    if not isinstance(value, str):
        raise wrong(name, "text", value)
    return value


def optional_text(document: Mapping[str, Any], name: str) -> str | None:
    """Return a text, or None where null stands."""
    return None if document[name] is None else text_of(document, name)


def choice(document: Mapping[str, Any], name: str, choices: tuple[Any, ...]) -> Any:
    """Return a value that is one of ``choices``."""
    if document[name] not in choices:
        raise wrong(name, f"one of {', '.join(choices)}", document[name])
    return document[name]


def object_of(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a JSON object."""
    value = document[name]
    if not isinstance(value, dict):
        raise wrong(name, "an object", value)
    return value


def _is_number(value: object) -> bool:
    # parse_json lets no NaN through, but an int may have a thousand digits.
    return type(value) in (int, float) and abs(value) < 1e300  # type: ignore[arg-type]


def number(document: Mapping[str, Any], name: str, low: float, high: float) -> float | None:
    """Return a number from ``low`` to ``high``, or None where null stands."""
    value = document[name]
    if value is None:
        return None
    if not _is_number(value) or not low <= value <= high:
        raise wrong(name, f"null or a number from {low:g} to {high:g}", value)
    return float(value)


def max_length(document: Mapping[str, Any]) -> int:
    """Return the length limit in tokens."""
    value = document["max_length"]
    if type(value) is not int or not 1 <= value <= 1 << 20:
        raise wrong("max_length", f"a whole number from 1 to {1 << 20}", value)
    return value


def calibration(document: Mapping[str, Any]) -> dict[str, float] | None:
    """Return the calibration errors by name, or None where null stands."""
    if document["calibration"] is None:
        return None
    found = object_of(document, "calibration")
    for value in found.values():
        if not _is_number(value):
            raise wrong("calibration", "a number for each name", value)
    return {key: float(value) for key, value in found.items()}


def scores(document: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores by metric, NaN where null stands."""
    found = object_of(document, "scores")
    for value in found.values():
        if value is not None and not _is_number(value):
            raise wrong("scores", "a number or null for each metric", value)
    return {key: math.nan if v is None else float(v) for key, v in found.items()}


def probes(document: Mapping[str, Any], task: Task) -> list[dict[str, Any]]:
    """Return the probes: texts and the logits that were computed for them."""
    found = document["probes"]
    if not isinstance(found, list):
        raise wrong("probes", "a list", found)
    for probe in found:
        match probe:
            case {"text": str(), "text_pair": None | str(), "logits": list(logits), **rest}:
                if not rest and _are_logits(logits, depth=3):
                    continue
        raise wrong("probes", "text, text_pair and logits in each", probe)
    return found


def _are_logits(values: list[Any], depth: int) -> bool:
    return all(
        _are_logits(v, depth - 1) if isinstance(v, list) and depth > 1 else _is_number(v)
        for v in values
    )


def task_of(value: object) -> Task:
    """Return the task that the field ``task`` describes."""
    match value:
        case {
            "name": str(name),
            "kind": str(kind),
            "labels": list(labels),
            "metrics": list(metrics),
            "is_pair": bool(is_pair),
            **rest,
        } if not rest and kind in DEFAULT_METRICS and metrics:
            if all(isinstance(text, str) for text in [*labels, *metrics]):
                try:
                    return Task(
                        name=name,
                        kind=kind,
                        labels=tuple(labels),
                        metrics=tuple(metrics),
                        is_pair=is_pair,
                    )
                except UsageError as error:
                    raise TaskFileError(f"field 'task': {str(error)[:200]}") from None
    raise wrong("task", "name, kind, labels, metrics and is_pair", value)
