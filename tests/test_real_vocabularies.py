"""Real vocabularies: ids against `tokenizers` piece by piece, and streams of real byte pieces."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Tokenizer
from vllm.plugins import load_general_plugins
from vllm.tokenizers import get_tokenizer

from service.model_config import load
from service.tokenizers.tokenizer_json import TEXTS, difference
from testing import checkpoints
from tests import vocabularies
from tests.test_tokenizers import assistant, streamed, system, user

Piece = ModelProto.SentencePiece
NAMES = ("llama3", "llama3_1", "qwen1_5", "qwen2_5", "qwen3", "yi")
STREAM = "你好，龘靐！😀👩‍👩‍👧🏔️ and ünïcode 𠮷野家"
Encode = Callable[[str], list[int]]


@cache
def opened(name: str) -> tuple[Path, Any, Encode]:
    """A vocabulary's folder, our tokenizer, and an encoder of single pieces of text."""
    load_general_plugins()
    folder = vocabularies.folder(name)
    ours = get_tokenizer(folder, tokenizer_mode="tokenizer_json")
    itself = Tokenizer.from_file(str(folder / "tokenizer.json"))
    itself.encode_special_tokens = True
    return folder, ours, lambda text: list(itself.encode(text, add_special_tokens=False).ids)


def conversations(text: str) -> list[list[dict[str, str]]]:
    three = [user(text), assistant("好的。"), user("Why?"), assistant(text), user(text)]
    greeted = [assistant("How can I help you?"), user(text)]  # as every WebDemo page begins
    return [[user(text)], three, [system(f"Be brief. {text}"), user(text)], greeted]


def chatml(
    id_of: Callable[[str], int],
    encode: Encode,
    turns: Sequence[dict[str, str]],
    default: str | None,
) -> list[int]:
    """ChatML by hand: control tokens by their ids, and what stands between them encoded alone."""
    start, end = map(id_of, ("<|im_start|>", "<|im_end|>"))
    if default is not None and turns[0]["role"] != "system":
        turns = [system(default), *turns]
    ids: list[int] = []
    for turn in turns:
        ids += [start, *encode(f"{turn['role']}\n{turn['content']}"), end, *encode("\n")]
    return [*ids, start, *encode("assistant\n")]


def llama(ours: Any, encode: Encode, turns: Sequence[dict[str, str]]) -> list[int]:
    names = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    begin, start, end, eot = ours.convert_tokens_to_ids(names)
    ids = [begin]
    for turn in turns:
        text = encode(f"\n\n{turn['content'].strip()}")
        ids += [start, *encode(turn["role"]), end, *text, eot]
    return [*ids, start, *encode("assistant"), end, *encode("\n\n")]


def rendered(ours: Any, turns: Sequence[dict[str, str]], **options: Any) -> list[int]:
    options = {"tokenize": False, "add_generation_prompt": True, **options}
    prompt = ours.apply_chat_template(turns, **options)
    if isinstance(prompt, list):
        return prompt
    return list(ours.encode(prompt, add_special_tokens=False))


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("qwen1_5", "You are a helpful assistant"),
        ("qwen2_5", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        ("qwen3", None),
    ],
)
def test_chatml_is_what_its_pieces_are(name: str, default: str | None) -> None:
    _, ours, encode = opened(name)
    for text in TEXTS:
        for turns in conversations(text):
            expected = chatml(ours.convert_tokens_to_ids, encode, turns, default)
            assert rendered(ours, turns) == expected, turns
            spelled = [{**turn, "content": f"{turn['content']}<|im_end|>"} for turn in turns]
            expected = chatml(ours.convert_tokens_to_ids, encode, spelled, default)
            assert rendered(ours, spelled) == expected, spelled


def test_llama_3_is_what_its_pieces_are() -> None:
    """Not of 3.1: its package has an early template."""
    _, ours, encode = opened("llama3")
    for text in TEXTS:
        for turns in conversations(text):
            assert rendered(ours, turns) == llama(ours, encode, turns), turns


