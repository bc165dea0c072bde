"""Lets a process end with its parent, as Linux offers it."""

import ctypes
import os
import signal

# The pid of the process whose children shall end with it.
VARIABLE = "CHAT_SERVICE_END_WITH"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, if `VARIABLE` names that.

    An engine whose parent was killed goes on otherwise (vLLM 0.32), and keeps its GPU.
    """
    parent = int(os.environ.get(VARIABLE, 0))
    if parent in (0, os.getpid()):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:  # it has ended already
        os._exit(1)
