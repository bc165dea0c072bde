"""A YAML file with the line of each key, so that an error can name its place."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
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
_MAX_VALUES = 100_000  # of a file, with those that its aliases repeat
# A number as YAML 1.2 and JSON have it. PyYAML takes it for text: YAML 1.1 wants 1.0e-6.
_NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
# Numbers that are others in YAML 1.1 than they seem to be: 0512 is octal, and 1:30 is 90.
_INTEGER = "tag:yaml.org,2002:int"
_SURPRISES = re.compile(r"[-+]?0[0-7_]+|.*:.*")


class _Loader(yaml.SafeLoader):
    """PyYAML's own parser."""


class _CLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """libyaml's, where PyYAML has it."""


for _loader in (_Loader, _CLoader):
    _loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789"))


@dataclass(frozen=True)
class Mistake:
    """One mistake: its line in the file, or infinity for what is in no line of it, and its text."""

    line: float
    text: str


class InvalidConfig(ConfigError):
    """All mistakes of a file, in its order, then those of `--set`; each is a line of the text.

    `engine` are the arguments of vLLM in it, which nobody has checked yet.
    """

    def __init__(
        self,
        mistakes: Iterable[Mistake],
        origins: "Origins",
        engine: Mapping[str, Any] | None = None,
    ) -> None:
        self.mistakes = sorted(
            dict.fromkeys(mistakes), key=lambda each: (each.line, each.text.startswith("--set"))
        )
        self.origins = origins
        self.engine = engine or {}
        super().__init__(self.mistakes, origins, self.engine)

    def __str__(self) -> str:
        return "\n".join(mistake.text for mistake in self.mistakes)


@dataclass(frozen=True)
class Origins:
    """Where each value was set, for error messages."""

    file: Path
    lines: Mapping[KeyPath, int]
    overridden: frozenset[KeyPath]

    def line(self, path: KeyPath) -> int | None:
        """Return the line of a key or of its nearest parent; 0: `--set`; None: no such line."""
        if any(written[: len(path)] == path for written in self.overridden if path):
            return 0
        for end in range(len(path), -1, -1):
            if path[:end] in self.overridden:
                return 0
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return None

    def place(self, path: KeyPath) -> str:
        """Return where a key or its nearest parent was set: "file.yaml:7", or "--set"."""
        line = self.line(path)
        if line == 0:
            return "--set"
        return str(self.file) if line is None else f"{self.file}:{line}"

    def of(self, path: KeyPath) -> str:
        """Return place and key for an error: "file.yaml:7: engine.dtype"."""
        key = ".".join(map(str, path)) or "top level"
        place = self.place(path)
        return f"--set {key}" if place == "--set" else f"{place}: {key}"

    def mistake(self, path: KeyPath, text: str) -> Mistake:
        """Return a mistake at a key's path."""
        return Mistake(self.line(path) or math.inf, f"{self.of(path)}: {text}")


@dataclass
class Document:
    """A file's keys and values, the line of each key's path, and what is wrong with the text."""

    data: dict[str, Any]
    lines: dict[KeyPath, int]
    mistakes: list[Mistake]


def read(file: Path, spell: Callable[[KeyPath, Any], Any] = lambda _, key: key) -> Document:
    """Read a file. `spell` returns the name under which a key at a path is known.

    Raises ConfigError where the text cannot be read to its end.
    """
    text = text_file.read(file, str(file))
    try:
        node = _compose(text)
        if isinstance(node, yaml.MappingNode):
            walk = _Walk(file, spell)
            walk.record(node)
            return Document(_Loader("").construct_document(node), walk.lines, walk.mistakes)
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
    node = yaml.compose(text, Loader=_Loader)
    if node is None:
        return None
    walk = _Walk(Path(), lambda _, key: key)
    walk.record(node)
    if walk.mistakes:
        raise ValueError(walk.mistakes[0].text)
    return _Loader("").construct_document(node)


def _compose(text: str) -> yaml.Node | None:
    """Parse with libyaml, which is ten times as fast.

    If that fails, parse with PyYAML, whose messages are better. Long texts go to PyYAML alone: some
    100,000 nested brackets overflow libyaml's stack.
    """
    if len(text) <= _SHORT and yaml.__with_libyaml__:
        try:
            node: yaml.Node | None = yaml.compose(text, Loader=_CLoader)
            return node
        except yaml.YAMLError:
            pass
    return yaml.compose(text, Loader=_Loader)


@dataclass
class _Walk:
    """Visits each key of a file once, and those of an alias wherever it stands."""

    file: Path
    spell: Callable[[KeyPath, Any], Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    _values: int = 0
    _last: yaml.Node | None = None  # the key visited last

    def record(self, node: yaml.Node, path: KeyPath = ()) -> None:
        """Note the line of each key below `node`, and what is wrong with it.

        Raises MarkedYAMLError if there are too many of them.
        """
        self._values += 1
        if self._values > _MAX_VALUES:
            problem = f"more than {_MAX_VALUES:,} values, with those that aliases repeat"
            raise yaml.MarkedYAMLError(
                problem=problem, problem_mark=(self._last or node).start_mark
            )
        if isinstance(node, yaml.MappingNode):
            firsts: dict[KeyPath, int] = {}
            for key, value in node.value:
                self._last = key
                where = (*path, str(self.spell(path, key.value)))
                line = self.lines[where] = key.start_mark.line + 1
                if where in firsts:
                    self._wrong(
                        line,
                        f"{'.'.join(map(str, where))} is given twice; it was first given on line "
                        f"{firsts[where]}",
                    )
                firsts.setdefault(where, line)
                self.record(value, where)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                self.record(value, (*path, index))
        elif (
            isinstance(node, yaml.ScalarNode)
            and node.tag == _INTEGER
            and _SURPRISES.fullmatch(node.value)
        ):
            value = _Loader("").construct_yaml_int(node)
            text = f"YAML reads {node.value} as {value}; write that, or put it in quotes"
            self._wrong(node.start_mark.line + 1, text)

    def _wrong(self, line: int, text: str) -> None:
        self.mistakes.append(Mistake(line, f"{self.file}:{line}: {text}"))


def explain(
    errors: Iterable[Any], origins: Origins, schema: type[BaseModel], hint: str = ""
) -> list[Mistake]:
    """Describe pydantic's errors, with their places. A message of several lines is as many.

    `hint` follows an unknown key of the top level.
    """
    return [mistake for error in errors for mistake in _explain(error, origins, schema, hint)]


def _explain(error: Any, origins: Origins, schema: type[BaseModel], hint: str) -> list[Mistake]:
    path: KeyPath = error["loc"]
    if error["type"] == "extra_forbidden":
        near = nearest(str(path[-1]), _keys_at(path[:-1], schema))
        return [origins.mistake(path, f"unknown key{near}{hint if len(path) == 1 else ''}")]
    if error["type"] == "missing":
        return [Mistake(math.inf, f"{origins.file}: {'.'.join(map(str, path))} is missing")]
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "string_type":  # as for 1.0, no, or 2024-01-01
        message += "; put it in quotes"
    return [origins.mistake(path, f"{line[0].lower()}{line[1:]}") for line in message.splitlines()]


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
