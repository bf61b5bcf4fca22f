from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast, DebertaV2Config

from bitfit.errors import TaskFileError, WrongBase, WrongTokenizer
from bitfit.identity import (
    BaseIdentity,
    check_base,
    check_tokenizer,
    hash_config,
    identify_base,
    tokenizer_hash,
)

CONFIG = BertConfig(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20
)


@pytest.fixture(scope="module")
def tensors():
    torch.manual_seed(0)
    return dict(BertModel(CONFIG).state_dict())


def identity(tensors, name="tiny", config=CONFIG):
    return identify_base(tensors, config, name, None)


def test_identity_does_not_depend_on_order_strides_or_name(tensors):
    other = {key: t.mT.contiguous().mT if t.ndim == 2 else t for key, t in [*tensors.items()][::-1]}
    assert replace(identity(other, "x"), name="tiny") == identity(tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, torch.bool])
def test_tensors_of_every_type_count_as_they_are_stored(tensors, dtype):
    key = "embeddings.word_embeddings.weight"
    changed = tensors | {key: tensors[key].to(dtype)}
    assert identity(changed).sha256 != identity(tensors).sha256
    assert identity(changed) == identity(changed)


def test_hash_is_the_documented_one():
    found = identity({"b": torch.tensor([[1.5, 2.0]]), "a": torch.tensor(3, dtype=torch.int64)})
    a = sha256(b'["a","I64",[]]\n' + np.int64(3).tobytes())
    b = sha256(b'["b","F32",[1,2]]\n' + np.array([1.5, 2], np.float32).tobytes())
    assert found.digests == a.hexdigest()[:8] + b.hexdigest()[:8]
    assert found.sha256 == sha256(a.digest() + b.digest()).hexdigest()


def test_name_of_a_local_directory_tells_nothing_of_the_machine(tmp_path, tensors):
    (tmp_path / "my-base").mkdir()
    shown = {
        str(tmp_path / "my-base"): "my-base",
        "/gone/away/": "away",
        "../x/y": "y",
        "~/bases/b": "b",
        "C:\\models\\bert": "bert",
        "google/bert-base": "google/bert-base",
        "minilm": "minilm",
    }
    assert {name: identity(tensors, name).name for name in shown} == shown


def test_config_hash_takes_what_changes_the_encoder_only():
    base = hash_config(CONFIG)
    values = CONFIG.to_dict()

    class Config:
        def __init__(self, **changes):
            self.changes = changes

        def to_dict(self):
            return values | self.changes

    harmless = {
        "transformers_version": "9",
        "_name_or_path": "/home/me",
        "dtype": torch.bfloat16,
        "architectures": ["X"],
        "id2label": {0: "a", 1: "b", 2: "c"},
        "num_labels": 3,
        "problem_type": "regression",
        "output_attentions": True,
        "hidden_dropout_prob": 0.3,
        "a_field_of_the_future": None,
    }
    assert hash_config(Config(**harmless)) == base
    for key, value in {"hidden_act": "relu", "layer_norm_eps": 1e-5, "hidden_size": 12}.items():
        assert hash_config(Config(**{key: value})) != base
    switch = [DebertaV2Config(position_biased_input=flag) for flag in (True, False)]
    assert hash_config(switch[0]) != hash_config(switch[1])


def test_identity_survives_json_and_refuses_anything_else(tensors):
    good = identity(tensors).to_json()
    assert BaseIdentity.from_json(good) == identity(tensors)
    for bad in (
        None,
        [],
        good | {"more": 1},
        good | {"name": 3},
        good | {"sha256": "A" * 64},
        good | {"digests": good["digests"][:-1]},
        good | {"digests": good["digests"].upper() + "G" * 8},
        {key: value for key, value in good.items() if key != "revision"},
    ):
        with pytest.raises(TaskFileError, match="base"):
            BaseIdentity.from_json(bad)


def test_wrong_base_names_the_first_tensor_that_differs(tensors):
    names = sorted(tensors)
    changed = dict(tensors)
    for name in names[3:5]:
        changed[name] = tensors[name].clone()
        changed[name].view(-1)[0] += 1e-3
    wanted, have = identity(tensors), identity(changed, "other")
    with pytest.raises(WrongBase) as caught:
        check_base(wanted, have, names)
    message = str(caught.value)
    assert f"tensor {names[3]!r} differs" in message
    assert f"2 of {len(names)} tensors" in message
    assert wanted.short in message
    assert have.short in message
    assert wanted.tensor_digests[3] in message
    assert have.tensor_digests[3] in message


def test_wrong_base_names_configuration_or_number_of_tensors(tensors):
    names = sorted(tensors)
    other = BertConfig(**{**CONFIG.to_dict(), "hidden_act": "relu"})
    with pytest.raises(WrongBase, match="configurations differ"):
        check_base(identity(tensors), identity(tensors, config=other), names)
    fewer = {name: tensors[name] for name in names[1:]}
    with pytest.raises(WrongBase, match=f"{len(fewer)} tensors, {len(names)} were expected"):
        check_base(identity(tensors), identity(fewer), names[1:])
    half = {name: t.bfloat16() for name, t in tensors.items()}
    with pytest.raises(WrongBase, match="stored in another precision"):
        check_base(identity(tensors), identity(half), names)


def test_the_same_weights_under_another_name_are_the_same_base(tensors):
    check_base(identity(tensors, "a"), identity(tensors, "b"), sorted(tensors))


def make_tokenizer(tmp_path, words=("hello", "world", "##s", "1"), **options):
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(vocab), encoding="utf-8")
    return BertTokenizerFast(str(path), **options)


def test_tokenizer_hash_survives_saving_and_truncation_settings(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    expected = tokenizer_hash(tokenizer)
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = BertTokenizerFast.from_pretrained(tmp_path / "saved", model_max_length=7)
    loaded("hello world", truncation=True, max_length=3, padding="max_length")
    assert tokenizer_hash(loaded) == expected
    check_tokenizer(tokenizer_hash(loaded), expected)


def test_tokenizer_that_splits_otherwise_is_refused(tmp_path):
    expected = tokenizer_hash(make_tokenizer(tmp_path))
    added = make_tokenizer(tmp_path)
    added.add_tokens(["<user>"])
    for other in (
        make_tokenizer(tmp_path, ("world", "hello", "##s", "1")),
        make_tokenizer(tmp_path, ("hello", "world", "##s", "1", "the", "THE"), do_lower_case=False),
        added,
    ):
        with pytest.raises(WrongTokenizer, match=expected[:8]):
            check_tokenizer(expected, tokenizer_hash(other))
