"""What the tables say of small experiments, whole and partial, of every kind of task."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from report_samples import (
    EIGHT,
    MNLI,
    MRPC,
    RTE,
    SQUAD,
    STSB,
    TAGS,
    TOPICS,
    Sample,
    table3,
)

from bitfit.experiments.report import figures
from bitfit.experiments.report.biases import mean_change
from bitfit.experiments.report.course import is_degenerate
from bitfit.experiments.report.curves import zeros
from bitfit.experiments.report.differences import Draws, to_reference
from bitfit.experiments.report.results import Results
from bitfit.experiments.report.table import Summary, points, rate_text
from bitfit.experiments.report.tables import all_tables
from bitfit.experiments.report.texts import as_csv, as_latex, as_markdown
from bitfit.experiments.report.words import sections
from bitfit.experiments.report.write import figure_names


def tables_of(sample, resamples=200):
    return {table.key: table for table in all_tables(Draws(Results(sample), resamples))}


def as_dicts(table):
    """The texts of a table's cells by column."""
    keys = [column.key for column in table.columns]
    return [dict(zip(keys, (cell.text for cell in row), strict=True)) for row in table.rows]


def words_of(sample):
    found = sections(Draws(Results(sample), 200))
    return {section.key: " ".join(section.sentences) for section in found}


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return table3(tmp_path_factory.mktemp("table3"), rows=200)


@pytest.fixture(scope="module")
def tables(sample):
    return tables_of(sample)


# ------------------------------------------------------------------ scores


def test_methods_are_rows_and_tasks_columns_with_the_printed_numbers_beside(sample, tables):
    table = tables["mean-paper"]
    assert [c.key for c in table.columns] == [
        "row", "mrpc", "rte", "stsb", "average", "seeds", "failed",
    ]  # fmt: skip
    assert [row[0].text for row in table.rows] == ["BitFit", "b_m2 + b_q", "Frozen", "Full-FT"]
    assert [cell.printed for cell in table.rows[0][1:4]] == [91.7, 76.5, 89.3]
    assert table.printed_base == "BERT-base"
    assert table.rows[3][-1].text == "1"
    runs = {r["id"]: r for r in sample.records()}
    cell = table.rows[3][3]
    scores = [runs[run]["scores"]["spearman"] for run in cell.runs]
    assert cell.value["mean"] == pytest.approx(np.mean(scores))
    assert cell.value["sd"] == pytest.approx(np.std(scores, ddof=1))
    assert cell.text == f"{100 * np.mean(scores):.1f} ± {100 * np.std(scores, ddof=1):.1f}"


def test_the_best_is_one_run_and_the_average_is_over_the_tasks(sample, tables):
    table = tables["best"]
    row = table.rows[0]
    runs = {r["id"]: r for r in sample.records()}
    assert row[1].value == pytest.approx(
        max(runs[run]["scores"]["f1"] for run in row[1].runs), abs=1e-9
    )
    assert row[4].value == pytest.approx(np.mean([cell.value for cell in row[1:4]]))


def test_the_best_scores_have_the_share_of_the_parameters_beside_the_printed_one(tmp_path):
    sample = Sample(tmp_path, rows=["BitFit", "Frozen", "Full-FT"], tasks=["mrpc"])
    config = {"method": "full", "learning_rate": 1e-5, "seed": 0, "epochs": 3}
    sample.done("BitFit", MRPC, trainable={"encoder": 13_824, "head": 770})
    sample.done("Frozen", MRPC, trainable={"encoder": 0, "head": 770})
    assert [row[-2].text for row in tables_of(sample)["best"].rows] == ["–", "–"]  # of how many?
    unprinted = Sample(tmp_path / "own", rows=["BitFit"], tasks=["mrpc"], paper=None)
    unprinted.done("BitFit", MRPC)
    assert [c.key for c in tables_of(unprinted)["best"].columns] == ["row", "mrpc", "seeds"]
    sample.done("Full-FT", MRPC, config=config, trainable={"encoder": 22_565_376, "head": 770})
    table = tables_of(sample)["best"]
    assert [c.key for c in table.columns] == ["row", "mrpc", "percent", "seeds"]
    assert [row[2].text for row in table.rows] == ["0.06", "0.00", "100.00"]
    assert [row[2].printed for row in table.rows] == [0.09, 0.0, 100]
    assert "| 0.06 (0.09) |" in as_markdown(table)


