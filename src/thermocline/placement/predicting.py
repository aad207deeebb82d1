"""Up to how many tokens of a step it is faster to compute what the predictor selects."""

from __future__ import annotations

from thermocline.activity.predictor import MOST_TOKENS
from thermocline.placement.cost import CostModel, FfnMode

FINENESS = 4
"""Sizes that are looked at grow by one part in so many, and by one token at least."""
WORTH = 0.9
"""Share of exact mode's time that prediction may take at most: what is priced is no finer, and exact loses nothing."""


def predicted_up_to(cost: CostModel) -> tuple[int, ...]:
    """For each layer, the most tokens of a step for which prediction is clearly faster than mode exact; at least 1.

    A batch computes the union of what its tokens select, which grows until it is more to read and to multiply, with the
    predictor, than the whole first matrix, in which exact mode finds the zeros. That mode takes no longer than dense.
    A single token is always predicted; where nothing is known of what is selected, nothing else, and beyond MOST_TOKENS
    nothing is.
    """
    most, tokens = [1] * cost.footprint.n_layer, 1
    while cost.known:
        last, tokens = tokens, tokens + max(1, tokens // FINENESS)
        if tokens > MOST_TOKENS:
            break
        faster = cost.alone(tokens, FfnMode.PREDICTED) <= WORTH * cost.alone(tokens, FfnMode.EXACT)
        most = [tokens if won and before == last else before for won, before in zip(faster, most, strict=True)]
        if tokens not in most:
            break
    return tuple(most)
