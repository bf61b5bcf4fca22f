"""The directory of an experiment."""

import errno
import gzip
import json
import os
import time

import pytest
from filelock import FileLock

from bitfit.errors import BitfitError, NotWritten, TrainingInterrupted, UsageError
from bitfit.experiments.store import STALE_SECONDS, Result, Store


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "here")
    store.write_experiment({
        "name": "here", "grid": {}, "base": ["minilm"], "rows": ["BitFit", "b_q"],
        "tasks": ["rte", "mrpc"], "seeds": [0], "conditions": {},
    })  # fmt: skip
    return store


def result(run_id, row="BitFit", task="rte", rate=1e-3, seed=0, state="done"):
    record = {
        "id": run_id, "state": state, "row": row, "base": "minilm", "task": {"name": task},
        "train_rows": None, "config": {"learning_rate": rate, "seed": seed}, "history": [],
        "data": {"train": "a" * 64, "dev": "b" * 64, "seed": 0},
    }  # fmt: skip
    return Result(record=record, predictions={"dev": [[0, 1]]}, answers=[1, 1], task_file=b"file")


def test_what_is_written_is_read_back(store):
    store.write(result("01"))
    assert store.record("01")["row"] == "BitFit"
    assert store.predictions(store.record("01")) == {"dev": [[0, 1]]}
    assert store.answers(store.record("01")) == [1, 1]
    assert store.task_file("01").read_bytes() == b"file"
    assert store.kept_predictions("02") is None
    assert store.finished() == {"01": "done"}


def test_records_come_by_row_task_rate_and_seed(store):
    for run in (
        result("05", row="b_q"), result("04", task="mrpc"), result("03", rate=1e-2),
        result("02", seed=1), result("01"),
    ):  # fmt: skip
        store.write(run)
    assert [r["id"] for r in store.records()] == ["01", "02", "03", "04", "05"]


def test_the_same_predictions_give_the_same_bytes(store, tmp_path):
    other = Store(tmp_path / "there")
    for place in (store, other):
        place.write(result("01"))
    paths = [p.directory / "predictions" / "01.json.gz" for p in (store, other)]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert json.loads(gzip.decompress(paths[0].read_bytes()))["dev"] == [[0, 1]]


def test_a_claim_is_alive_while_its_process_is(store):
    store.claim("group", ["01", "02"], 2)
    (claim,) = store.claims()
    assert (claim.runs, claim.lanes, claim.pid, claim.is_alive) == (
        ["01", "02"], 2, os.getpid(), True,
    )  # fmt: skip
    store.let_go("group")
    assert not store.claims()[0].is_alive
    store.release("group")
    assert store.claims() == []


def test_what_is_left_of_a_finished_group_is_removed_and_what_one_has_stays(store):
    for group in ("done", "stopped", "running"):
        store.claim(group, ["01"], 1)
        store.write_epoch(group, "01", 1, {"dev": [0]})
    store.let_go("stopped")
    store.release("done")
    store.write_epoch("done", "01", 2, {"dev": [0]})  # by one that was not told
    store.remove_leftovers()
    assert not store.scratch("done").exists()
    assert store.read_epoch("stopped", "01", 1) == store.read_epoch("running", "01", 1)
    assert store.read_epoch("running", "01", 1) == {"dev": [0]}


def test_a_claim_of_a_killed_process_or_a_silent_host_is_not_alive(store):
    store.claim("group", ["01"], 1)
    path = store.directory / "work" / "group.json"
    note = json.loads(path.read_text())
    path.write_text(json.dumps(note | {"pid": 2**22 - 1}))
    assert not store.claims()[0].is_alive
    path.write_text(json.dumps(note | {"host": "elsewhere"}))
    assert store.claims()[0].is_alive
    long_ago = time.time() - STALE_SECONDS - 1
    os.utime(path, (long_ago, long_ago))
    assert not store.claims()[0].is_alive
    store.beat("group")  # of another's claim: whoever has it says so itself
    assert not store.claims()[0].is_alive
    path.write_text(json.dumps(note))
    os.utime(path, (long_ago, long_ago))
    store.beat("group")
    assert store.claims()[0].is_alive


def test_who_slept_while_its_group_was_taken_over_takes_nothing_from_the_other(store):
    store.claim("group", ["01"], 1)
    path = store.directory / "work" / "group.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"host": "elsewhere"}))
    store.write_epoch("group", "01", 1, {"dev": [0]})
    store.end("group")
    assert [claim.host for claim in store.claims()] == ["elsewhere"]
    assert store.read_epoch("group", "01", 1) == {"dev": [0]}
    store.claim("group", ["01"], 1)
    store.end("group")
    assert store.claims() == []
    assert store.read_epoch("group", "01", 1) is None


