"""What the chat formats share: checking turns, and dropping the oldest when they are too long."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Turn = tuple[str, str]  # role and text


def turns(conversation: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> list[Turn]:
    """Role and text of each message, checked. A system message may only be the first.

    `options` are the arguments of `apply_chat_template`. Raises ValueError for what these formats
    have no place for.
    """
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
        found.append((role, content))
    if not any(role == "user" for role, _ in found):
        raise ValueError("there is no user message")
    return found


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
