"""A ModelScope repository, in modelscope's own cache (MODELSCOPE_CACHE moves it).

`modelscope_hub` resumes, retries, checks hashes and shows progress. (`import modelscope` would
import torch.) This module selects files, allows one download at a time, checks disk space, records
complete downloads, and gives a remedy for each failure.
"""

import errno
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.errors import WeightsError
from service.weights.lock import locked
from service.weights.tensor_files import read_json

if TYPE_CHECKING:
    from modelscope_hub import HubApi, HubConfig, ProgressCallback

_logger = logging.getLogger("service")

# Formats of weights that vLLM does not read, and code, which is never run.
_IGNORED = ("*.gguf", "*.onnx", "*.msgpack", "*.h5", "*.ot", "*.pth", "*.py")
_PICKLED = ("*.bin", "*.pt")  # vLLM reads these only if there is no safetensors file
_WEIGHTS = ("*.safetensors", *_PICKLED)

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


def fetch(
    model_id: str,
    revision: str,
    *,
    weights: bool = True,
    report: Callable[[int], None] | None = None,
) -> Path:
    """Return the folder with the repository's files; download missing ones.

    If the hub does not answer, use an earlier complete download. `weights=False` skips the weights,
    for the source of a tokenizer. `report` is called with the percentage downloaded. Raises
    WeightsError with the remedy.
    """
    hub, config = _hub()
    from modelscope_hub.errors import HubError
    from requests import RequestException

    key, what = ("source", model_id) if weights else ("tokenizer", f"the tokenizer {model_id}")
    folder = _folder(hub, model_id, revision)
    print(f"Asking ModelScope for {what} ...", file=sys.stderr, flush=True)
    try:
        files = _select_files(hub, model_id, revision, weights)
    except (HubError, RequestException) as e:
        problem = f"{config.endpoint} {_explain_listing(hub, model_id, revision, e)}"
        if _complete(folder, revision, weights):
            _logger.warning("%s; using the files already downloaded", problem)
            return folder
        raise WeightsError(
            f"could not download {what} from ModelScope: {problem}; {folder} has no complete copy. "
            f"Files of your own are used with --set '{key}={{path: /folder}}'"
        ) from e
    if _complete(folder, revision, weights, files):
        return folder
    try:
        with locked(config.cache_dir / ".lock" / f"{model_id.replace('/', '--')}.lock", model_id):
            if not _complete(folder, revision, weights, files):
                folder.mkdir(parents=True, exist_ok=True)
                _check_space(folder, files)
                receipt = _receipt(folder, weights)
                receipt.write_text("{}")  # until the download ends, the folder may mix revisions
                hub.download_repo(
                    model_id,
                    "model",
                    revision=revision,
                    file_list=files,
                    progress_callbacks=_progress(folder, files, report) if report else None,
                )
                receipt.write_text(json.dumps({"revision": revision, "files": files}))
    except (HubError, RequestException, OSError) as e:
        raise WeightsError(
            f"could not download {what} from ModelScope: {_explain_download(e, folder)}"
        ) from e
    return folder


def present(model_id: str, revision: str, *, weights: bool = True) -> Path | None:
    """Return the folder of an earlier complete download, or None. Works offline."""
    hub, _ = _hub()
    folder = _folder(hub, model_id, revision)
    return folder if _complete(folder, revision, weights) else None


def _hub() -> tuple["HubApi", "HubConfig"]:
    """Import modelscope_hub and return its client and settings."""
    # Seconds per file, read on import. The default of an hour is too short for a 5 GB shard.
    os.environ.setdefault("MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT", "86400")
    from modelscope_hub import HubApi, HubConfig

    # It warns at every retry; we report the failure once, at the end.
    logging.getLogger("modelscope_hub").setLevel(logging.ERROR)
    config = HubConfig()
    return HubApi(config), config


def _folder(hub: "HubApi", model_id: str, revision: str) -> Path:
    """Return modelscope's cache folder of the repository, also in the layout of older versions."""
    from modelscope_hub.errors import CacheNotFound

    try:
        return hub.download_repo(model_id, "model", revision=revision, local_files_only=True)
    except CacheNotFound as e:
        return Path(str(e.cache_dir))
    except OSError as e:
        raise WeightsError(
            f"cannot read {e.filename}: {e.strerror}; make it readable, or set MODELSCOPE_CACHE to "
            "another folder"
        ) from e


def _select_files(
    hub: "HubApi", model_id: str, revision: str, weights: bool
) -> list[dict[str, Any]]:
    """Select files from the hub's list, in the form that `download_repo` takes."""
    hub_files = [
        f for f in hub.list_repo_files(model_id, "model", revision=revision) if not f.is_dir
    ]
    ignored: tuple[str, ...] = _IGNORED
    if not weights:
        ignored += _WEIGHTS
    # Like vLLM, look for safetensors only in the top folder.
    elif any(_matches(f.path, ("*.safetensors",)) and "/" not in f.path for f in hub_files):
        ignored += _PICKLED
    files: list[dict[str, Any]] = [
        {"Path": f.path, "Size": f.size, "Sha256": f.sha256}
        for f in sorted(hub_files, key=lambda f: f.path)
        if not _matches(f.path, ignored)
    ]
    if not any(_matches(f["Path"], _WEIGHTS if weights else ("*",)) for f in files):
        kind = f"weights that vLLM reads ({', '.join(_WEIGHTS)})" if weights else "files"
        raise WeightsError(f"{model_id} at {revision} has no {kind}; choose another repository")
    return files


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)


