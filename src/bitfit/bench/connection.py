"""HTTP/1.1 as bare as can be: what is measured is the server, not the client."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_HEAD_BYTES = 1 << 16
_LENGTH = re.compile(rb"^content-length: *(\d+)", re.IGNORECASE | re.MULTILINE)
_CLOSES = re.compile(rb"^connection: *close", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Reply:
    """What a server answered."""

    status: int
    body: bytes

    def json(self) -> Any:
        """Return the body's JSON."""
        return json.loads(self.body)


class Connection:
    """A connection to this machine that is kept from one request to the next.

    It reads answers with a ``Content-Length``, or with a status that has no body.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, request: bytes) -> Reply:
        """Send the bytes of a request and return its whole answer.

        Raises:
            OSError: there is no connection, or it broke.
            EOFError: it was closed before the answer was whole.
        """
        try:
            return await self._send(request)
        except BaseException:  # what comes next on it would be the answer to this request
            self.close()
            raise

    async def begin(self, request: bytes) -> None:
        """Send a request whose answer nobody will read: :meth:`close` is next."""
        _, writer = await self._open()
        writer.write(request)
        await writer.drain()

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _send(self, request: bytes) -> Reply:
        reader, writer = await self._open()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = _LENGTH.search(head)
        body = await reader.readexactly(0 if length is None else int(length[1]))
        if _CLOSES.search(head):
            self.close()
        return Reply(int(head[9:12]), body)

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(
                "127.0.0.1", self.port, limit=MAX_HEAD_BYTES
            )
        return self._streams


def request_bytes(method: str, path: str, body: bytes = b"", media: str = "") -> bytes:
    """Return a request as it goes over the wire."""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    if media:
        head += f"Content-Type: {media}\r\n"
    return head.encode("ascii") + b"\r\n" + body


def json_bytes(path: str, value: Mapping[str, Any] | Sequence[Any]) -> bytes:
    """Return a POST of JSON as it goes over the wire."""
    return request_bytes("POST", path, json.dumps(value).encode(), "application/json")
