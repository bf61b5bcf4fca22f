"""A shelf and an engine without a model, and a client in the same process."""

from __future__ import annotations

import asyncio
import difflib
import json
import threading
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import httpx
from test_taskfile import make

from bitfit.errors import TaskFileError, UnknownTask, UsageError, WrongBase
from bitfit.serve.app import make_app
from bitfit.serve.auth import Keys
from bitfit.serve.engine import Answer, Ready
from bitfit.serve.folder import Change
from bitfit.serve.service import Service
from bitfit.serve.settings import ServeConfig
from bitfit.serve.shelf import TaskInfo
from bitfit.taskfile import TaskFile
from bitfit.tasks import Task

PATIENCE = 120.0  # seconds: far more than anything takes on a busy machine; what hangs fails
PREDICT, MANAGE = "predict-key-0123456789", "manage-key-0123456789"
KEYS = Keys.parse(f"predict:{PREDICT} manage:{MANAGE}", "test")


def task_file(name="mood", *, labels=("bad", "good"), is_pair=False, **changes):
    task = Task(name=name, kind="classification", labels=labels, is_pair=is_pair)
    return make(labels=labels, task=task, **changes)


def fingerprint(file):
    return sha256(file.to_bytes()).hexdigest()[:16]


@dataclass(eq=False)
class DummyLease:
    shelf: DummyShelf
    name: str
    version: int
    fingerprint: str
    task: Task
    released: bool = False

    def release(self):
        assert not self.released, "released twice"
        self.released = True
        self.shelf.leases.discard(self)


class DummyShelf:
    """Versions of task files by name; refuses files of another base."""

    def __init__(self):
        self.versions: dict[str, list[tuple[TaskInfo, TaskFile]]] = {}
        self.leases: set[DummyLease] = set()
        self.seen: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self.numbers: dict[str, int] = {}

    def __contains__(self, name):
        return name in self.versions

    def __len__(self):
        return len(self.versions)

    @property
    def resident(self):
        return len(self.versions)

    def put(self, name, file, *, source=None, pinned=False, version=1):
        if file.base.sha256 != "b" * 64:
            raise WrongBase(f"{name}: made for another base")
        with self.lock:
            before = self.versions.setdefault(name, [])
            number = self.numbers[name] = max(self.numbers.get(name, 0) + 1, version)
            info = TaskInfo(
                name=name, version=number, kind=file.task.kind, labels=file.task.labels,
                metric=file.task.metric, score=file.score, is_pair=file.task.is_pair,
                max_length=file.max_length, bytes=len(file.to_bytes()),
                fingerprint=fingerprint(file), pinned=pinned, resident=True,
                source=source, description=file.description, licence=file.licence,
                can_roll_back=bool(before), last_used=None,
            )  # fmt: skip
            before.append((info, file))
            return info

    def begin_after(self, name, version):
        self.numbers[name] = max(self.numbers.get(name, 0), version)

    def rollback(self, name, *, is_undo=False):
        self.info(name)
        if len(self.versions[name]) < 2:
            raise UsageError("no version before")
        before = self.versions[name][-2][1]
        if is_undo:
            self.versions[name].clear()
        return self.put(name, before)

    def remove(self, name):
        self.info(name)
        del self.versions[name]

    def info(self, name):
        if name not in self.versions:
            near = difflib.get_close_matches(name, self.versions, 1)
            hint = f". Did you mean {near[0]!r}?" if near else ""
            raise UnknownTask(f"there is no task {name!r}{hint}")
        return self.versions[name][-1][0]

    def infos(self):
        return [versions[-1][0] for _, versions in sorted(self.versions.items())]

    def file(self, name):
        self.info(name)
        return self.versions[name][-1][1]

    def lease(self, name):
        info = self.info(name)
        lease = DummyLease(self, name, info.version, info.fingerprint, self.file(name).task)
        self.leases.add(lease)
        return lease

    def sync(self, directory, number=None):
        found = {
            p.name.removesuffix(".bitfit.safetensors"): p.read_bytes()
            for p in Path(directory).glob("*.bitfit.safetensors")
        }
        changes = []
        for name, data in sorted(found.items()):
            if self.seen.get(name) == data:
                continue
            what = "changed" if name in self.seen else "added"
            try:
                info = self.put(name, TaskFile.from_bytes(data, name), source=str(directory))
                changes.append(Change(what, name, str(directory), "", info))
            except TaskFileError as error:
                changes.append(Change("refused", name, str(directory), str(error)))
        for name in self.seen.keys() - found.keys():
            if name in self.versions and self.info(name).source == str(directory):
                self.remove(name)
                changes.append(Change("removed", name, str(directory)))
        self.seen = found
        return changes


