import functools
import threading
import time
from dataclasses import replace
from itertools import pairwise
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WORDS, make_task

import bitfit
from bitfit.base import load_base
from bitfit.encoder import Encoder
from bitfit.errors import BitfitError, UnknownTask, UsageError
from bitfit.serve import engine as engine_module
from bitfit.serve.answers import merge_entities
from bitfit.serve.engine import Engine, Item, Ready
from bitfit.serve.failures import NotFinite
from bitfit.serve.shelf import FINGERPRINT, Shelf

KINDS = {
    "mood": {"kind": "classification"},
    "topic": {"kind": "classification", "labels": ("a", "b", "c", "d"), "terms": "query,b_m2"},
    "other": {"labels": ("a", "b", "c", "d"), "pooling": "mean", "seed": 1},
    "first": {"labels": ("a", "b", "c", "d"), "pooling": "cls", "seed": 2},
    "pooled": {"kind": "regression", "terms": "all,pooler", "seed": 3},
    "score": {"kind": "regression", "seed": 4},
    "tags": {"kind": "multilabel", "labels": ("x", "y", "z"), "seed": 5},
    "words": {"kind": "tokens", "labels": ("O", "B-p", "I-p"), "seed": 6},
    "late": {"kind": "tokens", "labels": ("O", "B-p", "I-p"), "terms": "all@1", "seed": 7},
    "qa": {"kind": "span", "seed": 8},
    "qa2": {"kind": "span", "seed": 9, "terms": "intermediate@1"},
}  # fmt: skip


def fill(shelf):
    for name, options in KINDS.items():
        if shelf.encoder.pooler is None:  # as of every base but BERT's
            options = options | {"terms": options.get("terms", "all").replace(",pooler", "")}
        shelf.put(name, make_task(shelf.encoder, name, **options))
    return shelf


@pytest.fixture(scope="module")
def engines(checkpoint):
    @functools.cache
    def make(family="bert", packed=True):
        return Engine(fill(Shelf(Encoder(load_base(checkpoint(family)), packed=packed))))

    return make


def ask(engine, items):
    ready = engine.prepare(items)
    assert all(isinstance(each, Ready) for each in ready), ready
    return engine.answer(ready)


def numbers(value):
    """All numbers of a result, of labels by name, so that two near ones may swap places."""
    if isinstance(value, dict):
        return [x for key in sorted(value) for x in numbers(value[key])]
    if isinstance(value, list):
        if value and isinstance(value[0], dict) and set(value[0]) == {"label", "score"}:
            value = sorted(value, key=lambda entry: entry["label"])
        return [x for entry in value for x in numbers(entry)]
    return [value] if isinstance(value, int | float) else []


texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)
mixtures = st.lists(st.tuples(st.sampled_from(sorted(KINDS)), texts), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("family", "packed"),
    [("bert", True), ("bert", False), ("roberta", True), ("deberta-v2", False)],
)
@settings(max_examples=8, deadline=None)
@given(mixture=mixtures, order=st.randoms(use_true_random=False))
def test_an_item_in_any_company_is_the_item_alone(family, packed, mixture, order, engines):
    """Promise 3 over mixtures of tasks, kinds, head shapes, poolings, terms, lengths and orders."""
    engine = engines(family, packed)
    items = [
        Item(task, text, "the bike is " + text if task.startswith("qa") else None, id=str(i))
        for i, (task, text) in enumerate(mixture)
    ]
    shuffled = list(items)
    order.shuffle(shuffled)
    together = {answer.id: answer for answer in ask(engine, shuffled)}
    for item in items:
        [alone], found = ask(engine, [item]), together[item.id]
        assert (found.task, found.fingerprint) == (alone.task, alone.fingerprint)
        assert numbers(found.result) == pytest.approx(numbers(alone.result), abs=1e-5)


