"""Converts the contract's prompt and history to the model's input."""

from collections.abc import Sequence
from typing import Any, Literal, NotRequired

from pydantic import with_config
from typing_extensions import TypedDict  # pydantic requires this one before Python 3.12

from service.errors import InvalidRequest
from service.model_config.schema import History as HistoryConfig
from service.model_config.schema import Prompt


@with_config(extra="allow", strict=True)
class Message(TypedDict):
    """One turn. A client's other keys are returned to it, but do not reach the model."""

    role: Literal["system", "user", "assistant"]
    content: str
    metadata: NotRequired[object]  # a text is part of ChatGLM3's and GLM-4's prompt


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
    return prepare([*messages_of(history or ()), {"role": "user", "content": prompt}], config)


def prepare(messages: Sequence[Any], config: Prompt) -> list[Any]:
    """Return the messages of a conversation with the YAML's system prompt, without a greeting."""
    roles = [message.get("role") for message in messages]
    if config.greeting == "drop" and "user" in roles:
        first = roles.index("user")
        messages = [m for i, m in enumerate(messages) if i >= first or roles[i] != "assistant"]
    if config.system is not None and not {"system", "developer"} & {*roles}:
        return [{"role": "system", "content": config.system}, *messages]
    return [*messages]


def append_turn(
    history: History, prompt: str, response: str, config: HistoryConfig
) -> list[Pair | Message]:
    """Return `history` plus the new turn, in the same form; `config` has that of an empty one."""
    roles = isinstance(history[0], dict) if history else config.form == "roles"
    if not roles:
        return [*history, (prompt, response)]
    answer = {"role": "assistant", **({"metadata": ""} if config.metadata else {})}
    return [*history, {"role": "user", "content": prompt}, {**answer, "content": response}]


def split_thinking(text: str, tags: Sequence[str], finished: bool) -> tuple[str, str]:
    """Return the reasoning in an answer, and what follows it, both stripped.

    DeepSeek-R1's chat template ends with the opening tag, so an answer often has only the closing
    one. If it has neither and was cut short (`finished` is false), all of it is reasoning.
    """
    start, end = tags
    think, found, answer = text.partition(end)
    if not found:
        if finished and start not in text:
            return "", text.strip()
        think, answer = text, ""
    return think.strip().removeprefix(start).strip(), answer.strip()


class Stripped:
    """The text of one answer, in pieces, without the white space around the whole."""

    def __init__(self) -> None:
        self._held = ""  # white space that is inside, if more text follows
        self._has_begun = False

    def next(self, piece: str, *, is_last: bool) -> str:
        """Return what can be shown once `piece` has come."""
        text = self._held + piece
        if not self._has_begun:
            text = text.lstrip()
        shown = text.rstrip()
        self._has_begun = self._has_begun or bool(shown)
        self._held = "" if is_last else text[len(shown) :]
        return shown


def messages_of(history: History) -> list[Message]:
    """Return a history as messages, without a client's other keys."""
    messages: list[Message] = []
    for turn in history:
        if isinstance(turn, dict):
            message: Message = {"role": turn["role"], "content": turn["content"]}
            if isinstance(metadata := turn.get("metadata"), str):
                message["metadata"] = metadata
            messages.append(message)
        else:
            user, assistant = turn
            messages.append({"role": "user", "content": user})
            messages.append({"role": "assistant", "content": assistant})
    return messages
