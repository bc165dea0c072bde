"""Will it fit: beside vLLM's own count on its engine, and by hand for the published models."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from service import model_config, settings
from service.cli import models
from service.errors import ConfigError, WeightsError
from service.preflight import check, fit
from service.preflight.fit import GIB
from testing import checkpoints
from tests.engine import imports_are_no_garbage

pytestmark = pytest.mark.usefixtures("environment")

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")

OPENELM_QUERY_HEADS = [12] * 4 + [16] * 14 + [20] * 12 + [24] * 6
OPENELM_FFN = [
    *(1536, 1792, 2048, 2560, 2816, 3072, 3328, 3584, 4096, 4352, 4608, 4864),
    *(5120, 5632, 5888, 6144, 6400, 6656, 7168, 7424, 7680, 7936, 8192, 8704),
    *(8960, 9216, 9472, 9728, 10240, 10496, 10752, 11008, 11264, 11776, 12032, 12288),
]


def llama(architecture: str, hidden: int, ffn: int, vocabulary: int, **keys: Any) -> dict[str, Any]:
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "vocab_size": vocabulary,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        **keys,
    }


# config.json as published, in what matters here; MiniCPM is the fp32 repository.
PUBLISHED: dict[str, dict[str, Any]] = {
    "baichuan2-7b-chat": llama(
        "Baichuan", 4096, 11008, 125696, model_type="baichuan", max_position_embeddings=4096
    ),
    "xverse-7b-chat": llama(
        "Xverse", 4096, 11008, 100534, model_type="xverse", max_position_embeddings=8192
    ),
    "bluelm-7b-chat": llama(
        "BlueLM", 4096, 11008, 100096, model_type="BlueLM", max_position_embeddings=2048
    ),
    "openelm-3b-instruct": {
        "architectures": ["OpenELMForCausalLM"],
        "model_type": "openelm",
        "model_dim": 3072,
        "head_dim": 128,
        "num_transformer_layers": 36,
        "num_query_heads": OPENELM_QUERY_HEADS,
        "num_kv_heads": [heads // 4 for heads in OPENELM_QUERY_HEADS],
        "ffn_multipliers": [size / 3072 for size in OPENELM_FFN],
        "ffn_dim_divisor": 256,
        "max_context_length": 2048,
        "share_input_output_layers": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 32000,
    },
    "minicpm-2b-sft": {
        **llama("MiniCPM", 2304, 5760, 122753, num_hidden_layers=40, num_attention_heads=36),
        **{"max_position_embeddings": 4096, "scale_emb": 12, "scale_depth": 1.4},
        **{"dim_model_base": 256, "torch_dtype": "float32", "tie_word_embeddings": True},
    },
    "qwen2-7b-instruct": {
        **llama("Qwen2", 3584, 18944, 152064, num_hidden_layers=28, num_attention_heads=28),
        **{"model_type": "qwen2", "num_key_value_heads": 4, "max_position_embeddings": 32768},
    },
}

# Models whose longest context does not fit, so their YAMLs shorten it (shapes from memory).
LONG: dict[str, dict[str, Any]] = {
    "deepseek-r1-distill-qwen-7b": {
        **PUBLISHED["qwen2-7b-instruct"],
        "max_position_embeddings": 131072,
    },
    "qwen1.5-7b-chat": llama(
        "Qwen2", 4096, 11008, 151936, model_type="qwen2", max_position_embeddings=32768
    ),
    "llama-3.1-8b-instruct": {
        **llama("Llama", 4096, 14336, 128256, model_type="llama", num_key_value_heads=8),
        "max_position_embeddings": 131072,
    },
    "deepseek-coder-v2-lite-instruct": {
        **llama("DeepseekV2", 2048, 10944, 102400, model_type="deepseek_v2"),
        **{"num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16},
        **{"kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64},
        **{"qk_nope_head_dim": 128, "v_head_dim": 128, "max_position_embeddings": 163840},
        **{"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6},
    },
}


def parameters(name: str) -> int:
    """By hand from the shapes; norms, biases and other vectors are below a thousandth."""
    config = PUBLISHED[name]
    if name.startswith("openelm"):
        heads = sum(2 * q + 2 * q // 4 for q in OPENELM_QUERY_HEADS)  # q and o, k and v
        return 32000 * 3072 + 3072 * 128 * heads + 3 * 3072 * sum(OPENELM_FFN)
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    shared = config.get("num_key_value_heads", config["num_attention_heads"])
    kv = hidden * shared // config["num_attention_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * config["intermediate_size"]
    tables = 1 if name.startswith("minicpm") else 2
    return int(tables * config["vocab_size"] * hidden + layers * layer)


@contextmanager
def engine(folder: Path, **arguments: Any) -> Iterator[Any]:
    """vLLM's LLM in this process."""
    from vllm import LLM

    with imports_are_no_garbage():
        llm = LLM(
            str(folder),
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            use_tqdm_on_load=False,
            kv_cache_memory_bytes=50 << 20,
            **arguments,
        )
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()


