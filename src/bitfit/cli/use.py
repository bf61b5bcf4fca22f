"""``bitfit eval`` and ``bitfit predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitfit.cli import console, options

TaskFilePath = Annotated[
    Path, typer.Argument(metavar="FILE", help="A task file (*.bitfit.safetensors).")
]


def evaluate(
    file: TaskFilePath,
    data: options.Data,
    split: Annotated[
        str,
        typer.Option(
            help="train, dev, dev_mismatched, test, test_mismatched or test_diagnostic.",
            rich_help_panel=options.DATA,
        ),
    ] = "dev",
    task: options.Task = None,
    text: options.TextColumn = None,
    text_pair: options.PairColumn = None,
    label: options.LabelColumn = None,
    dev: options.Dev = None,
    test: options.Test = None,
    format: options.DataFormat = "auto",
    token_column: options.TokenColumn = None,
    label_separator: options.LabelSeparator = None,
    hub_revision: options.HubRevision = None,
    dev_fraction: options.DevFraction = 0.1,
    skip_bad_rows: options.SkipBadRows = False,
    base: options.FileBase = None,
    trust_remote_code: options.TrustRemoteCode = False,
    dtype: options.FileDtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Score a task file on data.

    A built-in task is known by what the file says; of your own data, name the columns. Rows that
    training held out are found again: the file that was trained on is scored on those only.
    """
    given = dict(locals())
    from bitfit.cli import scoring

    report = scoring.evaluate(given)
    return console.print_json(report) if as_json else scoring.show(report)


def predict(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE... [TEXT]...",
            help="Task files (*.safetensors), then texts; a tab stands between the two of a pair. "
            "Without texts: standard input, one a line.",
        ),
    ],
    input: Annotated[
        Path | None,
        typer.Option(
            help="Read texts from a .txt, .csv, .tsv, .jsonl or .parquet file.",
            rich_help_panel=options.DATA,
        ),
    ] = None,
    text: options.TextColumn = None,
    text_pair: options.PairColumn = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="With --format glue the folder whose test split is answered; with squad a "
            "folder or file of questions.",
            rich_help_panel=options.DATA,
        ),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            help="text, jsonl, glue: the GLUE server's files, squad: SQuAD's JSON of answers.",
            rich_help_panel=options.REPORT,
        ),
    ] = "text",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Write to this file, whole or not at all; with glue a folder, or a .tsv file.",
            rich_help_panel=options.REPORT,
        ),
    ] = None,
    min_confidence: Annotated[
        float,
        typer.Option(
            help="Give no label ('?', of several labels none) below this calibrated probability.",
            rich_help_panel=options.REPORT,
        ),
    ] = 0.0,
    base: options.FileBase = None,
    trust_remote_code: options.TrustRemoteCode = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="As --format jsonl.", rich_help_panel=options.REPORT),
    ] = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Answer texts with one or several task files.

    Every text is answered by every task, mixed in common batches on the one base. The text format
    is LABEL, CONFIDENCE, TEXT between tabs; with several tasks TASK=LABEL (CONFIDENCE) for each.
    """  # fmt: skip
    given = dict(locals())
    from bitfit.cli import answering

    answering.predict(given)
