"""A grid of runs as a TOML file says it: rows (methods) x tasks x rates x seeds."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from bitfit.data import DataConfig
from bitfit.errors import DataError, UsageError
from bitfit.tasks import BUILTIN_TASKS, builtin_task
from bitfit.training.settings import RECIPES, TrainConfig, rates_to_try, resolve_config

Search = Literal["first-seed", "every-seed"]

_ROW_OPTIONS = {f.name for f in dataclasses.fields(TrainConfig)} - {
    "recipe", "seed", "learning_rate", "keep",
}  # fmt: skip
# The experiments whose numbers the paper prints.
PRINTED = ("table1", "table2", "table3", "table6", "pos")
_DATA_OPTIONS = {f.name for f in dataclasses.fields(DataConfig)} - {"seed", "limit", "splits"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table: a method with its settings and the rates it is searched over."""

    name: str
    """As it stands in the table."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of :class:`TrainConfig`: ``method``, ``terms``, ..."""
    learning_rate: tuple[float, ...] = ()
    """The rates to search over; empty: the paper's for the method (appendix A.2)."""

    @property
    def method(self) -> str:
        """The method that is trained."""
        return str(self.options.get("method", "bitfit"))

    @property
    def rates(self) -> tuple[float, ...]:
        """The rates, the smallest first."""
        return tuple(sorted(self.learning_rate or rates_to_try(self.method)))


@dataclass(frozen=True, kw_only=True)
class GridTask:
    """One column of a table."""

    name: str
    """As it stands in the table."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Fields of :class:`DataConfig`: ``task``, ``data``, ``text``, ...; a path is below the data
    directory."""
    limit: int | None = None
    """Training rows; None: all."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of :class:`TrainConfig` that this task needs, ``max_length`` or ``epochs``."""


