"""Servers that share a folder of tasks and know nothing of each other."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from filelock import FileLock
from serving import DummyEngine
from tiny import make_task

from bitfit.errors import UnknownTask
from bitfit.serve import uploads
from bitfit.serve.engine import Engine, Item
from bitfit.serve.failures import FolderBusy, from_error
from bitfit.serve.service import Service
from bitfit.serve.settings import ServeConfig
from bitfit.serve.shelf import FINGERPRINT, Shelf
from bitfit.serve.uploads import KEPT, Uploads


@asynccontextmanager
async def serving(folder, encoder, count=2, engine=DummyEngine, max_resident=None):
    services = []
    for _ in range(count):
        shelf = Shelf(encoder, max_resident=max_resident)
        config = ServeConfig(tasks=str(folder), watch_seconds=0.0)
        services.append(Service(shelf, engine(shelf), config, uploads=Uploads(folder)))
        await services[-1].start()
    try:
        yield services
    finally:
        for service in services:
            await service.stop()


@pytest.fixture
def run(tmp_path, open_tiny):
    """A function that runs a check on two servers; and the folder and four files."""
    encoder = open_tiny()
    files = [make_task(encoder, seed=seed) for seed in range(4)]

    def go(check, count=2, **options):
        async def main():
            async with serving(tmp_path, encoder, count, **options) as services:
                return await check(*services)

        return asyncio.run(main())

    go.encoder = encoder
    go.files, go.folder, go.seals = files, tmp_path, [f.seal[:FINGERPRINT] for f in files]
    return go


def states(*services):
    return [
        [(i.name, i.version, i.fingerprint, i.can_roll_back) for i in service.shelf.infos()]
        for service in services
    ]


def test_changes_sent_to_either_have_one_history(run):
    data, seals = [file.to_bytes() for file in run.files], run.seals

    async def check(a, b):
        assert (await a.put("m", data[0])) == (a.shelf.info("m"), True)
        info, is_new = await b.put("m", data[1])  # it has not looked since
        assert (info.version, is_new, info.can_roll_back) == (2, False, True)
        assert (await a.rollback("m")).fingerprint == seals[0]
        assert (await b.rollback("m")).fingerprint == seals[1]
        await a.remove("m")
        with pytest.raises(UnknownTask):
            await b.remove("m")
        info, is_new = await b.put("m", data[2])
        assert (info.version, is_new) == (5, True)
        await a.look()
        assert states(a) == states(b)

    run(check)


def test_one_that_looks_seldom_remembers_the_version_before_and_not_an_older_one(run):
    data = [file.to_bytes() for file in run.files]

    async def check(a, b):
        for one in data[:3]:
            await a.put("m", one)
            if one is data[0]:
                await b.look()
        await b.look()
        assert states(a) == states(b) == [[("m", 3, run.seals[2], True)]]
        assert (await b.rollback("m")).fingerprint == run.seals[1]

    run(check)


def test_changes_at_one_time_have_numbers_of_their_own(run):
    data = [file.to_bytes() for file in run.files]

    async def check(*services):
        puts = [s.put("m", data[(i + k) % 4]) for i, s in enumerate(services) for k in range(3)]
        numbers = [info.version for info, _ in await asyncio.gather(*puts)]
        assert sorted(numbers) == list(range(1, 10))
        for service in services:
            await service.look()
        first, *others = states(*services)
        assert all(other == first for other in others)

    run(check, count=3)


def test_a_row_whose_file_another_server_took_away_is_looked_for(run):
    """The task was removed, or replaced more often than files are kept, since the last look."""
    data = [make_task(run.encoder, seed=seed).to_bytes() for seed in range(3 + KEPT)]
    items = [Item("removed", "good bike"), Item("kept", "good bike"), Item("replaced", "good bike")]

    async def check(a, b):
        for name, one in zip(("removed", "replaced", "kept"), data, strict=False):
            await a.put(name, one)
        await b.look()
        await b.predict(items[1:2])  # the only row that is in memory
        await a.remove("removed")
        for one in data[3:]:
            await a.put("replaced", one)
        first, second, third = await b.predict(items)
        assert isinstance(first, UnknownTask)
        assert (second.version, third.version) == (1, 1 + KEPT)
        again = await b.predict(items[1:])
        assert [answer.version for answer in again] == [1, 1 + KEPT]
        assert b.shelf.resident == 1  # every lease was given back

    run(check, engine=Engine, max_resident=1)


def test_a_change_that_is_asked_for_twice_is_made_once(run):
    data = [file.to_bytes() for file in run.files]

    async def check(a, b):
        found = [await s.put("m", data[0], by="x") for s in (a, b, a)]
        assert [(info.version, is_new) for info, is_new in found] == [(1, True)] * 3
        await a.put("m", data[1], by="y")
        found = [await s.rollback("m", by="z") for s in (a, b)]
        assert [(i.version, i.fingerprint) for i in found] == [(3, run.seals[0])] * 2
        for service in (b, a):
            await service.remove("m", by="w")
        with pytest.raises(UnknownTask):
            await a.remove("m", by="v")

    run(check)


def test_a_pinned_task_is_pinned_at_all_servers_and_after_a_restart(run):
    data = [file.to_bytes() for file in run.files]

    async def pin(a, b):
        await a.put("m", data[0], pinned=True, by="x")
        again, _ = await b.put("m", data[0], pinned=True, by="x")
        await a.put("n", data[1])
        await b.look()
        assert again.pinned
        assert [[i.pinned for i in s.shelf.infos()] for s in (a, b)] == [[True, False]] * 2

    async def begin_again(a):
        assert [info.pinned for info in a.shelf.infos()] == [True, False]

    run(pin)
    run(begin_again, count=1)


def test_files_replaced_in_the_folder_keep_their_numbers_over_a_restart(run):
    path = run.folder / "m.bitfit.safetensors"
    run.files[0].save(path)

    async def fill(a, b):
        for file in run.files[1:]:
            file.save(path)
            await a.look()
        await b.look()  # at the last only
        assert [[task[:3] for task in found] for found in states(a, b)] == [
            [("m", 4, run.seals[3])]
        ] * 2

    async def begin_again(a, b):
        assert states(a, b) == [[("m", 4, run.seals[3], False)]] * 2
        info, _ = await a.put("m", run.files[0].to_bytes())
        assert info.version == 5
        run.files[1].save(path)
        await b.look()
        await a.look()
        assert states(a, b) == [[("m", 6, run.seals[1], True)]] * 2

    run(fill)
    run(begin_again)


def test_a_change_while_another_server_keeps_changing_is_put_off_and_not_failed(run, monkeypatch):
    monkeypatch.setattr(uploads, "LOCK_SECONDS", 0.05)

    async def check(server):
        with FileLock(Uploads(run.folder).directory / "lock"), pytest.raises(FolderBusy) as found:
            await server.put("m", run.files[0].to_bytes())
        refused = from_error(found.value)
        assert (refused.status, refused.code) == (503, "folder_busy")
        assert refused.headers == {"Retry-After": "1"}
        assert states(server) == [[]]
        await server.put("m", run.files[0].to_bytes())
        assert states(server) == [[("m", 1, run.seals[0], False)]]

    run(check, count=1)
