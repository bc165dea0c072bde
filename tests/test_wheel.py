"""The wheel: what others install, who have no checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from service import model_config
from testing.server import Server, free_port
from tests.conftest import LOOPBACK, MODEL, PATIENCE
from tests.test_readme import INSTALL

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, folder: Path, **env: str) -> str:
    """What a command prints, which does not import this checkout."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, env=inherited | env
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which README's line was run, with the tool's environment in `tools`."""
    folder = tmp_path_factory.mktemp("wheel") / "checkout"
    leave = shutil.ignore_patterns(".*", "__pycache__", "dist", "results", "node_modules")
    shutil.copytree(ROOT, folder, ignore=leave)
    env = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "UV_PYTHON": sys.executable,
        "UV_TOOL_DIR": str(folder / "tools"),
        "UV_TOOL_BIN_DIR": str(folder / "bin"),
    }
    line = INSTALL
    if "UV_FIND_LINKS" in os.environ:  # a folder that has torch; PyTorch's index would come first
        line = line.replace("--torch-backend cpu ", "")
    run("bash", "-ec", line, folder=folder, **env)
    return folder


def test_the_wheel_holds_all_that_the_service_reads(installed: Path) -> None:
    there = {
        *(path.relative_to(ROOT) for path in (ROOT / "service").rglob("*") if path.is_file()),
        *(Path("service") / path.relative_to(ROOT) for path in ROOT.glob("model_configs/*")),
    }
    (wheel,) = installed.glob("dist/*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("service/")}
    assert packed == {str(path) for path in there if "__pycache__" not in path.parts}
    assert {"service/web/chat.html", f"service/model_configs/{MODEL}.yaml"} <= packed


def test_an_installed_wheel_works_in_any_folder_and_serves_as_the_checkout_does(
    installed: Path, tmp_path: Path, embedded_model: Path
) -> None:
    chat_service = installed / "bin" / "chat-service"
    head, *lines = run(chat_service, "models", folder=tmp_path).splitlines()
    assert {line.split()[0] for line in lines} == {*model_config.catalogue()}
    (site_packages,) = (installed / "tools").glob("*/lib/python*/site-packages")
    report = run(chat_service, "check", folder=tmp_path)
    assert f"{site_packages}/service/model_configs/{MODEL}.yaml:" in report
    assert report.endswith(f"{MODEL}: ok\n") and str(ROOT / "model_configs") not in report
    port = free_port()
    command = [
        str(chat_service),
        "serve",
        "--port",
        str(port),
        "--set",
        "engine.enforce_eager=true",
    ]
    # With a cache of its own: the model is fetched by what the tool's environment has.
    nowhere = {"PYTHONPATH": "", "SERVICE_CACHE_DIR": str(tmp_path / "cache")}
    with Server(
        command, tmp_path / "log", port=port, env=nowhere, health="/health/ready"
    ) as server:
        answer = LOOPBACK.post(server.url, json={"prompt": "What is the capital of France?"})
    assert answer.json()["response"] == "The capital of France is Paris."
