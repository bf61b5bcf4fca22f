"""The front door: :func:`read_dataset`, from a :class:`DataConfig` to a :class:`Dataset`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitfit.data.columns import Spec, read_tables
from bitfit.data.config import SPLITS, DataConfig, Dataset
from bitfit.data.files import SUFFIXES, Layout, find_files, project_name, split_files
from bitfit.data.hub import read_hub
from bitfit.data.ptb import read_ptb
from bitfit.data.rows import RowGuard
from bitfit.data.splits import hold_out, splits_by_use, take_limit
from bitfit.data.squad import read_squad
from bitfit.data.tables import Table, glue_table, open_table
from bitfit.data.tagged import Sentence, read_conll, read_conllu, read_sentences
from bitfit.errors import DataError, UsageError
from bitfit.tasks import Example, Task

_HUB = "hub:"
_TOKEN_FORMATS = ("conllu", "conll", "ptb")


@dataclass(frozen=True)
class _Raw:
    """What a format's reader gives back."""

    task: Task
    splits: Mapping[str, Sequence[Example]]
    columns: Mapping[str, str]
    kind_seen_from: str | None = None


def read_dataset(config: DataConfig, *, with_test: bool = True) -> Dataset:
    r"""Return the task and the examples that ``config`` describes.

    ``with_test=False`` leaves test splits unread that ``config.splits`` does not ask for: training
    has no use for them.

    Dev is held out from train where there is none (``dev_fraction``), then ``limit`` is applied to
    train, so that dev stays the same while the training size varies.

    Raises:
        DataError: on data that cannot be read: file, line, what was expected.
        UsageError: on a configuration that does not fit the data.
        MissingExtra: for Parquet without pyarrow and the hub without ``datasets``.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "moods.csv")
        >>> _ = path.write_text("text,label\nso good,glad\nalas,sad\nhurrah,glad\noh no,sad\n")
        >>> data = read_dataset(DataConfig(data=path))
        >>> data.task.labels, len(data.splits["train"]), len(data.splits["dev"])
        (('glad', 'sad'), 2, 2)
    """
    guard = RowGuard(config.skip_bad_rows)
    name = str(config.data)
    if config.format == "hub" or (config.format == "auto" and name.startswith(_HUB)):
        raw, sources = _from_hub(name.removeprefix(_HUB), config, guard, with_test)
    else:
        layout = find_files(config)
        wanted = _splits_to_read(layout.files, config, layout.looked_in, with_test)
        layout = Layout(layout.format, {s: layout.files[s] for s in wanted}, layout.looked_in)
        raw = _from_files(layout, config, guard)
        sources = {split: tuple(map(str, paths)) for split, paths in layout.files.items()}
    return _finished(raw, sources, config, guard)


def _splits_to_read(
    found: Iterable[str], config: DataConfig, looked_in: str, with_test: bool
) -> list[str]:
    """Return the splits to read, in our order; train also for labels or to hold dev out."""
    there = [split for split in SPLITS if split in set(found)]
    if config.splits is None:
        if "train" not in there:
            raise DataError(_missing("train", config, looked_in))
        return [split for split in there if with_test or not split.startswith("test")]
    wanted = [split for split in there if split in config.splits]
    missing = [split for split in config.splits if split not in there]
    can_hold_out = "train" in there and config.dev_fraction > 0
    if missing and not (missing == ["dev"] and can_hold_out):
        raise DataError(_missing(missing[0], config, looked_in))
    knows_labels = (
        (config.builtin is not None and not config.builtin.open_labels)
        or config.labels is not None
        or config.kind in ("regression", "span")
    )
    if "train" in there and "train" not in wanted and (missing or not knows_labels):
        wanted.insert(0, "train")
    return wanted


def _missing(split: str, config: DataConfig, looked_in: str) -> str:
    builtin = config.builtin
    split = file = config.train_split if split == "train" else split
    if builtin is not None:
        file = " or ".join(split_files(builtin).get(split, (split,)))
    return f"{config.data}: no {split} split: looked for {file} in {looked_in}"


# ------------------------------------------------------------------ formats


def _from_files(layout: Layout, config: DataConfig, guard: RowGuard) -> _Raw:
    if layout.format in _TOKEN_FORMATS:
        return _from_sentences(layout, config, guard)
    if layout.format == "squad":
        splits = {
            s: read_squad(paths[0], guard, is_test=s.startswith("test"))
            for s, paths in layout.files.items()
        }
        if config.kind not in (None, "span"):
            raise UsageError(f"SQuAD is of the kind span, not {config.kind}")
        builtin = config.builtin
        name = project_name(config)
        task = builtin.task if builtin else Task(name=name, kind="span", is_pair=True)
        return _Raw(task, splits, {})
    tables = {
        s: _table(paths[0], layout.format, config, guard) for s, paths in layout.files.items()
    }
    return _from_tables(tables, config, guard, is_official=layout.format == "glue")


def _table(path: Path, table_format: str, config: DataConfig, guard: RowGuard) -> Table:
    # A dev or test file named by hand may be of another format than the training file.
    own = SUFFIXES.get(path.suffix.lower())
    if config.format == "auto" and own is not None and (own, table_format) != ("tsv", "glue"):
        table_format = own
    if table_format == "glue":
        task = config.builtin.task.name if config.builtin else None
        return glue_table(path, guard, is_cola=task == "cola", is_qqp=task == "qqp")
    return open_table(path, table_format, guard)


