"""vLLM's real engine on a tiny checkpoint, under the handler of POST /, in this process."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.datastructures import State
from starlette.requests import Request
from starlette.types import Message
from vllm import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from service import settings, vllm_arguments
from service.api.admission import Admission
from service.api.cancellation import Cancellations
from service.api.contract import Contract
from service.api.engine import Engine
from service.api.record import RequestRecord
from service.errors import InvalidRequest
from service.launch import server
from service.model_config import ModelConfig
from tests import checkpoints

LIMIT = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write("xverse", tmp_path_factory.mktemp("xverse"))


def run(
    checkpoint: Path, scenario: Callable[[AsyncLLM, Engine, ModelConfig], Awaitable[None]]
) -> None:
    """`scenario` with an engine of its own."""

    async def started() -> None:
        async with engine(checkpoint) as made:
            await scenario(*made)

    asyncio.run(started())


@asynccontextmanager
async def engine(folder: Path) -> AsyncIterator[tuple[AsyncLLM, Engine, ModelConfig]]:
    assignments = ("engine.enforce_eager=true", "engine.dtype=float32")
    config, origins = checkpoints.load("xverse", folder, *assignments)
    with server.prepared(config, origins, settings.load()) as (args, _):
        vllm_arguments.use_files(args, folder, folder)
        client = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(args))
        online = SimpleNamespace(
            chat_template=None,
            chat_template_content_format="auto",
            default_chat_template_kwargs=None,
        )
        try:
            yield client, Engine(client, State({"online_renderer": online})), config
        finally:
            client.shutdown()


@pytest.mark.usefixtures("environment")
def test_the_engine_never_holds_more_than_the_limit(checkpoint: Path) -> None:
    """Clients leave in the middle of their streams, and those who wait take their places."""

    async def scenario(client: AsyncLLM, engine: Engine, config: ModelConfig) -> None:
        admission = Admission(LIMIT, 1000, 60)
        contract = Contract(
            config, engine, admission, Cancellations(), log_prompts=False, cache_per_key=False
        )
        held = 0
        numbers = itertools.count()
        left = 0

        async def watch() -> None:
            nonlocal held
            while True:
                held = max(held, client.output_processor.get_num_unfinished_requests())
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
            response = await contract.create(Request(scope, receive, send))
            await response(scope, receive, send)
            left += gone.is_set()

        watching = asyncio.create_task(watch())
        async with asyncio.timeout(120):
            await asyncio.gather(*(ask(stream=number % 2 == 0) for number in range(120)))
        watching.cancel()
        assert (held, left) == (LIMIT, 120)
        assert client.output_processor.get_num_unfinished_requests() == 0

    run(checkpoint, scenario)


@pytest.mark.usefixtures("environment")
def test_what_is_blamed_is_what_was_sent(checkpoint: Path) -> None:
    async def scenario(client: AsyncLLM, engine: Engine, config: ModelConfig) -> None:
        async def blamed(prompt: Any) -> str | None:
            with pytest.raises(InvalidRequest) as error:
                await engine.tokenize(prompt)
            return error.value.param

        half = {"role": "user", "content": "\ud800"}
        assert await blamed("\ud800") == "prompt"  # a completion model has no history
        assert await blamed([half]) == "prompt"
        assert await blamed([{"role": "system", "content": "S"}, half]) == "history"

    run(checkpoint, scenario)
