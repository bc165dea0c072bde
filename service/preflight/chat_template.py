"""Checks a model's prompts and stop tokens, with turns rendered as the server renders them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.model_config import ModelConfig
from service.prompting import Message

# Words that no template contains.
_SYSTEM: Message = {"role": "system", "content": "orchid"}
_QUESTION: Message = {"role": "user", "content": "maple"}
_ANSWER: Message = {"role": "assistant", "content": "willow"}
_NEXT: Message = {"role": "user", "content": "cedar"}
_TURNS = [_QUESTION, _ANSWER, _NEXT]

# (messages, or a completion model's text; add_generation_prompt) -> token ids.
Render = Callable[[list[Message] | str, bool], list[int]]


@dataclass(frozen=True)
class StopToken:
    id: int
    token: str | None  # None: not in the vocabulary


@dataclass(frozen=True)
class Findings:
    """One line each, with the remedy. A warning may be right for the model."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check(render: Render, tokenizer: Any, model: Any, config: ModelConfig) -> Findings:
    """Check the prompts and stop tokens of a model. `model` is vLLM's model config."""
    findings = Findings()
    if config.prompt.style == "completion":
        _check_bos(render("maple", True), tokenizer, findings)
    else:
        _check_chat(render, tokenizer, findings)
    findings.problems.extend(missing(stop_tokens(tokenizer, model, config)))
    return findings


def stop_tokens(tokenizer: Any, model: Any, config: ModelConfig) -> list[StopToken]:
    """Return the tokens that end an answer: the tokenizer's, generation_config's and the YAML's."""
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
    """Return one line for each reason why an answer may not end."""
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


def _check_chat(render: Render, tokenizer: Any, findings: Findings) -> None:
    def text(messages: list[Message], *, add_generation_prompt: bool = True) -> str:
        """Render without white space, which encoding turn by turn may change."""
        ids = render(messages, add_generation_prompt)
        return re.sub(r"\s", "", tokenizer.decode(ids, skip_special_tokens=False))

    try:
        _check_bos(render([_QUESTION], True), tokenizer, findings)
        opening = text([_QUESTION])
        open_end = text([_QUESTION], add_generation_prompt=False)
    except Exception as e:  # a template may raise anything
        findings.problems.append(
            f"the template cannot render one user turn: {_reason(e)}; correct prompt.template, or "
            "write one, or set prompt.style: completion for a model that is not for chat"
        )
        return
    try:
        conversation = text(_TURNS)
    except Exception as e:
        findings.problems.append(
            f"the template cannot render user, assistant, user: {_reason(e)}; with it no request "
            "may have a history"
        )
        return
    if lost_role := _lost_role(_TURNS, conversation):
        findings.problems.append(
            f"of user, assistant, user the template loses or moves the {lost_role} turn; loop over "
            "`messages` in prompt.template and write each one's content"
        )
    elif _QUESTION["content"] in opening:
        longer = len(opening) > len(open_end)
        bos = tokenizer.bos_token or " "  # a blank occurs in no text here
        _check_marker(opening, conversation, bos, findings, longer=longer)
    try:
        if _lost_role([_SYSTEM], text([_SYSTEM, *_TURNS])):
            findings.warnings.append(
                "the template drops a system message and says nothing; write it in "
                "prompt.template, or let it call raise_exception"
            )
    except Exception:
        pass  # the template refuses system messages


def _check_marker(
    opening: str, conversation: str, bos: str, findings: Findings, *, longer: bool
) -> None:
    """Check that a prompt ends with the text that precedes an answer in a conversation.

    `longer`: whether add_generation_prompt makes the prompt longer.
    """
    question, answer = _QUESTION["content"], _ANSWER["content"]
    end = opening.partition(question)[2]
    marker = conversation.partition(question)[2].partition(answer)[0]
    # A tokenizer that encodes turn by turn may begin each with bos.
    ending, beginning = end.replace(bos, ""), marker.replace(bos, "")
    # The model may have to write the rest itself, such as the channel of its answer.
    may_continue = longer and beginning.startswith(ending)
    if not beginning or not (ending.startswith(beginning) or may_continue):
        findings.problems.append(
            f"a prompt ends in {end!r} after the user's text, and in a conversation {marker!r} "
            "stands before the answer; end prompt.template with what begins an answer, under "
            "{% if add_generation_prompt %}"
        )


def _check_bos(ids: list[int], tokenizer: Any, findings: Findings) -> None:
    bos = tokenizer.bos_token_id
    if bos is None:
        return
    if ids[:2] == [bos, bos]:
        findings.problems.append(
            f"a prompt begins with {tokenizer.bos_token!r} twice; take bos_token out of "
            "prompt.template, or add_bos_token out of tokenizer_config.json"
        )
    elif ids[:1] != [bos] and list(tokenizer.encode("maple"))[:1] == [bos]:
        findings.warnings.append(
            f"a prompt does not begin with {tokenizer.bos_token!r}, with which the tokenizer "
            "begins a text; if the model was trained so, begin prompt.template with {{ bos_token }}"
        )


def _lost_role(turns: Sequence[Message], text: str) -> str | None:
    """Return the role of the first turn that is missing from the text or out of order."""
    for turn in turns:
        _, content, text = text.partition(turn["content"])
        if not content:
            return turn["role"]
    return None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
