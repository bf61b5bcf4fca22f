"""What a server counts: for Prometheus, and for its own page."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from bitfit.serve.microbatch import BatchReport

OTHER = "_other"
"""Label of all tasks beyond those with a label of their own; no task can have this name."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
RATE_SECONDS, LATENCY_SECONDS = 10.0, 60.0
MAX_SAMPLES = 20_000
_SECONDS = (.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30)  # fmt: skip
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Metrics:
    """Counters, in a registry of their own.

    Args:
        task_labels: so many tasks, the first that are asked, have counts of their own.
        clock: seconds, never going back.
    """

    def __init__(
        self, *, task_labels: int = 100, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self.began = clock()
        self.requests, self.items = 0, 0
        self.batch_fill = 0.0
        """Mean share of the token budget in the last batches."""
        self._answered: deque[tuple[float, int]] = deque(maxlen=MAX_SAMPLES)
        self._latencies: deque[tuple[float, float]] = deque(maxlen=MAX_SAMPLES)
        self._task_labels, self._labelled = task_labels, set[str]()
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._make()

    def _make(self) -> None:
        at = self.registry
        self._http = Counter(
            "bitfit_http_requests", "HTTP requests answered", ["route", "method", "status"],
            registry=at,
        )  # fmt: skip
        self._http_seconds = Histogram(
            "bitfit_http_request_seconds", "From first byte to last", ["route"],
            buckets=_SECONDS, registry=at,
        )  # fmt: skip
        self._items = Counter(
            "bitfit_items", "Items answered, by what came of them", ["outcome"], registry=at
        )
        self._task_items = Counter(
            "bitfit_task_items", f"Items answered by task; {OTHER}: all that have no label",
            ["task"], registry=at,
        )  # fmt: skip
        self._refused = Counter(
            "bitfit_refused_requests", "Requests refused or given up", ["reason"], registry=at
        )
        self._batch_items = Histogram(
            "bitfit_batch_items", "Items in a batch", buckets=_SIZES, registry=at
        )
        self._batch_fill = Histogram(
            "bitfit_batch_fill", "Share of the token budget that a batch used", buckets=_SHARES,
            registry=at,
        )  # fmt: skip
        self._batch_seconds = Histogram(
            "bitfit_batch_seconds", "Computing a batch", buckets=_SECONDS, registry=at
        )
        self._wait_seconds = Histogram(
            "bitfit_wait_seconds", "Wait of a batch's oldest item", buckets=_SECONDS, registry=at
        )
        self._tokens = Counter("bitfit_tokens", "Tokens computed", registry=at)
        self._changes = Counter(
            "bitfit_task_changes", "Tasks added, replaced, removed", ["change"], registry=at
        )
        self.queue_items = Gauge("bitfit_queue_items", "Items accepted, not answered", registry=at)
        self.queue_tokens = Gauge(
            "bitfit_queue_tokens", "Tokens accepted, not computed", registry=at
        )
        self.tasks = Gauge("bitfit_tasks", "Tasks that can be asked", registry=at)
        self.resident = Gauge("bitfit_tasks_resident", "Tasks with their row loaded", registry=at)

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count an HTTP request; ``route`` is a pattern such as ``/v1/tasks/{name}``."""
        self.requests += 1
        self._http.labels(route, method, str(status)).inc()
        self._http_seconds.labels(route).observe(seconds)

    def predicted(self, seconds: float, outcomes: list[tuple[str, str | None]]) -> None:
        """Count a request to predict: per item what came of it, and its task where it is known."""
        now = self._clock()
        self.items += len(outcomes)
        self._answered.append((now, len(outcomes)))
        self._latencies.append((now, seconds))
        for outcome, task in outcomes:
            self._items.labels(outcome).inc()
            if task is not None:
                self._task_items.labels(self._label(task)).inc()

    def _label(self, task: str) -> str:
        if task not in self._labelled:
            if len(self._labelled) >= self._task_labels:
                return OTHER
            self._labelled.add(task)
        return task

    def refused(self, reason: str) -> None:
        """Count a request that was refused or given up, and why."""
        self._refused.labels(reason).inc()

    def changed(self, change: str) -> None:
        """Count a change of the tasks."""
        self._changes.labels(change).inc()

    def batch(self, report: BatchReport) -> None:
        """Count a batch."""
        self._batch_items.observe(report.items)
        self._batch_fill.observe(report.fill)
        self._batch_seconds.observe(report.seconds)
        self._wait_seconds.observe(report.waited)
        self._tokens.inc(report.tokens)
        self.batch_fill += (report.fill - self.batch_fill) * (0.1 if self.batch_fill else 1.0)

    def recent(self) -> dict[str, Any]:
        """Return ``uptime_s, requests, items, items_per_s, latency_ms, batch_fill``."""
        now = self._clock()
        span = max(min(RATE_SECONDS, now - self.began), 1e-9)
        answered = sum(count for when, count in self._answered if when > now - RATE_SECONDS)
        times = [s for when, s in self._latencies if when > now - LATENCY_SECONDS]
        marks = np.percentile(times, (50, 90, 99)) * 1000 if times else (None,) * 3
        return {
            "uptime_s": round(now - self.began, 1),
            "requests": self.requests,
            "items": self.items,
            "items_per_s": round(answered / span, 2),
            "latency_ms": {
                name: None if mark is None else round(float(mark), 2)
                for name, mark in zip(("p50", "p90", "p99"), marks, strict=True)
            },
            "batch_fill": round(self.batch_fill, 3),
        }

    def render(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)


class Labelled(Collector):
    """The metrics of several processes as one set, each sample with the label ``replica``."""

    def __init__(self, found: dict[str, Iterable[Metric]]) -> None:
        self._found = found

    def collect(self) -> Iterator[Metric]:
        """Yield each metric once, with the samples of all."""
        merged: dict[str, Metric] = {}
        for replica, metrics in self._found.items():
            for metric in metrics:
                if not metric.samples:
                    continue
                into = merged.setdefault(
                    metric.name, Metric(metric.name, metric.documentation, metric.type)
                )
                for sample in metric.samples:
                    if not sample.name.endswith("_created"):
                        labels = {**sample.labels, "replica": replica}
                        into.add_sample(sample.name, labels, sample.value)
        yield from merged.values()
