"""What the models of a cluster need of its nodes, and what vLLM says of their YAMLs."""

import sys

from service.cluster.config import Cluster
from service.errors import ServiceError


def resources(kind: str, *, free: bool = False) -> float:
    """Return how much of "CPU", "GPU" or "memory" (bytes) all nodes have, or have free."""
    import ray

    resources = ray.available_resources() if free else ray.cluster_resources()
    return float(resources.get(kind, 0))


def lacking(cluster: Cluster) -> list[str]:
    """Return which resources the smallest number of replicas lacks in the whole cluster."""
    has_gpus = resources("GPU") > 0
    models = cluster.models.values()
    names = {"CPU": ("cores", "cpus"), "GPU": ("GPUs", "gpus")}
    problems = [
        f"all replicas need {need:g} {names[kind][0]}, and the cluster has {resources(kind):g}: "
        f"lower `{names[kind][1]}` or `replicas`, or add a node"
        for kind, need in _needs(cluster).items()
        if need > resources(kind)
    ]
    memory = resources("memory") / 2**30
    weights = sum(
        m.min_replicas * (m.config.about.weights_gib("float32") or 0)
        for m in models
        if not m.gpus_of_replica(has_gpus=has_gpus)
    )
    if weights > memory:
        problems.append(
            f"the weights of all replicas on CPUs need about {weights:.0f} GiB, and the cluster "
            f"has {memory:.0f}"
        )
    return problems


def surging(cluster: Cluster, before: Cluster) -> set[str]:
    """Return the models of which one more replica fits beside what the update adds."""
    now, then = _needs(cluster), _needs(before)
    free = {
        kind: resources(kind, free=True) - max(0, now[kind] - then[kind]) for kind in ("CPU", "GPU")
    }
    has_gpus = resources("GPU") > 0
    return {
        name
        for name, model in cluster.models.items()
        if model.cpus <= free["CPU"] and model.gpus_of_replica(has_gpus=has_gpus) <= free["GPU"]
    }


def _needs(cluster: Cluster) -> dict[str, float]:
    """Return the cores and GPUs of the smallest number of replicas."""
    has_gpus = resources("GPU") > 0
    models = cluster.models.values()
    return {
        "CPU": sum(m.min_replicas * m.cpus for m in models),
        "GPU": sum(m.min_replicas * m.gpus_of_replica(has_gpus=has_gpus) for m in models),
    }


def refused(cluster: Cluster) -> list[str]:
    """Return what vLLM does not accept of a model's YAML, asked on a node of the cluster."""
    import ray

    @ray.remote(num_cpus=0)
    def refused() -> list[str]:
        from service import vllm_arguments

        for model in cluster.models.values():
            try:
                vllm_arguments.arguments(model.config, model.origins, cluster.settings)
            except ServiceError as e:
                return [f"{model.name}: {e}"]
        return []

    print("Asking vLLM, which takes a while to import ...", file=sys.stderr, flush=True)
    reasons: list[str] = ray.get(refused.remote())
    return reasons
