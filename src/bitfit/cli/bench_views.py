"""What ``bitfit bench`` found, as tables in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bitfit.cli import console

if TYPE_CHECKING:
    from bitfit.bench.plan import Plan


def show_plan(plan: Plan, what: str, each: str) -> None:
    """Say what is about to be run, and about how long it takes."""
    console.note(
        f"{what}: {console.count(plan.rounds, 'round')} and one to warm up, each of {each}"
        + (", then each once more in its own process for its memory" if plan.memory else "")
        + "".join(f". {name} is slow here: one step in one round" for name in sorted(plan.slow))
        + f". About {console.duration(plan.seconds)}."
    )


def show_machine(report: Mapping[str, Any]) -> None:
    """Print what it is run on."""
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


def show_table(table: Mapping[str, Any]) -> None:
    """Print a table of ``bench train``."""
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


def show_lanes(table: Mapping[str, Any]) -> None:
    """Print a table of ``bench lanes``."""
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


def show_serve(report: Mapping[str, Any]) -> None:
    """Print the report of ``bench serve``."""
    show_machine(report)
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


def show_http(report: Mapping[str, Any]) -> None:
    """Print the report of ``bench serve --http``."""
    show_machine(report)
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
