"""The environment of Ray's processes, which their node's first process hands on.

Ray reads it when it is imported. `chat-service cluster` sets it for the cluster that it starts;
where `ray start` makes a cluster, `chat-service cluster --environment` prints it.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from service.cluster.config import DEREGISTER_SECONDS

VARIABLES = {
    # HAProxy in front of the replicas, instead of a proxy in Python.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # A replica's engine ends with it. Otherwise it would keep its GPU.
    "RAY_process_group_cleanup_enabled": "1",
    # One event loop in a replica, and gRPC between the front and a replica: half the CPU time.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # Seconds that a replica stays reachable while HAProxy leaves it out.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DEREGISTER_SECONDS),
    # Seconds between two looks at HAProxy, which is started again after three that find none.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
    # Seconds that a client may send nothing in the middle of a long body.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
    # Seconds that a replaced HAProxy has for what it still answers: each change of replicas starts
    # a new one. Ray keeps the ports of ended replicas for 30 s more than that, because the old one
    # may still send there. In a day, replicas that end often would use up the 1000 of a node.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",
    # Failed connections after which it leaves a replica out. A HAProxy that was replaced still has
    # idle connections of clients, and knows only the replicas of its time. When it has left these
    # out, it uses Ray's own proxy.
    "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    # A request is sent again, twice at most, whose front or replica died before it answered.
    # HAProxy can send only what it had read in full before. So it is HAProxy that must limit how
    # long a client sends. Ray has no setting for these two options, so they come with this one, as
    # lines of their own in HAProxy's file.
    "RAY_SERVE_HAPROXY_RETRY_ON": (
        "conn-failure empty-response\noption http-buffer-request\ntimeout http-request 30s"
    ),
    "RAY_SERVE_HAPROXY_RETRIES": "2",
    # Seconds between two reports of a replica's load, from which Serve decides how many there are.
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
    # Bytes. gRPC's default of 4 MiB is less than the longest body with its headers.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
    # At 95 % of a machine's memory Ray would end controller, fronts and replicas, whoever uses it.
    # The kernel ends the largest process, when there is none left.
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# Without these, requests and engines get lost, or Ray runs what anybody sends it.
NEEDED = {
    name: VARIABLES[name]
    for name in (
        "RAY_SERVE_ENABLE_HA_PROXY",
        "RAY_process_group_cleanup_enabled",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED",
        "RAY_AUTH_MODE",
    )
}
_FILE = "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"
# Only for a cluster on this machine: its processes print less, and its files are in its folder
# instead of /tmp, so that those of a process that was killed go with it.
_ALONE = {
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "PYTHONWARNINGS": "ignore",
    "TMPDIR": "{folder}/t",
    _FILE: "{folder}/h/haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "{folder}/h/admin.sock",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "{folder}/h/metrics.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "{folder}/h",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "{folder}/h/server-state",
}


def prepare(folder: str | None) -> None:
    """Set the variables that are not set. Must run before Ray is imported.

    `folder` is that of a cluster on this machine, for its files.
    """
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    if folder is not None:
        os.environ |= {name: value.format(folder=folder) for name, value in _ALONE.items()}
        Path(os.environ["TMPDIR"]).mkdir()


def folder_of(variables: Mapping[str, str]) -> str | None:
    """Return the folder of the cluster to which a process with these variables belongs."""
    file = variables.get(_FILE)
    return str(Path(file).parent.parent) if file else None
