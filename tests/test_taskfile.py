from __future__ import annotations

import json
import math
import os
import pickle
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitfit.comparison import bias_change, compare, storage_loss
from bitfit.errors import (
    BitfitError,
    CorruptTaskFile,
    TaskFileError,
    UnsupportedFormat,
    UsageError,
    WrongBase,
)
from bitfit.identity import BaseIdentity
from bitfit.rounding import STORAGE_TYPES
from bitfit.storage import dump_json, hash_text, pack_safetensors
from bitfit.taskfile import (
    _FIELDS,
    MAX_BYTES,
    MAX_HEADER,
    MAX_METADATA,
    MAX_OVERHEAD,
    TaskFile,
    _file_hash,
    stretches,
)
from bitfit.tasks import Task

LAYOUT = [["query", "0-1", 8], ["output", "1", 8], ["intermediate", "0,2", 16], ["pooler", None, 8]]
N = 8 * 2 + 8 + 16 * 2 + 8
HIDDEN = 8


def make(*, labels=("no", "yes"), layout=LAYOUT, tensors=37, **changes):
    generator = torch.Generator().manual_seed(7)
    n = sum(length for *_, length in stretches(layout))
    values = {
        "task": Task(name="demo", kind="classification", labels=labels, is_pair=True),
        "bias": torch.randn(n, generator=generator) * 0.05,
        "layout": layout,
        "head": {
            "classifier.weight": torch.randn(len(labels), HIDDEN, generator=generator),
            "classifier.bias": torch.randn(len(labels), generator=generator),
        },
        "head_style": "linear",
        "pooling": "mean",
        "max_length": 128,
        "base": BaseIdentity("tiny", None, "a" * 64, "b" * 64, "0123abcd" * tensors),
        "tokenizer": "c" * 64,
        "recipe": {"recipe": "paper", "seed": 0, "learning_rate": 1e-3, "epochs": 3},
        "scores": {"accuracy": 0.872, "f1_macro": math.nan},
        "temperature": 1.25,
        "calibration": {"ece_before": 0.08, "ece_after": 0.02},
        "truncated_share": 0.0,
        "data_hash": hash_text("data"),
        "licence": "CC-BY-4.0",
        "description": 'Says "yes" or \\ "no" – 🙂',
        "probes": [{"text": "Café", "text_pair": "x", "logits": [0.1, torch.tensor(0.1).item()]}],
    }
    return TaskFile(**(values | changes))


GOOD = make().to_bytes()


def split(data):
    """The JSON header and the tensors' bytes of a file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def document(data=GOOD):
    return json.loads(split(data)[0]["__metadata__"]["bitfit"])


def forge(changes=None, tensors=None, text=None):
    """A file with a right hash but other content: an author's mistake, or an attack."""
    have = safetensors.torch.load(GOOD) | (tensors or {})
    have = {name: t for name, t in have.items() if t is not None}
    content = {k: v for k, v in (document() | (changes or {})).items() if v is not ...}
    digest = _file_hash(dump_json({**content, "sha256": ""}), have)
    return pack_safetensors(have, "bitfit", text or dump_json({**content, "sha256": digest}))


def same(a, b):
    for f in fields(TaskFile):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if f.name == "bias":
            assert torch.equal(x, y)
        elif f.name == "head":
            assert x.keys() == y.keys()
            assert all(torch.equal(x[k], y[k]) for k in x)
        elif f.name == "scores":
            assert repr(x) == repr(y)
        elif f.name == "probes":
            assert len(x) == len(y)
        else:
            assert x == y, f.name


def refused(data, message, error=CorruptTaskFile):
    with pytest.raises(error, match=message) as caught:
        TaskFile.from_bytes(data, "some/path")
    assert str(caught.value).startswith("some/path: ")
    return str(caught.value)


# --- what is kept -------------------------------------------------------------------------------


