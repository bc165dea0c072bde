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

from service.models.vllm_private import cpu_int8_kernel

NAME = "cpu_int8"
_LARGEST = 127


class _Matrix(nn.Module):
    """A matrix [outputs, inputs] in 8 bits, with a scale for each output.

    Inputs are quantised when they come, each token by its own range. The product is vLLM's.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / _LARGEST
        quantised = (weight / scale).round().to(torch.int8)
        self.weight = nn.Parameter(quantised, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.input_scale = self.input_zero_point = self.azp_adj = self.bias = None
        self.logical_widths = [len(weight)]
        self.kernel = cpu_int8_kernel()
        self.kernel.process_weights_after_loading(self)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        product: torch.Tensor = self.kernel.apply_weights(self, x, bias)
        return product


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
