"""All errors of this package, and the response body for a refused request.

ServiceError
├── ConfigError               a user's mistake at start: YAML, flag, setting (exit status 2)
├── WeightsError              the model could not be fetched or converted (exit status 1)
├── LaunchError               vLLM could not be started (exit status 1)
└── RequestError              refusals of one request, each with its HTTP status
    ├── MalformedBody         400  the body is not JSON
    ├── InvalidRequest        422  the JSON is not a valid request
    ├── PromptTooLong         422  the prompt leaves no room in the context
    ├── Unauthorized          401  no key, or a wrong one
    ├── NotFound              404  there is no such route
    ├── MethodNotAllowed      405  the route does not take this method
    ├── BodyTooSlow           408  the body did not come in time
    │   └── HeadersTooSlow         the headers did not come in time
    ├── BodyTooLarge          413  the body is longer than the limit
    ├── Overloaded            429  the queue is full
    ├── HeadersTooLarge       431  too many headers, or too long ones
    ├── ClientGone            499  the client closed the connection
    ├── GenerationFailed      500  the engine failed this request alone
    ├── Unavailable           503  the engine cannot take or finish the request now
    │   ├── EngineDead             the engine has died; the server is ending
    │   └── WaitedTooLong          it waited in the queue for queue_timeout
    └── DeadlineExceeded      504  the client's own deadline passed
"""

import json
import time
from typing import Any


class ServiceError(Exception):
    """An error for the user: its text says what is wrong, where, and what to do."""

    exit_status = 1


class ConfigError(ServiceError):
    """A mistake in a YAML file, a flag or an environment variable."""

    exit_status = 2


class WeightsError(ServiceError):
    """The model's files could not be fetched, checked or converted."""


class LaunchError(ServiceError):
    """vLLM could not be started with these arguments on this machine."""


class RequestError(ServiceError):
    """A refused or failed request, with its HTTP `status`.

    `message` goes to the client. It may name keys and limits, but never input, paths or addresses.
    `param` is the invalid request key. `retry_after` is in seconds.
    """

    status = 500
    type = "internal_error"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class MalformedBody(RequestError):
    status = 400
    type = "malformed_body"


class Unauthorized(RequestError):
    status = 401
    type = "unauthorized"


class InvalidRequest(RequestError):
    status = 422
    type = "invalid_request"


class PromptTooLong(RequestError):
    status = 422
    type = "prompt_too_long"


class NotFound(RequestError):
    status = 404
    type = "not_found"


class MethodNotAllowed(RequestError):
    """`allow` is the value of the header Allow: the methods of the route."""

    status = 405
    type = "method_not_allowed"

    def __init__(self, allow: str) -> None:
        super().__init__(f"this route takes {allow}")
        self.allow = allow


class BodyTooSlow(RequestError):
    status = 408
    type = "body_too_slow"


class HeadersTooSlow(BodyTooSlow):
    type = "headers_too_slow"


class HeadersTooLarge(RequestError):
    status = 431
    type = "headers_too_large"


class BodyTooLarge(RequestError):
    status = 413
    type = "body_too_large"


class Overloaded(RequestError):
    status = 429
    type = "overloaded"


class ClientGone(RequestError):
    status = 499
    type = "client_gone"


class GenerationFailed(RequestError):
    status = 500
    type = "generation_failed"


class Unavailable(RequestError):
    status = 503
    type = "unavailable"


class EngineDead(Unavailable):
    def __init__(self) -> None:
        super().__init__("the engine has stopped; the server is restarting", retry_after=5)


class WaitedTooLong(Unavailable):
    type = "waited_too_long"


class DeadlineExceeded(RequestError):
    status = 504
    type = "deadline_exceeded"


# HTTP status -> Anthropic's error type.
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def refusal_body(error: RequestError, request_id: str, path: str = "/") -> bytes:
    """Return the error body in the protocol of `path`: the contract's, Anthropic's or OpenAI's."""
    message = f"{error.message} (request {request_id})"
    body: dict[str, Any]
    if path == "/":
        body = {
            "response": "",
            "status": error.status,
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "error": {"type": error.type, "message": message, "param": error.param},
        }
    elif path.startswith("/v1/messages"):
        default = "api_error" if error.status >= 500 else "invalid_request_error"
        kind = _ANTHROPIC_TYPES.get(error.status, default)
        body = {
            "type": "error",
            "error": {"type": kind, "message": message},
            "request_id": request_id,
        }
    else:
        body = {
            "error": {
                "message": message,
                "type": error.type,
                "param": error.param,
                "code": error.status,
            }
        }
    return json.dumps(body, ensure_ascii=False).encode()
