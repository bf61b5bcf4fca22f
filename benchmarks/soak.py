"""A server under load while its tasks are added, replaced, rolled back and removed all the time.

    OMP_NUM_THREADS=1 python benchmarks/soak.py --items 200000 --json
    python benchmarks/soak.py --base DIR --items 3000

A real server (a process of its own, this machine only) is asked by many clients at once while
others change its tasks. Every answer is checked against a history of what each task was when:

- its fingerprint and version are of a version that the task had between request and answer;
- its numbers are those that this version gives to this text alone, computed before by an engine
  that holds no other task (``--tolerance``). How far off another task's row, head or text would be
  is measured too and stands in the report;
- a task is unknown only where it was removed, or never there, between request and answer;
- every request is answered, item by item in order, or refused with an error of the known shape.

Some clients go away without their answer, some give no time, some send nonsense. ``--max-resident``
is below the number of tasks, so rows are dropped and read again. At the end nothing may wait, no
row may be left of what is gone, the tasks must be those of the history, and the server's memory
must not have grown. Exit code 1: something of this did not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bitfit.bank import Layout
from bitfit.bench.connection import Connection, Reply, json_bytes, request_bytes
from bitfit.bench.memory import resident_bytes
from bitfit.bench.running import Running, last_lines, running, stop
from bitfit.bench.timing import describe_machine, describe_versions
from bitfit.encoder import Encoder, open_encoder
from bitfit.errors import BitfitError
from bitfit.heads import make_head
from bitfit.serve.engine import Engine, Item, Ready
from bitfit.serve.shelf import Shelf
from bitfit.taskfile import TaskFile
from bitfit.tasks import Task
from bitfit.terms import choose_sites

KINDS = ("classification", "classification", "multilabel", "regression")
# Words that the tokenizers of real bases and of the tests' tiny ones know.
WORDS = (
    "the a good bad film was is not very i you we it this that bike order where my money back now "
    "please when will arrive broken late nice slow fast red blue car who what yes no on in at to of"
).split()
SIZES = (1, 1, 2, 8, 32)
"""Items of a request, each as often."""
ANSWER_SECONDS = 120.0
"""A request without an answer for so long is lost."""
ENOUGH = 20
"""So many violations end it."""
SEEN = 0.98
"""Of answers with a wrong row or text at least this share must differ by more than is allowed."""
WARM_UP = 0.1
"""Of the items: memory counts from then on."""
Numbers = Mapping[str, float]


# --- the tasks and what they answer ---------------------------------------------------------------


@dataclass(frozen=True)
class Content:
    """A task file that may be uploaded, and what it answers."""

    data: bytes
    fingerprint: str
    kind: str
    answers: Mapping[str, Numbers]
    """By text."""


def make_file(encoder: Encoder, number: int, head_of: int | None = None) -> TaskFile:
    """Return a task of random numbers whose labels say which it is.

    Args:
        encoder: the base.
        number: of the row, and of the head where the next is None.
        head_of: number of the head, its labels and kind.
    """
    other = number if head_of is None else head_of
    kind = KINDS[other % len(KINDS)]
    labels = () if kind == "regression" else tuple(f"f{other}-{i}" for i in range(2 + other % 4))
    task = Task(name=f"file{other}", kind=kind, labels=labels)
    head = make_head(task, encoder)
    layout = Layout(choose_sites(encoder.sites, "all", inert=encoder.inert_terms))
    generator = torch.Generator().manual_seed(number)
    return TaskFile(
        task=task, bias=torch.randn(layout.n, generator=generator) * 0.1, layout=layout.to_json(),
        head=head.split(head.init(other, std=0.3)), head_style=head.style, pooling=head.pooling,
        max_length=64, base=encoder.base.identity, tokenizer=encoder.base.tokenizer_sha256,
    )  # fmt: skip


def make_texts(count: int, seed: int) -> list[str]:
    """Return different short texts."""
    chosen = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(chosen.choice(WORDS) for _ in range(chosen.randint(3, 10)))] = None
    return list(found)


def numbers(kind: str, result: Mapping[str, Any]) -> Numbers:
    """Return the numbers of an answer by label, or that of a regression."""
    if kind == "regression":
        return {"value": result["value"]}
    return {entry["label"]: entry["score"] for entry in result["scores"]}


def difference(found: Numbers, expected: Numbers) -> float:
    """Return the largest difference; infinite where the labels are others."""
    if found.keys() != expected.keys():
        return math.inf
    gaps = [abs(found[label] - value) for label, value in expected.items()]
    return math.inf if any(map(math.isnan, gaps)) else max(gaps)


def answers_alone(encoder: Encoder, file: TaskFile, texts: Sequence[str]) -> dict[str, Numbers]:
    """Return what a task says of each text where nothing else is in memory, one text at a time."""
    shelf = Shelf(encoder)
    shelf.put("only", file)
    engine = Engine(shelf)
    found = {}
    for text in texts:
        ready = [each for each in engine.prepare([Item("only", text)]) if isinstance(each, Ready)]
        [answer] = engine.answer(ready)
        found[text] = numbers(answer.kind, answer.result)
    return found


def make_contents(encoder: Encoder, count: int, texts: Sequence[str]) -> list[Content]:
    found = []
    for i in range(count):
        data = make_file(encoder, i).to_bytes()
        file = TaskFile.from_bytes(data)
        answers = answers_alone(encoder, file, texts)
        found.append(Content(data, file.seal[:16], file.task.kind, answers))
    return found


def measure_sharpness(
    encoder: Encoder, contents: Sequence[Content], texts: Sequence[str], tolerance: float
) -> dict[str, float]:
    """Return which share of answers with a wrong row, or text, would be seen, and how far off.

    A wrong row with the right head: with a wrong head the labels are others, or the kind.

    Raises:
        BitfitError: too few would be seen to trust what is found.
    """
    rows, others = [], []
    for i, content in enumerate(contents[:8]):
        mixed = make_file(encoder, (i + 1) % len(contents), head_of=i)
        wrong = answers_alone(encoder, mixed, texts)
        rows += [difference(wrong[text], content.answers[text]) for text in texts]
        others += [
            difference(content.answers[a], content.answers[b]) for a, b in itertools.pairwise(texts)
        ]
    found = {}
    for what, gaps in (("row", rows), ("text", others)):
        found[f"wrong_{what}_seen"] = statistics.mean(gap > tolerance for gap in gaps)
        found[f"wrong_{what}_median_difference"] = statistics.median(gaps)
        if found[f"wrong_{what}_seen"] < SEEN:
            raise BitfitError(
                f"only {found[f'wrong_{what}_seen']:.1%} of answers with a wrong {what} would be "
                f"seen; take a smaller --tolerance than {tolerance:g}, or another --seed"
            )
    return found


# --- what each task was when ----------------------------------------------------------------------


@dataclass
class State:
    """What a task was from ``begin`` (its change was sent) to ``end`` (the next was answered)."""

    content: Content | None
    """None: not there."""
    version: int
    begin: float
    end: float = math.inf
    is_pinned: bool = False


class History:
    """All states of one task, the last of them now; changed by one client only."""

    def __init__(self) -> None:
        self.states = [State(None, 0, -math.inf)]

    @property
    def now(self) -> State:
        """The last state."""
        return self.states[-1]

    @contextmanager
    def change(self, state: State) -> Iterator[None]:
        """Return a context in which both states may be met."""
        before = self.now
        self.states.append(state)
        yield
        before.end = time.monotonic()

    def between(self, begin: float, end: float) -> list[State]:
        """Return the states that a request of this time may have met, the last first."""
        found = []
        for state in reversed(self.states):
            if state.end < begin:
                break
            if state.begin <= end:
                found.append(state)
        return found


def check_item(
    item: Mapping[str, Any], answer: Mapping[str, Any], possible: Sequence[State],
    tolerance: float,
) -> str | None:  # fmt: skip
    """Return what is wrong with an answer; None: nothing.

    Args:
        item: what was asked.
        answer: what came.
        possible: the states that its task may have had.
        tolerance: largest difference of a number.
    """
    if (answer.get("task"), answer.get("id")) != (item["task"], item["id"]):
        return f"is of another item: {answer.get('task')!r}, {answer.get('id')!r}"
    error = answer.get("error")
    if error is not None:
        code = error.get("code")
        if code == "unknown_task" and any(s.content is None for s in possible):
            return None
        if code == "bad_input" and "text_pair" in item:
            return None
        return f"error {error}"
    if "text_pair" in item:
        return "a pair was answered by a task of single texts"
    for state in possible:
        content = state.content
        if content is not None and (content.fingerprint, state.version) == (
            answer["fingerprint"], answer["version"],
        ):  # fmt: skip
            expected = content.answers[item["text"]]
            gap = difference(numbers(content.kind, answer["result"]), expected)
            return None if gap <= tolerance else f"numbers differ by {gap:.3g}: {answer['result']}"
    known = [(s.version, s.content and s.content.fingerprint) for s in possible]
    return f"version {answer['version']} of {answer['fingerprint']}, possible were {known}"


# --- the soak -------------------------------------------------------------------------------------


@dataclass
class Soak:
    """What all clients share."""

    arguments: argparse.Namespace
    contents: Sequence[Content]
    texts: Sequence[str]
    server: Running
    until: float
    on_items: Callable[[int], None]
    histories: dict[str, History] = field(default_factory=dict)
    items: int = 0
    """Answered, each by an answer or an error of its own."""
    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    samples: list[tuple[float, int, int]] = field(default_factory=list)
    """Seconds, items, bytes of the server."""
    began: float = field(default_factory=time.monotonic)

    @property
    def is_over(self) -> bool:
        """Whether the clients stop."""
        return (
            self.items >= self.arguments.items
            or time.monotonic() >= self.until
            or len(self.violations) >= ENOUGH
        )

    def blame(self, what: str) -> None:
        """Note something that must not be."""
        self.violations.append(f"after {self.items} items: {what}"[:600])

    async def send(self, connection: Connection, request: bytes, what: str) -> Reply | None:
        """Return the answer to a request; None: it was lost, which is noted."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await connection.send(request)
        except (OSError, EOFError, TimeoutError) as error:
            self.blame(f"{what}: no answer ({type(error).__name__}: {error})")
            return None


