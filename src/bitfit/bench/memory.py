"""Peak memory of one variant above its loaded model, in a process of its own.

The system's highest resident size of a process (``ru_maxrss``) never goes down, and loading a model
may set it. So the model is loaded, every weight read once and one small product taken, what was
freed given back, and the mark set to the present size (Linux: ``5`` into
``/proc/self/clear_refs``); then two steps run and the mark is read (``VmHWM``). On a GPU torch
counts by itself. Elsewhere there is no such mark and the answer is None.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitfit.batches import Feature
from bitfit.bench.runs import Run, Variant
from bitfit.bench.variants import choose_variants
from bitfit.bench.work import Work
from bitfit.errors import BitfitError
from bitfit.freed import trim
from bitfit.tasks import Task

MARK = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


def peak_memory(variant: Variant, work: Work) -> int | None:
    """Return the bytes that training takes above the loaded model; None: not known here.

    Two steps are taken on the batches of the step with most tokens: the optimizer's state comes
    with the end of the first.

    Raises:
        BitfitError: the process failed; the message is its last line.
    """
    if not is_known(work.device):
        return None
    largest = max(range(len(work.batches) // work.lanes), key=work.tokens)
    order = {
        "variant": variant.name, "base": work.base, "device": str(work.device),
        "threads": torch.get_num_threads(), "task": dataclasses.asdict(work.task),
        "batches": [[_to_json(f) for f in batch] for batch in work.step_batches(largest)],
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "bitfit.bench.memory"],
        input=json.dumps(order), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise BitfitError(f"measuring the memory of {variant.name!r} failed: {last}")
    return int(done.stdout)


def is_known(device: torch.device) -> bool:
    """Whether peak memory can be measured on ``device``."""
    return device.type == "cuda" or MARK.exists()


def measure_peak(build: Callable[[], Run], device: torch.device) -> int:
    """Return the bytes of two steps above what is there after ``build``."""
    run = build()
    _settle(run)
    before = start_peak(device)
    for _ in range(2):
        run.step(0)
    return max(0, read_peak(device) - before)


def give_back() -> None:
    """Give back to the system what was freed, as far as it can be told to."""
    gc.collect()
    trim()


def _settle(run: Run) -> None:
    """Leave the model in memory and nothing of its loading."""
    for module in run.modules:
        for parameter in module.parameters():  # a mapped file's pages come when they are read
            float(parameter.detach().float().sum())
    x = torch.ones(64, 64, requires_grad=True)
    (x @ x).sum().backward()  # the libraries' own buffers
    give_back()


def start_peak(device: torch.device) -> int:
    """Set the mark to what is held now, and return that in bytes; :func:`is_known` must hold."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    MARK.write_text("5")
    return _status("VmRSS")


def read_peak(device: torch.device) -> int:
    """Return the most that was held since :func:`start_peak`, in bytes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def resident_bytes(process: int | None = None) -> int | None:
    """Return what a process holds in memory now; None: not known here (Linux only).

    Args:
        process: its number; None: this one.
    """
    path = STATUS if process is None else Path(f"/proc/{process}/status")
    return _status("VmRSS", path) if path.exists() else None


def _status(key: str, path: Path = STATUS) -> int:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise BitfitError(f"{path} has no {key}")


def _to_json(feature: Feature) -> list[Any]:
    return [feature.input_ids.tolist(), feature.token_type_ids.tolist(), feature.label]


def _from_json(found: Sequence[Any]) -> Feature:
    ids, types, label = found
    return Feature(np.asarray(ids, np.int64), np.asarray(types, np.int64), 0, label=label)


def main() -> None:
    """Answer the order on standard input with a number of bytes."""
    order = json.load(sys.stdin)
    torch.set_num_threads(order["threads"])
    task: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in order["task"].items()
    }
    work = Work(
        base=order["base"], device=torch.device(order["device"]), task=Task(**task),
        batches=[[_from_json(found) for found in batch] for batch in order["batches"]],
        lanes=len(order["batches"]),
    )  # fmt: skip
    everything = {v.name: v for v in choose_variants("bf16", {"fp32": 0.0, "bf16": 0.0}, "bf16")}
    variant = everything[order["variant"]]
    print(measure_peak(lambda: variant.build(work), work.device))


if __name__ == "__main__":
    main()