def test_answers_are_those_of_the_library(engines, checkpoint):
    engine = engines()
    model = bitfit.Model(engine.shelf.encoder)
    for name in KINDS:
        model.add(engine.shelf.file(name), name)
    texts = ["good film", "the order is late now", "bad"]
    for name, options in KINDS.items():
        if options.get("kind") == "span":
            found = ask(engine, [Item(name, t, "we will arrive late " * 3) for t in texts])
            expected = model.predict([(t, "we will arrive late " * 3) for t in texts], name)
        else:
            found = ask(engine, [Item(name, t) for t in texts])
            expected = model.predict(texts, name)
        for answer, wanted in zip(found, expected, strict=True):
            result = answer.result
            match options.get("kind", "classification"):
                case "classification":
                    assert result["label"] == wanted.label
                    scores = {s["label"]: s["score"] for s in result["scores"]}
                    assert scores == pytest.approx(wanted.scores, abs=1e-6)
                    assert result["scores"][0]["label"] == wanted.label
                case "multilabel":
                    assert tuple(result["labels"]) == wanted.labels
                case "regression":
                    assert result["value"] == pytest.approx(wanted.value, abs=1e-6)
                case "tokens":
                    assert tuple(s["label"] for s in result["spans"]) == wanted.labels
                case "span":
                    assert (result["answer"], result["start"]) == (wanted.answer, wanted.start)
                    assert result["end"] == result["start"] + len(result["answer"])


def test_places_are_characters_of_the_text_as_it_was_sent(engines):
    text = "  good\tfilm ,  the\u00a0bike  "
    [answer] = ask(engines(), [Item("words", text)])
    spans = answer.result["spans"]
    assert [s["text"] for s in spans] == text.split()
    assert all(text[s["start"] : s["end"]] == s["text"] for s in spans)
    assert all(text[e["start"] : e["end"]] == e["text"] for e in answer.result["entities"])


def test_words_of_one_entity_are_put_together():
    text = "New York and Paris , Rome"
    tags = ["B-loc", "I-loc", "O", "I-loc", "O", "B-loc"]
    spans, at = [], 0
    for word, tag in zip(text.split(), tags, strict=True):
        begin = text.index(word, at)
        at = begin + len(word)
        spans.append({"start": begin, "end": at, "text": word, "label": tag,
                      "confidence": 0.5 + begin / 100})  # fmt: skip
    found = merge_entities(spans, text)
    assert [(e["text"], e["label"], e["start"], e["end"]) for e in found] == [
        ("New York", "loc", 0, 8), ("Paris", "loc", 13, 18), ("Rome", "loc", 21, 25),
    ]  # fmt: skip
    assert found[0]["confidence"] == 0.5
    assert merge_entities([{**spans[0], "label": "NOUN"}], text) == []
    gap = [spans[0], spans[1] | {"start": 20, "end": 25, "label": "I-loc"}]
    assert len(merge_entities(gap, text)) == 2  # a word between them has no tag


def test_limits_and_abstention(engines):
    engine = engines()
    [sure, few, unsure] = ask(engine, [
        Item("topic", "good film"), Item("topic", "good film", top_k=2),
        Item("topic", "good film", min_confidence=1.0),
    ])  # fmt: skip
    assert [s["label"] for s in few.result["scores"]] == [
        s["label"] for s in sure.result["scores"][:2]
    ]
    assert (unsure.result["label"], unsure.result["abstained"]) == (None, True)
    assert sum(s["score"] for s in sure.result["scores"]) == pytest.approx(1)
    [words] = ask(engine, [Item("words", "good film", min_confidence=1.0)])
    assert words.result == {"spans": [], "entities": []}
    long = Item("mood", "good film " * 200)
    [cut, whole] = ask(engine, [long, Item("mood", "good")])
    assert (cut.truncated, whole.truncated) == (True, False)
    assert (cut.tokens, whole.tokens) == (90, 3)
    [empty, nothing] = ask(engine, [Item("words", ""), Item("mood", "")])
    assert empty.result == {"spans": [], "entities": []}
    assert nothing.result["label"] in ("bad", "good")


def test_a_long_context_has_several_windows_and_one_answer(engines):
    context = "the red bike is slow . " * 40
    [answer] = ask(engines(), [Item("qa", "what is slow", context)])
    assert answer.tokens > 200
    assert not answer.truncated
    result = answer.result
    assert context[result["start"] : result["end"]] == result["answer"]


def test_an_item_that_fails_stands_in_its_place_and_holds_nothing(engines):
    engine = engines()
    items = [
        Item("mood", "good"), Item("moood", "good"), Item("qa", "who"), Item("mood", "a", "b"),
        Item("moood", "bad"), Item("mood", "bad", min_confidence=2), Item("mood", "bad", top_k=0),
    ]  # fmt: skip
    found = engine.prepare(items)
    assert isinstance(found[0], Ready)
    assert isinstance(found[1], UnknownTask)
    assert isinstance(found[4], UnknownTask)
    for i in (2, 3, 5, 6):
        assert isinstance(found[i], UsageError)
    engine.answer([found[0]])
    shelf = engine.shelf
    assert all(version.leases == 0 for version in shelf._current.values())
    assert engine.answer([]) == []


