"""What the chat formats share: checking turns, and dropping the oldest when they are too long."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Turn = tuple[str, str]  # role and text


def turns(
    conversation: Sequence[Mapping[str, Any]], truncate_to: object, options: Mapping[str, Any]
) -> list[Turn]:
    """Role and text of each message: a system's may only be the first, the last is a user's.

    `truncate_to` and `options` are the other arguments of `apply_chat_template`, which /v1 takes
    from its clients. Raises ValueError for what these formats have no place for.
    """
    if truncate_to is not None and (not isinstance(truncate_to, int) or truncate_to < 1):
        raise ValueError("truncate_to must be a number of tokens, 1 at least")
    for option in ("chat_template", "tools", "documents"):
        if options.get(option):
            raise ValueError(f"this model's prompt format is fixed and has no {option}")
    found: list[Turn] = []
    for position, message in enumerate(conversation):
        role, content = message["role"], message.get("content")
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise ValueError(f"this model's prompt format has no place for a {role} message")
        if role == "system" and position:
            raise ValueError("a system message must be the first")
        check_text(content)
        found.append((role, content))
    if not found or found[-1][0] != "user":
        raise ValueError("the last message must be the user's")
    return found


def check_text(text: str) -> None:
    """Raises ValueError for a string that is no text: JSON can spell half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("a message holds half a character (a lone surrogate)") from None


def joined(
    system: list[int], rounds: Sequence[list[int]], limit: int | None, *, end: Sequence[int] = ()
) -> list[int]:
    """The prompt: the system's tokens, those of each round, and `end`.

    With a `limit` in tokens whole rounds are dropped, the oldest first and never the last; what is
    still too long loses its left end.
    """
    if limit is None:
        return [*system, *(token for tokens in rounds for token in tokens), *end]
    kept: list[int] = []
    for tokens in reversed(rounds):
        if kept and len(system) + len(tokens) + len(kept) > limit:
            break
        kept = tokens + kept
    return [*system, *kept, *end][-limit:]


def rounds_of(turns: Sequence[Turn]) -> list[list[Turn]]:
    """Turns in groups that begin with a user's; what comes before the first is a group too."""
    groups: list[list[Turn]] = []
    for turn in turns:
        if turn[0] == "user" or not groups:
            groups.append([])
        groups[-1].append(turn)
    return groups


def generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json beside the tokenizer, which some formats take token ids from."""
    try:
        config: dict[str, Any] = json.loads((folder / "generation_config.json").read_text())
    except FileNotFoundError:
        return {}
    return config
