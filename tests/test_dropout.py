"""Dropout of several runs on a CPU: together they draw what each draws when it is alone."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packed import parts_of

from bitfit import side_by_side as groups
from bitfit.attention import _DroppedAttention
from bitfit.dropout import StepDropout

HEADS = 2
RUNS = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), min_size=1, max_size=4)


def masks_of(runs, rates=None, seeds=None):
    """Return the masks of runs, each a list of lengths, with the batch of all."""
    parts, batch = parts_of(runs, rates, seeds)
    return StepDropout(parts), batch


def factors_of_each(masks, batch, rate):
    """Return each sequence's factors ``(heads, L, L)`` of one layer's attention, in order."""
    found = []
    for layout, draw in masks.attention(batch, HEADS, rate):
        own = {}
        drawn = layout.split_scores(draw(torch.ones(layout.scores)))
        for group, squares in zip(layout.groups, drawn, strict=True):
            split = squares.view(group.sequences, HEADS, group.width, group.width)
            for sequence, square in zip(group.members, split, strict=True):
                length = layout.lengths[sequence]
                own[sequence] = square[:, :length, :length]
        found += [own[sequence] for sequence in sorted(own)]
    return found


@settings(deadline=None)
@given(runs=RUNS, cost=st.sampled_from([0, 100, groups.GROUP_COST]))
@example(runs=[[1], [12, 1, 12], [3]], cost=0)
def test_a_run_s_masks_are_those_it_draws_alone(runs, cost):
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(groups, "GROUP_COST", cost)
        masks, batch = masks_of(runs)
        hidden = masks.drop(torch.ones(1, len(batch.input_ids), 3), 0.5)[0]
        layers = [factors_of_each(masks, batch, 0.5) for _ in range(2)]
        last = masks.drop(torch.ones(1, len(batch.input_ids), 3), 0.5)[0]
        at = tokens = 0
        for seed, lengths in enumerate(runs):
            alone, own = masks_of([lengths], seeds=[seed])
            end = tokens + sum(lengths)
            assert torch.equal(
                hidden[tokens:end], alone.drop(torch.ones(1, sum(lengths), 3), 0.5)[0]
            )
            for layer in layers:
                expected = factors_of_each(alone, own, 0.5)
                assert all(map(torch.equal, layer[at : at + len(lengths)], expected))
            assert torch.equal(last[tokens:end], alone.drop(torch.ones(1, sum(lengths), 3), 0.5)[0])
            tokens, at = end, at + len(lengths)


def test_runs_of_one_rate_attend_together_and_others_by_themselves():
    masks, batch = masks_of([[3], [4, 2]])
    assert len(masks.attention(batch, HEADS, 0.5)) == 1
    masks, batch = masks_of([[3], [4, 2]], rates=[0.1, 0.2])
    assert [len(layout.groups[0].members) for layout, _ in masks.attention(batch, HEADS, 0.5)] == [
        1, 2,
    ]  # fmt: skip
    masks, batch = masks_of([[3], [4, 2]], rates=[0.0, 0.0])
    assert masks.attention(batch, HEADS, 0.5) == []


def test_each_run_has_its_own_rate_on_attention():
    masks, batch = masks_of([[40], [40]], rates=[0.0, 0.5])
    first, second = factors_of_each(masks, batch, 0.9)
    assert (first == 1).all()
    assert set(second.unique().tolist()) == {0.0, 2.0}


def test_gradients_of_runs_together_are_those_of_each_alone():
    runs = [[5, 3], [9], [2, 2, 4]]
    total = sum(map(sum, runs))
    generator = torch.Generator().manual_seed(0)
    given_ = torch.randn(4, total, HEADS, 3, dtype=torch.float64, generator=generator)
    masks, batch = masks_of(runs)
    ((layout, draw),) = masks.attention(batch, HEADS, 0.3)
    qkv = [x.clone().requires_grad_(True) for x in given_[:3]]
    (_DroppedAttention.apply(*qkv, layout, 0.7, draw) * given_[3]).sum().backward()
    begin = 0
    for seed, lengths in enumerate(runs):
        own = slice(begin, begin + sum(lengths))
        alone, own_batch = masks_of([lengths], seeds=[seed])
        ((layout, draw),) = alone.attention(own_batch, HEADS, 0.3)
        parts = [x[own].clone().requires_grad_(True) for x in given_[:3]]
        (_DroppedAttention.apply(*parts, layout, 0.7, draw) * given_[3, own]).sum().backward()
        for together, by_itself in zip(qkv, parts, strict=True):
            torch.testing.assert_close(together.grad[own], by_itself.grad)
        begin = own.stop
