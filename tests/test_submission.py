"""The GLUE server's submission."""

import dataclasses
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import bitfit
from bitfit.data import DataConfig, read_dataset
from bitfit.encoder import Encoder
from bitfit.errors import DataError, UsageError
from bitfit.experiments.submission import (
    GLUE_TASKS,
    SERVER_FILES,
    Submission,
    match_files,
    official_answer,
    read_tests,
    write_submission,
)
from bitfit.model import Prediction
from bitfit.tasks import BUILTIN_TASKS

PAIRS = "the film\ta film\n", "a bike\tthe order\n", "money\tmoney back\n"


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")


def write_task(folder: Path, name: str, rows: int = 3) -> None:
    """Write a task's official files with some rows of train, one of dev, ``rows`` of test."""
    builtin = BUILTIN_TASKS[name]
    place, labels = folder / builtin.folder, builtin.task.labels or ("0.500", "4.250")
    columns = [c for c in (builtin.text, builtin.text_pair) if c]
    texts = ["\t".join(["the good film", "a bad bike"][: len(columns)]) for _ in range(rows)]
    if name == "cola":
        trained = [f"x\t{labels[i % 2]}\t\tthe good film\n" for i in range(6)]
    else:
        head = "\t".join(["index", *columns, builtin.label]) + "\n"
        trained = [head, *(f"{i}\t{texts[0]}\t{labels[i % len(labels)]}\n" for i in range(6))]
    test = ["\t".join(["index", *columns]) + "\n"]
    test += [f"{i}\t{text}\n" for i, text in enumerate(texts)]
    write(place / builtin.train, *trained)
    write(place / builtin.dev, *trained)
    write(place / builtin.test, *test)
    for extra in builtin.extra_splits:
        write(place / extra.files[0], *(trained if extra.name.startswith("dev") else test))


@pytest.fixture(scope="module")
def encoder(checkpoint: Callable[..., str]) -> Encoder:
    return bitfit.open_encoder(checkpoint(), "fp32", "cpu")


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "glue_data"
    for i, builtin in enumerate(GLUE_TASKS):
        write_task(folder, builtin.task.name, rows=3 + i)
    train = ["index\tsentence1\tsentence2\tlabel\n"]
    train += [f"{i}\ta\tb\t{int(i > 1)}\n" for i in range(6)]
    write(folder / "WNLI" / "train.tsv", *train)
    return folder


