"""Limits on what vLLM compiles to a grammar: JSON schemas, regular expressions, choices.

vLLM 0.32 compiles it once on the event loop, with xgrammar, to see whether it can be compiled.
"""

import re
from contextlib import suppress
from typing import Any

from pydantic_core import from_json, to_json

from service.errors import InvalidRequest

# The time and memory to compile a grammar grow faster than its text.
MAX_GRAMMAR_BYTES = 16_384
MAX_REGEX = 1_024
# xgrammar's grammar for minProperties or maxProperties grows with the cube of the properties.
MAX_COUNTED_PROPERTIES = 32
# Compile time of all schemas in one request, in units of about 0.1 microseconds (xgrammar 0.2,
# 2 GHz): so 0.1 s. The time for a pattern grows with the square of what its repeats add to it.
MAX_WORK = 1_000_000
_RANGE_WORK = 20_000
_FORMAT_WORK = 6_500
_CHARACTER_WORK = 3  # of a pattern, to read it here
_RANGES = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
# A class of characters becomes an automaton over UTF-8, as large as that of five characters.
_CLASS_SIZE = 5
# `*+` gives nothing back: a `[` that nothing closes takes the rest, once.
_TOKEN = re.compile(
    r"""\[(?:\\.|[^\]\\])*+\]?|\\."""
    # As xgrammar reads a repeat: with zeros in front, and with blanks.
    r"""|\{[ ]*0*(?P<min>\d{1,9})[ ]*(?:,[ ]*0*(?P<max>\d{0,9})[ ]*)?\}"""
    r"""|(?P<huge>\{[\d ,]*\})|.""",
    re.DOTALL,
)
_HUGE = 10**9  # times, of a repeat with more digits


def check(grammar: Any, param: str | None, work: int, max_bytes: int = MAX_GRAMMAR_BYTES) -> int:
    """Return the work to compile `grammar`, in the units of MAX_WORK.

    `param` is the key that the error may name; `work` is that of the request's other keys. Raises
    InvalidRequest if a limit is exceeded.
    """
    key = param or "what may become a grammar"
    if len(to_json(grammar)) > max_bytes:
        raise InvalidRequest(
            f"{key} has at most {max_bytes} bytes where it becomes a grammar", param=param
        )
    found = 0
    pending = [grammar]
    while pending:
        value = pending.pop()
        if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):  # a schema as text
            with suppress(ValueError):
                value = from_json(value)
        if isinstance(value, dict):
            _check_counted(value, key, param)
            found += _work(value, key, param)
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
    if work + found > MAX_WORK:
        raise InvalidRequest(
            f"{key} takes too long to compile: its patterns repeat too much, or too many numbers "
            "have bounds; say how long a string may be with maxLength, and leave bounds out",
            param=param,
        )
    return found


def check_made(outputs: Any) -> None:
    """Check what vLLM has made of a request's keys, just before it compiles it.

    `outputs` is vLLM's StructuredOutputsParams. They are longer than the keys, which were checked
    before. Raises InvalidRequest, also for a key of a later vLLM that is not known here.
    """
    kinds = ("json", "regex", "choice", "grammar", "structural_tag")
    made = {kind: getattr(outputs, kind) for kind in kinds}
    check(made, None, 0, 2 * MAX_GRAMMAR_BYTES)


def _check_counted(schema: dict[str, Any], key: str, param: str | None) -> None:
    counted = "minProperties" in schema or "maxProperties" in schema
    properties = schema.get("properties")
    if counted and isinstance(properties, dict) and len(properties) > MAX_COUNTED_PROPERTIES:
        raise InvalidRequest(
            f"an object in {key} with minProperties or maxProperties has at most "
            f"{MAX_COUNTED_PROPERTIES} properties",
            param=param,
        )


def _work(schema: dict[str, Any], key: str, param: str | None) -> int:
    patterns = [schema.get("pattern")]
    if isinstance(named := schema.get("patternProperties"), dict):
        patterns += named
    found = _RANGE_WORK * (not _RANGES.isdisjoint(schema)) + _FORMAT_WORK * ("format" in schema)
    for pattern in [*patterns, schema.get("regex")]:
        if isinstance(pattern, str) and len(pattern) > MAX_REGEX:
            raise InvalidRequest(
                f"a regular expression in {key} has at most {MAX_REGEX} characters", param=param
            )
    for pattern in patterns:  # not `regex`, which xgrammar compiles in another way
        if isinstance(pattern, str):
            found += max(0, expanded_size(pattern) - len(pattern)) ** 2
            found += _CHARACTER_WORK * len(pattern)
    return found


def expanded_size(pattern: str) -> int:
    """Return the number of characters of a regular expression with its repeats written out.

    One that is not well formed has a size too; vLLM refuses it.
    """
    groups = [0]
    last = 0  # the size of what a repeat would repeat
    for token in _TOKEN.finditer(pattern):
        text = token[0]
        if token["min"] is not None or token["huge"]:
            times = max(int(token["min"]), int(token["max"] or 0), 1) if token["min"] else _HUGE
            groups[-1] += last * (times - 1)
            last *= times
        elif text == "(":
            groups.append(0)
        elif text == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        elif text not in "|^$?*+":
            last = _CLASS_SIZE if text == "." or len(text) > 1 else 1
            groups[-1] += last
    return sum(groups)
