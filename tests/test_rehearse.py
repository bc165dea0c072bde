"""The upgrade rehearsal, on small made-up releases of vLLM and a small project that uses them."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from testing.rehearse import ROOT, Release, table, uses_in

OLD = {
    "__init__.py": "from vllm.engine import Engine as Engine\nfrom .args import *\n",
    "args.py": "def parse(words, *, strict=False): ...\ndef check(args): ...\n",
    "engine/__init__.py": "from .core import Engine\n",
    "engine/core.py": """
class Base:
    limit: int = 1

    def run(self, prompt): ...

    def stop(self): ...

class Engine(Base):
    def __init__(self, model, seed=0):
        self.model = model

    async def generate(self, prompt, params): ...
""",
    "registry.py": "class _Names:\n    def register(self, name): ...\n\nREGISTRY = _Names()\n",
    "lists.py": "TABLE = {}\nclass Executor: ...\n",
}
PROJECT = """
import vllm.lists
from vllm import Engine, parse
from vllm import lists as vllm_lists
from vllm.registry import REGISTRY
try:
    from vllm.common.args import check
except ImportError:
    from vllm.args import check

EXECUTOR = "vllm.lists.Executor"

class Ours(Engine):
    def run(self, prompt):
        return super().stop()

def replace(engine: Engine) -> None:
    engine.generate = None
    _replace(engine, "stop", None)
    engine.limit
    vllm_lists.TABLE["a"] = 1
    REGISTRY.register("a")
