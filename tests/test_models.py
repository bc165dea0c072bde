"""The tutorials' architectures in vLLM, beside the reference, on tiny random checkpoints."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.config import ModelConfig
from vllm.model_executor.models.chatglm import ChatGLMForCausalLM
from vllm.model_executor.models.deepseek_v2 import DeepseekV2ForCausalLM
from vllm.model_executor.models.internlm2 import InternLM2ForCausalLM
from vllm.model_executor.models.llama import LlamaAttention, LlamaForCausalLM, LlamaModel
from vllm.plugins import load_general_plugins
from vllm.transformers_utils.config import get_config

from service.models import baichuan2, bluelm, openelm, qwen
from service.preflight import reference
from testing import checkpoints
from tests.conftest import PATIENCE
from tests.engine import PROMPTS, Answer, ask, engine, read

NAMES = list(checkpoints.BUILDERS)
# The model code is ours, or their tensors are split in a way that is.
OURS = ["baichuan2", "xverse", "bluelm", "openelm", "internlm", "qwen", "index"]
# And vLLM's model code, with our config class or with its own.
SPLIT = [*OURS, "internlm2", "internlm3", "deepseek_moe", "chatglm3", "glm4"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: checkpoints.write(name, folder / name) for name in NAMES}


def differences(folder: Path, answers: Sequence[Answer]) -> tuple[int, float, float]:
    """Answers to the first of PROMPTS: tokens that the reference would not have chosen; how far
    log probabilities are, most and on average."""
    asked = PROMPTS[: len(answers)]
    logits = reference.logits(
        folder, [prompt + answer.tokens for prompt, answer in zip(asked, answers, strict=True)]
    )
    other = 0
    found: list[float] = []
    for prompt, answer, rows in zip(asked, answers, logits, strict=True):
        rows = rows[len(prompt) - 1 : -1].log_softmax(-1)
        other += int((rows.argmax(-1) != torch.tensor(answer.tokens)).sum())
        for row, place in zip(rows, answer.logprobs, strict=True):
            found += [abs(logprob - float(row[int(id)])) for id, logprob in place.items()]
    return other, max(found), sum(found) / len(found)


@pytest.mark.parametrize("name", NAMES)
def test_float32_says_what_the_reference_says_also_in_chunks_and_from_the_cache(
    folders: dict[str, Path], name: str
) -> None:
    with engine(folders[name]) as llm:
        answers, again = ask(llm), ask(llm)
    other, most, _ = differences(folders[name], answers)
    assert (other, most < 1e-3) == (0, True), most
    assert [answer.cached for answer in again] == [0, 0, 128]
    other, most, _ = differences(folders[name], again)
    assert (other, most < 1e-3) == (0, True), most
    assert len(set(answers[2].tokens)) > 3  # or the checkpoint would show nothing


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_differs_from_the_reference_by_rounding_only(
    folders: dict[str, Path], name: str
) -> None:
    with engine(folders[name], dtype="bfloat16") as llm:
        _, _, mean = differences(folders[name], ask(llm))
    assert mean < 0.15


# vLLM compiles its own model code in its own tests, and a compiler takes long.
@pytest.mark.parametrize("name", [*OURS, "deepseek_moe"])
def test_compiled_code_says_what_the_reference_says(folders: dict[str, Path], name: str) -> None:
    with engine(folders[name], enforce_eager=False) as llm:
        other, most, _ = differences(folders[name], ask(llm))
    assert (other, most < 1e-3) == (0, True), most


# For a pipeline, vLLM's CPU build does not get along with its asynchronous scheduler.
TWO_WORKERS: dict[str, dict[str, object]] = {
    "tensor parallel": {"tensor_parallel_size": 2},
    "pipeline parallel": {"pipeline_parallel_size": 2, "async_scheduling": False},
}


@pytest.fixture(scope="session")
def on_two_workers(folders: dict[str, Path]) -> dict[tuple[str, str], list[Answer]]:
    """All of them in one process, whose workers inherit what it has imported.

    It is bare vLLM: nothing there imports `service` but vLLM's own plugin loader.
    """
    keys = [(way, name) for way in TWO_WORKERS for name in SPLIT]
    runs = [(TWO_WORKERS[way], str(folders[name]), None) for way, name in keys]
    command = [sys.executable, "-m", "tests.engine", json.dumps(runs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    return dict(zip(keys, read(done), strict=True))


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("way", TWO_WORKERS)
def test_two_workers_say_what_the_reference_says(
    folders: dict[str, Path],
    on_two_workers: dict[tuple[str, str], list[Answer]],
    way: str,
    name: str,
) -> None:
    other, most, _ = differences(folders[name], on_two_workers[way, name])
    assert (other, most < 1e-3) == (0, True), most


Weight = tuple[str, torch.Tensor]


def loaded_as(model: Any, part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The mistake of a model that changes the weights with `part` in their names."""

    def patch(patch: pytest.MonkeyPatch) -> None:
        load = model.load_weights

        def changed(self: Any, weights: Iterable[Weight]) -> Any:
            return load(self, ((n, change(w) if part in n else w) for n, w in weights))

        patch.setattr(model, "load_weights", changed)

    return patch


