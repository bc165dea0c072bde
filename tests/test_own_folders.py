"""Folders with a model or an adapter as people have them: served, or told in a sentence why not."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from service import model_config, own_model, settings
from service.errors import ConfigError, LaunchError, WeightsError
from service.preflight import check
from service.weights import checkpoint
from testing import checkpoints

pytestmark = pytest.mark.usefixtures("environment")

SETS = ("engine.kv_cache_memory_bytes=64M", "engine.max_model_len=512")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    names = ("qwen2", "baichuan2", "chatglm3", "openelm")
    found = {name: checkpoints.write(name, folder / name) for name in names}
    return found | {"adapter": checkpoints.write_adapter(folder / "adapter", found["qwen2"])}


def change(file: Path, **keys: Any) -> None:
    """Change a JSON file; None removes a key."""
    content = json.loads(file.read_text()) | keys
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def added(id: int, token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {str(id): {"content": token, "special": True, **flags}}


def saved_by_transformers_5(folder: Path) -> None:
    rope = {"rope_theta": 1e6, "rope_type": "default"}
    config: dict[str, Any] = {"dtype": "float32", "torch_dtype": None}
    config |= {"rope_theta": None, "rope_parameters": rope}
    config |= {"layer_types": ["full_attention"] * 3, "transformers_version": "6.0.0"}
    change(folder / "config.json", **config)
    tokenizer: dict[str, Any] = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers"}
    file = folder / "tokenizer_config.json"
    (folder / "chat_template.jinja").write_text(json.loads(file.read_text())["chat_template"])
    change(file, **tokenizer, extra_special_tokens=["<|im_start|>"], chat_template=None)


def saved_by_transformers_4(folder: Path) -> None:
    tokenizer: dict[str, Any] = {"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": {}}
    tokenizer |= {"added_tokens_decoder": added(1, "<|im_start|>") | added(2, "<|im_end|>")}
    tokenizer |= {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    change(folder / "tokenizer_config.json", **tokenizer, split_special_tokens=False)
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    (folder / "added_tokens.json").write_text('{"<|im_start|>": 1, "<|im_end|>": 2}')


def of_a_class_that_is_not_here(folder: Path) -> None:
    remote = {"AutoTokenizer": ["tokenization_mine.MyTokenizer", None]}
    change(folder / "tokenizer_config.json", tokenizer_class="MyTokenizerFast", auto_map=remote)


def exported_by_llama_factory(folder: Path) -> None:
    """Of a model with remote code."""
    remote = "baichuan-inc/Baichuan2-7B-Chat--"
    auto_map = {"AutoConfig": f"{remote}configuration_baichuan.BaichuanConfig"}
    change(folder / "config.json", auto_map=auto_map, _name_or_path="/models/Baichuan2-7B-Chat")
    tensors = torch.load(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer: dict[str, Any] = {"added_tokens_decoder": added(0, "<unk>"), "sp_model_kwargs": {}}
    change(folder / "tokenizer_config.json", **tokenizer, padding_side="left")
    (folder / "Modelfile").write_text("FROM .")


def on_a_disk_of_macos(folder: Path) -> None:
    """With what else may lie beside a model, and no dtype in config.json."""
    change(folder / "config.json", dtype=None, torch_dtype=None)
    for file in list(folder.iterdir()):
        (folder / f"._{file.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ATTR")
    (folder / ".model.safetensors.swp").write_bytes(b"")
    for name in ("trainer_state.json", "all_results.json", "pytorch_model.bin.index.json"):
        (folder / name).write_text("{NaN")
    (folder / "consolidated.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}')
    (folder / ".ipynb_checkpoints").mkdir()


def beside_another_programs_args(folder: Path) -> None:
    (folder / "args.json").write_text("[1]")


def merged_with_peft(folder: Path) -> None:
    """By a newer transformers, which does not write where a model is from."""
    remote: dict[str, Any] = {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]}
    change(folder / "tokenizer_config.json", auto_map=remote)


def with_its_own_tokenizer(folder: Path) -> None:
    for file in (folder / "tokenizer").iterdir():
        file.rename(folder / file.name)


def merged_by_ms_swift_2(folder: Path) -> None:
    content = {"model_id_or_path": "qwen/Qwen2-7B-Instruct", "model_type": "qwen2-7b-instruct"}
    (folder / "sft_args.json").write_text(json.dumps(content))


def merged_by_ms_swift(folder: Path) -> None:
    (folder / "args.json").write_text('{"model": "Qwen/Qwen2-7B-Instruct", "model_type": "qwen2"}')


SERVED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "checkpoint-500": ("qwen2", saved_by_transformers_5, "its own"),
    "老版本 导出": ("qwen2", saved_by_transformers_4, "its own"),
    "mine": ("qwen2", of_a_class_that_is_not_here, "its own"),
    "百川 导出": ("baichuan2", exported_by_llama_factory, "baichuan2-7b-chat"),
    "mac": ("qwen2", on_a_disk_of_macos, "its own"),
    "args": ("qwen2", beside_another_programs_args, "its own"),
    "checkpoint-10-merged": ("qwen2", merged_by_ms_swift, "qwen2-7b-instruct"),
    "swift-2": ("qwen2", merged_by_ms_swift_2, "qwen2-7b-instruct"),
    "merged": ("baichuan2", merged_with_peft, "baichuan2-7b-chat"),
    "elm": ("openelm", with_its_own_tokenizer, "openelm-3b-instruct"),
}


@pytest.mark.parametrize("name", SERVED)
def test_a_folder_is_served(
    bases: dict[str, Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base, make, format_of = SERVED[name]
    folder = tmp_path / "v0 微调" / name
    shutil.copytree(bases[base], folder)
    make(folder)
    for state in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"):
        (folder / state).write_bytes(b"no weights")
    config, origins = own_model.load(str(folder), SETS)
    served = f"v0-微调-{name}" if "checkpoint" in name else name.replace(" ", "-")
    assert config.name == served
    said = capsys.readouterr().err
    assert f"served as {served!r} with " in said and f"sampling of {format_of}" in said.replace(
        "its own prompt format and sampling", "prompt format and sampling of its own"
    )
    checkpoint.check(folder)
    assert config.tokenizer is None
    assert check.check(config, origins, settings.load()).problems == []


def test_an_architecture_of_the_table_is_that_of_its_entry_and_of_no_other() -> None:
    entries: dict[str, set[str]] = {}
    for name, build in checkpoints.BUILDERS.items():
        entries.setdefault(build()[0]["architectures"][0], set()).add(checkpoints.CATALOGUE[name])
    for architecture, entry in own_model._ARCHITECTURES.items():
        assert entries[architecture] == {entry}


def test_a_command_that_is_told_can_be_typed(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "it's mine"
    shutil.copytree(bases["qwen2"], folder)
    own_model.load(str(folder))
    _, _, command = capsys.readouterr().err.partition("`chat-service ")
    *_, assignment = shlex.split(command.partition("` ")[0])
    config, _ = model_config.load("qwen2-7b-instruct", [assignment])
    assert config.source.path == str(folder)


def remove(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


def in_parts(folder: Path) -> None:
    remove(folder, "model.safetensors")
    (folder / "global_step500").mkdir()
    for name in ("zero_to_fp32.py", "latest", "scheduler.pt"):
        (folder / name).write_text("")


def without_tokenizer(folder: Path) -> None:
    remove(folder, "tokenizer.json", "tokenizer_config.json")


def with_an_adapter(folder: Path) -> None:
    checkpoints.write_adapter(folder, folder)


def with_a_newer_tokenizer(folder: Path) -> None:
    change(folder / "tokenizer.json", pre_tokenizer={"type": "OfTheFuture"})


def merged_into_four_bits(folder: Path) -> None:
    change(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"})


def replaced(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def sampled_by(**keys: Any) -> Callable[[Path], object]:
    return replaced("generation_config.json", json.dumps({"do_sample": True, **keys}))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
PULL = "it is the pointer of git-lfs to the file: run `git lfs pull` in its folder"
REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "DeepSpeed": ("qwen2", in_parts, "in parts: join them with the zero_to_fp32.py that lies in"),
    "no tokenizer": ("qwen2", without_tokenizer, "has no tokenizer; copy the tokenizer's files"),
    "both": ("qwen2", with_an_adapter, "a model and an adapter (adapter_model.safetensors); move"),
    "newer": ("qwen2", with_a_newer_tokenizer, "tokenizer.json is damaged, or newer than this"),
    "remote": ("chatglm3", lambda folder: None, "serve the folder as its entry of `chat-service"),
    "4 bits": ("qwen2", merged_into_four_bits, "bitsandbytes has quantised the weights, which"),
    "git without lfs": (
        "qwen2",
        replaced("model.safetensors", POINTER),
        "model.safetensors is not a safetensors file: ",
    ),
    "lfs": ("qwen2", replaced("model.safetensors", POINTER), PULL),
    "lfs, PyTorch": ("baichuan2", replaced("pytorch_model.bin", POINTER), PULL),
    "HTML, PyTorch": (
        "baichuan2",
        replaced("pytorch_model.bin", "<html>"),
        "pytorch_model.bin is not a PyTorch weight file; fetch the model again",
    ),
    "lfs, tokenizer": ("qwen2", replaced("tokenizer.json", POINTER), PULL),
    "a page of HTML": (
        "qwen2",
        replaced("model.safetensors", "<!DOCTYPE html><html><title>404</title>"),
        "model.safetensors is not a safetensors file: ",
    ),
    "empty": ("qwen2", replaced("model.safetensors", b""), "is not a safetensors file: "),
    "no weights": (
        "qwen2",
        lambda folder: remove(folder, "model.safetensors"),
        "holds no weights (*.safetensors, *.bin, *.pt); fetch the model again",
    ),
    "only macOS's": (
        "qwen2",
        lambda folder: (folder / "model.safetensors").rename(folder / "._model.safetensors"),
        "holds no weights (*.safetensors, *.bin, *.pt); fetch the model again",
    ),
    "a mark": ("qwen2", replaced("config.json", b"\xef\xbb\xbf{}"), "config.json is not readable"),
    "top_p": (
        "qwen2",
        sampled_by(top_p=0.0),
        "generation_config.json: vLLM does not take top_p 0.0: ",
    ),
    "temperature": ("qwen2", sampled_by(temperature=3.0), "; set sampling.temperature in the YAML"),
    "top_k": ("qwen2", sampled_by(top_k=-5), "; set sampling.top_k in the YAML, or correct it"),
    "min_p": ("qwen2", sampled_by(min_p=2), "vLLM does not take min_p 2: "),
    "penalty": ("qwen2", sampled_by(repetition_penalty="1.1"), "does not take repetition_penalty"),
    "tokens": ("qwen2", sampled_by(max_new_tokens=0), "; set sampling.max_tokens in the YAML"),
    "no config": (
        "adapter",
        lambda folder: remove(folder, "adapter_config.json"),
        "has adapter_model.safetensors without adapter_config.json; copy that too",
    ),
    "no rank": (
        "adapter",
        lambda folder: change(folder / "adapter_config.json", r=None, lora_alpha=None),
        "its adapter_config.json has no r and no lora_alpha; copy it again",
    ),
    "a hub's base": (
        "adapter",
        lambda folder: change(folder / "adapter_config.json", base_model_name_or_path="me/Mine-7B"),
        "is an adapter for me/Mine-7B, which is neither in the catalogue nor a folder here; name",
    ),
    "an empty base": (
        "adapter",
        lambda folder: change(folder / "adapter_config.json", base_model_name_or_path="/tmp"),
        "is an adapter for /tmp, which is a folder without config.json; name its base",
    ),
    "no base": (
        "adapter",
        lambda folder: change(folder / "adapter_config.json", base_model_name_or_path=None),
        "is an adapter for a base that it does not name, which is neither",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_says_what_to_do(
    bases: dict[str, Path], tmp_path: Path, case: str
) -> None:
    kind, spoil, message = REFUSED[case]
    folder = tmp_path / "我的 模型"
    shutil.copytree(bases[kind], folder)
    spoil(folder)
    try:
        problems = check.check(*own_model.load(str(folder), SETS), settings.load()).problems
    except (ConfigError, LaunchError, WeightsError) as e:
        problems = [str(e)]
    assert len(problems) == 1 and message in problems[0], problems
