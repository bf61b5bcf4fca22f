"""The outermost layer of the server: counts, logs, headers, and errors that nobody expected."""

from __future__ import annotations

import json
import logging
import secrets
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bitfit.errors import BitfitError
from bitfit.serve.auth import Keys, check_browser
from bitfit.serve.failures import RequestFailed
from bitfit.serve.logs import log
from bitfit.serve.metrics import Metrics
from bitfit.serve.settings import ServeConfig

LOG_FIELDS = "bitfit.log"
"""Key of a scope under which a route leaves more fields for the line of its request."""
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
API_POLICY = "default-src 'none'; frame-ancestors 'none'"
_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")
_QUIET = ("/healthz", "/readyz", "/metrics")


class Edge:
    """Wraps the application.

    Args:
        app: what it wraps.
        config: how many requests may be open, and whether other web pages are kept out.
        keys: where there are none, and no ``insecure``, other web pages are kept out.
        metrics: where requests are counted.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, keys: Keys, metrics: Metrics) -> None:
        self._app, self._config, self._metrics = app, config, metrics
        self._guards = not len(keys) and not config.insecure
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; other events pass through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        body = _Body(receive, Headers(scope=scope))
        answer = _Answer(send, body, _is_page(scope["path"]))
        self._open += 1
        try:
            await self._pass(scope, body.receive, answer)
        finally:
            self._open -= 1
            self._note(scope, answer, time.perf_counter() - began)

    async def _pass(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            self._check(scope)
            await self._app(scope, receive, answer.send)
        except RequestFailed as failed:
            await answer.fail(failed)
        except BitfitError as error:
            log("failed", level=logging.ERROR, trace=True, id=answer.id,
                path=scope["path"][:200], message=str(error))  # fmt: skip
            await answer.fail(
                RequestFailed(500, "it could not be done; the server's log says why under this id",
                              code="failed", details={"id": answer.id})
            )  # fmt: skip
        except Exception:
            log("internal_error", level=logging.ERROR, trace=True, id=answer.id,
                path=scope["path"][:200])  # fmt: skip
            await answer.fail(
                RequestFailed(500, "this is a bug; the server's log has it under this id",
                              details={"id": answer.id})
            )  # fmt: skip

    def _check(self, scope: Scope) -> None:
        if self._open > self._config.max_requests:
            raise RequestFailed(
                503, "too many requests at once; try again in 1 s", code="busy",
                headers={"Retry-After": "1"},
            )  # fmt: skip
        if self._guards:
            check_browser(Headers(scope=scope), scope["method"])

    def _note(self, scope: Scope, answer: _Answer, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        self._metrics.request(route, method, answer.status, seconds)
        if route in _QUIET and answer.status == 200:
            return
        client = scope.get("client")
        log(
            "request", id=answer.id, method=method, route=route, status=answer.status,
            ms=round(seconds * 1000, 2), client=client[0] if client else None,
            **scope.get(LOG_FIELDS, {}),
        )  # fmt: skip


class _Body:
    """Passes a request's body on; knows whether it is still to come."""

    def __init__(self, receive: Receive, headers: Headers) -> None:
        self._receive = receive
        self.is_open = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"

    async def receive(self) -> Message:
        """Receive one event."""
        message = await self._receive()
        if message["type"] == "http.request":
            self.is_open = message.get("more_body", False)
        return message


class _Answer:
    """Passes an answer on with the headers that all have; knows its status."""

    def __init__(self, send: Send, body: _Body, is_page: bool) -> None:
        self._send, self._body, self._is_page = send, body, is_page
        self.id = secrets.token_hex(8)
        self.status = 499  # none was sent: the client went away
        self._began = False

    async def send(self, message: Message) -> None:
        """Send one event."""
        if message["type"] == "http.response.start":
            self._began = True
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers[name] = value
            headers["content-security-policy"] = PAGE_POLICY if self._is_page else API_POLICY
            headers["x-request-id"] = self.id
            if not self._is_page:
                headers["cache-control"] = "no-store"
            if self.status >= 400 and self._body.is_open:  # else the rest would be read for nothing
                headers["connection"] = "close"
        await self._send(message)

    async def fail(self, failed: RequestFailed) -> None:
        """Send an error, if no answer has begun."""
        if self._began:
            return
        body = dump(failed.to_json())
        headers = {"content-type": "application/json", "content-length": str(len(body))}
        raw = [(k.lower().encode(), v.encode()) for k, v in (headers | failed.headers).items()]
        await self.send({"type": "http.response.start", "status": failed.status, "headers": raw})
        await self.send({"type": "http.response.body", "body": body})


def dump(value: Any) -> bytes:
    """Return ``value`` as JSON in UTF-8.

    Raises:
        ValueError: NaN or infinity.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def _is_page(path: str) -> bool:
    return path == "/" or path.startswith("/page/")
