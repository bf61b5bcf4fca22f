"""The shelf, the engine and the queue as one: what the routes are thin over."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import bitfit
from bitfit.comparison import bias_change, compare
from bitfit.errors import BitfitError, UnknownTask, UnreadableTaskFile
from bitfit.freed import trim
from bitfit.serve.engine import Answer, Engine, Item, Ready, parts
from bitfit.serve.failures import RequestFailed, closing
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
from bitfit.serve.shelf import Change, Shelf, TaskInfo
from bitfit.serve.uploads import Entry, FolderFile, Listed, Uploads
from bitfit.serve.wire import number
from bitfit.taskfile import TaskFile
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
        self.shelf, self.engine, self.config, self.uploads = shelf, engine, config, uploads
        self.base = dict(base or {})
        self.metrics = Metrics(task_labels=config.task_labels)
        self.ready = False
        """Whether requests are taken: started, and not told to stop."""
        self._threads = {
            name: ThreadPoolExecutor(1, f"bitfit-{name}") for name in ("engine", "texts", "tasks")
        }
        self._changing = asyncio.Lock()
        self._watcher: asyncio.Task[None] | None = None
        self._trimmer: asyncio.Task[None] | None = None
        self._has_computed = False
        self._applied: dict[str, Entry] = {}
        self._in_folder: dict[str, str] = {}  # fingerprints of the folder's files by name
        self.queue: MicroBatcher[Ready, Answer] = MicroBatcher(
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
            await self._in("tasks", self._look, True)
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
            RequestFailed: 429, 503 or 504: none of them was answered.
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
            raise RequestFailed(504, str(late)) from None
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

    async def _prepare_all(
        self, items: Sequence[Item], deadline: float
    ) -> Sequence[Ready | BitfitError]:
        """Prepare items; those whose file is gone once more, after a look at what others did.

        Another server of the folder may have removed or replaced a task whose row was dropped here.
        """
        found = await self._prepare(items, deadline)
        gone = [i for i, one in enumerate(found) if isinstance(one, UnreadableTaskFile)]
        if not gone or self.uploads is None or not self.uploads.has_changed():
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
            raise DeadlineExceeded("its texts were not read by its deadline") from None
        except asyncio.CancelledError:
            _give_up(future, waiting)
            raise

    async def _compute(self, ready: Sequence[Ready]) -> Sequence[Answer]:
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
        """Add or replace a task by the file in ``data``; return it, and whether it is new.

        Args:
            name: the task's.
            data: the bytes of a task file.
            pinned: keep its row in memory.
            by: a name of this very change: asked for again, at any server of the same folder, it
                is not made again.

        Raises:
            TaskFileError: the file is refused.
            BitfitError: it cannot be kept.
        """
        async with self._changing:
            info, is_new = await self._in("tasks", self._put, name, data, pinned, by)
        self._changed("added" if is_new else "replaced", info)
        return info, is_new

    def _put(self, name: str, data: bytes, pinned: bool, by: str | None) -> tuple[TaskInfo, bool]:
        file = TaskFile.from_bytes(data, "the upload")
        with self._alone():
            if (done := self._made(name, by)) is not None:
                return self.shelf.info(name), len(done.files) == 1 and done.over is None
            is_new = name not in self.shelf
            if self.uploads is None:
                return self.shelf.put(name, file, pinned=pinned), is_new
            return self._put_kept(name, data, file, pinned, by), is_new

    def _put_kept(
        self, name: str, data: bytes, file: TaskFile, pinned: bool, by: str | None
    ) -> TaskInfo:
        assert self.uploads is not None
        is_new = name not in self.shelf
        digest, is_kept = self.uploads.keep(data)
        source = str(self.uploads.path(digest))
        try:
            info = self.shelf.put(name, file, source=source, pinned=pinned)
        except BitfitError:
            if not is_kept:
                self.uploads.forget(digest)
            raise
        try:
            self._record(name, digest, info, by)
        except BitfitError:  # neither here nor there
            self.shelf.remove(name) if is_new else self.shelf.rollback(name)
            raise
        return info

    async def rollback(self, name: str, *, by: str | None = None) -> TaskInfo:
        """Make the version before the current one, under a new number, and return it.

        Args:
            name: the task's.
            by: as of ``put``.

        Raises:
            UnknownTask: there is no such task.
            RequestFailed: 409, it has no version before.
        """
        async with self._changing:
            info = await self._in("tasks", self._rollback, name, by)
        self._changed("rolled_back", info)
        return info

    def _rollback(self, name: str, by: str | None) -> TaskInfo:
        with self._alone():
            if self._made(name, by) is not None:
                return self.shelf.info(name)
            return self._roll_back(name, by)

    def _roll_back(self, name: str, by: str | None) -> TaskInfo:
        if not self.shelf.info(name).can_roll_back:
            raise RequestFailed(
                409, f"task {name!r} has no version before this one", code="no_version_before"
            )
        info = self.shelf.rollback(name)
        if self.uploads is not None:
            try:
                digest, _ = self.uploads.keep(_bytes_of(self.shelf.file(name)))
                self._record(name, digest, info, by)
            except BitfitError:  # neither here nor there
                self.shelf.rollback(name)
                raise
        return info

    async def remove(self, name: str, *, by: str | None = None) -> None:
        """Take a task out.

        Args:
            name: the task's.
            by: as of ``put``.

        Raises:
            UnknownTask: there is no such task.
        """
        async with self._changing:
            info = await self._in("tasks", self._remove, name, by)
        if info is not None:
            self._changed("removed", info)

    def _remove(self, name: str, by: str | None) -> TaskInfo | None:
        with self._alone():
            if self._made(name, by) is not None:
                return None
            info = self.shelf.info(name)
            if self.uploads is None:
                self.shelf.remove(name)
            else:  # nobody may still want to read the files that go
                self._record(name, None, info, by, lambda: self.shelf.remove(name))
            return info

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Be the only server that changes tasks, with what the others did taken over.

        Else two that share a folder would give one number to two versions, and remember other
        versions before.
        """
        if self.uploads is None:
            yield
            return
        with self.uploads.locked():
            self._look()
            yield

    def _made(self, name: str, by: str | None) -> Entry | None:
        """Return what a change left that was made already; None: it was not."""
        entry = self._applied.get(name)
        return entry if by is not None and entry is not None and entry.by == by else None

    def _record(
        self, name: str, digest: str | None, info: TaskInfo, by: str | None,
        then: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        assert self.uploads is not None
        over = self._in_folder.get(name)
        self._applied[name] = self.uploads.record(
            name, digest, version=info.version, over=over, pinned=info.pinned, by=by, then=then
        )

    def _changed(self, change: str, info: TaskInfo) -> None:
        self.metrics.changed(change)
        log("task", change=change, task=info.name, version=info.version,
            fingerprint=info.fingerprint)  # fmt: skip

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
        return await self._in("tasks", lambda: _bytes_of(self.shelf.file(name)))

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
            await self._in("tasks", self._look)

    def _look(self, strict: bool = False) -> None:
        if self.config.tasks is not None:
            self._look_at_folder(self.config.tasks)
        if self.uploads is None or not (strict or self.uploads.has_changed()):
            return
        for name, entry in self.uploads.entries().items():
            is_older = name in self._in_folder and entry.over != self._in_folder[name]
            if self._applied.get(name) == entry or is_older:
                continue
            try:
                self._apply(name, entry)
                self._applied[name] = entry
            except BitfitError as error:  # a shared folder may show the list before the file
                self.uploads.look_again()
                log("upload_failed", level=logging.WARNING, task=name, message=str(error))

    def _look_at_folder(self, folder: str) -> None:
        listed: Listed | None = None

        def number(name: str, fingerprint: str) -> int:
            """Return the version that a file has at least, by what all servers wrote down."""
            nonlocal listed
            if listed is None:
                listed = self.uploads.listed() if self.uploads is not None else Listed()
            return listed.number(name, fingerprint)

        replaced = {}
        for change in self.shelf.sync(folder, number):
            self._note(change)
            if change.info is not None and change.info.version > 1:
                replaced[change.name] = FolderFile(change.info.fingerprint, change.info.version)
        if replaced and self.uploads is not None:
            with suppress(BitfitError):  # a folder that may only be read: each counts for itself
                self.uploads.record_folder(replaced)

    def _apply(self, name: str, entry: Entry) -> None:
        """Make of a task what the list of uploads says; its version before can come back too."""
        assert self.uploads is not None
        if not entry.files:
            self.shelf.begin_after(name, entry.version)
            with suppress(UnknownTask):
                self.shelf.remove(name)
            return
        has_before = name in self.shelf and self.shelf.info(name).version >= entry.version - 1
        digests = entry.files[-1:] if has_before else entry.files[-2:]
        for earlier, digest in zip(range(len(digests) - 1, -1, -1), digests, strict=True):
            info = self.shelf.put(
                name, self.uploads.read(digest), source=str(self.uploads.path(digest)),
                pinned=entry.pinned, version=entry.version - earlier,
            )  # fmt: skip
            self._changed_by_others(info)

    def _changed_by_others(self, info: TaskInfo) -> None:
        log("task", change="taken_over", task=info.name, version=info.version,
            fingerprint=info.fingerprint)  # fmt: skip

    def _note(self, change: Change) -> None:
        """Remember what the folder holds, and say what changed there."""
        if change.info is not None:
            self._in_folder[change.name] = change.info.fingerprint
        elif change.what == "removed":
            self._in_folder.pop(change.name, None)
        self.metrics.changed(change.what)
        level = logging.WARNING if change.what == "refused" else logging.INFO
        log("folder", level=level, change=change.what, task=change.name,
            message=change.message or None)  # fmt: skip

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
    names = ("max_items", "max_text_chars", "max_body_bytes", "deadline_ms", "max_upload_bytes")
    return {name: getattr(config, name) for name in names}


def _bytes_of(file: TaskFile) -> bytes:
    return file.to_bytes(file.dtype)


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
