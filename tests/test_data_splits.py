"""Holding out, limits and the hash of the rows."""

import dataclasses
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitfit.data import DataConfig, dataset_hash, hold_out, read_dataset, take_limit
from bitfit.data.splits import count_shared
from bitfit.errors import DataError, UsageError
from bitfit.tasks import SpanExample, TextExample, TokenExample


def csv_of(path: Path, labels: list[str]) -> Path:
    path.write_text("text,label\n" + "".join(f"t{i},{n}\n" for i, n in enumerate(labels)))
    return path


def test_dev_is_held_out_in_the_classes_shares(tmp_path: Path) -> None:
    path = csv_of(tmp_path / "t.csv", ["a"] * 60 + ["b"] * 30 + ["c"] * 2 + ["d"])
    data = read_dataset(DataConfig(data=path))
    assert data.held_out
    assert Counter(e.label for e in data.splits["dev"]) == {0: 6, 1: 3, 2: 1}
    assert Counter(e.label for e in data.splits["train"]) == {0: 54, 1: 27, 2: 1, 3: 1}
    assert data.sources["dev"] == data.sources["train"]


def test_holding_out_repeats_exactly_and_varies_with_the_seed(tmp_path: Path) -> None:
    path = csv_of(tmp_path / "t.csv", ["a", "b"] * 50)
    splits = [read_dataset(DataConfig(data=path, seed=seed)).splits for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]


def test_the_limit_leaves_dev_alone_and_nests(tmp_path: Path) -> None:
    path = csv_of(tmp_path / "t.csv", ["a", "b"] * 50)
    data = {n: read_dataset(DataConfig(data=path, limit=n)).splits for n in (5, 20, 1000)}
    texts = {n: [e.text for e in splits["train"]] for n, splits in data.items()}
    assert data[5]["dev"] == data[20]["dev"] == data[1000]["dev"]
    assert [len(t) for t in texts.values()] == [5, 20, 90]
    assert set(texts[5]) < set(texts[20]) < set(texts[1000])
    assert texts[20] == [t for t in texts[1000] if t in texts[20]]  # the order is kept


def test_labels_are_those_before_the_limit(tmp_path: Path) -> None:
    path = csv_of(tmp_path / "t.csv", list("abcdefgh"))
    assert len(read_dataset(DataConfig(data=path, limit=1)).task.labels) == 8


def test_one_row_cannot_be_divided(tmp_path: Path) -> None:
    path = csv_of(tmp_path / "t.csv", ["a"])
    with pytest.raises(DataError, match="too few rows"):
        read_dataset(DataConfig(data=path, labels=("a", "b")))


def test_train_alone_is_not_divided(tmp_path: Path) -> None:
    path = csv_of(tmp_path / "t.csv", ["a", "b"] * 5)
    data = read_dataset(DataConfig(data=path, splits=("train",)))
    assert (list(data.splits), len(data.splits["train"])) == (["train"], 10)
    both = read_dataset(DataConfig(data=path, splits=("train", "dev")))
    assert (len(both.splits["train"]), both.held_out) == (8, True)


def test_any_split_of_a_folder_is_trained_on(tmp_path: Path) -> None:
    for name, labels in (("train", "ab" * 5), ("valid", "ab" * 10), ("test", "ab" * 15)):
        csv_of(tmp_path / f"{name}.csv", list(labels))

    def sizes(**options: Any) -> dict[str, int]:
        data = read_dataset(DataConfig(data=tmp_path, **options))
        return {split: len(examples) for split, examples in data.splits.items()}

    assert sizes(train_split="test") == {"train": 30, "dev": 20}
    assert sizes(train_split="dev", dev_fraction=0.2) == {"train": 16, "dev": 4, "test": 30}
    assert sizes(train_split="valid", dev=tmp_path / "train.csv")["train"] == 20
    assert sizes(train_split="valid", dev=tmp_path / "train.csv")["dev"] == 10
    with pytest.raises(DataError, match="no extra split: looked for extra in"):
        sizes(train_split="extra")
    with pytest.raises(UsageError, match="is one file"):
        read_dataset(DataConfig(data=tmp_path / "train.csv", train_split="dev"))


def test_what_is_trained_on_is_no_dev_file(tmp_path: Path) -> None:
    path = csv_of(tmp_path / "train.csv", list("ab" * 5))
    link = tmp_path / "other.csv"
    link.symlink_to(path)
    for data, dev in ((path, path), (path, link), (tmp_path, path)):
        with pytest.raises(UsageError, match=r"^dev .* is the file that is trained on.*leave dev"):
            read_dataset(DataConfig(data=data, dev=dev))
    other = csv_of(tmp_path / "more.csv", list("ab" * 5))
    assert len(read_dataset(DataConfig(data=path, dev=other)).splits["dev"]) == 10


def test_rows_that_stand_on_both_sides_are_counted() -> None:
    train = [TextExample("a", None, 0), TextExample("b", "c", 1)]
    dev = [TextExample("a", None, 1), TextExample("b", None, 1), TextExample("b", "c", 1)]
    assert count_shared(train, dev) == 2
    assert count_shared(train, []) == 0
    words = TokenExample(("a", "b"), (0, 1))
    assert count_shared([words], [words, TokenExample(("a",), (0,))]) == 1
    span = SpanExample("who", "the context", ())
    assert count_shared([span], [span, SpanExample("why", "the context", ())]) == 1


@given(st.lists(st.integers(0, 3), min_size=2, max_size=60), st.floats(0.01, 0.9))
def test_every_row_is_on_one_side_and_both_have_some(labels: list[int], fraction: float) -> None:
    rows = [TextExample(str(i), None, label) for i, label in enumerate(labels)]
    train, dev = hold_out(rows, fraction, seed=3)
    assert train
    assert dev
    assert sorted([*train, *dev], key=lambda e: int(e.text)) == rows


def test_a_limit_above_the_size_keeps_all() -> None:
    assert take_limit([1, 2, 3], 9, seed=0) == [1, 2, 3]


ROW = TextExample("ab", "c", 1, "id")


def test_the_hash_is_pinned_and_blind_to_ids() -> None:
    pinned = hashlib.sha256(b"bitfit data 1\nT4:S4:textS2:abS1:cI1;").hexdigest()
    assert dataset_hash([ROW]) == pinned
    assert dataset_hash([dataclasses.replace(ROW, id=None)]) == pinned


@pytest.mark.parametrize(
    "other",
    [
        [TextExample("a", "bc", 1)],
        [TextExample("ab", "c", 1.0)],
        [TextExample("ab", "c", (1,))],
        [TextExample("ab", "c", None)],
        [TextExample("abc", None, 1)],
        [ROW, ROW],
        [TokenExample(("ab", "c"), (1,))],
        [SpanExample("ab", "c", ((0, "c"),))],
        [],
    ],
)
def test_the_hash_tells_contents_apart(other: list) -> None:
    assert dataset_hash(other) != dataset_hash([ROW])


def test_the_hash_depends_on_the_order_only_of_the_rows(tmp_path: Path) -> None:
    first = csv_of(tmp_path / "a.csv", ["a", "b"])
    (tmp_path / "b.jsonl").write_text(
        '{"label": "a", "text": "t0"}\n{"text": "t1", "label": "b"}\n'
    )
    hashes = {
        dataset_hash(read_dataset(DataConfig(data=path, dev_fraction=0.0)).splits["train"])
        for path in (first, tmp_path / "b.jsonl")
    }
    assert len(hashes) == 1
