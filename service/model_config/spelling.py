"""Finds the valid name that is nearest to a wrong one."""

import difflib
from collections.abc import Iterable


def nearest(name: str, valid: Iterable[str], prefix: str = "", *, cutoff: float = 0.6) -> str:
    """Return "; did you mean X?" with `prefix` and the closest valid name, or an empty string."""
    names = list(valid)
    close = [longer for longer in names if name and longer.startswith(str(name))]
    close = close or difflib.get_close_matches(str(name), names, n=1, cutoff=cutoff)
    return f"; did you mean {prefix + close[0]!r}?" if close else ""