def test_fp32_round_trip_is_exact(tmp_path):
    path = tmp_path / "new" / "demo.bitfit.safetensors"
    file = make()
    file.save(path)
    loaded = TaskFile.load(path)
    same(file, loaded)
    assert loaded.n == N
    assert loaded.head_size == 2 * HIDDEN + 2
    assert loaded.score == 0.872
    probe = loaded.probes[0]
    assert torch.equal(torch.tensor(probe["logits"]), torch.tensor([0.1, 0.1]))
    assert (probe["text"], probe["text_pair"]) == ("Café", "x")


def test_round_trip_is_exact_in_a_fresh_process(tmp_path):
    path = tmp_path / "demo.bitfit.safetensors"
    make().save(path)
    code = (
        "import sys; from bitfit.taskfile import TaskFile; "
        "f = TaskFile.load(sys.argv[1]); "
        "sys.stdout.buffer.write(f.bias.numpy().tobytes() + f.head['classifier.weight']"
        ".numpy().tobytes() + f.to_bytes())"
    )
    src = str(Path(__file__).parents[1] / "src")
    found = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env=os.environ | {"PYTHONPATH": src},
        capture_output=True,
        check=True,
    ).stdout
    file = make()
    weight = file.head["classifier.weight"]
    assert found == file.bias.numpy().tobytes() + weight.numpy().tobytes() + path.read_bytes()


def test_two_writes_give_the_same_bytes_whatever_the_order_of_dictionaries(tmp_path):
    file = make()
    turned = replace(
        file,
        head=dict(reversed(file.head.items())),
        recipe=dict(reversed(file.recipe.items())),
        scores=dict(reversed(file.scores.items())),
    )
    assert file.to_bytes() == GOOD == turned.to_bytes() == TaskFile.from_bytes(GOOD).to_bytes()


