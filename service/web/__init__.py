"""The chat page, which `GET /` shows to a browser: one document, with nothing beside it."""

import base64
import hashlib
import re
from importlib.resources import files

_FILES = files(__name__)
# Unchanged from dist/browser of the npm package markdown-it 15.0.3. Its licences are beside it, and
# a test knows its hash.
_LIBRARY = "markdown-it.umd.min.js"


def _read(name: str) -> str:
    return _FILES.joinpath(name).read_bytes().decode()


PAGE = _read("chat.html").replace(
    f'<script src="{_LIBRARY}"></script>', f"<script>{_read(_LIBRARY)}</script>"
)


def _hashes(tag: str) -> str:
    """Return the CSP hashes of the page's elements `tag`."""
    return " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.S)
    )


HEADERS = {
    "content-security-policy": (
        f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}; "
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
