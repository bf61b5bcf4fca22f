"""Scripts of ``benchmarks/`` that change what they measure still fit what they change."""

import re
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.skipif(not BENCHMARKS.exists(), reason="no benchmarks in this distribution")
@pytest.mark.parametrize("words", [[], ["--alternatives", "--lanes", "2"]])
def test_the_profile_and_the_alternatives_of_a_step_run(words, checkpoint, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import step

    base = ["--base", checkpoint("bert"), "--task", "urgency", "--steps", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["step.py", *base, *words])
    step.main()
    table = capsys.readouterr().out
    rows = step.ALTERNATIVES if words else step.GROUPS
    assert all(f"| {name} |" in table for name in rows)


@pytest.mark.skipif(not BENCHMARKS.exists(), reason="no benchmarks in this distribution")
def test_the_cpu_time_of_a_step_is_told_alone(checkpoint, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import step

    words = ["--base", checkpoint("bert"), "--task", "urgency", "--steps", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["step.py", *words, "--method", "random", "--cpu-time"])
    step.main()
    told = capsys.readouterr().out
    assert told.startswith("urgency, random, batch 8, 1 lane(s)")
    assert re.search(r": \d+ ms of CPU a step\n$", told)