def test_a_machine_that_changes_its_name_keeps_its_claims(store, monkeypatch):
    store.claim("group", ["01"], 1)
    monkeypatch.setattr("socket.gethostname", lambda: "on-another-network")
    manifest = store.directory / "work" / "group.json"
    os.utime(manifest, (0, 0))
    store.beat("group")
    assert store.claims()[0].is_alive
    store.end("group")
    assert store.claims() == []


def test_a_record_that_another_process_forgets_is_no_damage(store, monkeypatch):
    record = {"state": "failed", "row": "r", "base": "b", "task": {}, "train_rows": 0, "config": {}}
    for name in ("01", "02"):
        store.write(Result(record={**record, "id": name}))
    listed = store._files("runs", ".json")
    store.forget("01")
    monkeypatch.setattr(store, "_files", lambda *place: listed)
    assert store.finished() == {"02": "failed"}


def test_a_claim_of_this_process_that_it_does_not_hold_is_not_alive(store, monkeypatch):
    """A container that is started again has the host name and process ids of the killed one."""
    store.claim("group", ["01"], 1)
    assert Store(store.directory).claims()[0].is_alive
    monkeypatch.setattr("bitfit.experiments.store._own", set())
    assert not store.claims()[0].is_alive
    store.claim("group", ["01"], 1)
    assert store.claims()[0].is_alive


def test_a_folder_that_fails_at_one_beat_is_no_end_of_them(store, monkeypatch):
    def stale(path):
        raise OSError(errno.ESTALE, "Stale file handle")

    store.claim("group", ["01"], 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", stale)
        store.beat("group")
    manifest = store.directory / "work" / "group.json"
    os.utime(manifest, (0, 0))
    store.beat("group")
    assert manifest.stat().st_mtime > 0


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("experiment.json", "Put back what was there"),
        ("runs/01.json", "Remove the file: --resume makes the run again"),
        ("predictions/01.json.gz", "with runs/01.json removed too, --resume makes the run again"),
        ("references/d.json.gz", "'bitfit report DIR --data DATA' reads it from the data again"),
    ],
)
def test_a_damaged_file_is_named_with_a_way_out(name, way, store):
    path = store.directory / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b'{"id": "0')
    read = {
        "experiment.json": store.experiment,
        "runs": store.finished,
        "predictions": lambda: store.kept_predictions("01"),
        "references": lambda: store.answers({"data": {"dev": "d"}}),
    }
    with pytest.raises(BitfitError) as caught:
        read[name.partition("/")[0]]()
    assert str(path) in str(caught.value)
    assert way in str(caught.value)


def test_who_waits_for_the_lock_may_be_stopped(store):
    asked = []

    def should_stop():
        asked.append(True)
        return len(asked) == 2

    with (
        FileLock(store.directory / ".lock"),
        pytest.raises(TrainingInterrupted, match="the same command with --resume goes on"),
        store.lock(should_stop),
    ):
        raise AssertionError("another has it")
    assert len(asked) == 2
    with store.lock(lambda: True):  # nobody is waited for
        pass


