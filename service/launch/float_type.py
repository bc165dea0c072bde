"""Chooses the float type on a CPU. Types without hardware instructions are slow."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from service import vllm_arguments
from service.model_config import ModelConfig
from service.weights import tensor_files

# Names in torch.cpu.get_capabilities() of instructions that multiply matrices of a type; one is
# enough. x86 first, then ARM. AVX-512 alone is missing: docs/performance.md has what it makes.
_INSTRUCTIONS = {
    "bfloat16": ("amx_bf16", "avx512_bf16", "bf16"),
    "float16": ("amx_fp16", "avx512_fp16", "fp16_arith"),
}
_SPELLINGS = {"half": "float16", "float": "float32"}  # vLLM's other names


def choose(args: argparse.Namespace, config: ModelConfig) -> str | None:
    """Use float32 on a CPU without instructions for the model's type, unless engine.dtype is set.

    Sets `args.dtype`; `args` must name the model's folder. Returns why it is not the model's own
    type, or why engine.dtype is slow; else None. A quantised model keeps its type, because vLLM's
    kernels for it do not support float32; ours do.
    """
    import torch

    from service.models import cpu_int8

    if not vllm_arguments.on_cpu():
        return None
    checkpoint = tensor_files.read_config(Path(args.model))
    # The values of config.json win over those of its text_config.
    checkpoint = {**(checkpoint.get("text_config") or {}), **checkpoint}
    by_vllm = args.quantization and args.quantization != cpu_int8.NAME
    if by_vllm or checkpoint.get("quantization_config") is not None:
        return None
    wanted = _SPELLINGS.get(args.dtype, args.dtype)
    if wanted == "auto":
        wanted = _of_checkpoint(checkpoint)
    if has_products(wanted, torch.cpu.get_capabilities()):
        return None
    reason = f"this processor has no instructions for {wanted}"
    if insists(config):
        return f"{reason}; without engine.dtype it computes in float32, which is faster"
    args.dtype = "float32"
    return f"{reason}; engine.dtype={wanted} insists, with half the memory"


def insists(config: ModelConfig) -> bool:
    """Whether the user has chosen the float type."""
    return config.engine.get("dtype") not in (None, "auto")


def has_products(dtype: str, capabilities: Mapping[str, object]) -> bool:
    """Whether a processor multiplies matrices of this type in hardware.

    `capabilities` is the result of torch.cpu.get_capabilities(). If it does not list such
    instructions (Power, RISC-V), return True, so that vLLM chooses.
    """
    names = [name for name in _INSTRUCTIONS.get(dtype, ()) if name in capabilities]
    return any(capabilities[name] for name in names) or not names


def _of_checkpoint(config: Mapping[str, object]) -> str:
    """Return vLLM's `dtype: auto`: the type in config.json, but bfloat16 for float32."""
    stored = config.get("dtype") or config.get("torch_dtype")
    return "float16" if stored == "float16" else "bfloat16"
