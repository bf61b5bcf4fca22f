import dataclasses
import threading
import time

import pytest
import torch
from tiny import make_task

from bitfit.errors import TaskFileError, UnknownTask, UsageError, WrongBase
from bitfit.serve import shelf as shelf_module
from bitfit.serve.shelf import FINGERPRINT, Shelf
from bitfit.serve.sources import SUFFIX


@pytest.fixture
def encoder(open_tiny):
    return open_tiny()


@pytest.fixture
def shelf(encoder):
    return Shelf(encoder)


def row_of(shelf, lease):
    return shelf.tasks.bank.gather([lease.row])[0]


def test_a_task_is_known_by_the_seal_of_its_file(shelf, encoder, tmp_path):
    made = make_task(encoder, description="a card", licence="MIT", scores={"accuracy": 0.5})
    made.save(tmp_path / "mood")
    file = type(made).load(tmp_path / "mood")
    info = shelf.put("m", file)
    assert info.fingerprint == file.seal[:FINGERPRINT] == made.seal[:FINGERPRINT]
    assert (info.name, info.version, info.kind, info.score) == ("m", 1, "classification", 0.5)
    assert (info.description, info.licence, info.resident) == ("a card", "MIT", True)
    assert info.bytes == 4 * (shelf.tasks.bank.layout.n + file.head_size)
    back = shelf.file("m")
    assert back.to_bytes() == file.to_bytes()


def test_requests_that_hold_a_version_finish_on_it(shelf, encoder):
    first, second = make_task(encoder, seed=1), make_task(encoder, seed=2)
    shelf.put("m", first)
    old = shelf.lease("m")
    kept = row_of(shelf, old)
    info = shelf.put("m", second)
    new = shelf.lease("m")
    assert (old.version, new.version, info.version) == (1, 2, 2)
    assert old.fingerprint == first.seal[:FINGERPRINT]
    assert new.fingerprint == second.seal[:FINGERPRINT]
    assert torch.equal(row_of(shelf, old), kept)
    assert not torch.equal(row_of(shelf, new), kept)
    assert shelf.resident == 2
    old.release()
    old.release()
    assert shelf.resident == 1
    shelf.remove("m")
    assert shelf.resident == 1
    new.release()
    assert shelf.resident == 0
    with pytest.raises(UnknownTask):
        shelf.lease("m")


def test_the_version_before_comes_back_under_a_new_number(shelf, encoder):
    first, second = make_task(encoder, seed=1), make_task(encoder, seed=2)
    shelf.put("m", first)
    with pytest.raises(UsageError, match="no version before"):
        shelf.rollback("m")
    assert shelf.put("m", second).can_roll_back
    info = shelf.rollback("m")
    assert (info.version, info.fingerprint) == (3, first.seal[:FINGERPRINT])
    assert shelf.rollback("m").fingerprint == second.seal[:FINGERPRINT]
    assert torch.equal(shelf.file("m").bias, second.bias)
    with pytest.raises(UnknownTask):
        shelf.rollback("n")


def test_a_removed_task_that_comes_again_has_a_new_number(shelf, encoder):
    shelf.put("m", make_task(encoder))
    shelf.remove("m")
    assert shelf.put("m", make_task(encoder)).version == 2


def test_a_file_that_does_not_fit_changes_nothing(shelf, encoder, open_tiny):
    shelf.put("m", make_task(encoder))
    with pytest.raises(WrongBase):
        shelf.put("m", make_task(open_tiny("bert", 1)))
    odd = dataclasses.replace(make_task(encoder), head={"classifier.weight": torch.zeros(2, 3)})
    with pytest.raises(TaskFileError):
        shelf.put("m", odd)
    assert shelf.info("m").version == 1


def test_too_large_a_bias_is_refused_in_fewer_bits(encoder):
    shelf = Shelf(encoder, storage="fp16")
    shelf.put("m", make_task(encoder))
    with pytest.raises(UsageError, match="fp16"):
        shelf.put("m", make_task(encoder, scale=1e6))
    assert shelf.info("m").version == 1
    assert shelf.resident == 1


def test_an_unknown_task_is_an_error_with_the_nearest_name(shelf, encoder):
    shelf.put("mood", make_task(encoder))
    for call in (shelf.lease, shelf.info, shelf.remove, shelf.file, shelf.rollback):
        with pytest.raises(UnknownTask, match="Did you mean 'mood'"):
            call("moood")


# ------------------------------------------------------------------ more tasks than memory


def put_saved(shelf, folder, name, file, **options):
    path = str(folder / f"{name}{SUFFIX}")
    file.save(path)
    return shelf.put(name, file, source=path, **options)


