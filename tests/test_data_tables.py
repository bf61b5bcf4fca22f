"""CSV, TSV, JSON Lines and Parquet with columns of the user's choice."""

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitfit.data import BadRow, DataConfig, Dataset, read_dataset
from bitfit.errors import DataError, UsageError
from bitfit.tasks import TextExample, TokenExample

CSV = (
    "body,intent\nwhere is my bill,billing\ncannot log in,login\nrefund me,billing\nlocked,login\n"
)
JSONL = '{"words": ["A", "dog"], "labels": ["DT", "NN"]}\n'


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path, **options: object) -> Dataset:
    return read_dataset(DataConfig(**{"data": path, "dev_fraction": 0.0, **options}))


def complaint(path: Path, **options: object) -> str:
    with pytest.raises((DataError, UsageError)) as caught:
        read(path, **options)
    return str(caught.value).replace(f"{path.parent}/", "")


def test_csv_with_named_columns(tmp_path: Path) -> None:
    data = read(write(tmp_path, "tickets.csv", CSV), text="body", label="intent")
    assert data.task.labels == ("billing", "login")
    assert (data.task.name, data.task.kind) == ("tickets", "classification")
    assert data.splits["train"][1] == TextExample("cannot log in", None, 1)
    assert data.sources == {"train": (str(tmp_path / "tickets.csv"),)}


def test_columns_are_guessed_from_common_names(tmp_path: Path) -> None:
    data = read(write(tmp_path, "tickets.csv", CSV))
    assert data.columns == {"text": "body", "label": "intent"}


def test_pairs_are_guessed_from_common_names(tmp_path: Path) -> None:
    text = "id,premise,hypothesis,label\n7,a,b,x\n8,c,,y\n"
    data = read(write(tmp_path, "t.csv", text))
    assert data.task.is_pair
    assert data.splits["train"] == [TextExample("a", "b", 0, "7"), TextExample("c", "", 1, "8")]


