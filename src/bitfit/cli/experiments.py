"""``bitfit sweep``, ``reproduce`` and ``report``: the options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from bitfit.cli import console, options

GRID = "The grid"

Data: TypeAlias = Annotated[
    Path,
    typer.Option(
        metavar="DIR", rich_help_panel=options.DATA, show_default=False,
        help="The data directory: GLUE's own, or one that holds glue_data, squad, ud_ewt, ptb.",
    ),
]  # fmt: skip
Out: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", rich_help_panel=GRID,
        help="The experiment's directory (default: results/NAME).",
    ),
]  # fmt: skip
Bases: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--base", rich_help_panel=GRID, help="In place of the grid's bases; repeatable."),
]
Tasks: TypeAlias = Annotated[
    str | None,
    typer.Option(rich_help_panel=GRID, help="Only these tasks, between commas."),
]
Rows: TypeAlias = Annotated[
    str | None,
    typer.Option(rich_help_panel=GRID, help="Only these rows, between commas."),
]
Seeds: TypeAlias = Annotated[
    str | None,
    typer.Option(rich_help_panel=GRID, help="Seeds between commas, the first searches: 0,1,2."),
]
Recipe: TypeAlias = Annotated[
    str | None,
    typer.Option(rich_help_panel=GRID, help="paper or default; by default the grid's."),
]
Epochs: TypeAlias = Annotated[
    int | None,
    typer.Option(min=1, rich_help_panel=GRID, help="By default the grid's, else the recipe's."),
]
Limit: TypeAlias = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=GRID,
        help="Training rows: a number for all tasks, or TASK=NUMBER between commas.",
    ),
]
Budget: TypeAlias = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=GRID,
        help="Do the most telling runs that fit into this time: 90m, 2h, 1h30m.",
    ),
]
DryRun: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--dry-run", rich_help_panel=GRID,
        help="Show runs, time and disk after a short measurement; write nothing.",
    ),
]  # fmt: skip
Resume: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--resume", rich_help_panel=GRID,
        help="Go on in a directory that holds this experiment, or join who works on it.",
    ),
]  # fmt: skip
Move: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--move", rich_help_panel=GRID,
        help="With --resume: go on with this --device, --dtype and --threads, where the experiment "
        "was begun with others. What is finished stays and counts.",
    ),
]  # fmt: skip
RetryFailed: TypeAlias = Annotated[
    bool,
    typer.Option("--retry-failed", rich_help_panel=GRID, help="Make failed runs again."),
]
Reuse: TypeAlias = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="DIR", rich_help_panel=GRID,
        help="Another experiment to copy the same runs from; repeatable.",
    ),
]  # fmt: skip
Lanes: TypeAlias = Annotated[
    str,
    typer.Option(
        rich_help_panel=options.MACHINE,
        help="How many runs train side by side in one forward pass: a number, or auto: measured "
        "once for each task, and recorded.",
    ),
]
Ray: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="local|auto|ADDRESS", rich_help_panel=options.MACHINE,
        help="Train on a Ray cluster (extra ray): local starts one of this machine, auto is the "
        "one that runs here, else HOST:PORT or ray://HOST:PORT.",
    ),
]  # fmt: skip

Submission: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--submission", rich_help_panel=GRID,
        help="Also answer GLUE's test sets with the best runs of bias tuning: every file that the "
        "server asks for, zipped.",
    ),
]  # fmt: skip


def sweep(
    grid: Annotated[Path, typer.Argument(metavar="GRID.toml", help="The grid of runs.")],
    data: Data,
    out: Out = None,
    bases: Bases = None,
    tasks: Tasks = None,
    rows: Rows = None,
    seeds: Seeds = None,
    recipe: Recipe = None,
    epochs: Epochs = None,
    limit: Limit = None,
    budget: Budget = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    move: Move = False,
    retry_failed: RetryFailed = False,
    reuse: Reuse = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    lanes: Lanes = "auto",
    ray: Ray = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Run a grid of your own: methods x tasks x rates x seeds, chosen on dev.

    Every finished run is a line of JSON in the experiment's directory. Ctrl-C saves the state; the
    same command with --resume goes on and repeats nothing. 'bitfit report DIR' makes the tables.
    """
    given = dict(locals())
    from bitfit.cli import sweeping

    sweeping.run_grids([sweeping.own_grid(given)], given, dry_run=dry_run, as_json=as_json)


def reproduce(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="table1, table2, table3, table6, figure1 (all tasks of 1 and 3-5), figure2 (with "
            "6), figure3 to figure6, pos, gap, convergence, stability; beyond the paper terms, "
            "layers, peft, curves; or all.",
        ),
    ],
    data: Data,
    out: Out = None,
    bases: Bases = None,
    tasks: Tasks = None,
    rows: Rows = None,
    seeds: Seeds = None,
    recipe: Recipe = None,
    epochs: Epochs = None,
    limit: Limit = None,
    budget: Budget = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    move: Move = False,
    retry_failed: RetryFailed = False,
    reuse: Reuse = None,
    submission: Submission = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    lanes: Lanes = "auto",
    ray: Ray = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Repeat a table or figure of the paper (Ben Zaken et al. 2022), on any base.

    Tasks whose data is not there are left out, and said. Every finished run is a line of JSON in
    the experiment's directory. Ctrl-C saves the state; the same command with --resume goes on and
    repeats nothing. At the end the report is written beside the runs.
    """
    given = dict(locals())
    from bitfit.cli import sweeping

    grids = sweeping.paper_grids(given)
    sweeping.run_grids(grids, given, dry_run=dry_run, as_json=as_json)


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An experiment's directory.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to (default: DIR/report).")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The data: for a submission, and where the experiment lacks the dev answers.",
        ),
    ] = None,
    submission: Submission = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Make tables, figures and a page of an experiment: Markdown, CSV, LaTeX, HTML, PNG, SVG.

    Best (to set beside the printed numbers), mean and standard deviation over seeds, differences
    with intervals, the generalization gap, convergence, stability, costs, and how to get from each
    number to its run.
    """
    from bitfit.cli import sweeping

    found = sweeping.make_report(directory, out, data, submission=submission, quiet=quiet)
    if as_json:
        console.print_json(found)
    else:
        sweeping.show_report(found)
