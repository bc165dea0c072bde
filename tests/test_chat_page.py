"""The chat page in a real Chromium; its server has a key, runs one request, and queues none."""

import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Error, Page, expect, sync_playwright

from testing.server import Server
from tests import warm
from tests.conftest import LOOPBACK, MODEL, PATIENCE, logged

expect.set_options(timeout=PATIENCE * 1000)
KEY = {"authorization": "Bearer secret"}
LONG = {"prompt": "Count from one to a thousand.", "temperature": 2, "max_new_tokens": 1500}
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def starting(tmp_path_factory: pytest.TempPathFactory, embedded_model: Path) -> Iterator[Server]:
    server = warm.Server.service(
        tmp_path_factory.mktemp("page") / "log",
        *("--set", "engine.enforce_eager=true", "--set", "engine.max_num_seqs=1"),
        env={"SERVICE_API_KEY": "secret", "SERVICE_MAX_WAITING": "0"},
    )
    yield server
    server.stop()


@pytest.fixture(scope="module")
def server(starting: Server) -> Server:
    starting.wait_until_ready()
    return starting


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed (Debian's package chromium has it)")
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        flags = [*FLAGS, f"--crash-dumps-dir={profile}"]
        with playwright.chromium.launch(executable_path=chromium, args=flags) as browser:
            yield browser


class Watch:
    """What pages complain about, and the addresses that they ask."""

    def __init__(self) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []

    def add(self, page: Page) -> None:
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._hear)
        page.on("request", lambda request: self.requests.append(request.url))

    def _hear(self, told: ConsoleMessage) -> None:
        # Chromium itself logs answers such as 429.
        if told.type == "error" and "status of 4" not in told.text:
            self.complaints.append(told.text)

    def check(self, url: str) -> None:
        assert self.complaints == []
        assert all(asked.startswith((url, "data:", "blob:")) for asked in self.requests)


@pytest.fixture
def page(server: Server, browser: Browser) -> Iterator[Page]:
    """The page with the key entered; whatever it complains about, or asks elsewhere, fails."""
    page = browser.new_page(locale="en-US", viewport={"width": 900, "height": 700})
    watch = Watch()
    watch.add(page)
    page.goto(server.url)
    page.get_by_label("API key").fill("secret")
    yield page
    page.close()
    watch.check(server.url)


def test_opened_while_the_model_loads_it_waits(starting: Server, browser: Browser) -> None:
    page = browser.new_page(locale="en-US")
    deadline = time.monotonic() + 20
    while not page.url.startswith(starting.url):
        try:
            opened = page.goto(starting.url)
        except Error:  # nothing listens in the first second
            assert time.monotonic() < deadline
            continue
        assert opened and opened.status == 503
        assert opened.headers["content-security-policy"].startswith("default-src 'none'")
    expect(page.locator("h1")).to_have_text(re.compile(f"{MODEL}: (starting|loading|warming)"))
    expect(page.locator("#send")).to_be_disabled()
    expect(page.locator("h1")).to_have_text(MODEL)
    expect(page.locator("#send")).to_be_enabled()
    expect(page.get_by_label("API key")).to_be_visible()
    page.close()


def ask(page: Page, prompt: str) -> None:
    expect(page.locator("#send")).to_be_enabled()  # before the page has loaded, Enter does nothing
    page.locator("#prompt").fill(prompt)
    page.locator("#prompt").press("Enter")


def wait_until_free(server: Server) -> None:
    """Until the engine's only place is: a client that has left is noticed a moment later."""
    deadline = time.monotonic() + 30
    one = {"prompt": "hi", "max_new_tokens": 1}
    while LOOPBACK.post(server.url, json=one, headers=KEY).status_code == 429:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_an_answer_streams_and_a_second_turn_knows_the_first(page: Page) -> None:
    expect(page.locator("h1")).to_have_text(MODEL)
    page.get_by_text("Sampling").click()
    page.get_by_label("temperature").fill("0")
    ask(page, "What is the capital of France?")
    answer = page.locator(".model .text").first
    expect(answer).to_contain_text("Paris")
    note = page.locator(".model .note").first
    expect(note).to_contain_text("tokens/s")
    expect(page.locator("#send")).to_have_text("Send")
    with page.expect_request(lambda request: request.method == "POST") as asked:
        ask(page, "And of Italy?")
    body = json.loads(asked.value.post_data or "")
    assert body["history"] == [["What is the capital of France?", answer.inner_text()]]
    assert body["temperature"] == 0
    expect(page.locator(".model .text").nth(1)).to_contain_text("Rome")


