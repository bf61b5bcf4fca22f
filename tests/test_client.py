"""The client: against the API in the same process, and against answers made up for it."""

from __future__ import annotations

import asyncio
import sys

import httpx
import pytest
from serving import KEYS, MANAGE, PREDICT, open_site, task_file

from bitfit import client as clients
from bitfit.client import (
    Answer,
    AsyncClient,
    Client,
    DeadlineExceeded,
    Item,
    NotAllowed,
    ServerBusy,
    ServerError,
    UnknownTaskOnServer,
    Unreachable,
)
from bitfit.errors import BitfitError, MissingExtra, UnknownTask, UsageError


def with_server(check, keys=None, key=None, **options):
    async def main():
        async with open_site(keys, **options) as site:
            transport = httpx.ASGITransport(app=site.app)
            async with AsyncClient("http://127.0.0.1", key=key, transport=transport) as client:
                return await check(site, client)

    return asyncio.run(main())


def test_items_are_answered_in_order_whatever_they_are_given_as():
    async def check(site, client):
        found = await client.predict([
            Item(task="mood", text="a", id="x", top_k=2),
            {"task": "topic", "text": "b"},
            ("mood", "c"),
            ("nothing", "d"),
        ])  # fmt: skip
        assert [answer.label for answer in found] == ["a", "b", "c", None]
        assert (found[0].id, found[0].version, found[0].kind) == ("x", 1, "classification")
        assert found[0].confidence == 0.9
        assert found[3].result is None
        assert isinstance(found[3].error, UnknownTask)
        assert found[3].error.code == "unknown_task"
        assert await client.predict([]) == []

    with_server(check)


def test_one_text_is_answered_or_its_error_raised():
    async def check(site, client):
        assert (await client.predict_one("mood", "a")).label == "a"
        with pytest.raises(UnknownTask, match="Did you mean 'mood'") as caught:
            await client.predict_one("moood", "a")
        assert isinstance(caught.value, UnknownTaskOnServer)
        with pytest.raises(ServerError, match="takes other texts") as refused:
            await client.predict_one("mood", "a", "b")
        assert refused.value.code == "bad_input"
        # A list of one is answered as any other list.
        assert (await client.predict([("moood", "a")]))[0].error.code == "unknown_task"

    with_server(check)


def test_tasks_are_put_listed_rolled_back_and_deleted(tmp_path):
    path = tmp_path / "new.bitfit.safetensors"
    task_file("new").save(path)

    async def check(site, client):
        info = await client.put("new", path)
        assert (info.name, info.version, info.labels) == ("new", 1, ("bad", "good"))
        info = await client.put("new", task_file("new", licence="other").to_bytes(), pinned=True)
        assert (info.version, info.pinned, info.licence) == (2, True, "other")
        assert (await client.rollback("new")).version == 3
        assert [t.name for t in await client.tasks()] == ["mood", "new", "topic"]
        assert [t.name for t in await client.tasks("new")] == ["new"]
        assert (await client.task("new"))["terms"] == "all"
        assert (await client.stats())["tasks"] == 3
        await client.delete("new")
        with pytest.raises(UnknownTaskOnServer):
            await client.delete("new")
        with pytest.raises(ServerError) as refused:
            await client.put("evil", b"<html>")
        assert (refused.value.code, refused.value.status) == ("bad_file", 422)
        with pytest.raises(BitfitError, match="cannot be read"):
            await client.put("none", tmp_path / "none")

    with_server(check)


def test_thousands_of_tasks_come_page_by_page(monkeypatch):
    async def check(site, client):
        site.shelf.versions = {f"t{i:04d}": site.shelf.versions["mood"] for i in range(1200)}
        assert len(await client.tasks()) == 1200

    with_server(check)


@pytest.mark.parametrize(("key", "status"), [(None, 401), ("wrong" * 5, 401), (PREDICT, 403)])
def test_a_key_that_may_not_is_an_error_of_its_own(key, status):
    async def check(site, client):
        with pytest.raises(NotAllowed) as refused:
            await client.delete("mood")
        assert refused.value.status == status

    with_server(check, KEYS, key)


def test_a_key_that_may_is_let_in():
    async def check(site, client):
        await client.delete("mood")

    with_server(check, KEYS, MANAGE)


# --- what goes wrong on the way -------------------------------------------------------------------


class Scripted:
    """Answers one after the other: a response, or an exception to raise."""

    def __init__(self, *answers):
        self.answers, self.requests = list(answers), []

    def __call__(self, request):
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def busy(status=429, after="2"):
    body = {"error": {"code": "queue_full", "message": "full"}}
    return httpx.Response(status, json=body, headers={"Retry-After": after} if after else {})


def fine():
    body = {"answers": [{"id": None, "task": "a", "version": 1, "kind": "regression",
                         "result": {"value": 0.5}}]}  # fmt: skip
    return httpx.Response(200, json=body)


@pytest.fixture
def pauses(monkeypatch):
    found = []
    monkeypatch.setattr(clients.time, "sleep", found.append)
    return found


def scripted(*answers, **options):
    script = Scripted(*answers)
    return Client(transport=httpx.MockTransport(script), **options), script


def test_a_refused_request_is_sent_again_after_the_time_that_was_asked_for(pauses):
    client, script = scripted(busy(), busy(503, None), fine())
    with client:
        assert client.predict([("a", "b")])[0].value == 0.5
    assert len(script.requests) == 3
    assert 2 <= pauses[0] <= 2.5
    assert 0.2 <= pauses[1] <= 0.25
    assert script.requests[0].content == script.requests[2].content


