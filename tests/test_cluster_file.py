"""The YAML of a cluster: what is in it, and each mistake with its line."""

from pathlib import Path

import pytest

from service.cluster import config
from service.errors import ConfigError
from tests.conftest import MODEL


def load(folder: Path, text: str) -> config.Cluster:
    file = folder / "cluster.yaml"
    file.write_text(text)
    return config.load(file)


@pytest.mark.parametrize("name", ["a", "'123'", "'1.5'", "'on'", "'null'", "b-2"])
def test_a_model_has_the_name_that_it_is_given(tmp_path: Path, name: str) -> None:
    cluster = load(tmp_path, f"models:\n  {name}: {{model: {MODEL}, replicas: [1, 2]}}\n")
    (model,) = cluster.models.values()
    assert [cluster.default] == [*cluster.models] == [name.strip("'")] == [model.config.name]
    assert (model.min_replicas, model.max_replicas) == (1, 2)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("models:\n  a: {model: %s}\ndefalt: a\n", 3, "unknown key; did you mean 'default'?"),
        ("models:\n  a:\n    model: %s\n    replica: 2\n", 4, "did you mean 'replicas'?"),
        (
            "models:\n  a:\n    model: %s\n    replicas: [3, 1]\n",
            2,
            "replicas: the first number is the minimum, the second the maximum",
        ),
        ("models:\n  v1: {model: %s}\n", 2, "is a route of the service; choose another name"),
        ("models:\n  a: {model: %s1}\n", 2, f"did you mean '{MODEL}'?"),
        (
            "models:\n  a: {model: %s}\n  b:\n    model: %s\n    set: {aliases: [a]}\ndefault: a\n",
            3,
            "a is served as 'a' too",
        ),
    ],
)
def test_a_mistake_is_told_with_its_line(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text.replace("%s", MODEL))
    place, _, said = str(error.value).partition(": ")
    assert place == f"{tmp_path / 'cluster.yaml'}:{line}" and message in said


@pytest.mark.parametrize(
    ("default", "message"),
    [("", "name the model that answers requests without `model`"), ("default: c\n", "no such key")],
)
def test_of_several_models_one_is_the_default(tmp_path: Path, default: str, message: str) -> None:
    text = f"models:\n  a: {{model: {MODEL}}}\n  b: {{model: {MODEL}}}\n"
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text + default)
    assert load(tmp_path, f"{text}default: b\n").default == "b"
