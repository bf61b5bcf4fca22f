import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import WORDS, make_tokenizer

from bitfit.batches import Feature, length_sorted, make_features, pack
from bitfit.errors import UsageError
from bitfit.tasks import SpanExample, Task, TextExample, TokenExample

TOKENIZER = make_tokenizer()
MOOD = Task(name="mood", kind="classification", labels=("bad", "good"))
TAGS = Task(name="tags", kind="tokens", labels=("A", "B"))
SPAN = Task(name="qa", kind="span", is_pair=True)


def feature(length, i=0):
    ids = np.arange(length) + 100 * i
    return Feature(ids, np.zeros(length, dtype=np.int64), i)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_packing_keeps_every_token_in_its_place(lengths):
    features = [feature(n, i) for i, n in enumerate(lengths)]
    batch = pack(features)
    for i, part in enumerate(torch.split(batch.input_ids, lengths)):
        assert part.tolist() == features[i].input_ids.tolist()
    assert batch.positions.tolist() == [p for n in lengths for p in range(n)]
    assert batch.sequence_of_token.tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]
    padded = batch.input_ids[batch.padded_index]
    assert torch.equal(padded[batch.mask], batch.input_ids)
    assert torch.equal(padded.flatten()[batch.unpadded_index], batch.input_ids)


@given(st.lists(st.integers(1, 40), max_size=40), st.integers(1, 100))
def test_length_sorted_batches_hold_each_index_once_within_the_budget(lengths, budget):
    features = [feature(n, i) for i, n in enumerate(lengths)]
    chunks = list(length_sorted(features, budget))
    assert sorted(i for chunk in chunks for i in chunk) == list(range(len(lengths)))
    for chunk in chunks:
        longest = max(lengths[i] for i in chunk)
        assert len(chunk) == 1 or longest * len(chunk) <= budget


def test_pairs_get_token_types_and_labels():
    found = make_features(TOKENIZER, MOOD, [TextExample("a good film", "not bad", 1)], 32)
    item = found.items[0]
    assert TOKENIZER.decode(item.input_ids) == "[CLS] a good film [SEP] not bad [SEP]"
    assert item.token_type_ids.tolist() == [0] * 5 + [1] * 3
    assert item.label == 1


def test_the_share_of_cut_texts_is_counted():
    texts = [TextExample("good " * n, label=1) for n in (3, 6, 30, 7)]
    found = make_features(TOKENIZER, MOOD, texts, 8)
    assert [len(f) for f in found.items] == [5, 8, 8, 8]
    assert found.truncated_share == 0.5


def test_a_word_that_was_cut_off_has_no_position():
    words = TokenExample(("good", "film", "is", "late"), (0, 1, 0, 1))
    item = make_features(TOKENIZER, TAGS, [words], 4).items[0]
    assert item.word_starts.tolist() == [1, 2, -1, -1]


def test_long_contexts_slide_and_the_answer_keeps_its_characters():
    context = " ".join(["the bike was very late"] * 40) + " we want money back"
    at = context.index("money")
    found = make_features(TOKENIZER, SPAN, [SpanExample("what", context, ((at, "money"),))], 100)
    assert len(found.items) > 1
    assert found.truncated == 1
    answers = [f for f in found.items if f.label != (0, 0)]
    assert answers
    for f in answers:
        start, end = f.label
        assert context[f.offsets[start, 0] : f.offsets[end, 1]] == "money"
    # every context character is seen by some window
    seen = set()
    for f in found.items:
        for begin, end in f.offsets[f.offsets[:, 0] >= 0]:
            seen |= set(range(begin, end))
    assert all(i in seen for i, c in enumerate(context) if c != " ")


def test_windows_are_as_long_as_they_may_be_and_overlap_by_the_stride():
    context = " ".join(WORDS[i % len(WORDS)] for i in range(700))
    at = context.index(" ", len(context) // 2) + 1
    answer = context[at : context.index(" ", at)]
    example = SpanExample("what bike", context, ((at, answer),))
    items = make_features(TOKENIZER, SPAN, [example], 384).items
    assert [len(f) for f in items[:-1]] == [384] * (len(items) - 1)
    tokens = [np.flatnonzero(f.offsets[:, 0] >= 0) for f in items]
    firsts = [f.offsets[t[0], 0] for f, t in zip(items, tokens, strict=True)]
    for f, t, following in zip(items, tokens, firsts[1:], strict=False):
        assert (f.offsets[t, 0] >= following).sum() == 128
    # the windows that hold the answer whole are labelled with it, all others with [CLS]
    for f in items:
        inside = np.flatnonzero(f.offsets[:, 0] == at)
        assert f.label == ((inside[0], inside[0]) if len(inside) else (0, 0))
    assert (0, 0) in [f.label for f in items]


def test_an_answer_that_a_window_cuts_is_none_of_its():
    context = " ".join(["the bike"] * 60)
    example = SpanExample("what", context, ((0, context),))
    items = make_features(TOKENIZER, SPAN, [example], 90).items
    assert [f.label for f in items] == [(0, 0)] * len(items)


def test_a_long_question_is_cut_and_the_context_stays():
    example = SpanExample("where " * 90, "the bike is red", ((12, "red"),))
    item = make_features(TOKENIZER, SPAN, [example], 90).items[0]
    assert (item.input_ids == TOKENIZER.convert_tokens_to_ids("where")).sum() == 64
    assert item.label != (0, 0)


def test_examples_of_another_kind_are_refused():
    with pytest.raises(UsageError, match="takes TokenExample, not TextExample"):
        make_features(TOKENIZER, TAGS, [TextExample("a")], 8)
    with pytest.raises(UsageError, match="some have none"):
        make_features(TOKENIZER, MOOD, [TextExample("a"), TextExample("a", "b")], 8)
    with pytest.raises(UsageError, match="leaves no room"):
        make_features(TOKENIZER, SPAN, [SpanExample("a", "b")], 70)
