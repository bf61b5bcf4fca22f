"""What ``bitfit bench train`` compares: each variant is a function that builds one training step.

All train on the same batches with AdamW, dropout and gradients clipped at 1.0. Only ours packs its
batches inside the step that is timed; those of the others are padded and on the device beforehand.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bitfit.base import find_base, max_positions, quiet_transformers
from bitfit.batches import Feature
from bitfit.bench.ours import our_step
from bitfit.bench.runs import MAX_GRAD_NORM, Run, Unavailable, Variant
from bitfit.bench.work import MAX_LENGTH, Work
from bitfit.terms import FAMILIES, select_biases

FROZEN_FLOPS, FULL_FLOPS = 4, 6
"""Per encoder weight and token: forward and input gradient; full fine-tuning weight gradient."""


# ------------------------------------------------------------------ stock parts


def bias_step(
    work: Work,
    *,
    terms: str,
    padding: str,
    autocast: bool,
    compiled: Mapping[str, Any] | None = None,
) -> Run:
    """Return a step of transformers' model with ``requires_grad`` on its biases and its head.

    ``compiled`` has the options of ``torch.compile``; None: the model runs as it is.
    """
    model = _classifier(work)
    select_biases(model, terms)
    called = model if compiled is None else torch.compile(model, **compiled)
    return _stock_step(work, model, called, padding, autocast)


def full_step(work: Work, *, padding: str, autocast: bool) -> Run:
    """Return a step that trains every parameter of transformers' model."""
    model = _classifier(work).requires_grad_(True)
    return _stock_step(work, model, model, padding, autocast)


def lora_step(work: Work, *, autocast: bool) -> Run:
    """Return a step of peft's LoRA: r=8 on query and value, padded to the longest."""
    peft = _peft("LoraConfig")
    model = _classifier(work)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.1,
        target_modules=_targets(model, "query", "value"),
    )  # fmt: skip
    return _stock_step(work, model, _wrapped(model, config), "longest", autocast)


def beft_step(work: Work, *, autocast: bool) -> Run:
    """Return a step of peft's own bias method, BEFT, padded to the longest.

    peft has no BitFit. BEFT (arXiv 2509.15974; peft 0.20 or newer) adds a trained vector after the
    value projections, its default targets, which is fewer biases than all others here train.
    (``LoraConfig(bias="all")`` trains biases only beside LoRA's matrices.)
    """
    peft = _peft("BeftConfig")
    model = _classifier(work)
    config = peft.BeftConfig(task_type="SEQ_CLS", target_modules=_targets(model, "value"))
    return _stock_step(work, model, _wrapped(model, config), "longest", autocast)


