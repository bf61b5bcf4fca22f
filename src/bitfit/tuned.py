"""Task files for people with a training loop of their own, on plain transformers models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitfit.bank import Layout
from bitfit.base import Base, load_base
from bitfit.errors import TaskFileError, UsageError
from bitfit.identity import check_base, check_tokenizer
from bitfit.taskfile import TaskFile, head_style_of
from bitfit.tasks import Task
from bitfit.terms import choose_sites, find_sites

# Where transformers' models keep their heads.
_HEADS = ("classifier.", "qa_outputs.")


def task_from_model(
    model: nn.Module,
    base: str | Base,
    task: Task,
    *,
    terms: str = "all",
    pooling: str | None = None,
    max_length: int = 128,
    recipe: Mapping[str, Any] | None = None,
    scores: Mapping[str, float] | None = None,
    description: str | None = None,
) -> TaskFile:
    """Return the task that a model of your own training holds, as a file to save.

    The row is the difference between the model's biases and the base's, so the base is loaded
    again from where it came from. Everything else in the encoder must be as in the base.

    Args:
        model: a transformers model with a head, its biases trained after
            :func:`bitfit.select_biases`.
        base: where the base is, as ``bitfit.finetune`` takes it.
        task: what was learned: kind, label names.
        terms: the terms that were trained.
        pooling: what the head reads: ``pooler``, ``cls`` or ``mean``; None: ``pooler`` where the
            encoder has one, else ``cls``, as transformers' own classes do.
        max_length: where texts are cut, in tokens.
        recipe: how it was trained, kept in the file.
        scores: metric -> fraction on dev, kept in the file.
        description: a model card in free text, kept in the file.

    Raises:
        UsageError: the model has no head of a known name, something beside the chosen terms was
            changed, or the model has parameters that a task file has no place for.
    """
    base = load_base(base) if isinstance(base, str) else base
    encoder: nn.Module = getattr(model, "base_model", model)
    chosen = choose_sites(find_sites(encoder), terms)
    head = _head(model, encoder)
    if task.kind in ("tokens", "span"):
        pooling = "none"
    elif pooling is None:
        pooling = "pooler" if getattr(encoder, "pooler", None) is not None else "cls"
    mine, theirs = _tensors(encoder), _base_tensors(base)
    paths = {f"{site.path}.bias" for site in chosen}
    for name in sorted((theirs.keys() & mine.keys()) - paths):
        if not torch.equal(mine[name], theirs[name].to(mine[name].dtype)):
            raise UsageError(
                f"{name} differs from base {base.name!r} and is none of the terms {terms!r}: a "
                "task file holds biases only, so this model would not be what the file gives back"
            )
    for name in sorted(mine.keys() - theirs.keys()):
        # A pooler that nobody reads may be random, as transformers makes it where there is none.
        if name in paths or pooling == "pooler" or not name.startswith("pooler."):
            raise UsageError(
                f"{name} is not in base {base.name!r}: a task file holds differences to its base, "
                "so it has no place for it"
            )
    for name in sorted(theirs.keys() - mine.keys()):
        if not name.startswith("pooler."):  # heads over tokens have none
            raise UsageError(
                f"{name} of base {base.name!r} is not in this model: it must be the whole base, "
                "with all of its layers"
            )
    names = [f"{site.path}.bias" for site in chosen]
    row = [mine[name].float() - theirs[name].float() for name in names]
    return TaskFile(
        task=task,
        bias=torch.cat(row).cpu() if row else torch.zeros(0),
        layout=Layout(chosen).to_json(),
        head=head,
        head_style=head_style_of(head),
        pooling=pooling,
        max_length=max_length,
        base=base.identity,
        tokenizer=base.tokenizer_sha256,
        terms=terms,
        recipe=dict(recipe or {}),
        scores=dict(scores or {}),
        description=description,
    )


def apply_task(model: nn.Module, file: TaskFile, base: str | Base) -> None:
    """Write a task's biases and head into a plain transformers model, in place.

    To take it back, load the model again: a plain model holds one task at a time. Many tasks at
    once are what :class:`bitfit.Model` is for.

    Args:
        model: a transformers model with a head of the task's shape, its encoder as in the base.
        file: the task.
        base: where the model's base is.

    Raises:
        WrongBase: the file was made for another base.
        WrongTokenizer: it was made with another tokenizer.
        TaskFileError: the model's head has other names or shapes.
    """
    base = load_base(base) if isinstance(base, str) else base
    check_base(file.base, base.identity, base.tensor_names)
    check_tokenizer(file.tokenizer, base.tokenizer_sha256)
    encoder: nn.Module = getattr(model, "base_model", model)
    layout = Layout.from_json(file.layout, find_sites(encoder))
    theirs = _base_tensors(base)
    parameters = dict(model.named_parameters())
    for name, tensor in file.head.items():
        shape = tuple(parameters[name].shape) if name in parameters else None
        if shape != tuple(tensor.shape):
            raise TaskFileError(
                f"task {file.task.name!r}: the file's {name} is {tuple(tensor.shape)}, "
                f"{type(model).__name__} has {shape or 'none'}"
            )
    with torch.no_grad():
        for path, shift in layout.split(file.bias).items():
            bias = encoder.get_parameter(f"{path}.bias")
            bias.copy_(theirs[f"{path}.bias"].float() + shift)
        for name, tensor in file.head.items():
            parameters[name].copy_(tensor)


def _head(model: nn.Module, encoder: nn.Module) -> dict[str, Tensor]:
    """Return the head's tensors; everything outside of the encoder has to be of the head."""
    inside = {id(parameter) for parameter in encoder.parameters()}
    outside = {n: p for n, p in model.named_parameters() if id(p) not in inside}
    if not any(name.startswith(_HEADS) for name in outside):
        raise UsageError(f"{type(model).__name__} has no head called classifier or qa_outputs")
    for name in outside:
        if not name.startswith(_HEADS):
            raise UsageError(
                f"{name} of {type(model).__name__} is neither in the encoder nor in a head called "
                "classifier or qa_outputs: a task file has no place for it"
            )
    return {name: parameter.detach().float().cpu() for name, parameter in outside.items()}


def _tensors(encoder: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().cpu() for name, p in encoder.named_parameters()}


def _base_tensors(base: Base) -> dict[str, Tensor]:
    tensors = _tensors(base.model)
    if base.pooler is not None:
        tensors |= {f"pooler.{name}": p for name, p in _tensors(base.pooler).items()}
    return tensors
