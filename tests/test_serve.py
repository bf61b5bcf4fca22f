"""The HTTP API over a shelf and an engine without a model."""

from __future__ import annotations

import asyncio
import gc
import json
import platform
import re
import socket
import threading
import tracemalloc
import weakref
from dataclasses import replace

import pytest
import torch
from serving import (
    KEYS,
    MANAGE,
    PATIENCE,
    PREDICT,
    DummyEngine,
    DummyShelf,
    ask,
    error_of,
    in_site,
    open_site,
    task_file,
    until,
)
from test_taskfile import GOOD, forge

import bitfit
from bitfit.errors import UsageError
from bitfit.identity import BaseIdentity
from bitfit.serve import app, uploads
from bitfit.serve.assets import read_assets
from bitfit.serve.auth import Keys, check_bind
from bitfit.serve.edge import dump
from bitfit.serve.engine import Item
from bitfit.serve.failures import NotFinite
from bitfit.serve.metrics import OTHER, Metrics
from bitfit.serve.run import _begin_to_listen, listen, serve
from bitfit.serve.service import Service
from bitfit.serve.settings import ServeConfig
from bitfit.serve.uploads import Uploads
from bitfit.storage import atomic_write

# --- answers --------------------------------------------------------------------------------------


def test_one_call_mixes_tasks_and_keeps_the_order():
    async def check(site, client):
        body = {
            "items": [
                {"task": "topic", "text": "a b c", "id": "x"},
                {"task": "mood", "text": "d"},
                {"task": "topic", "text": "e f"},
            ]
        }
        found = (await client.post("/v1/predict", json=body)).json()
        assert [a["result"]["label"] for a in found["answers"]] == ["a b c", "d", "e f"]
        assert [a["task"] for a in found["answers"]] == ["topic", "mood", "topic"]
        first = found["answers"][0]
        assert first.keys() == {
            "id", "task", "version", "fingerprint", "kind", "tokens", "truncated", "result",
        }  # fmt: skip
        assert (first["id"], first["version"], first["tokens"]) == ("x", 1, 5)
        assert found["ms"] > 0
        assert len(site.engine.batches) == 1

    in_site(check)


def test_an_unknown_task_is_an_error_of_its_item_and_the_rest_is_answered():
    async def check(site, client):
        response = await client.post("/v1/predict", json=ask(("moood", "a"), ("mood", "b")))
        assert response.status_code == 200
        failed, answered = response.json()["answers"]
        assert failed["error"]["code"] == "unknown_task"
        assert "Did you mean 'mood'?" in failed["error"]["message"]
        assert "result" not in failed
        assert answered["result"]["label"] == "b"

    in_site(check)


def test_an_unknown_task_alone_is_404():
    async def check(site, client):
        response = await client.post("/v1/predict", json=ask(("nothing", "a")))
        assert response.status_code == 404
        assert error_of(response)["code"] == "unknown_task"
        assert not site.engine.batches

    in_site(check)


def test_texts_that_do_not_fit_are_errors_of_their_items():
    async def check(site, client):
        body = ask(("mood", "one two"), ("mood", "x" * 50), ("mood", "a " * 15))
        body["items"][0]["text_pair"] = "but mood takes one"
        answers = (await client.post("/v1/predict", json=body)).json()["answers"]
        assert [a["error"]["code"] for a in answers] == ["bad_input", "too_long", "too_long"]

    in_site(check, max_text_chars=40, max_item_tokens=8)


def test_a_task_of_numbers_that_are_too_large_fails_alone_and_can_be_looked_at():
    huge = task_file("huge")
    huge = replace(huge, bias=torch.full_like(huge.bias, 3e38))

    async def check(site, client):
        answer = site.engine._answer

        def fail(one):
            found = answer(one)
            return NotFinite("not finite") if one.item.task == "huge" else found

        site.engine._answer = fail
        assert (await client.put("/v1/tasks/huge", content=huge.to_bytes())).status_code == 201
        response = await client.post("/v1/predict", json=ask(("huge", "a"), ("mood", "b")))
        failed, answered = response.json()["answers"]
        assert (response.status_code, failed["error"]["code"]) == (200, "not_finite")
        assert answered["result"]["label"] == "b"
        for path in ("/v1/tasks/huge", "/v1/compare?a=huge&b=mood"):
            assert (await client.get(path)).status_code == 200

    in_site(check)


def scored(site):
    """Let the engine of ``site`` give the scores that it is asked for."""
    answer = site.engine._answer

    def with_scores(one):
        scores = [{"label": str(i), "score": 1 / (i + 1)} for i in range(one.scores)]
        found = answer(one)
        return replace(found, result=found.result | {"scores": scores})

    site.engine._answer = with_scores


def test_more_scores_than_the_limit_are_refused_before_they_are_computed():
    async def check(site, client):
        scored(site)
        many = task_file("many", labels=tuple("abcdefgh"))
        assert (await client.put("/v1/tasks/many", content=many.to_bytes())).status_code == 201
        body = ask(("many", "a"), ("many", "b"), ("mood", "c"), ("nothing", "d"))
        response = await client.post("/v1/predict", json=body)
        error = error_of(response)
        assert (response.status_code, error["code"]) == (422, "too_many_scores")
        assert error["message"].startswith("18 scores would be answered, at most 17 are allowed")
        assert "top_k" in error["message"]
        assert error["details"] == {"limit": 17}
        assert not site.engine.batches
        body["items"][1]["top_k"] = 7
        answers = (await client.post("/v1/predict", json=body)).json()["answers"]
        assert [len(a["result"]["scores"]) for a in answers[:3]] == [8, 7, 2]

    in_site(check, max_scores=17)


def test_a_large_answer_is_the_same_and_keeps_nobody_waiting(monkeypatch):
    threads = set()

    def noted(value):
        threads.add(threading.current_thread())
        return dump(value)

    async def check(site, client):
        scored(site)
        body = ask(("mood", "a \u00e9"), ("nothing", "b"), ("topic", "c"))
        small = await client.post("/v1/predict", json=body)
        assert threads == {threading.main_thread()}
        threads.clear()
        monkeypatch.setattr(app, "LARGE", 4)
        large = await client.post("/v1/predict", json=body)
        assert threads
        assert threading.main_thread() not in threads
        assert large.headers["content-type"] == small.headers["content-type"]
        assert large.json() | {"ms": 0} == small.json() | {"ms": 0}

    monkeypatch.setattr(app, "dump", noted)
    in_site(check)


