"""A trainer's state in one file: written whole, and checked whole before anything of it is taken.

Tensors are ``trained.i``, ``mean.i`` and ``square.i`` of what is trained, and ``best.lane.i`` of
each lane's best epoch; one JSON document says of which runs they are and where these stand.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from bitfit.errors import CheckpointRefused
from bitfit.storage import atomic_write, pack_safetensors, unpack_safetensors
from bitfit.training.lane import Progress

CHECKPOINT_KEY = "bitfit_checkpoint"
# The header holds every epoch of every lane, some 150 bytes each: 1,024 lanes of 100 epochs, and
# far less than the tensors behind it.
_MAX_HEADER = 64 << 20


@dataclass(frozen=True)
class State:
    """Where the runs of a trainer stand."""

    slots: list[int | None]
    """The lane (its place in the queue) of each slot."""
    next_lane: int
    """How many lanes of the queue have begun."""
    progress: Sequence[Progress]
    """Of each lane."""
    best: Sequence[Sequence[Tensor]]
    """Of each lane the numbers of its best epoch; none of one that has not begun."""
    moving: Mapping[str, Tensor]
    """What every step changes: what is trained, and the optimizer's two of it."""


def write_state(path: Path, identity: Mapping[str, Any], state: State) -> None:
    """Write a state, atomically.

    Args:
        path: where.
        identity: what the runs depend on, as JSON has it.
        state: where they stand.
    """
    best = {
        f"best.{lane}.{i}": tensor
        for lane, tensors in enumerate(state.best)
        for i, tensor in enumerate(tensors)
    }
    note = {
        "identity": identity, "slots": state.slots, "next_lane": state.next_lane,
        "progress": [vars(progress) for progress in state.progress],
    }  # fmt: skip
    data = pack_safetensors({**state.moving, **best}, CHECKPOINT_KEY, json.dumps(note))
    atomic_write(path, data)


def read_state(
    path: Path,
    identity: Mapping[str, Any],
    *,
    moving: Mapping[str, Tensor],
    numbers: Sequence[Tensor],
    slots: int,
    lanes: int,
) -> State:
    """Return a state that the runs of a trainer can go on from.

    Args:
        path: where it was written.
        identity: what the runs depend on.
        moving: what every step changes, as it is now: for names and shapes.
        numbers: what a lane has trained, as it is now: for shapes.
        slots: how many lanes run side by side.
        lanes: how many there are.

    Raises:
        CheckpointRefused: it is damaged, or of runs with other settings or data.
    """
    tensors, note = _read(path)
    _check_identity(path, identity, note["identity"])
    next_lane = _checked_places(path, note, slots, lanes)
    progress = _checked_progress(path, note, lanes)
    found = {name: _tensor(path, tensors, name, own) for name, own in moving.items()}
    best = [
        [_tensor(path, tensors, f"best.{lane}.{i}", own) for i, own in enumerate(numbers)]
        if lane < next_lane
        else []
        for lane in range(lanes)
    ]
    return State(note["slots"], next_lane, progress, best, found)


def recorded_conditions(checkpoint: Path | None) -> dict[str, Any]:
    """Return what a checkpoint's run depended on (``dtype``, ``threads``, ...); empty without one.

    Raises:
        CheckpointRefused: the checkpoint is damaged.
    """
    if checkpoint is None or not checkpoint.exists():
        return {}
    return dict(_read(checkpoint)[1]["identity"])


def recorded_step(checkpoint: Path) -> int | None:
    """Return the step that a run would go on from; None where there is no checkpoint.

    Raises:
        CheckpointRefused: the checkpoint is damaged.
    """
    if not checkpoint.exists():
        return None
    note = _read(checkpoint)[1]
    lanes = note.get("progress")
    count = len(lanes) if isinstance(lanes, list) else 0
    return sum(progress.step for progress in _checked_progress(checkpoint, note, count))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and what is said of them, of which the identity alone is checked."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointRefused(f"{path}: cannot be read: {error.strerror or error}") from error
    tensors, text = unpack_safetensors(
        data, CHECKPOINT_KEY, source=str(path), what="checkpoint", max_header=_MAX_HEADER,
        error=CheckpointRefused,
    )  # fmt: skip
    try:
        note = json.loads(text)
    except ValueError:
        raise _damaged(path, "what it says of its runs is no JSON") from None
    if not isinstance(note, dict) or not isinstance(note.get("identity"), dict):
        raise _damaged(path, "it does not say what its runs depend on")
    return tensors, note


def _check_identity(path: Path, mine: Mapping[str, Any], its: Mapping[str, Any]) -> None:
    differs = [key for key in {**mine, **its} if mine.get(key) != its.get(key)]
    if differs:
        raise CheckpointRefused(
            f"{path} is of another run: {', '.join(differs)} differ(s). Repeat the command as it "
            "was, or delete the file to start anew"
        )


def _checked_places(path: Path, note: Mapping[str, Any], slots: int, lanes: int) -> int:
    """Return how many lanes have begun, once that and those in the slots can be meant."""
    begun = note.get("next_lane")
    if not _is_count(begun) or begun > lanes:
        raise _damaged(path, f"{begun!r} lanes have begun, of {lanes}")
    held = note.get("slots")
    if not isinstance(held, list) or len(held) != slots:
        raise _damaged(path, f"it has other slots than the {slots} of these runs")
    filled = [lane for lane in held if lane is not None]
    if wrong := [lane for lane in filled if not _is_count(lane) or lane >= begun]:
        raise _damaged(path, f"a slot has lane {wrong[0]!r}, of {begun} that have begun")
    if len(set(filled)) < len(filled):
        raise _damaged(path, "two slots have the same lane")
    return begun


def _checked_progress(path: Path, note: Mapping[str, Any], lanes: int) -> list[Progress]:
    entries = note.get("progress")
    if not isinstance(entries, list) or len(entries) != lanes:
        raise _damaged(path, f"it does not say where each of {lanes} lanes stands")
    return [_progress(path, lane, entry) for lane, entry in enumerate(entries)]


def _progress(path: Path, lane: int, entry: Any) -> Progress:
    """Return where a lane stands, if each field is there with a value of its kind."""
    fresh = vars(Progress())
    if not isinstance(entry, dict):
        raise _damaged(path, f"lane {lane} says nothing of where it stands")
    for name in {**fresh, **entry}:
        if name not in fresh:
            raise _damaged(path, f"lane {lane} has {name!r}, which this version does not know")
        if name not in entry:
            raise _damaged(path, f"lane {lane} lacks {name!r}")
        if not _is_like(entry[name], fresh[name]):
            raise _damaged(path, f"{name!r} of lane {lane} is {entry[name]!r:.40}")
    return dataclasses.replace(Progress(), **entry)


def _tensor(path: Path, tensors: Mapping[str, Tensor], name: str, own: Tensor) -> Tensor:
    """Return a tensor, if it is there and can take the place of ``own``."""
    if name not in tensors:
        raise _damaged(path, f"it lacks {name}")
    found = tensors[name]
    if found.shape != own.shape:
        raise _damaged(path, f"{name} has shape {[*found.shape]}, expected {[*own.shape]}")
    return found


def _is_like(value: Any, fresh: Any) -> bool:
    if type(fresh) is int:
        return _is_count(value)
    return type(value) in ((float, int) if type(fresh) is float else (type(fresh),))


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _damaged(path: Path, what: str) -> CheckpointRefused:
    return CheckpointRefused(f"{path} is no state to go on from ({what}): delete it to start anew")
