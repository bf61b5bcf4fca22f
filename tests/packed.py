"""Packed batches of given lengths, and the parts that the masks of several runs are made of."""

import numpy as np
import torch

from bitfit.batches import Feature, pack
from bitfit.dropout import DropoutBits


def batch_of(lengths):
    return pack([Feature(np.arange(n), np.zeros(n, np.int64), i) for i, n in enumerate(lengths)])


def parts_of(runs, rates=None, seeds=None):
    """Return the bits and the batch of each of several runs, and the batch of all.

    Args:
        runs: the lengths of each run's sequences.
        rates: each run's own on attention; None: the base's.
        seeds: None: 0, 1, ...
    """
    seeds, rates = seeds or range(len(runs)), rates or [None] * len(runs)
    parts = [
        (DropoutBits(seed, 1, torch.device("cpu"), attention_rate=rate), batch_of(lengths))
        for seed, lengths, rate in zip(seeds, runs, rates, strict=True)
    ]
    return parts, batch_of([n for lengths in runs for n in lengths])
