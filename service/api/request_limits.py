"""Limits on requests to vLLM's generating routes, in addition to vLLM's own."""

from collections.abc import Mapping
from typing import Any

from service.api import body_budget, grammar_limits
from service.errors import InvalidRequest

MAX_STOP = 1_000
MAX_BAD_WORDS = 1_024
MAX_BAD_WORD_CHARACTERS = 32_768
MAX_PROMPT_LOGPROBS = 16_384
MAX_ANSWER_LOGPROBS = 24_576
MAX_ITEMS_CHARACTERS = 131_072
_CHARACTERS_PER_TOKEN = 3
_USUAL_TOKENS = 1_024  # of an answer that has no limit but the context
# Keys that ask for several sequences per prompt, on any route; an absent key counts as 1.
_COUNTS = ("n", "best_of")
# Keys that may hold a list of prompts.
_LISTS = ("items", "prompt", "messages", "questions")
# Keys whose values may be long. Any other object or array may become a grammar, on some route.
_MAY_BE_LONG = frozenset(
    {"messages", "prompt", "input", "items", "query", "system", "questions", "documents", "state"}
    | {"allowed_token_ids", "stop_token_ids", "logit_bias", "bad_words", "stop"}
    | {"chat_template_kwargs"}  # text of the prompt, such as CharacterGLM's session_meta
    # OpenAI's and Anthropic's, which vLLM only returns or ignores.
    | {"metadata", "prediction", "functions", "mcp_servers", "context_management"}
)
# Keys that an error message may name. It must not echo any other key: that is the client's text.
_GRAMMARS = frozenset(
    {"output_config", "response_format", "structured_outputs", "text", "tool_choice", "tools"}
)


def parse(body: bytes) -> Mapping[str, Any]:
    """Return the parsed body. Raises MalformedBody, or InvalidRequest if it is no object."""
    request = body_budget.parse(body)
    if not isinstance(request, Mapping):
        raise InvalidRequest("the body must be a JSON object")
    return request


def sequences(request: Mapping[str, Any], max_sequences: int, max_tokens: int | None = None) -> int:
    """Return how many sequences a body asks for.

    `max_tokens` is the YAML's, for a body without its own. Raises InvalidRequest for more than
    `max_sequences`, and for what would take vLLM long on the event loop.
    """
    count, param = 1, None
    for key in _COUNTS:
        value = request.get(key)
        if value is not None and type(value) is not int:
            raise InvalidRequest(f"{key} must be an integer", param=key)
        if value is not None and value > 1:
            count, param = max(count, value), key
    for key in _LISTS:
        prompts = _prompts(request.get(key), key)
        if prompts > 1:
            count, param = count * prompts, key
    if count > max_sequences:
        raise InvalidRequest(
            f"one request may ask for {max_sequences} sequences at most (n times the number of "
            "prompts)",
            param=param,
        )
    _check_stop(request.get("stop"))
    _check_bad_words(request.get("bad_words"), count)
    _check_prompt_logprobs(request)
    _check_answer_logprobs(request, count, max_tokens or _USUAL_TOKENS)
    _check_items(request.get("items"))
    if request.get("background"):
        raise InvalidRequest(
            "background is not taken: an answer is given to the request that asks for it",
            param="background",
        )
    work = 0
    tools = _grammar_tools(_tools(request), request.get("tool_choice"))
    for key, value in {**request, "tools": tools}.items():
        if isinstance(value, dict | list) and key not in _MAY_BE_LONG:
            work += grammar_limits.check(value, key if key in _GRAMMARS else None, work)
    return count