def _classifier(work: Work) -> Any:
    """Return transformers' own classifier on the base, in fp32 and its default attention."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    with quiet_transformers():
        model = AutoModelForSequenceClassification.from_pretrained(
            find_base(work.base), num_labels=work.task.num_outputs, dtype=torch.float32,
            use_safetensors=True,
        )  # fmt: skip
    return model.to(work.device).train()


def _peft(needed: str) -> Any:
    try:
        import peft
    except ImportError:
        raise Unavailable("not installed: pip install 'bitfit[bench]'") from None
    if not hasattr(peft, needed):
        raise Unavailable(f"peft {peft.__version__} has no {needed}: install a newer one")
    return peft


def _wrapped(model: Any, config: Any) -> Any:
    import peft

    with warnings.catch_warnings():  # of transformers, about names that peft still uses
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(model, config)


def _targets(model: Any, *terms: str) -> list[str]:
    family = str(model.config.model_type)
    if family not in FAMILIES:
        raise Unavailable(f"where the projections of {family!r} stand is not known")
    return [FAMILIES[family][term].rpartition(".")[2] for term in terms]


def _stock_step(work: Work, plain: Any, model: Any, padding: str, autocast: bool) -> Run:
    """Return the step of a usual training loop around ``model``, which may wrap ``plain``."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-5, weight_decay=0.0)
    batches = [_padded(work, batch, plain, padding) for batch in work.batches]
    device = work.device.type

    def step(number: int) -> None:
        with torch.autocast(device, torch.bfloat16) if autocast else nullcontext():
            loss = model(**batches[number]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def state() -> list[Tensor]:
        values = (v for per_tensor in optimizer.state.values() for v in per_tensor.values())
        return [v for v in values if isinstance(v, Tensor)]

    return Run(step=step, trained=trained, optimizer_state=state, modules=[model])


def _padded(work: Work, batch: Sequence[Feature], model: Any, padding: str) -> dict[str, Tensor]:
    """Return a batch as transformers takes it, on the device."""
    longest = max(len(feature) for feature in batch)
    width = longest if padding == "longest" else min(MAX_LENGTH, max_positions(model.config))
    ids = torch.full((len(batch), width), model.config.pad_token_id or 0)
    types, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, feature in enumerate(batch):
        ids[i, : len(feature)] = torch.from_numpy(feature.input_ids)
        types[i, : len(feature)] = torch.from_numpy(feature.token_type_ids)
        mask[i, : len(feature)] = 1
    labels = torch.tensor([feature.label for feature in batch])
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if work.task.kind == "regression":
        inputs["labels"] = labels.float()
    if "token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["token_type_ids"] = types
    return {name: tensor.to(work.device) for name, tensor in inputs.items()}


# ------------------------------------------------------------------ the table


def _variant(
    name: str, title: str, precision: str, pads_to: str, build: Callable[..., Run], **options: Any
) -> Variant:
    return Variant(
        name=name, title=title, group=name.removesuffix("-fp32").removesuffix("-bf16"),
        precision=precision, pads_to=pads_to, build=partial(build, **options),
        flops=FULL_FLOPS if name.startswith("full") else FROZEN_FLOPS,
    )  # fmt: skip


def _ours(precision: str) -> Variant:
    return _variant(
        f"ours-{precision}", f"bitfit: {precision}, packed", precision, "packed", our_step,
        dtype=precision,
    )  # fmt: skip


def _stock(
    name: str, title: str, precision: str, build: Callable[..., Run], **options: Any
) -> Variant:
    bf16 = precision == "bf16"
    how = f"{title}: {'bf16 autocast' if bf16 else 'fp32'}, padded to the longest"
    return _variant(
        f"{name}-{precision}", how, precision, "longest", build, autocast=bf16, **options
    )


def choose_ours(dtype: str, favoured: str) -> list[Variant]:
    """Return bitfit itself, once for every precision it is measured in.

    Args:
        dtype: ``auto``, ``fp32`` or ``bf16``: it runs in fp32, and in bf16 too where that was asked
            for or, for ``auto``, where it is ``favoured``.
        favoured: the precision that :func:`bitfit.precision.measure_precision` chose.
    """
    both = dtype == "bf16" or (dtype == "auto" and favoured == "bf16")
    return [_ours(precision) for precision in (("fp32", "bf16") if both else ("fp32",))]


def choose_variants(dtype: str, gflops: Mapping[str, float], favoured: str) -> list[Variant]:
    """Return the variants to run, each once for every precision it is measured in.

    Args:
        dtype: of ours, as :func:`choose_ours` takes it.
        gflops: this machine's matrix products by precision. Stock bias training and full
            fine-tuning run in both all the same; peft in bf16 only where that is not the slower.
        favoured: see :func:`choose_ours`.
    """
    both = ("fp32", "bf16")
    of_peft = both if gflops["bf16"] >= gflops["fp32"] else both[:1]
    longest = {"padding": "longest"}
    released = {"padding": "128", "autocast": False}
    return [
        *choose_ours(dtype, favoured),
        _variant("released", "released recipe: fp32, padded to 128", "fp32", "128", bias_step,
                 terms="released:all", **released),
        *(_stock("stock", "stock biases", p, bias_step, terms="all", **longest) for p in both),
        _variant("full-released", "full fine-tuning: fp32, padded to 128", "fp32", "128",
                 full_step, **released),
        *(_stock("full", "full fine-tuning", p, full_step, **longest) for p in both),
        *(_stock("lora", "peft LoRA (r=8, query and value)", p, lora_step) for p in of_peft),
        *(_stock("beft", "peft BEFT (value biases)", p, beft_step) for p in of_peft),
    ]  # fmt: skip
