"""The routes: each reads its request, asks the service, and writes the answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, Protocol, TypeVar

from fastapi import Depends, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Match, Route

import bitfit
from bitfit.errors import BitfitError, UnknownTask
from bitfit.serve import wire
from bitfit.serve.assets import Asset, read_assets
from bitfit.serve.auth import Caller, Keys, Role
from bitfit.serve.bodies import Bodies
from bitfit.serve.edge import LOG_FIELDS, Edge, dump
from bitfit.serve.engine import Item
from bitfit.serve.failures import RequestFailed, from_error
from bitfit.serve.metrics import CONTENT_TYPE, Metrics
from bitfit.serve.service import Found
from bitfit.serve.settings import ServeConfig
from bitfit.serve.shelf import TaskInfo

LARGE = 4096
"""Scores and the like of an answer beyond which it is written in a thread: some 5 ms."""
V = TypeVar("V")
Name = Annotated[str, Path(max_length=200, description="The task's name.", examples=["intent"])]
# The pattern is for the description only: what it refuses, wire.check_name says in words.
NewName = Annotated[
    str, Path(json_schema_extra={"pattern": wire.NAME_PATTERN}, examples=["intent"])
]
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_bearer = HTTPBearer(auto_error=False, description="One of the server's API keys.")


class Serves(Protocol):
    """What the routes ask: a service of this process, or a front over several."""

    config: ServeConfig
    metrics: Metrics
    base: dict[str, Any]

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""

    @ready.setter
    def ready(self, value: bool) -> None: ...

    def refusal(self) -> RequestFailed:
        """Return what a request is answered with where none is taken."""

    @property
    def broken(self) -> bool:
        """Whether nothing is answered any more, though nobody stopped it."""

    @property
    def task_count(self) -> int:
        """How many tasks can be asked."""

    async def start(self) -> None:
        """Begin to answer."""

    async def stop(self, *, drain: bool = True) -> None:
        """End."""

    async def predict(
        self, items: Sequence[Item], *, deadline_ms: float | None = None
    ) -> list[Found]:
        """Return the answer to each item, or the error in its place."""

    async def infos(self) -> list[TaskInfo]:
        """Return every task, by name."""

    async def describe(self, name: str) -> tuple[TaskInfo, dict[str, Any]]:
        """Return a task, and what its file says."""

    async def file_bytes(self, name: str) -> bytes:
        """Return a task's file."""

    async def compare(self, a: str, b: str) -> list[dict[str, Any]]:
        """Return how far two tasks moved."""

    async def put(self, name: str, data: bytes, *, pinned: bool = False) -> tuple[TaskInfo, bool]:
        """Add or replace a task; return it, and whether it is new."""

    async def rollback(self, name: str) -> TaskInfo:
        """Make the version before the current one."""

    async def remove(self, name: str) -> None:
        """Take a task out."""

    async def stats(self) -> dict[str, Any]:
        """Return what ``/v1/stats`` answers."""

    async def render_metrics(self) -> bytes:
        """Return what ``/metrics`` answers."""


