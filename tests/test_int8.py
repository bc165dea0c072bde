"""Weights in 8 bits on a CPU, beside the same model in float32."""

from pathlib import Path

import pytest

from service.models import register
from testing import checkpoints
from tests.engine import ask, engine


@pytest.mark.parametrize("model", ["qwen2", "xverse", "openelm"])
def test_eight_bits_answer_nearly_as_float32_does(model: str, tmp_path: Path) -> None:
    register()
    folder = checkpoints.write(model, tmp_path / model)
    with engine(folder) as exact:
        expected = ask(exact)
    with engine(folder, quantization="cpu_int8") as quantised:
        found = ask(quantised)
    differences = [
        abs(theirs[token] - ours[token])
        for a, b in zip(expected, found, strict=True)
        for theirs, ours in zip(a.logprobs[:1], b.logprobs[:1], strict=True)  # of one prompt
        for token in theirs.keys() & ours.keys()
    ]
    assert differences and 0 < max(differences) < 0.05, differences
