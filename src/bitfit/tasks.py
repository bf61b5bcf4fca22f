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


def contexts(examples: Sequence[Example]) -> list[str] | None:
    """Return the texts that answers stand in; None for examples of another kind."""
    texts = [example.context for example in examples if isinstance(example, SpanExample)]
    return texts or None


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
class ExtraSplit:
    """A split that a built-in task has beside train, dev and test."""

    name: str
    """What it is called: ``dev_mismatched``, ``test_mismatched``, ``test_diagnostic``."""
    files: tuple[str, ...]
    """Where it lies, from the task's folder: the first that is there is read."""
    submission: str = ""
    """File name that the GLUE server expects; empty: it asks for none."""


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
    open_labels: bool = False
    """Whether the data says what the labels are; those of ``task`` are then what is usual."""
    train: str = "train.tsv"
    """File of the training split (of the Penn Treebank its sections)."""
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
    extra_splits: tuple[ExtraSplit, ...] = ()
    """More splits than train, dev and test."""


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
# The 45 tags of the Penn Treebank (Marcus et al. 1993), sorted as the readers sort labels.
_PENN_TAGS = tuple(sorted((
    "CC CD DT EX FW IN JJ JJR JJS LS MD NN NNS NNP NNPS PDT POS PRP PRP$ RB RBR RBS RP SYM TO UH "
    "VB VBD VBG VBN VBP VBZ WDT WP WP$ WRB # $ . , : ( ) `` ''"
).split()))  # fmt: skip

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
            extra_splits=(
                ExtraSplit(name="dev_mismatched", files=("dev_mismatched.tsv",)),
                ExtraSplit(name="test_mismatched", files=("test_mismatched.tsv",),
                           submission="MNLI-mm.tsv"),
                # GLUE's diagnostic set: two download scripts, two places.
                ExtraSplit(name="test_diagnostic", submission="AX.tsv",
                           files=("../AX/AX.tsv", "../diagnostic/diagnostic.tsv")),
            ),
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
        BuiltinTask(
            task=Task(name="ptb", kind="tokens", labels=_PENN_TAGS), open_labels=True,
            title="Penn Treebank, part of speech", layout="ptb", folder="ptb",
            train="sections 00-18", dev="sections 19-21", test="sections 22-24",
        ),
        BuiltinTask(
            task=Task(name="ud_ewt", kind="tokens", labels=tuple(sorted(
                {*_PENN_TAGS, "-LRB-", "-RRB-", "ADD", "AFX", "GW", "HYPH", "NFP", "XX"}
                - {"#", "(", ")"}
            ))), open_labels=True,
            title="UD English Web Treebank, part of speech (XPOS)", layout="conllu",
            folder="ud_ewt", train="en_ewt-ud-train.conllu", dev="en_ewt-ud-dev.conllu",
            test="en_ewt-ud-test.conllu",
        ),
    )
}  # fmt: skip


def builtin_task(name: str) -> BuiltinTask:
    """Return the built-in task called ``name`` (case and dashes do not matter).

    Raises:
        UnknownTask: with the nearest names.
    """
    by_key = {known.replace("_", ""): task for known, task in BUILTIN_TASKS.items()}
    key = name.lower().replace("-", "").replace("_", "")
    if key in by_key:
        return by_key[key]
    near = difflib.get_close_matches(key, by_key, n=1)
    hint = f" Did you mean {by_key[near[0]].task.name!r}?" if near else ""
    raise UnknownTask(
        f"unknown task {name!r}.{hint} Built in: {', '.join(sorted(BUILTIN_TASKS))}; "
        "for your own data leave --task out and name the columns."
    )
