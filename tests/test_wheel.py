"""The wheel: what others install, who have no checkout."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from service import model_config
from tests.conftest import MODEL, PATIENCE

ROOT = Path(__file__).parent.parent
UV = Path(sys.executable).with_name("uv")


def run(*command: str | Path, folder: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, env=env
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(UV, "build", "--quiet", "--wheel", "--out-dir", folder, ROOT, folder=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_the_wheel_holds_all_that_the_service_reads(wheel: Path) -> None:
    there = {
        *(path.relative_to(ROOT) for path in (ROOT / "service").rglob("*") if path.is_file()),
        *(Path("service") / path.relative_to(ROOT) for path in ROOT.glob("model_configs/*")),
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("service/")}
    assert packed == {str(path) for path in there if "__pycache__" not in path.parts}
    assert {"service/web/chat.html", f"service/model_configs/{MODEL}.yaml"} <= packed


def test_an_installed_wheel_works_in_any_folder(
    wheel: Path, tmp_path: Path, embedded_model: Path
) -> None:
    """Its dependencies are those of this environment: to install vLLM once more takes minutes."""
    environment = tmp_path / "venv"
    run(UV, "venv", "--quiet", "--python", sys.executable, environment, folder=tmp_path)
    python = environment / "bin" / "python"
    install = ("pip", "install", "--quiet", "--offline", "--no-deps", "--python", python)
    run(UV, *install, wheel, folder=tmp_path)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "rest.pth").write_text(sysconfig.get_path("purelib"))
    chat_service = environment / "bin" / "chat-service"
    head, *lines = run(chat_service, "models", folder=tmp_path).splitlines()
    assert {line.split()[0] for line in lines} == {*model_config.catalogue()}
    report = run(chat_service, "check", folder=tmp_path)
    assert f"{site_packages}/service/model_configs/{MODEL}.yaml:" in report
    assert report.endswith(f"{MODEL}: ok\n") and str(ROOT / "model_configs") not in report
