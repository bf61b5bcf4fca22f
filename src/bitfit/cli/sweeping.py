"""Behind ``bitfit sweep``, ``reproduce`` and ``report``: grids, progress, summaries."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer
from rich.progress import Progress

from bitfit.cli import console, options
from bitfit.cluster import connected
from bitfit.encoder import open_encoder
from bitfit.errors import BitfitError, DataError, NotWritten, TrainingInterrupted, UsageError
from bitfit.experiments.answers import restore_answers
from bitfit.experiments.described import check_begins
from bitfit.experiments.dry_run import dry_run as plan_sweep
from bitfit.experiments.execute import BegunAnew
from bitfit.experiments.executor import WorkerLost
from bitfit.experiments.grid import (
    Grid,
    builtin_grid,
    builtin_grids,
    check_experiment,
    read_grid,
)
from bitfit.experiments.report.write import write_report
from bitfit.experiments.store import Store
from bitfit.experiments.submission import best_runs, glue_folder, write_submission
from bitfit.experiments.sweep import (
    Event,
    GroupFinished,
    GroupStarted,
    Measuring,
    Moved,
    Planned,
    Settings,
    Summary,
    Sweep,
    Waiting,
)
from bitfit.precision import precision_here
from bitfit.training.plan import check_out_folder
from bitfit.training.train import LaneDropped, StepDone

_UNITS = {"h": 3600.0, "m": 60.0, "min": 60.0, "s": 1.0}


@dataclass(frozen=True)
class Ordered:
    """A grid with where it goes."""

    grid: Grid
    directory: Path
    settings: Settings


def own_grid(given: Mapping[str, Any]) -> Ordered:
    """Return the grid of a TOML file, as the options change it."""
    grid = _changed(read_grid(given["grid"]), given)
    return Ordered(grid, given["out"] or Path("results") / grid.name, _settings(given))


def paper_grids(given: Mapping[str, Any]) -> list[Ordered]:
    """Return one of the paper's grids, or all of them, as the options change them."""
    check_experiment(given["name"], "all")
    if given["name"] != "all":
        grid = _changed(builtin_grid(given["name"]), given)
        return [Ordered(grid, given["out"] or Path("results") / grid.name, _settings(given))]
    root = given["out"] or Path("results")
    grids = [builtin_grid(name) for name in builtin_grids()]
    kept = [(grid, own) for grid in grids if (own := _own_part(given, grid)) is not None]
    if not kept:
        raise UsageError("no experiment has these tasks and rows: 'bitfit tasks' lists the tasks")
    places = [root / grid.name for grid, _ in kept]
    return [
        Ordered(_changed(grid, own), place, _settings(own, [p for p in places if p != place]))
        for (grid, own), place in zip(kept, places, strict=True)
    ]


def _own_part(given: Mapping[str, Any], grid: Grid) -> dict[str, Any] | None:
    """Return the options with what ``grid`` has of the tasks, rows and limits that are named.

    None where it has none of the tasks, or none of the rows.
    """
    own = dict(given)
    for option, has in (("tasks", grid.tasks), ("rows", grid.rows)):
        if given[option] is not None:
            asked = _names(given[option])
            found = [each.name for each in has if each.name in asked]
            if not found:
                return None
            own[option] = ",".join(found)
    if given["limit"] is not None:
        known = {"", *(task.name for task in grid.tasks)}
        limits = (_limits(given["limit"]) or {}).items()
        own["limit"] = ",".join(f"{task}={n}" for task, n in limits if task in known) or None
    return own


def run_grids(
    orders: Sequence[Ordered], given: Mapping[str, Any], *, dry_run: bool, as_json: bool
) -> None:
    """Run grids one after the other, or show what they would do; then report on each.

    Raises:
        UsageError: a directory that no file can be made in, or that holds another experiment.
        typer.Exit: runs failed, or one of several experiments: the exit code is 1.
    """
    for order in orders:
        check_out_folder(order.directory, order.directory)
        if not dry_run:
            settings = order.settings
            check_begins(order.grid, order.directory, dtype=settings.dtype, resume=settings.resume)
    found, kinds = [], set()
    planned: set[str] = set()
    began = time.monotonic()
    with connected(None if dry_run else given["ray"]):  # once for all grids
        for order in orders:
            order = _with_time_left(order, time.monotonic() - began)
            try:
                if dry_run:
                    plan = plan_sweep(
                        order.grid, order.directory, order.settings, _tell_cell(given), planned
                    )
                    found.append(plan)
                    if not as_json:
                        _show_plan(plan)
                else:
                    found.append(_run(order, given, as_json=as_json))
            except (TrainingInterrupted, NotWritten):  # the next would not fare better
                raise
            except BitfitError as error:  # of several grids, one whose data or base is not there
                if len(orders) == 1:
                    raise
                kinds.add(type(error))
                console.note(f"left out {order.grid.name}: {error}")
                found.append({"name": order.grid.name, "error": str(error)})
    if dry_run and len(orders) > 1 and not as_json:
        _show_sum([one for one in found if "error" not in one])
    if found and all("error" in one for one in found):
        kind = UsageError if kinds == {UsageError} else DataError
        raise kind("; ".join(dict.fromkeys(one["error"] for one in found)))
    if as_json:
        console.print_json(found if given.get("name") == "all" else found[0])
    # They are listed, and whoever waits is told too.
    broken = kinds - {DataError}
    if broken or any(one.get("failed") or "submission_error" in one for one in found):
        raise typer.Exit(1)


