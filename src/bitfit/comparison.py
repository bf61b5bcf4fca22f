"""Looking at finished tasks: how far their biases moved, and what storing them in less costs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitfit.errors import WrongBase
from bitfit.rounding import STORAGE_TYPES, StorageType, dequantize, quantize
from bitfit.taskfile import TaskFile, stretches


def storage_loss(bias: Tensor, layout: object) -> dict[StorageType, dict[str, float]]:
    """Return what storing ``bias`` ``(n,)`` in each type would lose, and its bytes.

    Args:
        bias: fp32 values. Those of a file stored in less are taken as they are in the file.
        layout: as in the task file.

    Returns:
        Storage type -> ``max_error`` and ``mean_error`` (absolute; infinite where a value does not
        fit) and ``bytes`` of the biases alone.
    """
    lengths = [length for *_, length in stretches(layout)]
    bias = bias.detach().cpu().float()
    found: dict[StorageType, dict[str, float]] = {}
    for name, dtype in STORAGE_TYPES.items():
        size = bias.numel() * dtype.itemsize
        if name == "int8":
            back = dequantize(*quantize(bias, lengths), lengths)
            size += 4 * len(lengths)
        else:
            back = bias.to(dtype).float()
        error = (back - bias).abs()
        found[name] = {
            "max_error": error.max().item() if error.numel() else 0.0,
            "mean_error": error.mean().item() if error.numel() else 0.0,
            "bytes": size,
        }
    return found


def bias_change(file: TaskFile) -> list[dict[str, Any]]:
    """Return ``term``, ``layer`` and ``mean_abs`` of every site, in the order of the row.

    The amount of change of Ben Zaken et al. 2022, section 4 and Figure 1: the mean over a bias
    vector's values of the absolute difference to the base.
    """
    changes = file.bias.double().abs()  # in fp32 the sum of large ones is infinite
    return [
        {"term": term, "layer": layer, "mean_abs": changes[start : start + length].mean().item()}
        for term, layer, start, length in stretches(file.layout)
    ]


def compare(a: TaskFile, b: TaskFile) -> list[dict[str, Any]]:
    """Return how far two tasks of one base moved, and how much in one direction.

    Returns:
        One row per site: ``term``, ``layer``, ``cosine`` (None where either did not move),
        ``norm_a``, ``norm_b`` (L2), ``mean_abs_a``, ``mean_abs_b``. A site that one file lacks
        counts as zero there. Then a row ``total``; then, where the label names agree, a row
        ``head.NAME`` for each tensor of the heads.

    Raises:
        WrongBase: the two were made for different bases.
    """
    if (a.base.sha256, a.base.config_hash) != (b.base.sha256, b.base.config_hash):
        raise WrongBase(
            f"{a.task.name!r} was made for base {a.base.short}, {b.task.name!r} for "
            f"{b.base.short}: differences to different bases cannot be compared"
        )
    left, right = _by_site(a), _by_site(b)
    rows, pairs = [], []
    for site in dict.fromkeys([*left, *right]):
        x = left[site] if site in left else torch.zeros_like(right[site])
        y = right[site] if site in right else torch.zeros_like(x)
        rows.append(_compare_row(*site, x, y))
        pairs.append((x, y))
    nothing = torch.zeros(0, dtype=torch.float64)
    total = [torch.cat([nothing, *(pair[i] for pair in pairs)]) for i in (0, 1)]
    rows.append(_compare_row("total", None, *total))
    if (a.task.kind, a.task.labels) == (b.task.kind, b.task.labels):
        for name, tensor in a.head.items():
            if name in b.head and b.head[name].shape == tensor.shape:
                x, y = tensor.double().flatten(), b.head[name].double().flatten()
                rows.append(_compare_row(f"head.{name}", None, x, y))
    return rows


def _by_site(file: TaskFile) -> dict[tuple[str, int | None], Tensor]:
    return {
        (term, layer): file.bias[start : start + length].double()
        for term, layer, start, length in stretches(file.layout)
    }


def _compare_row(term: str, layer: int | None, x: Tensor, y: Tensor) -> dict[str, Any]:
    norm_a, norm_b = x.norm().item(), y.norm().item()
    moved = norm_a > 0 and norm_b > 0
    return {
        "term": term,
        "layer": layer,
        "cosine": (x / norm_a).dot(y / norm_b).item() if moved else None,
        "norm_a": norm_a,
        "norm_b": norm_b,
        "mean_abs_a": x.abs().mean().item() if x.numel() else 0.0,
        "mean_abs_b": y.abs().mean().item() if y.numel() else 0.0,
    }
