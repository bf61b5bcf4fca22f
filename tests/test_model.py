import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification

import bitfit
from bitfit.calibration import probabilities
from bitfit.errors import TaskFileError, UnknownTask, UsageError, WrongBase, WrongTokenizer
from bitfit.tasks import TextExample, TokenExample

TEXTS = ["good film", "bad bike", "the order is late", "very nice"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def files(folder, checkpoint):
    """Four tasks of different kinds, labels and terms on one base."""
    random = np.random.default_rng(0)
    made = {}
    for name, kind, terms, labels in (
        ("mood", "classification", "all", ["bad", "good"]),
        ("topic", "classification", "query,b_m2", ["a", "b", "c", "d"]),
        ("score", "regression", "all,pooler", None),
        ("words", "tokens", "all@1", ["x", "y"]),
    ):
        rows = []
        for i in range(24):
            words = random.choice("good bad film bike late nice".split(), 3).tolist()
            if kind == "tokens":
                rows.append({"words": words, "labels": [labels[len(w) % 2] for w in words]})
            else:
                label = labels[i % len(labels)] if labels else i % 7 + 0.5
                rows.append({"text": " ".join(words), "label": label})
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        made[name] = folder / f"{name}.bitfit.safetensors"
        bitfit.finetune(
            checkpoint(), data=path, kind=kind, terms=terms, out=made[name], epochs=3,
            learning_rate=2e-2, dtype="fp32", max_length=16,
        )  # fmt: skip
    return made


def test_a_mixed_batch_equals_each_task_alone(files, checkpoint):
    """Promise 3 through the whole of prediction: kinds, label counts and terms mixed."""
    model = bitfit.load(files.values(), base=checkpoint())
    names = [n for n in files for _ in TEXTS]
    mixed = model.predict(TEXTS * len(files), task=names)
    reverse = model.predict((TEXTS * len(files))[::-1], task=names[::-1])[::-1]
    for i, (name, text) in enumerate(zip(names, TEXTS * len(files), strict=True)):
        alone = bitfit.load(files[name], base=checkpoint()).predict([text])[0]
        for found in (mixed[i], reverse[i]):
            assert found.label == alone.label
            assert found.labels == alone.labels
            assert found.value == pytest.approx(alone.value, abs=1e-5)
            assert found.scores == pytest.approx(alone.scores, abs=1e-5)


def test_the_same_logits_come_from_a_fresh_process(files, checkpoint):
    """Promise 5."""
    code = (
        "import sys, json, bitfit\n"
        "model = bitfit.load(sys.argv[1], base=sys.argv[2], dtype='fp32')\n"
        "print(json.dumps([p.to_json() for p in model.predict(json.loads(sys.argv[3]))]))"
    )
    command = [sys.executable, "-c", code, str(files["mood"]), checkpoint(), json.dumps(TEXTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    here = bitfit.load(files["mood"], base=checkpoint(), dtype="fp32").predict(TEXTS)
    assert json.loads(done.stdout.splitlines()[-1]) == [p.to_json() for p in here]


def test_the_files_probes_hold(files, checkpoint):
    for path in files.values():
        file = bitfit.TaskFile.load(path)
        model = bitfit.load(path, base=checkpoint(), dtype="fp32")
        differences = model.check_probes(file.task.name)
        assert len(differences) == 3
        assert max(differences) < 1e-5


def test_tasks_are_added_and_removed_without_a_trace(files, checkpoint):
    model = bitfit.load(files["mood"], base=checkpoint())
    before = model.predict(TEXTS)
    model.add(files["topic"])
    model.add(files["topic"], name="again")
    assert list(model.tasks) == ["mood", "topic", "again"]
    assert [p.scores for p in model.predict(TEXTS, task="topic")] == [
        pytest.approx(p.scores) for p in model.predict(TEXTS, task="again")
    ]
    model.remove("topic")
    model.remove("again")
    assert model.predict(TEXTS) == before
    with pytest.raises(UnknownTask):
        model.remove("topic")


def test_an_unknown_task_is_an_error_and_never_the_base(files, checkpoint):
    model = bitfit.load(files.values(), base=checkpoint())
    with pytest.raises(UnknownTask, match="Did you mean 'mood'"):
        model.predict(["good"], task="moood")
    with pytest.raises(UnknownTask):
        model.predict(["good", "bad"], task=["mood", "nothing"])
    with pytest.raises(UsageError, match="say which task"):
        model.predict(["good"])


def test_low_confidence_abstains(files, checkpoint):
    model = bitfit.load(files["topic"], base=checkpoint())
    sure = model.predict(TEXTS)
    assert all(p.label for p in sure)
    unsure = model.predict(TEXTS, min_confidence=1.0)
    assert [p.label for p in unsure] == [None] * 4
    assert all(p.to_json()["abstained"] for p in unsure)
    assert [p.confidence for p in unsure] == [p.confidence for p in sure]
    for p in sure:
        assert sum(p.scores.values()) == pytest.approx(1)


def test_words_below_the_limit_get_no_label(files, checkpoint):
    file = dataclasses.replace(bitfit.TaskFile.load(files["words"]), temperature=3.0)
    model = bitfit.Model(bitfit.open_encoder(checkpoint(), "fp32"))
    model.add(file)
    words = "good bad film bike late nice".split() * 4  # 14 of them fit in 16 tokens
    sure = model.predict([" ".join(words)])[0]
    _, [logits] = model.logits([TokenExample(tuple(words))], ["words"])
    assert sure.confidences[:14] == pytest.approx(probabilities(logits, 3.0).max(axis=1))
    assert sure.confidences[14:] == (0.0,) * 10
    assert sure.labels[14:] == ("",) * 10
    limit = sorted(sure.confidences[:14])[7]
    unsure = model.predict([" ".join(words)], min_confidence=limit)[0]
    assert unsure.confidences == sure.confidences
    assert unsure.labels == tuple(
        label if p >= limit else "" for label, p in zip(sure.labels, sure.confidences, strict=True)
    )
    assert unsure.words == tuple(words)
    assert 0 < unsure.text.count("/?") - 10 < 14


def test_of_several_labels_those_below_the_limit_are_left_out(files, checkpoint):
    file = bitfit.TaskFile.load(files["topic"])
    task = dataclasses.replace(file.task, kind="multilabel", metrics=("f1_micro",))
    model = bitfit.Model(bitfit.open_encoder(checkpoint(), "fp32"))
    model.add(dataclasses.replace(file, task=task, temperature=None), "raw")
    model.add(dataclasses.replace(file, task=task, temperature=2.0), "calm")
    raw, calm = (model.predict(TEXTS, task=name) for name in ("raw", "calm"))
    assert [p.labels for p in raw] == [p.labels for p in calm]  # one half stays one half
    assert any(p.labels for p in raw)
    for a, b in zip(raw, calm, strict=True):
        for label, p in a.scores.items():
            assert math.log(p / (1 - p)) / 2 == pytest.approx(
                math.log(b.scores[label] / (1 - b.scores[label])), abs=1e-4
            )
    limit = max(p for answer in calm for p in answer.scores.values())
    limited = model.predict(TEXTS, task="calm", min_confidence=limit)
    assert sum(len(p.labels) for p in limited) == 1
    assert [p.scores for p in limited] == [p.scores for p in calm]


def test_inputs_that_do_not_fit_are_refused(files, checkpoint):
    model = bitfit.load(files["mood"], base=checkpoint())
    with pytest.raises(UsageError, match="takes one text, got a pair"):
        model.predict([("a", "b")])
    with pytest.raises(UsageError, match="one string"):
        model.predict("good film")
    with pytest.raises(UsageError, match="expected 0 to 1"):
        model.predict(["good"], min_confidence=2)
    with pytest.raises(UsageError, match="2 texts, but 1 task"):
        model.predict(["a", "b"], task=["mood"])
    with pytest.raises(UsageError, match="no answers"):
        model.evaluate([TextExample("good")])
    assert model.predict([]) == []


def test_another_base_is_refused_by_the_tensor_that_differs(files, checkpoint):
    with pytest.raises(WrongBase, match=r"embeddings\.LayerNorm\.bias"):
        bitfit.load(files["mood"], base=checkpoint("bert", 1))
    with pytest.raises(WrongBase):
        bitfit.load(files["mood"], base=checkpoint("roberta"))


def test_a_single_changed_bias_of_the_base_is_noticed(files, checkpoint, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    changed = shutil.copytree(checkpoint(), tmp_path / "changed")
    tensors = load_file(changed / "model.safetensors")
    tensors["encoder.layer.1.output.dense.bias"][3] += 1e-3
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    with pytest.raises(WrongBase, match=r"encoder\.layer\.1\.output\.dense\.bias"):
        bitfit.load(files["mood"], base=str(changed))


def test_another_tokenizer_is_refused(files, checkpoint, tmp_path):
    import shutil

    changed = shutil.copytree(checkpoint(), tmp_path / "changed")
    text = (changed / "tokenizer.json").read_text(encoding="utf-8")
    path = changed / "tokenizer.json"
    path.write_text(text.replace('"bike"', '"boat"'), encoding="utf-8")
    with pytest.raises(WrongTokenizer):
        bitfit.load(files["mood"], base=str(changed))


def test_a_head_of_other_shapes_is_refused(files, checkpoint):
    file = bitfit.TaskFile.load(files["mood"])
    head = {k: torch.cat([v, v], -1) if v.ndim == 2 else v for k, v in file.head.items()}
    model = bitfit.Model(bitfit.open_encoder(checkpoint()))
    with pytest.raises(TaskFileError, match="head"):
        model.add(dataclasses.replace(file, head=head))
    assert list(model.tasks) == []
    assert len(model.bank) == 0


def test_evaluation_repeats_the_score_in_the_file(files, folder, checkpoint):
    config = bitfit.DataConfig(data=folder / "mood.jsonl")
    dev = bitfit.read_dataset(config).splits["dev"]
    model = bitfit.load(files["mood"], base=checkpoint(), dtype="fp32")
    assert model.evaluate(dev) == pytest.approx(bitfit.TaskFile.load(files["mood"]).scores)


@pytest.mark.parametrize("storage", ["fp16", "bf16", "int8"])
def test_smaller_storage_answers_nearly_the_same(storage, files, checkpoint, tmp_path):
    file = bitfit.TaskFile.load(files["topic"])
    file.save(tmp_path / "small", dtype=storage)
    assert (tmp_path / "small").stat().st_size < files["topic"].stat().st_size
    small = bitfit.load(tmp_path / "small", base=checkpoint()).predict(TEXTS)
    exact = bitfit.load(files["topic"], base=checkpoint()).predict(TEXTS)
    for a, b in zip(small, exact, strict=True):
        assert a.scores == pytest.approx(b.scores, abs=0.05)


def test_a_text_longer_than_the_base_has_positions_is_cut(files, checkpoint, tmp_path):
    file = dataclasses.replace(bitfit.TaskFile.load(files["mood"]), max_length=4096)
    file.save(tmp_path / "long")
    model = bitfit.load(tmp_path / "long", base=checkpoint(), dtype="fp32")
    assert model.predict(["good film " * 200])[0].label in ("bad", "good")


def test_a_split_without_answers_is_refused_before_anything_is_computed(files, checkpoint):
    model = bitfit.load(files["mood"], base=checkpoint())
    model.encoder.encode = None  # type: ignore[assignment]
    with pytest.raises(UsageError, match="no answers"):
        model.evaluate([TextExample("good film")])


def test_a_model_with_fewer_layers_than_its_base_is_refused(checkpoint):
    model = BertForSequenceClassification.from_pretrained(checkpoint(), num_hidden_layers=1)
    bitfit.select_biases(model)
    task = bitfit.Task(name="mood", kind="classification", labels=("bad", "good"))
    with pytest.raises(UsageError, match=r"encoder\.layer\.1\..* is not in this model"):
        bitfit.task_from_model(model, checkpoint(), task)
