"""What ``experiment.json`` says of an experiment, and who may join it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitfit.errors import UsageError
from bitfit.experiments.conditions import Conditions, check_weights
from bitfit.experiments.grid import Grid
from bitfit.experiments.store import Store
from bitfit.jsonable import jsonable

# Options with which a command asks for the same runs.
_FLAGS = ("--resume", "--retry-failed", "--quiet", "-q", "--json", "--debug")
_WITH_VALUES = ("--budget", "--lanes", "--ray")


def describe(
    grid: Grid,
    command: str,
    conditions: Conditions,
    lanes: Mapping[str, int],
    before: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return ``experiment.json``: the grid, with what was there of other rows, tasks and seeds."""
    whole = grid.to_json()
    for key in ("rows", "tasks"):
        names = {entry["name"] for entry in whole[key]}
        old = before["grid"][key] if before else []
        whole[key] = [e for e in old if e["name"] not in names] + list(whole[key])
        order = [entry["name"] for entry in old]
        whole[key].sort(key=lambda e, o=order: o.index(e["name"]) if e["name"] in o else len(o))
    for key in ("seeds", "base"):
        old = before["grid"][key] if before else []
        whole[key] = [*old, *(value for value in whole[key] if value not in old)]
    # Whoever joins with a few of the rows may not have the one that others are compared with.
    whole["reference"] = grid.reference or (before["grid"]["reference"] if before else None)
    return {
        "name": grid.name,
        "title": grid.title,
        "base": whole["base"],
        "recipe": grid.recipe,
        "rows": [row["name"] for row in whole["rows"]],
        "reference_row": whole["reference"] or whole["rows"][0]["name"],
        "tasks": [task["name"] for task in whole["tasks"]],
        "seeds": whole["seeds"],
        "search": grid.search,
        "paper": grid.paper,
        "commands": _commands(before or {}, command),
        "grid": whole,
        "conditions": conditions.to_json() | {"lanes": dict(lanes)},
    }  # fmt: skip


def _commands(before: Mapping[str, Any], command: str) -> list[str]:
    """Return the commands that the runs are of: those that asked for others than each before."""
    known = list(before.get("commands") or [before["command"]]) if before else []
    return known if _asked(command) in map(_asked, known) else [*known, command]


def _asked(command: str) -> list[str]:
    """Return the words of a command, but for those with which it asks for the same runs."""
    found, is_value = [], False
    for word in shlex.split(command):
        name, has_value, _ = word.partition("=")
        if not is_value and name not in (*_FLAGS, *_WITH_VALUES):
            found.append(word)
        is_value = name in _WITH_VALUES and not has_value
    return found


def check_begins(grid: Grid, directory: Path, *, dtype: str, resume: bool) -> None:
    """Refuse what :class:`~bitfit.experiments.sweep.Sweep` would, as far as the directory tells.

    For experiments that are to run after others, perhaps for days.

    Raises:
        UsageError: as :func:`check_joins`, or ``dtype`` is none that the grid's rows train in.
    """
    store = Store(directory)
    if store.exists:
        check_joins(grid, store.experiment(), directory, resume=resume)
    else:
        check_weights(grid, dtype)


def check_joins(grid: Grid, before: Mapping[str, Any], directory: Path, *, resume: bool) -> None:
    """Refuse to go on with another experiment; other rows, tasks and seeds may be added.

    Raises:
        UsageError: it was not asked to go on, or it is another experiment.
    """
    if not resume:
        raise UsageError(
            f"{directory} holds the experiment {before['name']!r}: --resume goes on with it, or "
            "take another --out"
        )
    now, then = jsonable(grid.to_json()), before["grid"]
    for key in ("name", "recipe", "epochs", "search", "options", "train_rows"):
        if now[key] != then[key]:
            raise UsageError(
                f"{directory} holds an experiment with {key} {then[key]!r}, not {now[key]!r}: "
                "take another --out"
            )
    for key in ("rows", "tasks"):
        known = {entry["name"]: entry for entry in then[key]}
        for entry in now[key]:
            if known.get(entry["name"], entry) != entry:
                raise UsageError(
                    f"{directory}: {entry['name']!r} was begun with other settings: "
                    f"{known[entry['name']]}; take another --out"
                )
