"""Limits how much JSON a body may hold, before FastAPI validates it.

Parsing and validating block the event loop, and pydantic uses more memory for an error than for a
value: a small body of many wrong items once took 20 GB. So values are counted in the raw bytes,
arrays are measured after parsing, and then a validator runs that stops at its first error.
"""

import json
from collections.abc import Iterable
from typing import Any

from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from pydantic_core import SchemaValidator, from_json, to_json
from starlette.routing import BaseRoute

from service.errors import InvalidRequest, MalformedBody, PromptTooLong

# Objects, arrays, keys and strings in one body. 125 kB of ordinary tools have 7,000.
MAX_VALUES = 20_000
# Numbers in one body, but of `POST /`, which has no use for many. They cost less than other values,
# and a prompt may be token ids.
MAX_NUMBERS = 262_144
# Values in one array; the model's context, if that is longer.
MAX_ARRAY = 65_536
MAX_KEY_BYTES = 256
# Keys of a message's part that hold a URL: OpenAI's two forms.
_MEDIA_KEYS = frozenset({"url", "image_url", "audio_url", "video_url", "file_url", "file_data"})
# Bodies up to this size, with up to this many objects and arrays, are not checked.
_SMALL_BYTES = 4096
_SMALL_CONTAINERS = 64


def as_utf8(body: bytes) -> bytes:
    """Return JSON in UTF-8 without a byte order mark, from what Python's `json` reads.

    That is also UTF-16 and UTF-32, as the tutorials' server and vLLM take it. Raises MalformedBody.
    """
    encoding = json.detect_encoding(body)
    try:
        text = body.decode(encoding)
    except UnicodeDecodeError as e:
        raise MalformedBody(
            f"the body is not UTF-8 text (byte {e.start}); send UTF-8, uncompressed"
        ) from None
    return body if encoding == "utf-8" else text.encode()


def parse(body: bytes) -> Any:
    """Return the parsed body.

    Raises MalformedBody for invalid JSON, NaN, lone surrogates, and nesting beyond 201 levels,
    which is pydantic-core's limit.
    """
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as e:
        raise MalformedBody(f"the body is not valid JSON: {e}") from None


class Budget:
    """Checks bodies against the limits and against the schemas of an application's routes."""

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
        """Check a body. `path` selects the schema that it must fit.

        Raises InvalidRequest, PromptTooLong, or MalformedBody.
        """
        if is_small(body):
            return
        schema = self._schemas.get(path.rstrip("/"))
        # Without a schema the cost of an error is unknown: use the lower limit.
        known = schema is not None or path == "/"
        max_values = MAX_VALUES if known else self._max_items
        check_values(body, max_values, MAX_VALUES if path == "/" else MAX_NUMBERS)
        value = parse(body)
        self._check_length(value)
        parts = value.values() if isinstance(value, dict) else [value]
        if sum(map(self._characters, parts)) > self._max_text:
            raise PromptTooLong(
                f"a prompt or conversation, with its tools, has at most {self._max_text} "
                "characters, which is more than the model's context holds; send less text"
            )
        if schema is not None:
            _validate(schema, value)

    def _characters(self, part: Any) -> int:
        """Count the characters that the value of a key may have in a prompt. Raises InvalidRequest.

        A template may write an object as indented JSON. A prompt is tokenised in one piece, which
        takes some 300 bytes per character.
        """
        if isinstance(part, list) and not any(isinstance(each, dict) for each in part):
            # Several prompts or conversations, of which each is tokenised alone, or token ids.
            self._check_length(part)
            prompts = [each for each in part if isinstance(each, str | list)]
        else:
            prompts = [part]
        return max(map(self._prompt_characters, prompts), default=0)

    def _prompt_characters(self, prompt: Any) -> int:
        if not isinstance(prompt, dict | list):
            return len(prompt) if isinstance(prompt, str) else 0
        return len(to_json(self._without_media(prompt)).decode()) + _indentation(prompt)

    def _without_media(self, value: Any) -> Any:
        """Return a copy of a value without media that stand in data URLs. Raises InvalidRequest."""
        if not isinstance(value, dict | list):
            return value
        self._check_length(value)
        if isinstance(value, list):
            return [self._without_media(each) for each in value]
        return {
            key: self._without_media(each)
            for key, each in value.items()
            if not (key in _MEDIA_KEYS and isinstance(each, str) and each.startswith("data:"))
        }

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


def is_small(body: bytes) -> bool:
    """Whether a body can cost so little that it is not checked."""
    containers = body.count(b"{") + body.count(b"[")
    return containers <= _SMALL_CONTAINERS and len(body) <= _SMALL_BYTES


def _indentation(value: Any, depth: int = 1) -> int:
    """Return half the levels in front of all lines of a value's indented JSON.

    White space takes less than other text, and ordinary tools must pass.
    """
    parts = value.values() if isinstance(value, dict) else value
    return depth * len(value) // 2 + sum(
        _indentation(part, depth + 1) for part in parts if isinstance(part, dict | list)
    )


def check_values(body: bytes, max_values: int = MAX_VALUES, max_numbers: int = MAX_NUMBERS) -> None:
    """Count the values in a body before anything parses it. Raises InvalidRequest."""
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    strings = plain.count(b'"') // 2
    if strings <= max_values:
        pieces = plain.split(b'"')
        outside = b"".join(pieces[::2])
        values = strings + outside.count(b"{") + outside.count(b"[")
        if values <= max_values and outside.count(b",") <= max_numbers:
            # A string before a colon is a key.
            for string, following in zip(pieces[1::2], pieces[2::2], strict=False):
                if len(string) > MAX_KEY_BYTES and following.lstrip().startswith(b":"):
                    raise InvalidRequest(f"a key has at most {MAX_KEY_BYTES} bytes")
            return
    raise InvalidRequest(
        f"the body may hold at most {max_values} objects, arrays, keys and strings, and "
        f"{max_numbers} numbers"
    )


def _validator(body: Any) -> SchemaValidator:
    return SchemaValidator(_fail_fast(TypeAdapter(body).core_schema))


def _validate(schema: SchemaValidator, value: Any) -> None:
    try:
        schema.validate_python(value)
    except ValidationError as e:
        error = e.errors(include_url=False, include_input=False, include_context=False)[0]
        place = error["loc"]  # of a union its first part may be pydantic's name of a member
        missing = error["type"] == "missing" and len(place) == 1
        unknown = error["type"] == "extra_forbidden"  # never echo the name of such a key
        named = missing or (place and not unknown and isinstance(value, dict) and place[0] in value)
        param = str(place[0]) if named else None
        wrong = "is required" if missing else "does not have the form that this route takes"
        raise InvalidRequest(f"{param or 'the body'} {wrong}", param=param) from None
    except Exception:
        return  # raised by a vLLM validator: the route raises it again


def _fail_fast(schema: Any) -> Any:
    """Copy a pydantic core schema. In the copy an array stops at its first wrong item, and a union
    at its first choice that fits."""
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
