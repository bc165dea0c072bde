"""Who used what: the metrics by client on every generating route, whatever becomes of a request."""

import asyncio
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.terminal import usage
from service.terminal.remote import Remote
from testing.server import Server, free_port
from tests import warm
from tests.conftest import LOOPBACK, MODEL, PATIENCE, hardening
from tests.prometheus import running
from tests.test_overload import client_of

KEYS = {name: f"key-of-{name}" for name in ("alice", "bob", "carol", "dora")}
LIMITS = {"carol": "requests=1/min", "dora": "tokens=20/min"}
ASK = "Count from one to a thousand."
TURNS = [{"role": "user", "content": ASK}]
PLAIN = {"model": MODEL, "temperature": 0}
# Route -> a body for an answer of 6 tokens.
BODIES: dict[str, dict[str, Any]] = {
    "/": {**PLAIN, "prompt": ASK, "max_new_tokens": 6, "details": True},
    "/v1/chat/completions": {**PLAIN, "messages": TURNS, "max_tokens": 6},
    "/v1/completions": {**PLAIN, "prompt": ASK, "max_tokens": 6},
    "/v1/responses": {**PLAIN, "input": ASK, "max_output_tokens": 6},
    "/v1/messages": {**PLAIN, "messages": TURNS, "max_tokens": 6},
}
NAMES = (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens"))


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("".join(f"{name} {key} {LIMITS.get(name, '')}\n" for name, key in KEYS.items()))
    return file


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, keys_file: Path) -> Iterator[Server]:
    settings = {"API_KEY_FILE": str(keys_file), "METRICS_KEY": "false", "MAX_WAITING": "0"}
    env = {f"SERVICE_{name}": value for name, value in settings.items()}
    sets = ("--set", "engine.enforce_eager=true", "--set", "engine.max_num_seqs=4")
    alias = ("--set", "aliases=['other-name']")
    log = tmp_path_factory.mktemp("usage") / "log"
    with warm.Server.service(log, *sets, *alias, env=env) as server:
        yield server


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[name]}"}


def post(server: Server, route: str, body: Any, name: str, **headers: str) -> httpx.Response:
    return LOOPBACK.post(f"{server.url}{route}", json=body, headers={**bearer(name), **headers})


def counted(server: Server, name: str, **labels: str) -> float:
    """The sum of a counter's series with these labels."""
    samples = Remote(server.url, None).metrics().get(name, {})
    return sum(value for key, value in samples.items() if labels.items() <= dict(key).items())


