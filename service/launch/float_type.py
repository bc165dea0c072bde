"""The float type a CPU computes in: it multiplies in software what it has no instructions for."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from service.model_config import ModelConfig
from service.weights import tensor_files

# Names in torch.cpu.get_capabilities() of what multiplies matrices of a type; one is enough. x86,
# then ARM. AVX-512 alone has no products of bfloat16, and is not among them (not measured).
_PRODUCTS = {
    "bfloat16": ("amx_bf16", "avx512_bf16", "bf16"),
    "float16": ("amx_fp16", "avx512_fp16", "fp16_arith"),
}
_SPELLINGS = {"half": "float16", "float": "float32"}  # vLLM's other names


def choose(args: argparse.Namespace, config: ModelConfig) -> str | None:
    """Let a CPU compute in a type that it has instructions for, unless engine.dtype insists.

    Puts the type into vLLM's `args`, which name the model's folder. Returns why it is not the
    model's own, or why it should not be what engine.dtype says; None where all is well. A quantised
    model keeps its type, because vLLM's kernels for it take no float32.
    """
    import torch
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return None
    file = Path(args.model) / "config.json"
    checkpoint = tensor_files.read_json(file) if file.exists() else {}
    checkpoint = {**(checkpoint.get("text_config") or {}), **checkpoint}  # that of what answers
    if args.quantization or "quantization_config" in checkpoint:
        return None
    wanted = _SPELLINGS.get(args.dtype, args.dtype)
    if wanted == "auto":
        wanted = _of_checkpoint(checkpoint)
    if has_products(wanted, torch.cpu.get_capabilities()):
        return None
    software = f"this processor multiplies {wanted} in software"
    if "dtype" in config.engine:
        return f"{software}: float32 is faster, and is chosen where engine.dtype is not set"
    args.dtype = "float32"
    return software


def has_products(dtype: str, capabilities: Mapping[str, object]) -> bool:
    """Whether a processor multiplies matrices of this type in hardware.

    `capabilities` is what torch.cpu.get_capabilities() returns. One that tells nothing of such
    instructions (Power, RISC-V) counts as having them: the choice is vLLM's there.
    """
    told = [bool(capabilities[name]) for name in _PRODUCTS.get(dtype, ()) if name in capabilities]
    return any(told) or not told


def _of_checkpoint(config: Mapping[str, object]) -> str:
    """The type of vLLM's `dtype: auto`: that of config.json, but bfloat16 for float32."""
    stored = config.get("dtype") or config.get("torch_dtype")
    return "float16" if stored == "float16" else "bfloat16"
