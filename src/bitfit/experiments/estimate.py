"""How long runs take: from a short measurement, then from those that are finished."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence

import torch

from bitfit.errors import BitfitError
from bitfit.experiments.execute import Group
from bitfit.experiments.material import Material
from bitfit.experiments.runs import Run
from bitfit.training.lane import Progress
from bitfit.training.methods import make_method
from bitfit.training.train import Trainer

_STEPS = 3
# Evaluating is a forward pass without dropout on sorted batches: about so many times as fast.
_EVALUATION_GAIN = 3.0

Kind = tuple[str, int | None, str, int]
"""Task, training rows, method and lanes: runs of one kind take their tokens at one speed."""


class Clock:
    """Speeds of kinds of runs in real tokens per second, and what follows from them."""

    def __init__(self, material: Material) -> None:
        self.material = material
        self.speeds: dict[Kind, float] = {}

    def seconds(self, group: Group) -> float:
        """Return about how long a group takes, measuring where its kind is not known."""
        return sum(self._seconds(run, group.lanes) for run in group.runs)

    def _seconds(self, run: Run, lanes: int) -> float:
        try:
            speed = self.speed([run], lanes)
        except BitfitError:  # cannot be made, which takes no time
            return 0.0
        splits = self.material.splits(run)
        train, dev = (sum(len(f) for f in splits[name].features.items) for name in ("train", "dev"))
        evaluated = train + dev * (run.config.epochs + 1)
        return (train * run.config.epochs + evaluated / _EVALUATION_GAIN) / speed

    def speed(self, runs: Sequence[Run], lanes: int) -> float:
        """Return the tokens per second of a kind of runs, measured once."""
        kind = _kind(runs[0], lanes)
        if kind not in self.speeds:
            self.speeds[kind] = measure_speed(self.material, [runs[0]] * lanes)
        return self.speeds[kind]

    def learn(self, group: Group, tokens: int, seconds: float) -> None:
        """Take the speed that a whole group of one method had."""
        kinds = {_kind(run, group.lanes) for run in group.runs}
        if len(kinds) == 1 and tokens and seconds > 0:
            self.speeds[kinds.pop()] = tokens / seconds


def measure_speed(material: Material, runs: Sequence[Run]) -> float:
    """Return the tokens per second of a few steps of ``runs`` side by side."""
    lanes = [copy.copy(material.lane(run)) for run in runs]
    for lane in lanes:
        lane.progress = Progress()
    encoder = material.encoder
    method = make_method(encoder, lanes, len(lanes))
    method.install()
    try:
        steps = Trainer(encoder=encoder, method=method, lanes=lanes).steps_only()
        next(steps)
        began, tokens = time.perf_counter(), 0
        for _ in range(_STEPS):
            tokens += next(steps).tokens
        if encoder.device.type == "cuda":
            torch.cuda.synchronize(encoder.device)
        return tokens / (time.perf_counter() - began)
    finally:
        method.uninstall()


def _kind(run: Run, lanes: int) -> Kind:
    return run.task.name, run.train_rows, run.config.method, lanes
