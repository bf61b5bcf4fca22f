"""Behind ``bitfit predict``: where texts come from, and how answers are written."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from rich.progress import Progress, TextColumn

from bitfit.cli import console
from bitfit.cli.scoring import builtin_of, open_model
from bitfit.data import DataConfig, iter_texts, read_dataset
from bitfit.errors import DataError, UsageError
from bitfit.model import Model, Prediction
from bitfit.taskfile import TaskFile
from bitfit.tasks import TextExample

FORMATS = ("text", "jsonl", "glue")
CHUNK = 256
BAR_AFTER_SECONDS = 2.0


def predict(given: Mapping[str, Any]) -> None:
    """Answer the texts that the options name, and write the answers as they come."""
    style = "jsonl" if given["as_json"] else given["format"]
    if style not in FORMATS:
        raise UsageError(f"--format {style!r} is not one of {', '.join(FORMATS)}")
    paths, texts = _files_and_texts(given["arguments"])
    files = [TaskFile.load(path) for path in paths]
    _check(given, style, files, texts)
    model = open_model(
        files, given["base"], dtype=given["dtype"], device=given["device"],
        threads=given["threads"], names=_names(paths, files),
    )  # fmt: skip
    if style == "glue":
        return _submit(model, files[0], given)
    chunk = CHUNK
    if not texts and given["input"] is None and sys.stdin.isatty():
        chunk = 1
        console.note("type a text and press Enter; Ctrl-D ends")
    examples = _texts(texts, given)
    with ExitStack() as stack:
        out = stack.enter_context(_sink(given["output"]))
        count = stack.enter_context(_Count(given["quiet"] or (out is sys.stdout and out.isatty())))
        for part in _chunks(examples, chunk):
            for example, answers in _answer(model, part, given["min_confidence"]):
                out.write(_line(example, answers, style))
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
    names = [file.task.name for file in files]
    if len(set(names)) == len(names):
        return names
    stems = [path.name.removesuffix(".safetensors").removesuffix(".bitfit") for path in paths]
    return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]


def _check(
    given: Mapping[str, Any], style: str, files: Sequence[TaskFile], texts: Sequence[str]
) -> None:
    """Refuse what does not go together before the base is loaded."""
    if not 0 <= given["min_confidence"] <= 1:
        raise UsageError(f"--min-confidence is {given['min_confidence']}; expected 0 to 1")
    if texts and given["input"] is not None:
        raise UsageError(f"texts as arguments ({texts[0][:40]!r}) and --input: give one of them")
    if style != "glue":
        if given["data"] is not None:
            raise UsageError("--data goes with --format glue; --input takes a file of texts")
        return
    if len(files) != 1 or texts or given["input"] is not None or given["min_confidence"]:
        raise UsageError("--format glue takes one task file and --data, and always gives a label")
    builtin = builtin_of(files[0])
    if builtin is None or not builtin.submission:
        raise UsageError(f"task {files[0].task.name!r} is none of GLUE's: use --format jsonl")
    if given["data"] is None:
        raise UsageError("--format glue answers a test split: name its folder with --data")
    if builtin.extra_splits and given["output"] is None:
        raise UsageError(f"{builtin.task.name} has two test files: name a folder with --output")


def _texts(texts: Sequence[str], given: Mapping[str, Any]) -> Iterator[TextExample]:
    if texts:
        return iter([_one_text(text) for text in texts])
    if given["input"] is not None:
        return iter_texts(given["input"], "auto", given["text"], given["text_pair"])
    return iter_texts(getattr(sys.stdin, "buffer", sys.stdin))


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
    for name, file in model.tasks.items():
        for example in part:
            if file.task.is_pair and example.text_pair is None:
                raise UsageError(
                    f"task {name!r} takes pairs, but {example.text[:40]!r} is one text: put a tab "
                    "between the two, as in $'one\\tother', or name --text-pair with --input"
                )
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
            json.dumps(console.finite(known | answer.to_json()), ensure_ascii=False)
            for answer in answers
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
    return nullcontext(sys.stdout) if path is None else console.whole_file(path)


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
            column = TextColumn("{task.completed:.0f} texts, {task.fields[speed]}", markup=False)
            self.bar = Progress(column, console=console.messages(), transient=True)
            self.bar.start()
            self.row = self.bar.add_task("", total=None, speed="")
        self.bar.update(self.row, completed=self.done, speed=f"{self.done / seconds:,.0f} a second")

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()


# ------------------------------------------------------------------ the GLUE server's format


def _submit(model: Model, file: TaskFile, given: Mapping[str, Any]) -> None:
    """Answer the test split, or MNLI's two, in the files that the GLUE server takes."""
    builtin = builtin_of(file)
    assert builtin is not None  # _check has seen to it
    extra = {split: name for split, _, name in builtin.extra_splits if name}
    names = {"test": builtin.submission, **extra}
    dataset = read_dataset(
        DataConfig(data=given["data"], task=builtin.task.name, splits=tuple(names))
    )
    if dataset.skipped:
        raise DataError(
            f"{dataset.skipped[0]}; the server takes an answer to every row: fetch the file again"
        )
    output: Path | None = given["output"]
    if output is not None and output.suffix == ".tsv" and len(names) > 1:
        raise UsageError(f"{builtin.task.name} has two test files: --output names a folder")
    for split, name in names.items():
        examples: Any = dataset.splits[split]
        single = output is not None and output.suffix == ".tsv"
        path = output if single or output is None else output / name
        with _sink(path) as out, _Count(given["quiet"]) as count:
            out.write("index\tprediction\n")
            for begin in range(0, len(examples), CHUNK):
                part = examples[begin : begin + CHUNK]
                for i, answer in enumerate(model.predict(part), begin):
                    out.write(f"{examples[i].id or i}\t{_official(answer)}\n")
                count.add(len(part))
        if path is not None and not given["quiet"]:
            console.note(f"wrote {path}: {len(examples):,} answers")


def _official(answer: Prediction) -> str:
    """Return an answer as the server takes it: a label of the official files, or 0 to 5."""
    if answer.value is not None:
        return f"{min(max(answer.value, 0.0), 5.0):.3f}"
    assert answer.label is not None
    return answer.label
