"""Shared by the chat formats: check turns, and drop the oldest when the prompt is too long."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Turn = tuple[str, str]  # role and text
T = TypeVar("T")


def turns(
    conversation: Sequence[Mapping[str, Any]],
    truncate_to: object,
    options: Mapping[str, Any],
    *,
    system: bool = True,
) -> list[Turn]:
    """Return the role and text of each message. `system`: whether the format has such messages.

    `truncate_to` and `options` are the other arguments of `apply_chat_template`, which /v1 takes
    from clients. Raises ValueError for options and messages that these formats do not support: only
    the first message may be a system message, and the last must be a user's.
    """
    if truncate_to is not None and (not isinstance(truncate_to, int) or truncate_to < 1):
        raise ValueError("truncate_to must be a number of tokens, 1 at least")
    for option in ("chat_template", "tools", "documents"):
        if options.get(option):
            raise ValueError(f"this model's prompt format is fixed and has no {option}")
    checked: list[Turn] = []
    for position, message in enumerate(conversation):
        role, content = message["role"], message.get("content")
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise ValueError(f"this model's prompt format has no place for a {role} message")
        if role == "system" and not system:
            raise ValueError("this model has no system messages")
        if role == "system" and position:
            raise ValueError("a system message must be the first")
        check_text(content)
        checked.append((role, content))
    if not checked or checked[-1][0] != "user":
        raise ValueError("the last message must be the user's")
    return checked


def copy_as(kind: Any, tokenizer: Any) -> Any:
    """Return a shallow copy of a tokenizer as a `kind`, a class derived from its own."""
    clone = kind.__new__(kind)
    vars(clone).update(vars(tokenizer))
    return clone


def check_text(text: str) -> None:
    """Raise ValueError for a lone surrogate, which JSON can contain."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("a message holds half a character (a lone surrogate)") from None


def join(
    system: list[int], rounds: Sequence[list[int]], limit: int | None, *, end: Sequence[int] = ()
) -> list[int]:
    """Return the prompt: the system's tokens, those of each round, and `end`.

    With a `limit` in tokens, drop whole rounds, the oldest first but never the last, then cut off
    the left end if the prompt is still too long.
    """
    if limit is None:
        return [*system, *(token for tokens in rounds for token in tokens), *end]
    kept: list[int] = []
    for tokens in reversed(rounds):
        if kept and len(system) + len(tokens) + len(kept) > limit:
            break
        kept = tokens + kept
    return [*system, *kept, *end][-limit:]


def rounds_of(turns: Sequence[tuple[str, T]]) -> list[list[tuple[str, T]]]:
    """Group turns by their role, the first of each pair.

    Each group begins with a user's turn; turns before the first are a group too.
    """
    groups: list[list[tuple[str, T]]] = []
    for turn in turns:
        if turn[0] == "user" or not groups:
            groups.append([])
        groups[-1].append(turn)
    return groups


def added_tokens(folder: Path) -> dict[int, str]:
    """Return the tokens that tokenizer_config.json adds, by their ids."""
    added = _read(folder, "tokenizer_config.json").get("added_tokens_decoder") or {}
    return {int(id): token["content"] for id, token in added.items()}


def generation_config(folder: Path) -> dict[str, Any]:
    """Return generation_config.json, from which some formats take token ids, or an empty dict."""
    return _read(folder, "generation_config.json")


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return read
