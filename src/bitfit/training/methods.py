"""What a method trains: a row of the bank and a head, or matrices of the plain model.

``bitfit`` and ``frozen`` train one flat tensor ``(1, n + head)``: the row, then the head. ``full``
and ``random`` are the paper's controls (Table 3); they change matrices, so they are no rows, but go
through the same loop with fp32 weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitfit.bank import Layout
from bitfit.encoder import BankedLinear, Encoder
from bitfit.errors import NoBiases, UsageError
from bitfit.heads import Head
from bitfit.terms import Site, choose_sites
from bitfit.training.settings import Method, TrainConfig


class RowMethod:
    """Train a row of the bank (none of it for ``frozen``) and the head, in one flat tensor."""

    def __init__(self, encoder: Encoder, head: Head, layout: Layout, seed: int) -> None:
        self.head, self.layout = head, layout
        flat = torch.cat([torch.zeros(layout.n), head.init(seed, _init_std(encoder))])
        self.flat = flat.to(encoder.device)[None].requires_grad_(True)  # (1, n + head)
        self.tensors = [self.flat]
        self.encoder_count, self.head_count = layout.n, head.size

    def views(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the row by module path, ``(1, length)`` each, and the head's tensors by name."""
        *parts, head = torch.split(self.flat, [*self.layout.lengths, self.head.size], dim=1)
        shifts = {s.path: part for s, part in zip(self.layout.sites, parts, strict=True)}
        return shifts, self.head.split(head[0])

    def trained(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the row ``(n,)`` and the head's tensors by name, without gradients."""
        flat = self.flat.detach()[0]
        return flat[: self.layout.n], self.head.split(flat[self.layout.n :])

    def after_backward(self) -> None:
        """Nothing to mask: everything in the tensor is trained."""

    def install(self) -> None:
        """Nothing to put in place: the encoder reads the row it is given."""

    def uninstall(self) -> None:
        """Nothing to take back: the encoder was never changed."""


class MatrixMethod:
    """Train the model's own parameters, all of them or a random choice, and the head."""

    def __init__(
        self, encoder: Encoder, head: Head, masks: Mapping[str, Tensor] | None, seed: int
    ) -> None:
        if encoder.dtype != torch.float32:
            raise UsageError("methods full and random train fp32 weights: use --dtype fp32")
        self.head, self.layout = head, Layout(())
        self.parameters = encoder_parameters(encoder, head)
        if masks is not None:
            self.parameters = {k: p for k, p in self.parameters.items() if masks[k].any()}
        self.masks = masks
        self.original = {name: p.data for name, p in self.parameters.items()}
        self.values = {name: p.data.clone() for name, p in self.parameters.items()}
        flat = head.init(seed, _init_std(encoder)).to(encoder.device)
        self.flat = flat.requires_grad_(True)
        self.tensors = [*self.parameters.values(), self.flat]
        self.encoder_count = (
            sum(p.numel() for p in self.parameters.values())
            if masks is None
            else sum(int(masks[k].sum()) for k in self.parameters)
        )
        self.head_count = head.size

    def views(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return no row (the matrices themselves change) and the head's tensors by name."""
        return {}, self.head.split(self.flat)

    def trained(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return an empty row and the head's tensors by name, without gradients."""
        flat = self.flat.detach()
        return flat.new_empty(0), self.head.split(flat)

    def after_backward(self) -> None:
        """Zero the gradient of what was not chosen, so that it neither moves nor is clipped by."""
        if self.masks is not None:
            for name, parameter in self.parameters.items():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.masks[name])

    def install(self) -> None:
        """Let the encoder compute with this run's own copy of the parameters."""
        for name, parameter in self.parameters.items():
            parameter.data = self.values[name]
            parameter.requires_grad_(True)

    def uninstall(self) -> None:
        """Give the encoder its own parameters back, frozen."""
        for name, parameter in self.parameters.items():
            parameter.data = self.original[name]
            parameter.grad = None
            parameter.requires_grad_(False)


def encoder_parameters(encoder: Encoder, head: Head) -> dict[str, nn.Parameter]:
    """Return every parameter of the encoder and, where the head uses it, of the pooler."""
    named = dict(encoder.model.named_parameters())
    if encoder.pooler is not None and head.pooling == "pooler":
        named |= {f"pooler.{k}": p for k, p in encoder.pooler.named_parameters()}
    return named


def make_method(encoder: Encoder, head: Head, config: TrainConfig) -> RowMethod | MatrixMethod:
    """Return what ``config.method`` trains on ``encoder``.

    Raises:
        NoBiases: bias tuning of a base without biases.
        UnknownTerm: terms that this base does not have.
        UsageError: an unknown method.
    """
    if config.method in ("bitfit", "frozen"):
        terms = config.terms if config.method == "bitfit" else "none"
        inert = () if config.recipe == "paper" else encoder.inert_terms
        sites = choose_sites(encoder.sites, terms, inert=inert)
        if head.pooling != "pooler":
            sites = _without_pooler(sites, terms, head)
        if config.method == "bitfit" and not sites:
            raise NoBiases("no bias is selected: use --method frozen to train the head alone")
        return RowMethod(encoder, head, Layout(sites), config.seed)
    if config.method == "full":
        return MatrixMethod(encoder, head, None, config.seed)
    if config.method not in get_args(Method):
        raise UsageError(f"unknown method {config.method!r}: {', '.join(get_args(Method))}")
    return MatrixMethod(encoder, head, random_masks(encoder, head, config), config.seed)


def _without_pooler(sites: tuple[Site, ...], terms: str, head: Head) -> tuple[Site, ...]:
    """Leave out a pooler that this head does not read: its bias would never get a gradient."""
    if "pooler" in (item.strip() for item in terms.split(",")):
        raise UsageError(
            f"terms {terms!r} names the pooler, but this task pools by {head.pooling!r} and never "
            "uses it: add --pooling pooler, or leave the term out"
        )
    return tuple(s for s in sites if s.term != "pooler")


def random_masks(encoder: Encoder, head: Head, config: TrainConfig) -> dict[str, Tensor]:
    """Return which scalars a random method trains, a mask per parameter.

    ``random`` draws as many scalars as Table 4's eight terms have, uniformly from the whole model
    without replacement. ``released:random`` draws a quota per tensor with replacement, as the
    released code does; ``released:row_col`` takes per matrix one random column, or as many random
    rows as hold the bias' length (Ben Zaken et al. 2022, Table 3, "rand 100k"; the printed ACL
    version has the second).
    """
    parameters = encoder_parameters(encoder, head)
    random = np.random.default_rng((config.seed, 1))
    sites = choose_sites(encoder.sites, config.terms)
    count = sum(site.length for site in sites)
    if config.method == "random":
        chosen = _draw_exact(random, {k: p.numel() for k, p in parameters.items()}, count)
    elif config.method == "released:random":
        chosen = _draw_quota(random, {k: p.numel() for k, p in parameters.items()}, count)
    else:
        chosen = _draw_row_col(random, encoder, head)
    masks = {}
    for name, parameter in parameters.items():
        mask = torch.zeros(parameter.numel(), dtype=torch.bool)
        mask[torch.from_numpy(chosen.get(name, np.empty(0, np.int64)))] = True
        masks[name] = mask.view(parameter.shape).to(encoder.device)
    return masks


Places = dict[str, NDArray[np.int64]]


def _draw_exact(random: np.random.Generator, sizes: Mapping[str, int], count: int) -> Places:
    total = sum(sizes.values())
    places = np.sort(random.choice(total, size=min(count, total), replace=False))
    bounds = np.cumsum([0, *sizes.values()])
    return {
        name: places[np.searchsorted(places, low) : np.searchsorted(places, high)] - low
        for name, low, high in zip(sizes, bounds[:-1], bounds[1:], strict=True)
    }


def _draw_quota(random: np.random.Generator, sizes: Mapping[str, int], count: int) -> Places:
    total = sum(sizes.values())
    return {n: random.integers(0, size, int(count * size / total)) for n, size in sizes.items()}


def _draw_row_col(random: np.random.Generator, encoder: Encoder, head: Head) -> Places:
    modules = dict(encoder.model.named_modules())
    if encoder.pooler is not None and head.pooling == "pooler":
        modules |= {f"pooler.{k}" if k else "pooler": m for k, m in encoder.pooler.named_modules()}
    places: Places = {}
    for path, module in modules.items():
        if isinstance(module, BankedLinear) and module.bias is not None:
            out, width = module.weight.shape
            if random.random() < 0.5:
                column = random.integers(width)
                places[f"{path}.weight"] = np.arange(out) * width + column
            else:
                rows = random.choice(out, size=max(1, round(out / width)), replace=False)
                grid = rows[:, None] * width + np.arange(width)
                places[f"{path}.weight"] = grid.flatten()
    return places


def _init_std(encoder: Encoder) -> float:
    return float(getattr(encoder.base.config, "initializer_range", 0.02))
