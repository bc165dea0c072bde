"""Weights in 8 bits on a CPU, from any checkpoint: `engine.quantization: cpu_int8`."""

from typing import Any, Self

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)

NAME = "cpu_int8"
_LARGEST = 127
_SMALLEST = 1e-12  # of a range


class _Matrix:
    """A matrix [outputs, inputs] in 8 bits, with a scale for each output.

    Inputs are quantised when they come, each token by its own range. The product is fbgemm's, in
    torch: it takes a third of float32's time where a processor has AVX2 alone, and vLLM's own
    kernel for 8 bits there longer than float32.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        weight = weight.float()
        scales = weight.abs().amax(1).clamp(min=_SMALLEST).double() / _LARGEST
        zeros = torch.zeros(len(weight), dtype=torch.long)
        quantised = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self._packed = torch.ops.quantized.linear_prepack(quantised, None)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        # The kernel has one scale for all rows: with it alone one request would spoil the others.
        largest = rows.abs().amax(1, keepdim=True).clamp(min=_SMALLEST)
        product = torch.ops.quantized.linear_dynamic(rows / largest, self._packed, True) * largest
        product = product.to(x.dtype).reshape(*x.shape[:-1], product.shape[1])
        return product if bias is None else product + bias


class _Linear(UnquantizedLinearMethod):  # type: ignore[misc]  # vLLM is not typed for us
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if getattr(layer, "_cpu_skip_gemm_dispatch", False):  # MLA reads this matrix itself
            layer.quant_method = UnquantizedLinearMethod()
            layer.quant_method.process_weights_after_loading(layer)
            return
        self._matrix = _Matrix(layer.weight.data)
        layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._matrix(x, bias)


class _Head(UnquantizedEmbeddingMethod):  # type: ignore[misc]  # vLLM is not typed for us
    """For the last matrix. Its weights may be those of the embedding, which stay as they are."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self._matrix = _Matrix(layer.weight.data)

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._matrix(x, bias)


@register_quantization_config(NAME)
class CpuInt8(QuantizationConfig):  # type: ignore[misc]  # vLLM is not typed for us
    """Quantises matrices when they are loaded. Embeddings, norms and experts stay as they are."""

    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            return _Linear()
        return _Head() if isinstance(layer, ParallelLMHead) else None
