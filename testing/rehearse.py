"""What a release of vLLM would break here, without installing it: `make rehearse VLLM=0.33.0`.

Reads every name of vLLM that this project imports, calls, overrides or replaces, and looks each up
in the installed version and in the wheel of the other one. Nothing of either is run. It does not
see what reaches a name at run time: attributes of objects that are not annotated, log texts, and
arguments on a command line.
"""

import ast
import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import NamedTuple, Self

PACKAGE = "vllm"
ROOT = Path(__file__).parent.parent
FOLDERS = ("service", "benchmarks", "tests", "testing")
DOTTED = re.compile(rf"{PACKAGE}(\.\w+)+")
IMPORT = re.compile(rf"^ *(?:from|import) ({PACKAGE}[\w.]*)(?: import (\w+))?$", re.MULTILINE)
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Found(NamedTuple):
    """A definition, and the module it stands in; the node of a module is an ast.Module."""

    module: str
    node: ast.AST


class Release:
    """One version of vLLM as source text: a folder or a wheel that holds the package."""

    def __init__(self, root: Path | zipfile.Path, files: Iterable[str]) -> None:
        self.root = root
        self.files = [f for f in files if f.startswith(f"{PACKAGE}/") and f.endswith(".py")]
        self.module = cache(self._module)

    @classmethod
    def installed(cls, site_packages: Path) -> Self:
        """The one in a folder of installed packages."""
        files = (site_packages / PACKAGE).rglob("*.py")
        return cls(site_packages, (str(file.relative_to(site_packages)) for file in files))

    @classmethod
    def wheel(cls, file: Path) -> Self:
        """The one in a wheel."""
        archive = zipfile.ZipFile(file)
        return cls(zipfile.Path(archive), archive.namelist())

    def _module(self, name: str) -> ast.Module | None:
        path = name.replace(".", "/")
        for candidate in (f"{path}.py", f"{path}/__init__.py"):
            file = self.root / candidate
            if file.is_file():
                return ast.parse(file.read_text(encoding="utf-8"), candidate)
        return None

    def find(self, name: str) -> Found | None:
        """What a dotted name stands for, re-exports followed; None: there is no such name."""
        parts = name.split(".")
        found: Found | None = None
        for count, part in enumerate(parts, 1):
            prefix = ".".join(parts[:count])
            if count == 1 or (found and isinstance(found.node, ast.Module)):
                module = self.module(prefix)
                # A name in a package comes before its submodule of the same name.
                member = self._member(found, part) if found else None
                found = member or (Found(prefix, module) if module else None)
            elif found:
                found = self._member(found, part)
            if found is None:
                return None
        return found

    def _member(self, owner: Found, name: str) -> Found | None:
        if isinstance(owner.node, ast.Module):
            return self._in_module(owner.module, name)
        if isinstance(owner.node, ast.ClassDef):
            for holder in self.classes(owner):
                assert isinstance(holder.node, ast.ClassDef)
                for statement in _definitions(holder.node.body, name):
                    return Found(holder.module, statement)
                for node in ast.walk(holder.node):
                    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                        if node.attr == name and _dotted(node.value) == "self":
                            return Found(holder.module, node)
            return None
        if isinstance(owner.node, ast.Assign | ast.AnnAssign):  # an object: of which class?
            value = owner.node.value
            source = value.func if isinstance(value, ast.Call) else None
            if isinstance(owner.node, ast.AnnAssign):
                source = owner.node.annotation
            made = self._named(owner.module, _dotted(source)) if source else None
            if made and isinstance(made.node, ast.ClassDef):
                return self._member(made, name)
        return owner  # nothing says what it holds

    def _in_module(
        self, module: str, name: str, seen: frozenset[str] = frozenset()
    ) -> Found | None:
        tree = self.module(module)
        if tree is None or module in seen:
            return None
        for node in _definitions(tree.body, name):
            if not isinstance(node, ast.ImportFrom):
                return Found(module, node)
            source = _source(node, module, self.is_package(module))
            for alias in node.names:
                if alias.name == "*":
                    if found := self._in_module(source, name, seen | {module}):
                        return found
                elif (alias.asname or alias.name) == name:
                    if not source.startswith(PACKAGE):
                        return Found(module, node)  # of another package
                    if found := self._in_module(source, alias.name, seen | {module}):
                        return found
                    if submodule := self.module(f"{source}.{alias.name}"):
                        return Found(f"{source}.{alias.name}", submodule)
        return None

    def is_package(self, module: str) -> bool:
        return bool((self.root / module.replace(".", "/") / "__init__.py").is_file())

    def _named(self, module: str, name: str | None) -> Found | None:
        """A name as it is written in `module`."""
        first, _, rest = (name or "").partition(".")
        found: Found | None = self._in_module(module, first) if first else None
        for part in rest.split(".") if rest else ():
            found = self._member(found, part) if found else None
        return found

    def classes(self, owner: Found) -> Iterator[Found]:
        """A class and those it derives from, as far as they are vLLM's."""
        yield owner
        assert isinstance(owner.node, ast.ClassDef)
        for base in owner.node.bases:
            name = _dotted(base.value if isinstance(base, ast.Subscript) else base)
            found = self._named(owner.module, name)
            if found and isinstance(found.node, ast.ClassDef) and found != owner:
                yield from self.classes(found)

    def signature(self, found: Found) -> dict[str, str] | None:
        """Parameter -> its kind and default, of a function or of what makes a class's objects."""
        node = found.node
        if isinstance(node, ast.ClassDef):
            made = self._member(found, "__init__")
            if made is None or not isinstance(made.node, Function):
                return {
                    item.target.id: "=" if item.value else ""
                    for holder in reversed([*self.classes(found)])
                    for item in getattr(holder.node, "body", ())
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                }
            node = made.node
        if not isinstance(node, Function):
            return None
        return _parameters(node.args)

    def elsewhere(self, name: str) -> list[str]:
        """The files that define a function or class of this name."""
        last = name.rpartition(".")[2]
        pattern = re.compile(rf"^(?:class|def|async def) {re.escape(last)}\b", re.MULTILINE)
        return [
            path
            for path in self.files
            if pattern.search((self.root / path).read_text(encoding="utf-8"))
        ]


