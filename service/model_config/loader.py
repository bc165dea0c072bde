"""Reads a model's YAML: finds it, applies `--set`, and names the line of each mistake."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from service.errors import ConfigError
from service.model_config.document import (
    UNREADABLE,
    Document,
    InvalidConfig,
    KeyPath,
    Mistake,
    Origins,
    explain,
    read,
    value_of,
)
from service.model_config.schema import ModelConfig
from service.model_config.spelling import nearest

# What must be in a YAML, to look at the rest where it is wrong or missing.
_STAND_INS: dict[str, Any] = {"name": "model", "source": {"path": "."}}
# A Trainer's folder, and ms-swift's merged one.
CHECKPOINT = re.compile(r"checkpoint-\d+(-merged)?")
# The model's name in a path of a hub's cache: models--owner--name of Hugging Face, and
# models/owner--name/snapshots/revision of ModelScope.
_CACHED = re.compile(
    r"(?:^|[/\\])models(?:--|[/\\](?=[^/\\]+[/\\]snapshots(?:[/\\]|$)))[^/\\]+?--([^/\\]+)"
)
# What a folder has that can be served.
_CONFIGS = ("config", "adapter_config")


def catalogue() -> dict[str, Path]:
    """Return name -> file of all shipped models. The name is the file's stem."""
    package = Path(__file__).parent.parent
    folder = package / "model_configs"  # in a wheel
    if not folder.is_dir():
        folder = package.parent / "model_configs"  # in a checkout
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def _find(name_or_file: str) -> Path:
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
    more than its name and source. Raises ConfigError; InvalidConfig has all mistakes, each with
    file, line, key and the nearest valid name.
    """
    file = file or _find(name_or_file)
    document = _parse(file)
    data, lines, mistakes = document.data, document.lines, document.mistakes
    assigned: set[KeyPath] = set()
    for assignment in assignments:
        try:
            assigned.add(_assign(data, assignment))
        except ConfigError as e:
            mistakes.append(Mistake(math.inf, str(e)))
    for path in assigned:
        for written in [line for line in lines if line[: len(path)] == path]:
            del lines[written]
    if adapters:
        section = data.setdefault("adapters", {})
        if isinstance(section, dict):  # else validation says what it must be
            section.update(adapters)
            assigned |= {("adapters", name) for name in adapters}
    origins = Origins(file, lines, frozenset(assigned))
    engine = data.get("engine")
    if isinstance(engine, dict):
        engine = data["engine"] = {_argument(key): value for key, value in engine.items()}
    try:
        config = ModelConfig.model_validate(data)
        errors = []
    except ValidationError as e:
        errors = e.errors(include_url=False)
        errors += _of_rules(data, errors)
    hint = " (vLLM's arguments are keys of engine)"
    if mistakes := mistakes + explain(errors, origins, ModelConfig, hint):
        raise InvalidConfig(mistakes, origins, engine if isinstance(engine, dict) else None)
    return config, origins


def _of_rules(data: dict[str, Any], errors: Sequence[Any]) -> list[Any]:
    """Return errors of rules over several keys.

    Pydantic runs model validators only on valid fields. Drop the invalid ones, add stand-ins, and
    validate again.
    """
    for _ in range(3):  # without a key its section may be wrong
        for error in errors:
            _leave_out(data, error["loc"])
        try:
            ModelConfig.model_validate({**_STAND_INS, **data})
            break
        except ValidationError as e:
            errors = e.errors(include_url=False)
            if rules := [error for error in errors if not error["loc"]]:
                return rules
    return []


def _leave_out(data: dict[str, Any], path: KeyPath) -> None:
    """Delete the innermost key on `path`.

    If that is inside a required section, delete the whole section.
    """
    section: Any = data
    last: tuple[dict[Any, Any], Any] | None = None
    for part in path[:1] if path[:1] in [(key,) for key in _STAND_INS] else path:
        if not isinstance(section, dict) or part not in section:
            break
        last = section, part
        section = section[part]
    if last:
        del last[0][last[1]]


def name_of(folder: Path) -> str:
    """Return the name under which a folder is served: its own, without what a name cannot have.

    A checkpoint-500 is called after the folder around it too, a folder of a cache as its model.
    """
    folder = folder.absolute()
    name = folder.name
    if CHECKPOINT.fullmatch(name):
        name = f"{folder.parent.name}-{name}"
    elif folder.parent.name == "snapshots":
        name = cached_name(str(folder)) or name
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[:64] or "model"


def cached_name(path: str) -> str | None:
    """Return the name of the model in a path of a hub's cache; None for another path."""
    found = _CACHED.search(path)
    return found[1] if found else None


def _parse(file: Path) -> Document:
    if file.is_dir():
        if not (file / "config.json").is_file():
            raise ConfigError(f"{file}: has no config.json, so it is not a model{advice_on(file)}")
        return Document({"name": name_of(file), "source": {"path": str(file)}}, {}, [])
    if file.suffix in (".bin", ".gguf", ".pt", ".safetensors"):
        adapter = (file.parent / "adapter_config.json").is_file()
        folder = "its folder" if adapter else "the folder of a whole model"
        raise ConfigError(f"{file}: is a file of weights; give {folder}")
    return read(file, _spell)


def advice_on(folder: Path) -> str:
    """Return advice on a folder without a model: the one inside it with a model or an adapter."""
    places = [f"{at}/{name}.json" for at in ("*", "snapshots/*") for name in _CONFIGS]
    files = [file for place in places for file in folder.glob(place)]
    if not files:
        return "; give the folder that your training or its export wrote"
    newest = max(files, key=lambda file: file.stat().st_mtime)
    return f"; give the folder inside it, such as {newest.parent.relative_to(folder)}"


def _assign(data: dict[str, Any], assignment: str) -> KeyPath:
    """Apply one "key.path=value" to `data`; the value is YAML. Returns the key's path."""
    key, equals, text = assignment.partition("=")
    path: KeyPath = tuple(key.strip().split("."))
    if path[0] == "engine" and len(path) > 1:
        path = ("engine", _argument(path[1]), *path[2:])
    if not equals or not all(path):
        raise ConfigError(
            f"--set {assignment!r}: expected key.path=value, such as engine.max_model_len=2048"
        )
    try:
        value = value_of(text)
    except UNREADABLE:
        raise ConfigError(f"--set {key[:100]}: the value is not valid YAML") from None
    section: Any = data
    for part in path[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {key}: {part} has no keys below it")
    section[path[-1]] = value
    return path


def _spell(path: KeyPath, key: Any) -> Any:
    return _argument(key) if path == ("engine",) else key


def _argument(key: Any) -> Any:
    """Return the name of one of vLLM's arguments, which may be written with dashes."""
    return key.replace("-", "_") if isinstance(key, str) else key
