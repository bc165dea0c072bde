"""The file of API keys: names, weights, hashes, and revocation."""

import hashlib
import hmac
import logging
from pathlib import Path
from unittest import mock

import pytest

from service import clients
from service.api.keys import Keys
from service.clients import Client
from service.errors import ConfigError
from tests.conftest import hardening

FORM = "a line is NAME KEY [WEIGHT] [requests=N/min] [tokens=N/min]"
HASH = "a hash is sha256: and 64 hex digits, without blanks"
COMMENT = (
    "is the `#` a comment, or of a key? Write a comment in a line of its own, and a key that "
    "begins with # as sha256: and its hash"
)
LIMIT = "a limit is requests=N/min or tokens=N/min, where N is a whole number above 0"


@hardening(14)
def test_a_line_is_a_name_a_key_and_a_weight() -> None:
    hashed = hashlib.sha256(b"k2").hexdigest()
    found = clients.parse(f"# ours\nalice k1 2.5\n\nbob sha256:{hashed}  # hashed\n", "keys")
    assert list(found.values()) == [Client("alice", 2.5), Client("bob", 1.0)]
    assert found[hashed] == Client("bob")
    assert list(clients.parse("secret\n", "keys").values()) == [Client("default")]
    assert clients.digest(b"se#cret") in clients.parse("alice se#cret # hers", "keys")


def test_a_line_may_have_limits() -> None:
    text = "alice k1 2 requests=60/min\nbob k2 tokens=5000/min requests=6/min\nalice k3 2 "
    alice, bob, rotated = clients.parse(text + "requests=60/min", "keys").values()
    assert alice == rotated == Client("alice", 2, requests_per_minute=60)
    assert bob == Client("bob", 1, requests_per_minute=6, tokens_per_minute=5000)
    assert clients.digest(b"requests=6/minute==") in clients.parse("a requests=6/minute==", "keys")


