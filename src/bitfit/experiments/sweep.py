"""Making the runs of a grid: claim a group, train it, write what it leaves, until nothing is left.

A stopped or killed sweep goes on with ``resume`` and repeats nothing; several processes may share
a directory, each taking what the others have not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from bitfit.base import check_base
from bitfit.cluster import check_address, connected
from bitfit.encoder import Encoder, open_encoder
from bitfit.errors import BitfitError, TrainingInterrupted, UsageError
from bitfit.experiments.claimed import Held
from bitfit.experiments.cluster import RayExecutor, new_job
from bitfit.experiments.conditions import Conditions, check_weights, choose_conditions
from bitfit.experiments.described import check_joins, describe
from bitfit.experiments.estimate import Clock
from bitfit.experiments.execute import Event as TrainingEvent
from bitfit.experiments.execute import Group
from bitfit.experiments.executor import Executor, LocalExecutor, Outcome, WorkerLost
from bitfit.experiments.grid import Grid
from bitfit.experiments.material import Material, Sources
from bitfit.experiments.plan import Planner, first_group, make_group, most_lanes
from bitfit.experiments.runs import Run
from bitfit.experiments.store import STALE_SECONDS, Claim, Result, Store
from bitfit.precision import choose_place
from bitfit.training.lane import Lane
from bitfit.training.lane_count import choose_lane_count
from bitfit.training.plan import check_lanes

# How long to wait before looking again whether another process has finished its group.
_WAIT_SECONDS = 5.0


@dataclass(frozen=True)
class Moved:
    """An experiment goes on under other conditions."""

    before: Conditions
    now: Conditions
    begun: int
    """Groups that were begun and not finished; they begin again."""
    failed: int
    """Runs that had failed; they are tried again."""


@dataclass(frozen=True)
class Planned:
    """A sweep knows what it has to do on a base."""

    base: str
    finished: int
    total: int
    """Runs of this base, with the repeats that are still to be chosen."""
    missing_tasks: Sequence[str]
    """Tasks of the grid whose data is not there, each with the reason."""
    cut_sizes: Sequence[str] = ()
    """Tasks with fewer rows than a learning curve asks for, each in a sentence."""


@dataclass(frozen=True)
class Measuring:
    """How many runs of a task are trained side by side is about to be measured."""

    run: Run
    """One of them."""


@dataclass(frozen=True)
class GroupStarted:
    """A group is about to be trained, or is sent to a cluster."""

    group: Group


@dataclass(frozen=True)
class GroupFinished:
    """A group's results are written."""

    group: Group
    results: Sequence[Result]
    """Those that were not there before."""


@dataclass(frozen=True)
class Waiting:
    """All that is left is being worked on by others."""

    claims: Sequence[Claim]


Event: TypeAlias = (
    Moved
    | Planned
    | Measuring
    | GroupStarted
    | GroupFinished
    | Waiting
    | WorkerLost
    | TrainingEvent
)
Listener: TypeAlias = Callable[[Event], None]


@dataclass
class Summary:
    """How a sweep ended."""

    done: int = 0
    """Finished runs in the directory, of this grid."""
    failed: list[dict[str, Any]] = field(default_factory=list)
    """Records of failed runs."""
    made: int = 0
    """Runs made by this call."""
    left_out: list[str] = field(default_factory=list)
    """Runs that the time did not suffice for."""
    missing_tasks: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a sweep runs; nothing here is part of a run's id, but the precision.

    Raises:
        UsageError: ``lanes`` is neither ``auto`` nor a number of them.
    """

    data: Path
    """The data directory: GLUE's, or one that holds ``glue_data``, ``squad``, ``ud_ewt``."""
    command: str = ""
    """The command that asked for it, written into the experiment."""
    dtype: str = "auto"
    """Precision of the frozen weights: ``fp32``, ``bf16``, ``tf32``, ``auto`` (fp32 for the
    paper's recipe and where matrices are trained)."""
    device: str = "auto"
    threads: int | None = None
    lanes: int | str = "auto"
    """Runs side by side: ``auto`` measures it once for each task and records it."""
    budget_seconds: float | None = None
    """Begin nothing that would probably end later than this; what was begun before is gone on with
    while any time is left. None: no limit."""
    resume: bool = False
    """Go on in a directory that holds this experiment, or join those who work on it."""
    move: bool = False
    """Go on under this precision, device and threads, where it was begun with others."""
    retry_failed: bool = False
    """Make failed runs again."""
    reuse: Sequence[Path] = ()
    """Other experiments' directories, to copy runs of the same id from."""
    skip_missing: bool = False
    """Leave out tasks whose data is not there, in place of refusing."""
    ray: str | None = None
    """Train on a Ray cluster: ``local``, ``auto`` or its address; None: in this process."""

    def __post_init__(self) -> None:
        check_lanes(self.lanes)


