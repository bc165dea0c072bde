"""The front: one address for all models. It chooses by `model`; `relay` asks the replicas.

It knows nothing of Ray: `ReplicaHandles` is what it needs of it. It has no queue and no limits of
its own beside those on bodies: each replica has them.
"""

import asyncio
import dataclasses
import json
import logging
import time
from collections.abc import (
    Awaitable,
    Callable,
    Collection,
    Mapping,
)
from contextlib import nullcontext
from typing import Any

from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api import metrics
from service.api.bodies import Bodies, has_body, is_form
from service.api.body_budget import as_utf8, check_values, is_small
from service.api.cancellation import MAX_TIMEOUT, deadline_of
from service.api.generating import generates
from service.api.keys import Keys, is_preflight, is_public
from service.api.record import RequestRecord, request_id
from service.api.refusal import refusal
from service.clients import Client
from service.cluster import exposition
from service.cluster.exchange import Request
from service.cluster.relay import Exchange, ReplicaHandles, ReplicaLost, forward
from service.errors import (
    ClientGone,
    MethodNotAllowed,
    NotFound,
    RequestError,
    Unavailable,
)
from service.settings import Settings

_logger = logging.getLogger("service")

# How long a replica may take for a health check or for its share of a list, in seconds.
_ASK_SECONDS = 5.0
_RELOAD_SECONDS = 1.0  # between two looks at the file of keys


