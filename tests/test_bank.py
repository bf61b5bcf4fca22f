import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitfit.bank import Bank, Layout, parse_layout
from bitfit.errors import TaskFileError, UnknownTask, UsageError
from bitfit.terms import Site

SITES = (
    Site("query", 0, "layer.0.query", 3), Site("query", 1, "layer.1.query", 3),
    Site("intermediate", 1, "layer.1.up", 4), Site("pooler", None, "pooler.dense", 2),
)  # fmt: skip
LAYOUT = Layout(SITES)


def test_a_row_splits_into_its_sites_in_order():
    parts = LAYOUT.split(torch.arange(24.0).view(2, 12))
    assert [tuple(p.shape) for p in parts.values()] == [(2, 3), (2, 3), (2, 4), (2, 2)]
    assert torch.equal(torch.cat(list(parts.values()), dim=1), torch.arange(24.0).view(2, 12))


def test_a_row_moves_into_a_larger_layout_with_zeros_elsewhere():
    small = Layout((SITES[2], SITES[0]))
    row = small.expand(torch.arange(1.0, 8.0), LAYOUT)
    assert row.tolist() == [5, 6, 7, 0, 0, 0, 1, 2, 3, 4, 0, 0]
    with pytest.raises(UsageError, match="no place for query@1, pooler"):
        LAYOUT.expand(torch.zeros(12), small)


@given(st.sets(st.sampled_from([(t, i) for t in "abc" for i in range(12)] + [("p", None)])))
def test_a_layout_survives_json(chosen):
    order = sorted(chosen, key=str)
    order.sort(key=lambda pair: (pair[0], pair[1] or 0))
    sites = tuple(Site(t, i, f"{t}.{i}", 5 + len(t)) for t, i in order)
    value = Layout(sites).to_json()
    assert Layout.from_json(value, sites).sites == sites
    assert sum(len(layers) * length for _, layers, length in parse_layout(value)) == Layout(sites).n


@pytest.mark.parametrize(
    "value",
    [None, {}, [["query", "0-1"]], [["query", "0-1", -3]], [["query", 0, 3]], [[1, "0", 3]],
     [["query", "0-", 3]], [["query", "zero", 3]], [["query", "0-1", 3], ["query", "1", 3]],
     [["query", "0-99999999", 3]], [["query", "0", 1 << 40]], [[]] * 2000],
)  # fmt: skip
def test_a_bad_layout_is_refused(value):
    with pytest.raises(TaskFileError):
        Layout.from_json(value, SITES)


def test_a_layout_of_another_base_is_refused_by_site():
    with pytest.raises(TaskFileError, match="query@7"):
        Layout.from_json([["query", "7", 3]], SITES)
    with pytest.raises(TaskFileError, match="has 9 values, this base's 3"):
        Layout.from_json([["query", "0", 9]], SITES)


def test_tasks_come_and_go_without_touching_each_other():
    bank = Bank(LAYOUT)
    rows = {f"task{i}": torch.full((12,), float(i)) for i in range(100)}
    for name, row in rows.items():
        bank.add(name, row)
    bank.remove("task7")
    bank.add("new", torch.full((12,), -1.0))
    assert bank.names[:3] == ["task0", "task1", "task2"]
    for name, row in rows.items():
        if name != "task7":
            assert torch.equal(bank.gather([bank.index(name)])[0], row)
    assert len(bank) == 100


def test_an_unknown_task_is_an_error_with_the_nearest_name():
    bank = Bank(LAYOUT)
    bank.add("sentiment", torch.zeros(12))
    with pytest.raises(UnknownTask, match="Did you mean 'sentiment'"):
        bank.index("sentimant")
    with pytest.raises(UsageError, match="already has"):
        bank.add("sentiment", torch.zeros(12))
    with pytest.raises(UsageError, match="12 values, not 11"):
        bank.add("other", torch.zeros(11))


def test_a_layout_that_unfolds_to_millions_is_refused_early():
    with pytest.raises(TaskFileError, match="twice"):
        parse_layout([["query", ",".join(["0-999"] * 2700), 1]])


@pytest.mark.parametrize(
    ("storage", "error"), [("fp32", 0), ("fp16", 1e-3), ("bf16", 2e-2), ("int8", 2e-2)]
)
def test_rows_come_back_in_fp32_as_near_as_they_are_kept(storage, error):
    bank = Bank(LAYOUT, storage=storage)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 12, generator=generator)
    rows[:, 3:6] *= 1e-3  # a site of small values has a scale of its own
    indices = [bank.add(str(i), row) for i, row in enumerate(rows)]
    found = bank.gather(indices[::-1])
    assert found.dtype == torch.float32
    for part, wanted in zip(LAYOUT.split(found).values(), LAYOUT.split(rows.flip(0)).values(),
                            strict=True):  # fmt: skip
        assert ((part - wanted).abs().amax(1) <= error * wanted.abs().amax(1)).all()
    assert bank.row_bytes == {"fp32": 48, "fp16": 24, "bf16": 24, "int8": 12 + 16}[storage]


def test_memory_stays_near_what_the_rows_need_and_no_row_moves():
    bank = Bank(LAYOUT)
    first = bank.add("0", torch.ones(12))
    where = bank._blocks[0].data_ptr()
    for i in range(1, 1000):
        bank.add(str(i), torch.full((12,), float(i)))
        assert bank.capacity <= max(1.15 * len(bank), len(bank) + 1)
    assert bank._blocks[0].data_ptr() == where
    assert bank.gather([first, bank.index("999")])[:, 0].tolist() == [1, 999]


def test_sites_that_no_row_touches_are_left_out():
    bank = Bank(LAYOUT)
    a, b = torch.zeros(12), torch.zeros(12)
    a[0], b[11] = 1, 2
    indices = [bank.add("a", a), bank.add("b", b)]
    base = torch.arange(12.0)
    found = bank.biases(indices, base)
    assert list(found) == ["layer.0.query", "pooler.dense"]
    assert found["pooler.dense"].tolist() == [[10, 11], [10, 13]]
    assert bank.biases([bank.add("c", b * 0)], base) == {}
