"""Several processes that train one run together, as torchrun or accelerate's launcher start them.

Each computes its share of a step's sequences; the gradients of what is trained, a row and a head,
are summed, and every process takes the same step with them. Nothing else moves between them.
"""

from __future__ import annotations

import atexit
import hashlib
import os
from collections.abc import Sequence
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from bitfit.errors import BitfitError, UsageError

# One that waits so long for the others waits in vain: they are stuck, or long gone.
PATIENCE = timedelta(minutes=30)


class Processes:
    """What trains a run: this process alone, and what :class:`Group` has to do with others.

    Args:
        rank: which of ``count`` this one is, from 0. Of several without a :class:`Group` it has
            its share and asks nobody: to measure the speed of a step.
        count: how many share the sequences of a step.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes files."""
        return self.rank == 0

    def own(self, length: int) -> slice:
        """Return which of ``length`` things in a row are this one's; none, if there are fewer."""
        begin, end = (length * place // self.count for place in (self.rank, self.rank + 1))
        return slice(begin, end)

    def dealt(self, sizes: Sequence[int]) -> list[int]:
        """Return the places of the things that are this one's, of all sizes as many for each."""
        order = sorted(range(len(sizes)), key=lambda place: (-sizes[place], place))
        return order[self.rank :: self.count]

    def sum_gradients(self, tensors: Sequence[Tensor], losses: list[Tensor]) -> list[Tensor]:
        """Give ``tensors`` the sum of their gradients over all, and return that of the losses."""
        return losses

    def collect(
        self, own: list[NDArray[np.float32]], places: list[int], shapes: Sequence[tuple[int, ...]]
    ) -> list[NDArray[np.float32]]:
        """Return the arrays of all.

        Args:
            own: those of this one.
            places: where they stand, from :meth:`dealt`.
            shapes: of every array.
        """
        found = [np.empty(0, np.float32)] * len(shapes)
        for place, values in zip(places, own, strict=True):
            found[place] = values
        return found

    def any(self, claim: bool) -> bool:
        """Return whether ``claim`` is so in at least one."""
        return claim

    def first(self, number: int) -> int:
        """Return ``number`` as the main one has it."""
        return number

    def check_same(self, text: str) -> None:
        """Refuse to go on where another has another ``text``."""

    def wait(self) -> None:
        """Return when all are here."""


ALONE = Processes()


class Group(Processes):
    """Processes that are joined by ``torch.distributed``.

    What is on a GPU goes over its own backend (NCCL); what is on the CPU, such as whether to stop,
    over gloo, so that asking does not wait for the GPU.
    """

    def __init__(self) -> None:
        super().__init__(dist.get_rank(), dist.get_world_size())
        # A group that others made may know GPUs only.
        gloo = "gloo" in dist.get_backend_config()
        self._cpu = None if gloo else dist.new_group(backend="gloo", timeout=PATIENCE)

    def sum_gradients(self, tensors: Sequence[Tensor], losses: list[Tensor]) -> list[Tensor]:
        """Give ``tensors`` the sum of their gradients over all, and return that of the losses.

        One flat tensor goes around: n numbers for the biases, h for the head, a loss for each run.
        """
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]
        flat = torch.cat([*(g.flatten() for g in grads), torch.stack(losses).to(grads[0].dtype)])
        self._sum(flat)
        *parts, total = torch.split(flat, [*(g.numel() for g in grads), len(losses)])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.grad = part.view_as(tensor)
        # Copies: views would keep the gradients alive for as long as somebody keeps a loss.
        return list(total.clone())

    def collect(
        self, own: list[NDArray[np.float32]], places: list[int], shapes: Sequence[tuple[int, ...]]
    ) -> list[NDArray[np.float32]]:
        """Return the arrays of all: a sum in which each array is zero but in one process."""
        found = super().collect(own, places, shapes)
        mine = set(places)
        flat = torch.from_numpy(np.concatenate([
            values.ravel() if place in mine else np.zeros(int(np.prod(shape)), np.float32)
            for place, (values, shape) in enumerate(zip(found, shapes, strict=True))
        ]))  # fmt: skip
        self._sum(flat)
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
        parts = np.split(flat.numpy(), ends)
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def any(self, claim: bool) -> bool:
        """Return whether ``claim`` is so in at least one."""
        return self._total(int(claim)) > 0

    def first(self, number: int) -> int:
        """Return ``number`` as the main one has it."""
        return self._total(number if self.is_main else 0)

    def check_same(self, text: str) -> None:
        """Refuse to go on where another has another ``text``.

        Raises:
            UsageError: in every process.
        """
        mine = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        if self.any(self.first(mine) != mine):
            raise UsageError(
                f"the {self.count} processes are not about the same run: all need the same "
                "command, data and software, and a checkpoint that each can read"
            )

    def wait(self) -> None:
        """Return when all are here."""
        self._total(0)

    def _total(self, number: int) -> int:
        tensor = torch.tensor([number], dtype=torch.int64)
        self._sum(tensor)
        return int(tensor)

    def _sum(self, tensor: Tensor) -> None:
        try:
            dist.all_reduce(tensor, group=self._cpu if tensor.device.type == "cpu" else None)
        except RuntimeError as error:
            raise BitfitError(
                f"process {self.rank} of {self.count} has lost another, whose own messages say why "
                f"({error})"
            ) from error


def launched_count() -> int:
    """Return how many processes a launcher has started, by its environment variables; 1: none."""
    text = os.environ.get("WORLD_SIZE", "")
    return int(text) if text.isdecimal() else 1


def own_device(device: str) -> str:
    """Return ``device``, or the GPU of this process where ``device`` leaves open which."""
    place = os.environ.get("LOCAL_RANK", "")
    is_open = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    return f"cuda:{place}" if is_open and place and launched_count() > 1 else device


def join_processes(device: torch.device) -> Processes:
    """Return the processes that train together; this one alone where no launcher started it.

    Raises:
        UsageError: a launcher's variables that do not suffice.
    """
    if not dist.is_available():
        return ALONE
    if not dist.is_initialized():
        if launched_count() == 1:
            return ALONE
        backend = "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        try:
            dist.init_process_group(backend, timeout=PATIENCE)
        except ValueError as error:  # a variable is missing
            raise UsageError(
                f"WORLD_SIZE is {launched_count()}, but the processes cannot be joined: {error} "
                "Start them with torchrun, or unset WORLD_SIZE"
            ) from error
        atexit.register(_leave)
    return Group() if dist.get_world_size() > 1 else ALONE


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
