"""Templates as people break them, through `check`, on a tiny checkpoint; and sane ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from vllm import AsyncEngineArgs
from vllm.renderers import renderer_from_config

from service import model_config, settings, vllm_arguments
from service.api.fast_render import chat_params, chat_template
from service.launch import server
from service.model_config import ModelConfig, Origins
from service.preflight.check import CheckReport
from service.preflight.check import check as check_model
from service.prompting import Message
from testing import checkpoints
from tests.conftest import MODEL

try:
    from vllm.entrypoints.common.cli_args import resolve_default_chat_template_kwargs
except ImportError:  # vLLM 0.32
    from vllm.entrypoints.launchers.cli_args import resolve_default_chat_template_kwargs

pytestmark = pytest.mark.usefixtures("environment")

SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
TURNS = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
MARKER = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
SANE = f"{{{{ bos_token }}}}{TURNS}{MARKER}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes that begins a text with bos, and a model."""
    folder = checkpoints.write("qwen2", tmp_path_factory.mktemp("checkpoint"))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: id for id, token in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.normalizer = normalizers.NFC()  # as transformers' class for this model has it
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    keys = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(keys))
    return folder


def load(
    folder: Path, tmp_path: Path, template: str | None, **keys: Any
) -> tuple[ModelConfig, Origins]:
    file = tmp_path / "tiny.yaml"
    prompt = {"template": template} if template else {"style": "completion"}
    content = {"name": "tiny", "source": {"path": str(folder)}, "prompt": prompt, **keys}
    file.write_text(yaml.safe_dump(content))
    return model_config.load(str(file))


def check(folder: Path, tmp_path: Path, template: str | None, **keys: Any) -> CheckReport:
    loaded = load(folder, tmp_path, template, **keys)
    return check_model(*loaded, settings.load(), memory=1 << 34)


@pytest.mark.parametrize("variables", [None, {"enable_thinking": False}])
def test_short_turns_take_no_more_than_the_template(
    checkpoint: Path, tmp_path: Path, variables: dict[str, Any] | None
) -> None:
    """Whatever vLLM's server hands to each template; and the text is its renderer's."""
    engine = {"tokenizer_mode": "literal", "default_chat_template_kwargs": variables}
    text = SANE + "{{ enable_thinking is defined and not enable_thinking }}"
    loaded = load(checkpoint, tmp_path, text, engine=engine)
    with server.prepared(*loaded, settings.load()) as (args, _):
        vllm_arguments.use_files(args, checkpoint, checkpoint)
        renderer = renderer_from_config(AsyncEngineArgs.from_cli_args(args).create_engine_config())
    renderer.shutdown()  # its threads
    chat = chat_params(text, "auto", resolve_default_chat_template_kwargs(args))
    render = chat_template(renderer, chat)
    turns: list[Message] = [
        {"role": "user", "content": "one\n two"},
        {"role": "assistant", "content": "三"},
        {"role": "user", "content": ""},
    ]
    _, rendered = renderer.render_messages(turns, chat)
    assert render(turns) == rendered["prompt"]
    assert rendered["prompt"].endswith("True") is bool(variables)
    # These go vLLM's way.
    assert render([{"role": "system", "content": "Be kind."}, *turns]) is None
    assert render([{"role": "user", "content": "a <|user|> b"}]) is None