@pytest.mark.parametrize(
    ("key", "method", "path", "status"),
    [
        (None, "POST", "/v1/predict", 401),
        (PREDICT, "PUT", "/v1/tasks/mood", 403),
        (MANAGE, "POST", "/nowhere", 404),
    ],
)
def test_an_error_before_the_body_was_read_ends_the_connection(key, method, path, status):
    async def check(site, _):
        async with site.client(key) as client:
            response = await client.request(method, path, content=b" " * 100)
            assert (response.status_code, response.headers["connection"]) == (status, "close")
            response = await client.request(method, path)
            assert "connection" not in response.headers

    in_site(check, KEYS)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "bad_json"),
        (b"{", 400, "bad_json"),
        (b'{"items": [{"task": "a", "text": "\\ud800"}]}', 400, "bad_json"),
        (b"[" * 100_000, 400, "bad_json"),
        (b"[]", 422, "bad_input"),
        (b"{}", 422, "bad_input"),
        (b'{"items": []}', 422, "bad_input"),
        (b'{"items": [{"task": "mood"}]}', 422, "bad_input"),
        (b'{"items": [{"task": "mood", "text": 3}]}', 422, "bad_input"),
        (b'{"items": [{"task": "mood", "text": "a", "top_k": 0}]}', 422, "bad_input"),
        (b'{"items": [{"task": "mood", "text": "a", "min_confidence": 2}]}', 422, "bad_input"),
        (b'{"items": [{"task": "mood", "text": "a", "txet": "b"}]}', 422, "bad_input"),
        (b'{"items": [{"task": "mood", "text": "a"}], "deadline_ms": 0}', 422, "bad_input"),
        (b'{"items": [{"task": "mood", "text": "a"}], "deadline_ms": 1e999}', 422, "bad_input"),
    ],
)
def test_what_is_no_request_is_refused_by_field(body, status, code):
    async def check(site, client):
        response = await client.post("/v1/predict", content=body)
        assert response.status_code == status
        error = error_of(response)
        assert error["code"] == code
        if status == 422:
            assert error["details"]["fields"]

    in_site(check)


@pytest.mark.parametrize("body", [b"[]", b"3", b'"items"', b"null"])
def test_a_body_that_is_no_object_is_told_what_one_looks_like(body):
    async def check(site, client):
        error = error_of(await client.post("/v1/predict", content=body))
        assert error["message"].startswith('body: expected a JSON object such as {"items": [{')
        assert [entry["field"] for entry in error["details"]["fields"]] == ["body"]

    in_site(check)


def test_limits_hold_before_anything_is_computed():
    async def check(site, client):
        response = await client.post("/v1/predict", json=ask(*[("mood", "a")] * 5))
        assert (response.status_code, error_of(response)["code"]) == (413, "too_many_items")
        response = await client.post("/v1/predict", content=b" " * 2000)
        assert (response.status_code, error_of(response)["code"]) == (413, "too_large")

        async def chunks():  # no Content-Length
            for _ in range(100):
                read.append(1)
                yield b" " * 100

        read = []
        response = await client.post("/v1/predict", content=chunks())
        assert response.status_code == 413
        assert len(read) < 15
        assert not site.engine.batches

    in_site(check, max_items=4, max_body_bytes=1000)


def test_a_length_that_is_too_large_is_refused_before_a_byte_is_read():
    async def check(site, client):
        sent = []

        async def receive():
            pytest.fail("the body was read")

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http", "method": "PUT", "path": "/v1/tasks/x", "raw_path": b"/v1/tasks/x",
            "query_string": b"", "http_version": "1.1", "scheme": "http", "root_path": "",
            "headers": [(b"host", b"localhost"), (b"content-length", b"67108865")],
        }  # fmt: skip
        await site.app(scope, receive, send)
        assert sent[0]["status"] == 413

    in_site(check)


class Slow:
    """Bodies of which a byte comes, and no more until ``rest`` is set."""

    def __init__(self):
        self.begun, self.rest = 0, asyncio.Event()

    async def body(self):
        yield b"{"
        self.begun += 1  # more is asked for: what came is held
        await self.rest.wait()


def test_too_many_bodies_at_once_are_refused():
    async def check(site, client):
        slow = Slow()
        first = asyncio.create_task(client.post("/v1/predict", content=slow.body()))
        # All of what may be held together is taken by a length that was only announced.
        big = {"Content-Length": "600"}
        held = asyncio.create_task(client.post("/v1/predict", content=slow.body(), headers=big))
        await until(lambda: slow.begun == 2)
        response = await client.post("/v1/predict", content=b" " * 500)
        assert (response.status_code, error_of(response)["code"]) == (503, "busy")
        assert response.headers["retry-after"] == "1"
        slow.rest.set()
        for task in (first, held):
            response = await task
            assert (response.status_code, error_of(response)["code"]) == (400, "bad_json")
        response = await client.post("/v1/predict", content=b" " * 1000)
        assert response.status_code == 400  # there is room again

    in_site(
        check, max_body_bytes=1000, max_held_bytes=1000, max_upload_bytes=1000,
        body_seconds=PATIENCE,
    )  # fmt: skip


def test_bodies_that_come_too_slowly_are_refused():
    async def check(site, client):
        slow, big = Slow(), {"Content-Length": "600"}
        for headers in ({}, big):
            response = await client.post("/v1/predict", content=slow.body(), headers=headers)
            assert (response.status_code, error_of(response)["code"]) == (408, "too_slow")
        response = await client.post("/v1/predict", content=b" " * 1000)
        assert response.status_code == 400  # nothing of them is held any more
        response = await client.post("/v1/predict", json=ask(("mood", "a")))
        assert response.status_code == 200

    in_site(
        check, max_body_bytes=1000, max_held_bytes=1000, max_upload_bytes=1000, body_seconds=0.3
    )


