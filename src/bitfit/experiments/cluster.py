"""Groups trained on the machines of a Ray cluster (extra ``ray``).

The sweep stays one process, the driver: it claims groups, sends each to a worker process
somewhere, and writes what comes back into the one store. A worker opens the base once and keeps
it; it needs the same versions, and base and data under the same names. Where the experiment's
directory is visible too, a group that is tried again goes on from its checkpoint.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bitfit import __version__
from bitfit.bench.timing import describe_versions
from bitfit.cluster import import_ray
from bitfit.encoder import open_encoder
from bitfit.errors import BitfitError, TrainingInterrupted, UsageError
from bitfit.experiments.conditions import Conditions
from bitfit.experiments.execute import BegunAnew, Event, Group, failed_results, run_group
from bitfit.experiments.executor import Outcome, WorkerLost
from bitfit.experiments.material import Material, Sources
from bitfit.experiments.runs import command_of
from bitfit.experiments.store import Result, Store, host_name

# How often a group is sent to a worker before its runs count as failed.
TRIES = 4
# Groups that are sent ahead, so that a worker that has finished finds the next.
AHEAD = 1
# How long to wait for a result before asking again whether to stop.
_GLANCE_SECONDS = 0.2
# How long to wait for cancelled workers to end; they do at once, but on a machine that is lost.
_CANCEL_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker has to know beside the group."""

    base: str
    conditions: Conditions
    data: Path
    directory: Path
    """The experiment's, absolute."""
    folder: Path
    """The driver's working directory, from which relative names of base and data start."""
    host: str
    pid: int
    """Of the driver, who claims the groups."""
    versions: tuple[tuple[str, str], ...]


def new_job(base: str, conditions: Conditions, data: Path, directory: Path) -> Job:
    """Return what workers have to know of a base of an experiment, with this process as driver."""
    return Job(
        base=base, conditions=conditions, data=data, directory=directory.absolute(),
        folder=Path.cwd(), host=host_name(), pid=os.getpid(), versions=_versions(),
    )  # fmt: skip


# ------------------------------------------------------------------ the driver


@dataclass(frozen=True)
class _Sent:
    group: Group
    tries: int


