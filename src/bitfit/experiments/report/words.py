"""What stands above the tables, in sentences: what was run, what is noise, which order holds."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

from scipy.stats import kendalltau

from bitfit.experiments.report.differences import WAYS, Comparison, Draws, to_reference
from bitfit.experiments.report.paper import paper_source, paper_tasks, printed_score, task_title
from bitfit.experiments.report.results import Line, Results
from bitfit.experiments.report.table import points


@dataclass(frozen=True)
class Section:
    """A heading with its sentences, each a line."""

    key: str
    title: str
    sentences: tuple[str, ...]


def sections(draws: Draws) -> list[Section]:
    """Return the sections above the tables; those with nothing to say are left out."""
    results = draws.results
    comparisons = to_reference(draws, "paper")
    made = (
        Section("setup", "What was run", tuple(_setup(results))),
        Section("protocols", "Protocols", tuple(_protocols(results))),
        Section("noise", "Which differences are within noise", tuple(_noise(draws, comparisons))),
        Section("order", "The order of the rows", tuple(_orders(results, comparisons))),
    )
    return [section for section in made if section.sentences]


def _protocols(results: Results) -> Iterator[str]:
    yield from (f"{way}: {WAYS[way]}." for way in WAYS)
    if any(record["config"].get("patience") for record in results.done):
        yield (
            "Runs that stop early did so by all of dev: which epochs split chooses from, its "
            "reporting half had a part in."
        )


def counts_text(results: Results) -> str:
    """Return how many runs are done, failed and missing."""
    found = f"{_runs(len(results.done))} done, {len(results.failed)} failed"
    missing = results.missing()
    made = {record["task"]["name"] for record in results.records}
    if none := [name for name in results.experiment.get("tasks", ()) if name not in made]:
        names = ", ".join(task_title(name) for name in none)
        found += f", {missing} missing (row, task and seed without any run)"
        return f"{found}, among them all of {names}."
    return f"{found}, {missing} missing (row, task and seed without any run)."


def unfinished_searches(results: Results) -> list[str]:
    """Return the cells whose search over the rates is not finished, with how far it is."""
    found = [
        (results.label(line), task_title(task), *results.search_of(line, task))
        for line in results.lines for task in results.tasks
    ]  # fmt: skip
    return [
        f"{line} on {task} ({tried} of {wanted} rates)"
        for line, task, tried, wanted in found if 0 < tried < wanted
    ]  # fmt: skip


def environments(results: Results) -> list[str]:
    """Return the distinct environments of the runs, each as one line, counted if several."""
    found = (r["environment"] for r in results.done if r.get("environment"))
    lines = (", ".join(f"{key} {_value(value)}" for key, value in e.items()) for e in found)
    counts = Counter(lines)
    if len(counts) < 2:
        return list(counts)
    return [f"{line} ({_runs(count)})" for line, count in counts.items()]


def trained_on(results: Results) -> list[str]:
    """Return a sentence per base on what it was trained on, as far as that is known."""
    notes = {r["base"]: r["trained_on"] for r in results.records if r.get("trained_on")}
    return [
        f"Base {name}: {notes[base]}." if base in notes else f"Base {name}."
        for base, name in results.bases.items()
    ]


def _setup(results: Results) -> list[str]:
    experiment = results.experiment
    lines = [*trained_on(results), counts_text(results)]
    if unfinished := unfinished_searches(results):
        shown = "; ".join(unfinished)
        lines.append(f"Not every rate has been tried, so another may be better: {shown}.")
    if experiment.get("recipe"):
        lines.append(f"Recipe: {experiment['recipe']}.")
    if experiment.get("search"):
        lines.append(f"Search over the rates: {experiment['search']}.")
    if conditions := experiment.get("conditions"):
        lines.append(f"Conditions: {_value({**conditions, 'earlier': None})}.")
        lines += [
            f"Before it was moved: {_value(earlier)}." for earlier in conditions.get("earlier", ())
        ]
    lines += [f"Environment: {line}." for line in environments(results)]
    lines += [
        f"{task_title(task)}: {size:,} of its training rows."
        for task, size in results.limits().items()
    ]
    if results.paper:
        lines.append(f"Printed numbers: {paper_source()}.")
    return lines


def _runs(count: int) -> str:
    return f"{count} run" if count == 1 else f"{count} runs"


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        known = {key: found for key, found in value.items() if found not in ({}, [], None)}
        return ", ".join(f"{key} {_value(known[key])}" for key in sorted(known))
    return value if isinstance(value, str) else json.dumps(value)


# ------------------------------------------------------------------ noise


def _noise(draws: Draws, comparisons: Sequence[Comparison]) -> list[str]:
    results = draws.results
    lines = []
    for base in results.bases:
        for task in results.tasks:
            found = [c for c in comparisons if (c.line.base, c.task) == (base, task)]
            if found:
                lines.append(_noise_of(results, task, found))
    if lines:
        together = (
            f"all {len(comparisons)} comparisons together"
            if len(comparisons) > 1
            else "the one comparison"
        )
        lines.append(
            f"'ahead' and 'behind' hold for {together} at 95 %. "
            "Epoch and rate were chosen on the dev rows that also report (protocol paper)."
        )
    return lines


def _noise_of(results: Results, task: str, found: Sequence[Comparison]) -> str:
    groups: dict[str, list[str]] = {}
    for c in found:
        d = c.difference
        shown = points(d.value, signed=True)
        if math.isfinite(d.low):
            shown += f", {points(d.low, signed=True)} to {points(d.high, signed=True)}"
        groups.setdefault(d.word, []).append(f"{results.label(c.line)} ({shown})")
    words = ("ahead", "behind", "within noise", "too few seeds", "one seed only", "not known")
    parts = [f"{word}: {', '.join(groups[word])}" for word in words if word in groups]
    base = f", {results.bases[found[0].line.base]}" if len(results.bases) > 1 else ""
    reference = results.experiment.get("reference_row")
    return f"{task_title(task)}{base}, against {reference}: {'; '.join(parts)}."


# ------------------------------------------------------------------ order


def _orders(results: Results, comparisons: Sequence[Comparison]) -> list[str]:
    words = {(c.line, c.other, c.task): c.difference.word for c in comparisons}
    sizes = dict.fromkeys((line.base, line.train_rows) for line in results.lines)
    return [
        sentence
        for base, train_rows in sizes
        for column in results.columns
        if column.split == "dev"
        and (sentence := _order(results, words, base, train_rows, column.key))
    ]


def _order(
    results: Results,
    words: Mapping[tuple[Line, Line, str], str],
    base: str,
    train_rows: int | None,
    task: str,
) -> str:
    """Return the rows by mean score and, where the paper has two of them, its order beside."""
    lines = [x for x in results.lines if (x.base, x.train_rows) == (base, train_rows)]
    column = next(c for c in results.columns if c.key == task)
    means = {line: results.summary("paper", line, column).mean for line in lines}
    known = sorted((x for x in lines if math.isfinite(means[x])), key=lambda x: -means[x])
    if len(known) < 2:
        return ""
    shown = " > ".join(f"{x.row} {points(means[x])}" for x in known)
    where = [task_title(task)]
    where += [results.bases[base]] if len(results.bases) > 1 else []
    if results.has_sizes:
        where.append("all rows" if train_rows is None else f"{train_rows:,} rows")
    sentence = f"{', '.join(where)}: {shown}."
    return sentence + _beside_the_paper(results, words, means, known, task)


def _beside_the_paper(
    results: Results,
    words: Mapping[tuple[Line, Line, str], str],
    means: Mapping[Line, float],
    known: Sequence[Line],
    task: str,
) -> str:
    printed = {x: printed_score(results.paper, x.row, task, x.base) for x in known}
    theirs = {x: found for x, found in printed.items() if found is not None}
    if len(theirs) < 2:
        return ""
    best_first = sorted(theirs, key=lambda x: -theirs[x])
    order = f"{best_first[0].row} {theirs[best_first[0]]:.1f}"
    for before, line in pairwise(best_first):
        sign = "=" if theirs[before] == theirs[line] else ">"
        order += f" {sign} {line.row} {theirs[line]:.1f}"
    swapped = [
        (a, b) for a, b in combinations(theirs, 2)
        if (means[a] - means[b]) * (theirs[a] - theirs[b]) < 0
    ]  # fmt: skip
    tau = kendalltau([means[x] for x in theirs], list(theirs.values())).statistic
    sentence = f" The paper's order: {order}."
    if len(set(theirs.values())) == 1:
        return sentence  # no order to confirm
    tied = [
        (a, b) for a, b in combinations(theirs, 2)
        if means[a] == means[b] and theirs[a] != theirs[b]
    ]  # fmt: skip
    if tied and not swapped:
        many = "pair of its rows is" if len(tied) == 1 else "pairs of its rows are"
        return f"{sentence} Nothing is the other way round, but {len(tied)} {many} equal here."
    if not swapped:
        return f"{sentence} The same order."
    pairs = "; ".join(_pair(results, words, a, b, task) for a, b in swapped)
    agreement = f" (Kendall's tau {tau:.2f} over {len(theirs)} rows)" if math.isfinite(tau) else ""
    return f"{sentence} The other way round here{agreement}: {pairs}."


def _pair(
    results: Results,
    words: Mapping[tuple[Line, Line, str], str],
    above: Line,
    below: Line,
    task: str,
) -> str:
    word = words.get((above, below, task)) or words.get((below, above, task))
    shown = f"{above.row} above {below.row}"
    if word is None:
        return shown
    return f"{shown} ({'outside noise' if word in ('ahead', 'behind') else word})"


def paper_order(keys: Sequence[str]) -> list[str]:
    """Return task keys in the order of the paper's columns, others after them as they come."""
    order = {task: place for place, task in enumerate(paper_tasks())}
    return sorted(keys, key=lambda key: order.get(key, len(order)))
