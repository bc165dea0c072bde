"""Weights in 8 bits on a CPU, beside the same model in float32."""

from pathlib import Path
from statistics import mean

import pytest
import torch

from service.models import register
from testing import checkpoints
from tests.engine import ask, engine


def test_a_product_is_near_and_no_row_changes_another() -> None:
    register()
    from service.models import int8

    chance = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=chance)
    rows = torch.randn(5, 64, generator=chance)
    bias = torch.randn(96, generator=chance)
    matrix = int8._Matrix(weight)
    exact = torch.nn.functional.linear(rows, weight, bias)
    alone = matrix(rows, bias)
    assert (alone - exact).norm() / exact.norm() < 0.03
    outlier = torch.cat((rows, 1000 * rows[:1]))
    beside = matrix(outlier, bias)[:5]
    assert (beside - exact).norm() / exact.norm() < 0.03
    assert matrix(rows.bfloat16(), None).dtype == torch.bfloat16


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
    # Random weights make the most of a difference: bfloat16 makes 0.1 on average, 1.2 at most.
    assert differences and 0 < mean(differences) < 0.5, differences
