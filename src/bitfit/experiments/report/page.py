"""The report as one HTML page that needs nothing else: tables, inline figures, every run's record.

From each number links lead to the runs that it is made of, and from there to record and command.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from string import Template
from typing import Any

from bitfit.experiments.report.figures import Drawing
from bitfit.experiments.report.results import Results, shown_command
from bitfit.experiments.report.table import Cell, Column, Table, rate_text
from bitfit.experiments.report.words import Section

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
$style
</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header>
<h1>$title</h1>
$command
<nav aria-label="Contents">
<ul>
$contents
</ul>
</nav>
</header>
<main id="main">
$main
</main>
</body>
</html>
""")

_STYLE = """\
:root {
  --ink: #1b1b1b; --paper: #ffffff; --soft: #5a5a5a; --line: #d0d0d0; --head: #f1f3f5;
  --link: #0b57b0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e8e8e8; --paper: #15181c; --soft: #b0b4ba; --line: #3a4048; --head: #20252b;
    --link: #8ab8ff;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem; max-width: 78rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif;
}
a { color: var(--link); }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
nav ul { columns: 18rem; column-gap: 2.5rem; padding-left: 1.2rem; }
nav li { break-inside: avoid; }
.skip { position: absolute; left: -99rem; }
.skip:focus { position: static; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td {
  border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: left;
  vertical-align: top;
}
thead th { background: var(--head); white-space: nowrap; }
.n { text-align: right; white-space: nowrap; }
tbody th { font-weight: 500; white-space: nowrap; }
.printed { color: var(--soft); display: block; font-size: .85em; }
.notes { color: var(--soft); font-size: .9rem; }
td details summary { cursor: pointer; color: var(--link); }
td details a { display: block; font-size: .85em; }
code, pre { font-family: ui-monospace, monospace; font-size: .85rem; }
pre {
  overflow-x: auto; background: var(--head); padding: .6rem; white-space: pre-wrap;
  overflow-wrap: anywhere;
}
figure { margin: 1.5rem 0; }
figure .svg {
  background: #ffffff; padding: .5rem; border: 1px solid var(--line); overflow-x: auto;
}
figure svg { max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .9rem; }
.run { border-top: 1px solid var(--line); padding: .6rem 0; }
.run h3 { margin: 0; font-size: 1rem; }
:target { outline: 2px solid var(--link); outline-offset: 3px; }
@media print { nav { display: none; } }"""


def as_page(
    results: Results,
    title: str,
    said: Sequence[Section],
    tables: Sequence[Table],
    drawings: Sequence[Drawing],
    svgs: Mapping[str, str],
    runs: str,
) -> str:
    """Return the whole page.

    Args:
        results: the records; each is an entry of the page with an anchor ``run-ID``.
        title: plain text.
        said: the sentences on top.
        tables: all but the list of runs, which becomes those entries.
        drawings: the figures, each shown below its table.
        svgs: key of a drawing -> its SVG file.
        runs: the folder of the records, relative to the page.
    """
    seeds = {r["id"]: _short(r) for r in results.records}
    shown = [table for table in tables if table.key != "runs"]
    parts = [_section(section) for section in said]
    for table in shown:
        figures = [_figure(d, svgs[d.key]) for d in drawings if d.table == table.key]
        parts.append("\n".join([
            f'<section id="{escape(table.key)}">', f"<h2>{escape(table.title)}</h2>",
            _table(table, seeds), *figures, "</section>",
        ]))  # fmt: skip
    parts.append(_runs(results, runs))
    names = [*((s.key, s.title) for s in said), *((t.key, t.title) for t in shown)]
    names.append(("runs", "Every run"))
    commands = "\n".join(results.commands)
    return _PAGE.substitute(
        title=escape(title),
        style=_STYLE,
        command=f"<pre><code>{escape(commands)}</code></pre>" if commands else "",
        contents="\n".join(f'<li><a href="#{escape(k)}">{escape(t)}</a></li>' for k, t in names),
        main="\n".join(parts),
    )


def _section(section: Section) -> str:
    lines = "\n".join(f"<li>{escape(sentence)}</li>" for sentence in section.sentences)
    return (
        f'<section id="{escape(section.key)}">\n<h2>{escape(section.title)}</h2>\n'
        f"<ul>\n{lines}\n</ul>\n</section>"
    )


# ------------------------------------------------------------------ tables


