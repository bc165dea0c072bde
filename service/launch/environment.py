"""What every process of a server reads from its environment."""

import json
import math
import os
import warnings

from service import vllm_plugins
from service.launch import log_config
from service.launch.run_folder import FOLDER_VARIABLE, RunFolder
from service.settings import Settings


def prepare(folder: RunFolder, settings: Settings) -> None:
    """What every process of the server reads from its environment; `folder` must outlive them."""
    logging_config = log_config.configuration(folder, verbose=settings.verbose)
    folder.logging_file.write_text(json.dumps(logging_config))
    vllm_plugins.choose()
    os.environ[FOLDER_VARIABLE] = str(folder.path)
    os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(folder.logging_file)
    defaults = {
        # As vLLM's own command line sets it.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        # Seconds; the end of the server waits so long for a collector that does not answer.
        "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "2",
        # Prompts are encoded one at a time: handing them to a pool of threads costs more.
        "TOKENIZERS_PARALLELISM": "false",
        # On a CPU vLLM leaves what it compiles to torch, whose own place no container keeps: /tmp.
        "TORCHINDUCTOR_CACHE_DIR": str(settings.cache_dir / "torchinductor"),
        # An executor with several workers gives a step up, and the engine with it, after 300 s.
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(math.ceil(settings.step_timeout)),
        # A large model on a slow machine loads and compiles for longer than vLLM's 600 s.
        "VLLM_ENGINE_READY_TIMEOUT_S": "7200",
        # vLLM sets it on a CPU when torch has read it already: the number of threads is not in the
        # compiled code.
        "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1",
        # Longer than the longest Retry-After: who comes back meets no closed connection.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75",
        # vLLM allows 16,384 and 1,024; the routes that its own limits do not reach have ours.
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
    os.environ.pop("SERVICE_API_KEY", None)  # its hash is all that the other processes need
