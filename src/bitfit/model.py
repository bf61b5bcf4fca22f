"""Use task files: many tasks on one base, mixed in a batch, added and removed at any time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitfit.bank import Bank
from bitfit.batches import Feature, make_features
from bitfit.calibration import probabilities
from bitfit.encoder import Encoder, open_encoder
from bitfit.errors import UsageError
from bitfit.heads import best_span, read_predictions
from bitfit.held import FittingTask, HeldTask, HeldTasks
from bitfit.inference import Logits
from bitfit.metrics import compute_metrics
from bitfit.rounding import StorageType
from bitfit.taskfile import TaskFile
from bitfit.tasks import Example, SpanExample, Task, TextExample, TokenExample, references
from bitfit.words import find_words

Text = str | tuple[str, str] | Example


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one task says of one input."""

    task: str
    """The name the task goes by in its model."""
    label: str | None = None
    """classification: the best label; None where the confidence was below the limit."""
    confidence: float | None = None
    """classification: calibrated probability of the best label, 0 to 1."""
    scores: dict[str, float] | None = None
    """Calibrated probability of each label (classification, multilabel)."""
    labels: tuple[str, ...] | None = None
    """multilabel: the labels above one half; tokens: one per word, "" where it was cut.

    Labels below the limit are left out, of tokens "" is in their place.
    """
    words: tuple[str, ...] | None = None
    """tokens: the words that were asked; of a text those of :func:`bitfit.words.find_words`."""
    confidences: tuple[float, ...] | None = None
    """tokens: calibrated probability of each word's best label, 0 where the word was cut."""
    value: float | None = None
    """regression: the number."""
    answer: str | None = None
    """span: the answer, a piece of the context."""
    start: int | None = None
    """span: where the answer begins in the context, in characters."""

    @property
    def text(self) -> str:
        """The prediction in a word, as the command line prints it; of tokens ``word/TAG ...``."""
        if self.words is not None and self.labels is not None:
            pairs = zip(self.words, self.labels, strict=True)
            return " ".join(f"{word}/{label or '?'}" for word, label in pairs)
        if self.labels is not None:
            return " ".join(label or "?" for label in self.labels)
        if self.value is not None:
            return f"{self.value:.3f}"
        return self.answer if self.answer is not None else (self.label or "?")

    def to_json(self) -> dict[str, Any]:
        """Return the fields that apply, with ``abstained`` where no label was sure enough."""
        found = {key: value for key, value in vars(self).items() if value is not None}
        if self.confidence is not None and self.label is None:
            found |= {"label": None, "abstained": True}
        return found


