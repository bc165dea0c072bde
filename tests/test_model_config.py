"""The YAML of a model: what is accepted, and what each mistake is told."""

from pathlib import Path

import pytest

from service import model_config
from service.errors import ConfigError
from tests.conftest import hardening

GOOD = """\
name: mine
source:
  path: /models/mine
engine:
  max_model_len: 1024
sampling:
  temperature: 0.5
"""


def load(tmp_path: Path, text: str, *assignments: str) -> model_config.ModelConfig:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    return model_config.load(str(file), assignments)[0]


# Each line is nine times as long as the one before.
ALIASES = "".join(
    f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else '1'] * 9)}]\n" for i in range(12)
)


@pytest.mark.parametrize("name", model_config.catalogue())
def test_every_entry_of_the_catalogue_is_valid_and_named_as_its_file(name: str) -> None:
    assert model_config.load(name)[0].name == name


def test_set_overrides_one_value(tmp_path: Path) -> None:
    config = load(
        tmp_path, GOOD, "engine.max_model_len=2048", "sampling.top_k=5", "engine.dtype=bfloat16"
    )
    assert config.engine == {"max_model_len": 2048, "dtype": "bfloat16"}
    assert (config.sampling.temperature, config.sampling.top_k) == (0.5, 5)


@hardening(24)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "nmae: x\n" + GOOD,
            "{file}:1: nmae: unknown key; did you mean 'name'? (vLLM's arguments are keys of "
            "engine)",
        ),
        (
            GOOD.replace("temperature", "temprature"),
            "{file}:7: sampling.temprature: unknown key; did you mean 'temperature'?",
        ),
        (
            GOOD.replace("0.5", "hot"),
            "{file}:7: sampling.temperature: input should be a valid number",
        ),
        (
            GOOD.replace("mine\n", "no\n", 1),
            "{file}:1: name: input should be a valid string; put it in quotes",
        ),
        (
            GOOD.replace("1024", "0512"),
            "{file}:5: YAML reads 0512 as 330; write that, or put it in quotes",
        ),
        (
            GOOD + "  top_k: 1:30",
            "{file}:8: YAML reads 1:30 as 90; write that, or put it in quotes",
        ),
        (
            GOOD.replace("mine\n", "Qwen/Qwen2\n", 1),
            "{file}:1: name: a name has up to 64 letters, digits, _ . and -, and begins with none "
            "of the last two; for owner/model write model, as a name is part of paths",
        ),
        ("name: mine\nsource:\n  # path: /x\n", "{file}: source is missing"),
        (
            GOOD.replace("0.5", "3"),
            "{file}:7: sampling.temperature: input should be less than or equal to 2",
        ),
        (GOOD.replace("name: mine\n", ""), "{file}: name is missing"),
        (
            GOOD.replace("  path: /models/mine", "  path: a\n  modelscope: b/c"),
            "{file}:2: source: give exactly one of modelscope, path and embedded",
        ),
        (
            GOOD + "  temperature: 0.7\n",
            "{file}:8: sampling.temperature is given twice; it was first given on line 7",
        ),
        (
            GOOD.replace("  temperature", "\ttemperature"),
            "{file}:7: a tab cannot indent YAML; use spaces",
        ),
        (
            GOOD + "engine:\n" + ALIASES,
            "{file}:14: more than 100,000 values, with those that aliases repeat",
        ),
        ("just text", "{file}: expected keys and values, such as `name: my-model`"),
        ("", "{file}: expected keys and values, such as `name: my-model`"),
        (
            GOOD + "  max_tokens: 5\nmax_length: {default: 5}",
            "{file}: top level: give sampling.max_tokens or max_length.default, not both",
        ),
        (
            GOOD + "prompt: {echo: true}\nanswer: {strip: true}",
            "{file}: top level: give prompt.echo or answer.strip, not both",
        ),
        (
            GOOD + 'answer: {think: ["", "</think>"]}',
            "{file}:8: answer.think.0: string should have at least 1 character",
        ),
    ],
)
def test_a_mistake_is_told_with_its_line_and_the_nearest_name(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    assert str(error.value) == message.format(file=tmp_path / "mine.yaml")


@hardening(24)
def test_one_mistake_hides_no_other(tmp_path: Path) -> None:
    text = (
        "name: [mine]\n"
        "prompt: {style: completion, system: x, echo: true, echo: yes}\n"
        "answer: {strip: true, thnik: [a, b]}\n"
        "sampling: {top_p: 2, max_tokens: 5}\n"
        "max_length: {default: 0777, conuts: x}\n"
        "aliases: [a/b, 1.0]\n"
    )
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text, "name.first=x", "sampling", "sampling.top_k=hot")
    lines = str(error.value).replace(str(tmp_path / "mine.yaml"), "FILE").splitlines()
    begins = [
        "FILE:1: name",
        "FILE:2: prompt.echo is given twice; it was first given on line 2",
        "FILE:3: answer.thnik",
        "FILE:4: sampling.top_p",
        "FILE:5: YAML reads 0777 as 511; write that, or put it in quotes",
        "FILE:5: max_length.conuts",
        "FILE:6: aliases.0",
        "FILE:6: aliases.1",
        "FILE: source is missing",
        "FILE: top level",
        "FILE: top level",
        "FILE: top level",
        "--set name.first",
        "--set 'sampling'",
        "--set sampling.top_k",
    ]
    assert len(lines) == len(begins)
    assert [line for line, begin in zip(lines, begins, strict=True) if begin not in line] == []


