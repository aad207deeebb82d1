"""How PowerInfer's released code fills the VRAM, for comparison, and its GPU index as an order and a depth.

Source: SJTU-IPADS/PowerInfer at d3ebd7c, `llama.cpp` (lines 3000 to 3415) and `powerinfer-py/powerinfer/solver.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from thermocline.errors import PlanError, UsageError
from thermocline.hardware.machine import Tier
from thermocline.placement.footprint import Footprint
from thermocline.placement.problem import LayerPlace, Placement, Problem

Indices = npt.NDArray[np.int32]

BLOCK = 256
"""Neurons that the solver moves together."""
GATED_FACTOR, PLAIN_FACTOR = 4.5, 2.0
"""Bytes of a neuron, in rows of n_ff elements, as the budget formula has it. True are 3 or 2 rows of n_embd."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """What PowerInfer puts into VRAM: tensors by layer, the head, both caches, and neurons by depth.

    `complete` tells whether all tensors fitted; if not, no neuron is placed. `capacity` is the number of
    neurons that its formula allows, `fitting` the number that fit the same bytes.
    """

    attention: tuple[bool, ...]
    predictor: tuple[bool, ...]
    head: bool
    keys: bool
    values: bool
    capacity: int
    fitting: int
    hot: tuple[int, ...]

    @property
    def complete(self) -> bool:
        """Whether every tensor of the trunk is in VRAM."""
        return all(self.attention) and all(self.predictor) and self.head

    def placement(self, cluster: int, n_ff: int) -> Placement:
        """The same in our terms: attention where its weights are, whether or not the cache fitted beside them.

        Raises:
            UsageError: the cluster does not divide PowerInfer's blocks.
        """
        if BLOCK % cluster:
            raise UsageError(f"a cluster of {cluster} does not divide PowerInfer's blocks of {BLOCK} neurons")
        last = -(-n_ff // cluster)
        layers = tuple(
            LayerPlace(_tier(attention), _tier(predictor), hot // cluster, last)
            for attention, predictor, hot in zip(self.attention, self.predictor, self.hot, strict=True)
        )
        return Placement(Tier.RAM, _tier(self.head), layers)


def allocate(problem: Problem, budget: int) -> Allocation:
    """PowerInfer's allocation for a `--vram-budget` of `budget` bytes.

    Attention, then predictors, then the head, layer by layer (it goes tensor by tensor): the first that does
    not fit ends it all. Values, then keys of the cache only if all fitted. What is left goes to the neurons
    with the highest counts, in blocks of 256; scratch and graph memory are not counted. The defect of its
    exporter, which gives most layers another layer's counts, is left out.

    Raises:
        UsageError: temperatures are unknown, or n_ff is no multiple of 256.
    """
    f, left = problem.footprint, budget
    if problem.temperatures is None or f.n_ff % BLOCK:
        raise UsageError(f"PowerInfer's solver needs activation counts and an n_ff ({f.n_ff}) that {BLOCK} divides")
    fits, going = [], True
    for size in (*f.attention, *f.predictor, f.head):
        going = going and size <= left
        left -= size if going else 0
        fits.append(going)
    values = keys = False
    if going:
        cache = f.n_layer * f.kv_layer(problem.workload.context, problem.workload.batch) // 2
        values = cache <= left
        left -= cache if values else 0
        keys = values and cache <= left
        left -= cache if keys else 0
    capacity = neuron_capacity(f, left) if going else 0
    return Allocation(
        attention=tuple(fits[: f.n_layer]),
        predictor=tuple(fits[f.n_layer : -1]),
        head=fits[-1],
        keys=keys,
        values=values,
        capacity=capacity,
        fitting=left // sum(f.records[0]) if going else 0,
        hot=_hottest_blocks(problem.temperatures, min(capacity, f.n_layer * f.n_ff) // BLOCK),
    )


def neuron_capacity(footprint: Footprint, nbytes: int) -> int:
    """Neurons that PowerInfer's formula allows in `nbytes`: floor(bytes / (n_ff * element * factor)) * 4."""
    gate, up, _ = footprint.records[0]
    piece = footprint.n_ff * up / footprint.n_embd
    return int(nbytes // (piece * (GATED_FACTOR if gate else PLAIN_FACTOR))) * 4


def to_gpu_index(order: npt.ArrayLike, depth: int) -> tuple[Indices, Indices]:
    """A layer's `gpu_idx` (n_ff) of 0 and 1, and `gpu_bucket`: sorted original ids of the hot neurons.

    The bucket is empty where no neuron or every neuron is hot: PowerInfer leaves it unset then.

    Raises:
        UsageError: `order` is no permutation, or the depth exceeds it.
    """
    ids = np.asarray(order)
    n = ids.size
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not np.array_equal(np.sort(ids), np.arange(n)):
        raise UsageError(f"an order of {n} entries is no permutation of 0 to {n - 1}")
    if not 0 <= depth <= n:
        raise UsageError(f"a depth of {depth} does not fit {n} neurons")
    mask = np.zeros(n, np.int32)
    mask[ids[:depth]] = 1
    bucket = np.sort(ids[:depth]).astype(np.int32) if 0 < depth < n else np.empty(0, np.int32)
    return mask, bucket


def from_gpu_index(
    gpu_idx: npt.ArrayLike, gpu_bucket: npt.ArrayLike, order: npt.ArrayLike | None = None, source: str = "gpuidx"
) -> tuple[Indices, int]:
    """A layer's order (n_ff), hot neurons first, and its depth.

    Within hot and cold, neurons keep their place in `order` (hottest first) where one is given, else their
    number.

    Raises:
        PlanError: mask and bucket are not what PowerInfer writes, or contradict each other.
        UsageError: `order` is no permutation of the same neurons.
    """
    mask, bucket = np.asarray(gpu_idx), np.asarray(gpu_bucket)
    if mask.ndim != 1 or not mask.size or mask.dtype.kind not in "iu" or not np.isin(mask, (0, 1)).all():
        raise PlanError(source, "gpu_idx", "is no list of 0 and 1")
    hot = np.flatnonzero(mask)
    partly = 0 < hot.size < mask.size
    if bucket.size and (bucket.ndim != 1 or bucket.dtype.kind not in "iu" or not np.array_equal(bucket, hot)):
        raise PlanError(source, "gpu_bucket", f"does not list the {hot.size} neurons of gpu_idx in rising order")
    if partly and not bucket.size:
        raise PlanError(source, "gpu_bucket", f"is empty, but gpu_idx has {hot.size} of {mask.size} neurons")
    ranked = np.arange(mask.size) if order is None else np.asarray(order)
    to_gpu_index(ranked, 0)  # refuses what is no permutation
    if ranked.size != mask.size:
        raise UsageError(f"an order of {ranked.size} neurons does not fit a gpu_idx of {mask.size}")
    chosen = mask[ranked] == 1
    return np.concatenate([ranked[chosen], ranked[~chosen]]).astype(np.int32), int(hot.size)


def _hottest_blocks(temperatures: npt.NDArray[np.floating], blocks: int) -> tuple[int, ...]:
    """Depths that take the `blocks` blocks with the largest sums of all layers; its integer programme is this sort."""
    layers, n_ff = temperatures.shape
    sums = temperatures.reshape(layers, n_ff // BLOCK, BLOCK).sum(axis=2)
    order = np.argsort(-sums.ravel(), kind="stable")[:blocks]
    counts = np.bincount(order // sums.shape[1], minlength=layers)
    return tuple(int(count) * BLOCK for count in counts)


def _tier(on_gpu: bool) -> Tier:
    return Tier.VRAM if on_gpu else Tier.RAM
