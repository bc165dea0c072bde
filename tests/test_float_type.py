"""The float type of a CPU: the model's own where the processor multiplies it, else float32."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from service import model_config, settings
from service.errors import WeightsError
from service.launch import float_type
from service.preflight import check

pytestmark = pytest.mark.usefixtures("environment")

X86 = dict.fromkeys(("avx512_f", "avx512_bf16", "amx_bf16", "avx512_fp16", "amx_fp16"), False)
ARM = {"neon": True, "fp16_arith": True, "bf16": False}


@pytest.mark.parametrize(
    ("dtype", "capabilities", "has"),
    [
        ("bfloat16", X86, False),
        ("bfloat16", {**X86, "avx512_f": True}, False),
        ("bfloat16", {**X86, "avx512_bf16": True}, True),
        ("bfloat16", {**X86, "amx_bf16": True}, True),
        ("float16", {**X86, "amx_bf16": True}, False),
        ("float16", {**X86, "avx512_fp16": True}, True),
        ("float32", X86, True),
        ("bfloat16", ARM, False),
        ("float16", ARM, True),
        ("bfloat16", {"vsx": True}, True),  # its instructions are not told
    ],
)
def test_instructions_for_products_decide(
    dtype: str, capabilities: dict[str, bool], has: bool
) -> None:
    assert float_type.has_products(dtype, capabilities) is has


@pytest.mark.parametrize("model", model_config.catalogue())
@pytest.mark.parametrize("insisting", [False, True])
def test_check_says_what_is_computed_in_and_why(model: str, insisting: bool) -> None:
    config, origins = model_config.load(model)
    if insisting:
        config, origins = model_config.load(model, [f"engine.dtype={config.dtype}"])
    assert config.dtype
    report = check.check(config, origins, settings.load())
    told = [row for row in report.rows if row[0] == "engine.dtype"]
    slow = f"this processor has no instructions for {config.dtype}"
    warnings = [warning for warning in report.warnings if slow in warning]
    in_hardware = float_type.has_products(config.dtype, torch.cpu.get_capabilities())
    if insisting:
        assert told == [("engine.dtype", config.dtype, "--set")]
        assert bool(warnings) is not in_hardware
    else:
        assert len(told) == (not in_hardware)
        assert all(row[1] == "float32" and str(row[2]).startswith(slow) for row in told)
        assert not warnings


@pytest.mark.parametrize(
    ("checkpoint", "asked", "chosen"),
    [
        ({"torch_dtype": "bfloat16"}, "auto", "bfloat16"),
        ({"torch_dtype": "float32"}, "auto", "bfloat16"),
        ({"dtype": "float16"}, "auto", "float16"),
        ({"text_config": {"dtype": "float16"}}, "auto", "float16"),
        ({}, "half", "float16"),
        ({"quantization_config": {}, "dtype": "bfloat16"}, "auto", None),
        ({"text_config": {"quantization_config": {}}}, "auto", None),
        ({"quantization_config": None, "dtype": "float16"}, "auto", "float16"),
    ],
)
def test_the_type_of_the_files_is_read_where_vllm_reads_it(
    tmp_path: Path, checkpoint: dict[str, object], asked: str, chosen: str | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(checkpoint))
    args = Namespace(model=str(tmp_path), dtype=asked, quantization=None)
    config = model_config.ModelConfig(name="m", source=model_config.Source(path=str(tmp_path)))
    reason = float_type.choose(args, config)
    if chosen is None or float_type.has_products(chosen, torch.cpu.get_capabilities()):
        assert (reason, args.dtype) == (None, asked)
    else:
        assert reason and f"no instructions for {chosen}; engine.dtype={chosen} insists" in reason
        assert args.dtype == "float32"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ([], " is not a JSON object"),
        ({"text_config": "x"}, ": text_config is not a JSON object"),
        ({"quantization_config": [1]}, ": quantization_config is not a JSON object"),
        ({"architectures": "Qwen3ForCausalLM"}, ": architectures is not a JSON array"),
        ({"architectures": [[]]}, ": architectures has what is no string"),
    ],
)
def test_a_value_of_the_wrong_type_in_config_json_is_told(
    tmp_path: Path, config: object, says: str
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    args = Namespace(model=str(tmp_path), dtype="auto", quantization=None)
    served = model_config.ModelConfig(name="m", source=model_config.Source(path=str(tmp_path)))
    with pytest.raises(WeightsError) as error:
        float_type.choose(args, served)
    assert str(error.value) == f"{file}{says}; fetch the model again"


@pytest.mark.parametrize("value", ["auto", "null"])
def test_who_names_no_type_does_not_insist(value: str) -> None:
    config, _ = model_config.load("smollm2-135m-instruct", [f"engine.dtype={value}"])
    assert not float_type.insists(config)


def test_a_file_may_insist_and_one_that_says_nothing_is_served_too(tmp_path: Path) -> None:
    file = tmp_path / "m.yaml"
    file.write_text("name: m\nsource: {modelscope: a/b}\n")
    report = check.check(*model_config.load(str(file)), settings.load())
    assert "engine.dtype" not in [row[0] for row in report.rows]  # not known without its files
    file.write_text("name: m\nsource: {modelscope: a/b}\nengine: {dtype: bfloat16}\n")
    report = check.check(*model_config.load(str(file)), settings.load())
    assert ("engine.dtype", "bfloat16", f"{file}:3") in report.rows