class Model:
    """Tasks on one base. One forward pass takes a batch that mixes them in any way.

    Args:
        encoder: the base, from :func:`bitfit.open_encoder`.
        storage: how biases are kept in memory: ``fp32``, ``fp16``, ``bf16`` or ``int8``.

    Example:
        >>> model = bitfit.load(["intent.bitfit.safetensors", "mood.bitfit.safetensors"])
        ... # doctest: +SKIP
        >>> model.predict(["Where is my order?"], task="intent")  # doctest: +SKIP
    """

    def __init__(self, encoder: Encoder, storage: StorageType = "fp32") -> None:
        self.encoder = encoder
        self._held = HeldTasks(encoder, storage)
        self._tasks: dict[str, HeldTask] = {}

    @property
    def bank(self) -> Bank:
        """The rows, by the names of the tasks."""
        return self._held.bank

    @property
    def tasks(self) -> dict[str, TaskFile]:
        """The task files by name, put together from what is kept of them."""
        return {name: self.file(name) for name in self._tasks}

    def file(self, name: str | None = None) -> TaskFile:
        """Return the file of the task called ``name``; None means the only one.

        Its biases are as they are kept: rounded where ``storage`` is not fp32.

        Raises:
            UnknownTask: there is no such task.
            UsageError: None, and there are several.
        """
        return self._held.restore(self._tasks[self._name(name)])

    def add(self, file: TaskFile | str | Path, name: str | None = None) -> str:
        """Add a task under ``name`` (by default its own) and return that name.

        Raises:
            WrongBase: the file was made for another base; names the first tensor that differs.
            WrongTokenizer: it was made with another tokenizer.
            TaskFileError: the file is damaged, or does not fit this base.
            UsageError: the name is taken.
        """
        file = file if isinstance(file, TaskFile) else TaskFile.load(file)
        name = name or file.task.name
        self._tasks[name] = self._held.hold(name, self._held.fit(file), file.bias)
        return name

    def remove(self, name: str) -> None:
        """Take a task out; the base is as it was before it came.

        Raises:
            UnknownTask: there is no such task.
        """
        self._held.drop(self._tasks[self._name(name)])
        del self._tasks[name]

    def task(self, name: str | None = None) -> Task:
        """Return what the task called ``name`` is; None means the only one.

        Raises:
            UnknownTask: there is no such task.
            UsageError: None, and there are several.
        """
        return self._tasks[self._name(name)].fitting.task

    def predict(
        self,
        texts: Sequence[Text],
        task: str | Sequence[str] | None = None,
        *,
        min_confidence: float = 0.0,
    ) -> list[Prediction]:
        """Return one prediction per text, in order.

        Args:
            texts: strings, pairs of strings, or examples. Span tasks take (question, context).
            task: one task for all, or one per text; None where the model holds one task.
            min_confidence: no label is given below this calibrated probability: of a text, of
                several labels each, of tokens each word's. Numbers and spans have none.

        Raises:
            UnknownTask: a task that is not in the model. Never answered by the base.
            UsageError: a text that does not fit its task, or ``min_confidence`` outside 0 to 1.
        """
        if not 0 <= min_confidence <= 1:
            raise UsageError(f"min_confidence is {min_confidence}; expected 0 to 1")
        if isinstance(texts, str):
            raise UsageError("texts is one string; give a list of texts")
        names = self._names(texts, task)
        examples = [
            as_example(self._tasks[n].fitting.task, t) for n, t in zip(names, texts, strict=True)
        ]
        features, logits = self.logits(examples, names)
        return [
            _predict_one(n, self._tasks[n].fitting, example, feature, values, min_confidence)
            for n, example, feature, values in zip(names, examples, features, logits, strict=True)
        ]

    def logits(
        self, examples: Sequence[Example], names: Sequence[str]
    ) -> tuple[list[Feature], list[Logits]]:
        """Return the feature and the logits of each example, mixed tasks in one batch.

        A span example longer than the task's limit gives its best window.
        """
        owners: list[int] = []
        features: list[Feature] = []
        for name in dict.fromkeys(names):
            mine = [i for i, other in enumerate(names) if other == name]
            for feature in self._features(name, [examples[i] for i in mine]):
                owners.append(mine[feature.example])
                features.append(feature)
        logits = self._held.logits(features, [self._tasks[names[i]] for i in owners])
        best: dict[int, tuple[Feature, Logits]] = {}
        for owner, feature, values in zip(owners, features, logits, strict=True):
            if owner not in best or _window_score(feature, values) > _window_score(*best[owner]):
                best[owner] = (feature, values)
        return [best[i][0] for i in range(len(names))], [best[i][1] for i in range(len(names))]

    def evaluate(self, examples: Sequence[Example], task: str | None = None) -> dict[str, float]:
        """Return the task's metrics over ``examples``, as fractions.

        Raises:
            UsageError: an example without an answer.
        """
        name = self._name(task)
        held = self._tasks[name]
        answers = references(examples)
        if any(answer is None for answer in answers):
            raise UsageError("this split has no answers to compare with: use predict")
        features = self._features(name, examples)
        logits = self._held.logits(features, [held] * len(features))
        predictions = read_predictions(held.fitting.task, examples, features, logits)
        return compute_metrics(held.fitting.task, predictions, answers)

    def check_probes(self, task: str | None = None) -> list[float]:
        """Return, per probe in the task's file, the largest difference to the logits kept there.

        Absolute up to logits of 1, relative to the largest logit above that; infinite where the
        shapes differ. Rounding alone gives about 1e-6 in fp32, 1e-2 in bf16; more means that this
        machine, the base or a library does not do what it did when the file was made.
        """
        name = self._name(task)
        file = self.file(name)
        examples = probe_examples(file.task, file.probes)
        _, found = self.logits(examples, [name] * len(examples))
        differences = []
        for values, probe in zip(found, file.probes, strict=True):
            wanted = np.asarray(probe["logits"], dtype=np.float64)
            difference = math.inf
            if wanted.shape == values.shape:
                scale = max(1.0, float(np.abs(wanted).max(initial=0.0)))
                difference = float(np.abs(wanted - values).max(initial=0.0)) / scale
            differences.append(difference)
        return differences

    def _features(self, name: str, examples: Sequence[Example]) -> list[Feature]:
        fitting = self._tasks[name].fitting
        tokenizer = self.encoder.base.tokenizer
        return make_features(tokenizer, fitting.task, examples, fitting.max_length).items

    def _name(self, name: str | None) -> str:
        """Return ``name``, which is a task here; None means the only one."""
        if name is not None:
            self.bank.index(name)
            return name
        if len(self._tasks) != 1:
            known = ", ".join(self._tasks) or "none"
            raise UsageError(f"say which task is meant; this model holds: {known}")
        return next(iter(self._tasks))

    def _names(self, texts: Sequence[Text], task: str | Sequence[str] | None) -> list[str]:
        if task is None or isinstance(task, str):
            return [self._name(task)] * len(texts)
        if len(task) != len(texts):
            raise UsageError(f"{len(texts)} texts, but {len(task)} task names")
        for name in dict.fromkeys(task):
            self.bank.index(name)
        return list(task)


