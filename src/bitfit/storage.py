"""Files that are whole or not there at all: atomic writing, and safetensors with one JSON document.

Used by task files and by checkpoints. Reading trusts nothing: sizes are checked before anything is
parsed, and nothing is ever unpickled.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import safetensors.torch
import torch

from bitfit.errors import BitfitError, CorruptTaskFile, NotWritten

if TYPE_CHECKING:
    from torch import Tensor

# A temporary file that is older than this is of a write that was killed.
STALE_SECONDS = 3600
# How the folder begins that a folder's new files are written into.
_UNFINISHED = ".unfinished-"
# So many bytes tell a text file.
_LOOKED_AT = 256
# What a file of another kind begins with.
_FOREIGN = {
    b"PK\x03\x04": "a zip archive, as torch.save writes (.bin, .pt); it may hold pickled code",
    b"\x80\x02": "a Python pickle, which can run code",
    b"\x80\x03": "a Python pickle, which can run code",
    b"\x80\x04": "a Python pickle, which can run code",
    b"\x80\x05": "a Python pickle, which can run code",
    b"\x89HDF": "an HDF5 file",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "a gzip archive",
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file itself with 'git lfs pull'",
    b"<": "a web page",
    b"{": "JSON text",
}


class Digest(Protocol):
    """What this package needs of an object from :mod:`hashlib`."""

    def update(self, data: Any, /) -> None:
        """Take in ``data``, bytes or a buffer of bytes."""


@dataclass(frozen=True)
class Header:
    """The head of a safetensors file with exactly one metadata key."""

    tensors: dict[str, dict[str, Any]]
    """By name: ``dtype``, ``shape`` and ``data_offsets``, not yet checked."""
    text: str
    """The value of the one metadata key."""


def atomic_write(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that after any failure the old file or the new one is there.

    Raises:
        NotWritten: as of :func:`whole_file`.
    """
    with whole_file(path) as file:
        file.write(data)


@contextmanager
def whole_file(path: str | Path, encoding: str | None = None) -> Iterator[IO[Any]]:
    """Open ``path`` for writing; it is there once all is written, or as it was before.

    A temporary file beside the target is written, synced and renamed. Missing folders are made.

    Args:
        path: where.
        encoding: of text, whose line ends are written as they are; None: bytes are written.

    Raises:
        NotWritten: with the path and the system's reason (permission, no space, a directory).
    """
    target = Path(os.path.realpath(path))  # a link stays a link
    temporary = target.with_name(f".{target.name[:50]}.{secrets.token_hex(6)}.tmp")
    mode, newline = ("xb", None) if encoding is None else ("x", "")
    with writing(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open(mode, encoding=encoding, newline=newline) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:  # Ctrl-C too must not leave the temporary file
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)
    with suppress(OSError):  # the file is written: what is left over may stay
        _remove_leftovers(target)


