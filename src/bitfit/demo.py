"""The demo: three small tasks of one bicycle shop, trained and then answered on one base."""

from __future__ import annotations

import importlib.resources
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitfit.encoder import open_encoder
from bitfit.errors import BitfitError, UsageError
from bitfit.model import Model, Prediction
from bitfit.training.finetune import Event, finetune
from bitfit.training.outputs import Outcome
from bitfit.training.plan import checkpoint_path

TASKS = ("intent", "urgency", "sentiment")
# Chosen for two cores and four minutes, not for the last point of the score.
BITFIT = {"epochs": 5, "learning_rate": 3e-3, "patience": 0}
FROZEN = {"epochs": 5, "learning_rate": 1e-2, "patience": 0}
QUICK = {"epochs": 1, "limit": 120}

# None of them stands in the data.
SENTENCES = (
    "My new helmet came with a crack right across the top, and I ride to work on Monday!",
    "Thanks again to Priya at the till, she found me the perfect saddle.",
    "Do you also sell rain covers that fit a double child trailer?",
    "You took the money for my brakes two times, please send one of the payments back.",
)


@dataclass(frozen=True)
class DemoStarted:
    """One of the demo's six runs begins (three if quick)."""

    task: str
    method: str
    run: int
    """From 1."""
    runs: int


@dataclass(frozen=True)
class DemoResult:
    """What the demo gave."""

    tasks: list[dict[str, Any]]
    """Per task: ``task, classes, rows, metric, score, majority, frozen, trained, head, file,
    file_bytes, seconds``; ``frozen`` is None if quick."""
    sentences: Sequence[str]
    answers: list[list[Prediction]]
    """Per sentence one answer of each task."""
    answer_seconds: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return it as one object; scores are fractions."""
        return {
            "tasks": self.tasks,
            "answers": [
                {"text": text, **{answer.task: answer.to_json() for answer in found}}
                for text, found in zip(self.sentences, self.answers, strict=True)
            ],
            "answer_seconds": self.answer_seconds,
            "seconds": self.seconds,
        }


def example_files(task: str) -> tuple[Path, Path]:
    """Return the training and the dev file of an example task that comes with the package.

    Raises:
        BitfitError: they are not there: a broken installation.
    """
    folder = Path(str(importlib.resources.files("bitfit"))) / "example"
    train, dev = folder / f"{task}.train.csv", folder / f"{task}.dev.csv"
    for path in (train, dev):
        if not path.is_file():
            raise BitfitError(f"{path} is missing: install bitfit again")
    return train, dev


def task_file(folder: Path, task: str) -> Path:
    """Return where the demo writes one of its tasks."""
    return folder / f"{task}.bitfit.safetensors"


def run_demo(
    folder: Path,
    *,
    base: str = "minilm",
    quick: bool = False,
    on_event: Callable[[DemoStarted | Event], None] | None = None,
) -> DemoResult:
    """Train the example tasks, save them to ``folder``, and answer new sentences with all three.

    Args:
        folder: where the task files go.
        base: the base; the demo is made for ``minilm``.
        quick: one short epoch a task and no frozen baselines, to see that it runs; the scores mean
            nothing.
        on_event: told of every run, step and epoch.

    Raises:
        UsageError: ``folder`` cannot be one.
        MissingExtra: ``minilm`` without its package.
    """
    began = time.perf_counter()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; the demo's task files go to a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be a folder: {error.strerror or error}") from error
    encoder = open_encoder(base)
    rows: list[dict[str, Any]] = []
    methods = ("bitfit",) if quick else ("frozen", "bitfit")
    runs = [(task, method) for task in TASKS for method in methods]
    frozen: dict[str, float] = {}
    for number, (task, method) in enumerate(runs, 1):
        if on_event is not None:
            on_event(DemoStarted(task, method, number, len(runs)))
        train, dev = example_files(task)
        settings: dict[str, Any] = {**(FROZEN if method == "frozen" else BITFIT)}
        settings |= QUICK if quick else {}
        out = task_file(folder, task) if method == "bitfit" else None
        state = checkpoint_path(out)
        if state is not None:  # of a demo that was stopped: this one begins anew
            state.unlink(missing_ok=True)
        outcome = finetune(
            encoder, data=train, dev=dev, text="text", label="label", name=task, method=method,
            out=out,
            description=f"Example task {task!r} of bitfit's demo.", on_event=on_event, **settings,
        )  # fmt: skip
        if method == "frozen":
            frozen[task] = outcome.score
        else:
            rows.append(_row(outcome, frozen.get(task)))
    model = Model(encoder)
    for row in rows:
        model.add(row["file"])
    before = time.perf_counter()
    # Every sentence with every task, in one call: the batch mixes the three.
    flat = model.predict([s for s in SENTENCES for _ in TASKS], [*TASKS] * len(SENTENCES))
    now = time.perf_counter()
    answers = [flat[i : i + len(TASKS)] for i in range(0, len(flat), len(TASKS))]
    return DemoResult(rows, SENTENCES, answers, now - before, now - began)


def _row(outcome: Outcome, frozen: float | None) -> dict[str, Any]:
    report = outcome.to_json()
    metric = report["metric"]
    return {
        "task": report["task"],
        "classes": len(outcome.file.task.labels),
        "rows": report["rows"],
        "metric": metric,
        "score": report["score"],
        "majority": report["majority"][metric],
        "frozen": frozen,
        "trained": report["trainable"]["encoder"],
        "head": report["trainable"]["head"],
        "file": report["file"],
        "file_bytes": report["file_bytes"],
        "seconds": report["seconds"],
    }
