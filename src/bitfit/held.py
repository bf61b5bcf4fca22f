"""Tasks in memory: each a row of one bank and a head, and of the rest of its file a few KB."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from bitfit.bank import Bank, Layout
from bitfit.batches import Feature
from bitfit.encoder import Encoder
from bitfit.errors import TaskFileError
from bitfit.heads import Head, make_head
from bitfit.identity import check_base, check_tokenizer
from bitfit.inference import DEFAULT_MAX_TOKENS, Logits, TaskHead, compute_logits
from bitfit.rounding import StorageType
from bitfit.taskfile import TaskFile, restore, strip
from bitfit.tasks import Task


@dataclass(frozen=True, eq=False, slots=True)
class FittingTask:
    """What of a task file stays when it was checked against its base: all but the row."""

    task: Task
    head: TaskHead
    layout: Layout
    max_length: int
    """In tokens, no more than the base has positions for."""
    temperature: float | None
    seal: str
    """The SHA-256 in the task's file."""
    stripped: bytes = field(repr=False)

    @property
    def head_bytes(self) -> int:
        """The bytes of the head."""
        return 4 * self.head.head.size


@dataclass(frozen=True, eq=False, slots=True)
class HeldTask:
    """A task that can answer."""

    key: str
    """What the bank calls it."""
    fitting: FittingTask
    row: int
    """Its row of the bank."""


class HeldTasks:
    """All tasks in memory over one base.

    Args:
        encoder: the base.
        storage: how rows are kept; heads are kept in fp32.
    """

    def __init__(self, encoder: Encoder, storage: StorageType = "fp32") -> None:
        self.encoder = encoder
        # Without a pooler in the base no row has one; frozen tasks have rows of nothing but zeros.
        self.bank = Bank(Layout(encoder.sites), encoder.device, storage)
        self._names = encoder.base.tensor_names
        self._heads: dict[Head, Head] = {}
        self._layouts: dict[Layout, Layout] = {}

    def fit(self, file: TaskFile) -> FittingTask:
        """Return the part of ``file`` that is kept beside its row, checked against the base.

        Raises:
            WrongBase: the file was made for another base; names the first tensor that differs.
            WrongTokenizer: it was made with another tokenizer.
            TaskFileError: the file does not fit this base.
        """
        base = self.encoder.base
        check_base(file.base, base.identity, self._names)
        check_tokenizer(file.tokenizer, base.tokenizer_sha256)
        pooling = "auto" if file.pooling == "none" else file.pooling
        head = make_head(file.task, self.encoder, pooling)
        layout = Layout.from_json(file.layout, self.encoder.sites)
        return FittingTask(
            task=file.task,
            head=TaskHead(self._heads.setdefault(head, head), self._weights(head, file)),
            layout=self._layouts.setdefault(layout, layout),
            # A file of someone's own loop may ask for more than the base has positions for.
            max_length=self.encoder.clamp_length(file.max_length),
            temperature=file.temperature,
            seal=file.seal,
            stripped=strip(file),
        )

    def _weights(self, head: Head, file: TaskFile) -> dict[str, torch.Tensor]:
        found = {key: tuple(tensor.shape) for key, tensor in file.head.items()}
        if found != head.shapes:
            raise TaskFileError(
                f"task {file.task.name!r}: the head in the file is {found}, on this base it must "
                f"be {head.shapes}"
            )
        flat = torch.cat([file.head[name].detach().float().flatten() for name in head.shapes])
        return head.split(flat.to(self.encoder.device))

    def hold(self, key: str, fitting: FittingTask, bias: torch.Tensor) -> HeldTask:
        """Put a task in the bank under ``key``.

        Args:
            key: what the bank calls it.
            fitting: what :meth:`fit` gave.
            bias: the file's row ``(n,)``.

        Raises:
            UsageError: the name is taken, or a bias does not fit into the storage type.
        """
        row = fitting.layout.expand(bias.to(self.encoder.device), self.bank.layout)
        return HeldTask(key, fitting, self.bank.add(key, row))

    def drop(self, held: HeldTask) -> None:
        """Take a task out; the base is as it was before it came."""
        self.bank.remove(held.key)

    def restore(self, held: HeldTask) -> TaskFile:
        """Return the task's file, its biases as they are kept: rounded where that is not fp32."""
        fitting = held.fitting
        row = fitting.layout.take(self.bank.gather([held.row])[0], self.bank.layout)
        head = {name: tensor.cpu().clone() for name, tensor in fitting.head.weights.items()}
        return restore(fitting.stripped, row.cpu(), head, self.encoder.base.identity)

    def logits(
        self,
        features: Sequence[Feature],
        tasks: Sequence[HeldTask],
        max_tokens: int = DEFAULT_MAX_TOKENS,
    ) -> list[Logits]:
        """Return the logits of each feature by its own task, as ``compute_logits`` does."""
        heads = {held.row: held.fitting.head for held in tasks}
        return compute_logits(
            self.encoder, features, self.bank, self.bank.layout, heads,
            [held.row for held in tasks], max_tokens=max_tokens,
        )  # fmt: skip
