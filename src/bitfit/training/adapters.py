"""Adapters of the peft library (extra ``peft``), trained under the same protocol as all else here.

peft makes the modules and their arithmetic; they are put in the place of the encoder's leaves while
a run trains, and taken out again. Where they go is said by our own table of terms
(:data:`bitfit.terms.FAMILIES`), which matches whole: peft's own default of IA3 for BERT,
``output.dense``, also takes every ``attention.output.dense``.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitfit.bank import Layout
from bitfit.encoder import Encoder
from bitfit.errors import MissingExtra, UsageError
from bitfit.heads import Head
from bitfit.leaves import BankedLayerNorm, BankedLinear
from bitfit.terms import FAMILIES, paths_pattern
from bitfit.training.single import Numbers, SingleRun

# The prefix that a PeftModel writes before the names of the model it is around.
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Adapter:
    """One of peft's methods as it is used here."""

    config: str
    """peft's configuration class."""
    terms: tuple[str, ...] = ()
    """The modules that are adapted, by the term that their bias has; empty: every LayerNorm."""
    feedforward: tuple[str, ...] = ()
    """IA3: of those, the modules whose input is scaled, not the output."""
    options: Mapping[str, Any] = field(default_factory=dict)


# LoRA: Hu et al. 2021, query and value, with peft's defaults but alpha (8 there).
# IA3: Liu et al. 2022, keys, values and what the feed-forward layer has inside.
# LayerNorm tuning: Zhao et al. 2023, in peft "LN tuning"; gains and biases of all.
_ADAPTERS = {
    "peft:lora": _Adapter(
        "LoraConfig", ("query", "value"),
        options={"r": 8, "lora_alpha": 16, "lora_dropout": 0.0},
    ),
    "peft:ia3": _Adapter("IA3Config", ("key", "value", "output"), ("output",)),
    "peft:layernorm": _Adapter("LNTuningConfig"),
}  # fmt: skip


class AdapterMethod(SingleRun):
    """Train the adapters of one of peft's methods, in fp32, and the head.

    Args:
        encoder: the base; as before once this is made.
        head: of every run that will come.
        method: ``peft:lora``, ``peft:ia3`` or ``peft:layernorm``.

    Raises:
        MissingExtra: without peft.
        UsageError: a family of which it is not known where the adapted modules stand.
    """

    def __init__(self, encoder: Encoder, head: Head, method: str) -> None:
        super().__init__(encoder, head)
        self.model, self.description = encoder.model, describe_adapter(encoder, method)
        peft = _import_peft(method)
        self.leaves, self.modules = _made_by_peft(peft, encoder, self.description)
        """By path: the encoder's own leaves, and what stands in their place in a run."""
        self.parameters = {
            f"{path}.{name}": parameter
            for path, module in self.modules.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        for parameter in self.parameters.values():  # peft makes them in the precision of the base
            parameter.data = parameter.data.float()
        self.start = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.tensors = self.numbers()

    def numbers(self) -> Numbers:
        """Return the adapters' parameters and the head; not copies."""
        return [*self.parameters.values(), self.flat]

    def encoder_count(self, layout: Layout) -> int:
        """Return how many values the adapters have."""
        return sum(p.numel() for p in self.parameters.values())

    @torch.no_grad()
    def begin(self, slot: int, layout: Layout, head: Head, seed: int) -> None:
        """Start a run: adapters that change nothing yet, and a fresh head.

        All begin where peft lets them begin; LoRA's A, which is random, is drawn as peft draws it
        but from ``seed``, and not from torch's global generator.
        """
        state = np.random.SeedSequence((seed, 2)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        for name, parameter in self.parameters.items():
            parameter.copy_(self.start[name])
            if ".lora_A." in name:
                drawn = torch.empty(parameter.shape)
                nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
                parameter.copy_(drawn)
        self.flat.copy_(head.init(seed, self.std))

    def install(self) -> None:
        """Put the adapters into the encoder."""
        _put(self.model, self.modules)

    def uninstall(self) -> None:
        """Put the encoder's own leaves back, the very same."""
        _put(self.model, self.leaves)
        for parameter in self.parameters.values():
            parameter.grad = None

    def named(self) -> dict[str, Tensor]:
        """Return the adapters by the names that peft gives them in its own files, on the CPU."""
        return {
            _PREFIX + name.replace(".default", ""): parameter.detach().cpu().clone()
            for name, parameter in self.parameters.items()
        }


def describe_adapter(encoder: Encoder, method: str) -> dict[str, Any]:
    """Return what makes peft's configuration of ``method`` for a base: its class and arguments.

    ``target_modules`` is a regular expression over whole module paths.

    Raises:
        UsageError: a family of which it is not known where the adapted modules stand, or a base
            without such modules.
    """
    adapter = _ADAPTERS[method]
    targets = _targets(encoder, method, adapter.terms)
    found = {"class": adapter.config, **adapter.options, "target_modules": targets}
    if adapter.feedforward:
        found["feedforward_modules"] = _targets(encoder, method, adapter.feedforward)
    return found


def check_installed(method: str) -> None:
    """Refuse ``method`` at once where it needs peft and there is none.

    Raises:
        MissingExtra: naming the extra.
    """
    if method in _ADAPTERS and importlib.util.find_spec("peft") is None:
        raise MissingExtra(f"method {method!r}", "peft")


def _import_peft(method: str) -> Any:
    check_installed(method)
    with warnings.catch_warnings():  # of names in transformers that peft still uses
        warnings.simplefilter("ignore")
        import peft
    return peft


def _targets(encoder: Encoder, method: str, terms: Iterable[str]) -> str:
    """Return a pattern of the modules of ``terms``, or of every LayerNorm where there are none."""
    family = str(encoder.base.config.model_type)
    if not terms:
        modules = encoder.model.named_modules()
        paths = {path for path, module in modules if isinstance(module, BankedLayerNorm)}
        if not paths:
            raise UsageError(f"base {encoder.base.name!r} has no LayerNorm for method {method!r}")
    elif family not in FAMILIES:
        raise UsageError(
            f"method {method!r} adapts {', '.join(terms)}, and where these stand in a base of "
            f"family {family!r} is not known; it is for {', '.join(FAMILIES)}"
        )
    else:
        paths = {FAMILIES[family][term] for term in terms}
    return paths_pattern(sorted(paths))


def _made_by_peft(
    peft: Any, encoder: Encoder, description: Mapping[str, Any]
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Return by path the leaves that peft replaces and what by; the encoder keeps its own."""
    model, options = encoder.model, dict(description)
    leaves: dict[str, nn.Module] = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, BankedLinear | BankedLayerNorm)
    }
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # peft does not know our LayerNorm's size
        config = getattr(peft, options.pop("class"))(**options)
        peft.inject_adapter_in_model(config, model)
    found = {path: model.get_submodule(path) for path in leaves}
    made = {path: module for path, module in found.items() if module is not leaves[path]}
    leaves = {path: leaves[path] for path in made}
    _put(model, leaves)
    del model.peft_config
    return leaves, made


def _put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for path, module in modules.items():
        holder, _, name = path.rpartition(".")
        setattr(model.get_submodule(holder), name, module)
