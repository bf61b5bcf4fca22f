"""Grids in TOML: what is read, and what is refused with its place."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import typer

from bitfit.cli import app, options
from bitfit.errors import DataError, UsageError
from bitfit.experiments.conditions import Conditions
from bitfit.experiments.grid import (
    FIGURES,
    PRINTED,
    builtin_grid,
    builtin_grids,
    experiment_names,
    grid_task,
    parse_grid,
    read_grid,
)
from bitfit.experiments.report.paper import printed_rows
from bitfit.experiments.runs import Run, command_of, data_config
from bitfit.training.settings import TrainConfig, rates_to_try, resolve_config

SMALL = """
title = "A small one"
tasks = ["rte", { name = "mine", data = "tickets.csv", text = "body", max_length = 64 }]
epochs = 2
seeds = [0, 1]

[[rows]]
name = "BitFit"

[[rows]]
name = "b_q"
terms = "query"
learning_rate = [1e-3, 1e-4]

[[rows]]
name = "Full-FT"
method = "full"
"""


def test_a_grid_has_rows_tasks_rates_and_seeds():
    grid = parse_grid(SMALL, "small.toml", default_name="small")
    assert (grid.name, grid.seeds, grid.recipe, grid.reference, grid.rows[0].name) == (
        "small", (0, 1), "paper", None, "BitFit",
    )  # fmt: skip
    assert [row.rates for row in grid.rows] == [
        tuple(sorted(rates_to_try("bitfit"))), (1e-4, 1e-3), tuple(sorted(rates_to_try("full"))),
    ]  # fmt: skip
    config = grid.config(grid.rows[1], grid.tasks[1], 1e-4, 1)
    assert (config.terms, config.epochs, config.max_length) == ("query", 2, 64)
    assert (config.learning_rate, config.seed, config.keep) == (1e-4, 1, "best")
    assert grid.tasks[0].data == {"task": "rte"}
    assert grid.tasks[1].data == {"data": "tickets.csv", "text": "body"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("epochs = 2", "epoch = 2"), "unknown entry 'epoch'. Did you mean 'epochs'?"),
        (('terms = "query"', 'term = "query"'), "row 'b_q': unknown option 'term'. Did you mean"),
        (('name = "b_q"', 'name = "BitFit"'), "rows has an entry twice"),
        (("[1e-3, 1e-4]", '["fast"]'), "learning_rate: 'fast'; expected a number"),
        (("[1e-3, 1e-4]", "[3]"), "row 'b_q': learning_rate is 3"),
        (('"rte"', '"rtee"'), "unknown task 'rtee'"),
        (("seeds = [0, 1]", "seeds = [-1]"), "seeds: -1; expected whole numbers"),
        (("seeds = [0, 1]", "seeds = []"), "seeds is empty"),
        (('"full"', '"fulll"'), "row 'Full-FT': method is 'fulll'"),
        (
            ("epochs = 2", 'epochs = "two"'),
            "the grid: epochs is 'two'; expected a whole number",
        ),
        (("epochs = 2", "epochs = 1.5"), "epochs is 1.5; expected a whole number"),
        (("epochs = 2", "epochs = true"), "epochs is True; expected a whole number"),
        (('"A small one"', "5"), "title: 5; expected a text"),
        (("epochs = 2", "name = 5"), "name: 5; expected a text"),
        (("epochs = 2", 'options = { attention_dropout = "a" }'), "attention_dropout is 'a'"),
        (("max_length = 64", "limit = true"), "training rows: True; expected at least 1"),
        (("epochs = 2", 'options = "fast"'), "options: 'fast'; expected a table of options"),
        (("epochs = 2", "options = { terms = 3 }"), "options: terms is 3"),
        (("epochs = 2", "options = { batch_size = -3 }"), "options: batch_size is -3"),
        (("max_length = 64", "max_length = 1"), "task 'mine': max_length is 1"),
        (("epochs = 2", 'paper = "table9"'), "unknown entry of paper 'table9'. Did you mean"),
        (("epochs = 2", "paper = 3"), "unknown entry of paper 3"),
        (("[[rows]]", "[[rows]"), "not TOML"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_file_and_entry(change, message):
    with pytest.raises(UsageError, match=r"small\.toml") as caught:
        parse_grid(SMALL.replace(*change, 1), "small.toml", default_name="small")
    assert message in str(caught.value)


def test_what_is_nearer_to_a_run_holds_and_what_is_asked_for_holds_for_all():
    text = SMALL.replace("max_length = 64", "epochs = 7") + "epochs = 9\n"
    grid = parse_grid(text, "small.toml", default_name="small")
    epochs = lambda grid: [  # noqa: E731
        grid.config(row, task, 1e-4, 0).epochs for row in grid.rows for task in grid.tasks
    ]
    assert epochs(grid) == [2, 7, 2, 7, 9, 9]
    assert epochs(grid.replace(epochs=1)) == [1] * 6


def test_which_epoch_counts_is_no_option_of_a_grid():
    with pytest.raises(UsageError, match="unknown option 'keep'"):
        parse_grid(f'{SMALL}keep = "last"\n', "small.toml", default_name="small")


def test_a_missing_file_is_a_failure_that_is_said_once(tmp_path):
    path = tmp_path / "none.toml"
    with pytest.raises(DataError) as found:
        read_grid(path)
    assert str(found.value) == f"{path}: cannot be read: No such file or directory"
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match="it is not UTF-8"):
        read_grid(path)


def test_names_are_listed_in_the_order_of_the_page_that_explains_them():
    page = (Path(__file__).parents[1] / "docs" / "reproduce.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    names = experiment_names()
    assert {*builtin_grids(), *FIGURES} == set(names)
    assert [*(name for name in names if name in explained), "all"] == explained
    with pytest.raises(UsageError, match=r"unknown experiment 'table9'.*, curves$"):
        builtin_grid("table9")


@pytest.mark.parametrize("name", builtin_grids())
def test_the_papers_grids_are_whole(name):
    grid = builtin_grid(name)
    assert grid.title
    assert grid.recipe == "paper"
    assert grid.rows[0].name == "BitFit"


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "experiments").glob("*.toml")), ids=lambda p: p.stem
)
def test_our_own_grids_are_whole(path):
    assert read_grid(path).name == path.stem


def test_figures_that_share_runs_have_names_of_their_own():
    assert [task.name for task in builtin_grid("figure4").tasks] == ["mrpc"]
    assert builtin_grid("figure4").name == "figure4"
    assert builtin_grid("figure6").rows == builtin_grid("figure2").rows


def test_every_experiment_of_the_paper_is_there():
    assert {
        "table1", "table2", "table3", "table6", "figure1", "figure2", "pos", "gap", "convergence",
        "stability",
    } <= set(builtin_grids())  # fmt: skip
    rows = {row.name: row.options for row in builtin_grid("table3").rows}
    assert rows["b_m2 + b_q"]["terms"] == "intermediate,query"
    assert rows["rand 100k"]["method"] == "random"
    alone = [r for r in builtin_grid("terms").rows if r.name.endswith("alone")]
    assert len(alone) == 8


def test_tasks_rows_and_limits_narrow_a_grid():
    grid = builtin_grid("table3").only(
        tasks=["sst2", "wnli"], rows=["Frozen", "BitFit"], limits={"": 100, "sst2": 5000}
    )
    assert [task.name for task in grid.tasks] == ["sst2", "wnli"]
    assert [task.limit for task in grid.tasks] == [5000, 100]
    assert [row.name for row in grid.rows] == ["BitFit", "Frozen"]
    with pytest.raises(UsageError, match=r"unknown row 'Bitfit'\. Did you mean 'BitFit'"):
        grid.only(rows=["Bitfit"])


def test_a_limit_of_a_task_that_does_not_run_is_refused_by_name():
    with pytest.raises(UsageError) as found:
        builtin_grid("table3").only(tasks=["rte"], limits={"": 100, "sst2": 5000})
    assert str(found.value) == "unknown task in the limits 'sst2'. Known: rte"


def test_paper_names_what_has_printed_numbers():
    assert all(printed_rows(name) for name in PRINTED)


def test_the_command_of_a_run_reads_the_same_data_and_trains_the_same():
    """By what the command line makes of it; test_sweep runs one."""
    task = grid_task({
        "name": "mine", "data": "tickets.csv", "text": "body", "label": "tags", "dev": "dev.csv",
        "labels": ["good", "bad"], "kind": "multilabel", "format": "csv", "label_separator": ";",
        "dev_fraction": 0.123456789, "skip_bad_rows": True, "train_split": "dev",
        "token_column": -1, "max_length": 64, "adam_eps": 1e-8,
    })  # fmt: skip
    grid = parse_grid(SMALL, "small.toml", default_name="small").replace(tasks=(task,))
    config = grid.config(grid.rows[1], task, 1.2345678e-3, 1)
    run = Run(
        row=grid.rows[1], base="minilm", task=task, train_rows=7, config=config, data_seed=3,
        facts=(),
    )  # fmt: skip
    command = command_of(run, Path("data"), Conditions(dtype="fp32", device="cpu", threads=2))
    words = shlex.split(command)
    assert words[:2] == ["bitfit", "train"]
    assert words[words.index("--max-length") + 1] == "64"
    usual = dataclasses.replace(run, config=config.replace(max_length=128))
    assert "--max-length 128" in command_of(
        usual, Path("data"), Conditions(dtype="fp32", device="cpu", threads=2)
    )  # spans have 384 where it is not given
    train = typer.main.get_command(app.app).commands["train"]
    given = train.make_context("train", words[2:]).params
    source = data_config(task, Path("data"), 7, 3)
    source = dataclasses.replace(source, data=str(source.data), dev=str(source.dev))
    assert options.data_config({**given, "seed": None}, seed=given["data_seed"]) == source
    names = {field.name for field in dataclasses.fields(TrainConfig)} & set(given)
    asked = {name: given[name] for name in names - {"recipe", "learning_rate"}}
    rate = options.parse_rate(given["learning_rate"])
    assert resolve_config(given["recipe"], learning_rate=rate, **asked) == config
    assert names == {field.name for field in dataclasses.fields(TrainConfig)}
