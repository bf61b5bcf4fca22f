"""The task heads: what stands on the encoder, its loss, and what its logits say.

For BERT and RoBERTa the head has the shape and the names of transformers' own
``...ForSequenceClassification``, ``...ForTokenClassification`` and ``...ForQuestionAnswering``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bitfit.base import ROBERTA_LIKE
from bitfit.batches import Batch, Feature, upload
from bitfit.dropout import Draw
from bitfit.encoder import Encoder
from bitfit.errors import UsageError
from bitfit.tasks import Example, Kind, Task, contexts

HeadStyle = Literal["linear", "roberta"]
POOLINGS = ("auto", "pooler", "cls", "mean")
# The standard evaluation of SQuAD v1.1: 20 best starts and ends, answers up to 30 tokens.
N_BEST = 20
MAX_ANSWER_TOKENS = 30


@dataclass(frozen=True, kw_only=True)
class Head:
    """The shape of one task's head; its numbers are kept apart, as a dict of tensors."""

    kind: Kind
    num_outputs: int
    hidden_size: int
    pooling: str
    """``pooler``, ``cls``, ``mean``; ``none`` where every token has logits."""
    style: HeadStyle
    dropout_rate: float

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor by its name in transformers' model."""
        out, hidden = self.num_outputs, self.hidden_size
        if self.kind == "span":
            return {"qa_outputs.weight": (out, hidden), "qa_outputs.bias": (out,)}
        if self.style == "roberta":
            return {
                "classifier.dense.weight": (hidden, hidden),
                "classifier.dense.bias": (hidden,),
                "classifier.out_proj.weight": (out, hidden),
                "classifier.out_proj.bias": (out,),
            }
        return {"classifier.weight": (out, hidden), "classifier.bias": (out,)}

    @property
    def size(self) -> int:
        """How many numbers the head has."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values())

    def init(self, seed: int, std: float = 0.02) -> Tensor:
        """Return fresh numbers ``(size,)``: weights normal, biases zero, as transformers does."""
        generator = torch.Generator().manual_seed(seed)
        parts = [
            torch.randn(shape, generator=generator).mul_(std).flatten()
            if name.endswith("weight")
            else torch.zeros(shape)
            for name, shape in self.shapes.items()
        ]
        return torch.cat(parts)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views of ``flat`` ``(size,)`` by name; or of several, ``(U, size)``."""
        sizes = [int(np.prod(shape)) for shape in self.shapes.values()]
        parts = torch.split(flat, sizes, dim=-1)
        return {
            name: part.unflatten(-1, shape)
            for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)
        }


def make_head(task: Task, encoder: Encoder, pooling: str = "auto") -> Head:
    """Return the head that ``task`` needs on ``encoder``.

    Args:
        task: what is learned.
        encoder: the base it stands on.
        pooling: ``auto`` takes what the base was made for.

    Raises:
        UsageError: an unknown pooling, or ``pooler`` on a base without one.
    """
    if pooling not in POOLINGS:
        raise UsageError(f"pooling {pooling!r} is not one of {', '.join(POOLINGS)}")
    if pooling == "pooler" and encoder.pooler is None:
        raise UsageError(
            f"base {encoder.base.name!r} has no pretrained pooler; use --pooling cls or mean"
        )
    whole_text = task.kind in ("classification", "regression", "multilabel")
    pooling = encoder.base.pooling if pooling == "auto" else pooling
    roberta = whole_text and pooling == "cls" and encoder.base.family in ROBERTA_LIKE
    return Head(
        kind=task.kind,
        num_outputs=task.num_outputs,
        hidden_size=encoder.hidden_size,
        pooling=pooling if whole_text else "none",
        style="roberta" if roberta else "linear",
        dropout_rate=encoder.dropout_rate,
    )