def test_what_the_paper_prints_of_others_and_of_the_test_sets_has_rows_of_its_own(tmp_path):
    base = "bert-large-cased"
    sample = Sample(tmp_path, rows=["BitFit"], tasks=["mrpc"], paper="table1", base=[base])
    sample.done("BitFit", MRPC, base=base)
    table = tables_of(sample)["best"]
    names = [row[0].text for row in table.rows]
    assert names == [
        "BitFit", "Full-FT (Guo et al.), BERT-large, dev", "Diff-Prune, BERT-large, dev",
        "Full-FT (Houlsby et al.), BERT-large, test", "Full-FT (Guo et al.), BERT-large, test",
        "Adapters, BERT-large, test", "Diff-Prune, BERT-large, test", "BitFit, BERT-large, test",
    ]  # fmt: skip
    assert [row[1].printed for row in table.rows] == [
        91.5, 91.9, 87.4, 88.9, 89.3, 89.5, 89.7, 88.9,
    ]  # fmt: skip
    written = as_latex(table)
    ours, printed = written.split("Printed in the paper")
    assert "Adapters" not in ours
    assert re.search(r"Adapters, BERT-large, test & [\d.]+ & 89\.5", printed)
    assert any("Adapters, test: Table 1 (T), taken there from Houlsby" in n for n in table.notes)


def test_both_protocols_are_shown_and_each_score_leads_to_its_runs(sample, tables):
    rows = as_dicts(tables["scores"])
    assert len(rows) == 12
    ids = {r["id"] for r in sample.records()}
    for row, cells in zip(rows, tables["scores"].rows, strict=True):
        assert row["mean"] != "–"
        assert row["split_mean"] != "–"
        assert cells[-1].runs
        assert set(cells[-1].runs) <= ids
    assert float(rows[0]["error"]) == pytest.approx(4, abs=2)  # 120 rows at 80 %


def test_a_mismatched_half_has_a_column_of_its_own(tmp_path):
    sample = Sample(tmp_path, rows=["BitFit"], tasks=["mnli"], paper="table2")
    sample.done("BitFit", MNLI, more={"dev_mismatched": {"accuracy": 0.5}})
    table = tables_of(sample)["mean-paper"]
    assert [c.title for c in table.columns[1:3]] == ["MNLI-m", "MNLI-mm"]
    assert table.rows[0][2].text == "50.0"
    assert table.rows[0][2].printed == 82.2


def test_best_rates_stand_beside_those_of_the_paper(tables):
    table = tables["rates"]
    assert [c.title for c in table.columns] == ["row", "MRPC", "RTE", "STS-B"]
    assert [cell.printed for cell in table.rows[0][1:]] == [7e-4, 1e-3, 1e-4]
    assert table.rows[0][1].text == "1e-3 / 2"
    assert table.rows[1][1].printed is None


# ------------------------------------------------------------------ differences


def test_each_row_is_compared_with_the_reference_on_each_task(sample, tables):
    rows = as_dicts(tables["differences"])
    assert len(rows) == 9
    stsb = {row["row"]: row for row in rows if row["task"] == "STS-B"}
    assert stsb["Frozen"]["word"] == "behind"
    assert stsb["Full-FT"]["word"] == "too few seeds"
    assert any("9 comparisons (Bonferroni)" in note for note in tables["differences"].notes)
    found = to_reference(Draws(Results(sample), 200), "paper")
    assert all(c.difference.low <= c.difference.value <= c.difference.high for c in found)


def test_without_predictions_the_seeds_alone_speak(tmp_path):
    sample = Sample(tmp_path, rows=["BitFit", "Frozen"], tasks=["rte"])
    for seed in range(2):
        sample.done("BitFit", RTE, skill=0.9, seed=seed)
        sample.done("Frozen", RTE, skill=0.5, seed=seed, predictions=seed == 0)
    (row,) = as_dicts(tables_of(sample)["differences"])
    assert row["basis"] == "seeds"
    assert any("Student's t" in note for note in tables_of(sample)["differences"].notes)