class Json(JSONResponse):
    """An answer in JSON; NaN is an error."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return dump(content)


def make_app(service: Serves, keys: Keys | None = None) -> FastAPI:
    """Return the ASGI application over ``service``.

    Its lifespan starts the service where that was not done, and stops it at the end.

    Args:
        service: the tasks and the engine.
        keys: who may do what; None or none: everyone everything, but see ``Edge``.
    """
    keys = keys or Keys()
    config = service.config
    app = FastAPI(
        title="bitfit", version=bitfit.__version__, docs_url=None, redoc_url=None,
        description="Many fine-tuned text tasks on one base.", lifespan=_lifespan(service),
        default_response_class=Json, redirect_slashes=False,
    )  # fmt: skip
    routes = _Routes(service, config, keys)
    routes.add_to(app)
    app.add_middleware(Edge, config=config, keys=keys, metrics=service.metrics)
    _add_handlers(app)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _lifespan(service: Serves) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if not service.ready:
            await service.start()
        try:
            yield
        finally:
            await service.stop()

    return lifespan


class _Routes:
    def __init__(self, service: Serves, config: ServeConfig, keys: Keys) -> None:
        self._service, self._config, self._keys = service, config, keys
        self._bodies = Bodies(max_held=config.max_held_bytes, seconds=config.body_seconds)
        self._assets = read_assets()

    def add_to(self, app: FastAPI) -> None:
        """Register every route."""
        predict, manage = [Depends(self._allow("predict"))], [Depends(self._allow("manage"))]

        def route(
            method: str, path: str, call: Callable[..., Any], status: int, answer: Any,
            *, needs: Any = (), errors: tuple[int, ...] = (), also: Any = None, **more: Any,
        ) -> None:  # fmt: skip
            codes = (*errors, *((401, 403) if needs else ()), 500, 503)
            told = {code: _json("An error.", wire.ErrorOut) for code in codes}
            is_model = isinstance(answer, type)
            told[status] = _json("Done.", answer) if is_model else {"description": "Done."} | answer
            app.add_api_route(
                path, call, methods=[method], status_code=status, response_model=None,
                responses=told | (also or {}), dependencies=list(needs), **more,
            )  # fmt: skip

        route("POST", "/v1/predict", self.predict, 200, wire.PredictOut, needs=predict,
              errors=(400, 404, 408, 413, 422, 429, 504), tags=["predict"],
              openapi_extra=_body("application/json",
                                  {"$ref": "#/components/schemas/PredictIn"}))  # fmt: skip
        route("GET", "/v1/tasks", self.tasks, 200, wire.TasksOut, needs=predict, errors=(422,),
              tags=["tasks"])  # fmt: skip
        route("GET", "/v1/tasks/{name}", self.task, 200, wire.TaskDetailOut, needs=predict,
              errors=(404, 422), tags=["tasks"])  # fmt: skip
        route("GET", "/v1/tasks/{name}/file", self.file, 200,
              {"content": {"application/octet-stream": _BINARY}}, needs=manage,
              errors=(404, 422), tags=["manage"])  # fmt: skip
        route("PUT", "/v1/tasks/{name}", self.put, 200, wire.TaskOut, needs=manage,
              errors=(408, 409, 413, 422), tags=["manage"],
              also={201: _json("A new task.", wire.TaskOut)},
              openapi_extra=_body("application/octet-stream", _BINARY["schema"]))  # fmt: skip
        route("POST", "/v1/tasks/{name}/rollback", self.rollback, 200, wire.TaskOut, needs=manage,
              errors=(404, 409, 422), tags=["manage"])  # fmt: skip
        route("DELETE", "/v1/tasks/{name}", self.delete, 204, {}, needs=manage,
              errors=(404, 422), tags=["manage"])  # fmt: skip
        route("GET", "/v1/compare", self.compare, 200, wire.CompareOut, needs=predict,
              errors=(404, 422), tags=["tasks"])  # fmt: skip
        route("GET", "/v1/stats", self.stats, 200, wire.StatsOut, needs=predict, tags=["state"])
        route("GET", "/metrics", self.metrics, 200, {"content": {"text/plain": {}}},
              needs=predict, tags=["state"])  # fmt: skip
        route("GET", "/healthz", self.healthz, 200, wire.HealthOut, tags=["state"])
        route("GET", "/readyz", self.readyz, 200, wire.HealthOut, tags=["state"])
        for path in ("/", "/page/{asset}"):
            app.add_api_route(path, self.page, methods=["GET", "HEAD"], include_in_schema=False)

    def _allow(self, role: Role) -> Callable[..., Any]:
        async def allow(request: Request, _: Annotated[Any, Depends(_bearer)] = None) -> Caller:
            caller = self._keys.check(request.headers.get("authorization"), role)
            if caller.key is not None:
                _note(request, key=caller.key)
            return caller

        return allow

    # --- answers --------------------------------------------------------------------------------

    async def predict(self, request: Request) -> Response:
        """Answer texts, each by the task it names; tasks of all kinds mix in one call.

        An item that cannot be answered has `error` in its place, and the others are answered.
        """
        began = time.perf_counter()
        async with self._bodies.read(request, self._config.max_body_bytes) as body:
            asked = wire.read_predict(body)
            if len(asked.items) > self._config.max_items:
                raise RequestFailed(
                    413, f"{len(asked.items)} items, at most {self._config.max_items} are allowed",
                    code="too_many_items", details={"limit": self._config.max_items},
                )  # fmt: skip
            items = [item.to_item() for item in asked.items]
            _note(request, items=len(items))
            if self._config.log_texts:
                _note(request, texts=[[item.task, item.text, item.text_pair] for item in items])
            found = await _until_gone(
                request, self._service.predict(items, deadline_ms=asked.deadline_ms)
            )
        if len(items) == 1 and isinstance(found[0], UnknownTask):
            raise from_error(found[0])
        answers = [wire.answer_json(item, one) for item, one in zip(items, found, strict=True)]
        _note(request, tokens=_count_tokens(answers))
        ms = round((time.perf_counter() - began) * 1000, 2)
        if sum(map(_size, answers)) <= LARGE:
            return Json({"answers": answers, "ms": ms})
        body = await asyncio.to_thread(_dump_by_parts, answers, ms)
        return Response(body, media_type=Json.media_type)

    # --- tasks ----------------------------------------------------------------------------------

    async def tasks(
        self,
        query: Annotated[
            str, Query(max_length=200, description="Part of a name, kind, label or description.")
        ] = "",
        offset: Annotated[int, Query(ge=0, le=1 << 31)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> Response:
        """List the tasks by name."""
        infos = await self._service.infos()
        if words := query.lower().split():
            infos = [info for info in infos if all(w in _searched(info) for w in words)]
        page = infos[offset : offset + limit]
        return Json({"tasks": [wire.task_json(info) for info in page], "total": len(infos)})

    async def task(self, name: Name) -> Response:
        """Show a task: what its file says, and how far each bias vector moved."""
        info, more = await self._service.describe(name)
        return Json(wire.task_json(info) | more)

    async def file(self, name: Name) -> Response:
        """Download a task's file."""
        data = await self._service.file_bytes(name)
        return Response(data, media_type="application/octet-stream")

    async def put(
        self,
        request: Request,
        name: NewName,
        pinned: Annotated[bool, Query(description="Keep its row in memory.")] = False,
    ) -> Response:
        """Add a task, or replace it by a new version; requests on the old one finish on it."""
        wire.check_name(name)
        async with self._bodies.read(request, self._config.max_upload_bytes) as data:
            _note(request, bytes=len(data))
            info, is_new = await self._service.put(name, data, pinned=pinned)
        return Json(wire.task_json(info), status_code=201 if is_new else 200)

    async def rollback(self, name: Name) -> Response:
        """Bring the version before back, under a new number."""
        return Json(wire.task_json(await self._service.rollback(name)))

    async def delete(self, name: Name) -> Response:
        """Take a task out."""
        await self._service.remove(name)
        return Response(status_code=204)

    async def compare(
        self,
        a: Annotated[str, Query(max_length=200, description="A task.")],
        b: Annotated[str, Query(max_length=200, description="Another.")],
    ) -> Response:
        """Compare how far, and in how like a direction, two tasks moved each bias vector."""
        return Json({"a": a, "b": b, "rows": await self._service.compare(a, b)})

    # --- state ----------------------------------------------------------------------------------

    async def stats(self) -> Response:
        """Show rates, latencies and what waits."""
        return Json(await self._service.stats())

    async def metrics(self) -> Response:
        """Show everything that is counted, for Prometheus."""
        body = await self._service.render_metrics()
        return Response(body, headers={"content-type": CONTENT_TYPE})

    async def healthz(self) -> Response:
        """Say whether the process works."""
        if self._service.broken:
            raise RequestFailed(503, "the engine has stopped", code="broken")
        return Json({"status": "ok"})

    async def readyz(self) -> Response:
        """Say whether requests are taken."""
        if not self._service.ready:
            raise self._service.refusal()
        return Json({"status": "ok"})

    async def page(self, request: Request, asset: str = "index.html") -> Response:
        """Send a file of the page."""
        found: Asset | None = self._assets.get(asset)
        if found is None:
            raise RequestFailed(404, f"the page has no file {_shown(asset)}")
        headers = {"etag": found.tag, "cache-control": "no-cache"}
        if request.headers.get("if-none-match") == found.tag:
            return Response(status_code=304, headers=headers)
        return Response(found.data, headers=headers | {"content-type": found.content_type})


