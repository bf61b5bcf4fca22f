"""The kernels of a GPU, run by Triton's interpreter, against the same in plain torch."""

import numpy as np
import plain_kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitfit.fused_dropout import Where, threshold_of

triton = pytest.importorskip("triton", reason="no Triton: it comes with torch for CUDA")
from triton import language as tl

from bitfit import kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, DIM = 2, 5


@triton.jit
def count_up(x, count):
    for _ in range(tl.load(count)):
        tl.store(x, tl.load(x) + 1)


@pytest.fixture(scope="module", autouse=True)
def runs_here():
    """Some versions of Triton's interpreter do not go with some of NumPy: a loop shows it."""
    x, count = (torch.tensor([n], device=DEVICE) for n in (0, 3))
    try:
        count_up[(1,)](x, count)
    except Exception as error:
        if DEVICE.type == "cuda":
            raise
        pytest.skip(f"Triton {triton.__version__} does not interpret a loop here: {error}")
    assert x.item() == 3


def make_where(lengths, rate=None, site=0):
    """Return sequences end to end, of runs of two sequences each."""
    sizes = torch.tensor(lengths)
    draws = None
    if rate is not None:
        runs = [i // 2 for i in range(len(lengths))]
        places = [sum(lengths[i // 2 * 2 : i]) for i in range(len(lengths))]
        draws = torch.tensor([[(1 << 40) + 7 * r for r in runs], places,
                              [threshold_of(rate)] * len(lengths)])  # fmt: skip
    return Where(sizes.cumsum(0) - sizes, sizes, max(lengths), draws, site)


def on_device(where):
    draws = None if where.draws is None else where.draws.to(DEVICE)
    return Where(
        where.starts.to(DEVICE), where.lengths.to(DEVICE), where.longest, draws, where.site
    )


def random(tokens, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, HEADS, DIM, generator=generator).to(dtype)


def with_gradients(attend, where, tokens, device=DEVICE, scaling=0.4):
    """Return what attention gives, and the gradients of a weighed sum of it."""
    inputs = [random(tokens, seed).to(device).requires_grad_(True) for seed in range(3)]
    out = attend(*inputs, where, scaling)
    (out * random(tokens, 9).to(device)).sum().backward()
    return [x.detach().cpu() for x in (out, *(x.grad for x in inputs))]


@pytest.mark.parametrize("rate", [None, 0.1, 0.5])
@pytest.mark.parametrize("lengths", [[1], [3, 1, 7], [64, 2], [70, 130, 5]])
def test_attention_and_its_gradients_are_those_of_plain_torch(lengths, rate):
    """Lengths below, at and above a block; the masks are the same bit for bit."""
    where = make_where(lengths, rate, site=3)
    found = with_gradients(kernels.PackedAttention.apply, on_device(where), sum(lengths))
    expected = with_gradients(plain_kernels.attend, where, sum(lengths), torch.device("cpu"))
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
def test_a_nan_in_one_sequence_stays_there():
    where, inputs = on_device(make_where([3, 66, 4], 0.1)), [random(73, i) for i in range(3)]
    for x in inputs:
        x[3:69] = torch.nan
    inputs = [x.to(DEVICE).requires_grad_(True) for x in inputs]
    out = kernels.PackedAttention.apply(*inputs, where, 0.4)
    out.sum().backward()
    for x in (out, *(x.grad for x in inputs)):
        assert x[3:69].isnan().all()
        assert not x[:3].isnan().any()
        assert not x[69:].isnan().any()


@settings(deadline=None, max_examples=20)
@given(
    rows=st.integers(1, 5), width=st.sampled_from([1, 3, 8, 40]), kind=st.integers(0, 1 << 21),
    site=st.integers(0, 40), rate=st.sampled_from([0.1, 0.5, 0.9]),
    seed=st.integers(0, 2**63 - 1),
)  # fmt: skip
def test_what_is_dropped_is_what_philox_says(rows, width, kind, site, rate, seed):
    draws = torch.stack([torch.full((rows,), seed), torch.arange(rows) * 1000])
    arguments = kind, site, threshold_of(rate)
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    found = kernels.drop(x.to(DEVICE), draws.to(DEVICE), *arguments).cpu()
    torch.testing.assert_close(found, plain_kernels.drop(x, draws, *arguments))
    assert torch.equal(found == 0, plain_kernels.drop(x, draws, *arguments) == 0)


def test_the_gradient_of_what_is_dropped_has_the_same_mask():
    draws = torch.tensor([[5, 5, 6], [0, 1, 0]])
    x = torch.ones(3, 50, device=DEVICE, requires_grad=True)
    dropped = kernels.Dropped.apply(x, draws.to(DEVICE), 1, 2, threshold_of(0.3))
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped)
    assert 0.1 < (dropped == 0).float().mean() < 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_less_precision_keep_their_type(dtype):
    draws = torch.tensor([[5, 6], [0, 0]]).to(DEVICE)
    x = torch.ones(2, 64, device=DEVICE, dtype=dtype)
    found = kernels.drop(x, draws, 0, 0, threshold_of(0.5))
    assert found.dtype == dtype
    assert set(found.float().flatten().tolist()) == {0.0, 2.0}


def test_philox_gives_the_numbers_of_its_authors():
    """The known answers of Random123: key 0 and counters 0, and all bits set."""
    assert int(plain_kernels.philox(0, 0, 0, 0, 0)) == 0x6627E8D5
    ones = np.int64(-1)
    assert int(plain_kernels.philox(ones, *[ones] * 4)) == 0x408F276D
