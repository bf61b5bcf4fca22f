"""The task file: one row of biases, a head, and what is needed to refuse misuse (format 1).

One safetensors file with one JSON document in its header; docs/task-file.md specifies it byte by
byte. A file is checked from the outside in: size, header, JSON, format number, hash, content.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import stat
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from bitfit import fields
from bitfit.bank import parse_layout
from bitfit.errors import (
    CorruptTaskFile,
    TaskFileError,
    UnreadableTaskFile,
    UnsupportedFormat,
    UsageError,
)
from bitfit.identity import BaseIdentity, is_sha256
from bitfit.rounding import STORAGE_TYPES, StorageType, dequantize, quantize
from bitfit.storage import (
    atomic_write,
    dump_json,
    hash_tensor,
    pack_safetensors,
    parse_json,
    read_header,
    read_tensors,
)
from bitfit.tasks import BUILTIN_TASKS, BuiltinTask, Task

FORMAT = 1
KEY = "bitfit"
MAX_BYTES = 64 << 20
"""A larger file is refused before it is read."""
MAX_HEADER = 1 << 20
MAX_METADATA = 1 << 19
MAX_TENSORS = 64
MAX_OVERHEAD = 16 << 10
"""Bytes of a file beside its tensors, label names, licence and description."""
_PROSE = ("labels", "licence", "description")

Method = Literal["bitfit", "frozen"]


def _package_version() -> str:
    try:
        return importlib.metadata.version("bitfit")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "0+unknown"


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskFile:
    """One task: what it adds to its base, its head, and where it came from."""

    task: Task
    """Kind, label names and metrics."""
    bias: Tensor
    """``(n,)`` fp32: the difference to the base's biases, so zero is the base."""
    layout: list[list[Any]]
    """``[[term, layers, length], ...]`` as :meth:`bitfit.bank.Layout.to_json` gives it."""
    head: dict[str, Tensor]
    """fp32 by transformers' names: ``classifier.weight`` ``(outputs, hidden)``, ..."""
    head_style: str
    """``linear`` or ``roberta``."""
    pooling: str
    """``pooler``, ``cls``, ``mean``, or ``none`` where every token has logits."""
    max_length: int
    """Longer texts were cut here, in tokens."""
    base: BaseIdentity
    """The base it was trained on: the only one it works with."""
    tokenizer: str
    """:func:`bitfit.identity.tokenizer_hash` of the tokenizer it was trained with."""
    method: Method = "bitfit"
    """``frozen``: only the head was trained."""
    terms: str = "all"
    """The bias terms as the user asked for them; the layout says what that came to."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The resolved training configuration with seed, rate, epochs and choice of the epoch."""
    scores: dict[str, float] = field(default_factory=dict)
    """Metric -> fraction on dev; NaN where it is not defined."""
    temperature: float | None = None
    """Logits are divided by it before they become probabilities."""
    calibration: dict[str, Any] | None = None
    """Calibration error before and after the temperature."""
    truncated_share: float | None = None
    """Share of the training texts that ``max_length`` cut."""
    data_hash: str | None = None
    """Hash of the training data."""
    licence: str | None = None
    description: str | None = None
    """Free text: a model card in the file."""
    probes: Sequence[Mapping[str, Any]] = ()
    """``{"text", "text_pair", "logits"}``: what the task must answer on any machine."""
    dtype: StorageType = "fp32"
    """How the biases are (or were) stored; in memory they are fp32."""
    package_version: str = field(default_factory=_package_version)
    # Of the file it was read from; no field: a changed copy has none until it is asked for.
    _seal: ClassVar[str | None] = None

    @property
    def seal(self) -> str:
        """The SHA-256 in the file, over all that it holds, as 64 hex digits.

        Of a task that was not read from a file: what saving it (as ``dtype``) would write.
        """
        if self._seal is None:
            written = TaskFile.from_bytes(self.to_bytes(self.dtype)).seal
            object.__setattr__(self, "_seal", written)
        assert self._seal is not None
        return self._seal

    @property
    def n(self) -> int:
        """The number of bias values."""
        return self.bias.numel()

    @property
    def head_size(self) -> int:
        """The number of values in the head."""
        return sum(t.numel() for t in self.head.values())

    @property
    def score(self) -> float:
        """The headline score, NaN if there is none."""
        return self.scores.get(self.task.metric, math.nan)

    @property
    def builtin(self) -> BuiltinTask | None:
        """The built-in task that the file was made for, if it was, whatever its name is."""
        # Files of 0.1.0 do not say it: they are known by the task's own name only.
        found = BUILTIN_TASKS.get(str(self.recipe.get("builtin_task", self.task.name)))
        if found is None or found.task.kind != self.task.kind:
            return None
        return found if found.open_labels or found.task.labels == self.task.labels else None

    def save(self, path: str | Path, dtype: StorageType = "fp32") -> None:
        """Write the file at once or not at all; see :meth:`to_bytes`.

        Raises:
            UsageError: something in it cannot be stored.
            BitfitError: ``path`` cannot be written.
        """
        atomic_write(path, self.to_bytes(dtype))

    def to_bytes(self, dtype: StorageType = "fp32") -> bytes:
        """Return the file's bytes; equal contents give equal bytes.

        Probes are dropped from the last on where the file's promised size leaves no room for them.

        Raises:
            UsageError: something in it cannot be stored, or is too large.
        """
        if dtype not in STORAGE_TYPES:
            raise UsageError(f"storage type {dtype!r} is not one of {', '.join(STORAGE_TYPES)}")
        file = replace(self, dtype=dtype, probes=[_plain_probe(p) for p in self.probes])
        try:
            tensors = _stored_tensors(file)
            data = _sealed(file, tensors)
            while (over := _overhead(data, file, tensors) - MAX_OVERHEAD) > 0 and file.probes:
                file = replace(file, probes=file.probes[:-1])
                data = _sealed(file, tensors)
            if over <= 0:
                TaskFile.from_bytes(data, source=f"task {self.task.name!r}")
                return data
        except (TaskFileError, TypeError, ValueError) as error:
            raise UsageError(f"this task cannot be stored: {error}") from error
        sizes = {key: len(dump_json(value).encode()) for key, value in _document(file).items()}
        largest = max(sizes.keys() - {*_PROSE, "task"}, key=lambda key: sizes[key])
        raise UsageError(
            f"task {self.task.name!r} cannot be stored: beside numbers, labels, licence and "
            f"description a file has room for {MAX_OVERHEAD} bytes, this one needs {over} more; "
            f"shorten the largest, {largest!r} ({sizes[largest]} bytes)"
        )

    @classmethod
    def load(cls, path: str | Path) -> TaskFile:
        """Return the task in the file at ``path``, its biases in fp32.

        Raises:
            CorruptTaskFile: not a whole and unaltered task file.
            UnsupportedFormat: written by a newer bitfit in a format unknown to this one.
        """
        return cls.from_bytes(_read_limited(Path(path)), source=str(path))

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "task file") -> TaskFile:
        """Return the task in ``data``, the whole file; ``source`` is what messages call it.

        Raises:
            CorruptTaskFile: not a whole and unaltered task file.
            UnsupportedFormat: written by a newer bitfit in a format unknown to this one.
        """
        data = bytes(data)
        _check_size(len(data), source)
        header = read_header(data, KEY, source=source, max_header=MAX_HEADER)
        document = _parse_document(header.text, source)
        if len(header.tensors) > MAX_TENSORS:
            raise CorruptTaskFile(
                f"{source}: {len(header.tensors)} tensors, at most {MAX_TENSORS} are expected"
            )
        tensors = read_tensors(data, source=source)
        _check_hash(document, header.text, tensors, source)
        try:
            return _with_seal(_decode(document, tensors), document["sha256"])
        except TaskFileError as error:
            raise CorruptTaskFile(
                f"{source}: {error}. The file is whole but was not written by bitfit as it should "
                "be; ask its author for a good one"
            ) from error


