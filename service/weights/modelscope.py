"""A ModelScope repository, in modelscope's own cache (MODELSCOPE_CACHE moves it).

modelscope resumes, retries, checks hashes and shows progress. What is here: which files, one
download at a time, room on the disk, what a complete download is, and a remedy for each failure.
`modelscope_hub` is the part of it that does so; `import modelscope` would import torch.
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

if TYPE_CHECKING:
    from modelscope_hub import HubApi, HubConfig, ProgressCallback

_logger = logging.getLogger("service")

# Other formats of the same weights, which vLLM does not read, and code, which is never run.
_IGNORED = ("*.gguf", "*.onnx", "*.msgpack", "*.h5", "*.ot", "*.pth", "*.py")
_PICKLED = ("*.bin", "*.pt")  # read by vLLM only where there is no safetensors file
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
    """The folder with the repository's files, after downloading those that are missing.

    When the hub cannot be asked, an earlier complete download is used. `weights=False` leaves the
    weights out: the source of a tokenizer. `report` is told the per cent that is here.
    Raises WeightsError with the remedy.
    """
    hub, config = _hub()
    from modelscope_hub.errors import HubError
    from requests import RequestException

    key, what = ("source", model_id) if weights else ("tokenizer", f"the tokenizer {model_id}")
    folder = _folder(hub, model_id, revision)
    print(f"Asking ModelScope for {what} ...", file=sys.stderr, flush=True)
    try:
        files = _wanted(hub, model_id, revision, weights)
    except (HubError, RequestException) as e:
        problem = f"{config.endpoint} {_refusal(hub, model_id, revision, e)}"
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
                receipt.write_text("{}")  # from now on the folder may be a mixture
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
            f"could not download {what} from ModelScope: {_failure(e, folder)}"
        ) from e
    return folder


def present(model_id: str, revision: str, *, weights: bool = True) -> Path | None:
    """The folder of an earlier complete download, or None. Does not ask the hub."""
    hub, _ = _hub()
    folder = _folder(hub, model_id, revision)
    return folder if _complete(folder, revision, weights) else None


def _hub() -> tuple["HubApi", "HubConfig"]:
    """modelscope, with its settings. It reads some of them from the environment when imported."""
    # For one file; an hour, its default, is too short for a 5 GB shard on a slow line.
    os.environ.setdefault("MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT", "86400")
    from modelscope_hub import HubApi, HubConfig

    # It tells every try to reach a hub that is away; what to do is told once, at the end.
    logging.getLogger("modelscope_hub").setLevel(logging.ERROR)
    config = HubConfig()
    return HubApi(config), config


def _folder(hub: "HubApi", model_id: str, revision: str) -> Path:
    """Where modelscope keeps the repository's files, or will; caches of its past are found too."""
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


def _wanted(hub: "HubApi", model_id: str, revision: str, weights: bool) -> list[dict[str, Any]]:
    """The files to have, from the hub's list, as `download_repo` takes them."""
    listed = [f for f in hub.list_repo_files(model_id, "model", revision=revision) if not f.is_dir]
    ignored: tuple[str, ...] = _IGNORED
    if not weights:
        ignored += _WEIGHTS
    # As vLLM looks for them: in the top folder.
    elif any(_matches(f.path, ("*.safetensors",)) and "/" not in f.path for f in listed):
        ignored += _PICKLED
    files: list[dict[str, Any]] = [
        {"Path": f.path, "Size": f.size, "Sha256": f.sha256}
        for f in sorted(listed, key=lambda f: f.path)
        if not _matches(f.path, ignored)
    ]
    if not any(_matches(f["Path"], _WEIGHTS if weights else ("*",)) for f in files):
        kind = f"weights that vLLM reads ({', '.join(_WEIGHTS)})" if weights else "files"
        raise WeightsError(f"{model_id} at {revision} has no {kind}; choose another repository")
    return files


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)


def _receipt(folder: Path, weights: bool) -> Path:
    """Written after a download: its files. modelscope alone calls a half-filled folder present."""
    return folder / (".complete.json" if weights else ".complete-tokenizer.json")


def _complete(
    folder: Path, revision: str, weights: bool, files: list[dict[str, Any]] | None = None
) -> bool:
    """Whether all files of a finished download are here, and are still `files` when given.

    Their hashes were checked when they came; now only sizes are.
    """
    try:
        kept = json.loads(_receipt(folder, weights).read_text())
    except FileNotFoundError:
        return files is None and _looks_complete(folder, weights)  # modelscope's own command's
    except (OSError, ValueError):
        return False
    try:
        return (
            kept["revision"] == revision
            and files in (None, kept["files"])
            and all((folder / f["Path"]).stat().st_size == f["Size"] for f in kept["files"])
        )
    except (OSError, KeyError):
        return False


def _looks_complete(folder: Path, weights: bool) -> bool:
    """Whether a folder that another program filled lacks nothing that can be told from itself."""
    if any(folder.rglob("*.incomplete")):
        return False
    if not weights:
        return any(folder.glob("tokenizer*"))
    shards = {
        shard
        for index in folder.glob("*.index.json")
        for shard in json.loads(index.read_text())["weight_map"].values()
    }
    return (
        (folder / "config.json").is_file()
        and any(_matches(file.name, _WEIGHTS) for file in folder.iterdir())
        and all((folder / shard).is_file() for shard in shards)
    )


def _here(folder: Path, file: dict[str, Any]) -> int:
    """Bytes of a file that are here, those that a cut download left to be resumed too."""
    copies = (folder / file["Path"], folder / f"{file['Path']}.incomplete")
    return sum(copy.stat().st_size for copy in copies if copy.is_file())


def _progress(
    folder: Path, files: list[dict[str, Any]], report: Callable[[int], None]
) -> "list[type[ProgressCallback]]":
    """modelscope's progress bars, and one that counts over all files."""
    from modelscope_hub import ProgressCallback, TqdmCallback

    total = sum(file["Size"] for file in files) or 1
    here = sum(_here(folder, file) for file in files)
    told = -1

    class Percent(ProgressCallback):
        def update(self, size: int) -> None:
            nonlocal here, told
            here += size
            if (percent := min(99, here * 100 // total)) > told:
                told = percent
                report(percent)

    return [TqdmCallback, Percent]


def _check_space(folder: Path, files: list[dict[str, Any]]) -> None:
    """Raises WeightsError when the disk cannot hold what is missing of `files`."""
    needed = sum(max(0, file["Size"] - _here(folder, file)) for file in files)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise WeightsError(
            f"not enough space: the download needs {needed / 1e9:.1f} GB, {folder} has "
            f"{free / 1e9:.1f} GB free; free some, or set MODELSCOPE_CACHE to a folder on another "
            "disk"
        )


def _refusal(hub: "HubApi", model_id: str, revision: str, error: Exception) -> str:
    """What the hub did instead of listing the files, and what to do."""
    from modelscope_hub.errors import HubError
    from requests import RequestException

    status = getattr(error, "status_code", None)
    private = "a private one needs MODELSCOPE_API_TOKEN, or `modelscope login`"
    if status in (401, 403):
        return f"refuses it (HTTP {status}): {private}, of an account that may read it"
    if status not in (400, 404):
        return (
            f"does not answer as a hub ({_kind(error)}); check the network, the proxy and "
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


def _failure(error: Exception, folder: Path) -> str:
    """Why the files could not be had, and what to do."""
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
    return f"{file}: {_kind(e)}; run the command again: it resumes where it stopped"


def _kind(error: BaseException) -> str:
    """An error by its class: modelscope's messages are partly Chinese, and carry signed URLs."""
    return type(error).__name__.lstrip("_")
