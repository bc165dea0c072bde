"""Prompts of ChatGLM, Qwen v1, InternLM and Index to the token id, on tiny files of their forms."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from vllm.tokenizers import get_tokenizer

from service import model_config
from testing import checkpoints
from tests.test_tokenizers import (
    FLAGS,
    TEXTS,
    assistant,
    load,
    model_of,
    streamed,
    system,
    user,
)

ALL = ("chatglm3", "characterglm", "glm4", "index", "internlm", "internlm2", "internlm3", "qwen")
SENTENCEPIECE = tuple(name for name in ALL if name not in ("glm4", "qwen"))
META = {"bot_name": "苏梦远", "user_name": "陆星辰", "bot_info": "歌手\n女", "user_info": ""}
# Strings that each format must keep as text.
SPELLED = {
    "chatglm3": "[gMASK]sop<|user|><|assistant|></s>",
    "characterglm": "[gMASK]sop</s>",
    "glm4": "<|endoftext|><|user|><sop><|assistant|>",
    "index": "<unk>reserved_0reserved_1</s>",
    "internlm": "<eoh><eoa></s><s>",
    "internlm2": "<|im_end|><|im_start|>[UNUSED_TOKEN_145]</s>",
    "internlm3": "<|im_end|><|im_start|>[UNUSED_TOKEN_145]</s>",
    "qwen": "<|im_end|><|im_start|><|endoftext|><|extra_0|>",
}


def mode(name: str) -> str:
    config, _ = model_config.load(checkpoints.CATALOGUE[name])
    return str(config.engine["tokenizer_mode"])


def options(name: str) -> dict[str, Any]:
    return {"session_meta": META} if name == "characterglm" else {}


def prompt(tokenizer: Any, name: str, *turns: dict[str, Any], **more: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(turns, **options(name), **more))


def reference(folder: Path, name: str) -> tiktoken.Encoding:
    """The publisher's engine on the file, without control tokens."""
    file = folder / ("qwen.tiktoken" if name == "qwen" else "tokenizer.model")
    lines = (line.split() for line in file.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    words = checkpoints.QWEN_WORDS
    if name == "glm4":
        words = words.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    return tiktoken.Encoding("a", pat_str=words, mergeable_ranks=ranks, special_tokens={})


@pytest.mark.parametrize("flags", FLAGS, ids=["plain", "prefix", "prefix and nfkc"])
@pytest.mark.parametrize("text", TEXTS)
def test_chatglm3_encodes_each_piece_alone(
    tmp_path: Path, text: str, flags: dict[str, Any]
) -> None:
    chatglm3 = load("chatglm3", tmp_path, "chatglm3", **flags)
    encode = model_of(chatglm3).encode
    size = len(model_of(chatglm3))
    gmask, sop, of_system, of_user, of_assistant = (size + i for i in (1, 3, 5, 6, 7))
    line = encode("\n")
    assert prompt(chatglm3, "chatglm3", system("S"), user(text), assistant("好的"), user("a")) == [
        *[gmask, sop, of_system, *line, *encode("S"), of_user, *line, *encode(text)],
        *[of_assistant, *line, *encode("好的"), of_user, *line, *encode("a"), of_assistant],
    ]
    assert chatglm3.encode("a") == [gmask, sop, *encode("a")]
    names = ["</s>", "<|user|>", "<|observation|>"]
    assert [chatglm3.get_vocab()[name] for name in names] == [2, of_user, size + 8]


@pytest.mark.parametrize("text", [*TEXTS, "\n你", "1234567 a's"])
def test_glm4_encodes_each_piece_alone(tmp_path: Path, text: str) -> None:
    glm4 = load("glm4", tmp_path, "glm4")
    encode = reference(tmp_path, "glm4").encode_ordinary
    line = encode("\n")
    assert prompt(glm4, "glm4", system("S"), user(text), assistant("好的"), user("a")) == [
        *[402, 404, 406, *line, *encode("S"), 407, *line, *encode(text)],
        *[408, *line, *encode("好的"), 407, *line, *encode("a"), 408],
    ]
    assert glm4.encode("a") == [402, 404, *encode("a")]
    assert glm4.decode(encode(text)) == text


@pytest.mark.parametrize("name", ["chatglm3", "glm4"])
def test_the_line_of_a_glm_turn_is_its_metadata(tmp_path: Path, name: str) -> None:
    tokenizer = load(name, tmp_path, mode(name))
    encode, id_of = tokenizer.encode_text, tokenizer.get_vocab().__getitem__
    turns: list[dict[str, Any]] = [user("a"), {**assistant("好"), "metadata": "browser"}, user("b")]
    ids = prompt(tokenizer, name, *turns)
    assert ids[2:] == [
        *[id_of("<|user|>"), *encode("\n"), *encode("a")],
        *[id_of("<|assistant|>"), *encode("browser\n"), *encode("好")],
        *[id_of("<|user|>"), *encode("\n"), *encode("b"), id_of("<|assistant|>")],
    ]
    assert prompt(tokenizer, name, *turns, truncate_to=len(ids)) == ids
    for metadata, message in ((["a"], "must be text"), ("\ud800", "half a character")):
        with pytest.raises(ValueError, match=message):
            prompt(tokenizer, name, {**user("a"), "metadata": metadata})


@pytest.mark.parametrize("text", [*TEXTS, "\n你", "1234567 a's"])
def test_qwen_encodes_role_newline_and_text_apart(tmp_path: Path, text: str) -> None:
    qwen = load("qwen", tmp_path, "qwen")
    encode = reference(tmp_path, "qwen").encode_ordinary
    start, end = 401, 402

    def turn(role: str, content: str) -> list[int]:
        return [start, *encode(role), *encode("\n"), *encode(content), end, *encode("\n")]

    answer = [start, *encode("assistant"), *encode("\n")]
    default = turn("system", "You are a helpful assistant.")
    assert prompt(qwen, "qwen", user(text)) == [*default, *turn("user", text), *answer]
    assert prompt(qwen, "qwen", system("S"), user("a"), assistant(text), user("b")) == [
        *[*turn("system", "S"), *turn("user", "a"), *turn("assistant", text)],
        *[*turn("user", "b"), *answer],
    ]
    assert qwen.eos_token_id == end
    assert qwen.encode("e\u0301") == encode("é")


@pytest.mark.parametrize("flags", FLAGS, ids=["plain", "prefix", "prefix and nfkc"])
@pytest.mark.parametrize("text", TEXTS)
def test_internlm_encodes_one_string(tmp_path: Path, text: str, flags: dict[str, Any]) -> None:
    internlm = load("internlm", tmp_path, "internlm", **flags)
    encode = model_of(internlm).encode
    assert prompt(internlm, "internlm", user(text), assistant("好的"), user("b")) == [
        1,
        *encode(f"<|User|>:{text}<eoh>\n<|Bot|>:好的<eoa>\n<|User|>:b<eoh>\n<|Bot|>:"),
    ]
    with pytest.raises(ValueError, match="no system messages"):
        prompt(internlm, "internlm", system("S"), user("a"))


@pytest.mark.parametrize(
    ("name", "flags"),
    [*(("internlm2", flags) for flags in FLAGS), ("internlm3", {})],
    ids=["plain", "prefix", "prefix and nfkc", "InternLM3"],
)
@pytest.mark.parametrize("text", TEXTS)
def test_internlm2_and_3_encode_between_control_tokens(
    tmp_path: Path, text: str, name: str, flags: dict[str, Any]
) -> None:
    tokenizer = load(name, tmp_path, "internlm2", **flags)
    model = model_of(tokenizer)
    end, start = (model.piece_to_id(f"[UNUSED_TOKEN_{i}]") for i in (145, 146))

    def turn(role: str, content: str) -> list[int]:
        return [start, *model.encode(f"{role}\n{content}"), end, *model.encode("\n")]

    assert prompt(tokenizer, name, system("S"), user(text), assistant("a"), user("b")) == [
        *[1, *turn("system", "S"), *turn("user", text), *turn("assistant", "a")],
        *[*turn("user", "b"), start, *model.encode("assistant\n")],
    ]
    assert tokenizer.get_vocab()["<|im_end|>"] == end


@pytest.mark.parametrize("flags", FLAGS, ids=["plain", "prefix", "prefix and nfkc"])
@pytest.mark.parametrize("text", TEXTS)
def test_index_begins_with_unk_and_encodes_one_string(
    tmp_path: Path, text: str, flags: dict[str, Any]
) -> None:
    index = load("index", tmp_path, "index", **flags)
    encode = model_of(index).encode
    assert prompt(index, "index", system("S"), user(text), assistant("好的"), user("b")) == [
        0,
        *encode(f"Sreserved_0{text}reserved_1好的reserved_0breserved_1"),
    ]
    assert prompt(index, "index", user(text)) == [0, *encode(f"reserved_0{text}reserved_1")]
    assert [index.marker_ids[marker] for marker in index.MARKERS] == [3, 4]


def test_index_refuses_a_published_template_that_writes_otherwise(tmp_path: Path) -> None:
    load("index", tmp_path, "index")
    file = tmp_path / "tokenizer_config.json"
    keys = json.loads(file.read_text())
    same = (
        "<unk>{% for m in messages %}{% if m.role == 'user' %}reserved_0{{ m.content }}reserved_1"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    file.write_text(json.dumps({**keys, "chat_template": same}))
    get_tokenizer(tmp_path, tokenizer_mode="index")
    other = same.removeprefix("<unk>")
    file.write_text(json.dumps({**keys, "chat_template": other, "model_max_length": 9}))
    get_tokenizer.__globals__["cached_resolve_tokenizer_args"].cache_clear()
    with pytest.raises(ValueError, match="writes a prompt as 'orchidreserved_0maple"):
        get_tokenizer(tmp_path, tokenizer_mode="index")


@pytest.mark.parametrize("text", ["你好", " 两行\n话 ", "a </s>"])
def test_characterglm_writes_who_talks_in_lines(tmp_path: Path, text: str) -> None:
    tokenizer = load("characterglm", tmp_path, "characterglm")
    model = model_of(tokenizer)
    line = text.strip().replace("\n", " ")
    expected = (
        "以下是一段苏梦远和陆星辰之间的对话。\n关于苏梦远的信息：歌手 女\n"
        f"[陆星辰]{line}\n[苏梦远]嗯\n[陆星辰]再见\n[苏梦远]"
    )
    assert prompt(tokenizer, "characterglm", user(text), assistant("嗯"), user("再见")) == [
        *[len(model) + 1, len(model) + 3],
        *model.encode(expected),
    ]


@pytest.mark.parametrize(
    "meta", [None, "a", {}, {"bot_name": "a"}, {"bot_name": "a", "user_name": ""}]
)
def test_characterglm_asks_for_its_persons(tmp_path: Path, meta: object) -> None:
    tokenizer = load("characterglm", tmp_path, "characterglm")
    with pytest.raises(ValueError, match="needs session_meta with bot_name and user_name"):
        tokenizer.apply_chat_template([user("a")], session_meta=meta)
    with pytest.raises(ValueError, match="half a character"):
        broken = {"bot_name": "\ud800", "user_name": "b"}
        tokenizer.apply_chat_template([user("a")], session_meta=broken)


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_a_key_for_llamas_class_takes_no_space_from_a_text(tmp_path: Path, name: str) -> None:
    plain = load(name, tmp_path / "plain", mode(name), add_dummy_prefix=True)
    checkpoints.TOKENIZERS[name](tmp_path, add_dummy_prefix=True)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "legacy": False}))
    told = get_tokenizer(tmp_path, tokenizer_mode=mode(name))
    assert told.encode("你好 a") == plain.encode("你好 a")
    assert prompt(told, name, user("a"), assistant("b"), user("c")) == prompt(
        plain, name, user("a"), assistant("b"), user("c")
    )


