"""How a run trains: one frozen dataclass, and the recipes that fill it."""

from __future__ import annotations

import dataclasses
import numbers
from dataclasses import dataclass
from typing import Any, Literal, get_args

from bitfit.errors import UsageError

Method = Literal[
    "bitfit", "frozen", "full", "random", "released:random", "released:row_col",
    "peft:lora", "peft:ia3", "peft:layernorm",
]  # fmt: skip
# They train rows of a bank, so that many runs share a base; the others change its matrices.
ROW_METHODS = ("bitfit", "frozen")
# Adapters of the peft library (extra "peft").
PEFT_METHODS = ("peft:lora", "peft:ia3", "peft:layernorm")
Schedule = Literal["constant", "linear", "cosine"]
Keep = Literal["best", "last"]

# Ben Zaken et al. 2022, appendix A.2.
PAPER_RATES: dict[str, tuple[float, ...]] = {
    "bitfit": (1e-4, 4e-4, 7e-4, 1e-3),
    "full": (1e-5, 2e-5, 3e-5, 5e-5),
}
# The paper has none for these: four rates each, half a decade apart, around what the authors of the
# methods use on such models (LoRA: 5e-4, Hu et al. 2021, table 9; IA3: 3e-3, Liu et al. 2022).
OUR_RATES: dict[str, tuple[float, ...]] = {
    "peft:lora": (1e-4, 3e-4, 1e-3, 3e-3),
    "peft:ia3": (3e-4, 1e-3, 3e-3, 1e-2),
    "peft:layernorm": (1e-4, 3e-4, 1e-3, 3e-3),
}

# Questions with their contexts are longer than other texts: the usual window of SQuAD's.
SPAN_MAX_LENGTH = 384


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every choice that changes what a run learns. Written into the task file."""

    recipe: str = "default"
    """Which recipe filled what was not given."""
    method: str = "bitfit"
    """``bitfit``, ``frozen``, ``full``, ``random``, a rule of the released code, ``peft:...``."""
    terms: str = "all"
    """Which biases: as ``bitfit.select_biases`` takes them."""
    learning_rate: float = 2e-3
    """Peak rate of AdamW."""
    epochs: int = 5
    """Passes over the training rows."""
    batch_size: int = 8
    """Sequences in a step."""
    schedule: Schedule = "linear"
    """``constant``, ``linear`` or ``cosine`` decay to zero, after the warm-up."""
    warmup_ratio: float = 0.06
    """Share of all steps in which the rate rises linearly."""
    max_grad_norm: float = 1.0
    """Global norm that gradients are clipped at, row and head together; 0: no clipping."""
    adam_eps: float = 1e-6
    """AdamW's epsilon, added before bias correction as the released code's optimizer does."""
    keep: Keep = "best"
    """Which epoch goes into the file: the best on dev, or the last."""
    patience: int = 3
    """Stop after so many epochs without a dev score as good as the best; 0: never."""
    class_weights: str | None = None
    """``balanced`` weighs each class by the inverse of its frequency; None: all alike."""
    max_length: int = 128
    """Tokens in a sequence, specials included; longer texts are cut. Span tasks: 384."""
    pooling: str = "auto"
    """``auto``, ``pooler``, ``cls`` or ``mean``."""
    attention_dropout: float | None = None
    """Dropout on attention probabilities; None: the base's own."""
    seed: int = 0
    """Order of the data, dropout and the head's first numbers."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant, naming the option."""
        self._one_of("method", get_args(Method))
        self._one_of("schedule", get_args(Schedule))
        self._one_of("keep", get_args(Keep))
        self._one_of("class_weights", (None, "balanced"))
        for name in ("terms", "pooling"):
            if not isinstance(value := getattr(self, name), str):
                raise UsageError(f"{name} is {value!r}; expected a text", field=name)
        self._check_numbers()
        rate = self.attention_dropout
        if rate is not None and not (isinstance(rate, numbers.Real) and 0 <= rate < 1):
            raise UsageError(
                f"attention_dropout is {rate!r}; expected 0 up to below 1",
                field="attention_dropout",
            )
        if self.learning_rate == 0.0:
            raise UsageError("learning_rate is 0: nothing would be learned", field="learning_rate")

    def _check_numbers(self) -> None:
        for name, least, most in (
            ("learning_rate", 0.0, 1.0), ("epochs", 1, 10_000), ("batch_size", 1, 100_000),
            ("warmup_ratio", 0.0, 1.0), ("max_grad_norm", 0.0, 1e9), ("adam_eps", 0.0, 1.0),
            ("max_length", 3, 100_000), ("seed", 0, 2**63 - 1), ("patience", 0, 10_000),
        ):  # fmt: skip
            value: Any = getattr(self, name)
            is_whole = isinstance(least, int)
            kind = numbers.Integral if is_whole else numbers.Real
            if not isinstance(value, kind) or isinstance(value, bool):
                what = "a whole number" if is_whole else "a number"
                raise UsageError(f"{name} is {value!r}; expected {what}", field=name)
            if not least <= value <= most:  # type: ignore[operator]
                raise UsageError(f"{name} is {value}; expected {least} to {most}", field=name)

    def _one_of(self, name: str, allowed: tuple[Any, ...]) -> None:
        if getattr(self, name) not in allowed:
            shown = ", ".join(str(a) for a in allowed if a is not None)
            raise UsageError(
                f"{name} is {getattr(self, name)!r}; expected one of {shown}", field=name
            )

    def replace(self, **changes: Any) -> TrainConfig:
        """Return a copy with ``changes``, checked."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name."""
        return dataclasses.asdict(self)


# What each recipe sets beside the defaults above. "paper": the protocol of the paper and of its
# released code: constant rate, no early stopping, 16 epochs, the last epoch saved. The rate is the
# largest of the paper's grid; a rate that decays may begin higher (docs/recipes.md).
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "learning_rate": 1e-3, "epochs": 16, "schedule": "constant", "warmup_ratio": 0.0,
        "patience": 0, "keep": "last",
    },
}  # fmt: skip


def resolve_config(recipe: str = "default", **given: Any) -> TrainConfig:
    """Return the recipe's configuration with what was given (not None) in its place.

    Raises:
        UsageError: an unknown recipe, or a value that cannot be meant.
    """
    if recipe not in RECIPES:
        raise UsageError(f"unknown recipe {recipe!r}: {', '.join(RECIPES)}", field="recipe")
    options = {key: value for key, value in given.items() if value is not None}
    if options.get("method") == "full" and "learning_rate" not in options:
        options["learning_rate"] = 3e-5
    return TrainConfig(recipe=recipe, **(RECIPES[recipe] | options))


def rates_to_try(method: str) -> tuple[float, ...]:
    """Return the four rates of the search for ``method``.

    The paper gives rates for bias tuning and full fine-tuning (appendix A.2); ``frozen`` and the
    random methods are searched over the former. Those of peft's methods are ours.
    """
    return {**PAPER_RATES, **OUR_RATES}.get(method, PAPER_RATES["bitfit"])
