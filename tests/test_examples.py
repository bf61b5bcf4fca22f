"""The examples run, on a tiny base, and print what their readers are promised."""

import runpy
import sys
from pathlib import Path

import pytest

import bitfit

FOLDER = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def run(checkpoint, monkeypatch, capsys):
    """A function from an example, an output and a family to the lines that it prints."""

    def run_it(name, out, family="bert", *more):
        options = ["--base", checkpoint(family), "--out", str(out), "--limit", "24", *more]
        monkeypatch.setattr(sys, "argv", [name, *options])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run_it


def test_every_example_is_listed_and_run_here():
    scripts = {path.name for path in FOLDER.glob("*.py")}
    assert scripts == {"library.py", "mixed_batch.py", "own_loop.py", "with_trainer.py"}
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"]({name})" in listed for name in scripts)


def test_the_library_example_trains_saves_and_answers(run, tmp_path):
    out = tmp_path / "task.bitfit.safetensors"
    lines = run("library.py", out)
    assert lines[0].startswith("urgency: accuracy 0.")
    assert bitfit.TaskFile.load(out).task.labels == ("high", "low", "normal")
    assert len(lines) == 4
    assert all(line.split()[0] in ("high", "low", "normal") for line in lines[2:])


def test_the_mixed_batch_example_answers_with_two_tasks(run, tmp_path):
    lines = run("mixed_batch.py", tmp_path)
    assert [line.split(" = ")[0] for line in lines[2:6]] == ["urgency", "sentiment"] * 2
    assert lines[-1] == "tasks left: urgency"
    assert len(list(tmp_path.glob("*.bitfit.safetensors"))) == 2


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_loop_of_ones_own_ends_in_a_task_file(family, run, tmp_path):
    out = tmp_path / "own.bitfit.safetensors"
    lines = run("own_loop.py", out, family, "--epochs", "1")
    assert "a fresh model with the task gives the same logits" in lines
    assert lines[-1].split()[0] in ("high", "low", "normal")
    file = bitfit.TaskFile.load(out)
    assert bool(file.bias.any())
    assert file.recipe["epochs"] == 1


@pytest.mark.filterwarnings("ignore")  # transformers' and accelerate's own
def test_the_trainer_of_transformers_ends_in_a_task_file(run, tmp_path):
    pytest.importorskip("accelerate")
    out = tmp_path / "trainer.bitfit.safetensors"
    lines = run("with_trainer.py", out, "bert", "--epochs", "1")
    assert lines[-1] == "a fresh model with the task gives the same logits"
    assert bool(bitfit.TaskFile.load(out).bias.any())


def test_without_accelerate_the_trainer_example_says_what_to_install(run, tmp_path, monkeypatch):
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "accelerate" else find_spec(name)
    )
    with pytest.raises(SystemExit, match="pip install accelerate"):
        run("with_trainer.py", tmp_path / "x")
