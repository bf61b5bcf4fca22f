"""What a connection may cost, with both protocols of uvicorn, over real sockets."""

from __future__ import annotations

import asyncio
import json
import resource
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest
import uvicorn
from serving import PATIENCE, until
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from bitfit.serve.connections import HEAD_BYTES, READ_BYTES, Bounds, guarded, most_connections

BOUNDS = Bounds(head_seconds=0.6, answer_seconds=2.0)
PATIENT = replace(BOUNDS, head_seconds=PATIENCE, answer_seconds=PATIENCE)
LARGE = 16 << 20  # more than the buffers of two sockets
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


def post(length):
    return b"POST /read HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % length


async def app(scope, receive, send):
    """Answers as the path says: after reading the body, late, or with much."""
    body, more = b"", scope["path"] == "/read"
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    if scope["path"] == "/late":
        await asyncio.sleep(2 * BOUNDS.head_seconds)
    answer = b"x" * LARGE if scope["path"] == "/large" else b"%d" % len(body)
    headers = [(b"content-length", b"%d" % len(answer))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


class Site:
    def __init__(self, bounds, http):
        self.config = uvicorn.Config(
            app, lifespan="off", log_config=None, access_log=False, ws="none",
            http=guarded(bounds, http), h11_max_incomplete_event_size=HEAD_BYTES + READ_BYTES,
        )  # fmt: skip
        self.config.load()
        self.state = ServerState()
        self.writers = []

    def protocol(self):
        return self.config.http_protocol_class(
            config=self.config, server_state=self.state, app_state={}
        )

    async def connect(self, *sent):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        writer.write(b"".join(sent))
        return reader, writer


async def answer_of(reader):
    """The next answer's body."""
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    (length,) = (line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
    return await reader.readexactly(int(length.rpartition(b" ")[2]))


async def rest_of(reader):
    """What comes until the server closes, however it does."""
    found = b""
    try:
        while part := await reader.read(1 << 16):
            found += part
    except ConnectionResetError:
        pass
    return found


@pytest.fixture(params=["httptools", "h11"])
def at_site(request):
    """Runs ``check(site)`` with a server of each protocol."""
    if request.param == "h11":
        http = H11Protocol
    else:
        http = pytest.importorskip("uvicorn.protocols.http.httptools_impl").HttpToolsProtocol

    def run(check, bounds=BOUNDS):
        @asynccontextmanager
        async def serving():
            site = Site(replace(bounds), http)
            server = await asyncio.get_running_loop().create_server(site.protocol, "127.0.0.1", 0)
            site.port = server.sockets[0].getsockname()[1]
            try:
                yield site
            finally:
                server.close()
                for writer in site.writers:
                    writer.close()
                    with suppress(OSError):
                        await writer.wait_closed()
                await until(lambda: not site.state.connections)

        async def main():
            async with asyncio.timeout(PATIENCE), serving() as site:
                await check(site)

        asyncio.run(main())

    return run


@pytest.mark.parametrize("sent", [b"", b"GET /", GET[:-2]])
def test_a_connection_that_sends_no_whole_head_is_closed(at_site, sent):
    async def check(site):
        reader, _ = await site.connect(sent)
        assert await rest_of(reader) == b""

    at_site(check)


def test_half_a_head_after_an_answer_is_closed_too(at_site):
    async def check(site):
        reader, writer = await site.connect(GET)
        assert await answer_of(reader) == b"0"
        await asyncio.sleep(2 * BOUNDS.head_seconds)  # nothing of a next one: kept alive
        writer.write(GET)
        assert await answer_of(reader) == b"0"
        writer.write(GET[:9])
        assert await rest_of(reader) == b""

    at_site(check)


def test_what_takes_long_after_its_head_is_not_closed(at_site):
    async def check(site):
        reader, writer = await site.connect(GET.replace(b"/", b"/late", 1))
        assert await answer_of(reader) == b"0"
        writer.write(post(4))
        for _ in range(4):
            await asyncio.sleep(BOUNDS.head_seconds / 2)
            writer.write(b"x")
        assert await answer_of(reader) == b"4"

    at_site(check)


def test_bodies_and_requests_sent_ahead_are_not_taken_for_heads(at_site):
    async def check(site):
        size = 3 * HEAD_BYTES
        reader, _ = await site.connect(*[post(size) + b"x" * size] * 5, GET * 20)
        assert [await answer_of(reader) for _ in range(25)] == [b"%d" % size] * 5 + [b"0"] * 20

    at_site(check, PATIENT)


@pytest.mark.parametrize("begin", [b"GET /", GET[:-2] + b"A: ", GET + b"GET /"])
def test_a_head_that_is_too_large_is_431_and_closed(at_site, begin):
    async def check(site):
        reader, writer = await site.connect(begin)
        if begin.startswith(GET):
            await answer_of(reader)
        writer.write(b"a" * (HEAD_BYTES + 1))
        head, _, body = (await rest_of(reader)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 431 ")
        assert b"connection: close" in head
        assert json.loads(body)["error"]["code"] == "head_too_large"

    at_site(check, PATIENT)


def test_a_body_that_nobody_reads_is_not_received_for_ever(at_site):
    async def check(site):
        reader, writer = await site.connect(post(1 << 30).replace(b"/read", b"/"))
        assert await answer_of(reader) == b"0"
        writer.write(b"x")
        assert await rest_of(reader) == b""

    at_site(check)


def test_an_answer_that_is_not_read_is_dropped_with_its_connection(at_site):
    async def check(site):
        _, writer = await site.connect(GET.replace(b"/", b"/large", 1))
        await until(lambda: site.state.total_requests)
        await until(lambda: not site.state.connections)
        reader, writer = await site.connect(GET.replace(b"/", b"/large", 1))
        assert len(await answer_of(reader)) == LARGE
        await asyncio.sleep(1.5 * BOUNDS.answer_seconds)  # it was read: kept alive
        writer.write(GET)
        assert await answer_of(reader) == b"0"

    at_site(check)


def test_more_connections_than_files_are_closed_at_once_and_told_once(at_site, log_lines):
    async def check(site):
        held = [await site.connect(GET) for _ in range(2)]
        for reader, _ in held:
            assert await answer_of(reader) == b"0"
        for _ in range(3):
            reader, _ = await site.connect(GET)
            assert await rest_of(reader) == b""
            told = [line for line in log_lines() if line["event"] == "too_many_connections"]
        assert [line["limit"] for line in told] == [2]
        held.pop()[1].close()
        await until(lambda: len(site.state.connections) == 1)
        reader, _ = await site.connect(GET)
        assert await answer_of(reader) == b"0"

    at_site(check, replace(PATIENT, most=2))


def test_silent_connections_keep_out_nobody(at_site):
    async def check(site):
        silent, _ = await site.connect()
        slow, writer = await site.connect(GET[:9])
        await until(lambda: len(site.state.connections) == 2)
        reader, _ = await site.connect(GET)
        assert await answer_of(reader) == b"0"
        assert await rest_of(silent) == b""
        writer.write(GET[9:])
        assert await answer_of(slow) == b"0"
        further, _ = await site.connect(GET)
        assert await rest_of(further) == b""  # no other is silent now

    at_site(check, replace(PATIENT, most=2))


@pytest.mark.parametrize(
    ("files", "most"), [(1024, 768), (100, 50), (resource.RLIM_INFINITY, None)]
)
def test_connections_leave_files_for_the_rest(monkeypatch, files, most):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert most_connections() == most
