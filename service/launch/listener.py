"""The socket of a service, and what a command says of it."""

import errno
import json
import socket
import sys

from service.errors import LaunchError
from service.settings import Settings

_BACKLOG = 2048


def listener_of(settings: Settings) -> socket.socket:
    """Listen on the address and port of the settings. Raises LaunchError."""
    host, port = settings.host, settings.port
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
        return listener
    except (OSError, UnicodeError) as e:
        reason = getattr(e, "strerror", None) or "not a host name"
        remedy = (
            "stop the program that uses it, or choose another with SERVICE_PORT, --port, or "
            "`make serve PORT=...`"
            if isinstance(e, OSError) and e.errno == errno.EADDRINUSE
            else "choose another with --host and --port, or SERVICE_HOST and SERVICE_PORT"
        )
        raise LaunchError(f"cannot listen on {host[:80]} port {port}: {reason}; {remedy}") from None


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    address = str(listener.getsockname()[0])
    return address.startswith("127.") or address == "::1"


def warn_if_open(listener: socket.socket, settings: Settings, *, keyed: bool) -> None:
    """Print a warning if other machines may use the service without a key."""
    if keyed or is_loopback(listener):
        return
    print(
        f"WARNING: {settings.host} can be reached from other machines, and no API key is set: "
        "whoever reaches it may use it. Set SERVICE_API_KEY_FILE, or listen on 127.0.0.1.",
        file=sys.stderr,
    )


def ready_message(who: str, url: str, *, keyed: bool, model: str | None = None) -> str:
    """Return what a command prints when `who` is ready at `url`. The example asks for `model`."""
    key = '  -H "Authorization: Bearer <the API key>" \\\n' if keyed else ""
    body = {"prompt": "What is the capital of France?", **({"model": model} if model else {})}
    return (
        f"\nReady: {who} at {url}. Try:\n\n"
        f"curl -X POST {url} \\\n{key}  -d '{json.dumps(body, ensure_ascii=False)}'\n\n"
        f"OpenAI clients: base_url {url}/v1   Metrics: {url}/metrics\n"
    )
