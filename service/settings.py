"""The settings of a deployment, from environment variables and flags."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.clients import Client, hash_of, read_file
from service.errors import ConfigError
from service.model_config import nearest

PREFIX = "SERVICE_"

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseSettings):
    """Each field is an environment variable: `SERVICE_` and the field's name in capitals."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(6006, description="Port to listen on.")
    cache_dir: Path = Field(
        # `~` stays where a user has no home folder, and `load` refuses it.
        Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "chat-service",
        description="Where the embedded model and compiled code are kept; ModelScope's models are "
        "under MODELSCOPE_CACHE.",
    )
    api_key: SecretStr | None = Field(
        None,
        description="When set, all but GET /, /ping, /health, /health/live and /health/ready ask "
        "for it as a Bearer.",
    )
    api_key_file: Path | None = Field(
        None,
        description="A file of keys instead, a line each: NAME KEY [WEIGHT] [requests=N/min] "
        "[tokens=N/min]; read when changed.",
    )
    metrics_key: bool = Field(True, description="Whether /metrics asks for the key too.")
    cache_per_key: bool = Field(
        False, description="Whether each key has a prefix cache of its own, hidden from the others."
    )
    max_waiting: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Sequences that may wait [default: 4 times what the engine runs at once]."
    )
    queue_timeout: Seconds = Field(60, description="Seconds that a request may wait in the queue.")
    max_sequences: Annotated[int, Field(ge=1)] = Field(
        64, description="Sequences that one request may ask for: n times its prompts."
    )
    max_body_bytes: Annotated[int, Field(ge=1024)] = Field(
        4 * 2**20, description="The longest body of a request."
    )
    max_items: Annotated[int, Field(ge=64)] = Field(
        512,
        description="Objects or arrays in one array of a body, such as the turns of a chat, and "
        "keys of one object; more lets a request delay the others.",
    )
    body_timeout: Seconds = Field(30, description="Seconds in which headers, and body, must come.")
    write_timeout: Seconds = Field(
        30, description="Seconds for which a client may leave its answer unread."
    )
    max_connections: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Open connections, of each API process [default: 4096, or 512 more than the "
        "sequences that run and wait].",
    )
    drain_timeout: Seconds = Field(
        30, description="Seconds that accepted requests have to finish after SIGTERM."
    )
    stall_timeout: Seconds = Field(
        10, description="Seconds without a sign of life after which the engine counts as stalled."
    )
    step_timeout: Seconds = Field(
        600,
        description="Seconds that the engine may compute one step; four times its slowest, if that "
        "is more.",
    )
    log_prompts: bool = Field(
        False, description="Whether prompts and answers are logged, also in the tutorials' format."
    )
    verbose: bool = Field(False, description="Show everything that vLLM and its libraries log.")

    def url(self, *, tls: bool = False) -> str:
        """Return the service's URL for a client on this machine."""
        host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http{'s' * tls}://{f'[{host}]' if ':' in host else host}:{self.port}"

    def clients(self) -> Mapping[str, Client] | None:
        """Return hash of API key -> client, or None if no key is required.

        Raises ConfigError for an unusable file or an empty key.
        """
        key = self.api_key.get_secret_value().strip() if self.api_key else None
        if self.api_key_file:
            if key:
                raise ConfigError("give SERVICE_API_KEY or SERVICE_API_KEY_FILE, not both")
            clients = read_file(self.api_key_file, f"SERVICE_API_KEY_FILE: {self.api_key_file}")
        elif key is None:
            return None
        else:
            clients = {hash_of(key, "SERVICE_API_KEY"): Client("default")} if key else {}
        if not clients:
            raise ConfigError("the API key is empty; unset it to serve without a key")
        return clients


def load(**flags: object) -> Settings:
    """Read the environment; flags of the command line override it (None: not set).

    Prints and ignores an unknown SERVICE_ variable, such as a cluster's SERVICE_NAME. Raises
    ConfigError naming the variable, also for a name that looks like a typing error.
    """
    known = {name.upper() for name in Settings.model_fields}
    for variable in os.environ:
        name = variable.removeprefix(PREFIX)
        if variable.startswith(PREFIX) and name not in known:
            # Compare names without the common prefix. Others use it too: a variable such as
            # SERVICE_CHECK_TIMEOUT, which Registrator reads, is near enough to none.
            if hint := nearest(name, known, PREFIX, cutoff=0.75):
                raise ConfigError(f"{variable}: unknown setting{hint}")
            print(f"{variable} is no setting of this service; it is ignored", file=sys.stderr)
    values = {name: value for name, value in flags.items() if value is not None}
    try:
        loaded = Settings(**values)  # type: ignore[arg-type]
    except ValidationError as e:
        error = e.errors(include_url=False, include_input=False)[0]
        field = str(error["loc"][0])
        place = f"--{field}" if field in values else f"{PREFIX}{field.upper()}"
        raise ConfigError(f"{place}: {error['msg'][0].lower()}{error['msg'][1:]}") from None
    if loaded.cache_dir.parts[:1] == ("~",):
        raise ConfigError("SERVICE_CACHE_DIR: ~ is no folder here; write the whole path")
    return loaded