def head_logits(
    head: Head, weights: Mapping[str, Tensor], x: Tensor, dropout: Draw | None
) -> Tensor:
    """Return logits ``(N, outputs)`` of pooled or token vectors ``x`` ``(N, hidden)``.

    Several heads of one shape at once: ``(U, N, outputs)`` of ``x`` ``(U, N, hidden)``, where the
    weights have an axis of U before their own.
    """

    def drop(x: Tensor) -> Tensor:
        return x if dropout is None else x * dropout(x)

    def linear(x: Tensor, name: str) -> Tensor:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        if weight.ndim == 2:
            return F.linear(x, weight, bias)
        return torch.baddbmm(bias[:, None], x, weight.mT)

    if head.kind == "span":  # transformers' question answering has no dropout before its head
        return linear(x, "qa_outputs")
    if head.style == "roberta":
        x = torch.tanh(linear(drop(x), "classifier.dense"))
        return linear(drop(x), "classifier.out_proj")
    return linear(drop(x), "classifier")


def word_positions(batch: Batch) -> tuple[Tensor, list[int]]:
    """Return the token of each word that was not cut off, and how many words each sequence has."""
    lengths = [len(feature) for feature in batch.features]
    starts = np.cumsum([0, *lengths[:-1]]).tolist()  # not the batch's: reading it waits for a GPU
    kept = [
        start + f.word_starts[f.word_starts >= 0]
        for start, f in zip(starts, batch.features, strict=True)
        if f.word_starts is not None
    ]
    flat = torch.from_numpy(np.concatenate(kept))
    return upload(flat, batch.input_ids.device), [len(k) for k in kept]


def batch_loss(
    head: Head, logits: Tensor, batch: Batch, class_weights: Tensor | None = None
) -> Tensor:
    """Return the mean loss of a batch, a 0-d tensor.

    Cross entropy; mean squared error on the raw value for regression (as the released code does
    for STS-B); binary cross entropy for multilabel; the mean of start and end for spans. A batch
    of which no word is left has the loss 0.

    Args:
        head: whose logits they are.
        logits: ``(B, outputs)``; tokens: one row per word; span: one row per token.
        batch: where the labels are.
        class_weights: ``(labels,)``, the weight of each class in the mean (classification, tokens).
    """
    if head.kind == "tokens":
        if not len(logits):  # every word was cut off: the mean of nothing would be NaN
            return logits.sum()
        target = upload(torch.from_numpy(word_labels(batch.features)), logits.device)
        return F.cross_entropy(logits, target, class_weights)
    if head.kind == "span":
        return _span_loss(logits, batch, _targets(head, batch.features, logits.device))
    if head.kind == "classification":
        target = _targets(head, batch.features, logits.device)
        return F.cross_entropy(logits, target, class_weights)
    return mean_losses(head, logits[None], batch.features)[0]


def mean_losses(head: Head, logits: Tensor, features: Sequence[Feature]) -> Tensor:
    """Return the mean losses ``(U,)`` of U runs of as many whole texts each.

    Args:
        head: the shape of their heads.
        logits: ``(U, N, outputs)``.
        features: where the labels are, run after run.
    """
    target = _targets(head, features, logits.device)
    flat = logits.flatten(0, 1)
    if head.kind == "classification":
        each = F.cross_entropy(flat, target, reduction="none")
    elif head.kind == "regression":
        each = F.mse_loss(flat[:, 0], target, reduction="none")
    else:
        each = F.binary_cross_entropy_with_logits(flat, target, reduction="none")
    return each.view(len(logits), -1).mean(1)


def _targets(head: Head, features: Sequence[Feature], device: torch.device) -> Tensor:
    """Return the labels of whole texts, or the first and last token of answers."""
    labels = [f.label for f in features]
    if head.kind == "multilabel":
        target = torch.zeros(len(labels), head.num_outputs)
        for row, indices in enumerate(labels):
            target[row, list(indices)] = 1.0
    elif head.kind == "regression":
        target = torch.tensor(labels, dtype=torch.float32)
    else:
        target = torch.tensor(labels)
    return upload(target, device)


def loss_weight(
    head: Head, features: Sequence[Feature], class_weights: NDArray[np.float32] | None = None
) -> float:
    """Return what :func:`batch_loss` divides by: how many sequences or words, or their weights.

    So the mean over a batch is that of its parts, each times its share of the weight.
    """
    if head.kind not in ("classification", "tokens"):
        return float(len(features))
    tokens = head.kind == "tokens"
    labels = word_labels(features) if tokens else np.asarray([f.label for f in features])
    return float(len(labels) if class_weights is None else class_weights[labels].sum())