def test_an_unguessable_column_lists_the_columns(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", "foo,bar\na,b\n")
    assert complaint(path) == (
        "t.csv: which column is the text? Say it with text (--text); the columns are foo, bar"
    )
    assert "which column is the label?" in complaint(path, text="foo")


def test_a_misspelt_column_gets_the_nearest_name(tmp_path: Path) -> None:
    found = complaint(write(tmp_path, "t.csv", CSV), label="intnet")
    assert 't.csv has no column "intnet". Did you mean "intent"?' in found


def test_records_of_several_lines_keep_physical_line_numbers(tmp_path: Path) -> None:
    text = 'text,label\n"two\nlines, ""quoted""",a\n\nplain,b\nlast,c\n'
    path = write(tmp_path, "t.csv", text)
    assert read(path).splits["train"][0].text == 'two\nlines, "quoted"'
    assert complaint(path, labels=("a", "b")) == 't.csv:6: label "c" is not one of a, b'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "t.csv: the file is empty"),
        (b"text,label\n", "t.csv: no rows below the header"),
        (b"text,label,text\na,b,c\n", 't.csv:1: the header names "text" more than once'),
        (b"text,label\na,x\nb\n", "t.csv:3: 1 columns where the header has 2"),
        (b"text,label\na,x\nb,y,z\n", "t.csv:3: 3 columns where the header has 2"),
        (b"text,label\na,x\nb,y\nc,\n", 't.csv:4: column "label" is empty; expected one of x, y'),
        (b"text,label\na,x\n  ,y\n", 't.csv:3: column "text" is empty'),
        (b"text,label\na,x\nb,x\n", 'column "label" holds one class only, "x"'),
        (b"text,label\na,\nb,\n", 'column "label" is empty in every row'),
        (b"text,label\na,x\n\xe9,y\n", "t.csv:3: byte 0xe9 at position 1 is not UTF-8"),
        (b"text,label\na,x\n\0,y\n", "t.csv:3: a NUL byte"),
        (b"\xff\xfet\0e\0", "t.csv:1: this is UTF-16"),
        (b'text,label\na,x\n"b,y\nc,z\n', "t.csv:3: a quote is opened here and never closed"),
        (b'text,label\n"a" b,x\n', "t.csv:2: "),
        (b"text,label\ra,x\r", "t.csv:1: a carriage return outside of quotes"),
    ],
)
def test_a_broken_csv_names_line_and_expectation(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    assert expected in complaint(write(tmp_path, "t.csv", content))


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        ("text;label\na;x\n", {}, "text;label. The header has ';' and no comma: save the file"),
        ("text;label\na;x\n", {"text": "text", "label": "label"}, "The header has ';'"),
        ("text\tlabel\na\tx\n", {}, "tabs and no comma: call the file .tsv, or say the format"),
        ("text,mood\na,x\n", {}, "the columns are text, mood"),
        ("text,label\na,x\n", {"task": "mrpc"}, "two texts, and t.csv seems to have one: name "
         "their columns with text and text_pair (--text, --text-pair); the columns are text"),
        ("text1,text2,label\na,b,1\n", {"task": "sst2"}, "name its column with text (--text)"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_columns_is_said(
    content: str, options: dict[str, str], expected: str, tmp_path: Path
) -> None:
    found = complaint(write(tmp_path, "t.csv", content), **options)
    assert expected in found
    assert ("no comma" in found) == ("no comma" in expected or "';'" in expected)


def test_bom_and_crlf_are_tolerated(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode())
    assert read(path).splits == read(write(tmp_path, "u.csv", CSV)).splits


def test_a_label_seen_only_in_dev_is_named(tmp_path: Path) -> None:
    dev = write(tmp_path, "dev.csv", "body,intent\nx,billing\ny,logins\n")
    found = complaint(write(tmp_path, "t.csv", CSV), dev=dev)
    assert found == 'dev.csv:3: label "logins" is not one of billing, login. Did you mean "login"?'


def test_bad_rows_are_listed_when_asked_to_skip(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", "text,label\na,x\nb\nc,y\n,x\nd,\n")
    data = read(path, skip_bad_rows=True)
    assert [e.text for e in data.splits["train"]] == ["a", "c"]
    assert [row.line for row in data.skipped] == [3, 5, 6]
    assert str(data.skipped[0]) == f"{path}:3: 1 columns where the header has 2"
    assert isinstance(data.skipped[0], BadRow)


def test_only_bad_rows_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", "text,label\n,x\n,y\n")
    assert "no rows to use for train; 2 bad rows" in complaint(path, skip_bad_rows=True)


def test_whole_number_labels_are_sorted_as_numbers(tmp_path: Path) -> None:
    rows = "".join(f"t{i},{i % 12}\n" for i in range(24))
    data = read(write(tmp_path, "t.csv", "text,label\n" + rows))
    assert data.task.labels == tuple(map(str, range(12)))


def test_given_labels_keep_their_order(tmp_path: Path) -> None:
    data = read(write(tmp_path, "t.csv", CSV), labels=("login", "billing", "other"))
    assert data.task.labels == ("login", "billing", "other")
    assert [e.label for e in data.splits["train"]] == [1, 0, 1, 0]
    numbers = write(tmp_path, "n.csv", "text,label\n" + "".join(f"t,{i}\n" for i in range(30)))
    assert read(numbers, labels=list(map(str, range(30)))).task.kind == "classification"


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (["0.5", "1", "2"], "numbers with a fraction"),
        ([str(i) for i in range(21)], "21 different numbers"),
    ],
)
def test_measured_numbers_are_regression_and_the_reason_is_kept(
    tmp_path: Path, answers: list[str], reason: str
) -> None:
    rows = "".join(f"t,{a}\n" for a in answers)
    data = read(write(tmp_path, "t.csv", "text,score\n" + rows))
    assert data.task.kind == "regression"
    assert data.kind_seen_from == f'column "score" holds {reason}'
    named = read(tmp_path / "t.csv", kind="regression")
    assert (named.task.kind, named.kind_seen_from) == ("regression", None)
    assert [e.label for e in data.splits["train"]] == [float(a) for a in answers]


def test_one_slip_does_not_turn_measures_into_classes(tmp_path: Path) -> None:
    rows = "".join(f"t,{i}.5\n" for i in range(30))
    path = write(tmp_path, "t.csv", f"text,score\n{rows}t,3.x5\n")
    assert complaint(path) == 't.csv:32: column "score": "3.x5" is not a number'


def test_numbers_are_classes_when_the_kind_says_so(tmp_path: Path) -> None:
    rows = "".join(f"t,{i}\n" for i in range(30))
    path = write(tmp_path, "t.csv", "text,label\n" + rows)
    assert len(read(path, kind="classification").task.labels) == 30


def test_multilabel_from_separated_text_and_from_lists(tmp_path: Path) -> None:
    text = "text;labels\n"
    comma = write(tmp_path, "t.csv", text.replace(";", ",") + "p,a|b\nq,\nr, b \n")
    lists = write(
        tmp_path,
        "t.jsonl",
        '{"text": "p", "labels": ["b", "a"]}\n{"text": "q", "labels": []}\n'
        '{"text": "r", "labels": ["b"]}\n',
    )
    for data in (read(comma, kind="multilabel"), read(lists)):
        assert data.task.kind == "multilabel"
        assert data.task.labels == ("a", "b")
        assert [e.label for e in data.splits["train"]] == [(0, 1), (), (1,)]


def test_multilabel_separator_can_be_chosen(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", "text,labels\np,a;b\n")
    assert read(path, kind="multilabel", label_separator=";").task.labels == ("a", "b")


def test_a_test_file_may_be_without_answers(tmp_path: Path) -> None:
    test = write(tmp_path, "test.csv", "body\nwhat now\n")
    data = read(write(tmp_path, "t.csv", CSV), test=test)
    assert data.splits["test"] == [TextExample("what now")]


def test_a_folder_of_splits(tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        write(tmp_path, f"{name}.csv", CSV)
    data = read(tmp_path)
    assert list(data.splits) == ["train", "dev", "test"]
    assert data.task.name == tmp_path.name
    assert not data.held_out


def test_a_single_split_other_than_train_is_the_file_itself(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", CSV)
    data = read(path, splits=("dev",), labels=("billing", "login"))
    assert list(data.splits) == ["dev"]
    assert len(data.splits["dev"]) == 4
    assert "labels are needed" in complaint(path, splits=("dev",))


def test_tsv_is_quoted_like_csv_and_glue_is_not(tmp_path: Path) -> None:
    path = write(tmp_path, "t.tsv", 'text\tlabel\n"a ""b"""\tx\nc\ty\n')
    assert read(path).splits["train"][0].text == 'a "b"'
    assert read(path, format="glue").splits["train"][0].text == '"a ""b"""'
    raw = write(tmp_path, "u.tsv", 'text\tlabel\n"Frailty" is good\tx\nc\ty\n')
    assert 'say format "glue"' in complaint(raw)


def test_words_and_tags_from_jsonl(tmp_path: Path) -> None:
    data = read(write(tmp_path, "t.jsonl", JSONL))
    assert data.task.kind == "tokens"
    assert data.splits["train"] == [TokenExample(("A", "dog"), (0, 1))]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ('{"words": ["a"], "labels": ["DT", "NN"]}', "1 words; expected a list of as many labels"),
        ('{"words": [], "labels": []}', "the words are no list"),
        ('{"words": ["a", 3], "labels": ["DT", "NN"]}', 'column "words" is a int'),
        ('{"words": ["\\ud800"], "labels": ["DT"]}', "half of a surrogate pair"),
        ('{"words": ["a"], "labels": [["DT"]]}', "a label is a list"),
        ("[1, 2]", "a JSON list; expected an object"),
        ("{oops", "not JSON: "),
        ("[" * 100_000, "JSON that cannot be read"),
        ('{"x": ' + "1" * 5000 + "}", "JSON that cannot be read"),
    ],
)
def test_a_broken_jsonl_row_names_its_line(tmp_path: Path, row: str, expected: str) -> None:
    path = write(tmp_path, "t.jsonl", JSONL + "\n" + row + "\n")
    assert f"t.jsonl:3: {expected}" in complaint(path)
    assert len(read(path, skip_bad_rows=True).splits["train"]) == 1


def test_a_missing_key_in_jsonl_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "t.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n{"label": 0}\n')
    assert 't.jsonl:2: column "label" is empty; expected one of' in complaint(path)


def test_jsonl_labels_of_several_types_have_names(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": v} for v in (True, False, 1, 1.0, "x ")]
    path = write(tmp_path, "t.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    data = read(path)
    assert data.task.labels == ("1", "false", "true", "x")
    assert [e.label for e in data.splits["train"]] == [2, 1, 0, 0, 3]


def test_parquet_reads_as_jsonl_does(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": ["a", "b", None], "label": ["x", "y", "x"]}), path)
    assert complaint(path) == 't.parquet:3: column "text" is missing'
    data = read(path, skip_bad_rows=True)
    assert data.splits["train"] == [TextExample("a", None, 0), TextExample("b", None, 1)]
    assert "not readable as Parquet" in complaint(write(tmp_path, "u.parquet", b"PAR1"))


def test_missing_paths_and_unknown_formats_are_named(tmp_path: Path) -> None:
    assert complaint(tmp_path / "no.csv").startswith("no such file or folder")
    assert "hub:" in complaint(tmp_path / "owner")
    assert "the format cannot be told" in complaint(write(tmp_path, "t.xyz", CSV))
    (tmp_path / "empty").mkdir()
    assert "it is empty" in complaint(tmp_path / "empty")


def test_a_folder_of_two_formats_asks_which(tmp_path: Path) -> None:
    write(tmp_path, "train.csv", CSV)
    write(tmp_path, "train.jsonl", JSONL)
    assert "holds csv and jsonl; name one with format" in complaint(tmp_path)
    assert len(read(tmp_path, format="csv").splits["train"]) == 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"format": "cvs"},
        {"kind": "classificaton"},
        {"labels": ("a", "a")},
        {"labels": ("a", " ")},
        {"labels": ("a",), "kind": "regression"},
        {"dev_fraction": 1.0},
        {"limit": 0},
        {"seed": -1},
        {"text": "a", "label": "a"},
        {"splits": ()},
        {"splits": ("validation",)},
        {"task": "rtee"},
        {"task": "rte", "kind": "regression"},
        {"task": "rte", "labels": ("a", "b")},
        {"label_separator": ""},
        {"token_column": "pos"},
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        DataConfig(**{"data": "x", **wrong})


TEXT = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1
).filter(lambda text: text.strip())
ROWS = st.lists(st.tuples(TEXT, st.sampled_from(["x", "y"])), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.sampled_from([",", "\t"]))
def test_written_csv_comes_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], delimiter: str
) -> None:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter).writerows([("text", "label"), *rows])
    name = "t.csv" if delimiter == "," else "t.tsv"
    path = write(tmp_path_factory.getbasetemp(), name, out.getvalue())
    found = read(path, labels=("x", "y")).splits["train"]
    assert [(e.text, "xy"[e.label]) for e in found] == rows


@settings(max_examples=60, deadline=None)
@given(ROWS, st.booleans())
def test_written_jsonl_comes_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], ascii_only: bool
) -> None:
    lines = [json.dumps({"text": t, "label": n}, ensure_ascii=ascii_only) + "\n" for t, n in rows]
    path = write(tmp_path_factory.getbasetemp(), "t.jsonl", "".join(lines))
    found = read(path, labels=("x", "y")).splits["train"]
    assert [(e.text, "xy"[e.label]) for e in found] == rows
