"""Behind ``bitfit predict``: where texts come from, and how answers are written."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from rich.progress import Progress, TextColumn

from bitfit.cli import console
from bitfit.cli.scoring import open_model
from bitfit.data import DataConfig, iter_texts, read_dataset
from bitfit.errors import DataError, UsageError
from bitfit.experiments.submission import (
    HEADER,
    answer_lines,
    match_files,
    read_tests,
    server_files,
    write_submission,
)
from bitfit.jsonable import jsonable
from bitfit.model import Model, Prediction
from bitfit.storage import whole_file
from bitfit.taskfile import TaskFile
from bitfit.tasks import TextExample

FORMATS = ("text", "jsonl", "glue", "squad")
OFFICIAL = ("glue", "squad")
"""Formats of a benchmark: they answer a split of its files and take no texts."""
CHUNK = 256
BAR_AFTER_SECONDS = 2.0
# Inputs of these are tables; of all others a row is a line.
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


def predict(given: Mapping[str, Any]) -> None:
    """Answer the texts that the options name, and write the answers as they come."""
    style = "jsonl" if given["as_json"] else given["format"]
    if style not in FORMATS:
        raise UsageError(f"--format {style!r} is not one of {', '.join(FORMATS)}")
    paths, texts = _files_and_texts(given["arguments"])
    files = [TaskFile.load(path) for path in paths]
    _check(given, style, files, texts)
    _check_output(given["output"], paths, given["input"])
    names = _names(paths, files)
    if not given["quiet"]:
        _tell_names(paths, files, names)
        _tell_files_among(texts, given["input"])
    source = _Source(texts, given, dict(zip(names, files, strict=True)))
    if style not in OFFICIAL:
        source.begin()  # what is wrong with the input is said before the base is loaded
    model = open_model(
        files, given["base"], dtype=given["dtype"], device=given["device"],
        threads=given["threads"], names=names, trust_remote_code=given["trust_remote_code"],
    )  # fmt: skip
    if style == "squad":
        return _answer_squad(model, files[0], given)
    if style == "glue":
        several = len(files) > 1
        return _submit_all(model, paths, given) if several else _submit(model, files[0], given)
    chunk = CHUNK
    if source.is_stdin and sys.stdin.isatty():
        chunk = 1
        if not given["quiet"]:
            console.note("type a text and press Enter; Ctrl-D ends")
    with ExitStack() as stack:
        out = stack.enter_context(_sink(given["output"]))
        count = stack.enter_context(_Count(given["quiet"] or (out is sys.stdout and out.isatty())))
        goes = console.to_output if given["output"] is None else nullcontext
        for part in _chunks(source, chunk):
            for example, answers in _answer(model, part, given["min_confidence"]):
                with goes():
                    out.write(_line(example, answers, style))
            with goes():
                out.flush()
            count.add(len(part))


def _files_and_texts(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Tell task files from texts: what ends in .safetensors is a file."""
    paths = [Path(a) for a in arguments if a.endswith(".safetensors")]
    if not paths:
        raise UsageError(
            f"no task file among the arguments: {arguments[0]!r} does not end in .safetensors"
        )
    return paths, [a for a in arguments if not a.endswith(".safetensors")]


def _names(paths: Sequence[Path], files: Sequence[TaskFile]) -> list[str]:
    """Return the tasks' names, of those that share one the names of their files."""
    for i, path in enumerate(paths):
        if any(_is_same(path, earlier) for earlier in paths[:i]):
            raise UsageError(f"{path} is named twice")
    names = [file.task.name for file in files]
    if len(set(names)) == len(names):
        return names
    stems = [path.name.removesuffix(".safetensors").removesuffix(".bitfit") for path in paths]
    return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]


def _tell_names(paths: Sequence[Path], files: Sequence[TaskFile], names: Sequence[str]) -> None:
    """Say which files have tasks of one name, and what they are called instead."""
    by_task: dict[str, list[int]] = {}
    for i, file in enumerate(files):
        by_task.setdefault(file.task.name, []).append(i)
    for task, those in by_task.items():
        if len(those) > 1:
            console.note(
                f"{' and '.join(str(paths[i]) for i in those)} have one task name, {task!r}: the "
                f"answers go by their files, {' and '.join(names[i] for i in those)}"
            )


