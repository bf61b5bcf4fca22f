"""Sweeps on a Ray cluster: what one process makes, workers killed, drivers killed and resumed."""

import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import sweeping
from sweeping import left_in, small_grid, small_sweep

pytest.importorskip("ray", reason="needs the extra ray")
import ray

import bitfit
from bitfit.cluster import check_address, connected
from bitfit.encoder import open_encoder
from bitfit.errors import BitfitError, MissingExtra, TrainingInterrupted, UsageError
from bitfit.experiments.cluster import TRIES, _check_facts
from bitfit.experiments.executor import WorkerLost
from bitfit.experiments.material import Material, Sources
from bitfit.experiments.plan import Planner, make_group
from bitfit.experiments.store import Store
from bitfit.experiments.sweep import GroupFinished, GroupStarted, Settings, Sweep

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
SECONDS = 600  # far more than it takes on a busy machine: what hangs fails


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two workers on this machine, and its address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(bitfit.__file__).parents[1]))
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
            logging_level="ERROR", object_store_memory=100_000_000,
        )  # fmt: skip
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return sweeping.write_tickets(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(checkpoint, data, tmp_path_factory):
    """The directory of a sweep in one process."""
    out = tmp_path_factory.mktemp("experiments") / "whole"
    small_sweep(checkpoint(), str(data), str(out), resume=False).run()
    return out


def check_same(out, finished):
    """The same runs, all of them done; with the same bits where they were in the same company."""
    there = {r["id"]: r for r in Store(out).records()}
    assert {r["state"] for r in there.values()} == {"done"}
    assert there.keys() == {r["id"] for r in Store(finished).records()}
    for record in Store(finished).records():
        other = there[record["id"]]
        for key in ("row", "task", "config", "data", "rows", "command", "best_epoch", "trainable"):
            assert other[key] == record[key]
        for key in ("scores", "last", "train_scores", "majority"):
            assert other[key] == pytest.approx(record[key], abs=1e-5)
        if record["config"]["seed"] == 0:  # the search is grouped in one way only
            measured = ("cost", "environment")
            left, right = (
                {k: v for k, v in r.items() if k not in measured} for r in (other, record)
            )
            assert json.dumps(left) == json.dumps(right)
        for folder, suffix in (("predictions", ".json.gz"), ("tasks", ".bitfit.safetensors")):
            name = Path(folder) / f"{record['id']}{suffix}"
            assert (out / name).is_file() == (finished / name).is_file()
    assert left_in(out / "work") == []


def kinds(events, kind):
    return [event for event in events if isinstance(event, kind)]


def trains(process):
    """Whether a process, by its folder in /proc, trains a group now."""
    return (process / "cmdline").read_bytes().startswith(b"ray::train_group")


def workers():
    """The processes below this one that train a group now."""
    parents, busy = {}, []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if trains(path):
                busy.append(int(path.name))
        except (FileNotFoundError, ProcessLookupError):
            continue

    def is_ours(pid):
        while pid and pid != os.getpid():
            pid = parents.get(pid, 0)
        return bool(pid)

    return [pid for pid in busy if is_ours(pid)]


def kill_a_worker():
    """kill -9 to the first worker that trains, waiting for one."""
    end = time.monotonic() + SECONDS
    while True:
        assert time.monotonic() < end, "no worker is at work"
        for worker in workers():
            # Stopped and looked at again: it may have finished its group since it was found.
            os.kill(worker, signal.SIGSTOP)
            if trains(Path(f"/proc/{worker}")):
                os.kill(worker, signal.SIGKILL)
                return
            os.kill(worker, signal.SIGCONT)
        time.sleep(0.02)


def test_a_worker_whose_base_is_other_than_usual_is_refused(checkpoint, data, tmp_path):
    """What is usual is not among a run's facts, so both sides are asked for what they have."""
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint(), copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.3}))
    materials = [Material(open_encoder(str(base)), Sources(data)) for base in (checkpoint(), copy)]
    for driver, worker in (materials, materials[::-1]):
        grid = small_grid("base")
        runs = Planner(grid, "base", driver, Store(tmp_path / "out")).search()[:1]
        with pytest.raises(BitfitError, match=r"hidden_dropout_prob of .* are not the driver's"):
            _check_facts(make_group(runs, 1), worker)
        _check_facts(make_group(runs, 1), driver)


def test_a_driver_killed_and_one_stopped_are_gone_on_with(
    processes, cluster, finished, checkpoint, data, tmp_path
):
    """kill -9, then Ctrl-C, then to the end; the first is a process that joins by address."""
    out = tmp_path / "driven"
    settings = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    driver = processes.Process(
        target=sweeping.drive, args=(settings, checkpoint(), str(data), str(out)),
        kwargs={"ray": cluster},
    )  # fmt: skip
    driver.start()
    end = time.monotonic() + SECONDS
    while not list(out.glob("runs/*.json")):
        assert driver.is_alive()
        assert time.monotonic() < end
        time.sleep(0.02)
    driver.kill()
    driver.join()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("runs/*.json")}
    assert Store(out).claims()
    assert not any(claim.is_alive for claim in Store(out).claims())

    events = []
    sweep = small_sweep(checkpoint(), str(data), str(out), ray="auto")
    with pytest.raises(TrainingInterrupted, match="--resume goes on"):
        sweep.run(events.append, lambda: len(kinds(events, GroupStarted)) >= 2)
    assert Store(out).claims()
    assert not any(claim.is_alive for claim in Store(out).claims())

    summary = small_sweep(checkpoint(), str(data), str(out), ray="auto").run()
    assert summary.done == len(Store(finished).records())
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    check_same(out, finished)


