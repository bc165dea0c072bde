"""A start that fails ends in one line that says what to change: each cause, caused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from service import model_config, settings
from service.errors import WeightsError
from service.launch import start_errors
from service.preflight import check
from service.weights import checkpoint
from testing import checkpoints
from testing.server import free_port
from tests import warm

# What vLLM says where this machine cannot cause it, and a part of what we say.
SAID = [
    (
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
        "capacity of 23.68 GiB of which 1.20 GiB is free.",
        "the GPU is out of memory: lower engine.max_model_len or engine.max_num_seqs, choose",
    ),
    (
        "ValueError: Free memory on device cuda:0 (12.10/23.68 GiB) on startup is less than "
        "desired GPU memory utilization (0.92, 21.79 GiB). Decrease GPU memory utilization or "
        "reduce GPU memory used by other processes.",
        "21.79 GiB of 23.68 are wanted and 12.10 are free: set engine.kv_cache_memory_bytes, such "
        "as 2G, lower engine.gpu_memory_utilization (now 0.92)",
    ),
    (
        "ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0.",
        "this GPU has no bfloat16: set engine.dtype to float16",
    ),
    (
        "World size (4) is larger than the number of available GPUs (1) in this node.",
        "4 GPUs are wanted and there are 1: lower engine.tensor_parallel_size",
    ),
    (
        "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
        "allocate memory: you tried to allocate 512 bytes. Error code 12",
        "the machine is out of memory, at an allocation of 512 bytes: lower",
    ),
    ("RuntimeError: Engine core initialization failed.", "the engine's process ended without a"),
    ("AssertionError: ", "config.json and the weights are not of one model, or a file is damaged"),
    ("ValueError: something new", "ValueError: something new"),
]


@pytest.mark.parametrize(("cause", "advice"), SAID)
def test_what_vllm_says_becomes_what_to_do(cause: str, advice: str) -> None:
    assert start_errors.explain(cause).startswith(advice)


def damage(folder: Path, name: str, change: Callable[[Path], None]) -> str:
    """A tiny Qwen2 with something wrong: its YAML."""
    target = checkpoints.write("qwen2", folder / name)
    change(target)
    file = folder / f"{name}.yaml"
    file.write_text(f"name: {name}\nsource: {{path: {target}}}\nengine: {{dtype: float32}}\n")
    return str(file)


def with_config(**keys: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))

    return change


def without(part: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (file,) = folder.glob("*.safetensors")
        save_file({k: v for k, v in load_file(file).items() if part not in k}, file)

    return change


def spoil_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def cut(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_each_cause_ends_in_one_line(tmp_path: Path) -> None:
    embedded = "smollm2-135m-instruct"
    cases = [
        (
            [
                *(embedded, "engine.dtype=bfloat16", "engine.enforce_eager=true"),
                "engine.kv_cache_memory_bytes=30000000",
            ],
            "a context of 2048 tokens needs 0.04 GiB of KV cache and there are 0.03 GiB: lower "
            "engine.max_model_len to 1152 or less, or raise engine.kv_cache_memory_bytes",
        ),
        (
            [
                *(embedded, "engine.kv_cache_memory_bytes=900G", "engine.enforce_eager=true"),
                "engine.api_server_count=2",
            ],
            "900.0 GiB for the KV cache are not free: lower engine.kv_cache_memory_bytes",
        ),
        (
            [embedded, "engine.max_model_len=100000"],
            "engine.max_model_len is 100000 and the model was made for 8192: lower it to 8192",
        ),
        (
            [embedded, "engine.gpu_memory_utilization=1.5"],
            "gpu_memory_utilization: Input should be less than or equal to 1",
        ),
        ([embedded, "engine.tensor_parallel_size=5"], "heads cannot be shared out over 5 GPUs"),
        ([embedded, "engine.pipeline_parallel_size=2"], "vLLM has no pipeline on a CPU"),
        (
            [damage(tmp_path, "unknown", with_config(architectures=["NewForCausalLM"]))],
            "vLLM has no model for the architecture ['NewForCausalLM'] of config.json",
        ),
        (
            [damage(tmp_path, "type", with_config(model_type="new", architectures=["New"]))],
            "neither vLLM nor transformers knows the model type 'new' of config.json",
        ),
        (
            [damage(tmp_path, "none", lambda folder: next(folder.glob("*.safetensors")).unlink())],
            "holds no weights (*.safetensors, *.bin, *.pt); fetch the model again",
        ),
        ([damage(tmp_path, "cut", cut)], "is damaged or cut short"),
        (
            [damage(tmp_path, "linear", without("layers.1.mlp.down_proj"))],
            "lack 1 tensors of layer 1",
        ),
        (
            [damage(tmp_path, "json", spoil_tokenizer)],
            "tokenizer.json is not readable JSON",
        ),
    ]
    for (model, *sets), expected in cases:
        words = [word for each in sets for word in ("--set", each)]
        done = warm.run("serve", model, *words, "--port", str(free_port()))
        assert done.returncode and not done.stdout, (model, sets)
        told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert [expected in line for line in told] == [True], (sets, done.stderr)
        assert done.stderr.endswith(f"{told[0]}\n")
        assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("environment")
def test_a_pipeline_and_8_bits_are_checked_for_the_machine_that_is_asked_about(
    tmp_path: Path,
) -> None:
    config, origins = model_config.load("qwen2-7b-instruct", ["engine.pipeline_parallel_size=2"])
    (problem,) = check.check(config, origins, settings.load()).problems
    assert "vLLM has no pipeline on a CPU" in problem
    checkpoints.write("qwen2", tmp_path)
    config, origins = checkpoints.load("qwen2", tmp_path, "engine.pipeline_parallel_size=2")
    assert check.check(config, origins, settings.load(), memory=24 << 30).problems == []
    config, origins = checkpoints.load("qwen2", tmp_path, "engine.quantization=cpu_int8")
    (problem,) = check.check(config, origins, settings.load(), memory=24 << 30).problems
    assert problem.endswith("cpu_int8 is for CPUs; on a GPU use fp8_per_tensor")
    assert check.check(config, origins, settings.load()).problems == []


@pytest.mark.parametrize("name", sorted(checkpoints.BUILDERS))
def test_a_whole_checkpoint_is_called_whole(name: str, tmp_path: Path) -> None:
    folder = checkpoints.write(name, tmp_path / "whole")
    checkpoint.check(folder)


@pytest.mark.parametrize("name", ["v1 [final]", "a*", "what?"])
def test_a_path_that_vllm_takes_for_a_pattern_is_told(name: str, tmp_path: Path) -> None:
    folder = checkpoints.write("qwen2", tmp_path / name)
    with pytest.raises(WeightsError, match="rename the folder"):
        checkpoint.check(folder)


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("qwen2", "embed_tokens", "the token embedding"),
        ("qwen2", "layers.2.self_attn.q_proj.weight", "lack 1 tensors of layer 2"),
        ("baichuan2", "lm_head", "the output head"),
        ("xverse", "layers.2.", "tensors of layer 2"),
        ("internlm2", "output.weight", "the output head"),
        ("internlm2", "tok_embeddings", "the token embedding"),
        ("qwen", ".wte.", "the token embedding"),
        ("chatglm3", "output_layer", "the output head"),
        ("chatglm3", "layers.2.", "tensors of layer 2"),
        ("deepseek_moe", "layers.2.mlp.experts.5.up_proj", "lack 1 tensors of layer 2"),
    ],
)
def test_what_vllm_would_serve_as_garbage_is_missed(
    name: str, part: str, message: str, tmp_path: Path
) -> None:
    folder = checkpoints.write(name, tmp_path / name)
    if not list(folder.glob("*.safetensors")):
        import torch

        (file,) = folder.glob("*.bin")
        state = torch.load(file, weights_only=True)
        torch.save({k: v for k, v in state.items() if part not in k}, file)
    else:
        without(part)(folder)
    with pytest.raises(WeightsError, match=message):
        checkpoint.check(folder)
    shutil.rmtree(folder)
