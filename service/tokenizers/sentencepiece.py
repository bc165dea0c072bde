"""Tokenizers from a sentencepiece `tokenizer.model`, with the semantics of the publishers' code.

transformers reads `tokenizer.model` too, but tokenises some texts wrongly: it ignores the flag for
the dummy prefix.
"""

from typing import Any, Self

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend
from vllm.tokenizers.hf import get_cached_tokenizer

from service.tokenizers.chat import check_text

_UNUSED = ModelProto.SentencePiece.Type.UNUSED


class SentencePieceTokenizer(SentencePieceBackend):  # type: ignore[misc]  # transformers is untyped
    """`MARKERS` are the pieces that structure a chat. `encode_text` never yields one."""

    MARKERS: tuple[str, ...] = ()

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
            super().__init__(
                vocab_file=vocab_file,
                unk_token=unk_token,
                bos_token=bos_token,
                eos_token=eos_token,
                pad_token=pad_token,
                add_bos_token=add_bos_token,
                add_eos_token=add_eos_token,
                **kwargs,
            )
        except (RuntimeError, OSError) as e:
            raise ValueError(f"{vocab_file} is not a sentencepiece model; fetch it again") from e
        model = ModelProto.FromString(self.sp_model.serialized_model_proto())
        self.marker_ids: dict[str, int] = {}
        for id, piece in enumerate(model.pieces):
            if piece.piece in self.MARKERS:
                self.marker_ids[piece.piece] = id
                piece.type = _UNUSED
        self._text_model = SentencePieceProcessor(model_proto=model.SerializeToString())
        # The same model without a dummy prefix, for text after a marker.
        model.normalizer_spec.add_dummy_prefix = False
        model.normalizer_spec.remove_extra_whitespaces = False
        self._after_marker_model = SentencePieceProcessor(model_proto=model.SerializeToString())

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        tokenizer: Self = get_cached_tokenizer(super().from_pretrained(*args, **kwargs))
        return tokenizer

    def encode_text(self, text: str, *, follows_marker: bool = False) -> list[int]:
        """Return the token ids of a text, without bos and eos. A marker in it is plain text."""
        check_text(text)
        model = self._after_marker_model if follows_marker else self._text_model
        ids: list[int] = model.encode(text)
        return ids

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        check_text(text)
        pieces: list[str] = super()._tokenize(text, **kwargs)
        return pieces

    def _convert_id_to_token(self, index: int) -> str:
        # The model's vocabulary may be padded, so it may generate ids beyond the tokenizer's.
        return str(self.sp_model.id_to_piece(index)) if index < len(self.sp_model) else ""

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        bos = [self.bos_token_id] if self.add_bos_token else []
        eos = [self.eos_token_id] if self.add_eos_token else []
        built = bos + token_ids_0 + eos
        return built if token_ids_1 is None else built + bos + token_ids_1 + eos

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        text = ""
        pieces: list[str] = []
        for token in tokens:
            if token in self.all_special_tokens:
                text += self.sp_model.decode(pieces) + token
                pieces = []
            else:
                pieces.append(token)
        return text + str(self.sp_model.decode(pieces))
