"""Who trains the groups that a sweep has claimed: this process, or (``cluster``) others."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from bitfit.experiments.conditions import Conditions
from bitfit.experiments.execute import Event as TrainingEvent
from bitfit.experiments.execute import Group, run_group
from bitfit.experiments.material import Material
from bitfit.experiments.store import Result, Store


@dataclass(frozen=True)
class WorkerLost:
    """The process that trained a group is no more."""

    group: Group
    reason: str
    again: bool
    """Whether the group is tried again; else its runs are recorded as failed."""


@dataclass(frozen=True)
class Outcome:
    """How a group ended."""

    group: Group
    results: Sequence[Result]
    seconds: float
    """That its training took."""


class Executor(Protocol):
    """Takes groups, and gives back what their runs left."""

    @property
    def room(self) -> bool:
        """Whether it takes another group now."""

    @property
    def busy(self) -> bool:
        """Whether it has groups whose results were not collected."""

    def submit(self, group: Group) -> None:
        """Take a group."""

    def collect(self, timeout: float) -> list[Outcome]:
        """Return the groups that have ended since, waiting ``timeout`` seconds for the first.

        Raises:
            TrainingInterrupted: it was asked to stop.
            BitfitError: groups cannot be trained there at all.
        """

    def close(self) -> None:
        """Give up what is being trained."""


class LocalExecutor:
    """Trains one group at a time in this process, while :meth:`collect` is called.

    Args:
        material: the base and the data.
        store: where the groups keep their checkpoints.
        conditions: of the experiment.
        tell: told of steps and epochs.
        should_stop: asked after every step.
    """

    def __init__(
        self,
        material: Material,
        store: Store,
        conditions: Conditions,
        tell: Callable[[TrainingEvent], None],
        should_stop: Callable[[], bool] | None,
    ) -> None:
        self.material, self.store, self.conditions = material, store, conditions
        self.tell, self.should_stop = tell, should_stop
        self._group: Group | None = None

    @property
    def room(self) -> bool:
        """Whether no group waits."""
        return self._group is None

    @property
    def busy(self) -> bool:
        """Whether a group waits."""
        return self._group is not None

    def submit(self, group: Group) -> None:
        """Take a group."""
        self._group = group

    def collect(self, timeout: float) -> list[Outcome]:
        """Train the group that waits, however long it takes, and return what it left.

        Raises:
            TrainingInterrupted: ``should_stop`` said so; the state is saved.
        """
        group, self._group = self._group, None
        if group is None:
            return []
        began = time.perf_counter()
        results = run_group(
            group, self.material, self.store, self.conditions, on_event=self.tell,
            should_stop=self.should_stop,
        )  # fmt: skip
        return [Outcome(group, results, time.perf_counter() - began)]

    def close(self) -> None:
        """Do nothing: what was being trained has ended with :meth:`collect`."""