def _receipt(folder: Path, weights: bool) -> Path:
    """Return the path of the list of files that is written after a complete download."""
    return folder / (".complete.json" if weights else ".complete-tokenizer.json")


def _complete(
    folder: Path, revision: str, weights: bool, files: list[dict[str, Any]] | None = None
) -> bool:
    """Whether a complete download is in `folder`, and if `files` is given, of the same files.

    Checks only sizes; the hashes were checked during the download.
    """
    try:
        recorded = json.loads(_receipt(folder, weights).read_text(encoding="utf-8"))
    except FileNotFoundError:
        # modelscope's own command has downloaded it.
        return files is None and _looks_complete(folder, weights)
    except (OSError, ValueError):
        return False
    try:
        return (
            recorded["revision"] == revision
            and files in (None, recorded["files"])
            and all((folder / f["Path"]).stat().st_size == f["Size"] for f in recorded["files"])
        )
    except (OSError, KeyError):
        return False


def _looks_complete(folder: Path, weights: bool) -> bool:
    """Whether a folder that another program filled seems complete."""
    if any(folder.rglob("*.incomplete")):
        return False
    if not weights:
        return any(folder.glob("tokenizer*"))
    try:
        indexes = [read_json(index) for index in folder.glob("*.index.json")]
    except WeightsError:  # half-written
        return False
    shards = {shard for index in indexes for shard in index.get("weight_map", {}).values()}
    return (
        any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
        and any(_matches(file.name, _WEIGHTS) for file in folder.iterdir())
        and all((folder / shard).is_file() for shard in shards)
    )


def _local_bytes(folder: Path, file: dict[str, Any]) -> int:
    """Return the bytes of a file on this machine, including a partial download to resume."""
    copies = (folder / file["Path"], folder / f"{file['Path']}.incomplete")
    return sum(copy.stat().st_size for copy in copies if copy.is_file())


def _progress(
    folder: Path, files: list[dict[str, Any]], report: Callable[[int], None]
) -> "list[type[ProgressCallback]]":
    """Return modelscope's progress bars, and a callback that reports the total percentage."""
    from modelscope_hub import ProgressCallback, TqdmCallback

    total = sum(file["Size"] for file in files) or 1
    local_bytes = sum(_local_bytes(folder, file) for file in files)
    last_percent = -1

    class Percent(ProgressCallback):
        def update(self, size: int) -> None:
            nonlocal local_bytes, last_percent
            local_bytes += size
            if (percent := min(99, local_bytes * 100 // total)) > last_percent:
                last_percent = percent
                report(percent)

    return [TqdmCallback, Percent]


def _check_space(folder: Path, files: list[dict[str, Any]]) -> None:
    """Raise WeightsError if the disk has no space for the missing parts of `files`."""
    needed = sum(max(0, file["Size"] - _local_bytes(folder, file)) for file in files)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise WeightsError(
            f"not enough space: the download needs {needed / 1e9:.1f} GB, {folder} has "
            f"{free / 1e9:.1f} GB free; free some, or set MODELSCOPE_CACHE to a folder on another "
            "disk"
        )


def _explain_listing(hub: "HubApi", model_id: str, revision: str, error: Exception) -> str:
    """Explain why the hub did not list the files, and what to do."""
    from modelscope_hub.errors import HubError
    from requests import RequestException

    status = getattr(error, "status_code", None)
    private = "a private one needs MODELSCOPE_API_TOKEN, or `modelscope login`"
    if status in (401, 403):
        return f"refuses it (HTTP {status}): {private}, of an account that may read it"
    if status not in (400, 404):
        return (
            f"does not answer as a hub ({_class_name(error)}); check the network, the proxy and "
            "MODELSCOPE_ENDPOINT"
        )
    try:
        known = [r["Revision"] for r in hub.list_repo_revisions(model_id, "model")]
    except (HubError, RequestException, KeyError):
        known = []
    if known and revision not in known:
        return (
            f"has no revision {revision!r} of it; "
            f"source.revision may be {', '.join(map(str, known[:9]))}"
        )
    return f"has no such repository (HTTP {status}); check source.modelscope; {private}"


def _explain_download(error: Exception, folder: Path) -> str:
    """Explain why a download failed, and what to do."""
    from modelscope_hub.errors import FileDownloadError, FileIntegrityError

    failed = error.failed_files if isinstance(error, FileDownloadError) else {str(folder): error}
    causes = [cause for e in failed.values() for cause in (e, e.__cause__) if cause]
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in _DISK_FULL:
            return (
                f"{cause.strerror}: {folder}; free some space, or set MODELSCOPE_CACHE to a folder "
                "on another disk, then run the command again: here, it resumes"
            )
        if isinstance(cause, OSError) and cause.errno in _NOT_WRITABLE:
            return (
                f"cannot write to {cause.filename or folder}: {cause.strerror}; make it writable, "
                "or set MODELSCOPE_CACHE to another folder"
            )
    for file, e in failed.items():
        if isinstance(e, FileIntegrityError):
            return (
                f"{file} came with other content than the hub's list says, more than once; nothing "
                "of it was kept. Run the command again, and if it repeats, tell the repository's "
                "owner"
            )
    file, e = next(iter(failed.items()))
    return f"{file}: {_class_name(e)}; run the command again: it resumes where it stopped"


def _class_name(error: BaseException) -> str:
    """Name an error by its class: modelscope's texts are partly Chinese and hold signed URLs."""
    return type(error).__name__.lstrip("_")