def test_the_models_own_sampling_is_shown_and_what_is_asked_can_be_copied(
    page: Page, server: Server
) -> None:
    index = LOOPBACK.get(server.url).json()
    assert index["routes"]["/"] == ["GET", "HEAD", "POST"]
    for name, value in index["sampling"].items():
        assert float(page.locator(f"#{name}").get_attribute("placeholder") or "") == value
    page.evaluate("navigator.clipboard.writeText = (text) => { window.copied = text; }")
    ask(page, "It's me")
    page.get_by_role("button", name="Copy as curl").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    copied = page.evaluate("window.copied")
    assert copied.startswith(f"curl -N -X POST {server.url}/ -H 'Authorization: Bearer YOUR_KEY'")
    assert '"prompt":"It\'\\\'\'s me"' in copied
    # As over plain HTTP from another machine, where a page has no clipboard.
    page.evaluate("delete Navigator.prototype.clipboard")
    page.get_by_role("button", name="Copy as curl").click()
    page.locator("#prompt").focus()
    page.keyboard.press("Control+V")
    expect(page.locator("#prompt")).to_have_value(copied)
    page.locator("#prompt").fill("")
    expect(page.locator("#send")).to_have_text("Send")


def test_stop_ends_the_request_in_the_engine(page: Page, server: Server) -> None:
    page.get_by_text("Sampling").click()
    page.get_by_label("temperature").fill("2")
    page.get_by_label("max_new_tokens").fill("1500")
    ask(page, "Count from one to a thousand.")
    expect(page.locator(".model .note")).to_contain_text("tokens/s")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".model .note")).to_contain_text("stopped")
    assert page.locator(".model .text").inner_text()
    assert logged(server, "status=499")
    wait_until_free(server)


def test_a_new_chat_forgets_the_answer_that_was_being_written(page: Page, server: Server) -> None:
    page.get_by_text("Sampling").click()
    page.get_by_label("temperature").fill("2")
    ask(page, "Count from one to a thousand.")
    expect(page.locator(".model .note")).to_contain_text("tokens/s")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#send")).to_have_text("Send")
    wait_until_free(server)
    page.get_by_label("max_new_tokens").fill("1")
    with page.expect_request(lambda request: request.method == "POST") as asked:
        ask(page, "hi")
    assert json.loads(asked.value.post_data or "")["history"] == []
    expect(page.locator(".model .note")).to_contain_text("cut off")


def test_a_full_server_and_a_wrong_key_are_told(page: Page, server: Server) -> None:
    page.get_by_label("API key").fill("密钥\u200b")  # no header may hold it as it is
    ask(page, "hi")
    expect(page.locator(".model .error")).to_contain_text("401: send an API key")
    page.get_by_label("API key").fill("secret")
    with httpx.Client(timeout=60) as client:
        with client.stream(
            "POST", server.url, json={**LONG, "stream": True}, headers=KEY
        ) as response:
            chunks = response.iter_bytes()  # given up, it would close the connection
            next(chunks)
            ask(page, "hi")
            told = page.locator(".model .error").nth(1)
            expect(told).to_contain_text("The server or your key is at its limit. Try again in")
            expect(page.locator("#prompt")).to_have_value("hi")
    wait_until_free(server)


def test_what_a_user_or_a_model_writes_is_text(page: Page) -> None:
    ask(page, "<img src=x onerror=\"document.title='broken'\"><b>bold</b>")
    expect(page.locator(".user .text")).to_contain_text("<b>bold</b>")
    assert page.locator("#turns img, #turns b").count() == 0
    expect(page.locator("#send")).to_have_text("Send")
    assert page.title() == MODEL


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_in_china_reads_it(browser: Browser, server: Server, scheme: str) -> None:
    context = browser.new_context(
        locale="zh-CN",
        viewport={"width": 360, "height": 640},
        color_scheme="dark" if scheme == "dark" else "light",
    )
    page = context.new_page()
    page.goto(server.url)
    expect(page.get_by_role("button", name="发送")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    page.get_by_role("button", name="English").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    context.close()


def test_a_system_prompt_reaches_the_model(page: Page) -> None:
    page.get_by_text("Sampling").click()
    page.get_by_label("temperature").fill("0")
    page.get_by_label("max_new_tokens").fill("1")
    counts = []
    for system in ("", "You answer in one word."):
        page.get_by_label("System prompt").fill(system)
        with page.expect_response(lambda response: response.request.method == "POST") as asked:
            ask(page, "What is the capital of France?")
        last = asked.value.text().strip().split("\n\n")[-1]
        counts.append(json.loads(last.removeprefix("data: "))["details"]["prompt_tokens"])
        expect(page.locator("#send")).to_have_text("Send")
        page.get_by_role("button", name="New chat").click()
    assert counts[0] != counts[1]


def test_the_page_is_small_and_allows_nothing_from_elsewhere(server: Server) -> None:
    answer = LOOPBACK.get(server.url, headers={"accept": "text/html,*/*"})
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert len(answer.content) < 150_000
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
