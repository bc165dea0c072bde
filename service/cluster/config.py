"""The YAML file of `chat-service cluster`: its schema, and the models that it names."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from service import own_model, settings
from service.clients import Client
from service.errors import ConfigError
from service.model_config import InvalidConfig, ModelConfig, Origins, document, nearest
from service.model_config.document import Document
from service.model_config.schema import Name, Section
from service.settings import Settings

# What `chat-service cluster` runs without a file.
DEFAULT: dict[str, Any] = {"models": {"smollm2-135m-instruct": {"replicas": 2}}}
# The first parts of paths that the front answers itself or sends to the default model.
_ROUTES = frozenset(
    "-|detokenize|docs|generative_scoring|health|inference|invocations|kv_event_sources|load|metrics"
    "|openapi.json|ping|redoc|static|tokenize|v1|v2|version".split("|")
)
# What `--status` and our messages call the front.
FRONT = "front"
# Arguments of vLLM's server. Ray Serve has the place of the server, and HAProxy is before it.
_NOT_HERE = frozenset({"api_server_count", "root_path", "ssl_certfile", "ssl_keyfile"})
_NOT_HERE_BECAUSE = "a replica has one API process, behind HAProxy; put TLS and a prefix before it"
# Names of our Serve applications begin with it.
PREFIX = "chat-service"
# How long a replica that Serve stops stays reachable, until HAProxy has left it out.
DEREGISTER_SECONDS = 5

_Count = Annotated[int, Field(ge=1, le=10_000)]


class Replicas(Section):
    """One model of the cluster, served under the key's name."""

    model: str | None = Field(
        None, description="A name of the catalogue, a YAML file, or a folder. Absent: the key."
    )
    replicas: _Count | Annotated[list[_Count], Field(min_length=2, max_length=2)] = Field(
        1, description="How many; `[1, 4]`: from 1 to 4, by load."
    )
    gpus: Annotated[float, Field(ge=0, le=64)] | None = Field(
        None,
        description="GPUs of each replica; 0.5 lets two share one. Absent: what "
        "`engine.tensor_parallel_size` and `engine.pipeline_parallel_size` need, or 0 in a cluster "
        "without GPUs. `chat-service check MODEL` says whether the model fits in their memory.",
    )
    cpus: Annotated[float, Field(gt=0, le=1024)] = Field(
        1, description="CPU cores of each replica, and threads of an engine on a CPU."
    )
    queue: _Count = Field(
        32,
        description="With `replicas: [min, max]`: another replica is started above this many "
        "requests, running or waiting, in each.",
    )
    set: dict[str, Any] = Field(
        default_factory=dict, description="Values over those of the model's YAML, as with `--set`."
    )

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if isinstance(self.replicas, list) and self.replicas[0] > self.replicas[1]:
            raise ValueError("replicas: the first number is the minimum, the second the maximum")
        return self


class ClusterFile(Section):
    """What the file may hold."""

    default: str | None = Field(
        None, description="The model that answers requests without `model`. May be absent with one."
    )
    models: Annotated[dict[Name, Replicas], Field(min_length=1)] = Field(
        description=Replicas.__doc__ or ""
    )
    fronts: Annotated[int, Field(ge=1, le=100)] = Field(
        2, description="Processes that choose a replica by `model`. They need no GPU."
    )
    settings: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings by their names in small letters, over the SERVICE_ variables.",
    )

    @model_validator(mode="after")
    def _default_is_known(self) -> Self:
        if self.default is None and len(self.models) > 1:
            raise ValueError("default: name the model that answers requests without `model`")
        if self.default is not None and self.default not in self.models:
            raise ValueError(f"default: models has no such key{nearest(self.default, self.models)}")
        return self


@dataclass(frozen=True)
class ClusterModel:
    """One model of a cluster, with its whole configuration."""

    config: ModelConfig
    origins: Origins
    min_replicas: int
    max_replicas: int
    gpus: float | None
    cpus: float
    queue: int
    files: str  # changes with the files of its adapters, or of a model in a folder

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def served_names(self) -> list[str]:
        """All values of `model` in a request that mean this model or one of its adapters."""
        return [self.name, *self.config.aliases, *self.config.adapters]

    def gpus_of_replica(self, *, has_gpus: bool) -> float:
        """Return the GPUs that each replica reserves in a cluster with or without GPUs."""
        if self.gpus is not None:
            return self.gpus
        engine = self.config.engine
        needed = engine.get("tensor_parallel_size", 1) * engine.get("pipeline_parallel_size", 1)
        return float(needed) if has_gpus else 0.0


