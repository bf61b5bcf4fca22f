"""What products are done in: the precisions there are, which is fastest, and turning one on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from bitfit.base import choose_device
from bitfit.errors import UsageError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Precisions that are types of their own; ``auto`` chooses among them."""
PRECISIONS = {**DTYPES, "tf32": torch.float32}
"""All that can be asked for, by name. tf32: fp32 whose products a GPU rounds to 10 bits."""
# Held while torch's switch for the products of GPUs is turned. Taken before an encoder's own lock.
_SWITCHED = threading.RLock()


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a precision among :data:`DTYPES`."""
    return next(name for name, value in DTYPES.items() if value == dtype)


@dataclass(frozen=True)
class Precision:
    """Which precision this machine multiplies fastest in, as measured."""

    dtype: torch.dtype
    gflops: Mapping[str, float]
    """Billions of floating-point operations per second, by precision."""


def measure_precision(device: torch.device, hidden: int = 384, tokens: int = 512) -> Precision:
    """Time fp32 and bf16 matrix products of the encoder's shape; takes some 50 ms.

    bf16 is chosen where it is at least 1.3 times as fast: below that, its rounding buys nothing.
    """
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x = torch.ones(tokens, hidden, dtype=dtype, device=device)
        w = torch.ones(4 * hidden, hidden, dtype=dtype, device=device)
        seconds = _best_time(lambda x=x, w=w: F.linear(x, w), device)  # type: ignore[misc]
        rates[name] = 2 * tokens * hidden * 4 * hidden / seconds / 1e9
    best = torch.bfloat16 if rates["bf16"] > 1.3 * rates["fp32"] else torch.float32
    return Precision(best, rates)


def choose_place(dtype: str, device: str) -> torch.device:
    """Return the device that ``device`` means, once it is known to have the precision.

    Raises:
        UsageError: an unknown precision, or one that the device does not have.
        BaseModelError: a device that is not there.
    """
    if dtype not in ("auto", *PRECISIONS):
        known = ", ".join(PRECISIONS)
        raise UsageError(f"dtype {dtype!r} is not one of auto, {known}", field="dtype")
    place = choose_device(device)
    if dtype == "tf32" and not _has_tf32(place):
        raise UsageError(
            f"dtype 'tf32' is a form of product that NVIDIA's GPUs have (Ampere and newer), and "
            f"this is to run on {place}: use fp32, bf16 or auto"
        )
    return place


def precision_here(dtype: str, device: str = "auto") -> str:
    """Return a recorded precision as ``device`` has it: fp32 for tf32 where there is none."""
    return "fp32" if dtype == "tf32" and not _has_tf32(choose_device(device)) else dtype


def _has_tf32(place: torch.device) -> bool:
    if place.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(place) >= (8, 0)


@contextmanager
def exact_as(device: torch.device, *, tf32: bool) -> Iterator[None]:
    """Return a context in which a GPU rounds the factors of fp32 products, or does not.

    torch has one switch for the whole process, so it is turned for the time of a pass, and back
    after it: the caller's own products keep theirs. Passes of other threads on GPUs wait, as they
    may be of another precision.
    """
    if device.type != "cuda":
        yield
        return
    # Not torch.get_float32_matmul_precision, which fails once somebody used this newer switch.
    switch: Any = torch.backends.cuda.matmul
    with _SWITCHED:
        before = switch.fp32_precision
        switch.fp32_precision = "tf32" if tf32 else "ieee"
        try:
            yield
        finally:
            switch.fp32_precision = before


def _best_time(call: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)
