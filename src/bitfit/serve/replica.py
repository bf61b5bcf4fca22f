"""One replica of a server: a service in a process of a Ray cluster, asked by the front."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from bitfit.bench.timing import describe_versions
from bitfit.errors import BitfitError, UsageError
from bitfit.rounding import StorageType
from bitfit.serve import logs
from bitfit.serve.failures import RequestFailed
from bitfit.serve.run import open_service
from bitfit.serve.service import Service
from bitfit.serve.settings import ServeConfig

MAX_LINES = 1000
"""Lines of the log that a replica keeps until the front takes them."""
STAY_SECONDS = 1.0
"""How often a replica asks itself whether its engine works."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a replica has to know."""

    base: str
    config: ServeConfig
    storage: StorageType = "fp32"
    max_resident: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    threads: int = 1
    versions: tuple[tuple[str, str | None], ...]
    """Of the packages that answers depend on, at the front."""


@dataclass(frozen=True)
class Facts:
    """What a replica says of itself when it can be asked."""

    pid: int
    host: str
    base: dict[str, Any]
    tasks: int


@dataclass(frozen=True)
class Reply:
    """What came of a call. Errors that a client may see are values: Ray would wrap them."""

    value: Any = None
    failed: BitfitError | RequestFailed | None = None
    is_lost: bool = False
    """The replica cannot answer, though its process is there."""


@dataclass(frozen=True)
class Line:
    """A line of a replica's log."""

    level: int
    event: str
    fields: dict[str, Any]


def versions() -> tuple[tuple[str, str | None], ...]:
    """Return the versions of what answers depend on."""
    found = describe_versions()
    return tuple((name, found[name]) for name in ("bitfit", "torch", "transformers"))


class Replica:
    """The class of a Ray Serve deployment. It opens nothing before :meth:`start`.

    Args:
        job: what to serve, and how.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._service: Service | None = None
        self._starting = asyncio.Lock()
        self._lines = _Lines()

    async def start(self) -> Reply:
        """Open the base and the tasks, if that was not done, and return the :class:`Facts`."""
        async with self._starting:
            if self._service is None:
                try:
                    service = await asyncio.to_thread(self._open)
                    await service.start()
                except BitfitError as error:
                    # Of one class: others may not be made again from their message alone.
                    kind = UsageError if isinstance(error, UsageError) else BitfitError
                    return Reply(failed=kind(f"{socket.gethostname()}: {error}"))
                self._service = service
        service = self._service
        if service.broken:
            return Reply(is_lost=True)
        return Reply(Facts(os.getpid(), socket.gethostname(), service.base, len(service.shelf)))

    def _open(self) -> Service:
        job = self._job
        for (name, found), (_, expected) in zip(versions(), job.versions, strict=True):
            if found != expected:
                raise BitfitError(f"it has {name} {found}, and the server {expected}")
        torch.set_num_threads(job.threads)
        logs.configure()
        logs.LOGGER.addHandler(self._lines)
        return open_service(
            job.base, job.config, storage=job.storage, max_resident=job.max_resident,
            dtype=job.dtype, device=job.device, revision=job.revision,
            trust_remote_code=job.trust_remote_code,
        )  # fmt: skip

    async def stay(self) -> Reply:
        """Return when nothing can be answered any more: for as long as all is well, never."""
        while self._service is not None and not self._service.broken:
            await asyncio.sleep(STAY_SECONDS)
        return Reply(is_lost=True)

    async def call(self, method: str, *arguments: Any, **named: Any) -> Reply:
        """Return what the service answers to one of its methods."""
        service = self._service
        if service is None or service.broken:
            return Reply(is_lost=True)
        try:
            match method:
                case "info":
                    return Reply(service.shelf.info(*arguments))
                case "collect":
                    service.measure()
                    return Reply(list(service.metrics.registry.collect()))
                case "look":
                    await service.look()
                    return Reply(self._lines.take())
                case "ping":
                    return Reply(self._lines.take())
                case _:
                    return Reply(await getattr(service, method)(*arguments, **named))
        except (BitfitError, RequestFailed) as error:
            return Reply(failed=error)

    def check_health(self) -> None:
        """Raise where nothing is answered any more: Ray Serve then starts another process."""
        if self._service is not None and self._service.broken:
            raise RuntimeError("the engine has stopped")


class _Lines(logging.Handler):
    """Keeps the log's lines for the front, the last so many."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: deque[Line] = deque(maxlen=MAX_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        fields = dict(getattr(record, "fields", {}))
        if record.exc_info:
            fields["trace"] = logging.Formatter().formatException(record.exc_info)
        self._kept.append(Line(record.levelno, record.getMessage(), fields))

    def take(self) -> list[Line]:
        """Return what was kept, and keep it no more."""
        return [self._kept.popleft() for _ in range(len(self._kept))]
