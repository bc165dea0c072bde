"""What `GET /` shows: the chat page to a browser, and to programs what there is, as JSON."""

import base64
import hashlib
import re
from importlib.resources import files

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

PAGE = files(__name__).joinpath("chat.html").read_text(encoding="utf-8")
# What the model's defaults are called in a request.
_SAMPLING = {
    "max_tokens": "max_new_tokens",
    **{key: key for key in ("temperature", "top_p", "top_k", "repetition_penalty")},
}


def _hash(tag: str) -> str:
    """The CSP source of the page's only element of this kind."""
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
    """Whether an Accept header is a browser's that opens the address."""
    return "text/html" in (accept or "")


def index(
    request: Request, *, model: str, style: str, defaults: dict[str, object], asks_for_key: bool
) -> Response:
    """The chat page, or an object with the model, its sampling defaults, and the routes."""
    if wants_page(request.headers.get("accept")):
        return HTMLResponse(PAGE, headers=HEADERS)
    app: Starlette = request.app
    routes: dict[str, set[str]] = {}
    for route in app.routes:
        if isinstance(route, Route):
            routes.setdefault(route.path, set()).update(route.methods or ())
    return JSONResponse(
        {
            "model": model,
            "style": style,
            "sampling": {name: defaults[key] for key, name in _SAMPLING.items() if key in defaults},
            "asks_for_key": asks_for_key,
            "routes": {path: sorted(methods) for path, methods in sorted(routes.items())},
        },
        headers={"vary": "accept"},
    )
