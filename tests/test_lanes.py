"""Runs side by side: each ends as it does alone (promise 4 of the design)."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import plain_kernels
import pytest
import torch
from test_encoder import make_batch
from test_training import make_lane
from torch.utils._python_dispatch import TorchDispatchMode

from bitfit.batches import make_features
from bitfit.dropout import DropoutBits, StepDropout
from bitfit.errors import BitfitError, TrainingDiverged, UsageError
from bitfit.inference import TaskHead, compute_logits
from bitfit.leaves import RowIndex
from bitfit.tasks import Task, TextExample, TokenExample
from bitfit.training.lane import Lane, Share, Split
from bitfit.training.lane_count import (
    activation_bytes,
    choose_lane_count,
    free_memory,
    measure_lane_counts,
    training_speed,
)
from bitfit.training.methods import make_method
from bitfit.training.settings import TrainConfig
from bitfit.training.train import EpochDone, LaneDropped, StepDone, Trainer

# Fifty steps of 24 rows, 8 at a time: 17 epochs of three.
LONG = {"epochs": 17, "patience": 0, "keep": "last", "adam_eps": 1e-6}
VARIETY = [
    {"seed": 0, "learning_rate": 1e-3},
    {"seed": 1, "learning_rate": 1e-2, "schedule": "cosine"},
    {"seed": 2, "learning_rate": 4e-3, "terms": "query,b_m2", "max_grad_norm": 0.1},
    {"seed": 3, "learning_rate": 7e-3, "method": "frozen", "schedule": "constant"},
    {"seed": 4, "learning_rate": 2e-3, "pooling": "pooler", "batch_size": 5},
]


@pytest.fixture(params=["cpu", "gpu"])
def form(request, monkeypatch):
    """The form of a step: that of a CPU, and that of a GPU with its kernels in plain torch."""
    if request.param == "gpu":
        monkeypatch.setitem(sys.modules, "bitfit.kernels", plain_kernels)
        monkeypatch.setattr("bitfit.training.train.has_kernels", lambda device: True)
        monkeypatch.setattr(RowIndex, "sum_by_row", RowIndex._sum_segments)
    return request.param


def train(encoder, lanes, slots, **options):
    trainer = Trainer(
        encoder=encoder, method=make_method(encoder, lanes, slots), lanes=lanes, **options
    )
    return trainer, list(trainer.run())


def logits_of(encoder, trainer, lane):
    trainer.keep(lane)
    row, weights = trainer.method.trained(0, lane.layout, lane.head)
    heads = {0: TaskHead(lane.head, weights)}
    found = compute_logits(encoder, lane.dev.features.items, row[None], lane.layout, heads)
    return torch.tensor([v.tolist() for v in found])


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "albert", "electra"])
def test_a_lane_ends_as_the_run_alone_with_dropout_on(family, open_tiny, form):
    """Promise 4: rate, seed, data, terms, schedule, clipping, pooling and batch size differ.

    Fifty steps for BERT; the others differ in what their layers look like, and take six.
    """
    encoder = open_tiny(family)
    assert encoder.packed
    epochs = {} if family == "bert" else {"epochs": 2}
    options = [LONG | epochs | v for v in VARIETY if encoder.pooler or "pooling" not in v]
    lanes = [make_lane(encoder, train_seed=i, **o) for i, o in enumerate(options)]
    trainer, _ = train(encoder, lanes, len(lanes))
    for i, (lane, o) in enumerate(zip(lanes, options, strict=True)):
        alone = make_lane(encoder, train_seed=i, **o)
        single, _ = train(encoder, [alone], 1)
        torch.testing.assert_close(
            logits_of(encoder, trainer, lane), logits_of(encoder, single, alone),
            atol=1e-5, rtol=0, msg=lambda m, i=i: f"lane {i}: {m}",
        )  # fmt: skip
        assert lane.progress.step == alone.progress.step >= (50 if family == "bert" else 6)
        assert lane.progress.tokens == alone.progress.tokens
    rows = {tuple(lane.best[0].tolist()) for lane in lanes}
    assert len(rows) == len(lanes)


@pytest.mark.parametrize("slots", [2, 3])
def test_ended_lanes_make_room_for_the_next_and_nothing_of_them_stays(slots, open_tiny, form):
    encoder = open_tiny()

    def queue():
        return [
            make_lane(encoder, train_seed=i, **(LONG | {"epochs": e, "seed": i}))
            for i, e in enumerate((2, 5, 1, 3, 4))
        ]

    together, alone = queue(), queue()
    trainer, events = train(encoder, together, slots)
    most = max(len(e.losses) for e in events if isinstance(e, StepDone))
    assert most == slots
    for lane, single in zip(together, alone, strict=True):
        other, _ = train(encoder, [single], 1)
        torch.testing.assert_close(
            logits_of(encoder, trainer, lane), logits_of(encoder, other, single), atol=1e-5, rtol=0
        )
        assert [h["epoch"] for h in lane.progress.history] == [
            h["epoch"] for h in single.progress.history
        ]


def test_lanes_of_different_tasks_and_heads_train_together(open_tiny, form):
    encoder = open_tiny()
    words = "the film was very bad".split()
    tags = Task(name="tags", kind="tokens", labels=("x", "y", "z"))
    stars = Task(name="stars", kind="regression", is_pair=True)
    tagged = [TokenExample(tuple(words[: n + 2]), labels=tuple(range(n + 2))) for n in (1, 0, 1)]
    tagged = [TokenExample(e.words, labels=tuple(i % 3 for i in e.labels)) for e in tagged]
    rated = [TextExample("a good bike", "a red bike", label=float(i)) for i in range(4)]

    def queue():
        lanes = [make_lane(encoder, **(LONG | {"epochs": 6}))]
        for task, examples in ((tags, tagged), (stars, rated)):
            config = TrainConfig(**(LONG | {"epochs": 6, "max_length": 16, "seed": 5}))
            items = make_features(encoder.base.tokenizer, task, examples, 16)
            split = Split(examples, items)
            lanes.append(Lane(encoder=encoder, task=task, config=config, train=split))
        return lanes

    together, alone = queue(), queue()
    train(encoder, together, 3)
    for lane, single in zip(together, alone, strict=True):
        other, _ = train(encoder, [single], 1)
        found, expected = lane.best[0], single.best[0]
        n = other.method.layout.n
        torch.testing.assert_close(found[:n], expected[:n], atol=1e-4, rtol=0)
        size = lane.head.size
        torch.testing.assert_close(found[n : n + size], expected[n : n + size], atol=1e-4, rtol=0)
        assert not found[n + size :].any()


def test_a_diverged_lane_is_dropped_and_its_neighbours_never_see_it(open_tiny, form):
    encoder = open_tiny()
    options = LONG | {"epochs": 4}
    lanes = [make_lane(encoder, label=f"run {i}", seed=i, **options) for i in range(3)]
    method = make_method(encoder, lanes, 3)
    trainer = Trainer(encoder=encoder, method=method, lanes=lanes)
    dropped = []
    for event in trainer.run():
        if isinstance(event, StepDone) and lanes[0].progress.step == 2 and not dropped:
            with torch.no_grad():
                method.flat[0] = math.nan
        if isinstance(event, LaneDropped):
            dropped.append(event)
    assert [e.lane for e in dropped] == [lanes[0]]
    assert "loss became nan at step 3" in dropped[0].reason
    assert not lanes[0].progress.history
    for i in (1, 2):
        single = make_lane(encoder, seed=i, **options)
        other, _ = train(encoder, [single], 1)
        torch.testing.assert_close(
            logits_of(encoder, trainer, lanes[i]), logits_of(encoder, other, single),
            atol=1e-5, rtol=0,
        )  # fmt: skip


def test_when_every_lane_diverges_it_is_an_error(open_tiny):
    encoder = open_tiny()
    lanes = [make_lane(encoder, seed=i) for i in range(2)]
    method = make_method(encoder, lanes, 2)
    run = Trainer(encoder=encoder, method=method, lanes=lanes).run()
    next(run)
    with torch.no_grad():
        method.flat[:] = math.nan
    with pytest.raises(TrainingDiverged, match="smaller"):
        list(run)


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_group_of_lanes_resumes_at_any_step_to_the_same_numbers(stop, open_tiny, tmp_path):
    encoder = open_tiny()

    def make():
        lanes = [
            make_lane(encoder, train_seed=i, seed=i, epochs=e, keep=keep, patience=0)
            for i, (e, keep) in enumerate(((1, "best"), (3, "last"), (2, "best"), (1, "last")))
        ]
        return Trainer(
            encoder=encoder, method=make_method(encoder, lanes, 2), lanes=lanes,
            checkpoint=tmp_path / "c",
        )  # fmt: skip

    whole = make()
    list(whole.run())
    (tmp_path / "c").unlink()
    first, steps = make(), 0
    for event in first.run():
        steps += isinstance(event, StepDone)
        if steps == stop:
            first.save()
            break
    second = make()
    assert second.resume()
    list(second.run())
    for found, expected in zip(second.lanes, whole.lanes, strict=True):
        assert torch.equal(found.best[0], expected.best[0])
        assert found.progress.history == expected.progress.history
        assert found.progress.tokens == expected.progress.tokens


def test_epochs_that_end_together_are_saved_once(open_tiny, tmp_path, monkeypatch):
    encoder = open_tiny()
    lanes = [make_lane(encoder, train_seed=i, seed=i, epochs=2, patience=0) for i in range(3)]
    trainer = Trainer(
        encoder=encoder, method=make_method(encoder, lanes, 3), lanes=lanes,
        checkpoint=tmp_path / "c",
    )  # fmt: skip
    events = []
    monkeypatch.setattr(trainer, "save", lambda: events.append("saved"))
    for event in trainer.run():
        if isinstance(event, EpochDone):
            events.append(event.epoch)
    assert events == [1, 1, 1, "saved", 2, 2, 2, "saved"]


def test_a_checkpoint_of_another_number_of_lanes_is_refused(open_tiny, tmp_path):
    encoder = open_tiny()

    def make(slots):
        lanes = [make_lane(encoder, seed=i) for i in range(3)]
        method = make_method(encoder, lanes, slots)
        return Trainer(encoder=encoder, method=method, lanes=lanes, checkpoint=tmp_path / "c")

    first = make(3)
    next(first.run())
    first.save()
    with pytest.raises(BitfitError, match="lanes differ"):
        make(2).resume()


def test_what_cannot_share_a_pass_is_refused_and_runs_one_by_one(open_tiny):
    padded = open_tiny("mpnet")
    lanes = [make_lane(padded, seed=i) for i in range(3)]
    with pytest.raises(UsageError, match="does not run packed"):
        make_method(padded, lanes, 2)
    assert choose_lane_count(padded, lanes) == 1
    train(padded, lanes, 1)
    assert all(lane.finished for lane in lanes)
    encoder = open_tiny()
    full = [make_lane(encoder, method="full", learning_rate=r) for r in (1e-3, 1e-4)]
    with pytest.raises(UsageError, match="one run at a time"):
        make_method(encoder, full, 2)
    assert choose_lane_count(encoder, full) == 1


def test_full_runs_one_after_the_other_from_the_same_start(open_tiny):
    encoder = open_tiny()

    def lanes(*rates):
        return [make_lane(encoder, method="full", learning_rate=rate) for rate in rates]

    both, second = lanes(1e-3, 1e-4), lanes(1e-4)
    for queue in (both, second):
        method = make_method(encoder, queue)
        method.install()
        list(Trainer(encoder=encoder, method=method, lanes=queue).run())
        method.uninstall()
    pairs = zip(both[1].best, second[0].best, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_number_of_lanes_is_measured_without_touching_the_runs(open_tiny):
    encoder = open_tiny()
    lanes = [make_lane(encoder, seed=i) for i in range(5)]
    counts = [found.lanes for found in measure_lane_counts(encoder, lanes)]
    assert counts == [1, 2, 4]
    assert choose_lane_count(encoder, lanes) in (1, 2, 4)
    assert all(lane.progress.step == 0 and not lane.best for lane in lanes)


def test_memory_bounds_the_number_of_lanes(open_tiny, monkeypatch):
    encoder = open_tiny()
    lanes = [make_lane(encoder, seed=i) for i in range(4)]
    monkeypatch.setattr("bitfit.training.lane_count.free_memory", lambda device: 0)
    assert not list(measure_lane_counts(encoder, lanes))
    assert choose_lane_count(encoder, lanes) == 1


@pytest.mark.parametrize("family", ["bert", "distilbert", "albert", "electra", "mpnet"])
def test_low_memory_gives_the_same_numbers_and_keeps_less(family, open_tiny, form):
    """Layers are computed again with the rows and the dropout masks they had."""
    found, kept = [], []
    for low_memory in (False, True):
        encoder = open_tiny(family)
        encoder.low_memory = low_memory
        lanes = [make_lane(encoder, seed=i, epochs=1) for i in range(2)]
        train(encoder, lanes, 2 if encoder.packed else 1)
        found.append([lane.best[0] for lane in lanes])
        layout, batch = lanes[0].layout, lanes[0].next_batch()
        row, sizes = torch.zeros(1, layout.n, requires_grad=True), []
        dropout = StepDropout([(DropoutBits(0, 1, encoder.device), batch)])
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            encoder.encode(batch, layout.split(row), None, dropout)
        kept.append(sum(sizes))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert kept[1] < 0.3 * kept[0]


@pytest.mark.parametrize(("most", "passes"), [(150, [4]), (100, [2, 1, 1]), (1, [1, 1, 1, 1])])
def test_a_pass_of_lanes_is_bounded_in_tokens(most, passes, open_tiny, monkeypatch):
    """Two lanes of 3 x 4 tokens, one of 3 x 30 and one of 3 x 4."""
    monkeypatch.setattr("bitfit.training.train.pass_tokens", lambda device: most)
    encoder = open_tiny()
    lanes = [make_lane(encoder)]
    trainer = Trainer(encoder=encoder, method=make_method(encoder, lanes, 1), lanes=lanes)
    shares = [Share(make_batch([n] * 3), 1.0) for n in (4, 4, 30, 4)]
    assert [part.stop - part.start for part in trainer._passes(shares)] == passes


def test_without_kernels_a_gpu_draws_for_batches_that_are_there(open_tiny, monkeypatch):
    """Attention is laid out where the batch is; the batches of lanes are made on the CPU."""
    monkeypatch.setattr("bitfit.training.train.has_kernels", lambda device: False)
    encoder = open_tiny()
    lanes = [make_lane(encoder, seed=i) for i in range(2)]
    trainer = Trainer(encoder=encoder, method=make_method(encoder, lanes, 2), lanes=lanes)
    encoder.device = torch.device("meta")
    batch = lanes[0].next_batch()
    masks = trainer._masks([(DropoutBits(0, 1, encoder.device), batch)] * 2)
    assert [own.lengths.device.type for own in masks.batches] == ["meta", "meta"]
    parts = masks.attention(batch.to(encoder.device), 2, 0.1)
    assert len(parts) == 2  # one by one


class Counted(TorchDispatchMode):
    """Counts operations that a device would have to launch."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_a_step_of_many_lanes_launches_no_more_than_one_of_few(open_tiny, monkeypatch):
    """In the form of a GPU: each kernel is one call, for any number of lanes."""
    kernels = SimpleNamespace(
        PackedAttention=SimpleNamespace(apply=lambda q, k, v, where, scaling: q + k + v),
        Dropped=SimpleNamespace(apply=lambda x, *rest: x * 1),
        drop=lambda x, *rest: x,
    )
    monkeypatch.setitem(sys.modules, "bitfit.kernels", kernels)
    monkeypatch.setattr("bitfit.training.train.has_kernels", lambda device: True)
    monkeypatch.setattr(RowIndex, "sum_by_row", RowIndex._sum_segments)
    encoder, found = open_tiny(), []
    for number in (2, 12):
        lanes = [make_lane(encoder, seed=i) for i in range(number)]
        method = make_method(encoder, lanes, number)
        steps = Trainer(encoder=encoder, method=method, lanes=lanes).steps_only()
        next(steps)
        with Counted() as counted:
            next(steps)
        found.append(counted.count)
    few, many = found
    assert many < 1.1 * few


