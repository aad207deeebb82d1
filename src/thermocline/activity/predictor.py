"""Predictors: low-rank networks, one a layer, that score which neurons will fire; and their files.

Of a layer's residual stream x, before the FFN's norm, the scores of its neurons are fc2 · relu(fc1 · x). A neuron is
computed where its score is at least the layer's threshold; one that is computed in vain costs a row and changes
nothing. Source of the form: PowerInfer (Song et al., SOSP 2024).

On disk a predictor is a sidecar X.predictor.safetensors: for each layer N the matrices `blk.N.fc1.weight`
(rank, n_embd) and `blk.N.fc2.weight` (n_ff, rank), and for all of them `threshold` (n_layer) and, if it was measured,
`active_share` (n_layer), float32. Its info says `input` ("residual"), whatever its maker wrote down, and `audit` once
there was one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from thermocline.errors import ModelFormatError, NumericalError, UnsupportedModelError, UsageError, printable
from thermocline.files.formats import F16, BlockFormat
from thermocline.files.powerinfer import MAX_RANK, PowerinferPredictor, PredictorLayer
from thermocline.files.quantize import from_float, to_float
from thermocline.files.sidecar import Sidecar, SidecarKind, read_sidecar, require_finite, write_sidecar
from thermocline.files.weight import Weight
from thermocline.model.spec import ModelSpec

INPUT: Final = "residual"
"""What scores are made of: the residual stream after attention, before the FFN's norm."""

RANK_UNIT: Final = 32
"""Ranks are best a multiple of this: a whole number of blocks of Q8_0 and Q4_0, and of vectors of any CPU."""


@dataclass(frozen=True, slots=True)
class Audit:
    """What an audit found: whether the loss in quality is small enough, and that in one line."""

    passed: bool
    summary: str


