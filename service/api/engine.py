"""vLLM's engine as the contract needs it: prompts in, text out, its errors made ours."""

import asyncio
import functools
import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

import jinja2
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.inputs import tokens_input
from vllm.renderers import TokenizeParams
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from service.api import fast_render
from service.errors import (
    EngineDead,
    GenerationFailed,
    InvalidRequest,
    PromptTooLong,
    RequestError,
    Unavailable,
)
from service.models import vllm_private
from service.prompting import Message

_logger = logging.getLogger("service")

# Up to here rendering and tokenising takes less time than handing it to vLLM's threads and back.
_INLINE_CHARACTERS = 4096
# A text has fewer characters for each token, 3 to 5 in prose. Tokenising takes 300 bytes for each
# character: without this bound 1.2 GB for 4 MiB of text, where a token may have 128 characters.
_MAX_CHARACTERS_PER_TOKEN = 16
_MIN_CHARACTERS = 131_072  # a request that is allowed 100 kB of tools
# What vLLM's TokenizeParams name as at fault when a prompt does not fit.
_TOO_LONG = ("input_text", "input_tokens")
# Up to here the text of an answer is made on the loop: about a millisecond.
_INLINE_TOKENS = 2048


class Chunk(NamedTuple):
    """New text from the engine; `tokens` counts all of this request's so far.

    `echoed` is how many characters of the whole text are the prompt's.
    """

    text: str
    tokens: int
    finish_reason: str | None
    echoed: int = 0


