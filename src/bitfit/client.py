"""Ask a bitfit server: :class:`Client`, and :class:`AsyncClient` for asyncio (extra ``client``).

Example:
    >>> with Client("http://127.0.0.1:8000") as client:  # doctest: +SKIP
    ...     print(client.predict_one("intent", "Where is my order?").label)
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import quote

from bitfit.errors import BitfitError, MissingExtra, UnknownTask, UsageError

if TYPE_CHECKING:
    import httpx

C = TypeVar("C")

LONGEST_PAUSE = 30.0
"""Seconds that a client waits at most before it asks again."""


class ServerError(BitfitError):
    """The server answered with an error, or did not answer."""

    def __init__(
        self,
        message: str,
        *,
        code: str,
        status: int | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        """For programs: ``unknown_task``, ``bad_input``, ``queue_full``, ``unreachable``, ..."""
        self.status = status
        """Of HTTP; None where nothing was answered, and for one item among several."""
        self.details = dict(details or {})


class ServerBusy(ServerError):
    """The server had no room (429) or was stopping (503), at every try."""


class DeadlineExceeded(ServerError):
    """The server did not answer by the deadline (504)."""


class NotAllowed(ServerError):
    """The key is missing, unknown (401) or of another role (403)."""


class UnknownTaskOnServer(ServerError, UnknownTask):
    """The server has no such task."""


class Unreachable(ServerError):
    """Nothing was answered: no connection, or it broke, or took too long."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A text for a task."""

    task: str
    text: str
    """Of a span task the question."""
    text_pair: str | None = None
    """Second text of a pair; of a span task the context."""
    id: str | None = None
    """Comes back with the answer."""
    top_k: int | None = None
    """So many scores, the best; None: all."""
    min_confidence: float = 0.0
    """No label is given below this probability."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a task says of a text, or the error in its place."""

    task: str
    id: str | None
    version: int | None = None
    """Of the task, as the server counts."""
    fingerprint: str | None = None
    """First 16 hex digits of the seal of the task file that answered."""
    kind: str | None = None
    tokens: int | None = None
    truncated: bool | None = None
    """Whether the text was cut at the task's length."""
    result: Mapping[str, Any] | None = None
    """By kind: ``label, confidence, abstained, scores``; ``labels, scores``; ``value``;
    ``spans, entities``; ``answer, start, end, score``."""
    error: ServerError | None = None

    @property
    def label(self) -> str | None:
        """classification: the best label; None where none was sure enough."""
        found: str | None = self._get("label")
        return found

    @property
    def confidence(self) -> float | None:
        """classification: calibrated probability of the best label."""
        found: float | None = self._get("confidence")
        return found

    @property
    def labels(self) -> tuple[str, ...]:
        """multilabel: the labels that apply."""
        return tuple(self._get("labels") or ())

    @property
    def scores(self) -> dict[str, float]:
        """classification, multilabel: calibrated probability by label, the best first."""
        return {score["label"]: score["score"] for score in self._get("scores") or ()}

    @property
    def value(self) -> float | None:
        """regression: the number."""
        found: float | None = self._get("value")
        return found

    @property
    def answer(self) -> str | None:
        """span: the answer, a piece of the context."""
        found: str | None = self._get("answer")
        return found

    @property
    def spans(self) -> list[dict[str, Any]]:
        """tokens: ``start, end, text, label, confidence`` of each word."""
        return list(self._get("spans") or ())

    def _get(self, name: str) -> Any:
        return None if self.result is None else self.result.get(name)


@dataclass(frozen=True, kw_only=True)
class TaskInfo:
    """A task that a server has."""

    name: str
    version: int
    kind: str
    labels: tuple[str, ...]
    metric: str
    score: float | None
    is_pair: bool
    max_length: int
    bytes: int
    fingerprint: str
    pinned: bool
    resident: bool
    description: str | None
    licence: str | None
    can_roll_back: bool
    last_used: float | None


AnyItem = Item | Mapping[str, Any] | tuple[str, str] | tuple[str, str, str]


@dataclass(frozen=True)
class _Call:
    """A request, and whether it may be sent twice."""

    method: str
    path: str
    json: Any = None
    content: bytes | None = None
    params: Mapping[str, Any] | None = None
    repeatable: bool = True

    def request(self) -> dict[str, Any]:
        """Return it as httpx takes it."""
        names = ("json", "content", "params")
        return {"method": self.method, "url": self.path} | {n: getattr(self, n) for n in names}


