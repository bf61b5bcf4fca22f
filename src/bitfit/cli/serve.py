"""``bitfit serve``: the server's options, and what is printed when it is up."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from bitfit.cli import console, options
from bitfit.errors import MissingExtra, UsageError

TASKS, NETWORK, BATCHES, LIMITS = "Tasks", "Network", "Batches", "Limits"
REPLICAS = 2


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
    max_scores: Annotated[
        int, _option(LIMITS, "Scores in one answer: all labels of each text, or top_k.", min=1)
    ] = 262_144,
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
    trust_remote_code: options.TrustRemoteCode = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    ray: Annotated[
        str | None,
        _option(options.MACHINE, "Replicas on a Ray cluster behind this address (extra ray): local "
                "starts one of this machine, auto is the one that runs here, else HOST:PORT.",
                metavar="local|auto|ADDRESS"),
    ] = None,
    replicas: Annotated[
        int | None,
        _option(options.MACHINE, f"With --ray: how many, of --threads CPUs each (default: "
                f"{REPLICAS}).", min=1, max=1000),
    ] = None,
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
    SIGTERM ends the server after what it has accepted. With --ray several processes answer, on one
    machine or many; what was sent to one that dies is answered by another. Needs the extra: serve.
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
    from bitfit.rounding import STORAGE_TYPES
    from bitfit.serve.auth import Keys, check_bind
    from bitfit.serve.run import listen
    from bitfit.serve.settings import ServeConfig

    _check_replicas(given)
    if given["storage"] not in STORAGE_TYPES:
        raise UsageError(f"--storage {given['storage']!r} is not one of {', '.join(STORAGE_TYPES)}")
    names = {field.name for field in fields(ServeConfig)}
    config = ServeConfig(
        **{k: v for k, v in given.items() if k in names}, watch_seconds=given["watch"]
    )
    keys = Keys.load(given["keys"])
    check_bind(config, keys)
    listener = listen(config)  # before the base is loaded: a port that is taken is known at once
    with listener:
        at = config.at(listener.getsockname()[1])
        if not given["quiet"]:
            console.note(f"loading {given['base']}")
        if given["ray"] is None:
            _serve_here(given, at, keys, listener)
        else:
            _serve_replicas(given, at, keys, listener)


def _serve_here(given: Mapping[str, Any], config: Any, keys: Any, listener: Any) -> None:
    import torch

    from bitfit.serve.run import open_service

    if given["threads"] is not None:
        torch.set_num_threads(given["threads"])
    service = open_service(
        given["base"], config, storage=given["storage"], max_resident=given["max_resident"],
        dtype=given["dtype"], device=given["device"], revision=given["revision"],
        trust_remote_code=given["trust_remote_code"],
    )  # fmt: skip
    _serve(given, service, config, keys, listener)


def _serve_replicas(given: Mapping[str, Any], config: Any, keys: Any, listener: Any) -> None:
    import os
    import signal

    from bitfit.serve.auth import VARIABLE
    from bitfit.serve.deploy import deployed, server_name
    from bitfit.serve.front import Front
    from bitfit.serve.replica import Job, versions

    os.environ.pop(VARIABLE, None)  # only this process needs the keys: its children have none
    count = given["replicas"] or REPLICAS
    job = Job(
        base=given["base"],
        # The front says when to look: all look at one time.
        config=replace(config, watch_seconds=0.0),
        storage=given["storage"], max_resident=given["max_resident"], dtype=given["dtype"],
        device=given["device"], revision=given["revision"],
        trust_remote_code=given["trust_remote_code"], versions=versions(),
        threads=given["threads"] or max(1, (os.cpu_count() or 1) // count),
    )  # fmt: skip
    # Until the server has a way of its own to stop: as Ctrl-C, so that the cluster ends too.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with deployed(job, count, given["ray"], server_name(config.port)) as links:
            _serve(given, Front(links, config), config, keys, listener, replicas=count)
    finally:
        signal.signal(signal.SIGTERM, before)


def _serve(
    given: Mapping[str, Any], service: Any, config: Any, keys: Any, listener: Any,
    replicas: int | None = None,
) -> None:  # fmt: skip
    import asyncio

    from bitfit.serve import logs
    from bitfit.serve.run import serve

    def ready() -> None:
        tasks, base = service.task_count, given["base"]
        if given["as_json"]:
            found = {"address": config.address, "base": base, "tasks": tasks}
            console.print_json(found if replicas is None else found | {"replicas": replicas})
            sys.stdout.flush()
        else:
            count = console.count(tasks, "task")
            by = "" if replicas is None else f" by {console.count(replicas, 'replica')}"
            console.say(f"{count} on {base}{by} at {config.address}/")
        if not given["quiet"]:
            for line in _remarks(config, len(keys), given["tasks"]):
                console.note(line)

    logs.configure()
    asyncio.run(serve(service, keys, listener, on_ready=ready))


def _check_replicas(given: Mapping[str, Any]) -> None:
    if given["ray"] is not None:
        from bitfit.cluster import check_address
        from bitfit.serve.deploy import check_options

        check_address(given["ray"])
        check_options(given["ray"], given["tasks"])
    elif given["replicas"] is not None:
        raise UsageError("--replicas goes with --ray; --ray local has them on this machine")


def _remarks(config: Any, keys: int, tasks: str | None) -> list[str]:
    from bitfit.serve.sources import is_url

    found = [f"the page is at {config.address}/, the API's description at /openapi.json"]
    if tasks is None:
        found.append("no --tasks: what is uploaded is gone when the server ends")
    elif is_url(tasks):
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
