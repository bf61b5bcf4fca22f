"""``bitfit bench serve --http``: a server beside the same engine in process, and beside another.

Ways have their turns on the same texts, each for a task of its own drawn at random. Clients keep
their connections and always have a request open. Then requests come at twice the rate that was
carried, whether answered or not, to a server that may let a request wait for one second.
"""

from __future__ import annotations

import asyncio
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitfit.bench.connection import Connection, json_bytes, request_bytes
from bitfit.bench.contenders import random_task
from bitfit.bench.infinity import classify_bytes, infinity, version
from bitfit.bench.load import Load, closed_loop, open_loop
from bitfit.bench.memory import resident_bytes
from bitfit.bench.plan import check_choices
from bitfit.bench.running import Running, running
from bitfit.bench.runs import ratio
from bitfit.bench.serve import ADDED, ITEMS, TASKS, read_texts
from bitfit.bench.timing import describe_machine, describe_versions, in_turns
from bitfit.encoder import Encoder, open_encoder
from bitfit.errors import BitfitError
from bitfit.rounding import StorageType
from bitfit.serve.engine import Engine, Item, Ready
from bitfit.serve.folder import Folder
from bitfit.serve.shelf import Shelf

REQUESTS = 256
"""Different requests of each size."""
FULL = 256
"""Items that the engine in process is given at a time: the best that it does."""
CALLS = 8
"""Different calls of the engine."""
OVERLOAD_ITEMS = 8
OVERLOAD_DELAY_MS = 1000
WARM_UP_SECONDS = 1.0
SUFFIX = ".bitfit.safetensors"


@dataclass(frozen=True, kw_only=True)
class HttpPlan:
    """All that is about to be done."""

    base: str
    encoder: Encoder
    dtype: str
    source: str
    """The task whose texts are asked."""
    texts: Sequence[str]
    counts: Sequence[int]
    sizes: Sequence[int]
    """Items in a request."""
    clients: int
    rounds: int
    seconds: float
    """Of one way in one round."""
    storage: StorageType
    infinity: Path | None

    @property
    def turns(self) -> int:
        """How often something has its turn."""
        ways = len(self.counts) * (1 + len(self.sizes))
        ways += len(self.sizes) if self.infinity is not None else 0
        return ways * (self.rounds + 1) + 2


@dataclass(frozen=True)
class _Turn:
    """What a way did in one turn."""

    items: int
    seconds: float
    times: Sequence[float]
    """Seconds of each request."""
    cpu_seconds: float | None
    server: Mapping[str, float]
    """Of our server: what its own counters say."""


@dataclass
class _Way:
    """A way to answer."""

    name: str
    title: str
    tasks: int
    items: int
    """In a request, or in a call of the engine."""
    run: Callable[[float], _Turn]
    turns: list[_Turn] = field(default_factory=list)

    def take(self, number: int, seconds: float) -> float:
        """Return the items a second of one turn, of which the first is not kept."""
        turn = self.run(seconds if number else min(seconds, WARM_UP_SECONDS))
        if number:
            self.turns.append(turn)
        return turn.items / turn.seconds


def make_plan(
    *,
    base: str = "minilm",
    data: str | None = None,
    task: str | None = None,
    counts: Sequence[int] = TASKS,
    items: int = ITEMS,
    clients: int = 64,
    rounds: int = 3,
    seconds: float = 5.0,
    storage: StorageType = "fp32",
    dtype: str = "fp32",
    device: str = "auto",
    infinity: Path | None = None,
) -> HttpPlan:
    """Read the texts and return what would be run.

    Args:
        base: ``"minilm"``, a directory, or a name on the model hub.
        data: a GLUE directory; None: the example's sentences that come with the package.
        task: whose texts are asked; None: ``sst2``, of the example ``intent``.
        counts: numbers of tasks that requests are drawn from.
        items: texts in a request; requests of one text are timed too.
        clients: how many ask at once.
        rounds: how often all have their turn, beside one to warm up.
        seconds: of one turn.
        storage: how rows are kept.
        dtype: ``fp32`` or ``bf16`` of ours.
        device: ``auto``, ``cpu``, ``cuda``.
        infinity: the command of infinity-emb; None: it has no turn.

    Raises:
        UsageError: a task or a number that cannot be meant.
        DataError: data that cannot be read.
        BaseModelError: a base that cannot be loaded.
    """
    check_choices(dtype, rounds, items, clients, min(counts, default=0))
    name, _, examples = read_texts(data, task)
    return HttpPlan(
        base=base, encoder=open_encoder(base, dtype, device), dtype=dtype, source=name,
        texts=[example.text for example in examples], counts=sorted(dict.fromkeys(counts)),
        sizes=sorted({items, 1}, reverse=True), clients=clients, rounds=rounds, seconds=seconds,
        storage=storage, infinity=infinity,
    )  # fmt: skip


