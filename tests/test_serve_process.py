"""``bitfit serve`` as a process: a port, a page, a signal."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

import bitfit
from bitfit import cli
from bitfit.client import Client

SOURCE = os.path.dirname(os.path.dirname(bitfit.__file__))
SECONDS = 120  # far more than anything takes on a busy machine: what hangs fails


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, checkpoint):
    """A folder with one small task."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "mood.csv"
    rows = [f"{word} bike,{label}" for word, label in (("good", "glad"), ("bad", "sad"))] * 8
    data.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    bitfit.finetune(
        checkpoint(), data=data, dev_fraction=0, out=folder / "mood.bitfit.safetensors",
        name="mood", epochs=2, learning_rate=1e-2, dtype="fp32",
    )  # fmt: skip
    return folder


@contextmanager
def running(base, tasks, *options):
    """A server and its address."""
    command = [sys.executable, "-m", "bitfit", "serve", "--base", base, "--tasks", str(tasks),
               "--port", "0", "--dtype", "fp32", *options]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": SOURCE, "PYTHONWARNINGS": "default"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            line = process.stdout.readline()
            if not line:
                pytest.fail(process.stderr.read())
            yield process, line.split(" at ")[1].strip().rstrip("/")
        finally:
            process.kill()


def test_a_server_answers_changes_its_tasks_and_ends_after_what_it_accepted(tasks, checkpoint):
    # What is not full waits so long: the requests below are surely open when the signal comes.
    with running(checkpoint(), tasks, "--max-wait-ms", "1500") as (process, address):
        with Client(address, retries=0) as client:
            page = httpx.get(f"{address}/", timeout=SECONDS)
            assert page.status_code == 200
            assert "content-security-policy" in page.headers
            assert "server" not in page.headers
            answer = client.predict_one("mood", "good bike")
            assert answer.label in ("glad", "sad")
            file = httpx.get(f"{address}/v1/tasks/mood/file", timeout=SECONDS).content
            assert file == (tasks / "mood.bitfit.safetensors").read_bytes()
            assert client.put("again", file).version == 1
            assert {t.name for t in client.tasks()} == {"mood", "again"}
            assert client.predict_one("again", "good bike").scores == pytest.approx(answer.scores)
            found = []

            def ask(i):
                found.append(client.predict([("mood", f"good bike {i}"), ("nothing", "x")]))

            threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
            for thread in threads:
                thread.start()
            while client.stats()["queue"]["items"] < 16 and any(t.is_alive() for t in threads):
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            for thread in threads:
                thread.join()
            assert len(found) == 8
            assert all(first.label and second.error for first, second in found)
        assert process.wait(SECONDS) == 0
        log = process.stderr.read()
    assert '"event": "request"' in log
    assert "Warning" not in log
    assert "Traceback" not in log
    with pytest.raises(httpx.ConnectError):
        httpx.get(address, timeout=SECONDS)


def test_the_lines_of_the_documentation_run(tasks, checkpoint, tmp_path, monkeypatch, capsys):
    page = Path(__file__).parents[1] / "docs" / "serving.md"
    text = page.read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    shell = "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    monkeypatch.chdir(tmp_path)
    file = (tasks / "mood.bitfit.safetensors").read_bytes()
    # A folder of its own, which no other test counts; the files that a reader is supposed to have.
    for name in ("mood", "intent", "other", "sentiment"):
        (tmp_path / f"{name}.bitfit.safetensors").write_bytes(file)
    with running(checkpoint(), tmp_path) as (_, address):
        code = code.replace("http://127.0.0.1:8000", address)
        exec(compile(code, str(page), "exec"), {})
        assert len(capsys.readouterr().out.splitlines()) == 4
        lines = shell.replace("http://127.0.0.1:8000", address).replace("curl ", "curl -sSf ")
        subprocess.run(["sh", "-e", "-c", lines], check=True, capture_output=True)


def test_a_taken_port_a_bad_key_file_and_an_open_door_are_told_before_anything_is_loaded(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.delenv("BITFIT_API_KEYS", raising=False)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        keys = tmp_path / "keys"
        keys.write_text("nonsense")
        for options, message in [
            (["--port", port], f"127.0.0.1:{port} is taken by another program"),
            (["--keys", str(keys)], "keys:1: expected ROLE:KEY"),
            (["--host", "0.0.0.0"], "--insecure"),
            (["--host", "no.such.host.invalid", "--insecure"], "no such address"),
            (["--storage", "fp64"], "--storage 'fp64' is not one of"),
            (["--max-items", "9999"], "could never be accepted"),
        ]:
            assert cli.main(["serve", "--base", str(tmp_path / "none"), *options]) == 2
            assert message in capsys.readouterr().err


def test_without_its_extra_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert cli.main(["serve"]) == 2
    assert "pip install 'bitfit[serve]'" in capsys.readouterr().err
