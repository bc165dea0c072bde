"""docs/clients.md, word for word: its blocks run in the clients they are for, over a real service.

The clients have an environment of their own, made for one run from the pins in requirements/: their
dependencies are not the service's.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from testing.server import Server, free_port
from tests import warm
from tests.conftest import LOOPBACK, PATIENCE

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
REQUIREMENTS = ROOT / "requirements"
KEY = "secret"
# Of a language: the name of the file, what runs it, and the package of Debian that has that.
LANGUAGES = {
    "python": ("block.py", ["python"], ""),
    "javascript": ("block.mjs", ["node"], "nodejs"),
    "java": ("Ask.java", ["java"], "openjdk-17-jdk-headless"),
    "go": ("block.go", ["go", "run"], "golang-go"),
}
# Someone at the page of Streamlit, who first has a wrong key, and then asks twice.
READER = """
import os
import sys

from streamlit.testing.v1 import AppTest

app = AppTest.from_file(sys.argv[1], default_timeout=600).run()
key = os.environ["API_KEY"]
os.environ["API_KEY"] = "wrong"
app.chat_input[0].set_value("Hello?").run()
assert "API key" in app.error[0].value, app.error
os.environ["API_KEY"] = key
for question in ("What is the capital of France?", "And of Italy?"):
    app.chat_input[0].set_value(question).run()
    assert not app.exception and not app.error, (app.exception, app.error)
for message in app.chat_message:
    print(f"{message.name}: {message.markdown[0].value}")
"""


@dataclass
class Block:
    heading: str
    language: str
    code: str
    prints: str = ""


def _blocks() -> Iterator[Block]:
    last: Block | None = None
    for heading, section in re.findall(r"^##? (.*?)\n(.*?)(?=^##? |\Z)", PAGE, re.M | re.S):
        for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", section, re.M | re.S):
            if language == "text" and last:
                last.prints = text
            else:
                last = Block(heading, language, text)
                yield last


BLOCKS = list(_blocks())


def block(heading: str, language: str) -> str:
    """The one block of this language under a heading that prints nothing."""
    (found,) = (b for b in BLOCKS if (b.heading, b.language, b.prints) == (heading, language, ""))
    return found.code


def run(command: list[str], env: Mapping[str, str], folder: Path) -> str:
    done = subprocess.run(
        command, env=env, cwd=folder, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, embedded_model: Path) -> Iterator[Server]:
    """With a key, which each client shows that it sends, and with what the page says of tools."""
    log = tmp_path_factory.mktemp("clients") / "log"
    tools = re.findall(r"(--set) (engine\.[\w=]+)", PAGE)
    words = [w for pair in (*tools, ("--set", "engine.enforce_eager=true")) for w in pair]
    with warm.Server.service(log, *words, env={"SERVICE_API_KEY": KEY}) as server:
        yield server


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Where the blocks run: an environment that has the clients, and nothing of the service."""
    uv = str(Path(sys.executable).with_name("uv"))
    with tempfile.TemporaryDirectory(prefix="chat-service-clients-") as name:
        env = os.environ | {"VIRTUAL_ENV": name}
        run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, name], env, ROOT)
        run([uv, "pip", "sync", "--quiet", str(REQUIREMENTS / "clients.txt")], env, ROOT)
        yield Path(name)


@pytest.fixture(scope="module")
def npm(folder: Path) -> None:
    """Install what requirements/clients.json pins beside the blocks of JavaScript."""
    if not shutil.which("npm"):  # .ci/run always brings it
        pytest.skip("npm is not installed (Debian's package npm has it)")
    shutil.copy(REQUIREMENTS / "clients.json", folder / "package.json")
    run(["npm", "install", "--silent"], os.environ, folder)


@pytest.fixture
def env(service: Server, folder: Path) -> dict[str, str]:
    """The variables that the page exports, and none that a client might read instead."""
    variables = re.findall(r"^export (\w+)=", block("Clients", "bash"), re.M)
    assert variables == ["BASE_URL", "API_KEY"]
    others = re.compile("OPENAI_|ANTHROPIC_|LITELLM_")
    env = {name: value for name, value in os.environ.items() if not others.match(name)}
    env |= dict(zip(variables, (service.url, KEY), strict=True))
    return env | {"PATH": f"{folder / 'bin'}:{env['PATH']}", "GOCACHE": str(folder / "go")}


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.prints], ids=lambda b: b.heading)
def test_a_block_prints_what_the_page_says(
    block: Block, folder: Path, env: dict[str, str], request: pytest.FixtureRequest
) -> None:
    name, command, package = LANGUAGES[block.language]
    if not shutil.which(command[0], path=env["PATH"]):  # .ci/run always brings it
        pytest.skip(f"{command[0]} is not installed (Debian's package {package} has it)")
    if 'from "openai"' in block.code:
        request.getfixturevalue("npm")
    (folder / name).write_text(block.code)
    output = run([*command, name], env, folder)
    clock = re.compile(r'"time": "[\d: -]+"')
    assert clock.sub("", output) == clock.sub("", block.prints)


