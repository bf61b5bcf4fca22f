"""``bitfit serve``: the server's options, and what is printed when it is up."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from bitfit.cli import console, options
from bitfit.errors import MissingExtra, UsageError

TASKS, NETWORK, BATCHES, LIMITS = "Tasks", "Network", "Batches", "Limits"


def _option(panel: str, help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def serve(
    base: options.Base = "minilm",
    tasks: Annotated[
        str | None,
        _option(TASKS, "Folder of task files; uploads are kept in it. Or an fsspec URL.",
                metavar="DIR"),
    ] = None,
    watch: Annotated[
        float, _option(TASKS, "Seconds between looks at DIR; 0: at the start only.", min=0)
    ] = 5.0,
    storage: Annotated[
        str, _option(TASKS, "How rows are held in memory: fp32, fp16, bf16 or int8.")
    ] = "fp32",
    max_resident: Annotated[
        int | None,
        _option(TASKS, "Rows in memory at most; others are loaded when asked (default: all).",
                min=1),
    ] = None,
    host: Annotated[str, _option(NETWORK, "Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, _option(NETWORK, "Port to listen on; 0: any free one.", min=0, max=65535)
    ] = 8000,
    keys: Annotated[
        Path | None,
        _option(NETWORK, "File of API keys, lines of ROLE:KEY (default: BITFIT_API_KEYS).",
                metavar="FILE"),
    ] = None,
    insecure: Annotated[
        bool, _option(NETWORK, "Listen beyond this machine without keys.", "--insecure")
    ] = False,
    max_tokens: Annotated[
        int, _option(BATCHES, "Tokens in a batch: items times the longest.", min=1)
    ] = 2048,
    max_wait_ms: Annotated[
        float, _option(BATCHES, "How long a text waits for others to share a batch.", min=0)
    ] = 2.0,
    max_queue_items: Annotated[
        int, _option(BATCHES, "Texts accepted and not answered; more are refused (429).", min=1)
    ] = 4096,
    max_queue_tokens: Annotated[
        int, _option(BATCHES, "Tokens that wait; more are refused (429).", min=1)
    ] = 262_144,
    max_delay_ms: Annotated[
        float, _option(BATCHES, "Refuse (429) what would wait longer than this.", min=1)
    ] = 30_000.0,
    deadline_ms: Annotated[
        float, _option(BATCHES, "How long an answer may take (504).", min=1)
    ] = 60_000.0,
    max_items: Annotated[int, _option(LIMITS, "Texts in one request.", min=1)] = 1024,
    max_text_chars: Annotated[int, _option(LIMITS, "Characters of a text.", min=1)] = 100_000,
    max_body_bytes: Annotated[
        int, _option(LIMITS, "Bytes of a request to predict.", min=1)
    ] = 8 << 20,
    max_requests: Annotated[
        int, _option(LIMITS, "Requests open at one time; more are refused (503).", min=1)
    ] = 2048,
    drain_seconds: Annotated[
        float, _option(LIMITS, "Time for what was accepted when told to stop.", min=0)
    ] = 30.0,
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    log_texts: Annotated[
        bool,
        _option(options.REPORT, "Write the texts of requests into the log.", "--log-texts"),
    ] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:  # fmt: skip
    """Serve task files over HTTP, with a page to look at them and try them.

    All tasks share one base; requests of any tasks are answered in common batches. Ctrl-C or
    SIGTERM ends the server after what it has accepted. Needs the extra: serve.
    """  # fmt: skip
    given = dict(locals())
    check_extra()
    run(given)


def run(given: Mapping[str, Any]) -> None:
    """Serve by the options in ``given`` until told to stop.

    Raises:
        UsageError: an option that cannot be meant, or the port is taken.
        BitfitError: the base or the tasks cannot be loaded.
    """
    import asyncio

    import torch

    from bitfit.rounding import STORAGE_TYPES
    from bitfit.serve import logs
    from bitfit.serve.auth import Keys, check_bind
    from bitfit.serve.run import listen, open_service, serve
    from bitfit.serve.settings import ServeConfig

    if given["storage"] not in STORAGE_TYPES:
        raise UsageError(f"--storage {given['storage']!r} is not one of {', '.join(STORAGE_TYPES)}")
    names = {field.name for field in fields(ServeConfig)}
    config = ServeConfig(
        **{k: v for k, v in given.items() if k in names}, watch_seconds=given["watch"]
    )
    keys = Keys.load(given["keys"])
    check_bind(config, keys)
    listener = listen(config)  # before the base is loaded: a port that is taken is known at once
    if given["threads"] is not None:
        torch.set_num_threads(given["threads"])
    with listener:
        note = (lambda text: None) if given["quiet"] else console.note
        note(f"loading {given['base']}")
        service = open_service(
            given["base"], config, storage=given["storage"], max_resident=given["max_resident"],
            dtype=given["dtype"], device=given["device"], revision=given["revision"],
        )  # fmt: skip
        logs.configure()
        at = config.at(listener.getsockname()[1])

        def ready() -> None:
            tasks = len(service.shelf.infos())
            if given["as_json"]:
                console.print_json({"address": at.address, "base": given["base"], "tasks": tasks})
                sys.stdout.flush()
            else:
                count = console.count(tasks, "task")
                console.say(f"{count} on {given['base']} at {at.address}/")
            for line in _remarks(at, len(keys), given["tasks"]):
                note(line)

        asyncio.run(serve(service, keys, listener, on_ready=ready))


def _remarks(config: Any, keys: int, tasks: str | None) -> list[str]:
    found = [f"the page is at {config.address}/, the API's description at /openapi.json"]
    if tasks is None:
        found.append("no --tasks: what is uploaded is gone when the server ends")
    elif "://" in tasks:
        found.append("--tasks is a URL: what is uploaded is gone when the server ends")
    if not keys:
        found.append(
            "no keys: whoever reaches this address may ask, add and remove tasks"
            + (" (this machine only)" if config.is_loopback else "")
        )
    return found


def check_extra() -> None:
    """Refuse to go on without what a server needs.

    Raises:
        MissingExtra: the extra ``serve`` is not installed.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise MissingExtra("bitfit serve", "serve") from None
