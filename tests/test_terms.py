import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CONFIGS
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from bitfit.errors import NoBiases, UnknownTerm
from bitfit.terms import EIGHT_TERMS, SYMBOLS, choose_sites, find_sites, select_biases

BERT_BASE = BertConfig(vocab_size=28996)
BERT_LARGE = BertConfig(
    vocab_size=28996, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
    intermediate_size=4096,
)  # fmt: skip
ROBERTA_BASE = RobertaConfig(
    vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5
)


def on_meta(config, **options):
    with torch.device("meta"):
        return AutoModel.from_config(config, **options)


@pytest.fixture(scope="module")
def base_sites():
    return find_sites(on_meta(BERT_BASE))


def count(sites):
    return sum(site.length for site in sites)


# fidelity: BERT-base, BERT-large and RoBERTa-base of the paper's Table 4 and its totals
@pytest.mark.parametrize(
    ("terms", "base", "large", "roberta"),
    [
        ("all", 101_376, 270_336, 101_376),
        ("all,embeddings_layernorm", 102_144, 271_360, 102_144),
        ("released:all", 102_912, 272_384, 102_144),
        ("b_m2,b_q", 46_080, 122_880, 46_080),
        ("intermediate", 36_864, 98_304, 36_864),
        ("b_q", 9_216, 24_576, 9_216),
    ],
)
def test_counts_are_those_of_the_paper(terms, base, large, roberta):
    for config, options, expected in (
        (BERT_BASE, {}, base),
        (BERT_LARGE, {}, large),
        (ROBERTA_BASE, {"add_pooling_layer": False}, roberta),
    ):
        sites = find_sites(on_meta(config, **options))
        assert count(choose_sites(sites, terms)) == expected


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        (BERT_BASE, {}, 108_310_272),
        (BERT_LARGE, {}, 333_579_264),
        (ROBERTA_BASE, {"add_pooling_layer": False}, 124_055_040),
    ],
)
def test_encoders_have_the_parameters_that_the_table_says(config, options, expected):
    assert sum(p.numel() for p in on_meta(config, **options).parameters()) == expected


def test_the_eight_terms_without_the_inert_key_are_ten_elevenths():
    sites = find_sites(on_meta(BERT_BASE))
    assert count(choose_sites(sites, "all", inert=["key"])) == 92_160
    # what is named explicitly is selected, inert or not
    assert count(choose_sites(sites, "all,key", inert=["key"])) == 101_376


def test_each_symbol_of_table_4_selects_its_parameters_by_exact_name():
    suffixes = {
        "b_q": "attention.self.query.bias", "b_k": "attention.self.key.bias",
        "b_v": "attention.self.value.bias", "b_m1": "attention.output.dense.bias",
        "b_LN1": "attention.output.LayerNorm.bias", "b_m2": "intermediate.dense.bias",
        "b_m3": "output.dense.bias", "b_LN2": "output.LayerNorm.bias",
    }  # fmt: skip
    sites = find_sites(on_meta(BERT_BASE))
    for symbol, suffix in suffixes.items():
        names = [f"{site.path}.bias" for site in choose_sites(sites, symbol)]
        assert names == [f"encoder.layer.{layer}.{suffix}" for layer in range(12)]


def test_output_never_selects_the_attention_output():
    sites = find_sites(on_meta(BERT_BASE))
    assert all("attention" not in site.path for site in choose_sites(sites, "output"))
    # the released code's substring does, and brings the pooler along
    released = {site.term for site in choose_sites(sites, "released:output")}
    assert released == {"output", "attention_output", "pooler"}


def test_the_released_grouping_repeats_its_substring_rule():
    """Every name of the released code, against the rule itself on BERT's parameter names."""
    strings = {
        "intermediate": "intermediate.dense.bias", "key": "attention.self.key.bias",
        "query": "attention.self.query.bias", "value": "attention.self.value.bias",
        "output": "output.dense.bias", "output_layernorm": "output.LayerNorm.bias",
        "attention_layernorm": "attention.output.LayerNorm.bias", "all": "bias",
    }  # fmt: skip
    model = on_meta(BERT_BASE)
    sites = find_sites(model)
    for name, wanted in strings.items():
        expected = {
            parameter
            for parameter, _ in model.named_parameters()
            if wanted in parameter or "pooler.dense.bias" in parameter
        }
        assert {f"{s.path}.bias" for s in choose_sites(sites, f"released:{name}")} == expected


