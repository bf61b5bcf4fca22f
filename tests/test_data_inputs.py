"""Texts to predict on, hub data sets, and bytes of any kind."""

import contextlib
import io
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitfit.data import DataConfig, iter_texts, read_dataset
from bitfit.errors import BitfitError, DataError, MissingExtra, UsageError
from bitfit.tasks import SpanExample, TextExample, TokenExample


def write(path: Path, content: str) -> Path:
    path.write_bytes(content.encode())
    return path


# ------------------------------------------------------------------ texts


def test_lines_are_texts_and_a_tab_makes_a_pair(tmp_path: Path) -> None:
    path = write(tmp_path / "in.txt", "one\r\n\ntwo\tthree\nlast\u2028line")
    assert list(iter_texts(path)) == [
        TextExample("one"), TextExample(""), TextExample("two", "three"),
        TextExample("last\u2028line"),
    ]  # fmt: skip


def test_two_tabs_are_no_pair() -> None:
    with pytest.raises(DataError, match="input:2: 2 tabs"):
        list(iter_texts(io.StringIO("a\nb\tc\td\n")))


@pytest.mark.parametrize("stream", [io.BytesIO(b"body,n\na,1\n"), io.StringIO("body,n\na,1\n")])
def test_streams_of_bytes_and_of_text_are_read(stream: Any) -> None:
    assert list(iter_texts(stream, "csv")) == [TextExample("a")]


