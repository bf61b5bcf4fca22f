"""How many runs train side by side: chosen once, from a short measurement and the memory."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitfit.encoder import Encoder
from bitfit.fused_dropout import has_kernels
from bitfit.training.lane import Lane, Progress
from bitfit.training.methods import make_method
from bitfit.training.processes import ALONE, Processes
from bitfit.training.settings import ROW_METHODS
from bitfit.training.train import Trainer, pass_tokens

MOST = 64
# More lanes must gain at least this much to be worth their memory and their coarser refilling.
LEAST_GAIN = 1.05
_TIMED_STEPS = 3
# Of the memory that is free, how much the activations of all lanes may take.
_MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class LaneRate:
    """What a number of lanes reached in the measurement."""

    lanes: int
    tokens_per_second: float


def can_share(encoder: Encoder, lanes: Sequence[Lane]) -> bool:
    """Whether these runs can be in one forward pass: rows of a base that runs packed."""
    return encoder.shares_passes and all(lane.config.method in ROW_METHODS for lane in lanes)


def choose_lane_count(
    encoder: Encoder,
    lanes: Sequence[Lane],
    most: int = MOST,
    processes: Processes = ALONE,
) -> int:
    """Return how many of ``lanes`` to train side by side; 1 where they cannot share a pass.

    It takes as long as some twenty steps. The answer depends on the machine's mood, so it must be
    recorded: a run is repeated or resumed with the number it had. Of several processes each
    measures its own share of a step, and the main one's answer is taken.
    """
    if len(lanes) == 1 or not can_share(encoder, lanes):
        return 1
    best = LaneRate(1, 0.0)
    by_itself = Processes(processes.rank, processes.count)
    for found in measure_lane_counts(encoder, lanes, most, by_itself):
        if found.tokens_per_second > LEAST_GAIN * best.tokens_per_second:
            best = found
        elif found.lanes > 2 * best.lanes:  # two steps without a gain: it will not come any more
            break
    return processes.first(best.lanes)


def measure_lane_counts(
    encoder: Encoder, lanes: Sequence[Lane], most: int = MOST, processes: Processes = ALONE
) -> Iterator[LaneRate]:
    """Yield the speed of 1, 2, 4, ... of ``lanes`` side by side, as long as the memory suffices.

    Nothing is changed: copies of the runs take the steps.
    """
    free = free_memory(encoder.device)
    count = 1
    while count <= min(most, len(lanes)):
        if activation_bytes(encoder, lanes[:count]) > _MEMORY_SHARE * free:
            return
        yield LaneRate(count, training_speed(encoder, lanes[:count], processes))
        count *= 2


def training_speed(encoder: Encoder, lanes: Sequence[Lane], processes: Processes = ALONE) -> float:
    """Return real tokens per second of ``lanes`` side by side, the best of some steps.

    One more step warms up. Nothing is changed: copies of the runs take the steps.
    """
    trials = [copy.copy(lane) for lane in lanes]
    for trial in trials:
        trial.progress = Progress()
    method = make_method(encoder, trials, len(trials))
    trainer = Trainer(encoder=encoder, method=method, lanes=trials, processes=processes)
    method.install()
    try:
        steps = trainer.steps_only()
        rates = []
        for _ in range(1 + _TIMED_STEPS):
            began = time.perf_counter()
            tokens = next(steps).tokens
            if encoder.device.type == "cuda":
                torch.cuda.synchronize(encoder.device)
            rates.append(tokens / (time.perf_counter() - began))
        return max(rates[1:])
    finally:
        method.uninstall()


def activation_bytes(encoder: Encoder, lanes: Sequence[Lane]) -> int:
    """Return about how many bytes a step of ``lanes`` keeps for its backward pass."""
    config: Any = encoder.base.config
    longest = [_most_tokens(lane) for lane in lanes]
    # One pass after the other: each is done with its own before the next begins.
    tokens = min(sum(longest), max(pass_tokens(encoder.device), *longest))
    hidden = encoder.hidden_size
    inner = int(getattr(config, "intermediate_size", 4 * hidden))
    layers = int(getattr(config, "num_hidden_layers", 12))
    length = max(len(f) for lane in lanes for f in lane.train.features.items)
    heads = int(getattr(config, "num_attention_heads", 12))
    # Per token and layer: projections, norms and masks; the MLP; weights and masks of attention,
    # which kernels do not keep.
    scores = 0 if has_kernels(encoder.device) else 4 * heads * length
    numbers = 14 * hidden + 3 * inner + scores
    return tokens * layers * numbers * encoder.dtype.itemsize


def _most_tokens(lane: Lane) -> int:
    """The tokens of the largest batch that a lane can draw."""
    lengths = sorted((len(f) for f in lane.train.features.items), reverse=True)
    return sum(lengths[: lane.config.batch_size])


def free_memory(device: torch.device) -> int:
    """Return the bytes that ``device`` can give."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            # Not MemFree: a machine that has read files keeps them in what it could give.
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    # Other systems say how much there is, not how much of it is left: a quarter, to be careful.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
