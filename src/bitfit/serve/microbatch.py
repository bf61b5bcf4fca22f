"""Many small requests become batches: bounded, fair, with deadlines. Knows nothing of models.

Requests are lists of items, each with a cost in tokens. One batch is computed at a time; what
arrives meanwhile waits and makes the next one. All of it runs on one event loop.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")
R = TypeVar("R")

LOOK_AHEAD = 2
"""Budgets of waiting tokens, the oldest, among which items of like length are looked for."""
MEMORY = 0.2
"""Weight of the newest batch in the speed that waits are estimated from."""


class Refused(Exception):
    """A request that was not accepted. Nothing of it was computed."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds after which a place is likely."""


class QueueFull(Refused):
    """There is no room, or the wait would be too long."""


class Closing(Refused):
    """The server is being stopped: what was accepted is still answered, nothing more is."""


class DeadlineExceeded(Exception):
    """What of a request was not done in time; what was left of it is not computed."""


@dataclass(frozen=True)
class BatchReport:
    """What one batch was, for metrics."""

    items: int
    tokens: int
    fill: float
    """Share of the token budget: items times the longest, over the budget."""
    seconds: float
    waited: float
    """Seconds that its oldest item waited."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a queue holds and how long it waits; times in seconds."""

    max_tokens: int
    """Of one batch: the number of its items times the longest. A longer item goes alone."""
    max_wait: float
    """Of the oldest item, for others to come, while nothing is computed."""
    max_items: int
    """Accepted and not yet answered."""
    max_queue_tokens: int
    """Accepted and not yet computed."""
    max_delay: float = math.inf
    """Of a new request, by the speed of the batches before it."""


@dataclass(eq=False)
class _Request(Generic[T, R]):
    """Items that are answered together."""

    deadline: float
    future: asyncio.Future[list[R]]
    results: list[Any]
    left: int
    numbers: list[int] = field(default_factory=list)
    """Of its items in the queue."""


@dataclass(eq=False)
class _Job(Generic[T, R]):
    """One item that waits."""

    payload: T
    tokens: int
    arrived: float
    request: _Request[T, R]
    place: int
    """Which of its request's items it is."""


