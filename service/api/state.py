"""Our state that all requests to one application share: `app.state.service`."""

import asyncio
import math
from collections.abc import Collection, Mapping, Sequence

from starlette.datastructures import State
from starlette.requests import Request
from starlette.types import Receive, Scope, Send
from vllm.engine.protocol import EngineClient
from vllm.lora.request import LoRARequest

from service.api import metrics
from service.api.admission import Admission
from service.api.application import Deployment, Host
from service.api.bodies import Bodies
from service.api.body_budget import Budget
from service.api.cancellation import Cancellations
from service.api.contract import Contract
from service.api.engine import Engine
from service.api.health import Health
from service.api.keys import Keys
from service.api.rate_limits import RateLimits
from service.api.record import RequestRecord
from service.clients import ANYONE, Client
from service.errors import NotFound

# Default of max_waiting: this many times the sequences that run at once.
_WAITING_FACTOR = 4


class ServiceState:
    """Created when the engine runs, one for each API process."""

    # Set by `lifespan`, when all routes are registered.
    budget: Budget
    body_keys: Collection[str]  # all keys in the body schemas of vLLM's routes
    hidden: Collection[str]  # vLLM's paths that clients must not reach

    def __init__(
        self, deployment: Deployment, host: Host, client: EngineClient, state: State, processes: int
    ) -> None:
        self.deployment = deployment
        self.host = host
        self.engine_client = client
        settings = deployment.settings
        # Divide the limits among the API processes: connections are spread over them.
        vllm = client.vllm_config
        parallel = vllm.parallel_config
        # With an external or hybrid load balancer, count only this machine's data-parallel ranks.
        local_only = parallel.local_engines_only
        ranks = parallel.data_parallel_size_local if local_only else parallel.data_parallel_size
        sequences = vllm.scheduler_config.max_num_seqs * ranks
        limit = math.ceil(sequences / processes)
        waiting = settings.max_waiting
        queue = limit * _WAITING_FACTOR if waiting is None else math.ceil(waiting / processes)
        self.admission = Admission(limit, queue, settings.queue_timeout)
        self.rate_limits = RateLimits(processes)
        # Above limit + queue, so that a full queue is reported before connections run out.
        self.max_connections = settings.max_connections or max(4096, limit + queue + 512)
        self.cancellations = Cancellations()
        self.health = Health(settings.stall_timeout, settings.step_timeout)
        self.probe: asyncio.Task[None] | None = None
        self.keys: Keys | None = None
        if deployment.clients is not None:
            self.keys = Keys(deployment.clients, settings.api_key_file)
        self.traces = vllm.observability_config.otlp_traces_endpoint is not None
        self.bodies = Bodies(settings)
        self._models = state.openai_serving_models
        self.engine = Engine(client, state)
        model = deployment.model
        # Name in a request -> served name. A name that is not here is a client's text.
        self._served = {name: model.name for name in (model.name, *model.aliases)}
        self._served |= {name: name for name in model.adapters}
        self._show_clients()
        self.contract = Contract(
            model, self.engine, self.admission, self.cancellations, settings, self.adapter
        )

    async def create(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer `POST /`, as an ASGI application."""
        response = await self.contract.create(Request(scope, receive, send))
        await response(scope, receive, send)

    def served(self, name: object) -> str | None:
        """Return the name under which a request's model is counted: the YAML's, or an adapter's."""
        return self._served.get(name) if isinstance(name, str) else None

    def reload_keys(self) -> None:
        """Read the file of keys again, if it has changed."""
        if self.keys and self.keys.reload():
            self._show_clients()

    def use_keys(self, clients: Mapping[str, Client]) -> None:
        """Let these keys be the valid ones: hash -> client."""
        assert self.keys is not None  # keys are not switched on later
        self.keys.replace(clients)
        self._show_clients()

    def _show_clients(self) -> None:
        names = self.keys.names() if self.keys else {ANYONE.name}
        metrics.show(names, self._served.values())

    @property
    def model_names(self) -> Sequence[str]:
        """The model names that a request may use: the model and its LoRA adapters."""
        return [model.name for model in self._models.base_model_paths] + list(
            self._models.lora_requests
        )

    def adapter(self, name: str, record: RequestRecord) -> LoRARequest | None:
        """Return the adapter of a served name, or None for the base. Raises NotFound."""
        names = self.model_names
        record.model = self.served(name)
        if name not in names:
            raise NotFound(
                f"there is no model of this name; this server has {', '.join(names)}", param="model"
            )
        adapter: LoRARequest | None = self._models.lora_requests.get(name)
        return adapter

    @property
    def engine_dead(self) -> bool:
        """Whether the engine has died."""
        return bool(self.engine_client.errored)