@dataclass
class Use:
    """A name of vLLM here: what for and where, and the other names that would do instead.

    `bare` are the files that import it with no `except ImportError` around it.
    """

    name: str
    how: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)
    instead: set[str] = field(default_factory=set)
    bare: set[str] = field(default_factory=set)


class Reader(ast.NodeVisitor):
    """Collects the names of vLLM in one of our files."""

    def __init__(self, file: str, uses: dict[str, Use], installed: Release) -> None:
        self.file = file
        self.uses = uses
        self.installed = installed
        self.known: dict[str, str] = {}  # a name in this file -> the vLLM name it stands for
        self.guarded = False  # inside a `try` with an `except ImportError`
        self.fallback: dict[str, str] | None = None  # what that one imports anew

    def note(self, name: str, how: str) -> None:
        use = self.uses.setdefault(name, Use(name))
        use.how.add(how)
        use.files.add(self.file)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] == PACKAGE:
                self.note(alias.name, "import")
                top = alias.name if alias.asname else PACKAGE
                self.known[alias.asname or PACKAGE] = top

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level or (node.module or "").split(".")[0] != PACKAGE:
            return
        for alias in node.names:
            name, local = f"{node.module}.{alias.name}", alias.asname or alias.name
            self.note(name, "import")
            if not self.guarded:
                self.uses[name].bare.add(self.file)
            if self.fallback is not None and (first := self.fallback.get(local)):
                self.uses[first].instead.add(name)
                self.uses[name].instead.add(first)
            if not self.installed.find(self.known.get(local, "")):
                self.known[local] = name

    def visit_Try(self, node: ast.Try) -> None:
        caught = [ast.unparse(handler.type) for handler in node.handlers if handler.type]
        self.guarded = any(re.search("ImportError|ModuleNotFoundError", name) for name in caught)
        for statement in node.body:
            self.visit(statement)
        self.fallback = dict(self.known) if self.guarded else None
        for handler in node.handlers:
            self.visit(handler)
        self.fallback, self.guarded = None, False
        for statement in (*node.orelse, *node.finalbody):
            self.visit(statement)

    def visit_Constant(self, node: ast.Constant) -> None:
        if not isinstance(node.value, str):
            return
        if DOTTED.fullmatch(node.value) and self.installed.find(node.value):
            self.note(node.value, "by name")
        for module, name in IMPORT.findall(node.value):  # a program that a test runs
            imported = ".".join(filter(None, (module, name)))
            if self.installed.find(imported):
                self.note(imported, "import")

    def visit_Tuple(self, node: ast.Tuple) -> None:
        words = [item.value for item in node.elts if isinstance(item, ast.Constant)]
        if len(words) == 2 and all(isinstance(word, str) for word in words):
            if DOTTED.fullmatch(str(words[0])) and self.installed.find(".".join(map(str, words))):
                self.note(".".join(map(str, words)), "by name")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        if isinstance(node.value, ast.Call) and isinstance(node.targets[0], ast.Name):
            made = self.meant(node.value.func)
            found = self.installed.find(made) if made else None
            if made and found and isinstance(found.node, ast.ClassDef):
                self.known[node.targets[0].id] = made

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if name := self.meant(node):
            self.note(name, "replaced" if isinstance(node.ctx, ast.Store) else "use")
        else:
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        match node:  # of `_replace` in service/models/vllm_private.py
            case ast.Call(
                func=ast.Name("_replace"), args=[ast.expr() as owner, ast.Constant(str(name)), _]
            ):
                self.visit_Attribute(ast.Attribute(owner, name, ast.Store()))
        self.generic_visit(node)

    def meant(self, node: ast.AST) -> str | None:
        """The vLLM name that an expression stands for."""
        first, _, rest = (_dotted(node) or "").partition(".")
        if first not in self.known:
            return None
        name = ".".join([self.known[first], *filter(None, [rest])])
        while not self.installed.find(name) and name != self.known[first]:
            name = name.rpartition(".")[0]  # an attribute of an object that nothing describes
        return name

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._function(node)

    def _function(self, node: Function) -> None:
        outside = dict(self.known)
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            self.known.pop(argument.arg, None)
            if argument.annotation and (of := self.meant(argument.annotation)):
                self.known[argument.arg] = of
        self.generic_visit(node)
        self.known = outside

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for base in filter(None, map(self.meant, node.bases)):
            self.known[node.name] = base
            attributes = [n for n in ast.walk(node) if isinstance(n, ast.Attribute)]
            inside = {n.attr for n in attributes if _dotted(n.value) in ("self", "super()")}
            defined = {name for item in node.body for name in _names(item)}
            for name in sorted(inside | defined):
                if self.installed.find(f"{base}.{name}"):
                    self.note(f"{base}.{name}", "overridden" if name in defined else "use")
        outside = dict(self.known)
        self.generic_visit(node)
        self.known = outside


