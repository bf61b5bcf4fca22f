"""What a connection may cost before a request of it is known, and after its answer is made.

uvicorn bounds neither: it waits for ever for the head of a first request, keeps a head of any size
(with httptools), reads for ever what is left of a body that was answered, and holds for ever an
answer that nobody reads. Whoever reaches the port, without a key, could so take all its memory and
all its file descriptors. :func:`guarded` is uvicorn's protocol with these bounds.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from bitfit.serve.edge import dump
from bitfit.serve.failures import RequestFailed
from bitfit.serve.logs import log

HEAD_SECONDS = 10.0
"""How long the head of a request may take, from its first byte; of the first, from the connection's
beginning."""
HEAD_BYTES = 64 << 10
"""Of a request line and headers. What comes complete in one read may be larger."""
READ_BYTES = 256 << 10
"""What event loops read at once."""
OTHER_FILES = 256
"""File descriptors that are left for what is no connection: task files, logs, libraries."""


@dataclass
class Bounds:
    """What the connections of one server may cost."""

    head_seconds: float = HEAD_SECONDS
    head_bytes: int = HEAD_BYTES
    answer_seconds: float = 30.0
    """How long a client may take to read what was sent."""
    most: int | None = None
    """Connections at one time. For one more the one is closed that is silent for longest, or
    itself where none is silent: who sends nothing keeps out nobody. None: any number."""
    silent: dict[_Guard, None] = field(default_factory=dict, init=False)
    """Connections that have not sent a whole head yet, the oldest first."""
    is_told: bool = field(default=False, init=False)
    """Whether the log has that there were too many."""


def most_connections() -> int | None:
    """Return how many connections leave file descriptors for the rest; None: any number."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return None
    return files - min(OTHER_FILES, files // 2)


def guarded(
    bounds: Bounds, http: type[asyncio.Protocol] = AutoHTTPProtocol
) -> type[asyncio.Protocol]:
    """Return a protocol of uvicorn, by default the one that it would choose, with bounds."""
    return type("Guarded", (_Guard, http), {"bounds": bounds})


class _Guard(asyncio.Protocol):
    """Goes before a protocol of uvicorn, whose names these are."""

    bounds: Bounds
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    connections: set[Any]
    flow: Any
    cycle: Any
    """The request that came last, and its answer; None before the first head is whole."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._known: Any = None  # the cycle of the last head that was whole
        self._head = 0  # bytes since then, less those of its body
        self._head_timer = _Timer(self.loop, self.bounds.head_seconds)
        self._answer_timer = _Timer(self.loop, self.bounds.answer_seconds)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # pause_writing: not all that was sent is read
        if self.bounds.most is not None and len(self.connections) > self.bounds.most:
            self._tell()
            silent = next(iter(self.bounds.silent), self)
            self.bounds.silent.pop(silent, None)
            silent.transport.abort()
            if silent is self:
                return
        self.bounds.silent[self] = None
        self._head_timer.start(transport.abort)

    def _tell(self) -> None:
        if not self.bounds.is_told:
            self.bounds.is_told = True
            log("too_many_connections", level=logging.WARNING, limit=self.bounds.most,
                message="silent and further ones are closed; ulimit -n has more files")  # fmt: skip

    def connection_lost(self, exc: Exception | None) -> None:
        self.bounds.silent.pop(self, None)
        self._head_timer.stop()
        self._answer_timer.stop()
        super().connection_lost(exc)

    # --- heads ----------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        is_body = self._is_open and self.cycle.more_body
        super().data_received(data)
        if self.cycle is not self._known:
            self._known, self._head = self.cycle, 0
            self.bounds.silent.pop(self, None)
            self._head_timer.stop()
        elif not is_body and not self.flow.read_paused and not self.transport.is_closing():
            self._head += len(data)
            if self._head > self.bounds.head_bytes:
                self._refuse()
            elif not self._is_open:
                self._head_timer.start(self.transport.abort)

    @property
    def _is_open(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self) -> None:
        if not self._is_open:  # else it would stand before the answer
            limit = self.bounds.head_bytes
            body = dump(RequestFailed(431, f"more than {limit} bytes before the body").to_json())
            self.transport.write(
                b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n"
                b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
                % (len(body), body)
            )
        self.transport.close()

    # --- answers --------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._answer_timer.start(self.transport.abort)

    def resume_writing(self) -> None:
        self._answer_timer.stop()
        super().resume_writing()


class _Timer:
    """Calls once after so many seconds, if it is not stopped before."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._loop, self._seconds = loop, seconds
        self._handle: asyncio.TimerHandle | None = None

    def start(self, call: Callable[[], object]) -> None:
        """Begin, if that was not done."""
        if self._handle is None:
            self._handle = self._loop.call_later(self._seconds, call)

    def stop(self) -> None:
        """End it; it can be started again."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