"""


def wheel(file: Path, files: dict[str, str]) -> Release:
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in files.items():
            archive.writestr(f"vllm/{name}", text)
    return Release.wheel(file)


def rehearsed(tmp_path: Path, new: dict[str, str | None], **others: str) -> tuple[list[str], int]:
    """The table of PROJECT for the release that differs from OLD by these files."""
    old = tmp_path / "site-packages"
    for name, text in OLD.items():
        path = old / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    project = tmp_path / "project"
    project.mkdir()
    for name, text in {"ours": PROJECT, **others}.items():
        (project / f"{name}.py").write_text(text)
    installed = Release.installed(old)
    files = {name: text for name, text in {**OLD, **new}.items() if text is not None}
    other = wheel(tmp_path / "vllm-2-py3-none-any.whl", files)
    return table(uses_in({"project": project}, installed), installed, other)


def test_every_name_is_found_in_the_same_release(tmp_path: Path) -> None:
    lines, gone = rehearsed(tmp_path, {})
    assert gone == 0
    assert [line.split() for line in lines[1:-1] if not line.startswith(" ")] == [
        ["same", "import", "vllm.Engine"],
        ["same", "replaced", "vllm.Engine.generate"],
        ["same", "use", "vllm.Engine.limit"],
        ["same", "overridden", "vllm.Engine.run"],
        ["same", "replaced,", "use", "vllm.Engine.stop"],
        ["same", "import", "vllm.args.check"],
        ["same", "import", "vllm.common.args.check"],
        ["same", "import", "vllm.lists"],
        ["same", "by", "name", "vllm.lists.Executor"],
        ["same", "use", "vllm.lists.TABLE"],
        ["same", "import", "vllm.parse"],
        ["same", "import", "vllm.registry.REGISTRY"],
        ["same", "use", "vllm.registry.REGISTRY.register"],
    ]


CORE = OLD["engine/core.py"]


@pytest.mark.parametrize(
    ("new", "row"),
    [
        ({"registry.py": None}, "GONE import vllm.registry.REGISTRY"),
        (
            {"registry.py": "REGISTRY = 1"},
            "changed use vllm.registry.REGISTRY.register another kind of thing",
        ),
        (
            {"engine/core.py": CORE.replace("prompt, params", "params, prompt")},
            "changed replaced vllm.Engine.generate the order of its parameters",
        ),
        (
            {"registry.py": OLD["registry.py"].replace("register", "add")},
            "GONE use vllm.registry.REGISTRY.register",
        ),
        ({"lists.py": "TABLE = {}"}, "GONE by name vllm.lists.Executor"),
        ({"lists.py": "class Executor: ..."}, "GONE use vllm.lists.TABLE"),
        (
            {"engine/core.py": CORE.replace("def stop", "def end")},
            "GONE replaced, use vllm.Engine.stop",
        ),
        (
            {"engine/core.py": CORE.replace("generate", "answer")},
            "GONE replaced vllm.Engine.generate",
        ),
        (
            {"engine/core.py": CORE.replace("run(self, prompt)", "run(self, prompt, lora=None)")},
            "changed overridden vllm.Engine.run +lora=None",
        ),
        (
            {"engine/core.py": CORE.replace("seed=0", "seed")},
            "changed import vllm.Engine seed: =0 -> ",
        ),
        (
            {"args.py": "def parse(*, words, strict=False): ...\ndef check(args): ..."},
            "changed import vllm.parse words:  -> (keyword)",
        ),
        # A module became a package, a name moved, and the old place passes it on.
        ({"lists.py": None, "lists/__init__.py": OLD["lists.py"]}, None),
        (
            {
                "engine/core.py": None,
                "engine/new.py": CORE,
                "engine/__init__.py": "from .new import *",
            },
            None,
        ),
        # It moved to where the fallback imports it from.
        (
            {
                "args.py": "def parse(words, *, strict=False): ...",
                "common/args.py": "def check(args): ...",
                "common/__init__.py": "",
            },
            None,
        ),
        ({"args.py": "def parse(words, *, strict=False): ..."}, "GONE import vllm.args.check"),
    ],
)
def test_a_difference_is_told(tmp_path: Path, new: dict[str, str | None], row: str | None) -> None:
    lines, gone = rehearsed(tmp_path, new)
    differences = [
        " ".join(f"{line} {after}".split())
        for line, after in zip(lines[1:], lines[2:], strict=False)
        if line.startswith(("GONE", "changed"))
    ]
    if row is None:
        assert differences == []
        return
    assert any(d.startswith(" ".join(row.split())) for d in differences), lines
    assert bool(gone) is row.startswith("GONE")


def test_a_fallback_in_one_file_does_not_help_another(tmp_path: Path) -> None:
    args = "def parse(words, *, strict=False): ..."
    moved: dict[str, str | None] = {"args.py": args, "common/__init__.py": ""}
    moved["common/args.py"] = "def check(args): ..."
    lines, gone = rehearsed(tmp_path, moved, bare="from vllm.args import check")
    assert gone == 1
    place = lines.index("GONE     import             vllm.args.check")
    assert lines[place + 2].strip() == "in project/bare.py"


def test_what_is_gone_is_said_to_be_elsewhere(tmp_path: Path) -> None:
    moved = OLD["lists.py"].replace("class Executor: ...", "")
    lines, _ = rehearsed(tmp_path, {"lists.py": moved, "workers.py": "class Executor: ..."})
    (place,) = [n for n, line in enumerate(lines) if "vllm.lists.Executor" in line]
    assert lines[place + 1].strip() == "now in vllm/workers.py"
    assert lines[place + 2].strip() == "in project/ours.py"


def test_the_command_installs_nothing(tmp_path: Path) -> None:
    """Also when pyproject.toml is newer than what is installed."""
    done = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "--always-make", "rehearse", "VLLM=9.9"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout.splitlines() == [".venv/bin/python -m testing.rehearse 9.9"]


def test_the_exit_status_says_whether_a_name_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "vllm-9-py3-none-any.whl"
    wheel(file, {"__init__.py": ""})
    done = subprocess.run(
        [sys.executable, "-m", "testing.rehearse", str(file)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 1, done.stderr
    assert "vllm.ModelRegistry" in done.stdout
