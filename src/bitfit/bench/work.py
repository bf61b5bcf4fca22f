"""What a bench trains on: tasks, their batches, and which of them have their turn when."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bitfit.batches import Feature, make_features
from bitfit.data import DataConfig, read_dataset
from bitfit.demo import TASKS as EXAMPLE_TASKS
from bitfit.demo import example_files
from bitfit.encoder import Encoder
from bitfit.errors import UsageError
from bitfit.tasks import Task, builtin_task

MAX_LENGTH = 128
SEQUENCES_A_TURN = 40
Source = tuple[str, DataConfig]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every variant is given: a base and the batches of a task."""

    base: str
    device: torch.device
    task: Task
    batches: Sequence[Sequence[Feature]]
    lanes: int = 1
    """Batches that belong to one step, one for each of so many runs."""

    def step_batches(self, number: int) -> Sequence[Sequence[Feature]]:
        """Return the batches of a step, one for each lane."""
        return self.batches[number * self.lanes : (number + 1) * self.lanes]

    def first(self, steps: int) -> Work:
        """Return the work of the first steps only."""
        return dataclasses.replace(self, batches=self.batches[: steps * self.lanes])

    def tokens(self, number: int) -> int:
        """Return the real (not padding) tokens of a step."""
        return sum(len(feature) for batch in self.step_batches(number) for feature in batch)


@dataclass(frozen=True, kw_only=True)
class Table:
    """One task at one batch size and number of lanes: what is run there."""

    work: Work
    steps: int
    """In a turn; those of round r are ``r * steps`` up to ``(r + 1) * steps``."""

    @property
    def batch_size(self) -> int:
        """Sequences in a batch."""
        return len(self.work.batches[0])

    @property
    def mean_tokens(self) -> float:
        """Real tokens of a batch, on average."""
        tokens = sum(len(feature) for batch in self.work.batches for feature in batch)
        return tokens / len(self.work.batches)

    def numbers(self, turn: int) -> range:
        """Return the steps of a round."""
        return range(turn * self.steps, (turn + 1) * self.steps)


def choose_sources(
    data: str | None, tasks: Sequence[str], of_glue: Sequence[str], of_example: Sequence[str]
) -> list[Source]:
    """Return where each task's rows come from.

    Args:
        data: a GLUE directory; None: the example's sentences that come with the package.
        tasks: built-in tasks, or the example's; empty: one of the next two.
        of_glue: the default with ``data``.
        of_example: the default without.

    Raises:
        UsageError: a task that is not there, or that bench does not train.
    """
    return [_source(name, data) for name in tasks or (of_glue if data else of_example)]


def _source(name: str, data: str | None) -> Source:
    if data is not None:
        kind = builtin_task(name).task.kind
        if kind not in ("classification", "regression"):
            raise UsageError(f"task {name!r} is {kind}; bench trains classification and regression")
        return name, DataConfig(data=data, task=name, splits=("train",))
    if name not in EXAMPLE_TASKS:
        raise UsageError(
            f"task {name!r} is none of the example's ({', '.join(EXAMPLE_TASKS)}); "
            "for those of GLUE give --data with the GLUE folder"
        )
    train, _ = example_files(name)
    return name, DataConfig(data=train, text="text", label="label", dev_fraction=0.0)


def read_source(encoder: Encoder, source: Source) -> tuple[Task, list[Feature]]:
    """Return a task and some thousand of its training rows, tokenized, in a drawn order.

    Raises:
        DataError: data that cannot be read.
    """
    name, config = source
    dataset = read_dataset(config)
    length = encoder.clamp_length(MAX_LENGTH)
    # A few thousand rows have the lengths of all; QQP has 364,000.
    order = np.random.default_rng(0).permutation(len(dataset.splits["train"]))[:4000]
    examples = [dataset.splits["train"][i] for i in order]
    features = make_features(encoder.base.tokenizer, dataset.task, examples, length).items
    return dataclasses.replace(dataset.task, name=name), features


def make_table(
    base: str,
    device: torch.device,
    task: Task,
    features: Sequence[Feature],
    size: int,
    rounds: int,
    lanes: int = 1,
) -> Table:
    """Return batches of ``size`` for some 40 sequences, or one step, in every round."""
    steps = max(1, SEQUENCES_A_TURN // (size * lanes))
    batches = [
        [features[(number * size + i) % len(features)] for i in range(size)]
        for number in range(steps * lanes * (rounds + 1))
    ]
    work = Work(base=base, device=device, task=task, batches=batches, lanes=lanes)
    return Table(work=work, steps=steps)
