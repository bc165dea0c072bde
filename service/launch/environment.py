"""The environment variables of a server's processes."""

import json
import math
import os
import warnings

from service import vllm_plugins
from service.errors import ConfigError
from service.launch import log_config
from service.launch.run_folder import FOLDER_VARIABLE, RunFolder
from service.model_config.schema import MAX_STOP_STRINGS
from service.settings import Settings

# vLLM's variables that would bypass a protection, run what nobody checks, or be ignored in silence.
# (variable, the value that changes nothing, beside an empty one) -> why others are refused.
_REFUSED = {
    ("VLLM_ALLOW_INSECURE_SERIALIZATION", "0"): "lets the engine's sockets run code: unset it",
    ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0"): "lets clients load adapters from any path: unset "
    "it, and give them with --adapter",
    ("VLLM_API_KEY", ""): "guards /v1 and leaves POST / open: unset it, and set SERVICE_API_KEY, "
    "which guards both",
    ("VLLM_CONFIGURE_LOGGING", "1"): "turns off the log in which prompts are left out: unset it",
    ("VLLM_DEBUG_LOG_API_SERVER_RESPONSE", "0"): "logs answers: unset it, and set "
    "SERVICE_LOG_PROMPTS",
    ("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "0"): "mixes up requests of the same id: unset it",
    ("VLLM_ENABLE_COHERE_API", "0"): "opens routes that go past the queue: unset it",
    ("VLLM_ENABLE_RESPONSES_API_STORE", "0"): "keeps all answers in memory, and gives one to any "
    "client that knows its id: unset it",
    ("VLLM_LOGGING_CONFIG_PATH", ""): "would be ignored: unset it; --verbose logs everything",
    ("VLLM_LOGGING_LEVEL", "INFO"): "would be ignored: unset it; --verbose logs everything",
    ("VLLM_MODEL_REDIRECT_PATH", ""): "loads other files than those that are checked: unset it, "
    "and give source.path",
    ("VLLM_SERVER_DEV_MODE", "0"): "opens routes that change the engine: unset it",
    ("VLLM_TEST_FORCE_LOAD_FORMAT", ""): "loads other weights than those that are checked: unset "
    "it, and set engine.load_format",
    ("VLLM_USE_RUST_FRONTEND", "0"): "serves without POST / and without the queue: unset it",
}


def check() -> None:
    """Raise ConfigError for a variable of vLLM's that would undo what the service promises."""
    for (variable, harmless), reason in _REFUSED.items():
        if os.environ.get(variable, "") not in ("", harmless):
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
        # Triton multiplies float32 in TF32 by default. vLLM's float32 attention on a GPU is then
        # off by 0.005 nats, and by 1e-6 without (benchmarks/results/gpu.md).
        "TRITON_F32_DEFAULT": "ieee",
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
        # vLLM's default is 4.
        "VLLM_MAX_STOP_STRINGS": str(MAX_STOP_STRINGS),
        # vLLM's defaults are 16,384 and 1,024. `request_limits` covers other routes.
        "VLLM_MAX_N_SEQUENCES": str(settings.max_sequences),
        "VLLM_MAX_COMPLETION_PROMPTS": str(settings.max_sequences),
    }
    if not settings.verbose:
        defaults |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "TORCH_LOGS": "-torch._library.triton"}
        warnings.simplefilter("ignore")
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ.pop("SERVICE_API_KEY", None)  # other processes need only its hash
