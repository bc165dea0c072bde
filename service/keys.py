"""The API keys of a deployment: who may come in, under which name, with which weight.

Only SHA-256 hashes are kept, and compared in constant time.
"""

import hashlib
import hmac
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from service.admission import Client
from service.errors import ConfigError

_logger = logging.getLogger("service")

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HASH = re.compile(r"sha256:([0-9a-f]{64})")


def digest(key: bytes) -> str:
    """SHA-256 of a key, in hex."""
    return hashlib.sha256(key).hexdigest()


def parse(text: str, place: str) -> dict[str, Client]:
    """Hash to client, from lines `NAME KEY [WEIGHT]`; `#` begins a comment.

    KEY may be `sha256:` and the hash instead. A file with nothing but one word is one key, named
    default. Raises ConfigError with `place` and line, never with a key.
    """
    lines = [(n, line.partition("#")[0].split()) for n, line in enumerate(text.splitlines(), 1)]
    lines = [(n, words) for n, words in lines if words]
    if len(lines) == 1 and len(lines[0][1]) == 1:
        lines = [(lines[0][0], ["default", *lines[0][1]])]
    clients: dict[str, Client] = {}
    for number, words in lines:
        if len(words) not in (2, 3):
            raise ConfigError(f"{place}:{number}: a line is NAME KEY [WEIGHT]")
        name, key, *rest = words
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{place}:{number}: a name has 1 to 64 of A-Z a-z 0-9 . _ -")
        try:
            weight = float(rest[0]) if rest else 1.0
        except ValueError:
            weight = 0.0
        if not 0.001 <= weight <= 1000:
            raise ConfigError(f"{place}:{number}: a weight is a number from 0.001 to 1000")
        given = _HASH.fullmatch(key)
        hashed = given[1] if given else digest(key.encode())
        if hashed in clients:
            raise ConfigError(f"{place}:{number}: this key stands in an earlier line already")
        clients[hashed] = Client(name, weight)
    return clients


def read(file: Path, place: str) -> dict[str, Client]:
    """The keys of a file. Raises ConfigError."""
    try:
        return parse(file.read_text(encoding="utf-8"), place)
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{place}: {reason}") from None


class Keys:
    """The keys in force. A file is read again when it changes, so that a key can be revoked."""

    def __init__(self, clients: Mapping[str, Client], file: Path | None) -> None:
        self._clients = clients
        self._file = file
        self._version: tuple[int, int, int] | None = None  # it may have changed since it was read
        self._refused: tuple[tuple[int, int, int] | None] | None = None  # told once, tried again

    def client(self, key: bytes) -> Client | None:
        """Whose key this is."""
        given = digest(key)
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
            clients = read(self._file, "the file of API keys")
            if not clients:  # perhaps it is just being written
                raise ConfigError("the file of API keys: it holds no key")
        except ConfigError as e:
            if self._refused != (version,):
                _logger.error("%s; the keys read before stay in force", e)
            self._refused = (version,)
        else:
            self._version, self._refused = version, None
            changed, self._clients = clients != self._clients, clients
            if changed:
                _logger.info("API keys read again: %d in force", len(clients))

    def _stat(self) -> tuple[int, int, int] | None:
        if self._file is None:
            return None
        try:
            stat = self._file.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino
