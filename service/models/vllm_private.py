"""The one place that touches names of vLLM 0.32 that begin with an underscore."""

from vllm.transformers_utils import config as vllm_config


def assume_model_type(architecture: str, model_type: str) -> None:
    """Load a config.json that names `architecture` but has no model_type as `model_type`."""
    vllm_config._ARCHITECTURE_TO_MODEL_TYPE[architecture] = model_type