class DummyEngine:
    """Answers with the text itself; takes ``seconds`` per token."""

    def __init__(self, shelf, seconds=0.0):
        self.shelf, self.seconds = shelf, seconds
        self.batches: list[list[str]] = []
        self.begun = 0
        """Batches that it was given, answered or not."""
        self.fail = False
        self.gate = threading.Event()
        self.gate.set()

    def prepare(self, items):
        return [self._prepare(item) for item in items]

    def _prepare(self, item):
        try:
            lease = self.shelf.lease(item.task)
        except UnknownTask as error:
            return error
        if (item.text_pair is not None) != lease.task.is_pair:
            lease.release()
            return UsageError(f"task {item.task!r} takes other texts: {item.text[:40]!r}")
        ready = Ready.__new__(Ready)
        ready.lease, ready.item, ready.tokens = lease, item, len(item.text.split()) + 2
        return ready

    def answer(self, ready):
        self.begun += 1
        assert self.gate.wait(PATIENCE)
        if self.fail:
            for one in ready:
                one.lease.release()
            raise RuntimeError("the engine broke")
        time.sleep(self.seconds * sum(one.tokens for one in ready))
        self.batches.append([one.item.text for one in ready])
        return [self._answer(one) for one in ready]

    def _answer(self, one):
        one.lease.release()
        result = {"label": one.item.text, "confidence": 0.9, "abstained": False, "scores": []}
        return Answer(
            task=one.item.task, version=one.lease.version, fingerprint=one.lease.fingerprint,
            kind="classification", id=one.item.id, tokens=one.tokens, truncated=False,
            result=result,
        )  # fmt: skip


class Site:
    """A service with its dummies, and clients of it."""

    def __init__(self, service, keys):
        self.service, self.shelf, self.engine = service, service.shelf, service.engine
        self.app = make_app(service, keys)

    def client(self, key=None, host="127.0.0.1"):
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        transport = httpx.ASGITransport(app=self.app)
        return httpx.AsyncClient(
            transport=transport, base_url=f"http://{host}:8000", headers=headers, timeout=20
        )


@asynccontextmanager
async def open_site(
    keys=None, *, tasks=("mood", "topic"), folder=None, uploads=None, seconds=0.0, **options
):
    shelf = DummyShelf()
    for name in tasks:
        shelf.put(name, task_file(name))
    service = Service(
        shelf, DummyEngine(shelf, seconds), ServeConfig(tasks=folder, **options),
        base={"name": "tiny"},
        uploads=uploads,
    )  # fmt: skip
    site = Site(service, keys)
    await service.start()
    try:
        yield site
    finally:
        site.engine.gate.set()
        await service.stop()
    assert not shelf.leases, "a lease was never released"


def in_site(check, keys=None, **options):
    """Run ``check(site, client)``; the client may do everything."""

    async def main():
        async with open_site(keys, **options) as site, site.client(MANAGE) as client:
            return await check(site, client)

    return asyncio.run(main())


async def until(check):
    """Wait until ``check()`` holds: how long that takes is not the test's to say."""
    async with asyncio.timeout(PATIENCE):
        while not check():
            await asyncio.sleep(0.005)


def ask(*items, **more):
    return {"items": [{"task": t, "text": x} for t, x in items], **more}


def error_of(response):
    """The error of an answer, which has the shape that all errors have."""
    assert response.headers["content-type"] == "application/json"
    body = json.loads(response.content)
    assert body.keys() == {"error"}
    assert {"code", "message"} <= body["error"].keys() <= {"code", "message", "details"}
    return body["error"]
