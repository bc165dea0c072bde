"""TLS with certificates of clients, behind a prefix, on a name: what one start can show of each."""

import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from testing.server import Server
from tests import warm
from tests.conftest import PATIENCE


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for localhost that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name.from_rfc4514_string("CN=localhost")
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, key_pem = folder / "cert.pem", folder / "key.pem"
    pem.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    key_pem.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return pem, key_pem


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ssl.SSLContext]]:
    """The URL of a server that wants a client's certificate, and a context that has one."""
    folder = tmp_path_factory.mktemp("tls")
    pem, key = certificate(folder)
    sets = {
        "ssl_certfile": pem,
        "ssl_keyfile": key,
        "ssl_ca_certs": pem,
        "ssl_cert_reqs": ssl.CERT_REQUIRED.value,
        "root_path": "/llm/",
        "enforce_eager": "true",
    }
    words = [word for k, v in sets.items() for word in ("--set", f"engine.{k}={v}")]
    server = warm.Server.service(folder / "log", "--host", "localhost", *words)
    try:
        url = ready_url(server)
        context = ssl.create_default_context(cafile=str(pem))
        context.load_cert_chain(pem, key)
        yield url, context
    finally:
        server.stop()


def ready_url(server: Server) -> str:
    """Wait for the message that it is ready; the URL in it."""
    deadline = time.monotonic() + PATIENCE
    while " answers at " not in (log := server.log.read_text()):
        assert time.monotonic() < deadline and server.process.poll() is None, log
        time.sleep(0.1)
    return log.partition(" answers at ")[2].partition(". Try:")[0]


@pytest.mark.parametrize("path", ["/", "/llm/"])
def test_who_has_a_certificate_is_answered(served: tuple[str, ssl.SSLContext], path: str) -> None:
    url, context = served
    body = {"prompt": "hi", "max_new_tokens": 4}
    with httpx.Client(verify=context, timeout=PATIENCE) as client:
        assert client.post(f"{url}{path}", json=body).json()["status"] == 200


@pytest.mark.parametrize("prefix", ["", "/llm"])
def test_page_health_and_redirects_are_the_same_below_a_prefix(
    served: tuple[str, ssl.SSLContext], prefix: str
) -> None:
    url, context = served
    with httpx.Client(verify=context, timeout=PATIENCE, base_url=f"{url}{prefix}") as client:
        for path in ("/health", "/ping", "/health/live", "/health/ready", "/v1/models"):
            assert client.get(path).status_code == client.head(path).status_code == 200, path
        page = client.get("/", headers={"accept": "text/html"}).text
        assert "<!doctype html>" in page and 'fetch("/' not in page
        answer = client.post("/v1/completions/", json={}, follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (307, "../completions")


def test_who_has_none_is_not(served: tuple[str, ssl.SSLContext], tmp_path: Path) -> None:
    url, _ = served
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/health/live", verify=False)  # who asks here has none
