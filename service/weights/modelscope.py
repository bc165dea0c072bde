"""A ModelScope repository, through modelscope's own cache (MODELSCOPE_CACHE moves it)."""

import logging
from pathlib import Path

from service.errors import WeightsError

_logger = logging.getLogger("service")

# Other formats of the same weights, which neither vLLM nor the tokenizers read.
_IGNORED = ["*.gguf", "*.onnx", "*.msgpack", "*.h5", "*.ot", "*.pth"]


def fetch(model_id: str, revision: str) -> Path:
    """Download what is missing of the repository; without network, what is here is used.

    Raises WeightsError with the remedy.
    """
    from modelscope import snapshot_download
    from modelscope.hub.errors import HubError
    from requests import RequestException

    try:
        return Path(snapshot_download(model_id, revision=revision, ignore_patterns=_IGNORED))
    except (HubError, RequestException, OSError) as e:  # it lets some of requests' own through
        response = getattr(e, "response", None)
        if response is not None and response.status_code in (401, 403, 404):
            raise WeightsError(
                f"ModelScope has no {model_id} at revision {revision} for you "
                f"(HTTP {response.status_code}); check source.modelscope and source.revision"
            ) from e
        if folder := present(model_id, revision):
            _logger.warning("ModelScope does not answer; using the files already downloaded")
            return folder
        raise WeightsError(
            f"could not download {model_id} from ModelScope: {type(e).__name__}; check the network "
            "and the free space, then run the command again: it resumes where it stopped"
        ) from e


def present(model_id: str, revision: str) -> Path | None:
    """The folder of an earlier download, or None. Does not ask the hub."""
    from modelscope import snapshot_download
    from modelscope.hub.errors import HubError

    try:
        folder = snapshot_download(
            model_id, revision=revision, ignore_patterns=_IGNORED, local_files_only=True
        )
    except HubError:
        return None
    return Path(folder)
