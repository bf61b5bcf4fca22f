"""A trainer's state: what is read is what was written, or is refused before anything is taken."""

import json
import math

import pytest
import torch

from bitfit.errors import CheckpointRefused
from bitfit.storage import pack_safetensors, unpack_safetensors
from bitfit.training.checkpoint import (
    CHECKPOINT_KEY,
    State,
    read_state,
    recorded_conditions,
    write_state,
)
from bitfit.training.lane import Progress

IDENTITY = {"seed": 0, "threads": 1}
MOVING = {"trained.0": torch.arange(8.0).reshape(2, 4), "mean.0": torch.ones(2, 4)}
NUMBERS = [torch.zeros(4)]


@pytest.fixture
def path(tmp_path):
    """A state of three lanes in two slots: one has ended, one is running, one has not begun."""
    state = State(
        slots=[1, None], next_lane=2,
        progress=[Progress(step=6, best_epoch=1, best_score=1.0), Progress(step=2), Progress()],
        best=[[torch.full((4,), 1.0)], [torch.full((4,), 2.0)], []], moving=MOVING,
    )  # fmt: skip
    write_state(tmp_path / "state", IDENTITY, state)
    return tmp_path / "state"


def read(path, identity=IDENTITY):
    return read_state(path, identity, moving=MOVING, numbers=NUMBERS, slots=2, lanes=3)


def change(path, change):
    tensors, text = unpack_safetensors(path.read_bytes(), CHECKPOINT_KEY)
    note = json.loads(text)
    change(note, tensors)
    path.write_bytes(pack_safetensors(tensors, CHECKPOINT_KEY, json.dumps(note)))


def test_what_was_written_is_read_back(path):
    state = read(path)
    assert (state.slots, state.next_lane) == ([1, None], 2)
    assert [p.step for p in state.progress] == [6, 2, 0]
    assert [p.best_score for p in state.progress] == [1.0, -math.inf, -math.inf]
    assert [[t.tolist() for t in each] for each in state.best] == [[[1.0] * 4], [[2.0] * 4], []]
    assert all(torch.equal(state.moving[name], tensor) for name, tensor in MOVING.items())
    assert recorded_conditions(path) == IDENTITY


def test_a_state_of_other_runs_is_refused_by_what_differs(path):
    with pytest.raises(CheckpointRefused, match=r"is of another run: seed, rows differ\(s\)"):
        read(path, {"seed": 1, "threads": 1, "rows": "a"})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda note, tensors: tensors.pop("mean.0"), "it lacks mean.0"),
        (lambda note, tensors: tensors.pop("best.1.0"), "it lacks best.1.0"),
        (lambda note, tensors: tensors.update({"mean.0": torch.ones(3, 4)}),
         r"mean.0 has shape \[3, 4\], expected \[2, 4\]"),
        (lambda note, tensors: tensors.update({"best.0.0": torch.ones(5)}),
         r"best.0.0 has shape \[5\], expected \[4\]"),
        (lambda note, tensors: note.clear(), "it does not say what its runs depend on"),
        (lambda note, tensors: note.update(slots=[1]), "it has other slots than the 2"),
        (lambda note, tensors: note.pop("slots"), "it has other slots than the 2"),
        (lambda note, tensors: note.update(slots=[2, None]), "lane 2, of 2 that have begun"),
        (lambda note, tensors: note.update(slots=[-1, None]), "lane -1, of 2 that have begun"),
        (lambda note, tensors: note.update(slots=["1", None]), "lane '1', of 2 that have begun"),
        (lambda note, tensors: note.update(slots=[1, 1]), "two slots have the same lane"),
        (lambda note, tensors: note.update(next_lane=4), "4 lanes have begun, of 3"),
        (lambda note, tensors: note.update(next_lane=None), "None lanes have begun, of 3"),
        (lambda note, tensors: note["progress"].pop(), "where each of 3 lanes stands"),
        (lambda note, tensors: note.update(progress=[1, 2, 3]), "lane 0 says nothing"),
        (lambda note, tensors: note["progress"][1].pop("step"), "lane 1 lacks 'step'"),
        (lambda note, tensors: note["progress"][1].update(step=-1), "'step' of lane 1 is -1"),
        (lambda note, tensors: note["progress"][1].update(history={}), "'history' of lane 1 is {}"),
        (lambda note, tensors: note["progress"][2].update(unheard_of=1),
         "lane 2 has 'unheard_of', which this version does not know"),
    ],
)  # fmt: skip
def test_a_damaged_state_is_refused_and_what_it_lacks_is_said(damage, reason, path):
    change(path, damage)
    with pytest.raises(CheckpointRefused, match=f"no state to go on from .*{reason}") as caught:
        read(path)
    assert "Error(" not in str(caught.value)


def test_a_score_that_is_a_whole_number_is_one(path):
    change(path, lambda note, tensors: note["progress"][0].update(best_score=1))
    assert read(path).progress[0].best_score == 1


def test_a_state_whose_bytes_cannot_be_had_is_refused(path):
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointRefused, match="cannot be read: Is a directory"):
        read(path)
