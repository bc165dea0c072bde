"""The reader's own model: a folder, or an adapter, where a command takes a model's name."""

import functools
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from service import model_config, weights
from service.errors import ConfigError, WeightsError
from service.model_config import ModelConfig, Origins
from service.model_config.loader import CHECKPOINT
from service.weights import adapter, checkpoint, embedded
from service.weights.tensor_files import read_object

# Where a model's files say what it was trained from: those of transformers below 4.50, and of
# ms-swift 3 and 2.
_ORIGINS = {
    "config.json": "_name_or_path",
    "args.json": "model",
    "sft_args.json": "model_id_or_path",
}
# Architectures whose models are of one entry of the catalogue, as far as they can be served. Their
# prompt format or their tokenizer is not in their files. A ChatGLMModel may be of any of three.
_ARCHITECTURES = {
    "BaichuanForCausalLM": "baichuan2-7b-chat",
    "BlueLMForCausalLM": "bluelm-7b-chat",
    "IndexForCausalLM": "index-1.9b-chat",
    "InternLM2ForCausalLM": "internlm2-chat-7b",
    "InternLM3ForCausalLM": "internlm3-8b-instruct",
    "InternLMForCausalLM": "internlm-chat-7b",
    "OpenELMForCausalLM": "openelm-3b-instruct",
    "QWenLMHeadModel": "qwen-7b-chat",
    "XverseForCausalLM": "xverse-7b-chat",
}


def load(
    model: str, assignments: Sequence[str] = (), adapters: Sequence[str] = ()
) -> tuple[ModelConfig, Origins]:
    """Load a model as `model_config.load` does; `model` may also be a folder with files of one.

    `adapters` are NAME=FOLDER. Prints how a folder was understood. Raises ConfigError or
    WeightsError.
    """
    named = _named(adapters)
    folder = weights.expanded(model)
    if model in model_config.catalogue() or not folder.is_dir():
        return model_config.load(model, assignments, adapters=named)
    if adapter.is_adapter(folder):
        return _adapter(folder, assignments, named)
    return _model(folder, assignments, named)