def word_labels(features: Sequence[Feature]) -> NDArray[np.int64]:
    """Return the label of every word that was not cut off, sequence after sequence."""
    words = [f.label[f.word_starts >= 0] for f in features if f.word_starts is not None]
    return np.concatenate(words)


def logits_shape(head: Head, feature: Feature) -> tuple[int, ...]:
    """Return the shape of a feature's logits, as :func:`bitfit.inference.compute_logits` says."""
    if head.kind == "tokens":
        assert feature.word_starts is not None
        return int((feature.word_starts >= 0).sum()), head.num_outputs
    return (len(feature), head.num_outputs) if head.kind == "span" else (head.num_outputs,)


def _span_loss(logits: Tensor, batch: Batch, target: Tensor) -> Tensor:
    padded = logits[batch.padded_index].masked_fill(~batch.mask[:, :, None], -torch.inf)
    starts, ends = padded.unbind(-1)  # each (B, L)
    return (F.cross_entropy(starts, target[:, 0]) + F.cross_entropy(ends, target[:, 1])) / 2


def read_predictions(
    task: Task,
    examples: Sequence[Example],
    features: Sequence[Feature],
    logits: Sequence[NDArray[np.float32]],
) -> list[Any]:
    """Return one prediction per example, as :func:`bitfit.metrics.compute_metrics` takes them.

    A class index, a float, a tuple of class indices, a tuple of one class per word (-1 where the
    word was cut off by the length limit: it counts as wrong), or the text of an answer.
    """
    if task.kind == "span":
        places = read_spans(examples, features, logits)
        texts = contexts(examples) or []
        return [text[begin:end] for text, (begin, end) in zip(texts, places, strict=True)]
    if task.kind == "tokens":
        return [_read_tokens(f, rows) for f, rows in zip(features, logits, strict=True)]
    if task.kind == "classification":
        return [int(row.argmax()) for row in logits]
    if task.kind == "regression":
        return [float(row[0]) for row in logits]
    return [tuple(int(i) for i in np.flatnonzero(row > 0)) for row in logits]


def _read_tokens(feature: Feature, rows: NDArray[np.float32]) -> tuple[int, ...]:
    assert feature.word_starts is not None
    tags = np.full(len(feature.word_starts), -1)
    tags[feature.word_starts >= 0] = rows.argmax(axis=1) if len(rows) else []
    return tuple(int(tag) for tag in tags)


def read_spans(
    examples: Sequence[Example],
    features: Sequence[Feature],
    logits: Sequence[NDArray[np.float32]],
) -> list[tuple[int, int]]:
    """Return where in its context the answer of each question begins and ends, in characters.

    The best over all windows of a context; ``(0, 0)`` where there is none.
    """
    best: list[tuple[float, tuple[int, int]]] = [(-np.inf, (0, 0))] * len(examples)
    for feature, rows in zip(features, logits, strict=True):
        score, begin, end = best_span(feature, rows)
        if score > best[feature.example][0]:
            best[feature.example] = (score, (begin, end))
    return [place for _, place in best]


def best_span(feature: Feature, rows: NDArray[np.float32]) -> tuple[float, int, int]:
    """Return (score, first character, end character) of a window's best answer.

    The score is the sum of the two logits, over the :data:`N_BEST` best starts and ends among the
    context's tokens; minus infinity where no start has an end. Of equal scores the one with the
    better start counts, then the one with the better end.
    """
    assert feature.offsets is not None
    context = np.flatnonzero(feature.offsets[:, 0] >= 0)
    starts, ends = (context[np.argsort(-rows[context, i], kind="stable")[:N_BEST]] for i in (0, 1))
    scores = rows[starts, 0][:, None] + rows[ends, 1]
    length = ends - starts[:, None] + 1
    # Written so that NaN, which no comparison lets through, is out too.
    is_answer = (length >= 1) & (length <= MAX_ANSWER_TOKENS) & (scores > -np.inf)
    if not is_answer.any():
        return -np.inf, 0, 0
    start, end = np.unravel_index(np.where(is_answer, scores, -np.inf).argmax(), scores.shape)
    first, last = feature.offsets[starts[start], 0], feature.offsets[ends[end], 1]
    return float(scores[start, end]), int(first), int(last)
