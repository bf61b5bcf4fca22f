"""Clients that ask a server of this machine: as many as it can answer, or more than that."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bitfit.bench.connection import Connection, Reply
from bitfit.errors import BitfitError


@dataclass(frozen=True)
class Load:
    """What became of requests."""

    seconds: float
    """From the first to the last answer."""
    times: Sequence[float]
    """Seconds of each that was answered with 200."""
    refused: int = 0
    """Answered with 429 or 503."""
    failed: int = 0
    """Answered otherwise, or not at all."""


async def closed_loop(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> Load:
    """Return what clients got of which each always has one request open.

    Raises:
        BitfitError: one was not answered with 200.
    """
    times: list[float] = []
    until = time.perf_counter() + seconds

    async def client(number: int) -> None:
        connection, turn = Connection(port), number
        try:
            while (began := time.perf_counter()) < until:
                reply = await connection.send(requests[turn % len(requests)])
                _expect_ok(reply)
                times.append(time.perf_counter() - began)
                turn += clients
        except (OSError, EOFError) as error:
            raise BitfitError(f"a request was not answered: {error}") from error
        finally:
            connection.close()

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(clients):
            group.create_task(client(number))
    return Load(time.perf_counter() - began, times)


def _expect_ok(reply: Reply) -> None:
    if reply.status != 200:
        raise BitfitError(f"a request was answered with {reply.status}: {reply.body[:300]!r}")


async def open_loop(port: int, requests: Sequence[bytes], rate: float, seconds: float) -> Load:
    """Return what became of requests that come at ``rate`` a second, answered or not."""
    idle: list[Connection] = []
    times: list[float] = []
    counts = {"refused": 0, "failed": 0}

    async def one(request: bytes) -> None:
        connection = idle.pop() if idle else Connection(port)
        began = time.perf_counter()
        try:
            status = (await connection.send(request)).status
        except (OSError, EOFError):
            status = 0
        if status == 200:
            times.append(time.perf_counter() - began)
        else:
            counts["refused" if status in (429, 503) else "failed"] += 1
        idle.append(connection)

    number, began = 0, time.perf_counter()
    async with asyncio.TaskGroup() as group:
        while (spent := time.perf_counter() - began) < seconds:
            while number < spent * rate:
                group.create_task(one(requests[number % len(requests)]))
                number += 1
            await asyncio.sleep(0.002)
    spent = time.perf_counter() - began
    for connection in idle:
        connection.close()
    return Load(spent, times, **counts)
