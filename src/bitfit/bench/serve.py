"""``bitfit bench serve``: batches of texts for many tasks, in this process, beside other ways."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitfit.batches import make_features
from bitfit.bench.contenders import (
    OTHERS,
    Answer,
    Contender,
    Request,
    choose_contenders,
    random_task,
)
from bitfit.bench.memory import give_back, resident_bytes
from bitfit.bench.plan import check_choices
from bitfit.bench.runs import Unavailable, ratio
from bitfit.bench.timing import describe_machine, describe_versions, in_turns, timed
from bitfit.bench.work import MAX_LENGTH, choose_sources
from bitfit.data import read_dataset
from bitfit.encoder import Encoder, open_encoder
from bitfit.errors import UsageError
from bitfit.rounding import StorageType
from bitfit.serve.engine import Engine, Item, Ready
from bitfit.serve.shelf import Shelf
from bitfit.taskfile import TaskFile
from bitfit.tasks import Task, TextExample

TASKS = (1, 10, 100, 1000)
ITEMS = 32
BATCHES_A_TURN = 4
ADDED = 20
"""Tasks added one by one from files, for the time that takes."""


@dataclass(frozen=True, kw_only=True)
class ServePlan:
    """All that is about to be done."""

    base: str
    encoder: Encoder
    source: str
    """The task whose texts are asked."""
    requests: Sequence[Request]
    counts: Sequence[int]
    items: int
    rounds: int
    storage: StorageType

    @property
    def turns(self) -> int:
        """How often something is told: the tasks are made, then each contender has its turns."""
        return 1 + (self.rounds + 1) * (len(self.counts) + OTHERS)


@dataclass
class _Times:
    """What one contender took."""

    answer: Answer
    seconds: list[float] = field(default_factory=list)
    """Of each batch after the warm-up."""
    cpu_seconds: list[float] = field(default_factory=list)
    """The processor's, all threads together: what other processes take is not in it."""


def make_plan(
    *,
    base: str = "minilm",
    data: str | None = None,
    task: str | None = None,
    counts: Sequence[int] = TASKS,
    items: int = ITEMS,
    rounds: int = 15,
    storage: StorageType = "fp32",
    dtype: str = "fp32",
    device: str = "auto",
) -> ServePlan:
    """Read the texts and return what would be run.

    Args:
        base: ``"minilm"``, a directory, or a name on the model hub.
        data: a GLUE directory; None: the example's sentences that come with the package.
        task: whose texts are asked; None: ``sst2``, of the example ``intent``.
        counts: numbers of tasks that batches are drawn from.
        items: texts in a batch.
        rounds: how often all have their turn, beside one to warm up.
        storage: how rows are kept.
        dtype: ``fp32`` or ``bf16`` of ours; the others are in fp32.
        device: ``auto``, ``cpu``, ``cuda``.

    Raises:
        UsageError: a task or a number that cannot be meant.
        DataError: data that cannot be read.
        BaseModelError: a base that cannot be loaded.
    """
    check_choices(dtype, rounds, items, min(counts, default=0))
    name, task_of_texts, rows = read_texts(data, task)
    encoder = open_encoder(base, dtype, device)
    wanted = items * BATCHES_A_TURN
    texts = [rows[i % len(rows)] for i in range(wanted)]
    made = make_features(
        encoder.base.tokenizer, task_of_texts, texts, encoder.clamp_length(MAX_LENGTH)
    )
    requests = [
        Request(i, texts[i * items : (i + 1) * items], made.items[i * items : (i + 1) * items])
        for i in range(BATCHES_A_TURN)
    ]
    return ServePlan(
        base=base, encoder=encoder, source=name, requests=requests,
        counts=sorted(dict.fromkeys(counts)), items=items, rounds=rounds, storage=storage,
    )  # fmt: skip


def read_texts(data: str | None, task: str | None) -> tuple[str, Task, list[TextExample]]:
    """Return the name of a task, the task, and its texts in a drawn order.

    Args:
        data: a GLUE directory; None: the example's sentences that come with the package.
        task: which; None: ``sst2``, of the example ``intent``.

    Raises:
        UsageError: a task of pairs, or that is not there.
        DataError: data that cannot be read.
    """
    [(name, config)] = choose_sources(data, [task] if task else [], ("sst2",), ("intent",))
    dataset = read_dataset(config)
    if dataset.task.is_pair:
        raise UsageError(f"task {name!r} has pairs of texts; choose one of single texts, as sst2")
    rows = dataset.splits["train"]
    order = np.random.default_rng(0).permutation(len(rows))
    examples = [rows[i] for i in order]
    return name, dataset.task, [e for e in examples if isinstance(e, TextExample)]


