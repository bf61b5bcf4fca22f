"""Several services as one: replicas that die at any moment, and what they share."""

import asyncio
import logging
import pickle
import re
import sys
from contextlib import asynccontextmanager

import httpx
import pytest
from serving import PATIENCE, DummyEngine, ask, error_of
from tiny import make_task

from bitfit.errors import BitfitError, UsageError
from bitfit.serve import front as front_module
from bitfit.serve.app import make_app
from bitfit.serve.front import Front
from bitfit.serve.link import Link, Lost
from bitfit.serve.replica import Job, Replica, Reply
from bitfit.serve.service import Service
from bitfit.serve.settings import ServeConfig
from bitfit.serve.shelf import FINGERPRINT, Shelf
from bitfit.serve.uploads import Uploads


class Place:
    """Where a replica stands: it can die, and another one takes its place."""

    def __init__(self, folder, encoder, base="a" * 64, **options):
        self.folder, self.encoder, self.base = folder, encoder, base
        self.options = {"watch_seconds": 0.0, **options}
        self.fate, self.is_up = {}, asyncio.Event()
        self.rise()

    def rise(self):
        shelf = Shelf(self.encoder)
        self.engine = DummyEngine(shelf)
        self.service = Service(
            shelf, self.engine, ServeConfig(tasks=str(self.folder), **self.options),
            base={"name": "tiny", "sha256": self.base, "device": "cpu"},
            uploads=Uploads(self.folder),
        )  # fmt: skip
        self.replica = Replica(Job(base="tiny", config=self.service.config, versions=()))
        self.replica._open = lambda: self.service
        self.dead = asyncio.get_running_loop().create_future()
        self.is_up.set()

    def die(self):
        self.is_up.clear()
        self.dead.set_result(None)

    async def send(self, method, *arguments, **named):
        await self.is_up.wait()
        dead, called = self.dead, arguments[0] if method == "call" else method
        fate = self.fate.pop(called, None)
        if fate == "before":
            self.die()
            raise Lost
        work = asyncio.ensure_future(getattr(self.replica, method)(*arguments, **named))
        try:
            await asyncio.wait({work, dead}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not work.done():
                work.cancel()
        if fate == "after":
            self.die()
        if dead.done():
            raise Lost
        return pickle.loads(pickle.dumps(work.result()))  # as between processes


class Site:
    def __init__(self, front, places, client):
        self.front, self.places, self.client = front, places, client

    async def predict(self, task="m", text="hello", **more):
        return await self.client.post("/v1/predict", json=ask((task, text), **more))

    def states(self):
        """What each replica says of each task."""
        return [
            [(i.name, i.version, i.fingerprint, i.can_roll_back) for i in p.service.shelf.infos()]
            for p in self.places
        ]

    async def replace_the_dead(self):
        for link, place in zip(self.front.links, self.places, strict=True):
            if place.dead.done():
                await asyncio.wait({link.gone}, timeout=PATIENCE)
                place.rise()
        await self.until(lambda: all(link.is_ready for link in self.front.links))

    async def until(self, check):
        async with asyncio.timeout(PATIENCE):
            while not check():
                await asyncio.sleep(0.01)


@asynccontextmanager
async def open_front(folder, encoder, count=2, **options):
    places = [Place(folder, encoder, **options) for _ in range(count)]
    links = [Link(str(i), place.send) for i, place in enumerate(places, 1)]
    front = Front(links, ServeConfig(tasks=str(folder), **options))
    transport = httpx.ASGITransport(app=make_app(front))
    await front.start()
    try:
        async with httpx.AsyncClient(
            transport=transport, base_url="http://127.0.0.1:8000", timeout=20
        ) as client:
            yield Site(front, places, client)
    finally:
        await front.stop()
        for place in places:
            place.engine.gate.set()
            await place.service.stop(drain=False)


@pytest.fixture
def run(tmp_path, open_tiny):
    """A function that runs a check on replicas of a folder, which has the task m."""
    encoder = open_tiny()
    files = [make_task(encoder, seed=seed) for seed in range(4)]
    files[0].save(tmp_path / "m.bitfit.safetensors")

    def go(check, **options):
        async def main():
            async with open_front(tmp_path, encoder, **options) as site:
                site.files, site.folder = files, tmp_path
                await check(site)

        asyncio.run(main())

    return go


def seal(file):
    return file.seal[:FINGERPRINT]


def metric(text, name):
    return float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1])


