"""The shelf, the engine and the queue as one: what the routes are thin over."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import bitfit
from bitfit.comparison import bias_change, compare
from bitfit.errors import BitfitError, UnknownTask, UnreadableTaskFile
from bitfit.freed import trim
from bitfit.serve.changes import Changes, bytes_of
from bitfit.serve.engine import Answer, Engine, Item, Ready, parts
from bitfit.serve.failures import RequestFailed, closing, too_late
from bitfit.serve.logs import log
from bitfit.serve.metrics import Metrics
from bitfit.serve.microbatch import (
    Closing,
    DeadlineExceeded,
    Limits,
    MicroBatcher,
    QueueFull,
    Refused,
)
from bitfit.serve.settings import ServeConfig
from bitfit.serve.shelf import Shelf, TaskInfo
from bitfit.serve.uploads import Uploads
from bitfit.serve.wire import number
from bitfit.terms import SYMBOLS

TRIM_SECONDS = 5.0
"""Between looks at what was freed."""
V = TypeVar("V")
Found = Answer | BitfitError | RequestFailed


class Service:
    """One process' tasks and engine, used from one event loop.

    Texts are tokenized in one thread, answered in another, tasks changed in a third.

    Args:
        shelf: the tasks.
        engine: answers with them; owned by this service's thread from now on.
        config: limits and times.
        base: what is known of the base, shown in the statistics.
        uploads: where tasks that come over the network are kept; None: in memory only.
    """

    def __init__(
        self,
        shelf: Shelf,
        engine: Engine,
        config: ServeConfig,
        *,
        base: Mapping[str, Any] | None = None,
        uploads: Uploads | None = None,
    ) -> None:
        self.shelf, self.engine, self.config = shelf, engine, config
        self.base = dict(base or {})
        self.metrics = Metrics(task_labels=config.task_labels)
        self.changes = Changes(shelf, config.tasks, uploads, self.metrics)
        self.ready = False
        """Whether requests are taken: started, and not told to stop."""
        self._threads = {
            name: ThreadPoolExecutor(1, f"bitfit-{name}") for name in ("engine", "texts", "tasks")
        }
        self._changing = asyncio.Lock()
        self._watcher: asyncio.Task[None] | None = None
        self._trimmer: asyncio.Task[None] | None = None
        self._has_computed = False
        self.queue: MicroBatcher[Ready, Answer | BitfitError] = MicroBatcher(
            self._compute,
            Limits(
                max_tokens=config.max_tokens,
                max_wait=config.max_wait_ms / 1000,
                max_items=config.max_queue_items,
                max_queue_tokens=config.max_queue_tokens,
                max_delay=config.max_delay_ms / 1000,
            ),
            discard=_release,
            on_batch=self.metrics.batch,
        )

    # --- life -----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the tasks and begin to answer.

        Raises:
            BitfitError: the list of uploaded tasks is damaged.
        """
        if self.config.tasks is not None:
            await self._in("tasks", lambda: self.changes.look(strict=True))
        self.queue.start()
        self._trimmer = asyncio.get_running_loop().create_task(self._trim())
        if self.config.tasks is not None and self.config.watch_seconds > 0:
            self._watcher = asyncio.get_running_loop().create_task(self._watch())
        self.ready = True

    @property
    def task_count(self) -> int:
        """How many tasks can be asked."""
        return len(self.shelf)

    def refusal(self) -> RequestFailed:
        """Return what a request is answered with where none is taken."""
        return closing()

    @property
    def broken(self) -> bool:
        """Whether nothing is answered any more, though nobody stopped it."""
        return self.queue.broken

    def close(self) -> None:
        """Take no new requests; what was accepted goes on."""
        self.ready = False
        self.queue.close()

    async def stop(self, *, drain: bool = True) -> None:
        """Answer what was accepted, then end; after ``drain_seconds`` without the rest.

        Args:
            drain: False ends at once.
        """
        self.close()
        for task in (self._watcher, self._trimmer):
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
        try:
            async with asyncio.timeout(self.config.drain_seconds if drain else 0):
                await self.queue.drain()
        except TimeoutError:
            log("drain_timeout", level=logging.WARNING, items=self.queue.items)
        for pool in self._threads.values():
            pool.shutdown(wait=False, cancel_futures=True)

    async def _in(self, thread: str, function: Callable[..., V], *arguments: Any) -> V:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads[thread], function, *arguments)

    # --- answers --------------------------------------------------------------------------------

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
        try:
            found = await self._predict(items, began + allowed / 1000)
        except Refused as refused:
            reason = "closing" if isinstance(refused, Closing) else "queue_full"
            self.metrics.refused(reason)
            raise _refused(refused) from None
        except DeadlineExceeded as late:
            self.metrics.refused("deadline")
            raise too_late(str(late), allowed, self.config.deadline_ms) from None
        except asyncio.CancelledError:
            self.metrics.refused("abandoned")
            raise
        self.metrics.predicted(loop.time() - began, list(map(outcome, found)))
        return found

    async def _predict(self, items: Sequence[Item], deadline: float) -> list[Found]:
        found: list[Found | None] = [self._check_length(item) for item in items]
        asked = [i for i, failed in enumerate(found) if failed is None]
        with self.queue.admit(len(items), deadline=deadline) as place:
            ready = await self._prepare_all([items[i] for i in asked], deadline)
            self._check_scores(ready)
            places, work = [], []
            for i, result in zip(asked, ready, strict=True):
                if isinstance(result, BitfitError):
                    found[i] = result
                elif result.tokens > self.config.max_item_tokens:
                    found[i] = _too_long("tokens", result.tokens, self.config.max_item_tokens)
                    _release(result)
                else:
                    places.append(i)
                    work.append((result, result.tokens))
            for i, answer in zip(places, await place.run(work), strict=True):
                found[i] = answer
        return [result for result in found if result is not None]

    def _check_length(self, item: Item) -> RequestFailed | None:
        longest = max(len(item.text), len(item.text_pair or ""))
        limit = self.config.max_text_chars
        return _too_long("characters", longest, limit) if longest > limit else None

    def _check_scores(self, ready: Sequence[Ready | BitfitError]) -> None:
        asked = sum(one.scores for one in ready if isinstance(one, Ready))
        limit = self.config.max_scores
        if asked > limit:
            _release_all(ready)
            raise RequestFailed(
                422, f"{asked} scores would be answered, at most {limit} are allowed: give top_k, "
                "or fewer items", code="too_many_scores", details={"limit": limit},
            )  # fmt: skip

    async def _prepare_all(
        self, items: Sequence[Item], deadline: float
    ) -> Sequence[Ready | BitfitError]:
        """Prepare items; those whose file is gone once more, after a look at what others did.

        Another server of the folder may have removed or replaced a task whose row was dropped here.
        """
        found = await self._prepare(items, deadline)
        gone = [i for i, one in enumerate(found) if isinstance(one, UnreadableTaskFile)]
        if not gone or not self.changes.may_be_behind:
            return found
        try:
            with suppress(BitfitError):  # then the first error stands
                await self.look()
            again = await self._prepare([items[i] for i in gone], deadline)
        except BaseException:
            _release_all(found)
            raise
        for i, one in zip(gone, again, strict=True):
            found[i] = one
        return found

    async def _prepare(self, items: Sequence[Item], deadline: float) -> list[Ready | BitfitError]:
        """Prepare items part by part, so that those of other requests come between them."""
        found: list[Ready | BitfitError] = []
        try:
            for part in parts(items):
                found += await self._prepare_part(part, deadline)
        except BaseException:
            _release_all(found)
            raise
        return found

    async def _prepare_part(
        self, items: Sequence[Item], deadline: float
    ) -> Sequence[Ready | BitfitError]:
        waiting = list(items)
        future = self._threads["texts"].submit(self.engine.prepare, waiting)
        try:
            async with asyncio.timeout_at(deadline):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            _give_up(future, waiting)
            raise DeadlineExceeded("its texts were not read") from None
        except asyncio.CancelledError:
            _give_up(future, waiting)
            raise

    async def _compute(self, ready: Sequence[Ready]) -> Sequence[Answer | BitfitError]:
        self._has_computed = True
        return await self._in("engine", self.engine.answer, ready)

    async def _trim(self) -> None:
        """Give back what batches have freed, between two of them."""
        while True:
            await asyncio.sleep(TRIM_SECONDS)
            if self._has_computed:
                self._has_computed = False
                await self._in("engine", trim)

    # --- tasks ----------------------------------------------------------------------------------

    async def put(
        self, name: str, data: bytes, *, pinned: bool = False, by: str | None = None
    ) -> tuple[TaskInfo, bool]:
        """Add or replace a task; return it, and whether it is new. All as :meth:`Changes.put`."""
        async with self._changing:
            return await self._in(
                "tasks", lambda: self.changes.put(name, data, pinned=pinned, by=by)
            )

    async def rollback(self, name: str, *, by: str | None = None) -> TaskInfo:
        """Make the version before the current one, and return it. As :meth:`Changes.rollback`."""
        async with self._changing:
            return await self._in("tasks", lambda: self.changes.rollback(name, by=by))

    async def remove(self, name: str, *, by: str | None = None) -> None:
        """Take a task out. As :meth:`Changes.remove`."""
        async with self._changing:
            await self._in("tasks", lambda: self.changes.remove(name, by=by))

    async def infos(self) -> list[TaskInfo]:
        """Return every task, by name."""
        return self.shelf.infos()

    async def describe(self, name: str) -> tuple[TaskInfo, dict[str, Any]]:
        """Return a task, and ``recipe, scores, terms, change`` of its file.

        Raises:
            UnknownTask: there is no such task.
        """
        return await self._in("tasks", self._describe, name)

    def _describe(self, name: str) -> tuple[TaskInfo, dict[str, Any]]:
        info, file = self.shelf.info(name), self.shelf.file(name)
        change = [row | {"symbol": SYMBOLS.get(row["term"])} for row in bias_change(file)]
        return info, {
            "recipe": file.recipe,
            "scores": {key: number(value) for key, value in file.scores.items()},
            "terms": file.terms,
            "change": change,
        }

    async def file_bytes(self, name: str) -> bytes:
        """Return a task's file.

        Raises:
            UnknownTask: there is no such task.
        """
        return await self._in("tasks", lambda: bytes_of(self.shelf.file(name)))

    async def compare(self, a: str, b: str) -> list[dict[str, Any]]:
        """Return :func:`bitfit.comparison.compare` of two tasks, with the terms' symbols.

        Raises:
            UnknownTask: there is no such task.
        """
        rows = await self._in("tasks", lambda: compare(self.shelf.file(a), self.shelf.file(b)))
        return [row | {"symbol": SYMBOLS.get(row["term"])} for row in rows]

    # --- the folder -----------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self.config.watch_seconds)
            try:
                await self.look()
            except BitfitError as error:
                log("watch_failed", level=logging.WARNING, message=str(error))
            except Exception:
                log("watch_failed", level=logging.ERROR, trace=True)

    async def look(self) -> None:
        """Take over at once what changed in the folder, and what other servers were sent.

        Raises:
            BitfitError: the list of uploaded tasks is damaged.
        """
        async with self._changing:
            await self._in("tasks", self.changes.look)

    # --- numbers --------------------------------------------------------------------------------

    async def stats(self) -> dict[str, Any]:
        """Return what ``/v1/stats`` answers."""
        return self.metrics.recent() | {
            "queue": {"items": self.queue.items, "tokens": self.queue.tokens},
            "tasks": len(self.shelf),
            "resident": self.shelf.resident,
            "base": self.base,
            "limits": describe_limits(self.config),
            "version": bitfit.__version__,
        }

    async def render_metrics(self) -> bytes:
        """Return what ``/metrics`` answers."""
        self.measure()
        return self.metrics.render()

    def measure(self) -> None:
        """Set the metrics that are no counters."""
        self.metrics.queue_items.set(self.queue.items)
        self.metrics.queue_tokens.set(self.queue.tokens)
        self.metrics.tasks.set(len(self.shelf))
        self.metrics.resident.set(self.shelf.resident)


