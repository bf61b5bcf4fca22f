"""Who a base and a tokenizer are: hashes that a task file carries, and their comparison.

A base is what its numbers are and not what it is called: the same weights under another name are
the same base, and one changed bias is another.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitfit.errors import TaskFileError, WrongBase, WrongTokenizer
from bitfit.storage import dump_json, hash_tensor, hash_text

if TYPE_CHECKING:
    from torch import Tensor

DIGEST_LENGTH = 8
"""Hex digits of one tensor's short digest."""
MAX_TENSORS = 1 << 14

# Fields of a configuration that do not change what the encoder computes at inference. Names that
# begin with an underscore, and any with "dropout", are left out as well.
_NOT_ARCHITECTURE = frozenset(
    """
    add_cross_attention architectures attention_probs_dropout_prob auto_map begin_suppress_tokens
    bos_token_id chunk_size_feed_forward classifier_activation classifier_bias classifier_pooling
    cls_token_id cross_attention_hidden_size decoder_bias decoder_start_token_id
    deterministic_flash_attn dtype eos_token_id finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing hidden_dropout_prob id2label
    initializer_cutoff_factor initializer_factor initializer_range label2id legacy loss_type
    mask_token_id
    norm_init num_labels output_attentions output_hidden_states prefix problem_type
    reference_compile repad_logits_with_grad return_dict sep_token_id sparse_pred_ignore_index
    sparse_prediction summary_activation summary_first_dropout summary_last_dropout
    summary_proj_to_labels summary_type summary_use_proj task_specific_params
    tie_encoder_decoder tie_word_embeddings tokenizer_class torch_dtype torchscript
    transformers_version unk_token_id use_cache use_return_dict
    """.split()
)

# What a tokenizer is asked: its answers are its identity. Never change these for format 1.
_PROBES: tuple[tuple[str, str | None], ...] = (
    ("The quick brown fox jumps over the lazy dog.", None),
    ("The Quick BROWN Fox", "jumps over THE lazy dog"),
    ("Café crème, naïve Ångström, Straße, İstanbul, ﬁne", None),
    ("cafe\u0301 nin\u0303o", None),
    ("我爱北京 東京タワー 안녕하세요", "مرحبا Привет"),
    ("1234567890 3.14159 $1,000.00 50% 2nd 1e-6", None),
    ('Hello!?... (yes) [no] {maybe} don\'t rock-n-roll; "quotes" a_b@c.de http://x.y/z?q=1', None),
    ("🙂👍🏽 ™ © ½ →", None),
    ("  two  spaces\tand\ttabs\nand lines  ", " x "),
    ("unaffordableness antidisestablishmentarianism Zxqvjkw", "a"),
    ("[CLS] [SEP] [MASK] <s> </s> <mask> <pad> [PAD] [UNK] <unk>", None),
    ("", None),
    ("", ""),
)
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class BaseIdentity:
    """Who a base is. Two bases are the same where configuration and every tensor agree."""

    name: str
    """What the user called it; of a local directory only the last part. Never compared."""
    revision: str | None
    """Branch, tag or commit asked for on the hub. Never compared."""
    config_hash: str
    """SHA-256 over the fields of the configuration that change the encoder."""
    sha256: str
    """SHA-256 over the SHA-256 of every tensor, by sorted name, in the bytes as stored."""
    digests: str
    """The first 8 hex digits of each tensor's SHA-256 end to end, by sorted name."""

    @property
    def short(self) -> str:
        """``bert-base-cased (a1b2c3d4…)``, for messages."""
        return f"{self.name} ({self.sha256[:8]}…)"

    @property
    def tensor_digests(self) -> list[str]:
        """The short digest of each tensor, by sorted name."""
        step = DIGEST_LENGTH
        return [self.digests[i : i + step] for i in range(0, len(self.digests), step)]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> BaseIdentity:
        """Return what :meth:`to_json` wrote.

        Raises:
            TaskFileError: anything else.
        """
        match value:
            case {
                "name": str(name),
                "revision": None | str() as revision,
                "config_hash": str(config_hash),
                "sha256": str(digest),
                "digests": str(digests),
                **rest,
            } if not rest:
                hashes_ok = is_sha256(config_hash) and is_sha256(digest)
                count, odd = divmod(len(digests), DIGEST_LENGTH)
                digests_ok = re.fullmatch(r"[0-9a-f]*", digests) and not odd
                if hashes_ok and digests_ok and count <= MAX_TENSORS:
                    return cls(name, revision, config_hash, digest, digests)
        raise TaskFileError(
            "field 'base': expected name, revision, config_hash, sha256 and digests, hashes in "
            "lower-case hex"
        )


def is_sha256(text: object) -> bool:
    """Whether ``text`` is 64 lower-case hex digits."""
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{64}", text) is not None


