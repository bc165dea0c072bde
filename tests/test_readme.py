"""The README, word for word: its commands are run in their order, its answers are compared."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from service.settings import Settings
from testing.server import LOOPBACK, free_port
from tests.configuration import tables
from tests.conftest import PATIENCE

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)
(INSTALL,) = (body for language, body in BLOCKS if "uv tool install" in body)
# By .ci/run, by test_cluster.py, and by test_wheel.py.
RUN_ELSEWHERE = {"make test\n", "make cluster\n", INSTALL}


@contextmanager
def serving(command: str, port: int, folder: Path) -> Iterator[None]:
    """The command in the background, as in another terminal, until its port answers."""
    with (folder / f"{port}.log").open("w+") as log:
        shell = subprocess.Popen(
            ["bash", "-c", command], stdout=log, stderr=log, cwd=folder, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 500
            while shell.poll() is None and time.monotonic() < deadline:
                try:
                    LOOPBACK.open(f"http://127.0.0.1:{port}/health/ready").close()
                    break
                except OSError:
                    time.sleep(0.5)
            else:
                log.seek(0)
                pytest.fail(f"{command}: not ready\n{log.read()}")
            yield
        finally:
            os.killpg(shell.pid, signal.SIGTERM)
            shell.wait(60)


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder in which the README's relative paths are this checkout's."""
    for name in ("Makefile", "model_configs", "pyproject.toml", "requirements", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    (text,) = (body for language, body in BLOCKS if language == "yaml")
    (tmp_path / "my-model.yaml").write_text(text)
    return tmp_path


def test_every_command_runs_and_answers_as_shown(clone: Path) -> None:
    blocks = iter([*BLOCKS, ("end", "")])
    language, body = next(blocks)
    assert body == "make serve\n"
    seen = 1
    with serving(body, 6006, clone):
        second_server = ""
        language, body = next(blocks)
        while language != "end":
            following = next(blocks)
            if "make serve" in body and language == "bash":
                second_server = body
            elif language == "bash" and ":7000" in body:
                with serving(second_server, 7000, clone):
                    assert "Rome" in run(["bash", "-ec", body], clone)
            elif language == "bash" and body not in RUN_ELSEWHERE:
                output = run(["bash", "-ec", body], clone)
                assert output
                if following[0] == "json":
                    changing = r'"time": "[\d: -]+"|\(request \w+\)'
                    shown = re.sub(changing, "", following[1].strip())
                    assert re.sub(changing, "", output.strip()) == shown
            elif language == "python":
                output = run([sys.executable, "-c", body], clone)
                assert output == "The capital of France is Paris.\n"
            seen += 1
            language, body = following
    assert seen == len(BLOCKS)
    log = (clone / "6006.log").read_text()
    assert not re.search("WARNING|ERROR|Traceback", log.replace("status=422", "")), log


def test_what_ci_runs_is_in_ci() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    assert "\nmake lint test test-clients test-cluster\n" in ci


@pytest.mark.parametrize("file", tables(), ids=lambda file: file.name)
def test_the_tables_of_models_are_the_catalogue(file: Path) -> None:
    assert tables()[file] + "\n" in file.read_text(), "run `python -m tests.configuration`"


def test_the_table_of_variables_is_the_settings() -> None:
    rows = re.findall(r"^\| `SERVICE_(\w+)` \|(.*)\|(.*)\|$", README, re.M)
    assert [tuple(cell.strip() for cell in row) for row in rows] == [
        (name.upper(), _default(field.default), field.description)
        for name, field in Settings.model_fields.items()
    ]


def _default(value: object) -> str:
    if value is None:
        return ""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text.replace(str(Path.home()), '~')}`"


def test_health_checks_on_this_machine_ask_no_proxy() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    checks = {name: s["healthcheck"]["test"] for name, s in compose["services"].items()
              if "healthcheck" in s}  # fmt: skip
    for name in ("prometheus", "grafana"):
        assert checks[name][1:4] == ["wget", "-Y", "off"]  # as busybox has it
    kind, _, option, probe = checks["chat"]
    assert (kind, option) == ("CMD", "-c")

    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health/ready" else 404)
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        probe = probe.replace(":6006/", f":{server.server_port}/")
        dead = {"http_proxy": f"http://127.0.0.1:{free_port()}", "no_proxy": "", "NO_PROXY": ""}
        for env in (dead, {"HTTP_PROXY" if k == "http_proxy" else k: v for k, v in dead.items()}):
            subprocess.run([sys.executable, "-c", probe], env=os.environ | env, check=True)
        server.shutdown()


def test_compose_serves_with_a_volume_and_a_healthcheck() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    chat = compose["services"]["chat"]
    assert chat["ports"] == ["${PUBLISH:-127.0.0.1}:6006:6006"]
    others = [s for name, s in compose["services"].items() if name != "chat"]
    assert all(port.startswith("127.0.0.1:") for s in others for port in s["ports"])
    assert chat["volumes"] == ["cache:/cache"]
    assert "/health/ready" in chat["healthcheck"]["test"][-1]
    pinned = (ROOT / "requirements" / "bench.txt").read_text()
    (locust,) = re.findall(r"^locust==(.*)$", pinned, re.M)
    assert compose["services"]["locust"]["image"] == f"locustio/locust:{locust}"
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert all(f"=/cache/{name}" in dockerfile for name in ("models", "modelscope", "vllm"))
    assert shutil.which("make")  # what the image installs with