@pytest.mark.parametrize("kind", ["classification", "multilabel", "regression", "tokens", "span"])
@pytest.mark.parametrize("packed", [True, False])
def test_an_answer_that_is_not_finite_is_an_error_of_its_item_alone(open_tiny, kind, packed):
    encoder = open_tiny("bert", packed=packed)
    shelf = Shelf(encoder)
    shelf.put("good", make_task(encoder, "good", seed=1))
    labels = {"multilabel": ("x", "y"), "tokens": ("O", "B-p")}.get(kind, ())
    huge = make_task(encoder, "huge", kind=kind, seed=2, **({"labels": labels} if labels else {}))
    shelf.put("huge", replace(huge, bias=torch.full_like(huge.bias, 3e38)))
    engine = Engine(shelf)
    good = Item("good", "the good bike was late")
    huge = Item("huge", "a bad film", "the good bike was late" if kind == "span" else None)
    (alone,) = ask(engine, [good])
    beside, failed = ask(engine, [good, huge])
    assert beside.result["confidence"] == pytest.approx(alone.result["confidence"], abs=1e-5)
    assert isinstance(failed, NotFinite)
    assert "'huge'" in str(failed)
    assert shelf.resident == 2


def test_equal_texts_are_tokenized_once(engines):
    ready = engines().prepare([Item(name, "good film") for name in ("mood", "topic", "score")])
    assert len({id(each.features[0]) for each in ready}) == 1
    engines().answer(ready)


@given(st.lists(st.tuples(st.integers(0, 30), st.none() | st.integers(0, 30)), max_size=20))
def test_parts_are_all_items_in_their_order_and_no_larger_than_they_must(sizes):
    items = [Item("mood", "a" * n, None if m is None else "b" * m) for n, m in sizes]

    def chars(part):
        return sum(len(item.text) + len(item.text_pair or "") for item in part)

    with patch.object(engine_module, "PART_CHARS", 40):
        found = list(engine_module.parts(items))
    assert [item for part in found for item in part] == items
    assert all(len(part) == 1 or chars(part) <= 40 for part in found)
    for part, after in pairwise(found):
        assert chars([*part, after[0]]) > 40


def test_leases_are_given_back_where_computing_fails(engines, monkeypatch):
    engine = engines()
    ready = engine.prepare([Item("mood", "good"), Item("topic", "bad")])
    monkeypatch.setattr(engine.shelf.encoder, "encode", None)
    with pytest.raises(TypeError):
        engine.answer(ready)
    assert all(version.leases == 0 for version in engine.shelf._current.values())


def test_no_answer_is_ever_of_another_row(open_tiny):
    """Threads put, roll back and remove while others ask; each answer has its own file's numbers.

    Every file has another head bias, by which an answer tells whose row and head it has.
    """
    shelf = Shelf(open_tiny())
    engine = Engine(shelf)
    files = [make_task(shelf.encoder, kind="regression", seed=i) for i in range(5)]
    text = "good film"
    expected = {}
    for file in files:
        shelf.put("x", file)
        expected[file.seal[:FINGERPRINT]] = ask(engine, [Item("x", text)])[0].result["value"]
    shelf.remove("x")
    assert len({round(v, 4) for v in expected.values()}) == 5
    stop, wrong = threading.Event(), []

    def change(seed):
        random = np.random.default_rng(seed)
        while not stop.is_set():
            name = f"t{random.integers(6)}"
            try:
                match random.integers(6):
                    case 0:
                        shelf.remove(name)
                    case 1:
                        shelf.rollback(name)
                    case _:
                        shelf.put(name, files[random.integers(5)])
            except UsageError:
                pass
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=change, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    answered, random = 0, np.random.default_rng(9)
    # By answers and not by rounds: rounds against an empty shelf are over before a thread has
    # put anything there. The deadline only ends a run that would never get there.
    deadline = time.monotonic() + 120
    while answered <= 300 and not wrong and time.monotonic() < deadline:
        items = [Item(f"t{random.integers(6)}", text) for _ in range(8)]
        ready = [r for r in engine.prepare(items) if not isinstance(r, BitfitError)]
        for answer in engine.answer(ready):
            answered += 1
            if abs(answer.result["value"] - expected[answer.fingerprint]) > 1e-4:
                wrong.append(answer)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert answered > 300
    assert all(version.leases == 0 for version in shelf._current.values())