def test_other_dev_rows_are_never_paired(tmp_path):
    sample = Sample(tmp_path, rows=["BitFit", "Frozen"], tasks=["rte"])
    sample.done("BitFit", RTE, skill=0.9)
    sample.rows = 50
    sample.done("Frozen", RTE, skill=0.5)
    (row,) = as_dicts(tables_of(sample)["differences"])
    assert (row["word"], row["interval"]) == ("not known", "–")


def test_a_task_of_its_own_size_stands_in_the_row_of_the_others(tmp_path):
    sample = Sample(tmp_path, rows=["BitFit", "Frozen"], tasks=["mrpc", "rte"])
    for row in ("BitFit", "Frozen"):
        sample.done(row, MRPC)
        sample.done(row, RTE, train_rows=50)
    sample.failed("Frozen", RTE, train_rows=50, rate=1e-2)
    made = tables_of(sample)
    rows = as_dicts(made["mean-paper"])
    assert [row["row"] for row in rows] == ["BitFit", "Frozen"]
    assert all("–" not in (row["mrpc"], row["rte"]) for row in rows)
    assert rows[1]["failed"] == "1"
    assert any("Trained on a part of the rows: RTE 50." in n for n in made["mean-paper"].notes)
    assert as_dicts(made["scores"])[1]["train_rows"] == "50"
    assert len(made["differences"].rows) == 2
    assert "curves" not in made


def test_lines_are_compared_on_their_own_base_and_size(tmp_path):
    sample = Sample(tmp_path, rows=["BitFit", "Full-FT"], tasks=["rte"], base=["one", "two"])
    for base in ("one", "two"):
        sample.done("BitFit", RTE, base=base)
    sample.done("Full-FT", RTE, base="two")
    rows = as_dicts(tables_of(sample)["differences"])
    assert [row["row"] for row in rows] == ["Full-FT, two"]


# ------------------------------------------------------------------ course


def test_the_gap_is_train_less_dev(tables):
    rows = as_dicts(tables["gap"])
    assert len(rows) == 12
    assert all(row["gap"].startswith("+5.0") for row in rows)


def test_convergence_and_stability_have_a_line_for_each_rate(tables):
    rows = as_dicts(tables["convergence"])
    assert {row["rate"] for row in rows} == {"4e-4", "1e-3"}
    assert rows[0]["epochs"] == "3.0"
    stable = as_dicts(tables["stability"])
    assert len(stable) == len(rows) == 24
    for row in stable:
        assert float(row["least"]) <= float(row["mean"].split(" ")[0]) <= float(row["best"])


def test_a_run_that_is_not_above_the_majority_learned_nothing():
    def run(score, majority):
        return {"metric": "f1", "scores": {"f1": score}, "majority": majority}

    assert is_degenerate(run(0.8, {"f1": 0.8}))
    assert not is_degenerate(run(0.81, {"f1": 0.8}))
    assert not is_degenerate(run(0.5, {}))  # tasks of numbers have none
    assert not is_degenerate(run(0.5, {"f1": None}))
    assert is_degenerate(run(None, {}))
    stsb = {"metric": "spearman", "majority": {"spearman": None}}
    assert is_degenerate({**stsb, "scores": {"spearman": -0.3}})
    assert not is_degenerate({**stsb, "scores": {"spearman": 0.1}})


def test_runs_that_learned_nothing_are_counted_as_degenerate(tmp_path):
    sample = Sample(tmp_path, rows=["Frozen"], tasks=["rte", "stsb"])
    for seed in range(2):
        sample.done("Frozen", RTE, constant=seed == 0, skill=0.95, seed=seed)
        sample.done("Frozen", STSB, constant=True, skill=1.0, seed=seed, epochs=1)
    sample.failed("Frozen", RTE, seed=2)
    rows = as_dicts(tables_of(sample)["stability"])
    assert rows[0]["degenerate"] == "1 of 2 (50 %)" or rows[0]["degenerate"] == "2 of 2 (100 %)"
    assert rows[0]["failed"] == "1"
    assert rows[1]["degenerate"] == "2 of 2 (100 %)"
    assert rows[1]["mean"].startswith("– (2 of 2 undefined)")


def test_cost_has_medians_and_counts(tables):
    row = as_dicts(tables["cost"])[0]
    assert row["train_seconds"] == "10.5"
    assert row["peak_memory_mb"] == "400"
    assert (row["encoder"], row["head"], row["lanes"], row["runs"]) == ("9,216", "770", "4", "4")


