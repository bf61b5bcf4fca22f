"""Behind ``bitfit inspect``, ``diff`` and ``doctor``: reports as plain data, and as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from bitfit.cli import console
from bitfit.cli.scoring import open_model, trained_dtype
from bitfit.cli.showing_run import calibration_line, short_list
from bitfit.comparison import bias_change, compare, storage_loss
from bitfit.doctor import examine as examine_all
from bitfit.errors import UsageError
from bitfit.plots import change_table, check_plot_path, plot_bias_change
from bitfit.taskfile import TaskFile
from bitfit.terms import SYMBOLS

TOLERANCES = {"fp32": 1e-3, "bf16": 5e-2}

# ------------------------------------------------------------------ inspect


def inspect(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that a task file holds; draw and check what was asked for."""
    path: Path = given["file"]
    if given["plot"] is not None:
        check_plot_path(given["plot"])
    file = TaskFile.load(path)
    changes = bias_change(file)
    if given["plot"] is not None:
        title = f"{file.task.name} on {file.base.name}"
        plot_bias_change(changes, given["plot"], title=title)
    task = file.task
    return {
        "file": str(path), "file_bytes": path.stat().st_size,
        "task": {
            "name": task.name, "kind": task.kind, "labels": list(task.labels),
            "metrics": list(task.metrics), "is_pair": task.is_pair,
        },
        "scores": file.scores,
        "base": {
            "name": file.base.name, "revision": file.base.revision, "sha256": file.base.sha256,
            "config_hash": file.base.config_hash, "tensors": len(file.base.tensor_digests),
        },
        "tokenizer": file.tokenizer, "method": file.method, "terms": file.terms,
        "layout": file.layout, "biases": file.n, "head": file.head_size,
        "head_style": file.head_style,
        "head_tensors": {name: list(tensor.shape) for name, tensor in file.head.items()},
        "pooling": file.pooling, "max_length": file.max_length, "recipe": dict(file.recipe),
        "temperature": file.temperature, "calibration": file.calibration,
        "truncated_share": file.truncated_share, "data_hash": file.data_hash,
        "licence": file.licence, "description": file.description, "probes": len(file.probes),
        "package_version": file.package_version, "stored_as": file.dtype,
        "storage": storage_loss(file.bias, file.layout),
        "bias_change": change_table(changes),
        "plot": None if given["plot"] is None else str(given["plot"]),
        "check": check_probes(file, given) if given["check"] else None,
    }  # fmt: skip


