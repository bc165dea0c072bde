"""What max_length means, per model, and who wins."""

from typing import Any

import pytest
import torch

from service.api import sampling
from service.api.schema import ContractRequest
from service.errors import PromptTooLong
from service.model_config.schema import MaxLength

NEW = MaxLength()
WITH_PROMPT = MaxLength(counts="prompt_and_new_tokens", default=384)


def max_tokens(rule: MaxLength, *, prompt: int = 10, default: int = 0, **asked: Any) -> int:
    defaults = {"max_tokens": default} if default else {}
    request = ContractRequest(prompt="hi", **asked)
    resolved = sampling.resolve(request, defaults, rule, prompt_tokens=prompt, context=1000)
    return int(resolved["max_tokens"])


@pytest.mark.parametrize(
    ("expected", "rule", "values"),
    [
        (990, NEW, {}),
        (512, NEW, {"default": 512}),
        (50, NEW, {"default": 512, "max_length": 50}),
        (60, NEW, {"default": 512, "max_length": 50, "max_new_tokens": 60}),
        (990, NEW, {"max_new_tokens": 5000}),
        (990, NEW, {"default": 5000}),
        (374, WITH_PROMPT, {}),
        (40, WITH_PROMPT, {"max_length": 50}),
        (60, WITH_PROMPT, {"max_length": 50, "max_new_tokens": 60}),
        (990, WITH_PROMPT, {"max_length": 5000}),
        (374, WITH_PROMPT, {"default": 512}),
    ],
)
def test_how_many_tokens_may_be_generated(
    expected: int, rule: MaxLength, values: dict[str, int]
) -> None:
    assert max_tokens(rule, **values) == expected


@pytest.mark.parametrize(
    ("rule", "values", "param"),
    [
        (NEW, {"prompt": 1000}, "prompt"),
        (WITH_PROMPT, {"prompt": 400}, "prompt"),
        (WITH_PROMPT, {"prompt": 50, "max_length": 50}, "max_length"),
    ],
)
def test_a_prompt_that_leaves_no_room_is_refused(
    rule: MaxLength, values: dict[str, int], param: str
) -> None:
    with pytest.raises(PromptTooLong) as error:
        max_tokens(rule, **values)
    assert error.value.param == param


@pytest.mark.parametrize("others", [0.0, 0.4])
@pytest.mark.parametrize("longest", [0, 40])
def test_penalties_are_vllms_in_every_bit(others: float, longest: int) -> None:
    from vllm.model_executor.layers.utils import apply_penalties
    from vllm.v1.sample.ops import penalties

    from service.models import register, vllm_private

    register()
    assert penalties.apply_penalties is vllm_private.apply_penalties
    rows, vocabulary, chance = 16, 500, torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocabulary, generator=chance)
    logits[:, 7] = -torch.inf  # forbidden, by a grammar for example
    prompts = torch.randint(0, vocabulary, (rows, 40), generator=chance)
    answers = torch.randint(0, vocabulary, (rows, longest), generator=chance)
    for row in range(rows):  # of all lengths, from none
        prompts[row, 2 * row :] = answers[row, row:] = vocabulary
    prompts[5, 0] = vocabulary  # a token that the tokenizer has and the model has not
    extra = torch.zeros(rows)
    extra[3] = others
    asked = prompts, answers, extra, extra, torch.linspace(0.01, 2, rows)
    ours, theirs = (
        f(logits.clone(), *asked) for f in (vllm_private.apply_penalties, apply_penalties)
    )
    assert torch.equal(ours, theirs) and not torch.equal(ours, logits)


def test_top_p_takes_equals_and_rows_that_are_no_numbers_as_vllm_does() -> None:
    from vllm.v1.sample.ops import topk_topp_sampler

    from service.models import vllm_private

    low, none = -torch.inf, torch.nan
    logits = torch.tensor([[1.0, 1, 1, 0], [low] * 4, [none] * 4])
    p = torch.full((3,), 0.5)
    ours = vllm_private.apply_top_k_top_p(logits.clone(), None, p)
    theirs = topk_topp_sampler.apply_top_k_top_p_pytorch(logits.clone(), None, p)
    kept = torch.tensor([[low, 1, 1, low], [low] * 4, [none] * 4])  # of equals the highest ids
    torch.testing.assert_close(ours, kept, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(theirs, kept, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("vocabulary", [40, 5000])
@pytest.mark.parametrize("k", [None, (1, 5, 64, 65, 2000, 5000)])
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 3.0, 8.0, 100.0])
@pytest.mark.parametrize("coarse", [False, True])
def test_top_p_keeps_what_vllm_keeps(
    vocabulary: int, k: tuple[int, ...] | None, scale: float, coarse: bool
) -> None:
    from vllm.v1.sample.ops import topk_topp_sampler

    from service.models import register, vllm_private

    register()
    assert topk_topp_sampler.apply_top_k_top_p is vllm_private.apply_top_k_top_p
    chance = torch.Generator().manual_seed(0)
    p = torch.tensor([0.01, 0.1, 0.5, 0.8, 0.95, 0.999, 1.0]).repeat_interleave(6)
    logits = torch.randn(len(p), vocabulary, generator=chance) * scale
    if coarse:  # as a head in bfloat16 makes them: many are equal
        logits = logits.bfloat16().float()
    logits[:, 7] = -torch.inf  # forbidden, by a grammar for example
    ks = None if k is None else torch.tensor(k, dtype=torch.int32).clamp(max=vocabulary).repeat(7)
    arguments = (None if ks is None else ks.clone(), p)
    ours = vllm_private.apply_top_k_top_p(logits.clone(), *arguments)
    theirs = topk_topp_sampler.apply_top_k_top_p_pytorch(logits.clone(), ks, p)
    for row in range(len(p)):
        kept = ours[row] > -torch.inf
        assert torch.equal(ours[row][kept], logits[row][kept])
        if torch.equal(ours[row], theirs[row]):
            continue
        # They differ by what rounding decides, or by which of several equal ones is kept.
        allowed = logits[row].double()
        if ks is not None:
            least = logits[row].topk(int(ks[row])).values[-1]
            allowed[logits[row] < least] = -torch.inf
        sure = allowed.softmax(0).sort(descending=True).values.cumsum(0)
        for result in (ours[row], theirs[row]):
            inside = result > -torch.inf
            size = int(inside.sum())
            dropped = allowed[~inside].max()
            assert result[inside].min() >= dropped or p[row] == 1
            assert sure[size - 1] >= p[row] - 1e-5
            assert size == 1 or sure[size - 2] <= p[row] + 1e-5
