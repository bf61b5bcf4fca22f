from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitfit.bench import lanes, memory, runs, timing, train, variants, work
from bitfit.bench.ours import one_after_another, side_by_side
from bitfit.bench.plan import Plan
from bitfit.bench.runs import Run, Timed, Variant
from bitfit.bench.train import make_plan, make_rows
from bitfit.bench.variants import choose_variants
from bitfit.cli import main
from bitfit.encoder import Encoder
from bitfit.errors import BitfitError, UsageError
from bitfit.training.train import pass_tokens

FAST_FP32 = {"fp32": 50.0, "bf16": 5.0}
SMALL = ("--tasks", "intent", "--batch-sizes", "4", "--rounds", "1", "--no-memory")


@pytest.fixture
def plan(checkpoint: Callable[..., str]) -> Callable[..., Plan]:
    """A function that plans one round of a small batch on a tiny base of a family."""

    def make(family: str = "bert", **options: Any) -> Plan:
        given = {"tasks": ["intent"], "batch_sizes": [4], "rounds": 1, "memory": False} | options
        return make_plan(base=checkpoint(family), **given)

    return make


def by_name(dtype: str = "bf16") -> dict[str, Variant]:
    return {v.name: v for v in choose_variants(dtype, {"fp32": 1.0, "bf16": 1.0}, "bf16")}


# ------------------------------------------------------------------ which variants


def test_the_variants_are_those_that_the_docs_promise() -> None:
    assert list(by_name()) == [
        "ours-fp32", "ours-bf16", "released", "stock-fp32", "stock-bf16", "full-released",
        "full-fp32", "full-bf16", "lora-fp32", "lora-bf16", "beft-fp32", "beft-bf16",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "favoured", "ours"),
    [
        ("auto", "fp32", ["ours-fp32"]),
        ("auto", "bf16", ["ours-fp32", "ours-bf16"]),
        ("fp32", "bf16", ["ours-fp32"]),
        ("bf16", "fp32", ["ours-fp32", "ours-bf16"]),
    ],
)
def test_ours_runs_in_bf16_where_asked_for_or_faster(
    dtype: str, favoured: str, ours: list[str]
) -> None:
    found = [v.name for v in choose_variants(dtype, FAST_FP32, favoured)]
    assert [name for name in found if name.startswith("ours")] == ours
    assert {"stock-fp32", "stock-bf16", "full-bf16", "lora-fp32"} <= set(found)
    assert "lora-bf16" not in found  # bf16 products are the slower here


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta-v2"])
def test_every_variant_trains_what_it_says_and_nothing_else(
    family: str, plan: Callable[..., Plan]
) -> None:
    pytest.importorskip("peft")
    work = plan(family).tables[0].work
    for variant in by_name().values():
        run = variant.build(work)
        frozen = [p for m in run.modules for p in m.parameters()]
        frozen = [p for p in frozen if not any(p is t for t in run.trained)]
        before = [p.detach().clone() for p in frozen], [t.detach().clone() for t in run.trained]
        run.step(0)
        run.step(1)
        assert all(torch.equal(a, b) for a, b in zip(frozen, before[0], strict=True)), variant.name
        moved = [not torch.equal(a, b) for a, b in zip(run.trained, before[1], strict=True)]
        assert any(moved), variant.name
        sizes = runs.count_bytes(run)
        assert all(isinstance(value, int) for value in sizes.values())
        if variant.group == "full":
            assert not frozen


def test_the_optimizer_and_a_checkpoint_are_counted_in_bytes(
    plan: Callable[..., Plan],
) -> None:
    run = by_name()["ours-fp32"].build(plan().tables[0].work)
    numbers = sum(t.numel() for t in run.trained)
    assert runs.count_bytes(run) == {
        "trained_numbers": numbers, "optimizer_bytes": 8 * numbers, "checkpoint_bytes": 12 * numbers
    }  # fmt: skip