# --- one dies -------------------------------------------------------------------------------------


def test_what_was_in_flight_on_a_dead_replica_is_answered_by_another(run):
    async def check(site):
        for place in site.places:
            place.engine.gate.clear()
        asked = [asyncio.ensure_future(site.predict(text=f"text {i}")) for i in range(8)]
        await site.until(lambda: all(link.open == 4 for link in site.front.links))
        site.places[0].die()
        site.places[1].engine.gate.set()
        found = [(await one).json()["answers"][0]["result"]["label"] for one in asked]
        assert found == [f"text {i}" for i in range(8)]
        assert site.front.ready
        text = (await site.client.get("/metrics")).text
        assert metric(text, r'bitfit_retried_requests_total\{replica="front"\}') == 4
        assert metric(text, r'bitfit_replica_deaths_total\{replica="front"\}') == 1
        assert metric(text, r'bitfit_replicas\{replica="front"\}') == 1
        site.places[0].engine.gate.set()
        await site.replace_the_dead()
        for _ in range(4):
            assert (await site.predict()).status_code == 200
        assert site.places[0].engine.batches

    run(check)


def test_a_change_that_was_made_before_its_replica_died_is_made_once(run):
    async def check(site):
        put = {"content": site.files[1].to_bytes()}
        calls = [
            ("put", lambda: site.client.put("/v1/tasks/new", **put), 201, 1),
            ("put", lambda: site.client.put("/v1/tasks/m", **put), 200, 2),
            ("rollback", lambda: site.client.post("/v1/tasks/m/rollback"), 200, 3),
            ("remove", lambda: site.client.delete("/v1/tasks/m"), 204, None),
        ]
        for method, call, status, version in calls:
            once = {method: "after"}  # whichever is sent it dies of it, having done it
            for place in site.places:
                place.fate = once
            response = await call()
            assert response.status_code == status
            if version is not None:
                assert response.json()["version"] == version
            await site.replace_the_dead()
            first, second = ([task[:3] for task in tasks] for tasks in site.states())
            assert first == second

    run(check)


def test_without_any_replica_requests_are_refused_and_changes_are_not_said_to_be_harmless(
    run, monkeypatch
):
    monkeypatch.setattr(front_module, "BACK_SECONDS", 0.2)

    async def check(site):
        for place in site.places:
            place.fate = dict.fromkeys(("rollback", "put"), "before")
        response = await site.client.put("/v1/tasks/m", content=site.files[1].to_bytes())
        assert (response.status_code, error_of(response)["code"]) == (500, "lost")
        assert not site.front.ready
        response = await site.client.get("/readyz")
        assert (response.status_code, error_of(response)["code"]) == (503, "no_replica")
        assert (await site.client.get("/healthz")).status_code == 200
        response = await site.predict()
        assert (response.status_code, error_of(response)["code"]) == (503, "no_replica")
        assert response.headers["retry-after"] == "5"
        metrics = (await site.client.get("/metrics")).text
        counted = 'bitfit_refused_requests_total{reason="no_replica",replica="front"} 1.0'
        assert counted in metrics.splitlines()
        stats = (await site.client.get("/v1/stats")).json()
        assert [one["ready"] for one in stats["replicas"]] == [False, False]

    run(check)


def test_what_lost_all_replicas_is_answered_by_the_first_that_comes_back(run):
    async def check(site):
        for place in site.places:
            place.fate = {"predict": "before"}
        asked = asyncio.ensure_future(site.predict())
        await site.until(lambda: all(place.dead.done() for place in site.places))
        assert not asked.done()
        site.places[1].rise()
        assert (await asked).status_code == 200

    run(check)


