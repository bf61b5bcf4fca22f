"""The files of a report: every format, one self-contained page, the same bytes each time."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import shutil
import sys
from html.parser import HTMLParser

import pytest
from report_samples import EIGHT, RTE, STSB, Sample, table3

from bitfit.errors import BitfitError, MissingExtra, UsageError
from bitfit.experiments.report.page import inline_svg
from bitfit.experiments.report.table import SHARE, Cell, Column, Summary, Table, number, text
from bitfit.experiments.report.texts import as_csv, as_latex, as_markdown, escape_latex
from bitfit.experiments.report.write import FORMATS, file_name, write_report
from bitfit.experiments.store import Store

TEXTS = tuple(form for form in FORMATS if form != "figures")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    sample = table3(tmp_path_factory.mktemp("table3"), tasks=(RTE,), rows=60)
    sample.failed("Frozen", RTE, rate=7e-4, error="<script>alert('&')</script>")
    return sample


@pytest.fixture(scope="module")
def report(sample):
    pytest.importorskip("matplotlib")
    return write_report(sample, resamples=100)


def text_of(sample, name):
    return (sample.directory / "report" / name).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Collects what a page links to, its ids and its tables; holds that tags are balanced."""

    VOID = ("meta", "br", "path", "use", "rect", "line", "circle")

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.tags, self.open, self.outside = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        if "id" in found:
            self.ids.append(found["id"])
        for key in ("href", "src", "xlink:href"):
            # A heat map is an image within the page.
            if key in found and not found[key].startswith("data:image/png;base64,"):
                self.links.append(found[key])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag in self.VOID and self.open[-1] != tag:
            return
        assert self.open.pop() == tag


def test_every_format_is_written_and_named(sample, report):
    names = {str(p.relative_to(sample.directory / "report")) for p in report.files}
    assert {
        "report.md",
        "report.html",
        "report.json",
        "tables/best.csv",
        "tables/best.tex",
    } <= names
    assert {"figures/differences.png", "figures/differences.svg"} <= names
    assert {"figures/change-rte.png", "figures/convergence-rte.svg"} <= names
    assert all(path.stat().st_size for path in report.files)
    text = (sample.directory / "report" / "report.md").read_text(encoding="utf-8")
    assert "at most 24.0 thousandths" in text  # 0.024 is no 0.0
    assert report.left_out == ()


