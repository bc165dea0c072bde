"""CharacterGLM's chat format (source: CharacterGLM's own demo, `build_inputs`).

    [gMASK] sop 以下是一段{bot}和{user}之间的对话。
    关于{bot}的信息：{bot_info}
    关于{user}的信息：{user_info}
    [{user}]question
    [{bot}]answer
    [{user}]question
    [{bot}]

One string, in which newlines of a message or a person become spaces. Who talks is `session_meta`,
of `engine.default_chat_template_kwargs` or of a request's `chat_template_kwargs`. The tokenizer is
taken to be ChatGLM2's, with five control tokens after the pieces: unconfirmed, so a
tokenizer_config.json that has other ones there is refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from service.tokenizers import chat
from service.tokenizers.sentencepiece import SentencePieceTokenizer

_NAMES, _INFOS = ("bot_name", "user_name"), ("bot_info", "user_info")
_MAX_NAME, _MAX_INFO = 64, 4096  # characters


class CharacterGLMTokenizer(SentencePieceTokenizer):
    """There is no system role: the persons are described in `session_meta`."""

    PREFIX = ("[gMASK]", "sop")
    APPENDED = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        truncate_to: int | None = None,
        session_meta: object = None,
        **options: Any,
    ) -> list[int]:
        """Return the prompt's token ids. `truncate_to` is in tokens, see `chat.join`.

        A prompt cut to it is encoded round by round.
        """
        meta = _checked(session_meta)
        turns = chat.turns(conversation, truncate_to, options)
        if turns[0][0] == "system":
            raise ValueError("this model has no system messages; session_meta says who talks")
        bot, user = meta["bot_name"], meta["user_name"]
        opening = [f"以下是一段{bot}和{user}之间的对话。"]
        for name, info in ((bot, meta.get("bot_info")), (user, meta.get("user_info"))):
            if info:
                opening.append(f"关于{name}的信息：{info}")
        names = {"user": user, "assistant": bot}
        groups = [
            [f"[{names[role]}]{text.strip()}" for role, text in group]
            for group in chat.rounds_of(turns)
        ]
        end = f"[{bot}]"
        lines = [*opening, *(line for group in groups for line in group)]
        text = "".join(f"{_one_line(line)}\n" for line in lines) + end
        ids = self.build_inputs_with_special_tokens(self.encode_text(text))
        if truncate_to is None or len(ids) <= truncate_to:
            return ids
        texts = ["".join(f"{_one_line(line)}\n" for line in group) for group in (opening, *groups)]
        texts[-1] += end
        system, *rounds = (self.encode_text(text) for text in texts)
        return chat.join(self.build_inputs_with_special_tokens(system), rounds, truncate_to)


def _one_line(text: str) -> str:
    return text.replace("\n", " ")


def _checked(meta: object) -> dict[str, str]:
    if (
        not isinstance(meta, dict)
        or not all(isinstance(meta.get(key), str) and meta[key] for key in _NAMES)
        or not all(isinstance(meta.get(key) or "", str) for key in _INFOS)
    ):
        raise ValueError(
            "this model needs session_meta with bot_name and user_name, and perhaps bot_info and "
            "user_info; give it in engine.default_chat_template_kwargs"
        )
    known = {key: str(meta[key]) for key in (*_NAMES, *_INFOS) if meta.get(key)}
    for key, text in known.items():
        chat.check_text(text)
        limit = _MAX_NAME if key in _NAMES else _MAX_INFO
        if len(text) > limit:  # a name is written once for each turn
            raise ValueError(f"session_meta: {key} has at most {limit} characters")
    return known
