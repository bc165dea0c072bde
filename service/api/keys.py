"""Looks up the owner of an API key. Hashes are compared in constant time."""

import hmac
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import Scope

from service import clients
from service.clients import Client, Version
from service.errors import ConfigError, Unauthorized

_logger = logging.getLogger("service")

# Health checks, which need no key.
HEALTH = frozenset({"/health", "/health/live", "/health/ready", "/ping"})
# Routes of Anthropic's API, whose clients send the key in a header of their own.
_ANTHROPIC = ("/v1/messages", "/v1/models")


def is_public(scope: Scope, path: str, *, metrics_key: bool) -> bool:
    """Whether a request needs no key: health checks, the chat page, and preflights."""
    return (
        path in HEALTH
        or (path == "/" and scope["method"] in ("GET", "HEAD"))
        or (path == "/metrics" and not metrics_key)
        or is_preflight(scope)
    )


def is_preflight(scope: Scope) -> bool:
    """Whether this is a CORS preflight request. It has no key; vLLM's CORS layer answers it."""
    headers = Headers(scope=scope)
    cors = "origin" in headers and "access-control-request-method" in headers
    return cors and scope["method"] == "OPTIONS"


def _sent(scope: Scope, path: str) -> Iterator[bytes]:
    """Yield the API keys of a request as raw bytes, from each header that may have one."""
    headers = Headers(scope=scope)
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        yield key.strip(" \t").encode("latin-1")
    if path.startswith(_ANTHROPIC):
        yield headers.get("x-api-key", "").strip(" \t").encode("latin-1")


class Keys:
    """The valid keys. The file is read again when it changes, so a key can be revoked."""

    def __init__(self, clients: Mapping[str, Client], file: Path | None) -> None:
        self._clients = clients
        self._file = file
        self._version: Version | None = None  # None: read the file at the first reload
        # The version that was refused, in a tuple; None if none was. It is logged once, and read
        # again until it is valid.
        self._refused: tuple[Version | None] | None = None

    def replace(self, clients: Mapping[str, Client]) -> None:
        """Let these keys be the valid ones."""
        self._clients = clients

    def owner(self, scope: Scope, path: str) -> Client:
        """Return the client that sends a request to `path`. Raises Unauthorized."""
        client = next(filter(None, map(self.client, _sent(scope, path))), None)
        if client is None:
            other = " or `x-api-key`" if path.startswith(_ANTHROPIC) else ""
            raise Unauthorized(
                f"send an API key in the header `Authorization: Bearer <key>`{other}"
            )
        return client

    def client(self, key: bytes) -> Client | None:
        """Return the owner of a key, or None."""
        digest = clients.digest(key)
        owner = None
        for hashed, client in self._clients.items():
            if hmac.compare_digest(hashed, digest):
                owner = client
        return owner

    def names(self) -> set[str]:
        """Return the names of all clients."""
        return {client.name for client in self._clients.values()}

    def reload(self) -> bool:
        """Read the file if it has changed. If it is invalid or missing, keep the old keys.

        Returns whether the clients have changed.
        """
        version = clients.version_of(self._file)
        if self._file is None or version == self._version:
            return False
        try:
            new_clients = clients.read_file(self._file, "the file of API keys")
            if not new_clients:  # it may be half written
                raise ConfigError("the file of API keys: it holds no key")
        except ConfigError as e:
            if self._refused != (version,):
                _logger.error("%s; the keys read before stay in force", e)
            self._refused = (version,)
        else:
            self._version, self._refused = version, None
            changed, self._clients = new_clients != self._clients, new_clients
            if changed:
                _logger.info("API keys read again: %d in force", len(new_clients))
            return changed
        return False