def test_a_body_is_held_once():
    size = 4 << 20

    async def check(site, client):
        held = []

        async def put(name, data, **_):
            held.append(tracemalloc.get_traced_memory()[0] - before)
            raise bitfit.BitfitError("only looked")

        site.service.put = put

        async def chunks():
            for _ in range(64):
                yield b" " * (size // 64)

        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            await client.put("/v1/tasks/x", content=chunks())
        finally:
            tracemalloc.stop()
        assert size <= held[0] < 1.5 * size

    in_site(check)


# --- queue, deadlines, clients that leave ---------------------------------------------------------


def test_a_full_queue_answers_429_with_a_time_to_come_back():
    async def check(site, client):
        site.engine.gate.clear()
        waiting = [
            asyncio.create_task(client.post("/v1/predict", json=ask(("mood", "a"))))
            for _ in range(4)
        ]
        await until(lambda: site.service.queue.items == 4)
        response = await client.post("/v1/predict", json=ask(("mood", "b")))
        assert response.status_code == 429
        assert error_of(response)["code"] == "queue_full"
        assert int(response.headers["retry-after"]) >= 1
        site.engine.gate.set()
        assert [r.status_code for r in await asyncio.gather(*waiting)] == [200] * 4

    in_site(check, max_queue_items=4, max_items=2)


def test_a_deadline_that_passes_is_504_and_what_waits_is_not_computed():
    async def check(site, client):
        site.engine.gate.clear()
        first = asyncio.create_task(client.post("/v1/predict", json=ask(("mood", "first"))))
        await until(lambda: site.engine.begun)
        response = await client.post("/v1/predict", json=ask(("mood", "late"), deadline_ms=200))
        assert response.status_code == 504
        error = error_of(response)
        assert error["code"] == "deadline"
        assert error["message"] == (
            "it was not answered by its deadline of 200 ms: send fewer items in a request, or "
            "allow more time with deadline_ms (at most 60000, the server's --deadline-ms)"
        )
        site.engine.gate.set()
        await first
        assert site.engine.batches == [["first"]]
        assert site.service.queue.items == 0

    in_site(check)


def test_a_wait_that_is_longer_than_a_short_deadline_is_told_in_ms():
    async def check(site, client):
        queue = site.service.queue
        queue.tokens, queue._speed = 2830, 100.0
        response = await client.post("/v1/predict", json=ask(("mood", "late"), deadline_ms=50))
        queue.tokens = 0
        assert response.status_code == 429
        told = r"it would wait about 28\.3 s, \d\d ms are allowed; try again in 29 s"
        assert re.fullmatch(told, error_of(response)["message"])

    in_site(check)


def test_a_client_that_goes_away_is_not_computed_for():
    async def check(site, client):
        site.engine.gate.clear()
        first = asyncio.create_task(client.post("/v1/predict", json=ask(("mood", "first"))))
        await until(lambda: site.engine.begun)
        body = json.dumps(ask(("mood", "gone"))).encode()
        events = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]
        sent = []

        async def receive():
            await asyncio.sleep(0.02)
            return events.pop(0)

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/v1/predict", "raw_path": b"/v1/predict",
            "query_string": b"", "http_version": "1.1", "scheme": "http", "root_path": "",
            "headers": [(b"host", b"localhost")],
        }  # fmt: skip
        await site.app(scope, receive, send)
        assert sent[0]["status"] == 499
        site.engine.gate.set()
        assert (await first).status_code == 200
        assert site.engine.batches == [["first"]]

    in_site(check)


def read_slowly(site):
    """Let the thread that reads texts wait for a gate; what it was asked, call by call."""
    prepare, asked, gate = site.engine.prepare, [], threading.Event()

    def slow(items):
        asked.append([item.text for item in items])
        assert gate.wait(PATIENCE)
        return prepare(items)

    site.engine.prepare = slow
    return asked, gate


@pytest.mark.parametrize("ends_by", ["deadline", "client"])
def test_texts_that_nobody_waits_for_are_neither_read_nor_kept(ends_by):
    async def check(site, client):
        asked, gate = read_slowly(site)
        first = asyncio.create_task(client.post("/v1/predict", json=ask(("mood", "first"))))
        await until(lambda: asked)
        item = Item("mood", "given up")
        kept = weakref.ref(item)
        deadline = 10 if ends_by == "deadline" else None
        work = asyncio.create_task(site.service.predict([item], deadline_ms=deadline))
        del item
        await until(lambda: site.service.queue.items == 2)
        if ends_by == "client":
            work.cancel()
        await asyncio.wait({work})
        assert work.cancelled() if ends_by == "client" else work.exception().status == 504
        del work
        gc.collect()
        assert kept() is None
        gate.set()
        assert (await first).status_code == 200
        assert (await client.post("/v1/predict", json=ask(("mood", "last")))).status_code == 200
        assert asked == [["first"], ["last"]]

    in_site(check)


def test_texts_of_others_are_read_between_the_parts_of_a_long_request(monkeypatch):
    monkeypatch.setattr("bitfit.serve.engine.PART_CHARS", 10)

    async def check(site, client):
        asked, gate = read_slowly(site)
        long = ask(*(("mood", f"long text {n}") for n in range(3)))
        first = asyncio.create_task(client.post("/v1/predict", json=long))
        await until(lambda: asked)
        second = asyncio.create_task(client.post("/v1/predict", json=ask(("mood", "short"))))
        await until(lambda: site.service.queue.items == 4)
        gate.set()
        assert [(await answer).status_code for answer in (first, second)] == [200, 200]
        answers = first.result().json()["answers"]
        assert [a["result"]["label"] for a in answers] == [f"long text {n}" for n in range(3)]
        assert asked[:2] == [["long text 0"], ["short"]]
        assert asked[2:] == [["long text 1"], ["long text 2"]]

    in_site(check)


def test_what_was_read_of_a_request_is_given_back_where_the_rest_fails(monkeypatch):
    monkeypatch.setattr("bitfit.serve.engine.PART_CHARS", 10)

    async def check(site, client):
        prepare = site.engine.prepare

        def fail(items):
            if items[0].text == "second text":
                raise RuntimeError("no")
            return prepare(items)

        site.engine.prepare = fail
        response = await client.post(
            "/v1/predict", json=ask(("mood", "first text"), ("mood", "second text"))
        )
        assert response.status_code == 500
        assert not site.service.shelf.leases

    in_site(check)


def test_a_broken_engine_is_500_in_the_same_shape_and_tells_nothing():
    async def check(site, client):
        site.engine.fail = True
        response = await client.post("/v1/predict", json=ask(("mood", "a")))
        assert response.status_code == 500
        error = error_of(response)
        assert error["code"] == "internal"
        assert "broke" not in error["message"]
        assert error["details"]["id"] == response.headers["x-request-id"]
        site.engine.fail = False
        assert (await client.post("/v1/predict", json=ask(("mood", "a")))).status_code == 200

    in_site(check)


def test_a_server_that_stops_answers_what_it_has_accepted():
    async def main():
        async with open_site() as site, site.client() as client:
            site.engine.gate.clear()
            accepted = [
                asyncio.create_task(client.post("/v1/predict", json=ask(("mood", str(i)))))
                for i in range(8)
            ]
            await until(lambda: site.service.queue.items == 8)
            stopping = asyncio.create_task(site.service.stop())
            await until(lambda: not site.service.ready)
            assert (await client.get("/readyz")).status_code == 503
            assert (await client.get("/healthz")).status_code == 200
            response = await client.post("/v1/predict", json=ask(("mood", "new")))
            assert (response.status_code, error_of(response)["code"]) == (503, "closing")
            assert "retry-after" in response.headers
            site.engine.gate.set()
            await stopping
            found = [
                r.json()["answers"][0]["result"]["label"] for r in await asyncio.gather(*accepted)
            ]
            assert found == [str(i) for i in range(8)]

    asyncio.run(main())


