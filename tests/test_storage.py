from __future__ import annotations

import errno
import json
import os
import stat

import pytest
import torch

from bitfit.errors import BitfitError, CorruptTaskFile, NotWritten
from bitfit.storage import (
    atomic_write,
    check_folder,
    dump_json,
    pack_safetensors,
    parse_json,
    read_header,
    unfinished_in,
    unpack_safetensors,
    whole_file,
    whole_folder,
)


def test_writing_makes_missing_folders_and_leaves_only_the_file(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    atomic_write(path, b"one")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["file.bin"]


def test_written_file_has_the_permissions_of_an_ordinary_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    atomic_write(tmp_path / "file", b"")
    modes = [stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("plain", "file")]
    assert modes[0] == modes[1]


def test_writing_through_a_link_keeps_the_link(tmp_path):
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    atomic_write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch, call, failure
):
    path = tmp_path / "file.bin"
    atomic_write(path, b"old")

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(os, call, fail)
    expected = BitfitError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        atomic_write(path, b"new")
    if expected is BitfitError:
        assert str(path) in str(caught.value)
        assert "No space left" in str(caught.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_a_write_removes_what_killed_writes_of_its_file_left_and_nothing_else(tmp_path):
    path = tmp_path / "a[1].bin"
    old, young = f".{path.name}.{'0a' * 6}.tmp", f".{path.name}.{'1b' * 6}.tmp"
    others = [f".b.bin.{'0a' * 6}.tmp", ".a[1].bin.mine.tmp", f".a1.bin.{'0a' * 6}.tmp", "a.tmp"]
    for name in (old, young, *others):
        (tmp_path / name).write_bytes(b"")
    for name in (old, *others):
        os.utime(tmp_path / name, (0, 0))
    atomic_write(path, b"new")
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, young, *others])


def test_leftovers_that_cannot_be_removed_are_no_failed_write(tmp_path):
    left = tmp_path / f".file.{'0a' * 6}.tmp"
    left.mkdir()  # unlink refuses a folder
    os.utime(left, (0, 0))
    atomic_write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert left.is_dir()


def test_write_onto_a_directory_or_below_a_file_is_an_error_with_the_path(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path, tmp_path / "file" / "below"):
        with pytest.raises(BitfitError, match=str(path)):
            atomic_write(path, b"new")
    assert os.listdir(tmp_path) == ["file"]


def test_text_is_there_when_all_of_it_is_written_with_its_line_ends(tmp_path):
    path = tmp_path / "text"

    def write(*parts):
        with whole_file(path, encoding="utf-8") as file:
            for part in parts:
                file.write(part)

    write("é\n", "\r\n")
    assert path.read_bytes() == "é\n\r\n".encode()
    with pytest.raises(TypeError):
        write("half", None)
    assert path.read_bytes() == "é\n\r\n".encode()
    assert os.listdir(tmp_path) == ["text"]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_folder_that_was_not_written_to_its_end_is_as_it_was(tmp_path, failure):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    (old / "a").write_text("old")

    def write(path):
        with whole_folder(path, last="mark") as folder:
            (folder / "a").write_text("new")
            raise failure

    for path in (old, new):
        with pytest.raises(NotWritten if isinstance(failure, OSError) else KeyboardInterrupt):
            write(path)
    assert (old / "a").read_text() == "old"
    assert os.listdir(old) == ["a"]
    assert os.listdir(tmp_path) == ["old"]


def test_a_folders_new_files_take_the_place_of_the_old_ones_and_the_mark_comes_last(
    tmp_path, monkeypatch
):
    for name in ("a", "mark", "of the user"):
        (tmp_path / name).write_text("old")
    replace, seen = os.replace, []

    def watch(source, target):
        seen.append((os.path.basename(target), (tmp_path / "mark").exists()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    (tmp_path / ".unfinished-0a.tmp").mkdir()  # of one that was killed
    with whole_folder(tmp_path, last="mark") as folder:
        (folder / "z").mkdir()
        for name in ("a", "mark", "z/b"):
            (folder / name).write_text("new")
        assert len(unfinished_in(tmp_path)) == 2
    assert seen == [("a", False), ("b", False), ("mark", False)]
    assert unfinished_in(tmp_path) == []
    found = {
        str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*") if p.is_file()
    }
    assert found == {"a": "new", "mark": "new", "z/b": "new", "of the user": "old"}


def test_packing_is_exact_and_gives_the_same_bytes_in_any_order():
    tensors = {
        "z": torch.randn(3, 4).T,
        "a": torch.tensor([1, -2], dtype=torch.int8),
        "empty": torch.zeros(0),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "b16": torch.randn(5).bfloat16(),
    }
    tensors["shared"] = tensors["b16"][1:]
    data = pack_safetensors(tensors, "key", "text é")
    assert data == pack_safetensors(dict(reversed(tensors.items())), "key", "text é")
    found, text = unpack_safetensors(data, "key", source="x")
    assert text == "text é"
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


def test_unpacking_raises_the_error_asked_for_and_names_the_kind_of_file():
    with pytest.raises(BitfitError, match=r"here: not a bitfit checkpoint: 2 bytes") as caught:
        unpack_safetensors(b"xy", "k", source="here", what="checkpoint", error=BitfitError)
    assert not isinstance(caught.value, CorruptTaskFile)


@pytest.mark.parametrize("text", ["text,label\r\ngood,1\n", "\ufeffa name\tand more", "é" * 200])
def test_a_text_file_is_called_one(text):
    with pytest.raises(CorruptTaskFile, match=r"t: not a bitfit task file: it looks like a text"):
        read_header(text.encode(), "k", source="t")
    with pytest.raises(CorruptTaskFile, match="its header claims"):
        read_header(b"\x01" + text.encode(), "k", source="t")


def test_a_folder_that_takes_files_is_told_from_one_that_does_not(tmp_path):
    check_folder(tmp_path)
    check_folder(tmp_path / "not" / "there")
    assert not [*tmp_path.iterdir()]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError) as caught:
        check_folder(tmp_path / "file" / "below")
    assert caught.value.filename == str(tmp_path / "file")


def test_a_second_metadata_key_is_refused():
    header = json.dumps({"__metadata__": {"k": "1", "l": "2"}}).encode()
    with pytest.raises(CorruptTaskFile, match="must be the one key 'k'"):
        read_header(len(header).to_bytes(8, "little") + header, "k", source="x")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a":1,"a":2}', "'a' is given twice"),
        ('{"a":{"b":1,"b":1}}', "'b' is given twice"),
        ("[NaN]", "NaN"),
        ("[-Infinity]", "Infinity"),
        ("[1e999]", "out of range"),
        ("[1] x", "Extra data"),
        ('"\\ud800"', "surrogates"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 10_000, "digits"),
        (b"\xff", "decode"),
    ],
)
def test_json_that_readers_disagree_about_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


def test_json_is_written_sorted_compact_and_without_nan():
    assert dump_json({"b": [1, 0.5], "a": "é"}) == '{"a":"é","b":[1,0.5]}'
    for bad in (float("nan"), float("inf"), "\ud800"):
        with pytest.raises(ValueError):
            dump_json([bad])


def test_a_name_as_long_as_the_system_allows_is_written(tmp_path):
    path = tmp_path / ("好" * 80)  # 240 bytes
    atomic_write(path, b"x")
    assert path.read_bytes() == b"x"
