"""A `vllm.general_plugins` plugin with models that vLLM lacks or cannot load as published.

vLLM calls `register` in each of its processes, also for bare `vllm serve`.
"""

from service.parent import end_with_parent


def register() -> None:
    """Register the models with transformers and vLLM. May be called more than once.

    In an engine process it also lets that end with its parent, where this is wanted.
    """
    end_with_parent()
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.llama import LlamaForCausalLM
    from vllm.platforms import current_platform
    from vllm.reasoning import ReasoningParserManager

    from service.models import cpu_int8
    from service.models.baichuan2 import Baichuan2Config, Baichuan2ForCausalLM
    from service.models.bluelm import BlueLMConfig, BlueLMForCausalLM
    from service.models.deepseek_moe import DeepseekConfig
    from service.models.index import IndexConfig, IndexForCausalLM
    from service.models.internlm import InternLM2Config, InternLM3Config, InternLMConfig
    from service.models.minicpm import MiniCPMConfig
    from service.models.openelm import OpenELMConfig, OpenELMForCausalLM
    from service.models.qwen import QwenConfig, QwenForCausalLM
    from service.models.vllm_private import (
        assume_model_type,
        compile_nothing_for_requests,
        ignore_hidden_weights,
        let_tokenizer_mode_decide,
        multiply_by_each_adapter,
        spell_ids_without_token,
        use_fast_penalties,
        use_fast_top_p,
    )
    from service.models.xverse import XverseConfig
    from service.tokenizers import register as register_tokenizers

    # Architecture in config.json -> model class. Use classes, not names: for a name vLLM starts a
    # process at each server start that imports vLLM again (16 s on two cores).
    architectures = {
        "BaichuanForCausalLM": Baichuan2ForCausalLM,
        "BlueLMForCausalLM": BlueLMForCausalLM,
        "IndexForCausalLM": IndexForCausalLM,
        "InternLMForCausalLM": LlamaForCausalLM,
        "OpenELMForCausalLM": OpenELMForCausalLM,
        "QWenLMHeadModel": QwenForCausalLM,
        "XverseForCausalLM": LlamaForCausalLM,
    }
    known = ModelRegistry.get_supported_archs()
    for architecture, model in architectures.items():
        if architecture not in known:
            ModelRegistry.register_model(architecture, model)
    for config in (
        Baichuan2Config,
        BlueLMConfig,
        DeepseekConfig,
        IndexConfig,
        InternLM2Config,
        InternLM3Config,
        InternLMConfig,
        MiniCPMConfig,
        OpenELMConfig,
        QwenConfig,
        XverseConfig,
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    assume_model_type("MiniCPMForCausalLM", MiniCPMConfig.model_type)
    ignore_hidden_weights()
    spell_ids_without_token()
    register_tokenizers()
    ReasoningParserManager.register_lazy_module(
        "think_tags", "service.models.reasoning", "ThinkTagsParser"
    )
    let_tokenizer_mode_decide("internlm2")
    if current_platform.is_cpu():
        cpu_int8.register()
        use_fast_penalties()
        use_fast_top_p()
        compile_nothing_for_requests()
        multiply_by_each_adapter()
