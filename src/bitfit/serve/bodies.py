"""Request bodies, bounded while they are read: one by one, and all that are held together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request

from bitfit.serve.failures import RequestFailed


class Bodies:
    """Reads bodies, and counts the bytes of those that are in use.

    Args:
        max_held: bytes of all bodies in use.
        seconds: how long one may take to come.
    """

    def __init__(self, *, max_held: int, seconds: float) -> None:
        self._max_held, self._seconds = max_held, seconds
        self.held = 0
        """Bytes in use."""

    @asynccontextmanager
    async def read(self, request: Request, limit: int) -> AsyncIterator[bytes]:
        """Return a context with the whole body, at most ``limit`` bytes.

        Raises:
            RequestFailed: 413 too large (by Content-Length before a byte is read), 408 too slow,
                503 too many bodies at once, 499 the client went away.
        """
        data = bytearray()
        declared = _declared(request)
        _check(declared, limit)
        taken = 0
        try:
            taken = self._take(declared)
            async with asyncio.timeout(self._seconds):
                async for chunk in request.stream():
                    _check(len(data) + len(chunk), limit)
                    if len(data) + len(chunk) > taken:  # no length was given
                        taken += self._take(len(data) + len(chunk) - taken)
                    data += chunk
        except ClientDisconnect:
            self.held -= taken
            raise RequestFailed(499, "the client went away", code="client_gone") from None
        except TimeoutError:
            self.held -= taken
            raise RequestFailed(408, f"the body did not come within {self._seconds:g} s") from None
        except BaseException:
            self.held -= taken
            raise
        body = bytes(data)
        data.clear()  # one copy is held, and counted
        try:  # apart from the above: what times out in here is no body that did not come
            yield body
        finally:
            self.held -= taken

    def _take(self, count: int) -> int:
        if self.held + count > self._max_held:
            raise RequestFailed(
                503, "too many large requests at once; try again in 1 s", code="busy",
                headers={"Retry-After": "1"},
            )  # fmt: skip
        self.held += count
        return count


def _declared(request: Request) -> int:
    text = request.headers.get("content-length")
    return int(text) if text is not None and text.isdecimal() and len(text) < 20 else 0


def _check(size: int, limit: int) -> None:
    if size > limit:
        raise RequestFailed(413, f"the body has more than {limit} bytes", details={"limit": limit})
