import errno
import json
import math
import os
import shutil
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import bitfit
from bitfit import leaves
from bitfit.base import encoder_tensors, load_base
from bitfit.batches import make_features
from bitfit.calibration import expected_calibration_error, fit_temperature, probabilities
from bitfit.cli.scoring import trained_dtype
from bitfit.errors import (
    BitfitError,
    CheckpointRefused,
    DataError,
    NoBiases,
    NotWritten,
    TrainingDiverged,
    TrainingInterrupted,
    UsageError,
)
from bitfit.heads import make_head
from bitfit.tasks import Task, TextExample
from bitfit.training import methods
from bitfit.training.adamw import AdamW, learning_rate_at, step_size
from bitfit.training.finetune import RunStarted
from bitfit.training.lane import Lane, Split, choose_layout
from bitfit.training.methods import RandomMethod, make_method, random_places
from bitfit.training.outputs import calibrate
from bitfit.training.settings import RECIPES, TrainConfig, rates_to_try, resolve_config
from bitfit.training.train import (
    EpochDone,
    StepDone,
    Trainer,
    score_logits,
)

MOOD = Task(name="mood", kind="classification", labels=("bad", "good"))


def mood_split(encoder, count=24, seed=0):
    random = np.random.default_rng(seed)
    examples = []
    for i in range(count):
        words = random.choice("the a film bike was very".split(), random.integers(2, 7)).tolist()
        words.insert(1, ("bad", "good")[i % 2])
        examples.append(TextExample(" ".join(words), label=i % 2))
    return Split(examples, make_features(encoder.base.tokenizer, MOOD, examples, 16))


def make_lane(encoder, label="", train_seed=0, **options):
    config = TrainConfig(**({"epochs": 2, "learning_rate": 1e-2, "max_length": 16} | options))
    return Lane(
        encoder=encoder, task=MOOD, config=config, train=mood_split(encoder, seed=train_seed),
        dev=mood_split(encoder, 10, 1), label=label,
    )  # fmt: skip


def make_trainer(encoder, checkpoint=None, **options):
    lane = make_lane(encoder, **options)
    method = make_method(encoder, [lane])
    method.install()
    return Trainer(encoder=encoder, method=method, lanes=[lane], checkpoint=checkpoint)


def finish(trainer):
    """Run to the end; the lane, its kept numbers in place."""
    list(trainer.run())
    (lane,) = trainer.lanes
    trainer.keep(lane)
    return lane


def trained_row(trainer):
    (lane,) = trainer.lanes
    return trainer.method.trained(0, lane.layout, lane.head)[0]


def with_scores(trainer, *scores):
    """Let the epochs of a trainer score as given."""
    scores = iter(scores)
    trainer.evaluate = lambda lane, split, slot: ({"accuracy": next(scores)}, [])
    return trainer


@pytest.mark.parametrize("method", ["bitfit", "frozen"])
@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_every_tensor_of_the_base_stays_bit_identical(family, method, checkpoint, open_tiny):
    """Promise 1, for packed and padded batches."""
    encoder = open_tiny(family)
    trainer = make_trainer(encoder, method=method)
    finish(trainer)
    fresh = load_base(checkpoint(family))
    after = encoder_tensors(encoder.model, encoder.pooler)
    for name, tensor in encoder_tensors(fresh.model, fresh.pooler).items():
        assert torch.equal(after[name], tensor), name
    row = trained_row(trainer)
    assert (row.abs().sum() > 0) == (method == "bitfit")


def test_only_the_selected_biases_get_a_row(open_tiny):
    encoder = open_tiny()
    trainer = make_trainer(encoder, terms="query@1,b_m2")
    assert [s.label for s in trainer.method.layout.sites] == [
        "query@1", "intermediate@0", "intermediate@1"
    ]  # fmt: skip
    assert trainer.method.encoder_count(trainer.lanes[0].layout) == 32 + 2 * 64


def test_all_leaves_the_inert_key_out_but_the_paper_trains_it(open_tiny):
    encoder = open_tiny()
    terms = {s.term for s in make_trainer(encoder).method.layout.sites}
    assert terms == set(bitfit.terms.EIGHT_TERMS) - {"key"}
    paper = {s.term for s in make_trainer(encoder, recipe="paper").method.layout.sites}
    assert paper == set(bitfit.terms.EIGHT_TERMS)
    named = {s.term for s in make_trainer(encoder, terms="key").method.layout.sites}
    assert named == {"key"}
    deberta = {s.term for s in make_trainer(open_tiny("deberta-v2")).method.layout.sites}
    assert "key" in deberta


def test_a_trained_key_bias_stays_put_with_the_papers_epsilon(open_tiny):
    """Its gradient is rounding noise; eps 1e-6 before correction keeps Adam from blowing it up."""
    trainer = make_trainer(open_tiny(), recipe="paper", epochs=10)
    finish(trainer)
    row = trained_row(trainer)
    change = {site.term: 0.0 for site in trainer.method.layout.sites}
    for site, part in zip(
        trainer.method.layout.sites,
        torch.split(row, trainer.method.layout.lengths),
        strict=True,
    ):
        change[site.term] += part.abs().mean().item()
    assert change["key"] < 0.02 * change["query"]


def test_the_pooler_bias_is_trained_where_the_head_reads_it_and_refused_where_not(open_tiny):
    encoder = open_tiny()
    with_pooler = make_trainer(encoder, terms="all,pooler", learning_rate=1e-2)
    finish(with_pooler)
    row = trained_row(with_pooler)
    assert with_pooler.method.layout.sites[-1].term == "pooler"
    assert row[-32:].abs().sum() > 0
    with pytest.raises(UsageError, match="never uses it"):
        make_trainer(encoder, terms="all,pooler", pooling="mean")
    released = make_trainer(encoder, terms="released:query", pooling="mean")
    assert {s.term for s in released.method.layout.sites} == {"query"}


