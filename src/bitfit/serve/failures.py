"""What goes wrong on the way of a request, in one shape: a status, a code, a message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitfit.errors import (
    BitfitError,
    TaskFileError,
    UnknownTask,
    UnsupportedFormat,
    UsageError,
    WrongBase,
    WrongTokenizer,
)

CODES = {
    400: "bad_request", 401: "unauthorized", 403: "forbidden", 404: "not_found",
    405: "method_not_allowed", 408: "too_slow", 409: "conflict", 413: "too_large",
    415: "wrong_type", 422: "bad_input", 429: "queue_full", 431: "head_too_large",
    500: "internal", 503: "unavailable", 504: "deadline",
}  # fmt: skip


class FolderBusy(BitfitError):
    """Other servers kept changing the tasks of a folder for as long as one waits."""


class NotFinite(BitfitError):
    """A task computes NaN or infinity of a text: its file has numbers that are far too large."""


# The first that an error is an instance of: status and code.
_OF_ERRORS: tuple[tuple[type[BitfitError], int, str], ...] = (
    (FolderBusy, 503, "folder_busy"),
    (NotFinite, 422, "not_finite"),
    (UnknownTask, 404, "unknown_task"),
    (WrongBase, 409, "wrong_base"),
    (WrongTokenizer, 409, "wrong_tokenizer"),
    (UnsupportedFormat, 422, "unsupported_format"),
    (TaskFileError, 422, "bad_file"),
    (UsageError, 422, "bad_input"),
    (BitfitError, 500, "failed"),
)


class RequestFailed(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: for a person; says what was expected.
        code: for a program; by default that of the status.
        details: more for a program, ready for JSON.
        headers: more headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        details: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.code = code or CODES.get(status, "error")
        self.details = details
        self.headers = dict(headers or {})

    def __reduce__(self) -> tuple[Any, ...]:  # between the processes of a cluster
        return _rebuild, (self.status, self.message, self.code, self.details, self.headers)

    def to_json(self) -> dict[str, Any]:
        """Return ``{"error": {"code", "message", "details"?}}``."""
        error: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.details:
            error["details"] = dict(self.details)
        return {"error": error}


def _rebuild(
    status: int, message: str, code: str, details: Mapping[str, Any] | None,
    headers: Mapping[str, str],
) -> RequestFailed:  # fmt: skip
    return RequestFailed(status, message, code=code, details=details, headers=headers)


def closing() -> RequestFailed:
    """Return what is answered before a server takes requests, and when it takes no more."""
    return RequestFailed(503, "starting, or shutting down", code="closing")


def too_late(what: str, allowed_ms: float, limit_ms: float) -> RequestFailed:
    """Return what is answered where a deadline passed.

    Args:
        what: what did not happen by then.
        allowed_ms: the deadline.
        limit_ms: the longest that the server allows.
    """
    return RequestFailed(
        504, f"{what} by its deadline of {allowed_ms:.0f} ms: send fewer items in a request, or "
        f"allow more time with deadline_ms (at most {limit_ms:.0f}, the server's --deadline-ms)",
    )  # fmt: skip


def from_error(error: BitfitError) -> RequestFailed:
    """Return what a request is answered with where ``error`` stopped it."""
    status, code = next((s, c) for kind, s, c in _OF_ERRORS if isinstance(error, kind))
    headers = {"Retry-After": "1"} if status == 503 else None
    return RequestFailed(status, str(error), code=code, headers=headers)
