"""`chat-service chat` and `chat-service top` on a running server."""

import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from service.cluster import exposition
from service.errors import ConfigError, ServiceError
from service.terminal import chat as conversation
from service.terminal import remote, top, usage
from service.terminal.remote import Metrics
from testing.server import Server, free_port
from tests import terminal, warm
from tests.conftest import LOOPBACK, MODEL, PATIENCE


def test_one_question_is_answered_on_stdout(service: Server) -> None:
    ask = ("chat", "What is the capital of France?", "--url", service.url, "--temperature", "0")
    done = warm.run(*ask)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Paris" in done.stdout
    answer = json.loads(warm.run(*ask, "--json").stdout)
    assert answer["response"] == done.stdout.removesuffix("\n")
    assert answer["details"]["finish_reason"] == "stop"


def test_a_conversation_remembers_and_outlives_a_refusal(service: Server) -> None:
    typed = "What is the capital of France?\n\nAnd of Italy?\n"
    done = warm.run("chat", "--url", service.url, "--temperature", "0", "--json", typed=typed)
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert second["history"][0] == ["What is the capital of France?", first["response"]]
    assert "Rome" in second["response"]
    refused = warm.run("chat", "hi", "--url", service.url, "--temperature", "9")
    assert refused.returncode == 1 and refused.stdout == ""
    assert refused.stderr.startswith("error: 422: temperature should be less than or equal to 2")


def chat(server: Server, *options: str) -> list[str]:
    """The words of a conversation, as they are typed."""
    return [sys.executable, "-m", "service", "chat", "--url", server.url, *options]


