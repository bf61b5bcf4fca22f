"""Sweeps: nothing is lost, nothing is made twice, and two processes may share the work."""

import contextlib
import dataclasses
import json
import math
import random
import re
import shlex
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import sweeping
import torch
from sweeping import left_in, small_grid, small_sweep

from bitfit.cli.app import run
from bitfit.data import DataConfig, read_dataset
from bitfit.errors import (
    BaseModelError,
    BitfitError,
    DataError,
    NotWritten,
    TrainingInterrupted,
    UsageError,
)
from bitfit.experiments import execute
from bitfit.experiments.answers import restore_answers
from bitfit.experiments.conditions import Conditions, choose_conditions
from bitfit.experiments.dry_run import dry_run
from bitfit.experiments.estimate import Clock
from bitfit.experiments.execute import BegunAnew
from bitfit.experiments.executor import LocalExecutor
from bitfit.experiments.grid import Row, parse_grid
from bitfit.experiments.material import Material
from bitfit.experiments.plan import Planner, make_group, most_lanes
from bitfit.experiments.protocol import EpochScores, choose, paper_scores, task_of
from bitfit.experiments.report.write import write_report
from bitfit.experiments.store import Result, Store
from bitfit.experiments.sweep import GroupFinished, GroupStarted, Planned, Settings, Sweep, Waiting
from bitfit.metrics import compute_metrics
from bitfit.storage import pack_safetensors, unpack_safetensors
from bitfit.taskfile import TaskFile
from bitfit.tasks import references
from bitfit.training.checkpoint import CHECKPOINT_KEY
from bitfit.training.train import StepDone

