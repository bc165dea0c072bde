"""The handler of `POST /`: the tutorials' wire contract, from body bytes to response bytes."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from vllm.lora.request import LoRARequest

from service import prompting
from service.api import metrics, sampling
from service.api.admission import Admission
from service.api.cancellation import Cancellations, deadline_of
from service.api.engine import Chunk, Engine
from service.api.record import RequestRecord
from service.api.schema import ContractRequest, parse
from service.clients import Client
from service.model_config import ModelConfig
from service.settings import Settings


@dataclass(slots=True)
class _Generation:
    """One valid request and its generation in the engine."""

    request: ContractRequest
    model: str  # the served name
    params: dict[str, Any]
    prompt_tokens: int
    chunks: AsyncGenerator[Chunk, None]
    deadline: float | None
    # Enter it before taking chunks: it waits for an admission slot, and closes `chunks` on exit.
    slot: AbstractAsyncContextManager[object]


class Contract:
    """Answers `POST /` for one model on one engine."""

    def __init__(
        self,
        config: ModelConfig,
        engine: Engine,
        admission: Admission,
        cancellations: Cancellations,
        settings: Settings,
        adapter_of: Callable[[str, RequestRecord], LoRARequest | None] = lambda *_: None,
    ) -> None:
        """`adapter_of` returns the adapter of a served name, None for a base; raises NotFound."""
        self.config = config
        self.engine = engine
        self.admission = admission
        self.cancellations = cancellations
        self.settings = settings
        self.adapter_of = adapter_of
        self.default = config.default_adapter or config.name

    async def create(self, http: Request) -> Response:
        """Answer one request. Raises RequestError."""
        record = RequestRecord.of(http.scope)
        body = await http.body()
        began = time.perf_counter()
        request = parse(body)
        record.layer_seconds += time.perf_counter() - began
        model = self.default if request.model is None else request.model
        adapter = self.adapter_of(model, record)
        deadline = deadline_of(http.scope, request.timeout)
        self.admission.check(record.client)  # refuse early, before any work
        async with self.cancellations.watch(http.receive, deadline):
            generation = await self._start(request, deadline, record, model, adapter)
            if not request.stream:
                body = await self._complete(generation, record)
                return Response(body, media_type="application/json")
            async with AsyncExitStack() as stack:
                await stack.enter_async_context(generation.slot)
                # Take the first chunk before the response starts, so that an error of the engine
                # still sets the HTTP status.
                first = await anext(generation.chunks)
                generation.slot = stack.pop_all()
        return EventStream(self._events(generation, first, record), generation, self.cancellations)

    async def _start(
        self,
        request: ContractRequest,
        deadline: float | None,
        record: RequestRecord,
        model: str,
        adapter: LoRARequest | None,
    ) -> _Generation:
        began = time.perf_counter()
        prompt = prompting.render(request.prompt, request.history, self.config.prompt)
        token_ids = await self.engine.tokenize(prompt)
        params = sampling.resolve(
            request,
            self.engine.defaults,
            self.config.max_length,
            prompt_tokens=len(token_ids),
            context=self.engine.context,
        )
        record.layer_seconds += time.perf_counter() - began
        chunks = self.engine.generate(
            token_ids,
            params,
            record.id,
            stream=bool(request.stream),
            echo=self.config.prompt.echo,
            strip=self.config.answer.strip,
            cache_salt=record.client.name if self.settings.cache_per_key else None,
            trace_headers=record.trace_headers,
            adapter=adapter,
        )
        slot = self._admitted(record.client, chunks)
        return _Generation(request, model, params, len(token_ids), chunks, deadline, slot)

    @asynccontextmanager
    async def _admitted(
        self, client: Client, chunks: AsyncGenerator[Chunk, None]
    ) -> AsyncIterator[None]:
        """Wait for a slot; on exit release it and close `chunks`, which aborts the request."""
        async with self.admission.slot(client), aclosing(chunks):
            yield

    async def _complete(self, generation: _Generation, record: RequestRecord) -> bytes:
        async with generation.slot:
            # Exhaust the generator: closing it early makes vLLM abort a finished request.
            (chunk,) = [chunk async for chunk in generation.chunks]
        began = time.perf_counter()
        body = self._body(generation, chunk.text, chunk, record)
        record.layer_seconds += time.perf_counter() - began
        _note_end(chunk, record)
        return body

    async def _events(
        self, generation: _Generation, first: Chunk, record: RequestRecord
    ) -> AsyncGenerator[bytes, None]:
        """Yield server-sent events: the text of each chunk, then the whole response body."""
        text = ""
        chunk = first
        next_chunk: Chunk | None = first
        try:
            while next_chunk is not None:
                chunk = next_chunk
                began = time.perf_counter()
                text += chunk.text
                frame = _delta(chunk.text) if chunk.text else b""
                if chunk.finish_reason:
                    body = self._body(generation, text, chunk, record)
                    frame += b"data: " + body + b"\n\n"
                record.layer_seconds += time.perf_counter() - began
                if frame:
                    yield frame
                next_chunk = await anext(generation.chunks, None)
        finally:
            _note_end(chunk, record)

    def _body(
        self, generation: _Generation, text: str, last: Chunk, record: RequestRecord
    ) -> bytes:
        """Return the response body, with the keys in the tutorials' order."""
        request = generation.request
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        if self.settings.log_prompts:
            record.exchange = (now, request.prompt, text)
        answer = text[last.echoed :]  # without the prompt that `echo` repeats
        form = self.config.history
        body: dict[str, Any] = {"response": text}
        if tags := self.config.answer.think:
            finished = last.finish_reason == "stop"
            think, answer = prompting.split_thinking(answer, tags, finished)
            body |= {"think": think, "answer": answer}
        if form.always:  # the chapters that always have it have it here
            turns = request.history or ()
            body["history"] = prompting.append_turn(turns, request.prompt, answer, form)
        body |= {"status": 200, "time": now}
        if request.history is not None and not form.always:
            body["history"] = prompting.append_turn(request.history, request.prompt, answer, form)
        if request.details:
            body["details"] = {
                "model": generation.model,
                "finish_reason": last.finish_reason,
                "prompt_tokens": generation.prompt_tokens,
                "completion_tokens": last.tokens,
                "sampling": generation.params,
            }
        return _encode(body).encode()


class EventStream(Response):
    """Server-sent events, written frame by frame.

    A disconnect or the deadline cancels the frames. The generation is always closed, which aborts
    the engine's request if it still runs.
    """

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        generation: _Generation,
        cancellations: Cancellations,
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self.frames = frames
        self.generation = generation
        self.cancellations = cancellations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # In its own task, each token resumes only this coroutine, not all middleware around it.
        await asyncio.create_task(self._send(scope, receive, send))

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with (
            self.cancellations.watch(receive, self.generation.deadline),
            self.generation.slot,
            aclosing(self.frames) as frames,
        ):
            await send(start)
            async for frame in frames:
                await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def _note_end(last: Chunk, record: RequestRecord) -> None:
    """Note how an answer ended, complete or streamed in part."""
    record.finish_reason = last.finish_reason
    metrics.LAYER_SECONDS.observe(record.layer_seconds)


_encode = json.JSONEncoder(ensure_ascii=False).encode


def _delta(text: str) -> bytes:
    return f'data: {{"delta": {_encode(text)}}}\n\n'.encode()