def test_a_base_without_biases_is_an_error_for_bitfit_and_fine_frozen(open_tiny):
    encoder = open_tiny("modernbert")
    with pytest.raises(NoBiases, match="0 biases"):
        make_trainer(encoder)
    assert make_trainer(encoder, method="frozen").lanes[0].layout.n == 0


def test_the_optimizer_is_that_of_the_released_code():
    """transformers 4.2's AdamW, written out: eps is added before bias correction."""
    torch.manual_seed(0)
    tensor = torch.randn(5, requires_grad=True)
    p, m, v = tensor.detach().double(), torch.zeros(5).double(), torch.zeros(5).double()
    optimizer = AdamW([tensor])
    for step in range(1, 8):
        grad = torch.randn(5) * 1e-4
        tensor.grad = grad.clone()
        optimizer.step([step_size(1e-2, step)], [1e-6])
        m = 0.9 * m + 0.1 * grad
        v = 0.999 * v + 0.001 * grad.double() ** 2
        size = 1e-2 * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        p = p - size * m / (v.sqrt() + 1e-6)
    torch.testing.assert_close(tensor.detach().double(), p, atol=1e-7, rtol=1e-5)


def test_the_optimizer_with_a_rescaled_epsilon_is_torchs():
    torch.manual_seed(0)
    mine = torch.randn(7, requires_grad=True)
    theirs = mine.detach().clone().requires_grad_(True)
    ours, torchs = (
        AdamW([mine]),
        torch.optim.AdamW([theirs], 1e-2, eps=0.0, weight_decay=0),
    )
    for step in range(1, 6):
        grad = torch.randn(7)
        mine.grad, theirs.grad = grad.clone(), grad.clone()
        ours.step([step_size(1e-2, step)], [0.0])
        torchs.step()
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["bitfit", "full"])
def test_clipping_is_torchs_over_encoder_and_head_together(name, open_tiny):
    method = make_trainer(open_tiny(), method=name).method
    for tensor in method.tensors:
        tensor.grad = torch.randn_like(tensor)
    expected = [t.grad.clone().requires_grad_(True) for t in method.tensors]
    for e in expected:
        e.grad = e.detach().clone()
    torch.nn.utils.clip_grad_norm_(expected, 1.0)
    method.clip([0.0])
    assert torch.equal(method.tensors[0].grad, expected[0].detach())
    method.clip([1.0])
    for t, e in zip(method.tensors, expected, strict=True):
        torch.testing.assert_close(t.grad, e.grad, atol=1e-6, rtol=1e-4)
    method.uninstall()


def test_schedules_rise_and_fall_as_named():
    def rates(schedule, warmup):
        config = TrainConfig(schedule=schedule, warmup_ratio=warmup, learning_rate=1.0)
        return [learning_rate_at(config, step, 10) for step in range(1, 11)]

    assert rates("constant", 0.0) == [1.0] * 10
    assert rates("constant", 0.2)[:3] == [0.5, 1.0, 1.0]
    assert rates("linear", 0.0) == pytest.approx([1 - i / 10 for i in range(10)])
    cosine = rates("cosine", 0.2)
    assert cosine[:3] == [0.5, 1.0, 1.0]
    assert cosine == sorted(cosine[:2]) + sorted(cosine[2:], reverse=True)
    assert 0 < cosine[-1] < 0.1


def test_the_loss_curve_is_pinned(open_tiny):
    """One curve of the tiny model; a change here changes results and belongs in the changelog."""
    trainer = make_trainer(open_tiny(), epochs=1, seed=3)
    losses = [float(event.loss) for event in trainer.run() if isinstance(event, StepDone)]
    assert losses == pytest.approx(PINNED_LOSSES, abs=2e-4)


PINNED_LOSSES = [0.69142, 0.74841, 0.70226]


def test_training_learns(open_tiny):
    trainer = make_trainer(open_tiny(), epochs=20, learning_rate=2e-2, patience=0)
    lane = finish(trainer)
    assert lane.progress.best_score >= 0.9
    scores, _ = trainer.evaluate(lane, lane.train)
    assert scores["accuracy"] > 0.9


def test_two_runs_of_one_seed_are_bit_identical_and_two_seeds_are_not(open_tiny):
    def row(seed):
        trainer = make_trainer(open_tiny(), seed=seed)
        return finish(trainer).best[0]

    assert torch.equal(row(1), row(1))
    assert not torch.equal(row(1), row(2))


def test_the_best_epoch_is_kept_and_the_last_on_request(open_tiny):
    kept = {}
    for keep in ("best", "last"):
        trainer = with_scores(
            make_trainer(open_tiny(), keep=keep, epochs=3, patience=0), 0.5, 0.9, 0.7
        )
        flats = []
        for event in trainer.run():
            if isinstance(event, StepDone) and event.step % 3 == 0:
                flats.append(trainer.method.flat.detach().clone())
        (lane,) = trainer.lanes
        trainer.keep(lane)
        kept[keep] = lane.kept_epoch
        assert lane.progress.best_epoch == 2
        assert torch.equal(trainer.method.flat, flats[1] if keep == "best" else flats[2])
    assert kept == {"best": 2, "last": 3}


def test_early_stopping_waits_its_patience(open_tiny):
    trainer = make_trainer(open_tiny(), epochs=9, patience=2)
    lane = finish(with_scores(trainer, 0.5, 0.9, 0.7, 0.8, 1.0))
    assert [h["epoch"] for h in lane.progress.history] == [1, 2, 3, 4]
    assert lane.progress.stopped


