"""The printed numbers: looked up by experiment, row, base and task."""

from __future__ import annotations

import pytest

from bitfit.experiments.report.paper import (
    paper_base,
    paper_source,
    paper_tasks,
    printed_rate,
    printed_row,
    printed_rows,
    printed_score,
    task_title,
)


def test_numbers_of_each_table_are_found_by_row_and_task():
    assert printed_score("table3", "BitFit", "mrpc") == 91.7
    assert printed_score("table3", "Full-FT", "cola") == 53.4
    assert printed_score("table3", "rand 100k", "mnli-mm") == 78.6
    assert printed_score("table1", "BitFit", "cola") == 63.4
    assert printed_score("table1", "BitFit", "cola", split="test") == 59.7
    assert printed_score("table1", "Adapters", "mrpc") is None
    assert printed_score("table3", "LoRA", "mrpc") is None
    assert printed_score("table3", "BitFit", "squad") is None
    assert printed_score(None, "BitFit", "mrpc") is None
    assert printed_score("figure6", "BitFit", "mrpc") is None


def test_a_base_is_matched_and_an_unknown_one_stands_beside_bert_base():
    assert printed_score("table2", "BitFit", "rte", "FacebookAI/roberta-base") == 81.5
    assert printed_score("table2", "BitFit", "rte", "/models/bert-large-cased/") == 75.1
    assert printed_score("table2", "BitFit", "rte", "minilm") == 76.5
    assert printed_score("pos", "BitFit", "ewt", "roberta-base") == 97.1
    assert printed_score("pos", "Full-FT", "ptb", "bert-large-uncased") == 97.4


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("bert-base-cased", "BERT-base"),
        ("google-bert/bert-large-uncased", "BERT-large"),
        ("roberta-base", "RoBERTa-base"),
        ("xlm-roberta-base", None),
        ("distilbert-base-cased", None),
        ("minilm", None),
        ("", None),
    ],
)
def test_a_base_of_the_paper_is_known_by_its_last_part(name, base):
    assert paper_base(name) == base


def test_row_names_need_not_be_spelled_as_printed():
    for name in ("b_m2 + b_q", "b_q + b_m2", "b_q, b_m2", "B_m2+b_q"):
        assert printed_score("table3", name, "rte") == 72.7
    assert printed_score("table3", "b_q only", "rte") == 65.4
    assert printed_row("table3", "frozen").percent == 0.0


def test_rates_are_those_of_table_6():
    assert printed_rate("BitFit", "rte") == 1e-3
    assert printed_rate("BitFit", "rte", "bert-large-cased") == 4e-4
    assert printed_rate("Full-FT", "rte") is None
    assert printed_rate("BitFit", "squad") is None


def test_every_printed_row_is_whole_and_says_where_it_stands():
    rows = [
        row
        for experiment in ("table1", "table2", "table3", "pos")
        for split in ("dev", "test")
        for row in printed_rows(experiment, split)
    ]
    assert len(rows) == 9 + 6 + 7 + 6
    for row in rows:
        assert row.source
        assert set(row.scores) in ({"*"}, set(paper_tasks()))
        assert all(30 < score < 100 for score in row.scores.values())
    assert "anonymous ACL submission" in paper_source()
    assert [task_title(t) for t in ("mnli", "mnli-mm", "own")] == ["MNLI-m", "MNLI-mm", "own"]