def take_w1_for_gate(patch: pytest.MonkeyPatch) -> None:
    load = qwen.QwenForCausalLM.load_weights
    swap = {".w1.": ".w2.", ".w2.": ".w1."}

    def renamed(name: str) -> str:
        return next((name.replace(a, b) for a, b in swap.items() if a in name), name)

    patch.setattr(
        qwen.QwenForCausalLM,
        "load_weights",
        lambda self, weights: load(self, ((renamed(n), w) for n, w in weights)),
    )


def swap_halves(matrix: torch.Tensor) -> torch.Tensor:
    return torch.cat(matrix.chunk(2)[::-1])


def interleaved(matrix: torch.Tensor) -> torch.Tensor:
    return torch.stack(matrix.chunk(2), 1).flatten(0, 1)


def ungrouped(wqkv: torch.Tensor) -> torch.Tensor:
    """All of q, then k, then v, where the model expects them for each KV head."""
    groups = wqkv.view(2, 4, -1, wqkv.shape[1])
    return torch.cat([groups[:, :2].flatten(0, 2), groups[:, 2:].transpose(0, 1).flatten(0, 2)])


def rope(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


MISTAKES: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None] | dict[str, Any]]] = {
    "no NormHead": (
        "baichuan2",
        lambda p: p.setattr(baichuan2, "normalized_head", lambda head: head),
    ),
    "no embed_layer_norm": (
        "bluelm",
        lambda p: p.setattr(bluelm.BlueLMModel, "embed_input_ids", LlamaModel.embed_input_ids),
    ),
    "no q and k norm": (
        "openelm",
        lambda p: p.setattr(openelm.OpenELMAttention, "forward", LlamaAttention.forward),
    ),
    "up before gate": (
        "openelm",
        loaded_as(openelm.OpenELMForCausalLM, "proj_1", swap_halves),
    ),
    "no scale_emb": ("minicpm", {"scale_emb": 1}),
    "no scale_depth": ("minicpm", {"scale_depth": checkpoints.LAYERS**0.5}),
    "no final scale": ("minicpm", {"dim_model_base": checkpoints.HIDDEN}),
    "another rope base": ("xverse", rope(5000.0)),
    "no ntkmixed": ("bluelm_32k", rope(10000.0)),
    "no bias on o": (
        "internlm",
        loaded_as(LlamaForCausalLM, "o_proj.bias", torch.zeros_like),
    ),
    "no rotary base": ("internlm", rope(10000.0)),
    "q, k and v not grouped": (
        "internlm2",
        loaded_as(InternLM2ForCausalLM, ".wqkv.", ungrouped),
    ),
    "no rope_theta": ("internlm2", rope(10000.0)),
    "no rope_theta in the third": ("internlm3", rope(10000.0)),
    "no bias on InternLM3's q, k and v": (
        "internlm3",
        loaded_as(LlamaForCausalLM, "_proj.bias", torch.zeros_like),
    ),
    "w1 for gate": ("qwen", take_w1_for_gate),
    "no bias on q, k and v": (
        "qwen",
        loaded_as(qwen.QwenForCausalLM, "c_attn.bias", torch.zeros_like),
    ),
    "no rotary_emb_base": ("qwen", rope(10000.0)),
    "no layer_norm_epsilon": ("qwen", {"rms_norm_eps": 1e-6}),
    "no NormHead in Index": ("index", {"norm_head": False}),
    "weights of experts that sum to one": ("deepseek_moe", {"norm_topk_prob": True}),
    "too few experts": ("deepseek_moe", {"num_experts_per_tok": 2}),
    "no shared experts": (
        "deepseek_moe",
        loaded_as(DeepseekV2ForCausalLM, "shared_experts.down_proj", torch.zeros_like),
    ),
    "no bias on ChatGLM's q, k and v": (
        "chatglm3",
        loaded_as(ChatGLMForCausalLM, "query_key_value.bias", torch.zeros_like),
    ),
    "gate and up interleaved": (
        "chatglm3",
        loaded_as(ChatGLMForCausalLM, "dense_h_to_4h", interleaved),
    ),
    "halves as pairs": ("chatglm3", {"original_rope": False}),
    "no rope_ratio": ("glm4", {"rope_ratio": 1}),
}


