"""The figures of a report: heat maps, learning curves, convergence, stability, differences.

Colours are those of Okabe and Ito, which the colour-blind tell apart; markers and dashes differ,
too. Figures are drawn with the extra ``plots``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bitfit.experiments.report.biases import heat_maps, rounding_note
from bitfit.experiments.report.course import is_degenerate
from bitfit.experiments.report.curves import Crossing, Curve, crossings, learning_curves
from bitfit.experiments.report.differences import Comparison, Draws, to_reference
from bitfit.experiments.report.paper import task_title
from bitfit.experiments.report.results import Line, Results, to_float
from bitfit.experiments.report.table import Summary, rate_text
from bitfit.plots import draw_bias_change, new_figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A7A00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
WORD_STYLES = {
    "ahead": ("#0072B2", "o"),
    "behind": ("#D55E00", "s"),
    "within noise": ("#5A5A5A", "D"),
    "too few seeds": ("#CC79A7", "v"),
    "one seed only": ("#8A7A00", "^"),
    "not known": ("#999999", "x"),
}


@dataclass(frozen=True)
class Drawing:
    """A figure with what it shows."""

    key: str
    """File name and anchor."""
    title: str
    caption: str
    """What is to be seen, for those who read and those who cannot see it."""
    table: str
    """The key of the table with its numbers."""
    figure: Any
    """A ``matplotlib.figure.Figure``."""


def draw_figures(draws: Draws) -> list[Drawing]:
    """Return every figure that the records have something for; nothing is written.

    Raises:
        ImportError: without matplotlib.
    """
    results = draws.results
    makers: tuple[Callable[[], list[Drawing]], ...] = (
        lambda: _forests(draws),
        lambda: _curves(results),
        lambda: _convergence(results),
        lambda: _stability(results),
        lambda: _heat_maps(results),
    )
    return [drawing for make in makers for drawing in make()]


# ------------------------------------------------------------------ differences


def _forests(draws: Draws) -> list[Drawing]:
    """One figure per base: the difference of each row to the reference row, task by task."""
    results = draws.results
    found = [c for c in to_reference(draws, "paper") if math.isfinite(c.difference.value)]
    drawings = []
    for base in results.bases:
        group = [c for c in found if c.line.base == base]
        if group:
            title = f"Differences to {results.experiment.get('reference_row')}"
            title += f", {results.bases[base]}" if len(results.bases) > 1 else ""
            drawings.append(Drawing(
                _key("differences", base, results), title,
                "Points: mean score less that of the reference row. Bars: the interval that holds "
                "for all comparisons together at 95 %. A bar that crosses the line at zero is "
                "within noise, or of too few seeds. One that ends in an arrow goes on.",
                "differences", _forest(results, group, title),
            ))  # fmt: skip
    return drawings


def _forest(results: Results, found: Sequence[Comparison], title: str) -> Any:
    tasks = list(dict.fromkeys(c.task for c in found))
    reach = _reach(found)
    height = 1.3 + 0.27 * (len(found) + len(tasks))
    figure = new_figure(7.2, height)
    axes = figure.add_subplot()
    y, places, names = 0.0, [], []
    for task in tasks:
        axes.text(0.012, y, task_title(task), transform=axes.get_yaxis_transform(), va="center",
                  ha="left", fontsize=9, fontweight="bold", parse_math=False,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 1}, zorder=4)  # fmt: skip
        y += 1
        for comparison in (c for c in found if c.task == task):
            _bar(axes, comparison, y, reach)
            places.append(y)
            names.append(results.label(comparison.line))
            y += 1
    axes.axvline(0.0, color="black", linewidth=1, zorder=1)
    axes.set_yticks(places, names, fontsize=8, parse_math=False)
    axes.set_ylim(y - 0.3, -0.7)
    axes.grid(axis="x", color="#DDDDDD", zorder=0)
    axes.set_axisbelow(True)
    axes.set_xlim(-1.04 * reach, 1.04 * reach)
    axes.set_xlabel("difference in points")
    axes.set_title(title, fontsize=10, parse_math=False)
    _word_legend(axes, [c.difference.word for c in found])
    return figure


def _reach(found: Sequence[Comparison]) -> float:
    """Return how far the axis goes to each side of zero, in points.

    So far that every point and the bars of most are seen: a few bars, of seeds that differ much,
    would press all others together.
    """
    values = [100 * abs(c.difference.value) for c in found]
    ends = sorted(
        100 * max(abs(c.difference.low), abs(c.difference.high))
        for c in found
        if math.isfinite(c.difference.low)
    )
    bars = ends[(3 * (len(ends) - 1)) // 4] if ends else 0.0
    return max(1.0, 1.05 * max(values), min(bars, 100.0))


def _bar(axes: Any, comparison: Comparison, y: float, reach: float) -> None:
    found = comparison.difference
    color, marker = WORD_STYLES[found.word]
    if math.isfinite(found.low):
        low, high = max(-reach, 100 * found.low), min(reach, 100 * found.high)
        axes.plot([low, high], [y, y], color=color, linewidth=1.6)
        for end, whole, arrow in ((low, 100 * found.low, "<"), (high, 100 * found.high, ">")):
            if end != whole:
                axes.plot([end], [y], marker=arrow, color=color, markersize=5, linestyle="")
    axes.plot([100 * found.value], [y], marker=marker, color=color, markersize=5, linestyle="")


def _word_legend(axes: Any, words: Sequence[str]) -> None:
    for word, (color, marker) in WORD_STYLES.items():
        if word in words:
            axes.plot([], [], marker=marker, color=color, linewidth=1.6, label=word)
    _legend(axes)


# ------------------------------------------------------------------ learning curves


def _curves(results: Results) -> list[Drawing]:
    """One figure per base and task, a panel per metric."""
    curves = learning_curves(results)
    crossed = crossings(results, curves)
    drawings = []
    for base, task in dict.fromkeys((c.base, c.task) for c in curves):
        group = [c for c in curves if (c.base, c.task) == (base, task)]
        title = f"{task_title(task)}: dev score by training rows"
        drawings.append(Drawing(
            _key(f"curve-{task}", base, results), title,
            "Mean over the seeds; bands: one standard deviation. Dotted lines: where two mean "
            "curves cross.",
            "curves", _curve_figure(group, crossed, title),
        ))  # fmt: skip
    return drawings


def _curve_figure(curves: Sequence[Curve], crossed: Sequence[Crossing], title: str) -> Any:
    metrics = list(dict.fromkeys(c.metric for c in curves))
    rows = list(dict.fromkeys(c.row for c in curves))
    figure = new_figure(0.8 + 4.0 * len(metrics), 3.6)
    for place, metric in enumerate(metrics):
        axes = figure.add_subplot(1, len(metrics), place + 1)
        for curve in (c for c in curves if c.metric == metric):
            _draw_curve(axes, curve, rows.index(curve.row))
        for cross in crossed:
            if cross.curve in curves and cross.curve.metric == metric:
                _mark_crossings(axes, cross)
        axes.set_xscale("log")
        sizes = sorted({p.rows for c in curves for p in c.points})
        axes.set_xticks(sizes, [f"{n:,}" for n in sizes], fontsize=7, rotation=45, ha="right")
        axes.minorticks_off()
        axes.set_xlabel("training rows")
        axes.set_ylabel(f"{metric} x 100", parse_math=False)
        axes.grid(color="#E4E4E4")
    _legend(axes)
    figure.suptitle(title, fontsize=10, parse_math=False)
    figure.tight_layout()
    return figure


def _draw_curve(axes: Any, curve: Curve, place: int) -> None:
    color, marker, dash = _style(place)
    x = [p.rows for p in curve.points]
    y = [100 * p.scores.mean for p in curve.points]
    spread = [100 * (p.scores.spread if math.isfinite(p.scores.spread) else 0.0)
              for p in curve.points]  # fmt: skip
    axes.fill_between(
        x, [a - b for a, b in zip(y, spread, strict=True)],
        [a + b for a, b in zip(y, spread, strict=True)], color=color, alpha=0.18, linewidth=0,
    )  # fmt: skip
    axes.plot(x, y, color=color, marker=marker, linestyle=dash, markersize=4, label=curve.row)


def _mark_crossings(axes: Any, cross: Crossing) -> None:
    for at in cross.rows:
        axes.axvline(at, color="#444444", linestyle=":", linewidth=1.2)
        axes.text(at, 0.02, f" {at:,.0f}", transform=axes.get_xaxis_transform(), fontsize=7,
                  color="#444444", va="bottom")  # fmt: skip


# ------------------------------------------------------------------ convergence


def _convergence(results: Results) -> list[Drawing]:
    """One figure per task: a panel per line, a curve per rate."""
    drawings = []
    for task in results.tasks:
        lines = [
            x for x in results.lines if any(len(r["history"]) > 1 for r in results.runs(x, task))
        ]
        if not lines:
            continue
        title = f"{task_title(task)}: dev {results.metric(task)} by epoch"
        drawings.append(Drawing(
            f"convergence-{task}", title,
            "Mean over the seeds, one curve for each learning rate, as far as all its seeds went; "
            "the ring marks its best epoch.",
            "convergence", _convergence_figure(results, task, lines, title),
        ))  # fmt: skip
    return drawings


def _convergence_figure(results: Results, task: str, lines: Sequence[Line], title: str) -> Any:
    metric = results.metric(task)
    figure, panels = _panels(len(lines))
    for axes, line in zip(panels, lines, strict=True):
        for place, (rate, runs) in enumerate(results.by_rate(line, task).items()):
            means = _epoch_means(runs, metric)
            color, marker, dash = _style(place)
            axes.plot(range(1, len(means) + 1), means, color=color, linestyle=dash, marker=marker,
                      markersize=3, linewidth=1.3, label=rate_text(rate))  # fmt: skip
            known = [(value, i + 1) for i, value in enumerate(means) if math.isfinite(value)]
            if known:
                best, epoch = max(known)
                axes.plot([epoch], [best], marker="o", markersize=9, markerfacecolor="none",
                          markeredgecolor=color, linestyle="")  # fmt: skip
        axes.set_title(results.label(line), fontsize=9, parse_math=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("epoch", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(color="#E4E4E4")
        axes.legend(fontsize=6, title="rate", title_fontsize=6, framealpha=0.8)
    panels[0].set_ylabel("x 100", fontsize=8)
    figure.suptitle(title, fontsize=10, parse_math=False)
    figure.tight_layout()
    return figure


def _epoch_means(runs: Sequence[dict[str, Any]], metric: str) -> list[float]:
    """Return the mean of each epoch that all runs reached: of fewer it would be another mean."""
    shortest = min(len(run["history"]) for run in runs)
    return [
        100 * Summary(tuple(to_float(run["history"][i]["dev"].get(metric)) for run in runs)).mean
        for i in range(shortest)
    ]


# ------------------------------------------------------------------ stability


def _stability(results: Results) -> list[Drawing]:
    """One figure per task: each run is a dot, by rate, a panel per line."""
    drawings = []
    for task in results.tasks:
        lines = [line for line in results.lines if results.runs(line, task)]
        if len(results.done) < 2 or not lines:
            continue
        title = f"{task_title(task)}: dev {results.metric(task)} of every run by rate"
        drawings.append(Drawing(
            f"stability-{task}", title,
            "Each mark is a run at its best epoch. Dashed: always saying the most frequent answer. "
            "Crosses: degenerate runs, at or below it.",
            "stability", _stability_figure(results, task, lines, title),
        ))  # fmt: skip
    return drawings


def _stability_figure(results: Results, task: str, lines: Sequence[Line], title: str) -> Any:
    metric = results.metric(task)
    figure, panels = _panels(len(lines))
    for axes, line in zip(panels, lines, strict=True):
        rates = results.by_rate(line, task)
        for place, runs in enumerate(rates.values()):
            _strip(axes, place, runs, metric)
        usual = {to_float((r.get("majority") or {}).get(metric)) for r in results.runs(line, task)}
        for value in sorted(v for v in usual if math.isfinite(v)):
            axes.axhline(100 * value, color="#444444", linestyle="--", linewidth=1)
        axes.set_xticks(range(len(rates)), [rate_text(rate) for rate in rates], fontsize=7)
        axes.set_xlim(-0.6, len(rates) - 0.4)
        axes.set_title(results.label(line), fontsize=9, parse_math=False)
        axes.set_xlabel("learning rate", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(axis="y", color="#E4E4E4")
    panels[0].set_ylabel("x 100", fontsize=8)
    figure.suptitle(title, fontsize=10, parse_math=False)
    figure.tight_layout()
    return figure


def _strip(axes: Any, place: int, runs: Sequence[dict[str, Any]], metric: str) -> None:
    count = len(runs)
    for i, run in enumerate(runs):
        score = to_float(run["scores"].get(metric))
        bad = is_degenerate(run)
        x = place + 0.3 * ((i + 0.5) / count - 0.5)  # side by side, the same each time
        color, marker = (COLORS[1], "x") if bad else (COLORS[0], "o")
        # An undefined score has no height; it is marked at the foot of the panel.
        transform = axes.transData if math.isfinite(score) else axes.get_xaxis_transform()
        y = 100 * score if math.isfinite(score) else 0.03
        axes.plot([x], [y], marker=marker, color=color, alpha=0.8, markersize=5, linestyle="",
                  transform=transform)  # fmt: skip


# ------------------------------------------------------------------ heat maps


def _heat_maps(results: Results) -> list[Drawing]:
    drawings = []
    note = rounding_note(results)
    for line, task, changes in heat_maps(results):
        title = f"{task_title(task)}, {results.label(line)}: change of each bias"
        top = 1000 * max(entry["mean_abs"] for entry in changes)
        drawings.append(Drawing(
            _key(f"change-{task}", line.base, results), title,
            "Terms in rows, layers in columns, the largest total change on top: the mean absolute "
            f"change of the values of a bias, mean over the seeds; at most {top:.1f} thousandths."
            f"{note and ' '}{note}",
            "change", draw_bias_change(changes, title=title),
        ))  # fmt: skip
    return drawings


# ------------------------------------------------------------------ shapes


def _panels(count: int) -> tuple[Any, list[Any]]:
    """Return a figure with ``count`` panels, four to a line, all with one y axis."""
    across = min(4, count)
    down = math.ceil(count / across)
    figure = new_figure(1.0 + 2.3 * across, 0.7 + 2.3 * down)
    panels: list[Any] = []
    for place in range(count):
        share = panels[0] if panels else None
        panels.append(figure.add_subplot(down, across, place + 1, sharey=share))
    return figure, panels


def _style(place: int) -> tuple[str, str, str]:
    return (
        COLORS[place % len(COLORS)],
        MARKERS[place % len(MARKERS)],
        DASHES[place // len(COLORS) % len(DASHES)] if place >= len(COLORS) else DASHES[place % 4],
    )


def _legend(axes: Any) -> None:
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)


def _key(start: str, base: str, results: Results) -> str:
    return start if len(results.bases) == 1 else f"{start}-{base}"
