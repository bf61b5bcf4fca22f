"""What a run's id and settings come from, and which rates are repeated."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from sweeping import small_grid, write_tickets

from bitfit.encoder import open_encoder
from bitfit.experiments import material
from bitfit.experiments.grid import parse_grid
from bitfit.experiments.material import Material, Sources
from bitfit.experiments.plan import Planner
from bitfit.experiments.store import Store
from bitfit.experiments.sweep import Settings, Sweep


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tickets(tmp_path_factory.mktemp("data"))


def planner_of(grid, base, data, directory):
    return Planner(grid, base, Material(open_encoder(base), Sources(data)), Store(directory))


def ids_of(grid, base, data, directory):
    return {str(run): run.id for run in planner_of(grid, base, data, directory).search()}


def test_a_base_with_the_same_tensors_and_other_settings_has_other_runs(checkpoint, data, tmp_path):
    ids = [ids_of(small_grid(checkpoint()), checkpoint(), data, tmp_path)]
    for field, value in (("hidden_dropout_prob", 0), ("attention_probs_dropout_prob", 0.3)):
        copy = tmp_path / field
        shutil.copytree(checkpoint(), copy)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {field: value}))
        ids.append(ids_of(small_grid(str(copy)), str(copy), data, tmp_path))
    pooled = tmp_path / "pooled"
    shutil.copytree(checkpoint(), pooled)
    (pooled / "1_Pooling").mkdir()
    (pooled / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    ids.append(ids_of(small_grid(str(pooled)), str(pooled), data, tmp_path))
    for name in ids[0]:
        assert len({each[name] for each in ids}) == 4


def test_own_rows_that_are_scored_otherwise_are_other_runs(checkpoint, data, tmp_path):
    grid = small_grid(checkpoint())
    (task,) = grid.tasks
    ids = set()
    for kind in ("classification", "multilabel"):
        own = type(task)(name=task.name, data={**task.data, "kind": kind})
        ids |= {*ids_of(grid.replace(tasks=(own,)), checkpoint(), data, tmp_path).values()}
    assert len(ids) == 12


def test_labels_that_a_grid_names_are_part_of_what_a_run_is(checkpoint, data, tmp_path):
    grid = small_grid(checkpoint())
    (task,) = grid.tasks
    ids = set()
    for labels in (["praise", "complaint"], ["praise", "complaint", "question"]):
        own = type(task)(name=task.name, data={**task.data, "labels": labels})
        ids |= {*ids_of(grid.replace(tasks=(own,)), checkpoint(), data, tmp_path).values()}
    assert len(ids) == 12


def test_a_grid_of_more_data_than_is_kept_reads_each_once(checkpoint, data, tmp_path, monkeypatch):
    reads = []
    read = Sources._read
    monkeypatch.setattr(
        Sources, "_read", lambda self, *asked: reads.append(asked[1:]) or read(self, *asked)
    )
    monkeypatch.setattr(material, "_KEPT", 2)
    grid = small_grid(checkpoint()).replace(train_rows=(4, 6, 8, 10, 12))
    planner = planner_of(grid, checkpoint(), data, tmp_path)
    ids = [run.id for run in planner.search()]
    planner.look_again()
    assert [run.id for run in planner.search()] == ids
    assert len(reads) == len(set(reads)) == 5


def test_a_choice_of_rates_is_made_again_only_when_more_is_finished(
    checkpoint, data, tmp_path, monkeypatch
):
    grid = small_grid(checkpoint()).only(rows=["Frozen"])
    settings = Settings(data=data, threads=1, lanes=2)
    Sweep(grid.replace(seeds=(0,)), tmp_path / "out", settings).run()
    asked = []
    record = Store.record
    monkeypatch.setattr(
        Store, "record", lambda self, run_id: asked.append(run_id) or record(self, run_id)
    )
    planner = planner_of(grid, checkpoint(), data, tmp_path / "out")
    first, again = planner.repeats(), planner.repeats()
    assert first == again
    assert len(asked) == 2  # the two rates
    Sweep(grid, tmp_path / "out", replace(settings, resume=True)).run()
    asked.clear()
    assert planner.repeats()[:1] == first[:1]
    assert len(asked) >= 4


def test_spans_have_their_usual_length_where_none_is_set(checkpoint, tmp_path):
    (tmp_path / "squad").mkdir()
    context = "The cat sat on the mat."
    question = {"id": "q", "question": "Who sat?", "answers": [{"answer_start": 4, "text": "cat"}]}
    article = {"title": "t", "paragraphs": [{"context": context, "qas": [question]}]}
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        (tmp_path / "squad" / name).write_text(json.dumps({"version": "1.1", "data": [article]}))
    base = checkpoint()
    lengths = []
    for options in ("", "max_length = 24"):
        grid = parse_grid(
            f'tasks = ["squad"]\n[[rows]]\nname = "BitFit"\nlearning_rate = 1e-3\n{options}',
            "g.toml", default_name="g",
        )  # fmt: skip
        planner = planner_of(grid, base, tmp_path, tmp_path / "out")
        lengths.append(planner.search()[0].config.max_length)
    assert lengths == [min(384, open_encoder(base).clamp_length(10_000)), 24]


def test_a_rate_is_chosen_by_all_seeds_that_the_directory_has(checkpoint, data, tmp_path):
    """An experiment that is gone on with from another first seed repeats what its report shows."""
    grid = small_grid(checkpoint(), seeds=(0,)).only(rows=["Frozen"])
    for seed in (0, 3):
        settings = Settings(data=data, threads=1, resume=seed == 3)
        Sweep(grid.replace(seeds=(seed,)), tmp_path / "out", settings).run()
    scores = {(1e-2, 0): 0.9, (1e-3, 0): 0.5, (1e-2, 3): 0.6, (1e-3, 3): 0.7}
    for path in Path(tmp_path / "out" / "runs").iterdir():
        record = json.loads(path.read_text())
        score = scores[record["config"]["learning_rate"], record["config"]["seed"]]
        for epoch in record["history"]:
            epoch["dev"] = dict.fromkeys(epoch["dev"], score)
        path.write_text(json.dumps(record))
        (tmp_path / "out" / "predictions" / f"{record['id']}.json.gz").unlink()
    planner = planner_of(grid.replace(seeds=(3, 4)), checkpoint(), data, tmp_path / "out")
    assert [(r.config.learning_rate, r.config.seed) for r in planner.repeats()] == [(1e-2, 4)]
