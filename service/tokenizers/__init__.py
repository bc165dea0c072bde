"""Tokenizers that build the same token ids from a chat as the publisher's code.

Each is a `tokenizer_mode` of vLLM, so `POST /`, /v1/chat/completions and bare vLLM share it. In all
of them a control token that a user writes is plain text.
"""


def register() -> None:
    """Register the tokenizer modes with vLLM. May be called more than once."""
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers import TokenizerRegistry

    # TokenIdsRenderer is for tokenizers that turn messages into token ids themselves, HfRenderer
    # applies the chat template. Both give each thread its own tokenizer.
    token_ids_renderer = ("service.tokenizers.renderer", "TokenIdsRenderer")
    template_renderer = ("vllm.renderers.hf", "HfRenderer")
    modes = {  # mode -> (class, renderer)
        "baichuan2": ("BaichuanTokenizer", token_ids_renderer),
        "bluelm": ("BlueLMTokenizer", token_ids_renderer),
        "characterglm": ("CharacterGLMTokenizer", token_ids_renderer),
        "chatglm3": ("ChatGLM3Tokenizer", token_ids_renderer),
        "glm4": ("Glm4Tokenizer", token_ids_renderer),
        "index": ("IndexTokenizer", token_ids_renderer),
        "internlm": ("InternLMTokenizer", token_ids_renderer),
        "internlm2": ("InternLM2Tokenizer", token_ids_renderer),
        "literal": ("LiteralTokenizer", template_renderer),
        "minicpm": ("MiniCPMTokenizer", template_renderer),
        "qwen": ("QwenTokenizer", token_ids_renderer),
        "tokenizer_json": ("TokenizerJsonTokenizer", template_renderer),
        "xverse": ("XverseTokenizer", token_ids_renderer),
    }
    for mode, (name, renderer) in modes.items():
        if mode not in TokenizerRegistry.tokenizers:
            TokenizerRegistry.register(mode, f"service.tokenizers.{mode}", name)
            RENDERER_REGISTRY.register(mode, *renderer)
