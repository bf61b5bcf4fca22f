"""What HTTP costs: a server beside the same engine in process, and a server with too much to do.

    OMP_NUM_THREADS=1 python benchmarks/over_http.py --json
    python benchmarks/over_http.py --tasks 1000 --seconds 20 --threads 2

Rounds of both ways alternate on the same items: texts of the shipped example, each for a task of
its own drawn at random. 64 clients keep their connections and always have a request open. Then
requests come at twice the rate that was carried, whether answered or not, to a server that may let
a request wait for one second.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitfit.bank import Layout
from bitfit.demo import TASKS, example_files
from bitfit.doctor import cpu_name, package_version
from bitfit.encoder import Encoder, open_encoder
from bitfit.heads import make_head
from bitfit.serve.engine import Engine, Item
from bitfit.serve.shelf import Shelf
from bitfit.taskfile import TaskFile
from bitfit.tasks import Task
from bitfit.terms import choose_sites


def make_tasks(encoder: Encoder, count: int) -> list[TaskFile]:
    """Return so many random tasks of 2 to 8 labels."""
    generator = torch.Generator().manual_seed(0)
    layout = Layout(choose_sites(encoder.sites, "all", inert=encoder.inert_terms))
    found = []
    for i in range(count):
        labels = tuple(f"label {j}" for j in range(2 + i % 7))
        task = Task(name=f"task{i}", kind="classification", labels=labels)
        head = make_head(task, encoder, "auto")
        base = encoder.base
        found.append(
            TaskFile(
                task=task,
                bias=torch.randn(layout.n, generator=generator) * 0.01,
                layout=layout.to_json(),
                head={
                    name: torch.randn(shape, generator=generator) * 0.05
                    for name, shape in head.shapes.items()
                },
                head_style=head.style,
                pooling=head.pooling,
                max_length=128,
                base=base.identity,
                tokenizer=base.tokenizer_sha256,
            )
        )
    return found


def read_texts() -> list[str]:
    texts = []
    for name in TASKS:
        with example_files(name)[0].open(newline="", encoding="utf-8") as file:
            texts += [row["text"] for row in csv.DictReader(file)]
    return texts


def draw(texts: list[str], tasks: int, items: int, seed: int) -> list[dict[str, str]]:
    chosen = random.Random(seed)
    return [
        {"task": f"task{chosen.randrange(tasks)}", "text": chosen.choice(texts)}
        for _ in range(items)
    ]


# --- in process -----------------------------------------------------------------------------------


def in_process(engine: Engine, calls: list[list[Item]], seconds: float) -> tuple[float, float]:
    """Return items per second, each call prepared and answered, and CPU seconds per item."""
    done, began, number, cpu = 0, time.perf_counter(), 0, time.process_time()
    while (spent := time.perf_counter() - began) < seconds:
        call = calls[number % len(calls)]
        engine.answer(engine.prepare(call))  # type: ignore[arg-type]
        done, number = done + len(call), number + 1
    return done / spent, (time.process_time() - cpu) / done


# --- over HTTP ------------------------------------------------------------------------------------


class Connection:
    """HTTP/1.1 as bare as can be: what is measured is the server."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, request: bytes) -> int:
        """Send a request, read its answer to the end, and return the status."""
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 22)
        reader, writer = self.streams
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(re.search(rb"content-length: (\d+)", head, re.I)[1]))
        return int(head[9:12])

    def close(self) -> None:
        """Close the connection."""
        if self.streams is not None:
            self.streams[1].close()


def request_bytes(items: list[dict[str, str]]) -> bytes:
    body = json.dumps({"items": items}).encode()
    head = f"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def closed_loop(port: int, requests: list[bytes], clients: int, seconds: float) -> Any:
    """Return requests per second and the seconds of each; each client has one request open."""
    times: list[float] = []
    until = time.perf_counter() + seconds

    async def client(number: int) -> None:
        connection, turn = Connection(port), number
        while (began := time.perf_counter()) < until:
            status = await connection.send(requests[turn % len(requests)])
            assert status == 200, status
            times.append(time.perf_counter() - began)
            turn += clients
        connection.close()

    began = time.perf_counter()
    await asyncio.gather(*map(client, range(clients)))
    return len(times) / (time.perf_counter() - began), times


async def open_loop(port: int, requests: list[bytes], rate: float, seconds: float) -> Any:
    """Return what became of requests that come at ``rate``: (status, seconds) of each."""
    idle: list[Connection] = []
    found: list[tuple[int, float]] = []

    async def one(request: bytes) -> None:
        connection = idle.pop() if idle else Connection(port)
        began = time.perf_counter()
        found.append((await connection.send(request), time.perf_counter() - began))
        idle.append(connection)

    pending, number, began = set(), 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        while number < spent * rate:
            task = asyncio.create_task(one(requests[number % len(requests)]))
            pending.add(task)
            task.add_done_callback(pending.discard)
            number += 1
        await asyncio.sleep(0.002)
    await asyncio.gather(*pending)
    return found


