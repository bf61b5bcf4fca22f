"""The commands put together, and what becomes of their errors."""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

import bitfit
from bitfit.cli import console, look, train, use
from bitfit.errors import BitfitError

INTERRUPTED = 130

app = typer.Typer(
    name="bitfit",
    help="Fine-tune text models by their biases, and use many such tasks on one base.",
    epilog="Start with 'bitfit demo', or 'bitfit train --data tickets.csv --text body "
    "--label intent'.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "train": train.train,
    "eval": use.evaluate,
    "predict": use.predict,
    "inspect": look.inspect,
    "diff": look.diff,
    "doctor": look.doctor,
    "tasks": look.tasks,
    "demo": look.demo,
}
for _name, _command in _COMMANDS.items():
    # A docstring's lines are joined to paragraphs, which the terminal breaks at its own width.
    _paragraphs = inspect.getdoc(_command) or ""
    _help = "\n\n".join(" ".join(part.split()) for part in _paragraphs.split("\n\n"))
    app.command(_name, help=_help)(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bitfit {bitfit.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command line, by default the process' own, and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    console.STATE.debug = False
    try:
        code = _invoke(arguments or ["--help"])
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        console.error("aborted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away, as `head` does. What is left in the buffer has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except BitfitError as error:
        _trace(error)
        if error.exit_code == INTERRUPTED:
            console.note(str(error))  # as was asked: no error
        else:
            console.error(str(error))
        return error.exit_code
    except Exception as error:
        if hasattr(error, "format_message"):  # of typer or click: the command line is wrong
            return _misuse(error)
        _trace(error)
        hint = "" if console.STATE.debug else " (this is a bug; --debug shows where)"
        console.error(f"{type(error).__name__}: {error}{hint}")
        return 1


def _invoke(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    code = command.main(arguments, prog_name="bitfit", standalone_mode=False)
    return code if isinstance(code, int) else 0


def _misuse(error: Exception) -> int:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "bitfit"
    message = error.format_message()  # type: ignore[attr-defined]
    console.error(f"{message.rstrip('.')}. See '{path} --help'.")
    return int(getattr(error, "exit_code", 2))


def _trace(error: BaseException) -> None:
    if console.STATE.debug:
        traceback.print_exception(error)
