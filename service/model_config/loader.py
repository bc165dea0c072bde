"""Reads a model's YAML: finds it, applies `--set`, and names the line of each mistake."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from service.errors import ConfigError
from service.model_config.schema import ModelConfig
from service.model_config.spelling import nearest

Path_ = tuple[str | int, ...]
# Exceptions of PyYAML for invalid text or values, such as `!!int zz`.
_UNREADABLE = (yaml.YAMLError, ValueError, KeyError, RecursionError)


@dataclass(frozen=True)
class Origins:
    """Where each value was set, for error messages."""

    file: Path
    lines: Mapping[Path_, int]
    overridden: frozenset[Path_]

    def place(self, path: Path_) -> str:
        """Return where a key or its nearest parent was set: "file.yaml:7", or "--set"."""
        if any(written[: len(path)] == path for written in self.overridden if path):
            return "--set"
        for end in range(len(path), -1, -1):
            if path[:end] in self.overridden:
                return "--set"
            if path[:end] in self.lines:
                return f"{self.file}:{self.lines[path[:end]]}"
        return str(self.file)

    def of(self, path: Path_) -> str:
        """Return place and key for an error: "file.yaml:7: engine.dtype"."""
        key = ".".join(map(str, path)) or "top level"
        place = self.place(path)
        return f"--set {key}" if place == "--set" else f"{place}: {key}"


def catalogue() -> dict[str, Path]:
    """Return name -> file of all shipped models. The name is the file's stem."""
    package = Path(__file__).parent.parent
    folder = package / "model_configs"  # in a wheel
    if not folder.is_dir():
        folder = package.parent / "model_configs"  # in a checkout
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find(name_or_file: str) -> Path:
    """Return the YAML file for a catalogue name or a path. Raises ConfigError."""
    entries = catalogue()
    if name_or_file in entries:
        return entries[name_or_file]
    file = Path(name_or_file)
    if name_or_file.endswith((".yaml", ".yml")) or "/" in name_or_file or file.is_dir():
        return file  # errors are reported when it is read
    raise ConfigError(
        f"no model named {name_or_file!r}{nearest(name_or_file, entries)}; "
        "`chat-service models` lists the catalogue, and a path to a YAML file, or to a "
        "model's folder, works too"
    )


def load(
    name_or_file: str,
    assignments: Sequence[str] = (),
    *,
    file: Path | None = None,
    adapters: Mapping[str, str] | None = None,
) -> tuple[ModelConfig, Origins]:
    """Read one model's YAML, apply `--set key.path=value` assignments, and validate it.

    `adapters` are further ones, name -> folder. A folder with a model stands for a YAML with no
    more than its name and source. Raises ConfigError with file, line, key and the nearest valid
    name.
    """
    file = file or find(name_or_file)
    data, lines = _parse(file)
    overridden = frozenset(_assign(data, assignment) for assignment in assignments)
    for path in overridden:
        for written in [line for line in lines if line[: len(path)] == path]:
            del lines[written]
    if adapters:
        section = data.setdefault("adapters", {})
        if isinstance(section, dict):  # else validation says what it must be
            section.update(adapters)
            overridden |= {("adapters", name) for name in adapters}
    origins = Origins(file, lines, overridden)
    if isinstance(engine := data.get("engine"), dict):
        data["engine"] = {_argument(key): value for key, value in engine.items()}
    try:
        return ModelConfig.model_validate(data), origins
    except ValidationError as e:
        raise ConfigError(
            "\n".join(_explain(error, origins) for error in e.errors(include_url=False))
        ) from None


def name_of(folder: Path) -> str:
    """Return the name under which a folder is served: its own, without what a name cannot have.

    A Trainer's checkpoint-500 is called after the folder around it too.
    """
    folder = folder.expanduser().absolute()
    name = folder.name
    if re.fullmatch(r"checkpoint-\d+", name):
        name = f"{folder.parent.name}-{name}"
    return re.sub(r"[^\w.-]+|\s+", "-", name).strip("-.")[:64] or "model"