def test_what_runs_cost_is_told_for_each_machine_of_a_moved_experiment(tmp_path):
    was = {"dtype": "tf32", "device": "cuda", "threads": 1}
    sample = Sample(
        tmp_path, rows=["BitFit"], tasks=["rte"],
        conditions={"dtype": "fp32", "device": "cpu", "threads": 2, "lanes": {}, "earlier": [was]},
    )  # fmt: skip
    for seed, dtype, machine in ((0, "tf32", "H200"), (1, "fp32", "EPYC"), (2, "fp32", "EPYC")):
        sample.done(
            "BitFit", RTE, seed=seed, environment={"machine": machine, "dtype": dtype, "threads": 2}
        )
    rows = as_dicts(tables_of(sample)["cost"])
    assert [(row["machine"], row["runs"]) for row in rows] == [
        ("H200, tf32, 2 threads", "1"),
        ("EPYC, fp32, 2 threads", "2"),
    ]
    said = words_of(sample)["setup"]
    assert "Conditions: device cpu, dtype fp32, threads 2." in said
    assert "Before it was moved: device cuda, dtype tf32, threads 1." in said
    assert "machine EPYC, dtype fp32, threads 2 (2 runs)." in said


def test_a_score_over_seeds_of_two_precisions_is_marked_and_the_mark_explained(tmp_path):
    sample = Sample(tmp_path, rows=["BitFit", "Frozen"], tasks=["rte"])
    for seed, dtype, device in ((0, "tf32", "cuda"), (1, "fp32", "cpu")):
        sample.done("BitFit", RTE, seed=seed, environment={"dtype": dtype, "device": device})
        sample.done("Frozen", RTE, seed=seed, environment={"dtype": "fp32", "device": "cpu"})
    for key in ("best", "mean-paper", "mean-split"):
        table = tables_of(sample)[key]
        mixed, pure = (row[1] for row in table.rows)
        assert (mixed.mark, pure.mark) == ("†", "")
        note = "†: the seeds of this cell were not all made under the same conditions, but in tf32"
        assert sum(n.startswith(f"{note} on cuda and fp32 on cpu") for n in table.notes) == 1
        assert f"{mixed.text} †" in as_markdown(table)
        assert r"$\dagger$" in as_latex(table)
        assert "†" not in as_csv(table)
    assert not any("†" in note for note in tables_of(sample)["rates"].notes)


# ------------------------------------------------------------------ learning curves


@pytest.mark.parametrize(
    ("gaps", "places"),
    [
        ([0.1, -0.1], [1000.0]),
        ([0.3, -0.1], [100 * 100**0.75]),
        ([0.1, 0.2], []),
        ([0.0, 0.1], []),
    ],
)
def test_curves_cross_where_the_gap_changes_its_sign(gaps, places):
    assert zeros([100, 10_000], gaps) == pytest.approx(places)


def test_a_curve_that_goes_as_far_as_each_task_has_rows_misses_nothing(tmp_path):
    sample = Sample(tmp_path, rows=["BitFit"], tasks=["rte", "stsb"], seeds=[0])
    for task, size in ((RTE, 100), (RTE, 2490), (STSB, 100), (STSB, 5000)):
        sample.done("BitFit", task, train_rows=size)
    assert Results(sample).missing() == 0
    sample = Sample(tmp_path, rows=["BitFit"], tasks=["rte", "stsb", "mrpc"], seeds=[0])
    assert Results(sample).missing() == 3


def test_a_gap_of_zero_between_two_signs_is_the_crossing():
    assert zeros([10, 100, 1000], [0.1, 0.0, -0.2]) == [100.0]
    assert zeros([10, 100, 1000], [0.1, 0.0, 0.2]) == []


def test_learning_curves_have_every_metric_and_a_crossing(tmp_path):
    sample = Sample(tmp_path, rows=["BitFit", "Full-FT"], tasks=["squad"], paper=None)
    for size, one, other in ((100, 0.6, 0.3), (1000, 0.7, 0.95)):
        for seed in range(2):
            sample.done("BitFit", SQUAD, skill=one, seed=seed, train_rows=size)
            sample.done("Full-FT", SQUAD, skill=other, seed=seed, train_rows=size)
    made = tables_of(sample)
    rows = as_dicts(made["curves"])
    assert {row["metric"] for row in rows} == {"f1", "exact_match"}
    assert [row["train_rows"] for row in rows[:2]] == ["100", "1,000"]
    crossing = as_dicts(made["crossings"])[0]
    assert crossing["ahead"] == "BitFit"
    assert 100 < float(crossing["crossing"].replace(",", "")) < 1000
    assert [row[0].text for row in made["best"].rows][:2] == [
        "BitFit, 100 rows", "BitFit, 1,000 rows",
    ]  # fmt: skip


