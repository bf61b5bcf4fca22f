"""A server for the page's tests: the HTTP interface over 3,000 made-up tasks, no model.

`python tests/page_server.py` prints the address at which it serves, to look at it.
"""

from __future__ import annotations

import json
import math
import random
import re
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from bitfit.terms import SYMBOLS

PAGE = Path(__file__).resolve().parents[1] / "src" / "bitfit" / "serve" / "page"
POLICY = (
    "default-src 'self'; style-src 'self'; script-src 'self'; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
HOSTILE = (
    "<img src=x onerror=\"window.broken='img'\">",
    "<script>window.broken='script'</script>",
    "\u202eمرحبا desrever\u202e",
    "W" * 10_000,
    "Ẑ̸̗a̴l̷g̵o̸",
    "'\"`${window.broken=1}&lt;b&gt;",
    "javascript:window.broken=1",
)
INTENTS = (
    "refund_status",
    "cancel_order",
    "product_question",
    "workshop_booking",
    "delivery_delay",
)
SORTS = (
    ("intent", "classification", "accuracy", (*INTENTS, "invoice", "complaint")),
    ("sentiment", "classification", "f1_macro", ("negative", "positive")),
    ("topics", "multilabel", "f1_micro", ("brakes", "wheels", "gears", "frame", "lights")),
    ("entities", "tokens", "f1", ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")),
    ("similarity", "regression", "spearman", ()),
    ("answers", "span", "f1", ()),
)
PLACES = {"Berlin": "LOC", "Priya": "PER", "Bosch": "ORG", "Zürich": "LOC"}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def seeded(*parts: object) -> random.Random:
    return random.Random(repr(parts))


def make_task(number: int, now: float) -> dict[str, Any]:
    luck = seeded("task", number)
    word, kind, metric, labels = SORTS[number % 6]
    name = f"shop-{number // 6:04d}-{word}"
    return {
        "name": name,
        "version": 1 + luck.randrange(4),
        "kind": kind,
        "labels": list(labels),
        "metric": metric,
        "score": None if number % 40 == 9 else 0.6 + 0.38 * luck.random(),
        "is_pair": kind == "regression",
        "max_length": 384 if kind == "span" else 128,
        "bytes": 93_000 + 1540 * max(1, len(labels)),
        "fingerprint": f"{luck.getrandbits(64):016x}",
        "pinned": number % 50 == 0,
        "resident": number % 7 != 6,
        "source": f"tasks/{name}.bitfit.safetensors",
        "licence": "CC-BY-4.0",
        "description": f"Messages to the bicycle shop number {number // 6}, sorted by hand.",
        "can_roll_back": number % 3 == 0,
        "last_used": None if number % 5 == 4 else now - luck.expovariate(1 / 4000),
    }


def hostile_task(now: float) -> dict[str, Any]:
    task = make_task(0, now)
    task |= {
        "name": "hostile",
        "labels": list(HOSTILE),
        "description": " ".join(HOSTILE),
        "licence": HOSTILE[0],
        "source": HOSTILE[1],
        "metric": "accuracy",
        "can_roll_back": True,
    }
    return task


class FakeServer:
    """The tasks, what a test may set, and the requests that came."""

    def __init__(self, *, number: int = 3000, keys: dict[str, str] | None = None) -> None:
        now = time.time()
        tasks = [make_task(i, now) for i in range(number)]
        if number:
            tasks.insert(3, hostile_task(now))
            frozen = make_task(1, now)
            tasks.append(frozen | {"name": "head-only"})
        self.tasks = {task["name"]: task for task in tasks}
        self.keys = keys or {}
        """Key -> role."""
        self.fail: dict[str, tuple[int, dict[str, Any]]] = {}
        """Path -> status and body instead of the answer."""
        self.delay: dict[str, float] = {}
        """Path -> seconds until the answer."""
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.predicted: list[dict[str, Any]] = []
        self.started = now
        self.is_busy = True
        """Whether others ask it too."""
        handler = partial(Handler, self)
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/"

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


class Refusal(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, server: FakeServer, *args: Any) -> None:
        self.fake = server
        super().__init__(*args)

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_POST = do_PUT = do_DELETE = do_GET

    def answer(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.fake.requests.append((self.command, self.path, dict(self.headers)))
        time.sleep(self.fake.delay.get(url.path, 0))
        try:
            if url.path in self.fake.fail:
                status, document = self.fake.fail[url.path]
                self.send(status, document)
            elif url.path == "/" or url.path.startswith("/page/"):
                self.send_file(url.path)
            else:
                query = {name: values[0] for name, values in parse_qs(url.query).items()}
                self.route([unquote(part) for part in url.path.split("/")[1:]], query, body)
        except Refusal as refusal:
            error = {"code": refusal.code, "message": str(refusal)}
            self.send(refusal.status, {"error": error})
        except (BrokenPipeError, ConnectionResetError):
            pass  # the page went away

    def send_file(self, path: str) -> None:
        file = PAGE / ("index.html" if path == "/" else path.removeprefix("/page/"))
        if file.parent != PAGE or not file.is_file():
            raise Refusal(404, "not_found", "no such file")
        self.send(200, file.read_bytes(), TYPES[file.suffix])

    def send(self, status: int, document: Any, kind: str = "application/json") -> None:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        if status == 429:
            self.send_header("Retry-After", "2")
        self.end_headers()
        self.wfile.write(body if status != 204 else b"")

    def need(self, role: str) -> None:
        if not self.fake.keys:
            return
        key = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        held = self.fake.keys.get(key)
        if held is None:
            raise Refusal(401, "unauthorized", "no or unknown key")
        if role == "manage" and held != "manage":
            raise Refusal(403, "forbidden", "the key's role is predict")

    def route(self, parts: list[str], query: dict[str, str], body: bytes) -> None:
        match self.command, parts:
            case "POST", ["v1", "predict"]:
                self.need("predict")
                self.predict(json.loads(body))
            case "GET", ["v1", "stats"]:
                self.need("predict")
                self.send(200, self.stats())
            case "GET", ["v1", "compare"]:
                self.need("predict")
                self.send(200, compare(self.find(query["a"]), self.find(query["b"])))
            case "GET", ["v1", "tasks"]:
                self.need("predict")
                self.search(query)
            case "GET", ["v1", "tasks", name]:
                self.need("predict")
                self.send(200, details(self.find(name)))
            case "GET", ["v1", "tasks", name, "file"]:
                self.need("manage")
                self.send(200, json.dumps(self.find(name)).encode(), "application/octet-stream")
            case "PUT", ["v1", "tasks", name]:
                self.need("manage")
                self.put(name, body)
            case "POST", ["v1", "tasks", name, "rollback"]:
                self.need("manage")
                self.roll_back(self.find(name))
            case "DELETE", ["v1", "tasks", name]:
                self.need("manage")
                self.find(name)
                del self.fake.tasks[name]
                self.send(204, b"")
            case _:
                raise Refusal(404, "not_found", f"nothing at {self.path}")

    def find(self, name: str) -> dict[str, Any]:
        if name not in self.fake.tasks:
            raise Refusal(404, "unknown_task", f"no task is called {name!r}")
        return self.fake.tasks[name]

    def search(self, query: dict[str, str]) -> None:
        words = query.get("query", "").lower().split()
        found = [
            task
            for task in self.fake.tasks.values()
            if all(
                w in " ".join((task["name"], task["kind"], *task["labels"])).lower() for w in words
            )
        ]
        offset, limit = int(query.get("offset", 0)), int(query.get("limit", 50))
        self.send(200, {"tasks": found[offset : offset + limit], "total": len(found)})

    def put(self, name: str, body: bytes) -> None:
        if not NAME.fullmatch(name):
            raise Refusal(422, "bad_name", f"{name!r} is no name")
        if not body.startswith(b"{"):
            raise Refusal(422, "corrupt_task_file", f"{name}: a pickle, and no task file")
        old = self.fake.tasks.get(name)
        version = old["version"] + 1 if old else 1
        task = make_task(0, time.time()) | {
            "name": name,
            "version": version,
            "can_roll_back": bool(old),
            "bytes": len(body),
            "description": None,
            "last_used": None,
        }
        self.fake.tasks[name] = task
        self.send(200 if old else 201, task)

    def roll_back(self, task: dict[str, Any]) -> None:
        if not task["can_roll_back"]:
            raise Refusal(409, "no_version_before", f"{task['name']} has one version only")
        task["version"] += 1
        self.send(200, task)

    def predict(self, request: dict[str, Any]) -> None:
        self.fake.predicted.append(request)
        answers = [self.one(item) for item in request["items"]]
        if len(answers) == 1 and answers[0].get("error", {}).get("code") == "unknown_task":
            raise Refusal(404, "unknown_task", answers[0]["error"]["message"])
        self.send(200, {"answers": answers, "ms": 4.0 + 0.8 * len(answers)})

    def one(self, item: dict[str, Any]) -> dict[str, Any]:
        head = {"id": item.get("id"), "task": item["task"]}
        task = self.fake.tasks.get(item["task"])
        if task is None:
            message = f"no task is called {item['task']!r}"
            return head | {"error": {"code": "unknown_task", "message": message}}
        task["last_used"] = time.time()
        words = item["text"].split()
        return head | {
            "version": task["version"],
            "fingerprint": task["fingerprint"],
            "kind": task["kind"],
            "tokens": min(len(words) + 2, task["max_length"]),
            "truncated": len(words) + 2 > task["max_length"],
            "result": RESULTS[task["kind"]](task, item),
        }

    def stats(self) -> dict[str, Any]:
        beat = time.time() - self.fake.started
        luck = seeded("stats", int(beat))
        rate = 900 + 250 * math.sin(beat / 9) + 90 * luck.random() if self.fake.is_busy else 0.0
        return {
            "uptime_s": 93_000 + beat,
            "requests": 181_000 + int(beat * 40),
            "items": 3_200_000 + int(beat * 900),
            "items_per_s": rate,
            "latency_ms": {
                "p50": 6 + 2 * luck.random(),
                "p90": 14.0,
                "p99": 22 + 9 * luck.random(),
            },
            "queue": {"items": luck.randrange(40), "tokens": luck.randrange(900)},
            "batch_fill": 0.7 + 0.2 * luck.random(),
            "tasks": len(self.fake.tasks),
            "resident": sum(task["resident"] for task in self.fake.tasks.values()),
            "base": {"name": "minilm", "sha256": "9f2c01d3a7", "dtype": "fp32"},
            "version": "0.1.0",
        }


# ---------------------------------------------------------------- made-up answers


def scored(task: dict[str, Any], item: dict[str, Any], sharpness: float) -> list[dict[str, Any]]:
    luck = seeded(task["name"], item["text"])
    values = [math.exp(sharpness * luck.random()) for _ in task["labels"]]
    total = sum(values)
    scores = [
        {"label": label, "score": value / total}
        for label, value in zip(task["labels"], values, strict=True)
    ]
    return sorted(scores, key=lambda entry: -entry["score"])


def classification(task: dict[str, Any], item: dict[str, Any]) -> dict[str, Any]:
    scores = scored(task, item, 7.0)
    best = scores[0]
    abstained = best["score"] < item.get("min_confidence", 0)
    return {
        "label": None if abstained else best["label"],
        "confidence": best["score"],
        "abstained": abstained,
        "scores": scores[: item.get("top_k")],
    }


def multilabel(task: dict[str, Any], item: dict[str, Any]) -> dict[str, Any]:
    luck = seeded(task["name"], item["text"])
    scores = [{"label": label, "score": luck.random() ** 2} for label in task["labels"]]
    scores.sort(key=lambda entry: -entry["score"])
    labels = [entry["label"] for entry in scores if entry["score"] > 0.5]
    return {"labels": labels, "scores": scores[: item.get("top_k")]}


def tokens(task: dict[str, Any], item: dict[str, Any]) -> dict[str, Any]:
    spans, entities = [], []
    for found in re.finditer(r"\w+", item["text"]):
        kind = PLACES.get(found[0])
        piece = {
            "start": found.start(),
            "end": found.end(),
            "text": found[0],
            "label": f"B-{kind}" if kind else "O",
            "confidence": 0.97 if kind else 0.99,
        }
        spans.append(piece)
        if kind:
            entities.append(piece | {"label": kind})
    return {"spans": spans, "entities": entities}


def span(task: dict[str, Any], item: dict[str, Any]) -> dict[str, Any]:
    context = item["text_pair"]
    found = re.search(r"on (\w+)", context)
    if not found:
        return {"answer": "", "start": 0, "end": 0, "score": -3.2}
    return {"answer": found[1], "start": found.start(1), "end": found.end(1), "score": 8.41}


def regression(task: dict[str, Any], item: dict[str, Any]) -> dict[str, Any]:
    return {"value": 5 * seeded(item["text"], item["text_pair"]).random()}


RESULTS = {
    "classification": classification,
    "multilabel": multilabel,
    "tokens": tokens,
    "span": span,
    "regression": regression,
}


# ---------------------------------------------------------------- made-up biases


def change_of(task: dict[str, Any]) -> list[dict[str, Any]]:
    if task["name"] == "head-only":
        return []
    luck = seeded("change", task["name"])
    size = {term: 0.002 + 0.02 * luck.random() for term in SYMBOLS}
    return [
        {
            "term": term,
            "symbol": symbol,
            "layer": layer,
            "mean_abs": size[term] * (0.4 + 0.6 * luck.random()) * (0.5 + layer / 10),
        }
        for term, symbol in SYMBOLS.items()
        for layer in range(6)
        if term != "key"
    ] + [
        {
            "term": "embeddings_layernorm",
            "symbol": "embeddings_layernorm",
            "layer": None,
            "mean_abs": 0.004,
        }
    ]


def details(task: dict[str, Any]) -> dict[str, Any]:
    return task | {
        "recipe": {
            "method": "bitfit",
            "learning_rate": 1e-3,
            "epochs": 3,
            "batch_size": 8,
            "seed": 0,
        },
        "scores": {task["metric"]: task["score"], "f1_macro": 0.811, "mcc": None},
        "terms": "all",
        "change": change_of(task),
    }


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    if "head-only" in (a["name"], b["name"]):
        raise Refusal(409, "wrong_base", "the two were made for different bases")
    luck = seeded("compare", a["name"], b["name"])
    rows = [
        {
            "term": entry["term"],
            "layer": entry["layer"],
            "cosine": 1.0 if a is b else luck.uniform(-0.6, 1.0),
            "norm_a": 0.1 + luck.random(),
            "norm_b": 0.1 + luck.random(),
            "mean_abs_a": luck.random() / 50,
            "mean_abs_b": luck.random() / 50,
        }
        for entry in change_of(a)
    ]
    rows[4] |= {"cosine": None, "norm_b": 0.0, "mean_abs_b": 0.0}
    total = {"term": "total", "layer": None, "cosine": 0.31, "norm_a": 2.4, "norm_b": 1.7}
    rows.append(total | {"mean_abs_a": 0.011, "mean_abs_b": 0.008})
    if (a["kind"], a["labels"]) == (b["kind"], b["labels"]):
        rows.append(
            total | {"term": "head.classifier.weight", "mean_abs_a": 0.1, "mean_abs_b": 0.1}
        )
    return rows


if __name__ == "__main__":
    server = FakeServer()
    print(server.address, flush=True)
    try:
        server.thread.join()
    except KeyboardInterrupt:
        server.close()
