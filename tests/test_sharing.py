import pytest
import torch
from tiny import make_task

from bitfit.batches import make_features
from bitfit.held import HeldTasks
from bitfit.tasks import TextExample

TEXTS = ["good film", "the order is late now", "bad"]


def hold(encoder, terms, count=3):
    tasks = HeldTasks(encoder)
    held = []
    for i in range(count):
        file = make_task(encoder, seed=i, terms=terms, pooling="mean")
        held.append(tasks.hold(f"t{i}", tasks.fit(file), file.bias))
    return tasks, held


def answers(tasks, held, texts):
    task = held[0].fitting.task
    examples = [TextExample(text) for text in texts]
    features = make_features(tasks.encoder.base.tokenizer, task, examples, 20).items
    pairs = [(f, h) for h in held for f in features]
    return tasks.logits([f for f, _ in pairs], [h for _, h in pairs]), pairs


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "albert"])
@pytest.mark.parametrize("terms", ["all@1", "output@1", "all"])
def test_tasks_on_one_text_answer_as_each_alone(family, terms, open_tiny, monkeypatch):
    if family == "albert":
        terms = terms.partition("@")[0]
    encoder = open_tiny(family)
    tasks, held = hold(encoder, terms)
    seen = []
    inner = encoder.model.get_input_embeddings()
    inner.register_forward_hook(lambda module, args, out: seen.append(out.shape[-2]))
    found, pairs = answers(tasks, held, TEXTS)
    shares = "@" in terms
    assert seen == [sum(len(f) for f, _ in pairs[: len(TEXTS)]) * (1 if shares else 3)]
    for (feature, task), values in zip(pairs, found, strict=True):
        [alone] = tasks.logits([feature], [task])
        assert values == pytest.approx(alone, abs=1e-5)


def test_frozen_tasks_share_the_whole_encoder(open_tiny):
    encoder = open_tiny()
    tasks = HeldTasks(encoder)
    held = []
    for i in range(3):
        file = make_task(encoder, seed=i, scale=0.0)
        held.append(tasks.hold(f"t{i}", tasks.fit(file), file.bias))
    found, pairs = answers(tasks, held, TEXTS)
    assert encoder.share([f for f, _ in pairs], []).depth == 2
    for (feature, task), values in zip(pairs, found, strict=True):
        [alone] = tasks.logits([feature], [task])
        assert values == pytest.approx(alone, abs=1e-5)


def test_nothing_is_shared_where_it_does_not_hold(open_tiny):
    features = [None]
    for encoder in (open_tiny(packed=False), open_tiny("deberta-v2"), open_tiny("albert")):
        assert encoder.share(features, []) is None or not encoder.layers.modules
    encoder = open_tiny()
    assert encoder.layers.depth(["embeddings.LayerNorm"]) == 0
    assert encoder.layers.depth(["pooler.dense"]) == 2
    assert encoder.layers.depth(["encoder.layer.1.output.dense"]) == 1


def test_hooks_are_gone_after_a_pass_that_failed(open_tiny, monkeypatch):
    encoder = open_tiny()
    tasks, held = hold(encoder, "all@1")
    layer = encoder.layers.modules[1]
    monkeypatch.setattr(layer, "forward", None)
    with pytest.raises(TypeError):
        answers(tasks, held, TEXTS)
    assert not layer._forward_pre_hooks
    assert encoder.state.index is None
    monkeypatch.undo()
    assert torch.isfinite(torch.tensor(answers(tasks, held, TEXTS)[0][0])).all()
