"""Methods of the peft library: trained here as all others, and equal to peft on transformers."""

import json
import sys
import warnings

import pytest
import torch
from test_training import MOOD, finish, make_lane, make_trainer, mood_split, run

import bitfit
from bitfit.base import encoder_tensors, load_base
from bitfit.batches import pack
from bitfit.errors import BitfitError, MissingExtra, TrainingInterrupted, UsageError
from bitfit.terms import FAMILIES
from bitfit.training.adapters import AdapterMethod
from bitfit.training.methods import make_method
from bitfit.training.settings import PEFT_METHODS, TrainConfig, rates_to_try
from bitfit.training.train import StepDone, Trainer

pytest.importorskip("peft")
FAMILIES_TRIED = ("bert", "roberta", "distilbert", "albert", "deberta-v2")


def shaken(trainer, seed=0):
    """Move every number a little, so that no adapter is neutral."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in trainer.method.tensors:
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
    return trainer


def of_peft(checkpoint, family, config, tensors):
    """transformers' own model with peft's own wrapping and these adapters."""
    import peft
    from transformers import AutoModel

    model = AutoModel.from_pretrained(checkpoint(family), attn_implementation="eager").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, of transformers' names
        model = peft.get_peft_model(model, config)
    names = set(peft.get_peft_model_state_dict(model))
    result = peft.set_peft_model_state_dict(model, dict(tensors))
    assert not result.unexpected_keys
    assert names == set(tensors)
    return model.eval()


@pytest.mark.parametrize("method", PEFT_METHODS)
@pytest.mark.parametrize("family", FAMILIES_TRIED)
def test_packed_hidden_states_are_those_of_peft_on_padded_transformers(
    family, method, open_tiny, checkpoint
):
    encoder = open_tiny(family)
    trainer = shaken(make_trainer(encoder, method=method))
    features = mood_split(encoder, 7).features.items
    with torch.no_grad():
        found = encoder.encode(pack(features), {})
    config = of_description(trainer.method.description)
    theirs = of_peft(checkpoint, family, config, trainer.method.named())
    width = max(map(len, features))
    ids = torch.zeros(len(features), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, feature in enumerate(features):
        ids[i, : len(feature)] = torch.from_numpy(feature.input_ids)
        mask[i, : len(feature)] = 1
    with torch.no_grad():
        hidden = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
        plain = open_tiny(family).encode(pack(features), {})
    torch.testing.assert_close(found, hidden[mask.bool()], atol=1e-5, rtol=1e-5)
    assert (found - plain).abs().max() > 1e-2


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_a_fresh_adapter_is_the_base_and_only_adapters_and_head_are_trained(method, open_tiny):
    encoder = open_tiny()
    features = mood_split(encoder, 7).features.items
    plain = encoder.encode(pack(features), {})
    trainer = make_trainer(encoder, method=method)
    trainer._refill()
    with torch.no_grad():
        assert torch.equal(encoder.encode(pack(features), {}), plain)
    trained = [p for p in encoder.model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} | {id(trainer.method.flat)} == {
        id(p) for p in trainer.method.tensors
    }
    next(trainer.run())
    assert not torch.equal(trainer.method.flat, trainer.method.read(0)[0])


@pytest.mark.parametrize(
    ("method", "count"),
    [
        ("peft:lora", 2 * 2 * (32 * 8 + 8 * 32)),  # query and value of two layers
        ("peft:ia3", 2 * (32 + 32 + 64)),  # keys, values, the feed-forward layer's inside
        ("peft:layernorm", 5 * 2 * 32),  # two in each layer, one of the embeddings
    ],
)
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_as_many_values_are_trained_as_the_method_has(family, method, count, open_tiny):
    trainer = make_trainer(open_tiny(family), method=method)
    assert trainer.method.encoder_count(trainer.lanes[0].layout) == count


def test_ia3_leaves_the_attention_output_alone(open_tiny):
    """peft's own mapping for BERT takes it too: its "output.dense" matches by the ending."""
    method = make_trainer(open_tiny(), method="peft:ia3").method
    assert {path.partition("layer.")[2][2:] for path in method.modules} == {
        "attention.self.key", "attention.self.value", "output.dense"
    }  # fmt: skip
    feedforward = {path for path, m in method.modules.items() if m.is_feedforward}
    assert feedforward == {p for p in method.modules if p.endswith("output.dense")}


