"""Everything that is to be measured on a GPU, in one call without network or data.

    python benchmarks/gpu.py --out gpu-results        # under nine minutes
    python benchmarks/gpu.py --parts lanes --sizes large
    python benchmarks/gpu.py --smoke                  # tiny sizes, any device: does it run?

Bases of BERT's two sizes with random weights, random tokens, and sentences as long as those of MRPC
(RTE for the grid): speed does not depend on what weights and tokens say. With ``--base`` and
``--data`` a real checkpoint on the real rows. Each part stands alone: one that fails is a row of
the table, and the exit code is 1. Results are written after every part.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from bitfit.base import choose_device, quiet_transformers
from bitfit.batches import Feature, Features, pack
from bitfit.bench.memory import measure_peak
from bitfit.bench.ours import one_after_another, side_by_side
from bitfit.bench.runs import Run, Unavailable, Variant, product_tokens, products_name
from bitfit.bench.runs import time_in_turns as time_variants
from bitfit.bench.timing import describe_machine, describe_versions, medians, timed
from bitfit.bench.variants import FROZEN_FLOPS, bias_step
from bitfit.bench.work import Table, Work, choose_sources, read_source
from bitfit.dropout import DropoutBits, StepDropout
from bitfit.encoder import Encoder, open_encoder
from bitfit.fused_dropout import FusedDropout, has_kernels
from bitfit.inference import TaskHead, compute_logits
from bitfit.tasks import Task, TextExample
from bitfit.training.lane import Lane, Split
from bitfit.training.methods import RowMethod, make_method
from bitfit.training.settings import PAPER_RATES, TrainConfig
from bitfit.training.train import StepDone, Trainer

# Tokens of a training pair in the uncased vocabulary, cut at 128: percentiles 0, 5, ..., 100.
LENGTHS = {
    "mrpc": (19, 32, 36, 39, 41, 44, 45, 47, 50, 51, 53, 55, 57, 59, 61, 62, 64, 67, 70, 74, 103),
    "rte": (13, 29, 33, 37, 40, 43, 45, 47, 50, 53, 56, 59, 62, 67, 72, 85, 103, 120, 128, 128,
            128),
}  # fmt: skip
TASK = Task(name="pairs", kind="classification", labels=("no", "yes"), is_pair=True)
# Largest differences that pass. Packed against padded: relative to the largest hidden state; lanes
# against runs alone: of logits after LANE_STEPS steps (on the CPU, tests/test_lanes.py: 1e-5).
FP32_TOLERANCE, BF16_TOLERANCE, LANE_TOLERANCE = 1e-4, 5e-2, 1e-4
LANE_STEPS = 20
SIGMAS = 5.0  # that a statistic of dropout may be off
GRID_CAP = 200.0  # seconds after which the grid's time is projected from what is done


@dataclass(frozen=True, kw_only=True)
class Size:
    """A base, and how much is measured on it."""

    name: str
    config: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is measured."""

    sizes: dict[str, Size]
    vocabulary: int = 30522
    batch_size: int = 8
    lanes: Sequence[int] = (1, 4, 16, 64)
    kernel_lanes: Sequence[int] = (1, 20, 64)
    rounds: int = 3
    steps: int = 12  # of one lane in a turn; of more lanes fewer
    rows: int = 2490
    dev_rows: int = 277
    epochs: int = 10
    seeds: int = 5
    draws: int = 1 << 24
    compile_options: dict[str, dict[str, Any]] = field(default_factory=dict)


def _bert(name: str, hidden: int, layers: int, heads: int) -> Size:
    config = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return Size(name=name, config=config | {"intermediate_size": 4 * hidden})


