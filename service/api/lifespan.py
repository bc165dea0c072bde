"""What begins before the application accepts anyone, and ends with it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.routing import Route
from vllm.envs import enable_envs_cache

from service.api import connection
from service.api.body_budget import Budget
from service.api.state import ServiceState
from service.api.watch import Watch

# Routes of vLLM's that are not for clients: they change the engine that everybody uses.
_ELASTIC = frozenset({"/scale_elastic_ep", "/is_scaling_elastic_ep"})
# Where vLLM's scale-out routes are off, as here, it has routes in their place that say so.
_DISABLED = "disabled_scale_out"


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Runs after the server is configured, while all routes are there. Raises ServiceError."""
    service: ServiceState = app.state.service
    settings = service.deployment.settings
    service.hidden = frozenset() if app.state.args.enable_elastic_ep else _ELASTIC
    service.hidden |= {
        route.path for route in app.routes if isinstance(route, Route) and route.name == _DISABLED
    }
    service.budget = Budget(
        app.routes, settings.max_items, service.engine.context, service.engine.max_characters
    )
    schemas = app.openapi()["components"]["schemas"].values()
    service.body_keys = {key for schema in schemas for key in schema.get("properties", ())}
    connection.guard(app.state.server.config, settings, service.max_connections)
    watch = Watch(
        service.engine_client,
        service.health,
        service.admission,
        service.cancellations,
        service.keys,
        settings,
        app.state.server,
        service.host,
    )
    watching = asyncio.create_task(watch.run())  # signals are handled from here on
    enable_envs_cache()  # vLLM asks for its variables some forty times a request
    await asyncio.to_thread(service.host.take_over)
    try:
        yield
    finally:
        watching.cancel()