def test_it_is_sent_again_so_often_and_not_for_ever(pauses):
    client, script = scripted(*[busy() for _ in range(9)], retries=3)
    with client, pytest.raises(ServerBusy, match="full") as refused:
        client.predict([("a", "b")])
    assert (refused.value.status, refused.value.code) == (429, "queue_full")
    assert len(script.requests) == 4
    client, script = scripted(busy(after="100000"), fine())
    client.predict([("a", "b")])
    assert pauses[-1] <= clients.LONGEST_PAUSE


def test_a_broken_connection_repeats_only_what_may_be_repeated(pauses):
    broken = httpx.ReadError("reset")
    client, _ = scripted(broken, fine())
    assert client.predict([("a", "b")])[0].value == 0.5
    client, script = scripted(broken, httpx.Response(204))
    with pytest.raises(Unreachable, match="reset"):
        client.delete("a")
    assert len(script.requests) == 1
    client, script = scripted(httpx.ConnectError("refused"), httpx.Response(204))
    client.delete("a")
    assert len(script.requests) == 2
    client, _ = scripted(*[httpx.ConnectError("refused")] * 9, retries=2)
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:8000: no answer \(refused\)") as gone:
        client.predict([("a", "b")])
    assert gone.value.code == "unreachable"


@pytest.mark.parametrize(
    ("response", "kind", "code"),
    [
        (httpx.Response(504, json={"error": {"code": "deadline", "message": "late"}}),
         DeadlineExceeded, "deadline"),
        (httpx.Response(502, text="<html>Bad gateway</html>"), ServerError, "error"),
        (httpx.Response(200, text="<html>"), ServerError, "bad_answer"),
        (httpx.Response(200, json={"hello": 1}), ServerError, "bad_answer"),
        (httpx.Response(200, json=[]), ServerError, "bad_answer"),
        (httpx.Response(200, json={"answers": []}), ServerError, "bad_answer"),
        (httpx.DecodingError("no gzip"), ServerError, "bad_answer"),
        (httpx.TooManyRedirects("20 of them"), ServerError, "bad_answer"),
    ],
)  # fmt: skip
def test_other_answers_are_errors_with_a_code(response, kind, code):
    client, _ = scripted(response)
    with pytest.raises(kind) as caught:
        client.predict([("a", "b")])
    assert caught.value.code == code
    assert isinstance(caught.value, BitfitError)


def test_fewer_answers_than_texts_are_an_error():
    client, _ = scripted(fine(), httpx.Response(200, json={"answers": []}))
    for ask in (lambda: client.predict([("a", "b")] * 2), lambda: client.predict_one("a", "b")):
        with pytest.raises(ServerError, match="not that of a bitfit server") as caught:
            ask()
        assert caught.value.code == "bad_answer"


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_what_is_no_address_is_an_error_of_ours(kind):
    with pytest.raises(UsageError, match=r"'http://\[::1' is no address of a server"):
        kind("http://[::1")


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "localhost:8077",
            "it begins with http:// or https://; did you mean http://localhost:8077?",
        ),
        ("127.0.0.1", "it begins with http:// or https://; did you mean http://127.0.0.1?"),
        ("ftp://x", "it begins with http:// or https://"),
        ("", "it begins with http:// or https://"),
        ("http://", "it names no host; expected such as http://localhost:8000"),
        ("https:///v1", "it names no host; expected such as http://localhost:8000"),
    ],
)
def test_an_address_without_scheme_or_host_is_told_before_the_first_call(kind, address, message):
    with pytest.raises(UsageError) as caught:
        kind(address)
    assert str(caught.value) == f"{address!r} is no address of a server: {message}"


def test_an_address_may_have_large_letters_and_a_path():
    for address in ("HTTP://localhost:8077", "https://example.org/bitfit"):
        Client(address).close()


def test_a_name_that_no_address_can_have_is_an_error_of_ours():
    client, script = scripted()
    with pytest.raises(ServerError) as caught:
        client.delete("a" * 100_000)
    assert caught.value.code == "bad_input"
    assert not script.requests


@pytest.mark.parametrize("headers", [{"X-Tenant": "a"}, [("authorization", "other")], None])
def test_headers_of_ones_own_leave_the_key(headers):
    client, script = scripted(fine(), key="secret-0123456789", headers=headers)
    client.predict([("a", "b")])
    sent = script.requests[0].headers
    assert sent.get_list("authorization") == ["Bearer secret-0123456789"]
    assert sent.get("x-tenant") == ("a" if isinstance(headers, dict) else None)


def test_names_are_quoted():
    client, script = scripted(httpx.Response(204))
    client.delete("../a b")
    assert script.requests[0].url.raw_path == b"/v1/tasks/..%2Fa%20b"


def test_the_key_goes_into_the_header_and_into_no_message(pauses):
    client, script = scripted(busy(), retries=0, key="secret-0123456789")
    with pytest.raises(ServerBusy) as refused:
        client.stats()
    assert script.requests[0].headers["authorization"] == "Bearer secret-0123456789"
    assert "secret" not in str(refused.value)


def test_every_kind_of_answer_has_its_names():
    answer = Answer(
        task="a", id=None, result={"labels": ["x"], "scores": [{"label": "x", "score": 1.0}]}
    )
    assert (answer.labels, answer.scores, answer.label) == (("x",), {"x": 1.0}, None)
    answer = Answer(task="a", id=None, result={"answer": "b", "start": 0, "end": 1, "score": 2.0})
    assert (answer.answer, answer.spans) == ("b", [])


def test_without_httpx_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(MissingExtra, match=r"bitfit\[client\]"):
        Client()
