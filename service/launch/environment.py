"""The environment variables of a server's processes."""

import json
import math
import os
import warnings

from service import vllm_plugins
from service.errors import ConfigError
from service.launch import log_config
from service.launch.run_folder import FOLDER_VARIABLE, RunFolder
from service.settings import Settings

# vLLM's variables that would bypass a protection of this service.
_REFUSED = {
    "VLLM_SERVER_DEV_MODE": "opens routes that change the engine: unset it",
    "VLLM_ENABLE_COHERE_API": "opens routes that go past the queue: unset it",
    "VLLM_API_KEY": "guards /v1 and leaves POST / open: unset it, and set SERVICE_API_KEY, which "
    "guards both",
    "VLLM_USE_RUST_FRONTEND": "serves without POST / and without the queue: unset it",
}


def check() -> None:
    """Raise ConfigError for a variable of vLLM's that would bypass a protection."""
    for variable, reason in _REFUSED.items():
        off = "" if variable == "VLLM_API_KEY" else "0"
        if os.environ.get(variable, off) not in ("", off):
            raise ConfigError(f"{variable} {reason}")


def prepare(folder: RunFolder, settings: Settings) -> None:
    """Set the environment of the server's processes. `folder` must outlive them."""
    logging_config = log_config.configuration(folder, verbose=settings.verbose)
    folder.logging_file.write_text(json.dumps(logging_config))
    vllm_plugins.choose()
    os.environ[FOLDER_VARIABLE] = str(folder.path)
    os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(folder.logging_file)
    defaults = {
        # As vLLM's command line sets it.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        # Seconds. Shutdown waits this long for a collector that does not answer.
        "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "2",
        # Prompts are encoded one at a time, so a thread pool only costs time.
        "TOKENIZERS_PARALLELISM": "false",
        # On a CPU torch caches compiled code, by default in /tmp, which no container keeps.
        "TORCHINDUCTOR_CACHE_DIR": str(settings.cache_dir / "torchinductor"),
        # An executor with several workers ends the engine after a step of 300 s by default.
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(math.ceil(settings.step_timeout)),
        # A large model on a slow machine may take longer to start than vLLM's 600 s.
        "VLLM_ENGINE_READY_TIMEOUT_S": "7200",
        # Do not compile for a fixed number of threads. On a CPU vLLM sets this too, but after
        # torch has read it.
        "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1",
        # Above max Retry-After, so a retry can reuse its connection.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75",
        # vLLM's defaults are 16,384 and 1,024. `request_limits` covers other routes.
        "VLLM_MAX_N_SEQUENCES": str(settings.max_sequences),
        "VLLM_MAX_COMPLETION_PROMPTS": str(settings.max_sequences),
    }
    if not settings.verbose:
        defaults |= {
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "TORCH_LOGS": "-torch._library.triton",
        }
        warnings.simplefilter("ignore")
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ.pop("SERVICE_API_KEY", None)  # other processes need only its hash
