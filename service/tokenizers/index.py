"""Index-1.9B-Chat's format (sources: bilibili/Index-1.9B's finetune.py; LLaMA-Factory's template).

    <unk>system reserved_0 question reserved_1 answer reserved_0 question reserved_1

One string without the spaces, and without bos. `<unk>`, `reserved_0` and `reserved_1` are the ids
0, 3 and 4. That `<unk>` also begins a prompt without a system text, and that nothing ends a past
answer, is unconfirmed: files whose chat template writes otherwise are refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from service.tokenizers import chat
from service.tokenizers.sentencepiece import Part, SentencePieceTokenizer

_PROBE = [
    {"role": "system", "content": "orchid"},
    {"role": "user", "content": "maple"},
    {"role": "assistant", "content": "willow"},
    {"role": "user", "content": "cedar"},
]


class IndexTokenizer(SentencePieceTokenizer):
    """The `tokenizer_mode` "index". An answer ends at eos."""

    MARKERS = ("reserved_0", "reserved_1")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.chat_template:
            for probe in (_PROBE, _PROBE[1:]):
                published = super().apply_chat_template(
                    probe, tokenize=False, add_generation_prompt=True
                )
                ours = "".join(
                    text for text, _ in _parts([(m["role"], m["content"]) for m in probe])
                )
                if published != ours:
                    raise ValueError(
                        f"the tokenizer's template writes a prompt as {published!r}, and this mode "
                        f"as {ours!r}; if your training has added it, take it out (chat_template "
                        "in tokenizer_config.json, or the file chat_template.jinja), and if it is "
                        "the publisher's, correct service/tokenizers/index.py"
                    )

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        truncate_to: int | None = None,
        **options: Any,
    ) -> list[int]:
        """Return the prompt's token ids. `truncate_to` is in tokens, see `chat.join`."""
        turns = chat.turns(conversation, truncate_to, options)
        for marker in self.MARKERS:
            self.marker_id(marker)
        system = _parts([turns.pop(0)] if turns[0][0] == "system" else [])
        rounds = [_parts(group)[1:] for group in chat.rounds_of(turns)]
        return self.joined(system, rounds, [], truncate_to, bos=False)


def _parts(turns: Sequence[chat.Turn]) -> list[Part]:
    parts: list[Part] = [("<unk>", True)]
    for role, text in turns:
        if role == "user":
            parts += [("reserved_0", True), (text, False), ("reserved_1", True)]
        else:
            parts.append((text, False))
    return parts
