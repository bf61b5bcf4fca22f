"""One run over two processes: equal to one process, the same numbers in both, written once."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import several
import torch
from test_training import make_lane
from tiny import make_checkpoint

import bitfit
from bitfit.batches import Feature, pack
from bitfit.dropout import DropoutBits
from bitfit.errors import UsageError
from bitfit.heads import batch_loss, loss_weight, make_head
from bitfit.tasks import Task
from bitfit.training.methods import make_method
from bitfit.training.processes import ALONE, Group, Processes, join_processes, own_device
from bitfit.training.train import Trainer

SECONDS = 600  # far more than it takes on a busy machine: what hangs fails
SOURCE = str(Path(bitfit.__file__).parents[1])
# Those that have to end as one process does, without dropout.
EQUAL = ("labels", "one by one", "words", "span", "several labels", "lanes", "full", "padded")


def free_port():
    """A port below those that the system gives to whoever asks for any, while ours is not taken."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    plain = make_checkpoint(folder / "plain", **off)
    padded = make_checkpoint(folder / "plain", "mpnet", **off)
    random = np.random.default_rng(0)
    words = "the a film bike order is was very we it this that".split()

    def some(least, most):
        return random.choice(words, random.integers(least, most)).tolist()

    texts = write_rows(folder / "texts.jsonl", [
        {"text": " ".join([("good", "bad", "slow")[(i % 7) % 3], *some(1, 9)]),
         "label": "xyz"[(i % 7) % 3]}
        for i in range(32)
    ])  # fmt: skip
    tagged = write_rows(folder / "tagged.jsonl", [
        {"words": found, "labels": ["N" if word in words[2:5] else "O" for word in found]}
        for found in (some(1, 12) for _ in range(25))
    ])  # fmt: skip
    spans = write_rows(folder / "spans.jsonl", [
        {"question": "what", "context": f"{before} red bike",
         "answers": {"text": ["red"], "answer_start": [len(before) + 1]}}
        for before in (" ".join(some(1, 30)) for _ in range(20))
    ])  # fmt: skip
    several_labels = write_rows(folder / "several.jsonl", [
        {"text": " ".join(some(2, 8)), "label": (["x", "y"], ["y"], [])[i % 3]} for i in range(20)
    ])  # fmt: skip
    common = {"base": plain, "data": texts, "dev_fraction": 0.3}
    dropout = common | {"base": make_checkpoint(folder / "dropout")}
    return {
        "labels": common | {"batch_size": 5, "class_weights": "balanced", "train_score": True},
        "one by one": common | {"batch_size": 1, "limit": 8, "epochs": 1},
        "words": common | {"data": tagged, "batch_size": 3, "class_weights": "balanced"},
        "span": common | {"data": spans, "kind": "span"},
        "several labels": common | {"data": several_labels, "kind": "multilabel"},
        "lanes": common | {"learning_rate": "auto", "lanes": 3},
        "full": common | {"method": "full", "learning_rate": 1e-4},
        "padded": common | {"base": padded, "batch_size": 3},
        "dropout": dropout,
        "auto": dropout | {"learning_rate": "auto", "lanes": "auto", "dtype": "auto"},
        "stopped": dropout | {"only_1": {"stop_at": 3}},
        "resumed": dropout | {"resume": True, "out": "{folder}/stopped.bitfit.safetensors"},
        "left": dropout | {"only_0": {"stop_at": 2}},
        "seeds": dropout | {"only_1": {"seed": 1}},
        "lost": dropout | {"only_1": {"leave_at": 2}},  # the last: nothing comes after
    }


