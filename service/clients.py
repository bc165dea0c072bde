"""The clients of a deployment: each has an API key, a name, a weight, and perhaps limits.

Only the SHA-256 hash of a key is kept.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from service.errors import ConfigError

_COMMENT = re.compile(r"(?:^|\s)#")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
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


def digest(key: bytes) -> str:
    """Return the SHA-256 of a key, in hex."""
    return hashlib.sha256(key).hexdigest()


def parse(text: str, place: str) -> dict[str, Client]:
    """Parse lines of a name, a key, a weight and limits into hash -> client; `#` begins a comment.

    KEY may be `sha256:` and the hash. A text of a single word is a key with the name default.
    Raises ConfigError with `place` and line, but never a key.
    """
    lines = [(n, _COMMENT.split(line)[0].split()) for n, line in enumerate(text.splitlines(), 1)]
    lines = [(n, words) for n, words in lines if words]
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
        limits = _limits(rest, f"{place}:{number}")
        if len(rest) > 1:
            raise ConfigError(f"{place}:{number}: {_FORM}")
        try:
            weight = float(rest[0]) if rest else 1.0
        except ValueError:
            weight = 0.0
        if not 0.001 <= weight <= 1000:
            raise ConfigError(f"{place}:{number}: a weight is a number from 0.001 to 1000")
        match = _HASH.fullmatch(key)
        hashed = match[1] if match else digest(key.encode())
        if hashed in clients:
            raise ConfigError(f"{place}:{number}: this key stands in an earlier line already")
        client = Client(name, weight, limits.get("requests"), limits.get("tokens"))
        if by_name.setdefault(name, client) != client:
            raise ConfigError(
                f"{place}:{number}: {name} has another weight or other limits in an earlier line"
            )
        clients[hashed] = client
    return clients


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
    try:
        return parse(file.read_text(encoding="utf-8"), place)
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{place}: {reason}") from None
