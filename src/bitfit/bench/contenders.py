"""What ``bitfit bench serve`` compares: each answers batches of texts that name many tasks.

The weights of tasks are random: speed does not depend on them. Those that compute one task only,
or have no heads, do less than what is asked; their rows say so.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitfit.bank import Layout
from bitfit.base import find_base, quiet_transformers
from bitfit.batches import Feature, pack
from bitfit.bench.runs import Unavailable
from bitfit.encoder import Encoder
from bitfit.heads import head_logits, make_head
from bitfit.held import HeldTask
from bitfit.serve.engine import Engine, Item, Ready
from bitfit.serve.shelf import Shelf
from bitfit.taskfile import TaskFile
from bitfit.tasks import Task, TextExample
from bitfit.terms import FAMILIES, choose_sites, paths_pattern

OTHERS = 8
"""Contenders beside bitfit's mixed batches, of which there is one for each number of tasks."""
LORA_RANK = 8
# The places of BitFit's biases that a LoRA adapter can be at.
PROJECTIONS = ("query", "key", "value", "attention_output", "intermediate", "output")
MEMINFO = Path("/proc/meminfo")
ADAPTERS = 32
LABELS = 3
MEMORY_SHARE = 0.5
"""Of the free memory that separate models may take."""
FEW = 4
"""Separate models where nobody says how much memory is free."""


@dataclass(frozen=True)
class Request:
    """One batch: its texts, tokenized too, and a number that says which tasks are asked."""

    number: int
    examples: Sequence[TextExample]
    features: Sequence[Feature]

    def tasks(self, count: int) -> list[int]:
        """Return the task of each text, drawn from ``count``: other ones in every batch."""
        return _draw_tasks(self.number, len(self.examples), count)


@cache  # drawing is not what is timed
def _draw_tasks(seed: int, size: int, count: int) -> list[int]:
    random = np.random.default_rng(seed)
    if count >= size:
        return [int(i) for i in random.choice(count, size, replace=False)]
    return [int(i) for i in random.permutation(np.arange(size) % count)]


Answer = Callable[[Request], object]


@dataclass(frozen=True)
class Contender:
    """A way to answer."""

    name: str
    title: str
    tasks: int
    """How many tasks its batches name."""
    build: Callable[[], Answer]
    takes_text: bool = False
    """It tokenizes too; the others are given tokens."""


def random_task(encoder: Encoder, number: int, noise: float = 0.01) -> TaskFile:
    """Return a classifier whose biases are the base's with small noise."""
    labels = tuple(f"label{i}" for i in range(2 + number % 4))
    task = Task(name=f"task{number}", kind="classification", labels=labels)
    head = make_head(task, encoder)
    layout = Layout(choose_sites(encoder.sites, "all", inert=encoder.inert_terms))
    generator = torch.Generator().manual_seed(number)
    return TaskFile(
        task=task, bias=torch.randn(layout.n, generator=generator) * noise,
        layout=layout.to_json(), head=head.split(head.init(number)), head_style=head.style,
        pooling=head.pooling, max_length=128, base=encoder.base.identity,
        tokenizer=encoder.base.tokenizer_sha256,
    )  # fmt: skip


# ------------------------------------------------------------------ ours


def mixed(shelf: Shelf, count: int) -> Answer:
    """Return batches of any tasks in one pass, from tokens to logits."""
    held = _held(shelf, count)

    def answer(request: Request) -> object:
        return shelf.tasks.logits(request.features, [held[i] for i in request.tasks(count)])

    return answer


def whole(shelf: Shelf, count: int) -> Answer:
    """Return the same from texts to JSON, by the engine that serves."""
    engine = Engine(shelf)

    def answer(request: Request) -> object:
        items = [
            Item(f"task{i}", e.text, e.text_pair)
            for i, e in zip(request.tasks(count), request.examples, strict=True)
        ]
        ready = [each for each in engine.prepare(items) if isinstance(each, Ready)]
        assert len(ready) == len(items)
        return engine.answer(ready)

    return answer