def _tell_files_among(texts: Sequence[str], input: Path | None) -> None:
    """Say of a text that is also a file's name how the file would be read."""
    if input is not None:
        return
    for text in texts:
        try:
            is_file = Path(text).is_file()
        except (OSError, ValueError):  # a text too long for a name
            continue
        if is_file:
            console.note(
                f"{text!r} is answered as a text; a file of that name exists; "
                f"--input {shlex.quote(text)} reads it"
            )


def _is_same(a: Path, b: Path) -> bool:
    """Whether two paths lead to one file, through links too."""
    if os.path.realpath(a) == os.path.realpath(b):
        return True
    try:
        return a.samefile(b)
    except OSError:
        return False


def _check_output(output: Path | None, paths: Sequence[Path], input: Path | None) -> None:
    """Refuse to write over what is read, and over any task file."""
    if output is None:
        return
    what = None
    if any(_is_same(output, path) for path in paths):
        what = "is one of the task files"
    elif input is not None and _is_same(output, input):
        what = "is the file that --input reads"
    elif output.suffix == ".safetensors" and output.is_file():
        what = "is there and ends in .safetensors, as task files do"
    if what is not None:
        raise UsageError(f"--output {output} {what}: name another file, such as answers.txt")


def _check(
    given: Mapping[str, Any], style: str, files: Sequence[TaskFile], texts: Sequence[str]
) -> None:
    """Refuse what does not go together before the base is loaded."""
    if not 0 <= given["min_confidence"] <= 1:
        raise UsageError(f"--min-confidence is {given['min_confidence']}; expected 0 to 1")
    if texts and given["input"] is not None:
        raise UsageError(f"texts as arguments ({texts[0][:40]!r}) and --input: give one of them")
    if style not in OFFICIAL:
        if given["data"] is not None:
            raise UsageError("--data goes with --format glue and squad; --input takes texts")
        return
    if texts or given["input"] is not None or given["min_confidence"]:
        raise UsageError(f"--format {style} takes task files and --data, and always answers")
    if given["data"] is None:
        raise UsageError(f"--format {style} answers a split: name its folder with --data")
    if style == "glue":
        return _check_glue(files, given["output"])
    if len(files) != 1 or files[0].task.kind != "span":
        raise UsageError("--format squad takes one task file, of the kind span")


def _check_glue(files: Sequence[TaskFile], output: Path | None) -> None:
    """Refuse tasks that are none of GLUE's, and an output that cannot hold the files."""
    for file in files:
        if file.builtin is None or not file.builtin.submission:
            raise UsageError(f"task {file.task.name!r} is none of GLUE's: use --format jsonl")
    names = [name for file in files if file.builtin for name in server_files(file.builtin)]
    if len(names) > 1 and (output is None or output.suffix in (".tsv", ".zip")):
        raise UsageError(f"there are {len(names)} test files to answer: --output names a folder")


