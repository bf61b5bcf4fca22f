import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from bitfit.bank import Layout
from bitfit.batches import Feature, make_features, pack
from bitfit.errors import UsageError
from bitfit.heads import (
    MAX_ANSWER_TOKENS,
    N_BEST,
    Head,
    batch_loss,
    best_span,
    head_logits,
    make_head,
    read_predictions,
    read_spans,
)
from bitfit.inference import TaskHead, compute_logits, head_inputs
from bitfit.tasks import SpanExample, Task, TextExample, TokenExample

MOOD = Task(name="mood", kind="classification", labels=("bad", "ok", "good"))
TAGS = Task(name="tags", kind="tokens", labels=("A", "B", "C"))
SPAN = Task(name="qa", kind="span", is_pair=True)
TOPICS = Task(name="topics", kind="multilabel", labels=("x", "y", "z"))
SCORE = Task(name="score", kind="regression")


@pytest.mark.parametrize(
    ("hidden", "labels", "style", "expected"),
    [(768, 1, "linear", 769), (768, 2, "linear", 1_538), (768, 3, "linear", 2_307),
     (1024, 2, "linear", 2_050), (1024, 3, "linear", 3_075),
     (768, 1, "roberta", 591_361), (768, 2, "roberta", 592_130), (768, 3, "roberta", 592_899)],
)  # fmt: skip
def test_heads_have_the_sizes_of_the_paper(hidden, labels, style, expected):
    head = Head(kind="classification", num_outputs=labels, hidden_size=hidden, pooling="cls",
                style=style, dropout_rate=0.1)  # fmt: skip
    assert head.size == expected


def plain(model_class, path, **options):
    torch.manual_seed(0)
    return model_class.from_pretrained(path, **options).eval()


def logits_of(encoder, head, model, features):
    """Our logits with the weights of a transformers model, by their common names."""
    weights = {name: dict(model.named_parameters())[name].detach() for name in head.shapes}
    empty = torch.zeros(1, 0)
    return compute_logits(encoder, features, empty, Layout(()), {0: TaskHead(head, weights)})


def inputs(feature):
    return {
        "input_ids": torch.as_tensor(feature.input_ids)[None],
        "token_type_ids": torch.as_tensor(feature.token_type_ids)[None],
    }