def test_deepseeks_control_tokens_stay_text_in_a_message_though_they_are_not_special() -> None:
    _, ours, _ = opened("deepseek_v3")
    template = "{% for m in messages %}<｜User｜>{{ m.content }}{% endfor %}<｜Assistant｜>"
    spelled = "a<｜Assistant｜>b<｜User｜>c"
    ids = rendered(ours, [user(spelled)], chat_template=template)
    known = ours.convert_tokens_to_ids(["<｜User｜>", "<｜Assistant｜>"])
    assert [ids.count(id) for id in known] == [1, 1]
    assert spelled in ours.decode(ids)


def test_deepseeks_template_takes_a_greeting_as_a_turn() -> None:
    _, ours, _ = opened("deepseek_v3")
    ids = rendered(ours, [assistant("How can I help you?"), user("你好")])
    assert ours.decode(ids).endswith(
        "<｜Assistant｜>How can I help you?<｜end▁of▁sentence｜><｜User｜>你好<｜Assistant｜>"
    )


def test_qwen3s_template_leaves_old_reasoning_out() -> None:
    _, ours, _ = opened("qwen3")
    thought = assistant("<think>\nhm\n</think>\n\nYes.")
    for question in ("Why?", "Why<|im_end|>"):
        short = rendered(ours, [user(question), assistant("Yes."), user("b")])
        assert rendered(ours, [user(question), thought, user("b")]) == short


def test_yi_needs_the_mode_that_reads_tokenizer_json() -> None:
    """Yi's model adds no space in front of a text, and LlamaTokenizer does (was unconfirmed)."""
    folder, ours, encode = opened("yi")
    assert difference(get_tokenizer(folder), folder) == TEXTS[0]
    assert ours.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [6, 7]
    for text in TEXTS:
        assert list(ours.encode(text, add_special_tokens=False)) == encode(text)


def with_control_tokens(folder: Path, made: Path, tokens: dict[str, int]) -> None:
    """Copy a vocabulary, with these pieces of it as control tokens: what the chat model adds."""
    content = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    known = config.setdefault("added_tokens_decoder", {})
    for token, id in tokens.items():
        assert content["model"]["vocab"][token] == id
        added = {"content": token, "special": True, **flags}
        content["added_tokens"].append({"id": id, **added})
        known[str(id)] = added
    (made / "tokenizer.json").write_text(json.dumps(content))
    (made / "tokenizer_config.json").write_text(json.dumps(config))


def test_yi_s_chat_is_what_its_pieces_are(tmp_path: Path) -> None:
    folder, _, encode = opened("yi")
    ids = {"<|im_start|>": 6, "<|im_end|>": 7}
    with_control_tokens(folder, tmp_path, ids)
    ours = get_tokenizer(tmp_path, tokenizer_mode="tokenizer_json")
    template = load("yi-6b-chat")[0].prompt.template
    for text in (*TEXTS, "<|im_end|>"):
        for turns in conversations(text):
            expected = chatml(ids.__getitem__, encode, turns, None)
            assert rendered(ours, turns, chat_template=template) == expected, turns


def test_gemma_is_what_its_pieces_are(tmp_path: Path) -> None:
    """With the format of Google's documentation, for the package has no chat template."""
    folder, _, encode = opened("gemma")
    bos, start, end = 2, 106, 107
    with_control_tokens(folder, tmp_path, {"<start_of_turn>": start, "<end_of_turn>": end})
    ours = get_tokenizer(tmp_path, tokenizer_mode="literal")
    template = (
        "{{ bos_token }}{% for turn in messages %}<start_of_turn>"
        "{{ 'model' if turn.role == 'assistant' else 'user' }}\n{{ turn.content | trim }}"
        "<end_of_turn>\n{% endfor %}{{ '<start_of_turn>model\n' }}"
    )
    for text in (*TEXTS, "<end_of_turn><bos>"):
        for turns in conversations(text)[:2]:  # it takes no system turn
            expected = [bos]
            for turn in turns:
                role = "model" if turn["role"] == "assistant" else "user"
                content = encode(f"{role}\n{turn['content'].strip()}")
                expected += [start, *content, end, *encode("\n")]
            expected += [start, *encode("model\n")]
            assert rendered(ours, turns, chat_template=template) == expected, turns
    pieces = streamed(ours, encode(STREAM))
    assert "".join(pieces) == STREAM and not any("\ufffd" in piece for piece in pieces)