def _with_time_left(order: Ordered, seconds: float) -> Ordered:
    """Return ``order`` with what is left of the budget, which is for all grids together."""
    budget = order.settings.budget_seconds
    if budget is None:
        return order
    return replace(order, settings=replace(order.settings, budget_seconds=budget - seconds))


def _tell_cell(given: Mapping[str, Any]) -> Any:
    return None if given["quiet"] else lambda cell: console.note(f"measuring {cell}")


def _run(order: Ordered, given: Mapping[str, Any], *, as_json: bool) -> dict[str, Any]:
    sweep = Sweep(order.grid, order.directory, order.settings)
    with console.Interruption() as interruption, Watch(given["quiet"]) as watch:
        interruption.running = True
        summary = sweep.run(watch, lambda: interruption.asked)
    data, quiet = order.settings.data, given["quiet"]
    files = make_report(order.directory, None, data, quiet=quiet)
    if given.get("submission", False):
        try:
            files["submissions"] = _submit(order.directory, data, Path(files["report"]), quiet)
        except (UsageError, DataError) as error:  # the runs are made, and perhaps others to come
            files["submission_error"] = str(error)
            console.note(f"no submission: {error}")
    report = _summary_json(order, summary) | files
    if not as_json:
        _show_summary(order, summary, files)
    return report


# ------------------------------------------------------------------ options


def _changed(grid: Grid, given: Mapping[str, Any]) -> Grid:
    grid = grid.replace(
        base=tuple(given["bases"]) if given["bases"] else None, recipe=given["recipe"],
        epochs=given["epochs"], seeds=_seeds(given["seeds"]),
    )  # fmt: skip
    return grid.only(
        tasks=None if given["tasks"] is None else _names(given["tasks"]),
        rows=None if given["rows"] is None else _names(given["rows"]),
        limits=_limits(given["limit"]),
    )


def _settings(given: Mapping[str, Any], others: Sequence[Path] = ()) -> Settings:
    data = Path(given["data"])
    if not data.is_dir():
        raise DataError(f"--data {data}: no such directory")
    if given["move"] and not (given["resume"] or given["reuse"]):
        raise UsageError(
            "--move goes on with an experiment elsewhere: give --resume too, or --reuse DIR for a "
            "new one that comes from where that one is"
        )
    return Settings(
        data=data, command=shlex.join(["bitfit", *sys.argv[1:]]), dtype=given["dtype"],
        device=given["device"], threads=given["threads"],
        lanes=options.parse_lanes(given["lanes"]), budget_seconds=parse_budget(given["budget"]),
        resume=given["resume"], move=given["move"], retry_failed=given["retry_failed"],
        # Others may come to be while those before this one run.
        reuse=[*map(_experiment, given["reuse"] or ()), *others],
        skip_missing="name" in given and given["tasks"] is None, ray=given["ray"],
    )  # fmt: skip


def _experiment(path: Path) -> Path:
    if not Store(path).exists:
        raise DataError(f"--reuse {path}: no experiment is there")
    return path


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    return [name for name in names if name]


def _seeds(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(word) for word in _names(text))
    except ValueError:
        raise UsageError(f"--seeds {text!r}: expected whole numbers between commas") from None


def _limits(text: str | None) -> dict[str, int] | None:
    if text is None:
        return None
    limits = {}
    for word in _names(text):
        task, _, number = word.rpartition("=")
        if not number.isdigit() or int(number) == 0:
            raise UsageError(
                f"--limit {text!r}: expected a number from 1 up, or TASK=NUMBER between commas"
            )
        limits[task.strip()] = int(number)
    return limits


