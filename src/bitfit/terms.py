"""The bias terms of an encoder: their names, where they stand, and how to choose among them.

The paper's Table 4 names eight bias vectors in each layer of BERT. Every family of encoders has
the same eight under other module names; :data:`FAMILIES` says which. Names match whole:
``output`` never selects ``attention.output.dense``, as the paper's released code does. That code's
own grouping is at hand under names of its own, such as ``released:output``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from bitfit.errors import NoBiases, UnknownTerm

# Our name -> the paper's symbol, in the order of Table 4. The order is that of a row's terms.
SYMBOLS: dict[str, str] = {
    "query": "b_q",
    "key": "b_k",
    "value": "b_v",
    "attention_output": "b_m1",
    "attention_layernorm": "b_LN1",
    "intermediate": "b_m2",
    "output": "b_m3",
    "output_layernorm": "b_LN2",
}
EIGHT_TERMS = tuple(SYMBOLS)
# Terms that stand once in a model, selected only by name.
OUTER_TERMS = ("embeddings_layernorm", "pooler")

_BERT = {
    "query": "encoder.layer.{}.attention.self.query",
    "key": "encoder.layer.{}.attention.self.key",
    "value": "encoder.layer.{}.attention.self.value",
    "attention_output": "encoder.layer.{}.attention.output.dense",
    "attention_layernorm": "encoder.layer.{}.attention.output.LayerNorm",
    "intermediate": "encoder.layer.{}.intermediate.dense",
    "output": "encoder.layer.{}.output.dense",
    "output_layernorm": "encoder.layer.{}.output.LayerNorm",
    "embeddings_layernorm": "embeddings.LayerNorm",
    "pooler": "pooler.dense",
}
_MPNET = _BERT | {
    "query": "encoder.layer.{}.attention.attn.q",
    "key": "encoder.layer.{}.attention.attn.k",
    "value": "encoder.layer.{}.attention.attn.v",
    "attention_output": "encoder.layer.{}.attention.attn.o",
    "attention_layernorm": "encoder.layer.{}.attention.LayerNorm",
}
_DEBERTA = _BERT | {
    "query": "encoder.layer.{}.attention.self.query_proj",
    "key": "encoder.layer.{}.attention.self.key_proj",
    "value": "encoder.layer.{}.attention.self.value_proj",
}
_DISTILBERT = {
    "query": "transformer.layer.{}.attention.q_lin",
    "key": "transformer.layer.{}.attention.k_lin",
    "value": "transformer.layer.{}.attention.v_lin",
    "attention_output": "transformer.layer.{}.attention.out_lin",
    "attention_layernorm": "transformer.layer.{}.sa_layer_norm",
    "intermediate": "transformer.layer.{}.ffn.lin1",
    "output": "transformer.layer.{}.ffn.lin2",
    "output_layernorm": "transformer.layer.{}.output_layer_norm",
    "embeddings_layernorm": "embeddings.LayerNorm",
}
# ALBERT runs one layer at every depth: a term stands once and has no layer number.
_ALBERT_LAYER = "encoder.albert_layer_groups.0.albert_layers.0."
_ALBERT = {
    "query": _ALBERT_LAYER + "attention.query",
    "key": _ALBERT_LAYER + "attention.key",
    "value": _ALBERT_LAYER + "attention.value",
    "attention_output": _ALBERT_LAYER + "attention.dense",
    "attention_layernorm": _ALBERT_LAYER + "attention.LayerNorm",
    "intermediate": _ALBERT_LAYER + "ffn",
    "output": _ALBERT_LAYER + "ffn_output",
    "output_layernorm": _ALBERT_LAYER + "full_layer_layer_norm",
    "embeddings_layernorm": "embeddings.LayerNorm",
    "pooler": "pooler",
}
# transformers' model_type -> term -> module path, "{}" for the layer's number.
FAMILIES: dict[str, dict[str, str]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "mpnet": _MPNET,
    "deberta-v2": _DEBERTA,
    "distilbert": _DISTILBERT,
    "albert": _ALBERT,
}


def paths_pattern(paths: Iterable[str]) -> str:
    """Return the expression that whole module paths match, ``{}`` being the number of any layer."""
    return "|".join(re.escape(path).replace(r"\{\}", r"\d+") for path in paths)


# The released code looks for these strings *inside* a parameter's name (fidelity: its trap).
_RELEASED = {
    "query": ("query",),
    "key": ("key",),
    "value": ("value",),
    "intermediate": ("intermediate",),
    "attention_layernorm": ("attention_layernorm",),
    "output": ("output", "attention_output"),
    "output_layernorm": ("output_layernorm", "attention_layernorm"),
}


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """One bias vector of an encoder: a term in a layer, and the module that adds it."""

    term: str
    layer: int | None
    """0-based; None for a term that stands once in the model."""
    path: str
    """The module below the encoder whose ``bias`` it is."""
    length: int

    @property
    def label(self) -> str:
        """``query@3``: the term and its layer as ``--terms`` takes them."""
        return self.term if self.layer is None else f"{self.term}@{self.layer}"


def find_sites(encoder: nn.Module) -> tuple[Site, ...]:
    """Return every bias vector that a module of ``encoder`` adds, ordered by term, then layer.

    The order is that of a row of the bank: the eight terms of Table 4, then the outer terms, then
    whatever else the family has (ELECTRA's ``embeddings_project``, say) by module path. In a family
    that :data:`FAMILIES` does not know a term is called by its path below the layer.

    Args:
        encoder: a transformers encoder without task head, such as ``AutoModel`` gives.
    """
    family = FAMILIES.get(getattr(getattr(encoder, "config", None), "model_type", ""), {})
    patterns = {
        term: re.compile(re.escape(path).replace(r"\{\}", r"(\d+)"))
        for term, path in family.items()
    }
    sites = []
    for path, module in encoder.named_modules():
        if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
            bias = module.bias
            term, layer = _name_site(path, patterns)
            sites.append(Site(term, layer, path, bias.numel()))
    known = {term: i for i, term in enumerate((*EIGHT_TERMS, *OUTER_TERMS))}
    return tuple(sorted(sites, key=lambda s: (known.get(s.term, len(known)), s.term, s.layer or 0)))


def _name_site(path: str, patterns: dict[str, re.Pattern[str]]) -> tuple[str, int | None]:
    for term, pattern in patterns.items():
        if match := pattern.fullmatch(path):
            return term, int(match[1]) if match.groups() else None
    if path.endswith("embeddings.LayerNorm"):
        return "embeddings_layernorm", None
    numbered = re.fullmatch(r".*?\.(\d+)\.(.+)", path)
    return (numbered[2], int(numbered[1])) if numbered else (path, None)


def choose_sites(
    sites: Sequence[Site], terms: str, *, inert: Iterable[str] = ()
) -> tuple[Site, ...]:
    """Return the sites that ``terms`` selects, in the order of ``sites``.

    Args:
        sites: every site of the base, from :func:`find_sites`.
        terms: comma-separated items: ``all``; a term by our name or the paper's symbol
            (``query``, ``b_q``); either with layers (``query@0-5``, ``all@3``, layers from 0;
            ``all@first3``, ``all@last3``);
            ``released:NAME``, the released code's substring matching with the pooler it adds;
            ``none`` for the empty choice.
        inert: terms that ``all`` leaves out, since their gradient is zero (b_k). What is named
            explicitly is selected all the same.

    Raises:
        UnknownTerm: with the nearest name, or with the terms that this base has.
        NoBiases: where the base has none.
    """
    if terms.strip() == "none":
        return ()
    if not sites:
        raise NoBiases(
            "this base has 0 biases: there is nothing for bias tuning to train. Choose a base "
            "with biases (BERT, RoBERTa, ELECTRA, ...), or train only a head with --method frozen."
        )
    chosen: set[Site] = set()
    for item in (part.strip() for part in terms.split(",")):
        chosen |= set(_choose_item(sites, item, frozenset(inert)))
    return tuple(s for s in sites if s in chosen)


def _choose_item(sites: Sequence[Site], item: str, inert: frozenset[str]) -> Iterator[Site]:
    name, at, layers = item.partition("@")
    if name.startswith("released:"):
        wanted = _released_terms(sites, name.removeprefix("released:"))
    elif name == "all":
        wanted = {s.term for s in sites if s.term in EIGHT_TERMS}
        # A family of unknown names: everything inside its layers.
        wanted = (wanted or {s.term for s in sites if s.layer is not None}) - inert
    else:
        wanted = {_our_name(sites, name)}
    depth = 1 + max((s.layer for s in sites if s.layer is not None), default=-1)
    first, last = _layer_range(item, layers, depth) if at else (None, None)
    if last is not None and depth and last >= depth:
        raise UnknownTerm(f"{item!r}: this base has layers 0 to {depth - 1}")
    for site in sites:
        if site.term not in wanted:
            continue
        if first is None or last is None:
            yield site
        elif site.layer is None:
            raise UnknownTerm(
                f"{item!r}: {site.term!r} stands once in this base; leave the layers out"
            )
        elif first <= site.layer <= last:
            yield site


def _our_name(sites: Sequence[Site], name: str) -> str:
    term = {symbol: term for term, symbol in SYMBOLS.items()}.get(name, name)
    have = dict.fromkeys(s.term for s in sites)
    if term in have:
        return term
    near = difflib.get_close_matches(term, [*have, *SYMBOLS.values()], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UnknownTerm(
        f"unknown bias term {name!r}.{hint} This base has: {', '.join(have)}; "
        f"also 'all', the paper's symbols ({', '.join(SYMBOLS.values())}), layers as in "
        "'query@0-5' or 'query@last3', and 'released:NAME'."
    )


def _released_terms(sites: Sequence[Site], name: str) -> set[str]:
    have = {s.term for s in sites}
    if name == "all":
        return have
    if name not in _RELEASED:
        raise UnknownTerm(
            f"unknown bias term 'released:{name}'. The released code knows: "
            f"{', '.join(('all', *_RELEASED))}."
        )
    # It adds the pooler's bias whenever a term is chosen, where there is a pooler.
    return {*_RELEASED[name], "pooler"} & have


def _layer_range(item: str, layers: str, depth: int) -> tuple[int, int]:
    if (match := re.fullmatch(r"(first|last)([1-9]\d*)", layers)) is not None:
        count = int(match[2])
        if depth and count > depth:
            raise UnknownTerm(f"{item!r}: this base has {depth} layers")
        return (0, count - 1) if match[1] == "first" or not depth else (depth - count, depth - 1)
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", layers)
    if not match or int(match[2] or match[1]) < int(match[1]):
        raise UnknownTerm(
            f"{item!r}: layers are given as '@3' or '@0-5', counted from 0, or as '@first3', "
            "'@last3'"
        )
    return int(match[1]), int(match[2] or match[1])


def select_biases(model: nn.Module, terms: str = "all") -> dict[str, nn.Parameter]:
    """Return the chosen biases by parameter name, with the rest of the encoder frozen.

    For people with a training loop of their own: only the returned parameters, and whatever stands
    outside the encoder (the task head), keep ``requires_grad``. Ben Zaken et al. 2022, section 3.

    Args:
        model: a transformers model with or without a head.
        terms: as on the command line: ``"all"``, ``"query,intermediate"``, ``"b_q,b_m2"``,
            ``"query@0-5"``, ``"released:output"``.

    Returns:
        Names as in ``model.named_parameters()`` with their parameters of shape ``(length,)``.

    Raises:
        UnknownTerm: a term that this model does not have.
        NoBiases: a model without biases.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> model = BertForSequenceClassification(BertConfig(num_hidden_layers=2))
        >>> biases = select_biases(model, "query,intermediate")
        >>> sum(b.numel() for b in biases.values())
        7680
    """
    encoder = getattr(model, "base_model", model)
    chosen = choose_sites(find_sites(encoder), terms)
    encoder.requires_grad_(False)
    wanted = {id(encoder.get_submodule(site.path).bias) for site in chosen}
    selected = {name: p for name, p in model.named_parameters() if id(p) in wanted}
    for bias in selected.values():
        bias.requires_grad_(True)
    return selected
