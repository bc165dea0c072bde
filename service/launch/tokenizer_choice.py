"""Whether transformers reads a model's tokenizer.json rightly, and what to do if not."""

import argparse
from pathlib import Path
from typing import Any

from service.errors import LaunchError

# Modes in which AutoTokenizer chooses the class. Those of the second kind have a prompt format of
# their own, so none can take their place.
_REPLACEABLE = ("auto", "hf", "literal")
_OWN_FORMAT = ("minicpm", "xverse")
_NO_CHINESE = (
    "tokenizer.json makes no tokens of Chinese text, as where transformers 5 has read it wrongly "
    "and saved it; copy the base's tokenizer files over it"
)
_COMPARE = (
    "compare tokenizer.json and tokenizer_config.json with the publisher's, or fetch both again"
)


def choose(args: argparse.Namespace) -> str | None:
    """Set the mode that reads tokenizer.json itself, where transformers' class gives other ids.

    Returns a line for the user, if there is something to say; raises LaunchError where that mode
    would not help. vLLM caches the tokenizer that is loaded here, so a start that changes nothing
    loads it once.
    """
    from vllm.tokenizers.registry import cached_get_tokenizer

    from service.tokenizers.tokenizer_json import MODE, drops_chinese

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
    if wrong := _misnumbered(args, tokenizer):
        raise LaunchError(wrong)
    found = _difference(args, tokenizer)
    if found is None:
        return f"warning: {_NO_CHINESE}" if drops_chinese(tokenizer) else None
    if args.tokenizer_mode in _OWN_FORMAT:
        return f"warning: {found}; {_COMPARE}"
    args.tokenizer_mode = MODE
    return f"Reading tokenizer.json itself: {found}"


def problem(args: argparse.Namespace, tokenizer: Any) -> str | None:
    """Return what is wrong with the ids of a loaded tokenizer, with the remedy, or None."""
    from service.tokenizers.tokenizer_json import MODE, drops_chinese

    if not _by_transformers(args):
        return None
    if wrong := _misnumbered(args, tokenizer):
        return wrong
    found = _difference(args, tokenizer)
    if found is None:
        return _NO_CHINESE if drops_chinese(tokenizer) else None
    is_own = args.tokenizer_mode in _OWN_FORMAT
    return f"{found}; {_COMPARE if is_own else f'set engine.tokenizer_mode: {MODE}'}"


def _misnumbered(args: argparse.Namespace, tokenizer: Any) -> str | None:
    from service.tokenizers.tokenizer_json import misnumbered, published_class

    return misnumbered(tokenizer, Path(args.tokenizer)) if published_class(tokenizer) else None


def _difference(args: argparse.Namespace, tokenizer: Any) -> str | None:
    """Say in which text transformers and tokenizer.json differ, or None."""
    from service.tokenizers.tokenizer_json import difference, published_class

    text = difference(tokenizer, Path(args.tokenizer))
    if text is None:
        return None
    name = getattr(published_class(tokenizer), "__name__", "")
    return (
        f"transformers reads it as a {name}, which gives other tokens than tokenizer.json, such as "
        f"for {text!r}"
    )


def _by_transformers(args: argparse.Namespace) -> bool:
    from service.tokenizers.tokenizer_json import MODE

    has_json = (Path(args.tokenizer or args.model) / "tokenizer.json").is_file()
    return has_json and args.tokenizer_mode in (*_REPLACEABLE, *_OWN_FORMAT, MODE)
