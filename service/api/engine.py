"""Wraps vLLM's engine for `POST /`: prompts in, text out, errors as RequestError."""

import asyncio
import functools
import logging
import traceback
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

import jinja2
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.renderers import TokenizeParams
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from service.api import fast_render, vllm_errors
from service.errors import (
    EngineDead,
    GenerationFailed,
    InvalidRequest,
    PromptTooLong,
    RequestError,
    Unavailable,
)
from service.models import vllm_private
from service.prompting import Message, Stripped

_logger = logging.getLogger("service")

# Up to this length, rendering and tokenising takes less time than a hand-over to vLLM's threads.
_INLINE_CHARACTERS = 4096
# Real text has fewer characters per token: prose has 3 to 5. Tokenising takes 300 bytes per
# character. Without this limit, 4 MiB of text takes 1.2 GB where a token may have 128 characters.
_MAX_CHARACTERS_PER_TOKEN = 16
_MIN_CHARACTERS = 131_072  # room for 100 kB of tools
# Up to this many tokens are decoded on the event loop: about a millisecond.
_INLINE_TOKENS = 2048


class Chunk(NamedTuple):
    """New text from the engine.

    `tokens` is the request's token count so far. `echoed` is the number of characters at the start
    of the whole text that repeat the prompt.
    """

    text: str
    tokens: int
    finish_reason: str | None
    echoed: int = 0


def _control_tokens(tokenizer: Any) -> set[str]:
    """Return the strings that the tokenizer turns into special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}


def _characters(message: Message) -> int:
    """Return about how many characters a turn has in the prompt."""
    return len(message["content"]) + len(str(message.get("metadata", ""))) + 16


class Engine:
    """vLLM's AsyncLLM. Methods raise only RequestError."""

    def __init__(self, client: EngineClient, state: State) -> None:
        model = client.model_config
        self.context: int = model.max_model_len
        # Includes the YAML's sampling, which is vLLM's override_generation_config.
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
        """End every answer before any of these strings, on all generating routes.

        A control token is matched by its id, because it decodes to no text. Other strings are
        matched in the text, because " User" is another token than "User".
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
        """Return the token ids of a prompt, the same as vLLM's own routes. Raises RequestError."""
        try:
            rendered = await self._render(prompt)
        except (VLLMClientError, ValueError, TypeError, jinja2.TemplateError) as e:
            if getattr(e, "parameter", None) in vllm_errors.TOO_LONG:
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
            # The chat template raised this, or the tokenizer that replaces it.
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
                # A control token in the prompt is plain text.
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
        if sum(map(_characters, prompt)) > _INLINE_CHARACTERS:
            _, (rendered,) = await renderer.render_chat_async([prompt], self._chat, params)
            return rendered
        if (text := self._template(prompt)) is not None:
            rendered = {"prompt": text}
        else:
            _, rendered = renderer.render_messages(prompt, self._chat)
        # Some tokenizers turn messages into token ids directly: then there is no "prompt".
        if "prompt" in rendered and (short := self._encode(rendered["prompt"], params)) is not None:
            return short
        (rendered,) = renderer.tokenize_prompts([rendered], params)
        return rendered

    def _encode(self, text: str, params: TokenizeParams) -> dict[str, list[int]] | None:
        """Return the same as vLLM's renderer, or None if the caller must use that one."""
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
        strip: bool = False,
        cache_salt: str | None,
        trace_headers: dict[str, str] | None = None,
        adapter: LoRARequest | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """Yield chunks as they come, or without `stream` one with the whole text.

        With `echo`, the first chunk begins with the prompt's text; with `strip`, the whole text has
        no white space around it. Only requests with the same `cache_salt` share prefix cache
        entries. Closing or cancelling it aborts the request. Raises RequestError.
        """
        kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
        # vLLM must decode at each step only for a stream or stop strings.
        stepwise = stream or "stop" in params
        echoed = self._text(token_ids) if echo else ""
        stripped = Stripped() if strip else None
        answer: list[int] = []
        started = False
        try:
            sampling = SamplingParams(
                **params,
                output_kind=kind,
                detokenize=stepwise,
                skip_clone=True,  # no other request uses this object
            )
            outputs = self._client.generate(
                tokens_input(token_ids, cache_salt=cache_salt),
                sampling,
                request_id,
                trace_headers=trace_headers,
                lora_request=adapter,
            )
            # Close it explicitly to abort at once. A dropped generator aborts later, when another
            # request may already use the slot.
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
                    elif not started and (text or reason):
                        started = True
                        text = echoed + text if echo else self._first_text(answer, text)
                    if stripped is not None:
                        text = stripped.next(text, is_last=bool(reason))
                    yield Chunk(text, len(answer), reason, len(echoed))
        except RequestError:
            raise
        except EngineDeadError as e:
            raise EngineDead() from e
        except GracefulHTTPError as e:
            raise Unavailable("the engine's queue is full", retry_after=1) from e
        except (VLLMClientError, ValueError) as e:
            # The values pass our checks but not the engine's.
            kind = type(e).__name__  # its text may repeat what the client sent
            _logger.warning("request %s refused by the engine: %s", request_id, kind)
            raise InvalidRequest("the engine does not accept these sampling values") from e
        except Exception as e:
            where = "".join(traceback.format_tb(e.__traceback__))
            kind = type(e).__name__
            _logger.error("request %s failed in the engine: %s\n%s", request_id, kind, where)
            raise GenerationFailed("the engine failed this request; send it again") from e

    async def make_one_token(self) -> None:
        """Generate one token, to probe the engine. Raises RequestError."""
        prompt = await self.tokenize("hi")
        params = {"max_tokens": 1, "temperature": 0.0}
        request_id = f"probe-{uuid.uuid4().hex}"
        async for _ in self.generate(
            prompt, params, request_id, stream=False, echo=False, cache_salt=None
        ):
            pass

    async def _decode(self, prompt: list[int], answer: list[int], reason: str | None) -> str:
        """Decode a whole answer as the tutorials do, without special tokens."""
        ids = prompt + (answer[:-1] if reason == "stop" else answer)  # without the stop token
        if len(ids) <= _INLINE_TOKENS:
            text = self._text(ids)
        else:
            text = await asyncio.to_thread(self._text, ids)
        # An answer that was cut short may end with half a character.
        return text.rstrip("\ufffd") if reason == "length" else text

    def _first_text(self, answer: list[int], text: str) -> str:
        """Adjust the first text of a stream, so that the whole equals that of `_decode`.

        vLLM decodes the answer after the prompt, and so keeps a leading space that `_decode` drops.
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