@pytest.mark.parametrize("mode", ["auto", "literal"])
def test_a_sane_template_has_no_finding(checkpoint: Path, tmp_path: Path, mode: str) -> None:
    report = check(checkpoint, tmp_path, SANE, engine={"tokenizer_mode": mode})
    assert (report.problems, report.warnings) == ([], [])


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (f"{{{{ bos_token }}}}{TURNS}", "a prompt ends in '' after the user's text"),
        ("{{ bos_token }}" + SANE, "a prompt begins with '<s>' twice; take bos_token out"),
        (
            "{{ bos_token }}{{ '<|user|>' + messages[-1].content }}" + MARKER,
            "the template loses or moves the user turn; loop over `messages`",
        ),
        (
            "{{ bos_token }}{% for m in messages if m.role != 'assistant' %}"
            "{{ '<|user|>' + m.content }}{% endfor %}" + MARKER,
            "the template loses or moves the assistant turn",
        ),
        (SANE.replace("messages", "messages[::-1]"), "loses or moves the assistant turn"),
        ("{{ messages[0].contents.strip() }}", "the template cannot render one user turn: "),
        (
            "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}" + SANE,
            "cannot render user, assistant, user: one turn; with it no request may have a history",
        ),
        (
            "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "and in a conversation '' stands before the answer; end prompt.template with",
        ),
    ],
)
def test_a_broken_template_is_told_with_a_remedy(
    checkpoint: Path, tmp_path: Path, template: str, problem: str
) -> None:
    report = check(checkpoint, tmp_path, template)
    assert len(report.problems) == 1, report.problems
    assert problem in report.problems[0]


@pytest.mark.parametrize(
    ("template", "warning"),
    [
        (TURNS + MARKER, "a prompt does not begin with '<s>', with which the tokenizer begins"),
        (
            SANE.replace("in messages", "in messages if m.role != 'system'"),
            "the template drops a system message and says nothing",
        ),
    ],
)
def test_what_may_be_meant_is_a_warning(
    checkpoint: Path, tmp_path: Path, template: str, warning: str
) -> None:
    report = check(checkpoint, tmp_path, template)
    assert report.problems == []
    assert len(report.warnings) == 1
    assert warning in report.warnings[0]


@pytest.mark.parametrize(
    "template",
    [
        # A system message refused in words, none in the user's turn, and a thinking model whose
        # history is without thoughts.
        "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}" + SANE,
        SANE + "{% if add_generation_prompt %}<think>{% endif %}",
        # MiniCPM's: the marker stands behind every user's text.
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '<|user|>' + m.content + '<|assistant|>' }}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}",
        # The model itself names the channel of its answer.
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' }}"
        "{{ '(final)' if m.role == 'assistant' else '' }}{{ m.content }}{% endfor %}" + MARKER,
    ],
)
def test_other_sane_templates_have_no_finding(
    checkpoint: Path, tmp_path: Path, template: str
) -> None:
    report = check(checkpoint, tmp_path, template)
    assert (report.problems, report.warnings) == ([], [])


@pytest.mark.parametrize("mode", ["baichuan2", "bluelm"])
def test_tokenizers_that_build_prompts_themselves_are_sane(mode: str, tmp_path: Path) -> None:
    folder = checkpoints.write(mode, tmp_path / mode)
    engine = {"tokenizer_mode": mode}
    report = check(folder, tmp_path, None, engine=engine, prompt={"style": "chat"})
    assert (report.problems, report.warnings) == ([], [])


def test_xverses_prompts_are_sane(checkpoint: Path, tmp_path: Path) -> None:
    engine = {"tokenizer_mode": "xverse"}
    report = check(checkpoint, tmp_path, None, engine=engine, prompt={"style": "chat"})
    assert (report.problems, report.warnings) == ([], [])


def test_stop_tokens_must_exist(checkpoint: Path, tmp_path: Path) -> None:
    generation = checkpoint / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [1, 319]}))  # 319 is only in the weights
    try:
        report = check(checkpoint, tmp_path, None)
    finally:
        generation.unlink()
    assert len(report.problems) == 1
    assert "stop token 319 is not in the vocabulary; correct eos_token_id" in report.problems[0]


def test_a_completion_model_needs_no_template(checkpoint: Path, tmp_path: Path) -> None:
    report = check(checkpoint, tmp_path, None)
    assert (report.problems, report.warnings) == ([], [])


def test_the_embedded_model_is_sane_and_fits(embedded_model: Path) -> None:
    report = check_model(*model_config.load(MODEL), settings.load(), memory=24 << 30)
    assert (report.problems, report.warnings) == ([], [])
    assert report.fit[2:] == ["template: ok"]