@dataclass(frozen=True)
class Cluster:
    """All models of a cluster, and the settings of each replica."""

    models: dict[str, ClusterModel]
    default: str
    fronts: int
    settings: Settings  # without the API key
    # SHA-256 of each API key -> its owner. None: no key is required.
    clients: Mapping[str, Client] | None

    def owners(self) -> dict[str, str]:
        """Return served name -> name of its model."""
        return {served: m.name for m in self.models.values() for served in m.served_names}


def load(file: Path | None) -> Cluster:
    """Read and validate a cluster's file, the models it names, and the environment.

    Raises ConfigError with file, line, key and the nearest valid name.
    """
    read = document.read(file) if file else Document(DEFAULT, {}, [])
    origins = Origins(file or Path("the default cluster"), read.lines, frozenset())
    mistakes = read.mistakes
    try:
        parsed = ClusterFile.model_validate(read.data)
    except ValidationError as e:
        mistakes += document.explain(e.errors(include_url=False), origins, ClusterFile)
    if mistakes:
        raise InvalidConfig(mistakes, origins)
    models: dict[str, ClusterModel] = {}
    owner: dict[str, str] = {}
    for name, section in parsed.models.items():
        place = origins.of(("models", name))
        if name in _ROUTES:
            raise ConfigError(f"{place}: is a route of the service; choose another name")
        if name == FRONT:
            raise ConfigError(f"{place}: is the name of the front itself; choose another name")
        if not name.isascii():  # HAProxy compares paths as they are sent, percent-encoded
            raise ConfigError(
                f"{place}: is part of paths here, so it has none but ASCII letters; choose another "
                "name, and give the model's own as `model`"
            )
        model = _model(name, section, place)
        for served in model.served_names:
            if served in owner:
                raise ConfigError(f"{place}: {owner[served]} is served as {served!r} too")
            owner[served] = name
        models[name] = model
    for name, model in models.items():
        for route in model.config.routes:
            if (first := route.split("/")[1]) in models:
                place = origins.of(("models", name))
                raise ConfigError(f"{place}: {first} is served as {route!r} too")
    loaded = _settings(parsed.settings, origins)
    if loaded.api_key_file:  # read by this command and by the one that runs, each in its folder
        absolute = {"api_key_file": loaded.api_key_file.absolute()}
        loaded = loaded.model_copy(update=absolute)
    clients = loaded.clients()
    return Cluster(
        models=models,
        default=parsed.default or next(iter(models)),
        fronts=parsed.fronts,
        settings=loaded.model_copy(update={"api_key": None}),
        clients=None if clients is None else dict(clients),
    )


def _model(name: str, section: Replicas, place: str) -> ClusterModel:
    assignments = [f"{key}={yaml.safe_dump(value)}" for key, value in section.set.items()]
    assignments.append(f"name={json.dumps(name)}")
    try:
        config, origins = own_model.load(section.model or name, assignments)
    except ConfigError as e:
        raise ConfigError(f"{place}: {e}") from None
    for key in _NOT_HERE & config.engine.keys():
        raise ConfigError(f"{place}: engine.{key}: {_NOT_HERE_BECAUSE}")
    count = section.replicas
    least, most = count if isinstance(count, list) else (count, count)
    return ClusterModel(
        config=config,
        origins=origins,
        min_replicas=least,
        max_replicas=most,
        gpus=section.gpus,
        cpus=section.cpus,
        queue=section.queue,
        files=_stamp(config),
    )


def _settings(values: Mapping[str, Any], origins: Origins) -> Settings:
    for key in values:
        if key == "cache_dir" or key not in Settings.model_fields:
            hint = nearest(key, Settings.model_fields)
            if key == "cache_dir":  # `--status` finds the cluster in it, without the file
                hint = " in a file; set SERVICE_CACHE_DIR"
            raise ConfigError(f"{origins.of(('settings', key))}: unknown setting{hint}")
    try:
        return settings.load(**values)
    except ConfigError as e:  # it calls the values flags
        for key in values:
            if str(e).startswith(flag := f"--{key}: "):
                place = origins.of(("settings", key))
                raise ConfigError(f"{place}: {str(e).removeprefix(flag)}") from None
        raise


def _stamp(config: ModelConfig) -> str:
    """Return a text that changes when the files of an adapter or a local model change."""
    paths = [config.source.path, *(adapter.path for adapter in config.adapters.values())]
    files = [file for path in paths if path for file in sorted(Path(path).expanduser().glob("*"))]
    return " ".join(f"{file}:{file.stat().st_mtime_ns}" for file in files if file.is_file())
