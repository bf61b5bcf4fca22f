"""What ``bitfit.kernels`` computes, in plain torch and NumPy: slow, short, and without Triton.

The tests of the kernels compare with it, and those of lanes run on it where a GPU would launch
kernels. The random bits are the same, bit for bit.
"""

import numpy as np
import torch


def philox(seed, *counters, rounds=10):
    """Return the first word of Philox 4x32 (Salmon et al. 2011) of ``(c0, c1, c2, c3)``."""
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.int64).astype(np.uint64) & low for c in counters)
    seed = np.asarray(seed, dtype=np.int64).astype(np.uint64)
    key = [seed & low, seed >> np.uint64(32)]
    for _ in range(rounds):
        one, two = np.uint64(0xCD9E8D57) * c2, np.uint64(0xD2511F53) * c0
        shift = np.uint64(32)
        c0, c2 = (one >> shift) ^ c1 ^ key[0], (two >> shift) ^ c3 ^ key[1]
        c1, c3 = one & low, two & low
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    return c0


def factor(seed, row, column, kind, site, threshold):
    """Return what elements are multiplied with, as a float64 array."""
    bits = philox(seed, column, row, kind, site) >> np.uint64(1)
    return (bits.astype(np.int64) >= threshold) * (2.0**31 / (2.0**31 - threshold))


def drop(x, draws, kind, site, threshold):
    seeds, places = (part[:, None].numpy() for part in draws)
    found = factor(seeds, places, np.arange(x.shape[1]), kind, site, threshold)
    return x * torch.from_numpy(found).to(x.dtype)


class Dropped:
    """Stands in for the autograd function: autograd itself does what the kernel draws again."""

    apply = staticmethod(drop)


def attention_factors(where, sequence, heads):
    """Return what the weights of a sequence are multiplied with, ``(heads, L, L)``."""
    length = int(where.lengths[sequence])
    seed, place, threshold = where.draws[:, sequence].tolist()
    head, row, column = np.ogrid[:heads, :length, :length]
    zero = np.zeros((heads, length, length), dtype=np.int64)
    return factor(seed, zero + row + place, zero + column, zero + head, where.site, threshold)


def attend(q, k, v, where, scaling):
    contexts = []
    for sequence, (start, length) in enumerate(
        zip(where.starts.tolist(), where.lengths.tolist(), strict=True)
    ):
        own = slice(start, start + length)
        scores = torch.einsum("ihd,jhd->hij", q[own], k[own]) * scaling
        weights = scores.softmax(-1)
        if where.draws is not None:
            found = attention_factors(where, sequence, q.shape[1])
            weights = weights * torch.from_numpy(found).to(weights.dtype)
        contexts.append(torch.einsum("hij,jhd->ihd", weights, v[own]))
    return torch.cat(contexts)


class PackedAttention:
    apply = staticmethod(attend)
