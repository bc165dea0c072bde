"""Whether transformers reads a model's tokenizer.json rightly, and what to do if not."""

import argparse
from pathlib import Path
from typing import Any

from service.errors import LaunchError

# Modes in which AutoTokenizer chooses the class. Others have a prompt format of their own.
_BY_TRANSFORMERS = ("auto", "hf", "literal")


def choose(args: argparse.Namespace) -> str | None:
    """Set the mode that reads tokenizer.json itself, where transformers' class gives other ids.

    Returns the reason, in a line; raises LaunchError where that would not help. The loaded
    tokenizer is vLLM's, which keeps it: a start that changes nothing loads it once.
    """
    from vllm.tokenizers.registry import cached_get_tokenizer

    from service.tokenizers.tokenizer_json import MODE, misnumbered

    if not _by_transformers(args) or args.skip_tokenizer_init:
        return None
    try:
        tokenizer = cached_get_tokenizer(
            args.tokenizer,
            runner_type="generate",
            tokenizer_mode=args.tokenizer_mode,
            revision=args.tokenizer_revision,
            trust_remote_code=args.trust_remote_code,
        )
    except Exception:  # vLLM meets it again, and says which file it is
        return None
    if found := misnumbered(tokenizer, Path(args.tokenizer)):
        raise LaunchError(found)
    if found := problem(args, tokenizer):
        args.tokenizer_mode = MODE
        return f"Reading tokenizer.json itself: {found.partition(';')[0]}"
    return None


def problem(args: argparse.Namespace, tokenizer: Any) -> str | None:
    """Return what is wrong with the ids of a loaded tokenizer, with the remedy, or None."""
    from service.tokenizers.tokenizer_json import MODE, class_name, difference, misnumbered

    if not _by_transformers(args):
        return None
    if wrong := misnumbered(tokenizer, Path(args.tokenizer)):
        return wrong
    text = difference(tokenizer, Path(args.tokenizer))
    if text is None:
        return None
    return (
        f"transformers reads it as a {class_name(tokenizer)}, which gives other tokens than "
        f"tokenizer.json, such as for {text!r}; set engine.tokenizer_mode: {MODE}"
    )


def _by_transformers(args: argparse.Namespace) -> bool:
    has_json = (Path(args.tokenizer or args.model) / "tokenizer.json").is_file()
    return args.tokenizer_mode in _BY_TRANSFORMERS and has_json