def _parse(file: Path) -> tuple[dict[str, Any], dict[Path_, int]]:
    if file.is_dir():
        if not (file / "config.json").is_file():
            raise ConfigError(f"{file}: has no config.json, so it is not a model{_inner(file)}")
        return {"name": name_of(file), "source": {"path": str(file)}}, {}
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ConfigError(f"{file}: not UTF-8 text (byte {e.start})") from None
    except OSError as e:
        raise ConfigError(f"{file}: {e.strerror}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        loader = yaml.SafeLoader("")
        lines: dict[Path_, int] = {}
        if isinstance(node, yaml.MappingNode):
            _record_lines(node, (), lines, file)
            return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as e:
        line = f":{e.problem_mark.line + 1}" if e.problem_mark else ""
        problem = e.problem or "not valid YAML"
        if "'\\t'" in problem:
            problem = "a tab cannot indent YAML; use spaces"
        raise ConfigError(f"{file}{line}: {problem}") from None
    except _UNREADABLE as e:
        raise ConfigError(f"{file}: not valid YAML: {str(e).splitlines()[0][:200]}") from None
    raise ConfigError(f"{file}: expected keys and values, such as `name: my-model`")


def _inner(folder: Path) -> str:
    """Return advice that names a folder inside of `folder` that holds a model or an adapter."""
    files = [f for name in ("config", "adapter_config") for f in folder.glob(f"*/{name}.json")]
    if not files:
        return "; give the folder that your training or its export wrote"
    newest = max(files, key=lambda file: file.stat().st_mtime)
    return f"; give the folder inside it, such as {newest.parent.name}"


def _record_lines(node: yaml.Node, path: Path_, lines: dict[Path_, int], file: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            where = (*path, _argument(key.value) if path == ("engine",) else str(key.value))
            line = key.start_mark.line + 1
            if where in lines:
                raise ConfigError(
                    f"{file}:{line}: {'.'.join(map(str, where))} is given twice; "
                    f"it was first given on line {lines[where]}"
                )
            lines[where] = line
            _record_lines(value, where, lines, file)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _record_lines(value, (*path, index), lines, file)


def _assign(data: dict[str, Any], assignment: str) -> Path_:
    """Apply one "key.path=value" to `data`; the value is YAML. Returns the key's path."""
    key, equals, text = assignment.partition("=")
    path: Path_ = tuple(key.strip().split("."))
    if path[0] == "engine" and len(path) > 1:
        path = ("engine", _argument(path[1]), *path[2:])
    if not equals or not all(path):
        raise ConfigError(
            f"--set {assignment!r}: expected key.path=value, such as engine.max_model_len=2048"
        )
    try:
        value = yaml.safe_load(text)
    except _UNREADABLE:
        raise ConfigError(f"--set {key[:100]}: the value is not valid YAML") from None
    section: Any = data
    for part in path[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {key}: {part} has no keys below it")
    section[path[-1]] = value
    return path


def _argument(key: Any) -> Any:
    """Return the name of one of vLLM's arguments, which may be written with dashes."""
    return key.replace("-", "_") if isinstance(key, str) else key


def _explain(error: Any, origins: Origins) -> str:
    path: Path_ = error["loc"]
    place = origins.of(path)
    if error["type"] == "extra_forbidden":
        hint = nearest(str(path[-1]), _keys_at(path[:-1]))
        vllm = " (vLLM's arguments are keys of engine)" if len(path) == 1 else ""
        return f"{place}: unknown key{hint}{vllm}"
    if error["type"] == "missing":
        return f"{origins.file}: {'.'.join(map(str, path))} is missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"{place}: {message[0].lower()}{message[1:]}"


def _keys_at(path: Path_) -> list[str]:
    """Return the valid keys of the section at `path`."""
    model: Any = ModelConfig
    parts = iter(path)
    for part in parts:
        annotation = model.model_fields[part].annotation
        if getattr(annotation, "__origin__", None) is dict:  # whose keys are names
            next(parts, None)
        model = next(
            t
            for t in (annotation, *getattr(annotation, "__args__", ()))
            if isinstance(t, type) and issubclass(t, BaseModel)
        )
    return list(model.model_fields)