def test_file_holds_no_path_time_or_host(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make().save("demo.bitfit.safetensors")
    data = Path("demo.bitfit.safetensors").read_bytes()
    for told in (str(tmp_path), str(Path.home()), str(Path(__file__).parent), socket.gethostname()):
        assert told.encode() not in data
    os.utime("demo.bitfit.safetensors", (0, 0))
    make().save("again.bitfit.safetensors")
    assert Path("again.bitfit.safetensors").read_bytes() == data


def test_a_frozen_task_has_no_biases():
    file = make(layout=[], method="frozen", terms="none")
    for dtype in STORAGE_TYPES:
        loaded = TaskFile.from_bytes(file.to_bytes(dtype))
        assert loaded.bias.shape == (0,)
        assert loaded.method == "frozen"
    assert storage_loss(file.bias, [])["int8"] == {"max_error": 0, "mean_error": 0, "bytes": 0}


@pytest.mark.parametrize(
    ("task", "style", "pooling", "head"),
    [
        (
            Task(name="r", kind="regression"), "roberta", "cls",
            {"classifier.dense.weight": (8, 8), "classifier.dense.bias": (8,),
             "classifier.out_proj.weight": (1, 8), "classifier.out_proj.bias": (1,)},
        ),
        (
            Task(name="s", kind="span"), "linear", "none",
            {"qa_outputs.weight": (2, 8), "qa_outputs.bias": (2,)},
        ),
        (
            Task(name="d", kind="multilabel", labels=("a",)), "linear", "cls",
            {"pre_classifier.weight": (8, 8), "classifier.weight": (1, 8)},
        ),
    ],
)  # fmt: skip
def test_heads_of_every_style_are_kept(task, style, pooling, head):
    tensors = {name: torch.randn(shape) for name, shape in head.items()}
    file = make(task=task, head=tensors, head_style=style, pooling=pooling)
    loaded = TaskFile.from_bytes(file.to_bytes())
    assert loaded.task == task
    assert all(torch.equal(loaded.head[name], tensors[name]) for name in head)


@pytest.mark.parametrize(
    ("dtype", "relative"), [("fp32", 0), ("fp16", 2**-11), ("bf16", 2**-8), ("int8", None)]
)
def test_each_storage_type_keeps_its_error_bound(dtype, relative):
    file = make()
    loaded = TaskFile.from_bytes(file.to_bytes(dtype))
    assert loaded.dtype == dtype
    assert loaded.bias.dtype == torch.float32
    assert torch.equal(loaded.head["classifier.weight"], file.head["classifier.weight"])
    error = (loaded.bias - file.bias).abs()
    if relative is not None:
        assert (error <= relative * file.bias.abs() + 2**-25).all()
    else:
        for _, _, start, length in stretches(LAYOUT):
            part = slice(start, start + length)
            assert error[part].max() <= file.bias[part].abs().max() / 127 / 2 * 1.001
    loss = storage_loss(file.bias, LAYOUT)[dtype]
    assert loss["max_error"] == error.max().item()
    assert loss["mean_error"] == error.mean().item()
    assert loss["bytes"] == {"fp32": 4 * N, "fp16": 2 * N, "bf16": 2 * N, "int8": N + 6 * 4}[dtype]
    assert storage_loss(loaded.bias, LAYOUT)["fp32"]["max_error"] == 0


def test_int8_keeps_sites_that_are_zero_or_tiny():
    bias = torch.zeros(N)
    bias[8:16] = 1e-45
    bias[16:24] = 3.0
    loaded = TaskFile.from_bytes(make(bias=bias).to_bytes("int8"))
    assert (loaded.bias - bias).abs().max() < 1e-6


def test_an_untrained_task_stays_exactly_zero_in_every_storage_type():
    for dtype in STORAGE_TYPES:
        loaded = TaskFile.from_bytes(make(bias=torch.zeros(N)).to_bytes(dtype))
        assert torch.equal(loaded.bias, torch.zeros(N))


@pytest.mark.parametrize(
    ("dtype", "per_value"), [("fp32", 4), ("fp16", 2), ("bf16", 2), ("int8", 1)]
)
def test_size_of_bert_base_is_n_numbers_head_and_16_kb(dtype, per_value):
    widths = {"query": 768, "key": 768, "value": 768, "attention_output": 768,
              "attention_layernorm": 768, "intermediate": 3072, "output": 768,
              "output_layernorm": 768}  # fmt: skip
    layout = [[term, "0-11", width] for term, width in widths.items()]
    head = {"classifier.weight": torch.randn(2, 768), "classifier.bias": torch.randn(2)}
    file = make(layout=layout, head=head, tensors=199)
    assert file.n == 101_376
    size = len(file.to_bytes(dtype))
    assert size <= per_value * 101_376 + 4 * (2 * 768 + 2) + 16 * 1024
    assert size <= per_value * 101_376 + 4 * (2 * 768 + 2) + 5 * 1024  # and what it is today


def test_many_labels_and_a_long_card_do_not_count_as_overhead():
    labels = tuple(f'a "quoted" label {i}' for i in range(2000))
    file = make(labels=labels, description='é\n"' * 20_000, probes=[])
    loaded = TaskFile.from_bytes(file.to_bytes())
    assert (loaded.task.labels, loaded.description) == (labels, file.description)


def test_probes_are_dropped_from_the_last_on_where_there_is_no_room():
    labels = tuple(str(i) for i in range(150))
    probe = {"text": "x", "text_pair": None, "logits": torch.randn(150).tolist()}
    file = make(labels=labels, probes=[probe | {"text": str(i)} for i in range(20)])
    data = file.to_bytes()
    kept = [p["text"] for p in TaskFile.from_bytes(data).probes]
    assert kept == [str(i) for i in range(len(kept))]
    assert 2 < len(kept) < 20
    numbers = 4 * (file.n + file.head_size)
    assert len(data) <= numbers + len(json.dumps(labels)) + 2 * 2 * 150 + MAX_OVERHEAD


# --- what cannot be stored ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": torch.zeros(N + 1)}, r"shape \[65\], the layout says \[64\]"),
        ({"bias": torch.full((N,), math.nan)}, "'bias' holds NaN"),
        ({"bias": torch.zeros(N).index_fill(0, torch.tensor(3), math.inf)}, "'bias' holds NaN"),
        ({"head": {}}, "no single output layer"),
        ({"head": {"classifier.weight": torch.zeros(3, 8)}}, "has 3 rows, task 'demo' needs 2"),
        ({"recipe": {"note": "x" * 20_000}}, "'recipe'"),
        ({"recipe": {"rate": math.inf}}, "JSON"),
        ({"recipe": {"path": Path("/x")}}, "JSON"),
        ({"recipe": {"x": float("nan")}}, "JSON"),
        ({"description": "\ud800"}, "surrogates"),
        ({"description": "x" * MAX_METADATA}, "more than 524288 bytes of metadata"),
        ({"max_length": 0}, "max_length"),
        ({"max_length": 12.0}, "max_length"),
        ({"temperature": -1.0}, "temperature"),
        ({"truncated_share": 1.5}, "truncated_share"),
        ({"tokenizer": "abc"}, "tokenizer"),
        ({"method": "full"}, "method"),
        ({"pooling": ""}, "pooling"),
        ({"pooling": "max"}, "'pooling': expected one of pooler, cls, mean"),
        ({"pooling": "none"}, "pooling"),
        ({"head_style": "roberta"}, "'head_style': expected one of linear"),
        ({"calibration": {"ece_before": "low"}}, "calibration"),
        ({"probes": [{"text": 1, "logits": []}]}, "probes"),
        ({"scores": {"accuracy": math.inf}}, "JSON"),
    ],
)
def test_what_cannot_be_stored_is_a_usage_error(changes, message):
    with pytest.raises(UsageError, match=message):
        make(**changes).to_bytes()


