"""Predictors inside model files, and as PowerInfer has them.

PowerInfer's files hold one threshold for all layers, `powerinfer.sparse_threshold`. Ours say besides what a predictor
knows of each: `thermocline.predictor.thresholds` and, if they were measured, `thermocline.predictor.active_shares`
(n_layer, float32). An audit is of one model's very numbers, and stays behind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import numpy as np

from thermocline.activity.predictor import Predictor
from thermocline.errors import UsageError
from thermocline.files.formats import F32
from thermocline.files.gguf import GgufFile
from thermocline.files.metadata import Metadata
from thermocline.files.powerinfer import (
    THRESHOLD_KEY,
    THRESHOLDS,
    PowerinferPredictor,
    PredictorLayer,
    read_predictor,
)
from thermocline.files.quantize import quantize, to_float
from thermocline.files.weight import Bytes, Weight

LAYERS_KEY: Final = "thermocline.predictor.thresholds"
SHARES_KEY: Final = "thermocline.predictor.active_shares"


def predictor_inside(file: GgufFile) -> Predictor | None:
    """The predictor in a model file, as views on it; None if it has none.

    Raises as `files.powerinfer.read_predictor`, and ModelFormatError where thresholds or shares are none.
    """
    inside = read_predictor(file)
    if inside is None:
        return None
    found = Predictor.of_powerinfer(inside)
    thresholds = _floats(file.metadata, LAYERS_KEY, -math.inf, math.inf, len(found.layers))
    shares = _floats(file.metadata, SHARES_KEY, 0, 1, len(found.layers))
    return replace(found, thresholds=found.thresholds if thresholds is None else thresholds, active_shares=shares)


def predictor_metadata(predictor: Predictor, *, measured: bool) -> dict[str, object]:
    """Keys of a model file with this predictor inside; `measured` says whether its shares still hold."""
    thresholds = predictor.thresholds
    keys: dict[str, object] = {LAYERS_KEY: np.array(thresholds, np.float32)}
    if len(set(thresholds)) == 1 and THRESHOLDS[0] <= thresholds[0] <= THRESHOLDS[1]:
        keys[THRESHOLD_KEY] = np.float32(thresholds[0])
    if measured and predictor.active_shares is not None:
        keys[SHARES_KEY] = np.array(predictor.active_shares, np.float32)
    return keys


def without_predictor(metadata: Mapping[str, object]) -> dict[str, object]:
    """Metadata without what it says of a predictor."""
    return {key: value for key, value in metadata.items() if key not in {LAYERS_KEY, SHARES_KEY, THRESHOLD_KEY}}


def for_powerinfer(predictor: Predictor) -> PowerinferPredictor:
    """The same with one threshold: that of the first layer that scores, to which the scores of the others are scaled.

    A layer whose scores are all zero has all neurons computed at a threshold up to 0 and none above, and stays as it
    is: whatever its own threshold, that of the file must be on the same side.

    Raises:
        UsageError: no scale makes the layers' thresholds one, as they lie on both sides of 0 or are infinite.
    """
    thresholds = predictor.thresholds
    if len(set(thresholds)) == 1 and math.isfinite(thresholds[0]):
        return PowerinferPredictor(predictor.layers, thresholds[0])
    silent = [not to_float(layer.fc2).any() for layer in predictor.layers]
    scoring = [threshold for threshold, zero in zip(thresholds, silent, strict=True) if not zero]
    one = scoring[0] if scoring else float(thresholds[0] > 0)
    layers = []
    for number, (layer, threshold, zero) in enumerate(zip(predictor.layers, thresholds, silent, strict=True)):
        scale = _scale(one, threshold, zero=zero)
        if scale is None:
            raise UsageError(
                f"PowerInfer has one threshold for all layers; this predictor has {min(thresholds):g} to "
                f"{max(thresholds):g}, which no scale makes one: layer {number}, where it is {threshold:g}, would "
                "select other neurons; --predictor-threshold gives all layers the same, which changes what is selected"
            )
        layers.append(layer if scale == 1 else PredictorLayer(layer.fc1, _Scaled(layer.fc2, scale)))
    return PowerinferPredictor(tuple(layers), one)


def _scale(one: float, threshold: float, *, zero: bool) -> float | None:
    """What scores are to be multiplied by so that `one` selects what `threshold` does; None if there is no such number.

    Scores may be all `zero`.
    """
    if not math.isfinite(one):
        return None
    if zero:
        return 1.0 if (one <= 0) == (threshold <= 0) else None
    if one == threshold:
        return 1.0
    scale = one / threshold if threshold else 0.0
    return scale if 0 < scale < math.inf and math.isfinite(threshold) else None


class _Scaled(Weight):
    """A weight times a number, in F32, made anew whenever `data` is asked for."""

    __slots__ = ("_scale", "_source")
    _source: Weight
    _scale: float

    def __init__(self, source: Weight, scale: float) -> None:
        for field, value in (("name", source.name), ("format", F32), ("shape", source.shape)):
            object.__setattr__(self, field, value)
        object.__setattr__(self, "_source", source)
        object.__setattr__(self, "_scale", scale)

    @property
    def data(self) -> Bytes:
        """A new array (rows, 4 * columns)."""
        return quantize(to_float(self._source) * np.float32(self._scale), F32)

    def slice(self, start: int, stop: int) -> Weight:
        """Rows `start` to `stop`, still to be made."""
        return _Scaled(self._source.slice(start, stop), self._scale)


def _floats(metadata: Metadata, key: str, low: float, high: float, length: int) -> tuple[float, ...] | None:
    found = metadata.array(key, "float", length=length, default=None)
    if found is None:
        return None
    if not ((found >= low) & (found <= high)).all():
        raise metadata.wrong(key, f"numbers from {low:g} to {high:g}")
    return tuple(float(value) for value in found)
