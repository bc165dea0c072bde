"""Tokenizers from a tiktoken file: a line for each token, its bytes in base64 and its rank.

The publishers' classes run tiktoken in Python. Here the file becomes a tokenizer of the library
`tokenizers`, with the same ids, which vLLM decodes, streams and pools like any other.
"""

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import TokenizersBackend
from vllm.tokenizers.hf import get_cached_tokenizer

from service.tokenizers import chat


class ByteLevelTokenizer(TokenizersBackend):  # type: ignore[misc]  # transformers is untyped
    """The base of the tokenizers from a tiktoken file. Control tokens in a text stay text."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, control: Sequence[str], eos: str) -> Any:
        """Return vLLM's tokenizer for one that `load` made. `control` are its special tokens."""
        made = cls(
            tokenizer_object=tokenizer,
            eos_token=eos,
            pad_token="<|endoftext|>",
            extra_special_tokens=[*control],
            truncation_side="left",
        )
        return get_cached_tokenizer(made)

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        ids: list[int] = self.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids


def words(*, digits: int) -> str:
    """Return the pattern of GPT-4 that splits a text into words and numbers of up to `digits`."""
    return (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,{digits}}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def load(file: Path, words: str, control: Sequence[str], *, nfc: bool = False) -> Tokenizer:
    """Return the tokenizer of a file.

    `words` is the pattern that splits a text before tokens are merged. The `control` tokens, which
    no text yields, have the ids after those of the file. Raises ValueError for another file.
    """
    ranks = _ranks(file)
    letters = _letters()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    # tiktoken merges two neighbours into any token there is, the lowest rank first.
    merges = [
        (names[token[:cut]], names[token[cut:]])
        for token in ranks  # in order of rank
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in control]
    )
    return tokenizer


def check_added(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise ValueError if tokenizer_config.json has other control tokens than the tokenizer."""
    for id, token in chat.added_tokens(folder).items():
        known = tokenizer.id_to_token(id)
        if known is None:
            raise ValueError(
                f"tokenizer_config.json: token {id} ({token!r}) was added in training, which this "
                "mode does not read; merge without it, or leave it out of tokenizer_config.json"
            )
        if known != token:
            raise ValueError(
                f"tokenizer_config.json: token {id} is {token!r}, and by the tokenizer's file "
                f"{known!r}; these files are another model's"
            )


def _ranks(file: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    try:
        for line in file.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except FileNotFoundError:
        raise ValueError(f"the tokenizer's folder has no {file.name}; fetch it again") from None
    except (OSError, ValueError, binascii.Error) as e:
        raise ValueError(f"{file} is not a tiktoken file; fetch it again") from e
    if [*ranks.values()] != [*range(len(ranks))]:
        ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    if not ranks or [*ranks.values()] != [*range(len(ranks))]:
        raise ValueError(f"{file} lacks tokens; fetch it again")
    return ranks


def _letters() -> dict[int, str]:
    """The letters that `tokenizers` writes for bytes: printable ones as they are, others moved."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {
        byte: chr(256 + place) for place, byte in enumerate(others)
    }