def test_the_same_records_give_the_same_bytes_elsewhere_too(sample, report, tmp_path):
    copy = tmp_path / "other" / "place"
    shutil.copytree(sample.directory, copy, ignore=shutil.ignore_patterns("report"))
    again = write_report(Store(copy), resamples=100)
    assert len(again.files) == len(report.files)
    for one, two in zip(report.files, again.files, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name


def test_no_path_and_no_date_of_this_machine_is_written(sample, report):
    for path in report.files:
        data = path.read_bytes()
        assert str(sample.directory).encode() not in data, path.name
        assert b"dc:date" not in data, path.name


# ------------------------------------------------------------------ the page


def test_the_page_is_whole_and_needs_nothing_else(sample, report):
    text = text_of(sample, "report.html")
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe")]
    outside = [link for link in page.links if not link.startswith("#")]
    assert all(re.fullmatch(r"\.\./runs/\w+\.json", link) for link in outside)
    assert not re.search(r"@import|url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids))
    assert "prefers-color-scheme: dark" in text


def test_every_link_of_the_page_leads_to_an_anchor(sample, report):
    page = Page(text_of(sample, "report.html"))
    anchors = set(page.ids)
    inner = [link[1:] for link in page.links if link.startswith("#")]
    assert inner
    assert set(inner) <= anchors
    for record in sample.records():
        assert f"run-{record['id']}" in anchors


def test_records_that_the_page_points_to_are_there(sample, report):
    page = Page(text_of(sample, "report.html"))
    for link in page.links:
        if not link.startswith("#"):
            assert (sample.directory / "report" / link).resolve().exists()


def test_tables_of_the_page_can_be_read_aloud(sample, report):
    page = Page(text_of(sample, "report.html"))
    counts = {tag: sum(t == tag for t, _ in page.tags) for tag in ("table", "caption", "figure")}
    assert counts["table"] == counts["caption"] > 5
    assert all(a.get("scope") in ("row", "col") for t, a in page.tags if t == "th")
    svgs = [a for t, a in page.tags if t == "svg"]
    assert len(svgs) == counts["figure"] > 3
    assert all(a["role"] == "img" and a["aria-label"] for a in svgs)


def test_what_runs_say_is_text_and_never_markup(sample, report):
    assert "<script" not in text_of(sample, "report.html")
    assert "&lt;script&gt;" in text_of(sample, "report.html")
    assert r"\<script\>" in text_of(sample, "report.md")


def test_a_number_leads_to_each_of_its_runs_with_its_command(sample, report):
    text = text_of(sample, "report.html")
    record = next(r for r in sample.records() if r["row"] == "BitFit" and r["state"] == "done")
    assert text.count(f'href="#run-{record["id"]}"') >= 3
    entry = text.split(f'id="run-{record["id"]}"')[1].split("</article>")[0]
    assert record["command"] in entry
    assert f"../runs/{record['id']}.json" in entry


def test_ids_of_an_inlined_figure_are_its_own():
    svg = (
        '<?xml version="1.0"?><svg><metadata>x</metadata><g id="a"/>'
        '<use href="#a" clip-path="url(#a)"/></svg>'
    )
    found = inline_svg(svg, "one", 'say "hi"')
    assert found == (
        '<svg role="img" aria-label="say &quot;hi&quot;"><g id="one-a"/>'
        '<use href="#one-a" clip-path="url(#one-a)"/></svg>'
    )


# ------------------------------------------------------------------ texts


def test_json_has_fractions_and_the_runs(sample, report):
    found = json.loads(text_of(sample, "report.json"))
    assert found["format"] == 1
    assert found["runs"]["failed"] == 2
    best = next(t for t in found["tables"] if t["key"] == "best")
    cell = best["rows"][0]["rte"]
    assert 0 < cell["value"] < 1
    assert cell["printed"] == 76.5
    assert cell["runs"]


def test_csv_has_printed_numbers_in_columns_of_their_own(sample, report):
    rows = list(csv.DictReader(io.StringIO(text_of(sample, "tables/best.csv"))))
    assert rows[0]["rte printed"] == "76.5"
    assert rows[2]["row"] == "Frozen"
    assert 0 < float(rows[0]["rte"]) < 100


def test_markdown_says_on_what_the_base_was_trained_and_the_command(sample, report):
    text = text_of(sample, "report.md")
    assert text.startswith("# A sample\n\n    bitfit reproduce table3 --base minilm\n")
    assert "Base minilm: contrastively tuned for sentence similarity." in text
    assert "![Differences to BitFit](figures/differences.svg)" in text
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (sample.directory / "report" / link).resolve().exists(), link


SMALL = Table(
    "t", "A 50 % title",
    (Column("row", "row", False), Column("rte", "RTE"), Column("qnli", "QNLI")),
    ((Cell("b_m2 + b_q"), Cell("1.0 ± 0.1", printed=72.7), Cell()),),
    ("A note & more_of it.",), is_wide=True, printed_base="BERT-base",
)  # fmt: skip


def test_latex_has_the_shape_and_order_of_the_paper():
    lines = as_latex(SMALL).splitlines()
    assert r"row & QNLI & RTE \\" in lines
    assert r"$b_{\mathrm{m2}}$ + $b_{\mathrm{q}}$ & -- & 1.0 $\pm$ 0.1 \\" in lines
    assert r"$b_{\mathrm{m2}}$ + $b_{\mathrm{q}}$ & -- & 72.7 \\" in lines
    assert r"\multicolumn{3}{l}{Printed in the paper, BERT-base} \\" in lines
    assert r"\caption{A 50 \% title. A note \& more\_of it.}" in lines


def test_latex_has_the_share_of_the_parameters_before_the_scores():
    columns = (*SMALL.columns, Column(SHARE, "share"))
    rows = tuple((*row, Cell("0.09")) for row in SMALL.rows)
    lines = as_latex(dataclasses.replace(SMALL, columns=columns, rows=rows)).splitlines()
    assert r"row & share & QNLI & RTE \\" in lines


def test_latex_of_a_table_that_is_longer_than_a_page_is_several():
    rows = tuple((Cell(f"row {i}"),) for i in range(100))
    found = as_latex(Table("long", "Long", (Column("row", "row", False),), rows, ("A note.",)))
    assert found.count(r"\begin{table}") == found.count(r"\end{table}") == 3
    assert [f"row {i} " in found for i in (0, 44, 45, 99)] == [True] * 4
    assert found.count(r"\label{tab:long}") == found.count("Long. A note.") == 1
    assert found.count("Long (continued).") == 2


def test_csv_has_numbers_that_programs_read():
    columns = (Column("row", "row", False), Column("n", "n"), Column("mrpc", "MRPC"))
    mean = Summary((0.5, 0.7)).cell(printed=91.7)
    rows = ((text("BitFit, all"), number(261294), mean), (text("none"), number(None), Cell()))
    found = list(csv.reader(io.StringIO(as_csv(Table("t", "T", columns, rows)))))
    assert found == [
        ["row", "n", "mrpc", "mrpc sd", "mrpc printed"],
        ["BitFit, all", "261294", "60.0", "14.1", "91.7"],
        ["none", "", "", "", ""],
    ]


def test_latex_of_a_report_is_balanced_and_plain(sample, report):
    for path in (sample.directory / "report" / "tables").glob("*.tex"):
        text = path.read_text(encoding="utf-8")
        plain = re.sub(r"\\[\\{}$&%#_]", "", text)
        assert plain.count("{") == plain.count("}"), path.name
        assert plain.count("$") % 2 == 0, path.name
        assert text.count(r"\begin{table}") == text.count(r"\end{table}") >= 1
        assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}")
        assert text.isascii()


def test_special_characters_are_escaped():
    assert escape_latex("50 % & a_b #1 {x} ~^\\") == (
        r"50 \% \& a\_b \#1 \{x\} \textasciitilde{}\textasciicircum{}\textbackslash{}"
    )
    assert escape_latex("sub_key b_key b_k") == r"sub\_key b\_key $b_{\mathrm{k}}$"
    assert escape_latex("é語") == "é?"
    text = as_markdown(Table("t", "T", (Column("a", "a|b"),), ((Cell("x|y_z\nw"),),)))
    assert r"| a\|b |" in text
    assert r"| x\|y\_z w |" in text
    assert as_csv(Table("t", "T", (Column("a", "a"),), ((Cell('x,"y"'),),))) == 'a\n"x,""y"""\n'


# ------------------------------------------------------------------ options and errors


def test_only_what_was_asked_for_is_written_and_elsewhere(sample, tmp_path):
    found = write_report(sample, tmp_path / "out", formats=["markdown", "csv"], resamples=100)
    assert {path.suffix for path in found.files} == {".md", ".csv"}
    assert all(path.is_relative_to(tmp_path / "out") for path in found.files)


def test_a_report_without_matplotlib_has_no_figures_and_says_so(tmp_path, monkeypatch):
    sample = Sample(tmp_path, rows=["BitFit"], tasks=["rte"])
    sample.done("BitFit", RTE)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = write_report(sample, resamples=100)
    assert not [path for path in found.files if path.parent.name == "figures"]
    assert "bitfit[plots]" in found.left_out[0]
    with pytest.raises(MissingExtra, match="plots"):
        write_report(sample, formats=["figures"])


def test_wrong_options_are_refused(sample):
    with pytest.raises(UsageError, match="unknown format 'pdf'"):
        write_report(sample, formats=["pdf"])
    with pytest.raises(UsageError, match="at least 100"):
        write_report(sample, resamples=10)


def test_a_folder_that_cannot_be_written_is_an_error(sample, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BitfitError, match="cannot be written"):
        write_report(sample, tmp_path / "file", formats=TEXTS, resamples=100)


def test_partial_experiments_have_a_page(tmp_path):
    empty = Sample(tmp_path / "empty", rows=["BitFit"], tasks=["rte"])
    assert write_report(empty, resamples=100).tables == ()
    Page(text_of(empty, "report.html"))
    failed = Sample(tmp_path / "failed", rows=["BitFit"], tasks=["rte"])
    failed.failed("BitFit", RTE)
    keys = [table.key for table in write_report(failed, resamples=100).tables]
    assert keys == ["scores", "failures", "runs"]
    Page(text_of(failed, "report.html"))


def test_figures_are_drawn_of_learning_curves_and_undefined_scores(tmp_path):
    pytest.importorskip("matplotlib")
    sample = Sample(tmp_path, rows=["BitFit", "Full $x$"], tasks=["stsb"], paper=None)
    for size in (100, 1000):
        sample.done("BitFit", STSB, constant=True, skill=1.0, train_rows=size, epochs=2)
        sample.done("Full $x$", STSB, train_rows=size, change=EIGHT[:2])
    found = write_report(sample, formats=["figures"], resamples=100)
    names = {path.name for path in found.files}
    assert {"curve-stsb.png", "stability-stsb.svg", "change-stsb.png"} <= names


def test_a_base_that_is_a_path_makes_a_file_name():
    assert file_name("change-rte-/models/my base") == "change-rte-models-my-base"
    assert file_name("/") == "figure"
