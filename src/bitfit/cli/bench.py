"""``bitfit bench``: what is measured and how it is shown."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from bitfit.cli import console, options
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
    _run(plan, run_tables, _show_table, command, (what, each), as_json=as_json, quiet=quiet)


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
    _run(plan, run_tables, _show_lanes, command, (what, each), as_json=as_json, quiet=quiet)


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
        (_show_http if http else _show_serve)(report)


def _bench_in_process(given: Mapping[str, Any], command: str, quiet: bool) -> dict[str, Any]:
    from bitfit.bench.serve import make_plan, run_plan

    plan = make_plan(**given)
    with console.bar(quiet) as bar:
        turns = (plan.rounds + 1) * (len(plan.counts) + 7) + 1
        return run_plan(plan, command, _Progress(bar, turns, quiet))


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
        _show_plan(plan, *about)
    if not as_json:
        _show_machine(report)
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


def _show_plan(plan: Plan, what: str, each: str) -> None:
    console.note(
        f"{what}: {console.count(plan.rounds, 'round')} and one to warm up, each of {each}"
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
        *_sizes(row),
    )  # fmt: skip


def _show_lanes(table: Mapping[str, Any]) -> None:
    rows = table["rows"]
    products = {(r["product_tokens"], r["precision"]): r["gflops"] for r in rows}
    shown = ", ".join(f"{rate:,.1f} of {n} in {kind}" for (n, kind), rate in products.items())
    console.say("")
    console.print_table(
        (">lanes", "precision", ">tokens/s", ">one after another", ">ratio", ">to one lane",
         ">roofline", ">peak memory", ">optimizer", ">checkpoint"),
        [
            (
                str(row["lanes"]), row["precision"], f"{row['tokens_per_second']:,.0f}",
                f"{row['alone_tokens_per_second']:,.0f}", console.number(row["ratio"], 2),
                console.number(row["ratio_to_one_lane"], 2), f"{row['roofline_fraction']:.0%}",
                *_sizes(row),
            )
            for row in rows
        ],
        title=f"{table['task']}, batch {table['batch_size']}: {table['tokens_per_batch']:.0f} "
              f"tokens a batch; products of so many tokens: {shown} GFLOP/s",
    )  # fmt: skip


def _sizes(row: Mapping[str, Any]) -> Iterator[str]:
    keys = ("peak_memory_bytes", "optimizer_bytes", "checkpoint_bytes")
    return (_size(row[key]) for key in keys)


def _size(count: int | None) -> str:
    return "–" if count is None else console.size(count)


def _show_serve(report: Mapping[str, Any]) -> None:
    _show_machine(report)
    console.say("")
    console.print_table(
        ("answered by", ">tasks", ">items/s", ">ratio", ">of CPU time", ">p50 ms", ">p99 ms"),
        [_serve_cells(row) for row in report["rows"]],
        title=f"batches of {report['items']} texts of {report['texts']}, "
              f"{report['tokens_per_batch']:.0f} tokens; ratio to one task folded in",
    )  # fmt: skip
    memory, adding = report["memory"], report["adding"]
    shown = {
        "rows and heads": f"{_size(memory['row_and_head_bytes'])} of {memory['tasks']:,} tasks",
        "in memory": None,
        "separate models": f"{_size(memory['separate_models_bytes'])} for as many (calculated)",
        "a task": f"read in {adding['read_ms']:.1f} ms, ready {adding['ready_ms']:.1f} ms later, "
                  f"first answer {adding['first_answer_ms']:.1f} ms after that",
    }  # fmt: skip
    if memory["resident_bytes"] is not None:
        shown["in memory"] = f"{_size(memory['resident_bytes'])}, {memory['ratio']:.2f} times that"
    console.print_facts("", shown)


def _serve_cells(row: Mapping[str, Any]) -> Sequence[str]:
    if row["note"] is not None:
        return (row["title"], f"{row['tasks']:,}", row["note"], "", "", "", "")
    return (
        row["title"], f"{row['tasks']:,}", f"{row['items_per_second']:,.1f}",
        console.number(row["ratio_to_folded"], 2),
        console.number(row["cpu_ratio_to_folded"], 2), f"{row['p50_ms']:,.0f}",
        f"{row['p99_ms']:,.0f}",
    )  # fmt: skip


def _show_http(report: Mapping[str, Any]) -> None:
    _show_machine(report)
    console.say("")
    console.print_table(
        ("answered by", ">tasks", ">items a request", ">items/s", ">ratio", ">CPU ms an item",
         ">p50 ms", ">p99 ms"),
        [
            (
                row["title"], f"{row['tasks']:,}", str(row["items_per_request"]),
                f"{row['items_per_second']:,.1f}", console.number(row["ratio_to_engine"], 2),
                console.number(row["cpu_ms_per_item"], 2), f"{row['p50_ms']:,.0f}",
                f"{row['p99_ms']:,.0f}",
            )
            for row in report["rows"]
        ],
        title=f"{console.count(report['clients'], 'client')} with texts of {report['texts']}; "
              "ratio to the engine in process with as many tasks",
    )  # fmt: skip
    adding, load = report["adding"], report["overload"]
    answered = f"{load['answered']:,} requests answered, {load['refused']:,} refused"
    times = (
        "" if load["p50_ms"] is None
        else f"; median {load['p50_ms']:,.0f} ms, p99 {load['p99_ms']:,.0f} ms"
    )  # fmt: skip
    shown = {
        f"inside, {row['items_per_request']} a request": _inside(row["server"])
        for row in report["rows"] if row["server"] and row["tasks"] == report["rows"][-1]["tasks"]
    }  # fmt: skip
    shown |= {
        "a task": f"uploaded in {adding['put_ms']:.1f} ms, first answer "
                  f"{adding['first_answer_ms']:.1f} ms after that",
        "twice the load": f"{answered}, {load['failed']:,} failed{times}; memory "
                          + " to ".join(map(_size, load["server_bytes"])),
    }  # fmt: skip
    console.print_facts("", shown)


def _inside(server: Mapping[str, float]) -> str:
    """Return where a request's time goes, on one line."""
    request, wait, batch, items = (
        f"{server.get(key, 0.0):,.0f}"
        for key in ("request_ms", "wait_ms", "batch_ms", "batch_items")
    )
    return (
        f"{request} ms a request: the oldest of a batch waits {wait} ms, a batch of {items} items "
        f"takes {batch} ms"
    )