def swapped(shelf: Shelf, count: int) -> Answer:
    """Return one pass for each task of a batch, its biases folded into the products."""
    held = _held(shelf, count)

    def answer(request: Request) -> object:
        groups: dict[int, list[Feature]] = {}
        for task, feature in zip(request.tasks(count), request.features, strict=True):
            groups.setdefault(task, []).append(feature)
        return [
            shelf.tasks.logits(features, [held[task]] * len(features))
            for task, features in groups.items()
        ]

    return answer


def folded(encoder: Encoder) -> Answer:
    """Return one task in a plain packed model: no bank, no rows, one head."""
    file = random_task(encoder, 1)
    head = make_head(file.task, encoder)

    @torch.no_grad()
    def answer(request: Request) -> object:
        batch = pack(request.features).to(encoder.device)
        pooled = encoder.pool(encoder.encode(batch, {}), batch, head.pooling, {})
        return head_logits(head, file.head, pooled, None).cpu().numpy()

    return answer


def _held(shelf: Shelf, count: int) -> list[HeldTask]:
    leases = [shelf.lease(f"task{i}") for i in range(count)]
    return [lease.held for lease in leases]


# ------------------------------------------------------------------ others


def plain(base: str, device: torch.device) -> Answer:
    """Return one task in transformers' own classifier, padded to the longest of the batch."""
    model = classifier(base, device)

    @torch.inference_mode()
    def answer(request: Request) -> object:
        return model(**_padded(model, request.features, device)).logits.cpu().numpy()

    return answer


def separate(base: str, device: torch.device, count: int) -> Answer:
    """Return a model for each of so many tasks, each padded to the longest of its own texts."""
    models = [classifier(base, device) for _ in range(count)]

    @torch.inference_mode()
    def answer(request: Request) -> object:
        tasks = request.tasks(count)
        found = []
        for task, model in enumerate(models):
            own = [f for f, t in zip(request.features, tasks, strict=True) if t == task]
            found.append(model(**_padded(model, own, device)).logits.cpu().numpy())
        return found

    return answer


def pipeline(base: str, device: torch.device) -> Answer:
    """Return one task in transformers' pipeline, from texts to labels."""
    import transformers

    with quiet_transformers():
        tokenizer = transformers.AutoTokenizer.from_pretrained(find_base(base))
        run: Any = transformers.pipeline(
            "text-classification", model=classifier(base, device), tokenizer=tokenizer,
            device=device,
        )  # fmt: skip

    def answer(request: Request) -> object:
        texts = [
            e.text if e.text_pair is None else {"text": e.text, "text_pair": e.text_pair}
            for e in request.examples
        ]
        return run(texts, batch_size=len(texts), truncation=True, max_length=128)

    return answer


def lora(base: str, device: torch.device, terms: Sequence[str], count: int = ADAPTERS) -> Answer:
    """Return peft's mixed batch: a LoRA adapter for each text, no heads.

    Args:
        base: where the model is loaded from.
        device: where it computes.
        terms: which projections the adapters are on, by the names of their biases.
        count: how many adapters.

    Raises:
        Unavailable: peft is not installed, or too old.
    """
    try:
        import peft
    except ImportError:
        raise Unavailable("not installed: pip install 'bitfit[bench]'") from None
    from transformers import AutoModel

    with quiet_transformers():
        encoder = AutoModel.from_pretrained(
            find_base(base), dtype=torch.float32, use_safetensors=True
        )
    config = peft.LoraConfig(
        r=LORA_RANK, init_lora_weights=False, target_modules=_targets(encoder, terms)
    )
    with warnings.catch_warnings():  # of transformers, about names that peft still uses
        warnings.simplefilter("ignore")
        model: Any = peft.get_peft_model(encoder, config, adapter_name="task0")
        for i in range(1, count):
            model.add_adapter(f"task{i}", config)
    model = model.to(device).eval()
    inner = model.get_base_model()

    @torch.inference_mode()
    def answer(request: Request) -> object:
        names = [f"task{i}" for i in request.tasks(count)]
        inputs = _padded(inner, request.features, device)
        return model(**inputs, adapter_names=names).last_hidden_state

    return answer


