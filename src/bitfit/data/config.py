"""What to read (:class:`DataConfig`) and what was read (:class:`Dataset`)."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from bitfit.data.rows import BadRow, did_you_mean
from bitfit.errors import UsageError
from bitfit.tasks import DEFAULT_METRICS, BuiltinTask, Example, Kind, Task, builtin_task

Format = Literal[
    "auto", "glue", "csv", "tsv", "jsonl", "parquet", "conllu", "conll", "ptb", "squad", "hub"
]
FORMATS: tuple[str, ...] = get_args(Format)
SPLITS = ("train", "dev", "dev_mismatched", "test", "test_mismatched", "test_diagnostic")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A task with its examples by split."""

    task: Task
    splits: Mapping[str, Sequence[Example]]
    """``train``, ``dev``, ``test``; MNLI also ``dev_mismatched``, ``test_mismatched`` and, of
    GLUE's diagnostic set, ``test_diagnostic``."""
    skipped: Sequence[BadRow] = ()
    """Rows left out: on request, or because they are known to be broken in the official files."""
    sources: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The files that each split was read from; a held-out dev has those of train."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """The columns taken for ``text``, ``text_pair``, ``label`` and ``id``, where there are any."""
    held_out: bool = False
    """Whether dev was taken out of train, as the data has none of its own."""
    kind_seen_from: str | None = None
    """What the answers are that told the kind; None where the kind was named or is the format's."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data to read and how.

    Example:
        >>> config = DataConfig(data="tickets.csv", text="body", label="intent", dev_fraction=0.2)
    """

    data: str | Path
    """A file (the training split), a folder of splits, or ``hub:owner/name[:configuration]``."""
    task: str | None = None
    """A built-in task, whose files, columns and labels are known; None: data of your own."""
    text: str | None = None
    """Column of the text (or of the words); None: guessed from common names."""
    text_pair: str | None = None
    """Column of the second text; None: a single text unless the names are ``sentence1`` …"""
    label: str | None = None
    """Column of the answer; None: guessed from common names."""
    labels: tuple[str, ...] | None = None
    """Label names in the order of the logits; None: those of the training split, sorted."""
    kind: Kind | None = None
    """The kind of task; None: seen from the answers."""
    train_split: str = "train"
    """Which split to train on: of a folder train, dev or test; of a hub data set any of its own."""
    dev: str | Path | None = None
    """File of the development split (hub: its name); None: found by name, else held out."""
    test: str | Path | None = None
    """As ``dev``, of the test split, whose answers may be missing; None: found by name, or none."""
    format: Format = "auto"
    """``auto``: by file name. ``glue`` for a file of your own: tab-separated, quotes are text."""
    token_column: str | int | None = None
    """CoNLL-U: ``xpos`` (the default) or ``upos``. CoNLL: index of the tag, by default the last."""
    limit: int | None = None
    """Keep this many training rows, a seeded choice; a smaller limit keeps a subset of a larger."""
    dev_fraction: float = 0.1
    """Share of train to hold out where there is no dev split; 0: go without."""
    seed: int = 0
    """Seed of ``limit`` and ``dev_fraction``."""
    skip_bad_rows: bool = False
    """Leave bad rows out and list them, in place of stopping at the first."""
    label_separator: str = "|"
    """Multilabel in text columns: what stands between two labels."""
    splits: tuple[str, ...] | None = None
    """Splits to return, each of which must be there. None: train and whatever else is found.

    One split other than train, with ``data`` a file: that file is the split.
    """
    hub_revision: str | None = None
    """Commit, tag or branch of a hub data set."""

    def __post_init__(self) -> None:
        for name in ("labels", "splits"):  # a TOML file gives lists
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        if not str(self.data).strip():
            raise UsageError(
                "data is empty; name a file, a folder, or hub:owner/name", field="data"
            )
        self._check_choices()
        self._check_numbers()
        if self.labels is not None:
            self._check_labels(self.labels)
        named = [c for c in (self.text, self.text_pair, self.label) if c is not None]
        if len(set(named)) != len(named):
            raise UsageError(f"a column is named twice among text, text_pair and label: {named}")
        if not self.label_separator:
            raise UsageError(
                "label_separator is empty; expected a character such as '|'",
                field="label_separator",
            )

    @property
    def builtin(self) -> BuiltinTask | None:
        """The built-in task, if one is named."""
        return builtin_task(self.task) if self.task is not None else None

    def _check_choices(self) -> None:
        _check_choice("format", self.format, FORMATS)
        if self.kind is not None:
            _check_choice("kind", self.kind, tuple(DEFAULT_METRICS))
        if self.splits is not None and not self.splits:
            raise UsageError("splits is empty; leave it out to read what is there")
        for split in self.splits or ():
            _check_choice("split", split, SPLITS)
        if isinstance(self.token_column, str):
            _check_choice("token_column", self.token_column, ("xpos", "upos"))
        builtin = self.builtin
        if builtin is not None and self.kind not in (None, builtin.task.kind):
            raise UsageError(f"task {self.task!r} is {builtin.task.kind}, not {self.kind}")
        if builtin is None or builtin.open_labels:
            return
        if self.labels not in (None, builtin.task.labels):
            raise UsageError(f"task {self.task!r} has the labels {', '.join(builtin.task.labels)}")

    def _check_numbers(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"limit is {self.limit}; expected at least 1", field="limit")
        share = self.dev_fraction
        if not (isinstance(share, numbers.Real) and 0 <= share < 1):
            raise UsageError(
                f"dev_fraction is {share!r}; expected 0 up to below 1", field="dev_fraction"
            )
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}; expected 0 or more", field="seed")

    def _check_labels(self, labels: tuple[str, ...]) -> None:
        if self.kind in ("regression", "span") and labels:
            raise UsageError(f"{self.kind} has no labels, got {', '.join(labels)}")
        if any(not label.strip() for label in labels):
            raise UsageError("a label is empty")
        if len(set(labels)) != len(labels):
            raise UsageError(f"a label occurs twice in {', '.join(labels)}")


def _check_choice(what: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        hint = did_you_mean(str(value), choices)
        raise UsageError(f'unknown {what} "{value}".{hint} Known: {", ".join(choices)}', field=what)