def test_lora_is_r_8_alpha_16_without_dropout_and_begins_as_peft_lets_it(open_tiny):
    trainer = make_trainer(open_tiny(), method="peft:lora", seed=3)
    trainer._refill()
    for module in trainer.method.modules.values():
        assert (module.r["default"], module.scaling["default"]) == (8, 2.0)
        assert isinstance(module.lora_dropout["default"], torch.nn.Identity)
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        assert not b.any()
        assert 0.8 < a.abs().max() * 32**0.5 <= 1  # uniform, as the first numbers of a Linear
        assert a.std().item() == pytest.approx((3 * 32) ** -0.5, rel=0.1)


@pytest.mark.parametrize("method", PEFT_METHODS)
@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_the_base_comes_back_bit_for_bit(family, method, open_tiny, checkpoint):
    encoder = open_tiny(family)
    modules = dict(encoder.model.named_modules())
    trainer = make_trainer(encoder, method=method)
    finish(trainer)
    trainer.method.uninstall()
    assert dict(encoder.model.named_modules()) == modules  # the very same objects
    assert not hasattr(encoder.model, "peft_config")
    fresh = load_base(checkpoint(family))
    after = encoder_tensors(encoder.model, encoder.pooler)
    before = encoder_tensors(fresh.model, fresh.pooler)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(p.requires_grad or p.grad is not None for p in encoder.model.parameters())


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_runs_depend_on_their_seed_and_not_on_torchs_generator(method, open_tiny):
    def numbers(seed, other):
        torch.manual_seed(other)
        trainer = make_trainer(open_tiny(), method=method, seed=seed)
        state = torch.get_rng_state()
        best = finish(trainer).best
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([t.flatten() for t in best])

    first = numbers(1, 0)
    assert torch.equal(first, numbers(1, 5))
    assert not torch.equal(first, numbers(2, 0))


