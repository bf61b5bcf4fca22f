"""Small experiments written by hand, as a sweep would leave them: records, predictions, answers."""

from __future__ import annotations

import gzip
import json

import numpy as np

from bitfit.experiments.store import Store
from bitfit.metrics import compute_metrics, majority_score
from bitfit.tasks import Task

MRPC = Task(name="mrpc", kind="classification", labels=("0", "1"), metrics=("f1", "accuracy"),
            is_pair=True)  # fmt: skip
RTE = Task(name="rte", kind="classification", labels=("a", "b"), metrics=("accuracy",))
MNLI = Task(name="mnli", kind="classification", labels=("a", "b", "c"), metrics=("accuracy",))
STSB = Task(name="stsb", kind="regression", metrics=("spearman", "pearson"))
TAGS = Task(name="tags", kind="tokens", labels=("N", "V", "X"))
SQUAD = Task(name="squad", kind="span")
TOPICS = Task(name="topics", kind="multilabel", labels=("x", "y", "z"))
EIGHT = ("query", "key", "value", "attention_output", "attention_layernorm", "intermediate",
         "output", "output_layernorm")  # fmt: skip


class Sample(Store):
    """A store that writes made-up runs."""

    def __init__(self, directory, **experiment):
        super().__init__(directory)
        self.rows = 60
        experiment = {
            "format": 1, "name": "sample", "title": "A sample", "base": ["minilm"],
            "recipe": "paper", "grid": {}, "rows": [], "reference_row": "BitFit", "tasks": [],
            "seeds": [0, 1, 2], "search": "first-seed", "paper": "table3",
            "command": "bitfit reproduce table3 --base minilm",
            "conditions": {"threads": 1, "dtype": "fp32", "lanes": {"mrpc": 4}},
        } | experiment  # fmt: skip
        for name in ("runs", "predictions", "references"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        self._write("experiment.json", experiment)

    def _write(self, name, value):
        data = json.dumps(value, allow_nan=False).encode()
        path = self.directory / name
        path.write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)

    def done(self, row, task, *, skill=0.7, seed=0, rate=1e-3, base="minilm", train_rows=None,
             epochs=3, predictions=True, constant=False, change=(), **fields):  # fmt: skip
        """Write one finished run that is right in about ``skill`` of the rows."""
        name = self.name(row, task, seed, rate, base, train_rows)
        answers = answers_of(task, self.rows)
        dev = f"{task.name}{self.rows}"
        made = [
            guess(
                task, answers, skill - 0.1 * (epochs - 1 - e), (seed, int(rate * 1e6), e), constant
            )
            for e in range(epochs)
        ]
        scores = [clean(compute_metrics(task, p, answers)) for p in made]
        history = [
            {"epoch": e + 1, "train_loss": 0.7 - 0.1 * e, "dev": found}
            for e, found in enumerate(scores)
        ]
        order = [-1 if s[task.metric] is None else s[task.metric] for s in scores]
        best = max(range(epochs), key=lambda e: (order[e], e))
        record = self.start(name, "done", row, task, seed, rate, base, train_rows) | {
            "data": {"train": "t", "dev": dev, "seed": 0},
            "rows": {"train": train_rows or 3668, "dev": self.rows},
            "history": history, "best_epoch": best + 1, "scores": scores[best],
            "last": scores[-1],
            "train_scores": {
                k: None if v is None else min(1.0, v + 0.05) for k, v in scores[best].items()
            },
            "more": {}, "majority": clean(majority_score(task, answers)),
            "change": [
                {"term": term, "layer": layer, "mean_abs": 0.001 * (i + 1) * (layer + 1)}
                for i, term in enumerate(change) for layer in range(3)
            ] or None,
            "trainable": {"encoder": 9216, "head": 770},
            "cost": {
                "train_seconds": 10.0 + seed, "seconds": 12.0, "tokens": 1000,
                "tokens_per_second": 5000.0, "peak_memory_bytes": 400_000_000,
                "task_bytes": 40_000, "lanes": 4,
            },
            "environment": {"bitfit": "0.1.0", "torch": "2.13", "device": "cpu", "threads": 1},
        } | fields  # fmt: skip
        self._write(f"runs/{name}.json", record)
        self._write(f"references/{dev}.json.gz", {"answers": answers})
        if predictions:
            self._write(f"predictions/{name}.json.gz", {"dev": made})
        return name

    def failed(self, row, task, *, seed=0, rate=1e-3, base="minilm", train_rows=None,
               error="the loss became NaN at step 7"):  # fmt: skip
        """Write one failed run, with nothing that a run does not have before it fails."""
        name = self.name(row, task, seed, rate, base, train_rows)
        record = self.start(name, "failed", row, task, seed, rate, base, train_rows)
        for key in ("base_name", "trained_on", "metric"):
            del record[key]
        self._write(f"runs/{name}.json", record | {"error": error})
        return name

    @staticmethod
    def name(*parts):
        from hashlib import sha256

        return sha256(repr(parts).encode()).hexdigest()[:16]

    @staticmethod
    def start(name, state, row, task, seed, rate, base, train_rows):
        config = {
            "method": "bitfit", "terms": "all", "learning_rate": rate, "epochs": 3, "seed": seed,
            "recipe": "paper", "batch_size": 8,
        }  # fmt: skip
        return {
            "id": name, "state": state, "error": None, "row": row, "base": base,
            "base_name": base, "trained_on": "contrastively tuned for sentence similarity",
            "task": {
                "name": task.name, "kind": task.kind, "labels": list(task.labels),
                "metrics": list(task.metrics), "is_pair": task.is_pair,
            },
            "train_rows": train_rows, "config": config, "metric": task.metric,
            "command": f"bitfit train --base {base} --task {task.name} --lr {rate} --seed {seed}",
        }  # fmt: skip