@hardening(14)
@pytest.mark.parametrize(("key", "name"), [(b"k1", "alice"), (b"k2", "bob"), (b"k", None)])
def test_each_key_is_compared_in_constant_time(key: bytes, name: str | None) -> None:
    found = clients.parse("alice k1\nbob k2\ncarol k3\n", "keys")
    with mock.patch.object(hmac, "compare_digest", wraps=hmac.compare_digest) as compare:
        client = Keys(found, None).client(key)
    assert (client and client.name) == name
    given = hashlib.sha256(key).hexdigest()
    # All of them, also after the one that fits.
    assert compare.call_args_list == [mock.call(hashed, given) for hashed in found]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alice k1\nbob", f"keys:2: {FORM}"),
        ("alice k1 2 3", f"keys:1: {FORM}"),
        ("alice requests=5/min", f"keys:1: {FORM}"),
        ("alice k1 requests=5/min 2", f"keys:1: {FORM}"),
        ("alice k1 requests=5", f"keys:1: {LIMIT}"),
        ("alice k1 requests=0/min", f"keys:1: {LIMIT}"),
        ("alice k1 tokens=1e3/min", f"keys:1: {LIMIT}"),
        ("alice k1 2 token=5/min", f"keys:1: {LIMIT}"),
        ("alice k1 tokens=5/min tokens=6/min", "keys:1: tokens= stands here twice"),
        (
            "alice k1 tokens=5/min\nalice k2",
            "keys:2: alice has another weight or other limits in an earlier line",
        ),
        ("al/ice k1", "keys:1: a name has 1 to 64 of A-Z a-z 0-9 . _ -"),
        ("alice k1 0", "keys:1: a weight is a number from 0.001 to 1000"),
        ("alice k1 nan", "keys:1: a weight is a number from 0.001 to 1000"),
        ("alice #k1", f"keys:1: {COMMENT}"),
        ("alice # k1", f"keys:1: {COMMENT}"),
        ("alice k1 #k2", f"keys:1: {COMMENT}"),
        ("k1 # mine", f"keys:1: {COMMENT}"),
        ("alice sha256:2bb80d537b1da3e3", f"keys:1: {HASH}"),
        ("alice sha256: " + "0" * 64, f"keys:1: {HASH}"),
        ("SHA-256:" + "0" * 64, f"keys:1: {HASH}"),
        ("alice md5:" + "0" * 32, f"keys:1: {HASH}"),
        ("alice k1\nbob k1", "keys:2: this key stands in an earlier line already"),
    ],
)
def test_a_mistake_names_its_line_and_no_key(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        clients.parse(text, "keys")
    assert str(error.value) == message


def test_a_key_is_the_one_that_is_written_whatever_the_editor(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    hashed = hashlib.sha256(b"k1").hexdigest()
    for content in (
        b"\xef\xbb\xbfk1",
        b"\xef\xbb\xbfalice k1\r\n\r\n# hers\r\n",
        b"alice\tk1\t \r# old Mac",
        f"alice sha256:{hashed.upper()}\n".encode(),  # as PowerShell's Get-FileHash prints it
        f"SHA256:{hashed}".encode(),
    ):
        file.write_bytes(content)
        assert clients.read_file(file, "keys").keys() == {hashed}, content
    for key in ("ab#cd", "密钥", "a=b:c", "'k1'"):
        file.write_text(f"# all of them\nalice {key}\n", encoding="utf-8")
        assert clients.read_file(file, "keys").keys() == {clients.digest(key.encode())}, key


SUM = b"5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("alice k1\nbob k\u200b2\n".encode(), "keys:2: the character U+200B cannot be seen"),
        ("alice k1\nbob k2\u3000\n".encode(), "keys:2: the character U+3000 cannot be seen"),
        ("alice k1\u20282\n".encode(), "keys:1: the character U+2028 cannot be seen"),
        ("\ufeffalice \ufeffk1\n".encode(), "keys:1: the character U+FEFF cannot be seen"),
        ("alice k1\n# 密钥\n".encode("gbk"), "keys:2: not UTF-8 text; save the file as UTF-8"),
        ("alice k1\n".encode("utf-16"), "keys:1: not UTF-8 text; save the file as UTF-8"),
        (b"%s  -\n" % SUM, "keys:1: the name looks like a hash"),  # of `sha256sum`
        (b"%s alice\n" % SUM, "keys:1: the name looks like a hash"),
        (b"alice $2y$05$abcdefghijklmnopqrstuv\n", "keys:1: a hash is sha256: and 64 hex digits"),
        (b"alice {SHA}5en6G6MezRroT3XKqkdPOmY/BfQ=\n", "keys:1: a hash is sha256: and 64"),
        (b"5f4dcc3b5aa765d61d8327deb882cf99  -\n", "keys:1: the name looks like a hash"),
        (b"alice:$2y$05$abcdefghijklmnopqrstuv\n", "keys:1: a hash is sha256: and 64 hex"),
        (b"alice pbkdf2_sha256$1$abc$def\n", "keys:1: a hash is sha256: and 64 hex digits"),
        (b"SERVICE_API_KEY=k1\n", "keys:1: this line sets a variable"),
        (b"export SERVICE_API_KEY=k1\n", "keys:1: this line sets a variable"),
        (b'$env:SERVICE_API_KEY="k1"\n', "keys:1: this line sets a variable"),
        (b"api_key:k1\n", "keys:1: this line sets a variable"),
    ],
)
def test_what_an_editor_spoils_is_refused_with_its_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        clients.read_file(file, "keys")
    assert str(error.value).startswith(message)


def test_a_key_is_revoked_by_writing_the_file_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.write_text("alice k1\nbob k2\n")
    current = Keys(clients.read_file(file, "keys"), file)
    assert current.client(b"k2") == Client("bob")
    assert current.client(b"k3") is None
    file.write_text("alice k1\n")
    current.reload()
    assert (current.client(b"k1"), current.client(b"k2")) == (Client("alice"), None)
    with caplog.at_level(logging.ERROR, logger="service"):
        file.write_text("alice k1\nbroken\n")
        current.reload()
        caplog.clear()
        file.unlink()
        current.reload()
        current.reload()
    assert current.client(b"k1") == Client("alice")
    assert caplog.text.count("No such file or directory; the keys read before stay in force") == 1
    assert "k1" not in caplog.text
    (tmp_path / "new").write_text("alice k2\n")
    (tmp_path / "new").rename(file)
    with mock.patch.object(Path, "read_text", side_effect=OSError(24, "Too many open files")):
        current.reload()
    current.reload()
    assert (current.client(b"k1"), current.client(b"k2")) == (None, Client("alice"))
    file.write_text("")  # as a file that is just being written looks
    current.reload()
    assert current.client(b"k2") == Client("alice")