@pytest.fixture(scope="module")
def found(processes, scenarios, tmp_path_factory):
    """What both processes wrote down of each scenario, and the folder of their files."""
    folder = tmp_path_factory.mktemp("two")
    for options in scenarios.values():
        if "out" in options:
            options["out"] = options["out"].format(folder=folder)
    port = free_port()
    both = [
        processes.Process(target=several.train_scenarios, args=(rank, port, folder, scenarios))
        for rank in range(2)
    ]
    for process in both:
        process.start()
    end = time.monotonic() + SECONDS
    for process in both:
        process.join(max(0.1, end - time.monotonic()))
    for process in both:
        process.kill()
    assert [process.exitcode for process in both] == [0, 0]
    notes = {
        name: [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}.?.json"))]
        for name in scenarios
    }
    return notes, folder


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_end_as_one_with_the_same_global_batch(name, found, scenarios, tmp_path):
    notes, folder = found
    two, other = notes[name]
    assert "error" not in two, two
    one = several.train_one(dict(scenarios[name]), tmp_path / "one.bitfit.safetensors")
    assert two["steps"] == other["steps"] == one["steps"]
    assert two["tokens"] == one["tokens"]
    for a, b in zip(chain(*two["history"]), chain(*one["history"]), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
        assert a["dev"] == pytest.approx(b["dev"], abs=1e-6)
    assert two["scores"] == pytest.approx(one["scores"], abs=1e-6)
    if name == "full":
        from safetensors.torch import load_file

        a, b = (
            load_file(path / "model.safetensors")
            for path in (folder / f"{name}.bitfit.safetensors", tmp_path / "one.bitfit.safetensors")
        )
        for key, tensor in a.items():
            torch.testing.assert_close(tensor, b[key], atol=1e-5, rtol=0)
        return
    a, b = (
        bitfit.TaskFile.load(path)
        for path in (folder / f"{name}.bitfit.safetensors", tmp_path / "one.bitfit.safetensors")
    )
    torch.testing.assert_close(a.bias, b.bias, atol=1e-5, rtol=0)
    assert a.bias.abs().max() > 1e-4
    for key, tensor in a.head.items():
        torch.testing.assert_close(tensor, b.head[key], atol=1e-5, rtol=0)
    assert a.recipe["processes"] == 2
    assert "processes" not in b.recipe


def test_both_processes_have_the_same_bits_scores_and_lanes(found):
    """And what each did is known, though one of them must not write (``several._no_write``)."""
    notes, _ = found
    trained = {name: pair for name, pair in notes.items() if "error" not in pair[0]}
    assert set(trained) == set(notes) - {"stopped", "left", "seeds", "lost"}
    for name, (first, second) in trained.items():
        assert first == second, name
        assert first["file"]


def test_only_the_gradients_of_row_and_head_move_in_a_step(found):
    notes, folder = found
    (note, _), steps = notes["dropout"], notes["dropout"][0]["steps"]
    file = bitfit.TaskFile.load(folder / "dropout.bitfit.safetensors")
    trained = file.n + sum(tensor.numel() for tensor in file.head.values())
    moved = {int(size): count for size, count in note["moved"].items()}
    assert moved.pop(trained + 1) == steps  # with the loss
    assert steps <= moved.pop(1) < steps + 10  # whether to stop, and what is agreed on at the start
    assert list(moved) == [file.recipe["dev_rows"] * len(file.task.labels)]  # logits of dev


def test_a_loss_that_is_kept_does_not_keep_the_gradients_alive(monkeypatch):
    """A run keeps its losses until an epoch is over; bert-base has 440 MB of gradients a step."""
    group = object.__new__(Group)
    monkeypatch.setattr(group, "_sum", lambda tensor: None)
    trained = torch.zeros(1000, requires_grad=True)
    trained.grad = torch.ones(1000)
    losses = group.sum_gradients([trained], [torch.tensor(1.0), torch.tensor(2.0)])
    assert [loss.item() for loss in losses] == [1.0, 2.0]
    assert all(loss.untyped_storage().nbytes() <= 8 for loss in losses)


def test_with_dropout_each_process_draws_its_own_masks(found, scenarios, tmp_path):
    notes, _ = found
    one = several.train_one(dict(scenarios["dropout"]), tmp_path / "one.bitfit.safetensors")
    assert one["steps"] == notes["dropout"][0]["steps"]
    assert one["numbers"] != notes["dropout"][0]["numbers"]
    x, cpu = torch.ones(1000), torch.device("cpu")
    first, second, same = (DropoutBits(3, 4, cpu, *rank).scale(x, 0.5) for rank in ((), (1,), (0,)))
    assert torch.equal(first, same)
    assert not torch.equal(first, second)


def test_one_that_is_asked_to_stop_stops_both_and_they_resume_to_the_same_bytes(found):
    notes, folder = found
    for note in notes["stopped"]:
        assert note["error"].startswith("TrainingInterrupted: stopped at step 3 of")
        assert note["steps"] == 3
    resumed, whole = (folder / f"{name}.bitfit.safetensors" for name in ("stopped", "dropout"))
    assert resumed.read_bytes() == whole.read_bytes()
    assert not Path(f"{resumed}.checkpoint").exists()


def test_a_checkpoint_of_another_number_of_processes_is_refused(found, scenarios):
    _, folder = found
    out = folder / "left.bitfit.safetensors"
    assert Path(f"{out}.checkpoint").exists()
    note = several.train_one(scenarios["dropout"] | {"resume": True}, out)
    assert "processes differ(s)" in note["error"]


def test_processes_that_are_about_different_runs_are_refused(found):
    for note in found[0]["seeds"]:
        assert note["error"].startswith("UsageError: the 2 processes are not about the same run")


def test_who_loses_another_ends_with_an_error_and_does_not_wait(found):
    (note,) = found[0]["lost"]
    assert "BitfitError: process 0 of 2 has lost another" in note["error"]


# ------------------------------------------------------------------ in this process


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [0, 1, 4, 8, 11])
def test_everything_is_shared_out_once_and_evenly(count, length):
    all_of_them = [Processes(rank, count) for rank in range(count)]
    items = list(range(length))
    parts = [items[p.own(length)] for p in all_of_them]
    assert list(chain(*parts)) == items
    dealt = [p.dealt([i % 3 for i in items]) for p in all_of_them]
    assert sorted(chain(*dealt)) == items
    for shares in (parts, dealt):
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_the_shares_of_a_step_weigh_as_much_as_the_whole(open_tiny):
    encoder = open_tiny()
    lane = make_lane(encoder, class_weights="balanced", batch_size=5)
    for feature in lane.train.features.items[:7]:
        feature.label = 1
    lane.class_weights = torch.tensor([0.3, 2.0])
    batch = lane.next_batch()
    for count in (2, 3, 5, 8):
        shares = [lane.share(batch, Processes(rank, count)) for rank in range(count)]
        assert sum(share.weight for share in shares) == pytest.approx(1)
        assert all(len(share.batch.features) for share in shares)
        used = [f for share in shares if share.weight for f in share.batch.features]
        assert [id(f) for f in used] == [id(f) for f in batch.features]
    assert lane.share(batch, ALONE).batch is batch


