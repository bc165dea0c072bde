"""vLLM's own routes beside POST /, through the openai SDK."""

import json
from collections.abc import Iterator

import httpx
import openai
import pytest

from service.cluster import config
from testing.server import Server
from tests.conftest import MODEL

FRANCE = "What is the capital of France?"
PARIS = "The capital of France is Paris."


@pytest.fixture
def client(service: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none") as client:
        yield client


def test_chat_gives_the_answer_of_post(client: openai.OpenAI) -> None:
    # The YAML's template and sampling apply: without them the answer is longer, and in French.
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": FRANCE}]
    )
    assert answer.choices[0].message.content == PARIS
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (16, 8)


def test_chat_streams(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": FRANCE}], stream=True
    )
    deltas = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert len(deltas) > 5
    assert "".join(deltas) == PARIS


def test_log_probabilities_need_no_compiler(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="a", max_tokens=3, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs and len(logprobs.token_logprobs or ()) == 3


def test_structured_output(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"capital": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["capital"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": FRANCE}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "capital", "schema": schema, "strict": True},
        },
    )
    assert json.loads(answer.choices[0].message.content or "") == {"capital": "Paris"}


def test_completion_and_the_list_of_models(client: openai.OpenAI) -> None:
    done = client.completions.create(model=MODEL, prompt="Paris is the capital of", max_tokens=1)
    assert done.choices[0].text == " France"
    (model,) = client.models.list()
    assert model.id == MODEL
    assert "/" not in str(model.model_dump()["root"])  # no path of the server's machine


def test_a_body_that_is_not_said_to_be_json_is_refused_with_what_to_say(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", content=b'{"prompt": "hi"}')
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert "send the header `Content-Type: application/json`" in message


def test_the_other_routes_are_there(http: httpx.Client) -> None:
    assert http.post("/tokenize", json={"prompt": "hi"}).json()["tokens"] == [6004]
    assert http.get("/health").status_code == 200
    assert http.get("/health/ready").json() == {
        "status": "ready",
        "model": MODEL,
        "instance": http.get("/health/ready").json()["instance"],
    }
    assert http.get("/version").json() == {"version": "0.32.0"}


def test_no_model_of_a_cluster_is_named_like_a_route(http: httpx.Client) -> None:
    firsts = {path.split("/")[1] for path in http.get("/").json()["routes"]}
    assert firsts - {""} <= config._ROUTES
