"""`chat-service verify`: the engine beside the reference, as a user runs it."""

import json
import subprocess
from pathlib import Path

import pytest

from testing import checkpoints
from tests import warm


def verify(name: str, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    sets = checkpoints.arguments(name, folder, "engine.enforce_eager=true")
    words = [word for argument in sets for word in ("--set", argument)]
    return warm.run("verify", checkpoints.CATALOGUE[name], *words, *arguments)


def test_equal_is_said_for_people_and_for_machines(tmp_path: Path) -> None:
    checkpoints.write("baichuan2", tmp_path)
    told = verify("baichuan2", tmp_path, "--set", "engine.dtype=float32", "--prompt", "你好")
    assert told.returncode == 0, told.stderr[-3000:]
    assert told.stdout.startswith("1. 24 of 24 tokens agree, log probabilities within ")
    assert "   prompt     '<reserved_106>你好<reserved_107>'\n" in told.stdout
    assert "\nan answer ends at: 2 '</s>'\n" in told.stdout
    assert told.stdout.endswith("baichuan2-7b-chat: equal (float32 engine, float32 reference)\n")


@pytest.mark.parametrize("name", ["deepseek_moe", "glm4", "internlm2", "qwen"])
def test_models_that_transformers_lacks_have_a_reference(name: str, tmp_path: Path) -> None:
    checkpoints.write(name, tmp_path)
    told = verify(name, tmp_path, "--set", "engine.dtype=float32", "--prompt", "你好")
    assert told.returncode == 0, told.stderr[-3000:]
    assert told.stdout.endswith("equal (float32 engine, float32 reference)\n")


def test_a_difference_is_located_and_ends_in_a_status_of_its_own(tmp_path: Path) -> None:
    checkpoints.write("openelm", tmp_path)
    rope = {"rope_type": "default", "rope_theta": 2.0}
    overrides = f"engine.hf_overrides={json.dumps({'rope_parameters': rope})}"
    sets = ("--set", overrides, "--set", "engine.dtype=bfloat16")
    answer = verify("openelm", tmp_path, *sets, "--json")
    assert answer.returncode == 3, answer.stderr[-3000:]
    report = json.loads(answer.stdout)
    assert (report["verdict"], report["dtype"]) == ("different", "bfloat16")
    assert "log probabilities differ by" in " ".join(report["problems"])
    assert [comparison["tokens"] for comparison in report["comparisons"]] == [24] * 4
    first = next(c for c in report["comparisons"] if c["divergence"])
    assert first["agreeing"] < 24
    assert first["divergence"]["position"] == first["agreeing"]
    assert first["divergence"]["engine"] != first["divergence"]["reference"]
    assert first["largest_difference"] > first["mean_difference"] > 0