def identify_base(
    tensors: Mapping[str, Tensor], config: Any, name: str, revision: str | None = None
) -> BaseIdentity:
    """Return the identity of the base with ``tensors``, in the precision they are stored in.

    Args:
        tensors: every tensor of the encoder by name, as read from the checkpoint, before any cast.
        config: a transformers configuration (anything with ``to_dict()``).
        name: what the user called it; of a path only the last part is kept.
        revision: what was asked for on the hub.
    """
    hashes = []
    for key in sorted(tensors):
        digest = sha256()
        hash_tensor(digest, key, tensors[key])
        hashes.append(digest)
    return BaseIdentity(
        name=_public_name(name),
        revision=revision,
        config_hash=hash_config(config),
        sha256=sha256(b"".join(h.digest() for h in hashes)).hexdigest(),
        digests="".join(h.hexdigest()[:DIGEST_LENGTH] for h in hashes),
    )


def _public_name(name: str) -> str:
    """Keep a hub's ``owner/name``, but of a path only the last part: it tells of the machine."""
    looks_local = name.startswith(("/", "~", ".")) or "\\" in name or name.count("/") > 1
    if looks_local or Path(name).expanduser().exists():
        return re.split(r"[/\\]", os.path.abspath(Path(name).expanduser()))[-1] or "base"
    return name


def hash_config(config: Any) -> str:
    """Return the SHA-256 over what a configuration says about the encoder's computation.

    Null, false and empty fields are left out, so that a field that a later transformers adds with
    such a default changes nothing.
    """
    fields = {
        str(key): value
        for key, value in config.to_dict().items()
        if key not in _NOT_ARCHITECTURE
        and not str(key).startswith("_")
        and "dropout" not in str(key)
        and value is not None
        and value is not False
        and value not in ("", [], (), {})
    }
    return hash_text(dump_json(_plain(fields)))


def _plain(value: Any) -> Any:
    """Return ``value`` in JSON's types; a dictionary's keys become text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(inner) for inner in value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, (str, int)) or value is None else str(value)


def check_base(wanted: BaseIdentity, have: BaseIdentity, names: Sequence[str]) -> None:
    """Return if ``have`` is the base that a task was made for.

    Args:
        wanted: from the task file.
        have: the base at hand.
        names: the names of ``have``'s tensors, sorted.

    Raises:
        WrongBase: naming what differs first: configuration, number of tensors, or the tensor.
    """
    if (wanted.sha256, wanted.config_hash) == (have.sha256, have.config_hash):
        return
    raise WrongBase(
        f"the task was made for base {wanted.short}, this base is {have.short}: "
        f"{_first_difference(wanted, have, names)}. Load the task with the base it was made for"
        f"{f' (revision {wanted.revision})' if wanted.revision else ''}, or train it again on "
        "this one."
    )


def _first_difference(wanted: BaseIdentity, have: BaseIdentity, names: Sequence[str]) -> str:
    if wanted.config_hash != have.config_hash:
        return (
            f"the configurations differ ({wanted.config_hash[:8]}… and {have.config_hash[:8]}…): "
            "other sizes or another architecture"
        )
    theirs, ours = wanted.tensor_digests, have.tensor_digests
    if len(theirs) != len(ours):
        return f"it has {len(ours)} tensors, {len(theirs)} were expected"
    differing = [i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b]
    if not differing:
        return "the tensors differ"
    first = differing[0]
    name = names[first] if first < len(names) else f"number {first}"
    hint = ""
    if len(differing) == len(ours):
        hint = ", as when the weights are stored in another precision"
    return (
        f"tensor {name!r} differs ({theirs[first]} and {ours[first]}; "
        f"{len(differing)} of {len(ours)} tensors do{hint})"
    )


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a SHA-256 over what ``tokenizer`` does: vocabulary, special tokens, answers to probes.

    Behaviour and not the serialised form, which changes between versions of the libraries.
    """
    digest = sha256()
    for token, number in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{number}\t{token}\n".encode("utf-8", "surrogatepass"))
    special = {name: getattr(tokenizer, f"{name}_token", None) for name in _SPECIAL}
    answers = [_ask(tokenizer, text, pair) for text, pair in _PROBES]
    digest.update(dump_json([_plain(special), answers]).encode())
    return digest.hexdigest()


def _ask(tokenizer: Any, text: str, pair: str | None) -> list[list[int]]:
    found = tokenizer(
        text,
        pair,
        truncation=False,
        padding=False,
        return_token_type_ids=True,
        return_attention_mask=False,
        verbose=False,
    )
    return [[int(i) for i in found[key]] for key in ("input_ids", "token_type_ids")]


def check_tokenizer(wanted: str, have: str) -> None:
    """Return if the hashes of two tokenizers agree.

    Raises:
        WrongTokenizer: with both short hashes and what to do.
    """
    if wanted != have:
        raise WrongTokenizer(
            f"the task was made with tokenizer {wanted[:8]}…, this base's is {have[:8]}…: they "
            "split text differently, so the task would read other words. Use the tokenizer files "
            "that were there at training (case, vocabulary and added tokens count)."
        )