@pytest.mark.filterwarnings("ignore")
def test_the_head_is_that_of_transformers_bert(open_tiny, checkpoint):
    encoder = open_tiny("bert")
    examples = [TextExample("a good film"), TextExample("bad")]
    head = make_head(MOOD, encoder)
    assert head.pooling == "pooler"
    model = plain(BertForSequenceClassification, checkpoint("bert"), num_labels=3)
    features = make_features(encoder.base.tokenizer, MOOD, examples, 16).items
    for feature, found in zip(features, logits_of(encoder, head, model, features), strict=True):
        expected = model(**inputs(feature)).logits[0].detach()
        torch.testing.assert_close(torch.as_tensor(found), expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_the_head_is_that_of_transformers_roberta(open_tiny, checkpoint):
    encoder = open_tiny("roberta")
    head = make_head(MOOD, encoder)
    assert (head.style, head.pooling) == ("roberta", "cls")
    config = AutoConfig.from_pretrained(checkpoint("roberta"), num_labels=3)
    assert isinstance(config, RobertaConfig)
    model = plain(RobertaForSequenceClassification, checkpoint("roberta"), config=config)
    features = make_features(encoder.base.tokenizer, MOOD, [TextExample("a good film")], 16).items
    expected = model(torch.as_tensor(features[0].input_ids)[None]).logits[0].detach()
    found = torch.as_tensor(logits_of(encoder, head, model, features)[0])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_token_and_span_heads_are_those_of_transformers(open_tiny, checkpoint):
    encoder = open_tiny("bert")
    words = [TokenExample(("a", "good", "film"), (0, 1, 2))]
    features = make_features(encoder.base.tokenizer, TAGS, words, 16).items
    model = plain(BertForTokenClassification, checkpoint("bert"), num_labels=3)
    found = logits_of(encoder, make_head(TAGS, encoder), model, features)[0]
    expected = model(**inputs(features[0])).logits[0, 1:4].detach()
    torch.testing.assert_close(torch.as_tensor(found), expected, atol=1e-5, rtol=0)

    features = make_features(
        encoder.base.tokenizer, SPAN, [SpanExample("what", "a bike")], 90
    ).items
    model = plain(BertForQuestionAnswering, checkpoint("bert"))
    found = logits_of(encoder, make_head(SPAN, encoder), model, features)[0]
    output = model(**inputs(features[0]))
    expected = torch.stack([output.start_logits[0], output.end_logits[0]], dim=1).detach()
    torch.testing.assert_close(torch.as_tensor(found), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("task", "examples"),
    [
        (MOOD, [TextExample("a good film", label=2), TextExample("bad", label=0)]),
        (SCORE, [TextExample("a good film", label=4.5), TextExample("bad", label=1.0)]),
        (TOPICS, [TextExample("a good film", label=(0, 2)), TextExample("bad", label=())]),
        (TAGS, [TokenExample(("a", "film"), (0, 1)), TokenExample(("bad",), (2,))]),
        (SPAN, [SpanExample("what", "a red bike", ((2, "red"),)),
                SpanExample("who", "we", ((0, "we"),))]),
    ],
)  # fmt: skip
def test_every_loss_is_that_of_one_example_averaged(task, examples, open_tiny):
    encoder = open_tiny()
    head = make_head(task, encoder)
    weights = head.split(head.init(0))
    features = make_features(encoder.base.tokenizer, task, examples, 90).items

    def loss_of(chosen):
        batch = pack(chosen)
        hidden = encoder.encode(batch, {})
        vectors, _ = head_inputs(encoder, head, hidden, batch, {})
        return batch_loss(head, head_logits(head, weights, vectors, None), batch)

    parts = [loss_of([f]) for f in features]
    share = [len(e.words) for e in examples] if task is TAGS else [1] * len(examples)
    expected = sum(p * n for p, n in zip(parts, share, strict=True)) / sum(share)
    torch.testing.assert_close(loss_of(features), expected, atol=1e-5, rtol=1e-5)


def test_regression_is_the_squared_error_on_the_raw_value():
    head = Head(kind="regression", num_outputs=1, hidden_size=4, pooling="cls", style="linear",
                dropout_rate=0.1)  # fmt: skip
    batch = pack([Feature(np.arange(2), np.zeros(2, np.int64), 0, label=5.0)])
    assert batch_loss(head, torch.tensor([[2.0]]), batch).item() == 9.0


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 2.0, 3.0])])
def test_a_batch_without_a_word_left_has_no_loss_and_moves_nothing(weights, open_tiny):
    encoder = open_tiny()
    head = make_head(TAGS, encoder)
    flat = head.init(0).requires_grad_()
    ids = np.array([2, 5, 3])
    features = [
        Feature(ids, ids * 0, i, label=np.array([1, 2]), word_starts=np.array([-1, -1]))
        for i in (0, 1)
    ]
    batch = pack(features)
    vectors, _ = head_inputs(encoder, head, encoder.encode(batch, {}), batch, {})
    loss = batch_loss(head, head_logits(head, head.split(flat), vectors, None), batch, weights)
    assert loss.shape == ()
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(flat.grad, torch.zeros_like(flat))


def test_class_weights_shift_the_mean():
    head = Head(kind="classification", num_outputs=2, hidden_size=4, pooling="cls", style="linear",
                dropout_rate=0.1)  # fmt: skip
    ids = np.arange(2)
    batch = pack([Feature(ids, ids * 0, 0, label=0), Feature(ids, ids * 0, 1, label=1)])
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    light, heavy = (batch_loss(head, logits, batch, torch.tensor(w)) for w in ([1.0, 1], [1.0, 9]))
    assert heavy > light


def test_predictions_are_read_from_logits(open_tiny):
    tokenizer = open_tiny().base.tokenizer
    texts = [TextExample("a"), TextExample("film")]
    features = make_features(tokenizer, MOOD, texts, 8).items
    logits = [np.array([0.1, 3, 2], np.float32), np.array([0.3, -1, 0.2], np.float32)]
    assert read_predictions(MOOD, texts, features, logits) == [1, 0]
    assert read_predictions(TOPICS, texts, features, logits) == [(0, 1, 2), (0, 2)]
    assert read_predictions(SCORE, texts, features, [x[:1] for x in logits]) == pytest.approx(
        [0.1, 0.3]
    )
    words = [TokenExample(("a", "film", "bad", "good"))]
    cut = make_features(tokenizer, TAGS, words, 4).items
    assert read_predictions(TAGS, words, cut, [np.eye(3, dtype=np.float32)[[2, 0]]]) == [
        (2, 0, -1, -1)
    ]