@pytest.mark.parametrize("name", ALL)
def test_control_tokens_in_a_message_stay_text(tmp_path: Path, name: str) -> None:
    tokenizer = load(name, tmp_path, mode(name))
    ids = {*tokenizer.all_special_ids, *getattr(tokenizer, "marker_ids", {}).values()}

    def rendered(text: str) -> list[int]:
        return prompt(tokenizer, name, user(text), assistant(text), user(text))

    plain, spelled = rendered("ab"), rendered(f"a{SPELLED[name]}b")
    assert [id for id in plain if id in ids] == [id for id in spelled if id in ids]
    assert tokenizer.decode(spelled).count(f"a{SPELLED[name]}b") == 3


@pytest.mark.parametrize("name", ALL)
def test_a_limit_drops_the_oldest_rounds_first(tmp_path: Path, name: str) -> None:
    tokenizer = load(name, tmp_path, mode(name))
    rounds = [[user(f"question {i}"), assistant(f"answer {i}")] for i in range(3)]

    def render(*turns: list[dict[str, str]], **more: Any) -> list[int]:
        return prompt(tokenizer, name, *(t for turn in turns for t in turn), **more)

    last = [user("你好")]
    whole = render(*rounds, last)
    assert render(*rounds, last, truncate_to=len(whole)) == whole
    fewer = render(*rounds[1:], last)
    cut = render(*rounds, last, truncate_to=len(fewer) + 3)
    # Where the published code encodes one string, a cut prompt is encoded by rounds.
    assert tokenizer.decode(cut).replace(" ", "") == tokenizer.decode(fewer).replace(" ", "")
    with pytest.raises(ValueError, match="has no tools"):
        render(last, tools=[{}])


