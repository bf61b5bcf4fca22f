"""Data sets of the Hugging Face hub, by way of the ``datasets`` package."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from bitfit.data.tables import Row, Table
from bitfit.errors import DataError, MissingExtra


def read_hub(
    name: str, revision: str | None, task_labels: tuple[str, ...] | None
) -> dict[str, Table]:
    """Return the tables of ``owner/name`` or ``owner/name:configuration`` by the hub's own splits.

    Class numbers become class names. Where a built-in task has other names (``task_labels``; the
    hub calls SST-2's "0" "negative"), the numbers stay. Code from the hub is never run.

    Raises:
        MissingExtra: without ``datasets``.
        DataError: where the hub does not have it.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtra("reading from the hub", "data") from None
    path, _, configuration = name.partition(":")
    try:
        with _quiet_libraries():
            loaded = datasets.load_dataset(path, configuration or None, revision=revision)
    except Exception as error:
        # The package raises its own, the hub's, the network's and pyarrow's errors alike.
        raise DataError(_cannot_read(name, error)) from error
    parts = loaded if isinstance(loaded, Mapping) else {"train": loaded}
    return {
        str(split): _table(f"hub:{name}/{split}", part, task_labels)
        for split, part in parts.items()
    }


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Hold back what the libraries log of retries: our error says what came of them."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _cannot_read(name: str, error: Exception) -> str:
    reason = str(error).strip() or type(error).__name__
    return (
        f"hub:{name} cannot be read from the data hub: {reason.splitlines()[0].rstrip('.')}. "
        "Without a network give a local file or folder; with HF_HUB_OFFLINE=1 only what is in "
        "the hub's cache is looked at, and at once"
    )


def _table(file: str, part: Any, task_labels: tuple[str, ...] | None) -> Table:
    names = {column: _class_names(feature) for column, feature in part.features.items()}
    convert = {c: _namer(n, task_labels) for c, n in names.items() if n is not None}

    def rows() -> Iterator[tuple[int, Row]]:
        for number, row in enumerate(part, 1):
            yield number, {c: convert[c](v) if c in convert else v for c, v in row.items()}

    return Table(file, tuple(part.features), rows())


def _class_names(feature: Any) -> list[str] | None:
    """Return the class names of a column of class numbers, or of lists of them."""
    inner = getattr(feature, "feature", feature)
    names = getattr(inner, "names", None)
    return list(names) if names is not None else None


def _namer(names: list[str], task_labels: tuple[str, ...] | None) -> Callable[[Any], Any]:
    keep_numbers = task_labels is not None and not set(names) <= set(task_labels)

    def name(value: Any) -> Any:
        if isinstance(value, list):
            return [name(item) for item in value]
        if value is None or value < 0:  # -1: the answers of a test split are kept secret
            return None
        return value if keep_numbers else names[value]

    return name
