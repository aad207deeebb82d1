"""From how many tokens of a prompt on it is faster to send a layer's neurons in RAM to the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from thermocline.placement.cost import CostModel
from thermocline.placement.problem import Problem
from thermocline.placement.seats import LayerSeats


def sent_from(problem: Problem, layers: Sequence[LayerSeats]) -> tuple[int, ...]:
    """For each layer the fewest tokens, a power of two, from which on a step is faster so; 0 for never.

    Layers that leave neurons on disk never do.
    """
    fewest = [0] * len(layers)
    if problem.machine.gpu is None:
        return tuple(fewest)
    n_ff, cluster, work = problem.footprint.n_ff, problem.cluster, problem.workload
    most = min(work.ubatch, work.context)
    candidates = [1 << i for i in range(1, most.bit_length())]
    for tokens in reversed(candidates):
        prompt = replace(work, prompt=tokens, output=1, context=max(work.context, tokens + 1), first_token_ms=None)
        cost = CostModel(problem.footprint, problem.machine, prompt, problem.mode, problem.temperatures, cluster)
        before = 0 if tokens == candidates[-1] else 2 * tokens
        for index, seat in enumerate(layers):
            if seat.hot < n_ff and seat.warm == n_ff and fewest[index] == before:
                hot, predictor = -(-seat.hot // cluster), seat.predictor or seat.home
                time = cost.layer(cost.phases[1], index, seat.home, predictor, hot, cost.clusters)
                fewest[index] = tokens if bool(time.streamed) else before
        if tokens not in fewest:
            break
    return tuple(fewest)
