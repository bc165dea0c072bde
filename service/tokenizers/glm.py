"""Shared by ChatGLM3 and GLM-4: a turn is its role's token, the metadata line, and the text.

    [gMASK] sop  system \\n text  user \\n text  assistant \\n text  user \\n text  assistant

Each piece is encoded alone (source: build_single_message of both tokenization_chatglm.py). The line
is a message's `metadata`, the name of a tool, and empty where it has none. The model writes its own
line first, so an answer begins with a newline; the published chat() strips it, as `answer.strip` of
the YAML does.
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
    encoded = [
        (role, [token_id(ROLES[role]), *encode(_line(message)), *encode(text)])
        for (role, text), message in zip(turns, conversation, strict=True)
    ]
    system = encoded.pop(0)[1] if encoded[0][0] == "system" else []
    rounds = [[id for _, ids in group for id in ids] for group in chat.rounds_of(encoded)]
    return chat.join([*prefix, *system], rounds, truncate_to, end=[token_id(ROLES["assistant"])])


def _line(message: Mapping[str, Any]) -> str:
    metadata = message.get("metadata") or ""
    if not isinstance(metadata, str):
        raise ValueError("the metadata of a message must be text")
    chat.check_text(metadata)
    return f"{metadata}\n"
