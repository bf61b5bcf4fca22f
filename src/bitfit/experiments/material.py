"""What runs learn from: an open base, and data read, hashed and tokenized once for many runs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bitfit.batches import make_features
from bitfit.data import Dataset, dataset_hash, read_dataset
from bitfit.encoder import Encoder
from bitfit.errors import BitfitError, DataError, UsageError
from bitfit.experiments.grid import Grid, GridTask
from bitfit.experiments.runs import Run, data_config
from bitfit.storage import dump_json
from bitfit.tasks import Task
from bitfit.training.lane import Lane, Split

V = TypeVar("V")
# Data sets of different tasks, sizes and seeds that are kept; a large one is some hundred MB.
_KEPT = 8
_BERT_DROPOUT = 0.1


@dataclass(frozen=True)
class Source:
    """A data set with the hashes of its splits."""

    dataset: Dataset
    hashes: Mapping[str, str]


@dataclass(frozen=True)
class Known:
    """What is remembered of a data set when its rows are not."""

    task: Task
    hashes: Mapping[str, str]
    """Of each split."""
    train_rows: int


class Sources:
    """Data sets that were asked for last, read and hashed once.

    Args:
        data: the data directory.
    """

    def __init__(self, data: Path) -> None:
        self.data = data
        self._kept: OrderedDict[Hashable, Source] = OrderedDict()
        self._known: dict[Hashable, Known] = {}

    def read(self, task: GridTask, train_rows: int | None, seed: int) -> Source:
        """Return the rows of a task, with dev.

        Raises:
            DataError: files that are not there or cannot be read.
            UsageError: data without a dev split, which every choice needs.
        """
        key = task.name, train_rows, seed
        source = _kept(self._kept, key, lambda: self._read(task, train_rows, seed))
        dataset = source.dataset
        self._known[key] = Known(dataset.task, source.hashes, len(dataset.splits["train"]))
        return source

    def known(self, task: GridTask, train_rows: int | None, seed: int) -> Known:
        """Return what is known of a task's rows, which are read where they never were.

        A grid with many data sets asks for these again and again; it keeps the rows of a few.

        Raises:
            BitfitError: as :meth:`read`.
        """
        key = task.name, train_rows, seed
        if key not in self._known:
            self.read(task, train_rows, seed)
        return self._known[key]

    def _read(self, task: GridTask, train_rows: int | None, seed: int) -> Source:
        dataset = read_dataset(data_config(task, self.data, train_rows, seed), with_test=False)
        if "dev" not in dataset.splits:
            raise UsageError(
                f"task {task.name!r} has no dev rows, and epochs and rates are chosen on them: "
                "name a dev file, or let dev_fraction be above 0"
            )
        return Source(dataset, {k: dataset_hash(rows) for k, rows in dataset.splits.items()})

    def sizes(self, grid: Grid, task: GridTask) -> tuple[int | None, ...]:
        """Return on how many rows a task is trained: the sizes of a learning curve, or its own.

        A size above the task's limit, or above the rows that it has, becomes as many as there are.

        Raises:
            BitfitError: as :meth:`read`.
        """
        if not grid.train_rows:
            return (task.limit,)
        known = self.known(task, max(grid.train_rows), grid.data_seed(grid.seeds[0]))
        most = min(known.train_rows, task.limit or max(grid.train_rows))
        return tuple(dict.fromkeys(min(size, most) for size in grid.train_rows))

    def there(self, grid: Grid, *, skip_missing: bool) -> tuple[Grid, list[str]]:
        """Return the grid with the tasks whose data is there, and why others are left out.

        Raises:
            DataError: the data of a task is not there, unless ``skip_missing``, or of all tasks.
            UsageError: the same for a column, say, that the data does not have.
        """
        missing, tasks = [], []
        kind: type[BitfitError] = DataError
        for task in grid.tasks:
            try:
                for size in self.sizes(grid, task):
                    self.known(task, size, grid.data_seed(grid.seeds[0]))
                tasks.append(task)
            except BitfitError as error:
                missing.append(f"{task.name}: {error}")
                kind = UsageError if isinstance(error, UsageError) else kind
        if missing and (not skip_missing or not tasks):
            raise kind("; ".join(missing))
        return grid.replace(tasks=tuple(tasks)), missing


class Material:
    """An open base, and the data that was asked for last.

    Args:
        encoder: the base.
        sources: the data.
    """

    def __init__(self, encoder: Encoder, sources: Sources) -> None:
        self.encoder, self.sources = encoder, sources
        self._splits: OrderedDict[Hashable, dict[str, Split]] = OrderedDict()

    @property
    def data(self) -> Path:
        """The data directory."""
        return self.sources.data

    def source(self, task: GridTask, train_rows: int | None, seed: int) -> Source:
        """Return the rows of a task; as :meth:`Sources.read`."""
        return self.sources.read(task, train_rows, seed)

    def splits(self, run: Run) -> dict[str, Split]:
        """Return the features that a run learns from and is scored on."""
        source = self.source(run.task, run.train_rows, run.data_seed)
        task, length = source.dataset.task, run.config.max_length
        tokenizer = self.encoder.base.tokenizer
        return _kept(self._splits, (*run.material, length), lambda: {
            name: Split(examples, make_features(tokenizer, task, examples, length))
            for name, examples in source.dataset.splits.items()
        })  # fmt: skip

    def lane(self, run: Run) -> Lane:
        """Return the run as a lane.

        Raises:
            BitfitError: terms or a pooling that this base does not have, and what a lane refuses.
        """
        splits = self.splits(run)
        task = self.source(run.task, run.train_rows, run.data_seed).dataset.task
        return Lane(
            encoder=self.encoder, task=task, config=run.config, train=splits["train"],
            dev=splits["dev"], label=str(run),
            more={name: split for name, split in splits.items() if name not in ("train", "dev")},
        )  # fmt: skip

    def facts(self, task: GridTask, train_rows: int | None, seed: int) -> dict[str, Any]:
        """Return what a run's id is made of, beside its settings.

        The hashes of base, tokenizer and data, and the precision. What else a base and a task bring
        counts where it is not usual (ids of earlier versions stay): dropout unlike BERT's, a
        pooling other than the mean, how a task is scored that is not built in, labels that the grid
        names.
        """
        base, known = self.encoder.base, self.sources.known(task, train_rows, seed)
        own = {
            key: f"{value:g}" for key, value in base.config.to_dict().items()
            if _is_dropout(key, value) and value != _BERT_DROPOUT
        }  # fmt: skip
        if base.pooling != "mean":
            own["pooling"] = base.pooling
        if "task" not in task.data:
            own["scored_as"] = f"{known.task.kind}: {', '.join(known.task.metrics)}"
        if "labels" in task.data:  # else they follow from the rows
            own["labels"] = dump_json(known.task.labels)
        return own | {
            "base": base.identity.sha256,
            "tokenizer": base.tokenizer_sha256,
            "train": known.hashes["train"],
            "dev": known.hashes["dev"],
            "dtype": self.encoder.precision,
        }


def _is_dropout(key: str, value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and ("dropout" in key or key.endswith("_pdrop"))  # GPT-2's


def _kept(cache: OrderedDict[Hashable, V], key: Hashable, make: Callable[[], V]) -> V:
    if key not in cache:
        cache[key] = make()
        while len(cache) > _KEPT:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]
