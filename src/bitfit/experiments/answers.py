"""Dev answers of an experiment that was handed on without them, read again from the data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitfit.data import dataset_hash, read_dataset
from bitfit.errors import BitfitError
from bitfit.experiments.grid import GridTask
from bitfit.experiments.runs import data_config
from bitfit.experiments.store import Store
from bitfit.jsonable import jsonable
from bitfit.tasks import contexts, references


def restore_answers(store: Store, data: Path) -> list[str]:
    """Keep the dev answers that an experiment lacks; return why some could not be had.

    Result lines may be published without the answers, which belong to the data. Those of other
    rows than the runs were scored on are not taken: the hash of the rows tells.

    Args:
        store: the experiment.
        data: the data directory.
    """
    lacking = {}
    for record in store.records():
        is_span = record["task"].get("kind") == "span"
        found = store.contexts(record) if is_span else store.answers(record)
        more = (record["history"][0].get("more") or {}) if record["state"] == "done" else {}
        is_whole = found is not None and more.keys() <= store.more_answers(record).keys()
        if record["state"] == "done" and not is_whole:
            lacking[record["data"]["dev"]] = record
    tasks = {task["name"]: GridTask(**task) for task in store.experiment()["grid"]["tasks"]}
    problems = []
    for digest, record in lacking.items():
        name = record["task"]["name"]
        try:
            splits = _splits(tasks[name], data, record)
        except BitfitError as error:
            problems.append(f"{name}: {error}")
            continue
        examples = splits["dev"]
        if dataset_hash(examples) != digest:
            problems.append(f"{name}: the dev rows in {data} are not those of the experiment")
            continue
        more = {k: jsonable(references(v)) for k, v in splits.items() if k.startswith("dev_")}
        store.write_answers(record, jsonable(references(examples)), contexts(examples), more)
    return problems


def _splits(task: GridTask, data: Path, record: dict[str, Any]) -> Mapping[str, Any]:
    config = data_config(task, data, record["train_rows"], record["data"]["seed"])
    return read_dataset(config, with_test=False).splits