def test_no_crossing_is_said(tmp_path):
    sample = Sample(tmp_path, rows=["BitFit", "Full-FT"], tasks=["rte"], paper=None)
    for size in (100, 1000):
        sample.done("BitFit", RTE, skill=0.95, train_rows=size)
        sample.done("Full-FT", RTE, skill=0.5, train_rows=size)
    assert as_dicts(tables_of(sample)["crossings"])[0]["crossing"] == "no crossing in the range"


# ------------------------------------------------------------------ biases


def test_change_is_the_mean_over_the_seeds_largest_on_top(sample, tables):
    rows = [r for r in as_dicts(tables["change"]) if (r["row"], r["task"]) == ("BitFit", "MRPC")]
    assert [row["term"] for row in rows][:2] == ["b_LN2", "b_m3"]
    assert rows[0]["layer_2"] == "24.00"
    results = Results(sample)
    changes, runs = mean_change(results, results.lines[0], "mrpc")
    assert len(changes) == 24
    assert runs


@pytest.mark.parametrize(("dtype", "said"), [("fp32", False), ("tf32", True), ("bf16", True)])
def test_where_products_were_rounded_the_movement_of_b_k_is_explained(dtype, said, tmp_path):
    sample = Sample(tmp_path, rows=["BitFit"], tasks=["rte"])
    sample.done("BitFit", RTE, change=EIGHT, environment={"dtype": dtype})
    notes = " ".join(tables_of(sample)["change"].notes)
    assert (f"Computed in {dtype}" in notes) == said
    less = Sample(tmp_path / "less", rows=["BitFit"], tasks=["rte"])
    rest = [term for term in EIGHT if term != "key"]
    less.done("BitFit", RTE, change=rest, environment={"dtype": dtype})
    assert "Computed in" not in " ".join(tables_of(less)["change"].notes)


def test_leaving_out_a_term_is_checked_against_the_theory(tmp_path):
    without = {t: tuple(x for x in EIGHT if x != t) for t in ("key", "value")}
    rows = {"all eight": EIGHT, "no b_k": without["key"], "no b_v": without["value"]}
    sample = Sample(tmp_path, rows=list(rows), tasks=["rte"], reference_row="all eight")
    for seed in range(3):
        for row, terms in rows.items():
            skill = 0.6 if row == "no b_v" else 0.95
            sample.done(row, RTE, skill=skill, seed=seed, change=terms)
    found = {row["prediction"]: row for row in as_dicts(tables_of(sample)["theory"])}
    key, value = found["b_k changes nothing"], found["b_v is absorbed by b_m1"]
    assert (key["without"], key["with"], key["word"]) == ("no b_k", "all eight", "within noise")
    assert key["verdict"] == "not contradicted"
    assert (value["word"], value["verdict"]) == ("behind", "contradicted")


def test_b_v_is_checked_without_b_k_too(tmp_path):
    less = tuple(t for t in EIGHT if t not in ("key", "value"))
    sample = Sample(tmp_path, rows=["all", "no b_v"], tasks=["rte"], reference_row="all")
    sample.done("all", RTE, change=EIGHT)
    sample.done("no b_v", RTE, change=less)
    (row,) = as_dicts(tables_of(sample)["theory"])
    assert row["prediction"] == "b_v is absorbed by b_m1"
    assert any("the dropout of the base" in note for note in tables_of(sample)["theory"].notes)


def test_the_eight_terms_are_known_by_name_where_no_change_was_recorded(tmp_path):
    sample = Sample(tmp_path, rows=["all", "less"], tasks=["rte"], reference_row="all")
    config = Sample.start("", "done", "", RTE, 0, 1e-3, "", None)["config"]
    sample.done("all", RTE, config=config | {"terms": "b_q,b_k,b_v,b_m1"})
    sample.done("less", RTE, config=config | {"terms": "query, value, attention_output"})
    (row,) = as_dicts(tables_of(sample)["theory"])
    assert row["prediction"] == "b_k changes nothing"