@contextmanager
def server(folder: Path, arguments: argparse.Namespace, *more: str) -> Iterator[tuple[int, int]]:
    """Start a server; its port and its process."""
    command = [sys.executable, "-m", "bitfit", "serve", "--base", arguments.base, "--tasks",
               str(folder), "--port", "0", "--dtype", arguments.dtype, "--watch", "0",
               "--threads", str(arguments.threads), "--quiet", *more]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            line = process.stdout.readline()
            yield int(line.strip().rstrip("/").rpartition(":")[2]), process.pid
        finally:
            process.terminate()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def spread(times: list[float]) -> dict[str, float]:
    marks = np.percentile(times, (50, 99, 100)) * 1000
    names = ("p50_ms", "p99_ms", "max_ms")
    return {name: round(float(mark), 1) for name, mark in zip(names, marks, strict=True)}


# --- all of it ------------------------------------------------------------------------------------


def compare_ways(
    engine: Engine,
    port: int,
    pid: int,
    texts: list[str],
    size: int,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Return what both ways did, in turns, with requests of ``size`` items.

    CPU time is that of the engine's process and of the server's: other programs change it little.
    """
    drawn = [draw(texts, arguments.tasks, size, seed) for seed in range(256)]
    requests = [request_bytes(items) for items in drawn]
    items = [Item(**item) for request in drawn for item in request]
    # The best that the engine does: full batches.
    calls = [items[i : i + 256] for i in range(0, len(items), 256)]
    inside, outside, times = [], [], []
    cpu_inside, cpu_outside = [], []
    in_process(engine, calls, 1)
    asyncio.run(closed_loop(port, requests, arguments.clients, 0.1))
    for _ in range(arguments.rounds):
        rate, cpu = in_process(engine, calls, arguments.seconds)
        inside.append(rate)
        cpu_inside.append(cpu * 1000)
        before = cpu_seconds(pid)
        rate, took = asyncio.run(closed_loop(port, requests, arguments.clients, arguments.seconds))
        outside.append(rate * size)
        cpu_outside.append((cpu_seconds(pid) - before) / (len(took) * size) * 1000)
        times += took
    return {
        "items_per_request": size, "clients": arguments.clients,
        "in_process_items_per_s": round(statistics.median(inside), 1),
        "http_items_per_s": round(statistics.median(outside), 1),
        "ratio": round(statistics.median(o / i for o, i in zip(outside, inside, strict=True)), 3),
        "rounds": [[round(i, 1), round(o, 1)] for i, o in zip(inside, outside, strict=True)],
        "cpu_ms_per_item": [
            round(statistics.median(cpu_inside), 2),
            round(statistics.median(cpu_outside), 2),
        ],
        **spread(times),
    }  # fmt: skip


def overload(folder: Path, texts: list[str], rate: float, arguments: argparse.Namespace) -> Any:
    """Return what a server does with twice ``rate`` items per second, in requests of 8."""
    size = 8
    requests = [request_bytes(draw(texts, arguments.tasks, size, s)) for s in range(256)]
    with server(folder, arguments, "--max-delay-ms", "1000") as (port, pid):
        asyncio.run(closed_loop(port, requests, 8, 2))
        before = resident_mb(pid)
        began = time.perf_counter()
        found = asyncio.run(open_loop(port, requests, 2 * rate / size, arguments.overload_seconds))
        spent = time.perf_counter() - began
        after = resident_mb(pid)
    accepted = [seconds for status, seconds in found if status == 200]
    return {
        "offered_items_per_s": round(2 * rate, 1),
        "answered_items_per_s": round(len(accepted) * size / spent, 1),
        "accepted": len(accepted), "refused": sum(status == 429 for status, _ in found),
        "other": sum(status not in (200, 429) for status, _ in found),
        "memory_mb": [round(before, 1), round(after, 1)], **spread(accepted),
    }  # fmt: skip


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(arguments.threads)
    encoder = open_encoder(arguments.base, arguments.dtype)
    texts = read_texts()
    shelf = Shelf(encoder)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in make_tasks(encoder, arguments.tasks):
            file.save(folder / f"{file.task.name}.bitfit.safetensors")
        shelf.sync(folder)
        engine = Engine(shelf)
        patient = ("--max-delay-ms", "600000", "--deadline-ms", "600000")
        with server(folder, arguments, *patient) as (port, pid):
            ways = [compare_ways(engine, port, pid, texts, size, arguments) for size in (32, 1)]
        loaded = overload(folder, texts, ways[0]["http_items_per_s"], arguments)
    return {
        "command": " ".join(["python", *sys.argv]),
        "machine": {
            "cpu": cpu_name(), "cores": os.cpu_count(), "threads": arguments.threads,
            "load_average": os.getloadavg()[0], "python": platform.python_version(),
            **{p: package_version(p) for p in ("torch", "transformers", "fastapi", "uvicorn")},
        },
        "base": arguments.base, "dtype": arguments.dtype, "tasks": arguments.tasks,
        "ways": ways, "overload": loaded,
    }  # fmt: skip


def show(found: dict[str, Any]) -> None:
    print(found["command"], found["machine"], sep="\n")
    for way in found["ways"]:
        print(
            f"{way['clients']} clients, {way['items_per_request']} items a request: in process "
            f"{way['in_process_items_per_s']} items/s, HTTP {way['http_items_per_s']}, ratio "
            f"{way['ratio']}; CPU ms per item {way['cpu_ms_per_item']}; p50 {way['p50_ms']} ms, "
            f"p99 {way['p99_ms']} ms"
        )
    print("twice the load:", found["overload"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="minilm")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=8.0, help="of one way in one round")
    parser.add_argument("--overload-seconds", type=float, default=15.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = run(arguments)
    print(json.dumps(found)) if arguments.json else show(found)


if __name__ == "__main__":
    main()