def strip(file: TaskFile) -> bytes:
    """Return all of a task but its numbers and its base's digests, compressed."""
    base = {"name": file.base.name, "revision": file.base.revision}
    document = _document(file) | {"base": base, "sha256": file.seal}
    return zlib.compress(dump_json(document).encode(), level=1)


def restore(
    stripped: bytes, bias: Tensor, head: Mapping[str, Tensor], base: BaseIdentity
) -> TaskFile:
    """Return the task that :func:`strip` was given.

    Args:
        stripped: what it returned.
        bias: ``(n,)`` in fp32, in the order of the task's layout.
        head: the head's tensors.
        base: who the base is; what the task's author called it is restored.
    """
    document = json.loads(zlib.decompress(stripped))
    document["base"] = base.to_json() | document["base"]
    dtype, document["dtype"] = document["dtype"], "fp32"
    tensors = {f"head.{name}": tensor for name, tensor in head.items()} | {"bias": bias}
    return _with_seal(replace(_decode(document, tensors), dtype=dtype), document["sha256"])


def _with_seal(file: TaskFile, seal: str) -> TaskFile:
    object.__setattr__(file, "_seal", seal)  # frozen for everyone else
    return file


# --- reading -----------------------------------------------------------------------------------


def _read_limited(path: Path) -> bytes:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no ordinary file"
            raise CorruptTaskFile(f"{path}: is {kind}, a task file (*.bitfit.safetensors) expected")
        _check_size(status.st_size, str(path))
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)  # it may grow between the two calls
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or error
        raise UnreadableTaskFile(f"{path}: cannot be read: {reason}") from error


