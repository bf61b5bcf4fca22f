"""Every option that a command takes, with its help; those of several commands stand here once."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from bitfit.cli import console
from bitfit.errors import UsageError

if TYPE_CHECKING:
    from bitfit.data import DataConfig

DATA, TRAINING, MACHINE, FILE, REPORT = "Data", "Training", "Machine", "File", "Reports"


def _set_debug(value: bool) -> bool:
    console.STATE.debug = value
    return value


# ------------------------------------------------------------------ reports

AsJson: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on one line.", rich_help_panel=REPORT)
]
Quiet: TypeAlias = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no notes.", rich_help_panel=REPORT)
]
Debug: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--debug", callback=_set_debug, help="Show the traceback of an error.",
        rich_help_panel=REPORT,
    ),
]  # fmt: skip
Log: TypeAlias = Annotated[
    Path | None,
    typer.Option(help="Append a JSON line for every evaluation.", rich_help_panel=REPORT),
]
TensorBoard: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--tensorboard", help="Folder for TensorBoard (extra: tensorboard).",
        rich_help_panel=REPORT,
    ),
]  # fmt: skip
DryRun: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Read the data, show what would be trained, train nothing.",
        rich_help_panel=REPORT,
    ),
]  # fmt: skip

# ------------------------------------------------------------------ data

Data: TypeAlias = Annotated[
    str,
    typer.Option(
        help="A file, a folder of splits, the GLUE folder, or hub:owner/name.",
        rich_help_panel=DATA,
    ),
]
Task: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="A built-in task ('bitfit tasks'); leave it out for data of your own.",
        rich_help_panel=DATA,
    ),
]
TextColumn: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Column of the text; guessed from common names.", rich_help_panel=DATA),
]
PairColumn: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Column of the second text of a pair.", rich_help_panel=DATA),
]
LabelColumn: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Column of the answer; guessed from common names.", rich_help_panel=DATA),
]
Labels: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Label names between commas, in the order of the logits; else those of the data, "
        "sorted.",
        rich_help_panel=DATA,
    ),
]
Kind: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="classification, regression, multilabel, tokens or span; seen from the answers.",
        rich_help_panel=DATA,
    ),
]
TrainSplit: TypeAlias = Annotated[
    str,
    typer.Option(
        "--split",
        help="Which split of a folder (train, dev, test) or of a hub data set to train on.",
        rich_help_panel=DATA,
    ),
]
Dev: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="File of the dev split (hub: its name); else found by name, else held out.",
        rich_help_panel=DATA,
    ),
]
Test: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="As --dev, of the test split; training does not read it.", rich_help_panel=DATA
    ),
]
DataFormat: TypeAlias = Annotated[
    str,
    typer.Option(
        help="auto (by file name), csv, tsv, jsonl, parquet, glue, conllu, conll, ptb, squad, hub.",
        rich_help_panel=DATA,
    ),
]
TokenColumn: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="CoNLL-U: xpos or upos. CoNLL: number of the tag's column, by default the last.",
        rich_help_panel=DATA,
    ),
]
Limit: TypeAlias = Annotated[
    int | None,
    typer.Option(help="Use so many training rows, a seeded choice.", rich_help_panel=DATA),
]
DevFraction: TypeAlias = Annotated[
    float,
    typer.Option(help="Share of train held out where there is no dev split.", rich_help_panel=DATA),
]
DataSeed: TypeAlias = Annotated[
    int | None,
    typer.Option(
        help="What --limit and the rows held out are drawn from (default: --seed).",
        rich_help_panel=DATA,
    ),
]
SkipBadRows: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--skip-bad-rows", help="Leave bad rows out and list them, instead of stopping.",
        rich_help_panel=DATA,
    ),
]  # fmt: skip

LabelSeparator: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Multilabel: what stands between two labels of a row (default: |).",
        rich_help_panel=DATA,
    ),
]
HubRevision: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a hub: data set.", rich_help_panel=DATA),
]

# ------------------------------------------------------------------ training

LearningRate: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--lr",
        help="A number, or auto: the method's four rates, chosen on dev (default: the recipe's).",
        rich_help_panel=TRAINING,
    ),
]  # fmt: skip
Recipe: TypeAlias = Annotated[
    str,
    typer.Option(
        help="default, or paper: the protocol of the paper and its released code.",
        rich_help_panel=TRAINING,
    ),
]
Epochs: TypeAlias = Annotated[
    int | None,
    typer.Option(help="Passes over the training rows.", rich_help_panel=TRAINING),
]
BatchSize: TypeAlias = Annotated[
    int | None, typer.Option(help="Rows in a step (default: 8).", rich_help_panel=TRAINING)
]
Seed: TypeAlias = Annotated[
    int,
    typer.Option(
        help="Order of the data, dropout, the head's start, held-out rows (but see --data-seed).",
        rich_help_panel=TRAINING,
    ),
]
Terms: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Which biases: all, query,intermediate, b_q,b_m2, query@0-5, all@last3, "
        "released:output, ... "
        "('bitfit doctor' lists them).",
        rich_help_panel=TRAINING,
    ),
]
Method: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="bitfit, frozen (head only), full, random, released:random, released:row_col, "
        "peft:lora, peft:ia3, peft:layernorm (extra: peft).",
        rich_help_panel=TRAINING,
    ),
]
MaxLength: TypeAlias = Annotated[
    int | None,
    typer.Option(help="Longer texts are cut, in tokens (default: 128).", rich_help_panel=TRAINING),
]
Pooling: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="auto (what the base was made for), pooler, cls or mean.", rich_help_panel=TRAINING
    ),
]
Schedule: TypeAlias = Annotated[
    str | None,
    typer.Option(help="constant, linear or cosine.", rich_help_panel=TRAINING),
]
WarmupRatio: TypeAlias = Annotated[
    float | None,
    typer.Option(help="Share of the steps in which the rate rises.", rich_help_panel=TRAINING),
]
MaxGradNorm: TypeAlias = Annotated[
    float | None,
    typer.Option(help="Clip gradients at this norm; 0: never.", rich_help_panel=TRAINING),
]
AdamEps: TypeAlias = Annotated[
    float | None,
    typer.Option(
        help="AdamW's epsilon, added before bias correction (default: 1e-6).",
        rich_help_panel=TRAINING,
    ),
]
AttentionDropout: TypeAlias = Annotated[
    float | None,
    typer.Option(
        help="Dropout on attention probabilities; by default the base's own.",
        rich_help_panel=TRAINING,
    ),
]
ClassWeights: TypeAlias = Annotated[
    str | None,
    typer.Option(help="balanced: rare classes weigh more.", rich_help_panel=TRAINING),
]
Keep: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Which epoch goes into the file: best (on dev) or last.", rich_help_panel=TRAINING
    ),
]
Patience: TypeAlias = Annotated[
    int | None,
    typer.Option(
        help="Stop after so many epochs without a dev score as good as the best; 0: never.",
        rich_help_panel=TRAINING,
    ),
]
TrainScore: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--train-score", help="Score the training rows too, to show the gap.",
        rich_help_panel=TRAINING,
    ),
]  # fmt: skip
Resume: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--resume", help="Go on from the checkpoint of an interrupted run.",
        rich_help_panel=TRAINING,
    ),
]  # fmt: skip

# ------------------------------------------------------------------ base and machine

Base: TypeAlias = Annotated[
    str,
    typer.Option(
        "--base", help="minilm, a folder, or a name on the model hub.", rich_help_panel=MACHINE
    ),
]
FileBase: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--base", help="Where the base is; by default the name in the task file.",
        rich_help_panel=MACHINE,
    ),
]  # fmt: skip
Revision: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of the base on the hub.", rich_help_panel=MACHINE),
]
TrustRemoteCode: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run code that comes with the base. Only of authors you trust.",
        rich_help_panel=MACHINE,
    ),
]  # fmt: skip
Dtype: TypeAlias = Annotated[
    str,
    typer.Option(
        help="Precision of the frozen weights: fp32, bf16, tf32 (fp32 with a GPU's products "
        "rounded), or auto: the faster of fp32 and bf16 here.",
        rich_help_panel=MACHINE,
    ),
]
BenchDtype: TypeAlias = Annotated[
    str,
    typer.Option(
        "--dtype", help="Precision of ours: fp32, bf16, or auto: the faster here.",
        rich_help_panel=MACHINE,
    ),
]  # fmt: skip
FileDtype: TypeAlias = Annotated[
    str,
    typer.Option(
        "--dtype", help="fp32, bf16, tf32, or auto: the precision it was trained in.",
        rich_help_panel=MACHINE,
    ),
]  # fmt: skip
Device: TypeAlias = Annotated[
    str, typer.Option(help="auto, cpu, cuda, cuda:1, ...", rich_help_panel=MACHINE)
]
Threads: TypeAlias = Annotated[
    int | None, typer.Option(help="CPU threads.", min=1, rich_help_panel=MACHINE)
]
LowMemory: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--low-memory", rich_help_panel=MACHINE,
        help="Compute each layer again in the backward pass: less memory, the same numbers, "
        "about a third more time.",
    ),
]  # fmt: skip
Lanes: TypeAlias = Annotated[
    str,
    typer.Option(
        help="With --lr auto, how many rates train side by side in one forward pass: a number, or "
        "auto: measured.",
        rich_help_panel=MACHINE,
    ),
]

# ------------------------------------------------------------------ the task file

Out: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        help="File to write (default: TASK.bitfit.safetensors in this folder).",
        rich_help_panel=FILE,
    ),
]
Name: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="What the task is called: letters, digits, _ . and -; by default after the data.",
        rich_help_panel=FILE,
    ),
]
Storage: TypeAlias = Annotated[
    str,
    typer.Option(
        help="How the file keeps its biases: fp32, fp16, bf16 or int8.", rich_help_panel=FILE
    ),
]
Licence: TypeAlias = Annotated[
    str | None, typer.Option(help="Licence of the task file, kept in it.", rich_help_panel=FILE)
]
Description: TypeAlias = Annotated[
    str | None,
    typer.Option(help="A model card in free text, kept in the file.", rich_help_panel=FILE),
]


def data_config(given: Mapping[str, Any], **changes: Any) -> DataConfig:
    """Return the data options among ``given`` as a :class:`~bitfit.data.DataConfig`.

    Raises:
        UsageError: an option that cannot be meant.
    """
    from bitfit.data import DataConfig

    fields = {field.name for field in dataclasses.fields(DataConfig)}
    options = {key: value for key, value in given.items() if key in fields and value is not None}
    if isinstance(labels := options.get("labels"), str):
        options["labels"] = tuple(label.strip() for label in labels.split(","))
    if str(column := options.get("token_column")).lstrip("-").isdigit():
        options["token_column"] = int(str(column))
    return DataConfig(**(options | changes))


def check_name(name: str | None) -> None:
    """Refuse a task name that a file name or ``TASK=LABEL`` could not hold.

    Raises:
        UsageError: it has other characters than letters, digits, ``_``, ``.`` and ``-``.
    """
    if name is not None and re.fullmatch(r"[\w.-]+", name) is None:
        raise UsageError(f"--name {name!r}: expected letters, digits, _ . and - only")


def parse_rate(text: str | None) -> float | str | None:
    """Return ``--lr`` as :func:`bitfit.finetune` takes it.

    Raises:
        UsageError: neither a number nor ``auto``.
    """
    if text is None or text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--lr {text!r} is neither a number nor 'auto'") from None


def parse_lanes(text: str) -> int | str:
    """Return ``--lanes`` as :func:`bitfit.finetune` takes it.

    Raises:
        UsageError: neither a whole number nor ``auto``.
    """
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--lanes {text!r} is neither a whole number nor 'auto'") from None
