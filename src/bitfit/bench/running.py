"""A server in a process of its own on this machine, and what that process takes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from bitfit.errors import BitfitError

STOP_SECONDS = 60.0


@dataclass(frozen=True)
class Running:
    """A server that takes requests."""

    port: int
    process: subprocess.Popen[str]
    log: Path
    """What it wrote to standard error."""

    def cpu_seconds(self) -> float | None:
        """Return the processor's time that it has taken; None: not known here (Linux only)."""
        return cpu_seconds(self.process.pid)


@contextmanager
def running(base: str, folder: str | Path, *options: str) -> Iterator[Running]:
    """Start ``bitfit serve`` with the tasks in ``folder`` on a free port; at the end it is stopped.

    Args:
        base: as ``--base`` takes it.
        folder: as ``--tasks`` takes it.
        options: more of the command's.

    Raises:
        BitfitError: it did not start; the message has the end of what it said.
    """
    command = [sys.executable, "-m", "bitfit", "serve", "--base", base, "--tasks", str(folder),
               "--port", "0", "--json", "--quiet", *options]  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "log"
        with (
            log.open("w", encoding="utf-8") as errors,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
            ) as process,
        ):
            try:
                yield Running(_port(process, log), process, log)
            finally:
                stop(process)


def stop(process: subprocess.Popen[str]) -> int:
    """Ask a process to end, end it where it does not, and return its exit status."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _port(process: subprocess.Popen[str], log: Path) -> int:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        process.wait()
        raise BitfitError(f"the server did not start: {last_lines(log)}")
    port: int | None = urlsplit(json.loads(line)["address"]).port
    assert port is not None
    return port


def last_lines(log: Path) -> str:
    """Return the end of what a process said, on one line."""
    text = log.read_text(encoding="utf-8", errors="replace")
    return " ".join(text.split())[-600:] or "no message"


def cpu_seconds(process: int) -> float | None:
    """Return the processor's time of a process; None: not known here (Linux only)."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before may have blanks
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
