"""The tutorials' models behind the real server: tiny checkpoints under the catalogue's entries."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import sentencepiece
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from vllm.plugins import load_general_plugins
from vllm.reasoning import ReasoningParserManager
from vllm.tokenizers import get_tokenizer

from service.api import engine
from service.preflight import reference
from testing import checkpoints
from testing.server import Server
from tests import warm
from tests.conftest import PATIENCE

Tutorial = tuple[Path, httpx.Client]  # the checkpoint, and a client of its server
GREEDY = {"temperature": 0, "repetition_penalty": 1}
# What a model that reasons writes after the template, whose last token is a new line.
THOUGHT = ("Ċ", "<think>", "h", "m", "</think>", "Y", "e", "s", "<|im_end|>")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Tutorial]]:
    """One for each model, started at the same time."""
    servers: dict[str, Tutorial] = {}
    waiting: list[Server] = []
    with ExitStack() as stack:
        for name in ("baichuan2", "bluelm", "glm4", "openelm", "qwen2"):
            folder, entry = tmp_path_factory.mktemp(name), checkpoints.CATALOGUE[name]
            if name == "qwen2":
                checkpoints.write_scripted(folder, THOUGHT)
                entry = "deepseek-r1-distill-qwen-7b"
            else:
                checkpoints.write(name, folder)
            if name == "glm4":
                begin_with_a_newline(folder)
            arguments = checkpoints.arguments(
                name, folder, "engine.dtype=float32", "engine.enforce_eager=true"
            )
            sets = [word for argument in arguments for word in ("--set", argument)]
            server: Server = warm.Server.service(folder / "log", entry, *sets)
            stack.callback(server.stop)
            client = httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False)
            servers[name] = folder, stack.enter_context(client)
            waiting.append(server)
        for each in waiting:
            each.wait_until_ready()
        yield servers


def glm4_ids(folder: Path, *turns: dict[str, str]) -> list[int]:
    return list(get_tokenizer(folder, tokenizer_mode="glm4").apply_chat_template(turns))


def begin_with_a_newline(folder: Path) -> None:
    """Make GLM-4's answer to "你好" do so, as the published model's answers do."""
    load_general_plugins()
    newline = get_tokenizer(folder, tokenizer_mode="glm4").encode_text("\n")
    (rows,) = reference.logits(folder, [glm4_ids(folder, {"role": "user", "content": "你好"})])
    likeliest = int(rows[-1].argmax())
    weights = load_file(folder / "model.safetensors")
    head = weights["transformer.output_layer.weight"]
    head[[*newline, likeliest]] = head[[likeliest, *newline]]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def greedy(folder: Path, ids: list[int], tokens: int, ends: Sequence[int] = (2,)) -> list[int]:
    """What the reference answers to the prompt `ids`."""
    answer: list[int] = []
    while len(answer) < tokens:
        (rows,) = reference.logits(folder, [ids + answer])
        answer.append(int(rows[-1].argmax()))
        if answer[-1] in ends:
            return answer[:-1]
    return answer


def streamed(client: httpx.Client, body: dict[str, Any]) -> tuple[list[str], str]:
    """The deltas, and the whole answer of the last event."""
    answer = client.post("/", json={**body, "stream": True})
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line]
    return [event["delta"] for event in events if "delta" in event], events[-1]["response"]


@pytest.fixture
def baichuan2(servers: dict[str, Tutorial]) -> Tutorial:
    return servers["baichuan2"]


@pytest.fixture
def bluelm(servers: dict[str, Tutorial]) -> Tutorial:
    return servers["bluelm"]


@pytest.fixture
def glm4(servers: dict[str, Tutorial]) -> Tutorial:
    return servers["glm4"]


@pytest.fixture
def openelm(servers: dict[str, Tutorial]) -> Tutorial:
    return servers["openelm"]


def test_baichuan2_answers_what_its_reference_answers_on_every_route(
    baichuan2: Tutorial,
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
    baichuan2: Tutorial,
) -> None:
    _, client = baichuan2
    answer = client.post("/", json={"prompt": "你好", "details": True, "max_length": 3}).json()
    sampling = {"temperature": 0.3, "top_p": 0.85, "top_k": 5, "repetition_penalty": 1.05}
    assert answer["details"]["sampling"] == {**sampling, "max_tokens": 3}


def test_what_baichuan2s_format_has_no_place_for_costs_that_request_alone(
    baichuan2: Tutorial,
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
    bluelm: Tutorial,
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
    bluelm: Tutorial,
) -> None:
    _, client = bluelm
    body = {"prompt": "你好", "history": [["谁", "我"]], "max_length": 5, **GREEDY}
    answer = client.post("/", json=body).json()
    said = answer["history"][1][1]
    assert answer["response"] == f"谁我你好{said}"


def test_bluelm_is_greedy_as_its_checkpoint_is(bluelm: Tutorial) -> None:
    _, client = bluelm
    body = {"prompt": "你好", "max_length": 2, "details": True}
    sampling = client.post("/", json=body).json()["details"]["sampling"]
    assert sampling == {"temperature": 0.0, "repetition_penalty": 1.1, "max_tokens": 2}


def test_glm4_answers_what_its_reference_answers_without_white_space_around_it(
    glm4: Tutorial,
) -> None:
    folder, client = glm4
    asked = {"role": "user", "content": "你好"}
    answer = greedy(folder, glm4_ids(folder, asked), 12, [400, 407, 409])
    said = get_tokenizer(folder, tokenizer_mode="glm4").decode(answer, skip_special_tokens=True)
    expected = said.rstrip("\ufffd").strip()
    assert said.startswith("\n") and expected
    body = {"prompt": "你好", "max_new_tokens": 12, **GREEDY}
    plain = client.post("/", json=body).json()
    assert plain["response"] == expected
    assert plain["history"] == [
        asked,
        {"role": "assistant", "metadata": "", "content": expected},
    ]
    deltas, whole = streamed(client, body)
    assert ("".join(deltas), whole) == (expected, expected)
    chat = {"messages": [asked], "max_tokens": 12, **GREEDY}
    raw = client.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"]
    assert raw.startswith("\n")  # as the model writes it
    # As a client of the book's vLLM chapter does.
    chat["stop_token_ids"] = [answer[2], 407, 409]
    (choice,) = client.post("/v1/chat/completions", json=chat).json()["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", answer[2])


def test_metadata_of_a_turn_is_in_glm4s_prompt(glm4: Tutorial) -> None:
    folder, client = glm4
    for metadata in ("", "browser", "browser " * 1000):
        history = [
            {"role": "user", "content": "你好"},
            {"role": "assistant", "metadata": metadata, "content": "好"},
        ]
        body = {"prompt": "谁", "history": history, "details": True, "max_new_tokens": 1, **GREEDY}
        answer = client.post("/", json=body)
        assert answer.status_code == (422 if len(metadata) > 1000 else 200)
        if answer.status_code == 200:
            ids = glm4_ids(folder, *history, {"role": "user", "content": "谁"})
            assert answer.json()["details"]["prompt_tokens"] == len(ids)
            assert answer.json()["history"][:2] == history


def test_openelm_completes_the_text_and_max_length_counts_it(
    openelm: Tutorial,
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


def test_every_token_that_is_no_text_counts_as_a_control_token(embedded_model: Path) -> None:
    found = engine._control_tokens(AutoTokenizer.from_pretrained(embedded_model))
    assert {"<|im_end|>", "<repo_name>", "<|endoftext|>"} <= found and "the" not in found


def test_openelm_reads_a_control_token_as_text(openelm: Tutorial) -> None:
    _, client = openelm
    body = {"prompt": "a</s>b", "max_new_tokens": 1, "details": True}
    answer = client.post("/", json=body).json()
    assert answer["response"].startswith("a</s>b")
    assert answer["details"]["prompt_tokens"] > 4


@pytest.fixture
def reasoner(servers: dict[str, Tutorial]) -> httpx.Client:
    return servers["qwen2"][1]


# In the second the template has written the opening tag: the answer begins behind it.
@pytest.mark.parametrize(("question", "opening"), [("go", "<think>"), ("begun", "")])
def test_reasoning_is_apart_from_the_answer_on_every_route(
    reasoner: httpx.Client, question: str, opening: str
) -> None:
    plain = reasoner.post("/", json={"prompt": question, "history": []}).json()
    assert plain["response"] == f"{opening}hm</think>Yes"
    assert (plain["think"], plain["answer"]) == ("hm", "Yes")
    assert plain["history"] == [[question, "Yes"]]
    deltas, whole = streamed(reasoner, {"prompt": question})
    assert "".join(deltas) == whole == plain["response"]

    messages = [{"role": "user", "content": question}]
    asked = {"model": "deepseek-r1-distill-qwen-7b", "max_tokens": 50}
    chat = asked | {"messages": messages}
    (choice,) = reasoner.post("/v1/chat/completions", json=chat).json()["choices"]
    assert (choice["message"]["reasoning"], choice["message"]["content"]) == ("hm", "Yes")
    lines = reasoner.post("/v1/chat/completions", json=chat | {"stream": True}).text.splitlines()
    pieces = [
        json.loads(line[6:])["choices"][0]["delta"]
        for line in lines
        if line and "[DONE]" not in line
    ]
    reasoning = "".join(piece.get("reasoning") or "" for piece in pieces)
    assert reasoning == "hm"
    assert "".join(piece.get("content") or "" for piece in pieces) == "Yes"

    kinds = {"reasoning": "hm", "message": "Yes"}
    body = {"model": asked["model"], "input": question, "max_output_tokens": 50}
    output = reasoner.post("/v1/responses", json=body).json()["output"]
    assert {item["type"]: item["content"][0]["text"] for item in output} == kinds
    content = reasoner.post("/v1/messages", json=chat).json()["content"]
    assert [block.get("thinking") or block.get("text") for block in content] == ["hm", "Yes"]


def test_an_opening_tag_that_comes_with_other_tokens_is_no_reasoning(tmp_path: Path) -> None:
    load_general_plugins()
    tokenizer = get_tokenizer(checkpoints.write_scripted(tmp_path, THOUGHT))
    ids = tokenizer.convert_tokens_to_ids(["<think>", "h"])

    def streamed_by(name: str) -> str:
        parser = ReasoningParserManager.get_reasoning_parser(name)(tokenizer)
        text = "<think>h"
        message = parser.extract_reasoning_streaming("", text, text, [], ids, ids)
        return str(message.reasoning)

    assert streamed_by("think_tags") == "h"
    assert streamed_by("deepseek_r1") == "<think>h"  # else ours is not needed
