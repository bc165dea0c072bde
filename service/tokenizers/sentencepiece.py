"""Tokenizers from a sentencepiece `tokenizer.model`, with the semantics of the publishers' code.

transformers reads `tokenizer.model` too, but tokenises some texts wrongly: it ignores the flag for
the dummy prefix.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Self

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import AddedToken
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend
from vllm.tokenizers.hf import get_cached_tokenizer

from service.tokenizers import chat

_Type = ModelProto.SentencePiece.Type

Part = tuple[str, bool]  # a piece of a prompt, and whether it is a control token


class SentencePieceTokenizer(SentencePieceBackend):  # type: ignore[misc]  # transformers is untyped
    """`MARKERS` are the pieces that structure a chat. `encode_text` never yields one.

    `PREFIX` are the tokens that begin an input, instead of bos and eos around it. `APPENDED` are
    control tokens that the publisher's class numbers after all pieces. They are added to those of
    tokenizer_config.json, which no text yields either.
    """

    MARKERS: tuple[str, ...] = ()
    PREFIX: tuple[str, ...] = ()
    APPENDED: tuple[str, ...] = ()

    def __init__(
        self,
        vocab_file: str | None = None,
        unk_token: Any = "<unk>",
        bos_token: Any = "<s>",
        eos_token: Any = "</s>",
        pad_token: Any = None,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        **kwargs: Any,
    ) -> None:
        if not vocab_file:
            raise ValueError("the tokenizer's folder has no tokenizer.model; fetch it again")
        self.add_bos_token = add_bos_token
        self.add_eos_token = add_eos_token
        try:
            added = self._added_tokens(vocab_file, kwargs.pop("added_tokens_decoder", {}))
            kwargs.pop("additional_special_tokens", None)
            kwargs["sp_model_kwargs"] = kwargs.get("sp_model_kwargs") or {}  # null in InternLM2's
            kwargs["legacy"] = True  # false takes the dummy prefix; the publishers' classes keep it
            super().__init__(
                vocab_file=vocab_file,
                unk_token=unk_token,
                bos_token=bos_token,
                eos_token=eos_token,
                pad_token=pad_token,
                add_bos_token=add_bos_token,
                add_eos_token=add_eos_token,
                added_tokens_decoder=added,
                **kwargs | {"extra_special_tokens": [str(t) for t in added.values() if t.special]},
            )
        except (RuntimeError, OSError) as e:
            raise ValueError(f"{vocab_file} is not a sentencepiece model; fetch it again") from e
        model = ModelProto.FromString(self.sp_model.serialized_model_proto())
        self.marker_ids: dict[str, int] = {}
        for id, piece in enumerate(model.pieces):
            if piece.piece in self.MARKERS:
                self.marker_ids[piece.piece] = id
            elif id not in added:
                continue
            if piece.type in (_Type.NORMAL, _Type.USER_DEFINED):
                piece.type = _Type.UNUSED
        self.marker_ids |= {str(token): id for id, token in added.items()}
        self._text_model = SentencePieceProcessor(model_proto=model.SerializeToString())
        # The same model without a dummy prefix, for text after a marker.
        model.normalizer_spec.add_dummy_prefix = False
        model.normalizer_spec.remove_extra_whitespaces = False
        self._after_marker_model = SentencePieceProcessor(model_proto=model.SerializeToString())

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        tokenizer: Self = get_cached_tokenizer(super().from_pretrained(*args, **kwargs))
        return tokenizer

    def _added_tokens(
        self, vocab_file: str, configured: Mapping[int, AddedToken]
    ) -> dict[int, AddedToken]:
        added = dict(configured)
        size = len(SentencePieceProcessor(model_file=vocab_file)) if self.APPENDED else 0
        for id, token in enumerate(self.APPENDED, size):
            if id in added and str(added[id]) != token:
                raise ValueError(
                    f"tokenizer_config.json: token {id} is {str(added[id])!r}, not {token!r}; "
                    "these files are another model's"
                )
            added[id] = AddedToken(token, normalized=False, special=True)
        return added

    def marker_id(self, marker: str) -> int:
        """Return the id of a control token. Raises ValueError if the files have none."""
        if marker not in self.marker_ids:
            raise ValueError(f"these files are another model's: they have no token {marker!r}")
        return self.marker_ids[marker]

    def prefix(self) -> list[int]:
        """Return the ids of `PREFIX`. Raises ValueError if the files lack one."""
        return [self.marker_id(token) for token in self.PREFIX]

    def encode_string(self, parts: Sequence[Part]) -> list[int]:
        """Return the token ids of a prompt that the published code encodes as one string.

        Control tokens in its texts stay text.
        """
        control = {*self.marker_ids, *self.all_special_tokens}
        ids: list[int]
        if not any(
            token in text for text, is_control in parts if not is_control for token in control
        ):
            ids = self.encode("".join(text for text, _ in parts), add_special_tokens=False)
            return ids
        ids, at_start = [], True  # of what goes to sentencepiece in one, with any dummy prefix
        for is_control, group in groupby(parts, key=lambda part: part[1]):
            texts = [text for text, _ in group]
            if not is_control:
                if text := "".join(texts):
                    ids += self.encode_text(text, follows_marker=not at_start)
                    at_start = False
                continue
            for token in texts:
                is_piece = token not in self.all_special_tokens
                if is_piece and at_start:
                    ids += self.encode(token, add_special_tokens=False)
                else:
                    ids.append(self.convert_tokens_to_ids(token))
                at_start = not is_piece
        return ids

    def joined(
        self,
        system: list[Part],
        rounds: Sequence[list[Part]],
        end: list[Part],
        limit: int | None,
        *,
        bos: bool = True,
    ) -> list[int]:
        """Return the ids of a prompt that is one string, behind bos.

        With a `limit` in tokens see `chat.join`; a prompt that exceeds it is encoded by rounds.
        """
        start = [self.bos_token_id] if bos else []
        ids = start + self.encode_string([*system, *(p for parts in rounds for p in parts), *end])
        if limit is None or len(ids) <= limit:
            return ids
        rounds = [*rounds[:-1], [*rounds[-1], *end]]
        start += self.encode_string(system) if system else []
        return chat.join(start, [self.encode_string(parts) for parts in rounds], limit)

    def encode_text(self, text: str, *, follows_marker: bool = False) -> list[int]:
        """Return the token ids of a text, without bos and eos. A marker in it is plain text."""
        chat.check_text(text)
        model = self._after_marker_model if follows_marker else self._text_model
        ids: list[int] = model.encode(text)
        return ids

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        chat.check_text(text)
        pieces: list[str] = super()._tokenize(text, **kwargs)
        return pieces

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        # The tutorials' answers show no markers.
        if skip_special_tokens and not isinstance(ids, int):
            markers = {self.marker_ids.get(marker) for marker in self.MARKERS}
            ids = [id for id in ids if id not in markers]
        return super().convert_ids_to_tokens(ids, skip_special_tokens)

    def _convert_id_to_token(self, index: int) -> str:
        # The model's vocabulary may be padded, so it may generate ids beyond the tokenizer's.
        return str(self.sp_model.id_to_piece(index)) if index < len(self.sp_model) else ""

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        if self.PREFIX:
            return [*self.prefix(), *token_ids_0, *(token_ids_1 or [])]
        bos = [self.bos_token_id] if self.add_bos_token else []
        eos = [self.eos_token_id] if self.add_eos_token else []
        built = bos + token_ids_0 + eos
        return built if token_ids_1 is None else built + bos + token_ids_1 + eos

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        text = ""
        pieces: list[str] = []
        for token in tokens:
            if token in self.all_special_tokens or token in self.added_tokens_encoder:
                text += self.sp_model.decode(pieces) + token
                pieces = []
            else:
                pieces.append(token)
        return text + str(self.sp_model.decode(pieces))
