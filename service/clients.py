"""The clients of a deployment: each has an API key, a name, a weight, and perhaps limits.

Only the SHA-256 hash of a key is kept.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from service import text_file
from service.errors import ConfigError

_COMMENT = re.compile(r"^[ \t]*#|[ \t]+#(?=[ \t]|$)")
_BLANKS = re.compile(r"[ \t]+")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HASH = re.compile(r"sha256:([0-9a-f]{64})", re.IGNORECASE)
_LIKE_A_HASH = re.compile(
    r"(?:[\w.-]+:)?"  # a name, in files for Apache
    r"(?:(?:sha|md)[-_]?[0-9]{1,3}[:=$(-]|\$[\w-]+\$|\{[A-Z0-9-]+\}|(?:pbkdf2|scrypt|blake2)\w*[:$(])",
    re.IGNORECASE,
)
_NAME_LIKE_A_HASH = re.compile(r"[0-9a-f]{32,64}", re.IGNORECASE)  # what sha256sum prints first
_VARIABLE = re.compile(r"[$\w:.-]*KEY[=:]", re.IGNORECASE)  # as in files of variables
_LIMIT = re.compile(r"(requests|tokens)=([1-9][0-9]{0,11})/min")
_FORM = "a line is NAME KEY [WEIGHT] [requests=N/min] [tokens=N/min]"


@dataclass(frozen=True, slots=True)
class Client:
    """The owner of a request: the name, the weight and the limits of its API key."""

    name: str = "anonymous"
    weight: float = 1.0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


ANYONE = Client()

Version = tuple[int, int, int]  # of a file: time, size and inode


def digest(key: bytes) -> str:
    """Return the SHA-256 of a key, in hex."""
    return hashlib.sha256(key).hexdigest()


def hash_of(key: str, place: str) -> str:
    """Return the SHA-256 of a key, which may be given as `sha256:` and the hash.

    Raises ConfigError for what was probably mistyped: a malformed hash, or a character that cannot
    be seen.
    """
    if match := _HASH.fullmatch(key):
        return match[1].lower()
    if _LIKE_A_HASH.match(key):
        raise ConfigError(f"{place}: a hash is sha256: and 64 hex digits, without blanks")
    if hidden := next((c for c in key if not c.isprintable()), None):
        raise ConfigError(
            f"{place}: the character U+{ord(hidden):04X} cannot be seen; delete it, or give "
            "sha256: and the hash of the key"
        )
    return digest(key.encode())


def parse(text: str, place: str) -> dict[str, Client]:
    """Parse lines of a name, a key, a weight and limits into hash -> client.

    KEY may be `sha256:` and the hash. A text of a single word is a key with the name default. A
    comment begins with `#` at the start of a line, or with `#` between blanks. Raises ConfigError
    with `place` and line, but never a key.
    """
    lines = []
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        content, *comment = _COMMENT.split(line, maxsplit=1)
        if words := [word for word in _BLANKS.split(content) if word]:
            _check_comment(words, comment, f"{place}:{number}")
            lines.append((number, words))
    if len(lines) == 1 and len(lines[0][1]) == 1:
        lines = [(lines[0][0], ["default", *lines[0][1]])]
    clients: dict[str, Client] = {}
    by_name: dict[str, Client] = {}
    for number, words in lines:
        if len(words) < 2 or _LIMIT.fullmatch(words[1]):
            raise ConfigError(f"{place}:{number}: {_FORM}")
        name, key, *rest = words
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{place}:{number}: a name has 1 to 64 of A-Z a-z 0-9 . _ -")
        if _VARIABLE.match(key) or name in ("export", "set"):
            raise ConfigError(f"{place}:{number}: this line sets a variable; write the key alone")
        if _NAME_LIKE_A_HASH.fullmatch(name):
            raise ConfigError(
                f"{place}:{number}: the name looks like a hash; {_FORM}, a hash as sha256:..."
            )
        hashed = hash_of(key, f"{place}:{number}")
        limits = _limits(rest, f"{place}:{number}")
        if len(rest) > 1:
            raise ConfigError(f"{place}:{number}: {_FORM}")
        try:
            weight = float(rest[0]) if rest else 1.0
        except ValueError:
            weight = 0.0
        if not 0.001 <= weight <= 1000:
            raise ConfigError(f"{place}:{number}: a weight is a number from 0.001 to 1000")
        if hashed in clients:
            raise ConfigError(f"{place}:{number}: this key stands in an earlier line already")
        client = Client(name, weight, limits.get("requests"), limits.get("tokens"))
        if by_name.setdefault(name, client) != client:
            raise ConfigError(
                f"{place}:{number}: {name} has another weight or other limits in an earlier line"
            )
        clients[hashed] = client
    return clients


def _check_comment(words: list[str], comment: list[str], place: str) -> None:
    """Raise ConfigError where it is not certain what is a key and what a comment."""
    if any(word.startswith("#") for word in words) or (comment and len(words) == 1):
        raise ConfigError(
            f"{place}: is the `#` a comment, or of a key? Write a comment in a line of its own, "
            "and a key that begins with # as sha256: and its hash"
        )


def _limits(words: list[str], place: str) -> dict[str, int]:
    """Take the limits off the end of a line's words. Raises ConfigError."""
    limits: dict[str, int] = {}
    while words and "=" in words[-1]:
        match = _LIMIT.fullmatch(words.pop())
        if not match:
            raise ConfigError(
                f"{place}: a limit is requests=N/min or tokens=N/min, where N is a whole number "
                "above 0"
            )
        if match[1] in limits:
            raise ConfigError(f"{place}: {match[1]}= stands here twice")
        limits[match[1]] = int(match[2])
    return limits


def read_file(file: Path, place: str) -> dict[str, Client]:
    """Return the keys in a file as hash -> client. Raises ConfigError."""
    return parse(text_file.read(file, place), place)


def version_of(file: Path | None) -> Version | None:
    """Return what changes when a file is written or replaced; None if there is none."""
    try:
        stat = file.stat() if file else None
    except OSError:
        return None
    return (stat.st_mtime_ns, stat.st_size, stat.st_ino) if stat else None


def as_json(clients: Mapping[str, Client] | None) -> dict[str, dict[str, Any]] | None:
    """Return hash -> client as JSON values, or None if no key is required."""
    return None if clients is None else {key: asdict(client) for key, client in clients.items()}


def from_json(values: Mapping[str, dict[str, Any]]) -> dict[str, Client]:
    """Return hash -> client from what `as_json` made."""
    return {key: Client(**client) for key, client in values.items()}
