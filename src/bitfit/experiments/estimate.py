"""How long runs take: from a short measurement, then from those that are finished."""

from __future__ import annotations

from collections.abc import Sequence

from bitfit.errors import BitfitError
from bitfit.experiments.execute import Group
from bitfit.experiments.material import Material
from bitfit.experiments.runs import Run
from bitfit.training.lane_count import training_speed

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
            side_by_side = [self.material.lane(runs[0])] * lanes
            self.speeds[kind] = training_speed(self.material.encoder, side_by_side)
        return self.speeds[kind]

    def learn(self, group: Group, tokens: int, seconds: float) -> None:
        """Take the speed that a whole group of one method had."""
        kinds = {_kind(run, group.lanes) for run in group.runs}
        if len(kinds) == 1 and tokens and seconds > 0:
            self.speeds[kinds.pop()] = tokens / seconds


def _kind(run: Run, lanes: int) -> Kind:
    return run.task.name, run.train_rows, run.config.method, lanes
