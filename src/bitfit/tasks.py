"""What a task is: its kind, its label names, how it is scored, and the tasks that are built in."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bitfit.errors import UnknownTask, UsageError

Kind = Literal["classification", "regression", "multilabel", "tokens", "span"]

DEFAULT_METRICS: dict[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "f1_macro"),
    "regression": ("spearman", "pearson"),
    "multilabel": ("f1_micro", "f1_macro", "subset_accuracy"),
    "tokens": ("accuracy",),
    "span": ("f1", "exact_match"),
}


@dataclass(frozen=True, slots=True)
class TextExample:
    """One text or pair of texts with its answer.

    ``label`` is a class index (classification), a float (regression), a tuple of class indices
    (multilabel, possibly empty), or None where the answer is not known (a test set).
    """

    text: str
    text_pair: str | None = None
    label: int | float | tuple[int, ...] | None = None
    id: str | None = None


@dataclass(frozen=True, slots=True)
class TokenExample:
    """One sentence split into words, with one class index per word (or None: not known)."""

    words: tuple[str, ...]
    labels: tuple[int, ...] | None = None
    id: str | None = None


@dataclass(frozen=True, slots=True)
class SpanExample:
    """A question and a context with its accepted answers, each ``(character offset, text)``."""

    question: str
    context: str
    answers: tuple[tuple[int, str], ...] | None = None
    id: str | None = None


Example = TextExample | TokenExample | SpanExample


def references(examples: Sequence[Example]) -> list[Any]:
    """Return the right answers, as :func:`bitfit.metrics.compute_metrics` takes them.

    A class index, a float, a tuple of class indices, one class per word, or the accepted answers;
    None where an answer is not known.
    """
    answers: list[Any] = []
    for example in examples:
        if isinstance(example, SpanExample):
            answers.append(example.answers)
        elif isinstance(example, TokenExample):
            answers.append(example.labels)
        else:
            answers.append(example.label)
    return answers


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is learned: kind, label names and metrics. No data, no path."""

    name: str
    """A short name, used in file names and on the command line."""
    kind: Kind
    """Which head, loss and metrics apply."""
    labels: tuple[str, ...] = ()
    """Label names in the order of the logits; empty for regression and span."""
    metrics: tuple[str, ...] = ()
    """Metrics to compute, the first is the headline; empty: the kind's defaults."""
    is_pair: bool = False
    """Whether an example has two texts."""

    def __post_init__(self) -> None:
        if not self.metrics:
            object.__setattr__(self, "metrics", DEFAULT_METRICS[self.kind])
        if self.kind in ("classification", "tokens") and len(self.labels) < 2:
            raise UsageError(
                f"task {self.name!r}: {self.kind} needs at least two labels, got {self.labels}"
            )
        if self.kind == "multilabel" and not self.labels:
            raise UsageError(f"task {self.name!r}: multilabel needs at least one label")
        if len(set(self.labels)) != len(self.labels):
            raise UsageError(f"task {self.name!r}: a label name occurs twice in {self.labels}")

    @property
    def metric(self) -> str:
        """The headline metric: the one that chooses the best epoch and rate."""
        return self.metrics[0]

    @property
    def num_outputs(self) -> int:
        """How many logits the head gives (per text, per token, or start and end)."""
        if self.kind == "regression":
            return 1
        return 2 if self.kind == "span" else len(self.labels)


@dataclass(frozen=True, kw_only=True)
class BuiltinTask:
    """A :class:`Task` that is known by name, with where its files lie and what they hold."""

    task: Task
    title: str
    """What a reader knows it by."""
    layout: Literal["glue", "squad", "conllu", "ptb"]
    """Which reader takes its files."""
    folder: str
    """The folder below the data directory."""
    train: str = "train.tsv"
    """File of the training split."""
    dev: str = "dev.tsv"
    """File of the development split (MNLI: the matched one)."""
    test: str = "test.tsv"
    """File of the test split (MNLI: the matched one)."""
    text: str = "sentence"
    """Column of the text."""
    text_pair: str | None = None
    """Column of the second text."""
    label: str = "label"
    """Column of the answer in train and dev."""
    submission: str = ""
    """File name that the GLUE server expects."""
    extra_splits: tuple[tuple[str, str, str], ...] = ()
    """More splits: (name, file, file name that the GLUE server expects)."""


