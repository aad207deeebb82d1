"""Counts firing neurons while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from thermocline.activity.statistics import SIZE_BINS, Activity, Floats, Overlap
from thermocline.errors import NumericalError
from thermocline.files.quantize import dequantize
from thermocline.files.weight import Weight
from thermocline.model.spec import ModelSpec
from thermocline.ops.contract import Array

Bools = npt.NDArray[np.bool_]

ROWS = 128
"""Tokens compared with all earlier ones at once."""
PIECE = 1 << 22
"""Elements of a down projection looked at together."""


class Accumulator:
    """An observer (see `model.network.Observer`) that adds up an `Activity`.

    Steps come layer by layer from 0, sequences one after another: call `begin_sequence` before each.

    Args:
        start: what to add to; its `threshold` says what counts as firing.
        down_norms: (n_layer, n_ff), the norm of each neuron's down row.
        to_host: gives the numpy array of an implementation's own.
    """

    def __init__(
        self, start: Activity, down_norms: Floats, to_host: Callable[[Array], npt.NDArray[Any]] = np.asarray
    ) -> None:
        self._start = start
        self._norms = down_norms
        self._to_host = to_host
        self.tokens, self.sequences = start.tokens, start.sequences
        self._fired, self._sizes = start.fired.copy(), start.sizes.copy()
        self._contribution = start.contribution.copy()
        self._overlaps = [
            (overlap.shared.copy(), overlap.total.copy()) for overlap in (start.token_overlap, start.layer_overlap)
        ]
        self._before: list[Bools | None] = [None] * start.n_layer
        self._alike: npt.NDArray[np.intp] | None = None

    def begin_sequence(self) -> None:
        """The next step's first token follows no other."""
        self.sequences += 1
        self._before = [None] * len(self._before)

    def ffn_input(self, layer: int, residual: Array, normed: Array) -> None:
        """Not looked at."""

    def ffn_hidden(self, layer: int, hidden: Array) -> None:
        """Add one layer's activations (T, n_ff) of the tokens of a step.

        Raises:
            NumericalError: they are not finite.
        """
        magnitude = np.abs(self._to_host(hidden))
        sums = magnitude.sum(axis=0, dtype=np.float64)
        if not np.isfinite(sums).all():
            raise NumericalError(f"layer {layer} computed NaN or infinity; the model's weights or settings are broken")
        active = magnitude > self._start.threshold
        count = np.count_nonzero(active, axis=1)
        if layer == 0:
            self.tokens += len(active)
        self._fired[layer] += np.count_nonzero(active, axis=0)
        self._contribution[layer] += sums * self._norms[layer]
        bins = count * SIZE_BINS // (active.shape[1] + 1)
        self._sizes[layer] += np.bincount(bins, minlength=SIZE_BINS)
        self._compare_tokens(layer, active, count)
        self._compare_layers(layer, active, count)

    def result(self, runs: tuple[Mapping[str, Any], ...] = ()) -> Activity:
        """What was added up so far, with `runs` to tell of it."""
        token, layer = (Overlap(shared.copy(), total.copy()) for shared, total in self._overlaps)
        return Activity(
            model_fingerprint=self._start.model_fingerprint,
            model_name=self._start.model_name,
            tokens=self.tokens,
            sequences=self.sequences,
            threshold=self._start.threshold,
            fired=self._fired.copy(),
            contribution=self._contribution.copy(),
            sizes=self._sizes.copy(),
            token_overlap=token,
            layer_overlap=layer,
            runs=(*self._start.runs, *runs),
            tokens_known=self._start.tokens_known,
        )

    def _compare_tokens(self, layer: int, active: Bools, count: npt.NDArray[np.intp]) -> None:
        shared, total = self._overlaps[0]
        before = self._before[layer]
        if before is not None:
            shared[layer] += np.count_nonzero(active[0] & before)
            total[layer] += count[0]
        shared[layer] += np.count_nonzero(active[1:] & active[:-1])
        total[layer] += count[1:].sum()
        self._before[layer] = active[-1].copy()

    def _compare_layers(self, layer: int, active: Bools, count: npt.NDArray[np.intp]) -> None:
        shared, total = self._overlaps[1]
        if layer > 0 and self._alike is not None:
            shared[layer] += np.count_nonzero(active[1:] & active[self._alike])
            total[layer] += count[1:].sum()
        self._alike = most_alike(active, count) if layer + 1 < len(self._fired) else None


def most_alike(active: Bools, count: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """For each token but the first (T - 1), the earlier one with the most similar active set; of equals the latest.

    Similar is intersection over union; two empty sets are equal.
    """
    words = _words(active)
    found = [_latest_alike(words, count, start) for start in range(1, len(active), ROWS)]
    return np.concatenate(found) if found else np.zeros(0, np.intp)


def _words(active: Bools) -> npt.NDArray[np.uint64]:
    """Active sets (T, n_ff) as bits (ceil(n_ff / 64), T)."""
    packed = np.packbits(active, axis=1)
    padded = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8)))
    return np.ascontiguousarray(padded.view(np.uint64).T)


def _latest_alike(words: npt.NDArray[np.uint64], count: npt.NDArray[np.intp], start: int) -> npt.NDArray[np.intp]:
    """The same for the tokens from `start`, at most ROWS of them."""
    stop = min(start + ROWS, words.shape[1])
    # Not a product of matrices: a BLAS library's threads wait for the next one for so long that kernels go without.
    common = np.zeros((stop - start, stop - 1), np.int64)
    for word in words:
        common += np.bitwise_count(word[start:stop, None] & word[: stop - 1])
    union = count[start:stop, None] + count[: stop - 1] - common
    likeness = np.divide(common, union, out=np.ones(common.shape), where=union > 0)
    likeness[np.arange(stop - 1) >= np.arange(start, stop)[:, None]] = -1.0  # neither itself nor a later one
    latest: npt.NDArray[np.intp] = stop - 2 - likeness[:, ::-1].argmax(axis=1)
    return latest


def down_norms(weights: Mapping[str, Weight], spec: ModelSpec) -> Floats:
    """The Euclidean norm of every neuron's down row (n_layer, n_ff), from weights by canonical names."""
    norms = np.zeros((spec.n_layer, spec.n_ff))
    for layer in range(spec.n_layer):
        records = weights.get(f"blk.{layer}.ffn_down_t.weight")
        weight = records or weights[f"blk.{layer}.ffn_down.weight"]
        step = max(1, PIECE // weight.columns)
        for start in range(0, weight.rows, step):
            piece = dequantize(weight.data[start : start + step], weight.format, weight.columns)
            squares = np.square(piece, dtype=np.float64)
            if records is None:
                norms[layer] += squares.sum(axis=0)
            else:
                norms[layer, start : start + step] = squares.sum(axis=1)
    return np.sqrt(norms)
