"""Ray clusters (extra ``ray``): what an address may be, and to be connected to one."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bitfit.errors import BitfitError, MissingExtra, UsageError

_PLACE = re.compile(r"(?:ray://)?(\S+):([0-9]{1,5})")
_LAST_PORT = 65_535
# How long an address may take to answer at all; Ray itself tries for minutes.
_ANSWER_SECONDS = 10.0


def check_address(address: str) -> None:
    """Refuse ``--ray`` before anything is written.

    Raises:
        MissingExtra: Ray is not installed.
        UsageError: neither ``local`` nor ``auto`` nor an address.
    """
    import_ray()
    if address in ("local", "auto"):
        return
    place = _PLACE.fullmatch(address)
    if place is None or not 0 < int(place[2]) <= _LAST_PORT:
        raise UsageError(
            f"--ray {address!r}: expected local (a cluster of this machine alone), auto (the one "
            f"that runs here), HOST:PORT or ray://HOST:PORT, PORT from 1 to {_LAST_PORT}"
        )


@contextmanager
def connected(address: str | None, **local: Any) -> Iterator[None]:
    """Be connected to a Ray cluster; within another such ``with`` this does nothing.

    Args:
        address: ``local`` starts one of this machine alone, which ends with the ``with``; ``auto``
            is the one that runs here; ``HOST:PORT``, ``ray://HOST:PORT``; None: none is needed.
        **local: more for ``ray.init`` where it starts one.

    Raises:
        MissingExtra: Ray is not installed.
        UsageError: an address that cannot be meant.
        BitfitError: there is no cluster.
    """
    if address is None:
        yield
        return
    check_address(address)
    ray = import_ray()
    if ray.is_initialized():
        yield
        return
    _connect(ray, address, local)
    try:
        yield
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str, local: dict[str, Any]) -> None:
    # Ours to say: nothing is reported to anyone.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        options |= {"include_dashboard": False} | local
    try:
        if place := _PLACE.fullmatch(address):
            host, port = place[1].strip("[]"), int(place[2])
            socket.create_connection((host, port), timeout=_ANSWER_SECONDS).close()
        with _own_signals():
            ray.init(address=address, **options)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        hint = "" if address in ("local", "auto") else (
            ". If it runs and asks for a token, set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN if the "
            "token is not in ~/.ray/auth_token"
        )  # fmt: skip
        raise BitfitError(
            f"--ray {address}: no Ray cluster can be reached or started there: {error}{hint}"
        ) from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep what a signal does here: Ray puts its own in place of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def import_ray() -> Any:
    """Return Ray.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("--ray", "ray") from error
    return ray
