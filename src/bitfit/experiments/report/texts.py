"""Tables as Markdown, CSV, LaTeX and JSON."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence

from bitfit.experiments.report.table import DASH, SHARE, Cell, Column, Table, points
from bitfit.experiments.report.words import paper_order
from bitfit.terms import SYMBOLS

# ------------------------------------------------------------------ Markdown


def as_markdown(table: Table, *, runs: str = "../runs") -> str:
    """Return a table with its heading and notes.

    Args:
        table: the table.
        runs: the folder of the records, relative to the page: ids become links.
    """
    columns = table.columns
    lines = [
        "| " + " | ".join(escape_markdown(c.title) for c in columns) + " |",
        "|" + "|".join("---:" if c.is_number else "---" for c in columns) + "|",
    ]
    for row in table.rows:
        lines.append("| " + " | ".join(_markdown_cell(cell, runs) for cell in row) + " |")
    notes = [f"- {escape_markdown(note)}" for note in table.notes]
    heading = f"## {escape_markdown(table.title)}"
    return "\n".join([heading, "", *lines, *([""] if notes else []), *notes, ""])


def _markdown_cell(cell: Cell, runs: str) -> str:
    if cell.runs and cell.text == ", ".join(cell.runs):
        return ", ".join(f"[{run}]({runs}/{run}.json)" for run in cell.runs)
    printed = cell.printed_text
    return escape_markdown(cell.marked) + (f" ({printed})" if printed else "")


def escape_markdown(written: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    found = re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", written)
    return " ".join(found.split())


# ------------------------------------------------------------------ CSV


def as_csv(table: Table) -> str:
    """Return a table as CSV: numbers without separators, each in a column of its own.

    ``KEY sd`` has the spreads of a column of means, ``KEY printed`` what the paper prints.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    written = [
        _csv_column(column, [row[i] for row in table.rows])
        for i, column in enumerate(table.columns)
    ]
    writer.writerows(zip(*(column for columns in written for column in columns), strict=True))
    return out.getvalue()


def _csv_column(column: Column, cells: Sequence[Cell]) -> list[list[str]]:
    """Return what a column is in CSV, with its heading: one column, or one for each number."""
    found = [[column.key, *(_csv_text(cell) for cell in cells)]]
    if any(_is_mean(cell) for cell in cells):
        spreads = [cell.value["sd"] if _is_mean(cell) else None for cell in cells]
        found.append([f"{column.key} sd", *("" if s is None else points(s) for s in spreads)])
    if any(cell.printed is not None for cell in cells):
        found.append([f"{column.key} printed", *(cell.printed_text for cell in cells)])
    return found


def _csv_text(cell: Cell) -> str:
    if cell.text == DASH:
        return ""
    if _is_mean(cell):
        return "" if cell.value["mean"] is None else points(cell.value["mean"])
    is_number = isinstance(cell.value, int | float)
    return cell.text.replace(",", "") if is_number else cell.text


def _is_mean(cell: Cell) -> bool:
    return isinstance(cell.value, Mapping) and {"mean", "sd"} <= {*cell.value}


# ------------------------------------------------------------------ LaTeX

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%",
    "#": r"\#", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "–": "--", "−": "$-$", "<": "$<$", ">": "$>$", "|": "$|$", '"': "''",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
}  # fmt: skip
_SYMBOL = re.compile(rf"\b(?:{'|'.join(SYMBOLS.values())})\b")


# What a page holds in small print, below a heading and above a caption.
_LATEX_ROWS = 45