def _from_tables(
    tables: Mapping[str, Table], config: DataConfig, guard: RowGuard, *, is_official: bool = False
) -> _Raw:
    builtin = config.builtin
    task = builtin.task if builtin is not None and not builtin.open_labels else None
    there = next(iter(tables.values())).columns

    def column(named: str | None, official: str | None) -> str | None:
        # Elsewhere than in the official files a built-in task's columns may have other names.
        return named or (official if is_official or official in there else None)

    spec = Spec(
        name=builtin.task.name if builtin else project_name(config),
        text=column(config.text, builtin.text if builtin else None),
        text_pair=column(config.text_pair, builtin.text_pair if builtin else None),
        label=column(config.label, builtin.label if builtin else None),
        kind=builtin.task.kind if builtin else config.kind,
        labels=task.labels if task else config.labels,
        separator=config.label_separator,
        task=task,
    )
    task, splits, columns, seen_from = read_tables(tables, spec, guard)
    return _Raw(task, splits, columns.named(), seen_from)


def _from_sentences(layout: Layout, config: DataConfig, guard: RowGuard) -> _Raw:
    builtin = config.builtin
    if config.kind not in (None, "tokens") or (builtin and builtin.task.kind != "tokens"):
        raise UsageError(f"{layout.format} files are of the kind tokens; leave kind and task out")
    sentences = {
        split: [s for path in paths for s in _sentences(path, layout.format, config, guard)]
        for split, paths in layout.files.items()
    }
    name = builtin.task.name if builtin else project_name(config)
    task, splits = read_sentences(sentences, name, config.labels, guard)
    return _Raw(task, splits, {})


def _sentences(path: Path, form: str, config: DataConfig, guard: RowGuard) -> list[Sentence]:
    column = config.token_column
    if form == "ptb":
        return read_ptb(path, guard)
    if form == "conllu":
        if isinstance(column, int):
            raise UsageError(f"token_column is {column}; CoNLL-U has xpos and upos")
        return read_conllu(path, column or "xpos", guard)
    if isinstance(column, str):
        raise UsageError(f"token_column is {column!r}; CoNLL columns are numbered from 0")
    return read_conll(path, -1 if column is None else column, guard)


def _from_hub(
    name: str, config: DataConfig, guard: RowGuard, with_test: bool
) -> tuple[_Raw, dict[str, tuple[str, ...]]]:
    builtin = config.builtin
    labels = builtin.task.labels if builtin and not builtin.open_labels else None
    found = read_hub(name, config.hub_revision, labels)
    wishes = {"train": config.train_split, "dev": config.dev, "test": config.test}
    named = {use: str(split) for use, split in wishes.items() if split is not None}
    tables = splits_by_use(found, named)
    for use in ("dev", "test"):
        if use in named and use not in tables:
            raise UsageError(
                f"{use} is {named[use]!r}, which is no split of hub:{name}; "
                f"it has {', '.join(found)}",
                field=use,
            )
    if "dev" in named and tables["dev"] is tables.get("train"):
        raise UsageError(
            f"dev is {named['dev']!r}, the split that is trained on: its rows would choose the "
            "epoch and give the score; leave dev out, and rows of train are held out",
            field="dev",
        )
    wanted = _splits_to_read(tables, config, f"its splits: {', '.join(found)}", with_test)
    tables = {split: tables[split] for split in wanted}
    sources: dict[str, tuple[str, ...]] = {split: (table.file,) for split, table in tables.items()}
    return _from_tables(tables, config, guard), sources


# ------------------------------------------------------------------ splits


def _finished(
    raw: _Raw, sources: Mapping[str, tuple[str, ...]], config: DataConfig, guard: RowGuard
) -> Dataset:
    splits = dict(raw.splits)
    sources = dict(sources)
    for split, examples in splits.items():
        if not examples:
            skipped = f"; {len(guard.skipped)} bad rows were left out" if guard.skipped else ""
            raise DataError(f"{', '.join(sources[split])}: no rows to use for {split}{skipped}")
    wants_dev = config.splits is None or "dev" in config.splits
    held_out = wants_dev and "dev" not in splits and config.dev_fraction > 0
    if held_out:
        splits["train"], splits["dev"] = hold_out(splits["train"], config.dev_fraction, config.seed)
        sources["dev"] = sources["train"]
        if not (splits["train"] and splits["dev"]):
            where = ", ".join(sources["train"])
            raise DataError(f"{where}: too few rows to hold a dev split out; give dev a file")
    if config.limit is not None and "train" in splits:
        splits["train"] = take_limit(splits["train"], config.limit, config.seed)
    kept = [s for s in SPLITS if s in splits and (config.splits is None or s in config.splits)]
    return Dataset(
        task=raw.task,
        splits={split: splits[split] for split in kept},
        skipped=tuple(guard.skipped),
        sources={split: sources[split] for split in kept},
        columns=raw.columns,
        held_out=held_out,
        kind_seen_from=raw.kind_seen_from,
    )