def test_a_request_that_ends_each_replica_it_meets_does_not_end_them_all(run):
    async def check(site):
        for place in site.places:
            place.fate = {"predict": "before"}
        response = await site.predict()  # not 503, which clients repeat by themselves
        assert (response.status_code, error_of(response)["code"]) == (500, "lost")
        assert "each of the 3 replicas" in error_of(response)["message"]
        assert sum(place.dead.done() for place in site.places) == front_module.TRIES
        assert (await site.client.get("/v1/tasks")).status_code == 200

    run(check, count=4)


def test_a_replica_comes_back_whatever_went_wrong_on_the_way(run, monkeypatch):
    monkeypatch.setattr(front_module, "BEAT_SECONDS", 0.01)

    async def check(site):
        link, place = site.front.links[0], site.places[0]
        wrong = [RuntimeError("a bug"), BitfitError("a bug of the replica"), Lost()]

        async def send(method, *arguments, **named):
            if method == "start" and wrong:
                raise wrong.pop(0)
            return await place.send(method, *arguments, **named)

        monkeypatch.setattr(link, "_send", send)
        place.die()
        await site.replace_the_dead()
        assert not wrong

    run(check)


def test_a_replica_is_known_to_be_lost_whatever_ends_the_call_that_stays_open(run, monkeypatch):
    async def check(site):
        link = site.front.links[0]

        async def send(method, *_, **__):
            assert method == "stay"
            raise RuntimeError("a bug")

        monkeypatch.setattr(link, "_send", send)
        gone = asyncio.get_running_loop().create_future()
        with pytest.raises(RuntimeError, match="a bug"):
            await link._stay(gone)
        assert gone.done()

    run(check)


def test_a_replica_that_is_refused_again_and_again_has_one_call_open(run, monkeypatch):
    monkeypatch.setattr(front_module, "BEAT_SECONDS", 0.01)

    async def check(site):
        link, place = site.front.links[0], site.places[0]
        opened, left = [], []

        async def send(method, *arguments, **named):
            if method != "stay":
                return await place.send(method, *arguments, **named)
            opened.append(method)
            try:
                return await place.send(method)
            finally:
                left.append(method)

        monkeypatch.setattr(link, "_send", send)
        place.base = "b" * 64
        place.die()
        await asyncio.wait({link.gone}, timeout=PATIENCE)
        place.rise()
        await site.until(lambda: len(opened) > 4)
        assert len(opened) - len(left) <= 1
        assert not link.is_ready

    run(check)


def test_replicas_that_end_before_they_can_be_asked_end_the_start(tmp_path, open_tiny, log_lines):
    encoder = open_tiny()

    async def check():
        good = Place(tmp_path, encoder)

        async def dies(*_, **__):
            raise Lost

        front = Front([Link("1", good.send), Link("2", dies)], good.service.config)
        with pytest.raises(BitfitError, match="replica 2 ended 5 times before it could be asked"):
            await front.start()
        await front.stop()
        await good.service.stop(drain=False)

    asyncio.run(check())
    assert [line["replica"] for line in log_lines() if line["event"] == "replica_lost"] == ["2"] * 5


def test_what_goes_wrong_in_a_replica_is_in_the_log_with_its_trace(run, log_lines):
    async def check(site):
        try:
            raise ValueError("of the replica")
        except ValueError:
            record = logging.LogRecord(
                "bitfit.serve", logging.ERROR, "here", 1, "it_failed", (), sys.exc_info()
            )
        site.places[0].replica._lines.emit(record)
        await site.front._look(site.front.links[0])

    run(check)
    line = next(line for line in log_lines() if line["event"] == "it_failed")
    assert (line["level"], line["replica"]) == ("error", "1")
    assert "ValueError: of the replica" in line["trace"]


# --- what passes through --------------------------------------------------------------------------