def run_plan(
    plan: ServePlan, command: str, on_turn: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """Run all and return the report, ready for JSON."""
    shelf = Shelf(plan.encoder, storage=plan.storage)
    on_turn("making tasks")
    memory = _fill(shelf, max(plan.counts))
    adding = _time_adding(shelf, plan)
    rows = _time_all(plan, shelf, on_turn)
    tokens = [sum(map(len, request.features)) for request in plan.requests]
    return {
        "command": command,
        "hardware": describe_machine(plan.encoder.device),
        "versions": describe_versions(),
        "base": plan.encoder.base.name,
        "encoder_weights": plan.encoder.weights,
        "precision": plan.encoder.precision,
        "storage": plan.storage,
        "texts": plan.source,
        "items": plan.items,
        "tokens_per_batch": statistics.mean(tokens),
        "rounds": plan.rounds,
        "batches_a_turn": BATCHES_A_TURN,
        "rows": rows,
        "memory": memory,
        "adding": adding,
    }


def _fill(shelf: Shelf, count: int) -> dict[str, Any]:
    """Put the tasks on the shelf and return what they take."""
    # First one, taken out again: what is made once for all tasks is not of the tasks.
    shelf.put("first", _as_read(random_task(shelf.encoder, 0)))
    shelf.remove("first")
    give_back()
    before = resident_bytes()
    for i in range(count):
        shelf.put(f"task{i}", _as_read(random_task(shelf.encoder, i)))
    give_back()
    after = resident_bytes()
    infos = shelf.infos()
    numbers = sum(info.bytes for info in infos)
    taken = None if before is None or after is None else after - before
    model = sum(p.numel() * p.element_size() for p in shelf.encoder.model.parameters())
    return {
        "tasks": count,
        "row_bytes": shelf.tasks.bank.row_bytes,
        "row_and_head_bytes": numbers,
        "resident_bytes": taken,
        "ratio": ratio(taken, numbers) if taken is not None else None,
        "bytes_per_task": None if taken is None else taken / count,
        "model_bytes": model,
        "separate_models_bytes": model * count,
    }


def _as_read(file: TaskFile) -> TaskFile:
    return TaskFile.from_bytes(file.to_bytes())


def _time_adding(shelf: Shelf, plan: ServePlan) -> dict[str, Any]:
    """Return the milliseconds from a file to a task that can be asked, and to its first answer."""
    engine, text = Engine(shelf), plan.requests[0].examples[0].text
    times: dict[str, list[float]] = {"read_ms": [], "ready_ms": [], "first_answer_ms": []}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(ADDED):
            path = Path(folder) / f"{i}.bitfit.safetensors"
            random_task(shelf.encoder, 10**6 + i).save(path)
            began = time.perf_counter()
            file = TaskFile.load(path)
            read = time.perf_counter()
            shelf.put("added", file, source=str(path))
            ready = time.perf_counter()
            found = [r for r in engine.prepare([Item("added", text)]) if isinstance(r, Ready)]
            assert len(engine.answer(found)) == 1
            done = time.perf_counter()
            spent = (read - began, ready - read, done - ready)
            for name, seconds in zip(times, spent, strict=True):
                times[name].append(seconds * 1e3)
    shelf.remove("added")
    return {name: statistics.median(values) for name, values in times.items()}


def _time_all(
    plan: ServePlan, shelf: Shelf, on_turn: Callable[[str], None]
) -> list[dict[str, Any]]:
    contenders = choose_contenders(plan.base, shelf, plan.counts, plan.items)
    ready: dict[str, _Times] = {}
    notes: dict[str, str] = {}
    for contender in contenders:
        try:
            ready[contender.name] = _Times(contender.build())
        except Unavailable as error:
            notes[contender.name] = str(error)
    measures = {
        name: lambda turn, times=times: _turn(times, plan.requests, turn, plan.encoder.device)
        for name, times in ready.items()
    }
    rounds = in_turns(measures, plan.rounds, on_turn=lambda name: on_turn(f"answering: {name}"))
    return [
        {
            "name": c.name, "title": c.title, "tasks": c.tasks, "takes_text": c.takes_text,
            "note": notes.get(c.name),
            **(_row(plan, rounds, c, ready) if c.name in ready else {}),
        }
        for c in contenders
    ]  # fmt: skip


def _turn(times: _Times, requests: Sequence[Request], turn: int, device: torch.device) -> float:
    """Return the batches a second of one turn."""
    spent, cpu = [], []
    for request in requests:
        began = time.process_time()
        spent.append(timed(lambda request=request: times.answer(request), device))  # type: ignore[misc]
        cpu.append(time.process_time() - began)
    if turn:
        times.seconds += spent
        times.cpu_seconds += cpu
    return len(spent) / sum(spent)


def _row(
    plan: ServePlan,
    rounds: dict[str, list[float]],
    contender: Contender,
    ready: dict[str, _Times],
) -> dict[str, Any]:
    rate = statistics.median(rounds[contender.name])
    tokens = statistics.mean(sum(map(len, r.features)) for r in plan.requests)
    # Of the same round: what slows one slows the other.
    shares = [a / b for a, b in zip(rounds[contender.name], rounds["folded"], strict=True)]
    own, folded = ready[contender.name], ready["folded"]
    p50, p99 = np.percentile(own.seconds, [50, 99])
    cpu = [a / b for a, b in zip(folded.cpu_seconds, own.cpu_seconds, strict=True)]
    return {
        "items_per_second": rate * plan.items,
        "tokens_per_second": rate * tokens,
        "ratio_to_folded": statistics.median(shares),
        "cpu_ratio_to_folded": statistics.median(cpu),
        "p50_ms": float(p50) * 1e3,
        "p99_ms": float(p99) * 1e3,
        "batches_per_second_by_round": rounds[contender.name],
    }