def test_baichuan2_on_its_real_vocabulary(tmp_path: Path) -> None:
    folder = vocabularies.folder("baichuan2")
    load_general_plugins()
    sentencepiece_of(folder, tmp_path, dummy_prefix=False)
    baichuan2 = get_tokenizer(tmp_path, tokenizer_mode="baichuan2")
    content = json.loads((folder / "tokenizer.json").read_text())
    # The conversion's, which the model does not have.
    assert content["normalizer"]["normalizers"].pop(0)["type"] == "Prepend"
    itself = Tokenizer.from_str(json.dumps(content))
    itself.encode_special_tokens = True

    def encode(text: str) -> list[int]:
        return list(itself.encode(text, add_special_tokens=False).ids)

    ids = {"user": [195], "assistant": [196], "system": []}
    for text in (*TEXTS, "<reserved_106></s>"):
        for turns in conversations(text):
            expected = [id for t in turns for id in (*ids[t["role"]], *encode(t["content"]))]
            assert baichuan2.apply_chat_template(turns) == [*expected, 196], turns
    pieces = streamed(baichuan2, encode(STREAM))
    assert "".join(pieces) == STREAM and not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", NAMES)
def test_the_mode_gives_the_ids_of_the_file_and_others_only_where_told(name: str) -> None:
    folder, ours, encode = opened(name)
    for text in TEXTS:
        assert list(ours.encode(text, add_special_tokens=False)) == encode(text)
    if name != "yi":
        assert difference(get_tokenizer(folder), folder) is None


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_of_real_pieces_never_shows_half_a_character(name: str) -> None:
    _, ours, encode = opened(name)
    pieces = streamed(ours, encode(STREAM))
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == STREAM
    assert len([piece for piece in pieces if piece]) > 10


def test_qwen_v1_on_its_real_vocabulary(tmp_path: Path) -> None:
    """Qwen1.5's first 151,643 tokens are qwen.tiktoken's: written so, the ids are Qwen1.5's."""
    folder, qwen15, encode = opened("qwen1_5")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(vocabulary) == 151643
    checkpoints.write_ranks(
        tmp_path / "qwen.tiktoken", sorted(vocabulary, key=vocabulary.__getitem__)
    )
    qwen = get_tokenizer(tmp_path, tokenizer_mode="qwen")
    start, end = 151644, 151645

    def turn(role: str, text: str) -> list[int]:
        return [start, *encode(role), *encode("\n"), *encode(text), end, *encode("\n")]

    for text in (*TEXTS, "<|im_end|>"):
        assert list(qwen.encode(text, add_special_tokens=False, split_special_tokens=True)) == (
            encode(text)
        )
        for turns in conversations(text):
            said = [(turn["role"], turn["content"]) for turn in turns]
            if said[0][0] != "system":
                said.insert(0, ("system", "You are a helpful assistant."))
            expected = [id for one in said for id in turn(*one)]
            expected += [start, *encode("assistant"), *encode("\n")]
            assert list(qwen.apply_chat_template(turns)) == expected, turns
    apart = qwen.apply_chat_template([user("\n你")])
    assert apart != rendered(qwen15, [system("You are a helpful assistant."), user("\n你")])
    pieces = streamed(qwen, encode(STREAM))
    assert "".join(pieces) == STREAM and not any("\ufffd" in piece for piece in pieces)


def sentencepiece_of(folder: Path, made: Path, *, dummy_prefix: bool) -> None:
    """Write the tokenizer.model that a tokenizer.json was converted from: its merges are ranked."""
    content = json.loads((folder / "tokenizer.json").read_text())["model"]
    vocabulary = content["vocab"]
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(content["merges"]):
        merged = "".join(pair if isinstance(pair, list) else pair.split(" "))
        ranks.setdefault(merged, rank)
    model = ModelProto()
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = len(vocabulary)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = dummy_prefix
    model.normalizer_spec.remove_extra_whitespaces = False
    for id, text in enumerate(sorted(vocabulary, key=vocabulary.__getitem__)):
        kind = Piece.NORMAL
        if id < 3:
            kind = Piece.UNKNOWN if id == 0 else Piece.CONTROL
        elif len(text) == 6 and text.startswith("<0x"):
            kind = Piece.BYTE
        elif text.startswith("[UNUSED_TOKEN_"):
            kind = Piece.USER_DEFINED
        score = -float(ranks.get(text, len(content["merges"])))
        model.pieces.add(piece=text, score=score, type=kind)
    (made / "tokenizer.model").write_bytes(model.SerializeToString())
    config = (folder / "tokenizer_config.json").read_text()
    (made / "tokenizer_config.json").write_text(config)


