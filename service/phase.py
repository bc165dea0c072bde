"""Where a server is between its first second and its last; `/health/ready` tells it."""

from enum import StrEnum


class Phase(StrEnum):
    """Where a server is between its first second and its last."""

    STARTING = "starting"
    DOWNLOADING = "downloading"
    LOADING = "loading"
    COMPILING = "compiling"
    WARMING = "warming"
    READY = "ready"
    STALLED = "stalled"
    DRAINING = "draining"
    FAILED = "failed"


# An engine that answers, has work and neither computes nor makes tokens counts as stalled after so
# many times the stall timeout; so does an API process that does not answer the supervisor.
PATIENCE = 6
