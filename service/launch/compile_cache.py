"""Compiled code on a CPU: `chat-service compile` builds it, `serve` uses it.

Compiling takes minutes, and gains little or nothing on some processors. So `serve` runs eager,
unless `chat-service compile` has measured a gain for this model on this machine. On a GPU vLLM
chooses.
"""

import argparse
import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from service import vllm_arguments
from service.model_config import ModelConfig

BATCHES = (1, 8)  # batch sizes that are measured
_WORTHWHILE = 1.05  # a smaller gain is noise, and a compiled start takes twice as long
# Keys of `engine` in the YAML with which the user chooses.
CHOICES = frozenset({"enforce_eager", "compilation_config", "optimization_level"})


@dataclass(frozen=True)
class Compiled:
    """Measured speed of one model on this machine, eager and compiled."""

    eager: list[float]  # tokens/s for each of BATCHES
    compiled: list[float]

    @property
    def gain(self) -> float:
        """Compiled speed / eager speed, as a geometric mean."""
        ratios = [after / before for before, after in zip(self.eager, self.compiled, strict=True)]
        return math.prod(ratios) ** (1 / len(ratios))

    @property
    def worthwhile(self) -> bool:
        return self.gain >= _WORTHWHILE


def choose(args: argparse.Namespace, config: ModelConfig) -> str | None:
    """Choose eager mode on a CPU, unless compiled code is cached and faster.

    Sets `args.enforce_eager`; `args` must name the model's folder. Returns the reason, or None if
    the user or vLLM chooses.
    """
    if not vllm_arguments.on_cpu() or CHOICES & config.engine.keys():
        return None
    try:
        result = Compiled(**json.loads(file(args).read_text()))
    except (OSError, ValueError, TypeError):  # no file, or one of another version
        args.enforce_eager = True
        return (
            "Not compiled: `chat-service compile`, with the same MODEL and --set, measures in some "
            "minutes what it brings here (1.0 to 1.4 times the speed, by processor), and keeps it "
            "for later starts"
        )
    args.enforce_eager = not result.worthwhile
    used = "Compiled code is used" if result.worthwhile else "Compiled code is not used"
    return f"{used}: it was measured at {result.gain:.2f} times the speed"


def file(args: argparse.Namespace) -> Path:
    """Return the result's path, unique to the model, arguments, versions and processor.

    It is in the folder of the compiled code, so both are deleted together.
    """
    import torch

    graph = vllm_arguments.engine_config(args).compute_hash()
    processor = sorted(name for name, has in torch.cpu.get_capabilities().items() if has is True)
    threads = str(torch.get_num_threads())
    parts = "\n".join([graph, torch.__version__, threads, *processor])
    name = hashlib.sha256(parts.encode()).hexdigest()[:16]
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / f"chat-service-{name}.json"
