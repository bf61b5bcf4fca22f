"""What the commands share: where things are printed, tables, one line of JSON, and signals."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from bitfit.errors import BitfitError
from bitfit.jsonable import jsonable


@dataclass
class _State:
    debug: bool = False
    """Whether errors show their traceback."""


STATE = _State()
LAUNCHER_SECONDS = 5.0


def launched_count() -> int:
    """Return how many processes torchrun or accelerate's launcher has started; 1: none."""
    text = os.environ.get("WORLD_SIZE", "")
    return int(text) if text.isdecimal() else 1


def is_main() -> bool:
    """Whether this process speaks for all that a launcher has started."""
    return launched_count() <= 1 or os.environ.get("RANK", "0") == "0"


# What a terminal would obey: escape sequences in a task file or a text are shown, not run.
_CONTROLS = {i: "\ufffd" for i in (*range(32), *range(127, 160)) if chr(i) not in "\t\n"}


def printable(text: str) -> str:
    """Return ``text`` with each control character but tab and line feed replaced."""
    return text.translate(_CONTROLS)


def output() -> Console:
    """Return a console on standard output; without a terminal nothing is cut to 80 columns."""
    return _console(sys.stdout)


def messages() -> Console:
    """Return a console on standard error."""
    return _console(sys.stderr)


def _console(file: IO[str]) -> Console:
    width = None if file.isatty() else 200
    return Console(file=file, width=width, markup=False, highlight=False, emoji=False)


@contextmanager
def to_output() -> Iterator[None]:
    """Around what writes to standard output: a full disk there is a failure and no bug.

    Raises:
        BitfitError: it takes no more.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as problem:
        drop_output()
        raise BitfitError(f"standard output: {problem.strerror or problem}") from problem


def drop_output() -> None:
    """Let what is left in the buffer of standard output go nowhere, at the end of Python too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def error(message: str) -> None:
    """Print an error on standard error."""
    messages().print(Text.assemble(("error:", "bold red"), " ", printable(message)), soft_wrap=True)


def note(message: str) -> None:
    """Print a message on standard error; of several processes the main one does."""
    if is_main():
        messages().print(Text(printable(message)), soft_wrap=True)


def say(message: str, style: str = "") -> None:
    """Print a line of a result on standard output."""
    with to_output():
        output().print(Text(printable(message), style=style), soft_wrap=True)


def print_json(value: Any) -> None:
    """Print ``value`` on standard output as one line of JSON; what is not finite is null."""
    line = json.dumps(jsonable(value), allow_nan=False, ensure_ascii=False) + "\n"
    with to_output():
        sys.stdout.write(line)


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None
) -> None:
    """Print rows as a table; columns of numbers (named with a leading ``>``) stand right."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        right = column.startswith(">")
        table.add_column(Text(column.lstrip(">"), "bold"), justify="right" if right else "left")
    for row in rows:  # as Text: a user's "[red]" is text and no markup
        cells = (c if isinstance(c, Text) else Text(printable(str(c))) for c in row)
        table.add_row(*cells)
    if title is not None:
        say(title, "bold")
    _print(table)


def print_facts(title: str, facts: Mapping[str, Any]) -> None:
    """Print names with their values, those that are not None."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in facts.items():
        if value is not None:
            table.add_row(Text(f"  {key}", "dim"), Text(printable(str(value))))
    if title:
        say(title, "bold")
    if table.row_count:
        _print(table)


def _print(table: Table) -> None:
    console = output()
    with to_output():  # the end of a capture flushes too
        with console.capture() as captured:
            console.print(table)
        for line in captured.get().splitlines():  # without the blanks that fill the last column
            sys.stdout.write(f"{line.rstrip()}\n")


def number(value: float | None, digits: int = 4) -> str:
    """Return a score as a reader wants it; ``–`` where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def count(number_: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun: ``1 row``, ``1,200 rows``."""
    return f"{number_:,} {one if number_ == 1 else many or one + 's'}"


def size(count: float) -> str:
    """Return a number of bytes in a unit that suits it."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"


def duration(seconds: float) -> str:
    """Return seconds as ``42 s``, ``3 min 20 s`` or ``2 h 5 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    minutes, rest = divmod(total, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def progress(*more: TextColumn) -> Progress:
    """Return a progress bar on standard error; ``more`` columns stand before the time left."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        MofNCompleteColumn(),  # how many there are may not be known yet
        *more,
        TimeRemainingColumn(),
        console=messages(),
        transient=True,
    )


@contextmanager
def bar(quiet: bool, *more: TextColumn) -> Iterator[Progress | None]:
    """Return a context with a running progress bar; None where nobody would see it."""
    if quiet or not messages().is_terminal:
        yield None
        return
    with progress(*more) as shown:
        yield shown


@contextmanager
def working(quiet: bool, what: str) -> Iterator[Callable[[str], object]]:
    """Show on a terminal what is being done, where nobody knows how long it takes.

    Returns a context of the function that says what is done next.
    """
    if quiet or not messages().is_terminal:
        yield lambda what: None
        return
    with messages().status(what) as status:
        yield status.update


class Interruption:
    """Ctrl-C and SIGTERM while training: the first asks it to stop, the second ends at once.

    Before :attr:`running` there is nothing to save, and the first ends at once too. A launcher
    passes on what the terminal has sent already: for some seconds that is no second one.
    """

    def __init__(self) -> None:
        self.asked, self.running = False, False
        self.asked_at = 0.0

    def __enter__(self) -> Interruption:
        self._before = {
            s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number_, handler in self._before.items():
            signal.signal(number_, handler)

    def _on_signal(self, number_: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked and launched_count() > 1 and now - self.asked_at < LAUNCHER_SECONDS:
            return
        if self.asked or not self.running:
            raise KeyboardInterrupt
        self.asked, self.asked_at = True, now
        # Not print: the signal may have come in the middle of one.
        if is_main():
            os.write(2, b"\nstopping after this step and saving it; once more aborts at once\n")
