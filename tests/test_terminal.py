"""Progress where people see it: on a terminal, which the other tests' captured output is not."""

import io
import os
import sys
import threading

import pytest
from sweeping import GRID, write_tickets

from bitfit import cli
from bitfit.cli import console

pty = pytest.importorskip("pty", reason="needs pseudo-terminals")


class Terminal:
    """A pseudo-terminal as standard error, and all that was written to it."""

    def __init__(self):
        self.master, slave = pty.openpty()
        self.file = open(slave, "w", encoding="utf-8")
        self.seen = io.BytesIO()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self):
        while True:
            try:
                data = os.read(self.master, 4096)
            except OSError:  # the other end is closed
                return
            if not data:
                return
            self.seen.write(data)

    def close(self):
        self.file.close()
        self.thread.join(10)
        os.close(self.master)
        return self.seen.getvalue().decode("utf-8")


@pytest.fixture
def on_terminal(monkeypatch, capsys):
    """A function from arguments to the exit code and what a terminal was sent."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments):
        terminal = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal.file)
            code = cli.main([str(a) for a in arguments])
        seen = terminal.close()
        assert seen.rfind("\x1b[?25h") >= seen.rfind("\x1b[?25l"), "the cursor is left hidden"
        return code, seen

    return run


@pytest.fixture
def data(tmp_path):
    return write_tickets(tmp_path)


def test_a_sweep_counts_its_runs(on_terminal, checkpoint, data, tmp_path):
    (tmp_path / "g.toml").write_text(GRID.replace("[0, 1, 2]", "[0]"))
    code, seen = on_terminal(
        "sweep", tmp_path / "g.toml", "--base", checkpoint(), "--data", data, "--rows", "Frozen",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, seen
    assert "runs" in seen
    assert "[1/2] Frozen" in seen
    assert "[2/2] Frozen" in seen
    assert "\x1b[?25l" in seen  # there was a bar


def test_the_demo_shows_which_run_it_is_at(on_terminal, checkpoint, tmp_path):
    code, seen = on_terminal("demo", "--quick", "--keep", tmp_path / "d", "--base", checkpoint())
    assert code == 0, seen
    assert "3/3 sentiment: biases and a head" in seen


def test_training_and_answering_show_how_far_they_are(
    on_terminal, checkpoint, data, tmp_path, monkeypatch
):
    out = tmp_path / "x.bitfit.safetensors"
    code, seen = on_terminal(
        "train", "--base", checkpoint(), "--data", data / "tickets.csv", "--text", "body",
        "--label", "intent", "--out", out, "--epochs", "2",
    )  # fmt: skip
    assert code == 0, seen
    assert "\x1b[?25l" in seen
    (tmp_path / "texts.txt").write_text("a good bike\n" * 50)
    monkeypatch.setattr("bitfit.cli.answering.BAR_AFTER_SECONDS", 0.0)
    code, seen = on_terminal(
        "predict", out, "--base", checkpoint(), "--input", tmp_path / "texts.txt",
        "-o", tmp_path / "answers.txt",
    )  # fmt: skip
    assert code == 0, seen
    assert "texts: 50" in seen


def test_a_bar_may_not_know_its_end(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal.file)
    monkeypatch.setenv("TERM", "xterm-256color")
    with console.progress() as bar:
        row = bar.add_task("runs", total=None)
        bar.update(row, completed=3)
        bar.refresh()
    assert "3/?" in terminal.close()


def test_a_report_says_what_it_is_at(on_terminal, checkpoint, data, tmp_path):
    (tmp_path / "g.toml").write_text(GRID.replace("[0, 1, 2]", "[0]"))
    out = tmp_path / "out"
    code, seen = on_terminal(
        "sweep", tmp_path / "g.toml", "--base", checkpoint(), "--data", data, "--rows", "Frozen",
        "--out", out, "--quiet",
    )  # fmt: skip
    assert code == 0, seen
    assert "\x1b[?25l" not in seen
    code, seen = on_terminal("report", out)
    assert code == 0, seen
    assert "drawing the figures" in seen