def parse_budget(text: str | None) -> float | None:
    """Return ``90m``, ``2h`` or ``1h30m`` in seconds.

    Raises:
        UsageError: anything else.
    """
    if text is None:
        return None
    parts = re.findall(r"(\d+(?:\.\d+)?)(h|min|m|s)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text.replace(" ", ""):
        raise UsageError(f"--budget {text!r}: expected a time such as 90m, 2h or 1h30m")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


# ------------------------------------------------------------------ progress


class Watch:
    """Follows a sweep: bars on a terminal, a line per group elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.bar: Progress | None = None
        self.done = self.total = 0

    def __enter__(self) -> Watch:
        if not self.quiet and console.messages().is_terminal:
            self.bar = console.progress()
            self.runs = self.bar.add_task("runs", total=None)
            self.steps = self.bar.add_task("reading the data", total=None)
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Moved):
            self._say(
                f"moved from {event.before} to {event.now}; {console.count(event.begun, 'group')} "
                f"begun and {console.count(event.failed, 'run')} failed there begin again here"
            )
        elif isinstance(event, Planned):
            self._planned(event)
        elif isinstance(event, Measuring):
            self._measuring(event)
        elif isinstance(event, GroupStarted):
            self._started(event)
        elif isinstance(event, StepDone):
            if self.bar is not None:
                self.bar.update(self.steps, completed=event.step, total=event.total)
        elif isinstance(event, GroupFinished):
            self._finished(event)
        elif isinstance(event, LaneDropped):
            self._say(f"{event.lane.label} is given up: {event.reason}")
        elif isinstance(event, BegunAnew):
            first = event.group.runs[0]
            self._say(f"{first} begins again, as its state cannot be used: {event.reason}")
        elif isinstance(event, WorkerLost):
            what = "tried again" if event.again else "given up"
            self._say(f"the worker of {event.group.runs[0]} was lost, {what}: {event.reason}")
        elif isinstance(event, Waiting):
            hosts = ", ".join(sorted({f"{c.host}:{c.pid}" for c in event.claims}))
            self._say(f"waiting for what {hosts} works on")

    def _planned(self, event: Planned) -> None:
        self.done, self.total = event.finished, event.total
        for reason in event.missing_tasks:
            self._say(f"left out: {reason}")
        for sentence in event.cut_sizes:
            self._say(sentence)
        there = f", {event.finished} of them finished" if event.finished else ""
        self._say(f"{event.base}: {console.count(event.total, 'run')}{there}")
        self._count()

    def _started(self, event: GroupStarted) -> None:
        runs = event.group.runs
        more = f" and {len(runs) - 1} beside it" if len(runs) > 1 else ""
        if self.bar is not None:
            self.bar.reset(self.steps, description=f"{runs[0]}{more}"[:60])
        else:
            self._say(f"training {runs[0]}{more}")

    def _measuring(self, event: Measuring) -> None:
        what = f"how many runs of {event.run.task.name} train side by side"
        if self.bar is not None:
            self.bar.reset(self.steps, description=f"measuring {what}"[:60])
        else:
            self._say(f"measuring {what}")

    def _finished(self, event: GroupFinished) -> None:
        for result in event.results:
            self.done += 1
            self._count()
            # Where the two protocols choose two rates, there are more runs than were counted on.
            place = f"{self.done}/{max(self.total, self.done)}"
            record = result.record
            name = f"{record['row']} on {record['task']['name']}"
            rate, seed = record["config"]["learning_rate"], record["config"]["seed"]
            if record["state"] == "failed":
                self._say(f"[{place}] {name}: failed: {record['error']}")
                continue
            score = console.number(record["scores"].get(record["metric"]))
            size = "" if record["train_rows"] is None else f", {record['train_rows']:,} rows"
            self._say(
                f"[{place}] {name}{size}, rate {rate:g}, seed {seed}: "
                f"{record['metric']} {score}, {console.duration(record['cost']['seconds'])}"
            )

    def _count(self) -> None:
        if self.bar is not None:
            total = max(self.total, self.done)
            self.bar.update(self.runs, completed=self.done, total=total)

    def _say(self, line: str) -> None:
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.console.print(console.printable(line), soft_wrap=True)
        else:
            console.note(line)


# ------------------------------------------------------------------ what is shown


def _show_plan(plan: Mapping[str, Any]) -> None:
    rows = [
        (
            cell["base"], cell["row"], cell["task"],
            "all" if cell["train_rows"] is None else f"{cell['train_rows']:,}",
            cell["runs"], f"{cell['tokens_per_second']:,.0f}", console.duration(cell["seconds"]),
            console.size(cell["bytes"]),
        )
        for cell in plan["cells"]
    ]  # fmt: skip
    console.print_table(
        ("base", "row", "task", ">rows", ">runs", ">tokens/s", ">time", ">disk"), rows,
        title=plan["title"] or plan["name"],
    )  # fmt: skip
    for reason in plan["missing_tasks"]:
        console.say(f"left out: {reason}")
    for sentence in plan["cut_sizes"]:
        console.say(sentence)
    for cell in (cell for cell in plan["cells"] if "error" in cell):
        console.say(f"cannot be made: {cell['row']} on {cell['task']}: {cell['error']}")
    conditions = plan["conditions"]
    shared = f"{plan['shared']} of the experiments before, " if plan["shared"] else ""
    console.say(
        f"{console.count(plan['runs'], 'run')} to make, {shared}{plan['finished']} finished: about "
        f"{console.duration(plan['seconds'])} one after the other on {conditions['device']} with "
        f"{console.count(conditions['threads'], 'thread')} in {conditions['dtype']}, "
        f"{console.size(plan['bytes'])} in {plan['directory']}, up to "
        f"{console.size(plan['bytes_while_running'])} more while it works. "
        "Lanes make rows of biases faster."
    )


def _show_sum(plans: Sequence[Mapping[str, Any]]) -> None:
    runs, seconds, size = (sum(plan[key] for plan in plans) for key in ("runs", "seconds", "bytes"))
    console.say(
        f"in all {console.count(runs, 'run')} to make: about {console.duration(seconds)} one after "
        f"the other, {console.size(size)}"
    )


def _summary_json(order: Ordered, summary: Summary) -> dict[str, Any]:
    return {
        "name": order.grid.name, "directory": str(order.directory), "made": summary.made,
        "done": summary.done,
        "failed": [{k: r[k] for k in ("id", "row", "error")} for r in summary.failed],
        "left_out": summary.left_out, "missing_tasks": summary.missing_tasks,
        "seconds": summary.seconds,
    }  # fmt: skip


def _show_summary(order: Ordered, summary: Summary, files: Mapping[str, Any]) -> None:
    console.say(
        f"{console.count(summary.made, 'run')} made in {console.duration(summary.seconds)}, "
        f"{summary.done} finished in {order.directory}"
    )
    for record in summary.failed:
        console.say(f"failed: {record['row']} ({record['id']}): {record['error']}")
    if summary.left_out:
        console.say(
            f"{console.count(len(summary.left_out), 'run')} left out for lack of time, the first: "
            f"{summary.left_out[0]}; --resume goes on"
        )
    show_report(files)


def make_report(
    directory: Path,
    out: Path | None,
    data: Path | None,
    *,
    submission: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write the report of an experiment, and return its files and what it lacks."""
    if data is not None and not data.is_dir():
        raise DataError(f"--data {data}: no such directory")
    if out is not None:
        check_out_folder(out, out)
    store = Store(directory)
    with console.working(quiet, "reading what is right on dev") as tell:
        left_out = [] if data is None else restore_answers(store, data)
        report = write_report(store, out, on_part=tell)
    folder = out if out is not None else directory / "report"
    found: dict[str, Any] = {
        "title": report.title, "report": str(folder), "page": str(folder / "report.html"),
        "files": [str(path) for path in report.files], "lacks": [*left_out, *report.left_out],
    }  # fmt: skip
    if submission:
        if data is None:
            raise UsageError("a submission answers GLUE's test files: name them with --data DIR")
        found["submissions"] = _submit(directory, data, folder, quiet)
    return found


def show_report(found: Mapping[str, Any]) -> None:
    """Print where a report is."""
    console.say(f"{found['title']}: {console.count(len(found['files']), 'file')}")
    console.say(f"the page: {found['page']}")
    for line in found["lacks"]:
        console.note(f"lacks {line}")
    for made in found.get("submissions", ()):
        console.say(f"the submission of {made['base']}: {made['archive']}")
        for name, why in made["left_out"].items():
            console.note(f"without {name}: {why}")


def _submit(directory: Path, data: Path, folder: Path, quiet: bool) -> list[dict[str, Any]]:
    """Write the GLUE server's files of each base, answered by its best runs of bias tuning."""
    made = []
    store = Store(directory)
    best = best_runs(store)
    if not best:
        raise UsageError(f"{store.directory} has no finished run of bias tuning on a GLUE task")
    for number, (base, runs) in enumerate(best.items(), 1):
        files = {name: store.task_file(run["id"]) for name, run in runs.items()}
        # Of an experiment that was moved the runs may be of several precisions.
        dtypes = {precision_here(run["environment"]["dtype"]) for run in runs.values()}
        dtype = dtypes.pop() if len(dtypes) == 1 else "fp32"
        place = folder / ("submission" if len(best) == 1 else f"submission-{number}")
        encoder = open_encoder(base, dtype)
        with console.bar(quiet) as bar:
            row = None if bar is None else bar.add_task(f"answers of {base}", total=None)

            def tell(count: int, bar: Any = bar, row: Any = row) -> None:
                if bar is not None:
                    bar.advance(row, count)

            written = write_submission(
                encoder, files, glue_folder(data), place, partial=True, on_answers=tell
            )
        made.append({
            "base": base, "archive": str(written.archive), "left_out": dict(written.left_out),
            "files": {file.name: str(file.source or file.constant) for file in written.files},
        })  # fmt: skip
    return made