def test_a_released_batch_is_padded_to_128_and_a_stock_one_to_its_longest(
    plan: Callable[..., Plan],
) -> None:
    work = plan().tables[0].work
    model = by_name()["released"].build(work).modules[0]
    longest = max(map(len, work.batches[0]))
    for padding, width in (("128", 128), ("longest", longest)):
        batch = variants._padded(work, work.batches[0], model, padding)
        assert batch["input_ids"].shape == (4, width)
        assert int(batch["attention_mask"].sum()) == work.tokens(0)


# ------------------------------------------------------------------ lanes


def make_work(encoder: Encoder, base: str, count: int) -> work.Work:
    task, features = work.read_source(encoder, work.choose_sources(None, ["intent"], (), ())[0])
    return work.make_table(base, encoder.device, task, features, 4, 1, count).work


def test_side_by_side_and_one_after_another_are_the_same_runs(
    checkpoint: Callable[..., str], open_tiny: Callable[..., Encoder]
) -> None:
    encoder = open_tiny("bert")
    given = make_work(encoder, checkpoint("bert"), 3)
    together, alone = side_by_side(given, encoder), one_after_another(given, encoder)
    for number in range(2):
        together.step(number)
        alone.step(number)
    (rows,) = together.trained
    assert len(alone.trained) == len(rows) == 3
    for row, other in zip(rows, alone.trained, strict=True):
        assert torch.allclose(row, other[0], atol=1e-5)
    assert not torch.allclose(rows[0], rows[1], atol=1e-4)  # another seed, rate and batch
    assert runs.count_bytes(together) == runs.count_bytes(alone)
    assert together.modules == alone.modules


def test_each_lane_of_a_step_has_its_own_batch(
    checkpoint: Callable[..., str], open_tiny: Callable[..., Encoder]
) -> None:
    given = make_work(open_tiny("bert"), checkpoint("bert"), 3)
    assert len(given.batches) == 2 * 3 * 3  # two rounds of 3 steps of 3 batches of 4 of 40 rows
    assert given.step_batches(1) == given.batches[3:6]
    assert given.tokens(1) == sum(len(f) for batch in given.batches[3:6] for f in batch)
    assert given.first(2).batches == given.batches[:6]


def test_products_are_of_the_tokens_of_one_pass(
    checkpoint: Callable[..., str], open_tiny: Callable[..., Encoder]
) -> None:
    def tokens(count: int) -> tuple[int, float]:
        made = make_work(open_tiny("bert"), checkpoint("bert"), count)
        table = work.Table(work=made, steps=1)
        return runs.product_tokens(table), table.mean_tokens

    one, mean = tokens(1)
    assert one == round(mean)
    few, mean = tokens(4)
    assert few == round(4 * mean)
    # A pass takes no more, and these have fewer altogether or fill it.
    many, mean = tokens(256)
    assert many == min(round(256 * mean), pass_tokens(torch.device("cpu")))


def test_rows_of_lanes_give_ratios_and_the_share_of_the_roofline(
    checkpoint: Callable[..., str], open_tiny: Callable[..., Encoder]
) -> None:
    encoder = open_tiny("bert")
    tables = [
        work.Table(work=make_work(encoder, checkpoint("bert"), count), steps=1) for count in (1, 16)
    ]
    values = {
        "ours-fp32, 1 lane": [100.0, 90.0, 110.0], "alone-fp32, 1 lane": [100.0],
        "ours-fp32, 16 lanes": [300.0], "alone-fp32, 16 lanes": [120.0],
        runs.products_name("fp32", runs.product_tokens(tables[0])): [0.5],
        runs.products_name("fp32", runs.product_tokens(tables[1])): [2.0],
    }  # fmt: skip
    sizes = {name: runs.count_bytes(None) for name in values}
    timed = Timed(values=values, sizes=sizes, notes={})
    one, many = lanes.make_rows([by_name()["ours-fp32"]], tables, timed, 1_000_000)
    assert (one["lanes"], one["ratio"], one["ratio_to_one_lane"]) == (1, 1.0, 1.0)
    assert (many["lanes"], many["ratio"], many["ratio_to_one_lane"]) == (16, 2.5, 3.0)
    assert (one["roofline_fraction"], many["roofline_fraction"]) == (100 / 125, 300 / 500)
    (row,) = lanes.make_rows([by_name()["ours-fp32"]], tables[1:], timed, 1_000_000)
    assert row["ratio_to_one_lane"] is None


