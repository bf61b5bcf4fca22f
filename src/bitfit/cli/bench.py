"""``bitfit bench``: what is measured and how it is shown."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from bitfit.cli import bench_views, console, options
from bitfit.cli.serve import check_extra as check_serving
from bitfit.errors import UsageError

if TYPE_CHECKING:
    from bitfit.bench.plan import Plan
    from bitfit.rounding import StorageType

    RunTables = Callable[[Plan, Callable[[str], None]], Iterator[dict[str, Any]]]

OVER_HTTP = "Over HTTP"
Data = Annotated[
    str | None,
    typer.Option(
        metavar="DIR", rich_help_panel=options.DATA,
        help="A GLUE folder; without it the example's sentences that come with bitfit.",
    ),
]  # fmt: skip
Rounds = Annotated[
    int,
    typer.Option(
        min=1, rich_help_panel=options.TRAINING,
        help="How often all have their turn; the median counts.",
    ),
]  # fmt: skip
Memory = Annotated[
    bool,
    typer.Option(
        "--memory/--no-memory", rich_help_panel=options.TRAINING,
        help="Measure peak memory too, each in a process of its own.",
    ),
]  # fmt: skip


def train(
    data: Data = None,
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
    rounds: Rounds = 5,
    memory: Memory = True,
    base: options.Base = "minilm",
    dtype: options.BenchDtype = "auto",
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
    command = _command("train", dict(locals()))
    sizes = _numbers("--batch-sizes", batch_sizes)
    from bitfit.bench.train import make_plan, run_tables

    _set_threads(threads)
    plan = make_plan(
        base=base, data=data, tasks=_names(tasks or ""), batch_sizes=sizes, rounds=rounds,
        memory=memory, dtype=dtype, device=device,
    )  # fmt: skip
    where = ", ".join(f"{t.work.task.name} at {t.batch_size}" for t in plan.tables)
    what = f"{console.count(len(plan.variants), 'variant')} on {where}"
    each = f"{console.count(sum(t.steps for t in plan.tables), 'step')} a variant"
    _run(
        plan,
        run_tables,
        bench_views.show_table,
        command,
        (what, each),
        as_json=as_json,
        quiet=quiet,
    )


def lanes(
    data: Data = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=options.DATA,
            help="Tasks between commas (default: sst2,mrpc; without --data the example's "
            "intent,urgency,sentiment).",
        ),
    ] = None,
    lanes: Annotated[
        str,
        typer.Option(rich_help_panel=options.TRAINING, help="Numbers of runs, between commas."),
    ] = "1,4,16,64",
    batch_size: Annotated[
        int,
        typer.Option(
            min=1, rich_help_panel=options.TRAINING, help="Rows in a step of one run."
        ),
    ] = 8,
    rounds: Rounds = 5,
    memory: Memory = True,
    base: options.Base = "minilm",
    dtype: options.BenchDtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:  # fmt: skip
    """Time training runs side by side against the same runs one after another.

    Both ways train the same batches, in turns. Shown are real (not padding) tokens per second, all
    runs together, their ratio, the share of what this machine's matrix products allow, peak memory
    above the loaded model, and the bytes of the optimizer and of a checkpoint. Takes minutes, and
    means something on a quiet machine only.
    """
    command = _command("lanes", dict(locals()))
    counts = _numbers("--lanes", lanes)
    from bitfit.bench.lanes import make_plan, run_tables

    _set_threads(threads)
    plan = make_plan(
        base=base, data=data, tasks=_names(tasks or ""), lanes=counts, batch_size=batch_size,
        rounds=rounds, memory=memory, dtype=dtype, device=device,
    )  # fmt: skip
    shown = ", ".join(str(table.work.lanes) for table in plan.groups[0])
    names = ", ".join(group[0].work.task.name for group in plan.groups)
    what = f"{shown} lanes and as many runs alone on {names} at {batch_size}"
    steps = sum(t.steps * t.work.lanes for t in plan.tables) * len(plan.variants)
    each = console.count(steps, "step")
    _run(
        plan,
        run_tables,
        bench_views.show_lanes,
        command,
        (what, each),
        as_json=as_json,
        quiet=quiet,
    )


def serve(
    data: Data = None,
    task: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=options.DATA,
            help="Whose texts are asked (default: sst2; without --data the example's intent).",
        ),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            rich_help_panel=options.TRAINING,
            help="Numbers of tasks that batches are drawn from, between commas.",
        ),
    ] = "1,10,100,1000",
    items: Annotated[
        int, typer.Option(min=1, rich_help_panel=options.TRAINING, help="Texts in a batch.")
    ] = 32,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1, rich_help_panel=options.TRAINING, show_default="15; over HTTP 3",
            help="How often all have their turn; the median counts.",
        ),
    ] = None,
    storage: Annotated[
        str,
        typer.Option(
            rich_help_panel=options.MACHINE,
            help="How biases are kept in memory: fp32, fp16, bf16 or int8.",
        ),
    ] = "fp32",
    http: Annotated[
        bool,
        typer.Option(
            "--http", rich_help_panel=OVER_HTTP,
            help="Ask a server over HTTP, beside the engine in this process.",
        ),
    ] = False,
    clients: Annotated[
        int | None,
        typer.Option(
            min=1, rich_help_panel=OVER_HTTP, show_default="64", help="How many ask at once."
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0.1, rich_help_panel=OVER_HTTP, show_default="5", help="Of a turn."
        ),
    ] = None,
    infinity: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=OVER_HTTP,
            help="The command infinity_emb of an environment of its own: infinity-emb has its "
            "turn too, with one classifier.",
        ),
    ] = None,
    base: options.Base = "minilm",
    dtype: options.BenchDtype = "fp32",
    device: options.Device = "auto",
    threads: options.Threads = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:  # fmt: skip
    """Time answers of many tasks at once, in this process or over HTTP, beside other ways.

    All answer the same texts in turns; each text names another task. The tasks are made up: the
    base's biases with small noise, and random heads, which changes no speed. Shown are items per
    second, the ratio to one task folded into a plain packed model (the median of the rounds'
    ratios), the time of a batch, memory per task, and the time to add one. With --http: a server
    of its own process beside its engine in this one, with requests of many texts and of one, the
    processor's time, and what becomes of twice the load. Means something on a quiet machine only.
    """
    given = dict(locals())
    command = _command("serve", given | {"memory": True}) + (" --http" if http else "")
    counts = _numbers("--tasks", tasks)
    _set_threads(threads)
    common = {
        "base": base, "data": data, "task": task, "counts": counts, "items": items,
        "storage": _storage(storage), "dtype": dtype, "device": device,
    }  # fmt: skip
    alone = {"clients": clients, "seconds": seconds, "infinity": infinity}
    chosen = {key: value for key, value in alone.items() if value is not None}
    if rounds is not None:
        common["rounds"] = rounds
    if http:
        report = _bench_http(common | chosen, command, quiet)
    elif chosen:
        raise UsageError(f"--{min(chosen)} is of the server: give --http too")
    else:
        report = _bench_in_process(common, command, quiet)
    if as_json:
        console.print_json(report)
    else:
        (bench_views.show_http if http else bench_views.show_serve)(report)


def _bench_in_process(given: Mapping[str, Any], command: str, quiet: bool) -> dict[str, Any]:
    from bitfit.bench.serve import make_plan, run_plan

    plan = make_plan(**given)
    with console.bar(quiet) as bar:
        return run_plan(plan, command, _Progress(bar, plan.turns, quiet))


def _bench_http(given: Mapping[str, Any], command: str, quiet: bool) -> dict[str, Any]:
    check_serving()
    from bitfit.bench.over_http import make_plan, run_plan

    plan = make_plan(**given)
    with console.bar(quiet) as bar:
        return run_plan(plan, command, _Progress(bar, plan.turns, quiet))


def _storage(name: str) -> StorageType:
    from bitfit.rounding import STORAGE_TYPES

    if name not in STORAGE_TYPES:
        raise UsageError(f"--storage {name!r} is not one of {', '.join(STORAGE_TYPES)}")
    return name


def _run(
    plan: Plan,
    run_tables: RunTables,
    show: Callable[[Mapping[str, Any]], None],
    command: str,
    about: tuple[str, str],
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run a plan; ``about`` says what is run, and how much of it in a round."""
    from bitfit.bench.plan import describe

    report = describe(plan, command) | {"tables": []}
    if not quiet:
        bench_views.show_plan(plan, *about)
    if not as_json:
        bench_views.show_machine(report)
    with console.bar(quiet) as bar:
        progress = _Progress(bar, plan.turns, quiet)
        for table in run_tables(plan, progress):
            report["tables"].append(table)
            if not as_json:
                with progress.paused():
                    show(table)
    if as_json:
        console.print_json(report)


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(option: str, text: str) -> list[int]:
    names = _names(text)
    if not names or not all(name.isdecimal() and int(name) > 0 for name in names):
        raise UsageError(f"{option} {text!r}: expected numbers from 1 up between commas, as 8,32")
    return [int(name) for name in names]


def _command(name: str, given: Mapping[str, Any]) -> str:
    """Return the command with every choice that changes what is measured."""
    words = ["bitfit", "bench", name]
    for option, value in given.items():
        if value is not None and not isinstance(value, bool):
            words += [f"--{option.replace('_', '-')}", str(value)]
    return shlex.join(words if given["memory"] else [*words, "--no-memory"])


# ------------------------------------------------------------------ shown


class _Progress:
    """A bar over all turns; without a terminal a line per table."""

    def __init__(self, bar: Progress | None, turns: int, quiet: bool) -> None:
        self.bar, self.quiet, self.where = bar, quiet, ""
        if bar is not None:
            self.row = bar.add_task("loading", total=turns)

    def __call__(self, what: str) -> None:
        where = what.partition(":")[0]
        if self.bar is not None:
            self.bar.update(self.row, description=what, advance=1)
        elif where != self.where and not self.quiet:
            console.note(where)
        self.where = where

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context in which the bar is out of the way."""
        if self.bar is not None:
            self.bar.stop()
        try:
            yield
        finally:
            if self.bar is not None:
                self.bar.start()