class MicroBatcher(Generic[T, R]):
    """A bounded queue and the one worker that empties it.

    Args:
        compute: takes the payloads of a batch and gives a result for each, in order. What it
            raises is raised to every request with an item in the batch.
        limits: sizes and waits.
        discard: told of each payload that is dropped without having been computed.
        on_batch: told of each batch that was computed.

    Use :meth:`start` on the event loop, :meth:`admit` for each request, :meth:`drain` at the end.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[T]], Awaitable[Sequence[R]]],
        limits: Limits,
        *,
        discard: Callable[[T], None] = lambda payload: None,
        on_batch: Callable[[BatchReport], None] = lambda report: None,
    ) -> None:
        self._compute, self._discard, self._on_batch = compute, discard, on_batch
        self.limits = limits
        self.items = 0
        """Items accepted and not yet answered."""
        self.tokens = 0
        """Tokens that wait or are being computed."""
        self._waiting_tokens = 0
        self._jobs: dict[int, _Job[T, R]] = {}  # by number, so in the order of arrival
        self._number = 0
        self._speed = 0.0  # tokens per second of the last batches; 0: not known yet
        self._wake = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._closing = False

    def start(self) -> None:
        """Begin to compute, on the running event loop."""
        self._worker = asyncio.get_running_loop().create_task(self._work())

    @property
    def expected_wait(self) -> float:
        """Seconds that a new item would wait, by the speed of the last batches."""
        return self.tokens / self._speed if self._speed else 0.0

    def admit(self, items: int, *, deadline: float = math.inf) -> Place[T, R]:
        """Return a place for a request of ``items``, to be used as a context.

        Args:
            items: how many there are.
            deadline: when its answer is of no more use, on the event loop's clock.

        Raises:
            QueueFull: too many items are there, or they would wait longer than the limit or the
                deadline allows.
            Closing: the queue is being emptied for good.
        """
        wait = self.expected_wait
        if self._closing:
            raise Closing("the server is shutting down", retry_after=1.0)
        if self.items and self.items + items > self.limits.max_items:
            raise QueueFull(
                f"{self.items} items wait, {items} more would exceed {self.limits.max_items}",
                retry_after=wait,
            )
        allowed = min(self.limits.max_delay, deadline - asyncio.get_running_loop().time())
        if wait > allowed:
            raise QueueFull(
                f"it would wait about {_told(wait)}, {_told(max(allowed, 0))} are allowed",
                retry_after=wait - max(allowed, 0),
            )
        return Place(self, items, deadline)

    async def drain(self) -> None:
        """Refuse what is new, answer what was accepted, and end."""
        self._closing = True
        self._wake.set()
        if self._worker is not None:
            await self._worker

    @property
    def broken(self) -> bool:
        """Whether the worker ended though it was not told to."""
        return self._worker is not None and self._worker.done() and not self._closing

    def close(self) -> None:
        """Accept nothing more; :meth:`drain` waits for the rest."""
        self._closing = True
        self._wake.set()

    # --- used by Place --------------------------------------------------------------------------

    def hold(self, items: int) -> None:
        """Count ``items`` as accepted (negative: as answered)."""
        self.items += items
        self._wake.set()

    async def run(self, work: Sequence[tuple[T, int]], deadline: float) -> list[R]:
        """Return the result of each payload; :meth:`Place.run` says what it raises."""
        if not work:
            return []
        tokens = sum(cost for _, cost in work)
        if self._waiting_tokens and self._waiting_tokens + tokens > self.limits.max_queue_tokens:
            self._drop(payload for payload, _ in work)
            raise QueueFull(
                f"{self._waiting_tokens} tokens wait, {tokens} more would exceed "
                f"{self.limits.max_queue_tokens}",
                retry_after=self.expected_wait,
            )
        request = self._enqueue(work, deadline)
        try:
            async with asyncio.timeout_at(None if math.isinf(deadline) else deadline):
                return await request.future
        except TimeoutError:
            if request.future.cancelled():
                raise DeadlineExceeded("it was not answered") from None
            # It came just as the clock rang; or it is what the computation raised.
            return request.future.result()
        finally:
            self._abandon(request)

    def _enqueue(self, work: Sequence[tuple[T, int]], deadline: float) -> _Request[T, R]:
        loop = asyncio.get_running_loop()
        request: _Request[T, R] = _Request(
            deadline, loop.create_future(), [None] * len(work), len(work)
        )
        now = loop.time()
        for place, (payload, cost) in enumerate(work):
            self._number += 1
            self._jobs[self._number] = _Job(payload, cost, now, request, place)
            request.numbers.append(self._number)
            self.tokens += cost
            self._waiting_tokens += cost
        self._wake.set()
        return request

    def _abandon(self, request: _Request[T, R]) -> None:
        """Take out what still waits of a request that nobody waits for."""
        self._drop(
            self._remove(number).payload for number in request.numbers if number in self._jobs
        )

    def _drop(self, payloads: Any) -> None:
        for payload in payloads:
            self._discard(payload)

    def _remove(self, number: int) -> _Job[T, R]:
        job = self._jobs.pop(number)
        self._waiting_tokens -= job.tokens
        self.tokens -= job.tokens
        return job

    # --- the worker -----------------------------------------------------------------------------

    async def _work(self) -> None:
        while not (self._closing and self.items == 0 and not self._jobs):
            self._wake.clear()
            wait = self._wait_left()
            if wait > 0:
                try:
                    async with asyncio.timeout(None if math.isinf(wait) else wait):
                        await self._wake.wait()
                except TimeoutError:
                    pass
                continue
            if batch := self._take():
                await self._run_batch(batch)

    def _wait_left(self) -> float:
        """Return how long to wait for more items, in seconds; infinite where there is none."""
        if not self._jobs:
            return math.inf
        if self._closing or self._waiting_tokens >= self.limits.max_tokens:
            return 0.0
        oldest = next(iter(self._jobs.values()))
        now = asyncio.get_running_loop().time()
        return oldest.arrived + self.limits.max_wait - now

    def _take(self) -> list[_Job[T, R]]:
        """Take the next batch: the oldest item, and of the old ones those of the nearest length.

        The oldest is always in it, so nothing waits for ever.
        """
        window = self._oldest()
        if not window:
            return []
        wanted = self._jobs[window[0]].tokens
        nearest = sorted(window, key=lambda number: abs(self._jobs[number].tokens - wanted))
        chosen: list[int] = []
        longest = 0
        for number in nearest:
            width = max(longest, self._jobs[number].tokens)
            if chosen and width * (len(chosen) + 1) > self.limits.max_tokens:
                continue
            chosen.append(number)
            longest = width
        batch = [self._remove(number) for number in chosen]
        self.tokens += sum(job.tokens for job in batch)  # they count until they are computed
        return batch

    def _oldest(self) -> list[int]:
        """Return the numbers of the oldest items, in order, less those past their deadline."""
        now = asyncio.get_running_loop().time()
        found, late, tokens = [], [], 0
        for number, job in self._jobs.items():
            if job.request.deadline <= now:
                late.append(number)
                continue
            found.append(number)
            tokens += job.tokens
            if tokens >= LOOK_AHEAD * self.limits.max_tokens:
                break
        self._drop(self._remove(number).payload for number in late)  # their request's timer rings
        return found

    async def _run_batch(self, batch: list[_Job[T, R]]) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        tokens = sum(job.tokens for job in batch)
        try:
            results = await self._compute([job.payload for job in batch])
            assert len(results) == len(batch)
        except Exception as error:
            for job in batch:
                if not job.request.future.done():
                    job.request.future.set_exception(error)
        else:
            for job, result in zip(batch, results, strict=True):
                self._answer(job, result)
        finally:
            self.tokens -= tokens
        seconds = loop.time() - began
        fill = max(job.tokens for job in batch) * len(batch) / self.limits.max_tokens
        if seconds > 0 and fill >= 0.5:  # a small batch says little of how fast full ones are
            speed = tokens / seconds
            self._speed += (speed - self._speed) * (MEMORY if self._speed else 1.0)
        oldest = min(job.arrived for job in batch)
        self._on_batch(BatchReport(len(batch), tokens, fill, seconds, began - oldest))

    def _answer(self, job: _Job[T, R], result: R) -> None:
        request = job.request
        request.results[job.place] = result
        request.left -= 1
        if request.left == 0 and not request.future.done():
            request.future.set_result(request.results)


class Place(Generic[T, R]):
    """The place of one accepted request, from :meth:`MicroBatcher.admit`; a context."""

    def __init__(self, queue: MicroBatcher[T, R], items: int, deadline: float) -> None:
        self._queue, self._items, self._deadline = queue, items, deadline

    def __enter__(self) -> Self:
        self._queue.hold(self._items)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._queue.hold(-self._items)

    async def run(self, work: Sequence[tuple[T, int]]) -> list[R]:
        """Return the result of each payload, in order.

        Where the caller is cancelled, what was not begun is not computed.

        Args:
            work: payloads with their tokens, at most as many as were admitted.

        Raises:
            QueueFull: too many tokens wait.
            DeadlineExceeded: the deadline passed.
        """
        return await self._queue.run(work, self._deadline)


def _told(seconds: float) -> str:
    """Return a time for a person: a short one in ms, since a deadline of 50 ms is no 0.0 s."""
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds * 1000:.0f} ms"
