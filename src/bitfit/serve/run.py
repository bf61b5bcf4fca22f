"""From settings to a server that runs until it is told to stop."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from bitfit.encoder import Encoder, open_encoder
from bitfit.errors import BitfitError, UsageError
from bitfit.rounding import StorageType
from bitfit.serve.app import Serves, make_app
from bitfit.serve.auth import Keys, check_bind
from bitfit.serve.connections import HEAD_BYTES, READ_BYTES, Bounds, guarded, most_connections
from bitfit.serve.engine import Engine
from bitfit.serve.logs import log
from bitfit.serve.service import Service
from bitfit.serve.settings import ServeConfig
from bitfit.serve.shelf import Shelf
from bitfit.serve.sources import is_url
from bitfit.serve.uploads import Uploads

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75


def open_service(
    base: str | Encoder = "minilm",
    config: ServeConfig | None = None,
    *,
    storage: StorageType = "fp32",
    max_resident: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Service:
    """Return a service on ``base``, its tasks not yet loaded: ``start`` does that.

    Args:
        base: where the base is, or an open encoder.
        config: limits and times.
        storage: how rows are held in memory: ``fp32``, ``fp16``, ``bf16``, ``int8``.
        max_resident: rows in memory at most; the least recently used are loaded again when asked.
        dtype: precision of the frozen weights.
        device: where it runs.
        revision: branch, tag or commit of the base on the hub.
        trust_remote_code: run code that comes with the base. Only where you trust its author.

    Raises:
        BaseModelError: the base cannot be loaded.
        UsageError: the folder of tasks is none.
    """
    config = config or ServeConfig()
    folder = None if config.tasks is None or is_url(config.tasks) else Path(config.tasks)
    if folder is not None:
        _check_folder(folder)
    if isinstance(base, str):
        base = open_encoder(
            base, dtype, device, revision=revision, trust_remote_code=trust_remote_code
        )
    shelf = Shelf(base, storage=storage, max_resident=max_resident)
    engine = Engine(shelf, max_tokens=config.max_tokens)
    uploads = None if folder is None else Uploads(folder)
    return Service(shelf, engine, config, base=describe_base(base), uploads=uploads)


def describe_base(encoder: Encoder) -> dict[str, Any]:
    """Return what a server says of its base."""
    return {
        "name": encoder.base.name,
        "sha256": encoder.base.identity.sha256,
        "family": encoder.base.family,
        "dtype": encoder.computes_in,
        "device": str(encoder.device),
        "packed": encoder.packed,
    }


def listen(config: ServeConfig) -> socket.socket:
    """Return a socket bound to the address of ``config``, not yet listening.

    The port is kept from now on, and who connects is refused by the system until :func:`serve`
    takes requests: nobody waits for a base that loads.

    Raises:
        UsageError: the port is taken, or not allowed, or there is no such address.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UsageError(f"--host {config.host}: no such address ({error.strerror})") from error
    # With the protocol named, asyncio turns off Nagle's algorithm on what is accepted. Without, the
    # body of a small answer waits for the client to confirm its head: 40 ms.
    found = socket.socket(family, kind, protocol)
    try:
        _bind(found, address)
    except OSError as error:
        found.close()
        raise UsageError(_why_not(config, error)) from error
    return found


def _bind(listener: socket.socket, address: Any) -> None:
    """Bind, so that nobody else can, where that is possible.

    Two sockets that both say SO_REUSEADDR may be bound to one port while none of them listens: two
    servers started together would each load a base before one is told. So it is first tried
    without; but then what is left of a former server's connections (TIME_WAIT, a minute) keeps the
    port, which is no reason to refuse a restart.
    """
    try:
        listener.bind(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)


def _begin_to_listen(listener: socket.socket, config: ServeConfig) -> None:
    # The connections accepted inherit it: the port is free at once for the server after this one.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.listen(BACKLOG)
    except OSError as error:  # another was bound too, and was ready before
        raise UsageError(_why_not(config, error)) from error


def _why_not(config: ServeConfig, error: OSError) -> str:
    where = f"{config.host}:{config.port}"
    if error.errno == errno.EADDRINUSE:
        return f"{where} is taken by another program; choose another port with --port (0: any)"
    if error.errno == errno.EACCES:
        return f"{where} is not allowed to you; ports from 1024 up are"
    return f"{where}: cannot listen there: {error.strerror or error}"


async def serve(
    service: Serves,
    keys: Keys,
    listener: socket.socket,
    *,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT, then answer what was accepted and return.

    A second signal ends at once.

    Args:
        service: not yet started.
        keys: who may do what.
        listener: from :func:`listen`.
        on_ready: called when requests are taken.

    Raises:
        UsageError: it would be open to other machines without keys, or another program that
            shared the port listens there by now.
        BitfitError: the tasks cannot be loaded.
    """
    check_bind(service.config, keys)
    bounds = Bounds(answer_seconds=service.config.body_seconds, most=most_connections())
    server = _Server(
        uvicorn.Config(
            make_app(service, keys), lifespan="off", log_config=None, access_log=False,
            server_header=False, proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_SECONDS,
            backlog=BACKLOG, ws="none", http=guarded(bounds),
            h11_max_incomplete_event_size=HEAD_BYTES + READ_BYTES,
            timeout_graceful_shutdown=_whole(service.config.drain_seconds),
        ),
        service,
    )  # fmt: skip
    await service.start()
    try:
        _begin_to_listen(listener, service.config)  # before anybody is told to come
        log("started", tasks=service.task_count, keys=len(keys), base=service.base.get("name"))
        on_ready()
        await server.serve(sockets=[listener])
    finally:
        await service.stop(drain=not server.force_exit)
        log("stopped")


class _Server(uvicorn.Server):
    """uvicorn that says first that it stops, and that ends a process as if it were done."""

    def __init__(self, config: uvicorn.Config, service: Serves) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop after what was accepted; at once where it was asked before."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for open requests, then close."""
        self._service.ready = False
        await super().shutdown(sockets)


def _whole(seconds: float) -> int:
    return max(1, round(seconds)) if seconds else 0  # None would wait for ever


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UsageError(f"--tasks {folder}: is a file; expected a folder of task files") from None
    except OSError as error:
        raise BitfitError(f"{folder}: cannot be a folder: {error.strerror or error}") from error
