"""The official GLUE directories."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bitfit.data import DataConfig, Dataset, read_dataset
from bitfit.errors import DataError, UsageError
from bitfit.tasks import BUILTIN_TASKS, TextExample


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())


def read(data: Path, task: str, **options: object) -> Dataset:
    return read_dataset(DataConfig(**{"data": data, "task": task, "dev_fraction": 0.0, **options}))


COLA = 'gj04\t1\t\tOur friends "won\'t" buy.\ngj04\t0\t*\tMost the cat.\n'


def test_every_place_that_was_looked_in_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, "cola")
    places = f"{tmp_path}/CoLA or {tmp_path}/glue_data/CoLA"
    assert str(caught.value) == (
        f"{tmp_path}: no train split: looked for train.tsv in {tmp_path} (there is no folder "
        f"{places} either)"
    )


def test_cola_has_no_header_but_in_test(tmp_path: Path) -> None:
    write(tmp_path / "CoLA/train.tsv", COLA)
    write(tmp_path / "CoLA/dev.tsv", COLA)
    write(tmp_path / "CoLA/test.tsv", "index\tsentence\n0\tBill whistled.\n")
    data = read(tmp_path, "cola")
    assert data.splits["train"] == [
        TextExample('Our friends "won\'t" buy.', None, 1),
        TextExample("Most the cat.", None, 0),
    ]
    assert data.splits["test"] == [TextExample("Bill whistled.", None, None, "0")]
    assert read(tmp_path / "CoLA", "CoLA").splits == data.splits


def test_mrpc_has_a_bom_and_quotes_that_are_text(tmp_path: Path) -> None:
    head = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    write(tmp_path / "MRPC/train.tsv", head + '1\t7\t8\t"A quote\tnever closed "\r\n')
    assert read(tmp_path, "mrpc").splits["train"] == [
        TextExample('"A quote', 'never closed "', 1, None)
    ]


def test_mnli_has_two_dev_and_test_sets_and_rows_without_gold(tmp_path: Path) -> None:
    head = "index\tsentence1\tsentence2\tlabel1\tgold_label\n"
    row = "0\tone\ttwo\tneutral\tentailment\n"
    write(tmp_path / "MNLI/train.tsv", head + row + "1\ta\tb\tneutral\t-\n")
    for name in ("dev_matched", "dev_mismatched"):
        write(tmp_path / f"MNLI/{name}.tsv", head + row)
    for name in ("test_matched", "test_mismatched"):
        write(tmp_path / f"MNLI/{name}.tsv", "index\tsentence1\tsentence2\n5\tx\ty\n")
    data = read(tmp_path, "mnli")
    assert list(data.splits) == ["train", "dev", "dev_mismatched", "test", "test_mismatched"]
    assert [len(rows) for rows in data.splits.values()] == [1] * 5
    assert data.splits["train"][0].label == 1
    assert [row.line for row in data.skipped] == [3]
    assert data.splits["test_mismatched"][0].id == "5"


def test_broken_rows_of_qqp_are_left_out_and_told(tmp_path: Path) -> None:
    head = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    write(tmp_path / "QQP/train.tsv", head + "1\t2\t3\tWhy?\t\t0\n4\t5\t6\tcut\noff\t1\n")
    data = read(tmp_path, "qqp")
    assert data.splits["train"] == [TextExample("Why?", "", 0, "1")]
    assert [row.line for row in data.skipped] == [3, 4]


def test_broken_rows_of_other_tasks_are_errors(tmp_path: Path) -> None:
    write(tmp_path / "SST-2/train.tsv", "sentence\tlabel\ngood \t1\nbad \t2\n")
    with pytest.raises(DataError, match=r'train\.tsv:3: label "2" is not one of 0, 1'):
        read(tmp_path, "sst2")
    write(tmp_path / "SST-2/train.tsv", "sentence\tlabel\ngood \t1\nbad\n")
    with pytest.raises(DataError, match=r"train\.tsv:3: 1 columns where the header has 2"):
        read(tmp_path, "sst2")


def test_stsb_is_regression_and_its_scores_are_checked(tmp_path: Path) -> None:
    head = "index\tsentence1\tsentence2\tscore\n"
    write(tmp_path / "STS-B/train.tsv", head + "0\ta\tb\t3.800\n")
    assert read(tmp_path, "stsb").splits["train"][0].label == 3.8
    write(tmp_path / "STS-B/train.tsv", head + "0\ta\tb\tnan\n")
    with pytest.raises(DataError, match=r':2: column "score": "nan" is not a number'):
        read(tmp_path, "stsb")


def test_a_missing_train_names_file_and_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"looked for train\.tsv in .*no folder .*WNLI"):
        read(tmp_path, "wnli")


def test_one_split_needs_no_train(tmp_path: Path) -> None:
    write(tmp_path / "WNLI/dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n")
    data = read(tmp_path, "wnli", splits=("dev",), dev_fraction=0.1)
    assert list(data.splits) == ["dev"]
    assert not data.held_out
    with pytest.raises(DataError, match=r"no test split: looked for test\.tsv"):
        read(tmp_path, "wnli", splits=("dev", "test"))


def test_glue_is_found_in_its_folder_below_the_data_too(tmp_path: Path) -> None:
    text = "index\tsentence1\tsentence2\tlabel\n0\t{}\tb\t1\n"
    write(tmp_path / "glue_data/WNLI/train.tsv", text.format("below"))
    for data in (tmp_path, tmp_path / "glue_data", tmp_path / "glue_data/WNLI"):
        assert read(data, "wnli").splits["train"][0].text == "below"
    write(tmp_path / "WNLI/train.tsv", text.format("nearer"))
    assert read(tmp_path, "wnli").splits["train"][0].text == "nearer"


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    write(tmp_path / "RTE/train.tsv", "index\tsentence1\tsentence_2\tlabel\n0\ta\tb\tentailment\n")
    with pytest.raises(UsageError, match=r'no column "sentence2"\. Did you mean "sentence_2"'):
        read(tmp_path, "rte")


def test_a_builtin_task_reads_other_files_too(tmp_path: Path) -> None:
    path = tmp_path / "rte.csv"
    write(path, "premise,hypothesis,label\na,b,not_entailment\n")
    data = read(path, "rte")
    assert data.task is BUILTIN_TASKS["rte"].task
    assert data.splits["train"] == [TextExample("a", "b", 1)]
    write(path, "text,label\na,not_entailment\n")
    with pytest.raises(UsageError, match="two texts"):
        read(path, "rte")


@pytest.mark.parametrize(
    ("task", "rows"),
    [
        ("rte", {"train": 2490, "dev": 277, "test": 3000}),
        ("mrpc", {"train": 3668, "dev": 408, "test": 1725}),
        ("stsb", {"train": 5749, "dev": 1500}),
        ("sst2", {"train": 67349, "dev": 872}),
        ("mnli", {"train": 480}),
        ("qnli", {"train": 320}),
        ("qqp", {"train": 320}),
    ],
)
def test_real_glue_is_read_whole(
    real_data: Callable[..., Path], task: str, rows: dict[str, int]
) -> None:
    real_data("glue_data", BUILTIN_TASKS[task].folder)
    data = read(real_data("glue_data"), task)
    assert {split: len(part) for split, part in data.splits.items()} == rows
    assert not data.skipped
    assert data.task.is_pair == (data.splits["train"][0].text_pair is not None)
    assert all(example.label is not None for example in data.splits["train"])
    assert all(example.label is None for example in data.splits.get("test", ()))
