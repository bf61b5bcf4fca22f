"""Tiny random bases of each family, saved as checkpoints: the exact architectures, 2 layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from bitfit.bank import Layout
from bitfit.encoder import Encoder
from bitfit.heads import make_head
from bitfit.taskfile import TaskFile
from bitfit.tasks import Task
from bitfit.terms import choose_sites

WORDS = (
    "the a good bad film was is not very i you we it this that bike order where my money back now "
    "please when will arrive broken late nice slow fast red blue car who what yes no on in at to of"
).split()
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
_DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "max_relative_positions": 16,
}
# model_type -> what differs from _SMALL
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "electra": {"embedding_size": 16},
    "mpnet": {},
    "deberta-v2": _DEBERTA | {"share_att_key": True, "position_buckets": 8},
    "albert": {"embedding_size": 16},
    "modernbert": {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3},
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of some fifty words, with BERT's special tokens and template."""
    vocab = {token: i for i, token in enumerate([*SPECIALS, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


def make_config(family: str, **changes: Any) -> Any:
    """The configuration of a tiny base of ``family``."""
    options = {"vocab_size": len(SPECIALS) + len(WORDS), "pad_token_id": 0}
    return AutoConfig.for_model(family, **(options | _SMALL | CONFIGS.get(family, {}) | changes))


def make_checkpoint(folder: Path, family: str = "bert", seed: int = 0, **changes: Any) -> str:
    """Save a random base of ``family`` below ``folder`` and return its directory."""
    torch.manual_seed(seed)
    model = AutoModel.from_config(make_config(family, **changes))
    with torch.no_grad():  # fresh biases are zero, real ones are not
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif "LayerNorm" not in name and "layer_norm" not in name:
                parameter.normal_(0, 0.3 / parameter.shape[-1] ** 0.25)
    path = folder / f"{family}-{seed}"
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


def make_task(
    encoder: Encoder, name: str = "mood", kind: str = "classification", *, seed: int = 0,
    labels: tuple[str, ...] = ("bad", "good"), terms: str = "all", pooling: str = "auto",
    max_length: int = 90, scale: float = 0.3, **changes: Any,
) -> TaskFile:  # fmt: skip
    """A task of random numbers on ``encoder``: what training would leave, at once."""
    labels = () if kind in ("regression", "span") else labels
    task = Task(name=name, kind=kind, labels=labels, is_pair=kind == "span")
    head = make_head(task, encoder, pooling)
    layout = Layout(choose_sites(encoder.sites, terms))
    generator = torch.Generator().manual_seed(seed)
    return TaskFile(
        task=task, bias=torch.randn(layout.n, generator=generator) * scale,
        layout=layout.to_json(), head=head.split(head.init(seed, std=0.5)),
        head_style=head.style, pooling=head.pooling, max_length=max_length,
        base=encoder.base.identity, tokenizer=encoder.base.tokenizer_sha256, terms=terms, **changes,
    )  # fmt: skip