P = TypeVar("P", Row, GridTask)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Rows x tasks x training sizes, each with its rates and seeds."""

    name: str
    """Letters, digits and dashes."""
    rows: tuple[Row, ...]
    """The lines, the most telling first: with a limited budget they come first."""
    tasks: tuple[GridTask, ...]
    """The columns."""
    title: str = ""
    """What a reader knows it by."""
    base: tuple[str, ...] = ("minilm",)
    """Names of bases."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the data's order, dropout, the head, and the choice of training rows."""
    recipe: str = "paper"
    """``paper`` or ``default``."""
    epochs: int | None = None
    """None: the recipe's."""
    search: Search = "first-seed"
    """``first-seed``: all rates with the first seed, the best with the others. ``every-seed``: all
    rates with all seeds."""
    train_rows: tuple[int, ...] = ()
    """Sizes of a learning curve; empty: each task's own."""
    reference: str | None = None
    """The row that others are compared with; None: the first."""
    paper: str | None = None
    """Which printed numbers stand beside: ``table2``, ..."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of :class:`TrainConfig` for every run."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant, naming the entry."""
        _check(isinstance(self.name, str), "name", self.name, "a text")
        if not self.name or not all(c.isascii() and (c.isalnum() or c in "-_") for c in self.name):
            raise UsageError(f"name is {self.name!r}; expected letters, digits, dashes")
        for what, values in (
            ("rows", [row.name for row in self.rows]), ("tasks", [t.name for t in self.tasks]),
            ("base", self.base), ("seeds", self.seeds), ("train_rows", self.train_rows),
        ):  # fmt: skip
            if not values and what != "train_rows":
                raise UsageError(f"{what} is empty: expected at least one")
            if len(set(values)) < len(values):
                raise UsageError(f"{what} has an entry twice: {', '.join(map(str, values))}")
        for row in self.rows:
            ok = len(set(row.learning_rate)) == len(row.learning_rate)
            _check(ok, f"row {row.name!r}: learning_rate", list(row.learning_rate), "each once")
        for seed in self.seeds:
            _check(isinstance(seed, int) and seed >= 0, "seeds", seed, "whole numbers from 0")
        for size in (*self.train_rows, *(t.limit for t in self.tasks if t.limit is not None)):
            ok = isinstance(size, int) and not isinstance(size, bool) and size > 0
            _check(ok, "training rows", size, "at least 1")
        _one_of("search", self.search, get_args(Search))
        _one_of("recipe", self.recipe, tuple(RECIPES))
        if self.reference is not None:
            _one_of("reference", self.reference, tuple(row.name for row in self.rows))
        for row in self.rows:
            for rate in row.rates:
                for task in self.tasks:
                    self.config(row, task, rate, self.seeds[0])

    def config(self, row: Row, task: GridTask, rate: float, seed: int) -> TrainConfig:
        """Return how one run trains.

        Raises:
            UsageError: an option that does not exist or cannot be meant, with where it stands.
        """
        options = self.options_of(row, task)
        if unknown := sorted(set(options) - _ROW_OPTIONS):
            place = self._place(unknown[0], row, task)
            raise UsageError(f"{place}: unknown option {_near(unknown[0], _ROW_OPTIONS)}")
        try:
            # The file, the score on train and the figures are of the epoch that counts.
            return resolve_config(
                self.recipe, learning_rate=rate, seed=seed, keep="best", **options
            )
        except (UsageError, TypeError) as error:  # a list where a name is looked up
            place = self._place(getattr(error, "field", None), row, task)
            raise UsageError(f"{place}: {error}") from error

    def _place(self, option: str | None, row: Row, task: GridTask) -> str:
        """Return where a run has an option from, as whoever wrote the grid knows it."""
        if option in row.options or option is None:
            return f"row {row.name!r}"
        if option in task.options:
            return f"task {task.name!r}"
        if option in self.options:
            return "options"
        return "the grid" if option == "epochs" else f"row {row.name!r}"

    def options_of(self, row: Row, task: GridTask) -> dict[str, Any]:
        """Return what is set for a run: by the grid, over it the task's, over these the row's."""
        own = {"epochs": self.epochs} if self.epochs is not None else {}
        return {**own, **self.options, **task.options, **row.options}

    def data_seed(self, seed: int) -> int:
        """Return the seed of the choice of training rows for a run of ``seed``.

        Of a learning curve each seed draws its own rows: the spread is to show that too.
        """
        return seed if self.train_rows else 0

    def replace(self, **changes: Any) -> Grid:
        """Return a copy with those ``changes`` that are not None.

        ``epochs`` are those of every run: what single rows and tasks have of their own goes.
        """
        given = {key: value for key, value in changes.items() if value is not None}
        grid = dataclasses.replace(self, **given)
        if "epochs" not in given:
            return grid
        return dataclasses.replace(
            grid,
            options=_without_epochs(grid.options),
            rows=tuple(_with_common_epochs(row) for row in grid.rows),
            tasks=tuple(_with_common_epochs(task) for task in grid.tasks),
        )

    def only(
        self,
        *,
        tasks: Sequence[str] | None = None,
        rows: Sequence[str] | None = None,
        limits: Mapping[str, int] | None = None,
    ) -> Grid:
        """Return the grid with only some of its tasks and rows, or with built-in tasks it lacks.

        Args:
            tasks: names; a built-in task that the grid does not have is added.
            rows: names.
            limits: training rows by task; the key ``""`` is for all others.

        Raises:
            UsageError: an unknown name.
        """
        grid = self
        if rows is not None:
            for name in rows:
                _one_of("row", name, tuple(row.name for row in self.rows))
            chosen = tuple(row for row in self.rows if row.name in rows)
            own = self.reference if self.reference in rows else None
            grid = dataclasses.replace(grid, rows=chosen, reference=own)
        if tasks is not None:
            known = {task.name: task for task in self.tasks}
            for name in tasks:
                _one_of("task", name, (*known, *(t for t in BUILTIN_TASKS if t not in known)))
            found = tuple(known.get(name) or grid_task(name) for name in tasks)
            grid = dataclasses.replace(grid, tasks=found)
        if limits:
            for name in filter(None, limits):  # "" is every task
                _one_of("task in the limits", name, [task.name for task in grid.tasks])
            limited = tuple(
                dataclasses.replace(task, limit=limits.get(task.name, limits.get("", task.limit)))
                for task in grid.tasks
            )
            grid = dataclasses.replace(grid, tasks=limited)
        return grid

    def to_json(self) -> dict[str, Any]:
        """Return the grid as it is written into the experiment."""
        return dataclasses.asdict(self)


def read_grid(path: str | Path) -> Grid:
    """Return the grid that a TOML file describes.

    Raises:
        DataError: a file that cannot be read.
        UsageError: an entry that cannot be meant, with the file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError:
        raise DataError(f"{path}: cannot be read: it is not UTF-8; expected a TOML file") from None
    return parse_grid(text, str(path), default_name=Path(path).stem)


# Figures that are the same runs as another, or some of them: which, and on which tasks.
FIGURES: dict[str, tuple[str, list[str] | None]] = {
    "figure3": ("figure1", ["cola"]),
    "figure4": ("figure1", ["mrpc"]),
    "figure5": ("figure1", ["stsb"]),
    "figure6": ("figure2", None),
}


# All of them with a limited time come in this order; those beyond the paper after these.
_ORDER = (
    "table3", "table2", "table1", "table6", "figure1", "gap", "figure2", "pos", "convergence",
    "stability",
)  # fmt: skip


def builtin_grids() -> list[str]:
    """Return the names of the paper's experiments, the most telling first, then those beyond it."""
    folder = resources.files("bitfit.experiments") / "grids"
    names = [p.name.removesuffix(".toml") for p in folder.iterdir() if p.name[-5:] == ".toml"]
    return sorted(names, key=lambda name: (_place(name), name))


def _place(name: str) -> int:
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