def uses_in(folders: Mapping[str, Path], installed: Release) -> list[Use]:
    """The names of vLLM in the Python files of these folders."""
    uses: dict[str, Use] = {}
    for label, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            reader = Reader(f"{label}/{path.relative_to(folder)}", uses, installed)
            reader.visit(ast.parse(path.read_text(encoding="utf-8")))
    return sorted(uses.values(), key=lambda use: use.name)


def compare(use: Use, installed: Release, other: Release) -> tuple[str, str]:
    """The state of one name in the other version, and what there is to know about it."""
    new, old = other.find(use.name), installed.find(use.name)
    if new is None:
        there = [name for name in sorted(use.instead) if other.find(name)]
        if there and not use.bare:
            return "same", f"imported from {there[0].rpartition('.')[0]} instead"
        places = other.elsewhere(use.name)[:3]
        return "GONE", f"now in {', '.join(places)}" if places else ""
    if old is None:
        return "same", "not in the installed version, where another import stands for it"
    before, after = installed.signature(old), other.signature(new)
    if before is None or after is None:
        return ("same", "") if before is after else ("changed", "another kind of thing")
    if [*before.items()] == [*after.items()]:
        return "same", ""
    difference = [f"-{name}" for name in before if name not in after]
    difference += [f"+{name}{kind}" for name, kind in after.items() if name not in before]
    both = [name for name in before if name in after]
    difference += [f"{n}: {before[n]} -> {after[n]}" for n in both if before[n] != after[n]]
    return "changed", " ".join(difference) or "the order of its parameters"


