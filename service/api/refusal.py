"""Writes a RequestError as an HTTP response, or as the last event of a stream."""

import json

from starlette.responses import Response

from service.errors import MethodNotAllowed, RequestError, Unauthorized, refusal_body


def refusal(error: RequestError, request_id: str, path: str) -> Response:
    """Return the HTTP response for a refused or failed request to `path`."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if isinstance(error, MethodNotAllowed):
        headers["allow"] = error.allow
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    body = refusal_body(error, request_id, path)
    return Response(body, error.status, headers, media_type="application/json")


def refusal_event(error: RequestError, request_id: str, path: str, number: int) -> bytes:
    """Return the last bytes of a stream that fails after `number` events, by `path`'s protocol."""
    body = refusal_body(error, request_id, path)
    if path.startswith("/v1/responses"):
        event = {
            "type": "error",
            "code": error.type,
            "message": f"{error.message} (request {request_id})",
            "param": error.param,
            "sequence_number": number,
        }
        body = json.dumps(event, ensure_ascii=False).encode()
    if path.startswith(("/v1/responses", "/v1/messages")):
        return b"event: error\ndata: " + body + b"\n\n"
    return b"data: " + body + b"\n\n" + (b"" if path == "/" else b"data: [DONE]\n\n")