def check_probes(file: TaskFile, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return how far the probes' logits on this machine are from those in the file.

    Differences are absolute up to logits of 1, and relative to the largest logit above that.

    Raises:
        UsageError: the file has no probes.
    """
    if not file.probes:
        raise UsageError(f"{given['file']}: holds no probes, so there is nothing to check against")
    dtype = trained_dtype(file, given["dtype"], given["device"])
    model = open_model(
        [file], given["base"], dtype=dtype, device=given["device"], threads=given["threads"],
        trust_remote_code=given["trust_remote_code"],
    )  # fmt: skip
    is_rounded = model.encoder.computes_in != "float32" or file.dtype != "fp32"
    is_rounded = is_rounded or file.recipe.get("dtype") not in (None, "float32")
    tolerance = TOLERANCES["bf16" if is_rounded else "fp32"]
    probes = [
        {
            "text": " | ".join(t for t in (probe["text"], probe["text_pair"]) if t),
            "difference": difference,
            "passed": difference <= tolerance,
        }
        for probe, difference in zip(file.probes, model.check_probes(), strict=True)
    ]
    return {
        "passed": all(p["passed"] for p in probes), "tolerance": tolerance,
        "dtype": model.encoder.computes_in, "probes": probes,
    }  # fmt: skip


def show_file(report: Mapping[str, Any]) -> None:
    """Print a task file's report as tables."""
    task, base, recipe = report["task"], report["base"], report["recipe"]
    kind = f"{task['kind']}{' of pairs' if task['is_pair'] else ''}"
    labels = f"{len(task['labels'])}: {short_list(task['labels'])}" if task["labels"] else None
    cut = report["truncated_share"]
    console.print_facts(f"{task['name']}  ({report['file']})", {
        "kind": kind,
        "labels": labels,
        "dev scores": _scores(report) or "none: there were no dev rows",
        "description": report["description"],
        "licence": report["licence"],
        "base": f"{base['name']} ({base['sha256'][:12]}…, {base['tensors']} tensors)",
        "revision": base["revision"],
        "tokenizer": f"{report['tokenizer'][:12]}…",
        "reads": f"{report['pooling']} pooling, {report['head_style']} head, up to "
        f"{report['max_length']} tokens",
        "cut texts": None if cut is None else f"{cut:.1%} of the training texts",
        "trained data": None if report["data_hash"] is None else f"{report['data_hash'][:12]}…",
        "calibration": calibration_line(
            task["kind"], report["temperature"], report["calibration"],
            rows if isinstance(rows := recipe.get("dev_rows"), int) else None,
        ),
        "made by": f"bitfit {report['package_version']}",
    })  # fmt: skip
    shown = {
        key: value for key, value in recipe.items() if key != "rates_tried" and value is not None
    }
    console.print_facts("\nrecipe", {
        "method": f"{report['method']}, terms {report['terms']}",
        "settings": ", ".join(f"{k} {_plain(v)}" for k, v in shown.items()) or None,
        "rates tried": _rates_tried(recipe.get("rates_tried")),
    })  # fmt: skip
    _show_biases(report)
    _show_check(report["check"])
    if report["plot"] is not None:
        console.say(f"\ndrawn: {report['plot']}")


def _scores(report: Mapping[str, Any]) -> str:
    """The scores, the headline first."""
    first = report["task"]["metrics"][0]
    ordered = sorted(report["scores"].items(), key=lambda item: item[0] != first)
    return ", ".join(f"{name} {console.number(value)}" for name, value in ordered)


def _rates_tried(found: Any) -> str | None:
    """Return the rates with their scores; of a file of someone's own loop whatever stands there."""
    lines = []
    for run in found if isinstance(found, list) else ():
        match run:
            case {"learning_rate": float(rate), "score": None | float() as score}:
                lines.append(f"{rate:g}: {console.number(score)}")
            case _:
                lines.append(str(run))
    return ", ".join(lines) or None


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _show_biases(report: Mapping[str, Any]) -> None:
    lengths: dict[str, int] = {}
    for term, _, length in report["layout"]:
        lengths[term] = length
    rows = [
        (row["term"], row["symbol"], len(row["layers"]), f"{row['mean']:.5f}",
         f"{max(row['layers'].values()):.5f}", f"{len(row['layers']) * lengths[row['term']]:,}")
        for row in report["bias_change"]
    ]  # fmt: skip
    title = f"\nbiases: {report['biases']:,} values, and {report['head']:,} in the head"
    if rows:
        columns = ("term", "paper", ">vectors", ">mean |change|", ">largest", ">values")
        console.print_table(columns, rows, title=title)
    else:
        console.say(f"{title} (only the head was trained)")
    losses = [
        (f"{name}{' (this file)' if name == report['stored_as'] else ''}",
         console.size(loss["bytes"]), f"{loss['max_error']:.2g}", f"{loss['mean_error']:.2g}")
        for name, loss in report["storage"].items()
    ]  # fmt: skip
    title = (
        f"\nsize: {console.size(report['file_bytes'])} in all; what storing biases otherwise loses"
    )
    console.print_table(
        ("stored as", ">biases", ">largest error", ">mean error"), losses, title=title
    )


def _show_check(check: Mapping[str, Any] | None) -> None:
    if check is None:
        return
    rows = [
        (p["text"][:60], f"{p['difference']:.2g}", _verdict(p["passed"])) for p in check["probes"]
    ]
    title = f"\ncheck in {check['dtype']}, tolerance {check['tolerance']:g}"
    console.print_table(("probe", ">difference", ""), rows, title=title)
    if not check["passed"]:
        console.error("the base here does not answer as it did where the file was made")


def _verdict(passed: bool) -> Text:
    return Text("ok", "green") if passed else Text("differs", "bold red")


# ------------------------------------------------------------------ diff


def diff(a: Path, b: Path) -> dict[str, Any]:
    """Return how two task files of one base differ: by bias vector, by term, and in all."""
    first, second = TaskFile.load(a), TaskFile.load(b)
    rows = compare(first, second)
    sites = [row for row in rows if row["term"] != "total" and not row["term"].startswith("head.")]
    return {
        "a": {"file": str(a), "task": first.task.name},
        "b": {"file": str(b), "task": second.task.name},
        "base": first.base.name,
        "total": next(row for row in rows if row["term"] == "total"),
        "terms": [
            _term_row([row for row in sites if row["term"] == term])
            for term in dict.fromkeys(row["term"] for row in sites)
        ],
        "sites": sites,
        "head": [row for row in rows if row["term"].startswith("head.")],
    }


def _term_row(sites: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the comparison of a term over all its layers, as of one long vector."""
    norm_a, norm_b = (math.hypot(*(s[key] for s in sites)) for key in ("norm_a", "norm_b"))
    product = sum((s["cosine"] or 0.0) * s["norm_a"] * s["norm_b"] for s in sites)
    return {
        "term": sites[0]["term"],
        "symbol": SYMBOLS.get(sites[0]["term"], sites[0]["term"]),
        "layers": len(sites),
        "cosine": product / (norm_a * norm_b) if norm_a and norm_b else None,
        "norm_a": norm_a,
        "norm_b": norm_b,
        "mean_abs_a": sum(s["mean_abs_a"] for s in sites) / len(sites),
        "mean_abs_b": sum(s["mean_abs_b"] for s in sites) / len(sites),
    }


def show_diff(report: Mapping[str, Any], *, layers: bool) -> None:
    """Print a comparison by term, or by layer."""
    chosen = report["sites"] if layers else report["terms"]
    rows = [*chosen, report["total"], *report["head"]]
    columns = ("term", *([">layer"] if layers else []), ">cosine", ">size A", ">size B",
               ">mean |A|", ">mean |B|")  # fmt: skip
    cells = [
        (row["term"], *([_dash(row.get("layer"))] if layers else []),
         console.number(row["cosine"], 3), f"{row['norm_a']:.4f}", f"{row['norm_b']:.4f}",
         f"{row['mean_abs_a']:.5f}", f"{row['mean_abs_b']:.5f}")
        for row in rows
    ]  # fmt: skip
    title = f"A = {report['a']['task']}, B = {report['b']['task']}, on {report['base']}"
    console.print_table(columns, cells, title=title)


def _dash(value: Any) -> str:
    return "–" if value is None else str(value)


# ------------------------------------------------------------------ doctor


def examine(
    base: str, device: str, threads: int | None, revision: str | None, trust: bool
) -> dict[str, Any]:
    """Return the doctor's report."""
    if threads is not None:
        torch.set_num_threads(threads)
    return examine_all(base, device=device, revision=revision, trust_remote_code=trust)


def show_doctor(report: Mapping[str, Any]) -> None:
    """Print the doctor's report."""
    base, machine = report["base"], report["machine"]
    console.print_facts(f"base {base['name']}", {
        "family": f"{base['family']}, {base['layers']} layers of {base['hidden_size']}, "
        f"{base['encoder_parameters']:,} parameters",
        "texts": f"up to {base['max_positions']:,} tokens, vocabulary of {base['vocabulary']:,}",
        "pooling": f"made for {base['pooling']}",
        "trained on": base["trained_on"],
        "batches": "packed: no padding is computed" if base["packed"]
        else "padded: packing gives other results here, or is not supported by this family",
        "tasks": "mixed freely in one batch" if base["mixes"]
        else "run one after the other where a batch mixes them: this family needs it",
    })  # fmt: skip
    if base["biases"] == 0:
        _show_no_biases()
    else:
        _show_terms(base)
    _show_machine(machine)


def _show_no_biases() -> None:
    console.say("\n0 biases: there is nothing for bias tuning to train on this base", "bold red")
    console.say(
        "Choose a base with biases (BERT, RoBERTa, ELECTRA, MPNet, DistilBERT, DeBERTa, MiniLM), "
        "or train only a head with --method frozen."
    )


def _show_terms(base: Mapping[str, Any]) -> None:
    rows = [
        (t["term"], t["symbol"] or "–", t["vectors"], f"{t['count']:,}", f"{t['share']:.4%}",
         "inert: left out of 'all'" if t["inert"] else "")
        for t in base["terms"]
    ]  # fmt: skip
    eight, tuned = base["eight_terms"], base["default_terms"]
    rows.append(("the paper's eight", "", "", f"{eight['count']:,}", f"{eight['share']:.4%}", ""))
    rows.append(("tuned by default", "", "", f"{tuned['count']:,}", f"{tuned['share']:.4%}", ""))
    columns = ("term", "paper", ">vectors", ">values", ">share", "")
    console.print_table(columns, rows, title="\nbiases")
    if "key" in base["inert_terms"]:
        console.say("b_k is inert here: adding anything to it changed no output (measured)")


def _show_machine(machine: Mapping[str, Any]) -> None:
    speeds = machine["gflops"]
    console.print_facts("\nmachine", {
        "device": f"{machine['device']} ({machine['device_name']}), "
        + console.count(machine["threads"], "thread"),
        "precision": f"{machine['dtype']} is chosen: bf16 {speeds['bf16']:,.0f} GFLOP/s, fp32 "
        f"{speeds['fp32']:,.0f} ({speeds['bf16'] / speeds['fp32']:.2g} times)",
        "versions": ", ".join(
            f"{name} {version}" for name, version in machine["versions"].items() if version
        ) + f", python {machine['python']}",
        **{
            f"extra {name}": "installed" if extra["installed"] else f"missing: {extra['install']}"
            for name, extra in machine["extras"].items()
        },
    })  # fmt: skip