def test_a_bad_layout_is_a_usage_error():
    with pytest.raises(UsageError, match="bad layers"):
        replace(make(), layout=[["query", "0-x", 8]]).to_bytes()


def test_a_value_too_large_for_fp16_is_refused():
    with pytest.raises(UsageError, match="does not fit into fp16"):
        make(bias=torch.full((N,), 70_000.0)).to_bytes("fp16")
    with pytest.raises(UsageError, match="'fp8' is not one of"):
        make().to_bytes("fp8")
    assert storage_loss(torch.full((N,), 70_000.0), LAYOUT)["fp16"]["max_error"] == math.inf


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "demo.bitfit.safetensors"
    make().save(path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(BitfitError, match="No space left"):
        make(temperature=2.0).save(path)
    assert path.read_bytes() == GOOD
    assert os.listdir(tmp_path) == [path.name]


# --- refusals -----------------------------------------------------------------------------------


def test_a_file_cut_anywhere_is_refused():
    step = max(1, len(GOOD) // 300)
    for length in [*range(40), *range(40, len(GOOD), step), len(GOOD) - 1]:
        refused(GOOD[:length], "truncated|damaged|no safetensors header")


def test_a_file_with_anything_behind_it_is_refused():
    refused(GOOD + b"\0", "truncated or damaged")
    refused(GOOD + GOOD, "truncated or damaged")


@settings(max_examples=600, deadline=None, database=None, derandomize=True)
@given(st.integers(0, 8 * len(GOOD) - 1))
def test_any_flipped_bit_is_refused(bit):
    flipped = bytearray(GOOD)
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(TaskFileError):
        TaskFile.from_bytes(bytes(flipped))


def test_every_flipped_bit_of_length_header_and_padding_is_refused():
    header = 8 + int.from_bytes(GOOD[:8], "little")
    begin = GOOD.index(b'{\\"base')
    end = GOOD.rindex(b"truncated_share") + 20
    for place in [*range(begin + 8), *range(end, header)]:
        for bit in range(8):
            flipped = bytearray(GOOD)
            flipped[place] ^= 1 << bit
            with pytest.raises(TaskFileError):
                TaskFile.from_bytes(bytes(flipped))


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(st.binary(max_size=64), st.booleans())
def test_arbitrary_bytes_raise_nothing_but_a_task_file_error(data, as_header):
    if as_header:
        data = len(data).to_bytes(8, "little") + data
    with pytest.raises(TaskFileError):
        TaskFile.from_bytes(data)


LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(-1e9, 1e9)
JSON = LEAVES | st.lists(LEAVES, max_size=3) | st.dictionaries(st.text(max_size=5), LEAVES)
JSON_DEEP = JSON | st.lists(JSON, max_size=2)


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(st.sampled_from(sorted(_FIELDS - {"sha256"})), JSON_DEEP)
def test_any_content_under_a_right_hash_loads_or_is_refused(key, value):
    with suppress(TaskFileError):
        TaskFile.from_bytes(forge({key: value}))


@pytest.mark.parametrize("length", [0, 1, MAX_HEADER + 1, 1 << 40, (1 << 64) - 1])
def test_an_absurd_header_length_is_refused_unread(length):
    refused(length.to_bytes(8, "little") + GOOD[8:], "header")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"bias": torch.zeros(N - 1)}, r"'bias' has shape \[63\], the layout says \[64\]"),
        ({"bias": torch.zeros(1, N)}, r"shape \[1, 64\]"),
        ({"bias": torch.full((N,), math.nan)}, "'bias' holds NaN"),
        ({"bias": torch.zeros(N, dtype=torch.float16)}, "'bias' is torch.float16"),
        ({"bias": None}, "'bias' is missing"),
        ({"head.classifier.bias": torch.tensor([0.0, math.inf])}, "'head.classifier.bias' holds"),
        ({"head.classifier.bias": torch.zeros(3)}, "'head.classifier.bias' has a wrong shape"),
        ({"head.classifier.bias": torch.zeros(())}, "'head.classifier.bias' has a wrong shape"),
        ({"head.classifier.weight": torch.zeros(2, 8).double()}, "float64, expected torch.float32"),
        ({"head.classifier.weight": torch.zeros(1, 8), "head.classifier.bias": None}, "has 1 rows"),
        ({"head.classifier.weight": None, "head.classifier.bias": None}, "no single output layer"),
        ({"head.dense.weight": torch.zeros(5, 8)}, "does not fit"),
        ({"bias_scale": torch.zeros(6)}, "'bias_scale' is unknown"),
        ({"encoder.weight": torch.zeros(2)}, "'encoder.weight' is unknown"),
        ({"head.a/../b": torch.zeros(2)}, "is unknown"),
        ({f"head.t{i}": torch.zeros(1) for i in range(70)}, "at most 64"),
        ({"bias": torch.zeros(N, dtype=torch.complex64)}, "complex64"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_refused_by_name(tensors, message):
    refused(forge(tensors=tensors), message)


def test_int8_scales_must_fit_the_sites():
    q = torch.zeros(N, dtype=torch.int8)
    for scale, message in [
        (torch.zeros(5), r"\[5\], expected \[6\]"),
        (torch.full((6,), math.nan), "'bias_scale' holds NaN"),
        (None, "'bias_scale' is missing"),
    ]:
        refused(forge({"dtype": "int8"}, {"bias": q, "bias_scale": scale}), message)
    huge = {"bias": q + 127, "bias_scale": torch.full((6,), 3e38)}
    refused(forge({"dtype": "int8"}, huge), "infinite")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2, "package_version": "3.1"}, r"format 2, .*'3.1'.*reads up to 1; upgrade"),
        ({"format": 10**400}, "reads up to 1; upgrade"),
    ],
)
def test_a_newer_format_is_refused_by_name(changes, message):
    refused(forge(changes | {"something": "new"}), message, UnsupportedFormat)


