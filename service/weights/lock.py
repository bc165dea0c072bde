"""One process at a time, whatever kills it: the kernel drops the lock with its holder."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def locked(file: Path, name: str) -> Iterator[None]:
    """Hold the lock `file`, waiting for another process that fetches `name`. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"Waiting for {name}, which is being fetched ...", file=sys.stderr, flush=True)
        lock.acquire()
    with lock:  # counted: the one above is released with it
        lock.release()
        yield
