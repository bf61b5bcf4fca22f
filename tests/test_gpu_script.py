"""``benchmarks/gpu.py`` runs anywhere on tiny sizes; what it measures means something on a GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="no benchmarks in this distribution")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu", module)
    spec.loader.exec_module(module)
    return module


def smoke(script: ModuleType, out: Path, *words: str) -> tuple[int, list[dict[str, Any]]]:
    code = script.main(["--smoke", "--device", "cpu", "--out", str(out), *words])
    return code, json.loads((out / "gpu.json").read_text(encoding="utf-8"))["rows"]


def test_every_part_but_the_compiled_runs_on_tiny_sizes(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [name for name in script.PARTS if name != "compiled"]
    code, rows = smoke(script, tmp_path, "--sizes", "base", "--parts", ",".join(parts))
    assert [row for row in rows if row["is_check"] and not row["met"]] == []
    assert code == 0
    assert {row["part"].split()[0] for row in rows} == set(parts)
    rates = {row["what"]: row["value"] for row in rows if row["unit"] == "tokens/s"}
    assert set(rates) == {"1 lane", "3 lanes", "the runs of 3 lanes, one after another", "stock"}
    out = capsys.readouterr().out
    assert "4 rates x 1 seeds side by side, 24 rows" in out
    assert "packed fp32 against transformers fp32" in out


@pytest.mark.slow
def test_the_compiled_part_runs_on_tiny_sizes(script: ModuleType, tmp_path: Path) -> None:
    code, rows = smoke(script, tmp_path, "--sizes", "base", "--parts", "compiled")
    assert code == 0
    assert any(row["what"].startswith("one lane to stock compiled") for row in rows)


def test_a_part_that_fails_is_a_row_and_loses_no_other(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(bench: object, size: str) -> Iterator[Any]:
        yield script.Row(part="lanes base", what="before", value=1.0)
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setitem(script.PARTS, "lanes", (broken, True))
    code, rows = smoke(script, tmp_path, "--sizes", "base", "--parts", "lanes,dropout")
    assert code == 1
    assert [row["value"] for row in rows[:2]] == [1.0, "RuntimeError: out of memory"]
    assert rows[-1]["part"] == "dropout"
    assert rows[-1]["met"]


def test_a_variant_that_fails_is_a_row_and_the_others_are_timed(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no Triton")

    monkeypatch.setattr(script, "bias_step", broken)
    code, rows = smoke(script, tmp_path, "--sizes", "base", "--parts", "lanes")
    assert code == 1
    values = {row["what"]: row["value"] for row in rows}
    assert values["stock"] == "failed: RuntimeError: no Triton"
    assert values["3 lanes"] > 0


def test_without_time_a_part_says_so(script: ModuleType, tmp_path: Path) -> None:
    code, rows = smoke(script, tmp_path, "--minutes", "0", "--parts", "dropout")
    assert code == 1
    assert "no time left" in rows[0]["value"]


@pytest.mark.skipif(sys.platform == "win32", reason="no timer there")
def test_a_part_is_stopped_when_the_time_is_up(script: ModuleType) -> None:
    with pytest.raises(script.OutOfTime), script.stopped_after(1.1):
        time.sleep(60)


def test_without_a_gpu_only_smoke_runs(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "--smoke" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main(["--parts", "speed"])
    assert "not among" in capsys.readouterr().err


def test_random_rows_are_as_long_as_those_of_the_task(script: ModuleType) -> None:
    features = script.random_features("mrpc", 4000, 30522)
    lengths = [len(feature) for feature in features]
    assert np.mean(lengths) == pytest.approx(53.2, abs=0.7)  # MRPC: 53.2
    assert (min(lengths), max(lengths)) == (19, 103)
