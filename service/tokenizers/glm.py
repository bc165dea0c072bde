"""Shared by ChatGLM3 and GLM-4: a turn is its role's token, the metadata line, and the text.

    [gMASK] sop  system \\n text  user \\n text  assistant \\n text  user \\n text  assistant

Each piece is encoded alone (source: build_single_message of both tokenization_chatglm.py). The line
holds the name of a tool; it is empty in all turns here. The model writes its own line first, so an
answer begins with a newline, which the published chat() strips.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from service.tokenizers import chat

ROLES = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}


def prompt(
    conversation: Sequence[Mapping[str, Any]],
    truncate_to: int | None,
    options: Mapping[str, Any],
    *,
    prefix: list[int],
    token_id: Callable[[str], int],
    encode: Callable[[str], list[int]],
) -> list[int]:
    """Return the prompt's token ids. `truncate_to` is in tokens, see `chat.join`."""
    turns = chat.turns(conversation, truncate_to, options)
    line = encode("\n")

    def ids(turn: chat.Turn) -> list[int]:
        role, text = turn
        return [token_id(ROLES[role]), *line, *encode(text)]

    system = ids(turns.pop(0)) if turns[0][0] == "system" else []
    rounds = [[id for turn in group for id in ids(turn)] for group in chat.rounds_of(turns)]
    return chat.join([*prefix, *system], rounds, truncate_to, end=[token_id(ROLES["assistant"])])
