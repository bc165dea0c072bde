"""Top-p sampling without sorting the vocabulary."""

from collections.abc import Callable

import torch

# Look at a row's 64 largest logits, then at 1,024; sort all only if the nucleus is wider.
_WIDTHS = (64, 1024)


def keep_nucleus(
    logits: torch.Tensor,
    p: torch.Tensor,
    by_sorting: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Set all logits to -inf but those of each row's nucleus, in place.

    A row's nucleus is the smallest set of its most probable tokens whose probabilities sum to `p`
    or more (arXiv:1904.09751). Of tokens that are equally probable at its edge, the highest ids are
    kept. `logits` are [sequences, vocabulary], float32; `p` is [sequences], and 1 keeps a row as it
    is. `by_sorting` does the same for the rows whose nucleus is wide.
    """
    rows = (p < 1).nonzero().squeeze(1)
    for width in _WIDTHS:
        if len(rows) == 0:
            return logits
        part = logits if len(rows) == len(logits) else logits[rows]
        top, token = part.topk(min(width, part.shape[1]))
        token, order = token.sort(descending=True)
        top, order = top.gather(1, order).sort(descending=True, stable=True)
        token = token.gather(1, order)
        probability = part.softmax(1).gather(1, token)
        mass = probability.cumsum(1)
        limit = p[rows].unsqueeze(1)
        outside = mass - probability >= limit
        outside[:, 0] = False
        size = outside.logical_not().sum(1, keepdim=True)
        # A nucleus that ends with the last of `top`, or with its equals, may go on behind it.
        lowest = top[:, -1:]
        ends_here = (mass[:, -1:] >= limit) & (top.gather(1, size - 1) > lowest)
        found = (ends_here | (lowest == -torch.inf)).squeeze(1)
        done = rows[found]
        logits.index_fill_(0, done, -torch.inf)
        logits[done.unsqueeze(1), token[found]] = top[found].masked_fill(outside[found], -torch.inf)
        rows = rows[~found]
    if len(rows):
        logits[rows] = by_sorting(logits[rows], p[rows])
    return logits