def draw_item(soak: Soak, chosen: random.Random, number: int) -> dict[str, Any]:
    item = {
        "task": chosen.choice(list(soak.histories)), "text": chosen.choice(soak.texts),
        "id": str(number),
    }  # fmt: skip
    kind = chosen.random()
    if kind < 0.01:
        item["task"] = f"nobody{chosen.randrange(10**6)}"
    elif kind < 0.02:
        item["text_pair"] = "too much"
    return item


async def ask(soak: Soak, number: int) -> None:
    """Ask, one request after another."""
    chosen = random.Random(f"{soak.arguments.seed} asks {number}")
    connection = Connection(soak.server.port)
    while not soak.is_over:
        size = chosen.choice(SIZES)
        items = [draw_item(soak, chosen, i) for i in range(size)]
        body: dict[str, Any] = {"items": items}
        if chosen.random() < 0.02:
            body["deadline_ms"] = chosen.choice((1, 20, 200))
        request = json_bytes("/v1/predict", body)
        kind = chosen.random()
        if kind < 0.02:
            await go_away(soak, request, chosen.random() * 0.1)
        elif kind < 0.03:
            await send_nonsense(soak, connection, request[:-1])
        else:
            await check_request(soak, connection, items, request, "deadline_ms" in body)
    connection.close()


