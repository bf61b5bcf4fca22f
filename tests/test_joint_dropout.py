"""Dropout drawn for many runs in few calls, as a GPU takes it: each run's masks are its own."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import parts_of

from bitfit.joint_dropout import LAYERS_AHEAD, SITES_AHEAD, JointDropout, drawn_bytes

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CPU = torch.device("cpu")
HEADS = 2
RUNS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4)


def joint(runs, seeds=None, rates=None):
    """Return the masks of runs, each a list of lengths, with the batch of all."""
    parts, batch = parts_of(runs, rates, seeds)
    return JointDropout(parts, CPU), batch


def hidden_mask(masks, tokens, width=6, rate=0.5):
    return masks.drop(torch.ones(1, tokens, width), rate)[0]


def score_masks(masks, batch, rate=0.5):
    """Return the factors of one layer's attention, ``(B, heads, L, L)``."""
    longest = batch.max_length
    ((layout, draw),) = masks.attention(batch, HEADS, rate)
    return draw(torch.ones(layout.scores)).view(-1, HEADS, longest, longest)


@settings(deadline=None, max_examples=25)
@given(runs=RUNS, sites=st.integers(1, SITES_AHEAD + 2), layers=st.integers(1, LAYERS_AHEAD + 1))
def test_the_masks_of_a_run_do_not_depend_on_its_neighbours(runs, sites, layers):
    masks, batch = joint(runs)
    tokens = [sum(lengths) for lengths in runs]
    together = [hidden_mask(masks, sum(tokens)).split(tokens) for _ in range(sites)]
    scores = [score_masks(masks, batch).split([len(r) for r in runs]) for _ in range(layers)]
    heads = masks.head(range(len(runs)), 0.5)(torch.ones(len(runs), 3, 5))
    for place, lengths in enumerate(runs):
        alone, own = joint([lengths], seeds=[place])
        for site in together:
            assert torch.equal(site[place], hidden_mask(alone, tokens[place]))
        for layer in scores:
            expected = score_masks(alone, own)
            for found, single, n in zip(layer[place], expected, lengths, strict=True):
                assert torch.equal(found[:, :n, :n], single[:, :n, :n])
        assert torch.equal(heads[place], alone.head([0], 0.5)(torch.ones(3, 5)))


@settings(deadline=None, max_examples=50)
@given(runs=RUNS)
def test_no_bit_of_attention_is_used_twice_and_all_are_of_the_runs_own_stretch(runs):
    masks, batch = joint(runs)
    rows = masks._score_rows(batch.max_length, HEADS).view(
        LAYERS_AHEAD, -1, HEADS, batch.max_length
    )
    used, begin, sequence = [], 0, 0
    for lengths in runs:
        own = []
        for n in lengths:
            own.append((rows[:, sequence, :, :n, None] + torch.arange(n)).flatten())
            sequence += 1
        places = torch.cat(own)
        size = LAYERS_AHEAD * sum(lengths) * HEADS * max(lengths)
        assert places.min() >= begin
        assert places.max() < begin + size
        used.append(places)
        begin += -(-size // 4) * 4
    every = torch.cat(used)
    assert len(every.unique()) == len(every)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_sites_and_layers_drop_at_the_rate_and_independently(rate):
    masks, batch = joint([[60] * 4, [60] * 3])
    drawn = [hidden_mask(masks, 420, 500, rate) for _ in range(SITES_AHEAD + 1)]
    drawn += [score_masks(masks, batch, rate) for _ in range(LAYERS_AHEAD + 1)]
    for factor in drawn:
        n, dropped = factor.numel(), (factor == 0).double()
        assert abs(dropped.mean().item() - rate) < 5 * (rate * (1 - rate) / n) ** 0.5
        kept = factor[factor != 0].unique()
        assert len(kept) == 1
        assert kept.item() == pytest.approx(1 / (1 - rate), rel=1e-4)
    flat = [(factor == 0).double().flatten()[:50_000] for factor in drawn]
    pairs = [(flat[0], other) for other in flat[1:]] + [(flat[-1], flat[-2])]
    pairs += [(flat[0][lag:], flat[0][:-lag]) for lag in (1, 2, 3, 4, 500)]
    for a, b in pairs:
        assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 5 / 50_000**0.5


def test_each_run_has_its_own_rate_on_attention():
    masks, batch = joint([[4, 2], [5]], rates=[0.0, None])
    factors = score_masks(masks, batch, 0.5)
    assert (factors[:2] == 1).all()
    assert set(factors[2].unique().tolist()) == {0.0, 2.0}
    assert joint([[3]], rates=[0.0])[0].attention(batch, HEADS, 0.5) == []


def test_masks_that_are_drawn_again_are_the_same():
    """A layer that is recomputed in the backward pass comes after later ones were drawn."""
    masks, batch = joint([[4, 2], [5]])
    seen = []
    for _ in range(max(SITES_AHEAD, LAYERS_AHEAD) + 2):
        places = masks.places()
        seen.append((places, hidden_mask(masks, 11), score_masks(masks, batch)))
    for places, hidden, scores in reversed(seen):
        masks.move_to(places)
        assert torch.equal(hidden_mask(masks, 11), hidden)
        assert torch.equal(score_masks(masks, batch), scores)


@pytest.mark.skipif(not BENCHMARKS.exists(), reason="no benchmarks in this distribution")
def test_a_step_of_many_lanes_needs_hardly_more_operations_than_of_one(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import launches

    monkeypatch.setattr(sys, "argv", ["launches.py", "--layers", "2", "--lanes", "2,12", "--json"])
    launches.main()
    found = json.loads(capsys.readouterr().out)["operations"]
    few, many = (sum(found[lanes].values()) for lanes in ("2", "12"))
    # beside the draws: a call for each lane and block of bits
    assert many - few == found["12"]["random_"] - found["2"]["random_"]
    assert many < 1.3 * few


def test_the_bytes_of_bits_drawn_ahead_are_known_beforehand():
    lengths = [20, 20, 20, 20]
    masks, batch = joint([lengths])
    hidden_mask(masks, sum(lengths), width=64)
    score_masks(masks, batch)
    held = sum(block.nbytes for _, block in masks._blocks.values()) + masks._rows.nbytes
    assert held == pytest.approx(sum(lengths) * drawn_bytes(64, HEADS, 20), rel=0.02)