def _check_size(size: int, source: str) -> None:
    if size > MAX_BYTES:
        raise CorruptTaskFile(
            f"{source}: {size} bytes, a task file has at most {MAX_BYTES}; this is something else"
        )


def _parse_document(text: str, source: str) -> dict[str, Any]:
    """Return the JSON document after a look at its size and at its format number only."""
    if len(text) > MAX_METADATA or len(text.encode()) > MAX_METADATA:
        raise CorruptTaskFile(f"{source}: more than {MAX_METADATA} bytes of metadata; refused")
    try:
        found = parse_json(text)
    except ValueError as error:
        raise CorruptTaskFile(
            f"{source}: damaged metadata ({str(error)[:120]}); copy the file again"
        ) from None
    document: dict[str, Any] = found if isinstance(found, dict) else {}
    number = document.get("format")
    if type(number) is not int or number < 1:
        raise CorruptTaskFile(f"{source}: damaged metadata: no format number; copy the file again")
    if number > FORMAT:
        version = str(document.get("package_version", "a newer one"))
        raise UnsupportedFormat(
            f"{source}: format {str(number)[:20]}, written by bitfit {version!r:.40}; this bitfit "
            f"({_package_version()}) reads up to {FORMAT}; upgrade: pip install -U bitfit"
        )
    return document


def _check_hash(
    document: Mapping[str, Any], text: str, tensors: Mapping[str, Tensor], source: str
) -> None:
    wanted = str(document.get("sha256"))
    written = f'"sha256":"{wanted}"'
    if not is_sha256(wanted) or text.count(written) != 1:
        raise CorruptTaskFile(f"{source}: its SHA-256 is missing or damaged; copy the file again")
    found = _file_hash(text.replace(written, '"sha256":""'), tensors)
    if found != wanted:
        raise CorruptTaskFile(
            f"{source}: its content has SHA-256 {found[:12]}…, {wanted[:12]}… expected: the file "
            "was altered or damaged after it was written; copy it again"
        )