async def go_away(soak: Soak, request: bytes, seconds: float) -> None:
    connection = Connection(soak.server.port)
    with suppress(OSError):
        await connection.begin(request)
        await asyncio.sleep(seconds)
    connection.close()
    soak.counts["requests abandoned"] += 1


async def send_nonsense(soak: Soak, connection: Connection, request: bytes) -> None:
    body = request.partition(b"\r\n\r\n")[2]
    cut = request_bytes("POST", "/v1/predict", body, "application/json")
    reply = await soak.send(connection, cut, "nonsense")
    if reply is not None and (reply.status, error_code(reply)) != (400, "bad_json"):
        soak.blame(f"nonsense: {reply.status} {reply.body[:200]!r}")
    soak.counts["requests of nonsense"] += 1


async def check_request(
    soak: Soak, connection: Connection, items: Sequence[Mapping[str, Any]], request: bytes,
    has_deadline: bool,
) -> None:  # fmt: skip
    """Send a request and check all of its answer."""
    begin = time.monotonic()
    reply = await soak.send(connection, request, f"{len(items)} items")
    end = time.monotonic()
    if reply is None:
        return
    answers = read_answers(items, reply)
    if answers is None:
        code = error_code(reply)
        usual = {(429, "queue_full"), (503, "busy")} | (
            {(504, "deadline")} if has_deadline else set()
        )
        if (reply.status, code) not in usual:
            soak.blame(f"{len(items)} items: {reply.status} {reply.body[:300]!r}")
        soak.counts[f"requests refused: {code}"] += 1
        if reply.status in (429, 503):
            await asyncio.sleep(0.2)
        return
    soak.counts["requests answered"] += 1
    for item, answer in zip(items, answers, strict=True):
        history = soak.histories.get(item["task"], NEVER)
        wrong = check_item(item, answer, history.between(begin, end), soak.arguments.tolerance)
        if wrong is not None:
            soak.blame(f"task {item['task']!r}, text {item['text']!r}: {wrong}")
        error = answer.get("error")
        soak.counts["items answered" if error is None else f"items: {error.get('code')}"] += 1
    soak.items += len(items)
    soak.on_items(soak.items)