FULL = Scale(
    sizes={
        "base": _bert("base", 768, 12, 12),
        "large": _bert("large", 1024, 24, 16),
        "mini": _bert("mini", 384, 6, 12),
    },
    compile_options={
        "longest": {"dynamic": True},  # as many shapes as lengths
        "128": {"dynamic": False, "mode": "reduce-overhead"},  # one shape: CUDA graphs
    },
)
SMOKE = Scale(
    sizes={
        "base": _bert("base", 32, 2, 4), "large": _bert("large", 48, 2, 4),
        "mini": _bert("mini", 16, 1, 2),
    },
    vocabulary=120, batch_size=4, lanes=(1, 3), kernel_lanes=(1, 3), rounds=1, steps=2, rows=24,
    dev_rows=6, epochs=1, seeds=1, draws=1 << 16,
    compile_options={"longest": {"backend": "eager", "dynamic": True}},
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every part is given."""

    scale: Scale
    device: torch.device
    folder: Path
    base: str | None
    data: str | None
    deadline: float

    @property
    def left(self) -> float:
        """Seconds until all must be done."""
        return self.deadline - time.monotonic()

    def checkpoint(self, size: str) -> str:
        """Return a base with random weights, made when first asked for; or the real one."""
        if self.base is not None:
            return self.base
        path = self.folder / size
        if not path.exists():
            make_checkpoint(path, self.scale, self.scale.sizes[size], self.device)
        return str(path)

    def encoder(self, size: str, dtype: str = "bf16") -> Encoder:
        """Return a fresh encoder of a size."""
        return open_encoder(self.checkpoint(size), dtype, str(self.device))

    def work(self, size: str, encoder: Encoder, batches: int, lanes: int = 1) -> Work:
        """Return batches of MRPC's rows, or of random ones as long."""
        count = batches * self.scale.batch_size
        task = TASK
        if self.data is None:
            features = random_features("mrpc", count, self.scale.vocabulary)
        else:
            (source,) = choose_sources(self.data, ("mrpc",), (), ())
            task, found = read_source(encoder, source)
            features = [found[i % len(found)] for i in range(count)]
        step = self.scale.batch_size
        cut = [features[i : i + step] for i in range(0, count, step)]
        return Work(
            base=self.checkpoint(size), device=self.device, task=task, batches=cut, lanes=lanes
        )

    def table(self, size: str, encoder: Encoder, lanes: int) -> Table:
        """Return what a number of lanes trains on in a turn; more lanes take fewer steps."""
        steps = max(1, round(self.scale.steps / math.sqrt(lanes)))
        batches = steps * lanes * (self.scale.rounds + 1)
        return Table(work=self.work(size, encoder, batches, lanes), steps=steps)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table."""

    part: str
    what: str
    value: float | str | None
    unit: str = ""
    target: str = ""
    met: bool | None = None
    """Whether the target was reached, or the check held; None: there is none."""
    is_check: bool = False
    """Whether missing it is a fault, and not only slow."""


# ------------------------------------------------------------------ bases and rows


def make_checkpoint(path: Path, scale: Scale, size: Size, device: torch.device) -> None:
    """Save a BERT with random weights, and a tokenizer that nobody asks anything."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert", vocab_size=scale.vocabulary, pad_token_id=0, **size.config
    )  # fmt: skip
    with torch.device(device), quiet_transformers():
        model = AutoModel.from_config(config)
    with torch.no_grad():  # fresh biases are zero, real ones are not
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    with quiet_transformers():
        model.save_pretrained(path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    special = {f"{word[1:-1].lower()}_token": word for word in words}
    inner = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(path)


def random_features(lengths_of: str, count: int, vocabulary: int, seed: int = 0) -> list[Feature]:
    """Return pairs of random tokens whose lengths are spread as those of a GLUE task."""
    random = np.random.default_rng(seed)
    known = LENGTHS[lengths_of]
    places = random.uniform(0, len(known) - 1, count)
    lengths = np.interp(places, range(len(known)), known).round().astype(int)
    features = []
    for i, length in enumerate(lengths):
        ids = random.integers(5, vocabulary, length)
        types = (np.arange(length) >= length // 2).astype(np.int64)
        features.append(Feature(ids, types, i, label=int(random.integers(2))))
    return features


def make_split(lengths_of: str, count: int, vocabulary: int, seed: int) -> Split:
    """Return random pairs with their answers."""
    items = random_features(lengths_of, count, vocabulary, seed)
    examples = [TextExample("", "", label=feature.label) for feature in items]
    return Split(examples, Features(items, count, 0))


# ------------------------------------------------------------------ is it right?


def check_equality(bench: Bench, size: str) -> Iterator[Row]:
    """Ours against plain transformers, and lanes against runs alone."""
    from transformers import AutoModel

    part = f"equality {size}"
    encoder = bench.encoder(size, "fp32")
    features = random_features("mrpc", 32, bench.scale.vocabulary)
    batch = pack(features).to(bench.device)
    with quiet_transformers():
        plain = AutoModel.from_pretrained(
            bench.checkpoint(size), dtype=torch.float32, attn_implementation="eager",
            use_safetensors=True,
        ).to(bench.device).eval()  # fmt: skip
    with torch.no_grad():
        padded = plain(
            input_ids=torch.where(batch.mask, batch.input_ids[batch.padded_index], 0),
            token_type_ids=torch.where(batch.mask, batch.token_type_ids[batch.padded_index], 0),
            attention_mask=batch.mask.long(),
        ).last_hidden_state
        expected = padded.flatten(0, 1).index_select(0, batch.unpadded_index)
        for dtype, limit in (("fp32", FP32_TOLERANCE), ("bf16", BF16_TOLERANCE)):
            if dtype == "bf16":
                encoder = bench.encoder(size, "bf16")
            found = encoder.encode(batch, {})
            error = float((found - expected).abs().max() / expected.abs().max())
            yield Row(
                part=part, what=f"packed {dtype} against transformers fp32, relative error",
                value=error, target=f"<= {limit:g}", met=error <= limit, is_check=True,
            )  # fmt: skip
    if not encoder.shares_passes:
        yield Row(part=part, what="runs packed", value="no", met=False, is_check=True)
        return
    difference = lanes_against_alone(bench, bench.encoder(size, "fp32"))
    yield Row(
        part=part, what=f"4 lanes against alone, fp32, dropout on, {LANE_STEPS} steps: logits",
        value=difference, target=f"<= {LANE_TOLERANCE:g}", met=difference <= LANE_TOLERANCE,
        is_check=True,
    )  # fmt: skip


def lanes_against_alone(bench: Bench, encoder: Encoder) -> float:
    """Return the largest difference of logits of runs side by side and alone."""
    split = make_split("mrpc", 64, bench.scale.vocabulary, seed=1)
    probe = random_features("mrpc", 16, bench.scale.vocabulary, seed=2)
    configs = [
        TrainConfig(recipe="paper", seed=seed, learning_rate=rate, batch_size=4, epochs=10)
        for seed, rate in enumerate(PAPER_RATES["bitfit"])
    ]

    def train(chosen: Sequence[TrainConfig]) -> list[Any]:
        lanes = [Lane(encoder=encoder, task=TASK, config=c, train=split) for c in chosen]
        method = make_method(encoder, lanes, len(lanes))
        steps = Trainer(encoder=encoder, method=method, lanes=lanes).steps_only()
        for _ in range(LANE_STEPS):
            next(steps)
        found = []
        for slot, lane in enumerate(lanes):
            row, weights = method.trained(slot, lane.layout, lane.head)
            heads = {0: TaskHead(lane.head, weights)}
            found.append(compute_logits(encoder, probe, row[None], lane.layout, heads))
        return found

    together = train(configs)
    alone = [logits for config in configs for logits in train([config])]
    return float(np.abs(np.asarray(together) - np.asarray(alone)).max())


def drawn_factor(
    bench: Bench, step: int, rate: float, dtype: torch.dtype, count: int
) -> torch.Tensor:
    """Return ``count`` factors that two runs draw in a step for one site, ``(count,)``."""
    runs = [random_features("mrpc", 32, bench.scale.vocabulary, seed) for seed in (0, 1)]
    tokens = sum(len(feature) for features in runs for feature in features)
    parts = [(DropoutBits(3 + i, step, bench.device), pack(run)) for i, run in enumerate(runs)]
    width = -(-count // tokens)
    x = torch.ones(1, tokens, width, device=bench.device, dtype=dtype)
    masks = FusedDropout(parts, bench.device) if has_kernels(bench.device) else StepDropout(parts)
    return masks.drop(x, rate).flatten()[:count]


def check_dropout(bench: Bench, size: str) -> Iterator[Row]:
    """Masks have their rate, no pattern, and come again from the same seed and step."""
    rate, count = 0.1, bench.scale.draws
    steps = 2**31 if has_kernels(bench.device) else 2**16
    exact = round(rate * steps) / steps
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        factor = drawn_factor(bench, 7, rate, dtype, count)
        dropped = (factor == 0).double()
        kept = torch.full((), 1 / (1 - exact), device=bench.device, dtype=dtype)
        whole = bool(((factor == 0) | (factor == kept)).all())
        off = abs(float(dropped.mean()) - exact) / math.sqrt(exact * (1 - exact) / count)
        yield Row(
            part="dropout", what=f"{name}: share dropped, off by sigmas", value=off,
            target=f"<= {SIGMAS:g}", met=whole and off <= SIGMAS, is_check=True,
        )  # fmt: skip
        centred = dropped - exact
        worst = max(
            abs(float((centred[:-lag] * centred[lag:]).mean())) * math.sqrt(count)
            for lag in (1, 2, 3, 4, 8)
        ) / (exact * (1 - exact))
        yield Row(
            part="dropout", what=f"{name}: correlation of neighbours, sigmas", value=worst,
            target=f"<= {SIGMAS:g}", met=worst <= SIGMAS, is_check=True,
        )  # fmt: skip
        again, other = (drawn_factor(bench, step, rate, dtype, count) for step in (7, 8))
        good = torch.equal(factor, again) and not torch.equal(factor, other)
        yield Row(
            part="dropout", what=f"{name}: same (seed, step) same mask, another step another",
            value="yes" if good else "no", met=good, is_check=True,
        )  # fmt: skip


def check_determinism(bench: Bench, size: str) -> Iterator[Row]:
    """Two runs of the same seed end in the same bytes."""
    for dtype in ("fp32", "bf16"):
        encoder = bench.encoder(size, dtype)
        for lanes in (1, 4):
            work = bench.work(size, encoder, 8 * lanes, lanes)
            ends = []
            for _ in range(2):
                run = side_by_side(work, encoder)
                for number in range(8):
                    run.step(number)
                ends.append([tensor.detach().clone() for tensor in run.trained])
            same = all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
            yield Row(
                part="determinism", what=f"{dtype}, {_lanes(lanes)}: two runs, 8 steps, same bytes",
                value="yes" if same else "no", met=same, is_check=True,
            )  # fmt: skip


# ------------------------------------------------------------------ how fast is it?


def measure_lanes(bench: Bench, size: str) -> Iterator[Row]:
    """Lanes, and the best stock set-up that is not compiled."""
    part, encoder = f"lanes {size}", bench.encoder(size)
    tables = {count: bench.table(size, encoder, count) for count in bench.scale.lanes}
    one = tables[min(tables)]
    entries = {
        _lanes(count): (_ours(encoder, side_by_side), table) for count, table in tables.items()
    }
    several = max(count for count in tables if count <= 16)
    entries[f"the runs of {_lanes(several)}, one after another"] = (
        _ours(encoder, one_after_another), tables[several],
    )  # fmt: skip
    entries["stock"] = (_stock("longest", None), one)
    rates = yield from _timed(bench, part, encoder, entries)
    if "stock" in rates and _lanes(1) in rates:
        yield _against(part, "one lane to stock (bf16 autocast, sdpa)", rates, 1, "stock", 3.0)
    if _lanes(16) in rates and _lanes(1) in rates:
        yield _against(part, "16 lanes to one lane", rates, 16, _lanes(1), 8.0)


def measure_compiled(bench: Bench, size: str) -> Iterator[Row]:
    """One lane beside stock biases under torch.compile."""
    part, encoder = f"compiled {size}", bench.encoder(size)
    table = bench.table(size, encoder, 1)
    entries = {_lanes(1): (_ours(encoder, side_by_side), table)}
    for padding, options in bench.scale.compile_options.items():
        entries[f"stock compiled, padded to {padding}"] = (_stock(padding, options), table)
    rates = yield from _timed(bench, part, encoder, entries)
    stock = {name: rate for name, rate in rates.items() if name.startswith("stock")}
    if stock and _lanes(1) in rates:
        best = max(stock, key=lambda name: stock[name])
        yield _against(part, f"one lane to {best}", rates, 1, best, 3.0)


def _timed(
    bench: Bench, part: str, encoder: Encoder, entries: dict[str, tuple[Variant, Table]]
) -> Iterator[Any]:
    """Time entries in turns, yield a row for each, and return the rates by name."""
    found = time_variants(encoder, entries, bench.scale.rounds, (), lambda name: None)
    middle = medians(found.values)
    for name, note in found.notes.items():
        yield Row(part=part, what=name, value=f"failed: {note}", met=False, is_check=True)
    rates = {name: middle[name] for name in entries if name in middle}
    for name, (variant, table) in entries.items():
        if name not in rates:
            continue
        yield Row(part=part, what=name, value=rates[name], unit="tokens/s")
        gflops = middle[products_name("bf16", product_tokens(table))]
        share = rates[name] * FROZEN_FLOPS * encoder.weights / (gflops * 1e9)
        target = 0.4 if name == _lanes(64) else None
        yield Row(
            part=part, what=f"{name}: share of the roofline at {gflops / 1e3:,.1f} TFLOP/s",
            value=share, target="" if target is None else f">= {target:g}",
            met=None if target is None else share >= target,
        )  # fmt: skip
        if bench.device.type == "cuda" and "compiled" not in name:
            peak = measure_peak(partial(variant.build, table.work.first(1)), bench.device)
            yield Row(
                part=part, what=f"{name}: peak above the model", value=peak / 2**20, unit="MiB"
            )
    return rates


def _ours(encoder: Encoder, build: Callable[[Work, Encoder], Run]) -> Variant:
    return Variant(
        name="ours", title="", group="ours", precision="bf16", pads_to="packed",
        flops=FROZEN_FLOPS, build=_tried(lambda work: build(work, encoder)),
    )  # fmt: skip


def _stock(padding: str, compiled: dict[str, Any] | None) -> Variant:
    build = partial(bias_step, terms="all", padding=padding, autocast=True, compiled=compiled)
    return Variant(
        name="stock", title="", group="stock", precision="bf16", pads_to=padding,
        flops=FROZEN_FLOPS, build=_tried(build),
    )  # fmt: skip


def _tried(build: Callable[[Work], Run]) -> Callable[[Work], Run]:
    """Return a ``build`` that takes a first step, so that what fails is a note and no end."""

    def built(work: Work) -> Run:
        try:
            run = build(work)
            run.step(0)
        except OutOfTime:
            raise
        except Exception as error:
            raise Unavailable(_short(error)) from error
        return run

    return built


def _against(
    part: str, what: str, rates: dict[str, float], lanes: int, other: str, least: float
) -> Row:
    ratio = rates[_lanes(lanes)] / rates[other]
    return Row(part=part, what=what, value=ratio, target=f">= {least:g}", met=ratio >= least)


def _lanes(count: int) -> str:
    return f"{count} lane{'s' if count > 1 else ''}"


def measure_products(bench: Bench, size: str) -> Iterator[Row]:
    """The ceiling of large square bf16 products, beside which the encoder's own shapes stand."""
    n = 8192 if bench.device.type == "cuda" else 256
    a, b = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = min(timed(lambda: a @ b, bench.device) for _ in range(10))
    yield Row(
        part="products", what=f"bf16, {n} x {n}", value=2 * n**3 / seconds / 1e12, unit="TFLOP/s"
    )


def measure_kernels(bench: Bench, size: str) -> Iterator[Row]:
    """How many kernels a step has, how long they take, and how long it takes to launch them.

    Of rows by number of lanes, and of full fine-tuning, which comes alone. In tf32; on a CPU its
    operations in fp32.
    """
    on_gpu = bench.device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    for lanes, method in (*((k, "bitfit") for k in bench.scale.kernel_lanes), (1, "full")):
        encoder = bench.encoder(size, "tf32" if on_gpu else "fp32")
        table = bench.table(size, encoder, lanes)
        run = side_by_side(table.work, encoder, method)
        for number in range(table.steps):  # warms up
            run.step(number)
        seconds = min(
            timed(partial(run.step, number), bench.device) for number in range(table.steps)
        )
        with profile(activities=[activity]) as found:
            run.step(0)
            if on_gpu:
                torch.cuda.synchronize(bench.device)
        name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        events = [event for event in found.key_averages() if getattr(event, name) > 0]
        spent = sum(getattr(event, name) for event in events) / 1000
        count = float(sum(event.count for event in events))
        part, what = f"kernels {size}", f"{_lanes(lanes)}, {method}"
        yield Row(part=part, what=f"{what}: kernels of a step", value=count)
        yield Row(part=part, what=f"{what}: time in kernels", value=spent, unit="ms")
        yield Row(part=part, what=f"{what}: time of a step", value=seconds * 1000, unit="ms")


def measure_grid(bench: Bench, size: str) -> Iterator[Row]:
    """Wall time of four rates by some seeds on data of RTE's size, scored on dev every epoch."""
    scale, encoder = bench.scale, bench.encoder(size)
    train = make_split("rte", scale.rows, scale.vocabulary, seed=3)
    dev = make_split("rte", scale.dev_rows, scale.vocabulary, seed=4)
    began = time.perf_counter()
    lanes = [
        Lane(
            encoder=encoder, task=TASK, train=train, dev=dev, label=f"rate {rate:g}, seed {seed}",
            config=TrainConfig(
                recipe="paper", seed=seed, learning_rate=rate, epochs=scale.epochs,
                batch_size=scale.batch_size,
            ),
        )
        for rate in PAPER_RATES["bitfit"] for seed in range(scale.seeds)
    ]  # fmt: skip
    method = make_method(encoder, lanes, len(lanes))
    assert isinstance(method, RowMethod)
    trainer = Trainer(encoder=encoder, method=method, lanes=lanes)
    cap = min(GRID_CAP, bench.left - 5)
    for event in trainer.run():
        if isinstance(event, StepDone) and time.perf_counter() - began > cap:
            break
    if bench.device.type == "cuda":
        torch.cuda.synchronize(bench.device)
    seconds = time.perf_counter() - began
    done = trainer.steps / trainer.total_steps
    what = (
        f"{len(PAPER_RATES['bitfit'])} rates x {scale.seeds} seeds side by side, {scale.rows:,} "
        f"rows, {scale.epochs} epochs, batch {scale.batch_size}, bf16"
    )
    if done < 1:
        what += f": projected from the first {done:.0%}"
    whole = seconds / done
    yield Row(
        part=f"grid {size}", what=what, value=whole, unit="s", target="< 180", met=whole < 180
    )


# ------------------------------------------------------------------ all of it


Part = Callable[[Bench, str], Iterator[Row]]
PARTS: dict[str, tuple[Part, bool]] = {
    "equality": (check_equality, False),
    "dropout": (check_dropout, False),
    "determinism": (check_determinism, False),
    "products": (measure_products, False),
    "lanes": (measure_lanes, True),
    "kernels": (measure_kernels, False),
    "grid": (measure_grid, False),
    "compiled": (measure_compiled, True),
}
"""By name: the part, and whether every size has it; the others run on the first only."""


class OutOfTime(Exception):
    """The time that was given is used up."""


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raise :class:`OutOfTime` in the body once it has run so long, where the system can."""

    def stop(*_: object) -> None:
        raise OutOfTime("no time left (--minutes)")

    if seconds <= 1:
        stop()
    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_part(bench: Bench, name: str, part: Part, size: str) -> Iterator[Row]:
    """Yield the rows of a part; whatever fails in it is a row too."""
    began = time.monotonic()
    try:
        with stopped_after(bench.left):
            yield from part(bench, size)
    except Exception as error:
        if not isinstance(error, OutOfTime):
            traceback.print_exc()
        yield Row(
            part=f"{name} {size}", what="failed", value=_short(error), met=False, is_check=True
        )
    finally:
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{name} {size}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]:.120}"


def print_table(rows: Sequence[Row]) -> None:
    """Print all rows, those with a target with what came of it."""
    cells = [(row.part, row.what, _shown(row), row.target, _verdict(row)) for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(5)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def _shown(row: Row) -> str:
    if isinstance(row.value, float):
        number = f"{row.value:,.0f}" if abs(row.value) >= 1000 else f"{row.value:.3g}"
        return f"{number} {row.unit}".strip()
    return str(row.value)


def _verdict(row: Row) -> str:
    if row.met is None:
        return ""
    good, bad = ("ok", "FAILED") if row.is_check else ("met", "missed")
    return good if row.met else bad


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of gpu.json")
    parser.add_argument("--parts", default=",".join(PARTS), help="between commas (default: all)")
    parser.add_argument("--sizes", default="base,large", help="among base, large, mini")
    parser.add_argument("--rounds", type=int, default=3, help="turns that are counted")
    parser.add_argument("--minutes", type=float, default=8.5, help="stop after so many")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--base", help="a real checkpoint, in place of random weights")
    parser.add_argument("--data", help="a GLUE folder (with --base): real rows of MRPC")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    args = parser.parse_args(argv)
    args.parts, args.sizes = args.parts.split(","), args.sizes.split(",")
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"--parts: {', '.join(unknown)} not among {', '.join(PARTS)}")
    if unknown := [name for name in args.sizes if name not in FULL.sizes]:
        parser.error(f"--sizes: {', '.join(unknown)} not among {', '.join(FULL.sizes)}")
    if args.data and not args.base:
        parser.error("--data needs --base: random weights come without a real tokenizer")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    device = choose_device(args.device)
    if device.type != "cuda" and not args.smoke:
        print("no GPU here: --smoke tries the script on tiny sizes", file=sys.stderr)
        return 2
    report: dict[str, Any] = {
        "command": ["benchmarks/gpu.py", *(sys.argv[1:] if argv is None else argv)],
        "smoke": args.smoke, "hardware": describe_machine(device),
        "versions": describe_versions(), "rows": [],
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    deadline = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        scale = SMOKE if args.smoke else replace(FULL, rounds=args.rounds)
        bench = Bench(
            scale=scale, device=device, folder=Path(folder),
            base=args.base, data=args.data, deadline=deadline,
        )  # fmt: skip
        sizes = args.sizes if args.base is None else args.sizes[:1]
        order = [
            (name, size)
            for size in sizes
            for name in args.parts
            if PARTS[name][1] or size == sizes[0]
        ]
        for name, size in order:
            rows += run_part(bench, name, PARTS[name][0], size)
            report["rows"] = [vars(row) for row in rows]
            text = json.dumps(report, indent=1) + "\n"
            (args.out / "gpu.json").write_text(text, encoding="utf-8")
    print_table(rows)
    return 1 if any(row.is_check and not row.met for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
