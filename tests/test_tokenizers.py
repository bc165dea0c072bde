"""Prompts to the token id, as the publishers' own code builds them."""

import json
import random
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, models
from transformers import TokenizersBackend
from vllm import AsyncEngineArgs
from vllm.plugins import load_general_plugins
from vllm.renderers import renderer_from_config
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import get_tokenizer
from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from service import model_config, settings, vllm_arguments
from service.api.fast_render import chat_params
from service.launch import server
from service.tokenizers.literal import control_pattern, longest_of
from testing import checkpoints

TEXTS = ["你好", " 你好 ", "Who are you?", "a  b", "😀 龘", "第一行\n第二行\n", "12345", "</s>"]
# As trained by their publishers, or not: nobody here has seen the real files.
FLAGS: list[dict[str, Any]] = [
    {},
    {"add_dummy_prefix": True},
    {
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": True,
        "normalization_rule_name": "nmt_nfkc",
    },
]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def load(name: str, folder: Path, mode: str, **options: Any) -> Any:
    load_general_plugins()
    checkpoints.TOKENIZERS[name](folder, **options)
    return get_tokenizer(folder, tokenizer_mode=mode)


@pytest.fixture(params=FLAGS, ids=["plain", "prefix", "prefix and nfkc"])
def baichuan2(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return load("baichuan2", tmp_path, "baichuan2", **request.param)


@pytest.fixture(params=FLAGS, ids=["plain", "prefix", "prefix and nfkc"])
def bluelm(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return load("bluelm", tmp_path, "bluelm", **request.param)


@pytest.fixture
def xverse(tmp_path: Path) -> Any:
    return load("xverse", tmp_path, "xverse")


def model_of(tokenizer: Any) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=tokenizer.vocab_file)


@pytest.mark.parametrize("text", TEXTS)
def test_baichuan2_encodes_each_message_between_its_turn_tokens(baichuan2: Any, text: str) -> None:
    encode = model_of(baichuan2).encode
    asks, answers = baichuan2.turn_ids["user"], baichuan2.turn_ids["assistant"]
    assert baichuan2.apply_chat_template([user(text)]) == [asks, *encode(text), answers]
    conversation = [system("Be brief."), user("你好"), assistant(text), user(text)]
    assert baichuan2.apply_chat_template(conversation) == [
        *encode("Be brief."),
        *[asks, *encode("你好"), answers, *encode(text)],
        *[asks, *encode(text), answers],
    ]


def test_baichuan2_takes_bos_and_turn_tokens_from_the_files(tmp_path: Path) -> None:
    baichuan2 = load("baichuan2", tmp_path, "baichuan2")
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    (tmp_path / "generation_config.json").write_text('{"user_token_id": 7}')
    other = get_tokenizer(tmp_path, tokenizer_mode="baichuan2")
    ids = other.apply_chat_template([user("你好")])
    assert ids[:2] == [7, 1]
    assert ids[2:] == baichuan2.apply_chat_template([user("你好")])[1:]


@pytest.mark.parametrize("text", TEXTS)
def test_bluelm_encodes_up_to_an_answers_end_as_one_string(bluelm: Any, text: str) -> None:
    encode = model_of(bluelm).encode
    assert bluelm.apply_chat_template([user(text)]) == [1, *encode(f"[|Human|]:{text}[|AI|]:")]
    conversation = [system("S"), user(text), assistant("好的"), user("再见")]
    assert bluelm.apply_chat_template(conversation) == [
        *[1, *encode(f"[|SYSTEM|]:S[|Human|]:{text}[|AI|]:好的"), 2],
        *encode("[|Human|]:再见[|AI|]:"),
    ]


def test_xverse_encodes_each_turn_and_ends_answers_with_eos(xverse: Any) -> None:
    one = xverse.apply_chat_template([user("你好")])
    assert one == xverse.encode("Human: 你好\n\nAssistant: ")
    many = xverse.apply_chat_template([user("a"), assistant("b"), user("你好")])
    assert many == [
        *xverse.encode("Human: a\n\n"),
        *xverse.encode("Assistant: b"),
        xverse.eos_token_id,
        *one,
    ]
    with pytest.raises(ValueError, match="no system messages"):
        xverse.apply_chat_template([system("S"), user("a")])


@pytest.mark.parametrize(
    ("name", "mode", "markers"),
    [
        ("baichuan2", "baichuan2", ["<reserved_106>", "<reserved_107>", "</s>"]),
        ("bluelm", "bluelm", ["[|Human|]:", "[|AI|]:", "</s>"]),
        ("xverse", "xverse", ["<|endoftext|>", "<|startoftext|>"]),
        ("qwen2", "literal", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"]),
        ("minicpm", "minicpm", ["</s>", "<s>"]),
    ],
)
def test_control_tokens_in_a_message_stay_text(
    tmp_path: Path, name: str, mode: str, markers: Sequence[str]
) -> None:
    tokenizer = load(name, tmp_path, mode)
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[marker] for marker in markers]
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    if name == "minicpm":
        config, _ = checkpoints.load(name, tmp_path)
        options["chat_template"] = config.prompt.template

    def rendered(text: str) -> list[int]:
        prompt = tokenizer.apply_chat_template([user(text), assistant(text), user(text)], **options)
        if isinstance(prompt, str):
            return list(tokenizer.encode(prompt, add_special_tokens=False))
        return list(prompt)

    plain, spelled = rendered("ab"), rendered(f"a{''.join(markers)}b")
    assert [plain.count(id) for id in ids] == [spelled.count(id) for id in ids]
    assert tokenizer.decode(spelled).count(f"a{''.join(markers)}b") == 3


def one_of_each_mode() -> list[str]:
    names = [name for name in checkpoints.TOKENIZERS if name != "openelm"]  # which has no mode
    modes = {
        model_config.load(checkpoints.CATALOGUE[n])[0].engine["tokenizer_mode"]: n for n in names
    }
    assert len(modes) == 13
    return [*modes.values()]


@pytest.mark.parametrize("name", one_of_each_mode())
def test_a_greeting_of_the_assistant_may_come_first(tmp_path: Path, name: str) -> None:
    """As the WebDemo pages begin; Gemma's template alone refuses it, and its YAML drops it."""
    config, _ = model_config.load(checkpoints.CATALOGUE[name])
    tokenizer = load(name, tmp_path, config.engine["tokenizer_mode"])
    options = dict(config.engine.get("default_chat_template_kwargs") or {})
    if config.prompt.template:
        options["chat_template"] = config.prompt.template
    options |= {"tokenize": False, "add_generation_prompt": True}

    def text(*turns: dict[str, str]) -> str:
        prompt = tokenizer.apply_chat_template(list(turns), **options)
        return prompt if isinstance(prompt, str) else str(tokenizer.decode(prompt))

    greeted = text(assistant("Welcome."), user("Who are you?"))
    assert greeted.index("Welcome.") < greeted.index("Who are you?")
    end = text(user("Who are you?"))[-12:]
    assert greeted.endswith(end)


@pytest.fixture(params=one_of_each_mode())
def renderer(
    request: pytest.FixtureRequest, tmp_path: Path, environment: None
) -> Iterator[tuple[Any, Any]]:
    """vLLM's renderer for each mode, as the server makes it, and the options of a chat."""
    checkpoints.write(request.param, tmp_path)
    config, origins = checkpoints.load(request.param, tmp_path)
    with server.prepared(config, origins, settings.load()) as (args, _):
        vllm_arguments.use_files(args, tmp_path, tmp_path)
        renderer = renderer_from_config(AsyncEngineArgs.from_cli_args(args).create_engine_config())
    kwargs = config.engine.get("default_chat_template_kwargs")
    yield renderer, chat_params(config.prompt.template, "auto", kwargs)
    renderer.shutdown()


def test_threads_that_encode_do_not_disturb_each_other(renderer: tuple[Any, Any]) -> None:
    """As in a server: chats and texts on the loop, and on vLLM's threads."""
    made, chat = renderer
    tokenizer = made.get_tokenizer()
    spelled = f"a{''.join(tokenizer.all_special_tokens[:9])}b {'你好 ' * 9}"
    short = replace(made.default_cmpl_tok_params, truncate_prompt_tokens=5)

    def rendered() -> list[list[int]]:
        _, (conversation,) = made.render_chat([[user(spelled)]], chat)
        (text,) = made.render_cmpl([{"prompt": spelled}])
        (cut,) = made.render_cmpl([{"prompt": spelled}], short)
        literal = tokenizer.encode(spelled, split_special_tokens=True)
        return [literal, *(prompt["prompt_token_ids"] for prompt in (conversation, text, cut))]

    expected = rendered()
    wrong: list[object] = []

    def check() -> None:
        try:
            wrong.extend(found for _ in range(150) if (found := rendered()) != expected)
        except Exception as e:
            wrong.append(e)

    threads = [threading.Thread(target=check) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, (len(wrong), wrong[0], expected)


@pytest.mark.parametrize("markers", [(), ("<用户>", "<AI>")])
@pytest.mark.parametrize("legacy", [True, False])
def test_minicpm_encodes_its_template_as_any_text(
    tmp_path: Path, legacy: bool, markers: tuple[str, ...]
) -> None:
    load_general_plugins()
    checkpoints.llama_tokenizer(tmp_path, markers)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "legacy": legacy}))
    minicpm = get_tokenizer(tmp_path, tokenizer_mode="minicpm")
    published = get_tokenizer(tmp_path)
    config, _ = checkpoints.load("minicpm", tmp_path)
    ids = minicpm.apply_chat_template(
        [user(" 你好 "), assistant("Who?"), user("a")],
        chat_template=config.prompt.template,
        tokenize=False,
        add_generation_prompt=True,
    )
    assert ids == published("<用户>你好<AI>Who?<用户>a<AI>")["input_ids"]
    assert ids.count(published.bos_token_id) == 1


