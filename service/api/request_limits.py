"""Limits on requests to vLLM's generating routes, in addition to vLLM's own."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pydantic_core import from_json, to_json

from service.api import body_budget
from service.errors import InvalidRequest

# The time and memory to compile a grammar grow faster than its text.
MAX_GRAMMAR_BYTES = 16_384
MAX_REGEX = 1_024
# xgrammar's grammar for minProperties or maxProperties grows with the cube of the properties.
MAX_COUNTED_PROPERTIES = 32
MAX_STOP = 1_000
# Keys that ask for several sequences per prompt, on any route; an absent key counts as 1.
_COUNTS = ("n", "best_of")
# Keys that may hold a list of prompts.
_LISTS = ("items", "prompt", "messages", "questions")
# Keys whose values may be long. Any other object or array may become a grammar, on some route.
_MAY_BE_LONG = frozenset(
    {"messages", "prompt", "input", "items", "query", "system", "questions", "documents"}
    | {"allowed_token_ids", "stop_token_ids", "logit_bias", "bad_words", "stop"}
)
# Keys that an error message may name. It must not echo any other key: that is the client's text.
_GRAMMARS = frozenset(
    {"output_config", "response_format", "structured_outputs", "text", "tool_choice", "tools"}
)


def parse(body: bytes) -> Mapping[str, Any]:
    """Return the parsed body. Raises MalformedBody, or InvalidRequest if it is no object."""
    request = body_budget.parse(body)
    if not isinstance(request, Mapping):
        raise InvalidRequest("the body must be a JSON object")
    return request


def sequences(request: Mapping[str, Any], max_sequences: int) -> int:
    """Return how many sequences a body asks for.

    Raises InvalidRequest for more than `max_sequences`, and for grammars or stop strings that are
    too long.
    """
    count, param = 1, None
    for key in _COUNTS:
        value = request.get(key)
        if value is not None and type(value) is not int:
            raise InvalidRequest(f"{key} must be an integer", param=key)
        if value is not None and value > 1:
            count, param = max(count, value), key
    for key in _LISTS:
        prompts = _prompts(request.get(key), key)
        if prompts > 1:
            count, param = count * prompts, key
    if count > max_sequences:
        raise InvalidRequest(
            f"one request may ask for {max_sequences} sequences at most (n times the number of "
            "prompts)",
            param=param,
        )
    _check_stop(request.get("stop"))
    for key, value in request.items():
        if key == "tools":
            value = _grammar_tools(value, request.get("tool_choice"))
        if isinstance(value, dict | list) and key not in _MAY_BE_LONG:
            _check_grammar(value, key if key in _GRAMMARS else None)
    return count


def _prompts(value: Any, key: str) -> int:
    """Count the prompts in a value. A single prompt, of token ids or messages, is a list too."""
    if not isinstance(value, list) or not value:
        return 1
    first = value[0]
    if key == "messages":
        return len(value) if isinstance(first, list) else 1
    return 1 if isinstance(first, int) else len(value)


def _check_stop(stop: Any) -> None:
    strings = stop if isinstance(stop, list) else [stop]
    if any(isinstance(string, str) and len(string) > MAX_STOP for string in strings):
        raise InvalidRequest(f"a stop string has at most {MAX_STOP} characters", param="stop")


def _grammar_tools(tools: Any, choice: Any) -> list[Any]:
    """Return the tools that become a grammar: those with `strict`, or those that must be called.

    Other tools are only text in the prompt. OpenAI's two routes and Anthropic's differ in where the
    tool's name is, and in the values of `choice`.
    """
    if not isinstance(tools, list):
        return []

    def function_of(value: Any) -> dict[str, Any]:
        function = value.get("function", value) if isinstance(value, dict) else {}
        return function if isinstance(function, dict) else {}

    kind = choice.get("type") if isinstance(choice, dict) else choice
    if kind in (None, "auto", "none"):
        return [tool for tool in tools if function_of(tool).get("strict")]
    name = function_of(choice).get("name")
    return [tool for tool in tools if name in (None, function_of(tool).get("name"))]


def _check_grammar(grammar: Any, param: str | None) -> None:
    key = param or "what may become a grammar"
    if len(to_json(grammar)) > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(
            f"{key} has at most {MAX_GRAMMAR_BYTES} bytes where it becomes a grammar", param=param
        )
    pending = [grammar]
    while pending:
        value = pending.pop()
        if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):  # a schema as text
            with suppress(ValueError):
                value = from_json(value)
        if isinstance(value, dict):
            counted = "minProperties" in value or "maxProperties" in value
            properties = value.get("properties")
            if (
                counted
                and isinstance(properties, dict)
                and len(properties) > MAX_COUNTED_PROPERTIES
            ):
                raise InvalidRequest(
                    f"an object in {key} with minProperties or maxProperties has at most "
                    f"{MAX_COUNTED_PROPERTIES} properties",
                    param=param,
                )
            for name in ("regex", "pattern"):
                regex = value.get(name)
                if isinstance(regex, str) and len(regex) > MAX_REGEX:
                    raise InvalidRequest(
                        f"a regular expression in {key} has at most {MAX_REGEX} characters",
                        param=param,
                    )
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