def test_errors_and_limits_are_those_of_one_server(run):
    async def check(site):
        response = await site.predict("mm")
        assert (response.status_code, error_of(response)["code"]) == (404, "unknown_task")
        response = await site.client.post("/v1/predict", json=ask(("mm", "a"), ("m", "b")))
        first, second = response.json()["answers"]
        assert first["error"]["code"] == "unknown_task"
        assert second["result"]["label"] == "b"
        response = await site.client.put("/v1/tasks/new", content=b"nonsense")
        assert (response.status_code, error_of(response)["code"]) == (422, "bad_file")
        response = await site.client.post("/v1/tasks/m/rollback")
        assert (response.status_code, error_of(response)["code"]) == (409, "no_version_before")
        for path in ("/v1/tasks/m", "/v1/tasks/m/file", "/v1/compare?a=m&b=m", "/", "/readyz"):
            assert (await site.client.get(path)).status_code == 200
        for place in site.places:
            place.engine.gate.clear()
        asked = [asyncio.ensure_future(site.predict()) for _ in range(8)]
        await site.until(lambda: all(p.service.queue.items == 4 for p in site.places))
        response = await site.predict()
        assert (response.status_code, error_of(response)["code"]) == (429, "queue_full")
        assert int(response.headers["retry-after"]) >= 1
        for place in site.places:
            place.engine.gate.set()
        assert {(await one).status_code for one in asked} == {200}

    run(check, max_queue_items=4, max_items=4)


def test_what_a_client_gave_up_is_given_up_by_the_replica(run):
    async def check(site):
        for place in site.places:
            place.engine.gate.clear()
        asked = asyncio.ensure_future(site.front.predict([]))
        await asked
        held = asyncio.ensure_future(site.front._ask("predict", _items("x")))
        await site.until(lambda: sum(p.service.queue.items for p in site.places) == 1)
        held.cancel()
        with pytest.raises(asyncio.CancelledError):
            await held
        for place in site.places:
            place.engine.gate.set()
        await site.until(lambda: sum(p.service.queue.items for p in site.places) == 0)
        assert [link.open for link in site.front.links] == [0, 0]

    run(check)


def _items(*texts):
    from bitfit.serve.engine import Item

    return [Item("m", text) for text in texts]


def test_a_replica_that_hangs_costs_its_requests_their_deadline_and_no_more(run, monkeypatch):
    monkeypatch.setattr(front_module, "GRACE_SECONDS", 0.05)

    async def check(site):
        async def hang(*_, **__):
            await asyncio.sleep(60)

        for link in site.front.links:
            monkeypatch.setattr(link, "_send", hang)
        response = await site.predict(deadline_ms=50)
        assert (response.status_code, error_of(response)["code"]) == (504, "deadline")
        assert "did not answer by its deadline of 50 ms: " in error_of(response)["message"]
        assert [link.open for link in site.front.links] == [0, 0]
        own = site.front.metrics.registry
        assert own.get_sample_value("bitfit_refused_requests_total", {"reason": "deadline"}) == 1

    run(check)


def test_a_deadline_is_told_as_it_was_asked_for_and_not_as_what_was_left_of_it(run):
    async def check(site):
        for place in site.places:
            place.engine.gate.clear()
        response = await site.predict(deadline_ms=200)
        assert (response.status_code, error_of(response)["code"]) == (504, "deadline")
        assert "was not answered by its deadline of 200 ms: " in error_of(response)["message"]

    run(check)


# --- they agree -----------------------------------------------------------------------------------


def test_all_replicas_have_a_change_before_it_is_answered_and_so_has_one_that_comes_later(run):
    async def check(site):
        for number, file in enumerate(site.files[1:], 2):
            response = await site.client.put("/v1/tasks/m", content=file.to_bytes())
            assert response.json()["version"] == number
            expected = [("m", number, seal(file), True)]
            assert site.states() == [expected, expected]
        back = (await site.client.post("/v1/tasks/m/rollback")).json()
        assert (back["version"], back["fingerprint"]) == (5, seal(site.files[2]))
        site.places[0].die()
        await site.replace_the_dead()
        expected = [("m", 5, seal(site.files[2]), True)]
        assert site.states() == [expected, expected]
        assert (await site.client.delete("/v1/tasks/m")).status_code == 204
        assert site.states() == [[], []]

    run(check)