def table(uses: list[Use], installed: Release, other: Release) -> tuple[list[str], int]:
    """The lines of the table, and how many names are gone."""
    rows = [(*compare(use, installed, other), use) for use in uses]
    rows.sort(key=lambda row: (("GONE", "changed", "same").index(row[0]), row[2].name))
    lines = [f"{'state':8} {'how':18} name"]
    counts: dict[str, int] = defaultdict(int)
    for state, remark, use in rows:
        counts[state] += 1
        lines.append(f"{state:8} {', '.join(sorted(use.how)):18} {use.name}")
        if remark:
            lines.append(f"{'':28}{remark}")
        if state != "same":
            files = use.bare if state == "GONE" and use.bare else use.files
            lines.append(f"{'':28}in {', '.join(sorted(files))}")
    lines.append("  ".join(f"{counts[state]} {state}" for state in ("GONE", "changed", "same")))
    return lines, counts["GONE"]


def _definitions(body: list[ast.stmt], name: str) -> Iterator[ast.stmt]:
    """The statements that may bind `name`, the last first; those inside `if` and `try` too."""
    for node in reversed(body):
        if name in _names(node):
            yield node
        elif isinstance(node, ast.If | ast.Try | ast.With):
            inner = [*node.body, *getattr(node, "orelse", [])]
            handlers = [s for h in getattr(node, "handlers", []) for s in h.body]
            yield from _definitions([*handlers, *inner], name)
        elif isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names):
            yield node


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, Function | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name.split(".")[0] for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [n.id for t in targets if t for n in ast.walk(t) if isinstance(n, ast.Name)]


def _dotted(node: ast.AST | None) -> str | None:
    text = ast.unparse(node).strip("'\"") if node else ""
    return text if re.fullmatch(r"[\w.]+|super\(\)", text) else None


def _source(node: ast.ImportFrom, module: str, package: bool) -> str:
    """The absolute name of the module that a `from ... import` in `module` reads."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + package]
    return ".".join([*parts, *filter(None, [node.module])])


def _parameters(arguments: ast.arguments) -> dict[str, str]:
    ordered = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(ordered) - len(arguments.defaults)) + list(arguments.defaults)
    found = {
        a.arg: f"={ast.unparse(d)}" if d else "" for a, d in zip(ordered, defaults, strict=True)
    }
    if arguments.vararg:
        found[f"*{arguments.vararg.arg}"] = ""
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found[argument.arg] = "(keyword)" + (f"={ast.unparse(default)}" if default else "")
    if arguments.kwarg:
        found[f"**{arguments.kwarg.arg}"] = ""
    return found


def main(wanted: str) -> int:
    """Print the table for a version or a wheel; 1 when a name is gone, 2 when there is no wheel."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        print("vLLM is not installed: run `make install`", file=sys.stderr)
        return 2
    installed = Release.installed(Path(spec.origin).parent.parent)
    with tempfile.TemporaryDirectory() as folder:
        if not wanted.endswith(".whl"):
            print(f"Downloading the wheel of vLLM {wanted} ...", flush=True)
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--only-binary=:all:", "--dest", folder, f"{PACKAGE}=={wanted}"]
            if subprocess.run(command).returncode:
                print(f"no wheel of vLLM {wanted} for this machine: see above", file=sys.stderr)
                return 2
            (wheel,) = Path(folder).glob("*.whl")
        else:
            wheel = Path(wanted)
        other = Release.wheel(wheel)
        uses = uses_in({name: ROOT / name for name in FOLDERS}, installed)
        lines, gone = table(uses, installed, other)
    distribution = packages_distributions()[PACKAGE][0]
    print(f"{distribution} {version(distribution)} is installed; compared with {wheel.name}")
    print("\n".join(lines))
    return 1 if gone else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m testing.rehearse VERSION-OR-WHEEL")
    sys.exit(main(sys.argv[1]))
