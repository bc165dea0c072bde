"""The endpoint plugin: our routes in vLLM's app. The only file that knows vLLM's app and engine."""

import logging
from argparse import Namespace
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from vllm.engine.protocol import EngineClient
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.inputs import tokens_input
from vllm.renderers import ChatParams
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from service import settings
from service.contract import OPENAPI, Chunk, Contract
from service.errors import (
    GenerationFailed,
    InvalidRequest,
    PromptTooLong,
    RequestError,
    Unavailable,
)
from service.prompting import Message

_logger = logging.getLogger("service")


@dataclass(frozen=True, slots=True)
class ServiceState:
    """All of ours on the application: `app.state.service`."""

    contract: Contract
    engine_client: EngineClient
    key_hash: str | None


class ChatService:
    """vLLM's EndpointPlugin protocol: POST / and GET /health/ready."""

    name = "chat_service"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.add_api_route(
            "/",
            _create,
            methods=["POST"],
            name="create",
            summary="Answer one prompt",
            openapi_extra=OPENAPI,
            response_class=Response,
        )
        app.add_api_route(
            "/health/ready",
            _ready,
            methods=["GET"],
            name="ready",
            summary="200 when requests are answered, 503 when not",
            response_class=JSONResponse,
        )

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        assert engine_client is not None  # required_tasks keeps us off the render server
        config = settings.read_api_process_config()
        for model in state.openai_serving_models.base_model_paths:
            model.model_path = config.model.name  # /v1/models would show a path of this machine
        engine = Engine(engine_client, state)
        state.service = ServiceState(
            contract=Contract(config.model, engine, log_prompts=config.log_prompts),
            engine_client=engine_client,
            key_hash=config.key_hash,
        )


async def _create(request: Request) -> Response:
    state: ServiceState = request.app.state.service
    return await state.contract.create(request)


async def _ready(request: Request) -> Response:
    state: ServiceState = request.app.state.service
    try:
        await state.engine_client.check_health()
    except EngineDeadError:
        return JSONResponse({"status": "the engine has stopped"}, 503)
    return JSONResponse({"status": "ready", "model": state.contract.config.name})


class Engine:
    """vLLM's AsyncLLM as `contract.Engine`: its objects and errors become ours here."""

    def __init__(self, client: EngineClient, state: State) -> None:
        model = client.model_config
        self.context: int = model.max_model_len
        # The YAML's sampling is vLLM's override_generation_config, so this has both.
        self.defaults: Mapping[str, Any] = model.get_diff_sampling_param()
        self._client = client
        self._renderer = client.renderer
        online = state.online_renderer
        # As vLLM's own chat route renders (ChatCompletionRequest.build_chat_params).
        self._chat = ChatParams(
            chat_template=online.chat_template,
            chat_template_content_format=online.chat_template_content_format,
            chat_template_kwargs={
                **(online.default_chat_template_kwargs or {}),
                "add_generation_prompt": True,
                "tokenize": False,
            },
        )

    async def tokenize(self, prompt: list[Message] | str) -> list[int]:
        """Token ids of a rendered prompt, as vLLM's own routes make them."""
        renderer = self._renderer
        try:
            if isinstance(prompt, str):
                (rendered,) = await renderer.render_cmpl_async(
                    [{"prompt": prompt}], renderer.default_cmpl_tok_params
                )
            else:
                _, (rendered,) = await renderer.render_chat_async(
                    [prompt], self._chat, renderer.default_chat_tok_params
                )
        except VLLMClientError as e:
            raise PromptTooLong(
                f"the prompt does not fit the model's context of {self.context} tokens, which must "
                "also hold the answer; shorten the prompt or the history",
                param="prompt",
            ) from e
        except (ValueError, TypeError) as e:  # raised by the chat template itself
            raise InvalidRequest(
                "the model's chat template does not accept these turns; usually they must "
                "alternate between user and assistant, with system at most first",
                param="history",
            ) from e
        token_ids: list[int] = rendered["prompt_token_ids"]
        return token_ids

    def decode(self, token_ids: list[int]) -> str:
        text: str = self._renderer.get_tokenizer().decode(token_ids, skip_special_tokens=True)
        return text

    async def generate(
        self, token_ids: list[int], params: dict[str, Any], request_id: str, *, stream: bool
    ) -> AsyncGenerator[Chunk, None]:
        kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
        tokens = 0
        try:
            sampling = SamplingParams(**params, output_kind=kind)
            async for output in self._client.generate(
                tokens_input(token_ids), sampling, request_id
            ):
                (completion,) = output.outputs
                tokens += len(completion.token_ids)
                reason = completion.finish_reason
                if reason == "error":
                    raise GenerationFailed("the engine failed this request; send it again")
                if reason == "abort":
                    raise Unavailable("the server is stopping", retry_after=5)
                yield Chunk(completion.text, tokens, reason)
        except RequestError:
            raise
        except EngineDeadError as e:
            raise Unavailable("the engine has stopped; the server is restarting") from e
        except GracefulHTTPError as e:
            raise Unavailable("the engine's queue is full", retry_after=1) from e
        except (VLLMClientError, ValueError) as e:
            # Values that pass our bounds but not the engine's (such as a stop string it rejects).
            _logger.warning("request %s refused by the engine: %s", request_id, e)
            raise InvalidRequest("the engine does not accept these sampling values") from e
        except Exception as e:
            _logger.exception("request %s failed in the engine", request_id)
            raise GenerationFailed("the engine failed this request; send it again") from e
