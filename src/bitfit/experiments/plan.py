"""Which runs a grid asks for, in which order, and which of them are trained together."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bitfit.errors import UsageError
from bitfit.experiments.execute import Group
from bitfit.experiments.grid import Grid, GridTask, Row
from bitfit.experiments.material import Material
from bitfit.experiments.protocol import EpochScores, choose, paper_scores, split_scores
from bitfit.experiments.runs import Run
from bitfit.experiments.store import Store
from bitfit.training.settings import SPAN_MAX_LENGTH, TrainConfig


def most_lanes(device: str) -> int:
    """Return the most runs that ``auto`` puts side by side, where the hardware gains from more."""
    return 16 if torch.device(device).type == "cpu" else 64


@dataclass(frozen=True)
class CellPlan:
    """A row on a task at a training size: rates to search over, then seeds at the chosen one."""

    row: Row
    task: GridTask
    train_rows: int | None


class Planner:
    """The runs of a grid on one base.

    Args:
        grid: what is asked for.
        base: which of its bases.
        material: that base, open, and the data.
        store: what is finished.
        also: precisions of an experiment that was moved. A run that is finished in one of them
            stands for itself in this one.
    """

    def __init__(
        self,
        grid: Grid,
        base: str,
        material: Material,
        store: Store,
        also: Sequence[str] = (),
    ) -> None:
        self.grid, self.base, self.material, self.store = grid, base, material, store
        self.also = also
        # Once for each task: the rows of a large one are not kept for long.
        self._sizes = {t.name: material.sources.sizes(grid, t) for t in grid.tasks}
        self.cells = [
            CellPlan(row, task, size)
            for row in grid.rows
            for task in grid.tasks
            for size in self._sizes[task.name]
        ]
        self._runs: dict[tuple[Any, ...], Run] = {}
        # By cell: the states of the runs that were chosen from, and the rates.
        self._chosen: dict[tuple[Any, ...], tuple[dict[str, str], list[float]]] = {}
        self._halves: dict[str, EpochScores] = {}
        self._before = self._finished_before()
        self._seeds_before = store.experiment().get("seeds", []) if store.exists else []
        self._refuse_twins()

    def _refuse_twins(self) -> None:
        """Refuse two rows, or two tasks, whose runs are the same: one of them would stay empty."""
        seen: dict[str, Run] = {}
        for run in self.search():
            other = seen.setdefault(run.id, run)
            for what, one, two in (
                ("rows", other.row, run.row), ("tasks", other.task, run.task),
            ):  # fmt: skip
                if one.name != two.name:
                    raise UsageError(
                        f"{what} {one.name!r} and {two.name!r} ask for the same runs: leave one out"
                    )

    def cut_sizes(self) -> list[str]:
        """Return a sentence for each task that has fewer rows than a learning curve asks for."""
        found = []
        for name, sizes in self._sizes.items():
            most = max(size or 0 for size in sizes)
            above = [f"{size:,}" for size in self.grid.train_rows if size > most]
            if above:
                found.append(f"at most {most:,} training rows of {name}: no {', '.join(above)}")
        return found

    def search(self) -> list[Run]:
        """Return the runs over all rates, the most telling first.

        Every row on every task with the first seed, then with the next.
        """
        seeds = self.grid.seeds if self.grid.search == "every-seed" else self.grid.seeds[:1]
        return [
            self._run(cell, rate, seed)
            for seed in seeds
            for cell in self.cells
            for rate in cell.row.rates
        ]

    def repeats(self) -> list[Run]:
        """Return the runs at the chosen rates with the other seeds, of cells that have chosen.

        A cell chooses when its search is finished; by either protocol, which mostly agree.
        """
        if self.grid.search == "every-seed" or len(self.grid.seeds) == 1:
            return []
        finished = self.store.finished()
        chosen = [(cell, self._chosen_rates(cell, finished)) for cell in self.cells]
        return [
            self._run(cell, rate, seed)
            for seed in self.grid.seeds[1:]
            for cell, rates in chosen
            for rate in rates
        ]

    def repeats_to_come(self) -> Iterator[Run]:
        """Yield a stand-in for each run that :meth:`repeats` will have: at the cell's last rate."""
        if self.grid.search == "every-seed":
            return
        for seed, cell in itertools.product(self.grid.seeds[1:], self.cells):
            yield self._run(cell, cell.row.rates[-1], seed)

    def unchosen(self) -> list[Run]:
        """Return the stand-ins of :meth:`repeats_to_come` whose cells have not chosen a rate."""
        finished = self.store.finished()
        left = {
            run.cell for run in self.search()
            if run.id not in finished and len(run.row.rates) > 1  # one alone is chosen already
        }  # fmt: skip
        return [run for run in self.repeats_to_come() if run.cell in left]

    def _chosen_rates(self, cell: CellPlan, finished: Mapping[str, str]) -> list[float]:
        """Return the rates that the finished search chose; none while it is not finished.

        Whatever seeds this directory has are asked, as the report asks them: an experiment may be
        gone on with from another first seed.
        """
        if len(cell.row.rates) == 1:
            return list(cell.row.rates)
        runs = {
            seed: [self._run(cell, rate, seed) for rate in cell.row.rates]
            for seed in dict.fromkeys([*self.grid.seeds, *self._seeds_before])
        }
        if any(run.id not in finished for run in runs[self.grid.seeds[0]]):
            return []
        whole = {run.id: finished[run.id] for each in runs.values() for run in each
                 if run.id in finished}  # fmt: skip
        # Asked for at every claim, and scoring what every epoch predicted takes seconds a cell.
        key = cell.row.name, cell.task.name, cell.train_rows
        if key not in self._chosen or self._chosen[key][0] != whole:
            records = [self.store.record(run_id) for run_id in whole]
            found = [choose(records, scores_of) for scores_of in (paper_scores, self._on_halves)]
            choices = [choice for cells in found for each in cells.values() for choice in each]
            rates = sorted({choice.record["config"]["learning_rate"] for choice in choices})
            if any(r["state"] == "done" and r["id"] not in self._halves for r in records):
                return rates  # answers that are not here may come with another row's runs
            self._chosen[key] = whole, rates
        return self._chosen[key][1]

    def _on_halves(self, record: Mapping[str, Any]) -> EpochScores | None:
        run_id, store = record["id"], self.store
        if run_id not in self._halves:
            scores = split_scores(record, store.predictions(record), store.answers(record))
            if scores is None:
                return None
            self._halves[run_id] = scores
        return self._halves[run_id]

    def _run(self, cell: CellPlan, rate: float, seed: int) -> Run:
        key = cell.row.name, cell.task.name, cell.train_rows, rate, seed
        if key not in self._runs:
            data_seed = self.grid.data_seed(seed)
            config = self.grid.config(cell.row, cell.task, rate, seed)
            length = self.material.encoder.clamp_length(self._max_length(cell, config, data_seed))
            run = Run(
                row=cell.row, base=self.base, task=cell.task, train_rows=cell.train_rows,
                config=config.replace(max_length=length), data_seed=data_seed,
                facts=tuple(self.material.facts(cell.task, cell.train_rows, data_seed).items()),
            )  # fmt: skip
            self._runs[key] = self._as_finished(run)
        return self._runs[key]

    def _max_length(self, cell: CellPlan, config: TrainConfig, data_seed: int) -> int:
        """Return the length that is set, or what is usual for the kind of the task."""
        if "max_length" in self.grid.options_of(cell.row, cell.task):
            return config.max_length
        task = self.material.sources.known(cell.task, cell.train_rows, data_seed).task
        return SPAN_MAX_LENGTH if task.kind == "span" else config.max_length

    def _as_finished(self, run: Run) -> Run:
        """Return the run, or the same in the precision in which it was done."""
        if not self.also:
            return run
        forms = [run, *(run.in_dtype(dtype) for dtype in self.also)]
        return next((form for form in forms if self._before.get(form.id) == "done"), run)

    def _finished_before(self) -> Mapping[str, str]:
        # Once for all runs: what is made from now on is made in this precision.
        return self.store.finished() if self.also else {}

    def ids(self, run: Run) -> list[str]:
        """Return the ids that a run has in each precision that counts, its own first."""
        return [run.id, *(run.in_dtype(dtype).id for dtype in self.also)]

    def look_again(self) -> None:
        """Forget in which precision runs were done: some came from elsewhere."""
        if self.also:
            self._runs.clear()
            self._before = self._finished_before()

    def waiting(self, taken: Sequence[str] = ()) -> list[list[Run]]:
        """Return what is left to do: of the search, then of the repeats, each in its order.

        Args:
            taken: ids of runs that someone is working on.
        """
        done = {*self.store.finished(), *taken}
        return [
            [run for run in runs if run.id not in done] for runs in (self.search(), self.repeats())
        ]

    def find(self, run_ids: Sequence[str]) -> list[Run] | None:
        """Return the runs of these ids, in their order; None where one is not of this grid."""
        known = {run.id: run for run in (*self.search(), *self.repeats())}
        return [known[i] for i in run_ids] if all(i in known for i in run_ids) else None


def first_group(runs: Sequence[Run], lanes_for: Callable[[Sequence[Run]], int]) -> Group:
    """Return the first of ``runs`` with those behind it that are trained beside it.

    Those of the same task and training size, if their methods train rows; as many as
    ``lanes_for`` those runs says.
    """
    first = runs[0]
    if not first.shares_passes:
        return make_group([first], 1)
    alike = [
        run for run in runs
        if run.shares_passes and run.material[:2] == first.material[:2]
    ]  # fmt: skip
    lanes = lanes_for(alike)
    return make_group(alike[:lanes], lanes)


def make_group(runs: Sequence[Run], lanes: int) -> Group:
    """Return a group; its id is the hash of its runs and of how many of them are side by side."""
    lanes = min(lanes, len(runs))  # before the id: whoever takes over has only this number
    text = ",".join([*(run.id for run in runs), str(lanes)])
    return Group(hashlib.sha256(text.encode()).hexdigest()[:16], runs, lanes)
