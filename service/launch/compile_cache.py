"""Compiled code on a CPU: `chat-service compile` makes it (`compiling.py`), `serve` uses it.

Compiling takes minutes, and brings little or nothing on some processors. So `serve` starts eager,
unless this machine has compiled this model before and it brought something. On a GPU the choice is
vLLM's.
"""

import argparse
import copy
import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from service.model_config import ModelConfig

BATCHES = (1, 8)  # requests at once that are measured
_WORTHWHILE = 1.05  # less is noise, and a compiled start takes twice as long
# With one of these in the YAML the user has chosen.
CHOICES = frozenset({"enforce_eager", "compilation_config", "optimization_level"})


@dataclass(frozen=True)
class Compiled:
    """What compiling one model brought on this machine."""

    eager: list[float]  # tokens/s for each of BATCHES
    compiled: list[float]

    @property
    def gain(self) -> float:
        """How many times the speed, by geometric mean."""
        ratios = [after / before for before, after in zip(self.eager, self.compiled, strict=True)]
        return math.prod(ratios) ** (1 / len(ratios))

    @property
    def worthwhile(self) -> bool:
        return self.gain >= _WORTHWHILE


def choose(args: argparse.Namespace, config: ModelConfig) -> str | None:
    """Run eager on a CPU where compiled code is not kept or brings nothing, unless told otherwise.

    Puts the choice into vLLM's `args`, which name the model's folder. Returns why; None: the choice
    is the user's, or vLLM's.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or CHOICES & config.engine.keys():
        return None
    try:
        found = Compiled(**json.loads(file(args).read_text()))
    except (OSError, ValueError, TypeError):  # none, or not what this version writes
        args.enforce_eager = True
        return (
            f"Not compiled: `chat-service compile {config.name}` takes some minutes, measures what "
            "it brings here (1.0 to 1.3 times the speed, by processor), and keeps it for later "
            "starts"
        )
    args.enforce_eager = not found.worthwhile
    used = "Compiled code is used" if found.worthwhile else "Compiled code is not used"
    return f"{used}: it was measured at {found.gain:.2f} times the speed"


def file(args: argparse.Namespace) -> Path:
    """Where the result is kept: for this model, these arguments, these versions, this processor.

    It is in the folder of the compiled code, so that both are there or neither.
    """
    import torch
    from vllm import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    args = copy.copy(args)
    args.enforce_eager = False
    engine_args = AsyncEngineArgs.from_cli_args(args)
    graph = engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER).compute_hash()
    processor = sorted(name for name, has in torch.cpu.get_capabilities().items() if has is True)
    parts = "\n".join([graph, torch.__version__, *processor])
    name = hashlib.sha256(parts.encode()).hexdigest()[:16]
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / f"chat-service-{name}.json"
