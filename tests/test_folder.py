import os

import pytest
from tiny import make_task

from bitfit.errors import UnreadableTaskFile
from bitfit.serve import folder as folder_module
from bitfit.serve.folder import Folder
from bitfit.serve.shelf import FINGERPRINT, Shelf
from bitfit.serve.sources import SUFFIX


@pytest.fixture
def encoder(open_tiny):
    return open_tiny()


@pytest.mark.parametrize("place", ["folder", "memory"])
def test_a_folder_is_followed(place, encoder, tmp_path):
    shelf = Shelf(encoder)
    if place == "folder":
        where, write = str(tmp_path), lambda name, data: (tmp_path / name).write_bytes(data)

        def delete(name):
            (tmp_path / name).unlink()
    else:
        import fsspec

        system, where = fsspec.filesystem("memory"), "memory://tasks"
        system.makedirs("/tasks", exist_ok=True)

        def write(name, data):
            system.pipe_file(f"/tasks/{name}", data)

        def delete(name):
            system.rm(f"/tasks/{name}")

    folder = Folder(shelf, where)
    assert folder.look() == []
    write("a" + SUFFIX, make_task(encoder, seed=1).to_bytes())
    write("b" + SUFFIX, b"no task file")
    write("other.txt", b"")
    found = folder.look()
    assert [(c.what, c.name) for c in found] == [("added", "a"), ("refused", "b")]
    assert found[0].info.version == 1
    assert "not a bitfit task file" in found[1].message
    assert folder.look() == []  # told once
    write("a" + SUFFIX, make_task(encoder, seed=2, description="new").to_bytes())
    write("b" + SUFFIX, make_task(encoder, seed=3).to_bytes())
    assert [(c.what, c.name) for c in folder.look()] == [("changed", "a"), ("added", "b")]
    assert shelf.info("a").version == 2
    assert shelf.rollback("a").fingerprint == make_task(encoder, seed=1).seal[:FINGERPRINT]
    write("a" + SUFFIX, b"damaged")
    assert [(c.what, c.name) for c in folder.look()] == [("refused", "a")]
    assert shelf.info("a").version == 3  # what answered goes on answering
    delete("b" + SUFFIX)
    assert [(c.what, c.name) for c in folder.look()] == [("removed", "b")]
    assert "b" not in shelf
    if place == "memory":
        system.rm("/tasks", recursive=True)


def test_a_file_that_is_written_again_as_it_was_undoes_nothing(encoder, tmp_path):
    shelf, path = Shelf(encoder), tmp_path / f"a{SUFFIX}"
    folder = Folder(shelf, str(tmp_path))
    make_task(encoder, seed=1).save(path)
    folder.look()
    newer = shelf.put("a", make_task(encoder, seed=2))
    os.utime(path, (1, 1))
    assert folder.look() == []
    assert shelf.info("a").fingerprint == newer.fingerprint
    shelf.remove("a")
    os.utime(path, (2, 2))
    assert folder.look() == []
    make_task(encoder, seed=3).save(path)
    assert [c.what for c in folder.look()] == ["added"]
    path.unlink()
    assert [c.what for c in folder.look()] == ["removed"]
    make_task(encoder, seed=3).save(path)
    assert [c.what for c in folder.look()] == ["added"]


def test_a_folder_that_cannot_be_read_is_told_and_removes_nothing(encoder, tmp_path):
    shelf = Shelf(encoder)
    path = tmp_path / "tasks"
    path.mkdir()
    make_task(encoder).save(path / f"a{SUFFIX}")
    make_task(encoder).save(path / f"bad name{SUFFIX}")
    folder = Folder(shelf, str(path))
    assert [c.what for c in folder.look()] == ["added", "refused"]
    os.rename(path, tmp_path / "away")
    assert [c.what for c in folder.look()] == ["refused"]
    assert [c.what for c in Folder(shelf, "nothing://there").look()] == ["refused"]
    assert "a" in shelf


def test_a_file_that_cannot_be_read_now_is_tried_again_and_told_once(
    encoder, tmp_path, monkeypatch
):
    shelf, path = Shelf(encoder), tmp_path / f"a{SUFFIX}"
    folder = Folder(shelf, str(tmp_path))
    make_task(encoder).save(path)
    read = folder_module.read_source

    def fails(source):
        raise UnreadableTaskFile(f"{source}: cannot be read: Stale file handle")

    monkeypatch.setattr(folder_module, "read_source", fails)
    assert [c.what for c in folder.look()] == ["refused"]
    assert folder.look() == []
    monkeypatch.setattr(folder_module, "read_source", read)
    assert [c.what for c in folder.look()] == ["added"]
    assert folder.look() == []