def _table(table: Table, seeds: Mapping[str, str]) -> str:
    header = "".join(f'<th scope="col"{_align(c)}>{escape(c.title)}</th>' for c in table.columns)
    rows = "\n".join(
        "<tr>" + "".join(_cell(table, i, cell, seeds) for i, cell in enumerate(row)) + "</tr>"
        for row in table.rows
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(table.title)}">\n'
        f"<table>\n<caption>{escape(table.title)}</caption>\n"
        f"<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>"
        + (f'\n<ul class="notes">{notes}</ul>' if notes else "")
    )


def _align(column: Column) -> str:
    return ' class="n"' if column.is_number else ""


def _cell(table: Table, place: int, cell: Cell, seeds: Mapping[str, str]) -> str:
    printed = cell.printed_text
    inside = _linked(cell, seeds)
    if printed:
        inside += f'<span class="printed">paper: {escape(printed)}</span>'
    align = _align(table.columns[place])
    if place < table.heads:
        return f'<th scope="row"{align}>{inside}</th>'
    return f"<td{align}>{inside}</td>"


def _linked(cell: Cell, seeds: Mapping[str, str]) -> str:
    """Return a cell's text, leading to its run, or unfolding the list of its runs."""
    if not cell.runs:
        return escape(cell.marked)
    if len(cell.runs) == 1:
        return f'<a href="#run-{escape(cell.runs[0])}">{escape(cell.marked)}</a>'
    if cell.text == ", ".join(cell.runs):
        return ", ".join(f'<a href="#run-{escape(r)}">{escape(r)}</a>' for r in cell.runs)
    links = "".join(
        f'<a href="#run-{escape(run)}">{escape(seeds.get(run, run))}</a>' for run in cell.runs
    )
    return f"<details><summary>{escape(cell.marked)}</summary>{links}</details>"


def _short(record: Mapping[str, Any]) -> str:
    """Return what tells a run from its neighbours in a cell."""
    config = record["config"]
    rate = config.get("learning_rate")
    shown = f", {rate_text(rate)}" if rate is not None else ""
    return f"{record['row']}, {record['task']['name']}{shown}, seed {config.get('seed')}"


# ------------------------------------------------------------------ figures


def _figure(drawing: Drawing, svg: str) -> str:
    return (
        f'<figure id="figure-{escape(drawing.key)}">\n<div class="svg">'
        f"{inline_svg(svg, drawing.key, drawing.title)}</div>\n"
        f"<figcaption>{escape(drawing.title)}. {escape(drawing.caption)}</figcaption>\n</figure>"
    )


def inline_svg(svg: str, key: str, label: str) -> str:
    """Return an SVG file as an element: no prolog, no metadata, ids of its own, a label."""
    found = svg[svg.index("<svg") :]
    found = re.sub(r"<metadata>.*?</metadata>\s*", "", found, flags=re.DOTALL)
    start = re.sub(r"[^A-Za-z0-9-]", "-", key)
    found = re.sub(r'\bid="([^"]*)"', rf'id="{start}-\1"', found)
    found = re.sub(r'(xlink:href|href)="#([^"]*)"', rf'\1="#{start}-\2"', found)
    found = re.sub(r"url\(#([^)]*)\)", rf"url(#{start}-\1)", found)
    return found.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1).rstrip()


# ------------------------------------------------------------------ runs


def _runs(results: Results, runs: str) -> str:
    entries = "\n".join(_run(results, record, runs) for record in results.records)
    return f'<section id="runs">\n<h2>Every run</h2>\n{entries}\n</section>'


def _run(results: Results, record: Mapping[str, Any], runs: str) -> str:
    """Return a run's entry: what it is, the command that repeats it, its record."""
    run = str(record["id"])
    name = f"{results.label(results.line_of(record))}, {_short(record).split(', ', 1)[1]}"
    state = "" if record["state"] == "done" else f", {record['state']}: {record.get('error')}"
    command = record.get("command")
    parts = (f'  "{key}": {json.dumps(record[key], ensure_ascii=False)}' for key in record)
    whole = "{\n" + ",\n".join(parts) + "\n}"
    return (
        f'<article class="run" id="run-{escape(run)}">\n'
        f"<h3>{escape(name)}{escape(state)}</h3>\n"
        + (f"<pre><code>{escape(shown_command(str(command)))}</code></pre>\n" if command else "")
        + f'<p>Record: <a href="{escape(runs)}/{escape(run)}.json">{escape(run)}.json</a></p>\n'
        f"<details><summary>The record</summary><pre>{escape(whole)}</pre></details>\n</article>"
    )
