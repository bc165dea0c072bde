"""XVERSE-7B, compatible with xverse/XVERSE-7B and -7B-Chat: plain Llama under another name."""

from transformers import LlamaConfig


class XverseConfig(LlamaConfig):  # type: ignore[misc]  # transformers is not typed for us
    """Source: xverse's configuration_xverse.py."""

    model_type = "xverse"
