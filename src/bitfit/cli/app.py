"""The commands put together, and what becomes of their errors."""

from __future__ import annotations

import inspect
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Annotated, Any

import typer

import bitfit
from bitfit.cli import bench, console, experiments, look, serve, train, use
from bitfit.errors import BitfitError, UsageError

INTERRUPTED = 130
BROKEN_PIPE = 141

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
    "serve": serve.serve,
    "inspect": look.inspect,
    "diff": look.diff,
    "doctor": look.doctor,
    "tasks": look.tasks,
    "demo": look.demo,
    "sweep": experiments.sweep,
    "reproduce": experiments.reproduce,
    "report": experiments.report,
}
_BENCH_COMMANDS: dict[str, Callable[..., None]] = {
    "train": bench.train,
    "lanes": bench.lanes,
    "serve": bench.serve,
}


def _help(command: Callable[..., None]) -> str:
    # A docstring's lines are joined to paragraphs, which the terminal breaks at its own width.
    paragraphs = inspect.getdoc(command) or ""
    return "\n\n".join(" ".join(part.split()) for part in paragraphs.split("\n\n"))


for _name, _command in _COMMANDS.items():
    app.command(_name, help=_help(_command))(_command)
_bench = typer.Typer(rich_markup_mode="rich", no_args_is_help=False)
for _name, _command in _BENCH_COMMANDS.items():
    _bench.command(_name, help=_help(_command))(_command)


@_bench.callback(invoke_without_command=True)
def _show_bench(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.add_typer(
    _bench, name="bench", rich_help_panel="Measuring",
    help="Measure this machine's speed beside stock parts.",
)  # fmt: skip


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
    arguments = _with_ray_address(list(sys.argv[1:] if argv is None else argv))
    console.STATE.debug = False
    if sys.stdout is None:  # as after `>&-`
        console.error("standard output is closed")
        return 1
    try:
        code = _invoke(arguments or ["--help"])
        with console.to_output():
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        console.error("aborted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader went away, as `head` does
        console.drop_output()
        return BROKEN_PIPE
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich turns one into an exit with 1
            console.drop_output()
            return BROKEN_PIPE
        raise
    except BitfitError as error:
        _trace(error)
        if error.exit_code == INTERRUPTED:
            console.note(str(error))  # as was asked: no error
        else:
            console.error(_with_option(error, arguments))
        return error.exit_code
    except Exception as error:
        if hasattr(error, "format_message"):  # of typer or click: the command line is wrong
            return _misuse(error, arguments)
        _trace(error)
        hint = "" if console.STATE.debug else " (this is a bug; --debug shows where)"
        console.error(f"{type(error).__name__}: {error}{hint}")
        return 1


def _with_ray_address(arguments: list[str]) -> list[str]:
    """Return the arguments with ``--ray`` alone as ``--ray auto``: typer's options need a value."""
    if arguments[:1] not in (["sweep"], ["reproduce"], ["serve"]) or "--" in arguments:
        return arguments
    found = []
    for word, following in zip(arguments, [*arguments[1:], "-"], strict=True):
        found += ["--ray", "auto"] if word == "--ray" and following.startswith("-") else [word]
    return found


def _invoke(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    _hide_type_of_flags(command)
    is_help = not {"--help", "--version"}.isdisjoint(arguments)
    try:  # not command.main, which makes an exit with 1 of a broken pipe
        with (
            console.to_output() if is_help else nullcontext(),
            command.make_context("bitfit", arguments) as context,
        ):
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    return 0


def _hide_type_of_flags(command: Any) -> None:
    """Leave ``<bool>`` out of the help: a flag takes no value."""
    for option in command.get_params(typer.Context(command)):
        if getattr(option, "is_flag", False):
            option.metavar = ""
    for each in getattr(command, "commands", {}).values():
        _hide_type_of_flags(each)


def _with_option(error: BitfitError, arguments: Sequence[str]) -> str:
    """Return an error's message with the name of the option that was typed, not the library's."""
    message = str(error)
    if not isinstance(error, UsageError) or error.field is None:
        return message
    option = _options_of(arguments).get(error.field, error.field)
    return re.sub(rf"\b{re.escape(error.field)}\b", option, message, count=1)


def _options_of(arguments: Sequence[str]) -> dict[str, str]:
    """Return the options of the command that was typed, by the names of its parameters."""
    command: Any = typer.main.get_command(app)
    words = iter(arguments)
    while (commands := getattr(command, "commands", None)) is not None:
        command = next((commands[word] for word in words if word in commands), None)
    options = getattr(command, "params", ())
    return {each.name: each.opts[0] for each in options if each.opts[0].startswith("-")}


def _misuse(error: Exception, arguments: Sequence[str]) -> int:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "bitfit"
    message: str = error.format_message()  # type: ignore[attr-defined]
    value = _value_given(arguments, getattr(getattr(error, "param", None), "opts", ()))
    if value is not None and repr(value) not in message:
        message = message.replace("Invalid value for", f"Invalid value {value!r} for", 1)
    end = "" if message.endswith("?") else "."
    console.error(f"{message.rstrip('.')}{end} See '{path} --help'.")
    return int(getattr(error, "exit_code", 2))


def _value_given(arguments: Sequence[str], names: Sequence[str]) -> str | None:
    """Return what the command line has for an option."""
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in names and equals:
            return value
        if name in names and i + 1 < len(arguments):
            return arguments[i + 1]
    return None


def _trace(error: BaseException) -> None:
    if console.STATE.debug:
        traceback.print_exception(error)
