"""vLLM's application behind our queue: a slot at the engine, limits on the body, and a deadline."""

import asyncio
from collections.abc import Mapping
from typing import Any

from pydantic_core import to_json
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import limits
from service.admission import Admission
from service.ending import Endings, deadline_of
from service.errors import InvalidRequest
from service.request_record import RequestRecord
from service.settings import Settings

# How long vLLM's handler of an ended request may take to notice.
_NOTICE_SECONDS = 5.0


class Admit:
    """A request to what may generate: behind the queue, with limits and a deadline."""

    def __init__(
        self, app: ASGIApp, admission: Admission, endings: Endings, settings: Settings
    ) -> None:
        self.app = app
        self.admission = admission
        self.endings = endings
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = RequestRecord.of(scope)
        message: Message | None = await receive()
        assert message is not None
        body = message.get("body", b"")
        request: Mapping[str, Any] = {}
        if Headers(scope=scope).get("content-type", "").startswith("multipart/form-data"):
            if self.settings.cache_per_key:  # of which a form cannot tell vLLM
                raise InvalidRequest("this server takes no forms, because it keeps a cache per key")
        elif body:
            request = limits.parse(body)
            if self.settings.cache_per_key:
                message["body"] = to_json({**request, "cache_salt": record.client.name})
        sequences = limits.sequences(request, self.settings.max_sequences)
        ended = asyncio.Event()

        async def read() -> Message:
            nonlocal message
            if message is not None:
                body, message = message, None
                return body
            await ended.wait()
            return {"type": "http.disconnect"}

        async def send_until_ended(message: Message) -> None:
            if not ended.is_set():
                await send(message)

        async with (
            self.endings.watch(receive, deadline_of(scope)),
            self.admission.slot(record.client, sequences),
        ):
            handler = asyncio.ensure_future(self.app(scope, read, send_until_ended))
            try:
                await asyncio.shield(handler)
            except asyncio.CancelledError:
                # vLLM's handlers do not pass a cancellation on to the engine; what they notice is
                # that the client leaves.
                ended.set()
                handler.add_done_callback(lambda task: task.cancelled() or task.exception())
                await asyncio.wait({handler}, timeout=_NOTICE_SECONDS)
                handler.cancel()
                raise
