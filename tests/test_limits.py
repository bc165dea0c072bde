"""What a body may hold, at the last value that passes and the first that does not: no server."""

import json
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import to_json
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output import backend_xgrammar

from service.api import body_budget, grammar_limits, request_limits
from service.api.body_budget import Budget
from service.errors import InvalidRequest, MalformedBody, PromptTooLong, RequestError
from service.models import vllm_private
from tests.conftest import hardening

MAX_ITEMS, CONTEXT, CHARACTERS = 512, 2048, 2048 * 81
EXPLODES = {
    "strict": True,
    "input_schema": {"properties": {"a": {"type": "string", "pattern": "(a|b){1,9999}"}}},
}
LARGE = " " * 5000  # a small body of few objects is not looked at


def keys(count: int) -> dict[str, int]:
    return {f"the-key-{number}": 1 for number in range(count)}


def wide(count: int) -> dict[str, int]:
    return {f"{number:0256}": 1 for number in range(count)}


def tools(enum: list[Any]) -> dict[str, Any]:
    return {"tools": [{"function": {"parameters": {"enum": enum}}}]}


def levels(count: int) -> str:
    return "[" * count + "]" * count


@hardening(1, 2)
@pytest.mark.parametrize(
    ("path", "passes", "refused", "says"),
    [
        ("/", {"a": [{}] * 512}, {"a": [{}] * 513}, "at most 512 objects or arrays"),
        ("/", keys(512), keys(513), "an object has at most 512 keys"),
        # The object, its key and the array count too.
        ("/", {"a": [""] * 19_997}, {"a": [""] * 19_998}, "at most 20000 objects, arrays, keys"),
        ("/invocations", {"a": [""] * 509 + [LARGE]}, {"a": [""] * 510 + [LARGE]}, "at most 513"),
        ("/invocations", {str(each): [0] * 65_536 for each in range(4)},
         {str(each): [0] * 43_700 for each in range(6)}, "and 262144 numbers"),
        ("/", {"a": [0] * 20_001}, {"a": [0] * 20_002}, "and 20000 numbers"),
        ("/invocations", {"a": [0] * 65_536}, {"a": [0] * 65_537}, "an array holds at most 65536"),
        ("/", {"k" * 256: LARGE}, {"k" * 257: LARGE}, "a key has at most 256 bytes"),
        ("/", {"a": "x" * CHARACTERS}, {"a": "x" * (CHARACTERS + 1)}, f"at most {CHARACTERS} char"),
        ("/", {"a": ["x" * CHARACTERS, "y"]}, {"a": [{"b": "x" * CHARACTERS}]}, f"{CHARACTERS} ch"),
        ("/", {"a": "x" * CHARACTERS}, {"a": "x" * CHARACTERS, "b": "y"}, f"{CHARACTERS} char"),
        ("/invocations", {"a": [123456] * 60_000}, tools([0.25] * 40_000), f"{CHARACTERS} char"),
        ("/", tools([wide(200)] * 3), tools([wide(200)] * 4), f"{CHARACTERS} char"),
    ],
)  # fmt: skip
def test_a_body_holds_so_much(
    path: str, passes: dict[str, Any], refused: dict[str, Any], says: str
) -> None:
    max_items = 513 if path == "/invocations" else MAX_ITEMS
    budget = Budget([], max_items, CONTEXT, CHARACTERS)
    budget.check(path, json.dumps(passes).encode())
    with pytest.raises(RequestError, match=says) as error:
        budget.check(path, json.dumps(refused).encode())
    assert isinstance(error.value, InvalidRequest | PromptTooLong) and error.value.status == 422


def test_an_array_may_be_as_long_as_the_context() -> None:
    Budget([], MAX_ITEMS, 100_000, CHARACTERS).check("/v1", json.dumps([0] * 100_000).encode())


@hardening(2)
def test_a_body_has_so_many_levels() -> None:
    body_budget.parse(levels(201).encode())
    with pytest.raises(MalformedBody, match="recursion limit"):
        body_budget.parse(levels(202).encode())


def choice(size: int) -> dict[str, Any]:
    """A grammar of so many bytes."""
    frame = len(to_json({"choice": [""]}))
    return {"structured_outputs": {"choice": ["x" * (size - frame)]}}


def counted(properties: int) -> dict[str, Any]:
    schema = {"properties": keys(properties), "minProperties": 1}
    return {"structured_outputs": {"json": schema}}


@hardening(4)
@pytest.mark.parametrize(
    ("passes", "refused", "says"),
    [
        (choice(16_384), choice(16_385), "at most 16384 bytes"),
        (counted(32), counted(33), "at most 32 properties"),
        (
            {"structured_outputs": {"regex": "x" * 1024}},
            {"structured_outputs": {"regex": "x" * 1025}},
            "at most 1024 characters",
        ),
    ],
)
def test_a_grammar_is_so_large(passes: dict[str, Any], refused: dict[str, Any], says: str) -> None:
    assert request_limits.sequences(passes, 64) == 1
    with pytest.raises(InvalidRequest, match=says):
        request_limits.sequences(refused, 64)