@pytest.mark.parametrize("name", ALL)
def test_a_stream_never_shows_half_a_character(tmp_path: Path, name: str) -> None:
    tokenizer = load(name, tmp_path, mode(name))
    text = "你好龘靐😀👩‍👩‍👧🏔️ and ünïcode"
    pieces = streamed(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces).lstrip(" ") == text
    assert len([piece for piece in pieces if piece]) > 5


@pytest.mark.parametrize("name", ALL)
def test_control_tokens_are_no_text_of_an_answer(tmp_path: Path, name: str) -> None:
    """So `sampling.stop` of the YAML matches them by their ids."""
    tokenizer = load(name, tmp_path, mode(name))
    vocabulary = tokenizer.get_vocab()
    for token in {
        "chatglm3": ["<|user|>", "<|observation|>"],
        "glm4": ["<|user|>", "<|observation|>", "<|endoftext|>"],
        "internlm": ["<eoa>"],
        "internlm2": ["<|im_end|>"],
        "internlm3": ["<|im_end|>"],
        "qwen": ["<|im_start|>", "<|im_end|>"],
    }.get(name, []):
        assert tokenizer.decode([vocabulary[token]], skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    ("name", "id", "message"),
    [
        ("chatglm3", 448, "token 448 is '<.other.>'.*another model's"),
        ("glm4", 406, "token 406 is '<.other.>'.*another model's"),
        ("qwen", 402, "token 402 is '<.other.>'.*another model's"),
        ("glm4", 414, r"token 414 \('<.other.>'\) was added in training.*merge without it"),
        ("qwen", 608, r"token 608 \('<.other.>'\) was added in training.*merge without it"),
    ],
)
def test_files_that_number_a_control_token_otherwise_are_refused(
    tmp_path: Path, name: str, id: int, message: str
) -> None:
    load(name, tmp_path, name)
    token = {"content": "<|other|>", "special": True, "lstrip": False}
    keys = {
        "added_tokens_decoder": {str(id): token | dict.fromkeys(("rstrip", "normalized"), False)}
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(keys))
    with pytest.raises(ValueError, match=message):
        get_tokenizer(tmp_path, tokenizer_mode=name)


@pytest.mark.parametrize("name", ["glm4", "qwen"])
def test_null_says_that_no_token_was_added(tmp_path: Path, name: str) -> None:
    plain = load(name, tmp_path, name).encode("你好 a")
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": null}')
    assert get_tokenizer(tmp_path, tokenizer_mode=name, use_fast=True).encode("你好 a") == plain


@pytest.mark.parametrize("name", ["glm4", "qwen"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs\noid sha256:1\nsize 2\n", "not a tiktoken file; fetch it again"),
        (b"YQ== 0\nYg== 2\n", "lacks tokens; fetch it again"),
        (None, "has no .*; fetch it again"),
    ],
)
def test_files_that_are_no_tiktoken_file_are_told(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    load(name, tmp_path, name)
    file = tmp_path / ("qwen.tiktoken" if name == "qwen" else "tokenizer.model")
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        get_tokenizer(tmp_path, tokenizer_mode=name)
