"""All errors of this package, and the response body for a refused request."""

import json
import time
from typing import Any


class ServiceError(Exception):
    """An error for the user: its text says what is wrong, where, and what to do."""

    exit_status = 1

    def lines(self) -> str:
        """Return the text for a terminal; each line of it begins with what it is."""
        return "\n".join(f"error: {line}" for line in str(self).splitlines())


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


class RateLimited(RequestError):
    status = 429
    type = "rate_limited"


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
    def __init__(self, reason: str = "the engine has stopped") -> None:
        super().__init__(f"{reason}; the server is restarting", retry_after=5)


class WaitedTooLong(Unavailable):
    type = "waited_too_long"


class DeadlineExceeded(RequestError):
    status = 504
    type = "deadline_exceeded"

    def __init__(self) -> None:
        super().__init__("the time that the client allowed for it has passed")


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
