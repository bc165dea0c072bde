"""chat-service as its user types it: data on stdout, one line on stderr for a mistake."""

import json
import os
import re
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from service import model_config
from service.launch import supervisor
from testing.server import free_port
from tests import terminal, warm
from tests.conftest import MODEL, PATIENCE, hardening


def typed(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, **env},
    )


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The same without the import of vLLM."""
    return warm.run(*arguments, env=env)


def test_help_shows_each_command_with_an_example() -> None:
    overview = run("--help")
    assert overview.returncode == 0
    for command in ("serve", "check", "download", "models", "verify", "chat", "top", "usage"):
        assert command in overview.stdout
        text = run(command, "--help").stdout
        assert f"chat-service {command}" in text
    assert run("--version").stdout == f"{version('vllm-chat-service')}\n"


def test_the_shell_completes_the_names_of_models() -> None:
    asked = {"COMP_WORDS": "chat-service serve q", "COMP_CWORD": "2"}
    command = [str(Path(sys.executable).with_name("chat-service"))]
    env = {**os.environ, **asked, "_CHAT_SERVICE_COMPLETE": "complete_bash"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.stdout.split() == [name for name in model_config.catalogue() if name[0] == "q"]


def test_models_is_a_table_with_a_line_for_each() -> None:
    done = run("models")
    assert done.returncode == 0
    head, *lines = done.stdout.splitlines()
    columns = ["model", "family", "parameters", "weights", "24 GiB card", "chapter", "description"]
    assert re.split(r"\s{2,}", head.strip()) == columns
    assert {line.split()[0] for line in lines} == set(model_config.catalogue())
    families = [line.split()[1] for line in lines]
    assert families == sorted(families)  # each is in one place
    listed = json.loads(run("models", "--json", "phi").stdout)
    assert [entry["model"] for entry in listed] == ["phi-3-mini-4k-instruct", "phi-4"]
    refused = run("models", "nothing")
    assert refused.returncode == 2 and "no model has 'nothing' in its name" in refused.stderr


@pytest.mark.parametrize("command", ["models", "check"])
def test_a_table_fits_a_terminal_and_is_plain_in_a_pipe(embedded_model: Path, command: str) -> None:
    more = ("--set", "prompt.system=" + "Be brief. " * 60) if command == "check" else ()
    status, text = terminal.run(command, *more)
    lines = [line for line in text.splitlines() if not line.startswith("Asking vLLM")]
    assert status == 0, text
    assert 60 < max(map(len, lines)) <= 80
    if command == "models":
        assert {*model_config.catalogue()} <= {line.split(" ")[0] for line in lines}
    piped = run(command, *more, FORCE_COLOR="1", COLUMNS="40")
    assert "\x1b" not in piped.stdout
    _, *rows = piped.stdout.splitlines()
    if command == "check":
        (row,) = [row for row in rows if row.startswith("prompt.system ")]
        assert re.split(r"\s{2,}", row)[2] == "--set"
    else:
        assert len(rows) == len(model_config.catalogue())
        assert all(len(re.split(r"\s{2,}", row)) == 7 for row in rows)


def test_json_is_all_of_stdout(embedded_model: Path) -> None:
    assert json.loads(run("check", "--json").stdout)["model"] == MODEL


def test_check_says_where_each_value_is_from(embedded_model: Path) -> None:
    done = typed("check", "--set", "sampling.top_k=7")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: re.split(r"\s{2,}", line.strip()) for line in done.stdout.splitlines()}
    key, value, origin = rows["engine.max_model_len"]
    assert value == "2048"
    assert re.search(rf"model_configs/{MODEL}\.yaml:\d+", origin)
    assert rows["sampling.top_k"][1:] == ["7", "--set"]
    assert rows["files"][1] == str(embedded_model)
    assert done.stdout.startswith("key ") and done.stdout.endswith(f"{MODEL}: ok\n")


def test_check_ends_with_1_when_it_does_not_fit(embedded_model: Path) -> None:
    fits = run("check", "--memory", "24GiB", "--concurrent", "40", "--context", "1024")
    assert fits.returncode == 0, fits.stderr
    assert re.search(r"^memory: 24\.0 GiB: weights 0\.3, .* KV cache 1\.0 GiB", fits.stdout, re.M)
    asked = ("--memory", "24GiB", "--concurrent", "60", "--context", "1024")
    done = run("check", *asked, "--json")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    (problem,) = report["problems"]
    assert problem.startswith("does not fit: 60 x 1,024 tokens need 0.32 GiB more")
    lengths = [row["value"] for row in report["rows"] if row["key"] == "engine.max_model_len"]
    assert lengths == ["2048"]


def test_check_works_before_anything_is_downloaded(tmp_path: Path) -> None:
    done = run("check", "qwen2-7b-instruct", MODELSCOPE_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "not downloaded yet" in done.stdout


def test_check_refuses_what_vllm_refuses_for_this_model(embedded_model: Path) -> None:
    done = run("check", "--set", "engine.max_model_len=1000000")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: .*max_model_len.*\n", done.stderr.splitlines(True)[-1])
    assert "Traceback" not in done.stderr


@hardening(24)
def test_a_mistake_in_a_yaml_ends_the_start_with_2(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nsource: {path: .}\nsamplign: {}\n")
    done = run("serve", str(file))
    assert (done.returncode, done.stdout) == (2, "")
    mistake = (
        "samplign: unknown key; did you mean 'sampling'? (vLLM's arguments are keys of engine)"
    )
    assert done.stderr == f"error: {file}:3: {mistake}\n"


@hardening(24)
@pytest.mark.parametrize("command", ["check", "serve"])
def test_all_mistakes_of_a_yaml_are_told_in_its_order(tmp_path: Path, command: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "nmae: mine\n"
        "name: mine\n"
        "engine:\n"
        "  max-model-ln: 5\n"
        "  max_num_seqs: many\n"
        "  host: x\n"
        "sampling:\n"
        "  temprature: 1\n"
        "  top_k: 0512\n"
        "  top_p: 7\n"
        "  max_tokens: 5\n"
        "  max_tokens: 6\n"
        "source: {path: ., pth: x}\n"
    )
    done = run(command, str(file), "--set", "prompt.ecko=true")
    assert (done.returncode, done.stdout) == (2, "")
    told = [
        f"{file}:1: nmae: unknown key; did you mean 'name'? (vLLM's arguments are keys of engine)",
        f"{file}:4: engine.max_model_ln: vLLM has no such argument; did you mean 'max_model_len'?",
        f"{file}:5: engine.max_num_seqs: invalid int value: 'many'",
        f"{file}:6: engine.host: given by --host here",
        f"{file}:8: sampling.temprature: unknown key; did you mean 'temperature'?",
        f"{file}:9: YAML reads 0512 as 330; write that, or put it in quotes",
        f"{file}:10: sampling.top_p: input should be less than or equal to 1",
        f"{file}:12: sampling.max_tokens is given twice; it was first given on line 11",
        f"{file}:13: source.pth: unknown key; did you mean 'path'?",
        "--set prompt.ecko: unknown key; did you mean 'echo'?",
    ]
    asking, *lines = done.stderr.splitlines()
    assert asking.startswith("Asking vLLM")
    assert lines == [f"error: {mistake}" for mistake in told]
    file.write_text("name: mine\nsource: {path: .}\nengine: {dtipe: x,\n  max_num_seqs: many}\n")
    done = run(command, str(file))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-2:] == [
        f"error: {file}:3: engine.dtipe: vLLM has no such argument; did you mean 'dtype'?",
        f"error: {file}:4: engine.max_num_seqs: invalid int value: 'many'",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "smollm"], "error: no model named 'smollm'"),
        (["check", "--set", "engine.dtipe=x"], "did you mean 'dtype'?"),
        (["serve", "--set", "engine.api_server_count=two"], "api_server_count: invalid int value"),
        (["serve", "--port", "99999"], "error: --port: input should be less than or equal to"),
        (["serve", "--set", "engine.ssl_keyfile=k"], "ssl_keyfile: give engine.ssl_certfile too"),
        (["check", "--memory", "much"], "error: --memory 'much': expected a size, such as 24GiB"),
        (["check", "none.yaml"], "error: none.yaml: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line_on_stderr(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("key", ["0", "secret"])
def test_a_key_of_vllm_alone_is_refused(key: str) -> None:
    done = run("serve", VLLM_API_KEY=key)
    assert done.returncode == 2
    assert "set SERVICE_API_KEY, which guards both" in done.stderr
    assert key == "0" or key not in done.stderr


def test_a_full_disk_is_told_in_one_line() -> None:
    fails = "raise OSError(28, 'No space left on device', '/tmp/x')"
    code = f"import sys, tempfile; tempfile.mkdtemp = lambda *_: exec({fails!r}); "
    done = run(
        "-c", code + "from service.cli import main; main()", "serve", "--port", str(free_port())
    )
    assert done.returncode == 1
    assert done.stderr == "error: No space left on device: /tmp/x\n"


def test_a_port_in_use_is_told_at_once() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        done = run("serve", "--port", str(port))
    assert done.returncode == 1
    assert done.stderr == (
        f"error: cannot listen on 127.0.0.1 port {port}: Address already in use; stop the program "
        "that uses it, or choose another with SERVICE_PORT, --port, or `make serve PORT=...`\n"
    )


@pytest.mark.parametrize(
    ("module", "plugin"),
    [
        ("service.api.statistics", "chat_service_statistics"),
        ("service.models", "chat_service_models"),
    ],
)
def test_nothing_goes_on_without_the_plugins(module: str, plugin: str) -> None:
    # An entry in sys.modules that is None makes the import of that module fail.
    broken = f"import sys; sys.modules[{module!r}] = None; from service.cli import main; main()"
    done = run("-c", broken, "check")
    assert done.returncode == 1
    assert f"error: vLLM's plugin {plugin} fails to load" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cluster_without_ray_is_told_how_to_get_it(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(f"models: {{a: {{model: {MODEL}}}}}\n")
    broken = "import sys; sys.modules['ray'] = None; from service.cli import main; main()"
    # A process of its own: what `run` forks has imported Ray with vLLM.
    command = [sys.executable, "-c", broken, "cluster", str(file), "--check"]
    env = {**os.environ, "SERVICE_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert re.fullmatch(
        "error: a cluster needs Ray, which is not installed; .*pip install .*\n", done.stderr
    )


@pytest.mark.parametrize(
    ("accepts", "reason"), [(False, r"\[Errno 111\] Connection refused"), (True, "timed out")]
)
def test_a_cluster_that_cannot_be_reached_is_told_within_seconds(
    tmp_path: Path, accepts: bool, reason: str
) -> None:
    with socket.socket() as gone:
        gone.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{gone.getsockname()[1]}"
        if accepts:  # one connection alone: the packets of a second one are dropped
            gone.listen(0)
            kept = socket.create_connection(gone.getsockname())
        env = {"RAY_ADDRESS": where, "SERVICE_CACHE_DIR": str(tmp_path)}
        done = typed("cluster", "--status", **env)
        if accepts:
            kept.close()
    assert done.returncode == 1
    said = f"error: the Ray cluster at {where} does not answer: {reason}\n"
    assert re.fullmatch(said, done.stderr), done.stderr


def test_a_library_of_another_build_of_torch_is_told_with_its_remedy() -> None:
    fails = "raise RuntimeError('operator torchvision::nms does not exist')"
    code = (
        "import sys, types; module = types.ModuleType('service.models'); "
        f"module.register = lambda: exec({fails!r}); sys.modules['service.models'] = module; "
    )
    done = run("-c", code + "from service.cli import main; main()", "check")
    assert done.returncode == 1
    assert "`pip uninstall torchvision torchaudio torchcodec`" in done.stderr.splitlines()[-1]


def test_a_template_that_cannot_be_rendered_ends_the_start() -> None:
    eager = ("--set", "engine.enforce_eager=true")
    template = ("--set", "prompt.template='{{ messages | nope }}'")
    done = run("serve", *eager, *template, "--port", str(free_port()))
    assert done.returncode == 2
    assert "prompt.template cannot render one user turn" in done.stderr.splitlines()[-1]


def test_a_reader_that_ends_does_not_end_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        supervisor._announce("ready")
        supervisor._announce("ready")
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it where stdout is closed
    supervisor._announce("ready")
