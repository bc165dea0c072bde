"""Our plugins of vLLM, and which plugins its processes load."""

import os
from importlib.metadata import entry_points

from service.errors import LaunchError

# Group and name of our entry points.
OURS = (
    ("vllm.general_plugins", "chat_service_models"),
    ("vllm.stat_logger_plugins", "chat_service_statistics"),
    ("vllm.endpoint_plugins", "chat_service"),
)


def choose() -> None:
    """Name the plugins for every process of vLLM's that this one starts.

    They are ours, and what the user chose, or all that vLLM would load without us. It loads no
    endpoint plugin that is not named.
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
    """Load our plugins as vLLM will. It only logs a failure, and would serve without them."""
    for group, name in OURS:
        found = tuple(entry_points(group=group, name=name))
        if not found:
            raise LaunchError(
                f"vLLM's plugin {name} is not installed; run `pip install` for this package again"
            )
        try:
            plugin = found[0].load()
            if group == "vllm.general_plugins":
                plugin()
        except Exception as e:
            reason = " ".join(f"{type(e).__name__}: {e}".split())
            raise LaunchError(f"vLLM's plugin {name} fails to load: {reason}") from e
