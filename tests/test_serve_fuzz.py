"""Requests made from the server's own description: none ends in an error of ours."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from serving import PATIENCE, DummyEngine, DummyShelf, task_file

from bitfit.serve.auth import Keys
from bitfit.serve.run import listen, serve
from bitfit.serve.service import Service
from bitfit.serve.settings import ServeConfig

schemathesis = pytest.importorskip("schemathesis")


@contextmanager
def running():
    """A server in a thread, and its address."""
    shelf = DummyShelf()
    for name in ("mood", "topic"):
        shelf.put(name, task_file(name))
        shelf.put(name, task_file(name, licence="second"))
    config = ServeConfig(port=0)
    listener = listen(config)
    service = Service(shelf, DummyEngine(shelf), config)
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    serving = loop.create_task(serve(service, Keys(), listener, on_ready=ready.set))

    def run():
        try:
            loop.run_until_complete(serving)
        except asyncio.CancelledError:
            pass

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(PATIENCE)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(serving.cancel)
        thread.join(PATIENCE)
        loop.close()
        listener.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_any_request_made_from_the_description_is_answered_as_described():
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
    ]
    called = set()
    with running() as address:
        schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
        for result in schema.get_all_operations():
            operation = result.ok()

            @given(case=operation.as_strategy())
            @settings(
                max_examples=6,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            def check(case):
                called.add(case.operation.label)
                response = case.call_and_validate(checks=checks)
                # The one that a client can ask for: an answer within a millisecond.
                late = response.status_code == 504 and "deadline_ms" in case.body
                assert response.status_code < 500 or late

            check()
    assert len(called) == 12