def test_a_newer_format_is_refused_even_where_its_hash_or_tensors_are_made_otherwise():
    text = dump_json({"format": 7, "package_version": "9"})
    tensors = {f"t{i}": torch.zeros(1) for i in range(100)}
    refused(pack_safetensors(tensors, "bitfit", text), "format 7", UnsupportedFormat)


@pytest.mark.parametrize("number", [0, -1, 1.0, "1", None, True, ...])
def test_a_bad_format_number_is_refused(number):
    refused(forge({"format": number}), "no format number")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": 1}, "'extra' is unknown in format 1"),
        ({"recipe": ...}, "'recipe' is missing"),
        ({"layout": [["query", "0-1", 8]]}, r"the layout says \[16\]"),
        ({"layout": [["query", "0-999," * 4000, 8]]}, "layout in the file is too long"),
        ({"task": {"name": "x"}}, "'task'"),
        ({"base": None}, "'base'"),
        ({"description": 3}, "'description': expected text"),
        ({"dtype": "fp64"}, "'dtype': expected one of"),
        ({"probes": [{"text": "a", "text_pair": None, "logits": [[[[1.0]]]]}]}, "'probes'"),
        ({"temperature": 10**400}, "'temperature'"),
        ({"max_length": True}, "'max_length'"),
    ],
)
def test_wrong_fields_are_refused_by_name(changes, message):
    refused(forge(changes), message)


