from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import make_checkpoint

from bitfit import doctor
from bitfit.encoder import Encoder, open_encoder


@pytest.mark.parametrize(
    ("family", "packed", "mixes"),
    [("bert", True, True), ("mpnet", False, True), ("deberta-v2", False, False)],
)
def test_what_holds_is_reported_per_family(
    family: str, packed: bool, mixes: bool, open_tiny: Callable[..., Encoder]
) -> None:
    report = doctor.examine_base(open_tiny(family))
    assert (report["family"], report["packed"], report["mixes"]) == (family, packed, mixes)
    assert report["layers"] == 2
    assert report["hidden_size"] == 32


def test_terms_are_counted_with_their_shares(open_tiny: Callable[..., Encoder]) -> None:
    encoder = open_tiny("bert")
    report = doctor.examine_base(encoder)
    terms = {row["term"]: row for row in report["terms"]}
    assert terms["intermediate"]["count"] == 2 * 64
    assert terms["query"] == {
        "term": "query", "symbol": "b_q", "vectors": 2, "count": 64,
        "share": 64 / report["encoder_parameters"], "inert": False,
    }  # fmt: skip
    assert terms["key"]["inert"]
    assert report["eight_terms"]["count"] == 2 * (7 * 32 + 64)
    assert report["default_terms"]["count"] == 2 * (6 * 32 + 64)
    assert report["biases"] == sum(row["count"] for row in report["terms"])


def test_the_pooler_counts_only_where_the_base_is_pooled_by_it(
    open_tiny: Callable[..., Encoder],
) -> None:
    encoder = open_tiny("bert")
    own = sum(p.numel() for p in encoder.model.parameters())
    report = doctor.examine_base(encoder)
    assert report["pooling"] == "pooler"
    assert report["encoder_parameters"] == own + report["pooler_parameters"]
    report = doctor.examine_base(open_tiny("distilbert"))
    assert (report["pooling"], report["pooler_parameters"]) == ("cls", 0)


def test_a_base_without_biases_says_zero(open_tiny: Callable[..., Encoder]) -> None:
    report = doctor.examine_base(open_tiny("modernbert"))
    assert (report["biases"], report["terms"]) == (0, [])
    assert report["eight_terms"] == {"count": 0, "share": 0.0}


def test_the_machine_is_measured_and_all_of_it_is_json(checkpoint: Callable[..., str]) -> None:
    report = doctor.examine(checkpoint("bert"))
    machine: dict[str, Any] = json.loads(json.dumps(report, allow_nan=False))["machine"]
    assert set(machine["gflops"]) == {"fp32", "bf16"}
    assert all(rate > 0 for rate in machine["gflops"].values())
    assert machine["dtype"] in ("float32", "bfloat16")
    assert machine["versions"]["torch"]
    assert machine["extras"]["plots"]["install"] == "pip install 'bitfit[plots]'"


def test_the_extras_are_those_of_the_project() -> None:
    path = Path(__file__).parents[1] / "pyproject.toml"
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    assert set(doctor.EXTRAS) == set(project["optional-dependencies"])


def test_what_is_tuned_by_default_is_counted_in_a_family_of_unknown_names(tmp_path: Path) -> None:
    encoder = open_encoder(make_checkpoint(tmp_path, "ernie"), "fp32")
    report = doctor.examine_base(encoder)
    assert report["eight_terms"]["count"] == 0
    assert report["default_terms"]["count"] == 2 * (7 * 32 + 64)
