"""nginx and HAProxy with the configurations of docs/proxies.md, over TLS."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from testing.server import free_port
from tests.conftest import PATIENCE

PAGE = (Path(__file__).parent.parent / "docs" / "proxies.md").read_text(encoding="utf-8")
NAMES = ("nginx", "haproxy")
# What Debian's own nginx.conf has around conf.d, for one test: all files below its folder.
NGINX = """
daemon off;
user root;
worker_processes 1;
pid {folder}/pid;
error_log {folder}/log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {page}
}}
"""

# What Debian's own haproxy.cfg has before the page's part: where it logs. Here that is `output`.
HAPROXY = """
global
    log stdout format raw local0
    zero-warning

"""


class Proxy:
    """One that runs; `process` is its first, and `output` what it prints."""

    def __init__(
        self, name: str, port: int, process: "subprocess.Popen[bytes]", output: Path
    ) -> None:
        self.name = name
        self.output = output
        self.port = port
        self.url = f"https://localhost:{port}"
        self.process = process


@contextmanager
def running(
    name: str, urls: Sequence[str], pem: Path, folder: Path, more: Mapping[str, str]
) -> Iterator[Proxy]:
    """nginx or HAProxy in front of two servers, with a certificate and its key in `pem`.

    `more` is replaced in the page's text.
    """
    program = shutil.which(name) or shutil.which(name, path="/usr/sbin")
    if program is None:  # .ci/run always brings it
        pytest.skip(f"{name} is not installed (Debian's package {name} has it)")
    port = free_port()
    text = _block(name)
    addresses = [url.removeprefix("http://") for url in urls]
    replaced = {
        "127.0.0.1:6006": addresses[0],
        "127.0.0.1:6007": addresses[1],
        "/etc/ssl/chat.pem": str(pem),
        "listen 443 ": f"listen 127.0.0.1:{port} ",
        "bind :443 ": f"bind 127.0.0.1:{port} ",
    }
    for old, new in replaced.items():
        text = text.replace(old, new)
    for old, new in more.items():
        assert old in text
        text = text.replace(old, new)
    folder.mkdir()
    file = folder / "configuration"
    if name == "nginx":
        file.write_text(NGINX.format(folder=folder, page=text))
        command = [program, "-c", str(file), "-p", str(folder), "-e", f"{folder}/log"]
    else:
        file.write_text(HAPROXY + text)
        command = [program, "-W", "-db", "-f", str(file)]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        _wait(f"https://localhost:{port}", process, folder)
        yield Proxy(name, port, process, folder / "output")
    finally:
        process.terminate()
        process.wait(PATIENCE)


def _block(language: str) -> str:
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)
    return str(text)


def _wait(url: str, process: "subprocess.Popen[bytes]", folder: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            httpx.get(url, verify=False, trust_env=False)
            return
        except httpx.TransportError:
            pass
        said = "".join(file.read_text() for file in folder.iterdir() if file.is_file())
        assert process.poll() is None and time.monotonic() < deadline, said
        time.sleep(0.1)
