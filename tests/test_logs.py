"""What the server says, at the start and for each request."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest

from service.launch.log_config import ToSupervisor, log_our_own
from service.launch.run_folder import RunFolder
from service.phase import Phase
from testing.server import Server
from tests.conftest import MODEL, hardening, logged


@hardening(25)
def test_a_request_is_one_line_without_its_prompt(service: Server, http: httpx.Client) -> None:
    answer = http.post(
        "/", json={"prompt": "xyzzy", "max_new_tokens": 2}, headers={"X-Request-Id": "my-id.1"}
    )
    assert answer.headers["x-request-id"] == "my-id.1"
    assert logged(service, "id=my-id.1")
    log = service.log.read_text()
    assert re.search(
        r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO request id=my-id.1 method=POST route=/ status=200 "
        rf"prompt_tokens=\d+ generation_tokens=2 finish_reason=length model={MODEL} "
        r"duration=0\.\d+ "
        r"layer=0\.\d+$",
        log,
        re.M,
    )
    assert log.count("my-id.1") == 1
    assert "xyzzy" not in log


def test_a_refusal_says_why(service: Server, http: httpx.Client) -> None:
    http.post("/", json={"prompt": 1}, headers={"X-Request-Id": "refused"})
    assert logged(service, "id=refused method=POST route=/ status=422 error=invalid_request")


def test_vllms_routes_have_the_same_line(service: Server) -> None:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none") as client:
        for stream in (False, True):
            answer = client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "hi"}],
                max_tokens=3,
                stream=stream,
                extra_headers={"X-Request-Id": f"vllm-{stream}"},
            )
            assert not stream or len(list(answer)) > 2
    for stream in (False, True):
        assert logged(
            service,
            f"id=vllm-{stream} method=POST route=/v1/chat/completions status=200 "
            f"prompt_tokens=10 generation_tokens=3 model={MODEL} duration=",
        )


def test_a_hostile_request_id_is_replaced(service: Server, http: httpx.Client) -> None:
    answer = http.get("/health", headers={"X-Request-Id": "a b\tforged"})
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])
    http.get("/nowhere", headers={"X-Request-Id": "after"})
    assert logged(service, "id=after")
    assert "forged" not in service.log.read_text()


def test_probes_are_not_logged(service: Server, http: httpx.Client) -> None:
    for probe in ("/health", "/health/ready", "/metrics"):
        http.get(probe, headers={"X-Request-Id": "probe"})
    http.get("/nowhere", headers={"X-Request-Id": "after-probes"})
    assert logged(service, "id=after-probes")
    assert "id=probe" not in service.log.read_text()


def test_a_server_that_is_ready_stays_so_whatever_vllm_loads_or_compiles(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    report = ToSupervisor(str(tmp_path))

    def log(message: str) -> None:
        report.filter(logging.LogRecord("vllm", logging.INFO, "", 0, message, (), None))

    log("Loading weights took 1.00 seconds")
    assert folder.phase()[0] is Phase.WARMING
    folder.set_phase(Phase.READY)
    log("Loading weights took 1.00 seconds")
    log("Dynamo bytecode transform time: 2.00 s")
    assert folder.phase()[0] is Phase.READY


@hardening(25)
def test_no_message_of_a_library_is_more_than_a_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = f"""
import logging.config
from pathlib import Path
from service.launch import log_config
from service.launch.run_folder import RunFolder
folder = RunFolder(Path({str(tmp_path)!r}))
logging.config.dictConfig(log_config.configuration(folder, verbose=False))
logging.getLogger("any").warning("a %s", "b\\n2026-11-21 12:09:29 INFO \\x1b[1m")
try:
    raise ValueError("secret")
except ValueError:
    logging.getLogger("vllm.tool_parsers.any").exception("it fails: %s", "secret")
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    line, failed, *where = capfd.readouterr().err.splitlines()
    assert line.endswith(" WARNING a b 2026-11-21 12:09:29 INFO  [1m")
    assert failed.endswith("ValueError") and where and "secret" not in " ".join(where)


def test_the_start_is_phases_and_then_how_to_call_it(service: Server) -> None:
    assert logged(service, "OpenAI clients: ")  # a request may be answered before
    start, last, _ = service.log.read_text().partition("OpenAI clients: base_url ")
    # A processor without bfloat16 says so.
    other = re.compile(r"Computing in|.* INFO request |$")
    lines = [line for line in (start + last).split("\n") if not other.match(line)]
    said = [
        r"Starting smollm2-135m-instruct",
        r".* INFO Loading the weights \.\.\.",
        r".* INFO Weights loaded in [\d.]+ s",
        r".* INFO KV cache: room for [\d,]+ tokens",
        r".* INFO Engine ready in [\d.]+ s",
        rf"Ready: {MODEL} answers at {service.url}\. Try:",
        rf"curl -X POST {service.url} \\",
        r"  -d '\{\"prompt\": \"What is the capital of France\?\"\}'",
        r"OpenAI clients: base_url ",
    ]
    assert len(lines) == len(said), start
    for line, pattern in zip(lines, said, strict=True):
        assert re.match(pattern, line), line


def test_a_process_without_an_engine_logs_its_requests_too(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("service")
    for name in ("handlers", "propagate", "level"):  # which are as before afterwards
        monkeypatch.setattr(logger, name, getattr(logger, name))
    log_our_own(verbose=False)
    logger.debug("hidden")
    logger.info("request id=a")
    line = capfd.readouterr().err
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO request id=a\n", line)