def test_more_than_can_be_computed_is_refused_in_part_and_the_rest_is_answered():
    async def check(site, client):
        answered = refused = most = 0

        async def one(i):
            nonlocal answered, refused, most
            # 100 a second; the engine does 12, so that a machine that sends far fewer of them
            # still sends too many.
            await asyncio.sleep(i * 0.01)
            response = await client.post("/v1/predict", json=ask(("mood", "a b")))
            most = max(most, site.service.queue.items)
            assert response.status_code in (200, 429)  # and never 504: late
            answered += response.status_code == 200
            refused += response.status_code == 429

        await asyncio.gather(*map(one, range(200)))
        # Exact bounds are those of the queue's own tests, whose clock no other program slows.
        assert refused > 30
        assert answered > 10
        assert most <= 20

    in_site(check, seconds=0.02, max_tokens=16, max_delay_ms=200, max_queue_items=20, max_items=8)


# --- tasks ----------------------------------------------------------------------------------------


def test_tasks_are_listed_by_name_searched_and_paged():
    async def check(site, client):
        found = (await client.get("/v1/tasks", params={"limit": 2, "offset": 1})).json()
        assert [t["name"] for t in found["tasks"]] == ["b", "c-x"]
        assert found["total"] == 5
        found = (await client.get("/v1/tasks", params={"query": "C-x CLASSIF"})).json()
        assert [t["name"] for t in found["tasks"]] == ["c-x"]
        first = found["tasks"][0]
        assert (first["score"], first["version"], first["labels"]) == (0.872, 1, ["bad", "good"])

    in_site(check, tasks=("e", "d", "c-x", "b", "a"))


def test_a_task_shows_what_its_file_says():
    async def check(site, client):
        found = (await client.get("/v1/tasks/mood")).json()
        assert found["scores"] == {"accuracy": 0.872, "f1_macro": None}
        assert found["recipe"]["epochs"] == 3
        assert found["change"][0].keys() == {"term", "symbol", "layer", "mean_abs"}
        assert found["change"][0]["symbol"] == "b_q"
        response = await client.get("/v1/tasks/nothing")
        assert (response.status_code, error_of(response)["code"]) == (404, "unknown_task")
        rows = (await client.get("/v1/compare", params={"a": "mood", "b": "topic"})).json()["rows"]
        assert rows[0]["cosine"] == pytest.approx(1)
        assert (await client.get("/v1/compare", params={"a": "mood"})).status_code == 422

    in_site(check)


def test_a_task_is_uploaded_replaced_rolled_back_downloaded_and_removed():
    async def check(site, client):
        first, second = task_file().to_bytes(), task_file(licence="other").to_bytes()
        response = await client.put("/v1/tasks/new.task", content=first)
        assert response.status_code == 201
        assert response.json()["version"] == 1
        response = await client.put("/v1/tasks/new.task?pinned=true", content=second)
        assert response.status_code == 200
        assert (response.json()["version"], response.json()["pinned"]) == (2, True)
        assert (await client.get("/v1/tasks/new.task/file")).content == second
        response = await client.post("/v1/tasks/new.task/rollback")
        assert response.json()["version"] == 3
        assert (await client.get("/v1/tasks/new.task/file")).content == first
        response = await client.post("/v1/predict", json=ask(("new.task", "a")))
        assert response.json()["answers"][0]["version"] == 3
        assert (await client.delete("/v1/tasks/new.task")).status_code == 204
        assert (await client.delete("/v1/tasks/new.task")).status_code == 404
        response = await client.post("/v1/tasks/mood/rollback")
        assert (response.status_code, error_of(response)["code"]) == (409, "no_version_before")

    in_site(check)


@pytest.mark.parametrize(
    "name", ["..", ".hidden", "-x", "a/b", "a%2Fb", "%2e%2e%2fetc", "a b", "ä", "a" * 101, "a%00"]
)
def test_a_name_that_is_none_is_refused(name, tmp_path):
    async def check(site, client):
        response = await client.put(f"/v1/tasks/{name}", content=GOOD)
        assert response.status_code in (404, 405, 422)
        error_of(response)
        assert {info.name for info in site.shelf.infos()} == {"mood", "topic"}
        assert [p.name for p in tmp_path.iterdir()] == []

    in_site(check, uploads=Uploads(tmp_path), tasks=("mood", "topic"))


@pytest.mark.parametrize("name", ["ünï", ".hid", "a" * 101, "a b"])
def test_a_name_that_is_none_is_told_what_a_name_is(name, tmp_path):
    async def check(site, client):
        response = await client.put(f"/v1/tasks/{name}", content=GOOD)
        error = error_of(response)
        assert (response.status_code, error["code"]) == (422, "bad_input")
        assert error["message"] == (
            f"{name!r} is no name of a task: a task's name has letters, digits, '_', '.' and '-', "
            "at most 100 of them, and begins with a letter or digit"
        )
        assert [entry["field"] for entry in error["details"]["fields"]] == ["path.name"]
        assert "String should match" not in response.text

    in_site(check, uploads=Uploads(tmp_path))


def test_the_name_of_a_file_is_told_the_name_of_its_task(tmp_path):
    """``curl -T FILE ADDRESS/v1/tasks/`` adds the file's name to the address."""

    async def check(site, client):
        path = "/v1/tasks/intent.bitfit.safetensors"
        response = await client.put(path, content=GOOD)
        error = error_of(response)
        assert (response.status_code, error["code"]) == (422, "bad_input")
        assert "'intent.bitfit.safetensors' is the name of a file" in error["message"]
        told = error["message"].rpartition(" ")[2]
        assert told == "/v1/tasks/intent"
        assert (await client.put(told, content=GOOD)).json()["name"] == "intent"
        assert (await client.get(path)).status_code == 404
        longest = "a" * 100 + ".bitfit.safetensors"
        response = await client.put(f"/v1/tasks/{longest}", content=GOOD)
        assert error_of(response)["message"].endswith("/v1/tasks/" + "a" * 100)
        response = await client.put("/v1/tasks/.bitfit.safetensors", content=GOOD)
        assert "is no name of a task" in error_of(response)["message"]

    in_site(check, uploads=Uploads(tmp_path))


def test_what_is_known_of_a_task_is_what_the_description_says():
    async def check(site, client):
        schema = (await client.get("/openapi.json")).json()["components"]["schemas"]
        found = (await client.get("/v1/tasks")).json()["tasks"][0]
        assert found.keys() == schema["TaskOut"]["properties"].keys()
        assert "created" not in found

    in_site(check)


