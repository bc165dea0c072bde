"""vLLM's real engine on a tiny checkpoint, under the handler of POST /, in this process."""

import asyncio
import itertools
import json
import os
import socket
from argparse import Namespace
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import uvicorn
from starlette.datastructures import State
from starlette.requests import Request
from starlette.types import Message
from vllm import AsyncEngineArgs, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from service import clients, settings, vllm_arguments, vllm_plugins
from service.api import application
from service.api.admission import Admission
from service.api.application import Deployment, Host
from service.api.cancellation import Cancellations
from service.api.connection import GuardedProtocol
from service.api.contract import Contract
from service.api.engine import Engine
from service.api.record import RequestRecord
from service.clients import Client
from service.errors import ClientGone, InvalidRequest
from service.model_config import ModelConfig
from service.settings import Settings
from testing import checkpoints
from tests.conftest import PATIENCE, hardening

LIMIT = 3


Scenario = Callable[["Made"], Awaitable[None]]


@dataclass(frozen=True)
class Made:
    """An engine with its arguments, and `engine.Engine` on it."""

    args: Namespace
    client: AsyncLLM
    engine: Engine
    config: ModelConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Scenario], None]]:
    """Runs a scenario on one engine, which is made without `service.launch`."""
    saved = dict(os.environ)
    folder = checkpoints.write("xverse", tmp_path_factory.mktemp("xverse"))
    vllm_plugins.choose()
    vllm_plugins.load()
    assignments = ("engine.enforce_eager=true", "engine.dtype=float32")
    config, origins = checkpoints.load("xverse", folder, *assignments)
    args = vllm_arguments.arguments(config, origins, settings.load())
    vllm_arguments.use_files(args, folder, folder)

    async def make() -> Made:
        client = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(args))
        online = SimpleNamespace(
            chat_template=None,
            chat_template_content_format="auto",
            default_chat_template_kwargs=None,
        )
        return Made(args, client, Engine(client, State({"online_renderer": online})), config)

    with asyncio.Runner() as runner:
        made = runner.run(make())
        yield lambda scenario: runner.run(cast(Coroutine[Any, Any, None], scenario(made)))
        made.client.shutdown()
    os.environ.clear()
    os.environ.update(saved)


def test_the_engine_never_holds_more_than_the_limit(run: Callable[[Scenario], None]) -> None:
    """Clients leave in the middle of their streams, and those who wait take their places."""

    async def scenario(made: Made) -> None:
        admission = Admission(LIMIT, 1000, 60)
        contract = Contract(
            made.config,
            made.engine,
            admission,
            Cancellations(),
            Settings(),
        )
        held = 0
        numbers = itertools.count()
        left = 0

        async def watch() -> None:
            nonlocal held
            while True:
                held = max(held, made.client.output_processor.get_num_unfinished_requests())
                await asyncio.sleep(0)

        async def ask(stream: bool) -> None:
            nonlocal left
            number = next(numbers)
            gone = asyncio.Event()
            body = {"prompt": "hi", "stream": stream, "max_new_tokens": 400, "temperature": 0.0}
            asked: list[Message] = [{"type": "http.request", "body": json.dumps(body).encode()}]

            async def receive() -> Message:
                if asked:
                    return asked.pop()
                if not stream:
                    await asyncio.sleep(0.02 + number % 7 / 100)
                    gone.set()
                await gone.wait()
                return {"type": "http.disconnect"}

            async def send(message: Message) -> None:
                if message["type"] == "http.response.body" and stream:
                    gone.set()
                    await asyncio.sleep(0)

            scope: dict[str, Any] = {"type": "http", "method": "POST", "headers": [], "path": "/"}
            RequestRecord(f"leaver-{number}").attach(scope)
            with suppress(ClientGone):
                response = await contract.create(Request(scope, receive, send))
                await response(scope, receive, send)
            left += gone.is_set()

        watching = asyncio.create_task(watch())
        async with asyncio.timeout(120):
            await asyncio.gather(*(ask(stream=number % 2 == 0) for number in range(120)))
        watching.cancel()
        assert (held, left) == (LIMIT, 120)
        assert made.client.output_processor.get_num_unfinished_requests() == 0

    run(scenario)


def test_what_is_blamed_is_what_was_sent(run: Callable[[Scenario], None]) -> None:
    async def scenario(made: Made) -> None:
        async def blamed(prompt: Any) -> str | None:
            with pytest.raises(InvalidRequest) as error:
                await made.engine.tokenize(prompt)
            return error.value.param

        half = {"role": "user", "content": "\ud800"}
        assert await blamed("\ud800") == "prompt"  # a completion model has no history
        assert await blamed([half]) == "prompt"
        assert await blamed([{"role": "system", "content": "S"}, half]) == "history"

    run(scenario)


@hardening(7)
def test_an_id_without_a_token_has_a_probability_and_ends_nobody(
    run: Callable[[Scenario], None],
) -> None:
    async def scenario(made: Made) -> None:
        beyond = checkpoints.VOCABULARY - 1  # the tokenizer is shorter
        wanted = SamplingParams(max_tokens=3, logprobs=2, logit_bias={beyond: 100})
        async for output in made.client.generate({"prompt_token_ids": [9, 8]}, wanted, "beyond"):
            (answer,) = output.outputs
        assert [*answer.token_ids] == [beyond] * 3
        assert [place[beyond].decoded_token for place in answer.logprobs] == ["", "", ""]
        assert answer.text == "" and not made.client.errored

    run(scenario)


@hardening(3)
def test_the_whole_application_is_built_around_an_engine(run: Callable[[Scenario], None]) -> None:
    """As in a process that nobody supervises: a replica of a cluster."""
    ended: list[str] = []

    class Recording(Host):
        def report_failure(self, reason: str) -> None:
            ended.append(reason)

    async def scenario(made: Made) -> None:
        deployment = Deployment(
            model=made.config,
            settings=settings.load(max_connections=77),
            clients={clients.digest(b"secret"): Client("alice")},
            instance="this one",
        )
        app = await application.build(made.args, deployment, made.client, Recording())
        with socket.create_server(("127.0.0.1", 0)) as listener:
            server = uvicorn.Server(uvicorn.Config(app, log_config=None))
            app.state.server = server
            serving = asyncio.create_task(server.serve([listener]))
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=PATIENCE) as http:
                assert (await http.get("/health/ready")).json()["instance"] == "this one"
                protocol = cast(type[GuardedProtocol], server.config.http_protocol_class)
                assert protocol.max_connections == 77
                admission = app.state.service.admission
                assert admission.queue == 4 * admission.limit  # as SERVICE_MAX_WAITING is not set
                assert (await http.post("/", json={"prompt": "hi"})).status_code == 401
                http.headers["authorization"] = "Bearer secret"
                body = {"prompt": "hi", "max_new_tokens": 3, "details": True}
                answer = (await http.post("/", json=body)).json()
                assert answer["details"]["completion_tokens"] == 3
                body = {"model": made.config.name, "prompt": "hi", "max_tokens": 3}
                answer = (await http.post("/v1/completions", json=body)).json()
                assert answer["usage"]["completion_tokens"] == 3
                assert (await http.post("/v1/completions", json={**body, "n": 65})).is_client_error
                assert "service_requests_total" in (await http.get("/metrics")).text
            server.should_exit = True
            await serving
        assert not ended

    run(scenario)
