"""The mode that reads tokenizer.json itself, and what tells that a model needs it."""

import argparse
import json
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from vllm.plugins import load_general_plugins
from vllm.tokenizers import get_tokenizer
from vllm.tokenizers.mistral import MistralTokenizer

from service import model_config, settings
from service.launch import server, tokenizer_choice
from service.preflight import check
from service.tokenizers.tokenizer_json import TEXTS
from testing import checkpoints

pytestmark = pytest.mark.usefixtures("environment")

REMEDY = "set engine.tokenizer_mode: tokenizer_json"


@pytest.fixture
def misread(tmp_path: Path) -> Path:
    """As deepseek-llm is published: bytes in tokenizer.json, and the name of another class."""
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    checkpoints.write("qwen2", tmp_path, **llama)
    file = tmp_path / "tokenizer_config.json"
    keys = {**json.loads(file.read_text()), "tokenizer_class": "LlamaTokenizerFast"}
    file.write_text(json.dumps(keys))
    return tmp_path


def loaded(folder: Path, *assignments: str) -> Any:
    return checkpoints.load("qwen2", folder, *assignments)


def test_the_mode_gives_the_ids_of_tokenizer_json(misread: Path) -> None:
    load_general_plugins()
    itself = Tokenizer.from_file(str(misread / "tokenizer.json"))
    ours = get_tokenizer(misread, tokenizer_mode="tokenizer_json")
    guessed = get_tokenizer(misread)
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=False) == itself.encode(text).ids
        assert ours.decode(itself.encode(text).ids) == unicodedata.normalize("NFC", text)
    assert guessed.encode("你好", add_special_tokens=False) == []  # why the mode is there
    options = {"tokenize": False, "add_generation_prompt": True}
    plain = ours.apply_chat_template([{"role": "user", "content": "你好"}], **options)
    assert plain.endswith("<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n")
    spelled = ours.apply_chat_template([{"role": "user", "content": "a<|im_end|>b"}], **options)
    assert spelled.count(ours.convert_tokens_to_ids("<|im_end|>")) == 2  # system's and user's
    assert "a<|im_end|>b" in ours.decode(spelled)


@pytest.mark.parametrize("mode", ["auto", "literal"])
def test_check_reports_other_ids_with_the_remedy(misread: Path, mode: str) -> None:
    config, origins = loaded(misread, f"engine.tokenizer_mode={mode}")
    report = check.check(config, origins, settings.load(), memory=1 << 34)
    (problem,) = report.problems
    assert problem.startswith("transformers reads it as a LlamaTokenizer, which gives other tokens")
    assert problem.endswith(REMEDY)
    config, origins = loaded(misread, "engine.tokenizer_mode=tokenizer_json")
    assert not check.check(config, origins, settings.load(), memory=1 << 34).problems


def test_serve_reads_tokenizer_json_itself_and_says_so(
    misread: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, origins = loaded(misread)
    with server.prepared(config, origins, settings.load()) as (args, _):
        server.fetch_files(args, config, settings.load())
    assert args.tokenizer_mode == "tokenizer_json"
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "tokenizer.json" in line]
    assert line.startswith("Reading tokenizer.json itself: transformers reads it as a LlamaTokeni")


@pytest.mark.parametrize("mode", ["literal", "tokenizer_json"])
def test_a_file_that_was_saved_by_the_wrong_class_is_told(
    misread: Path, mode: str, capfd: pytest.CaptureFixture[str]
) -> None:
    AutoTokenizer.from_pretrained(misread).save_pretrained(misread)
    config, origins = loaded(misread, f"engine.tokenizer_mode={mode}")
    report = check.check(config, origins, settings.load(), memory=1 << 34)
    assert any("makes no tokens of Chinese text" in problem for problem in report.problems)
    with server.prepared(config, origins, settings.load()) as (args, _):
        server.fetch_files(args, config, settings.load())
    assert "copy the base's tokenizer files over it" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["xverse", "minicpm"])
def test_a_mode_with_its_own_format_is_kept_and_the_other_ids_are_told(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoints.write(name, tmp_path)
    sibling = tmp_path / "sibling"
    checkpoints.write("qwen2", sibling)
    shutil.copy(sibling / "tokenizer.json", tmp_path)
    file = tmp_path / "tokenizer_config.json"
    keys = {**json.loads(file.read_text()), "tokenizer_class": "LlamaTokenizerFast"}
    file.write_text(json.dumps(keys))
    config, origins = checkpoints.load(name, tmp_path)
    (problem,) = check.check(config, origins, settings.load(), memory=1 << 34).problems
    assert problem.startswith("transformers reads it as a Llama") and "fetch both again" in problem
    with server.prepared(config, origins, settings.load()) as (args, _):
        server.fetch_files(args, config, settings.load())
    assert args.tokenizer_mode == name
    assert "warning: transformers reads it as a Llama" in capfd.readouterr().err


def test_a_tokenizer_that_is_not_of_transformers_is_not_compared(misread: Path) -> None:
    # vLLM's, which it takes where a folder has Mistral's own files.
    mistral = MistralTokenizer.__new__(MistralTokenizer)
    args = argparse.Namespace(tokenizer=str(misread), tokenizer_mode="auto")
    assert tokenizer_choice.problem(args, mistral) is None


@pytest.mark.parametrize("name", ["qwen2", "xverse", "minicpm"])
def test_a_tokenizer_that_is_read_rightly_is_left_alone(tmp_path: Path, name: str) -> None:
    checkpoints.write(name, tmp_path)
    config, origins = checkpoints.load(name, tmp_path)
    with server.prepared(config, origins, settings.load()) as (args, _):
        server.fetch_files(args, config, settings.load())
    assert args.tokenizer_mode == config.engine.get("tokenizer_mode", "auto")
    assert tokenizer_choice.choose(args) is None


def test_a_folder_without_the_file_is_told(tmp_path: Path) -> None:
    load_general_plugins()
    checkpoints.TOKENIZERS["minicpm"](tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer\.json; leave out tokenizer_mode"):
        get_tokenizer(tmp_path, tokenizer_mode="tokenizer_json")


def test_the_mode_is_in_the_catalogue_of_vllms_arguments(misread: Path) -> None:
    yaml = misread / "mine.yaml"
    yaml.write_text(
        f"name: mine\nsource: {{path: {misread}}}\nengine: {{tokenizer_mode: tokenizer_json}}\n"
    )
    with server.prepared(*model_config.load(str(yaml)), settings.load()) as (args, _):
        assert args.tokenizer_mode == "tokenizer_json"
