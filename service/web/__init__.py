"""The chat page, which `GET /` shows to a browser."""

import base64
import hashlib
import re
from importlib.resources import files

PAGE = files(__name__).joinpath("chat.html").read_text(encoding="utf-8")


def _hash(tag: str) -> str:
    """Return the CSP hash of the page's only element `tag`."""
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.S)
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


HEADERS = {
    "content-security-policy": (
        f"default-src 'none'; script-src {_hash('script')}; style-src {_hash('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "vary": "accept",
    "x-content-type-options": "nosniff",
}


def wants_page(accept: str | None) -> bool:
    """Whether an Accept header is from a browser that opens the page."""
    return "text/html" in (accept or "")
