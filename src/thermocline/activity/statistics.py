"""What a profile knows about a model's neurons: how often each fires, how much it adds, and what repeats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from thermocline.errors import FingerprintError, UsageError, printable
from thermocline.files.sidecar import named

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

SIZE_BINS: Final = 256
"""Bins of the distribution of active-set sizes: a set of s neurons falls in bin s * SIZE_BINS // (n_ff + 1)."""


@dataclass(frozen=True, slots=True, eq=False)
class Overlap:
    """Of `total` (n_layer) active neurons that had something to be compared with, `shared` were active there too."""

    shared: Ints
    total: Ints

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(self.shared + other.shared, self.total + other.total)

    @property
    def share(self) -> Floats:
        """The quotient of both per layer; NaN where nothing was compared."""
        return _quotient(self.shared.astype(np.float64), self.total.astype(np.float64))

    @property
    def mean(self) -> float:
        """Over all layers together; NaN where nothing was compared."""
        total = int(self.total.sum())
        return int(self.shared.sum()) / total if total else float("nan")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Activity:
    """The statistics of one model over `tokens` tokens in `sequences` sequences.

    A neuron *fires* for a token if the magnitude of its activation is more than `threshold`. Arrays are indexed
    by layer, then by neuron as the model's file numbers them.

    * `fired` (n_layer, n_ff): for how many tokens.
    * `contribution` (n_layer, n_ff): sum over the tokens of |activation| times the norm of the neuron's down row.
    * `sizes` (n_layer, SIZE_BINS): for how many tokens the active set had which size.
    * `token_overlap`: the active set against that of the token before it, in the same sequence.
    * `layer_overlap`: the active set against that of the earlier token of the batch whose active set one layer
      below is most alike (by intersection over union; of equals the latest). It tells how well a layer foresees
      the next one. The first layer has nothing below.
    * `runs`: what was read, a record for each run that was merged.
    * `tokens_known`: False where `tokens` is only the least that can have been read.
    """

    model_fingerprint: str
    model_name: str
    tokens: int
    sequences: int
    threshold: float
    fired: Ints
    contribution: Floats
    sizes: Ints
    token_overlap: Overlap
    layer_overlap: Overlap
    runs: tuple[Mapping[str, Any], ...] = ()
    tokens_known: bool = True

    @classmethod
    def empty(
        cls, model_fingerprint: str, model_name: str, n_layer: int, n_ff: int, *, threshold: float = 0.0
    ) -> Activity:
        """Before the first token."""
        return cls.from_counts(model_fingerprint, model_name, np.zeros((n_layer, n_ff), np.int64), 0, threshold)

    @classmethod
    def from_counts(
        cls, model_fingerprint: str, model_name: str, fired: Ints, tokens: int, threshold: float = 0.0
    ) -> Activity:
        """Statistics of which only `fired` (n_layer, n_ff) over `tokens` is known, such as PowerInfer's files hold."""
        n_layer = len(fired)

        def zeros() -> Ints:
            return np.zeros(n_layer, np.int64)

        return cls(
            model_fingerprint=model_fingerprint,
            model_name=model_name,
            tokens=tokens,
            sequences=0,
            threshold=threshold,
            fired=np.asarray(fired, np.int64),
            contribution=np.zeros(fired.shape, np.float64),
            sizes=np.zeros((n_layer, SIZE_BINS), np.int64),
            token_overlap=Overlap(zeros(), zeros()),
            layer_overlap=Overlap(zeros(), zeros()),
        )

    @property
    def n_layer(self) -> int:
        """Layers."""
        return len(self.fired)

    @property
    def n_ff(self) -> int:
        """Neurons of a layer."""
        return int(self.fired.shape[1])

    @property
    def temperatures(self) -> Floats:
        """How often each neuron fires, 0 to 1 (n_layer, n_ff); 0 where nothing was read."""
        return self.fired / max(self.tokens, 1)

    @property
    def order(self) -> npt.NDArray[np.int32]:
        """Each layer's neurons, hottest first (n_layer, n_ff); of equals the lower number first."""
        return np.argsort(-self.fired, axis=1, kind="stable").astype(np.int32)

    @property
    def sorted_temperatures(self) -> Floats:
        """Temperatures in the order of `order` (n_layer, n_ff), which is what placement asks for."""
        return -np.sort(-self.temperatures, axis=1)

    @property
    def active_share(self) -> Floats:
        """Mean size of the active set as a share of the layer's neurons (n_layer)."""
        share: Floats = self.temperatures.mean(axis=1)
        return share

    @property
    def chance_overlap(self) -> Floats:
        """What any overlap would be if every neuron fired by itself at its temperature (n_layer); NaN if none fires."""
        p = self.temperatures
        return _quotient((p * p).sum(axis=1), p.sum(axis=1))

    def coverage(self, share: float = 0.8) -> tuple[Floats, float]:
        """The smallest share of neurons that gives `share` of the activations: per layer (n_layer), whole model.

        PowerInfer's paper (section 2.2) quotes this figure for a share of 0.8.
        """
        return np.array([_coverage(row, share) for row in self.fired]), _coverage(self.fired.reshape(-1), share)

    def size_quantile(self, q: float) -> Floats:
        """The size that the active set does not exceed for a share `q` of tokens, as a share of n_ff (n_layer).

        Exact to one bin; NaN where no sizes are known.
        """
        below = np.cumsum(self.sizes, axis=1)
        total = below[:, -1]
        bins = (below < q * total[:, None]).sum(axis=1)
        # The largest size of a bin: the bins' floors are not evenly spaced where n_ff is no multiple of them.
        largest = -(-(bins + 1) * (self.n_ff + 1) // SIZE_BINS) - 1
        sizes: Floats = np.where(total > 0, largest / self.n_ff, np.nan)
        return sizes

    def require_model(self, fingerprint: str, name: str = "", *, path: Path | str = "activity") -> None:
        """Refuse to be used with another model; `path` is where it came from.

        Raises:
            FingerprintError: `fingerprint` is another model's.
        """
        if fingerprint != self.model_fingerprint:
            mine, other = named(self.model_name, self.model_fingerprint), named(name, fingerprint)
            raise FingerprintError(path, mine, other, "profile this model with `thermocline profile`")

    def reordered(self, order: npt.NDArray[np.integer[Any]]) -> Activity:
        """The same where each layer's neurons are numbered anew: `order` (n_layer, n_ff) gives their numbers here."""
        places = order.astype(np.intp)
        return replace(
            self,
            fired=np.take_along_axis(self.fired, places, axis=1),
            contribution=np.take_along_axis(self.contribution, places, axis=1),
        )

    def with_run(self, run: Mapping[str, Any]) -> Activity:
        """The same, with a record of what was read."""
        return replace(self, runs=(*self.runs, run))

    def merge(self, other: Activity, *, path: Path | str = "activity") -> Activity:
        """Both together, as if one run had read what both read; `path` is where the other came from.

        Raises:
            FingerprintError: they are of different models.
            UsageError: they do not mean the same by firing, or share a run.
        """
        other.require_model(self.model_fingerprint, self.model_name, path=path)
        if (self.fired.shape, self.threshold) != (other.fired.shape, other.threshold):
            raise UsageError(
                f"{printable(str(path))} cannot be merged: activities have thresholds {self.threshold:g} and "
                f"{other.threshold:g} over {self.fired.shape} and {other.fired.shape} (layers, neurons); profile anew"
            )
        known = {run["id"] for run in self.runs if "id" in run}
        twice = next((run["id"] for run in other.runs if run.get("id") in known), None)
        if twice is not None:
            raise UsageError(
                f"{printable(str(path))} cannot be merged: run {twice} is in both activities, and its tokens would "
                "count twice"
            )
        return replace(
            self,
            tokens=self.tokens + other.tokens,
            sequences=self.sequences + other.sequences,
            fired=self.fired + other.fired,
            contribution=self.contribution + other.contribution,
            sizes=self.sizes + other.sizes,
            token_overlap=self.token_overlap + other.token_overlap,
            layer_overlap=self.layer_overlap + other.layer_overlap,
            runs=self.runs + other.runs,
            tokens_known=self.tokens_known and other.tokens_known,
        )

    def summary(self) -> dict[str, Any]:
        """The figures of the whole model and of each layer, for JSON; None where a figure is not known."""
        layers, whole = self.coverage()
        middle, high = self.size_quantile(0.5), self.size_quantile(0.99)
        columns = {
            "active_share": self.active_share,
            "median_active_share": middle,
            "p99_active_share": high,
            "neurons_for_80_percent": layers,
            "never_fired": (self.fired == 0).mean(axis=1),
            "token_overlap": self.token_overlap.share,
            "layer_overlap": self.layer_overlap.share,
            "chance_overlap": self.chance_overlap,
        }
        return {
            "model": self.model_name,
            "model_fingerprint": self.model_fingerprint,
            "tokens": self.tokens,
            "tokens_known": self.tokens_known,
            "sequences": self.sequences,
            "threshold": self.threshold,
            "n_layer": self.n_layer,
            "n_ff": self.n_ff,
            "active_share": known(float(self.active_share.mean())),
            "neurons_for_80_percent": whole,
            "token_overlap": known(self.token_overlap.mean),
            "layer_overlap": known(self.layer_overlap.mean),
            "runs": [dict(run) for run in self.runs],
            "layers": [
                {name: known(float(values[layer])) for name, values in columns.items()} for layer in range(self.n_layer)
            ],
        }


def merge_all(activities: Sequence[tuple[Path | str, Activity]]) -> Activity:
    """All of them together, in order, each with where it came from.

    Raises:
        FingerprintError, UsageError: as `Activity.merge`; or there are none.
    """
    if not activities:
        raise UsageError("there is no activity to merge; name at least one file")
    (_, merged), *others = activities
    for path, activity in others:
        merged = merged.merge(activity, path=path)
    return merged


def known(value: float) -> float | None:
    """The value, None if it is NaN."""
    return None if np.isnan(value) else value


def _quotient(part: Floats, whole: Floats) -> Floats:
    """Part / whole, NaN where that is 0 / 0."""
    quotient: Floats = np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
    return quotient


def _coverage(counts: Ints, share: float) -> float:
    total = int(counts.sum())
    if not total:
        return 0.0
    reached = np.cumsum(-np.sort(-counts))
    return (int(np.searchsorted(reached, share * total)) + 1) / len(counts)
