"""Models that vLLM lacks or cannot load as published, as a `vllm.general_plugins` plugin.

vLLM calls `register` in every process it starts, bare `vllm serve` included.
"""


def register() -> None:
    """Make the models known to transformers and vLLM. May be called more than once."""
    from service.models import minicpm

    minicpm.register()
