"""How this deployment runs. The only reader of the environment."""

import hashlib
import os
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.errors import ConfigError
from service.model_config import ModelConfig, nearest

PREFIX = "SERVICE_"
# Names the file with the ApiProcessConfig of this run.
CONFIG_VARIABLE = "CHAT_SERVICE_CONFIG"


class Settings(BaseSettings):
    """One field is one environment variable: `SERVICE_` and the field's name in capitals."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(6006, description="Port to listen on.")
    cache_dir: Path = Field(
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chat-service",
        description="Where the embedded model is kept; ModelScope's are under MODELSCOPE_CACHE.",
    )
    api_key: SecretStr | None = Field(
        None, description="When set, every route but the health checks asks for it as a Bearer."
    )
    api_key_file: Path | None = Field(None, description="A file with the key, instead.")
    log_prompts: bool = Field(
        False, description="Whether prompts and answers are logged, also in the tutorials' format."
    )
    verbose: bool = Field(False, description="Show everything that vLLM and its libraries log.")

    def key_hash(self) -> str | None:
        """SHA-256 of the API key in hex, or None. Raises ConfigError for an unusable file."""
        key = self.api_key.get_secret_value().strip() if self.api_key else None
        if self.api_key_file:
            if key:
                raise ConfigError("give SERVICE_API_KEY or SERVICE_API_KEY_FILE, not both")
            try:
                key = self.api_key_file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as e:
                reason = getattr(e, "strerror", None) or "not UTF-8 text"
                raise ConfigError(f"SERVICE_API_KEY_FILE: {self.api_key_file}: {reason}") from None
        if key == "":
            raise ConfigError("the API key is empty; unset it to serve without a key")
        return hashlib.sha256(key.encode()).hexdigest() if key else None


class ApiProcessConfig(BaseModel):
    """What `launch` hands to every API process, as a file named by one environment variable."""

    model_config = ConfigDict(frozen=True)

    model: ModelConfig
    key_hash: str | None
    log_prompts: bool
    instance: str  # tells this run's answers from those of another on the same port


def load(**flags: object) -> Settings:
    """Read the environment, with the command line's flags (None: not given) over it.

    Raises ConfigError naming the variable, and the nearest one for an unknown name.
    """
    known = {name.upper() for name in Settings.model_fields}
    for variable in os.environ:
        name = variable.removeprefix(PREFIX)
        if variable.startswith(PREFIX) and name not in known:
            # Compared without the prefix, which all of them share.
            raise ConfigError(f"{variable}: unknown setting{nearest(name, known, PREFIX)}")
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**given)  # type: ignore[arg-type]
    except ValidationError as e:
        error = e.errors(include_url=False, include_input=False)[0]
        field = str(error["loc"][0])
        place = f"--{field}" if field in given else f"{PREFIX}{field.upper()}"
        raise ConfigError(f"{place}: {error['msg'][0].lower()}{error['msg'][1:]}") from None


def read_api_process_config() -> ApiProcessConfig:
    """The config that `launch` wrote. Raises ConfigError outside of `chat-service serve`."""
    file = os.environ.get(CONFIG_VARIABLE)
    if not file:
        raise ConfigError("this plugin runs inside `chat-service serve`, which sets it up")
    return ApiProcessConfig.model_validate_json(Path(file).read_bytes(), strict=False)