def _targets(model: Any, terms: Sequence[str]) -> str:
    """Return the expression that matches the whole paths of some projections, in every layer."""
    family = str(model.config.model_type)
    if family not in FAMILIES:
        raise Unavailable(f"where the projections of {family!r} stand is not known")
    return paths_pattern(FAMILIES[family][term] for term in terms)


def classifier(base: str, device: torch.device) -> Any:
    """Return transformers' own classifier in fp32 and its default attention, its head random."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    with quiet_transformers():
        model = AutoModelForSequenceClassification.from_pretrained(
            find_base(base), num_labels=LABELS, dtype=torch.float32, use_safetensors=True
        )
    return model.to(device).eval()


def _padded(model: Any, features: Sequence[Feature], device: torch.device) -> Mapping[str, Tensor]:
    longest = max(map(len, features))
    ids = torch.full((len(features), longest), model.config.pad_token_id or 0)
    types, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, feature in enumerate(features):
        ids[i, : len(feature)] = torch.from_numpy(feature.input_ids)
        types[i, : len(feature)] = torch.from_numpy(feature.token_type_ids)
        mask[i, : len(feature)] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["token_type_ids"] = types
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def count_separate(encoder: Encoder, wanted: int) -> int:
    """Return how many separate models are loaded: ``wanted``, or what memory has room for."""
    one = sum(p.numel() * p.element_size() for p in encoder.model.parameters())
    if encoder.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(encoder.device)
    elif MEMINFO.exists():
        found = re.search(r"^MemAvailable: +(\d+) kB", MEMINFO.read_text(encoding="ascii"), re.M)
        free = int(found[1]) * 1024 if found is not None else 0
    else:
        return min(wanted, FEW)
    return max(1, min(wanted, int(MEMORY_SHARE * free / one)))


def choose_contenders(
    base: str, shelf: Shelf, counts: Sequence[int], items: int
) -> list[Contender]:
    """Return all that have their turn.

    Args:
        base: where the others load the base from.
        shelf: with at least as many tasks as the largest of ``counts``.
        counts: the numbers of tasks that batches are drawn from.
        items: texts in a batch, which can name no more tasks.
    """
    encoder, device = shelf.encoder, shelf.encoder.device
    most = max(counts)
    models = count_separate(encoder, min(most, items))
    found = [
        Contender("folded", "one task folded into a plain packed model", 1,
                  lambda: folded(encoder)),
        *(
            Contender(f"mixed-{n}", f"bitfit: mixed batches over {n:,} tasks", n,
                      lambda n=n: mixed(shelf, n))  # type: ignore[misc]
            for n in counts
        ),
        Contender(f"engine-{most}", f"bitfit's engine, texts to JSON, {most:,} tasks", most,
                  lambda: whole(shelf, most), takes_text=True),
        Contender(f"swap-{most}", f"biases swapped task by task, {most:,} tasks", most,
                  lambda: swapped(shelf, most)),
        Contender("plain", "one task, transformers padded to the longest", 1,
                  lambda: plain(base, device)),
        Contender(f"separate-{models}", f"{models} separate transformers models", models,
                  lambda: separate(base, device, models)),
        Contender("pipeline", "one task, transformers' pipeline, texts to labels", 1,
                  lambda: pipeline(base, device), takes_text=True),
        *(
            Contender(f"{name}-{ADAPTERS}", f"peft LoRA (r={LORA_RANK}, {where}), {ADAPTERS} "
                      "adapters mixed, no heads", ADAPTERS,
                      lambda terms=terms: lora(base, device, terms))  # type: ignore[misc]
            for name, where, terms in (
                ("lora", "query and value", ("query", "value")),
                ("lora-all", "all projections", PROJECTIONS),
            )
        ),
    ]  # fmt: skip
    assert len(found) == len(counts) + OTHERS
    return found
