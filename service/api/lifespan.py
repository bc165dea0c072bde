"""The lifespan of our part of the application."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI
from starlette.routing import Route
from vllm.envs import disable_envs_cache, enable_envs_cache

from service.api import connection
from service.api.body_budget import Budget
from service.api.state import ServiceState
from service.api.watch import Watch

# vLLM's routes that clients must not reach: they change the engine for all clients.
_ELASTIC = frozenset({"/scale_elastic_ep", "/is_scaling_elastic_ep"})
# Name of the placeholder routes that vLLM adds where its scale-out routes are off, as here.
_DISABLED = "disabled_scale_out"


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Starts once the server is configured and all routes are registered. Raises ServiceError."""
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
    if isinstance(app.state.server, uvicorn.Server):  # a replica of a cluster has none of its own

        def route_of(path: str) -> str:
            path = path.removeprefix(app.root_path) or "/"
            return "/" if path in service.deployment.model.routes else path

        config = app.state.server.config
        connection.guard(config, settings, service.max_connections, route_of)
    watch = Watch(service, app.state.server)
    watch_task = asyncio.create_task(watch.run())  # from here on our signal handlers are set
    enable_envs_cache()  # vLLM reads environment variables some forty times a request
    try:
        await asyncio.to_thread(service.host.take_over)
        yield
    finally:
        watch_task.cancel()
        disable_envs_cache()