class FrontApplication:
    """An ASGI application that sends each request to a replica of its model."""

    def __init__(self, replicas: ReplicaHandles, settings: Settings) -> None:
        self._replicas = replicas
        self._settings = settings
        self._bodies = Bodies(settings)
        self._keys: Keys | None = None
        self._reload_at = 0.0
        self._owners: Mapping[str, str] = {}
        self._default = ""
        self._routes: Collection[str] = ()
        self._own_routes: dict[str, Callable[[Scope], Awaitable[Response]]] = {
            "/health": self._ready,
            "/health/live": self._live,
            "/health/ready": self._ready,
            "/metrics": self._metrics,
            "/ping": self._ready,
            "/v1/models": self._list_models,
        }

    def configure(
        self,
        default: str,
        owners: Mapping[str, str],
        clients: Mapping[str, Client] | None,
        cors: Mapping[str, Any],
        routes: Collection[str] = (),
    ) -> None:
        """Set the default model, served name -> model, and the keys (None: none is asked for).

        `cors` are the arguments of CORSMiddleware for what the front answers itself; `routes` are
        paths that answer like `POST /`.
        """
        self._default, self._owners, self._cors, self._routes = default, owners, cors, routes
        for model in owners.values():  # Prometheus sees no increase in a series that begins at 1
            metrics.FRONT_RETRIES.labels(model)
        file = self._settings.api_key_file
        self._keys = None if clients is None else Keys(clients, file)

    def use_keys(self, clients: Mapping[str, Client]) -> None:
        """Let these keys be the valid ones."""
        assert self._keys is not None  # keys are not switched on later
        self._keys.replace(clients)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        record = RequestRecord(request_id(scope))
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        # The path whose protocol it speaks.
        form = "/" if scope["method"] == "POST" and path in self._routes else path
        exchange = Exchange(send)
        try:
            response = await self._respond(scope, path, form, record, receive, exchange)
        except RequestError as e:
            error = e
        except Exception as e:
            _logger.error("request %s failed: %s", record.id, type(e).__name__)
            _logger.debug("request %s", record.id, exc_info=e)
            error = RequestError("internal error; the front's log has more under the request's id")
        else:
            if response is not None:
                await self._with_cors(response, scope)(scope, receive, send)
            return
        # What a replica answers, and whose client leaves it, it counts and logs itself.
        if not (exchange.at_replica and isinstance(error, ClientGone)):
            record.status, record.error = error.status, error.type
            route = form if form == "/" or form in self._own_routes else "unmatched"
            metrics.REQUESTS.labels(route, record.status).inc()
            if generates(scope["method"], form):
                record.count()
            record.log(scope["method"], route, time.perf_counter() - began, quiet=False)
        if exchange.started:
            await exchange.end(error, record.id, form)
        else:
            response = refusal(error, record.id, form)
            await self._with_cors(response, scope)(scope, receive, send)

    def _with_cors(self, response: Response, scope: Scope) -> ASGIApp:
        if "origin" not in Headers(scope=scope):
            return response
        return CORSMiddleware(response, **self._cors)

    async def _respond(
        self,
        scope: Scope,
        path: str,
        form: str,
        record: RequestRecord,
        receive: Receive,
        exchange: Exchange,
    ) -> Response | None:
        """Answer a request by `exchange`, or return the answer. Raises RequestError."""
        method = scope["method"]
        if self._keys:
            if time.monotonic() > self._reload_at:  # a file that is refused is read each time
                self._keys.reload()
                self._reload_at = time.monotonic() + _RELOAD_SECONDS
            if not is_public(scope, path, metrics_key=self._settings.metrics_key):
                record.client = self._keys.owner(scope, path)
        if (own := self._own_routes.get(path)) is not None:
            if method in ("GET", "HEAD"):
                return await own(scope)
            if not is_preflight(scope):  # which a replica answers
                raise MethodNotAllowed("GET, HEAD")
        async with (
            self._bodies.read(scope, receive) if has_body(scope) else nullcontext(b"") as body
        ):
            value: dict[str, Any] = {}
            if form == "/" or not is_form(scope):
                body = as_utf8(body)
                value = _object_in(body)
            record.model = model = self._model_of(value, form)
            deadline = None
            if generates(method, form):
                deadline = deadline_of(scope, _timeout_in(value) if form == "/" else None)
            work = forward(
                self._replicas,
                model,
                _request(scope, path, body),
                exchange,
                self._settings.queue_timeout,
                deadline,
            )
            await exchange.run(work, receive)
        return None

    def _model_of(self, value: Mapping[str, Any], form: str) -> str:
        """Return the model that a body names, or the default. Raises NotFound."""
        name = value.get("model")
        # For vLLM's routes an empty name is none.
        if not isinstance(name, str) or (not name and form != "/"):
            return self._default
        if name not in self._owners:
            raise NotFound(
                f"there is no model of this name; this server has {', '.join(self._owners)}",
                param="model",
            )
        return self._owners[name]

    async def _live(self, scope: Scope) -> Response:
        return JSONResponse({"status": "alive"})

    async def _ready(self, scope: Scope) -> Response:
        """What a replica of the default model says of itself, or 503 when none is up."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        request = _request(scope, path, b"")
        for _ in range(2):  # the first may be about to end
            status, body = await self._ask(self._default, request)
            if status == 200:
                break
        if not body and path == "/health/ready" and status != 200:
            return JSONResponse({"status": "starting", "model": self._default}, 503)
        return Response(body, status, media_type="application/json" if body else None)

    async def _metrics(self, scope: Scope) -> Response:
        text = await asyncio.to_thread(exposition.joined, await self._replicas.metrics())
        return Response(text, media_type=exposition.MEDIA_TYPE)

    async def _list_models(self, scope: Scope) -> Response:
        """The union of the replicas' lists. A model without a replica is left out."""
        models = dict.fromkeys(self._owners.values())
        request = dataclasses.replace(_request(scope, "/v1/models", b""), method="GET")
        answers = await asyncio.gather(*(self._ask(model, request) for model in models))
        data = [m for status, body in answers if status == 200 for m in json.loads(body)["data"]]
        if not data:
            raise Unavailable("no replica is up yet; try again", retry_after=10)
        return JSONResponse({"object": "list", "data": data})

    async def _ask(self, model: str, request: Request) -> tuple[int, bytes]:
        """Return status and body of a short answer of one replica; 503 if there is none."""
        status, body = 503, b""
        try:
            async with asyncio.timeout(_ASK_SECONDS):
                async for part in self._replicas.answer(model, request):
                    if part is not None:
                        status, body = part.status or status, body + part.body
        except (ReplicaLost, TimeoutError):
            return 503, b""
        return status, body


def _request(scope: Scope, path: str, body: bytes) -> Request:
    return Request(
        method=scope["method"],
        path=path,
        query=scope["query_string"],
        headers=tuple(scope["headers"]),
        client=scope.get("client"),
        body=body,
    )


def _object_in(body: bytes) -> dict[str, Any]:
    """Return the object that a body holds; else an empty one, for the replica says what is wrong.

    Raises InvalidRequest.
    """
    if not is_small(body):
        check_values(body)
    try:
        value = from_json(body)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _timeout_in(value: Mapping[str, Any]) -> float | None:
    """Return the seconds that a body of `POST /` allows; the replica refuses what is none."""
    timeout = value.get("timeout")
    return timeout if isinstance(timeout, int | float) and 0 < timeout <= MAX_TIMEOUT else None


async def _lifespan(receive: Receive, send: Send) -> None:
    """Answer the lifespan protocol: the front has nothing to start or end."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
