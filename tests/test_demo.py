from __future__ import annotations

import csv
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from bitfit import TaskFile, demo
from bitfit.cli import main, showing_demo
from bitfit.errors import BitfitError
from bitfit.training.plan import checkpoint_path
from bitfit.training.train import StepDone


@pytest.mark.parametrize("task", demo.TASKS)
def test_the_example_files_come_with_the_package(task: str) -> None:
    texts, labels = [], []
    for path in demo.example_files(task):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        texts.append({row["text"] for row in rows})
        labels.append({row["label"] for row in rows})
    assert labels[0] == labels[1]
    assert not texts[0] & texts[1]
    assert not (texts[0] | texts[1]) & set(demo.SENTENCES)


def test_a_missing_example_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BitfitError, match=r"mood\.train\.csv is missing"):
        demo.example_files("mood")


def test_the_demo_trains_three_tasks_and_answers_in_one_batch(
    tmp_path: Path, checkpoint: Callable[..., str]
) -> None:
    started: list[tuple[str, str]] = []
    steps = 0

    def watch(event: object) -> None:
        nonlocal steps
        if isinstance(event, demo.DemoStarted):
            started.append((event.task, event.method))
        steps += isinstance(event, StepDone)

    first = tmp_path / f"{demo.TASKS[0]}.bitfit.safetensors"
    checkpoint_path(first).write_bytes(b"of a demo that was stopped")
    result = demo.run_demo(tmp_path, base=checkpoint("bert"), quick=True, on_event=watch)
    files = [f"{task}.bitfit.safetensors" for task in demo.TASKS]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
    assert started == [(t, "bitfit") for t in demo.TASKS]
    assert steps == 3 * demo.QUICK["limit"] / 8
    assert [row["task"] for row in result.tasks] == list(demo.TASKS)
    for row in result.tasks:
        assert TaskFile.load(row["file"]).score == row["score"]
        assert row["frozen"] is None
        assert Path(row["file"]).stat().st_size == row["file_bytes"]
    assert len(result.answers) == len(demo.SENTENCES) == 4
    for answers in result.answers:
        assert [answer.task for answer in answers] == list(demo.TASKS)
    report = result.to_json()
    assert set(report["answers"][0]) == {"text", *demo.TASKS}


def test_the_command_shows_both_tables_and_where_the_files_are(
    tmp_path: Path, checkpoint: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["demo", "--quick", "--keep", str(tmp_path), "--base", checkpoint("bert")])
    out, err = capsys.readouterr()
    assert code == 0
    assert "3/3 sentiment" in err
    for expected in ("meaningless", "majority", str(tmp_path), "bitfit predict", *demo.SENTENCES):
        assert expected in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_demo_says_in_a_line_what_is_kept(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(folder: Path, **_: object) -> None:
        signal.raise_signal(number)

    monkeypatch.setattr(showing_demo, "run_demo", stopped)
    assert main(["demo", "--keep", str(tmp_path)]) == 130
    again = "The same command trains all three tasks anew\n"
    assert capsys.readouterr() == ("", f"stopped; no task file is there yet. {again}")
    demo.task_file(tmp_path, "intent").write_bytes(b"of a task that was finished")
    assert main(["demo", "--keep", str(tmp_path)]) == 130
    kept = f"kept in {tmp_path}: intent.bitfit.safetensors"
    assert capsys.readouterr() == ("", f"stopped; {kept}. {again}")


def test_a_file_where_the_folder_should_be_is_refused_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["demo", "--quick", "--keep", str(tmp_path / "file"), "--base", "/none"]) == 2
    assert "is a file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
