"""The parts of the fast path that autograd does not write: their gradients, and what they keep."""

import pytest
import torch
from packed import batch_of
from torch.autograd import gradcheck

from bitfit.bank import Layout
from bitfit.dropout import DropoutBits, StepDropout
from bitfit.leaves import RowIndex, _AddByRow, _LinearByRow

INDEX = torch.tensor([0, 0, 2, 2, 2, 1, 1])


def exact(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(True)


def test_the_gradient_of_a_linear_by_row_is_exact():
    index = RowIndex(INDEX, 4)
    weight = exact(5, 3, seed=1).detach()

    def linear(x, rows):
        return _LinearByRow.apply(x, weight, rows, index)

    assert gradcheck(linear, (exact(1, 7, 3), exact(4, 5, seed=2)), atol=1e-8)
    x, rows = exact(1, 7, 3), exact(4, 5, seed=2)
    torch.testing.assert_close(linear(x, rows)[0], x[0] @ weight.T + rows[INDEX])


def test_the_gradient_of_an_added_row_is_exact():
    index = RowIndex(INDEX, 4)

    def add(x, rows):
        return _AddByRow.apply(x * 1.0, rows, index)  # in place: x itself is a leaf

    assert gradcheck(add, (exact(1, 7, 5), exact(4, 5, seed=2)), atol=1e-8)


@pytest.mark.parametrize("index", [[0, 0, 1], [2, 0, 2], [1, 1, 1]])
def test_sums_by_row_are_those_of_index_add(index):
    index = torch.tensor(index)
    grad = torch.randn(3, 4)
    expected = torch.zeros(3, 4).index_add_(0, index, grad)
    torch.testing.assert_close(RowIndex(index, 3).sum_by_row(grad), expected)
    # what a GPU takes
    torch.testing.assert_close(RowIndex(index, 3)._sum_segments(grad), expected)


@pytest.mark.parametrize("sums", ["sum_by_row", "_sum_segments"])
def test_a_nan_of_one_row_is_in_no_other_sum(sums):
    grad = torch.ones(7, 4)
    grad[2:5] = torch.nan
    found = getattr(RowIndex(INDEX, 4), sums)(grad)
    assert found[2].isnan().all()
    assert found[[0, 1, 3]].tolist() == [[2.0] * 4, [2.0] * 4, [0.0] * 4]


def test_a_linear_by_row_keeps_no_activation():
    x, rows = torch.randn(1, 7, 3, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    weight = torch.randn(5, 3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _LinearByRow.apply(x, weight, rows, RowIndex(INDEX, 4))
    assert [tuple(t.shape) for t in kept] == [(5, 3)]


def test_no_gradient_goes_below_the_lowest_trained_term(open_tiny):
    """Nothing of the layers below is kept for the backward pass."""
    encoder = open_tiny()
    layout = Layout(tuple(s for s in encoder.sites if s.label == "intermediate@1"))
    batch = batch_of([4, 3])
    seen = {}
    for number, layer in enumerate(encoder.model.encoder.layer):
        layer.register_forward_hook(
            lambda module, args, out, n=number: seen.update({n: (args[0], out)})
        )
    row = torch.zeros(1, layout.n, requires_grad=True)
    dropout = StepDropout([(DropoutBits(0, 1, encoder.device), batch)])
    encoder.encode(batch, layout.split(row), None, dropout).sum().backward()
    first_out = seen[0][1][0] if isinstance(seen[0][1], tuple) else seen[0][1]
    assert not first_out.requires_grad
    last_out = seen[1][1][0] if isinstance(seen[1][1], tuple) else seen[1][1]
    assert last_out.requires_grad
    assert row.grad.abs().sum() > 0
