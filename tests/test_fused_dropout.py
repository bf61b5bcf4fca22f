"""Dropout of many runs as a GPU takes it: each run's masks are its own, in any company."""

import sys
from types import SimpleNamespace

import plain_kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import parts_of

from bitfit.fused_dropout import FusedDropout, _can_launch, has_kernels, threshold_of

CPU = torch.device("cpu")
HEADS, WIDTH = 2, 6
RUNS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4)


@pytest.fixture(autouse=True, scope="module")
def in_plain_torch():
    with pytest.MonkeyPatch.context() as patches:
        patches.setitem(sys.modules, "bitfit.kernels", plain_kernels)
        yield


def fused(runs, seeds=None, rates=None):
    """Return the masks of runs, each a list of lengths, with the batch of all."""
    parts, batch = parts_of(runs, rates, seeds)
    return FusedDropout(parts, CPU), batch


def hidden_mask(masks, tokens, rate=0.5):
    return masks.drop(torch.ones(1, tokens, WIDTH), rate)[0]


def score_masks(masks, batch, rate=0.5):
    """Return the factors of one layer's attention, ``(heads, L, L)`` for each sequence."""
    where = masks.where(batch, rate)
    return [
        torch.from_numpy(plain_kernels.attention_factors(where, i, HEADS))
        for i in range(len(where.lengths))
    ]


@settings(deadline=None, max_examples=25)
@given(runs=RUNS, sites=st.integers(1, 3), layers=st.integers(1, 3))
def test_the_masks_of_a_run_do_not_depend_on_its_neighbours(runs, sites, layers):
    masks, batch = fused(runs)
    tokens = [sum(lengths) for lengths in runs]
    counts = [len(lengths) for lengths in runs]
    together = [hidden_mask(masks, sum(tokens)).split(tokens) for _ in range(sites)]
    scores = [score_masks(masks, batch) for _ in range(layers)]
    heads = masks.head(range(len(runs)), 0.5)(torch.ones(len(runs), 3, 5))
    for place, lengths in enumerate(runs):
        alone, own = fused([lengths], seeds=[place])
        begin = sum(counts[:place])
        for site in together:
            assert torch.equal(site[place], hidden_mask(alone, tokens[place]))
        for layer in scores:
            expected = score_masks(alone, own)
            found = layer[begin : begin + counts[place]]
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert torch.equal(heads[place], alone.head([0], 0.5)(torch.ones(3, 5)))


def test_every_site_layer_head_and_turn_has_other_masks():
    masks, batch = fused([[9, 9]])
    found = [hidden_mask(masks, 18) for _ in range(3)]
    draw = masks.head([0], 0.5)
    found += [draw(torch.ones(18, WIDTH)) for _ in range(2)]
    flat = [x.flatten() for x in found]
    layers = [score_masks(masks, batch) for _ in range(2)]
    flat += [head.flatten() for layer in layers for sequence in layer for head in sequence]
    kinds = {tuple(x.tolist()) for x in flat}
    assert len(kinds) == len(flat)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_rate_is_what_was_asked_for(rate):
    masks, batch = fused([[40] * 5])
    dropped = [(hidden_mask(masks, 200, rate) == 0).double().mean() for _ in range(40)]
    dropped += [(x == 0).double().mean() for x in score_masks(masks, batch, rate)]
    count = 40 * 200 * WIDTH + 5 * HEADS * 40 * 40
    assert abs(float(sum(dropped)) / len(dropped) - rate) < 5 * (rate * (1 - rate) / count) ** 0.5
    assert threshold_of(rate) / 2**31 == pytest.approx(rate, abs=1e-9)


def test_a_run_may_have_its_own_rate_on_attention_and_none_at_all():
    masks, batch = fused([[9, 9], [9]], rates=[0.0, None])
    *first, last = score_masks(masks, batch)
    assert all((x == 1).all() for x in first)
    assert 0 < (last == 0).double().mean() < 1
    off, batch = fused([[9], [9]], rates=[0.0, 0.0])
    assert off.where(batch, 0.5).draws is None


def test_a_layer_that_is_computed_again_draws_the_same():
    masks, batch = fused([[5, 3], [4]])
    hidden_mask(masks, 12)
    places = masks.places()
    before = hidden_mask(masks, 12), score_masks(masks, batch)
    hidden_mask(masks, 12)
    masks.move_to(places)
    again = hidden_mask(masks, 12), score_masks(masks, batch)
    assert torch.equal(before[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(before[1], again[1], strict=True))


def test_kernels_are_for_gpus(monkeypatch):
    monkeypatch.setattr("bitfit.fused_dropout._can_launch", lambda device: True)
    assert has_kernels(torch.device("cuda", 0))
    assert not has_kernels(CPU)
    monkeypatch.setattr("bitfit.fused_dropout._can_launch", lambda device: False)
    assert not has_kernels(torch.device("cuda", 0))


def test_kernels_that_cannot_be_compiled_are_a_warning_with_the_reason(monkeypatch):
    """Without a C compiler Triton is there and does not run: training goes on by other means."""

    def drop(*arguments):
        raise RuntimeError("Failed to find C compiler\nand more")

    monkeypatch.setitem(sys.modules, "bitfit.kernels", SimpleNamespace(drop=drop))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    device = torch.device("meta")
    with pytest.warns(RuntimeWarning, match=r"\(Failed to find C compiler\): training there"):
        assert not _can_launch.__wrapped__(device)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not _can_launch.__wrapped__(device)