@pytest.mark.parametrize("number", ["1e-6", "1E-6", "+1e-06", "1.e-6", "1.0e-6", "0.000001"])
def test_a_number_may_be_written_as_in_json(tmp_path: Path, number: str) -> None:
    sampling = load(tmp_path, GOOD.replace("0.5", number)).sampling
    assert sampling.temperature == 1e-6
    assert load(tmp_path, GOOD, f"sampling.temperature={number}").sampling == sampling
    long = GOOD.replace("0.5", number) + "# " + "x" * 10_000  # libyaml does not read it
    assert load(tmp_path, long).sampling == sampling
    quoted = load(tmp_path, f"{GOOD}description: '{number}'\nabout: {{family: {number}x}}\n")
    assert (quoted.description, quoted.about.family) == (number, f"{number}x")


@pytest.mark.parametrize("section", sorted({*model_config.ModelConfig.model_fields} - {"source"}))
def test_an_empty_section_is_as_if_it_were_not_there(tmp_path: Path, section: str) -> None:
    rest = "source: {path: /models/mine, revision: }\n"
    rest += "" if section == "name" else "name: mine\n"
    if section == "name":
        with pytest.raises(ConfigError, match=": name is missing$"):
            load(tmp_path, f"{rest}name:\n")
        return
    text = f"{rest}{section}:\n  # key: value\n"
    assert load(tmp_path, text) == load(tmp_path, rest)
    assert load(tmp_path, GOOD, f"{section}=null")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_file_is_read_whatever_the_editor(tmp_path: Path, end: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", end).encode())
    assert model_config.load(str(file))[0] == load(tmp_path, GOOD)


@pytest.mark.parametrize("codec", ["utf-16", "gbk"])
def test_a_file_in_another_encoding_is_told_with_its_line(tmp_path: Path, codec: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(f"{GOOD}description: 通义\n".encode(codec))
    line = 8 if codec == "gbk" else 1
    with pytest.raises(ConfigError) as error:
        model_config.load(str(file))
    assert str(error.value) == f"{file}:{line}: not UTF-8 text; save the file as UTF-8"


@pytest.mark.parametrize("depth", [4_000, 200_000])
def test_deep_brackets_are_told(tmp_path: Path, depth: int) -> None:
    for text in ("[" * depth, "[" * depth + "]" * depth):
        with pytest.raises(ConfigError, match="not valid YAML"):
            load(tmp_path, f"{GOOD}aliases: {text}")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("engine.max_model_len", "expected key.path=value, such as engine.max_model_len=2048"),
        ("name.first=x", "name has no keys below it"),
        ("prompt.ecko=true", "--set prompt.ecko: unknown key; did you mean 'echo'?"),
        ("sampling.top_p=[", "the value is not valid YAML"),
        ("name=!!int zz", "the value is not valid YAML"),
        ("name=" + "[" * 5000, "the value is not valid YAML"),
        ("sampling={temperature: hot}", "--set sampling.temperature: input should be a valid"),
    ],
)
def test_a_mistake_in_set_is_told(tmp_path: Path, assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, GOOD, assignment)
    assert message in str(error.value)


def test_a_name_that_is_not_in_the_catalogue_gets_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'smollm2-135m-instruct'"):
        model_config.load("smollm2-135m")
    with pytest.raises(ConfigError, match="did you mean 'qwen2-7b-instruct'"):
        model_config.load("qwen2")
    with pytest.raises(ConfigError, match="No such file"):
        model_config.load(str(tmp_path / "none.yaml"))
