"""Is the prompt sane? Turns rendered as the server renders them, and where an answer ends."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.model_config import ModelConfig
from service.prompting import Message

# Words that no template has by itself.
_SYSTEM: Message = {"role": "system", "content": "orchid"}
_QUESTION: Message = {"role": "user", "content": "maple"}
_ANSWER: Message = {"role": "assistant", "content": "willow"}
_NEXT: Message = {"role": "user", "content": "cedar"}
_TURNS = [_QUESTION, _ANSWER, _NEXT]

# Messages, or the text of a completion model, and whether an answer is to begin -> token ids.
Render = Callable[[list[Message] | str, bool], list[int]]


@dataclass(frozen=True)
class StopToken:
    id: int
    token: str | None  # None: it is not in the vocabulary


@dataclass(frozen=True)
class Findings:
    """One line each, with what to do. Warnings may be as the model wants it."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check(render: Render, tokenizer: Any, model: Any, config: ModelConfig) -> Findings:
    """What is wrong with the prompts of this model; `model` is vLLM's model config."""
    found = Findings()
    if config.prompt.style == "completion":
        _check_bos(render("maple", True), tokenizer, found)
    else:
        _check_chat(render, tokenizer, found)
    found.problems.extend(missing(stop_tokens(tokenizer, model, config)))
    return found


def stop_tokens(tokenizer: Any, model: Any, config: ModelConfig) -> list[StopToken]:
    """Where the engine ends an answer: the tokenizer's eos, generation_config's and the YAML's."""
    ids = model.try_get_generation_config().get("eos_token_id") or []
    ids = [tokenizer.eos_token_id, *([ids] if isinstance(ids, int) else ids)]
    vocabulary = tokenizer.get_vocab()
    ids += [vocabulary[text] for text in config.sampling.stop or () if text in vocabulary]
    known = {id: token for token, id in vocabulary.items()}
    return [
        StopToken(id, known.get(id) if id < model.get_vocab_size() else None)
        for id in dict.fromkeys(ids)
        if id is not None
    ]


def missing(stop_tokens: Sequence[StopToken]) -> list[str]:
    """Why an answer may not end, one line each."""
    if not stop_tokens:
        return [
            "no token ends an answer: the tokenizer has no eos and generation_config none; give "
            "eos_token_id in generation_config.json"
        ]
    return [
        f"stop token {stop.id} is not in the vocabulary; correct eos_token_id in "
        "generation_config.json, and eos_token in tokenizer_config.json"
        for stop in stop_tokens
        if not stop.token
    ]


def _check_chat(render: Render, tokenizer: Any, found: Findings) -> None:
    def text(messages: list[Message], *, answering: bool = True) -> str:
        """Without white space, which encoding turn by turn may change."""
        ids = render(messages, answering)
        return re.sub(r"\s", "", tokenizer.decode(ids, skip_special_tokens=False))

    try:
        _check_bos(render([_QUESTION], True), tokenizer, found)
        opening = text([_QUESTION])
        open_end = text([_QUESTION], answering=False)
    except Exception as e:  # a template raises what it likes
        found.problems.append(
            f"the template cannot render one user turn: {_reason(e)}; correct prompt.template, or "
            "write one, or set prompt.style: completion for a model that is not for chat"
        )
        return
    try:
        conversation = text(_TURNS)
    except Exception as e:
        found.problems.append(
            f"the template cannot render user, assistant, user: {_reason(e)}; with it no request "
            "may have a history"
        )
        return
    if lost := _lost(_TURNS, conversation):
        found.problems.append(
            f"of user, assistant, user the template loses or moves the {lost} turn; loop over "
            "`messages` in prompt.template and write each one's content"
        )
    elif _QUESTION["content"] in opening:
        longer = len(opening) > len(open_end)
        bos = tokenizer.bos_token or " "  # which no text here has
        _check_marker(opening, conversation, bos, found, longer=longer)
    try:
        if _lost([_SYSTEM], text([_SYSTEM, *_TURNS])):
            found.warnings.append(
                "the template drops a system message and says nothing; write it in "
                "prompt.template, or let it call raise_exception"
            )
    except Exception:
        pass  # it takes none, and says so


def _check_marker(
    opening: str, conversation: str, bos: str, found: Findings, *, longer: bool
) -> None:
    """Whether a prompt ends as the turns of a conversation say that an answer begins.

    `longer`: than the same turns when no answer is to begin.
    """
    question, answer = _QUESTION["content"], _ANSWER["content"]
    end = opening.partition(question)[2]
    marker = conversation.partition(question)[2].partition(answer)[0]
    # Turn by turn, a tokenizer may begin each with bos.
    ending, beginning = end.replace(bos, ""), marker.replace(bos, "")
    # The model may be left to write a part of it itself, such as the channel of its answer.
    begun = longer and beginning.startswith(ending)
    if not beginning or not (ending.startswith(beginning) or begun):
        found.problems.append(
            f"a prompt ends in {end!r} after the user's text, and in a conversation {marker!r} "
            "stands before the answer; end prompt.template with what begins an answer, under "
            "{% if add_generation_prompt %}"
        )


def _check_bos(ids: list[int], tokenizer: Any, found: Findings) -> None:
    bos = tokenizer.bos_token_id
    if bos is None:
        return
    if ids[:2] == [bos, bos]:
        found.problems.append(
            f"a prompt begins with {tokenizer.bos_token!r} twice; take bos_token out of "
            "prompt.template, or add_bos_token out of tokenizer_config.json"
        )
    elif ids[:1] != [bos] and list(tokenizer.encode("maple"))[:1] == [bos]:
        found.warnings.append(
            f"a prompt does not begin with {tokenizer.bos_token!r}, with which the tokenizer "
            "begins a text; if the model was trained so, begin prompt.template with {{ bos_token }}"
        )


def _lost(turns: Sequence[Message], text: str) -> str | None:
    """The role of the first turn that is not in the text behind those before it."""
    for turn in turns:
        _, there, text = text.partition(turn["content"])
        if not there:
            return turn["role"]
    return None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
