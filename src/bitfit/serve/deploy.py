"""Replicas in the processes of a Ray cluster, kept alive by Ray Serve (extra ``ray``).

Each replica is an application of its own: the front asks them one by one, for the least busy, for
the numbers of each, and for the one that remembers a version before. Ray Serve places them, looks
after their health, and starts one again where one ends; its own HTTP proxy is not used.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bitfit.cluster import connected, import_ray
from bitfit.errors import BitfitError, MissingExtra, UsageError
from bitfit.serve.link import Link, Lost
from bitfit.serve.replica import Job, Replica, Reply
from bitfit.serve.sources import is_url

HEALTH_SECONDS, HEALTH_TIMEOUT = 2.0, 10.0
"""How often Ray Serve asks for a replica's health, and how long it waits before it ends it."""
OBJECT_BYTES = 512 << 20
"""Shared memory for what is too large for a message: uploads."""


def check_options(ray: str, tasks: str | None) -> None:
    """Refuse what cannot be meant, before anything is started.

    Raises:
        MissingExtra: Ray Serve is not installed.
        UsageError: replicas would have no folder in common, or Ray is reached through a proxy.
    """
    if ray.startswith("ray://"):
        raise UsageError(
            f"--ray {ray}: replicas cannot be asked through Ray's client port; start the server on "
            "a machine of the cluster, with --ray auto or --ray HOST:PORT"
        )
    if tasks is None or is_url(tasks):
        raise UsageError(
            "--ray needs --tasks DIR, a folder that all replicas see"
            + ("" if tasks is None else f", and {tasks} is a URL")
            + ": by it a task that one is sent reaches the others"
        )
    _import_serve()


@contextmanager
def deployed(job: Job, count: int, address: str, name: str) -> Iterator[list[Link]]:
    """Return a context with links to ``count`` replicas, which end with it.

    Args:
        job: what they serve.
        count: how many.
        address: of the cluster, as :func:`bitfit.cluster.connected` takes it.
        name: of the server, its own on the cluster; what is left there under it is replaced.

    Raises:
        BitfitError: there is no cluster, or Ray Serve does not start them.
        UsageError: the machines have not the CPUs or GPUs.
    """
    is_local = address == "local"
    here = {"num_cpus": job.threads * count, "object_store_memory": OBJECT_BYTES}
    with connected(address, **here):
        serve = _import_serve()
        job = replace(
            job, base=_absolute(job.base),
            config=replace(job.config, tasks=str(Path(job.config.tasks or ".").absolute())),
        )  # fmt: skip
        needs = _needs(job, count)
        _check_room(needs, count)
        names = [f"{name}-{number}" for number in range(1, count + 1)]
        try:
            yield _run(serve, job, needs, names)
        finally:
            if not is_local:  # else all ends with the cluster
                _remove(serve, name)


def _import_serve() -> Any:
    import_ray()
    try:
        with warnings.catch_warnings():  # Ray's own, of how it uses pydantic
            warnings.simplefilter("ignore", DeprecationWarning)
            from ray import serve
    except ImportError as error:  # Ray without what its Serve needs
        raise MissingExtra("--ray", "ray") from error
    # One line in place of several for each replica that dies: the front's own.
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    return serve


def _ray_errors() -> tuple[type[Exception], ...]:
    """Return what Ray raises, and what its Serve does."""
    from ray.serve.exceptions import RayServeException

    return import_ray().exceptions.RayError, RayServeException


def _run(serve: Any, job: Job, needs: dict[str, float], names: list[str]) -> list[Link]:
    deployment = serve.deployment(Replica).options(
        name="replica", num_replicas=1,
        ray_actor_options={"num_cpus": needs["CPU"], "num_gpus": needs.get("GPU", 0)},
        # Each bounds what it accepts by itself, and says so to the client.
        max_ongoing_requests=2 * job.config.max_requests,
        health_check_period_s=HEALTH_SECONDS, health_check_timeout_s=HEALTH_TIMEOUT,
        graceful_shutdown_timeout_s=max(1.0, job.config.drain_seconds),
        graceful_shutdown_wait_loop_s=0.2,
    )  # fmt: skip
    targets = [
        serve.RunTarget(deployment.bind(job), name=name, route_prefix=None) for name in names
    ]
    failures: tuple[type[Exception], ...] = (RuntimeError, TimeoutError, *_ray_errors())
    try:
        serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
        _remove(serve, names[0].rpartition("-")[0])  # of a server that was killed
        handles = serve.run_many(targets)
    except failures as error:
        raise BitfitError(f"Ray Serve does not start the replicas: {error}") from error
    return [Link(str(number), _Caller(handle).send) for number, handle in enumerate(handles, 1)]


class _Caller:
    """Calls the methods of a replica."""

    def __init__(self, handle: Any) -> None:
        self._handle, self._errors = handle, import_ray().exceptions
        self._lost = _ray_errors()

    async def send(self, method: str, *arguments: Any, **named: Any) -> Reply:
        """Return the reply, from the replica that is there or the one that comes.

        Raises:
            Lost: it died, or is not to be reached.
            BitfitError: it failed in a way that nobody foresaw.
        """
        response = getattr(self._handle, method).remote(*arguments, **named)
        try:
            reply: Reply = await response
        except asyncio.CancelledError:
            response.cancel()
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise Lost from None  # cancelled where it was computed, and not here
        except self._errors.RayTaskError as error:
            last = str(error.cause).strip().rpartition("\n")[2]
            raise BitfitError(f"a replica failed: {type(error.cause).__name__}: {last}") from error
        except self._lost as error:
            raise Lost from error
        return reply


def _remove(serve: Any, name: str) -> None:
    """Remove a server's applications from the cluster."""
    ours = re.compile(re.escape(name) + r"-\d+")
    with suppress(RuntimeError, *_ray_errors()):
        for found in list(serve.status().applications):
            if ours.fullmatch(found):
                serve.delete(found)


def _needs(job: Job, count: int) -> dict[str, float]:
    """Return what one replica takes of a machine: GPUs are shared where there are too few."""
    needs: dict[str, float] = {"CPU": job.threads}
    wants_gpu = job.device.startswith("cuda") or (
        job.device == "auto" and torch.cuda.is_available()
    )
    if wants_gpu:
        there = sum(node["Resources"].get("GPU", 0) for node in _nodes())
        if there:  # so many on each, and down: parts that add up to more than one do not fit
            needs["GPU"] = math.floor(1000 / math.ceil(count / there)) / 1000
    return needs


def _check_room(needs: dict[str, float], count: int) -> None:
    """Refuse more replicas than fit; they would be waited for without end."""
    room = sum(
        min(int(node["Resources"].get(name, 0) / need) for name, need in needs.items() if need)
        for node in _nodes()
    )
    if room < count:
        each = " and ".join(f"{need:g} {name}" for name, need in needs.items())
        raise UsageError(
            f"the machines of the Ray cluster have room for {room} replicas of {each} each, not "
            f"for {count}: give --replicas or --threads that fit"
        )


def _nodes() -> list[dict[str, Any]]:
    return [node for node in import_ray().nodes() if node["Alive"]]


def _absolute(base: str) -> str:
    return os.path.abspath(base) if os.path.isdir(base) else base


def server_name(port: int) -> str:
    """Return what the server at a port of this machine is called on a cluster."""
    return f"bitfit-{socket.gethostname()}-{port}"
