"""What each of two processes does for test_processes; imported once by the fork server."""

from __future__ import annotations

import collections
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bitfit import taskfile
from bitfit.errors import BitfitError
from bitfit.training import checkpoint, outputs
from bitfit.training.finetune import finetune

ALL_REDUCE = dist.all_reduce
COMMON = {"dtype": "fp32", "epochs": 2, "learning_rate": 2e-3, "max_length": 80}


def train_scenarios(
    rank: int, port: int, folder: Path, scenarios: dict[str, dict[str, Any]]
) -> None:
    """Train each scenario as process ``rank`` of two and write down how it ended."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    torch.set_num_threads(1)
    if rank:
        for module in (taskfile, outputs, checkpoint):
            module.atomic_write = _no_write
    for name, options in scenarios.items():
        note = train_one(options, folder / f"{name}.bitfit.safetensors", rank)
        (folder / f"{name}.{rank}.json").write_text(json.dumps(note))


def train_one(options: dict[str, Any], out: Path, rank: int = 0) -> dict[str, Any]:
    """Train one scenario and return what is left of it."""
    options = COMMON | options
    options |= options.pop(f"only_{rank}", {})
    options.pop(f"only_{1 - rank}", None)
    stop_at, leave_at = options.pop("stop_at", None), options.pop("leave_at", None)
    asked = 0
    moved: collections.Counter[int] = collections.Counter()

    def counted(tensor: torch.Tensor, **others: Any) -> None:
        moved[tensor.numel()] += 1
        ALL_REDUCE(tensor, **others)

    dist.all_reduce = counted

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        if asked == leave_at:
            os._exit(0)
        return asked == stop_at

    try:
        outcome = finetune(out=options.pop("out", out), should_stop=should_stop, **options)
    except BitfitError as error:
        return {"error": f"{type(error).__name__}: {error}", "steps": asked}
    numbers = [t for lane in outcome.trainer.lanes for t in lane.best]
    digest = hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in numbers))
    return {
        "numbers": digest.hexdigest(),
        "steps": asked,
        "history": [lane.progress.history for lane in outcome.trainer.lanes],
        "scores": outcome.file.scores,
        "tokens": [lane.progress.tokens for lane in outcome.trainer.lanes],
        "lanes": len(outcome.trainer.slots),
        "moved": moved,
        "file": outcome.path.exists(),
    }


def _no_write(*_: Any, **__: Any) -> None:
    raise AssertionError("this process is to write nothing")
