"""infinity-emb, a well-known server of encoders, with one classifier of the same base."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import torch

from bitfit.base import find_base, quiet_transformers
from bitfit.bench.connection import json_bytes
from bitfit.bench.contenders import classifier
from bitfit.bench.running import Running, last_lines, stop
from bitfit.errors import BitfitError, UsageError

NAME = "classifier"
START_SECONDS = 600.0


@contextmanager
def infinity(command: Path, base: str, items: int) -> Iterator[Running]:
    """Start it on a free port, in fp32 on the CPU; at the end it is stopped.

    Args:
        command: its ``infinity_emb``, of an environment of its own.
        base: what its classifier is made of; the head has random weights.
        items: texts in one of its batches.

    Raises:
        UsageError: there is no such command.
        BitfitError: it did not start; the message has the end of what it said.
    """
    if not command.is_file():
        raise UsageError(
            f"--infinity {command}: no such file; expected the command infinity_emb, as "
            "ENV/bin/infinity_emb after ENV/bin/pip install 'infinity-emb[torch,server]'"
        )
    with tempfile.TemporaryDirectory() as place:
        folder, log = Path(place) / "model", Path(place) / "log"
        _save(base, folder)
        port = _free_port()
        words = [str(command), "v2", "--model-id", str(folder), "--served-model-name", NAME,
                 "--engine", "torch", "--device", "cpu", "--dtype", "float32",
                 "--batch-size", str(items), "--host", "127.0.0.1", "--port", str(port),
                 "--log-level", "warning"]  # fmt: skip
        threads = str(torch.get_num_threads())
        # It must not look for its model, nor tell anyone that it runs.
        more = {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1",
                "INFINITY_ANONYMOUS_USAGE_STATS": "0"}  # fmt: skip
        with (
            log.open("w", encoding="utf-8") as errors,
            subprocess.Popen(
                words, stdout=errors, stderr=errors, env=os.environ | more, text=True
            ) as process,
        ):
            try:
                _wait(process, port, log)
                yield Running(port, process, log)
            finally:
                stop(process)


def classify_bytes(texts: Sequence[str]) -> bytes:
    """Return its request to classify, as it goes over the wire."""
    return json_bytes("/classify", {"model": NAME, "input": list(texts)})


def version(command: Path) -> str | None:
    """Return its version; None: it is not to be found."""
    for path in command.parent.parent.glob("lib/python*/site-packages/infinity_emb-*.dist-info"):
        if found := re.search(r"infinity_emb-(.+)\.dist-info", path.name):
            return found[1]
    return None


def _save(base: str, folder: Path) -> None:
    from transformers import AutoTokenizer

    with quiet_transformers():
        model: Any = classifier(base, torch.device("cpu"))
        tokenizer: Any = AutoTokenizer.from_pretrained(find_base(base))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _wait(process: subprocess.Popen[str], port: int, log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while not _is_up(port):
        if process.poll() is not None or time.monotonic() > until:
            raise BitfitError(f"infinity did not start: {last_lines(log)}")
        time.sleep(0.5)


def _is_up(port: int) -> bool:
    with closing(HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False