def _glue(
    name: str,
    title: str,
    folder: str,
    labels: tuple[str, ...],
    metrics: tuple[str, ...],
    submission: str,
    *,
    text: str = "sentence1",
    text_pair: str | None = "sentence2",
    label: str = "label",
    kind: Kind = "classification",
) -> BuiltinTask:
    task = Task(name=name, kind=kind, labels=labels, metrics=metrics, is_pair=text_pair is not None)
    return BuiltinTask(
        task=task, title=title, layout="glue", folder=folder, submission=submission,
        text=text, text_pair=text_pair, label=label,
    )  # fmt: skip


_ENTAILMENT = ("entailment", "not_entailment")

# Labels as they stand in the official files; metrics as in the paper's Table 5, first the headline.
BUILTIN_TASKS: dict[str, BuiltinTask] = {
    b.task.name: b
    for b in (
        _glue("cola", "Corpus of Linguistic Acceptability", "CoLA", ("0", "1"),
              ("matthews", "accuracy"), "CoLA.tsv", text_pair=None, text="sentence"),
        _glue("sst2", "Stanford Sentiment Treebank", "SST-2", ("0", "1"),
              ("accuracy",), "SST-2.tsv", text_pair=None, text="sentence"),
        _glue("mrpc", "Microsoft Research Paraphrase Corpus", "MRPC", ("0", "1"),
              ("f1", "accuracy"), "MRPC.tsv", text="#1 String", text_pair="#2 String",
              label="Quality"),
        _glue("stsb", "Semantic Textual Similarity Benchmark", "STS-B", (),
              ("spearman", "pearson"), "STS-B.tsv", label="score", kind="regression"),
        _glue("qqp", "Quora Question Pairs", "QQP", ("0", "1"),
              ("f1", "accuracy"), "QQP.tsv", text="question1", text_pair="question2",
              label="is_duplicate"),
        BuiltinTask(
            task=Task(name="mnli", kind="classification", is_pair=True, metrics=("accuracy",),
                      labels=("contradiction", "entailment", "neutral")),
            title="Multi-Genre Natural Language Inference", layout="glue", folder="MNLI",
            dev="dev_matched.tsv", test="test_matched.tsv", text="sentence1",
            text_pair="sentence2", label="gold_label", submission="MNLI-m.tsv",
            extra_splits=(("dev_mismatched", "dev_mismatched.tsv", ""),
                          ("test_mismatched", "test_mismatched.tsv", "MNLI-mm.tsv")),
        ),
        _glue("qnli", "Question Natural Language Inference", "QNLI", _ENTAILMENT,
              ("accuracy",), "QNLI.tsv", text="question", text_pair="sentence"),
        _glue("rte", "Recognizing Textual Entailment", "RTE", _ENTAILMENT,
              ("accuracy",), "RTE.tsv"),
        _glue("wnli", "Winograd Natural Language Inference", "WNLI", ("0", "1"),
              ("accuracy",), "WNLI.tsv"),
        BuiltinTask(
            task=Task(name="squad", kind="span", is_pair=True),
            title="SQuAD v1.1 question answering", layout="squad", folder="squad",
            train="train-v1.1.json", dev="dev-v1.1.json", test="",
        ),
    )
}  # fmt: skip


def builtin_task(name: str) -> BuiltinTask:
    """Return the built-in task called ``name`` (case and dashes do not matter).

    Raises:
        UnknownTask: with the nearest names.
    """
    key = name.lower().replace("-", "").replace("_", "")
    if key in BUILTIN_TASKS:
        return BUILTIN_TASKS[key]
    near = difflib.get_close_matches(key, BUILTIN_TASKS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UnknownTask(
        f"unknown task {name!r}.{hint} Built in: {', '.join(sorted(BUILTIN_TASKS))}; "
        "for your own data leave --task out and name the columns."
    )
