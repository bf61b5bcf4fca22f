"""The commands that look: ``inspect``, ``diff``, ``doctor``, ``tasks`` and ``demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bitfit.cli import console, options

_FILE_HELP = "A task file (*.bitfit.safetensors)."


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=_FILE_HELP)],
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Load the base and compare what it answers to the probes in the file; exit 1 "
            "where it differs.",
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw how far each term moved (the paper's Figure 1): .png or .svg."),
    ] = None,
    base: options.FileBase = None,
    trust_remote_code: options.TrustRemoteCode = False,
    dtype: options.FileDtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Show everything that a task file holds, and prove that it works.

    The check allows for rounding only: 1e-3 in fp32, 5e-2 in bf16 or where the biases are stored
    in less than fp32, relative to the largest logit where that is above 1.
    """
    given = dict(locals())
    from bitfit.cli import views

    report = views.inspect(given)
    console.print_json(report) if as_json else views.show_file(report)
    if report["check"] is not None and not report["check"]["passed"]:
        raise typer.Exit(1)


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help=_FILE_HELP)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another of the same base.")],
    layers: Annotated[
        bool, typer.Option("--layers", help="Show every layer, not the terms' sums.")
    ] = False,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Compare two task files of one base: how far each term moved, and in how like a direction.

    The cosine is 1 where both moved alike, 0 where they have nothing in common.
    """
    from bitfit.cli import views

    report = views.diff(a, b)
    console.print_json(report) if as_json else views.show_diff(report, layers=layers)


def doctor(
    base: options.Base = "minilm",
    device: options.Device = "auto",
    threads: options.Threads = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Show what a base offers for bias tuning, and what this machine is good at."""
    from bitfit.cli import views

    report = views.examine(base, device, threads, revision, trust_remote_code)
    console.print_json(report) if as_json else views.show_doctor(report)


def tasks(as_json: options.AsJson = False, debug: options.Debug = False) -> None:
    """List the tasks that are built in, and the files that they are read from."""
    from bitfit.data.files import split_files
    from bitfit.tasks import BUILTIN_TASKS

    rows: list[dict[str, Any]] = []
    for name, built in BUILTIN_TASKS.items():
        splits = {split: files[0] for split, files in split_files(built).items()}
        rows.append({
            "name": name, "title": built.title, "kind": built.task.kind,
            "labels": list(built.task.labels), "metric": built.task.metric,
            "metrics": list(built.task.metrics), "is_pair": built.task.is_pair,
            "folder": built.folder, "files": splits, "open_labels": built.open_labels,
        })  # fmt: skip
    if as_json:
        return console.print_json({"tasks": rows})
    cells = [
        (r["name"], r["title"], r["kind"],
         "the data's" if r["open_labels"] else ", ".join(r["labels"]) or "–", r["metric"],
         f"{r['folder']}/{r['files']['train']}")
        for r in rows
    ]  # fmt: skip
    console.print_table(("name", "title", "kind", "labels", "metric", "files"), cells)
    console.say("\nRead them with: bitfit train --task NAME --data FOLDER, the folder above these.")


def demo(
    quick: Annotated[
        bool,
        typer.Option("--quick", help="One short epoch a task, no baselines: does it run at all?"),
    ] = False,
    keep: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the three task files go.")
    ] = Path("bitfit-demo"),
    base: options.Base = "minilm",
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Train three example tasks of a bicycle shop and answer new sentences with all of them.

    Takes some minutes on two cores. The example sentences were written for this project.
    """
    from bitfit.cli import showing_demo

    result = showing_demo.run(keep, base=base, quick=quick, quiet=quiet)
    console.print_json(result.to_json()) if as_json else showing_demo.show(result, keep, quick)
