"""Dev answers of an experiment that was handed on without them, read again from the data."""

from __future__ import annotations

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
        if record["state"] == "done" and found is None:
            lacking[record["data"]["dev"]] = record
    tasks = {task["name"]: GridTask(**task) for task in store.experiment()["grid"]["tasks"]}
    problems = []
    for digest, record in lacking.items():
        name = record["task"]["name"]
        try:
            examples = _dev_rows(tasks[name], data, record)
        except BitfitError as error:
            problems.append(f"{name}: {error}")
            continue
        if dataset_hash(examples) != digest:
            problems.append(f"{name}: the dev rows in {data} are not those of the experiment")
            continue
        store.write_answers(record, jsonable(references(examples)), contexts(examples))
    return problems


def _dev_rows(task: GridTask, data: Path, record: dict[str, Any]) -> Any:
    config = data_config(task, data, record["train_rows"], record["data"]["seed"])
    return read_dataset(config, with_test=False).splits["dev"]