def _file_hash(blanked_text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = sha256()
    for name in sorted(tensors):
        hash_tensor(digest, name, tensors[name])
    digest.update(blanked_text.encode())
    return digest.hexdigest()


# --- what the fields may hold -------------------------------------------------------------------


def _decode(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TaskFile:
    """Return the task, every field checked.

    Raises:
        TaskFileError: naming the field or tensor, and what was expected of it.
    """
    if odd := sorted(document.keys() ^ _FIELDS):
        missing = [key for key in odd if key in _FIELDS]
        raise TaskFileError(
            f"field {odd[0]!r:.80} is {'missing' if odd[0] in missing else 'unknown in format 1'}"
        )
    task = fields.task_of(document["task"])
    dtype = fields.choice(document, "dtype", tuple(STORAGE_TYPES))
    bias = _decode_bias(tensors, document["layout"], dtype)
    head = {k.removeprefix("head."): t for k, t in tensors.items() if k.startswith("head.")}
    _check_head(head, task)
    if not is_sha256(document["tokenizer"]):
        raise fields.wrong("tokenizer", "64 lower-case hex digits", document["tokenizer"])
    return TaskFile(
        task=task,
        bias=bias,
        layout=document["layout"],
        head=head,
        head_style=fields.choice(document, "head_style", (head_style_of(head),)),
        pooling=fields.choice(document, "pooling", _poolings_of(task)),
        max_length=fields.max_length(document),
        base=BaseIdentity.from_json(document["base"]),
        tokenizer=document["tokenizer"],
        method=fields.choice(document, "method", get_args(Method)),
        terms=fields.text_of(document, "terms"),
        recipe=fields.object_of(document, "recipe"),
        scores=fields.scores(document),
        temperature=fields.number(document, "temperature", low=1e-6, high=1e6),
        calibration=fields.calibration(document),
        truncated_share=fields.number(document, "truncated_share", low=0, high=1),
        data_hash=fields.optional_text(document, "data_hash"),
        licence=fields.optional_text(document, "licence"),
        description=fields.optional_text(document, "description"),
        probes=fields.probes(document, task),
        dtype=dtype,
        package_version=fields.text_of(document, "package_version"),
    )


_FIELDS = frozenset(
    """
    base calibration data_hash description dtype format head_style layout licence max_length method
    package_version pooling probes recipe scores sha256 task temperature terms tokenizer
    truncated_share
    """.split()
)


# --- tensors ------------------------------------------------------------------------------------


def _decode_bias(tensors: Mapping[str, Tensor], layout: object, dtype: StorageType) -> Tensor:
    """Return the biases ``(n,)`` in fp32 after a check of every tensor's name, type and values."""
    needed = {"bias", "bias_scale"} if dtype == "int8" else {"bias"}
    if missing := sorted(needed - tensors.keys()):
        raise TaskFileError(f"tensor {missing[0]!r} is missing")
    for name, tensor in tensors.items():
        if name not in needed and not re.fullmatch(r"head(\.[A-Za-z0-9_]{1,64}){1,8}", name):
            raise TaskFileError(f"tensor {name!r:.80} is unknown in format 1")
        expected = STORAGE_TYPES[dtype] if name == "bias" else torch.float32
        if tensor.dtype != expected:
            raise TaskFileError(f"tensor {name!r} is {tensor.dtype}, expected {expected}")
        if not torch.isfinite(tensor).all():
            raise TaskFileError(f"tensor {name!r} holds NaN or infinite values")
    lengths = [length for *_, length in stretches(layout)]
    bias = tensors["bias"]
    if bias.shape != (sum(lengths),):
        raise TaskFileError(
            f"tensor 'bias' has shape {list(bias.shape)}, the layout says [{sum(lengths)}]"
        )
    if dtype == "int8":
        scale = tensors["bias_scale"]
        if scale.shape != (len(lengths),):
            raise TaskFileError(
                f"tensor 'bias_scale' has shape {list(scale.shape)}, expected [{len(lengths)}]"
            )
        bias = dequantize(bias, scale, lengths)
        if not torch.isfinite(bias).all():
            raise TaskFileError("tensor 'bias_scale' makes infinite biases")
    return bias.to(torch.float32)


def head_style_of(head: Mapping[str, Tensor]) -> str:
    """Return the style of a head by its tensors: ``roberta`` or ``linear``."""
    return "roberta" if "classifier.out_proj.weight" in head else "linear"


def _poolings_of(task: Task) -> tuple[str, ...]:
    """Return what may be said of how a task's sequences become vectors."""
    return ("none",) if task.kind in ("tokens", "span") else ("pooler", "cls", "mean")


def _check_head(head: Mapping[str, Tensor], task: Task) -> None:
    """Refuse a head whose shapes do not fit each other and the number of labels."""
    for name, tensor in head.items():
        weight = head.get(name.removesuffix("bias") + "weight") if name.endswith("bias") else None
        if tensor.ndim not in (1, 2) or (weight is not None and tensor.shape != weight.shape[:1]):
            raise TaskFileError(f"tensor 'head.{name}' has a wrong shape {list(tensor.shape)}")
    weights = {name: t for name, t in head.items() if t.ndim == 2}
    last = [n for n in weights if n.split(".")[-2:-1] in (["out_proj"], ["qa_outputs"])]
    last = last or [n for n in weights if n.split(".")[-2:-1] == ["classifier"]]
    if len(last) != 1:
        raise TaskFileError(
            "the head has no single output layer (classifier, classifier.out_proj or qa_outputs)"
        )
    rows, hidden = weights[last[0]].shape
    if rows != task.num_outputs:
        raise TaskFileError(
            f"tensor 'head.{last[0]}' has {rows} rows, task {task.name!r} needs {task.num_outputs}"
        )
    for name, weight in weights.items():
        if name != last[0] and weight.shape[0] != hidden:
            raise TaskFileError(f"tensor 'head.{name}' does not fit 'head.{last[0]}'")


def stretches(layout: object) -> list[tuple[str, int | None, int, int]]:
    """Return ``(term, layer, start, length)`` of every site in the order of the row.

    Args:
        layout: as a task file holds it.

    Raises:
        TaskFileError: it is no such layout.
    """
    # Before it is unfolded: "0-999,0-999,..." grows three hundredfold.
    texts = (
        [e[1] for e in layout if isinstance(e, list) and len(e) == 3]
        if isinstance(layout, list)
        else []
    )
    if sum(len(text) for text in texts if isinstance(text, str)) > MAX_OVERHEAD:
        raise TaskFileError("the layout in the file is too long")
    found, start = [], 0
    for term, layers, length in parse_layout(layout):
        for layer in layers:
            found.append((term, layer, start, length))
            start += length
    return found


# --- writing ------------------------------------------------------------------------------------


def _stored_tensors(file: TaskFile) -> dict[str, Tensor]:
    """Return the tensors as the file holds them, by name."""
    bias = file.bias.detach().cpu().float()
    lengths = [length for *_, length in stretches(file.layout)]
    if bias.shape != (sum(lengths),):
        raise TaskFileError(f"bias has shape {list(bias.shape)}, the layout says [{sum(lengths)}]")
    if not torch.isfinite(bias).all():
        raise TaskFileError("tensor 'bias' holds NaN or infinite values")
    tensors = {f"head.{name}": t.detach().cpu().float() for name, t in file.head.items()}
    if file.dtype == "int8":
        tensors["bias"], tensors["bias_scale"] = quantize(bias, lengths)
        return tensors
    tensors["bias"] = bias.to(STORAGE_TYPES[file.dtype])
    if not torch.isfinite(tensors["bias"]).all():
        raise TaskFileError(f"a bias of {bias.abs().max():.3g} does not fit into {file.dtype}")
    return tensors


def _sealed(file: TaskFile, tensors: Mapping[str, Tensor]) -> bytes:
    """Return the file's bytes with the hash in its place."""
    document = _document(file)
    digest = _file_hash(dump_json({**document, "sha256": ""}), tensors)
    return pack_safetensors(tensors, KEY, dump_json({**document, "sha256": digest}))


def _document(file: TaskFile) -> dict[str, Any]:
    """Return the JSON document without its hash."""
    task = file.task
    scores = {
        key: None if math.isnan(value) else float(value) for key, value in file.scores.items()
    }
    return {
        "base": file.base.to_json(),
        "calibration": file.calibration,
        "data_hash": file.data_hash,
        "description": file.description,
        "dtype": file.dtype,
        "format": FORMAT,
        "head_style": file.head_style,
        "layout": file.layout,
        "licence": file.licence,
        "max_length": file.max_length,
        "method": file.method,
        "package_version": file.package_version,
        "pooling": file.pooling,
        "probes": list(file.probes),
        "recipe": file.recipe,
        "scores": scores,
        "task": {
            "name": task.name,
            "kind": task.kind,
            "labels": list(task.labels),
            "metrics": list(task.metrics),
            "is_pair": task.is_pair,
        },
        "temperature": file.temperature,
        "terms": file.terms,
        "tokenizer": file.tokenizer,
        "truncated_share": file.truncated_share,
    }


def _plain_probe(probe: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``probe`` with logits of nine significant digits, which restore any fp32 number."""

    def short(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [short(inner) for inner in value]
        return float(f"{value:.9g}")

    return {
        "text": probe["text"],
        "text_pair": probe.get("text_pair"),
        "logits": short(probe["logits"]),
    }


def _overhead(data: bytes, file: TaskFile, tensors: Mapping[str, Tensor]) -> int:
    """Return the file's bytes beside tensors, label names, licence and description."""
    numbers = sum(t.numel() * t.element_size() for t in tensors.values())
    prose = (list(file.task.labels), file.licence, file.description)
    # Twice: the document is text inside the header's JSON, so every quote has a backslash.
    return len(data) - numbers - sum(len(dump_json(dump_json(p)).encode()) - 2 for p in prose)
