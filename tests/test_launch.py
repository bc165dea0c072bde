"""A YAML's engine section becomes vLLM's own arguments, or an error that vLLM's parser decides."""

import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from service import model_config, settings, vllm_arguments, vllm_plugins
from service.errors import ConfigError
from service.launch import environment, server
from tests.conftest import MODEL, hardening


def arguments(tmp_path: Path, engine: str) -> Namespace:
    file = tmp_path / "m.yaml"
    file.write_text(f"name: m\nsource: {{path: .}}\nengine:\n  {engine}\n")
    config, origins = model_config.load(str(file))
    return vllm_arguments.arguments(config, origins, settings.load())


# vLLM's variables that sound as if they changed who comes in, what is run or what is logged, and
# that a server may have: vLLM honours them, and none undoes a promise of ours.
HARMLESS = {
    *("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE"),
    *("VLLM_DEEPEP_V2_ALLOW_HYBRID_MODE", "VLLM_DEEPEP_V2_ALLOW_MULTIPLE_REDUCTION"),
    *("VLLM_MEDIA_CONNECTOR", "VLLM_MEDIA_URL_ALLOW_REDIRECTS"),  # engine.allowed_media_domains
    "VLLM_PLUGINS",  # ours are added
    *("VLLM_LORA_RESOLVER_CACHE_DIR", "VLLM_LORA_RESOLVER_HF_REPO_LIST"),  # with another, refused
    "VLLM_RUST_FRONTEND_PATH",  # with another, which is refused
    *("VLLM_USE_PRECOMPILED_RUST", "VLLM_USE_RUST_BENCH"),  # of vLLM's build, and of its benchmark
    "VLLM_USAGE_STATS_SERVER",
    # What a log has is not a client's; the level and the form are ours.
    *("VLLM_LOGGING_COLOR", "VLLM_LOGGING_PREFIX", "VLLM_LOGGING_STREAM"),
    *("VLLM_LOG_BATCHSIZE_INTERVAL", "VLLM_LOG_MODEL_INSPECTION", "VLLM_LOG_STATS_INTERVAL"),
    *("VLLM_DISABLE_LOG_LOGO", "VLLM_MOONCAKE_STORE_TIER_LOG", "VLLM_TRACE_FUNCTION"),
    *("VLLM_DEBUG_DUMP_PATH", "VLLM_DEBUG_MFU_METRICS", "VLLM_DEBUG_WORKSPACE", "VLLM_GC_DEBUG"),
    "VLLM_PATTERN_MATCH_DEBUG",
}
SOUNDS = re.compile(
    "KEY|TOKEN$|ALLOW|INSECURE|LOG(_|GING|$)|DEBUG|TRACE|DEV_MODE|FRONTEND|RUST|PLUGIN|REDIRECT|"
    "RESOLVER|CONNECTOR$|API|FORCE_LOAD_FORMAT|REQUEST_ID|USAGE_STATS_SERVER"
)


def test_every_variable_of_vllm_that_sounds_dangerous_is_decided() -> None:
    from vllm import envs

    ours = (name for name in envs.environment_variables if name.startswith("VLLM_"))
    found = {name for name in ours if SOUNDS.search(name)}
    refused = {variable for variable, _ in environment._REFUSED}
    assert found - refused - HARMLESS == set()
    assert refused <= envs.environment_variables.keys()


@hardening(12)
@pytest.mark.parametrize(("variable", "harmless"), environment._REFUSED)
def test_a_variable_that_undoes_a_promise_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, variable: str, harmless: str
) -> None:
    for value in ("", harmless):
        monkeypatch.setenv(variable, value)
        environment.check()
    monkeypatch.setenv(variable, "1" if harmless == "0" else "0")
    with pytest.raises(ConfigError) as error:
        environment.check()
    assert str(error.value).startswith(f"{variable} ") and ": unset it" in str(error.value)


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


def test_the_supervisor_imports_nothing_that_takes_long() -> None:
    code = "import sys, service.launch.supervisor; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"vllm", "torch", "fastapi"}.isdisjoint(done.stdout.split())


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
        ("tool_call_parser: hermez", "vLLM has no such parser; did you mean 'hermes'?"),
        ("reasoning_parser: deepseek_r11", "vLLM has no such parser; did you mean 'deepseek_r1'?"),
        ("quantization: cpu_int9", "vLLM has no such quantization; did you mean 'cpu_int8'?"),
        ("distributed_executor_backend: ray", "cannot be ray: leave it out for the GPUs of one"),
        ("data_parallel_backend: ray", "cannot be ray: use `chat-service cluster`"),
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
