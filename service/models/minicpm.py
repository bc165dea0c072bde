"""MiniCPM-2B: vLLM has the model but not its config class.

Compatible with OpenBMB/MiniCPM-2B-sft-fp32 and -bf16, whose config.json has neither `model_type`
nor `tie_word_embeddings` and otherwise points at remote code. The keys beside Llama's, and the tied
embeddings, are those of OpenBMB/MiniCPM's configuration_minicpm.py.
"""

from transformers import LlamaConfig


class MiniCPMConfig(LlamaConfig):  # type: ignore[misc]  # transformers is not typed for us
    """The config.json of MiniCPM-1B and -2B.

    Embeddings are multiplied by scale_emb, residual branches by scale_depth / sqrt(layers), and the
    final hidden state is divided by hidden_size / dim_model_base.
    """

    model_type = "minicpm"

    tie_word_embeddings: bool = True
    scale_emb: int | float = 1
    scale_depth: int | float = 1
    dim_model_base: int = 1