def test_json_of_lanes_has_a_row_for_each_number_and_their_memory(
    checkpoint: Callable[..., str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(lanes, "peak_memory", lambda variant, work: 1000 * work.lanes)
    words = ["--tasks", "intent", "--lanes", "1,3", "--batch-size", "4", "--rounds", "1"]
    code = main(["bench", "lanes", "--base", checkpoint("bert"), *words, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    report = json.loads(out)
    assert report["command"].startswith("bitfit bench lanes --tasks intent --lanes 1,3")
    (table,) = report["tables"]
    assert (table["task"], table["batch_size"]) == ("intent", 4)
    rows = [row for row in table["rows"] if row["precision"] == "fp32"]
    assert [row["lanes"] for row in rows] == [1, 3]
    for row in rows:
        assert row["rounds"] == [row["tokens_per_second"]]
        assert row["ratio"] == row["tokens_per_second"] / row["alone_tokens_per_second"]
        bound = row["gflops"] * 1e9 / (4 * report["encoder_weights"])
        assert row["roofline_tokens_per_second"] == pytest.approx(bound)
        assert row["optimizer_bytes"] == rows[0]["optimizer_bytes"] * row["lanes"]
        known = memory.is_known(torch.device("cpu"))
        assert row["peak_memory_bytes"] == (1000 * row["lanes"] if known else None)
    assert re.search(r"1, 3 lanes and as many runs alone on intent at 4: 1 round .* About ", err)


def test_lanes_are_shown_as_a_table(
    checkpoint: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--tasks", "intent", "--lanes", "2,2", "--rounds", "1", "--no-memory", "--quiet"]
    code = main(["bench", "lanes", "--base", checkpoint("bert"), *words])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert "one after another" in out
    rows = [line.split() for line in out.splitlines() if line.split()[1:2] == ["fp32"]]
    assert [row[0] for row in rows] == ["2"]


def test_a_base_without_packing_has_no_lanes(
    checkpoint: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "lanes", "--base", checkpoint("mpnet"), "--tasks", "intent"]) == 2
    assert "does not run packed" in capsys.readouterr().err


# ------------------------------------------------------------------ arithmetic


def test_rows_give_ratios_and_the_share_of_the_roofline() -> None:
    chosen = [by_name()[n] for n in ("ours-fp32", "released", "stock-fp32", "stock-bf16")]
    chosen.append(by_name()["full-fp32"])
    rates = {"ours-fp32": 900.0, "released": 300.0, "stock-fp32": 450.0, "stock-bf16": 600.0}
    rows = make_rows(chosen, rates, {"fp32": 40.0, "bf16": 80.0}, 10_000_000)
    ours, released, _, stock, full = rows
    assert (ours["ratio"], ours["ratio_to_best_stock"]) == (3.0, 1.5)
    assert ours["roofline_tokens_per_second"] == 1000.0  # 40e9 / (4 * 1e7)
    assert ours["roofline_fraction"] == 0.9
    assert released["ratio"] == 1.0
    assert stock["roofline_fraction"] == 0.3  # of the products in its own precision
    assert full["roofline_tokens_per_second"] == pytest.approx(40e9 / 6e7)
    assert (full["tokens_per_second"], full["ratio"], full["roofline_fraction"]) == (None,) * 3


def test_the_best_of_a_group_is_the_faster_of_its_precisions() -> None:
    chosen = list(by_name().values())
    assert train.fastest(chosen, {"stock-fp32": 2.0, "stock-bf16": 3.0}, "stock") == "stock-bf16"
    assert train.fastest(chosen, {"stock-fp32": 2.0}, "stock") == "stock-fp32"
    assert train.fastest(chosen, {}, "full") is None


def test_turns_are_interleaved_and_the_first_round_is_not_kept() -> None:
    calls: list[tuple[str, int]] = []

    def measure(name: str) -> Callable[[int], float]:
        return lambda turn: calls.append((name, turn)) or float(turn)  # type: ignore[func-returns-value]

    values = timing.in_turns({n: measure(n) for n in "abc"}, 2, once={"c"})
    assert values == {"a": [1.0, 2.0], "b": [1.0, 2.0], "c": [1.0]}
    assert calls == [("a", 0), ("b", 0), ("b", 1), ("c", 1), ("a", 1), ("a", 2), ("b", 2)]


def test_a_precision_is_slow_where_fp32_is_several_times_faster() -> None:
    assert timing.slow_precisions({"fp32": 50.0, "bf16": 2.0}) == {"bf16"}
    assert timing.slow_precisions({"fp32": 165.0, "bf16": 750.0}) == set()  # never fp32 itself
    assert timing.slow_precisions({"fp32": 50.0, "bf16": 40.0}) == set()


def test_the_products_are_those_of_a_frozen_step(open_tiny: Callable[..., Encoder]) -> None:
    encoder = open_tiny("bert")
    products = timing.Products(encoder, 20, "fp32")
    assert products.flops == 4 * 20 * encoder.weights
    assert products.gflops() > 0


def test_the_estimate_counts_padding_and_what_each_variant_needs(
    plan: Callable[..., Plan],
) -> None:
    table = plan().tables[0]
    tokens = sum(table.work.tokens(i) for i in range(len(table.work.batches)))

    def seconds(name: str, slow: tuple[str, ...] = ()) -> float:
        return runs.estimate(1_000_000, [(by_name()[name], table)], {"fp32": 1.0}, slow)

    assert seconds("ours-fp32") == pytest.approx(4e6 * tokens / 0.5e9)
    padded = 4 * 128 * len(table.work.batches)
    assert seconds("full-released") == pytest.approx(6e6 * padded / 0.5e9)
    assert seconds("ours-fp32", ("fp32",)) < seconds("ours-fp32") / 5


# ------------------------------------------------------------------ memory


@pytest.mark.skipif(not memory.MARK.exists(), reason="Linux only")
def test_peak_memory_is_that_of_the_steps_and_not_of_loading() -> None:
    kept: list[torch.Tensor] = []

    def build() -> Run:
        torch.ones(100_000_000).sum()  # 400 MB, as loading may take
        return Run(
            step=lambda _: kept.append(torch.ones(10_000_000)), trained=[],
            optimizer_state=list, modules=[],
        )  # fmt: skip

    peak = memory.measure_peak(build, torch.device("cpu"))
    assert peak == pytest.approx(80_000_000, rel=0.1)


@pytest.mark.skipif(not memory.MARK.exists(), reason="Linux only")
def test_each_variant_is_measured_in_a_process_of_its_own(
    plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = dataclasses.replace(plan().tables[0].work, lanes=2)
    peak = memory.peak_memory(by_name()["ours-fp32"], work)
    assert peak is not None
    assert 0 < peak < 500_000_000
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(BitfitError, match="memory of 'released' failed: exit code 1"):
        memory.peak_memory(by_name()["released"], work)


def test_where_there_is_no_mark_the_peak_is_not_known(
    plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "MARK", Path("/none"))
    work = plan().tables[0].work
    assert memory.peak_memory(by_name()["released"], work) is None
    assert not plan(memory=True).memory


# ------------------------------------------------------------------ the command


def test_json_is_one_object_with_machine_versions_and_rows(
    checkpoint: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["bench", "train", "--base", checkpoint("bert"), *SMALL, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert out.count("\n") == 1
    report = json.loads(out)
    assert set(report) == {
        "command", "hardware", "versions", "base", "encoder_weights", "max_length", "rounds",
        "sequences_a_turn", "tables",
    }  # fmt: skip
    assert report["command"].startswith("bitfit bench train --tasks intent --batch-sizes 4")
    assert {"cpu", "cores", "threads", "device"} <= set(report["hardware"])
    assert report["versions"]["torch"] == torch.__version__
    (table,) = report["tables"]
    assert (table["task"], table["batch_size"]) == ("intent", 4)
    assert all(rate > 0 for rate in table["gflops"].values())
    assert table["best_stock"] in ("stock-fp32", "stock-bf16")
    rows = {row["variant"]: row for row in table["rows"]}
    for name in ("ours-fp32", "released", "stock-fp32", "stock-bf16", "full-released", "full-fp32"):
        row = rows[name]
        assert row["note"] is None
        assert row["rounds"] == [row["tokens_per_second"]]
        bound = row["roofline_tokens_per_second"]
        assert row["roofline_fraction"] == pytest.approx(row["tokens_per_second"] / bound)
        flops = 6 if name.startswith("full") else 4
        rate = table["gflops"][row["precision"]] * 1e9
        assert bound == pytest.approx(rate / (flops * report["encoder_weights"]))
        assert row["checkpoint_bytes"] > row["optimizer_bytes"] > row["trained_numbers"] > 0
        assert row["peak_memory_bytes"] is None
    assert rows["released"]["ratio"] == 1.0
    assert rows[table["best_stock"]]["ratio_to_best_stock"] == 1.0
    assert re.search(r"variants on intent at 4: 1 round and one to warm up, .* About ", err)


def test_without_peft_its_rows_say_that_it_is_not_installed(
    checkpoint: Callable[..., str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "peft", None)
    base = checkpoint("bert")
    capsys.readouterr()  # of transformers, where no test before this one made the checkpoint
    code = main(["bench", "train", "--base", base, *SMALL, "--quiet"])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    rows = [line for line in out.splitlines() if line.startswith("peft ")]
    assert [row.split(":")[0] for row in rows] == [
        "peft LoRA (r=8, query and value)", "peft BEFT (value biases)",
    ]  # fmt: skip
    assert all("not installed: pip install 'bitfit[bench]'" in row for row in rows)
    assert "bitfit: fp32, packed" in out
    assert "the best stock: stock biases" in out


def test_an_older_peft_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        __version__ = "0.17.0"

    monkeypatch.setitem(sys.modules, "peft", Old())
    with pytest.raises(variants.Unavailable, match=r"peft 0\.17\.0 has no BeftConfig"):
        variants._peft("BeftConfig")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-sizes", "8,x"], "expected numbers from 1 up"),
        (["--batch-sizes", "0"], "expected numbers from 1 up"),
        (["--tasks", "mrpc"], "give --data with the GLUE folder"),
        (["--data", ".", "--tasks", "squad"], "'squad' is span"),
        (["--data", ".", "--tasks", "mrcp"], "mrpc"),
        (["--rounds", "0"], "--rounds"),
        (["--dtype", "fp8"], "dtype 'fp8'"),
        (["--no-such"], "no-such"),
    ],
)
@pytest.mark.parametrize("command", ["train", "lanes"])
def test_misuse_is_refused_before_anything_runs(
    command: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "lanes":
        words = ["--lanes" if word == "--batch-sizes" else word for word in words]
    assert main(["bench", command, *words]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in err


def test_the_lengths_of_real_tasks_are_read(
    real_data: Callable[..., Path], plan: Callable[..., Plan]
) -> None:
    found = plan(data=str(real_data("glue_data")), tasks=["mrpc", "stsb"], batch_sizes=[8, 32])
    assert [(t.work.task.name, t.batch_size, t.steps) for t in found.tables] == [
        ("mrpc", 8, 5), ("mrpc", 32, 1), ("stsb", 8, 5), ("stsb", 32, 1),
    ]  # fmt: skip
    assert all(len(b) == t.batch_size for t in found.tables for b in t.work.batches)
    assert found.tables[0].mean_tokens > found.tables[2].mean_tokens


def test_help_says_what_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    assert "train" in capsys.readouterr().out
    assert main(["bench", "train", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "real (not padding) tokens per second" in out
    assert "<bool>" not in out


def test_the_machine_is_described() -> None:
    found = timing.describe_machine(torch.device("cpu"))
    assert found["cores"] == os.cpu_count()
    assert found["threads"] == torch.get_num_threads()
    assert timing.describe_versions()["bitfit"]


# ------------------------------------------------------------------ serving


def test_many_tasks_are_timed_beside_other_ways(checkpoint, capsys):
    from bitfit.cli.app import run

    command = ["bench", "serve", "--base", checkpoint(), "--tasks", "1,3", "--items", "4",
               "--rounds", "1", "--storage", "int8"]  # fmt: skip
    assert run([*command, "--json", "--quiet"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in report["rows"]}
    names = "folded mixed-1 mixed-3 engine-3 swap-3 plain separate-3 pipeline lora-32 lora-all-32"
    assert list(rows) == names.split()
    for name, row in rows.items():
        if not name.startswith("lora") or row["note"] is None:
            assert row["items_per_second"] > 0
            assert 0 < row["p50_ms"] <= row["p99_ms"]
    assert rows["folded"]["ratio_to_folded"] == 1
    assert report["memory"]["tasks"] == 3
    assert report["adding"]["ready_ms"] > 0
    assert "--storage int8" in report["command"]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about peft
def test_lora_is_on_the_projections_that_it_is_said_to_be_on(checkpoint):
    peft = pytest.importorskip("peft")
    from transformers import AutoModel

    from bitfit.bench.contenders import PROJECTIONS, _targets

    for terms, each in ((("query", "value"), 2), (PROJECTIONS, 6)):
        model = AutoModel.from_pretrained(checkpoint())
        config = peft.LoraConfig(r=2, target_modules=_targets(model, terms))
        adapted = peft.get_peft_model(model, config)
        places = [name for name, _ in adapted.named_modules() if name.endswith("lora_A.default")]
        assert len(places) == each * model.config.num_hidden_layers
        assert not any("pooler" in name for name in places)


def test_every_batch_asks_other_tasks_each_of_them_as_often():
    from bitfit.bench.contenders import Request

    few = [Request(i, [None] * 8, []).tasks(4) for i in range(2)]
    assert all(sorted(tasks) == [0, 0, 1, 1, 2, 2, 3, 3] for tasks in few)
    many = [Request(i, [None] * 8, []).tasks(1000) for i in range(2)]
    assert all(len(set(tasks)) == 8 for tasks in many)
    assert many[0] != many[1]


# ------------------------------------------------------------------ over HTTP


INFINITY = '''#!{python}
"""Speaks as infinity_emb does."""
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(200 if self.path == "/health" else 404)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        is_known = self.path == "/classify" and asked["model"] == given("--served-model-name")
        self.answer(200 if is_known else 404)

    def answer(self, status):
        self.send_response(status)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{{}}")

    def log_message(self, *words):
        pass

def given(option):
    return sys.argv[sys.argv.index(option) + 1]

assert (Path(given("--model-id")) / "model.safetensors").exists()
assert (Path(given("--model-id")) / "tokenizer.json").exists()
ThreadingHTTPServer(("127.0.0.1", int(given("--port"))), Handler).serve_forever()
'''


def executable(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(sys.platform == "win32", reason="a script as a command")
def test_a_server_is_timed_beside_its_engine_and_another_server(
    checkpoint: Callable[..., str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("fastapi")
    other = executable(tmp_path / "infinity_emb", INFINITY.format(python=sys.executable))
    words = ["--tasks", "1,3", "--items", "4", "--rounds", "1", "--clients", "3",
             "--seconds", "0.3", "--storage", "fp16", "--infinity", other]  # fmt: skip
    code = main(["bench", "serve", "--http", "--base", checkpoint(), *words, "--json", "--quiet"])
    out, err = capsys.readouterr()
    assert code == 0, err
    report = json.loads(out)
    assert report["command"].endswith("--http")
    assert (report["clients"], report["storage"]) == (3, "fp16")
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == [
        "engine-1", "http-1-4", "http-1-1", "engine-3", "http-3-4", "http-3-1", "infinity-4",
        "infinity-1",
    ]  # fmt: skip
    for name, row in rows.items():
        assert row["items_per_second_by_round"] == [row["items_per_second"]]
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert row["ratio_to_engine"] > 0
        assert (row["server"] is not None) == name.startswith("http-")
    inside = rows["http-3-1"]["server"]
    assert inside["request_ms"] > inside["batch_ms"] > 0
    assert 1 <= inside["batch_items"] <= 3  # of three clients with one text each
    assert report["adding"]["put_ms"] > 0
    load = report["overload"]
    assert load["answered"] > 0
    assert load["failed"] == 0
    if Path("/proc/self/status").exists():
        assert min(load["server_bytes"]) > 0
        assert all(row["cpu_ms_per_item"] is not None for row in rows.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--clients", "3"], "--clients is of the server: give --http too"),
        (["--infinity", "none"], "--infinity is of the server: give --http too"),
        (["--storage", "fp64"], "--storage 'fp64' is not one of"),
        (["--http", "--seconds", "0"], "--seconds"),
    ],
)
def test_misuse_of_serving_is_refused_before_anything_runs(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", *words]) == 2
    assert message in capsys.readouterr().err


def test_another_server_that_is_not_there_or_does_not_start_is_named(
    checkpoint: Callable[..., str], tmp_path: Path
) -> None:
    from bitfit.bench.infinity import infinity

    with (
        pytest.raises(UsageError, match=r"no such file; expected the command infinity_emb"),
        infinity(tmp_path / "none", checkpoint(), 4),
    ):
        pass
    broken = executable(tmp_path / "broken", "#!/bin/sh\necho no such engine\nexit 3\n")
    with (
        pytest.raises(BitfitError, match="infinity did not start: no such engine"),
        infinity(Path(broken), checkpoint(), 4),
    ):
        pass


def test_a_server_that_does_not_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitfit.bench.running import running

    broken = executable(tmp_path / "python", "#!/bin/sh\necho no such base >&2\nexit 1\n")
    monkeypatch.setattr(sys, "executable", broken)
    with (
        pytest.raises(BitfitError, match="the server did not start: no such base"),
        running("minilm", tmp_path),
    ):
        pass


def test_load_counts_what_was_refused_and_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a server that answers in turns 200, 429, 500 and nothing at all."""
    from bitfit.bench.connection import request_bytes
    from bitfit.bench.load import closed_loop, open_loop

    # A clock that each look at it moves on: by that of a busy machine fewer requests are sent.
    clock = itertools.count(step=0.0005)
    monkeypatch.setattr(
        "bitfit.bench.load.time", types.SimpleNamespace(perf_counter=lambda: next(clock))
    )
    turns = itertools.cycle([200, 429, 500, None])

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            status = next(turns)
            if status is None:
                break
            writer.write(f"HTTP/1.1 {status} So\r\ncontent-length: 2\r\n\r\n{{}}".encode())
        writer.close()

    async def check() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            requests = [request_bytes("GET", "/")]
            load = await open_loop(port, requests, 200, 0.3)
            number = len(load.times) + load.refused + load.failed
            assert number == pytest.approx(60, abs=20)
            assert load.refused == pytest.approx(number / 4, abs=1)
            assert load.failed == pytest.approx(number / 2, abs=2)
            with pytest.raises(ExceptionGroup) as found:
                await closed_loop(port, requests, 1, 10)
            assert "answered" in str(found.value.exceptions[0])

    asyncio.run(check())


def test_as_many_separate_models_are_loaded_as_memory_has_room_for(
    open_tiny: Callable[..., Encoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitfit.bench import contenders

    encoder = open_tiny("bert")
    one = sum(p.numel() * p.element_size() for p in encoder.model.parameters())
    free = tmp_path / "meminfo"
    free.write_text(f"MemTotal: 9 kB\nMemAvailable:   {one * 21 // 2 // 1024} kB\n")
    monkeypatch.setattr(contenders, "MEMINFO", free)
    assert contenders.count_separate(encoder, 3) == 3
    assert contenders.count_separate(encoder, 32) == 5  # half of the free memory
    monkeypatch.setattr(contenders, "MEMINFO", tmp_path / "none")
    assert contenders.count_separate(encoder, 32) == 4
