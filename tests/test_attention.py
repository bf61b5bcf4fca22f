import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packed import batch_of
from torch.autograd import gradcheck

from bitfit import side_by_side as groups
from bitfit.attention import _attend, _DroppedAttention
from bitfit.dropout import DropoutBits
from bitfit.side_by_side import SideBySide, group_by_length, side_by_side

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)
HEADS, DIM = 2, 3


@pytest.fixture
def cheap_groups(monkeypatch):
    """Groups that cost nothing: one for each distinct length."""
    monkeypatch.setattr(groups, "GROUP_COST", 0)


def make_layout(lengths):
    return SideBySide(batch_of(lengths), HEADS)


def exact(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, HEADS, DIM, dtype=torch.float64, generator=generator)


def same_bits(seed, rate):
    """Dropout bits that are drawn once, so that a function of them can be differentiated."""
    return lambda x: DropoutBits(seed, 1, x.device).scale(x, rate)


def keep_all(weights):
    return torch.ones_like(weights)


def attend_each(qkv, lengths, scaling):
    """Attention as it is defined: every sequence by itself, without padding or mask."""
    parts = zip(*(x.split(lengths) for x in qkv), strict=True)
    contexts = []
    for own in parts:
        q, k, v = (x.transpose(0, 1) for x in own)
        contexts.append((torch.softmax(q @ k.mT * scaling, -1) @ v).transpose(0, 1))
    return torch.cat(contexts)


@settings(deadline=None)
@given(lengths=LENGTHS, cost=st.sampled_from([0, 500, groups.GROUP_COST]))
@example(lengths=[40, 1, 40, 1, 2], cost=0)
def test_every_sequence_attends_to_itself_as_if_alone(lengths, cost):
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(groups, "GROUP_COST", cost)
        layout = make_layout(lengths)
    qkv = [exact(sum(lengths), seed) for seed in range(3)]
    expected = attend_each(qkv, lengths, 0.7)
    torch.testing.assert_close(_attend(*qkv, layout, 0.7), expected)
    torch.testing.assert_close(_DroppedAttention.apply(*qkv, layout, 0.7, keep_all), expected)


@settings(deadline=None)
@given(lengths=LENGTHS)
def test_what_is_laid_side_by_side_is_taken_back_as_it_was(lengths):
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(groups, "GROUP_COST", 0)
        layout = make_layout(lengths)
    x = exact(sum(lengths), 0)
    laid = layout.lay(x)
    assert torch.equal(layout.take(laid), x)
    for group, part in zip(layout.groups, layout.split_rows(laid), strict=True):
        assert part.shape == (group.sequences * HEADS, group.width, DIM)
        if group.mask is not None:
            kept = part.view(group.sequences, HEADS, group.width, DIM).transpose(1, 2)[group.mask]
            assert len(kept) == group.mask.sum() < group.sequences * group.width


@settings(deadline=None)
@given(lengths=LENGTHS, cost=st.sampled_from([0, 1000, 5000]))
def test_no_other_stretches_of_the_sorted_lengths_cost_less(lengths, cost):
    """The search is exhaustive here: every way to cut the distinct lengths."""

    def price(parts):
        widths = [(len(part), max(part)) for part in parts]
        return sum(n * HEADS * w * (w + groups.ROW_COST) + cost for n, w in widths)

    lengths = lengths[:7]
    ordered = sorted(lengths)
    ways = []
    for chosen in range(2 ** (len(ordered) - 1)):
        cuts = [i + 1 for i in range(len(ordered) - 1) if chosen >> i & 1]
        ways.append([ordered[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)])
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(groups, "GROUP_COST", cost)
        found = group_by_length(lengths, HEADS)
    assert sorted(i for group in found for i in group) == list(range(len(lengths)))
    assert price([[lengths[i] for i in group] for group in found]) == min(map(price, ways))


def test_one_long_text_does_not_pad_the_short_ones():
    layout = make_layout([12] * 30 + [512] + [12] * 30)
    assert [(g.sequences, g.width, g.mask) for g in layout.groups] == [
        (60, 12, None),
        (1, 512, None),
    ]


def test_a_few_short_texts_are_one_group():
    assert [g.width for g in make_layout([12, 14, 9, 11]).groups] == [14]


def test_every_layer_gets_the_same_groups():
    batch = batch_of([3, 7])
    assert side_by_side(batch, 2) is side_by_side(batch, 2)
    assert side_by_side(batch, 2) is not side_by_side(batch, 4)


def test_a_batch_is_gone_with_its_last_name():
    """Without a garbage collection: tensors that wait for one would pile up under load."""
    batch = batch_of([3, 7])
    side_by_side(batch, 2).places  # noqa: B018
    kept = weakref.ref(batch)
    gc.disable()
    try:
        del batch
        assert kept() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("lengths", [[3, 1, 2], [2, 2], [1, 3, 1, 3]])
def test_the_gradient_of_dropped_attention_is_exact(cheap_groups, lengths):
    layout = make_layout(lengths)
    assert len(layout.groups) == len(set(lengths))

    def attend(q, k, v):
        return _DroppedAttention.apply(q, k, v, layout, 0.7, same_bits(3, 0.4))

    inputs = tuple(exact(sum(lengths), seed).requires_grad_(True) for seed in range(3))
    assert gradcheck(attend, inputs, atol=1e-8)


def test_the_gradient_is_that_of_the_fused_attention(cheap_groups):
    lengths = [5, 2, 9, 1, 5]
    layout = make_layout(lengths)
    found, expected = ([exact(22, seed).requires_grad_(True) for seed in range(3)] for _ in "ab")
    weights = exact(22, 9)
    (_DroppedAttention.apply(*found, layout, 0.5, keep_all) * weights).sum().backward()
    padded = (
        torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2)
        for x in expected
    )
    real = torch.arange(9) < torch.tensor(lengths)[:, None]
    out = F.scaled_dot_product_attention(*padded, attn_mask=real[:, None, None], scale=0.5)
    (out.transpose(1, 2)[real] * weights).sum().backward()
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad)


@pytest.mark.parametrize("lengths", [[3, 5], [5, 3, 5, 3]])
def test_a_nan_in_one_sequence_stays_there(cheap_groups, lengths):
    layout = make_layout(lengths)
    qkv = [exact(sum(lengths), seed) for seed in range(3)]
    first = lengths[0]
    for x in qkv:
        x[:first] = torch.nan
        x.requires_grad_(True)
    dropped = _DroppedAttention.apply(*qkv, layout, 0.5, same_bits(0, 0.1))
    dropped.sum().backward()
    for out in (dropped, _attend(*qkv, layout, 0.5)):
        assert out[:first].isnan().all()
        assert not out[first:].isnan().any()
    assert not any(x.grad[first:].isnan().any() for x in qkv)


def test_factors_are_drawn_once_for_all_groups(cheap_groups):
    asked = []

    def draw(weights):
        asked.append(weights.shape)
        return torch.ones_like(weights)

    layout = make_layout([3, 5, 3])
    _DroppedAttention.apply(*(exact(11, seed) for seed in range(3)), layout, 0.5, draw)
    assert asked == [(HEADS * (3 * 3 * 2 + 5 * 5),)]
