"""Several replicas as one service: chosen, asked again elsewhere when one dies, kept alike.

The front holds the address, the keys and the limits of requests, and no model. What it accepted
is sent to the replica with the fewest texts open. Where that one dies, it is sent to another:
answers change nothing, and a change of a task has a name by which it is made once.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

import bitfit
from bitfit.errors import BitfitError, UnknownTask
from bitfit.serve.engine import Item
from bitfit.serve.failures import RequestFailed, closing, too_late
from bitfit.serve.link import Link, Lost
from bitfit.serve.logs import LOGGER, log
from bitfit.serve.metrics import Labelled, Metrics
from bitfit.serve.replica import Facts, Line
from bitfit.serve.service import Found, describe_limits, outcome
from bitfit.serve.settings import ServeConfig
from bitfit.serve.shelf import TaskInfo

TRIES = 3
"""How many replicas a request may be sent to: one that ends them all would else end each."""
STARTS = 5
"""How often a replica may end before it can be asked, when the server starts."""
BACK_SECONDS = 30.0
"""How long what was lost waits for a replica when there is none left."""
GRACE_SECONDS = 2.0
"""How long a replica may be late with what has a deadline."""
LOOK_SECONDS = 10.0
"""How long a change of a task waits for all replicas to take it over."""
STATE_SECONDS = 2.0
"""How long a replica may take to say how it does; then it is left out."""
BEAT_SECONDS = 5.0
"""How often a replica is asked whether it is there, where the folder is not watched."""


class Front:
    """What :class:`bitfit.serve.service.Service` is for one process, over replicas of it.

    Args:
        links: one to each replica.
        config: limits and times.
    """

    def __init__(self, links: Sequence[Link], config: ServeConfig) -> None:
        self.links, self.config = tuple(links), config
        self.metrics = Metrics(task_labels=0)
        self.base: dict[str, Any] = {}
        self.task_count = 0
        self._is_open = False
        self._changing = asyncio.Lock()
        self._keepers: list[asyncio.Task[None]] = []
        self._turn = 0
        at = self.metrics.registry
        self._live = Gauge("bitfit_replicas", "Replicas that can be asked", registry=at)
        self._deaths = Counter("bitfit_replica_deaths", "Replicas that were lost", registry=at)
        self._again = Counter(
            "bitfit_retried_requests", "Requests sent to another replica, the first being lost",
            registry=at,
        )  # fmt: skip

    # --- life -----------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether requests are taken: not told to stop, and a replica is there."""
        return self._is_open and any(link.is_ready for link in self.links)

    @ready.setter
    def ready(self, value: bool) -> None:
        self._is_open = value

    def refusal(self) -> RequestFailed:
        """Return what a request is answered with where none is taken."""
        if not self._is_open:
            return closing()
        return RequestFailed(
            503, "no replica can be asked now; try again in 5 s", code="no_replica",
            headers={"Retry-After": "5"},
        )  # fmt: skip

    @property
    def broken(self) -> bool:
        """Whether this process works no more; a replica that does not is replaced."""
        return False

    async def start(self) -> None:
        """Wait until all replicas can be asked, and keep them so.

        Raises:
            BitfitError: a replica cannot open the base or the tasks, or another base than others.
        """
        async with asyncio.TaskGroup() as group:
            starts = [group.create_task(self._first(link)) for link in self.links]
        for start in starts:
            if (error := start.result()) is not None:
                raise error
        self.task_count = max(link.facts.tasks for link in self.links if link.facts is not None)
        loop = asyncio.get_running_loop()
        for link in self.links:
            self._keepers += [
                loop.create_task(self._keep(link)),
                loop.create_task(self._beat(link)),
            ]
        self._is_open = True

    async def _first(self, link: Link) -> BitfitError | None:
        for _ in range(STARTS):
            try:
                await self._begin(link)
            except Lost:
                log("replica_lost", level=logging.WARNING, replica=link.name,
                    message="it ended before it could be asked; it is started again")  # fmt: skip
                await asyncio.sleep(0.5)
            except BitfitError as error:
                return error
            else:
                return None
        return BitfitError(
            f"replica {link.name} ended {STARTS} times before it could be asked: perhaps there is "
            "too little memory for the base; what it printed is in Ray's folder, "
            "/tmp/ray/session_latest/logs"
        )

    async def _begin(self, link: Link) -> None:
        """Make a replica that was started one that is asked: with all changes until now."""
        facts = await link.start()
        async with self._changing:
            self._check_base(facts)
            await self._look(link)
            link.is_ready = link.gone is not None and not link.gone.done()

    def _check_base(self, facts: Facts) -> None:
        base = self.base = self.base or facts.base
        if facts.base["sha256"] != base["sha256"]:
            raise BitfitError(
                f"{facts.host}: its base {facts.base['name']!r} is not that of the others (SHA-256 "
                f"{facts.base['sha256'][:12]}…, expected {base['sha256'][:12]}…); expected the "
                "same --base on each machine"
            )

    async def _keep(self, link: Link) -> None:
        """Wait for the end of a replica, then for the one in its place, for ever."""
        while True:
            assert link.gone is not None
            await asyncio.shield(link.gone)
            self._deaths.inc()
            assert link.facts is not None
            log("replica_lost", level=logging.WARNING, replica=link.name, pid=link.facts.pid,
                machine=link.facts.host)  # fmt: skip
            while not link.is_ready:
                try:
                    await self._begin(link)
                except Lost:
                    await asyncio.sleep(0.5)
                except BitfitError as error:
                    log("replica_refused", level=logging.ERROR, replica=link.name,
                        message=str(error))  # fmt: skip
                    await asyncio.sleep(BEAT_SECONDS)
                except Exception:  # a bug; without this loop the replica would never be back
                    log("replica_refused", level=logging.ERROR, trace=True, replica=link.name)
                    await asyncio.sleep(BEAT_SECONDS)
            log("replica_back", replica=link.name, pid=link.facts.pid, machine=link.facts.host)

    async def _beat(self, link: Link) -> None:
        """Have a replica look at the folder, and find out when it is no more."""
        seconds = self.config.watch_seconds
        while True:
            await asyncio.sleep(seconds or BEAT_SECONDS)
            try:
                await self._look_if_there(link, "look" if seconds else "ping")
            except Exception:  # a bug; the next look may go well
                log("watch_failed", level=logging.ERROR, trace=True, replica=link.name)

    async def _look(self, link: Link, how: str = "look") -> None:
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                lines: list[Line] = await link.call(how)
        except TimeoutError:
            log("watch_failed", level=logging.WARNING, replica=link.name,
                message=f"no answer in {LOOK_SECONDS:g} s")  # fmt: skip
            return
        except (BitfitError, RequestFailed) as error:
            log("watch_failed", level=logging.WARNING, replica=link.name, message=str(error))
            return
        for line in lines:  # not by log(): a trace is text by now
            fields = {"replica": link.name, **line.fields}
            LOGGER.log(line.level, line.event, extra={"fields": fields})

    async def stop(self, *, drain: bool = True) -> None:
        """Keep the replicas no more. What was accepted was answered before, or never is."""
        self._is_open = False
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*(link.close() for link in self.links))

    # --- asking ---------------------------------------------------------------------------------

    async def _ask(
        self, method: str, *arguments: Any, first: Link | None = None, weight: int = 1,
        until: float | None = None, **named: Any,
    ) -> Any:  # fmt: skip
        """Return what a replica answers; where it dies, what another does.

        Args:
            method: of the service.
            *arguments: its arguments.
            first: the replica to ask first; by default the one with the least to do.
            weight: texts in it.
            until: when it is too late, by the loop's clock; the replica is told as ``deadline_ms``.
            **named: its arguments by name.

        Raises:
            RequestFailed: 503, there is no replica; 500, each that it was sent to was lost; or as
                the method.
            BitfitError: as the method.
        """
        loop = asyncio.get_running_loop()
        for attempt in range(TRIES):
            link = first if first is not None and first.is_ready else self._choose()
            if link is None and attempt:
                link = await self._wait_for_one(until)
            if link is None:
                break
            if attempt:
                self._again.inc()
                log("retry", level=logging.WARNING, call=method, replica=link.name)
            if until is not None:
                named["deadline_ms"] = max(1.0, (until - loop.time()) * 1000)
            try:
                return await link.call(method, *arguments, weight=weight, **named)
            except Lost:
                first = None
        if attempt and "by" in named:  # no 503: a client that repeats it could make it twice
            raise RequestFailed(
                500, "its replica was lost, and no other made it: look whether the change was "
                "made before you repeat it", code="lost",
            )  # fmt: skip
        if link is not None:  # no 503: a client that repeats it could end the others too
            raise RequestFailed(
                500, f"each of the {TRIES} replicas that it was sent to was lost before it "
                "answered, perhaps of this request", code="lost",
            )  # fmt: skip
        raise self.refusal()

    def _choose(self) -> Link | None:
        """Return the replica with the fewest texts open; of several, each in turn."""
        ready = [link for link in self.links if link.is_ready]
        if not ready:
            return None
        self._turn += 1
        turn = self._turn % len(ready)
        return min(ready[turn:] + ready[:turn], key=lambda link: link.open)

    async def _wait_for_one(self, until: float | None) -> Link | None:
        loop = asyncio.get_running_loop()
        end = loop.time() + BACK_SECONDS
        end = end if until is None else min(end, until)
        while (link := self._choose()) is None and loop.time() < end:
            await asyncio.sleep(0.1)
        return link

    async def predict(
        self, items: Sequence[Item], *, deadline_ms: float | None = None
    ) -> list[Found]:
        """Return the answer to each item, or the error in its place.

        Raises:
            RequestFailed: 422, 429, 503 or 504: none of them was answered.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        allowed = min(deadline_ms or self.config.deadline_ms, self.config.deadline_ms)
        until = began + allowed / 1000
        try:
            async with asyncio.timeout_at(until + GRACE_SECONDS):
                found: list[Found] = await self._ask(
                    "predict", list(items), weight=len(items), until=until
                )
        except TimeoutError:
            self.metrics.refused("deadline")
            raise too_late("its replica did not answer", allowed, self.config.deadline_ms) from None
        except RequestFailed as failed:
            if failed.status == 504:  # the replica knows only what was left of the deadline
                raise too_late("it was not answered", allowed, self.config.deadline_ms) from None
            if failed.code in ("no_replica", "lost"):  # what a replica refused, it counts itself
                self.metrics.refused(failed.code)
            raise
        self.metrics.predicted(loop.time() - began, [(outcome(one)[0], None) for one in found])
        return found

    async def infos(self) -> list[TaskInfo]:
        """Return every task, by name."""
        found: list[TaskInfo] = await self._ask("infos")
        return found

    async def describe(self, name: str) -> tuple[TaskInfo, dict[str, Any]]:
        """Return a task, and what its file says.

        Raises:
            UnknownTask: there is no such task.
        """
        found: tuple[TaskInfo, dict[str, Any]] = await self._ask("describe", name)
        return found

    async def file_bytes(self, name: str) -> bytes:
        """Return a task's file.

        Raises:
            UnknownTask: there is no such task.
        """
        found: bytes = await self._ask("file_bytes", name)
        return found

    async def compare(self, a: str, b: str) -> list[dict[str, Any]]:
        """Return how far two tasks moved.

        Raises:
            UnknownTask: there is no such task.
        """
        found: list[dict[str, Any]] = await self._ask("compare", a, b)
        return found

    # --- changes --------------------------------------------------------------------------------

    async def put(self, name: str, data: bytes, *, pinned: bool = False) -> tuple[TaskInfo, bool]:
        """Add or replace a task, at all replicas; return it, and whether it is new.

        Raises:
            TaskFileError: the file is refused.
            BitfitError: it cannot be kept.
        """
        async with self._changing:
            info, is_new = await self._change("put", name, data, pinned=pinned)
        return info, is_new

    async def rollback(self, name: str) -> TaskInfo:
        """Make the version before the current one, at all replicas, and return it.

        Raises:
            UnknownTask: there is no such task.
            RequestFailed: 409, it has no version before.
        """
        async with self._changing:
            info: TaskInfo = await self._change("rollback", name, first=await self._knows(name))
        return info

    async def remove(self, name: str) -> None:
        """Take a task out, at all replicas.

        Raises:
            UnknownTask: there is no such task.
        """
        async with self._changing:
            await self._change("remove", name)

    async def _change(self, method: str, name: str, *arguments: Any, **named: Any) -> Any:
        by = secrets.token_hex(8)
        found = await self._ask(method, name, *arguments, by=by, **named)
        # Before it is answered: whoever asks next finds it, whichever replica answers.
        await asyncio.gather(*(self._look_if_there(link) for link in self.links))
        return found

    async def _look_if_there(self, link: Link, how: str = "look") -> None:
        with suppress(Lost):
            if link.is_ready:
                await self._look(link, how)

    async def _knows(self, name: str) -> Link | None:
        """Return a replica that has a version before; one that was started later may not."""
        ready = [link for link in self.links if link.is_ready]
        infos = await asyncio.gather(*(_info(link, name) for link in ready))
        for link, info in zip(ready, infos, strict=True):
            if info is not None and info.can_roll_back:
                return link
        return None

    # --- numbers --------------------------------------------------------------------------------

    async def stats(self) -> dict[str, Any]:
        """Return what ``/v1/stats`` answers: requests as seen here, the rest of all replicas."""
        found = await self._everywhere("stats")
        each = [one for one in found.values() if one is not None]
        queues = [one["queue"] for one in each]
        return self.metrics.recent() | {
            "queue": {key: sum(queue[key] for queue in queues) for key in ("items", "tokens")},
            "batch_fill": round(sum(one["batch_fill"] for one in each) / max(1, len(each)), 3),
            "tasks": max((one["tasks"] for one in each), default=0),
            "resident": sum(one["resident"] for one in each),
            "base": self.base,
            "limits": describe_limits(self.config),
            "version": bitfit.__version__,
            "replicas": [_replica_json(link, found[link]) for link in self.links],
        }

    async def render_metrics(self) -> bytes:
        """Return what ``/metrics`` answers: of each replica, and of this process as ``front``."""
        self._live.set(sum(link.is_ready for link in self.links))
        registry = CollectorRegistry()
        found = await self._everywhere("collect")
        own = [m for m in self.metrics.registry.collect() if _is_own(m.name)]
        of = {"front": own} | {link.name: m for link, m in found.items() if m is not None}
        registry.register(Labelled(of))
        return generate_latest(registry)

    async def _everywhere(self, method: str) -> dict[Link, Any]:
        """Return what each replica answers; None: it does not."""

        async def ask(link: Link) -> Any:
            with suppress(Lost, TimeoutError, BitfitError):
                async with asyncio.timeout(STATE_SECONDS):
                    return await link.call(method)
            return None

        answers = await asyncio.gather(*(ask(link) for link in self.links))
        return dict(zip(self.links, answers, strict=True))


async def _info(link: Link, name: str) -> TaskInfo | None:
    with suppress(Lost, UnknownTask):
        found: TaskInfo = await link.call("info", name)
        return found
    return None


def _replica_json(link: Link, stats: dict[str, Any] | None) -> dict[str, Any]:
    facts = link.facts
    assert facts is not None  # known since it was first started
    keys = ("uptime_s", "items", "items_per_s", "latency_ms", "queue", "batch_fill", "tasks")
    return {
        "name": link.name,
        "ready": link.is_ready,
        "machine": facts.host,
        "pid": facts.pid,
        "device": facts.base["device"],
    } | {key: None if stats is None else stats[key] for key in keys}


def _is_own(name: str) -> bool:
    """Whether a metric is this process' own, and not one that the replicas count."""
    return name.startswith(
        ("bitfit_http_", "bitfit_refused_", "bitfit_replica", "bitfit_retried_", "process_")
    )