HOSTILE = {
    "empty": (b"", "bad_file"),
    "cut short": (GOOD[:-1], "bad_file"),
    "too long": (GOOD + b"\0", "bad_file"),
    "a bit flipped": (GOOD[:-5] + bytes([GOOD[-5] ^ 1]) + GOOD[-4:], "bad_file"),
    "a huge header": (b"\xff" * 8 + GOOD[8:], "bad_file"),
    "a pickle": (b"\x80\x04cos\nsystem\n.", "bad_file"),
    "a zip": (b"PK\x03\x04" + bytes(100), "bad_file"),
    "a web page": (b"<html>", "bad_file"),
    "a field too many": (forge({"extra": 1}), "bad_file"),
    "no layout": (forge({"layout": [["query", "0-999," * 4000, 8]]}), "bad_file"),
    "a number too large": (forge({"temperature": 10**400}), "bad_file"),
    "a newer format": (forge({"format": 2}), "unsupported_format"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_uploads_are_refused_by_name_and_leave_nothing(what, tmp_path):
    data, code = HOSTILE[what]

    async def check(site, client):
        response = await client.put("/v1/tasks/evil", content=data)
        assert response.status_code == 422
        assert error_of(response)["code"] == code
        assert {info.name for info in site.shelf.infos()} == {"mood", "topic"}
        assert not list(tmp_path.rglob("*.safetensors"))

    in_site(check, uploads=Uploads(tmp_path))


def test_any_flipped_bit_of_an_upload_is_refused():
    async def check(site, client):
        for bit in range(0, len(GOOD) * 8, len(GOOD) * 8 // 40):
            data = bytearray(GOOD)
            data[bit // 8] ^= 1 << bit % 8
            response = await client.put("/v1/tasks/evil", content=bytes(data))
            assert response.status_code == 422

    in_site(check)


def test_what_batches_freed_is_given_back_between_them_and_not_at_rest(monkeypatch):
    from bitfit.serve import service

    threads = []
    monkeypatch.setattr(service, "TRIM_SECONDS", 0.02)
    monkeypatch.setattr(service, "trim", lambda: threads.append(threading.current_thread().name))

    async def check(site, client):
        await asyncio.sleep(0.1)
        assert threads == []
        for count in (1, 2):
            assert (await client.post("/v1/predict", json=ask(("mood", "hi")))).status_code == 200
            await until(lambda count=count: len(threads) >= count)
            await asyncio.sleep(0.1)
            assert len(threads) == count
        assert {name.rpartition("_")[0] for name in threads} == {"bitfit-engine"}

    in_site(check)


def test_memory_that_was_freed_is_given_back():
    from bitfit.bench.memory import resident_bytes
    from bitfit.freed import trim

    # Written to: pages of zeros that nobody touched are not in memory.
    blocks = [b"x" * 100_000 for _ in range(1000)]
    last = blocks.pop()  # above them in the heap: without it the system would have them back
    del blocks
    before = resident_bytes()
    trim()  # wherever it runs
    if platform.libc_ver()[0] == "glibc":
        assert before - resident_bytes() > 50_000_000
    assert len(last) == 100_000


def test_the_file_of_a_task_goes_when_nobody_can_ask_the_task_any_more(tmp_path, monkeypatch):
    uploads, there = Uploads(tmp_path), []

    async def check(site, client):
        forget = uploads.forget
        monkeypatch.setattr(
            uploads, "forget", lambda digest: (there.append("new" in site.shelf), forget(digest))
        )
        assert (await client.put("/v1/tasks/new", content=GOOD)).status_code == 201
        assert (await client.delete("/v1/tasks/new")).status_code == 204
        assert not list(tmp_path.rglob("*.safetensors"))

    in_site(check, uploads=uploads)
    assert there == [False]


def test_a_file_of_another_base_is_409_and_is_not_kept(tmp_path):
    other = task_file(base=BaseIdentity("other", None, "a" * 64, "d" * 64, "0123abcd"))

    async def check(site, client):
        response = await client.put("/v1/tasks/new", content=other.to_bytes())
        assert (response.status_code, error_of(response)["code"]) == (409, "wrong_base")
        assert not list(tmp_path.rglob("*.safetensors"))

    in_site(check, uploads=Uploads(tmp_path))


# --- what is kept ---------------------------------------------------------------------------------


def restarted(folder, check, **options):
    """Run ``check`` on a server whose tasks are all from ``folder``."""
    return in_site(check, tasks=(), uploads=Uploads(folder), folder=str(folder), **options)


def test_uploads_outlast_a_restart_with_their_versions(tmp_path):
    first, second = task_file().to_bytes(), task_file(licence="other").to_bytes()

    async def fill(site, client):
        for data in (first, second):
            await client.put("/v1/tasks/kept", content=data)
        await client.put("/v1/tasks/gone", content=first)
        await client.delete("/v1/tasks/gone")

    async def look(site, client):
        tasks = (await client.get("/v1/tasks")).json()["tasks"]
        assert [(t["name"], t["version"]) for t in tasks] == [("kept", 2)]
        assert (await client.get("/v1/tasks/kept/file")).content == second
        assert (await client.post("/v1/tasks/kept/rollback")).status_code == 200
        assert (await client.get("/v1/tasks/kept/file")).content == first
        assert (await client.put("/v1/tasks/gone", content=first)).json()["version"] == 2

    async def look_again(site, client):
        assert (await client.get("/v1/tasks/kept/file")).content == first

    restarted(tmp_path, fill)
    restarted(tmp_path, look)
    restarted(tmp_path, look_again)
    names = {p.name for p in (tmp_path / ".uploads").glob("*.safetensors")}
    assert all(re.fullmatch(r"[0-9a-f]{64}\.bitfit\.safetensors", name) for name in names)
    assert len(names) == 2


def test_an_upload_stands_until_the_folder_has_something_newer(tmp_path):
    task_file().save(tmp_path / "mood.bitfit.safetensors")
    upload = task_file(licence="upload").to_bytes()

    async def replace_it(site, client):
        await client.put("/v1/tasks/mood", content=upload)

    def expect(data):
        async def check(site, client):
            assert (await client.get("/v1/tasks/mood/file")).content == data

        return check

    restarted(tmp_path, replace_it)
    restarted(tmp_path, expect(upload))
    task_file(licence="newer").save(tmp_path / "mood.bitfit.safetensors")
    restarted(tmp_path, expect(task_file(licence="newer").to_bytes()))


def test_a_removed_task_stays_removed_until_its_file_changes(tmp_path):
    task_file().save(tmp_path / "mood.bitfit.safetensors")

    async def remove(site, client):
        assert (await client.delete("/v1/tasks/mood")).status_code == 204

    async def is_gone(site, client):
        assert (await client.get("/v1/tasks/mood")).status_code == 404

    async def is_back(site, client):
        assert (await client.get("/v1/tasks/mood")).status_code == 200

    restarted(tmp_path, remove)
    restarted(tmp_path, is_gone)
    task_file(licence="newer").save(tmp_path / "mood.bitfit.safetensors")
    restarted(tmp_path, is_back)


def test_servers_that_share_a_folder_take_over_what_the_others_were_sent(tmp_path):
    first, second = task_file().to_bytes(), task_file(licence="other").to_bytes()

    async def eventually(client, wanted):
        async with asyncio.timeout(PATIENCE):
            while True:
                response = await client.get("/v1/tasks/new/file")
                if (response.content if response.status_code == 200 else None) == wanted:
                    return
                await asyncio.sleep(0.01)

    async def main():
        options = {"tasks": (), "folder": str(tmp_path), "watch_seconds": 0.02}
        async with (
            open_site(uploads=Uploads(tmp_path), **options) as a,
            open_site(uploads=Uploads(tmp_path), **options) as b,
            a.client() as here,
            b.client() as there,
        ):
            await here.put("/v1/tasks/new", content=first)
            await eventually(there, first)
            await there.put("/v1/tasks/new", content=second)
            await eventually(here, second)
            await here.post("/v1/tasks/new/rollback")
            await eventually(there, first)
            await there.delete("/v1/tasks/new")
            await eventually(here, None)

    asyncio.run(main())


def test_a_damaged_list_of_uploads_is_an_error_and_never_ignored(tmp_path):
    (tmp_path / ".uploads").mkdir()
    for text in (
        "{",
        '{"format": 2, "tasks": {}}',
        '{"format": 1, "tasks": {"a": {"files": ["x"]}}}',
    ):
        (tmp_path / ".uploads" / "tasks.json").write_text(text, encoding="utf-8")
        with pytest.raises(bitfit.BitfitError, match=r"tasks\.json: .*restore it"):
            Uploads(tmp_path).entries()


def test_what_cannot_be_kept_is_not_served(tmp_path, monkeypatch):
    async def check(site, client):
        def fail(*_, **__):
            raise bitfit.BitfitError("no space left")

        monkeypatch.setattr(site.service.changes.uploads, "record", fail)
        response = await client.put("/v1/tasks/new", content=GOOD)
        assert response.status_code == 500
        assert "new" not in site.shelf.versions
        assert not list(tmp_path.rglob("*.safetensors"))

    in_site(check, uploads=Uploads(tmp_path))


def test_a_replacement_that_cannot_be_kept_leaves_the_version_before_and_no_file(
    tmp_path, monkeypatch
):
    other = task_file("new", labels=("no", "yes")).to_bytes()

    async def check(site, client):
        def fail(*_, **__):
            raise bitfit.BitfitError("no space left")

        before = (await client.put("/v1/tasks/new", content=GOOD)).json()
        files = set(tmp_path.rglob("*.safetensors"))
        with monkeypatch.context() as full:
            full.setattr(site.service.changes.uploads, "record", fail)
            for content in (other, GOOD):  # what is kept already stays
                assert (await client.put("/v1/tasks/new", content=content)).status_code == 500
                assert site.shelf.info("new").fingerprint == before["fingerprint"]
                assert set(tmp_path.rglob("*.safetensors")) == files
        # What was refused cannot come back.
        assert (await client.post("/v1/tasks/new/rollback")).status_code == 409

    in_site(check, uploads=Uploads(tmp_path))


def test_a_file_that_the_list_has_stays_though_its_recording_was_told_to_fail(
    tmp_path, monkeypatch
):
    async def check(site, client):
        def fail(path, data):
            atomic_write(path, data)
            if path.name == "tasks.json":
                raise bitfit.BitfitError("the folder cannot be synced")

        monkeypatch.setattr(uploads, "atomic_write", fail)
        assert (await client.put("/v1/tasks/new", content=GOOD)).status_code == 500
        ((digest,),) = [entry.files for entry in Uploads(tmp_path).entries().values()]
        assert Uploads(tmp_path).path(digest).exists()

    in_site(check, uploads=Uploads(tmp_path))


def test_a_rollback_that_cannot_be_kept_is_undone(tmp_path, monkeypatch):
    async def check(site, client):
        def fail(*_, **__):
            raise bitfit.BitfitError("no space left")

        for file in (GOOD, task_file("new", labels=("no", "yes")).to_bytes()):
            now = (await client.put("/v1/tasks/new", content=file)).json()
        monkeypatch.setattr(site.service.changes.uploads, "record", fail)
        files = set(tmp_path.rglob("*.safetensors"))
        assert (await client.post("/v1/tasks/new/rollback")).status_code == 500
        assert site.shelf.info("new").fingerprint == now["fingerprint"]
        assert set(tmp_path.rglob("*.safetensors")) == files

    in_site(check, uploads=Uploads(tmp_path))


def test_what_is_no_bug_is_not_called_one_and_the_log_says_what_it_is(
    tmp_path, monkeypatch, log_lines
):
    async def check(site, client):
        def fail(*_, **__):
            raise bitfit.BitfitError("/secret/place: no space left")

        monkeypatch.setattr(site.service.changes.uploads, "record", fail)
        response = await client.put("/v1/tasks/new", content=GOOD)
        error = error_of(response)
        assert (response.status_code, error["code"]) == (500, "failed")
        assert "bug" not in error["message"]
        assert "secret" not in response.text
        line = next(line for line in log_lines() if line["event"] == "failed")
        assert (line["message"], line["id"]) == (
            "/secret/place: no space left", error["details"]["id"],
        )  # fmt: skip

    in_site(check, uploads=Uploads(tmp_path))


# --- keys -----------------------------------------------------------------------------------------

ROUTES = [
    ("POST", "/v1/predict", "predict"), ("GET", "/v1/tasks", "predict"),
    ("GET", "/v1/tasks/mood", "predict"), ("GET", "/v1/compare?a=mood&b=topic", "predict"),
    ("GET", "/v1/stats", "predict"), ("GET", "/metrics", "predict"),
    ("GET", "/v1/tasks/mood/file", "manage"), ("PUT", "/v1/tasks/new", "manage"),
    ("POST", "/v1/tasks/mood/rollback", "manage"), ("DELETE", "/v1/tasks/mood", "manage"),
    ("GET", "/healthz", None), ("GET", "/readyz", None), ("GET", "/", None),
    ("GET", "/openapi.json", None),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "role"), ROUTES)
def test_every_route_wants_its_role(method, path, role):
    async def check(site, client):
        content = json.dumps(ask(("mood", "a"))).encode() if method == "POST" else GOOD
        content = content if method in ("POST", "PUT") else None
        for key, allowed in ((None, role is None), ("wrong-key-0123456789", role is None),
                             (PREDICT, role != "manage"), (MANAGE, True)):  # fmt: skip
            headers = {"Authorization": f"Bearer {key}"} if key else {"Authorization": ""}
            response = await client.request(method, path, content=content, headers=headers)
            if allowed:
                assert response.status_code in (200, 201, 204, 409)
            else:
                status = 403 if key == PREDICT else 401
                assert response.status_code == status
                assert error_of(response)["code"] == {401: "unauthorized", 403: "forbidden"}[status]
                assert ("www-authenticate" in response.headers) == (status == 401)

    in_site(check, KEYS)


def test_keys_are_read_from_a_file_or_the_environment_and_never_shown(tmp_path, monkeypatch):
    path = tmp_path / "keys"
    hashed = "a" * 64
    path.write_text(f"# ours\npredict:{PREDICT}\nmanage:sha256:{hashed}  # theirs\n")
    keys = Keys.load(path)
    assert len(keys) == 2
    assert PREDICT not in repr(vars(keys))
    monkeypatch.setenv("BITFIT_API_KEYS", f"manage:{MANAGE},predict:{PREDICT}")
    assert len(Keys.load()) == 2
    monkeypatch.delenv("BITFIT_API_KEYS")
    assert len(Keys.load()) == 0
    secret = "secret-0123456789abcdef"
    for text, message in [
        (f"admin:{secret}", "keys:1: expected ROLE:KEY"),
        (secret, "expected ROLE:KEY"),
        ("predict:short", "the key has 5 characters, expected 16"),
        ("# nothing", "no key in it"),
        (f"predict:{secret}é", "keys:1: the key is not ASCII"),
    ]:
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UsageError, match=message) as refused:
            Keys.load(path)
        assert secret not in str(refused.value)
        assert "short" not in str(refused.value)
    with pytest.raises(UsageError, match="cannot be read"):
        Keys.load(tmp_path / "none")


def test_without_keys_only_this_machine_is_served():
    for host in ("127.0.0.1", "localhost", "::1", "127.3.2.1"):
        check_bind(ServeConfig(host=host), Keys())
    for host in ("0.0.0.0", "::", "192.168.1.7", "example.com"):
        with pytest.raises(UsageError, match="--insecure"):
            check_bind(ServeConfig(host=host), Keys())
        check_bind(ServeConfig(host=host), KEYS)
        check_bind(ServeConfig(host=host, insecure=True), Keys())


def test_without_keys_pages_of_other_sites_are_kept_out():
    async def main():
        async with open_site() as site:
            async with site.client(host="evil.example") as client:  # its name was bent to us
                response = await client.get("/v1/tasks")
                assert (response.status_code, error_of(response)["code"]) == (403, "wrong_host")
            async with site.client() as client:
                for origin in ("https://evil.example", "null", "http://127.0.0.1:9999"):
                    response = await client.post(
                        "/v1/tasks/mood/rollback", headers={"Origin": origin}
                    )
                    assert response.status_code == 403
                    assert error_of(response)["code"] == "cross_origin"
                own = {"Origin": "http://127.0.0.1:8000"}
                response = await client.post("/v1/predict", json=ask(("mood", "a")), headers=own)
                assert response.status_code == 200
        async with open_site(KEYS) as site, site.client(MANAGE, host="tasks.example") as client:
            assert (await client.get("/v1/tasks")).status_code == 200

    asyncio.run(main())


# --- page, metrics, log ---------------------------------------------------------------------------


def test_the_page_and_its_files_come_from_the_package_under_a_strict_policy():
    async def check(site, client):
        response = await client.get("/")
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        for name, asset in read_assets().items():
            found = await client.get(f"/page/{name}")
            assert (found.content, found.headers["etag"]) == (asset.data, asset.tag)
        again = await client.get("/", headers={"If-None-Match": response.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        for path in ("/page/../app.py", "/page/%2e%2e%2fapp.py", "/page/none.js", "/page/"):
            assert (await client.get(path)).status_code == 404
        for path in ("/", "/v1/tasks", "/nothing"):
            headers = (await client.get(path)).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["x-frame-options"] == "DENY"
            assert "server" not in headers

    in_site(check)


def test_the_page_loads_nothing_from_elsewhere():
    for name, asset in read_assets().items():
        if name.endswith((".html", ".css", ".js")):
            text = asset.data.decode()
            assert not re.search(r"""(src|href)=["']?(https?:)?//""", text), name
            assert "@import" not in text
            assert not re.search(r"<(script|style)>|\son\w+=|\sstyle=", text), name


def test_errors_of_routing_have_the_same_shape():
    async def check(site, client):
        for method, path, status, code in [
            ("GET", "/nothing", 404, "not_found"),
            ("GET", "/v1/predict", 405, "method_not_allowed"),
            ("PATCH", "/v1/tasks/mood", 405, "method_not_allowed"),
            ("GET", "/v1/tasks?limit=0", 422, "bad_input"),
            ("GET", "/v1/tasks?offset=x", 422, "bad_input"),
        ]:
            response = await client.request(method, path)
            assert (response.status_code, error_of(response)["code"]) == (status, code)

    in_site(check)


def test_errors_of_routing_say_where_what_is_and_which_methods_a_path_takes():
    async def check(site, client):
        for method, path, allowed in [
            ("GET", "/v1/predict", "POST"),
            ("PATCH", "/v1/tasks/mood", "DELETE, GET, PUT"),
            ("DELETE", "/", "GET, HEAD"),
        ]:
            response = await client.request(method, path)
            assert response.headers["allow"] == allowed
            assert error_of(response)["message"] == f"{path} takes {allowed}; {method} was sent"
        for path in ("/nothing", "/v1/tasks/", "/docs"):
            message = error_of(await client.get(path))["message"]
            assert message.startswith(f"there is nothing at {path}: tasks are at /v1/tasks")
            assert "/openapi.json" in message
        assert len((await client.get("/" + "x" * 9000)).content) < 500
        message = error_of(await client.get("/page/none.js"))["message"]
        assert message == "the page has no file none.js"

    in_site(check)


def test_metrics_count_requests_items_and_batches():
    async def check(site, client):
        for i in range(3):
            await client.post("/v1/predict", json=ask(("mood", "a"), ("none", str(i))))
        await client.get("/nothing")
        text = (await client.get("/metrics")).text
        assert 'bitfit_items_total{outcome="answered"} 3.0' in text
        assert 'bitfit_items_total{outcome="unknown_task"} 3.0' in text
        assert 'bitfit_task_items_total{task="mood"} 3.0' in text
        assert "none" not in text
        assert 'route="/v1/predict",status="200"} 3.0' in text
        assert 'route="other",status="404"} 1.0' in text
        assert "bitfit_batch_fill_count" in text
        assert "bitfit_tasks 2.0" in text
        stats = (await client.get("/v1/stats")).json()
        assert stats["items"] == 6
        assert stats["tasks"] == stats["resident"] == 2
        assert stats["latency_ms"]["p50"] > 0
        assert stats["queue"] == {"items": 0, "tokens": 0}
        assert stats["base"] == {"name": "tiny"}

    in_site(check)


def test_the_labels_of_tasks_are_bounded():
    metrics = Metrics(task_labels=3)
    for i in range(50):
        metrics.predicted(0.01, [("answered", f"task{i}")])
    text = metrics.render().decode()
    assert text.count("bitfit_task_items_total{") == 4
    assert f'bitfit_task_items_total{{task="{OTHER}"}} 47.0' in text


def test_rates_are_those_of_the_last_seconds():
    now = 100.0
    metrics = Metrics(clock=lambda: now)
    for _ in range(20):
        now += 1
        metrics.predicted(0.5, [("answered", "a")] * 4)
    assert metrics.recent()["items_per_s"] == 4
    now += 1000
    found = metrics.recent()
    assert (found["items_per_s"], found["latency_ms"]["p50"], found["items"]) == (0, None, 80)


def test_the_log_has_no_texts_and_no_keys(log_lines):
    async def check(site, client):
        await client.post("/v1/predict", json=ask(("mood", "a private text"), ("x", "another one")))
        await client.post(
            "/v1/predict",
            json=ask(("mood", "third")),
            headers={"Authorization": "Bearer nonsense-nonsense"},
        )
        await client.get("/v1/tasks?query=searched")
        await client.put("/v1/tasks/new", content=GOOD)

    in_site(check, KEYS)
    lines = log_lines()
    text = json.dumps(lines)
    for secret in ("private", "another one", "third", "searched", MANAGE, "nonsense"):
        assert secret not in text
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["status"] for line in requests] == [200, 401, 200, 201]
    assert requests[0]["items"] == 2
    assert re.fullmatch("[0-9a-f]{8}", requests[0]["key"])
    assert {"time", "level", "event", "id", "route", "ms"} <= requests[0].keys()
    change = next(line for line in lines if line["event"] == "task")
    assert (change["change"], change["task"]) == ("added", "new")


def test_texts_are_logged_where_that_is_asked_for(log_lines):
    async def check(site, client):
        await client.post("/v1/predict", json=ask(("mood", "shown")))

    in_site(check, log_texts=True)
    assert "shown" in json.dumps(log_lines())


# --- settings, OpenAPI ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"port": 70_000}, "port is 70000; expected a whole number from 0 to 65535"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_wait_ms": -1}, "max_wait_ms is -1; expected a number from 0 up"),
        ({"deadline_ms": 0}, "deadline_ms is 0; expected a number above 0"),
        ({"max_delay_ms": float("nan")}, "max_delay_ms is nan"),
        ({"max_items": 5000}, "could never be accepted"),
        ({"max_body_bytes": 1 << 30}, r"max_body_bytes is 1073741824.*\(max_held_bytes\)"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        ServeConfig(**changes)


def test_the_address_is_one_that_a_browser_takes():
    assert ServeConfig().address == "http://127.0.0.1:8000"
    assert ServeConfig(host="0.0.0.0", port=80).address == "http://127.0.0.1:80"
    assert ServeConfig(host="::1").address == "http://[::1]:8000"


def test_openapi_describes_every_route_with_examples():
    async def check(site, client):
        schema = (await client.get("/openapi.json")).json()
        found = {
            (method.upper(), path) for path, entry in schema["paths"].items() for method in entry
        }
        told = {(m, re.sub(r"\?.*", "", p).replace("mood", "{name}").replace("new", "{name}"))
                for m, p, _ in ROUTES}  # fmt: skip
        assert found == told - {("GET", "/"), ("GET", "/openapi.json")}
        models = schema["components"]["schemas"]
        for name in ("PredictIn", "PredictOut", "ErrorOut"):
            assert models[name]["examples"]
        for path, entry in schema["paths"].items():
            for method, call in entry.items():
                assert call["description"], (method, path)
                assert {"500", "503"} <= call["responses"].keys()
                if path.startswith("/v1"):
                    assert call["security"]
        assert "HTTPValidationError" not in models

    in_site(check, KEYS)


def test_the_examples_of_the_description_are_answered():
    async def check(site, client):
        schema = (await client.get("/openapi.json")).json()
        for example in schema["components"]["schemas"]["PredictIn"]["examples"]:
            response = await client.post("/v1/predict", json=example)
            assert response.status_code == 200

    in_site(check, tasks=("intent", "sentiment"))


def test_a_server_that_loads_refuses_connections_and_takes_them_when_it_is_ready():
    async def main():
        config = ServeConfig(port=0)
        loading, loaded, ready = asyncio.Event(), asyncio.Event(), asyncio.Event()
        shelf = DummyShelf()
        service = Service(shelf, DummyEngine(shelf), config)
        start = service.start

        async def slow():
            loading.set()
            await loaded.wait()
            await start()

        service.start = slow
        with listen(config) as listener:
            address = listener.getsockname()
            work = asyncio.create_task(serve(service, Keys(), listener, on_ready=ready.set))
            await loading.wait()
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection(*address)
            loaded.set()
            async with asyncio.timeout(PATIENCE):
                await ready.wait()
                _, writer = await asyncio.open_connection(*address)
            writer.close()
            work.cancel()
            await asyncio.wait({work})

    asyncio.run(main())


@pytest.mark.parametrize(
    "options",
    [
        (),
        (socket.SO_REUSEADDR,),
        (socket.SO_REUSEPORT,),
        (socket.SO_REUSEADDR, socket.SO_REUSEPORT),
    ],
)
@pytest.mark.parametrize("is_listening", [False, True])
def test_a_port_that_another_program_holds_is_told_before_it_listens(options, is_listening):
    with socket.socket() as other:
        for option in options:
            other.setsockopt(socket.SOL_SOCKET, option, 1)
        other.bind(("127.0.0.1", 0))
        shares = socket.SO_REUSEADDR in options and not is_listening
        if is_listening:
            other.listen()
        config = ServeConfig(port=other.getsockname()[1])
        message = f"127.0.0.1:{config.port} is taken by another program"
        if not shares:
            with pytest.raises(UsageError, match=message):
                listen(config)
            return
        # It lets others share the port: that it wanted it is known when it listens first.
        with listen(config) as listener:
            other.listen()
            service = Service(shelf := DummyShelf(), DummyEngine(shelf), config)
            with pytest.raises(UsageError, match=message):
                asyncio.run(serve(service, Keys(), listener))


def test_of_two_servers_that_load_the_second_is_told_at_once():
    with listen(ServeConfig(port=0)) as first:
        with pytest.raises(UsageError, match="is taken by another program"):
            listen(ServeConfig(port=first.getsockname()[1]))


def test_a_server_takes_the_port_of_one_before_whose_connections_are_closing():
    with listen(config := ServeConfig(port=0)) as before:
        _begin_to_listen(before, config)
        port = before.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = before.accept()
            accepted.close()  # this side closes first: the port is in TIME_WAIT
            client.recv(1)
    with socket.socket() as plain, pytest.raises(OSError, match="in use"):
        plain.bind(("127.0.0.1", port))
    with listen(ServeConfig(port=port)) as listener:
        listener.listen()


def test_a_small_answer_waits_for_no_confirmation_of_its_head():
    """Nagle's algorithm is off on accepted connections: it cost a lone client 40 ms a request."""

    async def check():
        accepted = asyncio.get_running_loop().create_future()

        def take(reader, writer):
            connection = writer.get_extra_info("socket")
            accepted.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with listen(ServeConfig(host="127.0.0.1", port=0)) as listener:
            async with await asyncio.start_server(take, sock=listener) as server:
                address = server.sockets[0].getsockname()
                _, writer = await asyncio.open_connection(*address)
                assert await accepted
                writer.close()

    asyncio.run(check())