@contextmanager
def whole_folder(path: str | Path, last: str) -> Iterator[Path]:
    """Yield an empty folder, whose files replace those of ``path`` once all of them are written.

    They are moved there one by one: who is killed or fails just then leaves some of both, and the
    folder that was yielded with the rest. Files of other names stay.

    Args:
        path: where; made if it is not there.
        last: the file that is moved last. What has it is whole.

    Raises:
        NotWritten: with the path and the system's reason; ``path`` is as it was before, unless
            what failed was a move.
    """
    target = Path(os.path.realpath(path))
    # In the target, which may be of another file system than the folder that holds it.
    temporary = target / f"{_UNFINISHED}{secrets.token_hex(6)}.tmp"
    is_new = not target.exists()
    with writing(path):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            names = _synced_files(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if is_new:
                with suppress(OSError):
                    target.rmdir()
            raise
        _move_files(names, temporary, target, last)
        for left in unfinished_in(target):
            shutil.rmtree(left, ignore_errors=True)


def unfinished_in(folder: Path) -> list[Path]:
    """Return the folders of new files that a killed :func:`whole_folder` left in ``folder``."""
    return sorted(folder.glob(f"{_UNFINISHED}*.tmp"))


def _synced_files(folder: Path) -> list[Path]:
    """Return the files below a folder, relative to it; the loss of power leaves them whole."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return [path.relative_to(folder) for path in paths]


def _move_files(names: Sequence[Path], source: Path, target: Path, last: str) -> None:
    """Move files to the same places below another folder; ``last`` is gone meanwhile."""
    (target / last).unlink(missing_ok=True)
    for name in sorted(names, key=lambda name: (str(name) == last, name)):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / name, target / name)
    _sync_folder(target)


def check_folder(folder: str | Path) -> None:
    """Make sure that files can be made in ``folder``, or in the nearest above it that is there.

    A file is made and removed: the permissions that a folder has do not tell of all file systems.

    Raises:
        OSError: with the folder that takes none as its ``filename``.
    """
    place = Path(os.path.realpath(folder))
    while not place.exists() and place != place.parent:
        place = place.parent
    probe = place / f".bitfit.{secrets.token_hex(6)}.tmp"
    try:
        probe.open("xb").close()
        probe.unlink()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(place)) from error


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Around what writes to ``path``: what the system refuses there is a failure and no bug.

    Raises:
        NotWritten: with the path and the system's reason.
    """
    try:
        yield
    except OSError as error:
        raise NotWritten(f"{path}: cannot be written: {error.strerror or error}") from error


def _remove_leftovers(target: Path) -> None:
    """Remove what killed writes of ``target`` left an hour before it, longer than a write takes.

    By the times of one file system: its clock need not be this machine's.
    """
    name = re.compile(rf"\.{re.escape(target.name[:50])}\.[0-9a-f]{{12}}\.tmp")
    written = target.stat().st_mtime
    for path in target.parent.iterdir():
        if name.fullmatch(path.name) and path.lstat().st_mtime < written - STALE_SECONDS:
            path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` outlast a loss of power; Windows has no such call."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def dump_json(value: Any) -> str:
    """Return ``value`` as compact JSON: keys sorted, text as it is, no NaN.

    Raises:
        ValueError: NaN, infinity, or text that UTF-8 cannot hold.
        TypeError: something that JSON has no form for.
    """
    text = json.dumps(
        value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False
    )
    text.encode()  # a lone surrogate fails here, and not in another library
    return text


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON document, refusing what readers disagree about.

    Raises:
        ValueError: bad JSON, a key given twice, NaN, infinity, a number out of range, or nesting
            too deep to read.
    """
    try:
        value = json.loads(
            text.decode() if isinstance(text, bytes) else text,
            object_pairs_hook=_unique_keys,
            parse_constant=_no_constant,
            parse_float=_finite_float,
        )
        json.dumps(value, ensure_ascii=False).encode()  # fails on half a character
        return value
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r:.80} is given twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"number {digits:.40} is out of range")
    return value


def pack_safetensors(tensors: Mapping[str, Tensor], key: str, text: str) -> bytes:
    """Return a safetensors file whose one metadata key ``key`` holds ``text``.

    One key, for several would be written in random order: equal input gives equal bytes.
    """
    # Clones: the library refuses tensors that share memory.
    own = {name: t.detach().cpu().contiguous().clone() for name, t in sorted(tensors.items())}
    return safetensors.torch.save(own, metadata={key: text})


def unpack_safetensors(
    data: bytes,
    key: str,
    *,
    source: str = "the file",
    what: str = "file",
    max_header: int = 1 << 20,
    error: type[BitfitError] = CorruptTaskFile,
) -> tuple[dict[str, Tensor], str]:
    """Return the tensors and the text that :func:`pack_safetensors` was given.

    Args:
        data: the whole file.
        key: the metadata key expected.
        source: what messages call the file, its path as a rule.
        what: what messages call its kind.
        max_header: bytes of header above which it is refused unread.
        error: the exception raised.

    Raises:
        BitfitError: as ``error``: truncated, foreign, or otherwise not written by
            :func:`pack_safetensors`.
    """
    header = read_header(data, key, source=source, what=what, max_header=max_header, error=error)
    return read_tensors(data, source=source, error=error), header.text


def read_header(
    data: bytes,
    key: str,
    *,
    source: str,
    what: str = "task file",
    max_header: int = 1 << 20,
    error: type[BitfitError] = CorruptTaskFile,
) -> Header:
    """Return the header of a file of :func:`pack_safetensors`; arguments as there."""
    for magic, kind in _FOREIGN.items():
        if data.startswith(magic) and not _header_follows(data, max_header):
            raise error(f"{source}: not a bitfit {what} but {kind}; nothing of it was read")
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length < 2:
        raise error(f"{source}: not a bitfit {what}: {len(data)} bytes, no safetensors header")
    if length > max_header and _is_text(data[:_LOOKED_AT]):
        raise error(
            f"{source}: not a bitfit {what}: it looks like a text file; nothing of it was read"
        )
    if length > max_header:
        raise error(
            f"{source}: not a bitfit {what}: its header claims {length} bytes, "
            f"at most {max_header} are read"
        )
    if 8 + length > len(data):
        raise error(
            f"{source}: truncated: the header alone has {length} bytes, the file has "
            f"{len(data)}; copy it again"
        )
    try:
        found = parse_json(data[8 : 8 + length])
    except ValueError as bad:
        raise error(f"{source}: the header is damaged ({_short(bad)}); copy it again") from None
    return _checked_header(found, key, f"{source}: not a bitfit {what}", error)


def _is_text(begin: bytes) -> bool:
    """Whether bytes are those of a plain text: UTF-8 without control characters."""
    # Not final: a character may be cut in two at the end.
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(begin)
    except UnicodeDecodeError:
        return False
    return bool(text) and all(c.isprintable() or c in "\t\r\n\ufeff" for c in text)


def _header_follows(data: bytes, max_header: int) -> bool:
    """Whether the first bytes are a safetensors length and no foreign magic number after all."""
    return 2 <= int.from_bytes(data[:8], "little") <= max_header and data[8:9] == b"{"


def _checked_header(found: Any, key: str, refused: str, error: type[BitfitError]) -> Header:
    if not isinstance(found, dict):
        raise error(f"{refused}: its header is no JSON object")
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or key not in metadata:
        raise error(f"{refused}: no metadata {key!r}. {_looks_like(found)}")
    if len(metadata) != 1 or not isinstance(metadata[key], str):
        raise error(f"{refused}: its metadata must be the one key {key!r} with text")
    if not all(isinstance(entry, dict) for entry in found.values()):
        raise error(f"{refused}: its header describes no tensors")
    return Header(found, metadata[key])


def _looks_like(tensors: Mapping[str, Any]) -> str:
    names = sorted(tensors)
    if any("lora_" in name for name in names):
        kind = "an adapter of peft (LoRA)"
    elif any(name.startswith("base_model.") for name in names):
        kind = "an adapter of peft"
    elif any("layer" in name or name.startswith("embeddings") for name in names):
        kind = "the weights of a plain model"
    else:
        kind = "a safetensors file of another program"
    first = f", first {names[0]!r:.80}" if names else ""
    return f"It looks like {kind} ({len(names)} tensors{first})"


def read_tensors(
    data: bytes, *, source: str, error: type[BitfitError] = CorruptTaskFile
) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, copied out of ``data``.

    Raises:
        BitfitError: as ``error``, for anything that is not a whole and exact safetensors file.
    """
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except Exception as bad:  # the library raises its own error, KeyError, RuntimeError, ...
        reason = _short(bad)
        if re.search(r"InvalidOffset|Incomplete|TooSmall|buffer", reason):
            reason = f"its {len(data)} bytes are not those that its header describes"
        raise error(f"{source}: truncated or damaged: {reason}; copy it again") from None
    if odd := [name for name, tensor in tensors.items() if tensor.dtype not in _DTYPES]:
        raise error(f"{source}: tensor {odd[0]!r:.80} has type {tensors[odd[0]].dtype}")
    return tensors


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:120]


# torch's name -> safetensors' name, which hashes are made over.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def hash_tensor(digest: Digest, name: str, tensor: Tensor) -> None:
    r"""Feed ``tensor`` to ``digest``: ``["name","F32",[2,3]]\n``, then its bytes as stored."""
    dtype = _DTYPES.get(tensor.dtype) or str(tensor.dtype)
    digest.update(f"{dump_json([name, dtype, list(tensor.shape)])}\n".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy())


def hash_text(text: str) -> str:
    """Return the SHA-256 of ``text`` as 64 hex digits."""
    return sha256(text.encode()).hexdigest()
