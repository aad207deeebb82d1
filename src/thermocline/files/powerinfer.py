"""What PowerInfer's sparse models hold beside a network: a predictor for each layer.

Source of names and shapes: the converters and the loader of PowerInfer (Song et al., SOSP 2024).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from thermocline.errors import ModelFormatError, NumericalError, UnsupportedModelError, printable
from thermocline.files.formats import Q5_0
from thermocline.files.gguf import GgufFile
from thermocline.files.quantize import all_finite, widened
from thermocline.files.tensors import Tensor
from thermocline.files.weight import Weight

THRESHOLD_KEY: Final = "powerinfer.sparse_threshold"
THRESHOLDS: Final = (-1e6, 1e6)
"""Smallest and largest threshold; scores are logits of a few units."""
MAX_RANK: Final = 1 << 16

_SIZES: Final = {"n_embd": "embedding_length", "n_ff": "feed_forward_length"}
_TENSOR: Final = re.compile(r"blk\.(0|[1-9]\d{0,3})\.(fc[12])\.weight")


@dataclass(frozen=True, slots=True, eq=False)
class PredictorLayer:
    """The predictor of one layer: scores = fc2 · relu(fc1 · x), of every neuron.

    `fc1` is (rank, n_embd), `fc2` (n_ff, rank). x is the residual stream after attention, before the FFN's norm
    (in `falcon`, the layer's input).
    """

    fc1: Weight
    fc2: Weight

    @property
    def rank(self) -> int:
        """Width of the hidden layer."""
        return self.fc1.rows


@dataclass(frozen=True, slots=True, eq=False)
class PowerinferPredictor:
    """The predictors of all layers; a neuron is taken for active where its score is at least `threshold`."""

    layers: tuple[PredictorLayer, ...]
    threshold: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all its matrices."""
        return sum(layer.fc1.nbytes + layer.fc2.nbytes for layer in self.layers)

    def check(self, path: Path | str, *, n_layer: int, n_embd: int, n_ff: int) -> None:
        """Hold it to the sizes of the model it is for; `path` is where it came from.

        Raises:
            ModelFormatError: it has another number of layers, or a matrix of another shape.
        """
        if len(self.layers) != n_layer:
            problem = f"found {len(self.layers)}; the model has {n_layer}"
            raise ModelFormatError(path, "layers of the predictor", problem)
        for index, layer in enumerate(self.layers):
            found = (layer.fc1.columns, layer.fc2.rows)
            if found != (n_embd, n_ff):
                problem = f"goes from {found[0]} inputs to {found[1]} neurons; the model has {n_embd} and {n_ff}"
                raise ModelFormatError(path, f"predictor of layer {index}", problem)


def read_predictor(file: GgufFile) -> PowerinferPredictor | None:
    """The predictors in a model file, as views on it; None if it has none.

    Matrices in Q5_0, which PowerInfer's quantiser makes of them, become Q8_0 of the same numbers.

    Raises:
        ModelFormatError: a layer's predictor is missing, of a shape that does not fit the model, or there are
            predictors of layers that the model has not.
        NumericalError: a number of one is NaN or infinite.
        UnsupportedModelError: one is in a format that cannot be read.
    """
    found = _by_layer(file.tensors)
    if not found:
        return None
    metadata = file.metadata
    prefix = metadata.text("general.architecture", limit=64) + "."
    n_layer = metadata.integer(prefix + "block_count", 1, 1 << 12)
    missing = [f"{part} of layer {i}" for i in range(n_layer) for part in ("fc1", "fc2") if (i, part) not in found]
    if missing or len(found) != 2 * n_layer:
        problem = f"found {len(found)} of {n_layer} layers" + (
            f"; missing: {', '.join(missing[:5])}" if missing else ""
        )
        raise ModelFormatError(file.path, "predictor matrices", problem)
    layers = [_layer(file.path, i, found[i, "fc1"], found[i, "fc2"]) for i in range(n_layer)]
    predictor = PowerinferPredictor(tuple(layers), metadata.number(THRESHOLD_KEY, *THRESHOLDS, 0.0))
    sizes = {name: metadata.integer(prefix + key, 1, 1 << 20) for name, key in _SIZES.items()}
    predictor.check(file.path, n_layer=n_layer, **sizes)
    return predictor


def predictor_layer(path: Path | str, label: str, fc1: Weight, fc2: Weight) -> PredictorLayer:
    """The two matrices as a predictor, if they are one.

    Raises:
        ModelFormatError: the matrices do not fit together.
        NumericalError: a number is NaN or infinite.
    """
    if fc2.columns != fc1.rows or not 1 <= fc1.rows <= MAX_RANK:
        problem = f"fc1 is {fc1.rows} x {fc1.columns} and fc2 {fc2.rows} x {fc2.columns}; allowed: one rank of 1 to "
        raise ModelFormatError(path, label, f"{problem}{MAX_RANK}")
    for part, weight in (("fc1", fc1), ("fc2", fc2)):
        if not all_finite(weight):
            raise NumericalError(f"{printable(str(path))}: {label}: {part} holds NaN or infinity")
    return PredictorLayer(fc1, fc2)


def _by_layer(tensors: Mapping[str, Tensor]) -> dict[tuple[int, str], Tensor]:
    matches = ((_TENSOR.fullmatch(name), tensor) for name, tensor in tensors.items())
    return {(int(match[1]), match[2]): tensor for match, tensor in matches if match}


def _layer(path: Path, index: int, fc1: Tensor, fc2: Tensor) -> PredictorLayer:
    return predictor_layer(path, f"predictor of layer {index}", _matrix(fc1), _matrix(fc2))


def _matrix(tensor: Tensor) -> Weight:
    if tensor.format is not Q5_0:
        return tensor.weight()
    if len(tensor.shape) != 2:
        raise UnsupportedModelError(f"tensor {tensor.name} has shape {list(tensor.shape)}; readable are matrices")
    rows, columns = tensor.shape
    return widened(Weight(tensor.name, Q5_0, (rows, columns), tensor.data.reshape(rows, -1)))