@pytest.mark.parametrize("method", PEFT_METHODS)
@pytest.mark.parametrize("stop", [1, 4])
def test_an_adapter_run_resumes_to_the_same_numbers(stop, method, open_tiny, tmp_path):
    expected = finish(make_trainer(open_tiny(), method=method))
    first = make_trainer(open_tiny(), tmp_path / "c", method=method)
    for event in first.run():
        if isinstance(event, StepDone) and event.step == stop:
            first.save()
            break
    second = make_trainer(open_tiny(), tmp_path / "c", method=method)
    assert second.resume()
    found = finish(second)
    assert found.progress.history == expected.progress.history
    for a, b in zip(found.best, expected.best, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_low_memory_gives_the_same_numbers(method, open_tiny):
    def best(low_memory):
        encoder = open_tiny()
        encoder.low_memory = low_memory
        return finish(make_trainer(encoder, method=method, epochs=1)).best

    for a, b in zip(best(True), best(False), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_adapters_learn_and_stay_fp32_on_a_bf16_base(method, open_tiny):
    options = {"epochs": 25, "learning_rate": 3e-2, "patience": 0, "method": method}
    lane = finish(make_trainer(open_tiny(), **options))
    assert lane.progress.best_score >= 0.9
    encoder = open_tiny(dtype=torch.bfloat16)
    trainer = make_trainer(encoder, **options)
    assert finish(trainer).progress.best_score >= 0.8
    assert {t.dtype for t in trainer.method.tensors} == {torch.float32}


def test_lanes_of_several_rates_and_seeds_go_one_after_another(open_tiny):
    lanes = lambda encoder: [  # noqa: E731
        make_lane(encoder, method="peft:lora", seed=seed, learning_rate=rate)
        for seed, rate in ((0, 1e-2), (1, 3e-3))
    ]
    encoder = open_tiny()
    both = lanes(encoder)
    method = make_method(encoder, both)
    method.install()
    list(Trainer(encoder=encoder, method=method, lanes=both).run())
    method.uninstall()
    for lane, alone in zip(both, lanes(encoder), strict=True):
        method = make_method(encoder, [alone])
        method.install()
        list(Trainer(encoder=encoder, method=method, lanes=[alone]).run())
        method.uninstall()
        assert all(torch.equal(a, b) for a, b in zip(lane.best, alone.best, strict=True))
    with pytest.raises(UsageError, match="one run at a time"):
        make_method(encoder, both, 2)
    mixed = [make_lane(encoder, method=m) for m in ("peft:lora", "peft:ia3")]
    with pytest.raises(UsageError, match="share method, pooling, or come alone"):
        make_method(encoder, mixed)


def test_a_family_without_names_is_refused_and_has_layernorm_tuning_all_the_same(open_tiny):
    encoder = open_tiny("modernbert")
    for method in ("peft:lora", "peft:ia3"):
        with pytest.raises(UsageError, match="family 'modernbert' is not known; it is for bert"):
            make_trainer(encoder, method=method)
    assert "modernbert" not in FAMILIES
    method = make_trainer(encoder, method="peft:layernorm").method
    assert isinstance(method, AdapterMethod)
    assert method.parameters
    assert all(name.endswith("weight") for name in method.parameters)  # it has no biases
    method.uninstall()


def test_each_method_has_four_rates():
    for method in PEFT_METHODS:
        rates = rates_to_try(method)
        assert len(rates) == 4
        assert list(rates) == sorted(rates)
        TrainConfig(method=method)


# --- the whole run -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_a_run_is_saved_under_pefts_names_with_head_and_note(method, checkpoint, tickets, tmp_path):
    from safetensors import safe_open

    out = tmp_path / "task.safetensors"
    outcome = run(checkpoint, tickets, out=out, method=method, epochs=2)
    with safe_open(out, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        note = json.loads(file.metadata()["bitfit_adapter"])
    heads = {name: tensors.pop(name) for name in list(tensors) if name.startswith("head.")}
    assert sum(t.numel() for t in heads.values()) == outcome.lane.head.size
    report = outcome.to_json()
    assert sum(t.numel() for t in tensors.values()) == report["trainable"]["encoder"]
    assert note["recipe"]["method"] == method
    assert note["task"] == outcome.file.task.name
    model = of_peft(
        checkpoint, "bert", of_description(note["adapter"]), tensors
    )  # checks the names
    assert model is not None
    with pytest.raises(BitfitError, match="not a bitfit task file"):
        bitfit.TaskFile.load(out)
    run(checkpoint, tickets, out=out, method=method, epochs=1)  # its own file may be replaced


def of_description(description):
    import peft

    options = dict(description)
    return getattr(peft, options.pop("class"))(**options)


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_an_interrupted_adapter_run_resumes_to_the_same_bytes(
    method, checkpoint, tickets, tmp_path
):
    run(checkpoint, tickets, out=tmp_path / "whole", method=method, epochs=2)
    steps = iter(range(100))
    with pytest.raises(TrainingInterrupted):
        run(
            checkpoint, tickets, out=tmp_path / "part", method=method, epochs=2,
            should_stop=lambda: next(steps) == 7,
        )  # fmt: skip
    assert (tmp_path / "part.checkpoint").exists()
    run(checkpoint, tickets, out=tmp_path / "part", method=method, epochs=2, resume=True)
    assert (tmp_path / "part").read_bytes() == (tmp_path / "whole").read_bytes()


def test_without_peft_its_extra_is_named_before_anything_is_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    for method in PEFT_METHODS:
        with pytest.raises(MissingExtra, match=rf"{method}.*pip install 'bitfit\[peft\]'"):
            bitfit.finetune("no such base", data="no-such.csv", method=method)


def test_the_rates_of_an_adapter_are_searched(checkpoint, tickets):
    outcome = run(checkpoint, tickets, method="peft:ia3", learning_rate="auto", epochs=1)
    tried = [t["learning_rate"] for t in outcome.file.recipe["rates_tried"]]
    assert tried == list(rates_to_try("peft:ia3"))
    assert outcome.file.task.labels == ("complaint", "praise")
    assert MOOD.kind == outcome.file.task.kind