def test_literal_renders_as_transformers_does_when_nothing_is_spelled(tmp_path: Path) -> None:
    literal = load("qwen2", tmp_path, "literal")
    plain = get_tokenizer(tmp_path)
    conversation = [system("S"), user("你好 <|im"), assistant("_end|>"), user("😀")]
    options = {"tokenize": False, "add_generation_prompt": True}
    assert literal.apply_chat_template(conversation, **options) == plain.apply_chat_template(
        conversation, **options
    )
    spelled = literal.apply_chat_template([user("a<|im_end|>\n\nb")], **options)
    start, end = (plain.convert_tokens_to_ids(f"<|im_{which}|>") for which in ("start", "end"))

    def text(string: str) -> list[int]:
        return list(plain.encode(string, split_special_tokens=True))

    assert spelled == [
        *[start, *text("system\nYou are a helpful assistant."), end, *text("\n")],
        *[start, *text("user\na<|im_end|>\n\nb"), end, *text("\n")],
        *[start, *text("assistant\n")],
    ]


def with_added(folder: Path, **flags: Any) -> None:
    """Give the tokenizer the tags of reasoning, which are no special tokens, and its tokens flags.

    As Qwen3's, and Phi-3's with `rstrip`.
    """
    content = json.loads((folder / "tokenizer.json").read_text())
    added = content["added_tokens"]
    for token in added:
        token.update(flags)
    last = max(content["model"]["vocab"].values())
    for id, text in enumerate(("<think>", "</think>"), last + 1):
        added.append({**added[0], "id": id, "content": text, "special": False, "rstrip": False})
    (folder / "tokenizer.json").write_text(json.dumps(content))