class _Source:
    """The texts to answer, each checked to be a pair where a task takes pairs, and only there."""

    def __init__(
        self, texts: Sequence[str], given: Mapping[str, Any], tasks: Mapping[str, TaskFile]
    ) -> None:
        self.texts, self.given, self.tasks = texts, given, tasks
        self.is_stdin = not texts and given["input"] is None
        self.rows = self._rows()

    def begin(self) -> None:
        """Read the first text, but not of standard input, which may be a keyboard.

        Raises:
            UsageError: standard input is to be read, and there is none.
            DataError: a file without texts.
        """
        if self.is_stdin:
            if sys.stdin is None:  # closed by who started this process
                raise UsageError("standard input is closed: give texts as arguments, or --input")
            return
        first = next(self.rows, None)
        if first is None:
            is_headed = self.given["input"].suffix.lower() in (".csv", ".tsv")
            what = "no rows below the header" if is_headed else "no rows"
            raise DataError(f"{self.given['input']}: {what}; expected at least one to answer")
        self.rows = itertools.chain([first], self.rows)

    def __iter__(self) -> Iterator[TextExample]:
        return self.rows

    def _rows(self) -> Iterator[TextExample]:
        path: Path | None = self.given["input"]
        where = None
        if self.texts:
            examples = iter([_one_text(text) for text in self.texts])
        elif path is None:
            where = "standard input"
            examples = iter_texts(getattr(sys.stdin, "buffer", sys.stdin))
        else:
            if path.is_dir():
                raise UsageError(f"--input {path} is a folder; expected a file of texts")
            where = None if path.suffix.lower() in TABLES else str(path)
            examples = iter_texts(path, "auto", self.given["text"], self.given["text_pair"])
        for number, example in enumerate(examples, 1):
            problem = self._problem(example, is_line=path is None or where is not None)
            if problem is not None and where is not None:
                raise DataError(f"{where}:{number}: {problem}")
            if problem is not None:
                raise UsageError(problem)
            yield example

    def _problem(self, example: TextExample, *, is_line: bool) -> str | None:
        is_pair = example.text_pair is not None
        for name, file in self.tasks.items():
            if file.task.is_pair and not is_pair:
                return (
                    f"task {name!r} takes pairs, but {example.text[:40]!r} is one text: put a tab "
                    "between the two, as in $'one\\tother', or name --text-pair with --input"
                )
            if is_pair and not file.task.is_pair:
                cause = "a tab separates" if is_line else f"{example.text[:40]!r} is the first of"
                return f"{cause} two texts, but task {name!r} takes one"
        return None


def _one_text(text: str) -> TextExample:
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UsageError(f"the text {text!r} is not UTF-8")
    first, tab, second = text.partition("\t")
    return TextExample(first, second if tab else None)


def _chunks(examples: Iterable[TextExample], size: int) -> Iterator[list[TextExample]]:
    rows = iter(examples)
    while part := list(itertools.islice(rows, size)):
        yield part


def _answer(
    model: Model, part: Sequence[TextExample], min_confidence: float
) -> Iterator[tuple[TextExample, list[Prediction]]]:
    """Yield each text with what every task says of it; all of them go in one mixed call."""
    names = list(model.tasks)
    inputs = [example for example in part for _ in names]
    found = model.predict(inputs, names * len(part), min_confidence=min_confidence)
    for i, example in enumerate(part):
        yield example, found[i * len(names) : (i + 1) * len(names)]


def _line(example: TextExample, answers: Sequence[Prediction], style: str) -> str:
    """Return the answers to one text as lines."""
    if style == "jsonl":
        source = {"text": example.text, "text_pair": example.text_pair, "id": example.id}
        known = {key: value for key, value in source.items() if value is not None}
        lines = [
            json.dumps(jsonable(known | answer.to_json()), ensure_ascii=False) for answer in answers
        ]
        return "".join(f"{line}\n" for line in lines)
    text = " | ".join(" ".join(t.split()) for t in (example.text, example.text_pair or "") if t)
    if len(answers) == 1:
        answer = answers[0]
        fields = [answer.text, *(f"{c:.3f}" for c in [answer.confidence] if c is not None)]
    else:
        fields = [
            f"{a.task}={a.text}" + (f" ({a.confidence:.3f})" if a.confidence is not None else "")
            for a in answers
        ]
    line = "\t".join([*(" ".join(field.split()) for field in fields), text])
    return f"{console.printable(line)}\n"


def _sink(path: Path | None) -> Any:
    return nullcontext(sys.stdout) if path is None else whole_file(path, encoding="utf-8")