def distance(
    folder: Path,
    change: Any,
    patch: pytest.MonkeyPatch,
    prompts: Sequence[list[int]] = PROMPTS,
    **arguments: Any,
) -> float:
    """How far log probabilities are, at most, with a mistake: a patch, or keys of config.json."""
    if callable(change):
        change(patch)
    else:
        arguments["hf_overrides"] = change
    with engine(folder, **arguments) as llm:
        return differences(folder, ask(llm, prompts))[1]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_shows_a_mistake_in_a_model(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    name, change = MISTAKES[mistake]
    # The length of bluelm_32k is in what the mistake drops.
    limit = {"max_model_len": 64} if name == "bluelm_32k" and not callable(change) else {}
    assert distance(folders[name], change, monkeypatch, PROMPTS[:2], **limit) > 0.01


@pytest.mark.parametrize(
    ("name", "layer", "modules"),
    [
        ("baichuan2", "model.layers.1", {"self_attn.W_pack": (384, 128)}),
        (
            "openelm",
            "transformer.layers.1",
            {"attn.qkv_proj": (576, 128), "ffn.proj_1": (384, 128)},
        ),
        (
            "qwen",
            "transformer.h.1",
            {
                "attn.c_attn": (384, 128),
                "attn.c_proj": (128, 128),
                "mlp.w1": (192, 128),
                "mlp.w2": (192, 128),
                "mlp.c_proj": (128, 192),
            },
        ),
        (
            "internlm",
            "model.layers.1",
            {"self_attn.q_proj": (128, 128), "self_attn.o_proj": (128, 128)},
        ),
        (
            "internlm2",
            "model.layers.1",
            {
                "attention.wqkv": (256, 128),
                "attention.wo": (128, 128),
                "feed_forward.w1": (192, 128),
                "feed_forward.w2": (128, 192),
                "feed_forward.w3": (192, 128),
            },
        ),
        (
            "index",
            "model.layers.1",
            {"self_attn.v_proj": (128, 128), "mlp.gate_proj": (192, 128)},
        ),
        (
            "chatglm3",
            "transformer.encoder.layers.1",
            {
                "self_attention.query_key_value": (256, 128),
                "self_attention.dense": (128, 128),
                "mlp.dense_h_to_4h": (384, 128),
                "mlp.dense_4h_to_h": (128, 192),
            },
        ),
    ],
)
def test_an_adapter_for_the_published_modules_acts_as_if_merged(
    folders: dict[str, Path],
    tmp_path: Path,
    name: str,
    layer: str,
    modules: dict[str, tuple[int, int]],
) -> None:
    if name in checkpoints.BIN:
        merged = torch.load(folders[name] / "pytorch_model.bin")
    else:
        merged = load_file(folders[name] / "model.safetensors")
    adapter, rank = {}, 4
    for module, (rows, columns) in modules.items():
        a, b = torch.randn(rank, columns) * 0.1, torch.randn(rows, rank) * 0.1
        adapter[f"base_model.model.{layer}.{module}.lora_A.weight"] = a
        adapter[f"base_model.model.{layer}.{module}.lora_B.weight"] = b
        merged[f"{layer}.{module}.weight"] += 2 * b @ a
    (tmp_path / "config.json").write_text((folders[name] / "config.json").read_text())
    save_file(merged, tmp_path / "model.safetensors")
    (tmp_path / "adapter").mkdir()
    save_file(adapter, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": rank,
                "lora_alpha": 2 * rank,
                "target_modules": [module.rpartition(".")[2] for module in modules],
            }
        )
    )
    with engine(folders[name], enable_lora=True, max_lora_rank=8) as llm:
        plain = ask(llm)
        adapted = ask(llm, lora=str(tmp_path / "adapter"))
    assert differences(folders[name], plain)[1] < 1e-3
    assert differences(tmp_path, plain)[1] > 0.01
    assert differences(tmp_path, adapted)[1] < 1e-3


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("baichuan2", {"hidden_size": 5120}, "13B Baichuan (hidden_size 5120)"),
        ("baichuan2", {"vocab_size": 64000}, "Baichuan 1 (vocab_size 64000)"),
        ("openelm", {"num_query_heads": [8, 12]}, "num_query_heads must have one entry for each"),
        ("openelm", {"ffn_with_glu": False}, "ffn_with_glu other than True"),
        ("internlm", {"rotary": {"type": "linear"}}, "rotary of type linear"),
        ("internlm2", {"bias": True}, "with bias was never published"),
        ("internlm3", {"bias": True}, "with bias was never published"),
        ("qwen", {"visual": {"heads": 16}}, "this is a Qwen-VL"),
        ("qwen", {"n_embd": 128}, "fetch a later revision, such as v1.1.4"),
        ("qwen", {"no_bias": False}, "no_bias other than True"),
        ("deepseek_moe", {"scoring_func": "sigmoid"}, "scoring_func sigmoid"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    folders: dict[str, Path], tmp_path: Path, name: str, config: dict[str, Any], message: str
) -> None:
    published = json.loads((folders[name] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(published | config))
    load_general_plugins()
    with pytest.raises(ValueError) as error:
        get_config(tmp_path, trust_remote_code=False)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "config", "length"),
    [
        ("internlm", {}, 1024),
        ("internlm2", {}, 1024),
        ("internlm2", {"rope_scaling": {"type": "linear", "factor": 2.0}}, 2048),
        ("internlm3", {}, 1024),
        ("qwen", {"seq_length": 256}, 256),
        ("qwen", {"seq_length": 256, "use_dynamic_ntk": False}, 256),
        ("chatglm3", {"seq_length": 512}, 512),
    ],
)
def test_a_text_is_as_long_as_the_model_is_exact(
    tmp_path: Path, name: str, config: dict[str, Any], length: int
) -> None:
    load_general_plugins()
    checkpoints.write(name, tmp_path, **config)
    assert ModelConfig(str(tmp_path), skip_tokenizer_init=True).max_model_len == length