SQUAD = """
title = "Spans"
tasks = ["squad"]
epochs = 1

[[rows]]
name = "BitFit"
learning_rate = 1e-3
"""
SECONDS = 600  # far more than it takes on a busy machine: what hangs fails


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return sweeping.write_tickets(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(checkpoint, data, tmp_path_factory):
    """A sweep that was never disturbed: its directory and how it ended."""
    out = tmp_path_factory.mktemp("experiments") / "whole"
    return out, small_sweep(checkpoint(), str(data), str(out), resume=False).run()


def planner_of(sweep):
    (base,) = sweep.grid.base
    material = Material(sweep.open_base(base), sweep.sources)
    return Planner(sweep.grid, base, material, sweep.store)


def essence(directory):
    """All that a report says but for what was measured by the clock."""
    found = {}
    for record in Store(directory).records():
        kept = {k: v for k, v in record.items() if k not in ("cost", "environment")}
        found[record["id"]] = json.dumps(kept, sort_keys=True)
    for folder in ("predictions", "references", "tasks"):
        for path in left_in(Path(directory) / folder):
            found[f"{folder}/{path.name}"] = path.read_bytes()
    return found


def test_answers_in_texts_are_kept_without_the_texts_and_found_again_in_the_data(
    checkpoint, tmp_path
):
    qas = [{"id": "q1", "question": "who", "answers": [{"text": "a man", "answer_start": 0}]}]
    article = {"paragraphs": [{"context": "a man was here", "qas": qas}]}
    data, out = tmp_path / "data", tmp_path / "out"
    (data / "squad").mkdir(parents=True)
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        (data / "squad" / name).write_text(json.dumps({"version": "1.1", "data": [article]}))
    grid = parse_grid(SQUAD, "spans.toml", default_name="spans")
    grid = grid.replace(base=(checkpoint(),), seeds=(0,))
    Sweep(grid, out, Settings(data=data, lanes=1, threads=1)).run()
    store = Store(out)
    (record,) = store.records()
    ((place,),) = store.kept_predictions(record["id"])["dev"]
    ((text,),) = store.predictions(record)["dev"]
    assert text == "a man was here"[slice(*place)] != ""
    shutil.rmtree(out / "references")
    assert Store(out).predictions(record) is None
    assert restore_answers(Store(out), data) == []
    assert Store(out).predictions(record) == store.predictions(record)


def test_a_mismatched_half_of_dev_is_predicted_and_scored_at_every_epoch(checkpoint, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    (data / "MNLI").mkdir(parents=True)
    for name, rows in (("train", 12), ("dev_matched", 5), ("dev_mismatched", 7)):
        lines = ["sentence1\tsentence2\tgold_label"]
        labels = ("entailment", "neutral", "contradiction")
        lines += [f"a film {i}\tit was good {i}\t{labels[i % 3]}" for i in range(rows)]
        (data / "MNLI" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    grid = small_grid(checkpoint(), seeds=(0,)).only(rows=["BitFit"], tasks=["mnli"])
    events = []
    Sweep(grid, out, Settings(data=data, lanes=3, threads=1)).run(events.append)
    store = Store(out)
    records = store.records()
    assert len(records) == 3
    for record in records:
        assert record["state"] == "done", record["error"]
        predicted = store.predictions(record)
        assert [len(epoch) for epoch in predicted["dev"]] == [5, 5]
        assert [len(epoch) for epoch in predicted["dev_mismatched"]] == [7, 7]
        right = store.more_answers(record)["dev_mismatched"]
        for epoch, answers in zip(record["history"], predicted["dev_mismatched"], strict=True):
            found = compute_metrics(task_of(record), answers, right)
            assert epoch["more"]["dev_mismatched"] == found
        best = record["history"][record["best_epoch"] - 1]
        assert record["more"] == best["more"]
    other = Store(tmp_path / "other")
    Sweep(grid, other.directory, Settings(data=data, lanes=3, threads=1, reuse=[out])).run()
    assert other.more_answers(records[0]) == store.more_answers(records[0])
    shutil.rmtree(other.directory / "references")
    restored = Store(other.directory)
    assert restore_answers(restored, data) == []
    assert restored.more_answers(records[0]) == store.more_answers(records[0])


def test_a_rate_is_chosen_by_answers_that_come_with_another_row(
    finished, checkpoint, data, tmp_path, monkeypatch
):
    """Reused runs may come without them; then both protocols have a choice, and both are made."""
    origin = tmp_path / "origin"
    shutil.copytree(finished[0], origin)
    shutil.rmtree(origin / "references")
    split = EpochScores([0.0], [0.0]), EpochScores([1.0], [1.0])

    def last_rate(record, predictions, answers):
        if predictions is None or answers is None:
            return None
        return split[record["config"]["learning_rate"] == 1e-2]

    monkeypatch.setattr("bitfit.experiments.plan.split_scores", last_rate)
    monkeypatch.setattr(
        "bitfit.experiments.plan.paper_scores",
        lambda record: split[record["config"]["learning_rate"] == 1e-3],
    )
    grid = small_grid(checkpoint(), seeds=(0, 1)).only(rows=["BitFit"])
    whole = small_grid(checkpoint(), seeds=(0, 1)).only(rows=["BitFit", "Full-FT"])
    Sweep(grid.replace(seeds=(0,)), tmp_path / "a", Settings(data=data, reuse=[origin])).run()
    for path in (tmp_path / "a" / "references").glob("*"):
        path.unlink()
    settings = Settings(data=data, threads=1, lanes=2, reuse=[tmp_path / "a"])
    Sweep(whole, tmp_path / "out", settings).run()
    again = Sweep(whole, tmp_path / "out", replace(settings, resume=True)).run()
    assert again.made == 0


def test_rates_are_searched_with_the_first_seed_and_repeated_with_the_others(finished):
    out, summary = finished
    records = Store(out).records()
    runs = {(r["row"], r["config"]["learning_rate"], r["config"]["seed"]) for r in records}
    searched = {run for run in runs if run[2] == 0}
    assert len(searched) == 6
    for row in ("BitFit", "Frozen", "Full-FT"):
        # By two protocols, which may choose two rates.
        rates = {rate for name, rate, seed in runs if name == row and seed > 0}
        assert 1 <= len(rates) <= 2
        assert {(row, rate, seed) for rate in rates for seed in (0, 1, 2)} <= runs
        paper = next(c for cell, c in choose(records, paper_scores).items() if cell[0] == row)
        assert paper[0].record["config"]["learning_rate"] in rates
        assert [c.record["config"]["seed"] for c in paper] == [0, 1, 2]
    assert (summary.made, summary.done, summary.failed) == (len(runs), len(runs), [])


def test_a_record_says_what_its_predictions_say(finished, data):
    store = Store(finished[0])
    records = store.records()
    dev = read_dataset(
        DataConfig(data=data / "tickets.csv", text="body", label="intent", dev_fraction=0.4)
    ).splits["dev"]
    for record in records:
        predictions, answers = store.predictions(record), store.answers(record)
        assert answers == references(dev)
        scores = [compute_metrics(task_of(record), p, answers) for p in predictions["dev"]]
        assert [e["dev"] for e in record["history"]] == scores
        assert record["scores"] == scores[record["best_epoch"] - 1]
        assert set(record["train_scores"]) == {"accuracy", "f1_macro"}
        assert record["rows"] == {"train": 24, "dev": 16}
        assert record["cost"]["tokens"] > 0


def test_rows_of_biases_leave_a_task_file_and_their_change(finished, checkpoint):
    store = Store(finished[0])
    for record in store.records():
        path = store.task_file(record["id"])
        assert path.is_file() == (record["row"] != "Full-FT")
        assert (record["change"] is not None) == (record["row"] == "BitFit")
        if path.is_file():
            file = TaskFile.load(path)
            assert file.scores["accuracy"] == record["scores"]["accuracy"]
            assert record["cost"]["task_bytes"] == path.stat().st_size


def test_the_commands_of_an_experiment_are_those_that_asked_for_something(
    checkpoint, data, tmp_path
):
    out, line = tmp_path / "out", "bitfit sweep small.toml --rows BitFit"
    for command in (
        line, f"{line} --resume -q", f"{line},Frozen --resume", f"{line} --budget 2h --resume",
    ):  # fmt: skip
        small_sweep(checkpoint(), str(data), str(out), budget_seconds=0.0, command=command)
    assert Store(out).experiment()["commands"] == [line, f"{line},Frozen --resume"]
    described = Store(out).experiment()
    described["command"] = described.pop("commands")[0]  # as older versions wrote it
    Store(out).write_experiment(described)
    small_sweep(checkpoint(), str(data), str(out), budget_seconds=0.0, command="bitfit other")
    assert Store(out).experiment()["commands"] == [line, "bitfit other"]


def test_a_finished_sweep_repeats_nothing(finished, checkpoint, data):
    before = {p: p.stat().st_mtime_ns for p in finished[0].rglob("*.json") if "runs" in p.parts}
    events = []
    summary = small_sweep(checkpoint(), str(data), str(finished[0])).run(events.append)
    assert summary.made == 0
    assert not any(isinstance(e, GroupStarted) for e in events)
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_the_command_of_a_record_makes_the_run_again(finished, checkpoint, capsys):
    record = next(r for r in Store(finished[0]).records() if r["row"] == "BitFit")
    words = shlex.split(record["command"])
    out = Path(finished[0]).parent / "again.bitfit.safetensors"
    assert run([*words[1:], "--out", str(out), "--quiet"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["score"] == pytest.approx(record["scores"]["accuracy"])
    assert again["best_epoch"] == record["best_epoch"]
    assert {split: again["rows"][split] for split in record["rows"]} == record["rows"]
    assert again["scores"]["train_accuracy"] == pytest.approx(record["train_scores"]["accuracy"])


def report_of(directory):
    """The report's text without what the clock measured."""
    write_report(Store(directory), formats=["markdown"], resamples=200)
    text = (directory / "report" / "report.md").read_text()
    return re.sub(r"## Cost\n.*?\n## ", "## ", text, flags=re.DOTALL)


def saved(out):
    """When the state of the work was last saved."""
    found = {}
    for path in out.glob("work/*/state.checkpoint"):
        with contextlib.suppress(FileNotFoundError):  # its group has ended since
            found[path] = path.stat().st_mtime_ns
    return found


def test_a_sweep_killed_at_any_moment_gives_what_an_undisturbed_one_gives(
    processes, finished, checkpoint, data, tmp_path
):
    """kill -9 at eight moments of the work and four of the start, then on to the end."""
    out, moments = tmp_path / "killed", random.Random(1)
    arguments = checkpoint(), str(data), str(out)
    kills = 0
    for attempt in range(12):
        is_start = attempt % 3 == 0
        # Those of the work by steps and not by the clock, by which a fast machine would be done
        # before most of them.
        left = 1 if is_start else moments.randint(1, 5)
        end = time.monotonic() + (moments.uniform(0.2, 2.0) if is_start else math.inf)
        before = saved(out)
        process = processes.Process(target=sweeping.run_small, args=arguments)
        process.start()
        while process.exitcode is None and left and time.monotonic() < end:
            now = saved(out)
            left -= now != before
            before = now
            time.sleep(0.005)
        if not is_start:
            process.join(moments.uniform(0.0, 0.1))
        kills += process.exitcode is None
        process.kill()
        process.join()
    assert kills >= 6
    process = processes.Process(target=sweeping.run_small, args=arguments)
    process.start()
    process.join(SECONDS)
    assert process.exitcode == 0
    assert essence(out) == essence(finished[0])
    assert left_in(out / "work") == []
    assert report_of(out) == report_of(finished[0])


def test_two_processes_share_a_directory_and_make_each_run_once(
    processes, finished, checkpoint, data, tmp_path
):
    out = tmp_path / "shared"
    arguments = checkpoint(), str(data), str(out)
    both = [processes.Process(target=sweeping.run_small, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(SECONDS)
        assert process.exitcode == 0
    # The groups may differ from those of one process, and so the last bits: the runs may not.
    whole = {r["id"] for r in Store(finished[0]).records()}
    assert {r["id"] for r in Store(out).records()} >= {
        r["id"] for r in Store(finished[0]).records() if r["config"]["seed"] == 0
    }
    assert len(whole) == len(Store(out).records())


def test_stopping_keeps_the_state_and_going_on_ends_the_same(finished, checkpoint, data, tmp_path):
    out, steps = tmp_path / "stopped", []
    sweep = small_sweep(checkpoint(), str(data), str(out), resume=False)

    def count(event):
        steps.append(isinstance(event, StepDone))

    with pytest.raises(TrainingInterrupted, match="the same command with --resume"):
        sweep.run(count, lambda: sum(steps) == 4)
    assert len(Store(out).claims()) == 1
    assert not Store(out).claims()[0].is_alive
    small_sweep(checkpoint(), str(data), str(out)).run()
    assert essence(out) == essence(finished[0])


def test_a_failed_run_is_recorded_and_does_not_stop_the_others(checkpoint, data, tmp_path):
    grid = small_grid(checkpoint(), seeds=(0,))
    broken = Row(name="No such layer", options={"terms": "query@7"}, learning_rate=(1e-3,))
    wild = Row(name="Wild", options={"method": "bitfit", "max_grad_norm": 0.0,
                                     "adam_eps": 0.0}, learning_rate=(1.0,))  # fmt: skip
    grid = replace(grid, rows=(grid.rows[0], broken, wild))
    summary = Sweep(grid, tmp_path / "out", Settings(data=data, lanes=4, threads=1)).run()
    failed = {r["row"]: r["error"] for r in summary.failed}
    assert "7" in failed["No such layer"]
    assert {r["row"] for r in Store(tmp_path / "out").records() if r["state"] == "done"} >= {
        "BitFit"
    }
    again = Sweep(
        grid, tmp_path / "out",
        Settings(data=data, lanes=4, threads=1, resume=True, retry_failed=True),
    ).run()  # fmt: skip
    assert again.made == len(failed)


def spoil_task_file_of_rate(patch, rate, spoilt):
    """Let the task file of the runs with one rate be made with ``spoilt(file)``."""
    make = execute.make_task_file

    def make_spoilt(trainer, lane, *arguments, **options):
        file = make(trainer, lane, *arguments, **options)
        return spoilt(file) if lane.config.learning_rate == rate else file

    patch.setattr(execute, "make_task_file", make_spoilt)


def with_nan(file):
    """As of a run whose last step made NaN."""
    return dataclasses.replace(
        file, probes=[probe | {"logits": [math.nan] * 2} for probe in file.probes]
    )


def test_a_run_whose_result_cannot_be_made_fails_alone(checkpoint, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    grid = small_grid(checkpoint(), seeds=(0,), epochs=1).only(rows=["BitFit"])
    with monkeypatch.context() as patch:
        spoil_task_file_of_rate(patch, 1e-2, with_nan)
        summary = Sweep(grid, out, Settings(data=data, lanes=3, threads=1)).run()
    assert (summary.done, [r["config"]["learning_rate"] for r in summary.failed]) == (2, [1e-2])
    assert "not JSON compliant" in summary.failed[0]["error"]
    again = {"resume": True, "retry_failed": True}
    summary = Sweep(grid, out, Settings(data=data, lanes=3, threads=1, **again)).run()
    assert (summary.done, summary.failed, summary.made) == (3, [], 1)


def test_a_disk_that_is_full_when_results_are_made_fails_no_run(
    checkpoint, data, tmp_path, monkeypatch
):
    def full(file):
        raise NotWritten("No space left on device")

    out = tmp_path / "out"
    grid = small_grid(checkpoint(), seeds=(0,), epochs=1).only(rows=["BitFit"])
    with monkeypatch.context() as patch:
        spoil_task_file_of_rate(patch, 1e-2, full)
        with pytest.raises(NotWritten):
            Sweep(grid, out, Settings(data=data, lanes=3, threads=1)).run()
    assert Store(out).records() == []
    assert list((out / "work").glob("*/state.checkpoint"))


def test_a_dry_run_counts_failed_runs_that_are_to_be_made_again(checkpoint, data, tmp_path):
    out = tmp_path / "out"
    grid = small_grid(checkpoint(), seeds=(0,), epochs=1).only(rows=["BitFit"])
    grid = replace(grid, rows=(replace(grid.rows[0], options={"terms": "query@7"}),))
    settings = Settings(data=data, lanes=3, threads=1, resume=True)
    assert len(Sweep(grid, out, settings).run().failed) == 3
    planned = dry_run(grid, out, settings)
    assert (planned["runs"], planned["finished"]) == (0, 3)
    planned = dry_run(grid, out, replace(settings, retry_failed=True))
    assert (planned["runs"], planned["finished"]) == (3, 0)


def test_a_sweep_goes_on_with_what_its_host_and_process_id_left(
    checkpoint, data, tmp_path, monkeypatch
):
    """As of a container that was killed and started again: nobody else will let go of it."""
    out, steps = tmp_path / "out", []
    grid = small_grid(checkpoint(), seeds=(0,), epochs=1).only(rows=["BitFit"])
    settings = Settings(data=data, lanes=3, threads=1, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "let_go", lambda store, group: None)
        with pytest.raises(TrainingInterrupted):
            Sweep(grid, out, settings).run(steps.append, lambda: len(steps) > 3)
    assert Store(out).claims()[0].is_alive
    monkeypatch.setattr("bitfit.experiments.store._own", set())
    events = []
    summary = Sweep(grid, out, settings).run(events.append)
    assert not any(isinstance(e, Waiting) for e in events)
    assert (summary.done, summary.made) == (3, 3)


def test_a_directory_that_is_a_file_is_no_place_for_a_sweep(checkpoint, data, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="is a file or below one"):
            Sweep(small_grid(checkpoint()), out, Settings(data=data, threads=1))


def test_a_full_disk_stops_the_sweep_and_fails_no_run(checkpoint, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    grid = small_grid(checkpoint(), seeds=(0,))

    def full(*arguments):
        raise NotWritten("state.checkpoint: cannot be written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_epoch", full)
        with pytest.raises(NotWritten):
            Sweep(grid, out, Settings(data=data, lanes=2, threads=1)).run()
    assert Store(out).records() == []
    summary = Sweep(grid, out, Settings(data=data, lanes=2, threads=1, resume=True)).run()
    assert (summary.failed, summary.made) == ([], 6)


def cut_off(data):
    return data[:-100]


def changed(change):
    """A change of what a state says of its runs, in its file's bytes."""

    def changed_bytes(data):
        tensors, text = unpack_safetensors(data, CHECKPOINT_KEY)
        note = json.loads(text)
        change(note, tensors)
        return pack_safetensors(tensors, CHECKPOINT_KEY, json.dumps(note))

    return changed_bytes


def of_another_machine(note, tensors):
    note["identity"]["masks"] = "kernels"


def of_another_version(note, tensors):
    note["progress"][0]["unheard_of"] = 1


def without_what_it_says(note, tensors):
    note.clear()


def with_a_lane_too_many(note, tensors):
    note["slots"][-1] = 99


def without_a_tensor(note, tensors):
    del tensors["mean.0"]


def with_other_sizes(note, tensors):
    tensors["trained.0"] = tensors["trained.0"][:-1]


@pytest.mark.parametrize(
    "damage",
    [
        cut_off, changed(of_another_machine), changed(of_another_version),
        changed(without_what_it_says), changed(with_a_lane_too_many), changed(without_a_tensor),
        changed(with_other_sizes),
    ],
    ids=["cut", "machine", "version", "note", "lane", "tensor", "size"],
)  # fmt: skip
def test_a_state_that_cannot_be_used_is_left_and_its_group_begins_again(
    damage, finished, checkpoint, data, tmp_path
):
    """Damaged, say, or of a machine that computes in another way: no run fails by that."""
    out = tmp_path / "out"
    stop_after = iter([False] * 3 + [True])
    with pytest.raises(TrainingInterrupted):
        small_sweep(checkpoint(), str(data), str(out)).run(None, lambda: next(stop_after))
    (state,) = (out / "work").glob("*/state.checkpoint")
    state.write_bytes(damage(state.read_bytes()))
    said = []

    def watch(event):
        if isinstance(event, BegunAnew):
            said.append((event.reason, state.with_name("state.checkpoint.old").exists()))

    sweep = small_sweep(checkpoint(), str(data), str(out), budget_seconds=100.0)
    sweep._fits = lambda group, clock: not said  # the group that was begun is enough
    summary = sweep.run(watch)
    ((reason, is_kept),) = said
    assert "state.checkpoint" in reason
    assert is_kept
    assert summary.failed == []
    whole = essence(finished[0])
    made = Store(out).finished()
    assert made
    assert all(essence(out)[run_id] == whole[run_id] for run_id in made)


@pytest.mark.parametrize("lanes", [0, -3, "many"])
def test_lanes_that_cannot_be_meant_are_refused(lanes, data):
    with pytest.raises(UsageError, match="expected 'auto' or 1 to 1024"):
        Settings(data=data, lanes=lanes)


def test_runs_on_a_base_that_does_not_run_packed_come_one_after_the_other(
    checkpoint, data, tmp_path
):
    grid = small_grid(checkpoint("mpnet"), seeds=(0,)).only(rows=["BitFit"])
    events = []
    settings = Settings(data=data, lanes=3, threads=1)
    summary = Sweep(grid, tmp_path / "out", settings).run(events.append)
    assert (summary.failed, summary.made) == ([], 3)
    assert all(len(e.group.runs) == 1 for e in events if isinstance(e, GroupStarted))


def test_a_failed_run_is_said_by_the_exit_code(checkpoint, data, tmp_path, capsys):
    grid = tmp_path / "grid.toml"
    grid.write_text(
        f"""
tasks = [
  {{ name = "tickets", data = "tickets.csv", text = "body", label = "intent" }},
  {{ name = "odd", data = "tickets.csv", text = "body", label = "intent", terms = "query@7" }},
]
base = ["{checkpoint()}"]
epochs = 1
seeds = [0]
[[rows]]
name = "BitFit"
learning_rate = 1e-3
"""
    )
    line = [
        "sweep", str(grid), "--data", str(data), "--out", str(tmp_path / "out"), "--json",
        "--threads", "1", "-q",
    ]  # fmt: skip
    assert run(line) == 1
    report = json.loads(capsys.readouterr().out)
    assert (len(report["failed"]), report["done"]) == (1, 1)
    assert "query@7" in report["failed"][0]["error"]
    # What failed of another task is none of the failures of this command.
    assert run([*line, "--resume", "--tasks", "tickets"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["failed"], report["done"], report["made"]) == ([], 1, 0)


def test_lanes_are_measured_though_some_runs_cannot_be_made(checkpoint, data, tmp_path):
    grid = small_grid(checkpoint(), seeds=(0,))
    bad = Row(name="No such layer", options={"terms": "query@7"}, learning_rate=(1e-3,))
    summary = Sweep(
        replace(grid, rows=(bad, grid.rows[1])), tmp_path / "out",
        Settings(data=data, threads=1, budget_seconds=1000.0),
    ).run()  # fmt: skip
    assert [r["row"] for r in summary.failed] == ["No such layer"]
    assert summary.done > 0


def test_groups_that_nothing_here_depends_on_are_not_waited_for(
    finished, checkpoint, data, tmp_path
):
    """Such as those of another base, which another process works on."""
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    Store(out).claim("foreign", ["of another base"], 1)
    manifest = out / "work" / "foreign.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"host": "elsewhere"}))
    events = []
    small_sweep(checkpoint(), str(data), str(out)).run(events.append, lambda: True)
    assert not any(isinstance(e, Waiting) for e in events)


def test_another_experiment_is_not_written_into_a_directory(finished, checkpoint, data):
    out, settings = finished[0], Settings(data=data, threads=1, resume=True)
    with pytest.raises(UsageError, match="--resume goes on with it"):
        Sweep(small_grid(checkpoint()), out, Settings(data=data, threads=1))
    with pytest.raises(UsageError, match="with epochs 2, not 3"):
        Sweep(small_grid(checkpoint(), epochs=3), out, settings)
    with pytest.raises(UsageError, match=r"begun with threads 1, not 2: .*--move"):
        Sweep(small_grid(checkpoint()), out, Settings(data=data, threads=2, resume=True))


def begin_in_bf16(checkpoint, data, out, **settings):
    options = {"lanes": 2, "threads": 1, "dtype": "bf16"} | settings
    return Sweep(
        small_grid(checkpoint()).only(rows=["BitFit"]), out, Settings(data=data, **options)
    )


def move_to_fp32(checkpoint, data, out, **settings):
    options = {"lanes": 2, "threads": 1, "dtype": "fp32", "resume": True, "move": True} | settings
    return Sweep(small_grid(checkpoint()), out, Settings(data=data, **options))


def rows_of_biases(checkpoint):
    return small_grid(checkpoint()).only(rows=["BitFit", "Frozen"])


def move_back_to_bf16(checkpoint, data, out, threads=1):
    options = {"lanes": 2, "dtype": "bf16", "resume": True, "move": True, "threads": threads}
    return Sweep(rows_of_biases(checkpoint), out, Settings(data=data, **options))


def test_a_base_that_is_not_there_begins_no_experiment(data, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "code").mkdir()
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    (tmp_path / "code" / "config.json").write_text(json.dumps(own))
    (tmp_path / "code" / "mine.py").write_text("raise SystemExit('was run')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers would ask
    for base in ("nosuchbase", str(tmp_path / "empty"), str(tmp_path / "code")):
        with pytest.raises(BaseModelError, match="cannot be loaded"):
            Sweep(small_grid(base), tmp_path / "out", Settings(data=data))
        assert not (tmp_path / "out").exists()


def test_rows_that_train_weights_are_refused_in_bf16_before_anything_is_written(
    checkpoint, data, tmp_path
):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="'Full-FT' cannot run in bf16: weights are trained in"):
        Sweep(small_grid(checkpoint()), out, Settings(data=data, dtype="bf16"))
    assert not out.exists()
    begin_in_bf16(checkpoint, data, out, budget_seconds=0.0).run()
    with pytest.raises(UsageError, match="begun in bf16 with --move"):
        small_sweep(checkpoint(), str(data), str(out))


def test_a_moved_experiment_goes_on_where_it_is_and_repeats_nothing(checkpoint, data, tmp_path):
    out = tmp_path / "out"
    begin_in_bf16(checkpoint, data, out).run()
    planned = dry_run(
        small_grid(checkpoint()), out,
        Settings(data=data, threads=1, dtype="fp32", resume=True, move=True),
    )  # fmt: skip
    assert planned["runs"] == 4 + 3
    assert planned["conditions"]["earlier"] == [{"dtype": "bf16", "device": "cpu", "threads": 1}]
    moved = move_to_fp32(checkpoint, data, out).run()
    assert moved.made >= planned["runs"]  # more where the two protocols choose two rates
    found = {(r["row"], r["environment"]["dtype"]) for r in Store(out).records()}
    assert found == {("BitFit", "bf16"), ("Frozen", "fp32"), ("Full-FT", "fp32")}
    assert move_to_fp32(checkpoint, data, out).run().made == 0
    joins = Settings(data=data, threads=1, resume=True)
    assert Sweep(small_grid(checkpoint()), out, joins).run().made == 0
    conditions = Store(out).experiment()["conditions"]
    assert (conditions["dtype"], len(conditions["earlier"])) == ("fp32", 1)


def test_what_failed_before_the_move_is_made_again(checkpoint, data, tmp_path):
    out = tmp_path / "out"
    summary = begin_in_bf16(checkpoint, data, out).run()
    failed = Store(out).records()[0]
    path = out / "runs" / f"{failed['id']}.json"
    path.write_text(json.dumps(failed | {"state": "failed", "error": "out of memory"}))
    events = []
    moved = move_to_fp32(checkpoint, data, out).run(events.append)
    assert (events[0].begun, events[0].failed) == (0, 1)
    assert (moved.failed, path.exists()) == ([], False)
    again = [r for r in Store(out).records() if r["config"] == failed["config"]]
    assert [r["environment"]["dtype"] for r in again] == ["fp32"]
    assert moved.done == moved.made + summary.made - 1


def test_what_is_done_in_one_precision_is_done_after_moving_there_and_back(
    checkpoint, data, tmp_path
):
    out = tmp_path / "out"
    begin_in_bf16(checkpoint, data, out, budget_seconds=0.0).run()
    move_to_fp32(checkpoint, data, out).run()
    back = move_back_to_bf16(checkpoint, data, out)
    assert [c.dtype for c in back.conditions.earlier] == ["fp32"]
    assert back.run().made == 0


@pytest.mark.parametrize(
    "asked", [{"dtype": "bf16", "threads": 2}, {"dtype": "fp32", "threads": 1}]
)
def test_groups_that_were_begun_begin_again_after_a_move(asked, checkpoint, data, tmp_path):
    """Their checkpoints are of other threads or another precision."""
    out, steps = tmp_path / "out", []
    sweep = begin_in_bf16(checkpoint, data, out)
    with pytest.raises(TrainingInterrupted):
        sweep.run(
            lambda event: steps.append(event) if isinstance(event, StepDone) else None,
            lambda: len(steps) >= 3,
        )
    assert left_in(out / "work")
    events = []
    grid = rows_of_biases(checkpoint).only(rows=["BitFit"])
    options = {"lanes": 2, "resume": True, "move": True}
    moved = Sweep(grid, out, Settings(data=data, **options, **asked))
    moved = Sweep(grid, out, replace(moved.settings, move=False))
    assert moved.run(events.append).failed == []
    assert not left_in(out / "work")


def test_who_works_on_while_another_moves_stops(checkpoint, data, tmp_path):
    out = tmp_path / "out"
    late = begin_in_bf16(checkpoint, data, out)
    move_to_fp32(checkpoint, data, out, budget_seconds=0.0).run()
    with pytest.raises(BitfitError, match="was moved to device cpu, dtype fp32, threads 1"):
        late.run()
    assert Store(out).records() == []


def test_what_is_reused_counts_in_the_precision_that_it_was_made_in(checkpoint, data, tmp_path):
    there = begin_in_bf16(checkpoint, data, tmp_path / "there").run()
    new = move_to_fp32(checkpoint, data, tmp_path / "new", reuse=[tmp_path / "there"])
    assert new.conditions.earlier[0].dtype == "bf16"
    planned = dry_run(
        new.grid.only(rows=["BitFit"]), tmp_path / "none", replace(new.settings, resume=False)
    )
    assert (planned["runs"], planned["finished"]) == (2, 3)  # the repeats are not known yet
    new.run()
    found = [r for r in Store(tmp_path / "new").records() if r["row"] == "BitFit"]
    assert {r["environment"]["dtype"] for r in found} == {"bf16"}
    assert len(found) == there.made


def test_an_experiment_does_not_move_while_someone_works_on_it(checkpoint, data, tmp_path):
    out = tmp_path / "out"
    store = begin_in_bf16(checkpoint, data, out, budget_seconds=0.0).store
    store.claim("theirs", ["some run"], 1)
    described = store.experiment()
    with pytest.raises(UsageError, match="works on it there; stop that first"):
        move_to_fp32(checkpoint, data, out)
    with pytest.raises(BaseModelError, match="no such directory"):
        Sweep(small_grid("./gone"), out, Settings(data=data, dtype="fp32", resume=True, move=True))
    assert store.experiment() == described
    manifest = out / "work" / "theirs.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"host": "", "pid": 0}))
    assert move_to_fp32(checkpoint, data, out).store.claims() == []


def test_a_move_keeps_what_is_not_asked_for(checkpoint):
    bf16 = Conditions(dtype="bf16", device="cpu", threads=3)
    grid = rows_of_biases(checkpoint)
    moved = choose_conditions(grid, bf16, threads=2, move=True)
    assert (moved.dtype, moved.device, moved.threads, moved.earlier) == ("bf16", "cpu", 2, (bf16,))
    assert choose_conditions(grid, bf16, move=True) == bf16
    third = choose_conditions(grid, moved, dtype="fp32", move=True)
    assert third.earlier == (bf16, replace(moved, earlier=()))
    assert third.earlier_dtypes == ("bf16",)
    assert Conditions.from_json(json.loads(json.dumps(third.to_json()))) == third
    assert choose_conditions(grid, third, dtype="bf16", threads=3, move=True).earlier == (
        replace(moved, earlier=()), replace(third, earlier=()),
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_a_move_from_a_gpu_to_a_machine_without_one_goes_to_its_cpu(checkpoint):
    gpu = Conditions(dtype="tf32", device="cuda", threads=1)
    moved = choose_conditions(small_grid(checkpoint()), gpu, move=True)
    assert (moved.dtype, moved.device, moved.earlier) == ("fp32", "cpu", (gpu,))


def test_lanes_are_measured_again_after_a_move(checkpoint, data, tmp_path):
    out = tmp_path / "out"
    store = begin_in_bf16(checkpoint, data, out, budget_seconds=0.0).store
    described = store.experiment()
    described["conditions"]["lanes"] = {"some task": 64}
    store.write_experiment(described)
    settings = Settings(data=data, threads=1, resume=True)
    assert Sweep(rows_of_biases(checkpoint), out, settings).conditions.dtype == "bf16"
    assert store.experiment()["conditions"]["lanes"] == {"some task": 64}
    move_back_to_bf16(checkpoint, data, out, threads=2)
    assert store.experiment()["conditions"]["lanes"] == {}


def test_a_move_is_asked_for_and_told_on_the_command_line(checkpoint, data, tmp_path, capsys):
    grid, out = tmp_path / "grid.toml", tmp_path / "out"
    grid.write_text(sweeping.GRID)
    line = ["sweep", str(grid), "--data", str(data), "--out", str(out), "--base", checkpoint()]
    line += ["--rows", "Frozen", "--lanes", "2", "--threads", "1"]
    assert run([*line, "--dtype", "bf16", "--budget", "0s", "--quiet"]) == 0
    assert run([*line, "--dtype", "fp32", "--resume", "--quiet"]) == 2
    assert "go on here with --move" in capsys.readouterr().err
    assert run([*line, "--dtype", "fp32", "--resume", "--move"]) == 0
    said = capsys.readouterr().err
    assert "moved from device cpu, dtype bf16, threads 1 to device cpu, dtype fp32" in said


def test_those_who_join_with_a_few_rows_leave_what_rows_are_compared_with(
    checkpoint, data, tmp_path
):
    def reference_row(out, grid):
        settings = Settings(data=data, threads=1, resume=True)
        return Sweep(grid, tmp_path / out, settings).store.experiment()["reference_row"]

    plain = small_grid(checkpoint())
    assert reference_row("plain", plain) == "BitFit"
    assert reference_row("plain", plain.only(rows=["Full-FT"])) == "BitFit"
    chosen = small_grid(checkpoint(), reference="Frozen")
    assert reference_row("chosen", chosen) == "Frozen"
    assert reference_row("chosen", chosen.only(rows=["Full-FT"])) == "Frozen"


def test_a_budget_leaves_out_what_does_not_fit_and_says_so(checkpoint, data, tmp_path):
    settings = Settings(data=data, threads=1, lanes=2, budget_seconds=0.0)
    summary = Sweep(small_grid(checkpoint()), tmp_path / "out", settings).run()
    assert summary.made == 0
    assert summary.left_out[0] == "BitFit on tickets, rate 0.0001, seed 0"
    assert len(summary.left_out) >= 6


def test_within_a_budget_the_most_telling_runs_are_made_and_the_order_is_kept(
    checkpoint, data, tmp_path, monkeypatch
):
    """What is too long is left out with its repeats; shorter ones behind it are made."""
    seconds = {"bitfit": 10.0, "frozen": 10.0, "full": 1000.0}
    monkeypatch.setattr(
        Clock, "seconds", lambda clock, group: seconds[group.runs[0].config.method]
    )  # fmt: skip
    events = []
    grid = small_grid(checkpoint())
    full = replace(grid.rows[2], learning_rate=(1e-3, 1e-4))
    grid = replace(grid, rows=(full, *grid.rows[:2]))
    settings = Settings(data=data, threads=1, lanes=1, budget_seconds=900.0)
    summary = Sweep(grid, tmp_path / "out", settings).run(events.append)
    made = [
        (run.row.name, run.config.seed)
        for event in events if isinstance(event, GroupStarted) for run in event.group.runs
    ]  # fmt: skip
    assert made[:5] == [("BitFit", 0)] * 3 + [("Frozen", 0)] * 2  # the search, in the grid's order
    seeds = [seed for _, seed in made[5:]]  # then the repeats: every row before the next seed
    assert seeds == sorted(seeds)
    assert set(seeds) == {1, 2}
    assert summary.left_out == [
        "Full-FT on tickets, rate 0.0001, seed 0", "Full-FT on tickets, rate 0.001, seed 0",
        "Full-FT on tickets, the best rate, seed 1", "Full-FT on tickets, the best rate, seed 2",
    ]  # fmt: skip


def test_a_dry_run_says_what_cannot_be_made(checkpoint, data, tmp_path):
    grid = small_grid(checkpoint())
    wrong = Row(name="wrong", options={"terms": "b_zz"}, learning_rate=(1e-3,))
    grid = replace(grid, rows=(*grid.rows[:1], wrong), reference=None)
    plan = dry_run(grid, tmp_path / "out", Settings(data=data, threads=1))
    errors = {cell["row"]: cell.get("error") for cell in plan["cells"]}
    assert errors["BitFit"] is None
    assert "unknown bias term 'b_zz'" in errors["wrong"]
    assert plan["bytes_while_running"] > 0


def test_a_column_that_is_not_there_is_misuse(checkpoint, data, tmp_path):
    grid = small_grid(checkpoint())
    (task,) = grid.tasks
    wrong = replace(task, data={**task.data, "text": "bdy"})
    with pytest.raises(UsageError, match=r'tickets: .*no column "bdy"'):
        Sweep(grid.replace(tasks=(wrong,)), tmp_path / "out", Settings(data=data, threads=1))


def test_time_that_is_spent_is_not_spent_on_measuring(checkpoint, data, tmp_path, monkeypatch):
    def never(*arguments):
        raise AssertionError("measured")

    monkeypatch.setattr(Clock, "speed", never)
    monkeypatch.setattr("bitfit.experiments.sweep.choose_lane_count", never)
    out = tmp_path / "out"
    summary = Sweep(
        small_grid(checkpoint()), out, Settings(data=data, threads=1, budget_seconds=-1.0)
    ).run()
    assert (summary.made, len(summary.left_out) >= 6) == (0, True)
    # Nor on what another began.
    sweep = small_sweep(checkpoint(), str(data), str(out), budget_seconds=-1.0)
    ids = [run.id for run in planner_of(sweep).search()[:2]]
    sweep.store.claim("0" * 16, ids, 2)
    sweep.store.let_go("0" * 16)
    assert sweep.run().made == 0
    assert [claim.group for claim in sweep.store.claims()] == ["0" * 16]


def test_time_that_a_measurement_took_is_not_spent_on_smaller_ones(
    checkpoint, data, tmp_path, monkeypatch
):
    now, asked = [0.0], []

    def slow(clock, group):
        asked.append(len(group.runs))
        now[0] += 50.0
        return 1000.0

    monkeypatch.setattr(Clock, "seconds", slow)
    settings = Settings(data=data, threads=1, lanes=4, budget_seconds=10.0)
    sweep = Sweep(small_grid(checkpoint()), tmp_path / "out", settings)
    monkeypatch.setattr(sweep, "_time_left", lambda: 10.0 - now[0])
    assert sweep.run().made == 0
    assert asked == [4]


def test_of_runs_that_are_too_long_together_those_that_fit_are_made(
    checkpoint, data, tmp_path, monkeypatch
):
    """Not the less telling ones behind them."""
    monkeypatch.setattr(Clock, "seconds", lambda clock, group: 400.0 * len(group.runs))
    events = []
    settings = Settings(data=data, threads=1, lanes=4, budget_seconds=900.0)
    Sweep(small_grid(checkpoint()), tmp_path / "out", settings).run(events.append)
    groups = [event.group for event in events if isinstance(event, GroupStarted)]
    assert [run.row.name for run in groups[0].runs] == ["BitFit", "BitFit"]


def test_what_a_group_took_gives_the_same_estimate_again(checkpoint, data, tmp_path):
    """The evaluation that it had is not taken for training, and then added once more."""
    sweep = small_sweep(checkpoint(), str(data), str(tmp_path / "out"))
    planner = planner_of(sweep)
    clock = Clock(planner.material)
    runs = planner.search()[:2]
    group = make_group(runs, 2)
    clock.learn(group, {run.id: run.config.epochs for run in runs}, 12.0)
    assert clock.seconds(group) == pytest.approx(12.0)
    clock.learn(group, {run.id: 1 for run in runs}, 12.0)  # stopped early: slower than it was
    assert clock.seconds(group) > 12.0
    before = dict(clock.speeds)
    clock.learn(group, {runs[0].id: 2}, 1.0)  # the other failed, who knows when
    assert clock.speeds == before


def test_a_failure_of_one_who_slept_does_not_stand_before_what_another_made(
    checkpoint, data, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    sweep = small_sweep(checkpoint(), str(data), str(out))
    collect = LocalExecutor.collect

    def fail_elsewhere(self, timeout):
        outcomes = collect(self, timeout)
        for outcome in outcomes:
            for result in outcome.results:
                failed = {**result.record, "state": "failed", "error": "no device"}
                sweep.store.write(Result(record=failed))
        return outcomes

    with monkeypatch.context() as patch:
        patch.setattr(LocalExecutor, "collect", fail_elsewhere)
        summary = sweep.run()
    assert summary.failed == []
    assert summary.done == summary.made > 6


def test_one_base_under_two_names_is_refused(checkpoint, data, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint(), copy)
    grid = small_grid(checkpoint()).replace(base=(checkpoint(), str(copy))).only(rows=["Frozen"])
    sweep = Sweep(grid, tmp_path / "out", Settings(data=data, threads=1, lanes=2))
    with pytest.raises(UsageError, match="are the same: leave one out"):
        sweep.run()
    assert sweep.store.records() == []  # before days of the first
    with pytest.raises(UsageError, match="are the same: leave one out"):
        dry_run(grid, tmp_path / "none", Settings(data=data, threads=1))


def test_missing_data_is_refused_or_left_out(checkpoint, data, tmp_path):
    grid = small_grid(checkpoint()).only(tasks=["tickets", "rte"])
    with pytest.raises(DataError, match="rte: "):
        Sweep(grid, tmp_path / "a", Settings(data=data, threads=1)).run()
    assert not (tmp_path / "a").exists()
    settings = Settings(data=data, threads=1, lanes=2, skip_missing=True, budget_seconds=0.0)
    summary = Sweep(grid, tmp_path / "b", settings).run()
    assert summary.missing_tasks[0].startswith("rte: ")


@pytest.mark.parametrize(
    ("asked", "message"),
    [({"device": "cuda:99"}, "this torch sees"), ({"dtype": "tf32", "device": "cpu"}, "tf32")],
)
def test_what_the_machine_does_not_have_is_refused_before_anything_is_written(
    asked, message, checkpoint, data, tmp_path
):
    settings = Settings(data=data, threads=1, **asked)
    with pytest.raises(BitfitError, match=message):
        Sweep(small_grid(checkpoint()), tmp_path / "a", settings)
    assert not (tmp_path / "a").exists()


def test_the_most_runs_side_by_side_depend_on_the_device():
    assert most_lanes("cpu") == 16
    assert most_lanes("cuda:0") == 64


def test_runs_are_copied_from_an_experiment_that_has_them(finished, checkpoint, data, tmp_path):
    settings = Settings(data=data, threads=1, lanes=2, reuse=[finished[0]])
    summary = Sweep(small_grid(checkpoint()), tmp_path / "out", settings).run()
    assert summary.made == 0
    assert essence(tmp_path / "out") == essence(finished[0])


def test_a_dry_run_leaves_out_what_another_experiment_has(finished, checkpoint, data, tmp_path):
    settings = Settings(data=data, threads=1, reuse=(finished[0],))
    plan = dry_run(small_grid(checkpoint(), seeds=(0,)), tmp_path / "new", settings)
    assert plan["runs"] == 0


def test_a_dry_run_counts_what_is_left_and_writes_nothing(finished, checkpoint, data, tmp_path):
    out = tmp_path / "none"
    plan = dry_run(small_grid(checkpoint()), out, Settings(data=data, threads=1))
    assert not out.exists()
    assert plan["runs"] == 6 + 3 * 2
    assert plan["seconds"] > 0
    assert {cell["row"]: cell["runs"] for cell in plan["cells"]} == {
        "BitFit": 5, "Frozen": 4, "Full-FT": 3,
    }  # fmt: skip
    settings = Settings(data=data, threads=1, resume=True)
    assert dry_run(small_grid(checkpoint()), finished[0], settings)["runs"] == 0


def test_a_learning_curve_draws_its_rows_by_seed(checkpoint, data, tmp_path):
    grid = small_grid(checkpoint(), train_rows=(8, 16), seeds=(0, 1)).only(rows=["Full-FT"])
    Sweep(grid, tmp_path / "out", Settings(data=data, threads=1)).run()
    records = Store(tmp_path / "out").records()
    assert [(r["train_rows"], r["config"]["seed"]) for r in records] == [
        (8, 0), (8, 1), (16, 0), (16, 1),
    ]  # fmt: skip
    assert len({r["data"]["train"] for r in records}) == 4
    assert [r["rows"]["train"] for r in records] == [8, 8, 16, 16]


def test_sizes_beyond_the_data_or_the_limit_become_one_of_all_there_is(checkpoint, data, tmp_path):
    """Of 40 rows 24 are for training."""
    events: list[object] = []
    grid = small_grid(checkpoint(), train_rows=(8, 32, 64), seeds=(0,)).only(rows=["Full-FT"])
    settings = Settings(data=data, threads=1)
    planned = dry_run(grid, tmp_path / "out", settings)
    assert [(cell["train_rows"], cell["runs"]) for cell in planned["cells"]] == [(8, 1), (24, 1)]
    assert planned["cut_sizes"] == ["at most 24 training rows of tickets: no 32, 64"]
    Sweep(grid, tmp_path / "out", settings).run(events.append)
    records = Store(tmp_path / "out").records()
    assert [(r["train_rows"], r["rows"]["train"]) for r in records] == [(8, 8), (24, 24)]
    (told,) = (event for event in events if isinstance(event, Planned))
    assert (told.total, told.cut_sizes) == (2, planned["cut_sizes"])
    limited = dry_run(grid.only(limits={"": 12}), tmp_path / "other", settings)
    assert [cell["train_rows"] for cell in limited["cells"]] == [8, 12]


def test_a_dry_run_of_several_experiments_counts_what_they_share_once(checkpoint, data, tmp_path):
    grid, planned = small_grid(checkpoint()), set()
    settings = Settings(data=data, threads=1)
    part = grid.only(rows=["BitFit"])
    first = dry_run(part, tmp_path / "one", settings, planned=planned)
    second = dry_run(grid, tmp_path / "two", settings, planned=planned)
    assert (first["runs"], first["shared"]) == (3 + 2, 0)
    assert second["shared"] == first["runs"]
    assert second["runs"] == dry_run(grid, tmp_path / "two", settings)["runs"] - first["runs"]


def test_a_random_choice_costs_its_places_too(checkpoint, data, tmp_path):
    row = Row(name="random", options={"method": "random"}, learning_rate=(1e-3,))
    grid = replace(small_grid(checkpoint(), seeds=(0,)), rows=(row,), reference=None)
    Sweep(grid, tmp_path / "out", Settings(data=data, threads=1)).run()
    (record,) = Store(tmp_path / "out").records()
    count = record["trainable"]
    assert record["cost"]["task_bytes"] == 12 * count["encoder"] + 4 * count["head"]


def test_what_cannot_be_made_has_no_repeats_to_come(checkpoint, data, tmp_path):
    row = Row(name="lost", options={"terms": "all@last9"}, learning_rate=(1e-3, 1e-4))
    grid = replace(small_grid(checkpoint()), rows=(row,), reference=None)
    settings = Settings(data=data, threads=1, resume=True)
    assert len(Sweep(grid, tmp_path / "out", settings).run().failed) == 2
    assert dry_run(grid, tmp_path / "out", settings)["runs"] == 0


def test_what_the_time_does_not_suffice_for_is_named_with_its_repeats(checkpoint, data, tmp_path):
    out = tmp_path / "out"
    summary = small_sweep(checkpoint(), str(data), str(out), budget_seconds=0.0).run()
    assert len(summary.left_out) == 6 + 3 * 2
    assert "BitFit on tickets, the best rate, seed 2" in summary.left_out


def test_rows_that_ask_for_the_same_runs_are_refused(checkpoint, data, tmp_path):
    grid = small_grid(checkpoint())
    twin = replace(grid, rows=(grid.rows[0], replace(grid.rows[0], name="Again")))
    with pytest.raises(UsageError, match="'BitFit' and 'Again' ask for the same runs"):
        Sweep(twin, tmp_path / "out", Settings(data=data, threads=1)).run()


def test_groups_are_told_as_they_begin_and_end(checkpoint, data, tmp_path):
    events = []
    grid = small_grid(checkpoint(), seeds=(0,))
    Sweep(grid, tmp_path / "out", Settings(data=data, threads=1, lanes=4)).run(events.append)
    begun = [e.group.id for e in events if isinstance(e, GroupStarted)]
    ended = [e.group.id for e in events if isinstance(e, GroupFinished)]
    assert begun == ended
    # Three rates of biases and one of the head alone; the other; and full on its own.
    sizes = [len(e.results) for e in events if isinstance(e, GroupFinished)]
    assert sorted(sizes) == [1, 1, 4]


def test_a_group_that_is_taken_over_keeps_its_id_and_what_is_finished_is_not_made_again(
    finished, checkpoint, data, tmp_path
):
    """Of processes that were killed before they wrote their results, and just after."""
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    store = Store(out)
    runs = [r["id"] for r in store.records() if r["row"] == "BitFit" and r["config"]["seed"] == 0]
    store.claim("done", runs[:2], 2)
    store.let_go("done")
    store.forget(runs[2])
    events = []
    with pytest.raises(TrainingInterrupted):  # alone in a group, where two are side by side
        small_sweep(checkpoint(), str(data), str(out)).run(events.append, lambda: True)
    claimed = store.claims()
    assert [claim.runs for claim in claimed] == [[runs[2]]]
    summary = small_sweep(checkpoint(), str(data), str(out)).run(events.append)
    assert summary.made == 1
    assert {e.group.id for e in events if isinstance(e, GroupStarted)} == {claimed[0].group}
    assert left_in(out / "work") == []
