"""vLLM's engine as the contract needs it: prompts in, text out, its errors made ours."""

import asyncio
import functools
import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import jinja2
from starlette.datastructures import State
from transformers import TokenizersBackend
from transformers.utils.chat_template_utils import render_jinja_template
from vllm.engine.protocol import EngineClient
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.inputs import tokens_input
from vllm.renderers import ChatParams, TokenizeParams
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from service.contract import Chunk
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
from service.tokenizers.literal import control_pattern

_logger = logging.getLogger("service")

# Up to here rendering and tokenising takes less time than handing it to vLLM's threads and back.
_INLINE_CHARACTERS = 4096
# What vLLM's TokenizeParams name as at fault when a prompt does not fit.
_TOO_LONG = ("input_text", "input_tokens")
# Up to here the text of an answer is made on the loop: about a millisecond.
_INLINE_TOKENS = 2048


def chat_params(
    template: str | None, content_format: str, kwargs: dict[str, Any] | None
) -> ChatParams:
    """As vLLM's own chat route renders (ChatCompletionRequest.build_chat_params)."""
    return ChatParams(
        chat_template=template,
        chat_template_content_format=content_format,
        chat_template_kwargs={
            **(kwargs or {}),
            "add_generation_prompt": True,
            "tokenize": False,
        },
    )


def _fast(tokenizer: Any) -> Any:
    """The Rust tokenizer inside, or None where there is none.

    What transformers does around it for each text costs half as much again. vLLM gives its threads
    copies, and asks this one for the text of tokens alone.
    """
    if not isinstance(tokenizer, TokenizersBackend):
        return None
    fast = tokenizer.backend_tokenizer
    fast.no_truncation()
    fast.no_padding()
    return fast


def chat_template(renderer: Any, chat: ChatParams) -> Callable[[list[Message]], str | None]:
    """Short turns to text by the chat template alone; None: ask vLLM's renderer.

    That one searches each message for pictures and tools, and the template for its options, which
    takes longer than the template. It edits some system messages.
    """
    tokenizer = renderer.get_tokenizer()
    control = control_pattern(tokenizer)
    variables = {**tokenizer.special_tokens_map, **chat.chat_template_kwargs}
    del variables["tokenize"]

    def render(messages: list[Message]) -> str | None:
        if any(message["role"] == "system" for message in messages):
            return None
        if control.search("\0".join(message["content"] for message in messages)):
            return None
        try:
            (text,), _ = render_jinja_template([messages], chat_template=template, **variables)
        except Exception:  # the template's own; that one says which
            return None
        return str(text)

    turns: list[Message] = [
        {"role": "user", "content": " maple\n"},
        {"role": "assistant", "content": "birch"},
        {"role": "user", "content": "elm"},
    ]
    try:
        template = tokenizer.get_chat_template(chat.chat_template)
        for probe in (turns[:1], turns):
            seen, rendered = renderer.render_messages(probe, chat)
            texts = [message["content"] for message in seen]
            if texts != [message["content"] for message in probe]:
                return lambda _: None
            if rendered.get("prompt") != render(probe):
                return lambda _: None
    except Exception:  # there is none, or it wants other turns
        return lambda _: None
    return render


def _control_tokens(tokenizer: Any) -> set[str]:
    """Text that the tokenizer would make one token of that is no text, named or only added."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}


class Engine:
    """vLLM's AsyncLLM as `contract.Engine`: its objects and errors become ours here."""

    def __init__(self, client: EngineClient, state: State) -> None:
        model = client.model_config
        self.context: int = model.max_model_len
        # The YAML's sampling is vLLM's override_generation_config, so this has both.
        self.defaults: dict[str, Any] = model.get_diff_sampling_param()
        self._client = client
        self._renderer = client.renderer
        self._tokenizer = client.renderer.get_tokenizer()
        # A longer text cannot fit, whatever it is.
        self.max_characters: int = self.context * self._tokenizer.max_chars_per_token
        self._fast = _fast(self._tokenizer)
        self._control_tokens = _control_tokens(self._tokenizer)
        online = state.online_renderer
        self._chat = chat_params(
            online.chat_template,
            online.chat_template_content_format,
            online.default_chat_template_kwargs,
        )
        self._template: Callable[[list[Message]], str | None] = lambda _: None
        if self._fast is not None:
            self._template = chat_template(client.renderer, self._chat)

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
