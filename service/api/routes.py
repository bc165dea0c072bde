"""Our routes beside `POST /`: the chat page and the health checks. `gate` calls them.

They replace vLLM's own routes at the same paths.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from service import web
from service.api.record import RequestRecord
from service.api.schema import OPENAPI
from service.api.state import ServiceState
from service.errors import RequestError
from service.phase import Phase

# vLLM's name of each sampling default -> its name in a request.
_SAMPLING = {
    "max_tokens": "max_new_tokens",
    **{key: key for key in ("temperature", "top_p", "top_k", "repetition_penalty")},
}


async def index(request: Request) -> Response:
    """The chat page, or an object with the model, its sampling defaults, and the routes."""
    if web.wants_page(request.headers.get("accept")):
        return HTMLResponse(web.PAGE, headers=web.HEADERS)
    service: ServiceState = request.app.state.service
    model = service.deployment.model
    defaults = service.engine.defaults
    routes: dict[str, set[str]] = {path: {"GET", "HEAD"} for path in ROUTES}
    for path in ("/", *model.routes):
        routes.setdefault(path, set()).add("POST")
    for route in request.app.routes:
        if isinstance(route, Route) and route.path not in {*ROUTES, *service.hidden}:
            routes.setdefault(route.path, set()).update(route.methods or ())
    return JSONResponse(
        {
            "model": model.default_adapter or model.name,
            "style": model.prompt.style,
            "think": model.answer.think,
            "sampling": {name: defaults[key] for key, name in _SAMPLING.items() if key in defaults},
            "asks_for_key": service.keys is not None,
            "routes": {path: sorted(methods) for path, methods in sorted(routes.items())},
        },
        headers={"vary": "accept"},
    )


async def live(request: Request) -> Response:
    """200 as long as the process answers"""
    return JSONResponse({"status": "alive"})


async def health(request: Request) -> Response:
    """200 when the engine works, 503 when it is dead or stalled"""
    service: ServiceState = request.app.state.service
    healthy = service.health.phase in (Phase.READY, Phase.DRAINING) and not service.engine_dead
    return Response(status_code=200 if healthy else 503)


async def ready(request: Request) -> Response:
    """200 when requests are answered; else 503 and the phase"""
    service: ServiceState = request.app.state.service
    phase = Phase.FAILED if service.engine_dead else service.health.phase
    body: dict[str, object] = {
        "status": phase.value,
        "model": service.deployment.model.name,
        "instance": service.deployment.instance,
    }
    if phase is Phase.READY:
        if seconds := service.health.step_seconds:
            body["step_seconds"] = round(seconds, 1)
        return JSONResponse(body)
    RequestRecord.of(request.scope).error = phase.value
    return JSONResponse(body, 503)


async def generate(request: Request) -> Response:
    """200 when the engine has just made one token

    It bypasses the queue, so it works on a full server. Concurrent checks share one token.
    """
    service: ServiceState = request.app.state.service
    if service.probe is None or service.probe.done():
        service.probe = asyncio.create_task(service.engine.make_one_token())
    timeout = service.deployment.settings.stall_timeout * 3
    try:
        async with asyncio.timeout(timeout):
            await asyncio.shield(service.probe)
        return JSONResponse({"status": "generated"})
    except TimeoutError:
        reason = f"no token within {timeout:g} s"
    except RequestError as e:
        reason = e.message
    RequestRecord.of(request.scope).error = "no_token"
    return JSONResponse({"status": reason}, 503)


# Each answers GET and HEAD, which many health checkers send.
ROUTES: dict[str, Callable[[Request], Awaitable[Response]]] = {
    "/": index,
    "/health": health,
    "/health/generate": generate,
    "/health/live": live,
    "/health/ready": ready,
    "/ping": health,
}


def describe(schema: dict[str, Any], aliases: Collection[str]) -> None:
    """Add our routes to the application's OpenAPI schema; `aliases` answer like `POST /`."""
    for path, handler in ROUTES.items():
        summary = (handler.__doc__ or "").partition("\n")[0].rstrip(".")
        responses = {"200": {"description": "It is well"}}
        if handler not in (index, live):
            responses["503"] = {"description": "It is not"}
        schema["paths"][path] = {
            "get": {"summary": summary, "operationId": handler.__name__, "responses": responses}
        }
    for path in ("/", *aliases):
        name = "_".join(["create", *path.strip("/").split("/")]).strip("_")
        create = {"summary": "Answer one prompt", "operationId": name, **OPENAPI}
        schema["paths"].setdefault(path, {})["post"] = create