# ------------------------------------------------------------------ what is partial


@pytest.mark.parametrize("task", [MRPC, RTE, MNLI, STSB, TAGS, SQUAD, TOPICS], ids=lambda t: t.name)
def test_every_kind_of_task_is_reported(tmp_path, task):
    sample = Sample(tmp_path, rows=["BitFit", "Frozen"], tasks=[task.name], paper=None)
    for seed in range(2):
        sample.done("BitFit", task, skill=0.9, seed=seed)
        sample.done("Frozen", task, skill=0.4, seed=seed)
    made = tables_of(sample)
    assert as_dicts(made["differences"])[0]["basis"] == "examples and seeds"
    assert made["mean-split"].rows[0][1].text != "–"


def test_one_run_makes_a_report(tmp_path):
    sample = Sample(tmp_path, rows=["BitFit", "Frozen"], tasks=["mrpc", "rte"])
    sample.done("BitFit", MRPC, predictions=False)
    made = tables_of(sample)
    assert "differences" not in made
    assert "mean-split" not in made
    assert as_dicts(made["scores"])[0]["error"] == "–"
    assert "1 run done, 0 failed, 11 missing" in words_of(sample)["setup"]


def test_cells_without_runs_are_dashes_and_have_no_average(tmp_path):
    sample = Sample(tmp_path, rows=["BitFit", "Frozen"], tasks=["mrpc", "rte"])
    sample.done("BitFit", MRPC)
    sample.done("Frozen", RTE)
    table = tables_of(sample)["mean-paper"]
    rows = as_dicts(table)
    assert rows[0]["rte"] == rows[1]["mrpc"] == rows[0]["average"] == "–"
    average = [column.key for column in table.columns].index("average")
    assert table.rows[0][average].runs == ()  # nothing to unfold below a dash


def test_failed_runs_alone_are_reported_with_their_errors(tmp_path):
    sample = Sample(tmp_path, rows=["BitFit"], tasks=["rte"])
    name = sample.failed("BitFit", RTE)
    made = tables_of(sample)
    assert as_dicts(made["failures"])[0]["id"] == name
    assert "step 7" in as_dicts(made["failures"])[0]["error"]
    assert "best" not in made
    assert "0 runs done, 1 failed, 2 missing" in words_of(sample)["setup"]


def test_nothing_at_all_is_still_a_report(tmp_path):
    sample = Sample(tmp_path, rows=["BitFit"], tasks=["rte"])
    assert tables_of(sample) == {}
    assert "0 runs done, 0 failed, 3 missing" in words_of(sample)["setup"]


def test_an_undefined_score_is_null_and_counted(tmp_path):
    sample = Sample(tmp_path, rows=["BitFit", "Frozen"], tasks=["stsb"])
    sample.done("BitFit", STSB, constant=True, skill=1.0, epochs=1)
    sample.done("BitFit", STSB, seed=1)
    sample.done("Frozen", STSB)
    made = tables_of(sample)
    row = made["mean-paper"].rows[0]
    assert row[1].text.endswith("(1 of 2 undefined)")
    assert as_dicts(made["differences"])[0]["word"] == "not known"
    json.dumps([cell.value for table in made.values() for row in table.rows for cell in row],
               allow_nan=False)  # fmt: skip


# ------------------------------------------------------------------ words


def test_the_sentences_say_what_is_noise_and_which_order_holds(sample):
    said = words_of(sample)
    assert "Base minilm: contrastively tuned" in said["setup"]
    assert "48 runs done, 1 failed" in said["setup"]
    assert "STS-B, against BitFit: behind: Frozen" in said["noise"]
    assert "The paper's order: BitFit 91.7 > Full-FT 89.9" in said["order"]
    assert "Full-FT above BitFit (too few seeds)" in said["order"]


def test_an_order_that_is_turned_for_certain_is_outside_noise(tmp_path):
    sample = Sample(tmp_path, rows=["BitFit", "Full-FT"], tasks=["mrpc"])
    for row, skill in (("BitFit", 0.4), ("Full-FT", 0.99)):
        for seed in range(4):
            sample.done(row, MRPC, skill=skill, seed=seed)
    said = words_of(sample)
    assert "MRPC, against BitFit: ahead: Full-FT" in said["noise"]
    assert "Full-FT above BitFit (outside noise)" in said["order"]


