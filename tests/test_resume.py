"""Promise 6: the loss of power at any moment costs at most the steps since the last checkpoint."""

import random
import time

import killing

KILLS = 20


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

    finish(tmp_path / "warm-up")
    began = time.monotonic()
    expected = finish(tmp_path / "whole")
    seconds = time.monotonic() - began

    moments = random.Random(0)
    kills = resumed_midway = 0
    for attempt in range(3 * KILLS):
        if kills >= KILLS and resumed_midway >= KILLS // 4:
            break
        out = tmp_path / f"run{attempt}"
        process = start(out)
        time.sleep(moments.uniform(0.1, 0.95) * seconds)
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was done before the kill
            continue
        kills += 1
        resumed_midway += (tmp_path / f"run{attempt}.checkpoint").exists()
        assert finish(out) == expected
        assert not (tmp_path / f"run{attempt}.checkpoint").exists()
    assert kills >= KILLS
    assert resumed_midway >= KILLS // 4  # else the kills hit nothing worth resuming