class _Base:
    """What both clients share: what is sent, how it is read, when it is sent again."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        key: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        **options: Any,
    ) -> None:
        try:
            import httpx
        except ImportError:
            raise MissingExtra("bitfit.client", "client") from None
        _check_address(url)
        self._httpx: Any = httpx
        self._retries = retries
        self._url = url
        headers = httpx.Headers(options.pop("headers", None))
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        self._options = {"base_url": url, "headers": headers, "timeout": timeout} | options
        self._failures = (httpx.RequestError, httpx.InvalidURL)

    def _open(self, kind: Callable[..., C]) -> C:
        try:
            return kind(**self._options)
        except self._httpx.InvalidURL as error:
            raise UsageError(f"{self._url!r} is no address of a server: {error}") from error

    def _settle(
        self, call: _Call, attempt: int, outcome: httpx.Response | Exception
    ) -> float | None:
        """Return the seconds before the next try; None: the response is to be taken.

        Raises:
            ServerError: there is no response, and no next try.
        """
        if isinstance(outcome, Exception):
            if attempt >= self._retries or not self._may_repeat(call, outcome):
                raise self._failure(outcome) from outcome
            return _pause(attempt)
        if attempt >= self._retries or outcome.status_code not in (429, 503):
            return None
        text = outcome.headers.get("retry-after", "")
        return _pause(attempt, float(text) if text.isdecimal() else 0.0)

    def _may_repeat(self, call: _Call, error: Exception) -> bool:
        # A connection that never was has changed nothing.
        never_was = isinstance(error, self._httpx.ConnectError | self._httpx.ConnectTimeout)
        return never_was or (call.repeatable and isinstance(error, self._httpx.TransportError))

    def _failure(self, error: Exception) -> ServerError:
        reason = str(error) or type(error).__name__
        if isinstance(error, self._httpx.TransportError):
            return Unreachable(f"{self._url}: no answer ({reason})", code="unreachable")
        if isinstance(error, self._httpx.InvalidURL):
            return ServerError(f"it cannot be asked for: {reason}", code="bad_input")
        return ServerError(f"{self._url}: its answer cannot be read ({reason})", code="bad_answer")


class Client(_Base):
    """A client of a server; a context, or :meth:`close` it.

    Args:
        url: where the server is.
        key: API key, where it wants one.
        timeout: seconds for one try.
        retries: how often a request is sent again that was refused (429, 503; after the time that
            the server asks for) or not answered.
        options: more for :class:`httpx.Client`, such as ``transport`` or ``verify``.

    Raises:
        MissingExtra: httpx is not installed.
        UsageError: ``url`` is none.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._client: httpx.Client = self._open(self._httpx.Client)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def predict(self, items: Iterable[AnyItem], *, deadline_ms: int | None = None) -> list[Answer]:
        """Return the answer to each item, in order; one that failed has ``error``.

        Args:
            items: :class:`Item`, a mapping of its fields, or ``(task, text[, text_pair])``.
            deadline_ms: the server gives up after this.

        Raises:
            ServerError: none was answered.
        """
        sent = [_plain(item) for item in items]
        if not sent:
            return []
        try:
            return _read_answers(self._send(_predict(sent, deadline_ms)), len(sent))
        except UnknownTaskOnServer as error:  # of one single item
            return [_failed(sent[0], error)]

    def predict_one(
        self, task: str, text: str, text_pair: str | None = None, **options: Any
    ) -> Answer:
        """Return the answer to one text; ``options`` are more fields of :class:`Item`.

        Raises:
            ServerError: it was not answered.
        """
        return _only(self.predict([Item(task=task, text=text, text_pair=text_pair, **options)]))

    def tasks(self, query: str = "") -> list[TaskInfo]:
        """Return the server's tasks by name, of ``query`` those that it finds."""
        found: list[TaskInfo] = []
        while True:
            page, total = _read_tasks(self._send(_tasks(query, len(found))))
            found += page
            if not page or len(found) >= total:
                return found

    def task(self, name: str) -> dict[str, Any]:
        """Return all that the server knows of a task, as its JSON."""
        return _object(self._send(_Call("GET", _path(name))))

    def put(self, name: str, file: str | Path | bytes, *, pinned: bool = False) -> TaskInfo:
        """Add a task file under ``name``, or replace what is there by a new version.

        Raises:
            ServerError: it is refused.
            BitfitError: the file cannot be read.
        """
        return _read_info(self._send(_put(name, file, pinned)))

    def rollback(self, name: str) -> TaskInfo:
        """Bring the version before back, under a new number."""
        return _read_info(self._send(_rollback(name)))

    def delete(self, name: str) -> None:
        """Take a task out."""
        self._send(_delete(name))

    def stats(self) -> dict[str, Any]:
        """Return the server's rates, latencies and queue."""
        return _object(self._send(_Call("GET", "/v1/stats")))

    def _send(self, call: _Call) -> httpx.Response:
        attempt = 0
        while True:
            try:
                outcome: Any = self._client.request(**call.request())
            except self._failures as error:
                outcome = error
            pause = self._settle(call, attempt, outcome)
            if pause is None:
                return _checked(outcome)
            time.sleep(pause)
            attempt += 1


