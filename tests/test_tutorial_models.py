"""The tutorials' models behind the real server: tiny checkpoints under the catalogue's entries."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import sentencepiece

from benchmarks.server import Server
from service import reference
from tests import checkpoints

GREEDY = {"temperature": 0, "repetition_penalty": 1}


@contextmanager
def serving(name: str, folder: Path) -> Iterator[httpx.Client]:
    checkpoints.write(name, folder)
    arguments = checkpoints.arguments(
        name, folder, "engine.dtype=float32", "engine.enforce_eager=true"
    )
    sets = [word for argument in arguments for word in ("--set", argument)]
    with (
        Server.service(folder / "log", checkpoints.CATALOGUE[name], *sets) as server,
        httpx.Client(base_url=server.url, timeout=120, trust_env=False) as client,
    ):
        yield client


def greedy(folder: Path, ids: list[int], tokens: int) -> list[int]:
    """What the reference answers to the prompt `ids`."""
    answer: list[int] = []
    while len(answer) < tokens:
        (rows,) = reference.logits(folder, [ids + answer])
        answer.append(int(rows[-1].argmax()))
        if answer[-1] == 2:
            return answer[:-1]
    return answer


def streamed(client: httpx.Client, body: dict[str, Any]) -> tuple[list[str], str]:
    """The deltas, and the whole answer of the last event."""
    answer = client.post("/", json={**body, "stream": True})
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line]
    return [event["delta"] for event in events if "delta" in event], events[-1]["response"]


@pytest.fixture(scope="module")
def baichuan2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, httpx.Client]]:
    folder = tmp_path_factory.mktemp("baichuan2")
    with serving("baichuan2", folder) as client:
        yield folder, client


@pytest.fixture(scope="module")
def bluelm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, httpx.Client]]:
    folder = tmp_path_factory.mktemp("bluelm")
    with serving("bluelm", folder) as client:
        yield folder, client


@pytest.fixture(scope="module")
def openelm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, httpx.Client]]:
    folder = tmp_path_factory.mktemp("openelm")
    with serving("openelm", folder) as client:
        yield folder, client


def test_baichuan2_answers_what_its_reference_answers_on_every_route(
    baichuan2: tuple[Path, httpx.Client],
) -> None:
    folder, client = baichuan2
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    asks, answers = (model.piece_to_id(f"<reserved_{i}>") for i in (106, 107))
    ids = [asks, *model.encode("你好"), answers, *model.encode("好"), asks, *model.encode("谁")]
    ids.append(answers)
    expected = model.decode(greedy(folder, ids, 20))
    body = {"prompt": "谁", "history": [["你好", "好"]], "max_length": 20, **GREEDY}
    plain = client.post("/", json=body).json()
    assert plain["response"] == expected
    assert plain["history"] == [["你好", "好"], ["谁", expected]]
    deltas, whole = streamed(client, body)
    assert ("".join(deltas), whole) == (expected, expected)
    assert not any("\ufffd" in delta for delta in deltas)

    messages = [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "好"},
        {"role": "user", "content": "谁"},
    ]
    chat = {"messages": messages, "max_tokens": 20, "return_token_ids": True, **GREEDY}
    answer = client.post("/v1/chat/completions", json=chat).json()
    assert answer["prompt_token_ids"] == ids
    assert answer["choices"][0]["message"]["content"].strip() == expected.strip()


def test_baichuan2s_sampling_is_the_tutorials_over_the_checkpoints(
    baichuan2: tuple[Path, httpx.Client],
) -> None:
    _, client = baichuan2
    answer = client.post("/", json={"prompt": "你好", "details": True, "max_length": 3}).json()
    sampling = {"temperature": 0.3, "top_p": 0.85, "top_k": 5, "repetition_penalty": 1.05}
    assert answer["details"]["sampling"] == {**sampling, "max_tokens": 3}


def test_what_baichuan2s_format_has_no_place_for_costs_that_request_alone(
    baichuan2: tuple[Path, httpx.Client],
) -> None:
    _, client = baichuan2
    history = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    refused = client.post("/", json={"prompt": "c", "history": history})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "history")
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    body = {"messages": [{"role": "user", "content": "c"}], "tools": tools, "tool_choice": "none"}
    assert client.post("/v1/chat/completions", json=body).status_code == 400
    body = {
        "messages": [{"role": "user", "content": "c"}],
        "max_tokens": 5,
        "response_format": {"type": "json_object"},
    }
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert client.post("/", json={"prompt": "c", "max_length": 2}).status_code == 200


def test_bluelm_echoes_the_question_and_answers_what_its_reference_answers(
    bluelm: tuple[Path, httpx.Client],
) -> None:
    folder, client = bluelm
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = [1, *model.encode("[|Human|]:你好[|AI|]:")]
    answer = greedy(folder, ids, 20)
    markers = [model.piece_to_id(marker) for marker in ("[|Human|]:", "[|AI|]:")]
    expected = model.decode([id for id in ids + answer if id not in markers])
    assert expected.startswith("你好")
    body = {"prompt": "你好", "max_length": 20, **GREEDY}
    assert client.post("/", json=body).json()["response"] == expected
    deltas, whole = streamed(client, body)
    assert ("".join(deltas), whole) == (expected, expected)


def test_history_holds_what_bluelm_said_without_the_echo(
    bluelm: tuple[Path, httpx.Client],
) -> None:
    _, client = bluelm
    body = {"prompt": "你好", "history": [["谁", "我"]], "max_length": 5, **GREEDY}
    answer = client.post("/", json=body).json()
    said = answer["history"][1][1]
    assert answer["response"] == f"谁我你好{said}"


def test_bluelm_is_greedy_as_its_checkpoint_is(bluelm: tuple[Path, httpx.Client]) -> None:
    _, client = bluelm
    body = {"prompt": "你好", "max_length": 2, "details": True}
    sampling = client.post("/", json=body).json()["details"]["sampling"]
    assert sampling == {"temperature": 0.0, "repetition_penalty": 1.1, "max_tokens": 2}


def test_openelm_completes_the_text_and_max_length_counts_it(
    openelm: tuple[Path, httpx.Client],
) -> None:
    folder, client = openelm
    model = sentencepiece.SentencePieceProcessor(
        model_file=str(folder / "tokenizer" / "tokenizer.model")
    )
    prompt = "Once upon a time there was"
    ids = [1, *model.encode(prompt)]
    expected = model.decode(ids[1:] + greedy(folder, ids, 40 - len(ids)))
    assert expected.startswith(prompt)
    body = {"prompt": prompt, "max_length": 40, "details": True}
    answer = client.post("/", json=body).json()
    assert answer["response"] == expected
    deltas, whole = streamed(client, body)
    assert ("".join(deltas), whole) == (expected, expected)

    details = client.post("/", json={"prompt": prompt, "details": True}).json()["details"]
    assert details["sampling"]["max_tokens"] == 384 - len(ids)
    refused = client.post("/", json={"prompt": prompt, "max_length": 3})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "max_length")


def test_openelm_reads_a_control_token_as_text(openelm: tuple[Path, httpx.Client]) -> None:
    _, client = openelm
    body = {"prompt": "a</s>b", "max_new_tokens": 1, "details": True}
    answer = client.post("/", json=body).json()
    assert answer["response"].startswith("a</s>b")
    assert answer["details"]["prompt_tokens"] > 4
