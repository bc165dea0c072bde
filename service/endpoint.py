"""The endpoint plugin: our routes in vLLM's app, and vLLM's routes behind our queue."""

import asyncio
import math
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Lifespan, Receive, Scope, Send
from vllm.engine.protocol import EngineClient
from vllm.envs import enable_envs_cache

from service import connection, progress, prompting, settings, web
from service.admission import Admission
from service.budget import Budget
from service.contract import Contract
from service.contract_request import OPENAPI
from service.ending import Endings
from service.engine import Engine
from service.errors import ConfigError, RequestError
from service.health import Health, Phase
from service.keys import Keys
from service.model_config import ModelConfig
from service.models.vllm_private import shorten_error_texts
from service.request_record import RequestRecord
from service.settings import ApiProcessConfig
from service.watch import Watch

# Not for clients: they change the engine that everybody uses.
_OFF = frozenset({"/scale_elastic_ep", "/is_scaling_elastic_ep"})
# Where vLLM's scale-out routes are off, as here, it has routes in their place that say so.
_DISABLED = "disabled_scale_out"
# So many times what runs may wait, when the setting does not say.
_WAITING_FACTOR = 4


class ServiceState:
    """All of ours on the application: `app.state.service`."""

    def __init__(
        self, config: ApiProcessConfig, client: EngineClient, state: State, processes: int
    ) -> None:
        self.config = config
        self.engine_client = client
        # Each of several API processes takes its part of the limits: vLLM shares connections out.
        vllm = client.vllm_config
        sequences = vllm.scheduler_config.max_num_seqs * vllm.parallel_config.data_parallel_size
        limit = math.ceil(sequences / processes)
        waiting = config.settings.max_waiting
        queue = limit * _WAITING_FACTOR if waiting is None else math.ceil(waiting / processes)
        self.admission = Admission(limit, queue, config.settings.queue_timeout)
        # Enough that a full queue is told before the connections run out.
        self.max_connections = config.settings.max_connections or max(4096, limit + queue + 512)
        self.endings = Endings()
        self.health = Health(config.settings.stall_timeout, config.settings.step_timeout)
        self.probe: asyncio.Task[None] | None = None
        self.keys: Keys | None = None
        if config.clients is not None:
            self.keys = Keys(config.clients, config.settings.api_key_file)
        self.traces = vllm.observability_config.otlp_traces_endpoint is not None
        self.guarded_metrics = config.settings.metrics_key
        self.max_body_bytes = config.settings.max_body_bytes
        self.body_timeout = config.settings.body_timeout
        self.body_bytes = 0
        # When all routes are there.
        self.budget: Budget
        self.body_keys: Collection[str]
        self._models = state.openai_serving_models
        self.engine = Engine(client, state)
        self.contract = Contract(
            config.model,
            self.engine,
            self.admission,
            self.endings,
            log_prompts=config.settings.log_prompts,
            cache_per_key=config.settings.cache_per_key,
        )

    async def create(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST / as an ASGI application."""
        response = await self.contract.create(Request(scope, receive, send))
        await response(scope, receive, send)

    @property
    def model_names(self) -> Sequence[str]:
        """What a request may name as its model: this one, and adapters of it."""
        return [model.name for model in self._models.base_model_paths] + list(
            self._models.lora_requests
        )

    @property
    def engine_dead(self) -> bool:
        """Whether the engine has ended under us."""
        return bool(self.engine_client.errored)


class ChatService:
    """vLLM's EndpointPlugin protocol: POST / and the health routes."""

    name = "chat_service"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        shorten_error_texts()
        app.title = "vllm-chat-service"
        app.version = version(app.title)
        app.openapi = _openapi(app.openapi)  # type: ignore[method-assign]
        for path, handler, summary in (
            ("/", _index, "The chat page for browsers; for programs, what there is"),
            ("/health", _health, "200 when the engine works, 503 when it is dead or stalled"),
            ("/ping", _health, "the same"),
            ("/health/live", _live, "200 as long as the process answers"),
            ("/health/ready", _ready, "200 when requests are answered; else 503 and the phase"),
            ("/health/generate", _generate, "200 when the engine has just made one token"),
        ):
            # Before vLLM's own /health, which is in the app already. Many checkers send HEAD, which
            # FastAPI adds by itself to none.
            for method in ("HEAD", "GET"):
                app.add_api_route(
                    path,
                    handler,
                    methods=[method],
                    summary=summary,
                    include_in_schema=method == "GET",
                )
                app.router.routes.insert(0, app.router.routes.pop())
        # One route answers on `/`, so that 405 names all methods; the gate has taken POST.
        methods = ["GET", "HEAD", "POST"]
        app.router.routes.insert(0, Route("/", _index, methods=methods, include_in_schema=False))
        app.router.lifespan_context = _lifespan(app.router.lifespan_context)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        assert engine_client is not None  # required_tasks keeps us off the render server
        config = settings.read_api_process_config()
        for model in state.openai_serving_models.base_model_paths:
            model.model_path = config.model.name  # /v1/models would show a path of this machine
        service = ServiceState(config, engine_client, state, args.api_server_count or 1)
        service.engine.stop_at(config.model.sampling.stop or ())
        state.service = service
        await _try_template(service.engine, config.model)


def _lifespan(inner: Lifespan[FastAPI]) -> Lifespan[FastAPI]:
    """Ours around vLLM's: it runs after the server is configured and before it accepts anyone."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        service: ServiceState = app.state.service
        service.budget = Budget(
            app.routes,
            service.config.settings.max_items,
            service.engine.context,
            service.engine.max_characters,
        )
        schemas = app.openapi()["components"]["schemas"].values()
        service.body_keys = {key for schema in schemas for key in schema.get("properties", ())}
        _take_off(app)
        connection.guard(app.state.server.config, service.config.settings, service.max_connections)
        watch = Watch(
            service.engine_client,
            service.health,
            service.admission,
            service.endings,
            service.keys,
            service.config.settings,
            app.state.server,
        )
        watching = asyncio.create_task(watch.run())  # signals are handled from here on
        enable_envs_cache()  # vLLM asks for its variables some forty times a request
        await asyncio.to_thread(progress.hand_over)
        async with inner(app) as state:
            yield state
        watching.cancel()

    return lifespan


def _take_off(app: FastAPI) -> None:
    """Take off vLLM's routes that are not for clients."""
    off = _OFF if not app.state.args.enable_elastic_ep else frozenset()
    app.router.routes[:] = [
        route
        for route in app.routes
        if getattr(route, "path", None) not in off and getattr(route, "name", None) != _DISABLED
    ]


def _openapi(described: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """The schema of the application with POST /, which no route of FastAPI's answers."""

    def openapi() -> dict[str, Any]:
        schema = described()
        operation = {"summary": "Answer one prompt", "operationId": "create", **OPENAPI}
        schema["paths"].setdefault("/", {})["post"] = operation
        return schema

    return openapi


async def _index(request: Request) -> Response:
    service: ServiceState = request.app.state.service
    model = service.config.model
    return web.index(
        request,
        model=model.name,
        style=model.prompt.style,
        defaults=service.engine.defaults,
        asks_for_key=service.keys is not None,
    )


async def _live() -> JSONResponse:
    return JSONResponse({"status": "alive"})


async def _health(request: Request) -> Response:
    service: ServiceState = request.app.state.service
    well = service.health.phase in (Phase.READY, Phase.DRAINING) and not service.engine_dead
    return Response(status_code=200 if well else 503)


async def _ready(request: Request) -> JSONResponse:
    service: ServiceState = request.app.state.service
    phase = Phase.FAILED if service.engine_dead else service.health.phase
    body: dict[str, object] = {
        "status": phase.value,
        "model": service.config.model.name,
        "instance": service.config.instance,
    }
    if phase is Phase.READY:
        if seconds := service.health.step_seconds:
            body["step_seconds"] = round(seconds, 1)
        return JSONResponse(body)
    RequestRecord.of(request.scope).error = phase.value
    return JSONResponse(body, 503)


async def _generate(request: Request) -> JSONResponse:
    """One real token, past the queue: a full server generates all the same.

    Who asks while one is being made shares it.
    """
    service: ServiceState = request.app.state.service
    if service.probe is None or service.probe.done():
        service.probe = asyncio.create_task(service.engine.make_one_token())
    timeout = service.config.settings.stall_timeout * 3
    try:
        async with asyncio.timeout(timeout):
            await asyncio.shield(service.probe)
        return JSONResponse({"status": "generated"})
    except TimeoutError:
        reason = f"no token within {timeout:g} s"
    except RequestError as e:
        reason = e.message
    RequestRecord.of(request.scope).error = "no_token"
    return JSONResponse({"status": reason}, 503)


async def _try_template(engine: Engine, model: ModelConfig) -> None:
    """Render one turn, so that a broken template ends the start and not every request."""
    try:
        await engine.tokenize(prompting.render("hi", None, model.prompt))
    except RequestError as e:
        reason = " ".join(str(e.__cause__).split())
        raise ConfigError(f"prompt.template cannot render one user turn: {reason}") from e
