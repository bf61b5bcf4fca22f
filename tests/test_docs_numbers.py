"""Numbers in the pages are those of the result files that they name."""

import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bitfit.experiments.answers import restore_answers
from bitfit.experiments.report.write import write_report
from bitfit.experiments.store import Store

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BENCHMARKS = ROOT / "benchmarks" / "README.md"


def result(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def tables_of(page):
    """The body rows of every table of a page, by its header."""
    found = {}
    lines = iter(page.read_text(encoding="utf-8").splitlines())
    for line in lines:
        if not line.startswith("|"):
            continue
        rows = found.setdefault(cells(line), [])
        for row in lines:
            if not row.startswith("|"):
                break
            if not set(row) <= set("|-: "):
                rows.append(cells(row))
    return found


def cells(line):
    return tuple(cell.strip() for cell in line.strip().strip("|").split("|"))


def table(page, *header):
    """The rows of the one table whose header begins with these cells."""
    found = [rows for key, rows in tables_of(page).items() if key[: len(header)] == header]
    assert len(found) == 1, header
    return found[0]


def whole(value, unit=""):
    return "" if value is None else f"{value:,.0f}{unit}"


def percent(value):
    return "" if value is None else f"{100 * value:.0f} %"


def megabytes(value):
    if value is None:
        return ""
    scaled = value / 1e6
    return f"{scaled:.2f} MB" if scaled < 0.095 else f"{scaled:.{int(scaled < 9.5)}f} MB"


def ratio(value, digits=2):
    return f"{value:.{digits}f}"


def test_the_table_of_mixed_batches_is_that_of_its_file():
    shown = table(BENCHMARKS, "answered by", "tasks", "items/s")
    rows = result("serve_sst2.json")["rows"]
    assert [row[1:] for row in shown] == [
        (
            whole(r["tasks"]), whole(r["items_per_second"]), ratio(r["ratio_to_folded"]),
            ratio(r["cpu_ratio_to_folded"]), whole(r["p50_ms"], " ms"), whole(r["p99_ms"], " ms"),
        )
        for r in rows
    ]  # fmt: skip


def test_what_is_said_of_mixed_batches_is_in_their_files():
    last = result("serve_sst2.json")
    lines = (RESULTS / "serve_sst2_all.jsonl").read_text(encoding="utf-8").splitlines()
    every = [json.loads(line) for line in lines]
    assert every[-1] == last

    def row(report, name):
        return next(r for r in report["rows"] if r["name"] == name)

    def times(report, other):
        own, theirs = row(report, "mixed-1000"), row(report, other)
        pairs = zip(own["batches_per_second_by_round"], theirs["batches_per_second_by_round"],
                    strict=True)  # fmt: skip
        shares = sorted(a / b for a, b in pairs)
        return shares[len(shares) // 2]

    text = BENCHMARKS.read_text(encoding="utf-8")
    for other, said in (("lora-32", "**3.4 times**"), ("lora-all-32", "**5.3 times**")):
        assert said.strip("*") == f"{times(last, other):.1f} times"
        assert said in text
    found = {ratio(row(report, "mixed-1000")["ratio_to_folded"]) for report in every}
    assert found == {"0.93", "0.94", "0.97", "0.99"}
    assert f"{min(found)} to {max(found)}" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["sst2", "mrpc"])
def test_the_table_of_lanes_is_that_of_its_file(name):
    task = {"sst2": "SST-2", "mrpc": "MRPC"}[name]
    rows = table(BENCHMARKS, "task", "lanes", "side by side, tokens/s")
    shown = [row[1:] for row in rows if row[0] == task]
    assert shown == [
        (
            whole(r["lanes"]), whole(r["tokens_per_second"]), whole(r["alone_tokens_per_second"]),
            ratio(r["ratio"]), percent(r["roofline_fraction"]), megabytes(r["peak_memory_bytes"]),
        )
        for r in result(f"lanes_{name}.json")["tables"][0]["rows"]
    ]  # fmt: skip


def test_the_table_of_one_run_is_that_of_its_file():
    shown = table(BENCHMARKS, "variant", "tokens/s", "to released")
    rows = result("train_mrpc.json")["tables"][0]["rows"]
    expected = [
        (
            whole(r["tokens_per_second"]), ratio(r["ratio"]), ratio(r["ratio_to_best_stock"]),
            percent(r["roofline_fraction"]) if r["precision"] == "fp32" else "",
            megabytes(r["peak_memory_bytes"]), megabytes(r["optimizer_bytes"]),
            megabytes(r["checkpoint_bytes"]),
        )
        for r in rows
        if r["tokens_per_second"] is not None
    ]  # fmt: skip
    assert [row[1:] for row in shown] == expected


def test_the_table_over_http_is_that_of_its_file():
    shown = table(BENCHMARKS, "answered by", "texts in a request")
    expected = []
    for r in result("http.json")["rows"]:
        server = r["server"]
        parts = [] if server is None else [server[k] for k in ("wait_ms", "batch_ms", "request_ms")]
        expected.append((
            r["title"], whole(r["items_per_request"]), whole(r["items_per_second"]),
            ratio(r["ratio_to_engine"]), ratio(r["cpu_ms_per_item"], 1),
            f"{r['p50_ms'] / 1000:.2f} s, {r['p99_ms'] / 1000:.2f} s",
            ", ".join(f"{part:.0f}" for part in parts),
        ))  # fmt: skip
    assert shown == expected


@pytest.mark.parametrize(("size", "column"), [("base", 1), ("large", 4)])
def test_the_table_of_a_gpu_is_that_of_its_file(size, column):
    shown = table(BENCHMARKS, "bf16, batch 8, lengths of MRPC")
    values = {
        r["what"]: r["value"] for r in result(f"gpu_{size}.json")["rows"]
        if r["part"] == f"lanes {size}"
    }  # fmt: skip
    names = {
        "stock biases": "stock",
        "16 runs one after another": "the runs of 16 lanes, one after another",
    }
    for row in shown:
        what = names.get(row[0], row[0])
        assert row[column] == whole(values[what])
        if row[0] == "16 runs one after another":
            continue
        peak = values[f"{what}: peak above the model"]
        memory = f"{peak:.0f} MiB" if peak < 1024 else f"{peak / 1024:.1f} GiB"
        assert row[column + 2] == memory


@pytest.mark.parametrize("script", ["quality", "recipes"])
def test_tables_of_scores_are_those_that_their_script_prints(script):
    path = ROOT / "benchmarks" / f"{script}.py"
    done = subprocess.run(
        [sys.executable, str(path), "--table"], capture_output=True, text=True, check=True,
        cwd=ROOT,
    )  # fmt: skip
    printed = {cells(line) for line in done.stdout.splitlines() if line.startswith("|")}
    headers = {key for key in printed if key[0] == "task"}
    page = ROOT / "docs" / f"{script}.md"
    tables = {key: rows for key, rows in tables_of(page).items() if key in headers}
    assert len(tables) == len(headers)
    for rows in tables.values():
        assert rows
        assert set(rows) <= printed


# ------------------------------------------------------------------ experiments

REPRODUCE = ROOT / "docs" / "reproduce.md"
NUMBER = re.compile(r"(?<![\w.-])\d+\.\d(?![\d.])")


def bullets():
    """Each point of 'What has been run' with the reports that it leads to."""
    text = REPRODUCE.read_text(encoding="utf-8")
    section = text.partition("## What has been run")[2].partition("\n## ")[0]
    points = re.split(r"^- ", section, flags=re.MULTILINE)[1:]
    return [(p, re.findall(r"\]\((results/[\w-]+/report\.md)", p)) for p in points]


@pytest.mark.parametrize(
    ("point", "reports"), bullets(), ids=[p.partition("](")[0][1:] for p, _ in bullets()]
)
def test_a_score_that_is_named_stands_in_the_report_that_is_linked(point, reports):
    assert reports
    found = "\n".join((ROOT / "docs" / path).read_text(encoding="utf-8") for path in reports)
    there = set(re.findall(r"\d+\.\d", found))
    named = set(NUMBER.findall(re.sub(r"\]\([^)]*\)", "]", point)))
    assert named <= there


CHAIN = re.compile(r"[\w+ ]+? \d+\.\d(?: > [\w+ -]+? \d+\.\d)+")


def plain(text):
    """Markdown's text without its escapes and line breaks."""
    return " ".join(re.sub(r"\\(.)", r"\1", text).split())


@pytest.mark.parametrize(
    ("point", "reports"), bullets(), ids=[p.partition("](")[0][1:] for p, _ in bullets()]
)
def test_an_order_of_rows_is_the_one_that_the_report_that_is_linked_has(point, reports):
    found = plain("\n".join((ROOT / "docs" / path).read_text("utf-8") for path in reports))
    chains = CHAIN.findall(plain(point))
    assert all(chain.strip() in found for chain in chains), chains
    taus = re.findall(r"Kendall's tau (-?\d\.\d\d)", plain(point))
    assert all(f"Kendall's tau {tau}" in found for tau in taus), taus
    if reports == ["results/table3/report.md"]:
        assert len(chains) == len(taus) == 4


def test_the_counts_of_degenerate_runs_are_those_of_the_report():
    report = (ROOT / "docs/results/table3/report.md").read_text("utf-8")
    table = report.partition("## Stability over the seeds")[2].partition("\n## ")[0]
    found = re.findall(r"^\| (\S.*?) \| (\S+) \|.*?\| (\d+) of (\d+) \(", table, re.MULTILINE)
    rows = [(row, task, int(few), int(runs)) for row, task, few, runs in found]
    main = [row for row in rows if row[0] in ("BitFit", "Full-FT")]
    rest = [row for row in rows if row not in main]
    assert sum(row[2] for row in main) == 0
    counts = (
        f"of {sum(row[3] for row in main)}, is degenerate (at or below the most frequent answer); "
        f"{sum(row[2] for row in rest)} of the other {sum(row[3] for row in rest)} are, "
        f"{sum(row[2] for row in rest if row[1] == 'RTE')} of them on RTE"
    )
    assert counts in plain(REPRODUCE.read_text("utf-8"))


def rows_of(name, title):
    """The rows of a table of a report, each a mapping from its heads."""
    report = (ROOT / "docs" / "results" / name / "report.md").read_text("utf-8")
    part = report.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    lines = [plain(line) for line in part.splitlines() if line.startswith("|")]
    heads, _, *rows = ([c.strip() for c in line.strip("|").split("|")] for line in lines)
    return [dict(zip(heads, row, strict=True)) for row in rows]


def ends(values):
    """The least and the largest of some cells, which may have a spread behind a mean."""
    found = sorted(values, key=lambda cell: float(cell.split(" ")[0]))
    return tuple(cell.split(" ")[0].lstrip("+") for cell in (found[0], found[-1]))


def test_what_is_said_of_gap_convergence_and_spreads_is_what_the_report_says():
    said = plain(REPRODUCE.read_text("utf-8"))
    gap = {(r["row"], r["task"]): r["gap"] for r in rows_of("table3", "Generalization gap")}
    tasks = ("RTE", "MRPC", "STS-B", "SST-2")
    assert all(
        float(gap["BitFit", task].split()[0]) < float(gap["Full-FT", task].split()[0])
        for task in tasks
    )
    named = []
    for row in ("BitFit", "Full-FT"):
        least, most = ends([gap[row, task] for task in tasks])
        of = {gap[row, task].split()[0].lstrip("+"): task for task in tasks}
        named += [(least, of[least]), (most, of[most])]
    (a, b), (c, d), (e, f), (g, h) = named
    assert (
        f"{a} ({b}) to {c} points ({d}) with the biases, {e} ({f}) to {g} ({h}) with everything"
    ) in said
    best = {r["row"]: r for r in rows_of("table3", "Best learning rates")}
    rates = {
        (row, task): best[row][task].split(" ")[0]
        for row in ("BitFit", "Full-FT")
        for task in tasks
    }
    course = {
        (r["row"], r["task"], r["rate"]): r["epochs to the best"]
        for r in rows_of("table3", "Convergence: epochs to the best dev score")
    }
    spread = {
        (r["row"], r["task"], r["rate"]): r["sd"]
        for r in rows_of("table3", "Stability over the seeds")
    }
    low, high = {}, {}
    for row in ("BitFit", "Full-FT"):
        keys = [(row, task, rates[row, task]) for task in tasks]
        low[row] = ends([course[key] for key in keys])
        high[row] = ends([spread[key] for key in keys])
    assert (
        "BitFit has its best epoch after {} to {} of five, full fine-tuning after {} to {}."
    ).format(*low["BitFit"], *low["Full-FT"]) in said
    assert (
        "Spreads over seeds at the best rates are {} to {} of BitFit and {} to {} of full "
        "fine-tuning"
    ).format(*high["BitFit"], *high["Full-FT"]) in said
    last = [task for task in tasks if course["BitFit", task, "1e-4"].split(" ")[0] == "5.0"]
    assert f"BitFit is best in the last epoch on {', '.join(last[:-1])} and {last[-1]}" in said


def differences(name):
    """(row, task) -> difference, interval and word of a report's first table of differences."""
    report = (ROOT / "docs" / "results" / name / "report.md").read_text("utf-8")
    table = report.partition("## Differences to the reference row, protocol paper")[2]
    lines = [plain(line) for line in table.partition("\n## ")[0].splitlines()]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    return {(c[0], c[1]): c[2:5] for c in cells[2:]}


def test_what_is_said_of_differences_is_what_the_reports_say():
    said = plain(REPRODUCE.read_text("utf-8"))
    table3, pos = differences("table3"), differences("pos-minilm")
    stsb = {row: found for (row, task), found in table3.items() if task == "STS-B"}
    behind = ("rand 100k", "b_q", "Frozen")
    assert {stsb[row][2] for row in behind} == {"behind"}
    first, second, third = (stsb[row][0].lstrip("-") for row in behind)
    assert f"are behind all biases (by {first}, {second} and {third})" in said
    few = [stsb[row] for row in ("Full-FT", "b_m2 + b_q", "b_m2")]
    assert {word for *_, word in few} == {"too few seeds"}
    assert (
        f"For full fine-tuning ({few[0][0]}), b_m2 with b_q ({few[1][0]}) and b_m2 ({few[2][0]}) "
        "three seeds are too few to say so"
    ) in said
    assert stsb["row_col"][2] == "within noise"
    words = {task: {} for _, task in table3}
    for (row, task), (*_, word) in table3.items():
        words[task].setdefault(word, []).append(row)
    assert {*words["MRPC"]} == {*words["RTE"]} == {"within noise"}
    assert words["SST-2"].pop("too few seeds") == ["Frozen"]
    assert {*words["SST-2"]} == {"within noise"}
    value, interval, word = pos["Full-FT", "ud_ewt"]
    assert word == "ahead"
    assert f"full is ahead by {value[1:]} points ({interval.replace('+', '')})" in said
    squad = {row: found for (row, _), found in differences("squad-minilm").items()}
    value, interval, word = squad.pop("Full-FT, 7,984 rows")
    assert word == "ahead"
    assert (
        f"At 7,984 full fine-tuning is ahead by {value[1:]} points ({interval.replace('+', '')}); "
        "at the smaller sizes two seeds are too few to say so"
    ) in said
    assert {word for *_, word in squad.values()} == {"too few seeds"}


def test_what_is_said_of_single_terms_is_what_the_report_says():
    said = plain(REPRODUCE.read_text("utf-8"))
    rows = rows_of("terms-minilm", "Mean over the seeds, protocol paper")
    score = {r["row"]: r["STS-B"] for r in rows}
    alone = sorted((k for k in score if k.endswith("alone")), key=lambda k: -float(score[k]))
    first, second = (f"{k.removesuffix(' alone')} " for k in alone[:2])
    assert f"Of single terms {first}is the best ({score[alone[0]]}), {second}the next" in said
    assert f"({score[alone[1]]}); leaving out any one" in said
    lost = [float(r["difference"]) for r in rows_of(
        "terms-minilm", "Differences to the reference row, protocol paper"
    ) if r["row"].startswith("without")]  # fmt: skip
    assert len(lost) == 8
    assert f"costs at most {-min(lost):.1f} points" in said
    words = [r["the prediction"] for r in rows_of("terms-minilm", "Two predictions of the theory")]
    assert words == ["not contradicted", "not decided"]
    store = Store(KEPT / "terms-minilm")
    runs = {r["row"]: store.kept_predictions(r["id"])["dev"] for r in store.records()}
    for one, other in (("b_k alone", "Frozen"), ("without b_k", "BitFit")):
        assert np.abs(np.array(runs[one]) - np.array(runs[other])).max() < 1e-5


KEPT = ROOT / "experiments" / "results"
REPORTED = sorted({path.parent.name for path in KEPT.glob("*/predictions")})


@pytest.mark.parametrize("name", sorted(path.name for path in KEPT.iterdir()))
def test_the_commands_of_an_experiment_name_what_its_runs_are_of(name):
    """Each task, row and device; a grid's file stands for the tasks and rows in it."""
    store = Store(KEPT / name)
    experiment, commands = store.experiment(), []
    for command in store.experiment()["commands"]:
        words = shlex.split(command)
        options = dict(itertools.pairwise(words))
        asked = {
            key: options[f"--{key}"].split(",") if f"--{key}" in options else experiment[key]
            for key in ("tasks", "rows")
        }
        commands.append((asked, options.get("--device", "cpu")))
    for record in store.records():
        assert any(
            record["task"]["name"] in asked["tasks"]
            and record["row"] in asked["rows"]
            and record["environment"]["device"].startswith(device)
            for asked, device in commands
        ), record["id"]


@pytest.mark.parametrize("name", REPORTED)
def test_a_report_in_the_pages_is_what_its_records_give_today(name, real_data, tmp_path):
    """But for the figures, which take longer and are drawn of the same tables."""
    shutil.copytree(KEPT / name, tmp_path / name)
    store = Store(tmp_path / name)
    assert restore_answers(store, real_data()) == []
    out = tmp_path / "docs" / "results" / name
    write_report(store, out, formats=["markdown"])
    shown = (ROOT / "docs" / "results" / name / "report.md").read_text("utf-8")
    shown = re.sub(r"!\[[^\n]*\]\(figures/[^\n]*\n\n[^\n]*\n\n?", "", shown)
    made = (out / "report.md").read_text("utf-8")
    made = made.replace(f"../../../{name}/runs", f"../../../experiments/results/{name}/runs")
    assert made.splitlines() == shown.splitlines()
