"""Tells which requests generate. The front of a cluster asks it too, which has no vLLM."""

import re

from service.api.keys import HEALTH

# No route generates on these methods.
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
# Paths that do not generate on any method.
_NOT_GENERATING = HEALTH | {
    "/detokenize",
    "/health/generate",
    "/tokenize",
    "/v1/load_lora_adapter",
    "/v1/messages/count_tokens",
    "/v1/unload_lora_adapter",
}
_CANCEL = re.compile(r"/v1/responses/[^/]+/cancel")


def generates(method: str, path: str) -> bool:
    """Whether a request may make the engine generate.

    True for every route that is not known to do something else. These requests go through the
    queue, and are counted for their clients.
    """
    if path == "/":
        return method == "POST"
    return not (method in _SAFE_METHODS or path in _NOT_GENERATING or _CANCEL.fullmatch(path))