def test_lanes_that_train_the_pooler_never_wait_for_the_device(open_tiny, monkeypatch):
    """Stretches of rows that are looked for on a GPU wait for it."""

    def fail(*args, **options):
        raise AssertionError("looked for on the device")

    encoder = open_tiny()
    lanes = [make_lane(encoder, seed=i, terms="all,pooler", pooling="pooler") for i in range(2)]
    trainer = Trainer(encoder=encoder, method=make_method(encoder, lanes, 2), lanes=lanes)
    steps = trainer.steps_only()
    monkeypatch.setattr(torch, "unique_consecutive", fail)
    assert len(next(steps).losses) == 2


def test_a_trial_of_lanes_leaves_no_loss_with_them(open_tiny):
    encoder = open_tiny()
    lanes = [make_lane(encoder, seed=i) for i in range(2)]
    lanes[0].step_taken(torch.tensor(1.5), lanes[0].next_batch(), 0.0)
    training_speed(encoder, lanes)
    lanes[0].read_losses()
    assert lanes[0].progress.loss_sum == 1.5


def test_lanes_that_pass_one_by_one_need_the_memory_of_one_pass(open_tiny, monkeypatch):
    encoder = open_tiny()
    lanes = [make_lane(encoder, seed=i) for i in range(4)]
    one, four = (activation_bytes(encoder, lanes[:n]) for n in (1, 4))
    assert four == 4 * one
    monkeypatch.setattr("bitfit.training.lane_count.pass_tokens", lambda device: 1)
    assert activation_bytes(encoder, lanes) == one


def test_memory_that_holds_copies_of_files_counts_as_free():
    """MemFree alone would have a machine that has read much train lane after lane."""
    if not Path("/proc/meminfo").exists():
        pytest.skip("this system does not say what is left of its memory")
    known = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(known["MemAvailable"].split()[0]) * 1024
    assert free_memory(torch.device("cpu")) == pytest.approx(available, rel=0.2)
