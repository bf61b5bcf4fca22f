from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

import bitfit
from bitfit import DataConfig, cli
from bitfit.cli import app, console, options, training
from bitfit.errors import BaseModelError, DataError, NotWritten, UsageError
from bitfit.experiments.store import Store
from bitfit.experiments.sweep import Summary
from bitfit.jsonable import jsonable
from bitfit.training.finetune import RunStarted

GOOD, BAD = "good nice fast", "bad broken late slow"


def write_rows(path: Path, rows: int = 40, columns: str = "body,mood", seed: int = 0) -> Path:
    """A CSV whose two labels are told by single words: even a random base learns something."""
    draw = random.Random(seed)
    lines = [columns]
    for i in range(rows):
        words, label = (GOOD, "glad") if i % 2 else (BAD, "sad")
        text = " ".join([*draw.choices("the a bike film was is it".split(), k=3),
                         *draw.choices(words.split(), k=2)])  # fmt: skip
        lines.append(f"{text} {draw.randrange(10)},{label}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def base(checkpoint: Callable[..., str]) -> str:
    return checkpoint("bert")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A function from arguments to (exit code, standard output, standard error)."""

    def run_it(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err, "escape codes without a terminal"
        assert "Traceback" not in err
        return code, out, err

    return run_it


Run = Callable[..., tuple[int, str, str]]
QUICK = ("--epochs", 2, "--lr", "5e-3", "--dtype", "fp32")


@pytest.fixture
def trained(tmp_path: Path, base: str, run: Run) -> tuple[Path, dict[str, Any], Path]:
    """A task file, the report of its training, and the data."""
    data, out = write_rows(tmp_path / "moods.csv"), tmp_path / "moods.bitfit.safetensors"
    code, text, err = run(
        "train", "--base", base, "--data", data, "--text", "body", "--label", "mood",
        "--out", out, *QUICK, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert text.count("\n") == 1
    return out, json.loads(text), data


# ------------------------------------------------------------------ train


def test_train_json_is_one_object_with_what_the_issue_lists(
    trained: tuple[Path, dict[str, Any], Path],
) -> None:
    out, report, _ = trained
    needed = (
        "task metric score scores method terms seed learning_rate epochs train_seconds "
        "examples_per_second tokens_per_second peak_memory_bytes trainable file file_bytes"
    )
    assert not set(needed.split()) - report.keys()
    assert set(report["trainable"]) == {"encoder", "head"}
    assert report["task"] == "moods"
    assert report["file"] == str(out)
    assert report["file_bytes"] == out.stat().st_size


def test_without_a_terminal_training_prints_a_line_per_epoch_and_a_summary(
    tmp_path: Path, base: str, run: Run
) -> None:
    data = write_rows(tmp_path / "moods.csv")
    out = tmp_path / "x.bitfit.safetensors"
    code, text, err = run("train", "--base", base, "--data", data, "--out", out, *QUICK,
                          "--text", "body", "--label", "mood")  # fmt: skip
    assert code == 0
    assert [line[:9] for line in err.splitlines() if line.startswith("epoch")] == [
        "epoch 1/2", "epoch 2/2",
    ]  # fmt: skip
    for expected in ("accuracy", "majority", "in the head", f"bitfit predict {out}", "rows/s"):
        assert expected in text


def test_the_default_file_is_named_after_the_task_and_said(
    tmp_path: Path, base: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "moods.csv")
    monkeypatch.chdir(tmp_path)
    code, _, err = run("train", "--base", base, "--data", "moods.csv", "--text", "body",
                       "--label", "mood", *QUICK)  # fmt: skip
    assert code == 0
    assert (tmp_path / "moods.bitfit.safetensors").is_file()
    assert str(tmp_path / "moods.bitfit.safetensors") in err


def test_quiet_hides_progress_and_notes_only(tmp_path: Path, base: str, run: Run) -> None:
    data = write_rows(tmp_path / "moods.csv")
    code, out, err = run("train", "--base", base, "--data", data, "--text", "body", "--label",
                         "mood", "--out", tmp_path / "q.safetensors", *QUICK, "-q")  # fmt: skip
    assert (code, err) == (0, "")
    assert "accuracy" in out


def test_every_evaluation_goes_to_the_log_and_to_tensorboard(
    tmp_path: Path, base: str, run: Run
) -> None:
    data, log, board = write_rows(tmp_path / "m.csv"), tmp_path / "logs" / "l.jsonl", tmp_path / "b"
    code, text, _ = run(
        "train", "--base", base, "--data", data, "--text", "body", "--label", "mood", "--lr",
        "auto", "--epochs", 1, "--out", tmp_path / "a.safetensors", "--log", log,
        "--tensorboard", board, "--json", "--dtype", "fp32",
    )  # fmt: skip
    assert code == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["learning_rate"] for line in lines] == [1e-4, 4e-4, 7e-4, 1e-3]
    assert all("accuracy" in line["scores"] for line in lines)
    assert len(list(board.glob("lr-*/events*"))) == 4
    assert json.loads(text)["learning_rate"] in (1e-4, 4e-4, 7e-4, 1e-3)


def test_a_missing_tensorboard_names_the_extra(
    tmp_path: Path, base: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    data = write_rows(tmp_path / "m.csv")
    code, _, err = run("train", "--base", base, "--data", data, "--tensorboard", tmp_path / "b")
    assert code == 2
    assert "pip install 'bitfit[tensorboard]'" in err


def test_dry_run_says_what_would_be_trained_and_writes_nothing(
    tmp_path: Path, base: str, run: Run
) -> None:
    data = write_rows(tmp_path / "moods.csv")
    with data.open("a") as file:
        file.write("only one column\n")
    arguments = ("train", "--base", base, "--data", data, "--text", "body", "--label", "mood",
                 "--out", tmp_path / "no" / "x.safetensors", "--dry-run", "--skip-bad-rows",
                 "--terms", "b_q,b_m2", "--max-length", 5)  # fmt: skip
    code, out, _ = run(*arguments, "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["rows"] == {"train": 36, "dev": 4}
    assert plan["labels"] == ["glad", "sad"]
    assert plan["trainable"] == {"encoder": 2 * 32 + 2 * 64, "head": 66}
    assert plan["steps"] == 5 * 5
    assert plan["truncated_share"] == 1.0
    assert len(plan["skipped_rows"]) == 1
    assert not (tmp_path / "no").exists()
    code, out, _ = run(*arguments)
    assert "100.0% of train" in out
    assert "moods.csv:42" in out


def test_numbers_taken_as_measures_are_said_first_with_the_way_out(
    tmp_path: Path, base: str, run: Run
) -> None:
    data = tmp_path / "rooms.csv"
    data.write_text("text,label\n" + "".join(f"the film {i},{i % 25}\n" for i in range(50)))
    arguments = ("train", "--base", base, "--data", data, "--out", tmp_path / "x.safetensors",
                 *QUICK)  # fmt: skip
    said = 'column "label" holds 25 different numbers: read as regression'
    code, _, err = run(*arguments)
    assert code == 0, err
    first = err.splitlines()[0]
    assert first.startswith(said)
    assert first.endswith("--kind classification takes them as classes")
    assert said in run(*arguments, "--dry-run")[2]
    code, out, err = run(*arguments, "--kind", "classification", "--json")
    assert code == 0, err
    assert "read as" not in err
    assert json.loads(out)["metric"] == "accuracy"
    for quiet_or_named in (("-q",), ("--kind", "regression")):
        assert "read as" not in run(*arguments, *quiet_or_named)[2]


def test_skipped_rows_are_counted_and_listed(tmp_path: Path, base: str, run: Run) -> None:
    data = write_rows(tmp_path / "moods.csv")
    with data.open("a") as file:
        file.write("a,b,c\n")
    arguments = ("train", "--base", base, "--data", data, "--text", "body", "--label", "mood",
                 "--out", tmp_path / "x.safetensors", *QUICK)  # fmt: skip
    code, _, err = run(*arguments)
    assert code == 1
    assert "moods.csv:42" in err
    code, _, err = run(*arguments, "--skip-bad-rows")
    assert code == 0
    assert "1 bad row left out" in err
    assert "moods.csv:42" in err


def test_patience_zero_means_never(tmp_path: Path, base: str, run: Run) -> None:
    data = write_rows(tmp_path / "moods.csv")
    code, out, _ = run(
        "train", "--base", base, "--data", data, "--text", "body", "--label", "mood", "--json",
        "--lr", "1e-9", "--epochs", 6, "--patience", 0, "--out", tmp_path / "x.safetensors",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["epochs"] == 6


def test_undefined_scores_are_null_in_json(tmp_path: Path, base: str, run: Run) -> None:
    data = tmp_path / "scores.csv"
    data.write_text("text,score\n" + "".join(f"the film {i},{i / 7}\n" for i in range(20)))
    dev = tmp_path / "same.csv"
    dev.write_text("text,score\n" + "the film,1.5\nthe film,2.5\n" * 2)
    code, out, _ = run("train", "--base", base, "--data", data, "--dev", dev, "--kind",
                       "regression", "--label", "score", "--text", "text", "--json", *QUICK,
                       "--out", tmp_path / "x.safetensors")  # fmt: skip
    assert code == 0
    report = json.loads(out, parse_constant=pytest.fail)
    assert report["score"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--lr", "fast"), 2, "neither a number nor 'auto'"),
        (("--storage", "fp8"), 2, "fp32, fp16, bf16, int8"),
        (("--dtype", "fp64"), 2, "'fp64' is not one of auto, fp32, bf16"),
        (("--method", "lora"), 2, "'lora'"),
        (("--recipe", "papre"), 2, "'papre'"),
        (("--terms", "queri"), 2, "Did you mean 'query'?"),
        (("--terms", "pooler", "--pooling", "cls"), 2, "error: --terms 'pooler' names the pooler"),
        (("--kind", "multilabel", "--class-weights", "balanced"), 2, "error: --class-weights 'bal"),
        (("--task", "mrcp"), 2, "Did you mean 'mrpc'?"),
        (("--label", "mod"), 2, 'mood'),
        (("--epochs", "0"), 2, "--epochs is 0; expected 1 to"),
        (("--lr", "-1"), 2, "error: --lr is -1.0; expected 0.0 to 1.0"),
        (("--batch-size", "0"), 2, "error: --batch-size is 0"),
        (("--max-length", "2"), 2, "error: --max-length is 2"),
        (("--dev-fraction", "2"), 2, "error: --dev-fraction is 2.0"),
        (("--limit", "0"), 2, "error: --limit is 0"),
        (("--data-seed", "-1"), 2, "error: --data-seed is -1"),
        (("--seed", "-1"), 2, "error: --seed is -1"),
        (("--token-column", "pos"), 2, 'error: unknown --token-column "pos"'),
        (("--split", "test"), 2, "error: --split is 'test', but"),
        (("--epochs", "many"), 2, "'many' for '--epochs'"),
        (("--name", "a b"), 2, "'a b'"),
        (("--threads", "0"), 2, "--threads"),
        (("--nonsense",), 2, "--nonsense"),
        (("--base", "/no/such/folder"), 1, "no such directory"),
        (("--kind", "vibes"), 2, "vibes"),
    ],
)  # fmt: skip
def test_misuse_is_told_apart_from_failure(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path, base: str, run: Run
) -> None:
    data = write_rows(tmp_path / "moods.csv")
    found, out, err = run("train", "--base", base, "--data", data, "--text", "body", "--label",
                          "mood", "--out", tmp_path / "x.safetensors", *arguments)  # fmt: skip
    assert (found, out) == (code, "")
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_place_that_takes_no_file_is_said_before_anything_is_read(
    more: tuple[str, ...], tmp_path: Path, run: Run
) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("mine")
    folder.mkdir()
    below = f"the folder {file} cannot be written to (Not a directory); choose another"
    places = [
        (file / "x", f"error: --out {file}/x: {below}"),
        (file / "a" / "x", f"error: --out {file}/a/x: {below}"),
        (folder, f"error: --out {folder} is a directory"),
        (file, f"error: --out {file} exists and was not written by bitfit"),
        (tmp_path / ("n" * 300), "File name too long"),
    ]
    if Path("/proc/self").exists():
        places.append((Path("/proc/x"), "--out /proc/x: the folder /proc cannot be written to ("))
    for out, message in places:
        code, _, err = run("train", "--data", tmp_path / "none.csv", "--out", out, *more)
        assert (code, message in err) == (2, True), err
    assert sorted(tmp_path.iterdir()) == [file, folder]
    assert (file.read_text(), [*folder.iterdir()]) == ("mine", [])


def test_what_a_dry_run_says_of_dev_rows_lengths_and_the_state(
    tmp_path: Path, base: str, run: Run
) -> None:
    data = write_rows(tmp_path / "moods.csv")
    dev, out = tmp_path / "dev.csv", tmp_path / "x.bitfit.safetensors"
    seen = data.read_text(encoding="utf-8").splitlines()[1].split(",")[0]
    dev.write_text(f"body,mood\nnever seen,glad\n{seen},sad\n", encoding="utf-8")
    arguments = ("train", "--base", base, "--data", data, "--text", "body", "--label", "mood",
                 "--dev", dev, "--out", out, "--max-length", 5000)  # fmt: skip
    code, text, err = run(*arguments, "--dry-run", "--resume")
    assert code == 0
    length = int(text.split("of train at ")[1].split()[0])
    assert "1 of 2 dev rows stand among the training rows too" in err
    assert "--max-length 5000 is more than " in err
    assert f"texts are cut at {length} tokens" in err
    assert f"no checkpoint beside {out}: --resume starts anew" in err
    code, text, err = run(*arguments, "--dry-run", "--quiet")
    assert (code, err) == (0, "")
    dev.unlink()
    dev.symlink_to(data)
    code, _, err = run(*arguments)
    assert code == 2
    assert f"error: --dev {dev} is the file that is trained on" in err


def test_a_missing_file_and_a_missing_option(run: Run, tmp_path: Path) -> None:
    code, _, err = run("train", "--data", tmp_path / "none.csv")
    assert code == 1
    assert "none.csv" in err
    code, _, err = run("train")
    assert code == 2
    assert "--data" in err
    assert "bitfit train --help" in err


# ------------------------------------------------------------------ the round trip


def test_eval_gives_the_score_that_train_reported(
    trained: tuple[Path, dict[str, Any], Path], base: str, run: Run, tmp_path: Path
) -> None:
    file, report, data = trained
    arguments = ("eval", file, "--data", data, "--text", "body", "--label", "mood", "--base", base)
    code, out, _ = run(*arguments, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["scores"] == report["scores"]
    assert found["rows"] == report["rows"]["dev"], "only what training held out"
    assert "held out" in found["notes"][0]
    code, out, err = run(*arguments)
    assert "accuracy" in out
    assert "held out" in err
    other = write_rows(tmp_path / "other.csv", rows=10, seed=5)
    _, out, _ = run("eval", file, "--data", other, "--text", "body", "--label", "mood",
                    "--base", base, "--json")  # fmt: skip
    assert json.loads(out)["rows"] == 10
    assert json.loads(out)["notes"] == []


def test_eval_of_training_rows_says_so(
    trained: tuple[Path, dict[str, Any], Path], base: str, run: Run
) -> None:
    file, report, data = trained
    _, out, _ = run("eval", file, "--data", data, "--text", "body", "--label", "mood", "--base",
                    base, "--split", "train", "--json")  # fmt: skip
    found = json.loads(out)
    assert found["rows"] == sum(report["rows"].values())
    _, out, _ = run("eval", file, "--data", data, "--text", "body", "--label", "mood", "--base",
                    base, "--split", "dev", "--dev-fraction", 0, "--json")  # fmt: skip
    assert json.loads(out)["rows"] == sum(report["rows"].values())


def test_eval_refuses_other_labels(
    trained: tuple[Path, dict[str, Any], Path], base: str, run: Run, tmp_path: Path
) -> None:
    other = tmp_path / "other.csv"
    other.write_text("body,mood\nthe film,angry\n")
    code, _, err = run("eval", trained[0], "--data", other, "--text", "body", "--label", "mood",
                       "--base", base)  # fmt: skip
    assert code == 1
    assert "other.csv:2" in err
    assert "glad" in err


def test_predict_in_its_formats(
    trained: tuple[Path, dict[str, Any], Path], base: str, run: Run, tmp_path: Path
) -> None:
    file = trained[0]
    code, out, err = run("predict", file, "good film", "[red]bad[/red] bike", "--base", base)
    assert code == 0, err
    rows = [line.split("\t") for line in out.splitlines()]
    assert [row[2] for row in rows] == ["good film", "[red]bad[/red] bike"]
    assert {row[0] for row in rows} <= {"glad", "sad"}
    assert all(0.5 <= float(row[1]) <= 1 for row in rows)
    _, out, _ = run("predict", file, "good film", "--base", base, "--json")
    answer = json.loads(out)
    assert answer["task"] == "moods"
    assert answer["text"] == "good film"
    assert answer["label"] == rows[0][0]
    _, out, _ = run("predict", file, "film", "--base", base, "--min-confidence", 1)
    assert out.startswith("?\t")


def test_predict_from_standard_input_and_from_a_file_agree(
    trained: tuple[Path, dict[str, Any], Path], base: str, run: Run, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    file, _, data = trained
    texts = [line.rpartition(",")[0] for line in data.read_text().splitlines()[1:]]
    stream = io.TextIOWrapper(io.BytesIO("\n".join(texts).encode()))
    monkeypatch.setattr("sys.stdin", stream)
    code, piped, _ = run("predict", file, "--base", base)
    assert code == 0
    assert piped.count("\n") == len(texts)
    answers = tmp_path / "out" / "answers.txt"
    code, out, _ = run("predict", file, "--base", base, "--input", data, "--text", "body",
                       "--output", answers)  # fmt: skip
    assert (code, out) == (0, "")
    assert answers.read_text() == piped
    assert [p.name for p in answers.parent.iterdir()] == ["answers.txt"]


def test_large_input_is_answered_in_chunks(
    trained: tuple[Path, dict[str, Any], Path], base: str, run: Run, tmp_path: Path
) -> None:
    source = tmp_path / "many.txt"
    source.write_text("the film was good\n" * 600)
    code, out, _ = run("predict", trained[0], "--base", base, "--input", source)
    assert code == 0
    assert out.count("\n") == 600


def test_a_failed_prediction_leaves_the_old_output(
    trained: tuple[Path, dict[str, Any], Path], base: str, run: Run, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.txt"
    source.write_text('{"text": "a"}\n' * 300 + "nonsense\n")
    target.write_text("old")
    code, _, err = run("predict", trained[0], "--base", base, "--input", source, "-o", target)
    assert code == 1
    assert "in.jsonl:301" in err
    assert target.read_text() == "old"


def test_predict_never_writes_over_what_it_reads(
    trained: tuple[Path, dict[str, Any], Path], base: str, run: Run, tmp_path: Path
) -> None:
    file, source = trained[0], tmp_path / "in.txt"
    source.write_text("good film\n")
    other, link = tmp_path / "other.safetensors", tmp_path / "link.txt"
    other.write_bytes(b"x")
    link.symlink_to(source)
    for output in (file, source, other, link):
        before = output.read_bytes()
        code, _, err = run("predict", file, "--base", base, "--input", source, "-o", output)
        assert code == 2
        assert "name another file" in err
        assert output.read_bytes() == before


def test_the_input_is_checked_before_the_base_is_loaded(
    trained: tuple[Path, dict[str, Any], Path], run: Run, tmp_path: Path
) -> None:
    (tmp_path / "tabs.txt").write_text("one\ttwo\n")
    (tmp_path / "c.csv").write_text("a,b\n1,2\n")
    (tmp_path / "header.csv").write_text("text\n")
    (tmp_path / "empty.txt").write_text("")
    for name, code, message in (
        ("none.txt", 1, "none.txt: No such file"),
        (".", 2, "is a folder"),
        ("c.csv", 2, "body"),
        ("tabs.txt", 1, "tabs.txt:1: a tab separates two texts, but task 'moods' takes one"),
        ("header.csv", 1, "header.csv: no rows below the header; expected at least one"),
        ("empty.txt", 1, "empty.txt: no rows; expected at least one to answer"),
    ):
        more = ("--text", "body") if name == "c.csv" else ()
        found, _, err = run("predict", trained[0], "--base", "/no/such/base", "--input",
                            tmp_path / name, *more)  # fmt: skip
        assert (found, message in err) == (code, True), err


def test_a_closed_standard_input_is_said_before_the_base_is_loaded(
    trained: tuple[Path, dict[str, Any], Path], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it after <&-
    code, _, err = run("predict", trained[0], "--base", "/no/such/base")
    assert (code, err) == (
        2, "error: standard input is closed: give texts as arguments, or --input\n"
    )  # fmt: skip


def test_a_tab_is_told_with_its_line(
    trained: tuple[Path, dict[str, Any], Path], base: str, run: Run, tmp_path: Path
) -> None:
    source = tmp_path / "tabs.txt"
    source.write_text("one\ntwo\tthree\n")
    code, _, err = run("predict", trained[0], "--base", base, "--input", source)
    assert code == 1
    assert f"{source}:2: a tab separates two texts, but task 'moods' takes one" in err


def test_a_text_that_is_a_files_name_is_told(
    trained: tuple[Path, dict[str, Any], Path], base: str, run: Run
) -> None:
    code, out, err = run("predict", trained[0], trained[2], "--base", base)
    assert code == 0
    assert str(trained[2]) in out
    assert f"a file of that name exists; --input {trained[2]} reads it" in err


def test_a_run_says_its_rate_its_calibration_and_what_it_replaces(
    trained: tuple[Path, dict[str, Any], Path], base: str, run: Run, tmp_path: Path
) -> None:
    arguments = ("train", "--base", base, "--data", trained[2], "--text", "body", "--label", "mood",
                 "--out", trained[0], "--epochs", 1, "--dtype", "fp32")  # fmt: skip
    code, out, err = run(*arguments, "--lr", "auto")
    assert code == 0, err
    assert "(best on dev of 4 tried)" in out
    assert err.count(f"replaces the task file {trained[0]}") == 1
    code, out, _ = run(*arguments, "--dev-fraction", 0)
    assert "not calibrated (no dev rows)" in out
    (tmp_path / "bad.csv").write_text("body,mood\na\n")
    code, _, err = run(*arguments, "--data", tmp_path / "bad.csv")
    assert code == 1
    assert "replaces" not in err


def test_labels_are_cut_where_the_option_says(tmp_path: Path, base: str, run: Run) -> None:
    data, out = tmp_path / "m.csv", tmp_path / "m.bitfit.safetensors"
    data.write_text("text,label\n" + "the film,a;b\na bike,b\n" * 10)
    columns = ("--data", data, "--base", base, "--label-separator", ";")
    code, text, err = run("train", *columns, "--kind", "multilabel", "--out", out, *QUICK)
    assert code == 0, err
    code, text, err = run("eval", out, *columns, "--json")
    assert code == 0, err
    assert json.loads(text)["rows"] == 2


def test_several_tasks_answer_each_text(
    trained: tuple[Path, dict[str, Any], Path], base: str, run: Run, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.bitfit.safetensors"
    copy.write_bytes(trained[0].read_bytes())
    code, out, err = run("predict", trained[0], copy, "good film", "bad", "--base", base)
    assert code == 0, err
    assert out.count("\n") == 2
    assert "copy=" in out, "two tasks of one name go by their files' names"
    assert all(str(path) in err for path in (trained[0], copy))
    code, _, err = run("predict", copy, trained[0], copy, "good film", "--base", base)
    assert code == 2
    assert f"{copy} is named twice" in err
    _, out, _ = run("predict", trained[0], copy, "good film", "--base", base, "--json")
    assert [json.loads(line)["task"] for line in out.splitlines()] == ["moods", "copy"]


def test_predict_refuses_what_cannot_be_meant(
    trained: tuple[Path, dict[str, Any], Path], base: str, run: Run, tmp_path: Path
) -> None:
    file = trained[0]
    for arguments, code, message in (
        (("no.safetensors", "x"), 1, "no.safetensors"),
        (("x",), 2, "does not end in .safetensors"),
        ((file, "x", "--input", "y.txt"), 2, "--input"),
        ((file, "x", "--format", "xml"), 2, "text, jsonl, glue, squad"),
        ((file, "x", "--min-confidence", 2), 2, "expected 0 to 1"),
        ((file, "--format", "glue", "--data", tmp_path), 2, "none of GLUE's"),
        ((file, "x", "--data", tmp_path), 2, "--format glue"),
        ((file, "a\tb", "--base", base), 2, "takes one"),
        ((file, "x", "--base", base + "x"), 1, base + "x"),
    ):
        found, _, err = run("predict", *arguments)
        assert (found, message in err) == (code, True), err


def test_a_base_that_is_not_found_by_its_name_asks_for_its_folder(
    trained: tuple[Path, dict[str, Any], Path], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_such(*_: object, **__: object) -> None:
        raise BaseModelError("not on the hub.")

    monkeypatch.setattr("bitfit.cli.scoring.open_encoder", no_such)
    code, _, err = run("predict", trained[0], "x")
    assert code == 1
    assert "its base is 'bert-0'" in err
    assert "--base FOLDER" in err


def test_a_pair_is_two_texts_with_a_tab_between(tmp_path: Path, base: str, run: Run) -> None:
    data = tmp_path / "pairs.csv"
    lines = [f"the film {i},a film {i},{'yes' if i % 2 else 'no'}\n" for i in range(20)]
    data.write_text("a,b,same\n" + "".join(lines))
    file = tmp_path / "pairs.bitfit.safetensors"
    code, out, err = run("train", "--base", base, "--data", data, "--text", "a", "--text-pair",
                         "b", "--label", "same", "--out", file, *QUICK)  # fmt: skip
    assert code == 0, err
    assert "$'one text\\tthe other'" in out
    code, out, _ = run("predict", file, "the film\ta film", "--base", base)
    assert code == 0
    assert out.endswith("\tthe film | a film\n")
    code, _, err = run("predict", file, "the film", "--base", base)
    assert code == 2
    assert "put a tab" in err


# ------------------------------------------------------------------ glue


def write_glue(folder: Path) -> Path:
    mrpc, mnli, stsb = folder / "MRPC", folder / "MNLI", folder / "STS-B"
    for each in (mrpc, mnli, stsb):
        each.mkdir(parents=True)
    head = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    rows = [f"{i % 2}\t1\t2\tthe film {i}\ta film {i}\n" for i in range(16)]
    (mrpc / "train.tsv").write_text(head + "".join(rows))
    (mrpc / "dev.tsv").write_text(head + "".join(rows[:6]))
    test = "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    (mrpc / "test.tsv").write_text(test + "0\t1\t2\ta film\tthe film\n1\t1\t2\ta\tthe\n")
    labels = ("contradiction", "entailment", "neutral")
    pairs = [f"{i}\tthe film {i}\ta film {i}\t{labels[i % 3]}\n" for i in range(12)]
    for split in ("train", "dev_matched", "dev_mismatched"):
        text = "index\tsentence1\tsentence2\tgold_label\n" + "".join(pairs)
        (mnli / f"{split}.tsv").write_text(text)
    for split in ("test_matched", "test_mismatched"):
        (mnli / f"{split}.tsv").write_text("index\tsentence1\tsentence2\n0\ta\tb\n1\tthe\ta\n")
    scores = [f"{i}\tthe film {i}\ta film\t{i / 3:.3f}\n" for i in range(12)]
    for split in ("train", "dev"):
        text = "index\tsentence1\tsentence2\tscore\n" + "".join(scores)
        (stsb / f"{split}.tsv").write_text(text)
    (stsb / "test.tsv").write_text("index\tsentence1\tsentence2\n0\ta\tb\n1\tthe\ta\n")
    return folder


def test_glue_from_training_to_the_servers_files(tmp_path: Path, base: str, run: Run) -> None:
    data = write_glue(tmp_path / "glue_data")
    for task in ("mrpc", "mnli", "stsb"):
        file = tmp_path / "runs" / f"{task}.bitfit.safetensors"
        code, out, err = run("train", "--base", base, "--task", task, "--data", data, "--out",
                             file, *QUICK, "--json")  # fmt: skip
        assert code == 0, err
        report = json.loads(out)
        code, out, err = run("eval", file, "--data", data, "--base", base, "--json")
        assert code == 0, err
        assert json.loads(out)["scores"] == report["scores"]
    file = tmp_path / "runs" / "mrpc.bitfit.safetensors"
    code, out, _ = run("predict", file, "--base", base, "--format", "glue", "--data", data)
    assert code == 0
    assert out.startswith("index\tprediction\n0\t")
    assert {line.split("\t")[1] for line in out.splitlines()[1:]} <= {"0", "1"}
    named = tmp_path / "runs" / "mine.bitfit.safetensors"
    code, out, err = run("train", "--base", base, "--task", "mrpc", "--name", "mine", "--data",
                         data, "--out", named, *QUICK, "--json")  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    assert report["task"] == "mine"
    code, out, err = run("eval", named, "--data", data, "--base", base, "--json")
    assert code == 0, err
    assert json.loads(out)["scores"] == report["scores"]
    answers = [
        run("predict", each, "--base", base, "--format", "glue", "--data", data)
        for each in (named, file)
    ]
    assert answers[0] == answers[1]
    file = tmp_path / "runs" / "mnli.bitfit.safetensors"
    arguments = ("predict", file, "--base", base, "--format", "glue", "--data", data)
    assert run(*arguments)[0] == 2, "two files need a folder"
    assert run(*arguments, "-o", tmp_path / "x.tsv")[0] == 2
    assert run(*arguments, "-o", tmp_path / "send")[0] == 0
    assert sorted(p.name for p in (tmp_path / "send").iterdir()) == ["MNLI-m.tsv", "MNLI-mm.tsv"]
    lines = (tmp_path / "send" / "MNLI-m.tsv").read_text().splitlines()[1:]
    assert {line.split("\t")[1] for line in lines} <= {"contradiction", "entailment", "neutral"}
    file = tmp_path / "runs" / "stsb.bitfit.safetensors"
    code, out, _ = run("predict", file, "--base", base, "--format", "glue", "--data", data,
                       "-o", tmp_path / "sts.tsv")  # fmt: skip
    assert code == 0
    values = [float(x.split("\t")[1]) for x in (tmp_path / "sts.tsv").read_text().splitlines()[1:]]
    assert all(0 <= value <= 5 for value in values)


def test_several_task_files_of_glue_make_one_submission(
    tmp_path: Path, base: str, run: Run
) -> None:
    data = write_glue(tmp_path / "glue_data")
    files = [tmp_path / f"{name}.bitfit.safetensors" for name in ("one", "two")]
    for task, file in zip(("mrpc", "stsb"), files, strict=True):
        assert run("train", "--base", base, "--task", task, "--name", "same", "--data", tmp_path,
                   "--out", file, "--method", "frozen", "--epochs", 1)[0] == 0  # fmt: skip
    arguments = ("predict", *files, "--base", base, "--format", "glue", "--data", data)
    for wrong in ((), ("-o", tmp_path / "x.zip")):
        code, _, err = run(*arguments, *wrong)
        assert (code, "2 test files" in err) == (2, True), err
    code, out, err = run(*arguments, "-o", tmp_path / "send")
    assert (code, out) == (0, ""), err
    found = sorted(path.name for path in (tmp_path / "send").iterdir())
    assert found == ["MRPC.tsv", "STS-B.tsv", "submission.zip"]
    for expected in (
        f"wrote MRPC.tsv: 2 answers, {files[0]}",
        "without RTE.tsv: no task file of rte",
        "without WNLI.tsv: no test file WNLI/test.tsv",
    ):
        assert expected in err
    alone = run("predict", files[0], "--base", base, "--format", "glue", "--data", data)[1]
    assert (tmp_path / "send" / "MRPC.tsv").read_text() == alone


# ------------------------------------------------------------------ squad


def test_squads_answers_go_by_the_questions_ids(tmp_path: Path, base: str, run: Run) -> None:
    contexts = ["the red bike is fast", "we want money back " + "now please " * 60]
    paragraphs = [
        {"context": context, "qas": [
            {"id": f"q{i}{j}", "question": "what", "answers": [{"text": word, "answer_start": at}]}
            for j, (word, at) in enumerate([(context.split()[1], context.index(" ") + 1)] * 2)
        ]}
        for i, context in enumerate(contexts)
    ]  # fmt: skip
    folder = tmp_path / "squad"
    folder.mkdir()
    for split in ("train", "dev"):
        path = folder / f"{split}-v1.1.json"
        path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    file, answers = tmp_path / "mine.bitfit.safetensors", tmp_path / "answers.json"
    code, _, err = run("train", "--base", base, "--task", "squad", "--data", tmp_path, "--out",
                       file, "--max-length", 90, *QUICK)  # fmt: skip
    assert code == 0, err
    arguments = ("predict", file, "--base", base, "--format", "squad")
    code, out, err = run(*arguments, "--data", tmp_path, "-o", answers)
    assert (code, out) == (0, ""), err
    assert "4 answers" in err
    found = json.loads(answers.read_text())
    assert list(found) == ["q00", "q01", "q10", "q11"]
    for name, answer in found.items():
        assert answer in contexts[int(name[1])]
    # the answers are those that eval scores
    _, out, _ = run("eval", file, "--base", base, "--data", tmp_path, "--json")
    right = [found[f"q{i}{j}"] == contexts[i].split()[1] for i in (0, 1) for j in (0, 1)]
    assert json.loads(out)["scores"]["exact_match"] == sum(right) / 4
    # a file may lack the answers; ids it may not
    for paragraph in paragraphs:
        for question in paragraph["qas"]:
            del question["answers"]
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    assert json.loads(run(*arguments, "--data", secret)[1]) == found
    paragraphs[1]["qas"][0]["id"] = "q00"
    secret.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    code, _, err = run(*arguments, "--data", secret)
    assert (code, "q00 is there twice" in err) == (1, True)
    before = secret.read_text()
    code, _, err = run(*arguments, "--data", secret, "-o", secret)
    assert (code, "holds the questions" in err) == (2, True)
    assert secret.read_text() == before


def test_squads_format_is_for_one_file_of_spans(
    trained: tuple[Path, dict[str, Any], Path], base: str, run: Run, tmp_path: Path
) -> None:
    code, _, err = run("predict", trained[0], "--format", "squad", "--data", tmp_path)
    assert (code, "of the kind span" in err) == (2, True)
    code, _, err = run("predict", trained[0], "--format", "squad")
    assert (code, "--data" in err) == (2, True)


# ------------------------------------------------------------------ inspect, diff, doctor, tasks


def test_inspect_shows_checks_and_draws(
    trained: tuple[Path, dict[str, Any], Path], base: str, run: Run, tmp_path: Path
) -> None:
    file, report, _ = trained
    picture = tmp_path / "figure.png"
    code, out, err = run("inspect", file, "--check", "--base", base, "--plot", picture, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["check"]["passed"]
    assert found["check"]["tolerance"] == 1e-3
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert found["scores"] == report["scores"]
    assert found["biases"] == report["trainable"]["encoder"]
    totals = [row["total"] for row in found["bias_change"]]
    assert totals == sorted(totals, reverse=True)
    assert set(found["storage"]) == {"fp32", "fp16", "bf16", "int8"}
    code, out, _ = run("inspect", file, "--check", "--base", base)
    assert code == 0
    for expected in ("b_q", "int8", "tolerance 0.001", "glad, sad", "not calibrated (only 4"):
        assert expected in out


def test_what_the_loop_of_someone_else_says_of_its_training_is_shown_as_it_stands(
    run: Run, trained: tuple[Path, dict[str, Any], Path], tmp_path: Path, base: str
) -> None:
    path, _, data = trained
    odd = {"dev_rows": "many", "train_rows": "all", "rates_tried": [1e-3, {"learning_rate": "x"}]}
    file = replace(bitfit.TaskFile.load(path), recipe=odd, temperature=None, calibration=None)
    out = tmp_path / "odd.bitfit.safetensors"
    file.save(out)
    code, text, err = run("inspect", out)
    assert (code, err) == (0, "")
    assert "rates tried" in text
    columns = ["--data", data, "--text", "body", "--label", "mood"]
    assert run("eval", out, "--base", base, *columns)[0] == 0


def test_remote_code_is_that_of_a_base_that_was_named(
    run: Run, trained: tuple[Path, dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch,
    base: str,
) -> None:  # fmt: skip
    from bitfit import model
    from bitfit.cli import scoring
    from bitfit.serve import run as serving

    path, _, data = trained
    columns = ["--data", data, "--text", "body", "--label", "mood"]
    commands = (["eval", path, *columns], ["predict", path, "x"], ["inspect", path, "--check"])
    trusted = []

    def open_encoder(*_: object, trust_remote_code: bool = False, **__: object) -> None:
        trusted.append(trust_remote_code)
        raise BaseModelError("enough")

    for module in (scoring, model, serving):
        monkeypatch.setattr(module, "open_encoder", open_encoder)
    for command in commands:
        code, _, err = run(*command, "--trust-remote-code")
        assert (code, trusted) == (2, [])
        assert "say which with --base" in err
    with pytest.raises(UsageError, match="name it"):
        bitfit.load(path, trust_remote_code=True)
    for command in commands:
        assert run(*command, "--trust-remote-code", "--base", base)[0] == 1
        assert run(*command, "--base", base)[0] == 1
    assert run("serve", "--port", 0, "--base", base, "--trust-remote-code")[0] == 1
    with pytest.raises(BaseModelError):
        bitfit.load(path, base, trust_remote_code=True)
    assert trusted == [True, False] * 3 + [True, True]


def test_inspect_check_fails_where_answers_differ(
    trained: tuple[Path, dict[str, Any], Path], base: str, run: Run, tmp_path: Path
) -> None:
    import dataclasses

    from bitfit import TaskFile

    file = TaskFile.load(trained[0])
    probes = [{**probe, "logits": [9.0, -9.0]} for probe in file.probes]
    other = tmp_path / "other.safetensors"
    dataclasses.replace(file, probes=probes).save(other)
    code, out, err = run("inspect", other, "--check", "--base", base)
    assert code == 1
    assert "differs" in out
    assert "does not answer as it did" in err
    code, out, _ = run("inspect", other, "--check", "--base", base, "--json")
    assert code == 1
    assert json.loads(out)["check"]["passed"] is False


@pytest.mark.parametrize("storage", ["fp16", "bf16", "int8"])
def test_files_stored_in_less_pass_their_check(
    storage: str, tmp_path: Path, base: str, run: Run
) -> None:
    data, out = write_rows(tmp_path / "moods.csv"), tmp_path / "m.safetensors"
    run("train", "--base", base, "--data", data, "--text", "body", "--label", "mood", "--out",
        out, *QUICK, "--storage", storage)  # fmt: skip
    code, text, _ = run("inspect", out, "--check", "--base", base, "--json")
    assert code == 0
    assert json.loads(text)["stored_as"] == storage


def test_inspect_refuses_a_wrong_base_and_a_wrong_figure(
    trained: tuple[Path, dict[str, Any], Path], checkpoint: Callable[..., str], run: Run,
    tmp_path: Path,
) -> None:  # fmt: skip
    code, _, err = run("inspect", trained[0], "--check", "--base", checkpoint("bert", 1))
    assert code == 1
    assert "was made for base" in err
    code, _, err = run("inspect", trained[0], "--plot", tmp_path / "x.bmp")
    assert code == 2
    assert ".png" in err


def test_diff_by_term_and_by_layer(trained: tuple[Path, dict[str, Any], Path], run: Run) -> None:
    file = trained[0]
    code, out, _ = run("diff", file, file, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["total"]["cosine"] == pytest.approx(1)
    assert all(row["cosine"] == pytest.approx(1) for row in report["terms"])
    norms = sum(row["norm_a"] ** 2 for row in report["terms"])
    assert norms == pytest.approx(report["total"]["norm_a"] ** 2)
    _, short, _ = run("diff", file, file)
    _, long, _ = run("diff", file, file, "--layers")
    assert len(long.splitlines()) > len(short.splitlines())
    assert "query" in short


def test_doctor_names_every_term_and_the_machine(base: str, run: Run) -> None:
    code, out, _ = run("doctor", "--base", base, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["base"]["eight_terms"]["count"] == 2 * (7 * 32 + 64)
    assert report["base"]["inert_terms"] == ["key"]
    code, out, _ = run("doctor", "--base", base)
    assert code == 0
    for expected in ("b_LN1", "inert", "GFLOP/s", "packed", "extra plots"):
        assert expected in out


def test_doctor_is_loud_about_a_base_without_biases(
    checkpoint: Callable[..., str], run: Run
) -> None:
    code, out, _ = run("doctor", "--base", checkpoint("modernbert"))
    assert code == 0
    assert "0 biases" in out
    assert "--method frozen" in out


def test_tasks_lists_what_is_built_in(run: Run) -> None:
    code, out, _ = run("tasks")
    assert code == 0
    assert "Microsoft Research Paraphrase Corpus" in out
    _, out, _ = run("tasks", "--json")
    mnli = next(t for t in json.loads(out)["tasks"] if t["name"] == "mnli")
    assert mnli["files"]["dev_mismatched"] == "dev_mismatched.tsv"
    assert mnli["files"]["test_diagnostic"] == "../AX/AX.tsv"


# ------------------------------------------------------------------ help, errors, imports


def test_every_command_and_option_has_help() -> None:
    group: Any = typer.main.get_command(app.app)
    assert list(group.commands) == [
        "train", "eval", "predict", "serve", "inspect", "diff", "doctor", "tasks", "demo", "sweep",
        "reproduce", "report", "bench",
    ]  # fmt: skip
    inner = group.commands["bench"].commands
    assert list(inner) == ["train", "lanes", "serve"]
    assert group.commands["bench"].help
    single = {name: c for name, c in group.commands.items() if name != "bench"}
    for name, command in (single | {f"bench {name}": c for name, c in inner.items()}).items():
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"
        for flag in ("--json", "--debug"):
            assert any(flag in p.opts for p in command.params), f"{name} {flag}"


def test_help_and_version(run: Run) -> None:
    assert run("--version")[1].startswith("bitfit 0.")
    code, out, _ = run()
    assert code == 0
    assert "train" in out
    code, out, _ = run("train", "--help")
    assert code == 0
    assert "(default: 8)" in out
    assert "bool" not in out
    code, _, err = run("trian")
    assert code == 2
    assert "Did you mean 'train'? See" in err


def test_importing_the_command_line_imports_no_torch() -> None:
    code = (
        "import sys, bitfit.cli.app; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_an_unexpected_error_is_one_line_unless_debugging(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(given: object) -> None:
        raise RuntimeError("what [b]now[/b]")

    monkeypatch.setattr("bitfit.cli.views.inspect", fail)
    code, _, err = run("inspect", "x")
    assert code == 1
    assert err == "error: RuntimeError: what [b]now[/b] (this is a bug; --debug shows where)\n"
    assert cli.main(["inspect", "x", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = [sys.executable, "-c", "from bitfit.cli import main; raise SystemExit(main())"]
    for more in (["--json"], [], ["--help"]):
        reading, writing = os.pipe()
        os.close(reading)  # before anything is written: a real reader may be the slower one
        try:
            found = subprocess.run(
                [*command, "tasks", *more], stdout=writing, stderr=subprocess.PIPE, text=True
            )
        finally:
            os.close(writing)
        assert (found.returncode, found.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", ["tasks", "tasks --json", "tasks --help", "--version"])
def test_a_full_standard_output_is_a_failure_and_no_bug(arguments: str) -> None:
    command = [sys.executable, "-c", "from bitfit.cli import main; raise SystemExit(main())"]
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [*command, *arguments.split()], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert found.returncode == 1
    assert found.stderr == "error: standard output: No space left on device\n"


def test_tables_take_text_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table(("[b]x", ">n"), [("[red]a", 1)], title="[i]t")
    console.print_facts("[i]f", {"[k]": "[v]", "none": None})
    out = capsys.readouterr().out
    assert all(text in out for text in ("[b]x", "[red]a", "[i]t", "[i]f", "[k]", "[v]"))
    assert "none" not in out


def test_numbers_a_reader_can_read() -> None:
    assert console.size(999) == "999 bytes"
    assert console.size(98_488) == "98.5 kB"
    assert console.duration(4.25) == "4.2 s"
    assert console.duration(200) == "3 min 20 s"
    assert console.duration(7500) == "2 h 5 min"
    assert jsonable({"a": [float("nan"), 1.0], "b": (float("inf"),)}) == {
        "a": [None, 1.0], "b": [None],
    }  # fmt: skip


def test_the_rate_is_a_number_or_auto() -> None:
    assert options.parse_rate(None) is None
    assert options.parse_rate("auto") == "auto"
    assert options.parse_rate("1e-3") == 1e-3


# ------------------------------------------------------------------ interruption


def test_the_first_signal_asks_and_the_second_aborts(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with console.Interruption() as interruption:
        with pytest.raises(KeyboardInterrupt):  # nothing runs yet: nothing to save
            signal.raise_signal(signal.SIGTERM)
        interruption.running = True
        signal.raise_signal(signal.SIGTERM)
        assert interruption.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopping after this step" in capfd.readouterr().err


def test_what_a_launcher_passes_on_at_once_is_no_second_signal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with console.Interruption() as interruption:
        interruption.running = True
        monkeypatch.setattr(console, "LAUNCHER_SECONDS", 600.0)  # at once, on a busy machine too
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        assert interruption.asked
        monkeypatch.setattr(console, "LAUNCHER_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    console.note("not of the main process")
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    console.note("of the main process")
    assert capfd.readouterr().err == "of the main process\n"


def test_a_signal_saves_a_checkpoint_and_resume_ends_in_the_same_bytes(
    trained: tuple[Path, dict[str, Any], Path], base: str, run: Run, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    file, _, data = trained
    out = tmp_path / "again.bitfit.safetensors"
    arguments = ("train", "--base", base, "--data", data, "--text", "body", "--label", "mood",
                 "--out", out, "--name", "moods", *QUICK)  # fmt: skip
    with monkeypatch.context() as patch:
        begin = training.Watch._begin

        def begin_and_interrupt(self: training.Watch, event: RunStarted) -> None:
            begin(self, event)
            signal.raise_signal(signal.SIGINT)

        patch.setattr(training.Watch, "_begin", begin_and_interrupt)
        code, text, err = run(*arguments)
    assert (code, text) == (130, "")
    assert "--resume" in err
    assert "error" not in err
    assert not out.exists()
    assert Path(f"{out}.checkpoint").is_file()
    code, _, err = run(*arguments, "--resume", "--dry-run")
    assert code == 0
    assert f"a checkpoint beside {out}: --resume goes on from step 1" in err
    code, text, err = run(*arguments, "--resume")
    assert code == 0
    assert "resumed at step 1 of 10" in err
    assert "before it was resumed: " in text
    assert out.read_bytes() == file.read_bytes()
    assert not Path(f"{out}.checkpoint").exists()
    code, _, err = run(*arguments, "--resume")
    assert "starting anew" in err


def test_a_state_that_is_not_gone_on_from_is_said_with_where_it_is_kept(
    tmp_path: Path, base: str, run: Run
) -> None:
    data, out = write_rows(tmp_path / "m.csv"), tmp_path / "m.bitfit.safetensors"
    arguments = ("train", "--base", base, "--data", data, "--text", "body", "--label", "mood",
                 "--out", out, "--epochs", 1, "--dtype", "fp32")  # fmt: skip
    other = Path(f"{out}2.checkpoint")  # of a run whose name begins alike
    other.write_bytes(b"state")
    code, _, err = run(*arguments)
    assert (code, "interrupted" in err) == (0, False)
    code, _, err = run(*arguments, "--resume")
    assert f"no checkpoint beside {out}: starting anew" in err
    state = Path(f"{out}.checkpoint")
    state.write_bytes(b"state")
    code, _, err = run(*arguments)
    assert code == 0
    assert f"{state} of an interrupted run is kept as {state}.old: --resume would" in err
    assert Path(f"{state}.old").read_bytes() == other.read_bytes() == b"state"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_log_that_takes_no_more_is_said_once_and_does_not_end_training(
    tmp_path: Path, base: str, run: Run
) -> None:
    data, out = write_rows(tmp_path / "m.csv"), tmp_path / "m.bitfit.safetensors"
    code, _, err = run("train", "--base", base, "--data", data, "--text", "body", "--label",
                       "mood", "--out", out, "--log", "/dev/full", *QUICK, "-q")  # fmt: skip
    assert code == 0
    assert err == (
        "/dev/full: cannot be written: No space left on device; training goes on without it\n"
    )
    assert out.is_file()


def test_ctrl_c_on_a_real_process(tmp_path: Path, base: str, run: Run) -> None:
    data, out = write_rows(tmp_path / "moods.csv", 200), tmp_path / "m.bitfit.safetensors"
    command = [
        sys.executable, "-c", "from bitfit.cli import main; raise SystemExit(main())",
        "train", "--base", base, "--data", str(data), "--text", "body", "--label", "mood",
        "--out", str(out), "--epochs", "200", "--lr", "1e-3", "--dtype", "fp32", "--patience", "0",
        "--json", "--threads", "1",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:  # the first epoch's line: training is on its way
        if line.startswith("epoch"):
            break
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 130
    assert stdout == ""
    assert "the same command with --resume" in stderr
    assert Path(f"{out}.checkpoint").is_file()
    assert not out.exists()


def test_the_check_of_a_span_task_passes(tmp_path: Path, base: str, run: Run) -> None:
    rows = [{"question": "what", "context": f"a red bike {'very ' * i}fast",
             "answers": {"text": ["red"], "answer_start": [2]}} for i in range(12)]  # fmt: skip
    data, out = tmp_path / "rows.jsonl", tmp_path / "span.bitfit.safetensors"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, _, err = run("train", "--base", base, "--data", data, "--out", out,
                       "--max-length", 80, *QUICK)  # fmt: skip
    assert code == 0, err
    code, text, err = run("inspect", out, "--check", "--base", base, "--json")
    assert code == 0, text + err


def test_eval_finds_the_held_out_rows_whatever_share_they_were(
    tmp_path: Path, base: str, run: Run
) -> None:
    data, out = write_rows(tmp_path / "moods.csv"), tmp_path / "moods.bitfit.safetensors"
    columns = ("--data", data, "--text", "body", "--label", "mood", "--base", base)
    code, text, err = run("train", *columns, "--dev-fraction", 0.3, "--out", out, *QUICK, "--json")
    assert code == 0, err
    code, found, err = run("eval", out, *columns, "--json")
    assert code == 0, err
    assert json.loads(found)["rows"] == json.loads(text)["rows"]["dev"] == 12
    assert json.loads(found)["scores"] == json.loads(text)["scores"]


@pytest.mark.parametrize("as_folder", [False, True])
def test_eval_finds_the_held_out_rows_whatever_seed_chose_them(
    as_folder: bool, tmp_path: Path, base: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seed of the data is its own, and a folder without dev.csv holds out as a file does."""
    scored: list[Any] = []
    evaluate = bitfit.Model.evaluate

    def watch(model: bitfit.Model, examples: Any, task: str | None = None) -> dict[str, float]:
        scored.append(list(examples))
        return evaluate(model, examples, task)

    monkeypatch.setattr(bitfit.Model, "evaluate", watch)
    (tmp_path / "moods").mkdir()
    data, out = write_rows(tmp_path / "moods" / "train.csv"), tmp_path / "moods.bitfit.safetensors"
    source = data.parent if as_folder else data
    config = DataConfig(data=source, text="body", label="mood", dev_fraction=0.3, seed=7)
    outcome = bitfit.finetune(base, data=config, out=out, epochs=2, seed=3, dtype="fp32")
    assert outcome.file.recipe["dev_seed"] == 7
    code, found, err = run("eval", out, "--data", source, "--text", "body", "--label", "mood",
                           "--base", base, "--json")  # fmt: skip
    assert code == 0, err
    report = json.loads(found)
    assert report["rows"] == outcome.to_json()["rows"]["dev"] == 12
    assert report["scores"] == outcome.file.scores
    assert scored == [list(outcome.dataset.splits["dev"])]


def test_two_seeds_train_on_the_same_rows_where_the_data_has_a_seed(
    tmp_path: Path, base: str, run: Run
) -> None:
    data = write_rows(tmp_path / "moods.csv")
    columns = ("--data", data, "--text", "body", "--label", "mood", "--base", base, "--limit", 10)
    recipes = []
    for name, seeds in {
        "a": ("--seed", 1), "b": ("--seed", 2, "--data-seed", 1), "c": ("--seed", 2),
    }.items():  # fmt: skip
        code, _, err = run("train", *columns, *seeds, "--out", tmp_path / name, *QUICK)
        assert code == 0, err
        recipes.append(bitfit.TaskFile.load(tmp_path / name))
    assert recipes[0].data_hash == recipes[1].data_hash != recipes[2].data_hash
    assert [file.recipe["dev_seed"] for file in recipes] == [1, 1, 2]


def test_an_adapter_is_trained_by_command_beside_its_name(
    tmp_path: Path, base: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "moods.csv")
    columns = ("--data", "moods.csv", "--text", "body", "--label", "mood", "--base", base)
    code, text, err = run("train", *columns, "--method", "peft:lora", *QUICK, "--json")
    assert code == 0, err
    report = json.loads(text)
    assert (report["method"], report["file"]) == ("peft:lora", "moods.lora.safetensors")
    assert (tmp_path / "moods.lora.safetensors").stat().st_size == report["file_bytes"]
    assert not list(tmp_path.glob("*.checkpoint"))
    monkeypatch.setitem(sys.modules, "peft", None)
    code, _, err = run("train", *columns, "--method", "peft:lora", *QUICK)
    assert code == 2
    assert "pip install 'bitfit[peft]'" in err


def test_training_and_eval_agree_on_the_split_that_was_chosen(
    tmp_path: Path, base: str, run: Run
) -> None:
    folder, out = tmp_path / "moods", tmp_path / "moods.bitfit.safetensors"
    folder.mkdir()
    write_rows(folder / "train.csv", 20)
    write_rows(folder / "dev.csv", 60, seed=1)
    write_rows(folder / "test.csv", 10, seed=2)
    columns = ("--data", folder, "--text", "body", "--label", "mood", "--base", base)
    code, text, err = run("train", *columns, "--split", "dev", "--dev-fraction", 0.2, "--out", out,
                          *QUICK, "--json")  # fmt: skip
    assert code == 0, err
    report = json.loads(text)
    assert report["rows"] == {"train": 48, "dev": 12}
    code, text, err = run("eval", out, *columns, "--json")
    assert code == 0, err
    assert json.loads(text)["rows"] == 12, "only what training held out of dev.csv"
    assert json.loads(text)["scores"] == report["scores"]
    assert json.loads(run("eval", out, *columns, "--split", "test", "--json")[1])["rows"] == 10
    one_file = ("eval", out, *columns, "--data", folder / "train.csv", "--json")
    assert json.loads(run(*one_file)[1])["rows"] == 20
    code, _, err = run("train", *columns, "--data", folder / "dev.csv", "--split", "dev")
    assert code == 2
    assert "is one file" in err


def test_training_says_its_precision_and_that_it_pads(
    checkpoint: Callable[..., str], tmp_path: Path, run: Run
) -> None:
    data, out = write_rows(tmp_path / "moods.csv"), tmp_path / "task"
    for family, padded in (("bert", False), ("mpnet", True)):
        code, _, err = run("train", "--base", checkpoint(family), "--data", data, "--text", "body",
                           "--label", "mood", "--out", out, *QUICK)  # fmt: skip
        assert code == 0, err
        assert "in float32 on " in err
        assert ("in padded batches" in err) == padded


def test_control_characters_of_a_file_never_reach_the_terminal(
    tmp_path: Path, base: str, run: Run
) -> None:
    data, out = write_rows(tmp_path / "moods.csv"), tmp_path / "moods.bitfit.safetensors"
    code, _, err = run("train", "--data", data, "--text", "body", "--label", "mood", "--base", base,
                       "--out", out, "--description", "a\x1b[2Jb\x9bc", *QUICK)  # fmt: skip
    assert code == 0, err
    code, text, err = run("inspect", out)
    assert code == 0, err
    assert "a\ufffd[2Jb\ufffdc" in text
    code, text, _ = run("predict", out, "good \x1b]0;x\x07film", "--base", base)
    assert code == 0
    assert "good \ufffd]0;x\ufffdfilm" in text


def test_a_broken_row_in_a_glue_test_file_is_no_silent_gap(
    tmp_path: Path, base: str, run: Run
) -> None:
    folder = tmp_path / "glue_data" / "QQP"
    folder.mkdir(parents=True)
    rows = "".join(f"{i}\t1\t2\tthe film\ta film\t{i % 2}\n" for i in range(12))
    for split in ("train", "dev"):
        head = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        (folder / f"{split}.tsv").write_text(head + rows)
    (folder / "test.tsv").write_text("id\tquestion1\tquestion2\n0\tthe film\ta film\n1\tthe\n")
    out = tmp_path / "qqp.bitfit.safetensors"
    code, _, err = run("train", "--base", base, "--task", "qqp", "--data", folder.parent, "--out",
                       out, *QUICK)  # fmt: skip
    assert code == 0, err
    code, _, err = run("predict", out, "--base", base, "--format", "glue", "--data", folder.parent)
    assert code == 1
    assert "test.tsv:3" in err
    assert "every row" in err


def test_the_budget_is_for_all_experiments_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitfit.cli import sweeping

    clock, budgets = [100.0], []

    def run_for_40_seconds(order: sweeping.Ordered, *_: object, **__: object) -> dict[str, Any]:
        budgets.append(order.settings.budget_seconds)
        clock[0] += 40.0
        return {"name": order.grid.name}

    monkeypatch.setattr(sweeping, "_run", run_for_40_seconds)
    monkeypatch.setattr(sweeping.time, "monotonic", lambda: clock[0])
    grids = [sweeping.builtin_grid(name) for name in ("table3", "gap", "pos")]
    settings = sweeping.Settings(data=tmp_path, budget_seconds=60.0)
    orders = [sweeping.Ordered(grid, tmp_path / grid.name, settings) for grid in grids]
    sweeping.run_grids(orders, {"ray": None}, dry_run=False, as_json=False)
    assert budgets == [60.0, 20.0, -20.0]  # what begins too late finds nothing that fits


def test_a_failed_run_and_missing_data_of_several_experiments_are_both_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bitfit.cli import sweeping

    def fail_or_lack(order: sweeping.Ordered, *_: object, **__: object) -> dict[str, Any]:
        if order.grid.name == "pos":
            raise DataError("ptb: not there")
        return {"name": order.grid.name, "failed": [{"row": "BitFit"}] * (order.grid.name == "gap")}

    monkeypatch.setattr(sweeping, "_run", fail_or_lack)
    settings = sweeping.Settings(data=tmp_path)

    def reproduce(*names: str) -> Any:
        grids = [sweeping.builtin_grid(name) for name in names]
        orders = [sweeping.Ordered(grid, tmp_path / grid.name, settings) for grid in grids]
        sweeping.run_grids(orders, {"ray": None, "name": "all"}, dry_run=False, as_json=True)

    with pytest.raises(typer.Exit) as end:
        reproduce("table3", "gap", "pos")
    assert end.value.exit_code == 1
    table3, gap, pos = json.loads(capsys.readouterr().out)
    assert (table3["failed"], len(gap["failed"]), pos["error"]) == ([], 1, "ptb: not there")
    reproduce("table3", "pos")  # what is not there is no failure
    reproduce("table3")
    lines = capsys.readouterr().out.splitlines()
    assert [len(json.loads(line)) for line in lines] == [2, 1]  # a list, of one too


def test_an_experiment_that_cannot_begin_does_not_end_those_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bitfit.cli import sweeping

    begun = []

    def run_but_table2(order: sweeping.Ordered, *_: object, **__: object) -> dict[str, Any]:
        begun.append(order.grid.name)
        if order.grid.name == "table2":
            raise BaseModelError("roberta-base: not there")
        if order.grid.name == "figure1":
            raise NotWritten("disk full")
        return {"name": order.grid.name}

    monkeypatch.setattr(sweeping, "_run", run_but_table2)
    settings = sweeping.Settings(data=tmp_path)

    def reproduce(*names: str) -> None:
        grids = [sweeping.builtin_grid(name) for name in names]
        orders = [sweeping.Ordered(grid, tmp_path / grid.name, settings) for grid in grids]
        sweeping.run_grids(orders, {"ray": None, "name": "all"}, dry_run=False, as_json=True)

    with pytest.raises(typer.Exit) as end:
        reproduce("table2", "pos")
    assert (end.value.exit_code, begun) == (1, ["table2", "pos"])
    found = json.loads(capsys.readouterr().out)
    assert [one.get("error") for one in found] == ["roberta-base: not there", None]
    begun.clear()
    with pytest.raises(NotWritten):
        reproduce("figure1", "pos")
    assert begun == ["figure1"]
    begun.clear()
    (tmp_path / "pos").mkdir()
    grid = sweeping.builtin_grid("table3")
    described = {key: [] for key in ("base", "rows", "tasks", "seeds")}
    Store(tmp_path / "pos").write_experiment(
        described | {"name": "other", "grid": grid.to_json(), "conditions": {}}
    )
    with pytest.raises(UsageError, match="holds the experiment 'other': --resume goes on"):
        reproduce("table3", "pos")
    assert begun == []  # days later it would have been as wrong


def test_a_submission_that_cannot_be_made_ends_nothing_and_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bitfit.cli import sweeping

    class Done:
        def __init__(self, *_: object) -> None:
            pass

        def run(self, *_: object) -> Summary:
            return Summary()

    monkeypatch.setattr(sweeping, "Sweep", Done)
    monkeypatch.setattr(sweeping, "best_runs", lambda store: {})
    monkeypatch.setattr(
        sweeping, "make_report",
        lambda *_, **__: {"title": "t", "report": "r", "page": "p", "files": [], "lacks": []},
    )  # fmt: skip
    order = sweeping.Ordered(
        sweeping.builtin_grid("figure2"), tmp_path, sweeping.Settings(data=tmp_path)
    )
    given = {"quiet": True, "submission": True, "ray": None, "name": "all"}
    with pytest.raises(typer.Exit) as end:
        sweeping.run_grids([order, order], given, dry_run=False, as_json=True)
    assert end.value.exit_code == 1
    out, err = capsys.readouterr()
    both = json.loads(out)
    assert len(both) == 2
    assert "no finished run of bias tuning on a GLUE task" in both[0]["submission_error"]
    assert "no submission: " in err


def test_what_an_experiment_cannot_mean_names_the_option(tmp_path: Path, run: Run) -> None:
    here, file = ("--data", tmp_path), write_rows(tmp_path / "rows.csv")
    below = f"the folder {file} cannot be written to (Not a directory); choose another"
    for arguments, code, message in (
        (("reproduce", "table9", *here), 2, "Known: table1, table2, table3, table6, figure1, "),
        (("reproduce", "table9", *here), 2, "layers, peft, curves, all"),
        (("reproduce", "table3", *here, "--limit", "0"), 2, "--limit '0': expected a number from"),
        (("reproduce", "table3", *here, "--move"), 2, "give --resume too, or --reuse DIR"),
        (("reproduce", "table3", "--data", tmp_path / "no"), 1, "no: no such directory"),
        (("sweep", tmp_path / "no.toml", *here), 1, "no.toml: cannot be read: No such file"),
        (("report", tmp_path, "--out", file / "x"), 2, f"--out {file}/x: {below}"),
        (("reproduce", "table3", *here, "--out", file / "x"), 2, f"--out {file}/x: {below}"),
        (("reproduce", "table3", *here, "--out", "/proc/x"), 2, "--out /proc/x: the folder /"),
    ):
        found, _, err = run(*arguments)
        assert (found, message in err) == (code, True), err
        assert "[Errno" not in err


def test_reproduce_all_takes_of_the_options_what_each_experiment_has(tmp_path: Path) -> None:
    from bitfit.cli import sweeping

    given: dict[str, Any] = dict.fromkeys(
        ["bases", "recipe", "epochs", "seeds", "budget", "reuse", "threads", "ray"]
    )
    given |= {
        "name": "all", "out": tmp_path, "data": tmp_path, "tasks": "squad,rte",
        "rows": "BitFit,b_q",
        "limit": "rte=100,50", "dtype": "auto", "device": "auto", "lanes": "auto", "resume": False,
        "move": False, "retry_failed": False,
    }  # fmt: skip
    orders = sweeping.paper_grids(given)
    names = [order.grid.name for order in orders]
    assert names[0] == "table3"  # the most telling first
    assert "pos" not in names  # it has none of the tasks
    table3 = orders[0].grid
    assert [row.name for row in table3.rows] == ["BitFit", "b_q"]
    assert [(task.name, task.limit) for task in table3.tasks] == [("rte", 100)]
    (squad,) = orders[names.index("figure2")].grid.tasks
    assert (squad.name, squad.limit) == ("squad", 50)
    assert orders[0].settings.reuse == [tmp_path / name for name in names[1:]]
    with pytest.raises(UsageError, match="no experiment has these"):
        sweeping.paper_grids(given | {"rows": "nothing"})


@pytest.mark.parametrize(
    ("given", "understood"),
    [
        (["sweep", "g.toml", "--ray"], ["sweep", "g.toml", "--ray", "auto"]),
        (["sweep", "--ray", "-q", "g.toml"], ["sweep", "--ray", "auto", "-q", "g.toml"]),
        (["sweep", "--ray", "local", "--json"], ["sweep", "--ray", "local", "--json"]),
        (["serve", "--ray=h:1", "--replicas", "2"], ["serve", "--ray=h:1", "--replicas", "2"]),
        (["predict", "f", "--ray"], ["predict", "f", "--ray"]),  # no option there
    ],
)
def test_ray_without_an_address_is_the_cluster_that_runs_here(given, understood):
    assert app._with_ray_address(given) == understood