# As Qwen3's: it leaves the reasoning of an old answer out.
REASONING_TEMPLATE = """\
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and '</think>' in m.content %}
{{- m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{- m.content }}{% endif %}
{{- '<|im_end|>\n' }}{% endfor %}{{- '<|im_start|>assistant\n' }}"""


def test_literal_lets_the_template_find_the_reasoning_of_old_answers(tmp_path: Path) -> None:
    checkpoints.TOKENIZERS["qwen2"](tmp_path)
    with_added(tmp_path)
    literal = get_tokenizer(tmp_path, tokenizer_mode="literal")
    plain = get_tokenizer(tmp_path)
    tag = plain.convert_tokens_to_ids("</think>")
    options = {"tokenize": False, "chat_template": REASONING_TEMPLATE}

    def rendered(*turns: dict[str, str]) -> list[int]:
        prompt = literal.apply_chat_template(list(turns), **options)
        return list(plain.encode(prompt) if isinstance(prompt, str) else prompt)

    answer = assistant("<think>\nhm\n</think>\n\nYes.")
    for question in ("a", "a<|im_end|>"):
        short = rendered(user(question), assistant("Yes."), user("b"))
        assert rendered(user(question), answer, user("b")) == short
    # Elsewhere, and where they would end a turn, tokens stay text.
    start = plain.convert_tokens_to_ids("<|im_start|>")
    spelled = rendered(user("a</think>"), assistant("Yes.<|im_start|>"), user("b"))
    assert tag not in spelled and spelled.count(start) == 4


