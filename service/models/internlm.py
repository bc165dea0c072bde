"""InternLM, InternLM2 and InternLM3 of Shanghai AI Laboratory.

Compatible with internlm-chat-7b, internlm2-chat-7b, internlm3-8b-instruct and their base models.

- InternLM: Llama with biases on q, k, v and o, if `bias` is set. The base of the rotation is in
  `rotary`. Source: the modeling_internlm.py that InternLM/lmdeploy carries.
- InternLM2: vLLM has the model but not its config class. Grouped q, k and v are one matrix.
- InternLM3: to vLLM it is Llama, with `qkv_bias`. It too lacks the config class.

All three have a `dynamic` scaling of the rotation, which changes nothing up to
max_position_embeddings. Beyond that the frequencies depend on the length of the whole text, which a
KV cache cannot follow, and vLLM 0.32 has no rotation for those positions but would accept them. So
the scaling is left out here, and vLLM refuses longer texts.
"""

from typing import Any

from transformers import LlamaConfig


class _Config(LlamaConfig):  # type: ignore[misc]  # transformers is not typed for us
    rope_parameters: dict[str, Any] | None = None
    bias: bool = False
    _may_have_bias = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.bias and not self._may_have_bias:
            raise ValueError("config.json: an InternLM2 or InternLM3 with bias was never published")
        super().__post_init__(**kwargs)
        rope = self.rope_parameters or {}
        if rope.get("rope_type") == "dynamic":
            self.rope_parameters = {"rope_type": "default", "rope_theta": rope["rope_theta"]}


class InternLMConfig(_Config):
    """The config.json of InternLM-7B and -20B. Raises ValueError for an unknown `rotary`."""

    model_type = "internlm"

    vocab_size: int = 103168
    bias: bool = True
    _may_have_bias = True

    def __post_init__(self, **kwargs: Any) -> None:
        rotary = kwargs.pop("rotary", None) or {}
        if rotary.get("type", "origin") not in ("origin", "dynamic"):
            raise ValueError(
                f"config.json: an InternLM with rotary of type {rotary['type']} is not known here"
            )
        if "base" in rotary:
            kwargs["rope_theta"] = float(rotary["base"])
        super().__post_init__(**kwargs)


class InternLM2Config(_Config):
    """The config.json of InternLM2 and InternLM2.5. Raises ValueError for one with biases."""

    model_type = "internlm2"

    vocab_size: int = 92544


class InternLM3Config(_Config):
    """The config.json of InternLM3. Raises ValueError for one with biases on o and the MLP."""

    model_type = "internlm3"

    vocab_size: int = 128512
    qkv_bias: bool = False