class RayExecutor:
    """Trains groups on a cluster, as many at once as its machines have room for.

    A group whose worker is killed is sent again, ``TRIES`` times in all; then its runs are
    recorded as failed, and the others go on.

    Args:
        job: what the workers have to know.
        material: the driver's own, to write records with.
        tell: told of workers that are lost.
        should_stop: asked while waiting.
        ahead: groups to send beyond those that there is room for.

    Raises:
        UsageError: no machine of the cluster has what one group needs.
    """

    def __init__(
        self,
        job: Job,
        material: Material,
        tell: Callable[[WorkerLost | BegunAnew], None],
        should_stop: Callable[[], bool] | None,
        ahead: int = AHEAD,
    ) -> None:
        self.ray = import_ray()
        self.job, self.material = job, material
        self.tell, self.should_stop, self.ahead = tell, should_stop, ahead
        self._flight: dict[Any, _Sent] = {}
        needs = self.needs
        self._train = self.ray.remote(
            num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0), max_retries=0,
            scheduling_strategy="SPREAD",
        )(train_group)  # fmt: skip
        if not self.capacity():
            wanted = " and ".join(f"{count} {name}" for name, count in needs.items())
            raise UsageError(
                f"no machine of the Ray cluster has {wanted}, which a group needs: give --threads "
                "or --device that they have"
            )

    @property
    def needs(self) -> dict[str, int]:
        """What one group takes of a machine."""
        needs = {"CPU": self.job.conditions.threads}
        return needs | ({"GPU": 1} if self.job.conditions.device == "cuda" else {})

    def capacity(self) -> int:
        """Return how many groups the machines that are there now can train at once."""
        return sum(
            min(int(node["Resources"].get(name, 0) // count) for name, count in self.needs.items())
            for node in self.ray.nodes()
            if node["Alive"]
        )

    @property
    def room(self) -> bool:
        """Whether another group would not wait for long."""
        return len(self._flight) < self.capacity() + self.ahead

    @property
    def busy(self) -> bool:
        """Whether groups are in flight."""
        return bool(self._flight)

    def submit(self, group: Group) -> None:
        """Send a group."""
        self._send(_Sent(group, 1))

    def _send(self, sent: _Sent) -> None:
        self._flight[self._train.remote(self.job, sent.group)] = sent

    def collect(self, timeout: float) -> list[Outcome]:
        """Return groups that have ended, waiting ``timeout`` seconds for the first.

        Raises:
            TrainingInterrupted: ``should_stop`` said so.
            BitfitError: a machine of the cluster cannot train them; the message says which and why.
        """
        end = time.monotonic() + timeout
        while self._flight:
            if self.should_stop is not None and self.should_stop():
                raise TrainingInterrupted(
                    f"stopped, with {len(self._flight)} in training given up at their checkpoints"
                )
            ready, _ = self.ray.wait(list(self._flight), timeout=_GLANCE_SECONDS)
            outcomes = [outcome for ref in ready if (outcome := self._outcome(ref)) is not None]
            if outcomes or time.monotonic() >= end:
                return outcomes
        return []

    def _outcome(self, ref: Any) -> Outcome | None:
        """Return what a group left; None: it was sent again."""
        sent, errors = self._flight.pop(ref), self.ray.exceptions
        try:
            results, seconds, unusable = self.ray.get(ref)
        except errors.RayTaskError as error:  # raised by our function over there
            cause = error.cause
            if isinstance(cause, BitfitError):
                raise cause from None
            last = str(cause).strip().rpartition("\n")[2]  # Ray's messages hold whole tracebacks
            raise BitfitError(
                "a worker of the Ray cluster failed; expected were the same bitfit and the same "
                f"versions on each machine: {type(cause).__name__}: {last}"
            ) from error
        except errors.RayError as error:  # its process is no more, or its machine
            return self._lost(sent, error)
        for reason in unusable:
            self.tell(BegunAnew(sent.group, reason))
        return Outcome(sent.group, [self._own(result, sent) for result in results], seconds)

    def _lost(self, sent: _Sent, error: Exception) -> Outcome | None:
        group, again = sent.group, sent.tries < TRIES
        text = str(error).strip() or "no reason given"
        reason = f"{type(error).__name__}: {text.splitlines()[0].partition('. ')[0]}"
        self.tell(WorkerLost(group, reason, again))
        if again:
            self._send(_Sent(group, sent.tries + 1))
            return None
        message = f"its worker was lost {TRIES} times, the last: {reason}"
        failed = dict.fromkeys((run.id for run in group.runs), message)
        return Outcome(group, failed_results(group, self.material, self.job.conditions, failed), 0)

    def _own(self, result: Result, sent: _Sent) -> Result:
        """Return a result with the command as the driver's user would type it."""
        run = next(run for run in sent.group.runs if run.id == result.record["id"])
        command = command_of(run, self.material.data, self.job.conditions)
        return replace(result, record={**result.record, "command": command})

    def close(self) -> None:
        """Cancel what is in flight: its workers are killed, and keep their last checkpoints."""
        flight = list(self._flight)
        for ref in flight:
            self.ray.cancel(ref, force=True)
        if flight:  # one that still runs would write beside whoever goes on with its group
            self.ray.wait(flight, num_returns=len(flight), timeout=_CANCEL_SECONDS)
        self._flight.clear()


# ------------------------------------------------------------------ the workers


_open: dict[tuple[Any, ...], Material] = {}


def train_group(job: Job, group: Group) -> tuple[list[Result], float, list[str]]:
    """Train a group in a worker process.

    Returns:
        What its runs left, how long it took, and why a state that was there could not be used.

    Raises:
        BitfitError: this machine cannot: other versions, another base or other data than the
            driver's, or none.
    """
    began = time.perf_counter()
    unusable: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, BegunAnew):
            unusable.append(event.reason)

    try:
        _check_versions(job)
        torch.set_num_threads(job.conditions.threads)
        material = _material(job)
        _check_facts(group, material)
        with _place(job, group) as store:
            results = run_group(group, material, store, job.conditions, on_event=watch)
    except BitfitError as error:  # as one that any version of any module can read
        raise BitfitError(
            f"{socket.gethostname()}, a machine of the Ray cluster: {error}"
        ) from None
    return results, time.perf_counter() - began, unusable


def _versions() -> tuple[tuple[str, str], ...]:
    found = describe_versions()
    return ("bitfit", __version__), *((k, str(found[k])) for k in ("torch", "transformers"))


def _check_versions(job: Job) -> None:
    here = dict(_versions())
    for name, there in job.versions:
        if here[name] != there:
            raise BitfitError(f"it has {name} {here[name]}, and the driver {there}")


def _material(job: Job) -> Material:
    """Return the job's base and data; the last are kept, for one group is seldom alone."""
    key = job.base, job.conditions, job.data, job.folder
    if key not in _open:
        if job.folder.is_dir():
            os.chdir(job.folder)
        _open.clear()
        encoder = open_encoder(job.base, job.conditions.dtype, job.conditions.device)
        _open[key] = Material(encoder, Sources(job.data))
    return _open[key]


def _check_facts(group: Group, material: Material) -> None:
    """Refuse another base or other data under the same name: the runs' ids would be wrong."""
    for run in group.runs:
        # Read, where they are not kept: facts alone would be those of files as they were before.
        material.source(run.task, run.train_rows, run.data_seed)
        found = material.facts(run.task, run.train_rows, run.data_seed)
        expected = dict(run.facts)
        for name in (*expected, *(name for name in found if name not in expected)):
            # What is usual, as a dropout of 0.1, is not among them.
            here, there = (facts.get(name, "as usual") for facts in (found, expected))
            if here != there:
                what = {"train": "training rows", "dev": "dev rows"}.get(name, name)
                raise BitfitError(
                    f"its {what} of {run} are not the driver's ({here[:16]}, expected "
                    f"{there[:16]}): expected the same --base and --data on each machine"
                )


@contextmanager
def _place(job: Job, group: Group) -> Iterator[Store]:
    """Yield the experiment's store where this machine sees it, else one that goes away."""
    store = Store(job.directory)
    if store.is_claimed_by(group.id, job.host, job.pid):
        yield store
        return
    with tempfile.TemporaryDirectory(prefix="bitfit-") as folder:
        yield Store(Path(folder))