def configured(folder: Path, **arguments: Any) -> Any:
    from vllm import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    sizes = {"max_num_seqs": 256, "max_num_batched_tokens": 2048, "dtype": "bfloat16"}
    arguments = {"skip_tokenizer_init": True, **sizes, **arguments}
    return EngineArgs(str(folder), **arguments).create_engine_config()


def on_24_gib(folder: Path, **arguments: Any) -> fit.Fit:
    return fit.estimate(configured(folder, **arguments), folder, 24 * GIB, on_gpu=True)


def published(name: str, folder: Path) -> Path:
    config = PUBLISHED[name]
    stored = 4 if config["torch_dtype"] == "float32" else 2
    (folder / "config.json").write_text(json.dumps(config))
    index = {"metadata": {"total_size": parameters(name) * stored}, "weight_map": {}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", ["openelm", "qwen2", "baichuan2"])
def test_tokens_concurrency_and_weights_are_what_vllm_then_reports(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.model_executor.model_loader import base_loader

    loaded: list[int] = []
    process = base_loader.process_weights_after_loading

    def count(model: Any, *arguments: Any) -> None:  # before the CPU packs them
        loaded.append(sum(p.numel() * p.element_size() for p in model.parameters()))
        process(model, *arguments)

    monkeypatch.setattr(base_loader, "process_weights_after_loading", count)
    folder = checkpoints.write(name, tmp_path / name)
    with engine(folder, max_model_len=1000) as llm:  # not a multiple of a block
        vllm_config = llm.llm_engine.vllm_config
        cache = vllm_config.cache_config
        room = fit.estimate(vllm_config, folder, GIB, on_gpu=False)
        assert room.blocks == cache.num_gpu_blocks
        assert room.tokens == cache.kv_cache_size_tokens
        assert room.concurrency(1000) == pytest.approx(cache.kv_cache_max_concurrency)
    assert [room.demand.weights] == loaded


@pytest.mark.parametrize("name", ["openelm", "qwen2", "baichuan2", "minicpm"])
def test_the_slots_of_adapters_are_those_that_vllm_makes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    folder = checkpoints.write(name, tmp_path / name)
    arguments = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 32}
    with engine(folder, max_model_len=1000, **arguments) as llm:
        vllm_config = llm.llm_engine.vllm_config
        worker = llm.llm_engine.model_executor.driver_worker.worker
        manager = worker.model_runner.lora_manager._adapter_manager
        slots: dict[int, torch.Tensor] = {}
        for module in manager.modules.values():
            for stacked in module.lora_a_stacked, module.lora_b_stacked:
                slots |= {id(t): t for t in ([stacked] if torch.is_tensor(stacked) else stacked)}
    room = fit.estimate(vllm_config, folder, GIB, on_gpu=False)
    assert room.demand.adapters == sum(t.numel() * t.element_size() for t in slots.values())
    assert fit.estimate(configured(folder), folder, GIB, on_gpu=True).demand.adapters == 0


# KV cache of a token in KiB, and of what 24 GiB leaves for it: tokens, requests at full context.
EXPECTED = {
    "baichuan2-7b-chat": (2 * 32 * 32 * 128 * 2 / 1024, 10928, 2.67),
    "xverse-7b-chat": (2 * 32 * 32 * 128 * 2 / 1024, 12208, 1.49),
    "bluelm-7b-chat": (2 * 32 * 32 * 128 * 2 / 1024, 12224, 5.97),
    "openelm-3b-instruct": (2 * (4 * 3 + 14 * 4 + 12 * 5 + 6 * 6) * 128 * 2 / 1024, 186160, 90.90),
    "minicpm-2b-sft": (2 * 40 * 36 * 64 * 2 / 1024, 41568, 10.15),
    "qwen2-7b-instruct": (2 * 28 * 4 * 128 * 2 / 1024, 91472, 2.79),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_models_in_24_gib(name: str, tmp_path: Path) -> None:
    room = on_24_gib(published(name, tmp_path))
    kib, tokens, concurrency = EXPECTED[name]
    assert room.demand.block == kib * 1024 * 16
    assert room.demand.weights == parameters(name) * 2
    # 256 requests sampled, CUDA graphs, CUDA libraries.
    overhead = 256 * PUBLISHED[name]["vocab_size"] * 40 + (1.44 + 0.12) * GIB
    left = 24 * GIB * 0.92 - parameters(name) * 2 - overhead
    assert tokens == pytest.approx(left / (kib * 1024), abs=16)
    assert room.tokens == tokens
    full = room.demand.max_model_len
    assert room.concurrency(full) == pytest.approx(concurrency, abs=0.005)
    assert room.largest_context == full  # all six have room for one request at least
    assert room.problems() == []
    row = (
        f"| `{name}` | {full:,} | {room.concurrency(full):.1f} | {int(room.concurrency(1024))} |\n"
    )
    assert row in README


@pytest.mark.parametrize("name", LONG)
def test_a_model_of_a_long_context_starts_on_24_gib_as_its_yaml_is(
    name: str, tmp_path: Path
) -> None:
    config = model_config.load(name)[0]
    (row,) = model_config.listing(name)
    quantization = {"fp8": {"quantization": "fp8_per_tensor"}, "yes": {}}[row["24 GiB card"]]
    (tmp_path / "config.json").write_text(json.dumps(LONG[name]))
    assert config.about.parameters
    index = {"metadata": {"total_size": int(config.about.parameters * 2e9)}, "weight_map": {}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert on_24_gib(tmp_path, **quantization).problems()
    length = config.engine.get("max_model_len")
    assert on_24_gib(tmp_path, max_model_len=length, **quantization).problems() == []


def test_what_changes_the_bytes(tmp_path: Path) -> None:
    folder = checkpoints.write("openelm", tmp_path)  # float32, served in bfloat16 here
    stored = (folder / "model.safetensors").stat().st_size
    room = on_24_gib(folder)
    assert room.demand.weights == pytest.approx(stored / 2, rel=0.01)
    assert room.demand.block == 16 * 2 * (2 + 3 + 3) * 32 * 2
    assert on_24_gib(folder, kv_cache_dtype="fp8").demand.block == room.demand.block / 2
    assert on_24_gib(folder, block_size=32).demand.block == room.demand.block * 2
    two = on_24_gib(folder, tensor_parallel_size=2)
    assert two.demand.weights == room.demand.weights / 2
    assert two.demand.block == 16 * 2 * (1 + 3 + 3) * 32 * 2  # 3 KV heads are repeated
    table = checkpoints.VOCABULARY * checkpoints.HIDDEN
    halved = (room.demand.weights - 2 * table) / 2 + 2 * table
    for name in ("fp8_per_tensor", "fp8"):  # the second is its old name
        assert on_24_gib(folder, quantization=name).demand.weights == halved
    with_output_layer = halved + table  # which is the table of tokens too, and is copied
    assert on_24_gib(folder, quantization="cpu_int8").demand.weights == with_output_layer
    lora = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 64}
    alone = on_24_gib(folder, **lora).demand.adapters
    assert on_24_gib(folder, **lora).kv_cache == room.kv_cache - alone
    shared = on_24_gib(folder, **lora, tensor_parallel_size=2).demand.adapters
    whole = checkpoints.LAYERS * 4 * checkpoints.HIDDEN + 2 * (checkpoints.VOCABULARY + 128)
    assert shared * 2 - alone == 2 * 64 * 2 * whole  # sides that both have
    graphs = room.demand.overhead - on_24_gib(folder, enforce_eager=True).demand.overhead
    assert graphs == int(1.44 * GIB)
    tensors = load_file(folder / "model.safetensors")
    latent = tensors.pop("transformer.layers.0.attn.out_proj.weight")
    tensors["transformer.layers.0.attn.kv_b_proj.weight"] = latent  # stays in two bytes
    save_file(tensors, folder / "model.safetensors")
    with_latent = with_output_layer + latent.numel()
    assert on_24_gib(folder, quantization="cpu_int8").demand.weights == with_latent


def test_files_that_are_no_checkpoint_are_told(tmp_path: Path) -> None:
    folder = checkpoints.write("qwen2", tmp_path)
    vllm_config = configured(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(b"version https://git-lfs")
    with pytest.raises(WeightsError, match="is the pointer of git-lfs"):
        fit.estimate(vllm_config, folder, GIB, on_gpu=True)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="is not a PyTorch weight file"):
        fit.estimate(vllm_config, folder, GIB, on_gpu=True)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(WeightsError, match="has neither weights nor their index"):
        fit.estimate(vllm_config, folder, GIB, on_gpu=True)


DEMAND = fit.Demand(
    weights=14 * GIB,
    overhead=2 * GIB,
    block=GIB // 128,
    block_tokens=16,
    max_model_len=4096,
    max_num_seqs=256,
    gpus=1,
)


@pytest.mark.parametrize(
    ("room", "arguments", "problem"),
    [
        (fit.Fit(DEMAND, 24 * GIB, 1, None), (4, 4096), None),
        (fit.Fit(DEMAND, 24 * GIB, 1, None), (16, 1024), None),
        (
            fit.Fit(DEMAND, 24 * GIB, 1, None),
            (5, 4096),
            "5 x 4,096 tokens need 2.00 GiB more KV cache than there is; set "
            "engine.max_model_len=3264, engine.kv_cache_dtype=fp8, "
            "engine.quantization=fp8_per_tensor, or a larger engine.tensor_parallel_size",
        ),
        (
            fit.Fit(DEMAND, 17 * GIB, 1, None),
            (1, 1024),
            "1 x 4,096 tokens need 1.00 GiB more KV cache than there is; set "
            "engine.max_model_len=2048",
        ),
        (fit.Fit(DEMAND, 16 * GIB, 0.9, None), (1, None), "1.60 GiB more than there is; set"),
        (fit.Fit(DEMAND, 24 * GIB, 1, 9 * GIB), (1, None), "1.00 GiB more than there is; set a"),
        (fit.Fit(DEMAND, 24 * GIB, 1, GIB), (1, None), "a larger engine.kv_cache_memory_bytes"),
        (fit.Fit(DEMAND, 24 * GIB, 1, None), (1, 8192), "8,192 tokens is longer than 4,096"),
        (fit.Fit(DEMAND, 99 * GIB, 1, None), (300, 16), "raise engine.max_num_seqs to 300"),
    ],
)
def test_what_does_not_fit_is_told_with_how_much_and_what_to_change(
    room: fit.Fit, arguments: tuple[int, int | None], problem: str | None
) -> None:
    found = room.problems(*arguments)
    if problem is None:
        assert found == []
    else:
        assert len(found) == 1
        assert problem in found[0]


def test_lines_for_a_person() -> None:
    assert fit.Fit(DEMAND, 24 * GIB, 1, None).lines() == [
        "memory: 24.0 GiB x 1 = 24.0 GiB: weights 14.0, overhead about 2.0, KV cache 8.0 GiB = "
        "16,384 tokens (512 KiB a token)",
        "fits: 4.00 requests at the full context of 4,096 tokens; 16 at 1,024; largest context for "
        "one request 4,096 (limited by engine.max_model_len, or the model)",
    ]
    two = replace(DEMAND, adapters=GIB, max_loras=2)
    assert "weights 14.0, adapters 1.0, overhead" in fit.Fit(two, 24 * GIB, 1, None).lines()[0]
    (problem,) = fit.Fit(two, 16 * GIB, 1, None).problems()
    assert "1.00 GiB more than there is; set engine.max_loras=1, engine.quantization" in problem
    assert fit.Fit(DEMAND, 17 * GIB, 1, None).lines()[1].endswith("2,048 (limited by the memory)")
    assert fit.Fit(DEMAND, 16 * GIB, 1, None).lines()[0].endswith("nothing left for KV cache")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24G", 24 * 10**9),
        ("24GB", 24 * 10**9),
        ("1.5 gib", 3 * 2**29),
        ("512MiB", 2**29),
        ("1TB", 10**12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert models._size(text) == size


@pytest.mark.parametrize("text", ["24", "GiB", "-1G", "24 cards", "0GiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="--memory .*: expected a size"):
        models._size(text)


def test_a_fit_that_is_asked_for_needs_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    config, origins = model_config.load("qwen2-7b-instruct")
    report = check.check(config, origins, settings.load())
    remedy = "run `chat-service download qwen2-7b-instruct` first"
    assert report.fit == [f"fit and template: not checked; {remedy}"]
    assert report.problems == []
    with pytest.raises(WeightsError, match=remedy):
        check.check(config, origins, settings.load(), memory=24 * GIB)


@pytest.mark.parametrize(
    ("gib", "sequences", "tokens", "told"),
    [(24, 256, 2048, False), (80, 1024, 8192, True), (180, 1024, 16384, False)],
)
def test_a_large_gpu_is_planned_with_vllms_defaults_for_it(
    gib: int, sequences: int, tokens: int, told: bool
) -> None:
    args = argparse.Namespace(max_num_seqs=None, max_num_batched_tokens=None)
    rows = check.plan_for_gpu(args, gib * GIB)
    assert (args.max_num_seqs, args.max_num_batched_tokens) == (sequences, tokens)
    assert bool(rows) is told  # an A100 of this size has others