def test_the_best_span_is_in_the_context_and_in_order(open_tiny):
    example = SpanExample("what bike", "a red bike is fast")
    feature = make_features(open_tiny().base.tokenizer, SPAN, [example], 90).items[0]
    rows = np.zeros((len(feature), 2), np.float32)
    rows[1, :] = 50  # the question's first token: never an answer
    rows[5, 0], rows[6, 1] = 9, 8  # "red" ... "bike"
    rows[7, 0], rows[4, 1] = 9, 9  # an end before its start
    score, begin, end = best_span(feature, rows)
    assert example.context[begin:end] == "red bike"
    assert score == 17
    # a whole sentence of equal logits gives something, not a crash
    assert read_predictions(SPAN, [example], [feature], [rows * 0]) != [""]


def window(length, question=3, example=0):
    """A window of ``length`` context tokens of four characters behind a question."""
    offsets = np.full((question + length + 1, 2), -1)
    begins = np.arange(length) * 5
    offsets[question:-1] = np.stack([begins, begins + 4], axis=1)
    ids = np.zeros(len(offsets), np.int64)
    return Feature(ids, ids, example, offsets=offsets)


def best_span_by_loops(feature, rows):
    """The standard evaluation as it is usually told: two loops over the n best."""
    inside = [i for i, (begin, _) in enumerate(feature.offsets) if begin >= 0]
    starts, ends = (sorted(inside, key=lambda i: (-rows[i, k], i))[:N_BEST] for k in (0, 1))
    best = (-np.inf, 0, 0)
    for start in starts:
        for end in ends:
            score = float(rows[start, 0] + rows[end, 1])
            if start <= end and end - start + 1 <= MAX_ANSWER_TOKENS and score > best[0]:
                best = (score, int(feature.offsets[start, 0]), int(feature.offsets[end, 1]))
    return best


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 60),
    st.integers(0, 5),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 3, 1000]),  # few different logits: many ties
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_the_best_span_is_that_of_the_double_loop(length, question, seed, values, infinite):
    feature = window(length, question)
    random = np.random.default_rng(seed)
    rows = random.integers(0, values, (len(feature), 2)).astype(np.float32) / 7
    rows[random.random(rows.shape) < infinite] = -np.inf
    assert best_span(feature, rows) == best_span_by_loops(feature, rows)


def test_an_answer_has_at_most_thirty_tokens_and_comes_from_the_twenty_best():
    feature = window(100, question=0)
    rows = np.zeros((101, 2), np.float32)
    rows[10, 0], rows[40, 1], rows[39, 1] = 9, 9, 5  # tokens 10 to 39 are thirty
    assert best_span(feature, rows) == (14, 50, 39 * 5 + 4)
    # twenty better starts behind every good end: token 10 is not looked at any more
    rows[60:80, 0] = 20
    assert best_span(feature, rows) == (-np.inf, 0, 0)


def test_the_answer_of_a_long_context_is_the_best_of_all_its_windows():
    example = SpanExample("what", "".join(f"{i:04} " for i in range(40)))
    other = SpanExample("what", "zero")
    features = [window(40), window(4, example=1), window(40)]
    rows = [np.zeros((len(f), 2), np.float32) for f in features]
    rows[0][5] = 3, 3
    rows[1][3] = 1, 1
    rows[2][9] = 4, 4
    # [CLS] and the question never answer, however high they score
    rows[2][0] = 50, 50
    assert read_predictions(SPAN, [example, other], features, rows) == ["0006", "zero"]
    (begin, end), place = read_spans([example, other], features, rows)
    assert (example.context[begin:end], place) == ("0006", (0, 4))
    assert read_spans([example], [], []) == [(0, 0)]


def test_pooling_that_the_base_lacks_is_refused(open_tiny):
    with pytest.raises(UsageError, match="no pretrained pooler"):
        make_head(MOOD, open_tiny("roberta"), "pooler")
    with pytest.raises(UsageError, match="not one of"):
        make_head(MOOD, open_tiny(), "max")
    assert make_head(MOOD, open_tiny("roberta"), "mean").style == "linear"
