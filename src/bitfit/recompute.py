"""Less memory for more time: a layer keeps its input only and is computed again in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bitfit.leaves import BankedLinear, ForwardState


def recompute_layers(model: nn.Module, state: ForwardState) -> int:
    """Let every layer of ``model`` be recomputed while ``state.recompute``; return how many."""
    layers = _layers(model)
    for layer in layers:
        _wrap(layer, state)
    return len(layers)


def _layers(model: nn.Module) -> list[nn.Module]:
    """The members of the innermost lists of modules that hold matrices, as ``encoder.layer``."""
    found = []
    for holder in model.modules():
        if isinstance(holder, nn.ModuleList):
            inner = [
                m for m in holder.modules() if isinstance(m, nn.ModuleList) and m is not holder
            ]
            members = [m for m in holder if any(isinstance(x, BankedLinear) for x in m.modules())]
            found += members if not inner else []
    return found


def _wrap(layer: nn.Module, state: ForwardState) -> None:
    forward = layer.forward

    def again(*args: Any, **kwargs: Any) -> Any:
        if not (state.recompute and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        # The backward pass comes when the encoder has let go of its rows and its random bits have
        # moved on: both are taken back to where they were here.
        seen = state.snapshot()

        def run(*args: Any, **kwargs: Any) -> Any:
            with state.returned_to(seen):
                return forward(*args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, **kwargs)

    layer.forward = again