def run_plan(
    plan: HttpPlan, command: str, on_turn: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """Run all and return the report, ready for JSON.

    Raises:
        BitfitError: a server did not start, or did not answer.
    """
    with tempfile.TemporaryDirectory() as name, ExitStack() as open_servers:
        folder = Path(name)
        on_turn("making tasks")
        shelf = Shelf(plan.encoder, storage=plan.storage)
        for i in range(max(plan.counts)):
            random_task(plan.encoder, i).save(folder / f"task{i}{SUFFIX}")
        Folder(shelf, str(folder)).look()
        most = str(max(4096, 2 * plan.clients * max(plan.sizes)))
        patient = ("--max-delay-ms", "600000", "--deadline-ms", "600000",
                   "--max-queue-items", most, "--max-queue-tokens", "16777216")  # fmt: skip
        server = open_servers.enter_context(_ours(plan, folder, *patient))
        other = None
        if plan.infinity is not None:
            on_turn("starting infinity")
            other = open_servers.enter_context(infinity(plan.infinity, plan.base, max(plan.sizes)))
        ways = _ways(plan, Engine(shelf), server, other)
        rates = in_turns(
            {way.name: partial(way.take, seconds=plan.seconds) for way in ways},
            plan.rounds, on_turn=lambda name: on_turn(f"answering: {name}"),
        )  # fmt: skip
        adding = asyncio.run(_time_adding(plan, server.port))
        memory = resident_bytes(server.process.pid)
        open_servers.close()
        on_turn("twice the load")
        rows = _rows(plan, ways, rates)
        overload = _overload(plan, folder, _carried(rows))
    return {
        "command": command,
        "hardware": describe_machine(plan.encoder.device),
        "versions": describe_versions() | _versions(plan),
        "base": plan.encoder.base.name,
        "encoder_weights": plan.encoder.weights,
        "precision": plan.encoder.precision,
        "storage": plan.storage,
        "texts": plan.source,
        "clients": plan.clients,
        "rounds": plan.rounds,
        "seconds": plan.seconds,
        "rows": rows,
        "adding": adding,
        "server_bytes": memory,
        "overload": overload,
    }


def _versions(plan: HttpPlan) -> dict[str, str | None]:
    from bitfit.doctor import package_version

    found = {name: package_version(name) for name in ("fastapi", "uvicorn")}
    return found | ({"infinity-emb": version(plan.infinity)} if plan.infinity is not None else {})


@contextmanager
def _ours(plan: HttpPlan, folder: Path, *options: str) -> Iterator[Running]:
    given = ("--dtype", plan.dtype, "--device", str(plan.encoder.device), "--watch", "0",
             "--storage", plan.storage, "--threads", str(torch.get_num_threads()))  # fmt: skip
    with running(plan.base, folder, *given, *options) as server:
        yield server


# ------------------------------------------------------------------ ways


def _ways(plan: HttpPlan, engine: Engine, server: Running, other: Running | None) -> list[_Way]:
    found = []
    for count in plan.counts:
        title = f"bitfit's engine in process, {count:,} tasks"
        run = partial(_in_process, plan, engine, count)
        found.append(_Way(f"engine-{count}", title, count, FULL, run))
        for size in plan.sizes:
            requests = [_predict_bytes(items) for items in _draw(plan, count, size, REQUESTS)]
            title = f"bitfit over HTTP, {count:,} tasks"
            run = partial(_over_http, plan, server, requests, size)
            found.append(_Way(f"http-{count}-{size}", title, count, size, run))
    if other is not None:
        for size in plan.sizes:
            drawn = _draw(plan, 1, size, REQUESTS)
            requests = [classify_bytes([item["text"] for item in items]) for items in drawn]
            run = partial(_over_http, plan, other, requests, size)
            title = "one task, infinity-emb over HTTP"
            found.append(_Way(f"infinity-{size}", title, 1, size, run))
    return found


def _draw(plan: HttpPlan, tasks: int, size: int, count: int) -> list[list[dict[str, str]]]:
    """Return requests; those of one size have the same texts, whichever tasks they name."""
    texts, names = random.Random(size), random.Random(tasks)
    return [
        [
            {"task": f"task{names.randrange(tasks)}", "text": texts.choice(plan.texts)}
            for _ in range(size)
        ]
        for _ in range(count)
    ]


def _predict_bytes(items: Sequence[Mapping[str, str]]) -> bytes:
    return json_bytes("/v1/predict", {"items": items})


def _in_process(plan: HttpPlan, engine: Engine, tasks: int, seconds: float) -> _Turn:
    """Return a turn of the engine in this process, from texts to results."""
    calls = [
        [Item(item["task"], item["text"]) for item in call]
        for call in _draw(plan, tasks, FULL, 1 + REQUESTS // 32)
    ]
    times: list[float] = []
    began, cpu = time.perf_counter(), time.process_time()
    while (now := time.perf_counter()) - began < seconds or not times:
        ready = [r for r in engine.prepare(calls[len(times) % len(calls)]) if isinstance(r, Ready)]
        assert len(engine.answer(ready)) == FULL
        times.append(time.perf_counter() - now)
    spent, cpu = time.perf_counter() - began, time.process_time() - cpu
    return _Turn(len(times) * FULL, spent, times, cpu, {})


def _over_http(
    plan: HttpPlan, server: Running, requests: Sequence[bytes], size: int, seconds: float
) -> _Turn:
    before, cpu = _counters(server), server.cpu_seconds()
    load = asyncio.run(_asked(server.port, requests, plan.clients, seconds))
    after, cpu_after = _counters(server), server.cpu_seconds()
    return _Turn(
        len(load.times) * size, load.seconds, load.times,
        None if cpu is None or cpu_after is None else cpu_after - cpu,
        _means(before, after),
    )  # fmt: skip


async def _asked(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> Load:
    try:
        return await closed_loop(port, requests, clients, seconds)
    except* BitfitError as errors:
        raise errors.exceptions[0] from None


_COUNTER = re.compile(
    r"^bitfit_(http_request_seconds|wait_seconds|batch_seconds|batch_items)_(sum|count)"
    r'(?:\{route="/v1/predict"\})? (\S+)$', re.MULTILINE,
)  # fmt: skip


def _counters(server: Running) -> dict[tuple[str, str], float]:
    """Return our server's own sums and counts; of another server nothing."""

    async def read() -> str:
        connection = Connection(server.port)
        reply = await connection.send(request_bytes("GET", "/metrics"))
        connection.close()
        return reply.body.decode() if reply.status == 200 else ""

    found = _COUNTER.findall(asyncio.run(read()))
    return {(name, part): float(value) for name, part, value in found}


def _means(
    before: Mapping[tuple[str, str], float], after: Mapping[tuple[str, str], float]
) -> dict[str, float]:
    """Return the mean of each counter over the time between."""
    found = {}
    for name in {name for name, _ in after}:
        total, count = (
            after[name, part] - before.get((name, part), 0.0) for part in ("sum", "count")
        )
        if count:
            found[name] = total / count
    return found


# ------------------------------------------------------------------ what is shown


def _rows(
    plan: HttpPlan, ways: Sequence[_Way], rates: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    return [_row(plan, way, rates) for way in ways]


def _row(plan: HttpPlan, way: _Way, rates: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    own = rates[way.name]
    engine = rates[f"engine-{way.tasks if way.tasks in plan.counts else max(plan.counts)}"]
    p50, p99 = np.percentile([s for turn in way.turns for s in turn.times], [50, 99])
    cpu = [ratio(turn.cpu_seconds, turn.items) for turn in way.turns]
    known = [value * 1e3 for value in cpu if value is not None]
    return {
        "name": way.name, "title": way.title, "tasks": way.tasks, "items_per_request": way.items,
        "items_per_second": statistics.median(own),
        # Of the same round: what slows one slows the other.
        "ratio_to_engine": statistics.median(a / b for a, b in zip(own, engine, strict=True)),
        "cpu_ms_per_item": statistics.median(known) if known else None,
        "p50_ms": float(p50) * 1e3, "p99_ms": float(p99) * 1e3,
        "server": _inside(way),
        "items_per_second_by_round": list(own),
    }  # fmt: skip


def _inside(way: _Way) -> dict[str, float] | None:
    """Return where a request's time goes, by our server's own counters: means over all turns."""
    names = {"http_request_seconds": "request_ms", "wait_seconds": "wait_ms",
             "batch_seconds": "batch_ms", "batch_items": "batch_items"}  # fmt: skip
    found = {}
    for name, shown in names.items():
        values = [turn.server[name] for turn in way.turns if name in turn.server]
        if values:
            scale = 1e3 if shown.endswith("_ms") else 1.0
            found[shown] = statistics.mean(values) * scale
    return found or None


def _carried(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the items a second that the server carried at best."""
    return max(float(row["items_per_second"]) for row in rows if row["name"].startswith("http-"))


# ------------------------------------------------------------------ more


async def _time_adding(plan: HttpPlan, port: int) -> dict[str, float]:
    """Return the milliseconds of an upload, and of the first answer after it."""
    connection = Connection(port)
    times: dict[str, list[float]] = {"put_ms": [], "first_answer_ms": []}
    ask = _predict_bytes([{"task": "added", "text": plan.texts[0]}])
    for i in range(ADDED):
        data = random_task(plan.encoder, 10**6 + i).to_bytes()
        began = time.perf_counter()
        put = await connection.send(request_bytes("PUT", "/v1/tasks/added", data))
        ready = time.perf_counter()
        answered = await connection.send(ask)
        done = time.perf_counter()
        if put.status not in (200, 201) or answered.status != 200:
            raise BitfitError(f"a task could not be added: {put.body[:300]!r}")
        times["put_ms"].append((ready - began) * 1e3)
        times["first_answer_ms"].append((done - ready) * 1e3)
    connection.close()
    return {name: statistics.median(values) for name, values in times.items()}


def _overload(plan: HttpPlan, folder: Path, rate: float) -> dict[str, Any]:
    """Return what a server does with twice ``rate`` items a second."""
    drawn = _draw(plan, max(plan.counts), OVERLOAD_ITEMS, REQUESTS)
    requests = [_predict_bytes(items) for items in drawn]
    with _ours(plan, folder, "--max-delay-ms", str(OVERLOAD_DELAY_MS)) as server:
        # It must know how fast it is before it can say what it will not manage.
        asyncio.run(_asked(server.port, requests, OVERLOAD_ITEMS, min(2.0, plan.seconds)))
        before = resident_bytes(server.process.pid)
        requests_per_second = 2 * rate / OVERLOAD_ITEMS
        load = asyncio.run(open_loop(server.port, requests, requests_per_second, 3 * plan.seconds))
        after = resident_bytes(server.process.pid)
    marks = np.percentile(load.times, [50, 99, 100]) * 1e3 if load.times else [None] * 3
    p50, p99, longest = (None if mark is None else float(mark) for mark in marks)
    return {
        "offered_items_per_second": 2 * rate,
        "answered_items_per_second": len(load.times) * OVERLOAD_ITEMS / load.seconds,
        "items_per_request": OVERLOAD_ITEMS, "max_delay_ms": OVERLOAD_DELAY_MS,
        "answered": len(load.times), "refused": load.refused, "failed": load.failed,
        "p50_ms": p50, "p99_ms": p99, "longest_ms": longest,
        "server_bytes": [before, after],
    }  # fmt: skip
