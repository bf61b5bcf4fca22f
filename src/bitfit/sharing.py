"""Several tasks on one text: layers that none of their rows touches are computed once.

The pass begins with each text once. Before the first layer that a row touches, the hidden states
are repeated for every task, and the pass goes on with those. A hook on the layers does it, so no
architecture is written again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitfit.batches import Batch, Feature, pack
from bitfit.leaves import ForwardState, RowIndex
from bitfit.terms import Site


@dataclass(frozen=True)
class Shared:
    """A batch in which texts come several times, and the same with each text once."""

    distinct: Batch
    tokens: Tensor
    """``(T,)``: where each token of the batch stands in ``distinct``."""
    depth: int
    """How many layers are computed on ``distinct``."""


def share(features: Sequence[Feature], depth: int, device: torch.device) -> Shared | None:
    """Return the shared form of a batch; None where no text comes twice or no layer is shared."""
    if depth < 1:
        return None
    numbers: dict[bytes, int] = {}
    distinct: list[Feature] = []
    owners = []
    for feature in features:
        key = feature.input_ids.tobytes() + feature.token_type_ids.tobytes()
        if key not in numbers:
            numbers[key] = len(distinct)
            distinct.append(feature)
        owners.append(numbers[key])
    if len(distinct) == len(features):
        return None
    starts = np.cumsum([0, *(len(feature) for feature in distinct)])
    tokens = [np.arange(starts[owner], starts[owner + 1]) for owner in owners]
    return Shared(
        pack(distinct).to(device), torch.from_numpy(np.concatenate(tokens)).to(device), depth
    )


class Layers:
    """The layers of an encoder in their order, as far as its sites tell them apart."""

    def __init__(self, model: nn.Module, sites: Iterable[Site]) -> None:
        found: dict[int, nn.Module] = {}
        self._first: dict[str, int] = {}
        for site in sites:
            module = _layer_of(model, site)
            if module is not None:
                assert site.layer is not None
                found[site.layer] = module
            if site.term != "pooler":  # it comes after all layers
                self._first[site.path] = 0 if module is None else site.layer or 0
        # Layers that share their weights, as ALBERT's, are one module: nothing to tell apart.
        known = sorted(found) == list(range(len(found)))
        self.modules = [found[i] for i in sorted(found)] if known else []

    def depth(self, touched: Iterable[str]) -> int:
        """Return how many of the first layers are the base's where ``touched`` are not."""
        most = len(self.modules)
        return min((self._first[path] for path in touched if path in self._first), default=most)

    @contextmanager
    def repeating(
        self, shared: Shared, batch: Batch, state: ForwardState, index: RowIndex | None
    ) -> Iterator[None]:
        """Return a context in which a pass over ``shared.distinct`` goes on as one over ``batch``.

        Args:
            shared: the shared form of ``batch``.
            batch: what is computed from layer ``shared.depth`` on.
            state: what the leaves read.
            index: the row of each token of ``batch``.
        """

        def before(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if number == shared.depth:
                args = (args[0].index_select(1, shared.tokens), *args[1:])
                state.index = index
            return args, kwargs | {"bitfit_batch": batch}

        hooks = [
            module.register_forward_pre_hook(
                lambda _, args, kwargs, n=number: before(n, args, kwargs), with_kwargs=True
            )
            for number, module in enumerate(self.modules)
            if number >= shared.depth
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _layer_of(model: nn.Module, site: Site) -> nn.Module | None:
    """The member of a list of modules that ``site`` is in and that has its number."""
    module: nn.Module = model
    if site.layer is None:
        return None
    for name in site.path.split("."):
        inner = getattr(module, name, None)
        if inner is None:
            return None
        if isinstance(module, nn.ModuleList) and name == str(site.layer):
            return inner if isinstance(inner, nn.Module) else None
        module = inner
    return None