def test_epochs_to_the_best_end_where_it_was_first_reached(tmp_path):
    sample = Sample(tmp_path, rows=["BitFit"], tasks=["mrpc"])
    scores = [{"f1": score, "accuracy": score} for score in (0.5, 0.8, 0.8, 0.7)]
    history = [{"epoch": e, "train_loss": 0.1, "dev": s} for e, s in enumerate(scores, 1)]
    sample.done("BitFit", MRPC, history=history, best_epoch=3, scores=scores[2], predictions=False)
    (row,) = as_dicts(tables_of(sample)["convergence"])
    assert row["epochs"] == "2.0"


def test_the_share_is_known_without_a_run_of_full_fine_tuning(tmp_path):
    sample = Sample(tmp_path, rows=["BitFit"], tasks=["mrpc"])
    sample.done("BitFit", MRPC, trainable={"encoder": 1000, "head": 7, "of": 100_000})
    results = Results(sample)
    assert results.share(results.lines[0]) == 0.01


def test_tasks_without_any_run_are_named(tmp_path):
    sample = Sample(tmp_path, rows=["BitFit"], tasks=["rte", "cola"])
    sample.done("BitFit", RTE)
    assert (
        "(row, task and seed without any run), among them all of CoLA." in words_of(sample)["setup"]
    )


def test_figures_of_names_that_look_alike_are_files_of_their_own():
    keys = ["change-a b", "change-a-b", "change-a_b", "curve"]
    names = figure_names([SimpleNamespace(key=key) for key in keys])
    assert list(names.values()) == ["change-a-b", "change-a-b-2", "change-a-b-3", "curve"]


def test_runs_that_stop_early_are_said_to_have_looked_at_all_of_dev(tmp_path):
    said = []
    for patience in (0, 3):
        sample = Sample(tmp_path / str(patience), rows=["BitFit"], tasks=["rte"])
        config = {"learning_rate": 1e-3, "seed": 0, "patience": patience}
        sample.done("BitFit", RTE, config=config)
        said.append("stop early" in words_of(sample)["protocols"])
    assert said == [False, True]


def test_numbers_are_written_as_readers_expect():
    assert [points(x) for x in (0.8766, math.nan, None, -0.0001)] == ["87.7", "–", "–", "0.0"]
    assert points(0.012, signed=True) == "+1.2"
    assert [rate_text(x) for x in (4e-4, 1e-3, 2.5e-5)] == ["4e-4", "1e-3", "2.5e-5"]
    assert Summary((0.5,)).mean_text() == "50.0"
    assert Summary((0.5, 0.7)).mean_text() == "60.0 ± 14.1"
    assert Summary(()).mean_text() == "–"


def test_rows_that_differ_in_the_term_alone_are_preferred(tmp_path):
    rows = {"all": EIGHT, "no b_k": tuple(t for t in EIGHT if t != "key"),
            "no b_v": tuple(t for t in EIGHT if t != "value")}  # fmt: skip
    sample = Sample(tmp_path, rows=list(rows), tasks=["rte"], reference_row="all")
    for row, terms in rows.items():
        sample.done(row, RTE, change=terms)
    found = [(row["without"], row["with"]) for row in as_dicts(tables_of(sample)["theory"])]
    assert found == [("no b_k", "all"), ("no b_v", "all")]


def test_rows_that_are_equal_here_are_not_said_to_be_in_the_papers_order(tmp_path):
    sample = Sample(tmp_path, rows=["BitFit", "b_m2"], tasks=["rte"])
    for row in ("BitFit", "b_m2"):
        sample.done(row, RTE, constant=True)
    said = words_of(sample)["order"]
    assert said.endswith("Nothing is the other way round, but 1 pair of its rows is equal here.")


