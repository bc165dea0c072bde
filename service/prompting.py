"""Converts the contract's prompt and history to the model's input."""

from collections.abc import Sequence
from typing import Literal

from pydantic import with_config
from typing_extensions import TypedDict  # pydantic requires this one before Python 3.12

from service.errors import InvalidRequest
from service.model_config import Prompt


@with_config(extra="allow", strict=True)
class Message(TypedDict):
    """One turn. A client's other keys are returned to it, but do not reach the model."""

    role: Literal["system", "user", "assistant"]
    content: str


Pair = tuple[str, str]
History = Sequence[Pair] | Sequence[Message]


def render(prompt: str, history: History | None, config: Prompt) -> list[Message] | str:
    """Return messages for the chat template, or the prompt itself for a completion model.

    Raises InvalidRequest for a history with a completion model.
    """
    if config.style == "completion":
        if history:
            raise InvalidRequest("this model completes text and has no history", param="history")
        return prompt
    return [*_messages(history or ()), {"role": "user", "content": prompt}]


def append_turn(history: History, prompt: str, response: str) -> list[Pair | Message]:
    """Return `history` plus the new turn, in the same form; an empty history gets a pair."""
    if history and isinstance(history[0], dict):
        return [
            *history,
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": response},
        ]
    return [*history, (prompt, response)]


def _messages(history: History) -> list[Message]:
    messages: list[Message] = []
    for turn in history:
        if isinstance(turn, dict):
            messages.append({"role": turn["role"], "content": turn["content"]})
        else:
            user, assistant = turn
            messages.append({"role": "user", "content": user})
            messages.append({"role": "assistant", "content": assistant})
    return messages
