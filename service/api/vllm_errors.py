"""Translates vLLM's error texts into our own.

vLLM's texts echo input and name paths and addresses of the server. We pass on only numbers, and
parameter names that are in a route's schema. Patterns see only the first 1000 characters.
"""

import re
from collections.abc import Collection, Sequence
from http import HTTPStatus
from typing import Any

from service.errors import RequestError

MAX_CHARACTERS = 1000
_MAX_DEPTH = 16  # parts of a param: `messages.0.content`
# What vLLM's errors name as the parameter when a prompt is too long, in any key of the body.
TOO_LONG = ("input_tokens", "input_text")

# (beginning of a text of vLLM 0.32, our text). {0} and so on are the matched numbers.
_SENTENCES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), sentence)
    for pattern, sentence in (
        (r"The model `", "there is no model of this name; this server has {models}"),
        (
            r"This model's maximum context length is (\d{1,9}) tokens\. However, your prompt "
            r"contains (?:at least )?(\d{1,9}) input tokens",
            "the prompt has {1} tokens or more, and the model's context of {0} must hold it and "
            "the answer; shorten it",
        ),
        (
            r"This model's maximum context length is (\d{1,9}) tokens\. However, your prompt "
            r"contains (\d{1,9}) characters",
            "the prompt has {1} characters, and the model's context of {0} tokens must hold it and "
            "the answer; shorten it",
        ),
        (
            r"The engine prompt length (\d{1,9}) exceeds the max_model_len (\d{1,9})",
            "the prompt has {0} tokens, and the model's context of {1} must hold it and the "
            "answer; shorten it",
        ),
        (
            r"max_\w{1,24}=(\d{1,9}) cannot be greater than \w{1,40}=(\d{1,9})",
            "{0} tokens of answer are more than the model's context of {1}; ask for fewer",
        ),
        (
            r"1 validation error:\s{1,9}Unsupported Media Type",
            "this route takes JSON only; send the header `Content-Type: application/json`",
        ),
        (
            r'"auto" tool choice requires|tool_choice=',
            "this server has no parser for tool calls, so tool_choice can only be none; its "
            "operator can set engine.enable_auto_tool_choice and engine.tool_call_parser",
        ),
        (
            r"Chat template is passed with request",
            "chat_template is the server's own; leave it out",
        ),
        (
            r"At most (\d{1,4}) (?:image|audio|video|vision_chunk)\(s\) may",
            "a prompt holds at most {0} such pictures, sounds or videos for this model",
        ),
        (
            r".{1,200} is not a multimodal model",
            "this model takes text only: no pictures, sounds or videos",
        ),
        (r"You must set `--enable-prompt-embeds`", "prompt_embeds is not taken; send text"),
        (
            r"Token id -?\d{1,30} is out of vocabulary|(?:\w{1,40} )?token_id\(s\)",
            "a token id is not in the model's vocabulary",
        ),
        (
            r"Requested (?:sample|prompt) logprobs of -?\d{1,30}, which is greater than max "
            r"allowed: (\d{1,9})",
            "logprobs are given for at most {0} tokens at a place",
        ),
        (r"Stream options can only be defined", "stream_options goes with `stream: true` alone"),
        (
            r"Response with id '",
            "there is no response of this id; this server keeps none unless its operator has "
            "turned that on",
        ),
        (r"n must be 1 when using greedy", "n must be 1 where temperature is 0"),
    )
)
# Valid values of vLLM's sampling parameters, for errors other than a wrong type.
_BOUNDS = {
    "temperature": "a number from 0 to 2",
    "top_p": "a number above 0, at most 1",
    "top_k": "an integer of 1 or more; 0 or -1 considers every token",
    "min_p": "a number from 0 to 1",
    "presence_penalty": "a number from -2 to 2",
    "frequency_penalty": "a number from -2 to 2",
    "repetition_penalty": "a number above 0",
    "max_tokens": "an integer of 1 or more",
    "min_tokens": "an integer from 0 to max_tokens",
    "logprobs": "an integer of 0 or more",
    "prompt_logprobs": "an integer of 0 or more, and not with `stream: true`",
    "top_logprobs": "an integer of 0 or more, with `logprobs: true`",
    "stop": "strings that are not empty",
    "bad_words": "strings of at least one token",
    "logit_bias": "token ids of the model's vocabulary with numbers",
    "allowed_token_ids": "token ids of the model's vocabulary",
    "cache_salt": "a string of 1 to 128 characters without @ and slashes",
    "tool_choice": 'none, auto, required, or one function of tools as {"type": "function", ...}',
    "tools": "an array of at least one tool",
    "response_format": "text, json_object, or json_schema with a schema that can be compiled",
    "structured_outputs": "one constraint (json, regex, choice or grammar) that can be compiled",
}
_SUBJECT = re.compile(r"`?([a-z_]{1,40})`? must ")
_UNSUPPORTED = re.compile(r".{0,200}?(?:not (?:currently )?|un|only )support", re.S)
# Pydantic's errors: type, location, and the bound that a message names.
_VALIDATION = re.compile(r"\d{1,9} validation errors?:\s{1,9}\{'type': '")
_ERROR = re.compile(r"\{'type': '([a-z_]{1,40})', 'loc': '([^']{1,200})'")
_BOUND = re.compile(
    r"'msg': 'Input should be ((?:greater|less) than (?:or equal to )?-?[\d.]{1,20})'"
)
_ITEMS = re.compile(r"'msg': 'List should have at most (\d{1,9}) items?")
_KINDS: tuple[tuple[str, str], ...] = (
    ("missing", "is required"),
    ("extra_forbidden", "is not a parameter of this route"),
    ("float", "must be a number"),
    ("int", "must be an integer"),
    ("string", "must be a string"),
    ("bool", "must be true or false"),
    ("list", "must be an array"),
    ("dict", "must be an object"),
    ("model", "must be an object"),
    ("literal", "is not one of the values that this route takes"),
    ("too_long", "is longer than this route takes"),
    ("too_short", "is shorter than this route takes"),
)
_STATUSES = {
    404: "there is no such route or object here; GET / lists the routes",
    405: "this route does not take this method; the header Allow says which it takes",
    501: "this server does not offer this",
    503: "the engine cannot take this request now; send it again later",
}