def test_a_search_that_is_not_finished_is_marked_and_said(tmp_path):
    rows = [
        {"name": "BitFit", "options": {}, "learning_rate": [1e-3, 4e-4]},
        {"name": "Frozen", "options": {"method": "frozen"}, "learning_rate": [1e-3]},
    ]
    sample = Sample(tmp_path, rows=["BitFit", "Frozen"], tasks=["rte"], grid={"rows": rows})
    sample.done("BitFit", RTE)
    sample.done("Frozen", RTE, skill=0.6)
    table = tables_of(sample)["best"]
    assert [row[1].mark for row in table.rows] == ["‡", ""]
    assert any("‡: the search over the rates is not finished" in note for note in table.notes)
    assert "another may be better: BitFit on RTE (1 of 2 rates)." in words_of(sample)["setup"]
    sample.failed("BitFit", RTE, rate=4e-4)  # tried, though it failed
    assert [row[1].mark for row in tables_of(sample)["best"].rows] == ["", ""]


def test_a_mismatched_half_is_scored_at_the_epoch_that_each_protocol_chose(tmp_path):
    sample = Sample(tmp_path, rows=["BitFit"], tasks=["mnli", "rte"])
    sample.done("BitFit", MNLI)
    sample.done("BitFit", RTE)
    (path,) = (p for p in (tmp_path / "runs").iterdir() if '"mnli"' in p.read_text())
    record = json.loads(path.read_text())
    for epoch in record["history"]:
        epoch["more"] = {"dev_mismatched": {"accuracy": epoch["epoch"] / 10}}
    path.write_text(json.dumps(record))
    results = Results(sample)
    mm = next(column for column in results.columns if column.split != "dev")
    for way in ("paper", "split"):
        (choice,) = results.choices(way, results.lines[0], "mnli")
        assert results.summary(way, results.lines[0], mm).mean == choice.epoch / 10
    (row,) = as_dicts(tables_of(sample)["mean-split"])
    assert row["mnli-mm"] not in (None, "–")


def test_a_mismatched_half_that_some_runs_lack_is_no_mean_of_the_others(tmp_path):
    sample = Sample(tmp_path, rows=["BitFit", "Frozen"], tasks=["mnli", "rte"])
    for row in ("BitFit", "Frozen"):
        for seed in (0, 1):
            more = {"dev_mismatched": {"accuracy": 0.5}} if (row, seed) != ("Frozen", 1) else None
            sample.done(row, MNLI, seed=seed, more=more)
        sample.done(row, RTE)
    rows = as_dicts(tables_of(sample)["mean-paper"])
    assert [row["mnli-mm"] for row in rows] == ["50.0 ± 0.0", "–"]
    plain = [
        np.mean([float(row[key].split(" ")[0]) for key in ("mnli", "rte")]) for row in rows
    ]  # fmt: skip
    assert [float(row["average"]) for row in rows] == pytest.approx(plain, abs=0.06)


def test_undefined_scores_are_counted_where_a_mean_stands_alone():
    assert Summary((0.8, 0.84, math.nan)).mean_alone() == "82.0 (1 of 3 undefined)"
    assert Summary((0.8, 0.84)).mean_alone() == "82.0"
    assert Summary(()).mean_alone() == Summary(()).mean_text()
    assert Summary((math.nan,)).mean_alone() == Summary((math.nan,)).mean_text()


def test_a_mismatched_half_without_scores_takes_no_average_away(tmp_path):
    sample = Sample(tmp_path, rows=["BitFit"], tasks=["mnli", "rte"])
    sample.done("BitFit", MNLI, more={"dev_mismatched": {"accuracy": 0.5}})
    sample.done("BitFit", RTE)
    (row,) = as_dicts(tables_of(sample)["mean-split"])
    assert row["average"] not in (None, "–")


def test_a_convergence_curve_ends_where_its_first_seed_stopped():
    runs = [{"history": [{"dev": {"f1": score}} for score in scores]}
            for scores in ([0.1, 0.2, 0.9], [0.3, 0.4])]  # fmt: skip
    assert figures._epoch_means(runs, "f1") == pytest.approx([20.0, 30.0])


def test_what_the_paper_prints_as_equal_has_no_order(tmp_path):
    """RTE: 65.4 with b_m2 alone and with b_q alone."""
    sample = Sample(tmp_path, rows=["b_m2", "b_q"], tasks=["rte"])
    sample.done("b_m2", RTE)
    sample.done("b_q", RTE, skill=0.6)
    assert words_of(sample)["order"].endswith("The paper's order: b_m2 65.4 = b_q 65.4.")
    sample.done("BitFit", RTE, skill=0.9)
    said = words_of(sample)["order"]
    assert "The paper's order: BitFit 76.5 > b_m2 65.4 = b_q 65.4. The same order." in said
