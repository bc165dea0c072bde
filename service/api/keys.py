"""The API keys in force: whose key a request carries. Hashes are compared in constant time."""

import hmac
import logging
from collections.abc import Mapping
from pathlib import Path

from service import clients
from service.clients import Client
from service.errors import ConfigError

_logger = logging.getLogger("service")


class Keys:
    """The keys in force. A file is read again when it changes, so that a key can be revoked."""

    def __init__(self, clients: Mapping[str, Client], file: Path | None) -> None:
        self._clients = clients
        self._file = file
        self._version: tuple[int, int, int] | None = None  # it may have changed since it was read
        self._refused: tuple[tuple[int, int, int] | None] | None = None  # told once, tried again

    def client(self, key: bytes) -> Client | None:
        """Whose key this is."""
        given = clients.digest(key)
        found = None
        for hashed, client in self._clients.items():
            if hmac.compare_digest(hashed, given):
                found = client
        return found

    def reload(self) -> None:
        """Read the file if it has changed. One that is broken or gone changes nothing."""
        version = self._stat()
        if self._file is None or version == self._version:
            return
        try:
            found = clients.read_file(self._file, "the file of API keys")
            if not found:  # perhaps it is just being written
                raise ConfigError("the file of API keys: it holds no key")
        except ConfigError as e:
            if self._refused != (version,):
                _logger.error("%s; the keys read before stay in force", e)
            self._refused = (version,)
        else:
            self._version, self._refused = version, None
            changed, self._clients = found != self._clients, found
            if changed:
                _logger.info("API keys read again: %d in force", len(found))

    def _stat(self) -> tuple[int, int, int] | None:
        if self._file is None:
            return None
        try:
            stat = self._file.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino
