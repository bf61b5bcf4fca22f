"""What a sweep would do: its runs, the time from a short measurement, the disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bitfit.encoder import Encoder, open_encoder
from bitfit.errors import BitfitError
from bitfit.experiments.conditions import Conditions
from bitfit.experiments.estimate import Clock
from bitfit.experiments.grid import Grid
from bitfit.experiments.material import Material, Sources
from bitfit.experiments.plan import Planner, make_group, most_lanes
from bitfit.experiments.runs import Run
from bitfit.experiments.store import Store
from bitfit.experiments.sweep import Settings, check_twins, conditions_of
from bitfit.training.lane import Lane
from bitfit.training.methods import encoder_parameters, make_method
from bitfit.training.settings import ROW_METHODS

# A task file's document, a record, and what their file system adds.
_RUN_BYTES = 24_000


def dry_run(
    grid: Grid,
    directory: Path,
    settings: Settings,
    on_cell: Callable[[str], None] | None = None,
    planned: set[str] | None = None,
) -> dict[str, Any]:
    """Return what :class:`~bitfit.experiments.sweep.Sweep` would do, without writing anything.

    Speeds are those of runs one after the other: lanes make row methods faster, by how much is
    measured when it starts.

    Args:
        grid: what to run.
        directory: where the results would go; runs that are there, or in a directory of
            ``settings.reuse``, are not counted again, but for the repeats of a cell that has not
            chosen its rate here: which those are is not known yet.
        settings: how.
        on_cell: told before each measurement what is measured.
        planned: ids of runs that experiments before this one make and that it copies; those of
            this one are added.

    Returns:
        ``cells``: per base, row, task and training size: ``runs`` left, ``seconds``, ``bytes``,
        ``tokens_per_second``, and ``error`` where its runs cannot be made. ``runs``,
        ``finished``, ``seconds``, ``bytes``: of all;
        ``bytes_while_running``: what the state of the largest run takes beside them until it is
        finished; ``shared``: runs that experiments before this one make;
        ``missing_tasks``; ``cut_sizes``: a sentence for each task with fewer rows than a learning
        curve asks for; ``conditions``.
    """
    store = Store(directory)
    conditions = conditions_of(grid, store, settings)
    states = store.finished() if store.exists else {}
    if states and (settings.retry_failed or _moves(store, conditions)):
        states = _done(states)  # what failed would be made again
    for other in settings.reuse:
        states |= _done(Store(other).finished())
    finished = shared = state = 0
    lanes = most_lanes(conditions.device) if settings.lanes == "auto" else int(settings.lanes)
    planned = set() if planned is None else planned
    cut: list[str] = []
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    sources = Sources(settings.data)
    grid, missing = sources.there(grid, skip_missing=settings.skip_missing)
    if len(grid.base) > 1:
        places = conditions.dtype, conditions.device
        check_twins((base, open_encoder(base, *places)) for base in grid.base)
    for base in grid.base:
        encoder = open_encoder(base, conditions.dtype, conditions.device)
        material = Material(encoder, sources)
        planner = Planner(grid, base, material, store, also=conditions.earlier_dtypes)
        cut = planner.cut_sizes()
        clock = Clock(material)
        left, there = _all_runs(planner, states)
        finished += there
        for run in left:
            if run.id in planned:
                shared += 1
                continue
            planned.add(run.id)
            cell = cells.setdefault(_key(run), _new_cell(run))
            if on_cell is not None and not cell["runs"]:
                on_cell(f"{run.row.name} on {run.task.name}")
            cell["runs"] += 1
            cell["bytes"] += _RUN_BYTES
            try:
                lane = material.lane(run)
                cell["tokens_per_second"] = clock.speed([run], 1)
                state = max(state, _state_bytes(lane, encoder, lanes))
            except BitfitError as error:  # it would be recorded as failed
                cell["error"] = str(error)
                continue
            cell["seconds"] += clock.seconds(make_group([run], 1))
            cell["bytes"] += _bytes(lane)
    listed = list(cells.values())
    return {
        "name": grid.name, "title": grid.title, "directory": str(directory), "cells": listed,
        "runs": sum(cell["runs"] for cell in listed), "finished": finished,
        "shared": shared,
        "seconds": sum(cell["seconds"] for cell in listed),
        "bytes": sum(cell["bytes"] for cell in listed),
        "bytes_while_running": state,
        "missing_tasks": missing, "cut_sizes": cut,
        "conditions": conditions.to_json(),
    }  # fmt: skip


def _moves(store: Store, conditions: Conditions) -> bool:
    return Conditions.from_json(store.experiment()["conditions"]) != conditions


def _done(states: Mapping[str, str]) -> dict[str, str]:
    return {run_id: state for run_id, state in states.items() if state == "done"}


def _all_runs(planner: Planner, states: Mapping[str, str]) -> tuple[list[Run], int]:
    """Return what is left, and how many runs are finished.

    What is left has a stand-in for each repeat whose rate is still to be chosen.
    """
    begun = [*planner.search(), *planner.repeats()]
    left = [run for run in begun if not any(i in states for i in planner.ids(run))]
    return [*left, *planner.unchosen()], len(begun) - len(left)


def _key(run: Run) -> tuple[Any, ...]:
    return run.base, *run.cell


def _new_cell(run: Run) -> dict[str, Any]:
    keys = ("base", "row", "task", "train_rows")
    counts = {"runs": 0, "seconds": 0.0, "bytes": 0, "tokens_per_second": 0.0}
    return dict(zip(keys, _key(run), strict=True)) | counts


def _state_bytes(lane: Lane, encoder: Encoder, lanes: int) -> int:
    """Return about what the state of a run takes while it is made, with those beside it."""
    method = lane.config.method
    if method in ROW_METHODS:
        count = lanes * (lane.layout.n + lane.head.size)
    elif method == "full":
        count = sum(p.numel() for p in encoder_parameters(encoder, lane.head).values())
        count += lane.head.size
    else:
        count = sum(t.numel() for t in make_method(encoder, [lane], 1).tensors)
    # fp32: the numbers, Adam's two moments and the best epoch's; the new state stands beside the
    # old one until it replaces it.
    return 2 * 4 * 4 * count


def _bytes(lane: Lane) -> int:
    """Return about what a run leaves on disk beside its record."""
    kept = 4 * (lane.layout.n + lane.head.size) if lane.config.method in ROW_METHODS else 0
    scored = [split for split in (lane.dev, *lane.more.values()) if split is not None]
    return kept + 2 * lane.config.epochs * sum(len(split.features.items) for split in scored)