@pytest.mark.parametrize("family", [f for f in CONFIGS if f != "modernbert"])
def test_every_family_has_the_eight_terms_in_every_layer(family):
    from tiny import make_config

    sites = find_sites(AutoModel.from_config(make_config(family)))
    layers = [None] if family == "albert" else [0, 1]
    expected = set(itertools.product(EIGHT_TERMS, layers))
    assert {(s.term, s.layer) for s in choose_sites(sites, "all")} == expected


@given(st.integers(0, 11), st.integers(0, 11), st.sampled_from(sorted(SYMBOLS)))
def test_a_layer_range_takes_both_ends(base_sites, a, b, term):
    first, last = sorted((a, b))
    chosen = choose_sites(base_sites, f"{term}@{first}-{last}")
    assert [s.layer for s in chosen] == list(range(first, last + 1))


@pytest.mark.parametrize(
    "terms",
    ["", "query,", "kwery", "query@", "query@3-1", "all@12", "b_x", "pooler@0", "query@0-99",
     "released:attention_output"],
)  # fmt: skip
def test_a_term_that_is_not_there_is_an_error(base_sites, terms):
    with pytest.raises(UnknownTerm):
        choose_sites(base_sites, terms)


def test_a_misspelt_term_is_told_its_neighbour():
    with pytest.raises(UnknownTerm, match="Did you mean 'intermediate'"):
        choose_sites(find_sites(on_meta(BERT_BASE)), "intermediat")


def test_a_base_without_biases_is_said_loudly():
    from tiny import make_config

    model = AutoModel.from_config(make_config("modernbert"))
    assert find_sites(model) == ()
    with pytest.raises(NoBiases, match="0 biases"):
        choose_sites(find_sites(model), "all")


def test_an_unknown_family_names_its_terms_by_module_path():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(4, 4)

    model = nn.Module()
    model.layers = nn.ModuleList([Layer(), Layer()])
    sites = choose_sites(find_sites(model), "all")
    assert [(s.term, s.layer) for s in sites] == [("mix", 0), ("mix", 1)]


def test_select_biases_freezes_the_encoder_and_leaves_the_head():
    config = BertConfig(num_hidden_layers=2, hidden_size=24, num_attention_heads=2, vocab_size=9)
    model = BertForSequenceClassification(config)
    biases = select_biases(model, "query,b_m2")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {*biases, "classifier.weight", "classifier.bias"}
    assert list(biases) == [
        f"bert.encoder.layer.{layer}.{suffix}.bias"
        for layer in (0, 1)
        for suffix in ("attention.self.query", "intermediate.dense")
    ]


def test_select_biases_works_on_a_bare_encoder_and_on_roberta():
    config = RobertaConfig(num_hidden_layers=1, hidden_size=24, num_attention_heads=2, vocab_size=9)
    model = RobertaForSequenceClassification(config)
    assert len(select_biases(model, "all")) == 8
    assert len(select_biases(model.roberta, "key")) == 1
    assert not any(p.requires_grad for n, p in model.roberta.named_parameters() if "key" not in n)


def test_layers_where_there_are_none_say_that_the_term_stands_once():
    albert = find_sites(on_meta(AlbertConfig(hidden_size=64, num_attention_heads=4)))
    with pytest.raises(UnknownTerm, match="'query' stands once in this base"):
        choose_sites(albert, "query@0")
    with pytest.raises(UnknownTerm, match="'query' stands once in this base"):
        choose_sites(albert, "query@last1")


@pytest.mark.parametrize("depth", [6, 12, 24])
def test_the_last_layers_are_counted_from_the_top_of_any_base(depth):
    config = BertConfig(
        hidden_size=8, num_attention_heads=1, intermediate_size=8, num_hidden_layers=depth
    )
    sites = find_sites(on_meta(config))

    def layers(terms):
        return sorted({site.layer for site in choose_sites(sites, terms)})

    assert layers("all@last3") == [depth - 3, depth - 2, depth - 1]
    assert layers("query@last1") == [depth - 1]
    assert layers("all@first2") == [0, 1]
    assert layers(f"all@last{depth}") == list(range(depth)) == layers(f"b_q@first{depth}")
    with pytest.raises(UnknownTerm, match=f"this base has {depth} layers"):
        layers(f"all@last{depth + 1}")
    with pytest.raises(UnknownTerm, match="or as '@first3', '@last3'"):
        layers("all@last0")
