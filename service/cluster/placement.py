"""What the models of a cluster need of its nodes, and what vLLM says of their YAMLs."""

import sys

from service.cluster.config import Cluster, ClusterModel
from service.errors import ServiceError


def resources(kind: str, *, free: bool = False) -> float:
    """Return how much of "CPU", "GPU" or "memory" (bytes) all nodes have, or have free."""
    import ray

    resources = ray.available_resources() if free else ray.cluster_resources()
    return float(resources.get(kind, 0))


def lacking(cluster: Cluster) -> list[str]:
    """Return which resources the smallest number of replicas lacks."""
    has_gpus = resources("GPU") > 0
    models = cluster.models.values()
    problems = []
    for kind, (what, key) in {"CPU": ("cores", "cpus"), "GPU": ("GPUs", "gpus")}.items():
        need, largest = _needs(cluster)[kind], _largest(kind)
        if need > resources(kind):
            problems.append(
                f"all replicas need {need:g} {what}, and the cluster has {resources(kind):g}: "
                f"lower `{key}` or `replicas`, or add a node"
            )
            continue
        problems += [
            f"{m.name}: a replica needs {each:g} {what} of one node, and no node has more than "
            f"{largest:g}: lower `{key}`, or add a larger node"
            for m in models
            if (each := _of_replica(m, kind, has_gpus=has_gpus)) > largest
        ]
    memory = resources("memory") / 2**30
    # At least: a CPU without instructions for the type takes float32.
    weights = sum(
        m.min_replicas
        * (m.config.about.weights_gib(m.config.engine.get("dtype") or m.config.dtype) or 0)
        for m in models
        if not (m.gpus_of_replica(has_gpus=has_gpus) or m.config.engine.get("quantization"))
    )
    if weights > memory:
        problems.append(
            f"the weights of all replicas on CPUs need {weights:.0f} GiB or more, and the cluster "
            f"has {memory:.0f}"
        )
    return problems


def surging(cluster: Cluster, before: Cluster) -> set[str]:
    """Return the models of which one more replica fits on a node, beside what the update adds."""
    from ray._private.state import available_resources_per_node

    now, then = _needs(cluster), _needs(before)
    free = {
        kind: resources(kind, free=True) - max(0, now[kind] - then[kind]) for kind in ("CPU", "GPU")
    }
    nodes = available_resources_per_node().values()
    has_gpus = resources("GPU") > 0

    def fits(model: ClusterModel, room: dict[str, float]) -> bool:
        return all(_of_replica(model, k, has_gpus=has_gpus) <= room.get(k, 0) for k in free)

    return {
        name
        for name, model in cluster.models.items()
        if fits(model, free) and any(fits(model, node) for node in nodes)
    }


def _needs(cluster: Cluster) -> dict[str, float]:
    """Return the cores and GPUs of the smallest number of replicas."""
    has_gpus = resources("GPU") > 0
    return {
        kind: sum(
            m.min_replicas * _of_replica(m, kind, has_gpus=has_gpus)
            for m in cluster.models.values()
        )
        for kind in ("CPU", "GPU")
    }


def _of_replica(model: ClusterModel, kind: str, *, has_gpus: bool) -> float:
    """Return the cores or the GPUs of one replica."""
    return model.cpus if kind == "CPU" else model.gpus_of_replica(has_gpus=has_gpus)


def _largest(kind: str) -> float:
    """Return the most that one node has of "CPU" or "GPU"."""
    import ray

    nodes = (node["Resources"].get(kind, 0) for node in ray.nodes() if node["Alive"])
    return float(max(nodes, default=0))


def refused(cluster: Cluster) -> list[str]:
    """Return what vLLM does not accept of a model's YAML, asked on a node of the cluster."""
    import ray

    @ray.remote(num_cpus=0)
    def ask_vllm() -> list[str]:
        from service.launch import server

        reasons = []
        for model in cluster.models.values():
            try:
                with server.prepared(model.config, model.origins, cluster.settings):
                    pass
            except ServiceError as e:
                reasons.append(f"{model.name}: {e}")
        return reasons

    print("Asking vLLM, which takes a while to import ...", file=sys.stderr, flush=True)
    reasons: list[str] = ray.get(ask_vllm.remote())
    return reasons