@dataclass(frozen=True, slots=True, eq=False)
class Predictor:
    """The predictors of all layers.

    `thresholds` has one for each layer, infinite ones allowed: -inf computes all neurons. `active_shares`, where it is
    known, is the share of each layer's neurons that one token selects on average, measured. `info` is what its maker
    wrote down (JSON).

    Raises:
        UsageError: these are not as many as layers, or out of their range.
    """

    layers: tuple[PredictorLayer, ...]
    thresholds: tuple[float, ...]
    active_shares: tuple[float, ...] | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shares = self.active_shares
        if not self.layers or {len(self.thresholds), len(shares or self.layers)} != {len(self.layers)}:
            raise UsageError(
                f"a predictor of {len(self.layers)} layers has {len(self.thresholds)} thresholds"
                + (f" and {len(shares)} shares" if shares is not None else "")
            )
        if any(map(math.isnan, self.thresholds)):
            raise UsageError("a threshold is nan; allowed: numbers, and -inf or inf")
        if shares is not None and not all(0 <= share <= 1 for share in shares):
            raise UsageError("a share of active neurons is outside 0 to 1")

    @classmethod
    def of_powerinfer(cls, predictor: PowerinferPredictor) -> Predictor:
        """One of PowerInfer's, which has one threshold for all layers."""
        return cls(predictor.layers, (predictor.threshold,) * len(predictor.layers))

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        return sum(layer.fc1.nbytes + layer.fc2.nbytes for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Numbers in all matrices."""
        return sum(w.rows * w.columns for layer in self.layers for w in (layer.fc1, layer.fc2))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Width of each layer's hidden layer."""
        return tuple(layer.rank for layer in self.layers)

    @property
    def audit(self) -> Audit | None:
        """What the audit of this predictor found; None if there was none.

        Raises:
            UsageError: the note is not what an audit writes.
        """
        note = self.info.get("audit")
        if note is None:
            return None
        fields = (note.get("passed"), note.get("summary", "")) if isinstance(note, dict) else (None, None)
        if not isinstance(fields[0], bool) or not isinstance(fields[1], str):
            raise UsageError("the predictor's note of its audit is damaged; audit it again")
        return Audit(fields[0], printable(fields[1]))

    def share(self, spec: ModelSpec) -> float:
        """Numbers of the predictor for each weight of the model."""
        return self.parameters / spec.parameters

    def with_threshold(self, threshold: float) -> Predictor:
        """The same with one threshold for all layers. What was measured with other ones is forgotten.

        Raises:
            UsageError: the threshold is NaN.
        """
        info = {key: value for key, value in self.info.items() if key != "audit"}
        return replace(self, thresholds=(threshold,) * len(self.layers), active_shares=None, info=info)

    def in_format(self, fmt: BlockFormat) -> Predictor:
        """The same with matrices in `fmt`; what was measured with other numbers is forgotten.

        Ranks are filled up to a multiple of RANK_UNIT with zeros, which change no score. Where n_embd is no whole
        number of blocks, fc1 is F16.

        Raises:
            NumericalError: a number does not fit the format.
        """
        layers = tuple(in_format(layer, fmt) for layer in self.layers)
        info = {key: value for key, value in self.info.items() if key != "audit"}
        return replace(self, layers=layers, active_shares=None, info=info)

    def require_fits(self, path: Path | str, spec: ModelSpec) -> None:
        """Hold the predictor, which came from `path`, to the network's sizes.

        Raises:
            ModelFormatError: it is of another network.
        """
        sizes = {"n_layer": spec.n_layer, "n_embd": spec.n_embd, "n_ff": spec.n_ff}
        PowerinferPredictor(self.layers).check(path, **sizes)

    def saves(self, first_bytes: tuple[int, ...]) -> bool:
        """Whether a token reads less with the predictor than without it; True where no share was measured."""
        return self.active_shares is None or self.read_bytes(first_bytes) < sum(first_bytes)

    def read_bytes(self, first_bytes: tuple[int, ...]) -> float:
        """What a token reads to find the neurons that fire: the predictor, and the selected rows of `first_bytes`,
        which mode exact reads whole (see `memory.checks`); of all rows where no share was measured.
        """
        shares = self.active_shares or (1.0,) * len(self.layers)
        return self.nbytes + sum(share * first for share, first in zip(shares, first_bytes, strict=True))


MOST_TOKENS: Final = 64
"""Beyond so many tokens of a step nothing is predicted: they have nearly all neurons in common use."""


def save_predictor(predictor: Predictor, path: Path | str, model_fingerprint: str, *, model_name: str = "") -> str:
    """Write a predictor as a sidecar, whole or not at all; returns the file's checksum.

    Raises:
        NumericalError: a number of a matrix is NaN or infinite.
        OutputError: it could not be written; the old file, if any, is untouched.
    """
    tensors: dict[str, npt.NDArray[Any] | Weight] = {}
    if predictor.active_shares is not None:
        tensors["active_share"] = np.array(predictor.active_shares, np.float32)
    for index, layer in enumerate(predictor.layers):
        tensors |= {f"blk.{index}.fc1.weight": layer.fc1, f"blk.{index}.fc2.weight": layer.fc2}
    require_finite(path, tensors)
    tensors["threshold"] = np.array(predictor.thresholds, np.float32)
    info = {**predictor.info, "input": INPUT}
    return write_sidecar(path, SidecarKind.PREDICTOR, model_fingerprint, info, tensors, model_name=model_name)


def load_predictor(
    path: Path | str, model_fingerprint: str, *, model_name: str = "", verify: bool = False
) -> Predictor:
    """Read what `save_predictor` wrote, as views on the file. `verify` reads all of it to compare the checksum.

    Whether the matrices are finite is left to whoever places them (`memory.loader`), which is faster.

    Raises:
        FingerprintError: it is another model's.
        ModelFormatError: it is no predictor, or damaged, or contradicts itself.
        NumericalError: a threshold or a share is NaN.
        UnsupportedModelError: it is of a version, or takes an input, that this program does not know.
    """
    sidecar = read_sidecar(path, SidecarKind.PREDICTOR, verify=verify)
    sidecar.require_model(model_fingerprint, model_name)
    return predictor_of(sidecar)


def predictor_of(sidecar: Sidecar) -> Predictor:
    """The predictor in an opened sidecar; raises as `load_predictor`, and asks for no model."""
    source = sidecar.info.get("input")
    if source != INPUT:
        raise UnsupportedModelError(
            f"{printable(str(sidecar.path))}: scores are made of {printable(repr(source), 40)}; "
            f"implemented is {INPUT!r}"
        )
    thresholds = _vector(sidecar, "threshold")
    if not len(thresholds):
        raise ModelFormatError(sidecar.path, "threshold", "is empty; needed is one for each layer")
    shares = _vector(sidecar, "active_share", len(thresholds)) if "active_share" in sidecar.arrays else None
    if shares is not None and not ((shares >= 0) & (shares <= 1)).all():
        raise ModelFormatError(sidecar.path, "active_share", "is not everywhere from 0 to 1")
    return Predictor(
        _layers(sidecar.path, sidecar.weights, len(thresholds)),
        tuple(thresholds.tolist()),
        None if shares is None else tuple(shares.tolist()),
        sidecar.info,
    )


def _layers(path: Path, weights: Mapping[str, Weight], n_layer: int) -> tuple[PredictorLayer, ...]:
    names = [f"blk.{layer}.{part}.weight" for layer in range(n_layer) for part in ("fc1", "fc2")]
    missing = next((name for name in names if name not in weights), None)
    if missing is not None:
        raise ModelFormatError(path, missing, f"is missing; there are thresholds for {n_layer} layers")
    if len(weights) > len(names):
        extra = next(name for name in weights if name not in names)
        raise ModelFormatError(path, printable(extra, 80), f"belongs to none of {n_layer} layers")
    layers = [PredictorLayer(weights[a], weights[b]) for a, b in zip(names[::2], names[1::2], strict=True)]
    for index, layer in enumerate(layers):
        if layer.fc2.columns != layer.fc1.rows or not 1 <= layer.rank <= MAX_RANK:
            problem = f"fc1 is {layer.fc1.rows} x {layer.fc1.columns} and fc2 {layer.fc2.rows} x {layer.fc2.columns}"
            raise ModelFormatError(
                path, f"predictor of layer {index}", f"{problem}; one rank of 1 to {MAX_RANK} is needed"
            )
    return tuple(layers)


def _vector(sidecar: Sidecar, name: str, length: int | None = None) -> npt.NDArray[np.float32]:
    vector = sidecar.arrays.get(name)
    if vector is None:
        raise ModelFormatError(sidecar.path, name, "is missing")
    if vector.dtype != np.float32 or vector.ndim != 1 or length not in (None, len(vector)):
        wanted = f"float32 [{'n_layer' if length is None else length}]"
        raise ModelFormatError(sidecar.path, name, f"is {vector.dtype} {list(vector.shape)}; needed: {wanted}")
    if np.isnan(vector).any():
        raise NumericalError(f"{printable(str(sidecar.path))}: {name}: holds NaN; make the file anew")
    return vector


def in_format(layer: PredictorLayer, fmt: BlockFormat) -> PredictorLayer:
    """One layer in another format; see `Predictor.in_format`."""
    fc1, fc2 = to_float(layer.fc1), to_float(layer.fc2)
    more = -layer.rank % math.lcm(RANK_UNIT, fmt.block)
    if more:
        fc1, fc2 = np.pad(fc1, ((0, more), (0, 0))), np.pad(fc2, ((0, 0), (0, more)))
    first = fmt if layer.fc1.columns % fmt.block == 0 else F16
    return PredictorLayer(from_float(layer.fc1.name, fc1, first), from_float(layer.fc2.name, fc2, fmt))