class _Count:
    """Counts texts on standard error, once it has taken more than two seconds."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet or not console.messages().is_terminal
        self.began, self.done = time.perf_counter(), 0
        self.bar: Progress | None = None

    def __enter__(self) -> _Count:
        return self

    def add(self, count: int) -> None:
        """``count`` more texts are answered."""
        self.done += count
        seconds = time.perf_counter() - self.began
        if self.quiet or seconds < BAR_AFTER_SECONDS:
            return
        if self.bar is None:
            column = TextColumn("texts: {task.completed:.0f}, {task.fields[speed]}", markup=False)
            self.bar = Progress(column, console=console.messages(), transient=True)
            self.bar.start()
            self.row = self.bar.add_task("", total=None, speed="")
        self.bar.update(self.row, completed=self.done, speed=f"{self.done / seconds:,.0f} a second")

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()


# ------------------------------------------------------------------ the GLUE server's format


def _submit(model: Model, file: TaskFile, given: Mapping[str, Any]) -> None:
    """Answer the test split, or MNLI's, in the files that the GLUE server takes."""
    builtin = file.builtin
    assert builtin is not None  # _check has seen to it
    output: Path | None = given["output"]
    single = output is not None and output.suffix == ".tsv"
    names = server_files(builtin)
    tests, sources = read_tests(builtin, given["data"])
    for split, examples in tests.items():
        path = output if single or output is None else output / names[split]
        if path is not None and any(_is_same(path, Path(s)) for s in sources[split]):
            raise UsageError(f"--output {path} is the test file: name another place")
        guard = console.to_output() if path is None else nullcontext()
        with guard, _sink(path) as out, _Count(given["quiet"]) as count:
            out.write(HEADER)
            for lines in answer_lines(model, examples):
                out.write("".join(lines))
                count.add(len(lines))
        if path is not None and not given["quiet"]:
            console.note(f"wrote {path}: {console.count(len(examples), 'answer')}")


def _submit_all(model: Model, paths: Sequence[Path], given: Mapping[str, Any]) -> None:
    """Answer the test splits of several tasks, and pack what the GLUE server takes."""
    with _Count(given["quiet"]) as count:
        found = write_submission(
            model, match_files(paths), given["data"], given["output"], partial=True,
            on_answers=count.add,
        )  # fmt: skip
    if given["quiet"]:
        return
    for file in found.files:
        by = f"all {file.constant!r}, the majority of train" if file.source is None else file.source
        console.note(f"wrote {file.name}: {console.count(file.rows, 'answer')}, {by}")
    for name, why in found.left_out.items():
        console.note(f"without {name}: {why}")
    console.note(f"wrote {found.archive}")


# ------------------------------------------------------------------ SQuAD's format


def _answer_squad(model: Model, file: TaskFile, given: Mapping[str, Any]) -> None:
    """Answer a file of questions, or a folder's dev split, as the official script reads answers."""
    # Of a file that is called a test the answers may be missing.
    split = "dev" if Path(given["data"]).is_dir() else "test"
    dataset = read_dataset(
        DataConfig(
            data=given["data"],
            task=file.builtin.task.name if file.builtin else None,
            kind="span",
            splits=(split,),
            dev_fraction=0.0,
        )
    )
    output: Path | None = given["output"]
    if output is not None and any(_is_same(output, Path(s)) for s in dataset.sources[split]):
        raise UsageError(f"--output {output} holds the questions: name another place")
    found: dict[str, str] = {}
    examples = dataset.splits[split]
    with _Count(given["quiet"]) as count:
        for begin in range(0, len(examples), CHUNK):
            part = examples[begin : begin + CHUNK]
            for example, answer in zip(part, model.predict(part), strict=True):
                if example.id is None or example.id in found:
                    fault = "has no id" if example.id is None else f"{example.id} is there twice"
                    raise DataError(f"{given['data']}: a question {fault}; answers go by ids")
                found[example.id] = answer.text
            count.add(len(part))
    guard = console.to_output() if output is None else nullcontext()
    with guard, _sink(output) as out:
        out.write(json.dumps(found, ensure_ascii=False) + "\n")
    if output is not None and not given["quiet"]:
        console.note(f"wrote {output}: {console.count(len(found), 'answer')}")
