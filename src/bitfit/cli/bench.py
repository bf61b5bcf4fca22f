"""``bitfit bench``: what is measured and how it is shown."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from bitfit.cli import console, options
from bitfit.errors import UsageError

if TYPE_CHECKING:
    from bitfit.bench.train import Plan


def train(
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", rich_help_panel=options.DATA,
            help="A GLUE folder; without it the example's sentences that come with bitfit.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=options.DATA,
            help="Tasks between commas (default: mrpc,sst2,stsb; without --data the example's "
            "intent,urgency,sentiment).",
        ),
    ] = None,
    batch_sizes: Annotated[
        str,
        typer.Option(rich_help_panel=options.TRAINING, help="Rows in a step, between commas."),
    ] = "8,32",
    rounds: Annotated[
        int,
        typer.Option(
            min=1, rich_help_panel=options.TRAINING,
            help="How often every variant has its turn; the median counts.",
        ),
    ] = 5,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory/--no-memory", rich_help_panel=options.TRAINING,
            help="Measure peak memory too, each variant in a process of its own.",
        ),
    ] = True,
    base: options.Base = "minilm",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:  # fmt: skip
    """Time training steps of bitfit beside the released recipe, stock parts and peft.

    All variants run in turns on the same batches. Shown are real (not padding) tokens per second,
    their ratios, the share of what this machine's matrix products allow, peak memory above the
    loaded model, and the bytes of the optimizer and of a checkpoint. Takes minutes, and means
    something on a quiet machine only.
    """
    given = dict(locals())
    sizes = _numbers("--batch-sizes", batch_sizes)
    from bitfit.bench.train import describe, make_plan, run_tables

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    plan = make_plan(
        base=base, data=data, tasks=_names(tasks or ""), batch_sizes=sizes, rounds=rounds,
        memory=memory, dtype=dtype, device=device,
    )  # fmt: skip
    report = describe(plan, _command(given)) | {"tables": []}
    if not quiet:
        _show_plan(plan)
    if not as_json:
        _show_machine(report)
    with _Progress(plan.turns, quiet) as progress:
        for table in run_tables(plan, progress):
            report["tables"].append(table)
            if not as_json:
                with progress.paused():
                    _show_table(table)
    if as_json:
        console.print_json(report)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(option: str, text: str) -> list[int]:
    names = _names(text)
    if not names or not all(name.isdecimal() and int(name) > 0 for name in names):
        raise UsageError(f"{option} {text!r}: expected numbers from 1 up between commas, as 8,32")
    return [int(name) for name in names]


def _command(given: Mapping[str, Any]) -> str:
    """Return the command with every choice that changes what is measured."""
    words = ["bitfit", "bench", "train"]
    for name in ("data", "tasks", "batch_sizes", "rounds", "base", "dtype", "device", "threads"):
        if given[name] is not None:
            words += [f"--{name.replace('_', '-')}", str(given[name])]
    return shlex.join(words if given["memory"] else [*words, "--no-memory"])


# ------------------------------------------------------------------ shown


class _Progress:
    """A bar over all turns; without a terminal a line per table."""

    def __init__(self, turns: int, quiet: bool) -> None:
        self.quiet, self.where = quiet, ""
        self.bar: Progress | None = None
        if not quiet and console.messages().is_terminal:
            self.bar = console.progress()
            self.row = self.bar.add_task("loading", total=turns)

    def __enter__(self) -> _Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, what: str) -> None:
        where = what.partition(":")[0]
        if self.bar is not None:
            self.bar.update(self.row, description=what, advance=1)
        elif where != self.where and not self.quiet:
            console.note(where)
        self.where = where

    def paused(self) -> _Paused:
        """Return a context in which the bar is out of the way."""
        return _Paused(self.bar)


class _Paused:
    def __init__(self, bar: Progress | None) -> None:
        self.bar = bar

    def __enter__(self) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.start()


def _show_plan(plan: Plan) -> None:
    tables = [f"{t.work.task.name} at {t.batch_size}" for t in plan.tables]
    steps = console.count(sum(t.steps for t in plan.tables), "step")
    console.note(
        f"{console.count(len(plan.variants), 'variant')} on {', '.join(tables)}: "
        f"{console.count(plan.rounds, 'round')} and one to warm up, each of {steps} a variant"
        + (", then each once more in its own process for its memory" if plan.memory else "")
        + "".join(f". {name} is slow here: one step in one round" for name in sorted(plan.slow))
        + f". About {console.duration(plan.seconds)}."
    )


def _show_machine(report: Mapping[str, Any]) -> None:
    hardware, versions = report["hardware"], report["versions"]
    shown = ", ".join(f"{k} {v}" for k, v in versions.items() if v is not None)
    load = hardware["load_average"]
    console.print_facts("", {
        "command": report["command"],
        "machine": f"{hardware['cpu']}, {console.count(hardware['cores'], 'core')}, "
                   f"{console.count(hardware['threads'], 'thread')}"
                   + ("" if load is None else f", load {load:.1f} before"),
        "device": hardware["device_name"] if hardware["device"] != "cpu" else None,
        "versions": shown,
        "base": f"{report['base']}, {report['encoder_weights']:,} numbers in its matrices",
    })  # fmt: skip


def _show_table(table: Mapping[str, Any]) -> None:
    products = ", ".join(f"{rate:,.1f} in {name}" for name, rate in table["gflops"].items())
    console.say("")
    console.print_table(
        ("variant", ">tokens/s", ">ratio", ">to best stock", ">roofline", ">peak memory",
         ">optimizer", ">checkpoint"),
        [_cells(row) for row in table["rows"]],
        title=f"{table['task']}, batch {table['batch_size']}: {table['tokens_per_batch']:.0f} "
              f"tokens a step; products: {products} GFLOP/s",
    )  # fmt: skip
    titles = {row["variant"]: row["title"] for row in table["rows"]}
    for what in ("stock", "full"):
        console.say(f"the best {what}: {titles[table[f'best_{what}']]}")


def _cells(row: Mapping[str, Any]) -> Sequence[str]:
    if row["note"] is not None:
        return (row["title"], row["note"], *[""] * 6)
    share = row["roofline_fraction"]
    return (
        row["title"], f"{row['tokens_per_second']:,.0f}", console.number(row["ratio"], 2),
        console.number(row["ratio_to_best_stock"], 2), f"{share:.0%}",
        *(_size(row[key]) for key in ("peak_memory_bytes", "optimizer_bytes", "checkpoint_bytes")),
    )  # fmt: skip


def _size(count: int | None) -> str:
    return "–" if count is None else console.size(count)
