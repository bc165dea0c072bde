"""Fixtures: the real service on the embedded model, started once for all tests that talk to it."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service import model_config, settings, weights
from testing.server import Server
from tests import warm

# Two files of tests run at once, and threads of an engine that wait for each other want
# cores of their own.
os.environ["OMP_NUM_THREADS"] = "1"
# `make test ARGS=...` gives its arguments to the tests, not to the commands that they make.
for name in ("ARGS", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS"):
    os.environ.pop(name, None)
# The tests' own clients ask servers on this machine, and no proxy of the environment.
for name in ("no_proxy", "NO_PROXY"):
    os.environ[name] = f"{os.environ.get(name, '')},127.0.0.1,localhost".removeprefix(",")

# The files that take longest come first, so that two workers end together.
LONGEST = (
    *("models", "faults", "overload", "readme", "chat_answers", "adapters", "benchmarks"),
    *("real_vocabularies", "proxies", "contract", "hostile", "usage", "terminal", "wheel", "cli"),
    *("two_api_processes", "cpu_int8", "compiled", "weights", "chat_page", "tokenizers", "budget"),
    "start_errors",
)
MODEL = "smollm2-135m-instruct"
# Seconds that a test waits for what must come. Only what is broken takes so long, on any processor.
PATIENCE = 600
# A client for what is asked again and again: making one reads all certificates of the machine.
LOOPBACK = httpx.Client(
    trust_env=False,
    verify=False,
    timeout=PATIENCE,
    limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def hardening(*rows: int) -> pytest.MarkDecorator:
    """Marks a test that shows what becomes of these rows of docs/hardening.md."""
    return pytest.mark.hardening(rows)


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """The folder of the embedded model, fetched before a test that asks whether it is here."""
    return weights.fetch(model_config.load(MODEL)[0].source, settings.load().cache_dir)


@pytest.fixture
def environment() -> Iterator[None]:
    """For a test that calls what prepares the environment of a server."""
    saved = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(saved)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, embedded_model: Path) -> Iterator[Server]:
    """One API process. Eager, because compiling is most of a start; README's test compiles.

    Without a C++ compiler and with an empty cache: an eager server compiles nothing, ever.
    """
    folder = tmp_path_factory.mktemp("service")
    env = {"CXX": "no-compiler", "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    eager = ("--set", "engine.enforce-eager=true")
    with warm.Server.service(folder / "log", *eager, env=env) as server:
        yield server


@pytest.fixture
def http(service: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=PATIENCE, trust_env=False) as client:
        yield client


def logged(server: Server, text: str) -> bool:
    """Whether the server has logged `text`; a request's line follows its answer by a moment."""
    deadline = time.monotonic() + PATIENCE
    while text not in server.log.read_text():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