def test_labels_that_cannot_be_are_refused():
    for labels in (["yes"], ["yes", "yes"], ["yes", 1]):
        refused(forge({"task": document()["task"] | {"labels": labels}}), "'task'")


def test_duplicate_keys_and_numbers_outside_of_json_are_refused():
    text = split(GOOD)[0]["__metadata__"]["bitfit"]
    refused(forge(text=text.replace("{", '{"format":1,', 1)), "'format' is given twice")
    refused(forge(text=text.replace('"temperature":1.25', '"temperature":NaN')), "NaN")
    refused(forge(text=text.replace('"temperature":1.25', '"temperature":1e999')), "range")
    refused(forge(text="[" * 50_000), "nested too deeply")
    refused(forge(text='{"format":1,"x":"\\ud800"}'), "surrogates")
    refused(forge(text="x" * (MAX_METADATA + 1)), "bytes of metadata")


def test_a_missing_hash_is_refused():
    text = split(GOOD)[0]["__metadata__"]["bitfit"]
    digest = document()["sha256"]
    for other in ("", digest.upper(), digest[:-1]):
        refused(forge(text=text.replace(digest, other)), "SHA-256 is missing or damaged")


def test_duplicate_keys_in_the_safetensors_header_are_refused():
    header, body = split(GOOD)
    text = json.dumps(header)[:-1] + ',"bias":' + json.dumps(header["bias"]) + "}"
    refused(len(text).to_bytes(8, "little") + text.encode() + body, "'bias' is given twice")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (safetensors.torch.save({"base_model.model.x.lora_A.weight": torch.zeros(2)}), "peft"),
        (safetensors.torch.save({"encoder.layer.0.bias": torch.zeros(2)}, {"format": "pt"}),
         "weights of a plain model"),
        (safetensors.torch.save({}), "safetensors file of another program"),
        (pickle.dumps({"a": 1}), "a Python pickle, which can run code"),
        (b"PK\x03\x04" + bytes(100), "zip archive, as torch.save writes"),
        (b"", "0 bytes"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        (b'{"a": 1}                ', "JSON text"),
    ],
)  # fmt: skip
def test_foreign_files_are_named_for_what_they_are(data, message):
    assert "not a bitfit task file" in refused(data, message)


def test_a_pickle_is_never_unpickled(tmp_path, monkeypatch):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    path = tmp_path / "model.bin"
    torch.save({"x": Trap()}, path)
    with pytest.raises(CorruptTaskFile, match=r"torch\.save"):
        TaskFile.load(path)
    assert not (tmp_path / "sprung").exists()


