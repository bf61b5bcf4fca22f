"""``bitfit serve --ray``: two processes behind one address, one of them killed under load."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from tiny import make_task

pytest.importorskip("ray", reason="needs the extra ray")
pytest.importorskip("prometheus_client", reason="needs the extra serve")

import bitfit
from bitfit import cli
from bitfit.client import Client
from bitfit.errors import BitfitError, UsageError
from bitfit.serve import deploy
from bitfit.serve.link import Lost
from bitfit.serve.replica import Job
from bitfit.serve.settings import ServeConfig

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
SOURCE = str(Path(bitfit.__file__).parents[1])
SECONDS = 600  # far more than anything takes on a busy machine: what hangs fails
KEY, PREDICT = "manage-key-that-is-never-shown", "predict-key-that-is-never-shown"
WORDS = "the a film bike order is was very we it good bad".split()


class Server:
    def __init__(self, process, address, files, tasks):
        self.process, self.address, self.files, self.tasks = process, address, files, tasks

    def client(self, key=KEY):
        return Client(self.address, key=key, retries=0, timeout=SECONDS)

    def get(self, path):
        response = httpx.get(
            f"{self.address}{path}", headers={"Authorization": f"Bearer {KEY}"}, timeout=SECONDS
        )
        response.raise_for_status()
        return response

    def replicas(self):
        """What is known of each, once all have answered: one that is busy may be left out."""
        found = []

        def is_whole():
            found[:] = self.get("/v1/stats").json()["replicas"]
            return all(one["items"] is not None for one in found)

        until(is_whole)
        return found

    def metric(self, name):
        return float(re.search(rf"^{name}\{{.*\}} (\S+)$", self.get("/metrics").text, re.M)[1])


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    """Two replicas on a cluster of their own, with the task m."""
    from bitfit.base import load_base
    from bitfit.encoder import Encoder

    tasks, log = tmp_path_factory.mktemp("tasks"), tmp_path_factory.mktemp("log") / "log"
    encoder = Encoder(load_base(checkpoint()))
    files = [make_task(encoder, seed=seed, scale=0.3) for seed in range(3)]
    files[0].save(tasks / "m.bitfit.safetensors")
    command = [
        sys.executable, "-m", "bitfit", "serve", "--ray", "local", "--replicas", "2", "--base",
        checkpoint(), "--tasks", str(tasks), "--port", "0", "--threads", "1", "--dtype", "fp32",
        "--watch", "0.5", "--max-wait-ms", "200", "--json",
    ]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": SOURCE, "BITFIT_API_KEYS": f"manage:{KEY} predict:{PREDICT}",
    }  # fmt: skip
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
            start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            line = process.stdout.readline()
            if not line:
                pytest.fail(log.read_text())
            found = json.loads(line)
            assert (found["tasks"], found["replicas"]) == (1, 2)
            one = Server(process, found["address"], files, tasks)
            one.log = log
            yield one
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()


def processes_of(session):
    """Those that the server started: all are of its session."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found[int(path.name)] = (path / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def until(check):
    end = time.monotonic() + SECONDS
    while not check():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_replica_is_killed_under_load_and_every_request_is_answered_rightly(server, checkpoint):
    model = bitfit.load(
        server.tasks / "m.bitfit.safetensors", base=checkpoint(), dtype="fp32", device="cpu"
    )
    texts = [f"{a} {b} {c}" for a in WORDS for b in WORDS[:4] for c in WORDS[:3]]
    expected = dict(zip(texts, model.predict(texts), strict=True))
    found, stop = [], threading.Event()

    def load(start):
        with server.client(PREDICT) as client:
            for i in range(start, 10**6, 8):
                if stop.is_set():
                    return
                asked = [texts[(i * 7 + k) % len(texts)] for k in range(5)]
                found.append((asked, client.predict([("m", text) for text in asked])))

    threads = [threading.Thread(target=load, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: all(one["items"] > 20 for one in server.replicas()))
    victim = server.replicas()[0]["pid"]
    os.kill(victim, signal.SIGKILL)
    at_death = len(found)
    until(lambda: len(found) > at_death + 20)
    until(lambda: all(one["ready"] for one in server.replicas()))
    back = server.replicas()[0]
    until(lambda: server.replicas()[0]["items"] > 5)
    stop.set()
    for thread in threads:
        thread.join()
    assert back["pid"] != victim
    assert server.metric("bitfit_replica_deaths_total") >= 1  # Ray ends those that are too slow
    assert server.metric("bitfit_retried_requests_total") >= 1
    for asked, answers in found:
        assert all(answer.error is None for answer in answers)
        for text, answer in zip(asked, answers, strict=True):
            assert answer.label == expected[text].label
            assert answer.confidence == pytest.approx(expected[text].confidence, abs=1e-4)
    until(lambda: '"event": "replica_back"' in server.log.read_text())


def test_a_change_is_everywhere_when_it_is_answered_and_a_copied_file_within_seconds(server):
    def seen(task):
        """Versions and fingerprints in answers of both replicas."""
        before = {one["name"]: one["items"] for one in server.replicas()}
        with server.client() as client:
            answers = [client.predict_one(task, "good bike") for _ in range(6)]
        after = {one["name"]: one["items"] for one in server.replicas()}
        assert all(after[name] > before[name] for name in before)
        return {(answer.version, answer.fingerprint) for answer in answers}

    first, second = (file.seal[:16] for file in server.files[1:3])
    with server.client() as client:
        client.put("new", server.files[1].to_bytes())
        assert seen("new") == {(1, first)}
        client.put("new", server.files[2].to_bytes())
        assert seen("new") == {(2, second)}
        client.rollback("new")
        assert seen("new") == {(3, first)}
        client.rollback("new")
        assert seen("new") == {(4, second)}
        client.delete("new")
        for _ in range(4):
            with pytest.raises(bitfit.errors.UnknownTask):
                client.predict_one("new", "good bike")
        with server.client(PREDICT) as other, pytest.raises(bitfit.BitfitError, match="manage"):
            other.delete("m")
    server.files[1].save(server.tasks / "copied.bitfit.safetensors")
    until(lambda: {one["tasks"] for one in server.replicas()} == {2})
    assert seen("copied") == {(1, first)}
    (server.tasks / "copied.bitfit.safetensors").unlink()
    until(lambda: {one["tasks"] for one in server.replicas()} == {1})

    def told():
        lines = [json.loads(x) for x in server.log.read_text().splitlines() if "copied" in x]
        return sorted((x["change"], x["replica"]) for x in lines if x["event"] == "folder")

    until(lambda: len(told()) >= 4)  # a replica has done it before the server says so
    assert told() == [("added", "1"), ("added", "2"), ("removed", "1"), ("removed", "2")]


def test_keys_are_in_no_process_that_the_server_started(server):
    others = processes_of(server.process.pid)
    assert len(others) > 3
    for pid in others:
        for what in ("cmdline", "environ"):
            text = Path(f"/proc/{pid}/{what}").read_bytes()
            if (pid, what) != (server.process.pid, "environ"):  # where we put them ourselves
                assert b"never-shown" not in text
    assert "never-shown" not in server.log.read_text()


def test_told_to_stop_it_answers_what_it_accepted_and_leaves_no_process(server):
    answers = []

    def ask():
        with server.client() as client:
            answers.append(client.predict([("m", "good bike")] * 3))

    started = processes_of(server.process.pid)
    assert any(b"ServeReplica" in line for line in started.values())
    threads = []

    def are_waiting():
        """Whether all were accepted and some wait; where all are answered already, ask again."""
        if not any(thread.is_alive() for thread in threads):
            threads.extend(threading.Thread(target=ask) for _ in range(6))
            for thread in threads[-6:]:
                thread.start()
        answered = 3 * len(answers)
        waiting = sum(one["queue"]["items"] for one in server.replicas())
        return waiting > 0 and answered + waiting == 3 * len(threads)

    until(are_waiting)
    os.killpg(server.process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
    for thread in threads:
        thread.join()
    assert [answer.error for found in answers for answer in found] == [None] * 3 * len(threads)
    assert server.process.wait(SECONDS) == 0
    until(lambda: not processes_of(server.process.pid))
    log = server.log.read_text()
    assert '"event": "stopped"' in log
    assert "Traceback" not in log


def test_what_cannot_be_meant_is_refused_before_anything_starts(tmp_path, capsys, monkeypatch):
    folder = str(tmp_path)
    for options, message in [
        (["--replicas", "2"], "--replicas goes with --ray"),
        (["--ray", "local"], "--ray needs --tasks DIR"),
        (["--ray", "local", "--tasks", "memory://x"], "memory://x is a URL"),
        (["--ray", "everywhere", "--tasks", folder], "--ray 'everywhere': expected local"),
        (["--ray", "ray://10.0.0.1:10001", "--tasks", folder], "Ray's client port"),
        (["--ray", "local", "--tasks", folder, "--host", "0.0.0.0"], "--insecure"),
    ]:
        assert cli.main(["serve", "--base", str(tmp_path / "none"), *options]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    monkeypatch.delattr("ray.serve", raising=False)
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    open_door = ["--host", "0.0.0.0"]  # refused too, but later
    assert cli.main(["serve", "--ray", "local", "--tasks", folder, *open_door]) == 2
    assert "pip install 'bitfit[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpus", "count", "share"),
    [(1, 1, 1.0), (1, 2, 0.5), (1, 6, 0.166), (1, 7, 0.142), (2, 3, 0.5), (4, 6, 0.5)],
)
def test_replicas_share_gpus_in_parts_that_fit(gpus, count, share, monkeypatch):
    monkeypatch.setattr(deploy, "_nodes", lambda: [{"Resources": {"CPU": 64, "GPU": gpus}}])
    job = Job(base="x", config=ServeConfig(), device="cuda", threads=2, versions=())
    needs = deploy._needs(job, count)
    assert needs == {"CPU": 2, "GPU": share}
    deploy._check_room(needs, count)
    with pytest.raises(UsageError, match=rf"room for \d+ replicas of 2 CPU and {share:g} GPU each"):
        deploy._check_room(needs, 33)


def test_what_ray_cancels_by_itself_is_lost_and_what_we_cancel_is_not():
    deploy._import_serve()

    async def check():
        handle = Handle(fails=asyncio.CancelledError())
        with pytest.raises(Lost):
            await deploy._Caller(handle).send("look")
        held = asyncio.ensure_future(deploy._Caller(handle := Handle()).send("look"))
        await asyncio.sleep(0)
        held.cancel()
        with pytest.raises(asyncio.CancelledError):
            await held
        assert handle.is_cancelled

    asyncio.run(check())


class Handle:
    """A replica as Ray Serve shows it, that never answers, or fails."""

    def __init__(self, fails=None):
        self.fails, self.is_cancelled = fails, False
        self.look = self

    def remote(self):
        return self

    def cancel(self):
        self.is_cancelled = True

    def __await__(self):
        if self.fails is not None:
            raise self.fails
        yield from asyncio.get_running_loop().create_future()


def test_what_ray_raises_at_the_start_is_an_error_of_one_line(monkeypatch):
    from ray.exceptions import RaySystemError

    serve = deploy._import_serve()

    def fail(**_):
        raise RaySystemError("the controller died")

    monkeypatch.setattr(serve, "start", fail)
    job = Job(base="x", config=ServeConfig(tasks="."), versions=())
    with pytest.raises(BitfitError, match=r"does not start the replicas: .*controller"):
        deploy._run(serve, job, {"CPU": 1}, ["bitfit-x-1"])
