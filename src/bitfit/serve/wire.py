"""What goes over the wire: requests and answers as pydantic models, with examples for OpenAPI."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from pydantic.json_schema import models_json_schema

from bitfit.errors import BitfitError
from bitfit.serve.engine import Answer, Item
from bitfit.serve.failures import RequestFailed, from_error
from bitfit.serve.shelf import NAME, NAMES, TaskInfo
from bitfit.serve.sources import SUFFIX

NAME_PATTERN = f"^{NAME.pattern}$"
BODY = 'a JSON object such as {"items": [{"task": "intent", "text": "Where is my order?"}]}'
MAX_ITEMS = 1 << 16
"""Items that a request can be read with at all; the server's own limit is lower."""
MAX_DEADLINE_MS = 3_600_000


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ItemIn(_Strict):
    """One text for one task."""

    task: Annotated[str, Field(max_length=200, description="The task's name.")]
    text: Annotated[str, Field(description="The text; of a span task the question.")]
    text_pair: Annotated[
        str | None, Field(description="Second text of a pair; of a span task the context.")
    ] = None
    id: Annotated[str | None, Field(max_length=200, description="Comes back with the answer.")] = (
        None
    )
    top_k: Annotated[
        int | None, Field(ge=1, le=100_000, description="So many scores, the best; null: all.")
    ] = None
    min_confidence: Annotated[
        float, Field(ge=0, le=1, description="No label is given below this probability.")
    ] = 0.0

    def to_item(self) -> Item:
        """Return it as the engine takes it."""
        return Item(
            self.task, self.text, self.text_pair, self.id, self.top_k, self.min_confidence
        )  # fmt: skip


class PredictIn(_Strict):
    """Texts for any tasks, mixed."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "items": [
                        {"task": "intent", "text": "Where is my order?", "id": "a", "top_k": 3},
                        {"task": "sentiment", "text": "Where is my order?", "id": "b"},
                    ],
                    "deadline_ms": 2000,
                }
            ]
        }
    )

    items: Annotated[list[ItemIn], Field(min_length=1, max_length=MAX_ITEMS)]
    deadline_ms: Annotated[
        int | None,
        Field(ge=1, le=MAX_DEADLINE_MS, description="Later than this the answer is of no use."),
    ] = None


class Failure(BaseModel):
    """What went wrong: ``code`` for programs, ``message`` for people."""

    code: str
    message: str
    details: dict[str, JsonValue] | None = None


class ErrorOut(BaseModel):
    """How every error is answered."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "error": {
                        "code": "unknown_task",
                        "message": "unknown task 'intnt'. Did you mean 'intent'?",
                    }
                }
            ]
        }
    )

    error: Failure


class AnswerOut(BaseModel):
    """The answer to one item, or in its place ``error``; the order is that of the items."""

    id: str | None
    task: str
    version: int | None = None
    fingerprint: str | None = Field(
        None, description="First 16 hex digits of the task file's seal: which file answered."
    )
    kind: str | None = None
    tokens: int | None = None
    truncated: bool | None = Field(None, description="Whether the text was cut at max_length.")
    result: dict[str, JsonValue] | None = Field(
        None,
        description="classification: label, confidence, abstained, scores; multilabel: labels, "
        "scores; regression: value; tokens: spans, entities; span: answer, start, end, score.",
    )
    error: Failure | None = None


