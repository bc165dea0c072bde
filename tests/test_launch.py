"""A YAML's engine section becomes vLLM's own arguments, or an error that vLLM's parser decides."""

import os
from argparse import Namespace
from pathlib import Path

import pytest

from service import model_config, settings, vllm_arguments, vllm_plugins
from service.errors import ConfigError
from service.launch import server
from tests.conftest import MODEL, hardening


def arguments(tmp_path: Path, engine: str) -> Namespace:
    file = tmp_path / "m.yaml"
    file.write_text(f"name: m\nsource: {{path: .}}\nengine:\n  {engine}\n")
    config, origins = model_config.load(str(file))
    return vllm_arguments.arguments(config, origins, settings.load())


@pytest.mark.parametrize(
    ("engine", "name", "value"),
    [
        ("max_model_len: 2048", "max_model_len", 2048),
        ("max_model_len: 2k", "max_model_len", 2000),
        ("max-model-len: 2048", "max_model_len", 2048),
        ("gpu_memory_utilization: 0.5", "gpu_memory_utilization", 0.5),
        ("enforce_eager: true", "enforce_eager", True),
        ("enforce_eager: false", "enforce_eager", False),
        ("enable_prefix_caching: false", "enable_prefix_caching", False),
        ("disable_log_stats: false", "disable_log_stats", False),
        ("max_logprobs: -1", "max_logprobs", -1),
        ("quantization: null", "quantization", None),
        ("api_server_count: 2", "api_server_count", 2),
        ("allowed_origins: [a, b]", "allowed_origins", ["a", "b"]),
        (
            "middleware: [a.b, c.d]",
            "middleware",
            ["a.b", "c.d"],
        ),
        ("hf_overrides: {vocab_size: 7}", "hf_overrides", {"vocab_size": 7}),
        ("dtype: bfloat16", "distributed_executor_backend", vllm_arguments.CPU_EXECUTOR),
        ("distributed_executor_backend: mp", "distributed_executor_backend", "mp"),
        ("tensor_parallel_size: 2", "distributed_executor_backend", None),
    ],
)
def test_values_are_read_as_vllm_reads_them(
    tmp_path: Path, engine: str, name: str, value: object
) -> None:
    assert getattr(arguments(tmp_path, engine), name) == value


@pytest.mark.parametrize(
    ("engine", "here"),
    [
        ("dtype: bfloat16", True),
        ("api_server_count: 1", True),
        ("api_server_count: 2", False),
        ("data_parallel_size: 2", False),
        ("{data_parallel_size: 2, api_server_count: 1}", True),
        ("{data_parallel_size: 2, data_parallel_rank: 0}", True),
        ("{data_parallel_size: 2, data_parallel_external_lb: true}", True),
        ("{data_parallel_size: 2, enable_elastic_ep: true}", True),
        ("{data_parallel_size: 4, data_parallel_start_rank: 0}", True),
        (
            "{data_parallel_size: 4, data_parallel_start_rank: 0, data_parallel_size_local: 2}",
            False,
        ),
        ("{data_parallel_size: 2, data_parallel_multi_port_external_lb: true}", False),
    ],
)
def test_one_api_process_serves_on_our_socket(tmp_path: Path, engine: str, here: bool) -> None:
    assert vllm_arguments.serves_here(arguments(tmp_path, engine)) is here


@pytest.mark.usefixtures("environment")
def test_vllm_loads_the_plugins_that_it_would_load_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "others-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1\n")
    groups = ("general", "platform", "io_processor", "stat_logger", "endpoint")
    (package / "entry_points.txt").write_text(
        "".join(f"[vllm.{group}_plugins]\nan_{group} = others:{group}\n" for group in groups)
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)

    def named() -> set[str]:
        config, origins = model_config.load(MODEL)
        with server.prepared(config, origins, settings.load()):
            return set(os.environ["VLLM_PLUGINS"].split(","))

    ours = {name for _, name in vllm_plugins.OURS}
    assert named() >= ours | {f"an_{group}" for group in groups if group != "endpoint"}
    assert "an_endpoint" not in named()
    os.environ["VLLM_PLUGINS"] = "an_endpoint"
    assert named() == ours | {"an_endpoint"}


@hardening(15)
@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("max_model_length: 1", "vLLM has no such argument; did you mean 'max_model_len'?"),
        ("dtype: bfloat61", "invalid choice: 'bfloat61'"),
        ("max_model_len: many", "many"),
        ("api_server_count: two", "two"),
        ("api_server_count: 0", "must be 1 or more"),
        ("data_parallel_size: [1]", "data_parallel_size"),
        ("enforce_eager: maybe", "maybe"),
        ("model: other", "given by source here"),
        ("api_key: secret", "given by SERVICE_API_KEY here"),
        ("enable_scale_out: true", "cannot be set: its routes would go past the queue"),
        ("trust_remote_code: true", "cannot be set: remote code is never run"),
    ],
)
def test_vllm_decides_what_is_an_error_and_we_say_where(
    tmp_path: Path, engine: str, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        arguments(tmp_path, engine)
    place, _, said = str(error.value).partition(": ")
    assert place == f"{tmp_path / 'm.yaml'}:4"
    assert message in said
    assert len(said) < 400
