"""Weights in 8 bits on a CPU, made while a model is loaded: `engine.quantization: cpu_int8`.

vLLM's own kernels for 8 bits are slower than float32 on a processor with AVX2 alone, and want a
checkpoint that was quantised before. This is torch's kernel (fbgemm). Weights have a scale for each
output, inputs one for each token.

A few values of an input are often a hundred times as large as the rest, which would take all the
bits. So inputs and weights are rotated before they are rounded: that spreads a large value over 64
columns, and leaves their product as it is (as in QuaRot, arXiv:2404.00456, but by blocks).
"""

import functools
import math
import warnings
from typing import Any

import torch
from torch import library
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

NAME = "cpu_int8"
_MAX_BLOCK = 64  # columns that are rotated together
_ROWS = 4096  # quantised at once: the float copy of a large output layer would be gigabytes
_MIN_SCALE = 1e-30  # a scale's least value, for an input of zeros


def register() -> None:
    """Make vLLM know the method. May be called more than once."""
    register_quantization_config(NAME)(CpuInt8Config)


class CpuInt8Config(QuantizationConfig):  # type: ignore[misc]  # vLLM is not typed for us
    """Chooses the layers: all linear ones and the output layer. Embeddings and experts stay.

    So does an output layer that is the embedding itself, as Gemma 2's.
    """

    def __init__(self) -> None:
        """Raises ValueError on a processor that has no such kernel."""
        super().__init__()
        if "fbgemm" not in torch.backends.quantized.supported_engines:
            raise ValueError(f"quantization {NAME} needs an x86 processor with AVX2")

    @classmethod
    def get_name(cls) -> str:
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CpuInt8Config":
        return cls()

    def get_quant_method(
        self, layer: torch.nn.Module, prefix: str
    ) -> UnquantizedLinearMethod | None:
        if prefix.endswith(".kv_b_proj"):  # multi-head latent attention reads the weight itself
            return UnquantizedLinearMethod()
        return _Method() if isinstance(layer, LinearBase | ParallelLMHead) else None


class _Method(UnquantizedLinearMethod):  # type: ignore[misc]  # vLLM is not typed for us
    """Loads a layer's weights as they are, and keeps them in 8 bits."""

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        layers = get_current_vllm_config().compilation_config.static_forward_context
        layer.int8_name = f"{NAME}.{len(layers)}"
        layers[layer.int8_name] = layer

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.int8 = Int8Weights(layer.weight.data)
        # Without its values. vLLM's adapters ask it for its device.
        layer.weight = torch.nn.Parameter(layer.weight.data.new_empty(0), requires_grad=False)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if torch.compiler.is_compiling():  # which knows no packed weights, but names
            name, rows = layer.int8_name, layer.int8.rows
            product: torch.Tensor = torch.ops.chat_service.int8_linear(x, name, rows)
        else:
            product = layer.int8.multiply(x)
        return product if bias is None else product + bias


class Int8Weights:
    """A matrix in 8 bits, [rows, columns]."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.rows, columns = weight.shape
        self._rotation = rotation(min(_MAX_BLOCK, columns & -columns))
        self._limit = largest_input()
        parts = torch.split(weight, _ROWS)
        rotated = (_rotate(part.float(), self._rotation) for part in parts)
        rounded, scales = zip(*map(_round, rotated), strict=True)
        with warnings.catch_warnings():  # of types that a torch after ours may not have
            warnings.simplefilter("ignore")
            quantised = torch._make_per_channel_quantized_tensor(
                torch.cat(rounded),
                torch.cat(scales),
                torch.zeros(self.rows, dtype=torch.int64),
                axis=0,
            )
        self._packed = torch.ops.quantized.linear_prepack(quantised, None)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product of `x`, [..., columns], and the matrix: [..., rows], in x's type."""
        inputs = _rotate(x.reshape(-1, x.shape[-1]).float(), self._rotation)
        scale = inputs.abs().amax(-1, keepdim=True).clamp_(min=_MIN_SCALE)
        product: torch.Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            inputs.div_(scale), 1 / self._limit, self._limit + 1, self._packed
        )
        return product.mul_(scale).to(x.dtype).view(*x.shape[:-1], self.rows)


def _round(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights in 8 bits, and the scale of each row."""
    scale = weight.abs().amax(1).clamp_(min=_MIN_SCALE) / 127
    return (weight / scale.unsqueeze(1)).round().to(torch.int8), scale


@functools.cache
def rotation(size: int) -> torch.Tensor:
    """Return Sylvester's Hadamard matrix as a rotation, [size, size]; size is a power of two."""
    signs = [
        [-1.0 if (row & column).bit_count() % 2 else 1.0 for column in range(size)]
        for row in range(size)
    ]
    return torch.tensor(signs, dtype=torch.float32) / math.sqrt(size)


def _rotate(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Rotate each block of columns. The result is a new tensor."""
    return (x.reshape(-1, len(by)) @ by).view(x.shape)


def largest_input() -> int:
    """Return the largest value that rounded inputs may have.

    A processor without VNNI adds two products in 16 bits, which overflow unless inputs have 7.
    """
    return 127 if torch.cpu.get_capabilities().get("avx512_vnni") else 63


def _multiply_by_name(x: torch.Tensor, layer: str, rows: int) -> torch.Tensor:
    weights: Int8Weights = get_forward_context().no_compile_layers[layer].int8
    return weights.multiply(x)


# The product as an operator of torch, for compiled models.
_OPERATORS: Any = library.Library("chat_service", "DEF")  # type: ignore[no-untyped-call]
_OPERATORS.define("int8_linear(Tensor x, str layer, int rows) -> Tensor")
_OPERATORS.impl("int8_linear", _multiply_by_name, "CPU")
library.register_fake(
    "chat_service::int8_linear",
    lambda x, layer, rows: x.new_empty(*x.shape[:-1], rows),
    lib=_OPERATORS,
)
