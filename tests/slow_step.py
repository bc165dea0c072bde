"""A plugin of vLLM that makes one step of the engine slow, or hang, when a test says so.

It is installed for one server: `environment` gives the variables with which vLLM finds it.
"""

import os
import time
from pathlib import Path

_VARIABLE = "TEST_NEXT_STEP"  # names the file with "compute SECONDS" or "sleep SECONDS"


def environment(folder: Path) -> dict[str, str]:
    """Install the plugin below `folder`, for a server with these variables."""
    installed = folder / "slow_step-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: slow-step\nVersion: 1\n")
    (installed / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nslow_step = tests.slow_step:register\n"
    )
    paths = [str(folder), str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), _VARIABLE: str(folder / "step")}


def make_next_step(folder: Path, how: str, seconds: float) -> None:
    """The next step of the server with `folder`: "compute" or "sleep" for so long first."""
    (folder / "step").write_text(f"{how} {seconds}")


def register() -> None:
    """Called by vLLM in each of its processes."""
    from vllm.v1.worker.gpu_worker import Worker

    file = Path(os.environ[_VARIABLE])
    execute = Worker.execute_model

    def slow(self: object, *args: object, **kwargs: object) -> object:
        if file.exists():
            how, seconds = file.read_text().split()
            file.unlink()
            if how == "sleep":
                time.sleep(float(seconds))
            end = time.monotonic() + float(seconds)
            while how == "compute" and time.monotonic() < end:
                pass
        return execute(self, *args, **kwargs)

    Worker.execute_model = slow
