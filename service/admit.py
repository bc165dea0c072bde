"""A route of vLLM's behind our queue: a slot at the engine, limits on the body, and a deadline."""

import asyncio

from pydantic_core import to_json
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import limits
from service.admission import Admission
from service.ending import Endings, deadline_of
from service.errors import ENGINE_ENDED, ClientGone, RequestError, refusal
from service.guard import ServiceState
from service.request_record import RequestRecord
from service.settings import Settings

# How long vLLM's handler of an ended request may take to notice.
_NOTICE_SECONDS = 5.0


class Admit:
    """One of vLLM's own generating routes behind the queue, with limits and a deadline."""

    def __init__(
        self, app: ASGIApp, admission: Admission, endings: Endings, settings: Settings
    ) -> None:
        self.app = app
        self.admission = admission
        self.endings = endings
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = RequestRecord.of(scope)
        answer = _Answer(send, scope["app"].state.service)
        request: Message | None = await receive()
        assert request is not None
        ended = asyncio.Event()

        async def read() -> Message:
            nonlocal request
            if request is not None:
                message, request = request, None
                return message
            await ended.wait()
            return {"type": "http.disconnect"}

        try:
            asked = limits.parse(request.get("body", b""))
            sequences = limits.sequences(asked, self.settings.max_sequences)
            if self.settings.cache_per_key:
                request["body"] = to_json({**asked, "cache_salt": record.client.name})
            deadline = deadline_of(scope)
            async with (
                self.endings.watch(receive, deadline),
                self.admission.slot(record.client, sequences),
            ):
                handler = asyncio.ensure_future(self.app(scope, read, answer.send))
                try:
                    await asyncio.shield(handler)
                except asyncio.CancelledError:
                    # vLLM's handlers do not pass a cancellation on to the engine; what they
                    # notice is that the client leaves.
                    answer.ended = True
                    ended.set()
                    await asyncio.wait({handler}, timeout=_NOTICE_SECONDS)
                    handler.cancel()
                    raise
                if answer.ended:
                    raise ENGINE_ENDED.again()
        except RequestError as e:
            if answer.complete:
                return  # the client left after it had its answer
            record.status, record.error = e.status, e.type
            if not isinstance(e, ClientGone):
                await answer.refuse(e, record.id, scope, receive)


class _Answer:
    """What a route sends, until its request is ended; then an error instead of the rest."""

    def __init__(self, send: Send, state: ServiceState) -> None:
        self._send = send
        self._state = state
        self._started = False
        self._events = False
        self.complete = False
        self.ended = False

    async def send(self, message: Message) -> None:
        if self._events and self._state.engine_dead:
            self.ended = True  # vLLM's event for it says 500
        if self.ended:
            return
        if message["type"] == "http.response.start":
            self._started = True
            media_type = Headers(raw=message["headers"]).get("content-type", "")
            self._events = media_type.startswith("text/event-stream")
        else:
            self.complete = not message.get("more_body", False)
        await self._send(message)

    async def refuse(
        self, error: RequestError, request_id: str, scope: Scope, receive: Receive
    ) -> None:
        response = refusal(error, request_id)
        if not self._started:
            await response(scope, receive, self._send)
        elif self._events:
            body = b"data: " + bytes(response.body) + b"\n\ndata: [DONE]\n\n"
            await self._send({"type": "http.response.body", "body": body})
