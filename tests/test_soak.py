"""``benchmarks/soak.py``, a small one: no wrong row and nothing lost while tasks come and go."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "soak.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="no benchmarks in this distribution")


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["soak"]


def test_every_answer_is_of_the_row_that_its_task_had_while_tasks_come_and_go(
    soak, checkpoint, capsys
):
    wanted = {
        "tasks added",
        "tasks replaced",
        "tasks removed",
        "tasks rolled back",
        "items answered",
        "items: unknown_task",
        "requests abandoned",
    }
    # How many changes there are beside so many items is a matter of the machine, above all of its
    # disk: where they were too few of a kind, more items.
    for items in (4000, 40_000):
        words = ["--base", checkpoint(), "--items", str(items), "--seconds", "1200",
                 "--tasks", "16", "--files", "12", "--texts", "8", "--max-resident", "6",
                 "--pause", "0.02", "--max-growth-mb", "64", "--json"]  # fmt: skip
        code = soak.main(words)
        found = json.loads(capsys.readouterr().out)
        assert found["violations"] == []
        assert code == 0
        assert found["items"] >= items
        if wanted <= found["counts"].keys():
            break
    assert wanted <= found["counts"].keys()
    assert found["sharpness"]["wrong_row_seen"] >= 0.98


# ------------------------------------------------------------------ that it would be seen


@pytest.fixture
def history(soak):
    """A task that was put at 10, replaced from 20 to 21 and removed from 30 on."""
    first, second = (
        soak.Content(b"", fingerprint, "classification", {"hello": {"a": 0.9, "b": 0.1}})
        for fingerprint in ("one", "two")
    )
    found = soak.History()
    found.states[0].end = 11.0
    found.states += [
        soak.State(first, 1, 10.0, 21.0), soak.State(second, 2, 20.0),
    ]  # fmt: skip
    return found


def answer(version, fingerprint, scores=(0.9, 0.1), **more):
    entries = [{"label": label, "score": score} for label, score in zip("ab", scores, strict=True)]
    return {"task": "mood", "id": "7", "version": version, "fingerprint": fingerprint,
            "result": {"scores": entries}} | more  # fmt: skip


ITEM = {"task": "mood", "id": "7", "text": "hello"}
UNKNOWN = {"task": "mood", "id": "7", "error": {"code": "unknown_task", "message": "none"}}


@pytest.mark.parametrize(
    ("begin", "end", "given", "wrong"),
    [
        (12, 13, answer(1, "one"), None),
        (12, 20.5, answer(1, "one"), None),  # its change was sent, not answered
        (12, 20.5, answer(2, "two"), None),
        (21.5, 22, answer(1, "one"), "possible were"),  # replaced before it was asked
        (12, 13, answer(2, "two"), "possible were"),  # not yet there
        (12, 13, answer(2, "one"), "possible were"),
        (12, 13, answer(1, "one", (0.8, 0.2)), "numbers differ by 0.1"),
        (12, 13, answer(1, "one", (math.nan, 0.1)), "numbers differ by inf"),
        (12, 13, answer(1, "one", id="8"), "of another item"),
        (12, 13, UNKNOWN, "error"),  # it was there
        (10.5, 13, UNKNOWN, None),
        (12, 13, {"task": "mood", "id": "7", "error": {"code": "failed"}}, "error"),
    ],
)
def test_an_answer_that_its_task_cannot_have_given_is_named(
    soak, history, begin, end, given, wrong
):
    found = soak.check_item(ITEM, given, history.between(begin, end), 1e-4)
    assert found is None if wrong is None else wrong in found


def test_a_server_whose_memory_grows_is_named(soak):
    def check(grown):
        arguments = soak.argparse.Namespace(max_growth_mb=32.0)
        found = soak.Soak(arguments, [], [], None, 0.0, print, items=1000)
        found.samples = [(i, 10 * i, 400_000_000 + grown * i) for i in range(100)]
        return soak.check_memory(found), found.violations

    memory, violations = check(1000)
    assert violations == []
    assert memory["bytes_per_item"] == pytest.approx(100, abs=1)
    _, violations = check(1_000_000)
    assert "memory went from" in violations[0]


def test_refused_and_lost_requests_are_told_apart(soak):
    known = soak.Reply(429, b'{"error": {"code": "queue_full", "message": "try again"}}')
    assert soak.error_code(known) == "queue_full"
    assert soak.error_code(soak.Reply(500, b"Internal Server Error")) is None
    items = [ITEM, ITEM]
    assert soak.read_answers(items, soak.Reply(200, b'{"answers": [{}]}')) is None  # one is lost
    alone = soak.Reply(404, b'{"error": {"code": "unknown_task", "message": "none"}}')
    assert soak.read_answers([ITEM], alone)[0]["error"]["code"] == "unknown_task"