def test_a_conversation_has_commands(service: Server, tmp_path: Path) -> None:
    file = tmp_path / "talk 1.json"
    system = {"role": "system", "content": "Answer in one word."}
    lines = (
        "What is the capital of France?",
        "/system Answer in one word.",
        "And of Italy?",
        "/regenerate",
        f"/model {MODEL}",
        "//etc is what?",
        f"/save {file}",
        f"/save {file}",  # one's own file is written over
        "/system",
        "Thanks.",
        "/help",
    )
    options = ("--temperature", "0", "--max-new-tokens", "8", "--json", "--url", service.url)
    done = warm.run("chat", *options, typed="\n".join(lines))
    assert done.returncode == 0, done.stderr
    first, second, again, literal, last = map(json.loads, done.stdout.splitlines())
    assert first["history"] == [["What is the capital of France?", first["response"]]]
    assert second["history"][0] == system
    assert [turn["content"] for turn in second["history"][1:4]] == [
        *first["history"][0],
        "And of Italy?",
    ]
    assert again["history"] == second["history"]
    assert literal["history"][-2] == {"role": "user", "content": "/etc is what?"}
    assert literal["details"]["model"] == MODEL
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert saved == {"model": MODEL, "history": literal["history"]}
    assert last["history"][: len(literal["history"]) - 1] == literal["history"][1:]
    for command in ("/help", "/model NAME", "/regenerate", "/save FILE", "/system TEXT"):
        assert command in done.stderr
    # The file's keys are those of POST /.
    body = {**saved, "prompt": "And of Spain?", "max_new_tokens": 1}
    assert LOOPBACK.post(service.url, json=body).status_code == 200


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        ("/regenerat", 2, "there is no such command; did you mean '/regenerate'?"),
        ("/quit", 2, "there are /help, /model NAME, /regenerate, /save FILE, /system TEXT;"),
        ("/regenerate", 2, "/regenerate: there is no question yet"),
        ("/save x.json", 2, "/save FILE: there is no conversation yet"),
        ("hi\n/save", 2, "/save FILE: the name of the file is missing"),
        ("hi\n/save /etc/passwd", 2, "/save FILE: there is such a file; choose another name"),
        ("hi\n/save /none/x", 1, "/save FILE: it cannot be written: No such file or directory"),
        ("/model gpt", 2, f"/model NAME: no model has this name; there are {MODEL}"),
        ("/model", 2, f"/model NAME: the name is missing; there are {MODEL}"),
    ],
)
def test_a_mistake_in_a_command_is_told(
    service: Server, line: str, status: int, message: str
) -> None:
    done = warm.run("chat", "--url", service.url, "--max-new-tokens", "1", typed=f"{line}\n")
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    ("env", "encoding"),
    [
        ({"LC_ALL": "C"}, "utf-8"),
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, "utf-8"),
        ({"LANG": "C", "PYTHONIOENCODING": "ascii"}, "utf-8"),
        ({"PYTHONIOENCODING": "utf-8"}, "utf-8"),
        ({"PYTHONIOENCODING": "gbk"}, "gbk"),
    ],
)
def test_any_encoding_and_a_broken_byte_are_survived(
    service: Server, tmp_path: Path, env: dict[str, str], encoding: str
) -> None:
    typed = "\u4f60\u597d".encode(encoding) + b"\xff?\n"
    command = chat(service, "--max-new-tokens", "1", "--json")
    env = {**os.environ, **env}
    done = subprocess.run(command, input=typed, capture_output=True, env=env, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, b"")
    (turn,) = json.loads(done.stdout)["history"]
    assert turn[0] == "\u4f60\u597d\ufffd?"
    # As an argument, and on stdout.
    asked = [*map(os.fsencode, command), b"\xe4\xbd\xa0\xff"]
    done = subprocess.run(asked, capture_output=True, env=env, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["history"][0][0] == "\u4f60\ufffd"
    # At a terminal, where readline takes what is typed, in the locale's encoding.
    if encoding == "utf-8":
        keys = ["\u4f60\u597d\r".encode(), b"\x04"]
        options = ("--url", service.url, "--max-new-tokens", "1", "--json")
        status, text = terminal.run("chat", *options, env=env, typed=keys, prompt=b"> ")
        assert status == 0, text
        (line,) = re.findall(r'\{"response".*\}', text)
        assert json.loads(line)["history"][0][0] == "\u4f60\u597d"
    folder = tmp_path / "\u4f60\U0001f600"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    file = tmp_path / "mine.yaml"
    file.write_text(f"name: mine\nsource: {{path: '{folder}'}}\n", encoding="utf-8")
    command = [sys.executable, "-m", "service", "download", str(file)]
    done = subprocess.run(command, capture_output=True, env=env, timeout=PATIENCE)
    assert b"Traceback" not in done.stderr and str(tmp_path).encode() in done.stdout + done.stderr


def test_a_pipe_that_closes_ends_an_answer_without_a_word(service: Server) -> None:
    options = ("Count to a thousand.", "--max-new-tokens", "400")
    with subprocess.Popen(
        chat(service, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(PATIENCE) == 1
        assert process.stderr.read() == b""


def test_a_mistake_and_ctrl_c_at_a_terminal_do_not_end_the_conversation() -> None:
    typed = [b"/hlep\r", b"\xff\x03", b"/helX\x1b[D\x1b[3~p\r", b"\x04"]  # left, delete
    with page(b'{"style": "chat"}') as url:
        status, text = terminal.run("chat", "--url", url, typed=typed, prompt=b"> ")
    assert status == 0, text
    assert "error: there is no such command; did you mean '/help'?" in text
    assert "writes the conversation as JSON" in text and "Traceback" not in text


def test_ctrl_c_ends_a_conversation_that_is_piped() -> None:
    with page(b'{"style": "chat"}') as url:
        command = [*terminal.INTERRUPTED, sys.executable, "-m", "service", "chat", "--url", url]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdin and process.stderr
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(5)
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE) == 130
            assert b"Traceback" not in process.stderr.read()


def test_where_stderr_is_closed_no_message_comes_on_stdout() -> None:
    with page(b'{"style": "chat"}') as url:
        command = shlex.join([sys.executable, "-m", "service", "chat", "--url", url])
        shell = ["bash", "-c", f"{command} 2>&-"]
        done = subprocess.run(shell, input=b"/help\n/nothing\n", stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (2, b"")


def test_a_conversation_that_cannot_be_saved_is_told_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = conversation._Conversation(remote.Remote("x", None), {}, False)
    talk.history = [["What?", "word " * 1000]]
    with pytest.raises(ConfigError, match="/save FILE: "):
        talk._save("~nobody-of-this-name/x")
    file = tmp_path / "talk.json"

    def save_on_a_full_disk() -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(ServiceError, match="/save FILE: it cannot be written: "):
                talk._save(str(file))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    save_on_a_full_disk()
    assert list(tmp_path.iterdir()) == []
    talk._save(str(file))
    saved = file.read_text()
    assert json.loads(saved)["history"][0]["content"] == "What?"
    talk.history *= 2
    save_on_a_full_disk()
    assert list(tmp_path.iterdir()) == [file] and file.read_text() == saved
    talk._save(str(file))
    assert list(tmp_path.iterdir()) == [file]
    assert len(json.loads(file.read_text())["history"]) == 4
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ServiceError, match="/save FILE: it cannot be written: "):
        talk._save("talk.json")


@pytest.mark.parametrize("character", "\u2028\u2029\x85\v\f\x1c\x1d\x1e")
def test_what_python_takes_for_the_end_of_a_line_ends_no_event(
    service: Server, character: str
) -> None:
    """The question comes back in the history, as each of these may come in an answer."""
    words = ("chat", f"a{character}b", "--url", service.url, "--max-new-tokens", "2", "--json")
    done = warm.run(*words)
    assert done.returncode == 0, done.stderr
    (turn,) = json.loads(done.stdout)["history"]
    assert turn[0] == f"a{character}b"


def test_an_event_is_whole_wherever_the_stream_is_cut() -> None:
    stream = 'event: x\r\ndata: {"delta": "\u2028é"}\r\rdata: 2\n\n: comment\n'.encode()
    for size in range(1, len(stream)):
        pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
        response = httpx.Response(200, content=iter(pieces))
        assert list(remote._data(response)) == ['{"delta": "\u2028é"}'.encode(), b"2"]


def test_top_shows_what_the_server_does(service: Server) -> None:
    done = warm.run("top", "--url", service.url, "--interval", "0.2", "--count", "2", "--json")
    assert done.returncode == 0, done.stderr
    first, _ = map(json.loads, done.stdout.splitlines())
    assert first["requests_per_second"] == 0 and first["kv_cache_usage"] == 0
    shown = warm.run("top", "--url", service.url, "--interval", "0.2", "--count", "1")
    assert "KV cache" in shown.stdout and "tokens out" in shown.stdout


@contextmanager
def page(text: bytes) -> Iterator[str]:
    """The URL of a server that answers everything with this."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text)

        do_POST = do_GET

    with serving(Page) as url:
        yield url


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The URL of a server on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_top_shows_each_model_each_client_and_each_replica(service: Server) -> None:
    LOOPBACK.post(service.url, json={"prompt": "hi", "max_new_tokens": 1})
    words = ("top", "--interval", "0.2", "--count", "1", "--url")
    figures = json.loads(warm.run(*words, service.url, "--json").stdout)
    (model,) = figures["models"]
    assert (model["model"], model["running"], model["waiting"]) == (MODEL, 0, 0)
    assert "anonymous" in [client["client"] for client in figures["clients"]]
    assert figures["replicas"] == []
    text = LOOPBACK.get(f"{service.url}/metrics").text
    replicas = [("a", "one"), ("a", "two"), ("b", "three")]  # as the front of a cluster joins them
    joined = exposition.joined(
        [
            ({"model": name, "replica": replica}, text.replace(MODEL, name))
            for name, replica in replicas
        ]
    )
    with page(joined) as url:
        figures = json.loads(warm.run(*words, url, "--json").stdout)
        assert [model["model"] for model in figures["models"]] == ["a", "b"]
        shown = [(replica["model"], replica["replica"]) for replica in figures["replicas"]]
        assert shown == [("a", "one"), ("a", "two"), ("b", "three")]
        lines = warm.run(*words, url).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    heads = [line.split()[:2] for line in lines if "req/s" in line]
    assert heads == [["model", "req/s"], ["model", "replica"], ["client", "req/s"]]
    assert ["b", "three"] in [line.split()[:2] for line in lines]


def test_the_server_is_where_the_environment_says_that_it_listens(service: Server) -> None:
    port = service.url.rpartition(":")[2]
    words = ("top", "--interval", "0.2", "--count", "1")
    assert warm.run(*words, env={"SERVICE_PORT": port}).stdout.startswith(service.url)
    assert warm.run(*words, "--url", f"127.0.0.1:{port}").stdout.startswith(service.url)


def test_a_server_that_is_not_there_is_told_in_one_line() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    for command in (("top",), ("chat", "hi")):
        done = warm.run(*command, "--url", url)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"error: {url}: ") and done.stderr.count("\n") == 1


def test_a_server_of_another_kind_and_what_cannot_be_sent_are_told_in_one_line(
    service: Server,
) -> None:
    with page(b'<html>hi</html>\ndata: {"delta": "a piece"}\n\n') as url:
        for command in (("top",), ("chat", "hi"), ("chat",)):
            done = warm.run(*command, "--url", url, typed="hi\n")
            assert done.returncode == 1, command
            assert done.stderr.splitlines()[-1].startswith(f"error: {url}: "), done.stderr
    for words in (
        ("chat", "hi", "--url", "http://[::1"),
        *((command, "--url", "http://a..b") for command in ("chat", "top", "usage")),
        ("usage", "--prometheus", "http://a..b"),
        ("chat", "hi", "--url", service.url, "--temperature", "nan"),
    ):
        done = warm.run(*words)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("command", ["chat", "top", "usage"])
def test_a_key_is_sent_without_the_blanks_around_it_and_never_shown(command: str) -> None:
    keys: list[str] = []

    class Locked(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(self.headers["Authorization"])
            self.send_response(401)
            self.end_headers()

    with serving(Locked) as url:
        done = warm.run(command, "--url", url, env={"SERVICE_API_KEY": " secret \r\n"})
        assert keys == ["Bearer secret"]
        assert done.stderr == "error: 401: Unauthorized (--key, or SERVICE_API_KEY)\n"
        warm.run(command, "--url", url, "--key", "密钥")
        assert keys[-1].encode("latin-1").decode() == "Bearer 密钥"
        done = warm.run(command, "--url", url, "--key", "sec\rret")
        assert done.returncode == 2 and "ret" not in done.stderr
        assert done.stderr.startswith("error: the API key has a character that no header may")


def test_rates_and_quantiles_are_of_the_time_between_two_looks() -> None:
    def metrics(answered: int, failed: int, *counts: int) -> Metrics:
        name = "vllm:time_to_first_token_seconds_bucket"
        return {
            "service_requests_total": {
                (("route", "/"), ("status", "200")): answered,
                (("route", "/"), ("status", "503")): failed,
            },
            name: {
                (("le", bound),): count
                for bound, count in zip(("0.1", "0.2", "+Inf"), counts, strict=True)
            },
        }

    figures = top.compare(metrics(10, 1, 100, 100, 100), metrics(30, 5, 100, 110, 120), 2)
    assert figures["requests_per_second"] == 12
    assert figures["errors_per_second"] == 2
    assert figures["ttft_p50"] == 0.2
    assert figures["ttft_p99"] == 0.2  # as far as the buckets tell
    assert figures["generation_tokens_per_second"] == 0
    restarted = top.compare(metrics(10, 1, 100, 100, 100), metrics(4, 0, 1, 2, 2), 2)
    assert restarted["requests_per_second"] == 2 and restarted["errors_per_second"] == 0
    assert restarted["ttft_p99"] == 0.198


def test_figures_of_a_part_are_of_its_series_alone() -> None:
    def cluster(scale: int) -> Metrics:
        def tokens(client: str, model: str, replica: str, kind: str) -> tuple[tuple[str, str], ...]:
            labels = {"client": client, "kind": kind, "model": model, "replica": replica}
            return tuple(labels.items())

        def engine(model: str, replica: str) -> tuple[tuple[str, str], ...]:
            return (("model", model), ("model_name", model), ("replica", replica))

        return {
            "service_tokens_total": {
                tokens("anna", "a", "one", "generation"): 10 * scale,
                tokens("anna", "a", "two", "generation"): 20 * scale,
                tokens("anna", "tuned", "two", "prompt"): 5 * scale,
                tokens("ben", "b", "three", "generation"): 50 * scale,
            },
            "vllm:num_requests_running": {
                engine("a", "one"): 1,
                engine("a", "two"): 2,
                engine("b", "three"): 4,
            },
            "vllm:kv_cache_usage_perc": {
                engine("a", "one"): 0.25,
                engine("a", "two"): 0.75,
                engine("b", "three"): 0.5,
            },
        }

    figures = top.compare(cluster(1), cluster(2), 10)
    assert figures["running"] == 7 and figures["kv_cache_usage"] == 0.5
    rates = {
        (part, row[name]): row["generation_tokens_per_second"]
        for part, name in (("models", "model"), ("replicas", "replica"), ("clients", "client"))
        for row in figures[part]
    }
    assert rates == {
        ("models", "a"): 3,
        ("models", "b"): 5,
        ("models", "tuned"): 0,
        ("replicas", "one"): 1,
        ("replicas", "two"): 2,
        ("replicas", "three"): 5,
        ("clients", "ben"): 5,  # the busiest first
        ("clients", "anna"): 3,
    }
    a, _, tuned = figures["models"]
    assert (a["running"], a["kv_cache_usage"]) == (3, 0.5)
    assert (tuned["running"], tuned["prompt_tokens_per_second"]) == (None, 0.5)


@pytest.mark.parametrize("password", ["sec", "sec@ret", "sec/ret"])
def test_no_message_shows_the_password_of_a_url(password: str) -> None:
    url = f"http://anna:{password}@127.0.0.1:1"
    for ask in (
        lambda: remote.Remote(url, None).models(),
        lambda: usage.of_prometheus(url, "1h"),
    ):
        with pytest.raises(ServiceError) as error:
            ask()
        assert str(error.value).startswith("http://127.0.0.1:1: ")
        assert "sec" not in str(error.value)