@pytest.mark.parametrize("kind", ["default", "dynamic"])
def test_the_reference_reads_the_rotation_that_transformers_5_saves(
    tmp_path: Path, kind: str
) -> None:
    published = checkpoints.write("internlm3", tmp_path / "published")
    rope = {"rope_type": kind, "rope_theta": 50000000, "factor": 6.0}
    keys = {"rope_theta": None, "rope_scaling": None, "rope_parameters": rope}
    saved = checkpoints.write("internlm3", tmp_path / "saved", **keys)
    (expected,), (logits,) = (reference.logits(f, PROMPTS[:1]) for f in (published, saved))
    assert torch.equal(logits, expected)


def test_an_index_that_does_not_say_whether_it_has_a_norm_head_is_refused(tmp_path: Path) -> None:
    checkpoints.write("index", tmp_path, norm_head=None)
    with pytest.raises(Exception, match="norm_head"), engine(tmp_path):
        pass


@pytest.mark.parametrize(
    ("tp_size", "repeats"), [(1, [1, 1, 1, 1]), (2, [2, 1, 2, 1]), (4, [4, 1, 4, 2])]
)
def test_openelm_3b_repeats_as_few_kv_heads_as_it_must(
    monkeypatch: pytest.MonkeyPatch, tp_size: int, repeats: list[int]
) -> None:
    config = openelm_3b()
    monkeypatch.setattr(openelm, "get_tensor_model_parallel_world_size", lambda: tp_size)
    assert [openelm.kv_repeats(config, layer) for layer in range(4)] == repeats


def test_an_impossible_tensor_parallel_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openelm, "get_tensor_model_parallel_world_size", lambda: 8)
    with pytest.raises(ValueError, match="tensor_parallel_size 8: layer 0 has 12 query and 3 KV"):
        openelm.kv_repeats(openelm_3b(), 0)


def test_a_backend_that_counts_on_equal_layers_is_refused() -> None:
    openelm.check_backend("FlashAttentionBackend")
    with pytest.raises(ValueError, match="set engine.attention_backend to another"):
        openelm.check_backend("FlexAttentionBackend")


def openelm_3b() -> openelm.OpenELMConfig:
    """OpenELM-3B's four sizes of layer."""
    return openelm.OpenELMConfig(
        model_dim=3072,
        head_dim=128,
        num_transformer_layers=4,
        num_query_heads=[12, 16, 20, 24],
        num_kv_heads=[3, 4, 5, 6],
        ffn_multipliers=[0.5, 1.0, 2.37, 4.0],
    )