class Usage:
    """What a client has used since this object was made."""

    def __init__(self, server: Server, client: str) -> None:
        self.server = server
        self.client = client
        self._before = self._now()

    def _now(self) -> dict[tuple[str, ...], float]:
        samples = Remote(self.server.url, None).metrics()
        now: dict[tuple[str, ...], float] = {}
        for name, label in (("client_requests", "status"), ("tokens", "kind")):
            for key, value in samples[f"service_{name}_total"].items():
                labels = dict(key)
                if labels["client"] == self.client:
                    now[labels["model"], labels[label]] = value
        return now

    def __call__(self, requests: int = 1) -> dict[tuple[str, ...], float]:
        """By model and status or kind. A request is counted a moment after its answer."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            now = self._now()
            grown = {key: value - self._before.get(key, 0) for key, value in now.items()}
            if sum(v for (_, label), v in grown.items() if label.isdecimal()) >= requests:
                return {key: value for key, value in grown.items() if value}
            time.sleep(0.05)
        raise AssertionError(grown)


def told(answer: Any) -> list[int]:
    """The prompt's and the answer's tokens, as an answer tells them."""
    usage = answer.get("usage") or answer["details"]
    return [next(usage[name] for name in names if name in usage) for names in NAMES]


@pytest.mark.parametrize("route", BODIES)
def test_every_route_counts_its_tokens_streamed_or_not(server: Server, route: str) -> None:
    used = Usage(server, "alice")
    answer = post(server, route, BODIES[route], "alice")
    prompt, generation = told(answer.json())
    assert prompt > 6 and generation == 6
    once = {(MODEL, "200"): 1, (MODEL, "prompt"): prompt, (MODEL, "generation"): generation}
    assert used() == once
    used = Usage(server, "alice")  # without include_usage
    streamed = post(server, route, {**BODIES[route], "stream": True}, "alice")
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert used() == once


@pytest.mark.parametrize(
    "more",
    [
        {"n": 2, "temperature": 1},
        {"prompt": [ASK, "Paris is"]},
        {"n": 2, "use_beam_search": True},
    ],
)
def test_prompts_and_sequences_are_counted_as_the_answer_tells_them(
    server: Server, more: dict[str, Any]
) -> None:
    used = Usage(server, "bob")
    answer = post(server, "/v1/completions", {**BODIES["/v1/completions"], **more}, "bob")
    prompt, generation = told(answer.json())
    assert generation == 12
    assert used() == {(MODEL, "200"): 1, (MODEL, "prompt"): prompt, (MODEL, "generation"): 12}


@pytest.mark.parametrize("route", ["/", "/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize("stream", [False, True])
def test_what_was_made_for_who_left_or_was_late_is_counted(
    server: Server, route: str, stream: bool
) -> None:
    more = {"temperature": 1.9, "stream": stream}
    body = {**BODIES[route], **more}
    for key in ("max_new_tokens", "max_tokens", "max_output_tokens"):
        body |= {key: 1500} if key in body else {}
    used = Usage(server, "bob")
    before = counted(server, "vllm:generation_tokens_total")

    def wait_for_a_token() -> None:
        while counted(server, "vllm:generation_tokens_total") == before:
            time.sleep(0.05)

    async def leave() -> None:
        async with client_of(server, headers=bearer("bob")) as client:
            asked = asyncio.create_task(client.post(route, json=body))
            await asyncio.to_thread(wait_for_a_token)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)

    asyncio.run(leave())
    assert used()[MODEL, "499"] == 1
    late = post(server, route, body, "bob", **{"X-Request-Timeout": "1"})
    assert late.status_code == (200 if stream else 504)
    found = used(2)
    assert found[MODEL, "504"] == 1
    assert found[MODEL, "prompt"] > 12
    # As much as the engine has counted, for all of its clients.
    made = counted(server, "vllm:generation_tokens_total") - before
    assert found[MODEL, "generation"] == made > 0


def test_refusals_are_counted_and_nothing_of_a_clients_own_words(server: Server) -> None:
    used = Usage(server, "alice")

    async def crowd() -> list[int]:
        async with client_of(server, headers=bearer("alice")) as client:
            body = {**BODIES["/v1/completions"], "n": 4, "temperature": 1, "max_tokens": 200}
            asked = (client.post("/v1/completions", json=body) for _ in range(3))
            return sorted(answer.status_code for answer in await asyncio.gather(*asked))

    assert asyncio.run(crowd()) == [200, 429, 429]
    for route in BODIES:
        assert post(server, route, {**BODIES[route], "model": "secret"}, "alice").status_code == 404
        body = {**BODIES[route], "model": "other-name"}
        assert post(server, route, body, "alice").status_code == 200
    assert post(server, "/", {"prompt": 1}, "alice").status_code == 422
    assert LOOPBACK.post(server.url, json={"prompt": "hi"}).status_code == 401
    LOOPBACK.get(f"{server.url}/v1/models", headers=bearer("alice"))
    found = used(14)
    statuses = {key: value for key, value in found.items() if key[1].isdecimal()}
    assert statuses == {
        (MODEL, "200"): 6,
        (MODEL, "429"): 2,
        ("", "404"): 5,
        ("", "422"): 1,
    }
    metrics = LOOPBACK.get(f"{server.url}/metrics").text
    assert "secret" not in metrics and "other-name" not in metrics
    nobody = 'service_client_requests_total{client="anonymous",model="",status="401"} 1.0'
    assert nobody in metrics


def test_a_client_is_shown_from_the_start(server: Server, keys_file: Path) -> None:
    """Prometheus sees no increase in a series that begins above 0."""
    shown = {"client": "erin", "model": MODEL}
    keys_file.write_text(keys_file.read_text() + "erin key-of-erin\n")
    series = (
        ("service_tokens_total", {**shown, "kind": "prompt"}),
        ("service_tokens_total", {**shown, "kind": "generation"}),
        ("service_client_requests_total", {**shown, "status": "200"}),
    )
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        samples = Remote(server.url, None).metrics()
        if all(samples[name].get(tuple(sorted(labels.items()))) == 0 for name, labels in series):
            return
        time.sleep(0.2)
    raise AssertionError(json.dumps(shown))


@hardening(22)
def test_a_key_has_so_many_requests_a_minute_on_all_routes_together(server: Server) -> None:
    used = Usage(server, "carol")
    refusals = counted(server, "service_refused_requests_total", reason="rate_limited")
    assert post(server, "/", BODIES["/"], "carol").status_code == 200
    answers = {route: post(server, route, BODIES[route], "carol") for route in BODIES}
    message = "this key's limit requests=1/min is used up"
    for route, answer in answers.items():
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        error = answer.json()["error"]
        kind = "rate_limit_error" if route == "/v1/messages" else "rate_limited"
        assert error["type"] == kind and error["message"].startswith(message)
    assert answers["/"].json()["response"] == ""
    refusals = counted(server, "service_refused_requests_total", reason="rate_limited") - refusals
    found = used(6)
    assert refusals == found["", "429"] == 5 and found[MODEL, "200"] == 1
    # What generates nothing is free, and the others are not concerned.
    headers = bearer("carol")
    assert LOOPBACK.get(f"{server.url}/v1/models", headers=headers).status_code == 200
    answer = LOOPBACK.post(f"{server.url}/tokenize", json={"prompt": "hi"}, headers=headers)
    assert answer.status_code == 200
    assert post(server, "/", BODIES["/"], "alice").status_code == 200


@hardening(22)
def test_a_key_has_so_many_tokens_a_minute_and_a_changed_file_gives_more(
    server: Server, keys_file: Path
) -> None:
    used = Usage(server, "dora")
    stream = {**BODIES["/v1/chat/completions"], "stream": True, "max_tokens": 100}
    stream |= {"ignore_eos": True}
    assert post(server, "/v1/chat/completions", stream, "dora").status_code == 200
    found = used()
    spent = found[MODEL, "prompt"] + found[MODEL, "generation"]
    refused = post(server, "/", BODIES["/"], "dora")
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limited")
    assert refused.json()["error"]["message"].startswith(
        "this key's limit tokens=20/min is used up"
    )
    seconds = int(refused.headers["retry-after"])
    assert 0 <= (spent - 20 + 1) * 3 - seconds <= 5  # a token in 3 seconds
    keys_file.write_text(keys_file.read_text().replace("tokens=20/min", "tokens=1200/min"))
    deadline = time.monotonic() + 10
    while int(refused.headers["retry-after"]) > seconds / 30:
        assert time.monotonic() < deadline
        time.sleep(0.2)
        # It is not filled up by the change, it only fills faster.
        refused = post(server, "/", BODIES["/"], "dora")
        assert refused.status_code == 429
    time.sleep(int(refused.headers["retry-after"]))
    assert post(server, "/", BODIES["/"], "dora").status_code == 200


def test_the_table_is_of_the_servers_metrics(server: Server) -> None:
    post(server, "/", BODIES["/"], "alice")
    post(server, "/", BODIES["/"], "carol")  # refused, or not
    done = warm.run("usage", "--url", server.url, "--json")
    assert done.returncode == 0, done.stderr
    rows = {(row["client"], row["model"]): row for row in json.loads(done.stdout)}
    alice = rows["alice", MODEL]
    mine = {"client": "alice", "model": MODEL}
    assert alice["requests"] == counted(server, "service_client_requests_total", **mine)
    for kind in ("prompt", "generation"):
        assert alice[f"{kind}_tokens"] == counted(server, "service_tokens_total", **mine, kind=kind)
    refused = rows["carol", ""]
    assert refused["refused"] == refused["requests"] >= 5 and refused["prompt_tokens"] == 0
    assert all(row["client"] != "erin" for row in rows.values())  # has asked nothing
    head, *lines = warm.run("usage", "--url", server.url).stdout.splitlines()
    columns = ["client", "model", "requests", "refused", "prompt tokens", "generation tokens"]
    assert re.split(r"\s{2,}", head.strip()) == columns
    assert [str(value) for value in alice.values()] in [line.split() for line in lines]
    assert any(line.split()[:2] == ["carol", "-"] for line in lines)


def test_the_table_of_a_prometheus_is_of_a_time_and_all_servers(
    server: Server, tmp_path: Path
) -> None:
    address = server.url.removeprefix("http://")
    # One server, scraped as if it were two.
    targets = [{"targets": [address], "labels": {"replica": name}} for name in ("a", "b")]
    job = {"job_name": "service", "static_configs": targets}
    document = {"global": {"scrape_interval": "1s"}, "scrape_configs": [job]}
    with running(document, tmp_path) as url:

        def asked(since: str = "1h") -> Any:
            done = warm.run("usage", "--prometheus", url, "--since", since, "--json")
            rows = json.loads(done.stdout) if done.returncode == 0 else []
            return done, {(row["client"], row["model"]): row for row in rows}

        deadline = time.monotonic() + PATIENCE
        while asked()[0].returncode:  # until it has two scrapes
            assert time.monotonic() < deadline
        used = Usage(server, "alice")
        for _ in range(5):
            post(server, "/", BODIES["/"], "alice")
        counts = {
            "requests": 5,
            "prompt_tokens": used(5)[MODEL, "prompt"],
            "generation_tokens": 30,
        }
        row: dict[str, int] = {}
        # Until both have scraped all of it. What was before the first scrape is not of this time.
        while any(row.get(name, 0) < 2 * once for name, once in counts.items()):
            assert time.monotonic() < deadline, row
            row = asked()[1].get(("alice", MODEL), {})
        # `increase` extrapolates by up to an interval at each end.
        assert all(row[name] <= 3 * once for name, once in counts.items()), row
        done, _ = asked("yesterday")
        assert done.stderr.startswith("error: --since 'yesterday': expected a duration")


def test_what_is_no_prometheus_is_told_in_one_line(server: Server, tmp_path: Path) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    with running({"scrape_configs": []}, tmp_path) as empty:
        deadline = time.monotonic() + PATIENCE
        while "has nothing of" not in warm.run("usage", "--prometheus", empty).stderr:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        for words, message in (
            (
                ("--prometheus", empty),
                "Prometheus has nothing of service_client_requests_total in the last 24h",
            ),
            (("--prometheus", nobody), "is Prometheus running? (--prometheus)"),
            (("--prometheus", server.url), "this is not the answer of Prometheus (--prometheus)"),
            (("--prometheus", "http://[::1"), "is Prometheus running? (--prometheus)"),
            (("--since", "1h", "--url", server.url), "--since: a server knows only what was since"),
            (("--url", nobody), "is the server running? (--url)"),
        ):
            done = warm.run("usage", *words)
            assert done.returncode in (1, 2) and done.stdout == ""
            assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
            assert message in done.stderr


def test_a_kind_and_a_figure_that_are_no_count_are_left_out() -> None:
    mine = {"client": "anna", "model": "m"}
    samples = [
        ({**mine, "kind": "prompt"}, 3.0),
        ({**mine, "kind": "cached"}, 5.0),
        ({**mine, "kind": "generation"}, math.inf),
        ({**mine, "status": "200"}, math.nan),
    ]
    (row,) = usage._rows(samples)
    assert row == {**mine, "requests": 0, "refused": 0, "prompt_tokens": 3, "generation_tokens": 0}
