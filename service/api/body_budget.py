"""How much JSON a body may hold, decided before anything validates it.

Parsing and validating hold the event loop, and an error costs a validator more than a value: a
small body of many wrong items once took 20 GB. So values are counted on the bytes, the long arrays
on what is parsed, and the rest is tried by a validator that stops at its first wrong item.
"""

from collections.abc import Iterable
from typing import Any

from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from pydantic_core import SchemaValidator, from_json
from starlette.routing import BaseRoute

from service.errors import InvalidRequest, MalformedBody, PromptTooLong

# Objects, arrays, keys and strings of one body. 125 kB of ordinary tools have 7,000.
MAX_VALUES = 20_000
# Numbers too, which cost less: a prompt may be token ids.
MAX_NUMBERS = 262_144
# In one array, or the model's context if that is longer.
MAX_ARRAY = 65_536
MAX_KEY_BYTES = 256
# A body with no more than this is not worth a look.
_SMALL_BYTES = 4096
_SMALL_CONTAINERS = 64


def parse(body: bytes) -> Any:
    """The JSON of a body.

    Raises MalformedBody for what is not JSON: NaN, lone surrogates and nesting deeper than the
    parser's 201 levels too.
    """
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as e:
        raise MalformedBody(f"the body is not valid JSON: {e}") from None


class Budget:
    """The limits of one application's bodies, and the schemas of its routes."""

    def __init__(
        self, routes: Iterable[BaseRoute], max_items: int, context: int, max_text: int
    ) -> None:
        self._max_items = max_items
        self._max_array = max(MAX_ARRAY, context)
        self._max_text = max_text
        self._schemas = {
            route.path: _validator(route.body_field.field_info.annotation)
            for route in routes
            if isinstance(route, APIRoute) and route.body_field
        }

    def check(self, path: str, body: bytes) -> None:
        """Raises InvalidRequest for more than a body may hold, MalformedBody for what is no JSON.

        `path` decides which schema the body is tried against.
        """
        containers = body.count(b"{") + body.count(b"[")
        if containers <= _SMALL_CONTAINERS and len(body) <= _SMALL_BYTES:
            return
        schema = self._schemas.get(path)
        # Without a schema nobody says what a wrong item costs.
        known = schema is not None or path == "/"
        _check_values(body, MAX_VALUES if known else self._max_items)
        value = parse(body)
        self._check_length(value)
        for part in value.values() if isinstance(value, dict) else [value]:
            # Of several prompts or conversations each has the limit to itself.
            several = isinstance(part, list) and not any(isinstance(each, dict) for each in part)
            if several:
                self._check_length(part)
            if max(map(self._text, part if several else [part]), default=0) > self._max_text:
                raise PromptTooLong(
                    f"a prompt or conversation has at most {self._max_text} characters, which is "
                    "more than the model's context holds; send less text"
                )
        if schema is not None:
            _try(schema, value)

    def _text(self, value: Any) -> int:
        """Characters in all strings but media. Raises InvalidRequest as `_check_length`.

        A conversation is rendered and tokenised in one piece, at some 300 bytes a character.
        """
        characters = 0
        pending = [value]
        while pending:
            value = pending.pop()
            if isinstance(value, str):
                characters += 0 if value.startswith("data:") else len(value)
                continue
            if not isinstance(value, dict | list):
                continue
            self._check_length(value)
            parts = value.values() if isinstance(value, dict) else value
            pending += [part for part in parts if isinstance(part, str | dict | list)]
        return characters

    def _check_length(self, value: Any) -> None:
        if not isinstance(value, dict | list) or len(value) <= self._max_items:
            return
        if len(value) > self._max_array:
            raise InvalidRequest(f"an array holds at most {self._max_array} values")
        if isinstance(value, dict) or (
            sum(isinstance(each, dict | list) for each in value) > self._max_items
        ):
            raise InvalidRequest(
                f"an object has at most {self._max_items} keys, and an array at most "
                f"{self._max_items} objects or arrays, such as the turns of a conversation"
            )


def _check_values(body: bytes, max_values: int) -> None:
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    strings = plain.count(b'"') // 2
    if strings <= max_values:
        pieces = plain.split(b'"')
        outside = b"".join(pieces[::2])
        values = strings + outside.count(b"{") + outside.count(b"[")
        if values <= max_values and outside.count(b",") <= MAX_NUMBERS:
            # What a colon follows is a key.
            for string, following in zip(pieces[1::2], pieces[2::2], strict=False):
                if len(string) > MAX_KEY_BYTES and following.lstrip().startswith(b":"):
                    raise InvalidRequest(f"a key has at most {MAX_KEY_BYTES} bytes")
            return
    raise InvalidRequest(
        f"the body may hold at most {max_values} objects, arrays, keys and strings, and "
        f"{MAX_NUMBERS} numbers"
    )


def _validator(body: Any) -> SchemaValidator:
    return SchemaValidator(_fail_fast(TypeAdapter(body).core_schema))


def _try(schema: SchemaValidator, value: Any) -> None:
    try:
        schema.validate_python(value)
    except ValidationError as e:
        error = e.errors(include_url=False, include_input=False, include_context=False)[0]
        param = str(error["loc"][0])[:64] if error["loc"] else None
        missing = error["type"] == "missing"
        wrong = "is required" if missing else "does not have the form that this route takes"
        raise InvalidRequest(f"{param or 'the body'} {wrong}", param=param) from None
    except Exception:
        return  # vLLM's own refusal, which its route will tell


def _fail_fast(schema: Any) -> Any:
    """A copy of a pydantic schema whose arrays stop at their first wrong item, and whose unions
    at their first choice that fits."""
    if isinstance(schema, dict):
        copy = {
            key: value if key in ("cls", "metadata", "serialization") else _fail_fast(value)
            for key, value in schema.items()
        }
        kind = schema.get("type")
        if kind == "union":
            copy["mode"] = "left_to_right"
        elif isinstance(kind, str) and kind in ("list", "tuple", "set", "frozenset"):
            copy["fail_fast"] = True
        return copy
    if isinstance(schema, list | tuple):
        return type(schema)(_fail_fast(each) for each in schema)
    return schema
