"""What `bitfit train` prints of a run: what it would do, and what it gave."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from bitfit.calibration import CALIBRATED_KINDS
from bitfit.cli import console
from bitfit.doctor import count_parameters
from bitfit.training.outputs import MIN_CALIBRATION_ROWS, Outcome
from bitfit.training.settings import ROW_METHODS


def show_plan(plan: Mapping[str, Any]) -> None:
    """Print what a run would do."""
    config, trainable = plan["config"], plan["trainable"]
    rates = "four rates, chosen on dev" if plan["runs"] > 1 else f"rate {config['learning_rate']:g}"
    dev = " (dev held out of train)" if plan["held_out"] else ""
    facts = {
        "task": f"{plan['task']}, {plan['kind']}, scored by {plan['metric']}",
        "labels": f"{len(plan['labels'])}: {short_list(plan['labels'])}"
        if plan["labels"]
        else None,
        "columns": ", ".join(f"{k} = {v}" for k, v in plan["columns"].items()) or None,
        "rows": ", ".join(f"{k} {v:,}" for k, v in plan["rows"].items()) + dev,
        "bad rows": f"{len(plan['skipped_rows'])} left out" if plan["skipped_rows"] else None,
        "cut texts": f"{plan['truncated_share']:.1%} of train at {config['max_length']} tokens",
        "base": f"{plan['base']}, {plan['dtype']} on {plan['device']}, "
        f"{'packed' if plan['packed'] else 'padded'}, " + console.count(plan["threads"], "thread"),
        "trains": f"{config['method']} ({config['terms']}): {trainable['encoder']:,} values of the "
        f"encoder, {trainable['head']:,} in the head",
        "steps": f"{plan['steps']:,} of {console.count(config['batch_size'], 'row')} in "
        f"{console.count(config['epochs'], 'epoch')}, {rates}, {config['schedule']} schedule, "
        f"seed {config['seed']}",
        "file": plan["file"],
    }
    console.print_facts("dry run: nothing is trained", facts)
    for row in plan["skipped_rows"][:20]:
        console.say(f"  left out: {row}")


def short_list(names: Any, most: int = 12) -> str:
    """Return names between commas, the first of them where there are many."""
    shown = ", ".join(names[:most])
    return f"{shown}, ... ({len(names) - most} more)" if len(names) > most else shown


def show_outcome(outcome: Outcome) -> None:
    """Print what a run gave, and how to use it."""
    report = outcome.to_json()
    metric, trainable = report["metric"], report["trainable"]
    console.say(f"{report['task']}: {_score_line(report)}", style="bold")
    others = {k: v for k, v in report["scores"].items() if k != metric}
    total = count_parameters(outcome.trainer.encoder, outcome.lane.head.pooling)
    facts = {
        "also": ", ".join(f"{k} {console.number(v)}" for k, v in others.items()) or None,
        "epoch": _epoch_line(report),
        "rate": _rate_line(outcome),
        "calibration": calibration_line(
            outcome.file.task.kind,
            outcome.file.temperature,
            outcome.file.calibration,
            report["rows"].get("dev", 0),
        ),
        "bad rows": f"{report['skipped_rows']:,} left out" if report["skipped_rows"] else None,
        "cut texts": f"{report['truncated_share']:.1%}" if report["truncated_share"] else None,
        "trained": f"{trainable['encoder']:,} values of the encoder "
        f"({trainable['encoder'] / total:.3%} of {total:,}), {trainable['head']:,} in the head",
        "time": _time_line(report),
        "file": f"{report['file']}, {console.size(report['file_bytes'] or 0)}",
        "use it": _how_to_use(outcome),
    }
    console.print_facts("", facts)


def calibration_line(
    kind: str, temperature: float | None, found: Mapping[str, float] | None, dev_rows: int | None
) -> str | None:
    """Return what to say of a task's calibration; None for numbers and spans, which have none."""
    if kind not in CALIBRATED_KINDS:
        return None
    if temperature is None:
        if dev_rows is None:
            return "not calibrated"
        if dev_rows >= MIN_CALIBRATION_ROWS:
            return "not calibrated (the dev rows give no temperature: too many right, or too few)"
        few = f"only {console.count(dev_rows, 'dev row')}" if dev_rows else "no dev rows"
        return f"not calibrated ({few})"
    before, after = (console.number((found or {}).get(key)) for key in ("ece_before", "ece_after"))
    return f"temperature {temperature:.3f}, calibration error {before} before, {after} after"


def _rate_line(outcome: Outcome) -> str:
    tried = len(outcome.file.recipe.get("rates_tried") or ())
    best = f" (best on dev of {tried} tried)" if tried else ""
    return f"{outcome.lane.config.learning_rate:g}{best}"


def _score_line(report: Mapping[str, Any]) -> str:
    metric = report["metric"]
    if not report["scores"]:
        return "no dev rows, so no score; --dev or --dev-fraction gives one"
    majority = report["majority"].get(metric)
    beside = "" if majority is None else f" (always the majority: {console.number(majority)})"
    where = "held-out rows" if report["held_out"] else "dev"
    return f"{metric} {console.number(report['score'])} on {where}{beside}"


def _epoch_line(report: Mapping[str, Any]) -> str:
    history, metric = report["history"], report["metric"]
    last = history[-1]["dev"].get(metric) if history and history[-1]["dev"] else None
    line = f"{report['kept_epoch']} of {report['epochs']} is kept"
    if last is None:
        return line
    best = f"best {console.number(report['best_score'])} in epoch {report['best_epoch']}"
    return f"{line} ({best}, last {console.number(last)})"


def _time_line(report: Mapping[str, Any]) -> str:
    before = report["train_seconds_before"]
    here = console.duration(report["train_seconds"] - before)
    earlier = f", and {console.duration(before)} before it was resumed" if before else ""
    return (
        f"{console.duration(report['seconds'])}, training {here}{earlier}: "
        f"{report['examples_per_second']:,.0f} rows/s, {report['tokens_per_second']:,.0f} tokens/s"
    )


def _how_to_use(outcome: Outcome) -> str | None:
    path = shlex.quote(str(outcome.path))
    if outcome.lane.config.method not in ROW_METHODS:
        return f"bitfit train --base {path} ..." if outcome.path and outcome.path.is_dir() else None
    task = outcome.file.task
    if task.kind == "span":
        return f"bitfit predict {path} $'the question\\tthe context'"
    text = "$'one text\\tthe other'" if task.is_pair else '"a text"'
    return f"bitfit predict {path} {text}"
