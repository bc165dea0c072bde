"""A YAML file with the line of each key, so that an error can name its place."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from service import text_file
from service.errors import ConfigError
from service.model_config.spelling import nearest

KeyPath = tuple[str | int, ...]
# Exceptions of PyYAML for invalid text or values, such as `!!int zz`.
UNREADABLE = (yaml.YAMLError, ValueError, KeyError, RecursionError)
_SHORT = 10_000  # characters
# A number as YAML 1.2 and JSON have it. PyYAML takes it for text: YAML 1.1 wants 1.0e-6.
_NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
# Numbers that are others in YAML 1.1 than they seem to be: 0512 is octal, and 1:30 is 90.
_SURPRISES = re.compile(r"[-+]?0[0-7_]+|.*:.*")


class _Loader(yaml.SafeLoader):
    """PyYAML's own parser."""

    def construct_yaml_int(self, node: Any) -> int:
        value = super().construct_yaml_int(node)
        if _SURPRISES.fullmatch(node.value):
            problem = f"YAML reads {node.value} as {value}; write that, or put it in quotes"
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)
        return value


class _CLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """libyaml's, where PyYAML has it."""


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
for _loader in (_Loader, _CLoader):
    _loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789"))


@dataclass(frozen=True)
class Origins:
    """Where each value was set, for error messages."""

    file: Path
    lines: Mapping[KeyPath, int]
    overridden: frozenset[KeyPath]

    def place(self, path: KeyPath) -> str:
        """Return where a key or its nearest parent was set: "file.yaml:7", or "--set"."""
        if any(written[: len(path)] == path for written in self.overridden if path):
            return "--set"
        for end in range(len(path), -1, -1):
            if path[:end] in self.overridden:
                return "--set"
            if path[:end] in self.lines:
                return f"{self.file}:{self.lines[path[:end]]}"
        return str(self.file)

    def of(self, path: KeyPath) -> str:
        """Return place and key for an error: "file.yaml:7: engine.dtype"."""
        key = ".".join(map(str, path)) or "top level"
        place = self.place(path)
        return f"--set {key}" if place == "--set" else f"{place}: {key}"


def read(
    file: Path, spell: Callable[[KeyPath, Any], Any] = lambda _, key: key
) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """Return a file's keys and values, and the line of each key's path.

    `spell` returns the name under which a key at a path is known. Raises ConfigError.
    """
    text = text_file.read(file, str(file))
    try:
        node = _compose(text)
        loader = _Loader("")
        lines: dict[KeyPath, int] = {}
        if isinstance(node, yaml.MappingNode):
            _record_lines(node, (), lines, file, spell)
            return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as e:
        line = f":{e.problem_mark.line + 1}" if e.problem_mark else ""
        problem = e.problem or "not valid YAML"
        if "'\\t'" in problem:
            problem = "a tab cannot indent YAML; use spaces"
        raise ConfigError(f"{file}{line}: {problem}") from None
    except UNREADABLE as e:
        raise ConfigError(f"{file}: not valid YAML: {str(e).splitlines()[0][:200]}") from None
    raise ConfigError(f"{file}: expected keys and values, such as `name: my-model`")


def value_of(text: str) -> Any:
    """Return the value of a short YAML text. Raises one of `UNREADABLE`."""
    return yaml.load(text, Loader=_Loader)


def _compose(text: str) -> yaml.Node | None:
    """Parse by libyaml, which is ten times as fast, or else by PyYAML's own parser.

    That one words mistakes better. Nesting of some 100,000 brackets overflows libyaml's stack.
    """
    if len(text) <= _SHORT and yaml.__with_libyaml__:
        try:
            node: yaml.Node | None = yaml.compose(text, Loader=_CLoader)
            return node
        except yaml.YAMLError:
            pass
    return yaml.compose(text, Loader=_Loader)


def _record_lines(
    node: yaml.Node,
    path: KeyPath,
    lines: dict[KeyPath, int],
    file: Path,
    spell: Callable[[KeyPath, Any], Any],
) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            where = (*path, str(spell(path, key.value)))
            line = key.start_mark.line + 1
            if where in lines:
                raise ConfigError(
                    f"{file}:{line}: {'.'.join(map(str, where))} is given twice; "
                    f"it was first given on line {lines[where]}"
                )
            lines[where] = line
            _record_lines(value, where, lines, file, spell)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _record_lines(value, (*path, index), lines, file, spell)


def explain(error: Any, origins: Origins, schema: type[BaseModel], hint: str = "") -> str:
    """Describe one of pydantic's errors, with its place.

    `hint` follows an unknown key of the top level.
    """
    path: KeyPath = error["loc"]
    place = origins.of(path)
    if error["type"] == "extra_forbidden":
        near = nearest(str(path[-1]), _keys_at(path[:-1], schema))
        return f"{place}: unknown key{near}{hint if len(path) == 1 else ''}"
    if error["type"] == "missing":
        return f"{origins.file}: {'.'.join(map(str, path))} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "string_type":  # as for 1.0, no, or 2024-01-01
        message += "; put it in quotes"
    return f"{place}: {message[0].lower()}{message[1:]}"


def _keys_at(path: KeyPath, schema: type[BaseModel]) -> list[str]:
    """Return the valid keys of the section at `path`."""
    model: Any = schema
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
