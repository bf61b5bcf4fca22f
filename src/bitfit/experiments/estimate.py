"""How long runs take: from a short measurement, then from those that are finished."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

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
        self._tokens: dict[tuple[Hashable, ...], dict[str, int]] = {}

    def seconds(self, group: Group) -> float:
        """Return about how long a group takes, measuring where its kind is not known."""
        return sum(self._seconds(run, group.lanes) for run in group.runs)

    def _seconds(self, run: Run, lanes: int) -> float:
        try:
            speed = self.speed([run], lanes)
        except BitfitError:  # cannot be made, which takes no time
            return 0.0
        return self._work(run, run.config.epochs) / speed

    def _work(self, run: Run, epochs: int) -> float:
        """Return the tokens of a run of so many epochs, evaluated ones at their share of a cost."""
        key = *run.material, run.config.max_length
        if key not in self._tokens:
            splits = self.material.splits(run)
            self._tokens[key] = {k: sum(map(len, v.features.items)) for k, v in splits.items()}
        train = self._tokens[key]["train"]
        dev = sum(self._tokens[key].values()) - train
        # Every epoch ends with dev; the kept one is scored on both once more.
        return train * epochs + (train + dev * (epochs + 1)) / _EVALUATION_GAIN

    def speed(self, runs: Sequence[Run], lanes: int) -> float:
        """Return the tokens per second of a kind of runs, measured once.

        Raises:
            BitfitError: the first of them cannot be made, and no other of its kind was measured.
        """
        kind = _kind(runs[0], lanes)
        if kind not in self.speeds:
            side_by_side = [self.material.lane(runs[0])] * lanes
            self.speeds[kind] = training_speed(self.material.encoder, side_by_side)
        return self.speeds[kind]

    def learn(self, group: Group, epochs: Mapping[str, int], seconds: float) -> None:
        """Take the speed that a whole group of one method had.

        Args:
            group: what was made.
            epochs: how many each of its runs had, by id; of a group with runs that failed, whose
                work is not known, nothing is learned.
            seconds: that all of it took, evaluation too.
        """
        kinds = {_kind(run, group.lanes) for run in group.runs}
        if len(kinds) == 1 and seconds > 0 and all(run.id in epochs for run in group.runs):
            work = sum(self._work(run, epochs[run.id]) for run in group.runs)
            self.speeds[kinds.pop()] = work / seconds


def _kind(run: Run, lanes: int) -> Kind:
    return run.task.name, run.train_rows, run.config.method, lanes