@pytest.fixture(scope="module")
def files(
    glue: Path, encoder: Encoder, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A task file for every task but WNLI, each under a name that says nothing."""
    folder, made = tmp_path_factory.mktemp("files"), {}
    for i, builtin in enumerate(GLUE_TASKS):
        if builtin.task.name != "wnli":
            made[builtin.task.name] = path = folder / f"mine-{i}.bitfit.safetensors"
            bitfit.finetune(
                encoder, data=glue, task=builtin.task.name, name=f"mine-{i}", out=path,
                method="frozen", epochs=1, batch_size=6, max_length=16, seed=i,
            )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def written(
    glue: Path, files: dict[str, Path], encoder: Encoder,
    tmp_path_factory: pytest.TempPathFactory,
) -> Submission:  # fmt: skip
    return write_submission(encoder, files, glue, tmp_path_factory.mktemp("out") / "send")


def test_the_server_asks_for_eleven_files() -> None:
    assert sorted(SERVER_FILES) == sorted(
        "CoLA.tsv SST-2.tsv MRPC.tsv STS-B.tsv MNLI-m.tsv MNLI-mm.tsv QNLI.tsv QQP.tsv RTE.tsv "
        "WNLI.tsv AX.tsv".split()
    )


def test_a_submission_is_all_files_and_a_flat_zip_of_them(written: Submission) -> None:
    assert written.left_out == {}
    assert sorted(file.name for file in written.files) == sorted(SERVER_FILES)
    with zipfile.ZipFile(written.archive) as archive:
        assert archive.namelist() == sorted(SERVER_FILES)
        for name in SERVER_FILES:
            assert archive.read(name) == (written.folder / name).read_bytes()
        assert archive.testzip() is None


def test_every_row_of_a_test_file_has_its_answer_in_the_servers_words(
    written: Submission, glue: Path, files: dict[str, Path]
) -> None:
    for file in written.files:
        task = BUILTIN_TASKS[file.task].task
        lines = (written.folder / file.name).read_text().splitlines()
        assert lines[0] == "index\tprediction"
        cells = [line.split("\t") for line in lines[1:]]
        assert [cell[0] for cell in cells] == [str(i) for i in range(file.rows)]
        assert file.rows == 3 + [b.task.name for b in GLUE_TASKS].index(file.task)
        if task.kind == "regression":
            assert all(0 <= float(cell[1]) <= 5 for cell in cells)
        else:
            assert {cell[1] for cell in cells} <= set(task.labels)
        assert file.source == files.get(file.task)


def test_the_diagnostic_set_is_answered_by_mnli(
    written: Submission, encoder: Encoder, files: dict[str, Path]
) -> None:
    ax = next(file for file in written.files if file.name == "AX.tsv")
    assert (ax.task, ax.source) == ("mnli", files["mnli"])
    answer = bitfit.load(files["mnli"], encoder).predict([("the good film", "a bad bike")])[0].label
    lines = (written.folder / "AX.tsv").read_text().splitlines()[1:]
    assert {line.split("\t")[1] for line in lines} == {answer}


def test_wnli_without_a_task_file_gets_the_majority_of_train_and_says_so(
    written: Submission,
) -> None:
    wnli = next(file for file in written.files if file.task == "wnli")
    assert (wnli.source, wnli.constant) == (None, "1")
    lines = (written.folder / "WNLI.tsv").read_text().splitlines()[1:]
    assert {line.split("\t")[1] for line in lines} == {"1"}
    assert all(file.constant is None for file in written.files if file is not wnli)


def test_the_same_answers_make_the_same_bytes(
    written: Submission, encoder: Encoder, files: dict[str, Path], glue: Path, tmp_path: Path
) -> None:
    found: list[int] = []
    model = bitfit.load(files["rte"], encoder)  # a model on the base does as well
    again = write_submission(
        model, dict(reversed(files.items())), glue.parent, tmp_path, on_answers=found.append
    )
    assert again.archive.read_bytes() == written.archive.read_bytes()
    assert sum(found) == sum(file.rows for file in written.files)
    assert list(model.tasks) == ["mine-7"]


def test_what_is_missing_is_refused_by_name_before_anything_is_answered(
    encoder: Encoder, files: dict[str, Path], tmp_path: Path
) -> None:
    data = tmp_path / "glue_data"
    write_task(data, "rte")
    write_task(data, "mnli")
    (data / "AX" / "AX.tsv").unlink()
    mine = {name: files[name] for name in ("rte", "mnli", "qnli")}
    with pytest.raises(UsageError) as caught:
        write_submission(encoder, mine, data, tmp_path / "send")
    assert not (tmp_path / "send").exists()
    found = write_submission(encoder, mine, data, tmp_path / "send", partial=True)
    assert [file.name for file in found.files] == ["MNLI-m.tsv", "MNLI-mm.tsv", "RTE.tsv"]
    assert set(found.left_out) == set(SERVER_FILES) - {file.name for file in found.files}
    assert found.left_out["CoLA.tsv"] == "no task file of cola"
    assert found.left_out["QNLI.tsv"] == f"no test file QNLI/test.tsv in {data}"
    for piece in ("AX/AX.tsv or ", "diagnostic/diagnostic.tsv"):
        assert piece in found.left_out["AX.tsv"]
    for name, why in found.left_out.items():
        assert f"{name}: {why}" in str(caught.value)
    with zipfile.ZipFile(found.archive) as archive:
        assert archive.namelist() == [file.name for file in found.files]


def test_a_test_file_is_never_written_over(
    encoder: Encoder, files: dict[str, Path], glue: Path
) -> None:
    before = (glue / "AX" / "AX.tsv").read_bytes()
    with pytest.raises(UsageError, match=r"AX\.tsv would be written over"):
        write_submission(encoder, files, glue, glue / "AX")
    assert (glue / "AX" / "AX.tsv").read_bytes() == before


def test_nothing_to_write_is_refused_even_if_partial(encoder: Encoder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="would lack"):
        write_submission(encoder, {}, tmp_path, tmp_path / "send", partial=True)
    with pytest.raises(DataError, match="no such folder"):
        write_submission(encoder, {}, tmp_path / "x", tmp_path / "send", partial=True)


def test_files_are_matched_by_what_they_were_trained_on(
    files: dict[str, Path], tmp_path: Path
) -> None:
    assert match_files(files.values()) == files
    with pytest.raises(UsageError, match=r"are both of mrpc: give one"):
        match_files([files["mrpc"], files["rte"], files["mrpc"]])
    stranger = tmp_path / "stranger.bitfit.safetensors"
    file = bitfit.TaskFile.load(files["mrpc"])
    dataclasses.replace(file, recipe={}).save(stranger)
    with pytest.raises(UsageError, match="none of GLUE's"):
        match_files([stranger])


def test_a_file_of_another_task_with_the_same_labels_is_refused(
    encoder: Encoder, files: dict[str, Path], glue: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"is of the task 'rte', not 'qnli'"):
        write_submission(encoder, files | {"qnli": files["rte"]}, glue, tmp_path)
    with pytest.raises(UsageError, match="'squad' is none of GLUE's"):
        write_submission(encoder, {"squad": files["rte"]}, glue, tmp_path)


def test_a_test_file_that_is_not_whole_is_refused(
    encoder: Encoder, files: dict[str, Path], tmp_path: Path
) -> None:
    data = tmp_path / "glue_data"
    write_task(data, "qqp")
    path, mine = data / "QQP" / "test.tsv", {"qqp": files["qqp"]}
    whole = path.read_text()
    for broken, message in (
        (whole + "7\tcut off\n", r"test\.tsv:5: 2 columns .* fetch the file again"),
        (whole + "2\ta\tb\n", r"2 rows have the index 2"),
    ):
        path.write_text(broken)
        with pytest.raises(DataError, match=message):
            write_submission(encoder, mine, data, tmp_path / "send", partial=True)
    assert not (tmp_path / "send" / "QQP.tsv").exists()


def test_similarity_is_cut_to_the_servers_range() -> None:
    found = [official_answer(Prediction(task="stsb", value=v)) for v in (-0.2, 5.7, 3.14159)]
    assert found == ["0.000", "5.000", "3.142"]


@pytest.mark.parametrize("place", ["AX/AX.tsv", "diagnostic/diagnostic.tsv"])
def test_the_diagnostic_set_is_a_test_split_of_mnli(tmp_path: Path, place: str) -> None:
    write_task(tmp_path, "mnli")
    (tmp_path / "AX" / "AX.tsv").unlink()
    mnli = BUILTIN_TASKS["mnli"]
    assert set(read_tests(mnli, tmp_path)[0]) == {"test", "test_mismatched"}
    write(tmp_path / place, "index\tsentence1\tsentence2\n0\tone\ttwo\n")
    for data in (tmp_path, tmp_path / "MNLI"):
        rows, sources = read_tests(mnli, data)
        assert set(rows) == {"test", "test_mismatched", "test_diagnostic"}
        assert [(e.text, e.text_pair, e.label) for e in rows["test_diagnostic"]] == [
            ("one", "two", None)
        ]
        assert Path(sources["test_diagnostic"][0]) == tmp_path / place
    assert (
        "test_diagnostic"
        not in read_dataset(DataConfig(data=tmp_path, task="mnli"), with_test=False).splits
    )


def test_the_real_test_files_are_read_whole(real_data: Callable[..., Path]) -> None:
    for name, rows in (("rte", 3000), ("mrpc", 1725)):
        real_data("glue_data", BUILTIN_TASKS[name].folder, "test.tsv")
        found, _ = read_tests(BUILTIN_TASKS[name], real_data())
        assert [example.id for example in found["test"]] == [str(i) for i in range(rows)]