@contextmanager
def answering(status: int, headers: Mapping[str, str], body: bytes) -> Iterator[tuple[str, Any]]:
    """The URL of a server that always answers so, and when it was asked."""
    times: list[float] = []

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            times.append(time.monotonic())
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", times
        server.shutdown()


def fails(block: Block, url: str, folder: Path, env: Mapping[str, str]) -> str:
    """What a block says on stderr when it ends with an error."""
    name, command, package = LANGUAGES[block.language]
    if not shutil.which(command[0], path=env["PATH"]):
        pytest.skip(f"{command[0]} is not installed (Debian's package {package} has it)")
    (folder / name).write_text(block.code)
    done = subprocess.run(
        [*command, name], env={**env, "BASE_URL": url}, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode != 0, done.stdout
    return done.stderr


@pytest.mark.parametrize(
    ("heading", "more"), [("openai", 2), ("anthropic", 2), ("LangChain", 2), ("LlamaIndex", 11)]
)
def test_an_sdk_comes_back_when_the_service_says(
    heading: str, more: int, folder: Path, env: dict[str, str]
) -> None:
    first = next(b for b in BLOCKS if b.heading == heading)
    with answering(429, {"Retry-After": "3", "Content-Length": "2"}, b"{}") as (url, times):
        fails(first, url, folder, env)
    assert len(times) == 1 + more
    assert all(2.9 < after - before < 8 for before, after in pairwise(times))


@pytest.mark.parametrize("heading", ["fetch", "Go"])
def test_a_stream_that_fails_or_breaks_off_is_an_error(
    heading: str, folder: Path, env: dict[str, str]
) -> None:
    (reader,) = (b for b in BLOCKS if b.heading == heading)
    begun = b'data: {"delta": "The"}\n\n'
    failed = b'data: {"error": {"message": "the engine has stopped"}}\n\n'
    length = {"Content-Length": str(len(begun + failed))}
    with answering(200, length, begun + failed) as (url, _):
        assert "the engine has stopped" in fails(reader, url, folder, env)
    with answering(200, length, begun) as (url, _):
        fails(reader, url, folder, env)


def test_a_page_of_streamlit_chats(folder: Path, env: dict[str, str]) -> None:
    (folder / "chat.py").write_text(block("Streamlit", "python"))
    (folder / "reader.py").write_text(READER)
    output = run(["python", "reader.py", "chat.py"], env, folder)
    greeting, question, answer, *_, last = output.splitlines()
    assert greeting == "assistant: What can I do for you?"
    assert question == "user: What is the capital of France?"
    assert answer == "assistant: The capital of France is Paris."
    assert "Rome" in last  # what "And of Italy?" asks for is in the history


def test_litellms_proxy_stands_in_front(folder: Path, env: dict[str, str]) -> None:
    (folder / "litellm.yaml").write_text(block("litellm", "yaml"))
    port = free_port()
    script = (
        block("litellm", "bash").replace(" 4000", f" {port}").replace("litellm -", "exec litellm -")
    )
    command = ["bash", "-ec", f"cd {folder}\n{script}"]
    log = folder / "litellm.log"
    with Server(command, log, port=port, env=env, health="/health/liveliness") as proxy:
        body: dict[str, Any] = {
            "model": "france",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
        }
        key = psutil.Process(proxy.process.pid).environ()["LITELLM_MASTER_KEY"]
        url, headers = f"{proxy.url}/v1/chat/completions", {"Authorization": f"Bearer {key}"}
        answer = LOOPBACK.post(url, json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        message = answer.json()["choices"][0]["message"]
        assert message["content"] == "The capital of France is Paris."
        body["stream"] = True
        with LOOPBACK.stream("POST", url, json=body, headers=headers) as stream:
            assert [line for line in stream.iter_lines() if line][-1] == "data: [DONE]"


def test_no_block_is_left_out() -> None:
    silent = [(b.heading, b.language) for b in BLOCKS if not b.prints]
    assert silent == [
        ("Clients", "bash"),
        ("litellm", "yaml"),
        ("litellm", "bash"),
        ("Streamlit", "python"),
    ]
