"""Our vLLM plugins, and the choice of plugins that vLLM's processes load."""

import os
import sys
from importlib.metadata import entry_points

from service.errors import LaunchError

# (group, name) of our entry points.
OURS = (
    ("vllm.general_plugins", "chat_service_models"),
    ("vllm.stat_logger_plugins", "chat_service_statistics"),
    ("vllm.endpoint_plugins", "chat_service"),
)
# vLLM's wheel asks for these. Beside a CPU build of torch, pip takes those for CUDA.
_OTHER_BUILD = ("torchvision", "torchaudio", "torchcodec")


def choose() -> None:
    """Set VLLM_PLUGINS for this process and its children.

    Adds our plugins to the user's choice, or to all that vLLM loads by default. By default it loads
    no endpoint plugins.
    """
    plugins = {name for _, name in OURS}
    if chosen := os.environ.get("VLLM_PLUGINS"):
        plugins.update(chosen.split(","))
    else:
        for group in entry_points().groups:
            if group.startswith("vllm.") and group != "vllm.endpoint_plugins":
                plugins.update(entry_points(group=group).names)
    os.environ["VLLM_PLUGINS"] = ",".join(sorted(plugins))


def load() -> None:
    """Load our plugins, to check them. vLLM only logs a failure. Raises LaunchError."""
    for group, name in OURS:
        matches = tuple(entry_points(group=group, name=name))
        if not matches:
            raise LaunchError(
                f"vLLM's plugin {name} is not installed; run `pip install` for this package again"
            )
        try:
            plugin = matches[0].load()
            if group == "vllm.general_plugins":
                plugin()
        except Exception as e:
            reason = " ".join(f"{type(e).__name__}: {e}".split())
            raise LaunchError(
                f"vLLM's plugin {name} fails to load: {reason}{_remedy(reason)}"
            ) from e


def _remedy(reason: str) -> str:
    if not any(name in reason for name in _OTHER_BUILD):
        return ""
    names = " ".join(_OTHER_BUILD)
    return (
        f"; it is not of this build of torch, and no model needs it here: `pip uninstall {names}`, "
        f"or `uv pip uninstall --python {sys.prefix} {names}`"
    )