# The order of the paper, which is that of docs/reproduce.md.
_SHOWN = (
    "table1", "table2", "table3", "table6", "figure1", "figure2", "figure3", "figure4", "figure5",
    "figure6", "pos", "gap", "convergence", "stability", "terms", "layers", "peft", "curves",
)  # fmt: skip


def experiment_names() -> list[str]:
    """Return every name of an experiment, those of single figures too, in the paper's order."""
    names = {*builtin_grids(), *FIGURES}
    shown = [name for name in _SHOWN if name in names]
    return [*shown, *sorted(names.difference(shown))]


def check_experiment(name: str, *more: str) -> None:
    """Refuse a name that is no experiment's and none of ``more``.

    Raises:
        UsageError: with the nearest, and all of them.
    """
    _one_of("experiment", name, (*experiment_names(), *more))


def builtin_grid(name: str) -> Grid:
    """Return the grid of one of the paper's experiments.

    Raises:
        UsageError: an unknown name, with the nearest.
    """
    check_experiment(name)
    file, tasks = FIGURES.get(name, (name, None))
    folder = resources.files("bitfit.experiments") / "grids"
    text = (folder / f"{file}.toml").read_text(encoding="utf-8")
    return parse_grid(text, f"{file}.toml", default_name=name).only(tasks=tasks)


def parse_grid(text: str, source: str, *, default_name: str) -> Grid:
    """Return the grid in a TOML ``text``; ``source`` stands before each message.

    Raises:
        UsageError: not TOML, or an entry that cannot be meant.
    """
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{source}: not TOML: {error}") from error
    try:
        return _grid(found, default_name)
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from error


def _grid(found: dict[str, Any], default_name: str) -> Grid:
    known = {f.name for f in dataclasses.fields(Grid)}
    if unknown := sorted(set(found) - known):
        raise UsageError(f"unknown entry {_near(unknown[0], known)}")
    values = {"name": default_name} | found
    title, shared = values.get("title", ""), values.get("options", {})
    _check(isinstance(title, str), "title", title, "a text")
    _check(isinstance(shared, dict), "options", shared, "a table of options")
    if "paper" in found:
        _one_of("entry of paper", found["paper"], PRINTED)
    values["rows"] = tuple(_row(row) for row in _list(found, "rows", dict))
    values["tasks"] = tuple(grid_task(task) for task in _list(found, "tasks", (str, dict)))
    for key, kind in (("seeds", int), ("train_rows", int), ("base", str)):
        if key in found:
            values[key] = tuple(_list(found, key, kind))
    return Grid(**values)


def _row(found: dict[str, Any]) -> Row:
    options = dict(found)
    name = options.pop("name", None)
    if not isinstance(name, str) or not name.strip():
        raise UsageError(f"a row without a name: {found}")
    rates = options.pop("learning_rate", ())
    rates = tuple(rates) if isinstance(rates, list) else (rates,) if rates != () else ()
    for rate in rates:
        ok = isinstance(rate, (int, float)) and not isinstance(rate, bool)
        _check(ok, f"row {name!r}: learning_rate", rate, "a number or a list of them")
    return Row(name=name, options=options, learning_rate=rates)


def grid_task(found: str | Mapping[str, Any]) -> GridTask:
    """Return a task from its name, or from a table of options of the data and the training.

    Raises:
        UsageError: an option that neither has.
    """
    if isinstance(found, str):
        name = builtin_task(found).task.name
        return GridTask(name=name, data={"task": name})
    values = dict(found)
    name = values.pop("name", values.get("task"))
    if not isinstance(name, str) or not name.strip():
        raise UsageError(f"a task without a name: {found}")
    limit = values.pop("limit", None)
    data = {key: values.pop(key) for key in list(values) if key in _DATA_OPTIONS}
    if unknown := sorted(set(values) - _ROW_OPTIONS):
        known = _DATA_OPTIONS | _ROW_OPTIONS
        raise UsageError(f"task {name!r}: unknown option {_near(unknown[0], known)}")
    if not {"task", "data"} & set(data):
        if name not in BUILTIN_TASKS:
            raise UsageError(f"task {name!r}: neither a built-in task nor a file named by 'data'")
        data["task"] = name
    return GridTask(name=name, data=data, limit=limit, options=values)


def _with_common_epochs(part: P) -> P:
    return dataclasses.replace(part, options=_without_epochs(part.options))


def _without_epochs(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "epochs"}


def _list(found: Mapping[str, Any], key: str, kind: Any) -> list[Any]:
    values = found.get(key, [])
    values = values if isinstance(values, list) else [values]
    for value in values:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UsageError(f"{key} has {value!r}, which is not expected there")
    return values


def _check(ok: bool, what: str, value: Any, expected: str) -> None:
    if not ok:
        raise UsageError(f"{what}: {value!r}; expected {expected}")


def _one_of(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"unknown {what} {value!r}.{hint} Known: {', '.join(allowed)}")


def _near(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"{name!r}." + (f" Did you mean {near[0]!r}?" if near else "")