NEVER = History()
"""Of a task that never was."""


def read_answers(
    items: Sequence[Mapping[str, Any]], reply: Reply
) -> Sequence[Mapping[str, Any]] | None:
    """Return an answer for each item; None: the request has an error of its own instead."""
    if reply.status == 200:
        found = reply.json()["answers"]
        return found if len(found) == len(items) else None
    if (reply.status, error_code(reply), len(items)) == (404, "unknown_task", 1):
        error = reply.json()["error"]
        return [{"task": items[0]["task"], "id": items[0]["id"], "error": error}]
    return None


def error_code(reply: Reply) -> str | None:
    """Return the code of an error; None: it is not of the shape that all errors have."""
    try:
        error = reply.json()["error"]
        return error["code"] if isinstance(error["message"], str) else None
    except (ValueError, KeyError, TypeError):
        return None


# --- changes --------------------------------------------------------------------------------------


class Editor:
    """Changes tasks that no other editor changes, so that their history is known.

    Args:
        soak: what all clients share.
        number: of the editor.
        names: of its tasks.
    """

    def __init__(self, soak: Soak, number: int, names: Sequence[str]) -> None:
        self.soak, self.names = soak, names
        self.chosen = random.Random(f"{soak.arguments.seed} edits {number}")
        self.connection = Connection(soak.server.port)
        self.before: dict[str, State | None] = dict.fromkeys(names)
        soak.histories.update({name: History() for name in names})

    async def fill(self) -> None:
        """Put every task."""
        for name in self.names:
            await self.put(name)

    async def work(self) -> None:
        """Change one task after another."""
        while not self.soak.is_over:
            name = self.chosen.choice(self.names)
            choice = self.chosen.random()
            if self.soak.histories[name].now.content is None or choice < 0.5:
                await self.put(name)
            elif choice < 0.7:
                await self.roll_back(name)
            elif choice < 0.9:
                await self.remove(name)
            else:
                await self.put_broken(name)
            await asyncio.sleep(self.chosen.random() * self.soak.arguments.pause * 2)
        self.connection.close()

    async def put(self, name: str) -> None:
        """Add a task, or replace it by another file."""
        now = self.soak.histories[name].now
        content = self.chosen.choice([c for c in self.soak.contents if c is not now.content])
        is_pinned = self.chosen.random() < 0.05
        query = "?pinned=true" if is_pinned else ""
        request = request_bytes("PUT", f"/v1/tasks/{name}{query}", content.data)
        state = State(content, now.version + 1, time.monotonic(), is_pinned=is_pinned)
        what = "added" if now.content is None else "replaced"
        if await self.change(name, state, request, 201 if now.content is None else 200, what):
            self.before[name] = None if now.content is None else now

    async def roll_back(self, name: str) -> None:
        """Bring the version before back; where there is none that must be said."""
        now, before = self.soak.histories[name].now, self.before[name]
        request = request_bytes("POST", f"/v1/tasks/{name}/rollback")
        if before is None:
            await self.expect(name, request, 409, "no_version_before")
            return
        state = State(before.content, now.version + 1, time.monotonic(), is_pinned=before.is_pinned)
        if await self.change(name, state, request, 200, "rolled back"):
            self.before[name] = now

    async def remove(self, name: str) -> None:
        """Take a task out."""
        now = self.soak.histories[name].now
        request = request_bytes("DELETE", f"/v1/tasks/{name}")
        state = State(None, now.version, time.monotonic())
        if await self.change(name, state, request, 204, "removed"):
            self.before[name] = None

    async def put_broken(self, name: str) -> None:
        """Upload a file with one wrong bit, which must change nothing."""
        data = bytearray(self.chosen.choice(self.soak.contents).data)
        data[-self.chosen.randrange(1, len(data) // 2)] ^= 1 << self.chosen.randrange(8)
        request = request_bytes("PUT", f"/v1/tasks/{name}", bytes(data))
        await self.expect(name, request, 422, "bad_file")

    async def change(self, name: str, state: State, request: bytes, status: int, what: str) -> bool:
        """Send a change; return whether it was made as it should."""
        with self.soak.histories[name].change(state):
            reply = await self.soak.send(self.connection, request, f"{name} {what}")
        if reply is None:
            return False
        if reply.status != status:
            self.soak.blame(f"{name} {what}: {reply.status} {reply.body[:300]!r}")
            return False
        if state.content is not None:
            info = reply.json()
            found = info["version"], info["fingerprint"]
            if found != (state.version, state.content.fingerprint):
                self.soak.blame(
                    f"{name} {what}: is {found}, expected version {state.version} of "
                    f"{state.content.fingerprint}"
                )
        self.soak.counts[f"tasks {what}"] += 1
        return True

    async def expect(self, name: str, request: bytes, status: int, code: str) -> None:
        """Send what must be refused."""
        reply = await self.soak.send(self.connection, request, f"{name}: {code}")
        if reply is not None and (reply.status, error_code(reply)) != (status, code):
            self.soak.blame(f"{name}: expected {code}: {reply.status} {reply.body[:300]!r}")
        self.soak.counts[f"changes refused: {code}"] += 1


# --- the end --------------------------------------------------------------------------------------


async def sample_memory(soak: Soak) -> None:
    """Note the server's memory again and again."""
    while True:
        taken = resident_bytes(soak.server.process.pid)
        if taken is not None:
            soak.samples.append((time.monotonic() - soak.began, soak.items, taken))
        await asyncio.sleep(max(0.2, min(5.0, (time.monotonic() - soak.began) / 50)))


async def check_end(soak: Soak) -> dict[str, Any]:
    """Return what the server says of itself when all are done, after checking it."""
    connection = Connection(soak.server.port)
    tasks: dict[str, Any] = {}
    stats: dict[str, Any] = {}
    for _ in range(600):  # what was abandoned may still be computed
        for path, found in (("/v1/stats", stats), ("/v1/tasks?limit=1000", tasks)):
            reply = await soak.send(connection, request_bytes("GET", path), path)
            if reply is None:
                return {}
            found |= reply.json()
        resident = [task for task in tasks["tasks"] if task["resident"]]
        kept = [task for task in resident if not task["pinned"]]
        if (
            stats["queue"] == {"items": 0, "tokens": 0}
            and stats["resident"] == len(resident)
            and len(kept) <= soak.arguments.max_resident
        ):
            break
        await asyncio.sleep(0.1)
    else:
        soak.blame(
            f"at rest: queue {stats['queue']}, {stats['resident']} rows in memory of "
            f"{len(resident)} tasks that have one, {len(kept)} of these not pinned, at most "
            f"{soak.arguments.max_resident} are allowed"
        )
    expected = {
        name: (now.version, now.content.fingerprint, now.is_pinned)
        for name, history in soak.histories.items()
        if (now := history.now).content is not None
    }
    found = {t["name"]: (t["version"], t["fingerprint"], t["pinned"]) for t in tasks["tasks"]}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            soak.blame(f"at the end {name} is {found.get(name)}, expected {expected.get(name)}")
    connection.close()
    return {"tasks": len(found), "resident": stats["resident"], "latency_ms": stats["latency_ms"]}


def check_memory(soak: Soak) -> dict[str, Any]:
    """Return how the server's memory went, after checking that it did not grow."""
    first = WARM_UP * soak.items
    warm = [sample for sample in soak.samples if sample[1] >= first]
    if len(warm) < 4:
        if soak.samples:
            soak.blame("too few samples of memory to say anything: take more items")
        return {"samples": len(soak.samples), "growth_mb": None}
    part = max(1, len(warm) // 10)
    begin = statistics.median(taken for _, _, taken in warm[:part]) / 1e6
    end = statistics.median(taken for _, _, taken in warm[-part:]) / 1e6
    _, items, taken = np.array(warm).T
    slope = float(np.polyfit(items, taken, 1)[0]) if items[-1] > items[0] else math.nan
    bound = soak.arguments.max_growth_mb
    if end - begin > bound:
        soak.blame(f"memory went from {begin:.1f} to {end:.1f} MB; at most {bound} MB are allowed")
    shown = soak.samples[:: max(1, len(soak.samples) // 200)]
    return {
        "samples": len(soak.samples), "after_warm_up_mb": round(begin, 1),
        "at_end_mb": round(end, 1), "growth_mb": round(end - begin, 1), "bound_mb": bound,
        "bytes_per_item": round(slope, 1), "most_mb": round(float(taken.max()) / 1e6, 1),
        "seconds_items_mb": [[round(s, 1), n, round(b / 1e6, 1)] for s, n, b in shown],
    }  # fmt: skip


def check_log(soak: Soak) -> None:
    """Note what the server says went wrong in it."""
    with soak.server.log.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if '"internal_error"' in line or "Traceback" in line or '_failed"' in line:
                soak.blame(f"the server's log: {line.strip()}")
                return


def check_uploads(soak: Soak, folder: Path) -> int:
    """Return the number of files that the server kept, none of which may be of nobody."""
    listed = json.loads((folder / ".uploads" / "tasks.json").read_text(encoding="utf-8"))["tasks"]
    used = {digest for entry in listed.values() for digest in entry["files"]}
    kept = {path.name.partition(".")[0] for path in (folder / ".uploads").glob("*.safetensors")}
    if kept != used:
        soak.blame(f"files kept of uploads: {len(kept)}, of which tasks have {len(used)}")
    return len(kept)


async def load(soak: Soak) -> dict[str, Any]:
    """Let all clients work until it is over; return what the server says of itself then."""
    names = [f"task{i}" for i in range(soak.arguments.tasks)]
    count = soak.arguments.editors
    editors = [Editor(soak, i, names[i::count]) for i in range(count)]
    await asyncio.gather(*(editor.fill() for editor in editors))
    watching = asyncio.create_task(sample_memory(soak))
    asking = [ask(soak, i) for i in range(soak.arguments.clients)]
    await asyncio.gather(*asking, *(editor.work() for editor in editors))
    watching.cancel()
    return await check_end(soak)


def run(arguments: argparse.Namespace, on_items: Callable[[int], None]) -> dict[str, Any]:
    """Soak a server and return the report."""
    torch.set_num_threads(1)
    encoder = open_encoder(arguments.base, "fp32", "cpu")
    texts = make_texts(arguments.texts, arguments.seed)
    contents = make_contents(encoder, arguments.files, texts)
    sharpness = measure_sharpness(encoder, contents, texts, arguments.tolerance)
    options = [
        "--dtype", "fp32", "--device", "cpu", "--threads", "1", "--watch", "1",
        "--max-resident", str(arguments.max_resident),
    ]  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as folder,
        running(arguments.base, folder, *options) as server,
    ):
        soak = Soak(
            arguments, contents, texts, server, time.monotonic() + arguments.seconds, on_items
        )
        at_rest = asyncio.run(load(soak))
        seconds = time.monotonic() - soak.began
        memory = check_memory(soak)
        if (status := stop(server.process)) != 0:
            soak.blame(f"the server ended with status {status}: {last_lines(server.log)}")
        check_log(soak)
        kept = check_uploads(soak, Path(folder))
    return {
        "command": " ".join(["python", *sys.argv]),
        "hardware": describe_machine(encoder.device), "versions": describe_versions(),
        "base": arguments.base, "tasks": arguments.tasks, "max_resident": arguments.max_resident,
        "clients": arguments.clients, "editors": arguments.editors,
        "tolerance": arguments.tolerance, "sharpness": sharpness,
        "items": soak.items, "seconds": round(seconds, 1),
        "items_per_s": round(soak.items / seconds, 1), "counts": dict(sorted(soak.counts.items())),
        "at_rest": at_rest | {"files": kept}, "memory": memory, "violations": soak.violations,
    }  # fmt: skip


def show(found: Mapping[str, Any]) -> None:
    """Print the report for a person."""
    memory = found["memory"]
    print(found["command"])
    print(f"{found['items']} items in {found['seconds']} s, {found['tasks']} tasks, of which at "
          f"most {found['max_resident']} in memory")  # fmt: skip
    for what, count in found["counts"].items():
        print(f"  {count:>8} {what}")
    if memory["growth_mb"] is not None:
        print(f"memory: {memory['after_warm_up_mb']} MB after warming up, {memory['at_end_mb']} MB "
              f"at the end ({memory['bytes_per_item']} bytes an item)")  # fmt: skip
    sharp = found["sharpness"]
    print(
        f"of answers by a wrong row {sharp['wrong_row_seen']:.1%} would be seen: they differ by "
        f"{sharp['wrong_row_median_difference']:.2g}, {found['tolerance']:g} is allowed"
    )
    print("all held" if not found["violations"] else f"{len(found['violations'])} did not hold:")
    for violation in found["violations"]:
        print(" ", violation)


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """Return a context with a function that is told how many items are answered.

    It moves a bar; without a terminal it writes a line every minute.
    """
    console = Console(stderr=True)
    if console.is_terminal:
        columns = TextColumn("items"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console, transient=True) as bar:
            row = bar.add_task("items", total=total)
            yield lambda items: bar.update(row, completed=items)
        return
    last = time.monotonic()

    def note(items: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 60:
            last = time.monotonic()
            print(f"{items} of {total} items", file=sys.stderr, flush=True)

    yield note


def main(words: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="minilm")
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=7200.0, help="no longer than that")
    parser.add_argument("--clients", type=int, default=24, help="that ask at once")
    parser.add_argument("--editors", type=int, default=3, help="that change tasks at once")
    parser.add_argument(
        "--pause", type=float, default=0.3, help="seconds between an editor's changes"
    )
    parser.add_argument("--tasks", type=int, default=60, help="names that are used")
    parser.add_argument("--files", type=int, default=64, help="different task files")
    parser.add_argument("--texts", type=int, default=32, help="different texts")
    parser.add_argument("--max-resident", type=int, default=24, help="rows in memory, as of serve")
    parser.add_argument("--max-growth-mb", type=float, default=32.0, help="of the server's memory")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of a number of an answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(words)
    with progress(arguments.items) as on_items:
        found = run(arguments, on_items)
    print(json.dumps(found)) if arguments.json else show(found)
    return 1 if found["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
