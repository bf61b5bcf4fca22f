"""SQuAD v1.1."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bitfit.data import DataConfig, read_dataset
from bitfit.errors import DataError, UsageError
from bitfit.tasks import SpanExample

CONTEXT = "The cat sat on the mat."


def squad(*questions: dict[str, object], context: str = CONTEXT) -> str:
    return json.dumps({"data": [{"paragraphs": [{"context": context, "qas": list(questions)}]}]})


def question(name: str, *answers: tuple[int, str]) -> dict[str, object]:
    listed = [{"answer_start": start, "text": text} for start, text in answers]
    return {"id": name, "question": f"{name}?", "answers": listed}


def write(path: Path, content: str) -> Path:
    path.write_bytes(content.encode())
    return path


def test_questions_keep_all_their_answers(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", squad(question("q1", (4, "cat"), (0, "The cat"))))
    data = read_dataset(DataConfig(data=path, dev_fraction=0.0))
    assert data.task.kind == "span"
    answers = ((4, "cat"), (0, "The cat"))
    assert data.splits["train"] == [SpanExample("q1?", CONTEXT, answers, "q1")]


def test_an_answer_has_to_stand_where_it_says(tmp_path: Path) -> None:
    content = squad(question("good", (4, "cat")), question("bad", (5, "cat")))
    path = write(tmp_path / "x.json", content)
    with pytest.raises(DataError, match=r'question bad: at 5 the context reads "at ", not "cat"'):
        read_dataset(DataConfig(data=path))
    data = read_dataset(DataConfig(data=path, skip_bad_rows=True, dev_fraction=0.0))
    assert (len(data.splits["train"]), len(data.skipped)) == (1, 1)
    assert str(data.skipped[0]).startswith(f"{path}: question bad")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "x.json:1: not JSON"),
        ("[]", "expected SQuAD v1.1"),
        ('{"data": [{"paragraphs": 3}]}', "expected SQuAD v1.1"),
        ('{"data": []}', "no questions"),
        ("[" * 100_000, "cannot be read"),
        (squad(question("q")), "no answer; SQuAD v1.1 has one or more, v2 is not read"),
        (squad(question("q", (-3, "at."))), 'not "at."'),
        (squad({"id": "q", "question": "q", "answers": [{"text": "cat"}]}), "answer_start"),
        (squad({"id": "q", "answers": []}), "a question without its text"),
        (squad(question("q", (0, "x")), context=" "), "the context is no text"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_dataset(DataConfig(data=write(tmp_path / "x.json", content)))
    assert message in str(caught.value)


def test_span_files_are_of_no_other_kind(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", squad(question("q", (0, "The"))))
    with pytest.raises(UsageError, match="span"):
        read_dataset(DataConfig(data=path, kind="classification"))


def test_questions_of_one_context_are_held_out_together(tmp_path: Path) -> None:
    paragraphs = [
        {"context": f"c{i} x", "qas": [question(f"q{i}{j}", (0, f"c{i}")) for j in range(3)]}
        for i in range(10)
    ]
    path = write(tmp_path / "x.json", json.dumps({"data": [{"paragraphs": paragraphs}]}))
    data = read_dataset(DataConfig(data=path, dev_fraction=0.2))
    train, dev = ({e.context for e in data.splits[s]} for s in ("train", "dev"))
    assert not train & dev
    assert len(data.splits["dev"]) == 6


@pytest.mark.parametrize("task", ["squad", None])
def test_real_squad_is_read_whole(real_data: Callable[..., Path], task: str | None) -> None:
    data = read_dataset(DataConfig(data=real_data("squad"), task=task))
    assert [len(part) for part in data.splits.values()] == [7984, 2586]
    assert not data.held_out
    assert not data.skipped


def test_only_a_test_split_may_lack_answers(tmp_path: Path) -> None:
    unanswered = {"id": "q2", "question": "q2?"}
    train = write(tmp_path / "train.json", squad(question("q1", (4, "cat")), unanswered))
    with pytest.raises(DataError, match="question q2: no answer"):
        read_dataset(DataConfig(data=train, dev_fraction=0.0))
    good = write(tmp_path / "good.json", squad(question("q1", (4, "cat"))))
    data = read_dataset(DataConfig(data=good, test=train, dev_fraction=0.0))
    assert [e.answers is None for e in data.splits["test"] if isinstance(e, SpanExample)] == [
        False, True,
    ]  # fmt: skip