class Refused(RequestError):
    """A vLLM error: its status and type, our text."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message, param=param, retry_after=1 if status == 503 else None)
        self.status = status
        self.type = kind


def text(error: dict[str, Any]) -> str:
    """Return the beginning of vLLM's own text, for the log of --verbose."""
    return str(error.get("message") or error.get("detail") or "")[:MAX_CHARACTERS]


def explain(
    status: int, error: dict[str, Any], models: Sequence[str], keys: Collection[str]
) -> Refused:
    """Turn a vLLM or FastAPI error into ours.

    `models` are the model names that this server accepts, `keys` all keys in its routes' schemas.
    """
    message = text(error)
    param = _safe_param(error.get("param"), keys)
    kind = str(error.get("type") or "")
    if not re.fullmatch(r"[A-Za-z_ ]{1,40}", kind):
        kind = HTTPStatus(status).phrase
    if status >= 500:
        default = "the server failed at this request; its log has more under the request's id"
        return Refused(status, kind, _STATUSES.get(status, default))
    for pattern, sentence in _SENTENCES:
        if match := pattern.match(message):
            translated = sentence.format(*match.groups(), models=", ".join(models))
            return Refused(status, kind, translated, param)
    if _VALIDATION.match(message):
        return Refused(status, kind, _explain_validation(message, param), param)
    if param is None and (match := _SUBJECT.match(message)):
        param = _safe_param(match[1], keys)
    if param is None:
        default = (
            "the server does not take this request: its values do not go together, or the model's "
            "chat template does not accept these turns"
        )
        return Refused(status, kind, _STATUSES.get(status, default))
    if _UNSUPPORTED.match(message):
        return Refused(status, kind, f"{param} is not supported by this server", param)
    if bounds := _BOUNDS.get(param.partition(".")[0]):
        return Refused(status, kind, f"{param} must be {bounds}", param)
    return Refused(status, kind, f"{param} has a value that this server does not take", param)


def _explain_validation(message: str, param: str | None) -> str:
    errors = _ERROR.findall(message)
    # For a union, pydantic lists one error per member, all at the same location.
    kinds = {kind for kind, place in errors if place == errors[0][1]}
    kind = next(iter(kinds)) if len(kinds) == 1 else ""
    if kind == "json_invalid":
        return "the body is not valid JSON"
    subject = param or "the body"
    if kind.startswith(("greater", "less")) and (bound := _BOUND.search(message)):
        return f"{subject} must be {bound[1]}"
    if "too_long" in kinds and (items := _ITEMS.search(message)):
        return f"{subject} has at most {items[1]} items"
    for prefix, sentence in _KINDS:
        if kind.startswith(prefix):
            return f"{subject} {sentence}"
    return f"{subject} does not have the form that this route takes"


def _safe_param(param: Any, keys: Collection[str]) -> str | None:
    """Return the longest prefix of vLLM's param made of known keys and array indices, or None."""
    if param in TOO_LONG:
        return str(param)
    parts: list[str] = []
    for part in str(param or "")[:MAX_CHARACTERS].removeprefix("body.").split(".")[:_MAX_DEPTH]:
        if part not in keys and not (parts and re.fullmatch(r"[0-9]{1,6}", part)):
            break
        parts.append(part)
    return ".".join(parts) or None