def clean(scores):
    return {name: None if np.isnan(value) else value for name, value in scores.items()}


def answers_of(task, rows):
    rng = np.random.default_rng(3)
    if task.kind == "regression":
        return (rng.integers(0, 26, rows) / 5).tolist()
    if task.kind == "tokens":
        return [rng.integers(0, len(task.labels), 2 + i % 4).tolist() for i in range(rows)]
    if task.kind == "span":
        return [[[0, f"answer {i} here"], [3, f"the answer {i}"]] for i in range(rows)]
    if task.kind == "multilabel":
        return [np.flatnonzero(rng.random(len(task.labels)) < 0.5).tolist() for _ in range(rows)]
    return rng.integers(0, len(task.labels), rows).tolist()


def guess(task, answers, skill, seed, constant):
    """Return predictions that are right with the chance ``skill``."""
    rng = np.random.default_rng(seed)
    if task.kind == "regression":
        noise = rng.normal(0, 4 * (1 - skill), len(answers))
        return [2.5 if constant else a + n for a, n in zip(answers, noise.tolist(), strict=True)]
    if constant:
        return [answers[0]] * len(answers)
    right = rng.random(len(answers)) < skill
    if task.kind == "classification":
        return [a if ok else (a + 1) % len(task.labels)
                for a, ok in zip(answers, right, strict=True)]  # fmt: skip
    if task.kind == "tokens":
        return [a if ok else [-1] * len(a) for a, ok in zip(answers, right, strict=True)]
    if task.kind == "span":
        return [a[0][1] if ok else a[0][1].split()[0]
                for a, ok in zip(answers, right, strict=True)]  # fmt: skip
    return [a if ok else [0] for a, ok in zip(answers, right, strict=True)]


def table3(directory, tasks=(MRPC, RTE, STSB), rows=200):
    """Write an experiment like the paper's Table 3: two rates on seed 0, then two more seeds."""
    skills = {"BitFit": 0.8, "b_m2 + b_q": 0.79, "Frozen": 0.6, "Full-FT": 0.85}
    sample = Sample(directory, rows=list(skills), tasks=[t.name for t in tasks])
    sample.rows = rows
    for row, skill in skills.items():
        biases = {"BitFit": EIGHT, "b_m2 + b_q": ("query", "intermediate")}.get(row, ())
        for task in tasks:
            sample.done(row, task, skill=skill - 0.2, rate=4e-4, change=biases)
            for seed in range(3):
                sample.done(row, task, skill=skill, seed=seed, change=biases)
    sample.failed("Full-FT", tasks[0], rate=5e-2)
    return sample