def test_columns_are_named_or_guessed(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", '{"id": 3, "text": "a", "other": "b"}\n')
    assert list(iter_texts(path)) == [TextExample("a", None, None, "3")]
    assert next(iter_texts(path, text="other", text_pair="text")).text_pair == "a"
    with pytest.raises(UsageError, match=r'no column "othr"\. Did you mean "other"'):
        list(iter_texts(path, text="othr"))


def test_a_row_without_text_names_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", '{"text": "a"}\n\n{"text": null}\n')
    with pytest.raises(DataError, match=r'in\.jsonl:3: column "text" is missing'):
        list(iter_texts(path))


def test_texts_come_one_at_a_time() -> None:
    def endless() -> Any:
        while True:
            yield b"again\n"

    rows = iter_texts(endless())
    assert [next(rows).text for _ in range(3)] == ["again"] * 3


def test_unknown_input_formats_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown format"):
        iter_texts("x", "xml")
    with pytest.raises(UsageError, match="not from a stream"):
        iter_texts(io.BytesIO(), "parquet")
    with pytest.raises(DataError, match="No such file"):
        list(iter_texts(tmp_path / "none.txt"))


def test_bad_bytes_of_a_text_stream_are_named() -> None:
    stream = io.TextIOWrapper(io.BytesIO(b"a\n\xff\n"), errors="surrogateescape")
    with pytest.raises(DataError, match=":2: byte 0xff"):
        list(iter_texts(stream))


# ------------------------------------------------------------------ the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``datasets.load_dataset`` answers, by name; the arguments of the last call."""
    datasets = pytest.importorskip("datasets")
    answers: dict[str, Any] = {}

    def load(path: str, name: str | None = None, *, revision: str | None = None) -> Any:
        answers["called"] = (path, name, revision)
        return answers[path]

    monkeypatch.setattr(datasets, "load_dataset", load)
    return answers


def part(columns: dict[str, list[Any]], **classes: list[str]) -> Any:
    import datasets

    made = datasets.Dataset.from_dict(columns)
    for column, names in classes.items():
        feature = datasets.ClassLabel(names=names)
        if columns[column] and isinstance(columns[column][0], list):
            feature = datasets.Sequence(feature)
        made = made.cast_column(column, feature)
    return made


def test_hub_class_numbers_become_names(hub: dict[str, Any]) -> None:
    import datasets

    names = ["neg", "pos"]
    hub["me/moods"] = datasets.DatasetDict(
        train=part({"text": ["a", "b"], "label": [1, 0]}, label=names),
        validation=part({"text": ["c"], "label": [1]}, label=names),
        test=part({"text": ["d"], "label": [-1]}, label=names),
        unsupervised=part({"text": ["e"], "label": [-1]}, label=names),
    )
    data = read_dataset(DataConfig(data="hub:me/moods:plain", hub_revision="abc"))
    assert hub["called"] == ("me/moods", "plain", "abc")
    assert data.task.labels == ("neg", "pos")
    assert data.splits["train"] == [TextExample("a", None, 1), TextExample("b", None, 0)]
    assert data.splits["test"] == [TextExample("d")]
    assert data.sources["dev"] == ("hub:me/moods:plain/validation",)


def test_hub_glue_takes_the_built_in_labels(hub: dict[str, Any]) -> None:
    import datasets

    hub["glue"] = datasets.DatasetDict(
        train=part({"sentence": ["a", "b"], "label": [1, 0]}, label=["negative", "positive"]),
        test=part({"sentence": ["c"], "label": [-1]}, label=["negative", "positive"]),
    )
    data = read_dataset(DataConfig(data="glue", format="hub", task="sst2", dev_fraction=0.0))
    assert [e.label for e in data.splits["train"]] == [1, 0]
    assert data.splits["test"][0].label is None
    columns = {"premise": ["a"], "hypothesis": ["b"], "label": [0]}
    hub["glue"] = part(columns, label=["entailment", "neutral", "contradiction"])
    data = read_dataset(DataConfig(data="hub:glue", task="mnli", dev_fraction=0.0))
    assert data.splits["train"] == [TextExample("a", "b", 1)]
    hub["glue"] = datasets.DatasetDict(
        train=part({"sentence1": ["a"], "sentence2": ["b"], "label": [2.5]}),
        test=part({"sentence1": ["a"], "sentence2": ["b"], "label": [-1.0]}),
    )
    data = read_dataset(DataConfig(data="hub:glue", task="stsb", dev_fraction=0.0))
    assert data.splits["test"] == [TextExample("a", "b")]


def test_hub_tokens_and_spans(hub: dict[str, Any]) -> None:
    columns = {"tokens": [["A", "dog"]], "ner_tags": [[0, 1]]}
    hub["ner"] = part(columns, ner_tags=["O", "B"])
    data = read_dataset(DataConfig(data="hub:ner", dev_fraction=0.0))
    assert data.splits["train"] == [TokenExample(("A", "dog"), (1, 0))]  # labels sorted: B, O
    hub["qa"] = part(
        {
            "id": ["q"],
            "question": ["who?"],
            "context": ["the cat"],
            "answers": [{"text": ["cat"], "answer_start": [4]}],
        }
    )
    data = read_dataset(DataConfig(data="hub:qa", dev_fraction=0.0))
    assert data.splits["train"] == [SpanExample("who?", "the cat", ((4, "cat"),), "q")]


def test_what_the_hub_refuses_is_a_data_error(hub: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="hub:no/such"):
        read_dataset(DataConfig(data="hub:no/such"))
    hub["odd"] = {"everything": part({"text": ["a"]})}
    with pytest.raises(DataError, match=r"no train split: .* its splits: everything"):
        read_dataset(DataConfig(data="hub:odd"))
    with pytest.raises(DataError, match=r"no all split: .* its splits: everything"):
        read_dataset(DataConfig(data="hub:odd", train_split="all"))
    with pytest.raises(UsageError, match=r"dev is 'dev\.csv', .*no split of hub:odd; it has every"):
        read_dataset(DataConfig(data="hub:odd", dev="dev.csv"))


def test_a_hub_out_of_reach_is_said_once_with_the_ways_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    datasets = pytest.importorskip("datasets")
    logger = logging.getLogger("huggingface_hub")
    before = logger.level

    def unreachable(*_: object, **__: object) -> None:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise ConnectionError("Couldn't reach 'a/b' on the Hub (LocalEntryNotFoundError)\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError) as caught:
        read_dataset(DataConfig(data="hub:a/b"))
    message = str(caught.value)
    assert message.startswith("hub:a/b cannot be read from the data hub: Couldn't reach 'a/b' on")
    assert "a local file or folder; with HF_HUB_OFFLINE=1" in message
    assert "\n" not in message
    assert not caplog.records
    assert logger.level == before


def test_any_split_of_a_hub_data_set_is_trained_and_evaluated_on(hub: dict[str, Any]) -> None:
    import datasets

    def rows(*texts: str) -> Any:
        return part({"text": list(texts), "label": ["x", "y"]})

    hub["many"] = datasets.DatasetDict(
        train=rows("a", "b"), validation=rows("c", "d"), test=rows("e", "f"), extra=rows("g", "h")
    )

    def texts(**options: Any) -> dict[str, list[str]]:
        data = read_dataset(DataConfig(data="hub:many", **options))
        return {split: [e.text for e in examples] for split, examples in data.splits.items()}

    usual = {"dev": ["c", "d"], "test": ["e", "f"]}
    assert texts() == {"train": ["a", "b"]} | usual
    with pytest.raises(UsageError, match="dev is 'val', the split that is trained on"):
        texts(train_split="validation", dev="val")
    assert texts(train_split="extra") == {"train": ["g", "h"]} | usual
    assert texts(train_split="extra", dev="train", test="dev") == {
        "train": ["g", "h"], "dev": ["a", "b"], "test": ["c", "d"],
    }  # fmt: skip
    # What is trained on is no dev split too, by whichever of its names.
    for name in ("validation", "dev"):
        found = texts(train_split=name, dev_fraction=0)
        assert found == {"train": ["c", "d"], "test": ["e", "f"]}


def test_without_the_extra_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=r"bitfit\[data\]"):
        read_dataset(DataConfig(data="hub:a/b"))
    with pytest.raises(MissingExtra, match=r"reading Parquet needs an extra"):
        read_dataset(DataConfig(data=write(tmp_path / "t.parquet", "")))


# ------------------------------------------------------------------ any bytes

SEEDS = [
    b"text,label\na,x\nb,y\n", b'{"text": "a", "label": 1}\n', b'{"words": ["a"], "labels": [1]}',
    b"1\ta\ta\tX\tY\t_\t_\t_\t_\t_\n", b"( (S (NN a)))", b"[ a/NN ]\n====",
    b"sentence\tlabel\na\t1\n",
    b'{"data": [{"paragraphs": [{"context": "a", "qas": []}]}]}', b"", b"\xff", b"\0", b'"', b"\r",
]  # fmt: skip
NAMES = [
    "t.csv",
    "t.tsv",
    "t.jsonl",
    "t.parquet",
    "t.conllu",
    "t.conll",
    "t.pos",
    "t.mrg",
    "t.json",
]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from(SEEDS), st.binary(max_size=12)), max_size=4),
    st.sampled_from(NAMES),
    st.sampled_from([None, "sst2", "cola", "squad"]),
    st.booleans(),
)
def test_any_bytes_are_read_or_refused_on_purpose(
    tmp_path_factory: pytest.TempPathFactory,
    pieces: list[bytes],
    name: str,
    task: str | None,
    skip: bool,
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(b"".join(pieces))
    with contextlib.suppress(BitfitError):
        read_dataset(DataConfig(data=path, task=task, skip_bad_rows=skip))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=30), st.sampled_from(["text", "csv", "tsv", "jsonl"]))
def test_any_input_bytes_are_read_or_refused_on_purpose(content: bytes, form: str) -> None:
    with contextlib.suppress(BitfitError):
        list(iter_texts(io.BytesIO(content), form))