@hardening(4)
@pytest.mark.parametrize(
    ("choice", "forced"),
    [
        (None, False),
        ("auto", False),
        ("none", False),
        ("required", True),
        ({"type": "tool", "name": "f"}, True),
    ],
)
def test_tools_are_a_grammar_only_where_the_model_must_call_them(choice: Any, forced: bool) -> None:
    body = {"tools": [{"name": "f", "description": "x" * 20_000}], "tool_choice": choice}
    if forced:
        with pytest.raises(InvalidRequest, match="tools has at most 16384 bytes"):
            request_limits.sequences(body, 64)
    else:
        request_limits.sequences(body, 64)


@pytest.mark.parametrize(
    "key",
    ["metadata", "prediction", "messages", "system", "documents", "chat_template_kwargs"],
)
def test_what_no_grammar_is_made_of_has_no_limit_of_grammars(key: str) -> None:
    assert request_limits.sequences({key: [{f"k{i}": "v" * 500 for i in range(100)}]}, 64) == 1


@hardening(4)
@pytest.mark.parametrize(
    "body",
    [
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {
                    "role": "system",
                    "content": [{"tool": {"definition": {"name": "f", **EXPLODES}}}],
                },
            ],
            "tool_choice": {"type": "any"},
        },
        *(
            {
                "tools": [{"type": "namespace", "name": "n", "tools": [{"name": "f", **EXPLODES}]}],
                "tool_choice": {"type": "function", "name": name},
            }
            for name in ("f", "n__f")
        ),
    ],
)
def test_tools_are_found_where_a_protocol_hides_them(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="takes too long to compile") as error:
        request_limits.sequences(body, 64)
    assert error.value.param == "tools"


@hardening(4)
def test_no_grammar_goes_round_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    validate = backend_xgrammar.validate_xgrammar_grammar
    monkeypatch.setattr(backend_xgrammar, "validate_xgrammar_grammar", validate)  # put back after
    vllm_private.check_grammars(grammar_limits.check_made)
    tag = {
        "type": "structural_tag",
        "format": {"type": "json_schema", "json_schema": EXPLODES["input_schema"]},
    }
    for made in ({"structural_tag": json.dumps(tag)}, {"json": EXPLODES["input_schema"]}):
        params = SamplingParams(structured_outputs=StructuredOutputsParams(**made))
        with pytest.raises(InvalidRequest, match="takes too long to compile"):
            backend_xgrammar.validate_xgrammar_grammar(params)
    params = SamplingParams(structured_outputs=StructuredOutputsParams(json={"type": "object"}))
    backend_xgrammar.validate_xgrammar_grammar(params)


@hardening(1)
def test_several_questions_are_several_sequences() -> None:
    questions = {f"q{i}": "?" for i in range(64)}
    assert (
        request_limits.sequences({"questions": questions, "state": {"x": "y" * 20_000}}, 64) == 64
    )


@hardening(7)
def test_a_stop_string_is_so_long() -> None:
    request_limits.sequences({"stop": ["x" * 1000]}, 64)
    with pytest.raises(InvalidRequest, match="at most 1000 characters"):
        request_limits.sequences({"stop": ["x" * 1001]}, 64)


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        ("abc", 3),
        ("a{7}", 7),
        ("(ab){1,5}c", 11),
        ("[0-9a-f]{8}", 40),
        (r"\d{3}", 15),
        ("((a|b){1,10}){1,10}", 200),
        ("a{300}{3}", 900),
        ("a{5,}", 5),
        ("(((", 0),
        ("){3}", 3),
        ("[" * 1024, 5),
        ("a{0}", 1),
        ("a{0000001000}", 1000),
        ("a{ 2, 0000000900 }", 900),
        ("a{99999999999}", 10**9),
        ("a{1,00000000000000000000}", 1),
        ("[a\\", 6),
        ("a{99999999}", 99999999),
    ],
)
def test_repeats_of_a_pattern_are_counted(pattern: str, size: int) -> None:
    assert grammar_limits.expanded_size(pattern) == size


RANGE = {"type": "integer", "minimum": -123456789, "maximum": 987654321}


@hardening(4)
@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "(a|b){1,600}"},
        {"type": "string", "pattern": "((a|b){1,30}){1,30}"},
        {"properties": {f"p{n}": {"pattern": "[^x]{2,120}"} for n in range(10)}},
        {"patternProperties": {"(a|b){1,600}": {"type": "string"}}},
        {"properties": {f"p{n}": RANGE for n in range(51)}},
        {"properties": {f"p{n}": {"format": "ipv6"} for n in range(160)}},
        json.dumps({"type": "string", "pattern": "(a|b){1,9999}"}),
    ],
)
@pytest.mark.parametrize("where", ["structured_outputs", "tools", "unknown"])
def test_what_takes_long_to_compile_is_refused(schema: Any, where: str) -> None:
    body: dict[str, Any] = {where: {"json": schema}}
    if where == "tools":
        body = {"tools": [{"function": {"name": "f", "parameters": schema}}]}
        request_limits.sequences(body, 64)  # the model may call it: it is text
        body["tool_choice"] = {"function": {"name": "f"}}  # no type: it must
    with pytest.raises(InvalidRequest, match="takes too long to compile"):
        request_limits.sequences(body, 64)


