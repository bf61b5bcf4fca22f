"""Writing a report: the tables in every format, the figures, and one page that holds all."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bitfit.errors import MissingExtra, UsageError
from bitfit.experiments.report.differences import Draws
from bitfit.experiments.report.figures import Drawing, draw_figures
from bitfit.experiments.report.page import as_page
from bitfit.experiments.report.results import Records, Results
from bitfit.experiments.report.statistics import RESAMPLES
from bitfit.experiments.report.table import Table
from bitfit.experiments.report.tables import all_tables
from bitfit.experiments.report.texts import (
    as_csv,
    as_latex,
    as_markdown,
    dump,
    escape_markdown,
    table_json,
)
from bitfit.experiments.report.words import Section, sections
from bitfit.plots import figure_bytes
from bitfit.storage import atomic_write

FORMATS = ("markdown", "csv", "latex", "json", "html", "figures")
# Lists that are too long and too wide for a printed page.
_NOT_IN_LATEX = ("scores", "change", "failures", "runs")


@dataclass(frozen=True)
class Report:
    """What a report says and which files hold it."""

    title: str
    sections: tuple[Section, ...]
    """What stands above the tables."""
    tables: tuple[Table, ...]
    files: tuple[Path, ...]
    """Written, in this order."""
    left_out: tuple[str, ...] = ()
    """What could not be made, with the reason."""


@dataclass
class _Writer:
    folder: Path
    files: list[Path] = field(default_factory=list)

    def write(self, name: str, data: str | bytes) -> None:
        path = self.folder / name
        atomic_write(path, data.encode("utf-8") if isinstance(data, str) else data)
        self.files.append(path)


def write_report(
    store: Records,
    out: Path | None = None,
    *,
    formats: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    on_part: Callable[[str], object] | None = None,
) -> Report:
    """Write the report of an experiment and return what it says.

    The same records give the same bytes: no date, no time, not where this machine has the data.
    Below ``out``: ``report.md``, ``report.html``, ``report.json``, ``tables/KEY.csv``,
    ``tables/KEY.tex`` and ``figures/KEY.png`` and ``.svg``. Each file is written whole or not at
    all; files of an earlier report that this one has no more are left.

    Args:
        store: the records of an experiment.
        out: a folder; None: ``report`` in the experiment's directory.
        formats: some of :data:`FORMATS`; None: all, without figures where matplotlib is missing.
        resamples: of the bootstrap.
        on_part: told what is made next: of thousands of runs it takes a minute.

    Raises:
        UsageError: an unknown format, or fewer than 100 resamples.
        MissingExtra: figures were asked for and matplotlib is missing.
        BitfitError: a file cannot be written.
    """
    wanted, left_out = _check(formats, resamples)
    tell = on_part or (lambda part: None)
    tell("reading the records")
    folder = out if out is not None else store.directory / "report"
    results = Results(store)
    draws = Draws(results, resamples)
    title = str(results.experiment.get("title") or results.experiment.get("name") or "Experiment")
    tell("comparing the rows")
    said, tables = sections(draws), all_tables(draws)
    tell("drawing the figures")
    drawings = draw_figures(draws) if "figures" in wanted else []
    writer = _Writer(folder)
    svgs = _write_figures(writer, drawings)
    tell("writing the tables")
    runs = Path(os.path.relpath(store.directory / "runs", folder)).as_posix()
    if "csv" in wanted:
        for table in tables:
            writer.write(f"tables/{table.key}.csv", as_csv(table))
    if "latex" in wanted:
        for table in (t for t in tables if t.key not in _NOT_IN_LATEX):
            writer.write(f"tables/{table.key}.tex", as_latex(table))
    if "json" in wanted:
        writer.write("report.json", _as_json(results, title, said, tables))
    if "markdown" in wanted:
        text = _as_markdown(results, title, said, tables, drawings, runs)
        writer.write("report.md", text)
    if "html" in wanted:
        writer.write("report.html", as_page(results, title, said, tables, drawings, svgs, runs))
    return Report(title, tuple(said), tuple(tables), tuple(writer.files), tuple(left_out))


def _check(formats: Sequence[str] | None, resamples: int) -> tuple[set[str], list[str]]:
    """Return the formats to write, and what is left out as it cannot be made."""
    unknown = sorted(set(formats or ()) - set(FORMATS))
    if unknown:
        raise UsageError(f"unknown format {unknown[0]!r} of a report: {', '.join(FORMATS)}")
    if resamples < 100:
        raise UsageError(f"resamples is {resamples}; expected at least 100")
    wanted = set(FORMATS if formats is None else formats)
    if "figures" not in wanted or _has_matplotlib():
        return wanted, []
    if formats is not None:
        raise MissingExtra("drawing figures", "plots")
    return wanted - {"figures"}, ["figures: they need an extra: pip install 'bitfit[plots]'"]


def _has_matplotlib() -> bool:
    try:
        return importlib.util.find_spec("matplotlib") is not None
    except ValueError:  # blocked by sys.modules["matplotlib"] = None
        return False


def _write_figures(writer: _Writer, drawings: Sequence[Drawing]) -> dict[str, str]:
    """Write each figure as PNG and SVG and return the latter by key."""
    svgs, names = {}, figure_names(drawings)
    for drawing in drawings:
        name = names[drawing.key]
        svg = figure_bytes(drawing.figure, "svg")
        writer.write(f"figures/{name}.png", figure_bytes(drawing.figure, "png"))
        writer.write(f"figures/{name}.svg", svg)
        svgs[drawing.key] = svg.decode("utf-8")
    return svgs


def figure_names(drawings: Sequence[Drawing]) -> dict[str, str]:
    """Return the file name of each figure by its key: a number tells those alike apart."""
    names: dict[str, str] = {}
    for drawing in drawings:
        name, number = file_name(drawing.key), 1
        while name in names.values():
            number += 1
            name = f"{file_name(drawing.key)}-{number}"
        names[drawing.key] = name
    return names


def file_name(key: str) -> str:
    """Return a key as a file name: runs of what is neither letter, digit nor dot become a dash."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", key).strip("-.") or "figure"


def _as_json(results: Results, title: str, said: Sequence[Section], tables: Sequence[Table]) -> str:
    return dump(
        {
            "format": 1,
            "title": title,
            "name": results.experiment.get("name"),
            "commands": results.commands,
            "runs": {
                "done": len(results.done),
                "failed": len(results.failed),
                "missing": results.missing(),
            },
            "sections": [{"title": s.title, "sentences": list(s.sentences)} for s in said],
            "tables": [table_json(table) for table in tables],
        }
    )


def _as_markdown(
    results: Results,
    title: str,
    said: Sequence[Section],
    tables: Sequence[Table],
    drawings: Sequence[Drawing],
    runs: str,
) -> str:
    lines = [f"# {escape_markdown(title)}", ""]
    if results.commands:
        lines += [*(f"    {command}" for command in results.commands), ""]
    for section in said:
        lines += [f"## {section.title}", ""]
        lines += [f"- {escape_markdown(sentence)}" for sentence in section.sentences]
        lines.append("")
    names = figure_names(drawings)
    for table in tables:
        lines.append(as_markdown(table, runs=runs))
        for drawing in (d for d in drawings if d.table == table.key):
            place = f"figures/{names[drawing.key]}.svg"
            lines += [f"![{escape_markdown(drawing.title)}]({place})", ""]
            lines += [f"{escape_markdown(drawing.caption)}", ""]
    return "\n".join(lines).rstrip("\n") + "\n"