def test_the_weight_of_a_batch_is_what_its_mean_divides_by(open_tiny):
    """A batch's loss is that of its halves by weight, for each kind of head."""
    encoder, random = open_tiny(), np.random.default_rng(0)

    tasks = {
        "classification": (("a", "b", "c"), lambda n: int(random.integers(3))),
        "regression": ((), lambda n: float(random.normal())),
        "multilabel": (("a", "b"), lambda n: tuple(np.flatnonzero(random.random(2) < 0.5))),
        "tokens": (("a", "b", "c"), lambda n: random.integers(0, 3, n)),
        "span": ((), lambda n: (int(random.integers(n)), int(random.integers(n)))),
    }
    for kind, (labels, draw) in tasks.items():
        head = make_head(Task(name="t", kind=kind, labels=labels), encoder)
        weights = np.array([0.2, 1.0, 3.0], np.float32)
        weights = weights if kind in ("classification", "tokens") else None
        features, logits = [], []
        for n in (3, 6, 4, 9, 5):
            ids = np.full(n, 5)
            starts = np.where(random.random(n) < 0.7, np.arange(n), -1)
            features.append(Feature(ids, ids * 0, 0, label=draw(n), word_starts=starts))
            rows = {"tokens": int((starts >= 0).sum()), "span": n}.get(kind, 1)
            logits.append(torch.from_numpy(random.normal(size=(rows, head.num_outputs))).float())

        def mean(part, head=head, features=features, logits=logits, weights=weights):
            given = None if weights is None else torch.from_numpy(weights)
            return batch_loss(head, torch.cat(logits[part]), pack(features[part]), given)

        whole = loss_weight(head, features, weights)
        parts = sum(
            mean(part) * loss_weight(head, features[part], weights) / whole
            for part in (slice(0, 2), slice(2, 5))
        )
        torch.testing.assert_close(parts, mean(slice(0, 5)), msg=kind)


def test_a_checkpoint_of_one_process_says_nothing_of_processes(open_tiny):
    lane = make_lane(encoder := open_tiny())
    method = make_method(encoder, [lane])
    one = Trainer(encoder=encoder, method=method, lanes=[lane])
    two = Trainer(encoder=encoder, method=method, lanes=[lane], processes=Processes(0, 2))
    assert two.identity == one.identity | {"processes": 2}


def test_without_a_launcher_there_is_one_process(monkeypatch):
    cpu = torch.device("cpu")
    assert join_processes(cpu) is ALONE
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join_processes(cpu) is ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"WORLD_SIZE is 2.*RANK expected.*torchrun"):
        join_processes(cpu)


def test_each_process_of_a_machine_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [own_device(d) for d in ("auto", "cuda", "cpu")] == ["auto", "cuda", "cpu"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [own_device(d) for d in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device("auto") == "auto"


# ------------------------------------------------------------------ the command line


def test_torchrun_trains_one_run_and_says_it_once(scenarios, tmp_path):
    options = scenarios["dropout"]
    out, log = tmp_path / "task.bitfit.safetensors", tmp_path / "log.jsonl"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--master-addr", "127.0.0.1", "--master-port", str(free_port()),
        "-m", "--", "bitfit", "train", "--base", options["base"], "--data", options["data"],
        "--epochs", "2", "--dtype", "fp32", "--json", "--log", str(log), "--out", str(out),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        text, err = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    (line,) = text.splitlines()
    report = json.loads(line)
    assert report["processes"] == 2
    assert bitfit.TaskFile.load(out).recipe["processes"] == 2
    assert [json.loads(x)["epoch"] for x in log.read_text().splitlines()] == [1, 2]
    assert err.count("epoch 1/2") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [log.name, out.name]