def describe_limits(config: ServeConfig) -> dict[str, Any]:
    """Return what a server says of its limits."""
    names = (
        "max_items", "max_text_chars", "max_scores", "max_body_bytes", "deadline_ms",
        "max_upload_bytes",
    )  # fmt: skip
    return {name: getattr(config, name) for name in names}


def _release(ready: Ready) -> None:
    ready.lease.release()


def _give_up(future: Future[list[Ready | BitfitError]], waiting: list[Item]) -> None:
    """Let go of texts that nobody waits for: before they are read, or of what was made of them."""
    if future.cancel():
        waiting.clear()  # the thread still has the list, until it comes to it
    else:
        future.add_done_callback(_release_made)


def _release_made(future: Future[list[Ready | BitfitError]]) -> None:
    if not future.cancelled() and future.exception() is None:
        _release_all(future.result())


def _release_all(found: Iterable[Ready | BitfitError]) -> None:
    for one in found:
        if isinstance(one, Ready):
            _release(one)


def _refused(refused: Refused) -> RequestFailed:
    seconds = max(1, min(60, round(refused.retry_after + 0.5)))
    status, code = (429, "queue_full") if isinstance(refused, QueueFull) else (503, "closing")
    return RequestFailed(
        status, f"{refused}; try again in {seconds} s", code=code,
        details={"retry_after_s": seconds}, headers={"Retry-After": str(seconds)},
    )  # fmt: skip


def _too_long(what: str, found: int, limit: int) -> RequestFailed:
    return RequestFailed(422, f"{found} {what}, at most {limit} are allowed", code="too_long")


def outcome(found: Found) -> tuple[str, str | None]:
    """Return what came of an item, for its count, and its task where that is known."""
    if isinstance(found, Answer):
        return "answered", found.task
    return ("unknown_task", None) if isinstance(found, UnknownTask) else ("failed", None)