def test_of_equal_scores_the_later_epoch_is_kept(open_tiny):
    lane = finish(with_scores(make_trainer(open_tiny(), epochs=3), 0.9, 0.9, 0.8))
    assert lane.progress.best_epoch == 2


def test_an_undefined_score_never_wins(open_tiny):
    lane = finish(with_scores(make_trainer(open_tiny(), epochs=2), math.nan, -0.5))
    assert lane.progress.best_epoch == 2


def test_divergence_is_an_error_with_advice(open_tiny):
    trainer = make_trainer(open_tiny())
    run = trainer.run()
    next(run)
    with torch.no_grad():
        trainer.method.flat[0, 0] = math.nan
    with pytest.raises(TrainingDiverged, match="smaller"):
        list(run)


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_a_run_resumed_at_any_step_ends_in_the_same_numbers(stop, open_tiny, tmp_path):
    """Promise 6 in one process; test_resume kills processes."""
    whole = make_trainer(open_tiny())
    expected = finish(whole)
    first = make_trainer(open_tiny(), tmp_path / "c")
    for event in first.run():
        if isinstance(event, StepDone) and event.step == stop:
            first.save()
            break
    second = make_trainer(open_tiny(), tmp_path / "c")
    assert second.resume()
    assert second.steps == stop
    found = finish(second)
    assert torch.equal(second.method.flat, whole.method.flat)
    assert found.progress.history == expected.progress.history


@pytest.mark.parametrize("method", ["full", "random", "released:row_col"])
def test_a_run_of_the_model_itself_is_resumed_in_the_same_numbers(method, open_tiny, tmp_path):
    def trained(trainer):
        finish(trainer)
        tensors = encoder_tensors(trainer.encoder.model, trainer.encoder.pooler)
        return {name: tensor.clone() for name, tensor in tensors.items()}

    whole = trained(make_trainer(open_tiny(), method=method))
    first = make_trainer(open_tiny(), tmp_path / "c", method=method)
    steps = (e for e in first.run() if isinstance(e, StepDone))
    next(steps), next(steps)
    first.save()
    second = make_trainer(open_tiny(), tmp_path / "c", method=method)
    assert second.resume()
    assert second.steps == 2
    found = trained(second)
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def test_the_optimizer_moves_a_row_among_others_as_it_moves_it_alone():
    torch.manual_seed(0)
    rows = torch.randn(3, 9)
    alone = [row.clone().requires_grad_(True) for row in rows]
    together = rows.clone().requires_grad_(True)
    optimizers = [AdamW([row]) for row in alone]
    common = AdamW([together])
    for step in range(1, 6):
        sizes = [step_size(rate, step) for rate in (1e-4, 1e-3, 1e-2)]
        together.grad = torch.randn(3, 9) * 1e-3
        for optimizer, row, grad, size in zip(
            optimizers, alone, together.grad.clone(), sizes, strict=True
        ):
            row.grad = grad
            optimizer.step([size], [1e-6])
        common.step(sizes, [1e-6] * 3)
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-7, rtol=1e-6)


def test_an_epoch_is_told_with_its_logits_and_saved_only_after_that(open_tiny, tmp_path):
    """A consumer that is killed while it writes an epoch down sees it again."""

    def told(trainer):
        return [e for e in trainer.run() if isinstance(e, EpochDone)]

    whole = told(make_trainer(open_tiny()))
    for event in whole:
        assert event.scores == score_logits(MOOD, event.lane.dev, event.logits)
    first = make_trainer(open_tiny(), tmp_path / "c")
    epochs = (e for e in first.run() if isinstance(e, EpochDone))
    assert [next(epochs).epoch, next(epochs).epoch] == [1, 2]  # killed in the second
    second = make_trainer(open_tiny(), tmp_path / "c")
    assert second.resume()
    (again,) = told(second)
    assert (again.epoch, again.scores) == (2, whole[1].scores)
    assert np.array_equal(again.logits, whole[1].logits)
    alone = make_trainer(open_tiny())
    alone.lanes[0].dev = None
    assert [list(e.logits) for e in told(alone)] == [[], []]


def test_the_time_between_checkpoints_grows_with_what_one_takes(open_tiny, tmp_path, monkeypatch):
    now, takes, writes = 0.0, 10.0, 0

    def write(path):
        nonlocal now, writes
        now, writes = now + takes, writes + 1

    clock = types.SimpleNamespace(monotonic=lambda: now, perf_counter=time.perf_counter)
    monkeypatch.setattr("bitfit.training.train.time", clock)
    trainer = make_trainer(open_tiny(), tmp_path / "c", batch_size=1)
    monkeypatch.setattr(trainer, "_write", write)
    steps = trainer.run()

    def writes_at(moment):
        nonlocal now
        now = moment
        next(steps)
        return writes

    assert [writes_at(29), writes_at(31)] == [0, 1]  # it ends at 41: not again before 241
    takes = 0.1
    assert [writes_at(240), writes_at(242)] == [1, 2]
    assert [writes_at(272), writes_at(273)] == [2, 3]


def test_a_checkpoint_of_another_run_is_refused_by_what_differs(open_tiny, tmp_path):
    trainer = make_trainer(open_tiny(), tmp_path / "c")
    next(trainer.run())
    trainer.save()
    with pytest.raises(CheckpointRefused, match=r"another run: learning_rate, seed differ"):
        make_trainer(open_tiny(), tmp_path / "c", seed=5, learning_rate=1e-3).resume()
    (tmp_path / "c").write_bytes(b"\x00" * 50)
    with pytest.raises(CheckpointRefused, match="checkpoint"):
        make_trainer(open_tiny(), tmp_path / "c").resume()