def test_chatglm3_on_its_real_vocabulary(tmp_path: Path) -> None:
    folder = vocabularies.folder("chatglm3")
    load_general_plugins()
    sentencepiece_of(folder, tmp_path, dummy_prefix=True)
    chatglm3 = get_tokenizer(tmp_path, tokenizer_mode="chatglm3")
    itself = Tokenizer.from_file(str(folder / "tokenizer.json"))
    itself.encode_special_tokens = True

    def encode(text: str) -> list[int]:
        return list(itself.encode(text, add_special_tokens=False).ids)

    ids = {"system": 64794, "user": 64795, "assistant": 64796}
    for text in (*TEXTS, "<|user|>sop</s>"):
        for turns in conversations(text):
            expected = [64790, 64792]
            for turn in turns:
                expected += [ids[turn["role"]], 30910, 13, *encode(turn["content"])]
            assert chatglm3.apply_chat_template(turns) == [*expected, 64796], turns
    pieces = streamed(chatglm3, encode(STREAM))
    assert "".join(pieces).lstrip(" ") == STREAM and not any("\ufffd" in p for p in pieces)


def test_internlm2_on_its_real_vocabulary_without_tokenizer_json(tmp_path: Path) -> None:
    folder = vocabularies.folder("internlm2")
    load_general_plugins()
    # Its tokenizer.json names the control tokens' pieces otherwise: 92549 would be no token.
    with pytest.raises(ValueError, match=r"is 92538 in tokenizer_config\.json and becomes 925"):
        get_tokenizer(folder, tokenizer_mode="tokenizer_json")
    sentencepiece_of(folder, tmp_path, dummy_prefix=False)
    # Whatever vLLM has for the model type, the mode decides.
    (tmp_path / "config.json").write_text('{"model_type": "internlm2"}')
    internlm2 = get_tokenizer(tmp_path, tokenizer_mode="internlm2")
    itself = Tokenizer.from_file(str(folder / "tokenizer.json"))
    itself.encode_special_tokens = True

    def encode(text: str) -> list[int]:
        return list(itself.encode(text, add_special_tokens=False).ids)

    ids = {"<|im_start|>": 92543, "<|im_end|>": 92542}
    for text in (*TEXTS, "<|im_end|></s>"):
        for turns in conversations(text):
            expected = [1, *chatml(ids.__getitem__, encode, turns, None)]
            assert internlm2.apply_chat_template(turns) == expected, turns
    pieces = streamed(internlm2, encode(STREAM))
    assert "".join(pieces) == STREAM and not any("\ufffd" in piece for piece in pieces)


def test_facts_that_the_files_settle() -> None:
    def normalizers(name: str) -> list[Any]:
        file = vocabularies.folder(name) / "tokenizer.json"
        return list(json.loads(file.read_text())["normalizer"]["normalizers"])

    prepends = {name: normalizers(name)[0]["type"] for name in ("chatglm3", "internlm2", "yi")}
    assert prepends == {"chatglm3": "Prepend", "internlm2": "Replace", "yi": "Replace"}
    chatglm3 = json.loads((vocabularies.folder("chatglm3") / "tokenizer.json").read_text())
    assert len(chatglm3["model"]["vocab"]) == 64789
    config = json.loads((vocabularies.folder("chatglm3") / "tokenizer_config.json").read_text())
    added = {int(id): token["content"] for id, token in config["added_tokens_decoder"].items()}
    assert added == {64790: "[gMASK]", 64792: "sop", 64795: "<|user|>", 64796: "<|assistant|>"}
    itself = Tokenizer.from_file(str(vocabularies.folder("chatglm3") / "tokenizer.json"))
    assert itself.encode("\n", add_special_tokens=False).ids == [30910, 13]  # the metadata line
    internlm2 = json.loads((vocabularies.folder("internlm2") / "tokenizer.json").read_text())
    assert internlm2["model"]["vocab"]["[UNUSED_TOKEN_146]"] == 92543
