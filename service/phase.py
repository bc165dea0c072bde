"""The phases of a server, shown by `/health/ready`."""

from enum import StrEnum


class Phase(StrEnum):
    """The state of a server from start to end."""

    STARTING = "starting"
    DOWNLOADING = "downloading"
    LOADING = "loading"
    COMPILING = "compiling"
    WARMING = "warming"
    READY = "ready"
    STALLED = "stalled"
    DRAINING = "draining"
    FAILED = "failed"


# An engine that answers and has work, but neither computes nor makes tokens, is stalled after this
# many times the stall timeout. An API process without a beat for as long has hung.
PATIENCE = 6
