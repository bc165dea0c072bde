"""`chat-service chat` and `chat-service top` on a running server."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from service import terminal
from testing.server import Server, free_port
from tests import warm


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
        assert list(terminal._data(response)) == ['{"delta": "\u2028é"}'.encode(), b"2"]


def test_top_shows_what_the_server_does(service: Server) -> None:
    done = warm.run("top", "--url", service.url, "--interval", "0.2", "--count", "2", "--json")
    assert done.returncode == 0, done.stderr
    first, _ = map(json.loads, done.stdout.splitlines())
    assert first["requests_per_second"] == 0 and first["kv_cache_usage"] == 0
    shown = warm.run("top", "--url", service.url, "--interval", "0.2", "--count", "1")
    assert "KV cache" in shown.stdout and "tokens out" in shown.stdout


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
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'<html>hi</html>\ndata: {"delta": "a piece"}\n\n')

        do_POST = do_GET

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for command in (("top",), ("chat", "hi"), ("chat",)):
            done = warm.run(*command, "--url", url, typed="hi\n")
            assert done.returncode == 1, command
            assert done.stderr.splitlines()[-1].startswith(f"error: {url}: "), done.stderr
        server.shutdown()
    for words in (
        ("chat", "hi", "--url", "http://[::1"),
        ("chat", "hi", "--url", service.url, "--key", "密钥"),
        ("chat", "hi", "--url", service.url, "--temperature", "nan"),
    ):
        done = warm.run(*words)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


def test_rates_and_quantiles_are_of_the_time_between_two_looks() -> None:
    def metrics(answered: int, failed: int, *counts: int) -> terminal.Metrics:
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

    figures = terminal.compare(metrics(10, 1, 100, 100, 100), metrics(30, 5, 100, 110, 120), 2)
    assert figures["requests_per_second"] == 12
    assert figures["errors_per_second"] == 2
    assert figures["ttft_p50"] == 0.2
    assert figures["ttft_p99"] == 0.2  # as far as the buckets tell
    assert figures["generation_tokens_per_second"] == 0
    restarted = terminal.compare(metrics(10, 1, 100, 100, 100), metrics(4, 0, 1, 2, 2), 2)
    assert restarted["requests_per_second"] == 2 and restarted["errors_per_second"] == 0
    assert restarted["ttft_p99"] == 0.198
