"""Promise 6: the loss of power at any moment costs at most the steps since the last checkpoint."""

import random
import time

import killing

KILLS = 20


def saved(state):
    """When the state of a run was last saved; None: it is not there."""
    try:
        return state.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(
    processes, checkpoint, tickets, tmp_path
):
    def start(out):
        process = processes.Process(
            target=killing.train_task, args=(checkpoint(), str(tickets), str(out))
        )
        process.start()
        return process

    def finish(out):
        process = start(out)
        process.join()
        assert process.exitcode == 0
        return out.read_bytes()

    expected = finish(tmp_path / "whole")

    moments = random.Random(0)
    kills = resumed_midway = 0
    for attempt in range(3 * KILLS):
        if kills >= KILLS and resumed_midway >= KILLS // 4:
            break
        out, state = tmp_path / f"run{attempt}", tmp_path / f"run{attempt}.checkpoint"
        # Moments by what the run has done and not by the clock: how long one takes on a busy
        # machine says nothing of the next. Of 36 steps no more than two in three, because saves
        # that follow each other at once are seen as one.
        wanted = moments.randrange(24)
        process = start(out)
        seen, before = 0, None
        while seen < wanted and process.exitcode is None:
            now = saved(state)
            seen += now != before
            before = now
            time.sleep(0.001)
        process.join(moments.uniform(0, 0.05))  # on to anywhere in a step or a write
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was done before the kill
            continue
        kills += 1
        resumed_midway += state.exists()
        assert finish(out) == expected
        assert not state.exists()
    assert kills >= KILLS
    assert resumed_midway >= KILLS // 4  # else the kills hit nothing worth resuming
