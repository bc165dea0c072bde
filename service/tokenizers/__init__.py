"""Tokenizers that build a model's chat prompt as its publisher's code does, to the token id.

Each is a `tokenizer_mode` of vLLM, so that `POST /`, /v1/chat/completions and bare vLLM share it.
What a user writes is text in all of them, also when it spells a control token.
"""


def register() -> None:
    """Make the tokenizer modes known to vLLM. May be called more than once."""
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers import TokenizerRegistry

    # Mode -> the class, and the renderer for it: one for tokenizers that turn messages into token
    # ids themselves, one that applies the chat template. Both give each thread its own tokenizer.
    by_itself = ("service.tokenizers.renderer", "TokenIdsRenderer")
    by_template = ("vllm.renderers.hf", "HfRenderer")
    modes = {
        "baichuan2": ("BaichuanTokenizer", by_itself),
        "bluelm": ("BlueLMTokenizer", by_itself),
        "literal": ("LiteralTokenizer", by_template),
        "minicpm": ("MiniCPMTokenizer", by_template),
        "xverse": ("XverseTokenizer", by_itself),
    }
    for mode, (name, renderer) in modes.items():
        if mode not in TokenizerRegistry.tokenizers:
            TokenizerRegistry.register(mode, f"service.tokenizers.{mode}", name)
            RENDERER_REGISTRY.register(mode, *renderer)