def _named(adapters: Sequence[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for words in adapters:
        name, equals, path = words.partition("=")
        folder = weights.expanded(words, "--adapter ")
        if folder.is_dir():
            name, path = model_config.name_of(folder), words
        elif not equals or not name or not path:
            raise ConfigError(
                f"--adapter {words[:100]!r}: no such folder; correct its path, or give NAME=FOLDER"
            )
        if name in named:
            raise ConfigError(f"--adapter {name}: two adapters have this name; choose others")
        named[name] = path
    return named


def _adapter(
    folder: Path, assignments: Sequence[str], named: Mapping[str, str]
) -> tuple[ModelConfig, Origins]:
    """Load the base of the adapter in `folder`, which answers unless a request names another."""
    trained_on = adapter.base_of(folder)
    local = _local(trained_on)
    known = _in_catalogue(trained_on)
    sets: list[str] = []
    if local is not None and known:
        sets = _files(known, local)
    elif local is not None and (known := _entry(local)):
        sets = [*_files(known, local), *_own_name(local)]
    base = known or (str(local) if local else None)
    if base is None:
        shown = " ".join(trained_on.split())[:200] or "a base that it does not name"
        what = "neither in the catalogue nor a folder here"
        if trained_on and Path(trained_on).is_dir():
            what = "a folder without config.json"
        raise ConfigError(
            f"{folder} is an adapter for {shown}, which is {what}; name its base: "
            f"`chat-service serve BASE --adapter {shlex.quote(str(folder))}`"
        )
    names = model_config.load(base, sets)[0]
    name = model_config.name_of(folder)
    if name in (names.name, *names.aliases, *named):
        name = f"{name[:56]}-adapter"
    sets += [f"default_adapter={_yaml(name)}", *assignments]
    loaded = model_config.load(base, sets, adapters={**named, name: str(folder)})
    where = f", with the base's files in {local}" if local else ""
    print(
        f"{folder} is an adapter: it is served as {name!r} on {loaded[0].name}, the base that its "
        f"{adapter.CONFIG} names{where}.",
        file=sys.stderr,
    )
    return loaded


def _model(
    folder: Path, assignments: Sequence[str], named: Mapping[str, str]
) -> tuple[ModelConfig, Origins]:
    """Load a folder with a whole model, by the catalogue's entry that it was trained from."""
    if not (folder / "config.json").is_file() and (file := adapter.weights_in(folder)):
        raise ConfigError(
            f"{folder} has {file.name} without {adapter.CONFIG}; copy that too from where the "
            "adapter was trained"
        )
    known = _entry(folder)
    if known is None:
        loaded = model_config.load(str(folder), assignments, adapters=named)
        how = (
            "its own prompt format and sampling; `chat-service serve NAME --set "
            f"{shlex.quote(_source(folder))}` serves it as an entry of the catalogue"
        )
    else:
        sets = [*_files(known, folder), *_own_name(folder), *assignments]
        loaded = model_config.load(known, sets, adapters=named)
        how = f"the prompt format and sampling of {known}"
    print(f"{folder} is a model: it is served as {loaded[0].name!r} with {how}.", file=sys.stderr)
    return loaded


def _local(path: str) -> Path | None:
    """Return the folder of a model on this machine, if the path is one."""
    try:
        folder = weights.expanded(path)
    except ConfigError:
        return None
    return folder if path and (folder / "config.json").is_file() else None


def _entry(folder: Path) -> str | None:
    """Return the entry of the catalogue that a folder's model was trained from."""
    place = folder.absolute()
    if CHECKPOINT.fullmatch(place.name):
        place = place.parent
    named = next(filter(None, map(_in_catalogue, (*_origins(folder), str(place)))), None)
    return named or _by_architecture(folder)


def _by_architecture(folder: Path) -> str | None:
    if not (folder / "config.json").is_file():
        return None
    architectures = read_object(folder / "config.json").get("architectures")
    names = map(str, architectures if isinstance(architectures, list) else [])
    return next((_ARCHITECTURES[name] for name in names if name in _ARCHITECTURES), None)


def _origins(folder: Path) -> list[str]:
    """Return what the files of a model call the one that it was trained from."""
    found = []
    for name, key in _ORIGINS.items():
        if not (folder / name).is_file():
            continue
        try:
            content = read_object(folder / name)
        except WeightsError:
            if name == "config.json":
                raise
            continue  # another program's file
        if isinstance(origin := content.get(key), str):
            found.append(origin)
    return found


def _in_catalogue(text: str) -> str | None:
    """Return the entry of the catalogue that a hub's id or a path names."""
    return _entries().get(adapter.name_in(text))


@functools.cache
def _entries() -> dict[str, str]:
    """Return the entries of the catalogue by what a hub or a folder calls their models."""
    entries: dict[str, str] = {}
    for name, file in model_config.catalogue().items():
        source = model_config.load(name, file=file)[0].source
        entries.setdefault(name, name)
        if source.modelscope:
            entries.setdefault(adapter.name_in(source.modelscope), name)
        if source.embedded and source.sha256:
            folder = embedded.folder(source.embedded, source.sha256, Path())
            entries.setdefault(folder.name, name)
    return entries


def _files(entry: str, folder: Path) -> list[str]:
    """Assignments that give an entry the files of a folder, with its tokenizer if it has one."""
    sets = [_source(folder)]
    if model_config.load(entry)[0].tokenizer and checkpoint.has_tokenizer(folder):
        sets.append("tokenizer=null")
    return sets


def _source(folder: Path) -> str:
    return f"source={_yaml({'path': str(folder)})}"


def _own_name(folder: Path) -> list[str]:
    """Assignments that give a folder's model its own name instead of those of its entry."""
    return [f"name={_yaml(model_config.name_of(folder))}", "aliases=[]"]


def _yaml(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
