"""vLLM endpoint plugin: adds our state and OpenAPI schema to the application that vLLM builds."""

import functools
from argparse import Namespace
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient

from service import prompting
from service.api import grammar_limits, routes, vllm_errors
from service.api.application import Deployment, Host
from service.api.record import note_sequence
from service.api.state import ServiceState
from service.errors import ConfigError, RequestError
from service.models import vllm_private


class ChatService:
    """Implements vLLM's EndpointPlugin protocol. `gate` answers our routes, before vLLM's."""

    name = "chat_service"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        vllm_private.shorten_error_texts(vllm_errors.MAX_CHARACTERS)
        app.title = "vllm-chat-service"
        app.version = version(app.title)
        app.openapi = _openapi_with_our_routes(app)  # type: ignore[method-assign]

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        assert engine_client is not None  # never None, because of required_tasks
        try:
            parts: tuple[Deployment, Host] = args.chat_service
        except AttributeError:
            raise ConfigError("this plugin runs in `chat-service`, which sets it up") from None
        deployment, host = parts
        model = deployment.model
        vllm_private.hide_paths(state.openai_serving_models)
        service = ServiceState(deployment, host, engine_client, state, args.api_server_count or 1)
        service.engine.stop_at(model.sampling.stop or ())
        vllm_private.watch_sequences(engine_client, note_sequence)
        vllm_private.check_grammars(grammar_limits.check_made)
        if model.prompt.system is not None or model.prompt.greeting == "drop":
            vllm_private.change_conversations(
                engine_client.renderer, functools.partial(prompting.prepare, config=model.prompt)
            )
        try:  # a broken template must fail the start, not each request
            await service.engine.tokenize(prompting.render("hi", None, model.prompt))
        except RequestError as e:
            reason = " ".join(str(e.__cause__).split())
            raise ConfigError(f"prompt.template cannot render one user turn: {reason}") from e
        state.service = service


def _openapi_with_our_routes(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """Return an `openapi` method that adds our routes, unknown to FastAPI, to the schema."""

    openapi = app.openapi

    def openapi_with_our_routes() -> dict[str, Any]:
        schema = openapi()
        for path in app.state.service.hidden:
            schema["paths"].pop(path, None)
        routes.describe(schema, app.state.service.deployment.model.routes)
        return schema

    return openapi_with_our_routes
