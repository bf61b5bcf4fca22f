"""bitfit's own training step on given batches: the only place here that knows :class:`Trainer`."""

from __future__ import annotations

from collections.abc import Sequence

from bitfit.batches import Batch, Features, pack
from bitfit.bench.runs import MAX_GRAD_NORM, Run
from bitfit.bench.work import Work
from bitfit.encoder import Encoder, open_encoder
from bitfit.training.lane import Lane, Split
from bitfit.training.methods import make_method
from bitfit.training.settings import TrainConfig, rates_to_try
from bitfit.training.train import Trainer


def our_step(work: Work, *, dtype: str) -> Run:
    """Return the step of ``work.lanes`` runs side by side, on an encoder of its own."""
    return side_by_side(work, open_encoder(work.base, dtype, str(work.device)))


def side_by_side(work: Work, encoder: Encoder, method: str = "bitfit") -> Run:
    """Return a step in which all lanes share their forward passes."""
    return _run(work, encoder, [_make_lanes(work, encoder, method)])


def one_after_another(work: Work, encoder: Encoder) -> Run:
    """Return the same runs, each with a trainer to itself: one step of each in turn."""
    return _run(work, encoder, [[lane] for lane in _make_lanes(work, encoder)])


class _LaneOnGivenBatches(Lane):
    """A lane that takes its batch of the step that is wanted."""

    place: int
    work: Work
    number = 0

    def next_batch(self) -> Batch:
        return pack(self.work.step_batches(self.number)[self.place])


def _make_lanes(work: Work, encoder: Encoder, method: str = "bitfit") -> list[_LaneOnGivenBatches]:
    """Return lanes that differ in batches, seed (so in dropout and head) and learning rate."""
    rates = rates_to_try(method)
    items = [feature for batch in work.batches for feature in batch]
    split = Split([], Features(items, len(items), 0))
    lanes = []
    for place in range(work.lanes):
        config = TrainConfig(
            recipe="paper", method=method, batch_size=len(work.batches[0]), schedule="constant",
            warmup_ratio=0.0, max_grad_norm=MAX_GRAD_NORM, seed=place,
            learning_rate=rates[-1 - place % len(rates)],
        )  # fmt: skip
        lane = _LaneOnGivenBatches(encoder=encoder, task=work.task, config=config, train=split)
        lane.place, lane.work = place, work
        lanes.append(lane)
    return lanes


def _run(work: Work, encoder: Encoder, groups: Sequence[Sequence[_LaneOnGivenBatches]]) -> Run:
    """Return the step that takes one step of each group, its lanes side by side."""
    trainers = []
    for group in groups:
        method = make_method(encoder, group, len(group))
        method.install()
        trainers.append(Trainer(encoder=encoder, method=method, lanes=group))
    steps = [trainer.steps_only() for trainer in trainers]

    def step(wanted: int) -> None:
        for group in groups:
            for lane in group:
                lane.number = wanted
        done = sum(next(each).tokens for each in steps)
        assert done == work.tokens(wanted)

    optimizers = [trainer.optimizer for trainer in trainers]
    pooler = [] if encoder.pooler is None else [encoder.pooler]
    return Run(
        step=step, trained=[t for trainer in trainers for t in trainer.method.tensors],
        optimizer_state=lambda: [t for o in optimizers for t in (*o.means, *o.squares)],
        modules=[encoder.model, *pooler],
    )  # fmt: skip
