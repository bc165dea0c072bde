"""Weights in 8 bits on a CPU: how far their answers are from float32's, and what a user is told."""

import json
from pathlib import Path

import pytest
import torch

from service.models import cpu_int8
from testing import checkpoints
from tests import warm
from tests.engine import FORKED, ask, engine, read
from tests.test_models import NAMES, differences
from tests.test_models import folders as folders

INT8 = f"engine.quantization={cpu_int8.NAME}"


def error(x: torch.Tensor, weight: torch.Tensor, size: float) -> float:
    """How far the product is from the exact one, as a part of `size`."""
    product = cpu_int8.Int8Weights(weight).multiply(x)
    return float((product - x @ weight.T).square().mean().sqrt() / size)


@pytest.mark.parametrize("columns", [576, 1536, 96])
def test_a_large_value_of_an_input_does_not_take_the_bits_of_the_others(columns: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(200, columns), torch.randn(8, columns)
    size = float((x @ weight.T).square().mean().sqrt())
    x[:, 3] *= 100
    assert error(x, weight, size) < 0.12  # without a rotation 0.5 and more


def test_a_large_token_does_not_take_the_bits_of_another() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(200, 576), torch.randn(2, 576)
    x[1] *= 1000
    (product, _), exact = cpu_int8.Int8Weights(weight).multiply(x), x[0] @ weight.T
    assert (product - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_overflow(sign: int) -> None:
    ones = (torch.ones(9, 64) @ cpu_int8.rotation(64).T).reshape(1, 576)  # all 1 once rotated
    product = cpu_int8.Int8Weights(sign * ones.expand(32, -1)).multiply(ones)
    assert torch.allclose(product, torch.full((1, 32), sign * 576.0), rtol=1e-3)


def test_an_input_of_zeros_has_a_product_of_zeros_in_its_own_type() -> None:
    product = cpu_int8.Int8Weights(torch.randn(5, 64)).multiply(torch.zeros(2, 3, 64).bfloat16())
    assert product.dtype is torch.bfloat16
    assert torch.equal(product, torch.zeros(2, 3, 5).bfloat16())


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_is_near_its_reference(folders: dict[str, Path], name: str) -> None:
    with engine(folders[name], quantization=cpu_int8.NAME) as llm:
        answers = ask(llm)
    _, _, mean = differences(folders[name], answers)
    assert 1e-4 < mean < 0.5, mean  # the weights are rounded


def test_compiled_code_multiplies_in_8_bits_too(folders: dict[str, Path]) -> None:
    with engine(folders["qwen2"], quantization=cpu_int8.NAME, enforce_eager=False) as llm:
        _, _, mean = differences(folders["qwen2"], ask(llm))
    assert 1e-4 < mean < 0.5, mean


def test_an_adapter_adds_to_weights_in_8_bits(tmp_path: Path) -> None:
    base = checkpoints.write("qwen2", tmp_path / "base")
    lora = checkpoints.write_adapter(tmp_path / "lora", base, tmp_path / "merged", rank=8)
    with engine(base, quantization=cpu_int8.NAME, enable_lora=True, max_lora_rank=8) as llm:
        plain, adapted = ask(llm), ask(llm, lora=str(lora))
    assert [answer.tokens for answer in plain] != [answer.tokens for answer in adapted]
    _, _, mean = differences(tmp_path / "merged", adapted)
    assert mean < 0.5, mean


def test_two_workers_have_half_of_the_8_bits_each(folders: dict[str, Path]) -> None:
    arguments = {"tensor_parallel_size": 2, "quantization": cpu_int8.NAME}
    folder = folders["qwen2"]
    (answers,) = read(warm.run(*FORKED, json.dumps([(arguments, str(folder), None)])))
    _, _, mean = differences(folder, answers)
    assert 1e-4 < mean < 0.5, mean


def test_verify_says_what_8_bits_cost(tmp_path: Path) -> None:
    checkpoints.write("qwen2", tmp_path)
    sets = checkpoints.arguments("qwen2", tmp_path, "engine.enforce_eager=true", INT8)
    words = [word for argument in sets for word in ("--set", argument)]
    told = warm.run("verify", checkpoints.CATALOGUE["qwen2"], *words, "--prompt", "你好")
    assert told.returncode == 0, told.stderr[-3000:]
    assert told.stdout.endswith("(cpu_int8 engine, float32 reference)\n")
