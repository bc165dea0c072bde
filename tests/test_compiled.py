"""`chat-service compile`, and the server that is started before and after it."""

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from service import model_config, settings
from service.launch import compile_cache, server
from service.launch.compile_cache import Compiled
from testing import checkpoints
from tests import warm


@pytest.mark.parametrize(
    ("eager", "fast", "gain", "worthwhile"),
    [
        ([10, 40], [15, 60], 1.5, True),
        ([10, 40], [11, 44], 1.1, True),
        ([10, 40], [10, 40], 1, False),
        ([10, 40], [20, 20], 1, False),
        ([10, 40], [10.3, 41.2], 1.03, False),
    ],
)
def test_compiled_code_is_used_where_it_brings_something(
    eager: list[float], fast: list[float], gain: float, worthwhile: bool
) -> None:
    found = Compiled(eager, fast)
    assert found.gain == pytest.approx(gain)
    assert found.worthwhile is worthwhile


def test_a_start_is_eager_until_the_model_was_compiled_here(tmp_path: Path) -> None:
    checkpoint = checkpoints.write("qwen2", tmp_path / "tiny")
    file = tmp_path / "tiny.yaml"
    file.write_text(f"name: tiny\nsource: {{path: {checkpoint}}}\n")
    memory = ("--set", "engine.kv_cache_memory_bytes=64M")
    env = {"SERVICE_CACHE_DIR": str(tmp_path / "cache")}

    def start(*more: str) -> str:
        with warm.Server.service(tmp_path / "log", str(file), *memory, *more, env=env) as server:
            body = {"model": "tiny", "prompt": "a", "max_tokens": 3}
            assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
            return server.log.read_text()

    before = start()
    assert "Not compiled: `chat-service compile`, with the same MODEL and --set" in before
    assert "Compiling" not in before
    for _ in range(3):  # it keeps no result where something else used the processor
        done = warm.run("compile", str(file), *memory, "--json", env=env)
        if done.returncode == 0:
            break
        assert "something else used the processor" in done.stderr
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    code = sorted((tmp_path / "cache" / "torchinductor").rglob("*.so"))
    after = start()
    assert sorted((tmp_path / "cache" / "torchinductor").rglob("*.so")) == code
    if report["used"]:
        assert "Compiled code is used: it was measured at" in after
        assert "Compiled and warmed up" in after
    else:
        assert "Compiled code is not used: it was measured at" in after
        assert "Compiling" not in after


@pytest.mark.usefixtures("environment")
def test_another_float_type_is_other_code_and_a_larger_cache_is_not(tmp_path: Path) -> None:
    checkpoint = checkpoints.write("qwen2", tmp_path / "tiny")
    yaml = tmp_path / "tiny.yaml"
    yaml.write_text(f"name: tiny\nsource: {{path: {checkpoint}}}\n")

    def file(*assignments: str) -> Path:
        config, origins = model_config.load(str(yaml), assignments)
        with server.prepared(config, origins, settings.load()) as (args, _):
            server.fetch_files(args, config, settings.load())
            return compile_cache.file(args)

    small = ["engine.kv_cache_memory_bytes=64M", "engine.dtype=bfloat16"]
    large = ["engine.kv_cache_memory_bytes=128M", "engine.dtype=bfloat16"]
    other = ["engine.kv_cache_memory_bytes=64M", "engine.dtype=float32"]
    assert file(*small) == file(*large) != file(*other)


@pytest.mark.parametrize("choice", ["enforce_eager=true", "optimization_level=1"])
def test_who_has_chosen_is_told_that_compile_decides_nothing(choice: str) -> None:
    command = [sys.executable, "-m", "service", "compile", "--set", f"engine.{choice}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"--set engine.{choice.partition('=')[0]}: decides whether" in done.stderr
    assert "Traceback" not in done.stderr
