"""What chapters of the book have beside the common contract: one server with all of it."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from service import model_config, prompting
from testing.server import Server
from tests import warm
from tests.conftest import MODEL, PATIENCE

SETS = {
    "engine.enforce_eager": "true",
    "aliases": "[Capital-Model]",
    "routes": "[/v1/chat]",
    "prompt.system": "You speak of capitals.",
    "prompt.greeting": "drop",
    "sampling.max_tokens": "24",
    "history.always": "true",
    "history.form": "roles",
    "history.metadata": "true",
    "answer.think": "['The', 'of']",  # words of the answer
}
FRANCE = "What is the capital of France?"
GREETING = {"role": "assistant", "content": "How can I help you?"}


@pytest.fixture(scope="module")
def chapter(tmp_path_factory: pytest.TempPathFactory, embedded_model: Path) -> Iterator[Server]:
    words = [word for key, value in SETS.items() for word in ("--set", f"{key}={value}")]
    with warm.Server.service(tmp_path_factory.mktemp("chapter") / "log", *words) as server:
        yield server


@pytest.fixture
def client(chapter: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=chapter.url, timeout=PATIENCE, trust_env=False) as client:
        yield client


def tokens(client: httpx.Client, **body: object) -> int:
    answer = client.post("/", json={"prompt": FRANCE, "details": True, **body}).json()
    return int(answer["details"]["prompt_tokens"])


@pytest.mark.parametrize("path", ["/", "/v1/chat"])
def test_the_history_comes_back_though_none_was_sent(client: httpx.Client, path: str) -> None:
    answer = client.post(path, json={"prompt": FRANCE}).json()
    assert list(answer) == ["response", "think", "answer", "history", "status", "time"]
    assert answer["history"] == [
        {"role": "user", "content": FRANCE},
        {"role": "assistant", "metadata": "", "content": answer["answer"]},
    ]
    began = client.post(path, json={"prompt": FRANCE, "history": []}).json()
    assert began["history"] == answer["history"]
    longer = client.post(path, json={"prompt": FRANCE, "history": [["hi", "ho"]]}).json()
    assert longer["history"] == [["hi", "ho"], [FRANCE, longer["answer"]]]


def test_reasoning_is_split_from_the_answer_and_in_a_stream_too(client: httpx.Client) -> None:
    whole = client.post("/", json={"prompt": FRANCE}).json()
    think, _, rest = whole["response"].partition("of")
    assert whole["think"] == think.removeprefix("The").strip() and whole["answer"] == rest.strip()
    streamed = client.post("/", json={"prompt": FRANCE, "stream": True}).text
    *deltas, last = [json.loads(line[6:]) for line in streamed.split("\n\n") if line]
    assert "".join(delta["delta"] for delta in deltas) == whole["response"]
    assert (last["think"], last["answer"]) == (whole["think"], whole["answer"])


def test_a_refusal_at_another_path_has_the_contracts_form(client: httpx.Client) -> None:
    refused = client.post("/v1/chat", json={})
    assert refused.status_code == 422 and refused.json()["response"] == ""
    assert client.get("/v1/chat").status_code == 404  # and says that `GET /` lists the routes
    assert client.get("/").json()["routes"]["/v1/chat"] == ["POST"]
    paths = client.get("/openapi.json").json()["paths"]
    assert paths["/v1/chat"]["post"]["requestBody"] == paths["/"]["post"]["requestBody"]
    answer = paths["/"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert {"think", "answer"} <= answer["properties"].keys()


def test_the_system_prompt_is_the_yamls_unless_the_client_has_one(
    client: httpx.Client,
) -> None:
    ours = tokens(client)
    own = tokens(client, history=[{"role": "system", "content": "You speak."}])
    assert own < ours
    user = {"role": "user", "content": FRANCE}
    for messages, expected in (
        ([user], ours),
        ([{"role": "system", "content": "You speak."}, user], own),
        ([GREETING, user], ours),
    ):
        body = {"model": MODEL, "messages": messages, "max_tokens": 1}
        made = client.post("/v1/chat/completions", json=body).json()
        assert made["usage"]["prompt_tokens"] == expected


def test_a_greeting_before_the_first_question_is_left_out(client: httpx.Client) -> None:
    assert tokens(client, history=[GREETING]) == tokens(client)
    answer = client.post("/", json={"prompt": FRANCE, "history": [GREETING]}).json()
    assert answer["history"][0] == GREETING  # the client's own turns come back


def test_another_name_is_served_and_a_wrong_one_is_told_both(chapter: Server) -> None:
    with openai.OpenAI(base_url=f"{chapter.url}/v1", api_key="EMPTY") as sdk:
        assert [model.id for model in sdk.models.list()] == [MODEL, "Capital-Model"]
        text = sdk.completions.create(model="Capital-Model", prompt="a", max_tokens=1)
        assert text.model == MODEL
        with pytest.raises(openai.NotFoundError, match=f"{MODEL}, Capital-Model"):
            sdk.completions.create(model="Capital", prompt="a", max_tokens=1)


@pytest.mark.parametrize(
    ("text", "finished", "think", "answer"),
    [
        ("<think>\nhm\n</think>\n\nYes.", True, "hm", "Yes."),
        ("hm\n</think>\n\nYes.", True, "hm", "Yes."),  # the template has written the opening tag
        ("Yes.", True, "", "Yes."),
        ("<think>hm", True, "hm", ""),
        ("hm", False, "hm", ""),  # cut short
        ("", True, "", ""),
        ("a</think>b</think>c", True, "a", "b</think>c"),
    ],
)
def test_a_tag_may_be_missing(text: str, finished: bool, think: str, answer: str) -> None:
    assert prompting.split_thinking(text, ["<think>", "</think>"], finished) == (think, answer)


@pytest.mark.parametrize(
    "pieces",
    [
        ["\n你好"],
        ["\n", " ", "", "你", "好"],
        ["你好", "\n", "\n", "再见", " ", "\n"],
        [" 你\n", " 好", "", " "],
        ["\n", " "],
        [""],
    ],
)
def test_white_space_around_an_answer_is_left_out_of_a_stream_as_well(pieces: list[str]) -> None:
    stripped = prompting.Stripped()
    last = len(pieces) - 1
    shown = [stripped.next(piece, is_last=i == last) for i, piece in enumerate(pieces)]
    assert "".join(shown) == "".join(pieces).strip()
    assert len(pieces) == 1 or not shown[-1] or shown[-1] == pieces[-1]  # nothing waits for the end


def test_the_catalogue_has_the_chapters_of_the_book() -> None:
    rows = model_config.listing()
    assert len({row["chapter"] for row in rows} - {""}) == 28
    assert {row["model"] for row in model_config.listing("GEMMA")} == {
        "gemma-2b-it",
        "gemma-2-9b-it",
    }
    assert not model_config.listing("no such word")


HELPFUL = "You are a helpful assistant."
# What clients of these chapters send, or leave to the server.
FIVE_KEYS = {"temperature": 0.95, "top_p": 0.7}
# The chapters' own values, by hand: new tokens, or tokens with the prompt; sampling; the system
# prompt (of InternLM2, how it begins); the history of each answer. Where a value is None the
# model's files decide.
BOOK: dict[str, tuple[str | None, dict[str, float], str | None, str | None]] = {
    "baichuan2-7b-chat": ("2048 new", {"temperature": 0.3, "top_p": 0.85, "top_k": 5}, None, None),
    "bluelm-7b-chat": (None, {}, None, None),
    "characterglm-6b": ("2048 in all", FIVE_KEYS, None, "pairs"),
    "chatglm3-6b": ("2048 in all", FIVE_KEYS, None, "roles, metadata"),
    "deepseek-coder-v2-lite-instruct": ("512 new", {}, HELPFUL, None),
    "deepseek-llm-7b-chat": (None, {}, None, None),
    "deepseek-moe-16b-chat": (None, {}, None, None),
    "deepseek-r1-distill-qwen-7b": ("8192 new", {}, None, None),
    "gemma-2-9b-it": (None, {}, None, None),  # the chapter's 150 cut answers off
    "gemma-2b-it": ("1024 new", {"temperature": 0.7, "top_k": 50, "top_p": 0.95}, None, None),
    "glm-4-9b-chat": ("2048 in all", FIVE_KEYS, None, "roles, metadata"),
    "index-1.9b-chat": (
        "1024 new",
        FIVE_KEYS | {"top_k": 5, "repetition_penalty": 1.1},
        None,
        "pairs",
    ),
    "internlm-chat-7b": ("1024 new", FIVE_KEYS, None, "pairs"),
    "internlm2-chat-7b": (
        "1024 new",
        {"temperature": 0.8, "top_p": 0.8},
        "You are an AI assistant whose name is InternLM",
        None,
    ),
    # Its temperature of 1 acts only where generation_config.json samples.
    "internlm3-8b-instruct": (
        "1024 new",
        {"top_k": 40, "top_p": 0.8, "repetition_penalty": 1.005},
        HELPFUL,
        None,
    ),
    "llama-3-8b-instruct": (
        "512 new",
        {"temperature": 0.5, "top_p": 0.9, "repetition_penalty": 1.1},
        None,
        None,
    ),
    "llama-3.1-8b-instruct": ("512 new", {}, HELPFUL, None),
    "minicpm-2b-sft": (
        None,
        {"temperature": 0.5, "top_p": 0.8, "repetition_penalty": 1.02},
        None,
        None,
    ),
    "openelm-3b-instruct": ("384 in all", {"temperature": 0}, None, None),
    "phi-3-mini-4k-instruct": ("2048 new", {"temperature": 0}, None, None),
    "phi-4": ("512 new", {}, None, "roles"),
    "qwen-7b-chat": (None, FIVE_KEYS, None, "pairs"),
    "qwen1.5-7b-chat": ("512 new", {}, HELPFUL, None),
    "qwen2-7b-instruct": ("512 new", {}, HELPFUL, None),
    "qwen2.5-7b-instruct": ("512 new", {}, HELPFUL, None),
    "qwen2.5-coder-7b-instruct": ("512 new", {}, HELPFUL, None),
    "xverse-7b-chat": (None, {}, None, None),
    "yi-6b-chat": (None, {}, None, None),
}
# What ends an answer beside the eos of the files.
STOPS = {
    "chatglm3-6b": ["<|user|>", "<|observation|>"],
    "gemma-2-9b-it": ["<end_of_turn>"],
    "gemma-2b-it": ["<end_of_turn>"],
    "glm-4-9b-chat": ["<|user|>", "<|observation|>"],
    "internlm-chat-7b": ["<eoa>"],
    "internlm2-chat-7b": ["<|im_end|>"],
    "internlm3-8b-instruct": ["<|im_end|>"],
    "llama-3-8b-instruct": ["<|eot_id|>"],
    "minicpm-2b-sft": ["<AI>", "<用户>"],
    "phi-3-mini-4k-instruct": ["<|endoftext|>", "<|assistant|>", "<|end|>"],
    "phi-4": ["<|im_end|>"],
    "qwen-7b-chat": ["<|im_start|>"],
    "yi-6b-chat": ["<|im_end|>"],
}


def test_each_model_has_the_values_of_its_chapter() -> None:
    configs = [model_config.load(name)[0] for name in model_config.catalogue()]
    assert {config.name for config in configs if config.about.chapter} == BOOK.keys()
    for config in configs:
        if not config.about.chapter:
            continue
        limit, sampling, system, history = BOOK[config.name]
        new, unit = config.sampling.max_tokens, "new"
        if default := config.max_length.default:
            new, unit = default, "new" if config.max_length.counts == "new_tokens" else "in all"
        assert (f"{new} {unit}" if new else None) == limit, config.name
        given = config.sampling.model_dump(exclude_none=True, exclude={"max_tokens", "stop"})
        assert given == sampling, config.name
        assert (config.sampling.stop or []) == STOPS.get(config.name, []), config.name
        prompt = config.prompt.system
        assert prompt == system or (system and prompt and prompt.startswith(system)), config.name
        metadata = ", metadata" * config.history.metadata
        returned = f"{config.history.form}{metadata}" if config.history.always else None
        assert returned == history, config.name


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("deepseek-r1-distill-qwen-7b", "DeepSeek-R1-Distill-Qwen-7B"),
        ("glm-4-9b-chat", "glm-4-9b-chat"),
        ("llama-3.1-8b-instruct", "Llama-3.1-8B-Instruct"),
        ("qwen1.5-7b-chat", "Qwen1.5-7B-Chat"),
        ("qwen2-7b-instruct", "Qwen2-7B-Instruct"),
        ("qwen2.5-7b-instruct", "Qwen2.5-7B-Instruct"),
        ("qwen2.5-coder-7b-instruct", "Qwen2.5-Coder-7B-Instruct"),
        ("qwen3-8b", "Qwen3-8B"),
    ],
)
def test_a_client_of_the_books_vllm_chapters_finds_its_model(model: str, name: str) -> None:
    config, _ = model_config.load(model)
    assert name in (config.name, *config.aliases)