class PredictOut(BaseModel):
    """Answers in the order of the items."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "answers": [
                        {
                            "id": "a",
                            "task": "intent",
                            "version": 2,
                            "fingerprint": "9f0c2a7d51e3b846",
                            "kind": "classification",
                            "tokens": 7,
                            "truncated": False,
                            "result": {
                                "label": "order_status",
                                "confidence": 0.97,
                                "abstained": False,
                                "scores": [{"label": "order_status", "score": 0.97}],
                            },
                        },
                        {
                            "id": "b",
                            "task": "mood",
                            "error": {"code": "unknown_task", "message": "unknown task 'mood'"},
                        },
                    ],
                    "ms": 12.3,
                }
            ]
        }
    )

    answers: list[AnswerOut]
    ms: float


class TaskOut(BaseModel):
    """A task that can be asked."""

    name: str
    version: int = Field(description="Grows with each replacement and roll-back.")
    kind: str
    labels: list[str]
    metric: str
    score: float | None = Field(description="Of the metric on dev, a fraction.")
    is_pair: bool
    max_length: int
    bytes: int
    fingerprint: str
    pinned: bool
    resident: bool = Field(description="Whether its row is in memory; else asking loads it.")
    source: str | None
    description: str | None
    licence: str | None
    can_roll_back: bool
    last_used: float | None = Field(description="Seconds since 1970.")


class ChangeOut(BaseModel):
    """How far one bias vector moved."""

    term: str
    symbol: str | None
    layer: int | None
    mean_abs: float


class TaskDetailOut(TaskOut):
    """A task with what its file says of it."""

    recipe: dict[str, JsonValue]
    scores: dict[str, float | None]
    terms: str
    change: list[ChangeOut]


class TasksOut(BaseModel):
    """A page of the tasks, by name."""

    tasks: list[TaskOut]
    total: int = Field(description="How many there are, of all pages.")


class CompareRow(BaseModel):
    """Two tasks at one bias vector; ``total`` and ``head.NAME`` are rows too."""

    term: str
    symbol: str | None
    layer: int | None
    cosine: float | None
    norm_a: float
    norm_b: float
    mean_abs_a: float
    mean_abs_b: float


class CompareOut(BaseModel):
    """How far two tasks moved, and in how like a direction."""

    a: str
    b: str
    rows: list[CompareRow]


class QueueOut(BaseModel):
    """What waits."""

    items: int
    tokens: int


class StatsOut(BaseModel):
    """How the server does."""

    uptime_s: float
    requests: int
    items: int
    items_per_s: float = Field(description="Of the last 10 seconds.")
    latency_ms: dict[str, float | None] = Field(description="p50, p90, p99 of the last 60 seconds.")
    queue: QueueOut
    batch_fill: float
    tasks: int
    resident: int
    base: dict[str, JsonValue]
    limits: dict[str, JsonValue]
    version: str
    replicas: list[dict[str, JsonValue]] | None = Field(
        default=None, description="Of each replica, where there are several."
    )


class HealthOut(BaseModel):
    """``ok``, or what stands against it."""

    status: str


def schemas() -> dict[str, Any]:
    """Return the JSON schema of every model here, by name."""
    _, found = models_json_schema(
        [(PredictIn, "validation"), *((model, "serialization") for model in _ANSWERS)],
        ref_template="#/components/schemas/{model}",
    )  # fmt: skip
    return dict(found["$defs"])


_ANSWERS = (
    PredictOut, TaskOut, TaskDetailOut, TasksOut, CompareOut, StatsOut, HealthOut, ErrorOut,
)  # fmt: skip


def read_predict(body: bytes) -> PredictIn:
    """Return the request in ``body``.

    Raises:
        RequestFailed: 400 where it is no JSON, 422 where it is another JSON than expected.
    """
    try:
        return PredictIn.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from None


def from_validation(error: ValidationError) -> RequestFailed:
    """Return the answer to a request that does not fit its model: the first places and why."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    if found[0]["type"] == "json_invalid":
        return RequestFailed(400, f"the body is no JSON: {found[0]['msg']}", code="bad_json")
    if not found[0]["loc"]:  # the whole of it is another JSON
        return bad_fields([(("body",), f"expected {BODY}")])
    return bad_fields([(entry["loc"], entry["msg"]) for entry in found])


def check_name(name: str) -> None:
    """Refuse a name that no new task can get.

    Raises:
        RequestFailed: 422, it has other characters, or is that of a file.
    """
    bare = name.removesuffix(SUFFIX)
    if not NAME.fullmatch(bare):
        shown = name if len(name) <= 120 else f"{name[:100]}…"
        raise _bad_name(f"{shown!r} is no name of a task: {NAMES}")
    if bare != name:  # curl -T adds the file's name to an address that ends in a slash
        raise _bad_name(
            f"{name!r} is the name of a file; a task is called as its file is, less {SUFFIX}: "
            f"send it to /v1/tasks/{bare}"
        )


def _bad_name(message: str) -> RequestFailed:
    fields = [{"field": "path.name", "message": message}]
    return RequestFailed(422, message, details={"fields": fields})


def bad_fields(found: Sequence[tuple[Sequence[Any], str]]) -> RequestFailed:
    """Return a 422 that names each place and what was expected there."""
    fields = [{"field": ".".join(map(str, place)), "message": text} for place, text in found[:10]]
    first = fields[0]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return RequestFailed(
        422, f"{first['field']}: {first['message']}{more}", details={"fields": fields}
    )


def answer_json(item: Item, found: Answer | BitfitError | RequestFailed) -> dict[str, Any]:
    """Return the answer to ``item``, or its error, ready for JSON."""
    if isinstance(found, Answer):
        return {
            "id": found.id, "task": found.task, "version": found.version,
            "fingerprint": found.fingerprint, "kind": found.kind, "tokens": found.tokens,
            "truncated": found.truncated, "result": found.result,
        }  # fmt: skip
    failed = from_error(found) if isinstance(found, BitfitError) else found
    return {"id": item.id, "task": item.task, **failed.to_json()}


def task_json(info: TaskInfo) -> dict[str, Any]:
    """Return what is known of a task, ready for JSON."""
    found = dict(vars(info))
    found["labels"] = list(info.labels)
    found["source"] = None if info.source is None else info.source.rsplit("/", 1)[-1]
    return found | {"score": number(info.score)}


def number(value: float | None) -> float | None:
    """Return ``value``; None where it is not finite, which JSON has no form for."""
    return value if value is not None and isfinite(value) else None
