"""What two commands on one machine tell each other about one cluster."""

import os
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from service.clients import Client
from service.cluster.config import Cluster
from service.errors import LaunchError


class State:
    """A folder of the cache for each cluster."""

    def __init__(self, cache_dir: Path) -> None:
        address = os.environ.get("RAY_ADDRESS")
        name = re.sub(r"\W+", "-", address)[:64] if address else "local"
        self._folder = cache_dir / "cluster" / name
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.token = self._folder / "token"
        self._address = self._folder / "address"
        self._applied = self._folder / "applied"
        self._keys = self._folder / "keys"
        self._unfinished = self._folder / "unfinished"
        self._ray_folder = self._folder / "ray"

    @contextmanager
    def owner(self, patience: float = 5) -> Iterator[bool]:
        """Yield whether this command owns the cluster: it is the only one, or the first.

        Waits `patience` seconds for one that is just ending, or looks with `--status`.
        """
        lock = filelock.FileLock(self._folder / "lock")
        try:
            lock.acquire(timeout=patience)
        except filelock.Timeout:
            yield False
            return
        with lock:
            yield True

    @contextmanager
    def changing(self, patience: float = 5) -> Iterator[None]:
        """Let one command at a time change what is served. Raises LaunchError after `patience`."""
        try:
            with filelock.FileLock(self._folder / "changing", timeout=patience):
                yield
        except filelock.Timeout:
            raise LaunchError("another update is under way; try again after it") from None

    def forget(self) -> None:
        """Forget what an earlier command has applied, and where. It may have been killed."""
        for file in (self._applied, self._address, self._keys, self._unfinished):
            file.unlink(missing_ok=True)

    @property
    def address(self) -> str:
        """Where the owner's cluster is. Raises LaunchError while there is none."""
        try:
            return self._address.read_text()
        except FileNotFoundError:
            raise LaunchError("the cluster is still starting; try again later") from None

    @address.setter
    def address(self, value: str) -> None:
        self._address.write_text(value)

    @property
    def ray_folder(self) -> str | None:
        """The folder of the Ray that the last command has started on this machine."""
        return self._ray_folder.read_text() if self._ray_folder.exists() else None

    @ray_folder.setter
    def ray_folder(self, value: str) -> None:
        self._ray_folder.write_text(value)

    @property
    def unfinished(self) -> bool:
        """Whether an update has begun to change what is served. It may have been killed."""
        return self._unfinished.exists()

    @unfinished.setter
    def unfinished(self, value: bool) -> None:
        if value:
            self._unfinished.touch()
        else:
            self._unfinished.unlink(missing_ok=True)

    @property
    def applied(self) -> Cluster | None:
        """The cluster that was applied last, and came up."""
        applied: Cluster | None = _read(self._applied)
        return applied

    @applied.setter
    def applied(self, value: Cluster) -> None:
        _write(self._applied, value)

    @property
    def keys(self) -> tuple[Path, Mapping[str, Client]] | None:
        """The file of API keys, and the keys that the owner has last read from it."""
        keys: tuple[Path, Mapping[str, Client]] | None = _read(self._keys)
        return keys

    @keys.setter
    def keys(self, value: tuple[Path, Mapping[str, Client]]) -> None:
        _write(self._keys, value)


def _read(file: Path) -> Any:
    """Return what `_write` has written, or None."""
    try:
        return pickle.loads(file.read_bytes())
    except Exception:  # it is gone, or another version of this package has written it
        return None


def _write(file: Path, value: object) -> None:
    part = file.with_suffix(".part")
    part.write_bytes(pickle.dumps(value))
    part.replace(file)
