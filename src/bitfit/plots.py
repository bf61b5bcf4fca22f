"""Figures: how far each bias term moved, as in Figure 1 of the paper."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitfit.errors import MissingExtra, UsageError
from bitfit.storage import atomic_write
from bitfit.terms import SYMBOLS

SUFFIXES = (".png", ".svg", ".pdf")


def change_table(changes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the change of each term, largest total first, ready to be drawn or written as JSON.

    Args:
        changes: one entry per bias vector: ``term``, ``layer`` (None where it stands once) and
            ``mean_abs``, from :func:`bitfit.comparison.bias_change`.

    Returns:
        Per term: ``term``, ``symbol`` (the paper's, or the term itself), ``layers`` ``{layer: mean
        absolute change}``, ``total`` (sum over the layers) and ``mean`` (their average).

    Example:
        >>> change_table([{"term": "query", "layer": 0, "mean_abs": 0.5}])[0]["symbol"]
        'b_q'
    """
    terms: dict[str, dict[int | None, float]] = {}
    for change in changes:
        terms.setdefault(change["term"], {})[change["layer"]] = change["mean_abs"]
    rows = [
        {
            "term": term,
            "symbol": SYMBOLS.get(term, term),
            "layers": layers,
            "total": sum(layers.values()),
            "mean": sum(layers.values()) / len(layers),
        }
        for term, layers in terms.items()
    ]
    return sorted(rows, key=lambda row: (-row["total"], row["term"]))


def check_plot_path(path: Path) -> None:
    """Return if a figure can be written to ``path`` and matplotlib is there to do it.

    Raises:
        UsageError: an unknown suffix.
        MissingExtra: without matplotlib.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path}: a figure is one of {', '.join(SUFFIXES)}, by its suffix")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtra("drawing figures", "plots") from None


def plot_bias_change(changes: Sequence[Mapping[str, Any]], path: Path, *, title: str = "") -> None:
    """Draw terms x layers as a heat map with an average column, and save it to ``path``.

    Ben Zaken et al. 2022, Figure 1: the change of a bias vector is the mean over its values of
    the absolute difference to the base; rows stand by total change, the largest on top. A term
    that stands once in the model has only the average.

    Args:
        changes: as :func:`change_table` takes them.
        path: a ``.png``, ``.svg`` or ``.pdf`` file.
        title: what stands above the figure; plain text.

    Raises:
        UsageError: nothing was changed, or an unknown suffix.
        MissingExtra: without matplotlib.
        BitfitError: ``path`` cannot be written.
    """
    check_plot_path(path)
    figure = draw_bias_change(changes, title=title)
    atomic_write(path, figure_bytes(figure, path.suffix[1:].lower()))


def draw_bias_change(changes: Sequence[Mapping[str, Any]], *, title: str = "") -> Any:
    """Return the figure that :func:`plot_bias_change` saves, a ``matplotlib.figure.Figure``.

    Raises:
        UsageError: nothing was changed.
    """
    rows = change_table(changes)
    if not rows:
        raise UsageError("no bias was trained, only the head: there is no change to draw")
    layers = sorted({layer for row in rows for layer in row["layers"] if layer is not None})
    grid = [
        [row["layers"].get(layer, math.nan) for layer in layers] + [row["mean"]] for row in rows
    ]
    top = max(value for line in grid for value in line if not math.isnan(value)) or 1.0
    unit = "mean |change| of a bias"
    if top < 0.1:
        grid, top = [[1000 * value for value in line] for line in grid], 1000 * top
        unit += ", in thousandths"
    figure = new_figure(2.6 + 0.55 * (len(layers) + 1), 1.7 + 0.42 * len(rows))
    axes = figure.add_subplot()
    image = axes.imshow(grid, cmap="Blues", vmin=0.0, vmax=top, aspect="auto")
    axes.axvline(len(layers) - 0.5, color="white", linewidth=4)
    axes.set_yticks(range(len(rows)), [_math(row["symbol"]) for row in rows])
    axes.set_xticks(range(len(layers) + 1), [*(str(layer) for layer in layers), "avg"])
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    axes.set_title(title, parse_math=False, fontsize=10)
    _write_values(axes, grid, top)
    figure.colorbar(image, ax=axes, label=unit, pad=0.02)
    return figure


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of so many inches that needs no window, whatever the machine has."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def figure_bytes(figure: Any, form: str) -> bytes:
    """Return a figure as a ``png``, ``svg`` or ``pdf`` file: the same bytes each time, no date."""
    import matplotlib

    dates: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "bitfit", "svg.fonttype": "none"}):
        figure.savefig(out, format=form, dpi=160, bbox_inches="tight", metadata=dates.get(form))
    return out.getvalue()


def _write_values(axes: Any, grid: Sequence[Sequence[float]], top: float) -> None:
    """Write each cell's value into it."""
    form = "{:.1f}" if top >= 10 else "{:.2f}"
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            if math.isnan(value):
                axes.text(x, y, "–", ha="center", va="center", fontsize=7, color="grey")
                continue
            color = "white" if value > 0.55 * top else "black"
            axes.text(x, y, form.format(value), ha="center", va="center", fontsize=7, color=color)


def _math(symbol: str) -> str:
    """``b_LN1`` -> ``b`` with the subscript LN1; other names as they are."""
    letter, line, below = symbol.partition("_")
    if symbol not in SYMBOLS.values() or not line:
        return symbol.replace("$", r"\$")
    return rf"${letter}_{{\mathrm{{{below}}}}}$"