def test_a_cluster_with_a_worker_killed_makes_what_one_process_makes(
    cluster, finished, checkpoint, data, tmp_path
):
    events = []

    def watch(event):
        events.append(event)
        if isinstance(event, GroupFinished) and len(kinds(events, GroupFinished)) == 1:
            kill_a_worker()

    out = tmp_path / "killed"
    summary = small_sweep(checkpoint(), str(data), str(out), ray="auto").run(watch)
    lost = kinds(events, WorkerLost)
    assert lost
    assert all(event.again for event in lost)
    assert summary.failed == []
    assert summary.made == summary.done == len(Store(finished).records())
    check_same(out, finished)
    # Not before there was room: two workers, and one group ahead.
    most = running = 0
    for event in events:
        running += isinstance(event, GroupStarted) - isinstance(event, GroupFinished)
        most = max(most, running)
    assert most == 3


def test_a_group_whose_workers_are_lost_again_and_again_fails_and_the_others_go_on(
    cluster, checkpoint, data, tmp_path, monkeypatch
):
    """As one that does not fit the memory; here only the news of it is made up."""
    get, events = ray.get, []

    def lose(ref):
        found = get(ref)
        if found[0][0].record["row"] == "Full-FT":
            raise ray.exceptions.WorkerCrashedError()
        return found

    monkeypatch.setattr(ray, "get", lose)
    sweep = small_sweep(checkpoint(), str(data), str(tmp_path / "out"), ray="auto")
    sweep.grid = small_grid(checkpoint(), seeds=(0,)).only(rows=["Frozen", "Full-FT"])
    summary = sweep.run(events.append)
    assert [event.again for event in kinds(events, WorkerLost)] == [True] * (TRIES - 1) + [False]
    assert [r["row"] for r in summary.failed] == ["Full-FT"]
    assert f"lost {TRIES} times" in summary.failed[0]["error"]
    assert summary.done == 2


def test_a_machine_with_other_data_is_named_and_nothing_is_recorded(
    cluster, checkpoint, data, tmp_path, monkeypatch
):
    other = tmp_path / "other"
    other.mkdir()
    text = (data / "tickets.csv").read_text(encoding="utf-8")
    (other / "tickets.csv").write_text(text.replace("good", "nice"), encoding="utf-8")
    sweep = small_sweep(checkpoint(), str(data), str(tmp_path / "out"), ray="auto")
    monkeypatch.setattr("bitfit.experiments.sweep.new_job", sweeping.with_data(other))
    with pytest.raises(BitfitError, match=r"machine of the Ray cluster: its training rows of BitF"):
        sweep.run()
    assert Store(tmp_path / "out").records() == []
    assert not any(claim.is_alive for claim in Store(tmp_path / "out").claims())


def test_more_threads_than_any_machine_has_are_refused(cluster, checkpoint, data, tmp_path):
    sweep = small_sweep(checkpoint(), str(data), str(tmp_path / "out"), threads=3, ray="auto")
    with pytest.raises(UsageError, match="no machine of the Ray cluster has 3 CPU"):
        sweep.run()


def test_a_cluster_that_cannot_be_meant_or_installed_is_refused_before_anything_is_written(
    checkpoint, data, tmp_path, monkeypatch
):
    settings = Settings(data=data, threads=1, ray="everywhere")
    with pytest.raises(UsageError, match="--ray 'everywhere': expected local"):
        Sweep(small_grid(checkpoint()), tmp_path / "out", settings)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'bitfit\[ray\]'"):
        Sweep(small_grid(checkpoint()), tmp_path / "out", Settings(data=data, ray="local"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("port", ["0", "65536", "99999", "123456789"])
def test_a_port_that_is_none_is_misuse(port):
    with pytest.raises(UsageError, match="PORT from 1 to 65535"):
        check_address(f"127.0.0.1:{port}")


def test_connecting_keeps_what_a_signal_does(monkeypatch):
    """Ray puts a handler of its own in place of the one that saves the state."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "init", lambda **_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    signal.signal(signal.SIGTERM, mine := lambda *_: None)
    try:
        with connected("local"):
            assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_no_cluster_is_an_error_of_one_line(monkeypatch):
    def nothing(**_):
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", nothing)
    with pytest.raises(BitfitError, match="--ray auto: no Ray cluster"), connected("auto"):
        pass
    with socket.socket() as free:  # bound, and nobody listens
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(BitfitError, match=r"there: .*refused"), connected(place):
            pass
