"""Time things side by side: in turns, so that whatever else the machine does strikes all alike."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from bitfit.doctor import cpu_name, package_version
from bitfit.encoder import Encoder
from bitfit.leaves import BankedLinear
from bitfit.precision import DTYPES

PRODUCT_REPEATS = 3
# Where bf16 is emulated its products can take 30 times as long: one step tells enough then.
SLOW = 4.0


class Products:
    """The matrix products of one training step: the part of it that cannot be avoided.

    For every matrix of the encoder, each with memory of its own, the forward product and the one
    that carries the gradient back: 4 floating-point operations per weight and token.
    """

    def __init__(self, encoder: Encoder, tokens: int, precision: str) -> None:
        dtype, self.device = DTYPES[precision], encoder.device
        leaves = [m for m in encoder.model.modules() if isinstance(m, BankedLinear)]
        self.weights = [leaf.weight.detach().to(dtype).clone() for leaf in leaves]
        sizes = {size for weight in self.weights for size in weight.shape}
        self.inputs = {n: torch.randn(tokens, n).to(self.device, dtype) for n in sizes}
        self.outputs = {n: torch.empty_like(x) for n, x in self.inputs.items()}
        self.flops = 4 * tokens * sum(weight.numel() for weight in self.weights)

    @torch.no_grad()
    def gflops(self, repeats: int = PRODUCT_REPEATS) -> float:
        """Return billions of floating-point operations per second, the best of a few passes."""
        seconds = min(timed(self._multiply, self.device) for _ in range(repeats))
        return self.flops / seconds / 1e9

    def _multiply(self) -> None:
        for weight in self.weights:
            out, width = weight.shape
            torch.mm(self.inputs[width], weight.t(), out=self.outputs[out])
        for weight in reversed(self.weights):
            out, width = weight.shape
            torch.mm(self.inputs[out], weight, out=self.outputs[width])


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that ``call`` takes on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def in_turns(
    measures: Mapping[str, Callable[[int], float]],
    rounds: int,
    once: Collection[str] = (),
    on_turn: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Return what each of ``measures`` gave in every round, all of them once a round.

    A round 0 warms up and is not kept. Each round begins with another of them, so that none always
    follows the same. ``measures`` get the number of the round. Those named in ``once`` have a turn
    in round 1 only.
    """
    names = list(measures)
    values: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            on_turn(name)
            if name in once and turn != 1:
                continue
            value = measures[name](turn)
            if turn:
                values[name].append(value)
    return values


def slow_precisions(gflops: Mapping[str, float]) -> frozenset[str]:
    """Return the precisions that this machine multiplies in several times slower than in fp32."""
    return frozenset(name for name, rate in gflops.items() if rate * SLOW < gflops["fp32"])


def medians(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median of each."""
    return {name: statistics.median(found) for name, found in values.items()}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return what the numbers were measured on, ready for JSON."""
    cuda = device.type == "cuda"
    return {
        "cpu": cpu_name(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def describe_versions() -> dict[str, str | None]:
    """Return the versions of what was measured; None: not installed."""
    names = ("bitfit", "torch", "transformers", "peft")
    return {"python": platform.python_version(), **{name: package_version(name) for name in names}}