def test_a_state_of_thousands_of_epochs_is_read_back(open_tiny, tmp_path):
    """More in its header than a task file may have."""
    trainer = make_trainer(open_tiny(), tmp_path / "c")
    next(trainer.run())
    epoch = {"epoch": 1, "train_loss": 0.6908991019695233, "dev": {"accuracy": 0.5740072202166066}}
    trainer.lanes[0].progress.history = [epoch] * 20_000
    trainer.save()
    again = make_trainer(open_tiny(), tmp_path / "c")
    assert again.resume()
    assert len(again.lanes[0].progress.history) == 20_000


def test_full_trains_a_copy_and_gives_the_base_back(open_tiny, checkpoint):
    encoder = open_tiny()
    trainer = make_trainer(encoder, method="full", learning_rate=1e-3)
    list(trainer.run())
    changed = encoder_tensors(encoder.model, encoder.pooler)
    base = load_base(checkpoint())
    fresh = encoder_tensors(base.model, base.pooler)
    moved = [n for n, t in fresh.items() if not torch.equal(changed[n], t)]
    assert len(moved) > 0.9 * len(fresh)
    trainer.method.uninstall()
    after = encoder_tensors(encoder.model, encoder.pooler)
    assert all(torch.equal(after[name], tensor) for name, tensor in fresh.items())
    assert not any(p.requires_grad for p in encoder.model.parameters())