def load(
    files: str | Path | Iterable[str | Path],
    base: str | Encoder | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    storage: StorageType = "fp32",
    trust_remote_code: bool = False,
) -> Model:
    """Return a model with the tasks of one or several files on their common base.

    Args:
        files: one path or several.
        base: where the base is; None takes the name that the first file gives.
        dtype: precision of the frozen weights: ``fp32``, ``bf16``, ``tf32``, ``auto``.
        device: ``auto``, ``cpu``, ``cuda``.
        storage: how biases are kept in memory: ``fp32``, ``fp16``, ``bf16`` or ``int8``.
        trust_remote_code: run code that comes with ``base``, which must then be named: not the
            author of a file says whose code runs. Only where you trust the author of the base.

    Raises:
        TaskFileError: a file that is damaged, or made for another base or tokenizer.
        UsageError: two tasks of one name; remote code without a ``base``.
    """
    paths = [files] if isinstance(files, str | Path) else list(files)
    if not paths:
        raise UsageError("no task file was given")
    if trust_remote_code and base is None:
        raise UsageError("trust_remote_code runs code of the base: name it, as load(files, base)")
    loaded = [TaskFile.load(path) for path in paths]
    if base is None:
        base = loaded[0].base.name
    if isinstance(base, str):
        base = open_encoder(
            base, dtype, device, revision=loaded[0].base.revision,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    model = Model(base, storage)
    for file in loaded:
        model.add(file)
    return model


def probe_examples(task: Task, probes: Sequence[Mapping[str, Any]]) -> list[Example]:
    """Return the inputs of ``probes`` (``{"text", "text_pair"}``) as examples of ``task``.

    Words stand between white space here: how texts of users are split may change, probes may not.
    """
    if task.kind == "tokens":
        return [TokenExample(tuple(p["text"].split())) for p in probes]
    return [
        as_example(task, p["text"] if p["text_pair"] is None else (p["text"], p["text_pair"]))
        for p in probes
    ]


def as_example(task: Task, text: Text) -> Example:
    """Return ``text`` as an example of the task's kind.

    A text becomes the words that :func:`bitfit.words.find_words` finds in it where the task labels
    words; give a ``TokenExample`` to say them.

    Raises:
        UsageError: it is one text where the task takes a pair, or the other way round.
    """
    if isinstance(text, TextExample) and task.kind in ("tokens", "span"):
        pair = text.text_pair
        text = text.text if pair is None else (text.text, pair)
    if isinstance(text, str):
        if task.is_pair:
            raise UsageError(f"task {task.name!r} takes a pair of texts, got one: {text[:40]!r}")
        if task.kind == "tokens":
            return TokenExample(tuple(text[begin:end] for begin, end in find_words(text)))
        return TextExample(text)
    if isinstance(text, tuple):
        if not task.is_pair:
            raise UsageError(f"task {task.name!r} takes one text, got a pair: {text[0][:40]!r}")
        return SpanExample(*text) if task.kind == "span" else TextExample(*text)
    if isinstance(text, TextExample) and (text.text_pair is not None) != task.is_pair:
        wanted = "a pair of texts" if task.is_pair else "one text"
        raise UsageError(f"task {task.name!r} takes {wanted}: {text.text[:40]!r}")
    return text


def _window_score(feature: Feature, logits: Logits) -> float:
    return best_span(feature, logits)[0] if feature.offsets is not None else 0.0


def _predict_one(
    name: str,
    fitting: FittingTask,
    example: Example,
    feature: Feature,
    logits: Logits,
    min_confidence: float,
) -> Prediction:
    task, temperature = fitting.task, fitting.temperature or 1.0
    if task.kind == "classification":
        chances = probabilities(logits, temperature)
        best = int(chances.argmax())
        confidence = float(chances[best])
        scores = {label: float(p) for label, p in zip(task.labels, chances, strict=True)}
        label = task.labels[best] if confidence >= min_confidence else None
        return Prediction(task=name, label=label, confidence=confidence, scores=scores)
    if task.kind == "regression":
        return Prediction(task=name, value=float(logits[0]))
    if task.kind == "multilabel":
        chances = probabilities(logits, temperature, multilabel=True)
        scores = {label: float(p) for label, p in zip(task.labels, chances, strict=True)}
        chosen = tuple(label for label, p in scores.items() if p > 0.5 and p >= min_confidence)
        return Prediction(task=name, labels=chosen, scores=scores)
    if task.kind == "tokens":
        assert feature.word_starts is not None
        confidences = np.zeros(len(feature.word_starts))
        confidences[feature.word_starts >= 0] = probabilities(logits, temperature).max(axis=1)
        tags = read_predictions(task, [example], [feature], [logits])[0]
        labels = tuple(
            task.labels[tag] if tag >= 0 and p >= min_confidence else ""
            for tag, p in zip(tags, confidences, strict=True)
        )
        assert isinstance(example, TokenExample)
        return Prediction(
            task=name, labels=labels, words=example.words, confidences=tuple(confidences.tolist())
        )
    assert isinstance(example, SpanExample)
    _, begin, end = best_span(feature, logits)
    return Prediction(task=name, answer=example.context[begin:end], start=begin)
