"""Thousands of fine-tuned text models in the memory of one: bias-only fine-tuning (BitFit).

Public names are resolved when first used (PEP 562), so that ``import bitfit`` takes milliseconds
and no extra.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bitfit.bank import Bank, Layout
    from bitfit.data import DataConfig, Dataset, read_dataset
    from bitfit.encoder import open_encoder
    from bitfit.errors import BitfitError
    from bitfit.model import Model, Prediction, load
    from bitfit.taskfile import TaskFile
    from bitfit.tasks import Task
    from bitfit.terms import select_biases
    from bitfit.training.finetune import finetune
    from bitfit.training.settings import TrainConfig
    from bitfit.tuned import apply_task, task_from_model

_HOMES = {
    "Bank": "bank",
    "BitfitError": "errors",
    "DataConfig": "data",
    "Dataset": "data",
    "Layout": "bank",
    "Model": "model",
    "Prediction": "model",
    "Task": "tasks",
    "TaskFile": "taskfile",
    "TrainConfig": "training.settings",
    "apply_task": "tuned",
    "finetune": "training.finetune",
    "load": "model",
    "open_encoder": "encoder",
    "read_dataset": "data",
    "select_biases": "terms",
    "task_from_model": "tuned",
}

__all__ = [
    "Bank",
    "BitfitError",
    "DataConfig",
    "Dataset",
    "Layout",
    "Model",
    "Prediction",
    "Task",
    "TaskFile",
    "TrainConfig",
    "apply_task",
    "finetune",
    "load",
    "open_encoder",
    "read_dataset",
    "select_biases",
    "task_from_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bitfit' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"bitfit.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