def as_latex(table: Table) -> str:
    """Return a ``table`` environment with a plain ``tabular``: no package is needed.

    A wide table has the shape of the paper's: methods in rows, the share of the parameters, then
    tasks in the paper's order, and the printed numbers as rows of their own below ours. One that
    is longer than a page becomes several.
    """
    columns = _latex_columns(table)
    wanted = [table.columns.index(c) for c in columns]
    ours = table.rows[: len(table.rows) - table.printed_only]
    rows = [_latex_row([row[i].marked for i in wanted]) for row in ours]
    rows += _printed_rows(table, wanted)
    parts = [rows[i : i + _LATEX_ROWS] for i in range(0, len(rows), _LATEX_ROWS)] or [[]]
    notes = " ".join(n for n in table.notes if not (table.is_wide and n.startswith("In brackets")))
    label = re.sub(r"[^a-z0-9-]", "-", table.key.lower())
    captions = [f"{table.title}. {notes}".strip(), *[f"{table.title} (continued)."] * len(parts)]
    labels = [rf"\label{{tab:{label}}}", *[""] * len(parts)]
    written = zip(parts, captions, labels, strict=False)
    return "\n".join(_latex_table(columns, *each) for each in written)


def _latex_table(columns: Sequence[Column], rows: Sequence[str], caption: str, label: str) -> str:
    form = "".join("r" if c.is_number else "l" for c in columns)
    lines = [
        r"\begin{table}",
        r"\centering",
        r"\footnotesize",
        r"\setlength{\tabcolsep}{3pt}",
        rf"\begin{{tabular}}{{{form}}}",
        r"\hline",
        _latex_row([c.title for c in columns]),
        r"\hline",
        *rows,
        r"\hline",
        r"\end{tabular}",
        rf"\caption{{{escape_latex(caption)}}}",
        *([label] if label else []),
        r"\end{table}",
    ]
    return "\n".join([*lines, ""])


def _latex_columns(table: Table) -> list[Column]:
    if not table.is_wide:
        return list(table.columns)
    keys = paper_order([c.key for c in table.columns[table.heads :]])
    places = {key: place for place, key in enumerate(keys)}
    # The paper has the share of the parameters before the scores.
    in_order = sorted(table.columns[table.heads :], key=lambda c: (c.key != SHARE, places[c.key]))
    return [*table.columns[: table.heads], *in_order]


def _printed_rows(table: Table, wanted: Sequence[int]) -> list[str]:
    rows = [row for row in table.rows if any(cell.printed is not None for cell in row)]
    if not rows:
        return []
    lines = [r"\hline", rf"\multicolumn{{{len(wanted)}}}{{l}}{{{_printed_title(table)}}} \\"]
    for row in rows:
        cells = [row[i].text if i < table.heads else row[i].printed_text for i in wanted]
        lines.append(_latex_row([cell or DASH for cell in cells]))
    return lines


def _printed_title(table: Table) -> str:
    base = f", {table.printed_base}" if table.printed_base else ""
    return escape_latex(f"Printed in the paper{base}")


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(escape_latex(cell) for cell in cells) + r" \\"


def escape_latex(written: str) -> str:
    """Return text that LaTeX prints as it is, with the paper's symbols (``b_m2``) as formulas."""
    parts, end = [], 0
    for match in _SYMBOL.finditer(written):
        parts.append(_plain_latex(written[end : match.start()]))
        parts.append(rf"$b_{{\mathrm{{{match[0].partition('_')[2]}}}}}$")
        end = match.end()
    return "".join(parts) + _plain_latex(written[end:])


def _plain_latex(written: str) -> str:
    """Escape what is special; what the fonts of plain LaTeX lack becomes a question mark."""
    found = (_LATEX.get(letter, letter) for letter in written)
    return "".join(letter if max(letter) < "\u0180" else "?" for letter in found)


# ------------------------------------------------------------------ JSON


def table_json(table: Table) -> dict[str, object]:
    """Return a table for programs: scores as fractions, None where nothing is known."""
    return {
        "key": table.key,
        "title": table.title,
        "columns": [{"key": c.key, "title": c.title} for c in table.columns],
        "rows": [
            {c.key: _cell_json(cell) for c, cell in zip(table.columns, row, strict=True)}
            for row in table.rows
        ],
        "notes": list(table.notes),
    }


def _cell_json(cell: Cell) -> dict[str, object]:
    found: dict[str, object] = {"value": cell.value, "text": cell.text}
    if cell.runs:
        found["runs"] = list(cell.runs)
    if cell.printed is not None:
        found["printed"] = cell.printed
    return found


def dump(value: object) -> str:
    """Return JSON that people can read: indented, keys as they come, no NaN."""
    return json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
