"""Tables as Markdown, CSV, LaTeX and JSON."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence

from bitfit.experiments.report.table import DASH, Cell, Column, Table
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
    """Return a table as CSV; printed numbers have columns of their own, ``KEY printed``."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    with_printed = [
        i for i in range(len(table.columns)) if any(r[i].printed is not None for r in table.rows)
    ]
    header = []
    for i, column in enumerate(table.columns):
        header += [column.key, f"{column.key} printed"] if i in with_printed else [column.key]
    writer.writerow(header)
    for row in table.rows:
        cells = []
        for i, cell in enumerate(row):
            cells.append("" if cell.text == DASH else cell.text)
            if i in with_printed:
                cells.append(cell.printed_text)
        writer.writerow(cells)
    return out.getvalue()


# ------------------------------------------------------------------ LaTeX

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%",
    "#": r"\#", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "–": "--", "−": "$-$", "<": "$<$", ">": "$>$", "|": "$|$", '"': "''",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
}  # fmt: skip
_SYMBOL = re.compile(rf"\b(?:{'|'.join(SYMBOLS.values())})\b")


def as_latex(table: Table) -> str:
    """Return a ``table`` environment with a plain ``tabular``: no package is needed.

    A wide table has the shape of the paper's: methods in rows, tasks in the paper's order, and the
    printed numbers as rows of their own below ours.
    """
    columns = _latex_columns(table)
    wanted = [table.columns.index(c) for c in columns]
    form = "".join("r" if c.is_number else "l" for c in columns)
    lines = [
        r"\begin{table}",
        r"\centering",
        r"\footnotesize",
        r"\setlength{\tabcolsep}{3pt}",
        rf"\begin{{tabular}}{{{form}}}",
        r"\hline",
    ]
    lines.append(_latex_row([c.title for c in columns]))
    lines.append(r"\hline")
    ours = table.rows[: len(table.rows) - table.printed_only]
    lines += [_latex_row([row[i].marked for i in wanted]) for row in ours]
    lines += _printed_rows(table, wanted)
    notes = " ".join(n for n in table.notes if not (table.is_wide and n.startswith("In brackets")))
    caption = f"{table.title}. {notes}".strip()
    lines += [r"\hline", r"\end{tabular}", rf"\caption{{{escape_latex(caption)}}}"]
    label = re.sub(r"[^a-z0-9-]", "-", table.key.lower())
    return "\n".join([*lines, rf"\label{{tab:{label}}}", r"\end{table}", ""])


def _latex_columns(table: Table) -> list[Column]:
    if not table.is_wide:
        return list(table.columns)
    keys = paper_order([c.key for c in table.columns[table.heads :]])
    places = {key: place for place, key in enumerate(keys)}
    return [
        *table.columns[: table.heads],
        *sorted(table.columns[table.heads :], key=lambda c: places[c.key]),
    ]


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