class AsyncClient(_Base):
    """:class:`Client` for asyncio: the same arguments, and methods to be awaited."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._client: httpx.AsyncClient = self._open(self._httpx.AsyncClient)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def predict(
        self, items: Iterable[AnyItem], *, deadline_ms: int | None = None
    ) -> list[Answer]:
        """As :meth:`Client.predict`."""
        sent = [_plain(item) for item in items]
        if not sent:
            return []
        try:
            return _read_answers(await self._send(_predict(sent, deadline_ms)), len(sent))
        except UnknownTaskOnServer as error:
            return [_failed(sent[0], error)]

    async def predict_one(
        self, task: str, text: str, text_pair: str | None = None, **options: Any
    ) -> Answer:
        """As :meth:`Client.predict_one`."""
        item = Item(task=task, text=text, text_pair=text_pair, **options)
        return _only(await self.predict([item]))

    async def tasks(self, query: str = "") -> list[TaskInfo]:
        """As :meth:`Client.tasks`."""
        found: list[TaskInfo] = []
        while True:
            page, total = _read_tasks(await self._send(_tasks(query, len(found))))
            found += page
            if not page or len(found) >= total:
                return found

    async def task(self, name: str) -> dict[str, Any]:
        """As :meth:`Client.task`."""
        return _object(await self._send(_Call("GET", _path(name))))

    async def put(self, name: str, file: str | Path | bytes, *, pinned: bool = False) -> TaskInfo:
        """As :meth:`Client.put`."""
        return _read_info(await self._send(_put(name, file, pinned)))

    async def rollback(self, name: str) -> TaskInfo:
        """As :meth:`Client.rollback`."""
        return _read_info(await self._send(_rollback(name)))

    async def delete(self, name: str) -> None:
        """As :meth:`Client.delete`."""
        await self._send(_delete(name))

    async def stats(self) -> dict[str, Any]:
        """As :meth:`Client.stats`."""
        return _object(await self._send(_Call("GET", "/v1/stats")))

    async def _send(self, call: _Call) -> httpx.Response:
        attempt = 0
        while True:
            try:
                outcome: Any = await self._client.request(**call.request())
            except self._failures as error:
                outcome = error
            pause = self._settle(call, attempt, outcome)
            if pause is None:
                return _checked(outcome)
            await asyncio.sleep(pause)
            attempt += 1


def _check_address(url: str) -> None:
    """Refuse what httpx would refuse at the first request only.

    Raises:
        UsageError: it is no address of a server.
    """
    scheme, mark, rest = url.partition("://")
    if mark and scheme.lower() in ("http", "https"):
        if rest.startswith(("/", "?", "#")) or not rest:
            raise UsageError(
                f"{url!r} is no address of a server: it names no host; expected such as "
                "http://localhost:8000"
            )
        return
    near = f"; did you mean http://{url}?" if url and not mark else ""
    raise UsageError(f"{url!r} is no address of a server: it begins with http:// or https://{near}")


def _pause(attempt: int, asked: float = 0.0) -> float:
    """Return the seconds to wait, of which the server asked for ``asked`` at least."""
    backoff = 0.1 * 2.0**attempt
    # Spread, so that clients that were refused together do not come back together.
    return min(LONGEST_PAUSE, max(asked, backoff) * (1 + random.random() / 4))


# --- what is sent -------------------------------------------------------------------------------


def _plain(item: AnyItem) -> dict[str, Any]:
    if isinstance(item, Item):
        return {key: value for key, value in vars(item).items() if value is not None}
    if isinstance(item, Mapping):
        return dict(item)
    return dict(zip(("task", "text", "text_pair"), item, strict=False))


def _predict(items: Sequence[Mapping[str, Any]], deadline_ms: int | None) -> _Call:
    more = {} if deadline_ms is None else {"deadline_ms": deadline_ms}
    return _Call("POST", "/v1/predict", json={"items": items, **more})


def _tasks(query: str, offset: int) -> _Call:
    return _Call("GET", "/v1/tasks", params={"query": query, "offset": offset, "limit": 1000})


def _path(name: str, more: str = "") -> str:
    return f"/v1/tasks/{quote(name, safe='')}{more}"


def _put(name: str, file: str | Path | bytes, pinned: bool) -> _Call:
    if isinstance(file, bytes):
        data = file
    else:
        try:
            data = Path(file).read_bytes()
        except OSError as error:
            raise BitfitError(f"{file}: cannot be read: {error.strerror or error}") from error
    params = {"pinned": "true"} if pinned else None
    return _Call("PUT", _path(name), content=data, params=params, repeatable=False)


def _rollback(name: str) -> _Call:
    return _Call("POST", _path(name, "/rollback"), repeatable=False)


def _delete(name: str) -> _Call:
    return _Call("DELETE", _path(name), repeatable=False)


# --- what comes back ----------------------------------------------------------------------------

_BY_STATUS: dict[int, type[ServerError]] = {
    401: NotAllowed, 403: NotAllowed, 429: ServerBusy, 503: ServerBusy, 504: DeadlineExceeded,
}  # fmt: skip


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    raise _error(_failure(response), response.status_code)


def _failure(response: httpx.Response) -> Mapping[str, Any]:
    try:
        found = response.json()["error"]
        return {"code": str(found["code"]), "message": str(found["message"]),
                "details": found.get("details")}  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError):  # of something in between
        return {"code": "error", "message": f"HTTP {response.status_code}", "details": None}


def _error(failure: Mapping[str, Any], status: int | None = None) -> ServerError:
    kind = _BY_STATUS.get(status or 0, ServerError)
    if failure["code"] == "unknown_task":
        kind = UnknownTaskOnServer
    return kind(
        failure["message"], code=failure["code"], status=status, details=failure.get("details")
    )


@contextmanager
def _reading(response: httpx.Response) -> Iterator[Any]:
    """Give the answer's JSON; that it is of another shape is no bug of the caller's."""
    try:
        yield response.json()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ServerError("the answer is not that of a bitfit server", code="bad_answer") from error


def _object(response: httpx.Response) -> dict[str, Any]:
    with _reading(response) as found:
        return dict(found)


def _read_answers(response: httpx.Response, count: int) -> list[Answer]:
    with _reading(response) as found:
        answers = [_answer(entry) for entry in found["answers"]]
        if len(answers) != count:
            raise ValueError(f"{len(answers)} answers to {count} items")
        return answers


def _read_info(response: httpx.Response) -> TaskInfo:
    with _reading(response) as found:
        return _info(found)


def _read_tasks(response: httpx.Response) -> tuple[list[TaskInfo], int]:
    with _reading(response) as found:
        return [_info(entry) for entry in found["tasks"]], int(found["total"])


def _answer(entry: Mapping[str, Any]) -> Answer:
    known = {key: entry[key] for key in _ANSWER_FIELDS if key in entry}
    if entry.get("error") is not None:
        known["error"] = _error(entry["error"])
    return Answer(**known)


def _info(entry: Mapping[str, Any]) -> TaskInfo:
    known = {key: entry[key] for key in _INFO_FIELDS}
    return TaskInfo(**known | {"labels": tuple(entry["labels"])})


_ANSWER_FIELDS = tuple(f.name for f in fields(Answer) if f.name != "error")
_INFO_FIELDS = tuple(f.name for f in fields(TaskInfo))


def _failed(item: Mapping[str, Any], error: ServerError) -> Answer:
    return Answer(task=item["task"], id=item.get("id"), error=error)


def _only(answers: list[Answer]) -> Answer:
    if answers[0].error is not None:
        raise answers[0].error
    return answers[0]