def _control_tokens(tokenizer: Any) -> set[str]:
    """Text that the tokenizer would make one token of that is no text, named or only added."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}


class Engine:
    """vLLM's AsyncLLM. Every method raises RequestError alone."""

    def __init__(self, client: EngineClient, state: State) -> None:
        model = client.model_config
        self.context: int = model.max_model_len
        # The YAML's sampling is vLLM's override_generation_config, so this has both.
        self.defaults: dict[str, Any] = model.get_diff_sampling_param()
        self._client = client
        self._renderer = client.renderer
        self._tokenizer = client.renderer.get_tokenizer()
        self.max_characters = max(self.context * _MAX_CHARACTERS_PER_TOKEN, _MIN_CHARACTERS)
        self._fast = fast_render.rust_tokenizer(self._tokenizer)
        self._control_tokens = _control_tokens(self._tokenizer)
        online = state.online_renderer
        self._chat = fast_render.chat_params(
            online.chat_template,
            online.chat_template_content_format,
            online.default_chat_template_kwargs,
        )
        self._template: Callable[[list[Message]], str | None] = lambda _: None
        if self._fast is not None:
            self._template = fast_render.chat_template(client.renderer, self._chat)

    def stop_at(self, strings: Sequence[str]) -> None:
        """End every answer before these, on every route that generates.

        A control token is stopped at by its id, because no text shows it. Other strings are looked
        for in the text: " User" is not the token of "User".
        """
        vocabulary = self._tokenizer.get_vocab()
        ids = {s: vocabulary[s] for s in strings if s in vocabulary}
        control = {s: id for s, id in ids.items() if not self._text([id])}
        if texts := [string for string in strings if string not in control]:
            self.defaults["stop"] = texts
        if control:
            self.defaults["stop_token_ids"] = list(control.values())
        vllm_private.stop_every_answer(self._client, texts, list(control.values()))

    async def tokenize(self, prompt: list[Message] | str) -> list[int]:
        """Token ids of a rendered prompt, as vLLM's own routes make them."""
        try:
            rendered = await self._render(prompt)
        except (VLLMClientError, ValueError, TypeError, jinja2.TemplateError) as e:
            if getattr(e, "parameter", None) in _TOO_LONG:
                raise PromptTooLong(
                    f"the prompt does not fit the model's context of {self.context} tokens, which "
                    "must also hold the answer; shorten the prompt or the history",
                    param="prompt",
                ) from e
            if isinstance(prompt, str) or len(prompt) == 1:
                raise InvalidRequest(
                    "the model's tokenizer or chat template does not accept this prompt; send "
                    "text in which every character is whole (no lone surrogate)",
                    param="prompt",
                ) from e
            # From the chat template, or the tokenizer that stands for it.
            raise InvalidRequest(
                "the model's chat template does not accept these turns; usually they must "
                "alternate between user and assistant, with system at most first",
                param="history",
            ) from e
        token_ids: list[int] = rendered["prompt_token_ids"]
        return token_ids

    async def _render(self, prompt: list[Message] | str) -> Any:
        renderer = self._renderer
        if isinstance(prompt, str):
            if any(token in prompt for token in self._control_tokens):
                # Text, also when it spells a control token.
                encode = functools.partial(
                    self._tokenizer.encode, prompt, split_special_tokens=True
                )
                inline = len(prompt) <= _INLINE_CHARACTERS
                ids = encode() if inline else await asyncio.to_thread(encode)
                return {"prompt_token_ids": ids}
            params = renderer.default_cmpl_tok_params
            if len(prompt) > _INLINE_CHARACTERS:
                (rendered,) = await renderer.render_cmpl_async([{"prompt": prompt}], params)
                return rendered
            if (short := self._encode(prompt, params)) is not None:
                return short
            (rendered,) = renderer.render_cmpl([{"prompt": prompt}], params)
            return rendered
        params = renderer.default_chat_tok_params
        if sum(len(message["content"]) + 16 for message in prompt) > _INLINE_CHARACTERS:
            _, (rendered,) = await renderer.render_chat_async([prompt], self._chat, params)
            return rendered
        if (text := self._template(prompt)) is not None:
            rendered = {"prompt": text}
        else:
            _, rendered = renderer.render_messages(prompt, self._chat)
        # Some tokenizers make ids of the messages themselves.
        if "prompt" in rendered and (short := self._encode(rendered["prompt"], params)) is not None:
            return short
        (rendered,) = renderer.tokenize_prompts([rendered], params)
        return rendered

    def _encode(self, text: str, params: TokenizeParams) -> dict[str, list[int]] | None:
        """What vLLM's renderer makes of a text that fits; None: ask that."""
        if self._fast is None:
            return None
        encoding = self._fast.encode(text, add_special_tokens=params.add_special_tokens)
        return {"prompt_token_ids": encoding.ids} if len(encoding) < self.context else None

    async def generate(
        self,
        token_ids: list[int],
        params: dict[str, Any],
        request_id: str,
        *,
        stream: bool,
        echo: bool,
        cache_salt: str | None,
        trace_headers: dict[str, str] | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """Chunks as they come, or one whole; with `echo` the first begins with the prompt's text.

        Only requests with the same `cache_salt` share their prefixes in the cache. Closing or
        cancelling it aborts the request.
        """
        kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
        # Text is needed at every step only to send it or to look for stop strings.
        stepwise = stream or "stop" in params
        echoed = self._text(token_ids) if echo else ""
        answer: list[int] = []
        begun = False
        try:
            sampling = SamplingParams(
                **params,
                output_kind=kind,
                detokenize=stepwise,
                skip_clone=True,  # it is this request's alone
            )
            outputs = self._client.generate(
                tokens_input(token_ids, cache_salt=cache_salt),
                sampling,
                request_id,
                trace_headers=trace_headers,
            )
            # Closing it sends the abort; a generator that is only dropped sends it later, when
            # another request may have its slot.
            async with aclosing(outputs):
                async for output in outputs:
                    (completion,) = output.outputs
                    answer += completion.token_ids
                    reason = completion.finish_reason
                    if reason == "error":
                        raise GenerationFailed("the engine failed this request; send it again")
                    if reason == "abort":
                        raise Unavailable("the server is stopping", retry_after=5)
                    text = completion.text
                    if not stepwise:
                        text = await self._decode(token_ids if echo else [], answer, reason)
                    elif not begun and (text or reason):
                        begun = True
                        text = echoed + text if echo else self._begin(answer, text)
                    yield Chunk(text, len(answer), reason, len(echoed))
        except RequestError:
            raise
        except EngineDeadError as e:
            raise EngineDead() from e
        except GracefulHTTPError as e:
            raise Unavailable("the engine's queue is full", retry_after=1) from e
        except (VLLMClientError, ValueError) as e:
            # Values that pass our bounds but not the engine's (such as a stop string it rejects).
            _logger.warning("request %s refused by the engine: %s", request_id, e)
            raise InvalidRequest("the engine does not accept these sampling values") from e
        except Exception as e:
            _logger.exception("request %s failed in the engine", request_id)
            raise GenerationFailed("the engine failed this request; send it again") from e

    async def make_one_token(self) -> None:
        """Raises RequestError when the engine cannot."""
        prompt = await self.tokenize("hi")
        params = {"max_tokens": 1, "temperature": 0.0}
        request_id = f"probe-{uuid.uuid4().hex}"
        async for _ in self.generate(
            prompt, params, request_id, stream=False, echo=False, cache_salt=None
        ):
            pass

    async def _decode(self, prompt: list[int], answer: list[int], reason: str | None) -> str:
        """A whole answer as the tutorials decode it, special tokens dropped."""
        ids = prompt + (answer[:-1] if reason == "stop" else answer)  # less the stop token
        if len(ids) <= _INLINE_TOKENS:
            text = self._text(ids)
        else:
            text = await asyncio.to_thread(self._text, ids)
        return text.rstrip("\ufffd") if reason == "length" else text  # a character cut in two

    def _begin(self, answer: list[int], text: str) -> str:
        """The first text of a stream, such that the whole is what `_decode` gives.

        vLLM decodes after the prompt and keeps a space that decoding the answer alone drops.
        """
        if text.startswith(" ") and not self._text(answer).startswith(" "):
            return text[1:]
        return text

    def _text(self, token_ids: list[int]) -> str:
        if self._fast is not None:
            return str(self._fast.decode(token_ids, skip_special_tokens=True))
        text: str = self._tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
