"""The way from the front to one replica, whichever process is that replica at the time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from bitfit.errors import BitfitError
from bitfit.serve.replica import Facts, Reply

Send = Callable[..., Awaitable[Reply]]


class Lost(Exception):
    """A replica died, or cannot be reached, and what was sent to it has no answer."""


class Link:
    """The way to one replica. What stands in a replica's place after its death has the same link.

    Args:
        name: of the replica, in metrics and the log.
        send: calls a method of the replica by name, waiting for one to be there.
    """

    def __init__(self, name: str, send: Send) -> None:
        self.name, self._send = name, send
        self.facts: Facts | None = None
        self.is_ready = False
        self.open = 0
        """Texts and other requests sent to it and not answered."""
        self.gone: asyncio.Future[None] | None = None
        """Done when the replica that was started last is lost."""
        self._tie: asyncio.Task[None] | None = None

    async def start(self) -> Facts:
        """Return what a replica says of itself once it can be asked.

        Raises:
            Lost: it died meanwhile.
            BitfitError: it cannot open the base or the tasks.
        """
        await self.close()  # one that was refused may still be there, and a call to it open
        reply = await self._send("start")
        if reply.is_lost:
            raise Lost
        if reply.failed is not None:
            raise reply.failed
        facts: Facts = reply.value
        loop = asyncio.get_running_loop()
        self.facts, self.gone = facts, loop.create_future()
        self._tie = loop.create_task(self._stay(self.gone))
        return facts

    async def _stay(self, gone: asyncio.Future[None]) -> None:
        """Have a call open that a replica never answers: its end is the replica's.

        So the end is known at once. A call begun after it would wait for the next replica.
        """
        try:
            await self._send("stay")
        except (Lost, BitfitError):
            pass
        finally:  # whatever it was: else nobody would start it again
            self._lose(gone)

    def _lose(self, gone: asyncio.Future[None]) -> None:
        if not gone.done():
            self.is_ready = False
            gone.set_result(None)

    async def close(self) -> None:
        """Let go of the replica; it can be started again."""
        self.is_ready = False
        if self._tie is not None:
            self._tie.cancel()
            await asyncio.gather(self._tie, return_exceptions=True)

    async def call(self, method: str, *arguments: Any, weight: int = 1, **named: Any) -> Any:
        """Return what a method of the replica's service returns.

        Raises:
            Lost: the replica is no more.
            BitfitError: as the method.
            RequestFailed: as the method.
        """
        gone = self.gone
        if gone is None or gone.done():
            raise Lost
        work: asyncio.Future[Reply] = asyncio.ensure_future(
            self._send("call", method, *arguments, **named)
        )
        self.open += weight
        try:
            either: set[asyncio.Future[Any]] = {work, gone}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            reply = work.result() if work.done() else Reply(is_lost=True)
        except Lost:
            reply = Reply(is_lost=True)
        finally:
            self.open -= weight
            work.cancel()  # the client went away, or the replica
            work.add_done_callback(_ignore)
        if reply.is_lost:
            self._lose(gone)
            raise Lost
        if reply.failed is not None:
            raise reply.failed
        return reply.value


def _ignore(work: asyncio.Future[Any]) -> None:
    if not work.cancelled():
        work.exception()
