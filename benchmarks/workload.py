"""The same requests for every server: seeded, with lengths as a chat service sees them.

Lengths of prompts and answers are log-normal, as in published traces of chat services: most are
short and a few are long. The text is English and means little; only its length matters here.
"""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

_WORDS = (
    "old quiet bright narrow distant gentle broken silver wooden early ship harbour market garden "
    "letter teacher winter river lantern bridge doctor station forest window captain village "
    "carries repairs remembers follows paints answers crosses opens gathers measures slowly twice "
    "before after under beyond between"
).split()
_OPENING = "Write a long story, and do not stop before everything is told, in which"
# Longest, as a multiple of the median: keeps the tail, and the run's end, within bounds.
_LONGEST = 4
_SPREAD = 0.6  # sigma of the lengths' logarithm


@dataclass(frozen=True, slots=True)
class Lengths:
    """Median tokens of prompts and answers."""

    prompt: int = 48
    answer: int = 32


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: the user's turn, and how many tokens the answer may have."""

    prompt: str
    max_tokens: int


def requests(seed: str, lengths: Lengths) -> Iterator[Ask]:
    """Without end; the same for the same seed on every machine."""
    chance = random.Random(seed)
    for number in itertools.count():
        words = _draw(chance, lengths.prompt)
        text = " ".join(chance.choices(_WORDS, k=max(4, words - len(_OPENING.split()))))
        prompt = f"({number}) {_OPENING} {text}."
        yield Ask(prompt, _draw(chance, lengths.answer))


def _draw(chance: random.Random, median: int) -> int:
    length = chance.lognormvariate(math.log(median), _SPREAD)
    return round(min(max(length, 4), _LONGEST * median))