def test_a_place_that_cannot_hold_a_directory_is_named(store, monkeypatch):
    (store.directory / "file").write_text("")
    for path in (store.directory / "file", store.directory / "file" / "below"):
        with pytest.raises(UsageError, match="is a file or below one"), Store(path).lock():
            pass

    def refuse(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(NotWritten, match="here: cannot be written: Permission denied"):
        with store.lock():
            pass


def test_finished_runs_are_taken_over_from_another_experiment(store, tmp_path):
    other = Store(tmp_path / "other")
    other.write(result("01", row="their name"))
    other.write(result("02", state="failed"))
    here = {"row": "b_q", "base": "mine", "task": "ours", "train_rows": 5}
    assert store.reuse(other, ["03", "02", "01"], here) == "01"
    assert store.reuse(other, ["03", "02"], here) is None
    record = store.record("01")
    assert {**record, "task": record["task"]["name"]} == {**record, **here}
    assert store.predictions(record) == {"dev": [[0, 1]]}


def spans(run_id, predictions, contexts):
    record = result(run_id).record
    record["task"] = {"name": "squad", "kind": "span"}
    return Result(record=record, predictions=predictions, answers=[1, 1], contexts=contexts)


def test_answers_are_kept_as_places_in_texts_and_read_back_as_texts(store, tmp_path):
    store.write(spans("01", {"dev": [[[0, 3], [0, 0]], [[4, 7], [0, 3]]]}, ["one two", "six"]))
    kept = gzip.decompress((store.directory / "predictions" / "01.json.gz").read_bytes())
    assert not any(word in kept for word in (b"one", b"two", b"six"))
    assert store.predictions(store.record("01")) == {"dev": [["one", ""], ["two", "six"]]}
    other = Store(tmp_path / "other")
    assert other.reuse(store, ["01"], {"row": "BitFit", "base": "m", "task": "s",
                                       "train_rows": None}) == "01"  # fmt: skip
    assert other.predictions(other.record("01")) == store.predictions(store.record("01"))


def test_answers_without_the_texts_that_they_stand_in_are_not_there(store):
    store.write(spans("01", {"dev": [[[0, 3], [0, 0]]]}, ["one two", "six"]))
    for path in (store.directory / "references").iterdir():
        path.unlink()
    assert Store(store.directory).predictions(store.record("01")) is None
    assert store.kept_predictions("01") is not None


def test_answers_that_earlier_versions_kept_as_texts_are_read(store):
    store.write(spans("01", {"dev": [["one", "six"]]}, None))
    assert store.predictions(store.record("01")) == {"dev": [["one", "six"]]}


def test_texts_are_added_to_answers_that_an_earlier_version_kept_without(store):
    store.write(spans("01", {"dev": [["one", "six"]]}, None))
    store.write(spans("02", {"dev": [[[0, 3], [0, 3]]]}, ["one two", "six"]))
    assert store.predictions(store.record("02")) == {"dev": [["one", "six"]]}
    assert store.answers(store.record("01")) == [1, 1]


@pytest.mark.parametrize("epoch", [[[0, 3]], [[0, 3], 5], [[0, 3], ["a", "b"]], [[0, 3], [1]]])
def test_places_that_fit_no_texts_are_named(store, epoch):
    store.write(spans("01", {"dev": [epoch]}, ["one two", "six"]))
    with pytest.raises(BitfitError, match=r"run 01: .* no places in the 2 texts of dev"):
        store.predictions(store.record("01"))


def test_a_directory_that_is_no_experiment_is_refused(tmp_path):
    with pytest.raises(BitfitError, match=r"is no experiment: it has no experiment\.json"):
        Store(tmp_path).experiment()
    (tmp_path / "experiment.json").write_text('{"format": 99}')
    with pytest.raises(BitfitError, match="format 99; this version reads format 1"):
        Store(tmp_path).experiment()
    (tmp_path / "experiment.json").write_text("{")
    with pytest.raises(BitfitError, match="cannot be read as JSON"):
        Store(tmp_path).experiment()
    (tmp_path / "experiment.json").write_text("[]")
    with pytest.raises(BitfitError, match=r"experiment\.json: holds list, expected an object"):
        Store(tmp_path).experiment()
    (tmp_path / "experiment.json").write_text('{"format": 1, "rows": []}')
    with pytest.raises(BitfitError, match="not the record of an experiment: lacks name, grid"):
        Store(tmp_path).experiment()


def test_a_damaged_file_of_predictions_is_named(store):
    store.write(result("01"))
    path = store.directory / "predictions" / "01.json.gz"
    whole = path.read_bytes()
    # Every byte of the packed numbers: some make no deflate stream, some another sum.
    for place in range(10, len(whole) - 4):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with pytest.raises(BitfitError, match=r"01\.json\.gz"):
            store.kept_predictions("01")
    for value in ([1], {}, {"dev": 1}, {"dev": [1]}):
        path.write_bytes(gzip.compress(json.dumps(value).encode()))
        with pytest.raises(BitfitError, match=r"01\.json\.gz"):
            store.kept_predictions("01")
    path.write_bytes(whole[:-4])
    with pytest.raises(BitfitError, match=r"01\.json\.gz: cannot be read"):
        store.kept_predictions("01")


def test_a_record_that_is_none_is_named(store):
    store.write(result("01"))
    path = store.directory / "runs" / "01.json"
    record = json.loads(path.read_text())
    for key in ("task", "config", "history"):
        path.write_text(json.dumps(record | {key: None}))
        with pytest.raises(BitfitError, match=r"01\.json: not the record of a run: its task"):
            store.records()
    path.write_text("{}")
    for read in (store.records, lambda: store.record("01")):
        with pytest.raises(BitfitError, match=r"01\.json: not the record of a run: lacks id"):
            read()
    with pytest.raises(BitfitError, match=r"01\.json: not the record of a run: lacks id"):
        Store(store.directory).finished()


def test_a_size_beyond_the_rows_that_there_were_is_read_as_all_of_them(store):
    """As records of learning curves were written before."""
    asked = result("01")
    asked.record.update(train_rows=64, rows={"train": 24, "dev": 8})
    store.write(asked)
    assert [record["train_rows"] for record in store.records()] == [24]