def test_the_least_recently_used_rows_are_dropped_and_read_again(encoder, tmp_path):
    shelf = Shelf(encoder, max_resident=2)
    put_saved(shelf, tmp_path, "pinned", make_task(encoder, seed=9), pinned=True)
    shelf.put("memory", make_task(encoder, seed=8))  # no file to be read again from
    rows = {}
    for i in range(5):
        file = make_task(encoder, seed=i)
        put_saved(shelf, tmp_path, f"t{i}", file)
        with shelf.lease(f"t{i}") as lease:
            rows[f"t{i}"] = row_of(shelf, lease)
    resident = [info.name for info in shelf.infos() if info.resident]
    assert resident == ["memory", "pinned", "t3", "t4"]
    assert shelf.resident == 4
    for name in ("t0", "t3", "t0", "t1"):
        with shelf.lease(name) as lease:
            assert torch.equal(row_of(shelf, lease), rows[name])
    assert [i.name for i in shelf.infos() if i.resident] == ["memory", "pinned", "t0", "t1"]
    held = [shelf.lease(f"t{i}") for i in range(5)]  # in use: none of them may go
    assert all(torch.equal(row_of(shelf, x), rows[x.name]) for x in held)
    for lease in held:
        lease.release()
    assert shelf.resident == 4


def test_a_task_that_is_removed_with_its_file_while_its_row_is_read_is_unknown(
    encoder, tmp_path, monkeypatch
):
    shelf = Shelf(encoder, max_resident=1)
    for seed, name in enumerate(("a", "b")):
        path = tmp_path / name
        make_task(encoder, seed=seed).save(path)
        shelf.put(name, make_task(encoder, seed=seed), source=str(path))
    read = shelf_module.read_source

    def removed_meanwhile(source):
        shelf.remove("a")
        (tmp_path / "a").unlink()
        return read(source)

    monkeypatch.setattr(shelf_module, "read_source", removed_meanwhile)
    with pytest.raises(UnknownTask, match="unknown task 'a'"):
        shelf.lease("a")


def test_a_file_that_changed_under_a_dropped_row_is_no_answer(encoder, tmp_path):
    shelf = Shelf(encoder, max_resident=1)
    put_saved(shelf, tmp_path, "a", make_task(encoder, seed=1))
    put_saved(shelf, tmp_path, "b", make_task(encoder, seed=2))
    make_task(encoder, seed=3).save(tmp_path / f"a{SUFFIX}")
    with pytest.raises(TaskFileError, match="put the task again"):
        shelf.lease("a")
    (tmp_path / f"a{SUFFIX}").unlink()
    with pytest.raises(TaskFileError, match="cannot be read"):
        shelf.lease("a")
    assert shelf.lease("b").version == 1


def test_many_threads_find_whole_rows_only(encoder, tmp_path):
    """Each lease has the row of the file that its fingerprint names."""
    shelf = Shelf(encoder, max_resident=2)
    files = [make_task(encoder, seed=i) for i in range(6)]
    rows = {f.seal[:FINGERPRINT]: shelf.tasks.fit(f).layout.expand(f.bias, shelf.tasks.bank.layout)
            for f in files}  # fmt: skip
    for i, file in enumerate(files):
        file.save(tmp_path / f"{i}{SUFFIX}")
    for name in "abc":
        shelf.put(name, files[0], source=str(tmp_path / f"0{SUFFIX}"))
    wrong, stop = [], threading.Event()

    def change(seed):
        generator = torch.Generator().manual_seed(seed)
        while not stop.is_set():
            name = "abc"[int(torch.randint(3, (1,), generator=generator))]
            which = int(torch.randint(6, (1,), generator=generator))
            try:
                shelf.put(name, files[which], source=str(tmp_path / f"{which}{SUFFIX}"))
                if which % 3 == 0:
                    shelf.rollback(name)
                if which % 3 == 1:
                    shelf.remove(name)
            except UsageError:
                pass  # removed by the other one, or nothing to roll back to
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=change, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    # By leases and not by rounds, which are over at once while all tasks are removed. The deadline
    # only ends a run that would never get there.
    seen, i, deadline = 0, 0, time.monotonic() + 120
    while seen <= 200 and not wrong and time.monotonic() < deadline:
        i += 1
        try:
            lease = shelf.lease("abc"[i % 3])
        except UnknownTask:
            continue
        with lease:
            seen += 1
            if not torch.equal(row_of(shelf, lease), rows[lease.fingerprint]):
                wrong.append(lease.fingerprint)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert seen > 200
    for name in [info.name for info in shelf.infos()]:
        shelf.remove(name)
    assert shelf.resident == 0
    assert shelf.tasks.bank.capacity < 40