def _tools(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tools of a body, also those in OpenAI's namespaces, and those that Anthropic's
    messages add (`tool_addition`)."""
    tools = _objects(request.get("tools"))
    for message in _objects(request.get("messages")):
        for block in _objects(message.get("content")):
            added = block.get("tool")
            if isinstance(added, dict):
                tools += _objects([added.get("definition")])
    return [part for tool in tools for part in _objects(tool.get("tools")) or [tool]]


def _objects(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _prompts(value: Any, key: str) -> int:
    """Count the prompts in a value. A single prompt, of token ids or messages, is a list too."""
    if key == "questions" and isinstance(value, dict):
        return max(1, len(value))
    if not isinstance(value, list) or not value:
        return 1
    first = value[0]
    if key == "messages":
        return len(value) if isinstance(first, list) else 1
    return 1 if isinstance(first, int) else len(value)


def _check_stop(stop: Any) -> None:
    strings = stop if isinstance(stop, list) else [stop]
    if any(isinstance(string, str) and len(string) > MAX_STOP for string in strings):
        raise InvalidRequest(f"a stop string has at most {MAX_STOP} characters", param="stop")


def _check_bad_words(words: Any, count: int) -> None:
    """vLLM tokenises each word for each prompt on the event loop."""
    if not isinstance(words, list):
        return
    characters = sum(len(word) for word in words if isinstance(word, str))
    if len(words) * count > MAX_BAD_WORDS or characters * count > MAX_BAD_WORD_CHARACTERS:
        raise InvalidRequest(
            f"bad_words has at most {MAX_BAD_WORDS} words and {MAX_BAD_WORD_CHARACTERS} "
            "characters, divided by the number of sequences",
            param="bad_words",
        )


def _check_prompt_logprobs(request: Mapping[str, Any]) -> None:
    """vLLM makes an object of each log probability of a prompt on the event loop."""
    param = "prompt_logprobs"
    each = request.get(param)
    if each is None and request.get("echo"):
        param = "logprobs"
        each = request.get(param)
    if each is None:
        return
    tokens = sum(_tokens(request.get(key)) for key in ("prompt", "messages", "input"))
    if (abs(_number(each)) + 1) * tokens > MAX_PROMPT_LOGPROBS:
        raise InvalidRequest(
            f"one request may ask for about {MAX_PROMPT_LOGPROBS} log probabilities of its "
            "prompts; ask for fewer at each token, or send a shorter prompt",
            param=param,
        )


def _check_answer_logprobs(request: Mapping[str, Any], count: int, max_tokens: int) -> None:
    """vLLM makes an object of each log probability of an answer; without `stream` all at once."""
    ids = request.get("logprob_token_ids")
    param = "top_logprobs" if "top_logprobs" in request else "logprobs"
    each = max(_number(request.get(param)), len(ids) if isinstance(ids, list) else 0)
    lengths = ("max_tokens", "max_completion_tokens", "max_output_tokens")
    tokens = max(_number(request.get(key)) for key in lengths) or max_tokens
    if each and not request.get("stream") and (each + 1) * tokens * count > MAX_ANSWER_LOGPROBS:
        raise InvalidRequest(
            f"one request without stream may ask for {MAX_ANSWER_LOGPROBS} log probabilities of "
            "its answers; ask for fewer at each token, for fewer tokens, or for a stream",
            param=param,
        )


def _check_items(items: Any) -> None:
    """vLLM tokenises all of them on the event loop."""
    texts = items if isinstance(items, list) else []
    if sum(len(text) for text in texts if isinstance(text, str)) > MAX_ITEMS_CHARACTERS:
        raise InvalidRequest(
            f"items have at most {MAX_ITEMS_CHARACTERS} characters in all", param="items"
        )


def _number(value: Any) -> float:
    """Return a number, also one that is written as text, as vLLM takes it; 0 for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return 0


def _tokens(value: Any) -> int:
    """Estimate the tokens of a prompt or conversation."""
    if isinstance(value, str):
        return len(value) // _CHARACTERS_PER_TOKEN
    if isinstance(value, dict):
        return sum(map(_tokens, value.values()))
    if isinstance(value, list):
        return sum(map(_tokens, value))
    return 1 if isinstance(value, int) else 0


def _grammar_tools(tools: list[dict[str, Any]], choice: Any) -> list[dict[str, Any]]:
    """Return the tools that become a grammar: those with `strict`, or those that must be called.

    Other tools are only text in the prompt. OpenAI's two routes and Anthropic's differ in where the
    tool's name is, and in the values of `choice`.
    """

    def function_of(value: Any) -> dict[str, Any]:
        function = value.get("function", value) if isinstance(value, dict) else {}
        return function if isinstance(function, dict) else {}

    # vLLM takes a choice that names a function and no type for one of that function.
    kind = choice.get("type", "function") if isinstance(choice, dict) else choice
    if kind in (None, "auto", "none"):
        return [tool for tool in tools if function_of(tool).get("strict")]
    name = function_of(choice).get("name")

    def chosen(tool: dict[str, Any]) -> bool:
        own = function_of(tool).get("name")
        return name in (None, own) or str(name).endswith(f"__{own}")  # with its namespace

    return [tool for tool in tools if chosen(tool)]
