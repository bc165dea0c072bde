"""Reads tokenizer.json as it is, for any model that has one.

AutoTokenizer of transformers 5 picks a class by the names in tokenizer_config.json and config.json,
and most of those classes keep only the vocabulary of tokenizer.json and build the rest anew. Where
the names are wrong, the ids are: those of deepseek-llm and Yi, among others (transformers issues
45488, 47017, 48206).
"""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import TokenizersBackend
from vllm.tokenizers.hf import get_cached_tokenizer

from service.tokenizers import chat
from service.tokenizers.literal import literal

MODE = "tokenizer_json"
# What classes get wrong: the space at the front, white space, digits, bytes, the case of "'S".
TEXTS = (
    "你好，世界！今天天气怎么样？",
    "Who are you?",
    " 前后有空格 ",
    "   three spaces, and  two",
    "第一行\n第二行\n\n第四行\n",
    "\n\n\tdef f(x):\n\t\treturn x**2  # 平方\n",
    "12345 + 67.89 = 一万",
    "😀👩‍👩‍👧🏔️",
    "龘靐 ünïcode cafe\u0301",
    "It's what they'LL say, IT'S so.",
    '{"key": [1, 2], "值": null}\r\n',
    "<用户>a<AI> http://a.b/c?d=e_f",
)


class TokenizerJsonTokenizer:
    """The `tokenizer_mode` "tokenizer_json". As in "literal", control tokens of users stay text."""

    @staticmethod
    def from_pretrained(path: str | Path, *args: Any, **kwargs: Any) -> Any:
        if Path(path).is_dir() and not (Path(path) / "tokenizer.json").is_file():
            raise ValueError(
                f"the tokenizer's folder has no tokenizer.json; leave out tokenizer_mode: {MODE}"
            )
        tokenizer = TokenizersBackend.from_pretrained(path, *args, **kwargs)
        if wrong := misnumbered(tokenizer, Path(path)):
            raise ValueError(wrong)
        return literal(get_cached_tokenizer(tokenizer))


def difference(tokenizer: Any, folder: Path) -> str | None:
    """Return a text of which the tokenizer makes other ids than its folder's tokenizer.json.

    None if there is none, or no tokenizer.json, or the tokenizer is not of transformers.
    """
    file = folder / "tokenizer.json"
    if not file.is_file() or published_class(tokenizer) in (None, TokenizersBackend):
        return None
    itself = Tokenizer.from_file(str(file))
    itself.no_truncation()
    itself.no_padding()
    for text in TEXTS:
        if tokenizer.encode(text, add_special_tokens=False) != (
            itself.encode(text, add_special_tokens=False).ids
        ):
            return text
    return None


def drops_chinese(tokenizer: Any) -> bool:
    """Whether a tokenizer makes no tokens of Chinese text.

    Of the same tokenizer.json, that is: a class that reads one wrongly saves it so.
    """
    known = published_class(tokenizer) is not None
    return known and not tokenizer.encode(TEXTS[0], add_special_tokens=False)


def misnumbered(tokenizer: Any, folder: Path) -> str | None:
    """Return what is wrong if a control token has another id than in tokenizer_config.json.

    transformers adds those that tokenizer.json does not name at the end of the vocabulary;
    InternLM2's pieces have other names there.
    """
    for id, token in chat.added_tokens(folder).items():
        found = tokenizer.convert_tokens_to_ids(token)
        if found != id:
            return (
                f"the token {token!r} is {id} in tokenizer_config.json and becomes "
                f"{found}, because tokenizer.json does not name it; set engine.tokenizer_mode to "
                "one of the model's own, such as internlm2, or fetch other files"
            )
    return None


def published_class(tokenizer: Any) -> type | None:
    """Return the transformers class, without those that vLLM and we derive.

    None if there is none, as for vLLM's class of Mistral.
    """
    classes = type(tokenizer).__mro__
    return next((c for c in classes if c.__module__.startswith("transformers.")), None)
