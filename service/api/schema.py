"""The body of `POST /`: its schema and the errors for an invalid one."""

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service import prompting
from service.api.cancellation import MAX_TIMEOUT
from service.api.request_limits import MAX_STOP
from service.errors import InvalidRequest, MalformedBody
from service.model_config.schema import (
    MAX_STOP_STRINGS,
    RepetitionPenalty,
    Temperature,
    TokenLimit,
    TopK,
    TopP,
)

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP)]


class ContractRequest(BaseModel):
    """The body of `POST /`. Keys that are not listed are ignored; null is "not given"."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    prompt: str = Field(min_length=1, description="One user turn, or the text to complete.")
    model: str | None = Field(
        None, description="A name of /v1/models: an adapter or the base. Absent: the default one."
    )
    history: (
        Annotated[list[prompting.Pair], Field(fail_fast=True)]
        | Annotated[list[prompting.Message], Field(fail_fast=True)]
        | None
    ) = Field(
        None, description="Earlier turns: [user, assistant] pairs, or {role, content} objects."
    )
    max_length: TokenLimit | None = Field(
        None, description="Length limit in tokens; what it counts is in the model's YAML."
    )
    max_new_tokens: TokenLimit | None = Field(None, description="New tokens at most.")
    temperature: Temperature | None = Field(None, description="0 is greedy.")
    top_p: TopP | None = None
    top_k: TopK | None = Field(None, description="0 or -1 considers every token.")
    repetition_penalty: RepetitionPenalty | None = None
    seed: Annotated[int, Field(ge=-1, le=2**63 - 1)] | None = Field(
        None, description="The same seed draws the same tokens; -1 is no seed."
    )
    stop: (
        StopString
        | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)]
        | None
    ) = Field(None, description="The answer ends before the first of these.")
    stream: bool | None = Field(None, description="Server-sent events instead of one answer.")
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT, allow_inf_nan=False)] | None = Field(
        None, description="Seconds after which the answer is no longer wanted."
    )
    details: bool | None = Field(None, description="Add the sampling used and the token counts.")


def parse(body: bytes) -> ContractRequest:
    """Return the validated request; the Content-Type does not matter.

    Raises MalformedBody or InvalidRequest, which name the key but never its value.
    """
    try:
        request = ContractRequest.model_validate_json(body)
        _check_extras(request.history or ())
        return request
    except ValidationError as e:
        error = e.errors(include_url=False, include_input=False, include_context=False)[0]
    if error["type"] == "json_invalid":
        reason = error["msg"].removeprefix("Invalid JSON: ") if body else "it is empty"
        raise MalformedBody(f"the body is not valid JSON: {reason}")
    if not error["loc"]:
        raise InvalidRequest('the body must be a JSON object, such as {"prompt": "..."}')
    param = str(error["loc"][0])
    if error["type"] == "missing" and param == "prompt":
        raise InvalidRequest("prompt is required", param="prompt")
    if param == "history":
        raise InvalidRequest(
            "history must be a list of [user, assistant] pairs, or of objects with a role "
            "(system, user or assistant) and a content",
            param="history",
        )
    if param == "stop":
        raise InvalidRequest(
            f"stop must be a string or a list of at most {MAX_STOP_STRINGS}, of 1 to {MAX_STOP} "
            "characters each",
            param="stop",
        )
    message = error["msg"].removeprefix("Input ").removeprefix("String ")
    raise InvalidRequest(f"{param} {message}", param=param)


def _check_extras(history: prompting.History) -> None:
    """Raise InvalidRequest if a client's own key in a turn has a value that the response cannot
    return: 1e400 is parsed as infinity, which JSON cannot represent."""
    for turn in history:
        if len(turn) > 2:
            try:
                json.dumps(turn, allow_nan=False)
            except ValueError:
                raise InvalidRequest(
                    "history holds a number that is too large, or NaN", param="history"
                ) from None


# FastAPI cannot derive this, because the handler reads the body itself.
OPENAPI: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": ContractRequest.model_json_schema(
                    ref_template="#/paths/~1/post/requestBody/content/application~1json/schema"
                    "/$defs/{model}"
                )
            }
        },
    },
    "responses": {
        "200": {
            "description": "The answer, or with stream its events",
            "content": {
                "application/json": {
                    "schema": {
                        "type": "object",
                        "required": ["response", "status", "time"],
                        "properties": {
                            "response": {"type": "string"},
                            "status": {"type": "integer"},
                            "time": {"type": "string"},
                            "think": {"type": "string"},
                            "answer": {"type": "string"},
                            "history": {"type": "array"},
                            "details": {"type": "object"},
                        },
                    }
                },
                "text/event-stream": {},
            },
        },
        "400": {"description": "The body is not JSON"},
        "401": {"description": "No API key, or a wrong one"},
        "404": {"description": "There is no model of this name"},
        "408": {"description": "The body did not come in time"},
        "413": {"description": "The body is longer than the limit"},
        "422": {"description": "Not a valid request, or a prompt that does not fit"},
        "429": {"description": "Full, or the key's limit is used up; come back after Retry-After"},
        "500": {"description": "The engine failed this request"},
        "503": {"description": "The engine cannot take or finish the request now"},
        "504": {"description": "The client's own deadline has passed"},
    },
}