@pytest.mark.parametrize("method", ["random", "released:random", "released:row_col"])
def test_random_methods_change_only_what_was_drawn(method, open_tiny, checkpoint):
    encoder = open_tiny()
    trainer = make_trainer(encoder, method=method)
    list(trainer.run())
    assert isinstance(trainer.method, RandomMethod)
    fresh = load_base(checkpoint())
    before = encoder_tensors(fresh.model, fresh.pooler)
    after = encoder_tensors(encoder.model, encoder.pooler)
    places = random_places(encoder, trainer.lanes[0].head, trainer.lanes[0].config)
    changed = 0
    for name, tensor in before.items():
        moved = torch.nonzero((after[name] != tensor).flatten()).flatten()
        assert torch.isin(moved, places[name]).all(), name
        changed += len(moved)
    count = trainer.method.encoder_count(trainer.lanes[0].layout)
    assert 0.3 * count < changed <= count
    trainer.method.uninstall()
    given_back = encoder_tensors(encoder.model, encoder.pooler)
    assert all(torch.equal(given_back[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("family", ["bert", "mpnet", "albert", "deberta-v2"])
@pytest.mark.parametrize("method", ["random", "released:row_col"])
def test_chosen_scalars_get_the_gradients_that_full_fine_tuning_gives_them(
    method, family, low_memory, open_tiny, monkeypatch
):
    """Though no gradient of a whole matrix is made; dropout is on."""
    monkeypatch.setattr(leaves, "CHOSEN_TOKENS", 7)  # several parts
    monkeypatch.setattr(methods, "_LARGE_TABLE", 30)  # the words'

    def after_a_step(name):
        encoder = open_tiny(family)
        encoder.low_memory = low_memory
        trainer = make_trainer(encoder, method=name, max_grad_norm=0)
        monkeypatch.setattr(trainer.optimizer, "step", lambda *_: None)
        next(trainer.steps_only())
        return trainer.method

    full, chosen = after_a_step("full"), after_a_step(method)
    pieces = chosen.chosen.grad.split(chosen.counts)
    for (name, index), found in zip(chosen.places.items(), pieces, strict=True):
        whole = full.parameters[name].grad
        expected = torch.zeros_like(found) if whole is None else whole.flatten()[index]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert sum(piece.abs().sum() for piece in pieces) > 0
    assert chosen.leaves
    assert all(leaf.weight.grad is None for leaf in chosen.leaves.values())
    assert bool(chosen.tables) == (method == "random")
    assert all(table.sparse for table in chosen.tables)
    chosen.uninstall()
    assert not any(table.sparse for table in chosen.tables)
    assert all(leaf.chosen is None for leaf in chosen.leaves.values())


def test_random_draws_exactly_as_many_scalars_as_bias_tuning_trains(open_tiny):
    """The eight terms; without b_k, which changes nothing, where the recipe leaves it out."""
    encoder = open_tiny()
    head = make_head(MOOD, encoder)
    paper = random_places(encoder, head, resolve_config("paper", method="random"))
    assert sum(len(index) for index in paper.values()) == 2 * (7 * 32 + 64)
    config = resolve_config("default", method="random")
    places = random_places(encoder, head, config)
    layout = choose_layout(encoder, head, resolve_config("default"))
    assert sum(len(index) for index in places.values()) == layout.n == 2 * (6 * 32 + 64)
    # With a pooler that no head reads here: bias tuning leaves it out too.
    own = {"terms": "released:query", "pooling": "mean"}
    head = make_head(MOOD, encoder, "mean")
    places_of_query = random_places(encoder, head, resolve_config("paper", method="random", **own))
    layout = choose_layout(encoder, head, resolve_config("paper", **own))
    assert sum(len(index) for index in places_of_query.values()) == layout.n > 0
    again = random_places(encoder, make_head(MOOD, encoder), config)
    assert all(torch.equal(places[n], again[n]) for n in places)
    other = random_places(encoder, make_head(MOOD, encoder), config.replace(seed=1))
    assert not all(torch.equal(places[n], other[n]) for n in places)


def test_the_released_quota_leaves_111_of_199_tensors_of_bert_base_out():
    """fidelity: 100,000 drawn per tensor with replacement gives 99,830 distinct on average."""
    from transformers import AutoModel, BertConfig

    from bitfit.training.methods import _draw_quota

    with torch.device("meta"):
        model = AutoModel.from_config(BertConfig(vocab_size=28996))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    places = _draw_quota(np.random.default_rng(0), sizes, 100_000)
    assert len(sizes) == 199
    assert sum(len(p) == 0 for p in places.values()) == 111
    assert sum(len(np.unique(p)) for p in places.values()) == pytest.approx(99_830, abs=60)


def test_recipes_are_those_of_the_paper_and_of_the_docs():
    paper = resolve_config("paper")
    assert (paper.batch_size, paper.epochs, paper.schedule, paper.warmup_ratio) == (
        8, 16, "constant", 0.0
    )  # fmt: skip
    assert (paper.adam_eps, paper.max_grad_norm, paper.max_length) == (1e-6, 1.0, 128)
    assert (paper.patience, paper.keep) == (0, "last")
    assert resolve_config("paper", epochs=3, keep=None).epochs == 3
    assert rates_to_try("bitfit") == (1e-4, 4e-4, 7e-4, 1e-3)
    assert rates_to_try("full") == (1e-5, 2e-5, 3e-5, 5e-5)
    assert set(RECIPES) == {"default", "paper"}


@pytest.mark.parametrize(
    "options",
    [{"learning_rate": 0.0}, {"learning_rate": -1}, {"epochs": 0}, {"batch_size": 0}, {"seed": -1},
     {"method": "lora"}, {"schedule": "step"}, {"keep": "all"}, {"patience": -1},
     {"warmup_ratio": 1.5}, {"class_weights": "some"}, {"max_length": 2}],
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_refused(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        TrainConfig(**options)


def test_balanced_class_weights_are_the_inverse_of_the_frequency(open_tiny):
    encoder = open_tiny()
    lane = make_lane(encoder, class_weights="balanced")
    torch.testing.assert_close(lane.class_weights, torch.tensor([1.0, 1.0]))
    rows = lane.train.features.items
    lane.train = Split([], types.SimpleNamespace(items=[rows[0], rows[1], rows[3], rows[5]]))
    torch.testing.assert_close(lane._class_weights(), torch.tensor([2.0, 2 / 3]))


# --- the whole run -------------------------------------------------------------------------------


def run(checkpoint, tickets, **options):
    defaults = {"data": tickets, "text": "body", "label": "intent", "epochs": 4,
                "learning_rate": 2e-2, "dtype": "fp32", "dev_fraction": 0.3}  # fmt: skip
    return bitfit.finetune(checkpoint(), **(defaults | options))


def test_a_csv_becomes_a_task_file(checkpoint, tickets, tmp_path):
    out = tmp_path / "sub" / "intent.bitfit.safetensors"
    outcome = run(
        checkpoint, tickets, out=out, train_score=True, epochs=25, patience=0, pooling="mean"
    )
    file = bitfit.TaskFile.load(out)
    assert file.task.labels == ("complaint", "praise")
    assert file.score == outcome.score > 0.8
    assert "train_accuracy" in file.scores
    assert file.recipe["kept_epoch"] == outcome.lane.kept_epoch
    assert file.recipe["keep"] == "best"
    assert file.recipe["learning_rate"] == 2e-2
    assert file.temperature is None  # 18 dev rows calibrate nothing
    assert len(file.probes) == 3
    assert not list(out.parent.glob("*checkpoint*"))
    report = json.loads(json.dumps(outcome.to_json(), allow_nan=False))
    for key in ("task metric score scores method terms seed learning_rate epochs train_seconds "
                "examples_per_second tokens_per_second peak_memory_bytes trainable file "
                "file_bytes").split():  # fmt: skip
        assert key in report, key
    assert report["trainable"] == {"encoder": 2 * (6 * 32 + 64), "head": 66}
    assert report["file_bytes"] == out.stat().st_size


def test_two_runs_of_one_seed_give_the_same_bytes(checkpoint, tickets, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for out in (a, b):
        run(checkpoint, tickets, out=out, epochs=2)
    assert a.read_bytes() == b.read_bytes()
    text = a.read_bytes()
    assert str(tmp_path).encode() not in text


def test_the_rate_is_searched_on_dev_and_written_down(checkpoint, tickets, tmp_path):
    out = tmp_path / "auto.bitfit.safetensors"
    outcome = run(checkpoint, tickets, out=out, learning_rate="auto", epochs=2)
    tried = outcome.file.recipe["rates_tried"]
    assert [t["learning_rate"] for t in tried] == [1e-4, 4e-4, 7e-4, 1e-3]
    best = max(tried, key=lambda t: t["score"])
    assert outcome.score == best["score"]
    assert outcome.file.recipe["learning_rate"] == best["learning_rate"]
    assert [p.name for p in tmp_path.glob("auto*")] == [out.name]


@pytest.mark.parametrize("lanes", [1, 3, 4])
def test_an_interrupted_search_resumes_to_the_same_bytes(lanes, checkpoint, tickets, tmp_path):
    options = {"learning_rate": "auto", "epochs": 1, "limit": 24, "lanes": lanes}
    run(checkpoint, tickets, out=tmp_path / "whole", **options)
    steps = 0

    def stop():
        nonlocal steps
        steps += 1
        return steps in (1, 3)

    for _ in range(2):
        with pytest.raises(TrainingInterrupted, match="--resume"):
            run(
                checkpoint,
                tickets,
                out=tmp_path / "parts",
                should_stop=stop,
                resume=True,
                **options,
            )
    run(checkpoint, tickets, out=tmp_path / "parts", resume=True, **options)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_more_lanes_than_runs_are_as_many_as_runs(checkpoint, tickets):
    outcome = run(checkpoint, tickets, epochs=1, lanes=8)
    assert outcome.file.recipe["lanes"] == 1


def test_a_family_that_runs_padded_takes_one_rate_whatever_the_lanes(checkpoint, tickets):
    outcome = bitfit.finetune(
        checkpoint("mpnet"), data=tickets, text="body", label="intent", epochs=1, lanes=4
    )
    assert outcome.file.recipe["lanes"] == 1


def test_resuming_with_other_lanes_is_refused(checkpoint, tickets, tmp_path):
    options = {"learning_rate": "auto", "epochs": 1, "limit": 24, "out": tmp_path / "task"}
    with pytest.raises(TrainingInterrupted):
        run(checkpoint, tickets, lanes=2, should_stop=lambda: True, **options)
    with pytest.raises(BitfitError, match="another run: lanes differ"):
        run(checkpoint, tickets, lanes=3, resume=True, **options)
    outcome = run(checkpoint, tickets, resume=True, **options)
    assert outcome.file.recipe["lanes"] == 2


def test_rates_without_dev_rows_are_refused_before_the_base_is_opened(tickets):
    with pytest.raises(UsageError, match="chooses on dev rows"):
        bitfit.finetune(
            "./no-such-base", data=tickets, text="body", label="intent", dev_fraction=0.0,
            learning_rate="auto",
        )  # fmt: skip


def test_a_checkpoint_that_is_not_resumed_is_kept_aside(checkpoint, tickets, tmp_path):
    out = tmp_path / "task"
    with pytest.raises(TrainingInterrupted):
        run(checkpoint, tickets, out=out, should_stop=lambda: True)
    state = (tmp_path / "task.checkpoint").read_bytes()
    events = []
    run(checkpoint, tickets, out=out, epochs=1, seed=9, on_event=events.append)
    assert (tmp_path / "task.checkpoint.old").read_bytes() == state
    begun = next(event for event in events if isinstance(event, RunStarted))
    assert begun.set_aside == tmp_path / "task.checkpoint.old"
    assert not (tmp_path / "task.checkpoint").exists()


def test_resuming_repeats_the_precision_and_threads_of_the_checkpoint(
    checkpoint, tickets, tmp_path, monkeypatch
):
    options = {"out": tmp_path / "task", "epochs": 1, "dtype": "auto"}
    with pytest.raises(TrainingInterrupted):
        run(checkpoint, tickets, should_stop=lambda: True, **options)
    # a measurement that comes out the other way on another day
    other = types.SimpleNamespace(dtype=torch.bfloat16, gflops={})
    monkeypatch.setattr("bitfit.encoder.measure_precision", lambda *a: other)
    outcome = run(checkpoint, tickets, resume=True, **options)
    assert outcome.file.recipe["dtype"] == "float32"


def test_a_file_of_the_users_is_never_overwritten(checkpoint, tickets, tmp_path):
    before = tickets.read_bytes()
    with pytest.raises(UsageError, match="would be lost"):
        run(checkpoint, tickets, out=tickets)
    assert tickets.read_bytes() == before
    for _ in range(2):  # one of ours is replaced
        run(checkpoint, tickets, out=tmp_path / "task", epochs=1)


def test_enough_dev_rows_are_calibrated(checkpoint, tmp_path):
    random = np.random.default_rng(0)
    rows = ["text,label"]
    for i in range(200):
        words = random.choice("film bike was very late nice order".split(), 4)
        label = i % 2 if random.random() < 0.8 else 1 - i % 2
        rows.append(f"{('bad', 'good')[i % 2]} {' '.join(words)},{label}")
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    outcome = bitfit.finetune(
        checkpoint(), data=path, dev_fraction=0.4, epochs=4, learning_rate=2e-2, dtype="fp32",
        pooling="mean",
    )  # fmt: skip
    assert 0.05 < outcome.file.temperature < 20
    calibration = outcome.file.calibration
    assert 0 <= calibration["ece_after"] <= 1
    assert 0 <= calibration["ece_before"] <= 1


def noisy_rows(kind, count):
    """Rows whose answers are what the first word says, but for one in five."""
    random = np.random.default_rng(0)
    rows = []
    for i in range(count):
        words = [("bad", "good")[i % 2], *random.choice("film bike was very late".split(), 3)]
        flip = random.random() < 0.2
        if kind == "tokens":
            tags = ["ADJ" if (w in ("bad", "good", "late")) != flip else "X" for w in words]
            rows.append({"words": words, "labels": tags})
        else:
            labels = (["praise"] if (i % 2 == 1) != flip else []) + ["late"] * ("late" in words)
            rows.append({"text": " ".join(words), "label": labels})
    return rows


@pytest.mark.parametrize("kind", ["multilabel", "tokens"])
def test_several_labels_and_labels_per_word_are_calibrated(kind, checkpoint, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in noisy_rows(kind, 150)), encoding="utf-8")
    options = {"epochs": 8, "learning_rate": 2e-2, "dtype": "fp32", "pooling": "mean"}
    outcome = bitfit.finetune(
        checkpoint(), data=path, dev_fraction=0.4, out=tmp_path / "task", **options
    )
    file, trainer, lane = outcome.file, outcome.trainer, outcome.lane
    assert file.task.kind == kind
    assert 0.05 < file.temperature < 20
    assert set(file.calibration) == {"ece_before", "ece_after"}
    # The temperature is the likeliest, and it is what predict divides by.
    _, logits = trainer.evaluate(lane, lane.dev)
    if kind == "tokens":
        logits, answers = np.concatenate(logits), np.concatenate(
            [e.labels for e in lane.dev.examples]
        )  # fmt: skip
    else:
        answers = np.array([[i in e.label for i in (0, 1)] for e in lane.dev.examples], int)
    assert file.temperature == fit_temperature(logits, answers)
    shares = probabilities(logits, file.temperature, multilabel=kind == "multilabel")
    assert file.calibration["ece_after"] == expected_calibration_error(shares, answers)
    model = bitfit.load(tmp_path / "task", base=checkpoint(), dtype="fp32")
    found = model.predict(lane.dev.examples)
    if kind == "tokens":
        confidences = np.concatenate([p.confidences for p in found])
        np.testing.assert_allclose(confidences, shares.max(axis=1), atol=1e-5)
    else:
        np.testing.assert_allclose([list(p.scores.values()) for p in found], shares, atol=1e-5)


def test_words_that_were_cut_calibrate_nothing(checkpoint, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = noisy_rows("tokens", 150)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    options = {"epochs": 1, "learning_rate": 1e-3, "dtype": "fp32", "max_length": 4}
    outcome = bitfit.finetune(checkpoint(), data=path, dev_fraction=0.4, **options)
    trainer, lane = outcome.trainer, outcome.lane
    _, logits = trainer.evaluate(lane, lane.dev)
    assert {len(rows) for rows in logits} == {2}
    temperature, _ = calibrate(lane.task, lane.dev, logits)
    answers = np.concatenate([e.labels[:2] for e in lane.dev.examples])
    assert temperature == fit_temperature(np.concatenate(logits), answers)


@pytest.mark.parametrize("kind", ["regression", "span"])
def test_numbers_and_spans_are_not_calibrated(kind):
    examples = [TextExample("a", label=1.0)] * 60
    task = Task(name="x", kind=kind, is_pair=kind == "span")
    assert calibrate(task, Split(examples, None), [np.ones(1)] * 60) == (None, None)


def test_full_saves_an_ordinary_checkpoint_and_leaves_the_base(checkpoint, tickets, tmp_path):
    from transformers import AutoModel

    encoder = bitfit.open_encoder(checkpoint(), "fp32")
    before = {k: v.clone() for k, v in encoder_tensors(encoder.model, encoder.pooler).items()}
    options = {"text": "body", "label": "intent", "epochs": 1, "method": "full"}
    bitfit.finetune(encoder, data=tickets, out=tmp_path / "full", **options)
    after = encoder_tensors(encoder.model, encoder.pooler)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    tuned = AutoModel.from_pretrained(tmp_path / "full").state_dict()
    assert any(not torch.equal(tuned[k], before[k]) for k in before)
    assert bitfit.open_encoder(str(tmp_path / "full")).base.pooler is not None


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"),
     Exception("No space left on device (os error 28)")],
    ids=["Python", "Rust"],
)  # fmt: skip
def test_a_full_disk_leaves_the_model_that_full_wrote_before(
    failure, checkpoint, tickets, tmp_path, monkeypatch
):
    from transformers import PreTrainedTokenizerFast

    def fill(tokenizer, folder):
        (Path(folder) / "tokenizer.json").write_text('{"half":')
        raise failure

    out = tmp_path / "full"
    options = {"out": out, "method": "full", "epochs": 1}
    run(checkpoint, tickets, **options)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fill)
    with pytest.raises(NotWritten, match="full: cannot be written: No space left on device"):
        run(checkpoint, tickets, **options, seed=1)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert (tmp_path / "full.checkpoint").exists()  # to go on from, where there is space again
    monkeypatch.undo()
    run(checkpoint, tickets, **options, seed=1, resume=True)
    assert (out / "head.safetensors").read_bytes() != before["head.safetensors"]


def test_a_folder_that_full_was_killed_in_is_written_again(
    checkpoint, tickets, tmp_path, monkeypatch
):
    replace, moved = os.replace, []

    def killed(source, target):
        if Path(source).parent.parent == out:
            moved.append(target)
            if len(moved) == 2:
                raise KeyboardInterrupt
        replace(source, target)

    out = tmp_path / "full"
    options = {"out": out, "method": "full", "epochs": 1}
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint, tickets, **options)
    assert not (out / "bitfit.json").exists()
    run(checkpoint, tickets, **options, resume=True)
    assert (out / "bitfit.json").is_file()
    assert bitfit.open_encoder(str(out)).base.pooler is not None
    assert not list(out.glob(".*"))


def test_full_keeps_what_the_base_was_made_for(checkpoint, tickets, tmp_path):
    def base_for(mode):
        path = tmp_path / mode
        shutil.copytree(checkpoint(), path)
        (path / "1_Pooling").mkdir()
        modes = {f"pooling_mode_{m}": m == mode for m in ("cls_token", "mean_tokens")}
        (path / "1_Pooling" / "config.json").write_text(json.dumps(modes), encoding="utf-8")
        return str(path)

    out = tmp_path / "full"
    options = {"data": tickets, "text": "body", "label": "intent", "epochs": 1, "method": "full"}
    for base, pooling in (
        (base_for("mean_tokens"), "mean"), (base_for("cls_token"), "cls"), (checkpoint(), "pooler"),
        (checkpoint("roberta"), "cls"),
    ):  # fmt: skip
        assert load_base(base).pooling == pooling
        bitfit.finetune(base, out=out, dtype="fp32", limit=8, **options)
        assert load_base(str(out)).pooling == pooling


def test_training_reads_no_test_split(checkpoint, tickets, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.csv").write_bytes(tickets.read_bytes())
    (folder / "dev.csv").write_bytes(tickets.read_bytes())
    (folder / "test.csv").write_text("body,intent\nthe film,unheard of\n", encoding="utf-8")
    outcome = run(checkpoint, folder, epochs=1)
    assert outcome.to_json()["rows"] == {"train": 60, "dev": 60}
    run(checkpoint, tickets, test=folder / "test.csv", epochs=1)
    with pytest.raises(DataError, match=r"test\.csv:2: label"):  # who asks for it gets it
        run(checkpoint, folder, epochs=1, splits=("train", "dev", "test"))


def test_the_seed_of_the_data_may_be_its_own(checkpoint, tickets):
    def rows(**options):
        outcome = run(checkpoint, tickets, limit=16, epochs=1, **options)
        return [list(outcome.dataset.splits[s]) for s in ("train", "dev")], outcome.file.recipe

    default, recipe = rows(seed=3)
    assert (recipe["seed"], recipe["dev_seed"]) == (3, 3)
    own, recipe = rows(seed=4, data_seed=3)
    assert own == default
    assert (recipe["seed"], recipe["dev_seed"]) == (4, 3)
    assert rows(seed=3, data_seed=4)[0] != default
    config = bitfit.DataConfig(
        data=tickets, text="body", label="intent", dev_fraction=0.3, limit=16, seed=5
    )
    outcome = bitfit.finetune(checkpoint(), data=config, data_seed=3, epochs=1, dtype="fp32")
    assert [list(outcome.dataset.splits[s]) for s in ("train", "dev")] == default
    with pytest.raises(UsageError, match="seed is -1"):
        rows(data_seed=-1)


def test_random_saves_indices_and_values(checkpoint, tickets, tmp_path):
    from safetensors.torch import load_file

    out = tmp_path / "random.safetensors"
    run(checkpoint, tickets, out=out, method="random", epochs=1)
    tensors = load_file(out)
    names = [n.removeprefix("indices.") for n in tensors if n.startswith("indices.")]
    assert names
    assert sum(tensors[f"indices.{n}"].numel() for n in names) == 2 * (6 * 32 + 64)
    with pytest.raises(BitfitError, match="not a bitfit task file"):
        bitfit.TaskFile.load(out)


def test_options_that_do_not_exist_are_refused_with_the_nearest(checkpoint, tickets, tmp_path):
    with pytest.raises(UsageError, match="Did you mean 'epochs'"):
        run(checkpoint, tickets, epoch=3)
    with pytest.raises(UsageError, match="neither a number nor 'auto'"):
        run(checkpoint, tickets, learning_rate="best")
    with pytest.raises(UsageError, match="is a directory"):
        run(checkpoint, tickets, out=tmp_path)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UsageError, match="is a file"):
        run(checkpoint, tickets, out=tmp_path / "file", method="full")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "thesis.txt").write_text("kept")
    with pytest.raises(UsageError, match="take another"):
        run(checkpoint, tickets, out=tmp_path / "sub", method="full")
    with pytest.raises(UsageError, match="cannot be written"):
        run(checkpoint, tickets, out=tmp_path / "file" / "task")
    with pytest.raises(UsageError, match="storage 'int4'"):
        run(checkpoint, tickets, storage="int4")
    with pytest.raises(UsageError, match="dtype 'fp8'"):
        run(checkpoint, tickets, dtype="fp8")


@pytest.mark.parametrize("kind", ["regression", "multilabel", "tokens", "span"])
def test_every_kind_of_task_trains_saves_and_predicts(kind, checkpoint, tmp_path):
    rows = {
        "regression": [
            {"text": f"{'good ' * (i % 5)}film", "label": i % 5 + 0.5} for i in range(20)
        ],
        "multilabel": [
            {"text": ("good film", "bad bike")[i % 2], "label": (["x", "y"], [])[i % 2]}
            for i in range(20)
        ],
        "tokens": [{"words": ["good", "film"], "labels": ["ADJ", "NOUN"]} for _ in range(20)],
        "span": [
            {"question": "what", "context": f"a red bike {'very ' * i}fast",
             "answers": {"text": ["red"], "answer_start": [2]}}
            for i in range(20)
        ],
    }[kind]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    bitfit.finetune(
        checkpoint(), data=path, kind=kind, out=tmp_path / "task", epochs=2, learning_rate=1e-2,
        max_length=80, dtype="fp32",
    )  # fmt: skip
    model = bitfit.load(tmp_path / "task", base=checkpoint())
    text = ("what", "a red bike") if kind == "span" else "good film"
    prediction = model.predict([text])[0]
    answer = json.loads(json.dumps(prediction.to_json()))
    key = {"regression": "value", "span": "answer"}.get(kind, "labels")
    assert key in answer
    if kind == "span":
        assert "a red bike"[answer["start"] :].startswith(answer["answer"])


def test_a_search_without_dev_rows_is_refused(checkpoint, tickets):
    with pytest.raises(UsageError, match="chooses on dev rows"):
        bitfit.finetune(checkpoint(), data=tickets, learning_rate="auto", dev_fraction=0)


def test_class_weights_are_refused_where_they_would_be_ignored(checkpoint, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "good film,1.5\nbad bike,0.5\n" * 5, encoding="utf-8")
    with pytest.raises(UsageError, match="is regression: leave it out"):
        bitfit.finetune(checkpoint(), data=path, class_weights="balanced")


def test_a_base_opened_in_tf32_is_as_good_as_fp32_where_that_is_the_default(open_tiny, tickets):
    outcome = bitfit.finetune(open_tiny(tf32=True), data=tickets, recipe="paper", epochs=1)
    assert outcome.file.recipe["dtype"] == "tf32"
    assert trained_dtype(outcome.file, "auto", "cpu") == "fp32"
    assert trained_dtype(outcome.file, "bf16", "cpu") == "bf16"


def test_an_open_encoder_of_another_precision_is_refused(open_tiny, tickets):
    encoder = open_tiny(dtype=torch.bfloat16)
    for options in ({"dtype": "fp32"}, {"recipe": "paper"}):
        with pytest.raises(UsageError, match="open encoder computes in"):
            bitfit.finetune(encoder, data=tickets, **options)