async def _until_gone(request: Request, work: Coroutine[Any, Any, list[Found]]) -> list[Found]:
    """Return the result of ``work``, which is cancelled where the client goes away."""
    answer = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise RequestFailed(499, "the client went away", code="client_gone")
        return answer.result()
    finally:
        answer.cancel()
        gone.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _note(request: Request, **fields: Any) -> None:
    request.scope.setdefault(LOG_FIELDS, {}).update(fields)


def _count_tokens(answers: list[dict[str, Any]]) -> int:
    return sum(answer.get("tokens", 0) for answer in answers)


def _size(answer: dict[str, Any]) -> int:
    """Return how many scores, labels, spans and entities an answer has."""
    values = answer.get("result", {}).values()
    return 1 + sum(len(value) for value in values if isinstance(value, list))


def _dump_by_parts(answers: list[dict[str, Any]], ms: float) -> bytes:
    # One by one: a call of json lets no other thread run before its end.
    return b'{"answers":[%b],"ms":%b}' % (b",".join(map(dump, answers)), dump(ms))


def _searched(info: Any) -> str:
    return " ".join((info.name, info.kind, *info.labels, info.description or "")).lower()


# --- errors -------------------------------------------------------------------------------------


def _add_handlers(app: FastAPI) -> None:
    Handler = Callable[[Request, Any], Awaitable[Response]]

    def answer(failed: RequestFailed) -> Response:
        return Json(failed.to_json(), status_code=failed.status, headers=failed.headers)

    async def request_failed(_: Request, error: RequestFailed) -> Response:
        return answer(error)

    async def ours(_: Request, error: BitfitError) -> Response:
        failed = from_error(error)
        if failed.status >= 500:
            raise error
        return answer(failed)

    async def bad_fields(_: Request, error: RequestValidationError) -> Response:
        return answer(wire.bad_fields([(e["loc"], e["msg"]) for e in error.errors()]))

    async def http(request: Request, error: HTTPException) -> Response:
        failed = _of_routing(request, error.status_code) or RequestFailed(
            error.status_code, str(error.detail), headers=error.headers
        )
        return answer(failed)

    handlers: Mapping[type[Exception], Handler] = {
        RequestFailed: request_failed,
        BitfitError: ours,
        RequestValidationError: bad_fields,
        HTTPException: http,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def _of_routing(request: Request, status: int) -> RequestFailed | None:
    """Return what is answered where no route takes a request; None: that is not what it is."""
    path = _shown(request.scope["path"])
    if status == 404:
        return RequestFailed(
            404, f"there is nothing at {path}: tasks are at /v1/tasks and /v1/tasks/NAME, texts "
            "are sent to /v1/predict, and /openapi.json describes everything",
        )  # fmt: skip
    if status == 405:
        taken = ", ".join(_methods_at(request))
        return RequestFailed(
            405, f"{path} takes {taken}; {_shown(request.method)} was sent",
            headers={"Allow": taken},
        )  # fmt: skip
    return None


def _methods_at(request: Request) -> list[str]:
    """Return the methods of all routes of a path; Starlette's own header has the first one's."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    at = [route for route in routes if route.matches(request.scope)[0] != Match.NONE]
    return sorted({method for route in at for method in route.methods or ()})


def _shown(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}…"


# --- OpenAPI ------------------------------------------------------------------------------------


def _body(content_type: str, schema: Any) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {content_type: {"schema": schema}}}}


def _json(description: str, model: type) -> dict[str, Any]:
    """Return an answer by reference: FastAPI neither checks nor copies it."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        schema.setdefault("components", {})["schemas"] = wire.schemas()
        app.openapi_schema = schema
    return app.openapi_schema