class Sweep:
    """The runs of a grid in a directory.

    Args:
        grid: what to run.
        directory: where the results go.
        settings: how.

    Raises:
        UsageError: a directory that holds another experiment, or this one without ``resume``; a
            precision that there is not.
        BaseModelError: a device that is not there.
        DataError: the data of a task is not there, unless ``skip_missing``, or of all tasks.
        MissingExtra: a cluster is asked for and Ray is not installed.
    """

    def __init__(self, grid: Grid, directory: Path, settings: Settings) -> None:
        if settings.ray is not None:
            check_address(settings.ray)
        choose_place(settings.dtype, settings.device)
        self.store = Store(directory)
        self.settings = settings
        self.sources = Sources(settings.data)
        # Before anything is written: what cannot begin leaves all as it was.
        for base in grid.base:
            check_base(base)
        if not self.store.exists:
            check_weights(grid, settings.dtype)
        self.grid, missing = self.sources.there(grid, skip_missing=settings.skip_missing)
        self.summary = Summary(missing_tasks=missing)
        with self.store.lock():
            before = self.store.experiment() if self.store.exists else None
            self.conditions = conditions_of(grid, self.store, settings)
            self._moved: Moved | None = None
            lanes = {}
            if before is not None:
                check_joins(grid, before, directory, resume=settings.resume)
                recorded = Conditions.from_json(before["conditions"])
                if self.conditions == recorded:
                    lanes = before["conditions"]["lanes"]
                else:
                    self._moved = self._move(recorded)
            described = describe(grid, settings.command, self.conditions, lanes, before)
            self.store.write_experiment(described)
        torch.set_num_threads(self.conditions.threads)
        self._taken_over: set[str] = set()
        self._own: set[str] = set()
        """Ids of this grid's runs: a directory may hold others."""
        self._began = time.perf_counter()

    def run(
        self,
        on_event: Listener | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Summary:
        """Make every run that is not there yet, and return how it ended.

        Raises:
            TrainingInterrupted: ``should_stop`` said so; everything is saved.
        """
        tell = on_event or (lambda event: None)
        if self._moved is not None:
            tell(self._moved)
        if len(self.grid.base) > 1:
            check_twins((base, self.open_base(base)) for base in self.grid.base)
        with connected(self.settings.ray):
            for base in self.grid.base:
                self._run_base(base, tell, should_stop)
        with self.store.lock(should_stop):
            self.store.remove_leftovers()
        records = [r for r in self.store.records() if r["id"] in self._own]
        self.summary.done = sum(r["state"] == "done" for r in records)
        self.summary.failed = [r for r in records if r["state"] == "failed"]
        self.summary.seconds = time.perf_counter() - self._began
        return self.summary

    def open_base(self, base: str) -> Encoder:
        """Return a base in the experiment's precision."""
        return open_encoder(base, self.conditions.dtype, self.conditions.device)

    def _move(self, recorded: Conditions) -> Moved:
        """Forget what was begun or failed under other conditions: it is made from its start here.

        Raises:
            UsageError: someone works on it.
        """
        claims = self.store.claims()
        if alive := [f"{claim.host}:{claim.pid}" for claim in claims if claim.is_alive]:
            raise UsageError(
                f"{self.store.directory} cannot move from {recorded} to {self.conditions}: "
                f"{', '.join(dict.fromkeys(alive))} works on it there; stop that first. One that "
                f"is no more counts as gone {STALE_SECONDS / 60:g} minutes after its last sign"
            )
        for claim in claims:
            self.store.release(claim.group)
        failed = [i for i, state in self.store.finished().items() if state == "failed"]
        for run_id in failed:
            self.store.forget(run_id)
        return Moved(recorded, self.conditions, len(claims), len(failed))

    def _check_not_moved(self) -> None:
        """Stop where another process has moved the experiment: these runs would be made twice."""
        now = Conditions.from_json(self.store.experiment()["conditions"])
        if now != self.conditions:
            raise BitfitError(
                f"{self.store.directory} was moved to {now} meanwhile; what is finished is kept"
            )

    # ------------------------------------------------------------------ one base

    def _run_base(self, base: str, tell: Listener, should_stop: Callable[[], bool] | None) -> None:
        material = Material(self.open_base(base), self.sources)
        planner = Planner(
            self.grid, base, material, self.store, also=self.conditions.earlier_dtypes
        )
        self._prepare(planner)
        done, total = self._progress(planner)
        tell(Planned(base, done, total, self.summary.missing_tasks, planner.cut_sizes()))
        clock = Clock(material)
        left_out: dict[str, Run] = {}
        executor = self._executor(base, material, tell, should_stop)
        with Held(self.store) as held, closing(executor):
            while True:
                others: list[Claim] = []
                if executor.room:
                    group, others = self._claim(planner, clock, left_out, held, tell, should_stop)
                    if group is not None:
                        tell(GroupStarted(group))
                        executor.submit(group)
                        continue
                if executor.busy:
                    for outcome in self._collect(executor):
                        self._keep(outcome, held, clock, tell)
                elif others:
                    tell(Waiting(others))
                    _pause(should_stop)
                else:
                    break
        for run in (*planner.search(), *planner.repeats()):
            self._own.update(planner.ids(run))
        self.summary.left_out += [str(run) for run in left_out.values()]
        if left_out:
            self.summary.left_out += [run.title("the best rate") for run in planner.unchosen()]

    def _executor(
        self,
        base: str,
        material: Material,
        tell: Listener,
        should_stop: Callable[[], bool] | None,
    ) -> Executor:
        if self.settings.ray is None:
            return LocalExecutor(material, self.store, self.conditions, tell, should_stop)
        job = new_job(base, self.conditions, self.settings.data, self.store.directory)
        return RayExecutor(job, material, tell, should_stop)

    def _prepare(self, planner: Planner) -> None:
        """Copy what other experiments have, and forget failed runs that are to be made again."""
        if self.settings.retry_failed:
            # Those of this grid and base: no one would make the others again.
            own = {run.id for run in (*planner.search(), *planner.repeats())}
            for run_id, state in self.store.finished().items():
                if state == "failed" and run_id in own:
                    self.store.forget(run_id)
        for other in map(Store, self.settings.reuse):
            for runs in (planner.search, planner.repeats):  # known when the search is there
                finished = self.store.finished()
                for run in runs():
                    if run.id not in finished:
                        self.store.reuse(other, planner.ids(run), _place(run))
                planner.look_again()

    def _progress(self, planner: Planner) -> tuple[int, int]:
        finished = self.store.finished()
        search, repeats = planner.search(), list(planner.repeats_to_come())
        known = {run.id for run in (*search, *planner.repeats())}
        done = sum(run_id in finished for run_id in known)
        return done, max(len(search) + len(repeats), done)

    def _claim(
        self,
        planner: Planner,
        clock: Clock,
        left_out: dict[str, Run],
        held: Held,
        tell: Listener,
        should_stop: Callable[[], bool] | None,
    ) -> tuple[Group | None, list[Claim]]:
        """Return a group that is now ours; without one, the groups that others work on.

        Raises:
            TrainingInterrupted: ``should_stop`` said so while another was looking.
        """
        with self.store.lock(should_stop):
            self._check_not_moved()
            claims = self.store.claims()
            # Ours are alive though this machine slept longer than a claim lasts.
            alive = [c for c in claims if c.is_alive or c.group in held.groups]
            group = self._take_over(planner, [c for c in claims if c not in alive])
            if group is None:
                taken = [*(run_id for claim in alive for run_id in claim.runs), *left_out]
                group = self._take_new(planner, clock, taken, left_out, tell, should_stop)
            if group is not None:
                self.store.claim(group.id, [run.id for run in group.runs], group.lanes)
                held.add(group)
                return group, []
            # Nothing here depends on groups of another base, or of rows that this grid lacks.
            own = {run.id for run in (*planner.search(), *planner.repeats())}
            return None, [c for c in alive if c.group not in held.groups and own & {*c.runs}]

    def _take_over(self, planner: Planner, dead: Sequence[Claim]) -> Group | None:
        """Return the first group of this grid that was begun by a process that is no more.

        How much of it is left is not known: it is gone on with while any time is left.
        """
        finished = self.store.finished()
        for claim in dead:
            if all(run_id in finished for run_id in claim.runs):
                self.store.release(claim.group)  # killed between the last record and this
            elif self._time_left() > 0 and (runs := planner.find(claim.runs)) is not None:
                group = make_group(runs, claim.lanes)
                self._taken_over.add(group.id)
                return group
        return None

    def _take_new(
        self,
        planner: Planner,
        clock: Clock,
        taken: Sequence[str],
        left_out: dict[str, Run],
        tell: Listener,
        should_stop: Callable[[], bool] | None,
    ) -> Group | None:
        """Return the first group that nobody has begun and that the time suffices for.

        The runs of those that it does not suffice for are added to ``left_out``; without any time
        left nothing is measured.

        Raises:
            TrainingInterrupted: ``should_stop`` said so, between two measurements.
        """
        for runs in planner.waiting(taken):
            while runs:
                group = None
                if self._time_left() > 0:
                    group = first_group(
                        runs, lambda alike: self._lanes_for(alike, clock.material, tell)
                    )
                    if (part := self._that_fits(group, clock, should_stop)) is not None:
                        return part
                left_out |= {run.id: run for run in (runs if group is None else group.runs)}
                runs = [run for run in runs if run.id not in left_out]
                self._check_goes_on(should_stop)
        return None

    def _lanes_for(self, runs: Sequence[Run], material: Material, tell: Listener) -> int:
        """Return how many runs of a task are trained side by side; measured once, and recorded."""
        if not material.encoder.shares_passes:
            return 1  # whatever was asked for: this base does not run packed
        if self.settings.lanes != "auto":
            return int(self.settings.lanes)
        key = "/".join(str(part) for part in (runs[0].base, *runs[0].material[:2]) if part)
        experiment = self.store.experiment()  # another process may have measured it
        lanes: dict[str, int] = experiment["conditions"]["lanes"]
        if key not in lanes:
            tried: list[Lane] = []
            most = most_lanes(self.conditions.device)
            for run in runs[:most]:
                with suppress(BitfitError):  # cannot be made: its record will say why
                    tried.append(material.lane(run))
                    last = run
            if not tried:
                return 1
            tell(Measuring(last))
            # Fewer are waiting than could be: measure with copies of the last.
            tried += [material.lane(last) for _ in range(most - len(tried))]
            lanes[key] = choose_lane_count(material.encoder, tried, most)
            self.store.write_experiment(experiment)
        return lanes[key]

    def _check_goes_on(self, should_stop: Callable[[], bool] | None) -> None:
        if should_stop is not None and should_stop():
            raise TrainingInterrupted(
                f"stopped; the same command with --resume goes on in {self.store.directory}"
            )

    def _that_fits(
        self, group: Group, clock: Clock, should_stop: Callable[[], bool] | None
    ) -> Group | None:
        """Return the group, or the first of its runs, so that the time suffices; None: for none."""
        if self.settings.budget_seconds is None:
            return group
        while clock.seconds(group) > self._time_left():
            if len(group.runs) == 1 or self._time_left() <= 0:
                return None
            self._check_goes_on(should_stop)
            group = make_group(group.runs[: len(group.runs) // 2], group.lanes)
        return group

    def _time_left(self) -> float:
        budget = self.settings.budget_seconds
        return math.inf if budget is None else budget - (time.perf_counter() - self._began)

    def _collect(self, executor: Executor) -> list[Outcome]:
        try:
            return executor.collect(_WAIT_SECONDS)
        except TrainingInterrupted as stopped:
            raise TrainingInterrupted(
                f"{stopped}, saved in {self.store.directory}; the same command with --resume goes "
                "on from there"
            ) from stopped

    def _keep(self, outcome: Outcome, held: Held, clock: Clock, tell: Listener) -> None:
        """Write what a group left."""
        group = outcome.group
        results = [r for r in outcome.results if self._is_news(r)]
        for result in results:
            self.store.write(result)
        held.release(group)
        # Of those taken over only the rest was made now.
        if self.settings.budget_seconds is not None and group.id not in self._taken_over:
            done = [r.record for r in outcome.results if r.record["state"] == "done"]
            clock.learn(group, {r["id"]: len(r["history"]) for r in done}, outcome.seconds)
        self.summary.made += len(results)
        tell(GroupFinished(group, results))

    def _is_news(self, result: Result) -> bool:
        """Whether a run has no record yet, or one that failed where this one did not.

        A process that was killed while it wrote a group's results has left some; one that slept
        while another took its group over may have failed at what the other then did.
        """
        run_id, state = result.record["id"], result.record["state"]
        if not self.store.is_finished(run_id):
            return True
        return bool(state == "done" and self.store.record(run_id)["state"] == "failed")


def check_twins(bases: Iterable[tuple[str, Encoder]]) -> None:
    """Refuse one base under two names: the runs of one name would be those of the other.

    Raises:
        UsageError: with both names.
    """
    names: dict[tuple[Any, ...], str] = {}
    for name, encoder in bases:
        base = encoder.base
        key = base.identity.sha256, base.identity.config_hash, base.tokenizer_sha256, base.pooling
        other = names.setdefault(key, name)
        if other != name:
            raise UsageError(f"bases {other!r} and {name!r} are the same: leave one out")


def _place(run: Run) -> dict[str, Any]:
    """Return where a run stands in its experiment: what its id does not depend on."""
    return {
        "row": run.row.name, "base": run.base, "task": run.task.name, "train_rows": run.train_rows,
    }  # fmt: skip


def conditions_of(grid: Grid, store: Store, settings: Settings) -> Conditions:
    """Return the conditions under which a sweep begins or goes on, as :func:`choose_conditions`.

    One that begins with ``move`` comes from where the first of those that it reuses is.
    """
    origins = [store, *(map(Store, settings.reuse) if settings.move else ())]
    there = [one.experiment()["conditions"] for one in origins if one.exists]
    recorded = Conditions.from_json(there[0]) if there else None
    return choose_conditions(
        grid, recorded, dtype=settings.dtype, device=settings.device, threads=settings.threads,
        move=settings.move,
    )  # fmt: skip


def _pause(should_stop: Callable[[], bool] | None) -> None:
    end = time.monotonic() + _WAIT_SECONDS
    while time.monotonic() < end:
        if should_stop is not None and should_stop():
            raise TrainingInterrupted("stopped while others work on what is left")
        time.sleep(0.2)