def test_files_copied_into_the_folder_have_one_number_and_the_one_who_remembers_rolls_back(run):
    async def check(site):
        await site.client.get("/v1/tasks")
        for file in site.files[1:3]:
            file.save(site.folder / "m.bitfit.safetensors")
            for link in site.front.links:
                await site.front._look(link)
        expected = [("m", 3, seal(site.files[2]), True)]
        assert site.states() == [expected, expected]
        site.places[0].die()
        await site.replace_the_dead()
        assert site.states()[0] == [("m", 3, seal(site.files[2]), False)]  # begun with it
        for _ in range(2):  # whichever would be chosen
            back = await site.client.post("/v1/tasks/m/rollback")
            assert back.status_code == 200
        assert back.json()["version"] == 5
        first, second = site.states()
        assert first == second == [("m", 5, seal(site.files[2]), True)]

    run(check)


def test_the_folder_is_looked_at_by_all(run):
    async def check(site):
        site.files[1].save(site.folder / "n.bitfit.safetensors")
        (site.folder / "bad.bitfit.safetensors").write_bytes(b"nonsense")
        await site.until(lambda: [len(state) for state in site.states()] == [2, 2])

    run(check, watch_seconds=0.05)


def test_a_look_that_goes_wrong_is_not_the_last(run, monkeypatch):
    async def check(site):
        link, place, asked = site.front.links[0], site.places[0], []

        async def send(method, *arguments, **named):
            asked.append(arguments[0])
            if len(asked) == 1:
                raise RuntimeError("a bug")
            return await place.send(method, *arguments, **named)

        monkeypatch.setattr(link, "_send", send)
        await site.until(lambda: len(asked) > 2)

    run(check, watch_seconds=0.05)


# --- numbers --------------------------------------------------------------------------------------


def test_numbers_are_of_all_replicas_by_name(run):
    async def check(site):
        for i in range(6):
            await site.predict(text=f"text {i}")
        stats = (await site.client.get("/v1/stats")).json()
        assert (stats["items"], stats["tasks"], stats["resident"]) == (6, 1, 2)
        assert stats["base"]["name"] == "tiny"
        assert [(r["name"], r["ready"], r["items"]) for r in stats["replicas"]] == [
            ("1", True, 3), ("2", True, 3),
        ]  # fmt: skip
        text = (await site.client.get("/metrics")).text
        for name in "12":
            assert metric(text, rf'bitfit_task_items_total\{{replica="{name}",task="m"\}}') == 3
        assert 'bitfit_items_total{outcome="answered",replica="front"}' not in text
        assert text.count("# TYPE bitfit_batch_items histogram") == 1
        assert 'bitfit_http_requests_total{method="POST",replica="front"' in text

    run(check)


# --- what is refused ------------------------------------------------------------------------------


def test_a_replica_with_another_base_or_other_versions_stops_the_start(tmp_path, open_tiny):
    encoder = open_tiny()

    async def check():
        places = [Place(tmp_path, encoder), Place(tmp_path, encoder, base="b" * 64)]
        links = [Link(str(i), place.send) for i, place in enumerate(places)]
        with pytest.raises(BitfitError, match="its base 'tiny' is not that of the others"):
            await Front(links, places[0].service.config).start()
        for place in places:
            await place.service.stop(drain=False)

        others = (("bitfit", "9"), ("torch", None), ("transformers", None))
        job = Job(base="none", config=ServeConfig(), versions=others)
        reply = await Replica(job).start()
        assert isinstance(reply, Reply)
        assert re.search(r"it has bitfit \S+, and the server 9", str(reply.failed))

    asyncio.run(check())


def test_a_usage_error_of_a_replica_stays_one(tmp_path):
    file = tmp_path / "file"
    file.write_text("no folder")
    from bitfit.serve.replica import versions

    async def check():
        job = Job(base="none", config=ServeConfig(tasks=str(file)), versions=versions())
        reply = await Replica(job).start()
        assert isinstance(reply.failed, UsageError)
        assert (await Replica(job).call("infos")).is_lost

    asyncio.run(check())