def test_an_oversized_file_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "big.bitfit.safetensors"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # sparse: takes no space
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(CorruptTaskFile, match=f"{MAX_BYTES + 1} bytes.*at most {MAX_BYTES}"):
        TaskFile.load(path)


def test_missing_files_directories_and_devices_are_refused(tmp_path):
    with pytest.raises(TaskFileError, match=r"nothing-here.*No such file"):
        TaskFile.load(tmp_path / "nothing-here")
    with pytest.raises(TaskFileError, match="is a directory"):
        TaskFile.load(tmp_path)
    with pytest.raises(TaskFileError, match="no ordinary file"):
        TaskFile.load("/dev/zero")
    with pytest.raises(TaskFileError, match="null byte"):
        TaskFile.load("a\0b")


def test_the_hash_is_the_one_that_the_documentation_computes(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "task-file.md").read_text(encoding="utf-8")
    code = page.split("<!-- verify -->\n```python\n")[1].split("```")[0]
    for dtype in STORAGE_TYPES:
        path = tmp_path / f"{dtype}.bitfit.safetensors"
        make().save(path, dtype)
        names: dict[str, object] = {}
        exec(compile(code, "docs/task-file.md", "exec"), names)
        read, verify = names["read"], names["verify"]
        assert verify(path)
        assert read(path)[1]["bias"].shape == (N,)
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
        assert not verify(path)


def test_every_field_stands_in_the_documentation():
    page = (Path(__file__).parents[1] / "docs" / "task-file.md").read_text(encoding="utf-8")
    assert [name for name in sorted(_FIELDS) if f"| `{name}` |" not in page] == []


# --- looking at files -----------------------------------------------------------------------------


def test_amount_of_change_is_the_mean_absolute_difference_per_site():
    bias = torch.zeros(N)
    bias[8:16] = torch.tensor([1.0, -1] * 4)
    bias[-8:] = 0.5
    found = {(r["term"], r["layer"]): r["mean_abs"] for r in bias_change(make(bias=bias))}
    assert found == {
        ("query", 0): 0, ("query", 1): 1, ("output", 1): 0,
        ("intermediate", 0): 0, ("intermediate", 2): 0, ("pooler", None): 0.5,
    }  # fmt: skip


def test_comparison_of_a_task_with_itself_and_its_negative():
    file = make()
    rows = compare(file, replace(file, bias=-file.bias))
    assert [r["term"] for r in rows[:3]] == ["query", "query", "output"]
    for row in rows[:7]:
        assert row["cosine"] == pytest.approx(-1)
        assert row["norm_a"] == row["norm_b"] > 0
        assert row["mean_abs_a"] == row["mean_abs_b"] > 0
    total = rows[6]
    assert (total["term"], total["layer"]) == ("total", None)
    assert total["norm_a"] == pytest.approx(file.bias.norm().item())
    heads = {r["term"]: r["cosine"] for r in rows[7:]}
    assert heads == pytest.approx({"head.classifier.weight": 1, "head.classifier.bias": 1})


def test_sites_that_one_file_lacks_count_as_zero():
    a = make()
    b = make(layout=[["pooler", None, 8], ["key", "0", 8]], labels=("x", "y"))
    rows = {(r["term"], r["layer"]): r for r in compare(a, b)}
    assert rows["query", 0]["cosine"] is None
    assert (rows["query", 0]["norm_b"], rows["key", 0]["norm_a"]) == (0, 0)
    assert rows["key", 0]["norm_b"] > 0
    assert -1 <= rows["pooler", None]["cosine"] <= 1
    assert not any(term.startswith("head.") for term, _ in rows)
    assert compare(make(layout=[]), make(layout=[]))[0]["cosine"] is None


def test_tasks_of_different_bases_cannot_be_compared():
    other = make(base=BaseIdentity("other", None, "a" * 64, "d" * 64, "0123abcd"))
    with pytest.raises(WrongBase, match=r"tiny \(bbbbbbbb….*other \(dddddddd…"):
        compare(make(), other)