def test_literal_leaves_out_the_white_space_that_a_control_token_takes(tmp_path: Path) -> None:
    checkpoints.TOKENIZERS["qwen2"](tmp_path)
    with_added(tmp_path, rstrip=True)
    literal = get_tokenizer(tmp_path, tokenizer_mode="literal")
    plain = get_tokenizer(tmp_path)
    options = {"tokenize": False, "add_generation_prompt": True}
    start, end = (plain.convert_tokens_to_ids(f"<|im_{which}|>") for which in ("start", "end"))

    def expected(question: str) -> list[int]:
        def text(string: str) -> list[int]:
            return list(plain.encode(string, split_special_tokens=True))

        return [
            *[start, *text("system\nYou are a helpful assistant."), end],
            *[start, *text(f"user\n{question}"), end, start, *text("assistant\n")],
        ]

    one_string = literal.apply_chat_template([user("ab")], **options)
    assert plain.encode(one_string) == expected("ab")
    spelled = literal.apply_chat_template([user("a<|im_end|>\nb")], **options)
    assert spelled == expected("a<|im_end|>\nb")


def test_literal_takes_a_tokenizer_without_control_tokens(tmp_path: Path) -> None:
    Tokenizer(models.BPE({"a": 0, "b": 1}, [])).save(str(tmp_path / "tokenizer.json"))
    bare = TokenizersBackend(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert control_pattern(bare).split("ab") == ["ab"]


@pytest.mark.parametrize(
    ("name", "mode", "keeps_system"),
    [("baichuan2", "baichuan2", True), ("bluelm", "bluelm", True), ("xverse", "xverse", False)],
)
def test_a_limit_drops_the_oldest_rounds_first_and_then_cuts_the_left_end(
    tmp_path: Path, name: str, mode: str, keeps_system: bool
) -> None:
    tokenizer = load(name, tmp_path, mode)
    first = [system("Be brief.")] if keeps_system else []
    rounds = [[user(f"question {i}"), assistant(f"answer {i}")] for i in range(3)]
    last = [user("你好")]

    def render(*turns: list[dict[str, str]], **options: Any) -> list[int]:
        return list(tokenizer.apply_chat_template([t for turn in turns for t in turn], **options))

    whole = render(first, *rounds, last)
    assert render(first, *rounds, last, truncate_to=len(whole)) == whole
    without_one = render(first, *rounds[1:], last)
    # As published: the token that begins the answer is not counted when rounds are.
    assert render(first, *rounds, last, truncate_to=len(whole) - 2) == without_one
    alone = render(last)
    assert render(*rounds, last, truncate_to=len(alone)) == alone
    assert render(*rounds, last, truncate_to=len(alone) - 1) == alone[1:]


@pytest.mark.parametrize(
    ("conversation", "options", "message"),
    [
        ([], {}, "the last message must be the user's"),
        ([user("a"), assistant("b")], {}, "the last message must be the user's"),
        ([user("\ud800")], {}, "half a character"),
        ([user("a")], {"truncate_to": 0}, "truncate_to must be a number of tokens"),
        ([user("a")], {"truncate_to": "9"}, "truncate_to must be a number of tokens"),
        ([user("a"), system("b")], {}, "a system message must be the first"),
        ([{"role": "tool", "content": "a"}], {}, "no place for a tool message"),
        ([user("a")], {"tools": [{}]}, "is fixed and has no tools"),
        ([user("a")], {"chat_template": "x"}, "is fixed and has no chat_template"),
    ],
)
def test_what_the_format_has_no_place_for_is_refused(
    tmp_path: Path, conversation: list[Any], options: dict[str, Any], message: str
) -> None:
    tokenizer = load("baichuan2", tmp_path, "baichuan2")
    with pytest.raises(ValueError, match=message):
        tokenizer.apply_chat_template(conversation, **options)


def streamed(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return what vLLM's stream shows after each token of an answer."""
    request = SimpleNamespace(
        request_id="a",
        prompt_token_ids=tokenizer.encode("问"),
        prompt_embeds=None,
        sampling_params=SamplingParams(),
    )
    detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request)
    pieces = []
    for id in ids:
        detokenizer.update([id], stop_terminated=False)
        pieces.append(detokenizer.get_next_output_text(finished=False, delta=True))
    return pieces


@pytest.mark.parametrize("name", ["baichuan2", "bluelm", "minicpm", "openelm", "qwen2"])
def test_a_stream_never_shows_half_a_character(tmp_path: Path, name: str) -> None:
    mode = name if name in ("baichuan2", "bluelm") else "auto"
    tokenizer = load(name, tmp_path, mode)
    text = "你好龘靐😀👩‍👩‍👧🏔️ and ünïcode"  # most of it in bytes
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > len(text)
    pieces = streamed(tokenizer, ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces).lstrip(" ") == text
    assert len([piece for piece in pieces if piece]) > 5


@pytest.mark.parametrize("name", ["baichuan2", "bluelm"])
def test_tokens_of_a_padded_vocabulary_are_no_text(tmp_path: Path, name: str) -> None:
    tokenizer = load(name, tmp_path, name)
    ids = tokenizer.encode_text("你好")
    assert tokenizer.decode([9999, *ids, len(tokenizer)], skip_special_tokens=True) == "你好"


@pytest.mark.parametrize("name", checkpoints.TOKENIZERS)
def test_a_probability_of_an_id_without_a_token_is_spelled_as_nothing(
    tmp_path: Path, name: str
) -> None:
    config, _ = model_config.load(checkpoints.CATALOGUE[name])
    tokenizer = load(name, tmp_path, config.engine.get("tokenizer_mode", "auto"))
    assert convert_ids_list_to_tokens(tokenizer, [len(tokenizer) + 7]) == [""]


def test_files_that_are_no_tokenizer_are_told(tmp_path: Path) -> None:
    load("bluelm", tmp_path, "bluelm")
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs")
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a sentencepiece model; fetch"):
        get_tokenizer(tmp_path, tokenizer_mode="bluelm")
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.model; fetch it again"):
        get_tokenizer(tmp_path, tokenizer_mode="bluelm")


@pytest.mark.parametrize(
    "words",
    [
        ["<|a|>", "<|ab|>", "<|a", "<|", "b"],
        ["a.b", "a*b", "a+b|c", "(a", "[a]", "\\d", "^a$"],
        [" ", "  ", "    ", "\n", "\n\n\n"],
        ["aa", "aab", "ab", "b", "ba", "bab"],
        ["<|" + "x" * 2000 + "|>", "<|x|>"],
    ],
)
def test_the_longest_of_words_that_begin_alike_is_found(words: list[str]) -> None:
    plain = re.compile("|".join(re.escape(w) for w in sorted(words, key=len, reverse=True)))
    draw = random.Random(0)
    parts = [*words, *(w[: draw.randint(0, len(w))] for w in words), "x"]
    for _ in range(300):
        text = "".join(draw.choices(parts, k=8))
        assert re.findall(longest_of(words), text) == plain.findall(text), text


def test_the_longest_of_hundreds_of_words_that_begin_alike_is_found_soon() -> None:
    """By what it tries at one place: once their common beginning, and not each of them."""
    words = [f"<|reserved_special_token_{number}|>" for number in range(1000)]
    assert longest_of(words).count("reserved_special_token_") == 1
    assert re.fullmatch(longest_of(words), words[999])