def test_ordinary_schemas_pass() -> None:
    properties = {
        "id": {"pattern": "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"},
        "name": {"pattern": "^[A-Za-z0-9_-]{1,64}$"},
        "text": {"minLength": 1, "maxLength": 100_000},
        "when": {"format": "date-time"},
        **{f"n{number}": RANGE for number in range(20)},
    }
    request_limits.sequences({"structured_outputs": {"json": {"properties": properties}}}, 64)


@hardening(1, 7)
@pytest.mark.parametrize(
    ("passes", "refused", "param"),
    [
        ({"bad_words": ["x" * 128] * 256}, {"bad_words": ["x" * 129] * 256}, "bad_words"),
        ({"bad_words": ["x"] * 1024}, {"bad_words": ["x"] * 1025}, "bad_words"),
        (
            {"bad_words": ["x"] * 16, "prompt": ["a"] * 64},
            {"bad_words": ["x"] * 17, "prompt": ["a"] * 64},
            "bad_words",
        ),
        (
            {"prompt": [1] * 2048, "prompt_logprobs": 7},
            {"prompt": [1] * 2048, "prompt_logprobs": 8},
            "prompt_logprobs",
        ),
        (
            {"prompt": [[1] * 1024] * 4, "echo": True, "logprobs": 3},
            {"prompt": [[1] * 1024] * 4, "echo": True, "logprobs": 4},
            "logprobs",
        ),
        (
            {"prompt": [1] * 2048, "prompt_logprobs": 7.0},  # which vLLM takes, and as text too
            {"prompt": [1] * 2048, "prompt_logprobs": "8"},
            "prompt_logprobs",
        ),
        (
            {"n": 64, "max_tokens": 38, "top_logprobs": 9},
            {"n": 64, "max_tokens": 39, "top_logprobs": 9},
            "top_logprobs",
        ),
        (
            {"n": 64, "logprobs": 20, "stream": True},
            {"n": 64, "logprobs": 20},
            "logprobs",
        ),
        (
            {"max_tokens": 2000, "logprobs": 20, "stream": True},
            {"max_tokens": 2000, "logprob_token_ids": [1] * 20},
            "logprobs",
        ),
        ({"items": ["x" * 2048] * 64}, {"items": ["x" * 2049] * 64}, "items"),
        ({"input": "hi", "background": False}, {"input": "hi", "background": True}, "background"),
    ],
)
def test_what_vllm_would_do_on_the_loop_or_behind_the_queue_is_refused(
    passes: dict[str, Any], refused: dict[str, Any], param: str
) -> None:
    request_limits.sequences(passes, 64)
    with pytest.raises(InvalidRequest) as error:
        request_limits.sequences(refused, 64)
    assert error.value.param == param


@hardening(2)
def test_text_is_no_medium_because_it_says_data() -> None:
    budget = Budget([], MAX_ITEMS, CONTEXT, 10_000)
    picture = {"type": "image_url", "image_url": {"url": "data:" + "x" * 20_000}}
    budget.check("/", json.dumps({"messages": [{"content": [picture]}]}).encode())
    with pytest.raises(PromptTooLong):
        budget.check("/", json.dumps({"prompt": "data:" + "x" * 20_000}).encode())


class Turn(BaseModel):
    role: str


class Wrapped(Turn):
    @model_validator(mode="wrap")
    @classmethod
    def wrap(cls, value: Any, handler: Any) -> Any:
        return handler(value)


class Chat(BaseModel):
    model_config = ConfigDict(extra="forbid")
    messages: list[Turn]


@pytest.mark.parametrize(
    ("schema", "body", "says", "param"),
    [
        (Chat, {"messages": [{}] * 65}, "messages does not have the form", "messages"),
        (Chat, {"messages": [{"role": 1}] * 65}, "messages does not have the form", "messages"),
        (Chat, {"messages": [], "k": [{}] * 65}, "the body does not have the form", None),
        (Chat, {"k": [{}] * 65}, "messages is required", "messages"),
        (Wrapped | Chat, {"k": [{}] * 65}, "the body does not have the form", None),
        (Chat, [{}] * 65, "the body does not have the form", None),
    ],
)
def test_a_body_that_does_not_fit_is_told_the_key_that_it_has_or_lacks(
    schema: Any, body: Any, says: str, param: str | None
) -> None:
    app = FastAPI()

    @app.post("/v1/chat")
    def chat(body: schema) -> None: ...

    with pytest.raises(InvalidRequest, match=f"^{says}") as error:
        Budget(app.routes, MAX_ITEMS, CONTEXT, CHARACTERS).check(
            "/v1/chat", json.dumps(body).encode()
        )
    assert error.value.param == param
