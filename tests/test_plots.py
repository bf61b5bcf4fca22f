from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bitfit.errors import BitfitError, MissingExtra, UsageError
from bitfit.plots import change_table, plot_bias_change

CHANGES = [
    {"term": "query", "layer": 0, "mean_abs": 0.01},
    {"term": "query", "layer": 1, "mean_abs": 0.03},
    {"term": "intermediate", "layer": 0, "mean_abs": 0.05},
    {"term": "intermediate", "layer": 1, "mean_abs": 0.07},
    {"term": "pooler", "layer": None, "mean_abs": 0.02},
]


def test_terms_stand_by_total_change_under_the_papers_symbols() -> None:
    rows = change_table(CHANGES)
    assert [row["symbol"] for row in rows] == ["b_m2", "b_q", "pooler"]
    assert rows[0]["layers"] == {0: 0.05, 1: 0.07}
    assert rows[0]["total"] == pytest.approx(0.12)
    assert rows[0]["mean"] == pytest.approx(0.06)


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_the_figure_is_written_in_the_format_of_its_suffix(
    suffix: str, start: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "new" / f"figure{suffix}"
    plot_bias_change(CHANGES, path, title="costs $5 and $6")  # dollars are no mathematics here
    assert path.read_bytes().startswith(start)
    if suffix == ".svg":
        assert "avg" in path.read_text()


def test_all_zero_changes_can_be_drawn(tmp_path: Path) -> None:
    plot_bias_change([{"term": "query", "layer": 0, "mean_abs": 0.0}], tmp_path / "zero.png")
    assert (tmp_path / "zero.png").stat().st_size > 1000


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"\.png"):
        plot_bias_change(CHANGES, tmp_path / "figure.txt")
    with pytest.raises(UsageError, match="only the head"):
        plot_bias_change([], tmp_path / "figure.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(BitfitError, match="cannot be written"):
        plot_bias_change(CHANGES, tmp_path / "file" / "figure.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"bitfit\[plots\]"):
        plot_bias_change(CHANGES, tmp_path / "figure.png")


def test_a_terms_name_is_text_and_no_formula(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_bias_change([{"term": r"$\frac{$", "layer": 0, "mean_abs": 0.1}], tmp_path / "x.png")
