"""PowerInfer's folders of PyTorch files: activation counts, and predictors before they are converted.

Source of names and contents: PowerInfer's solver, exporter and converters (Song et al., SOSP 2024).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from thermocline.errors import ModelFormatError, OutputError, printable
from thermocline.files.atomic import atomic_folder, atomic_write
from thermocline.files.formats import F16, F32
from thermocline.files.layer_files import layer_files
from thermocline.files.mapped import read_small
from thermocline.files.metadata import Metadata
from thermocline.files.powerinfer import THRESHOLDS, PowerinferPredictor, PredictorLayer, predictor_layer
from thermocline.files.quantize import converted
from thermocline.files.strict_json import parse_object
from thermocline.files.torch_pickle import Array, read_tensor_pt, write_tensor_pt
from thermocline.files.weight import Weight

CONFIG: Final = "config.json"
MODEL_KEY: Final = "thermocline.model"
"""In config.json, whose it is; PowerInfer passes over what it does not know there."""
_MAX_CONFIG: Final = 1 << 20
_FORMATS: Final = {np.dtype("<f4"): F32, np.dtype("<f2"): F16}
_PARTS: Final = {"fc1.weight", "fc2.weight"}


@dataclass(frozen=True, slots=True, eq=False)
class ActivationFolder:
    """How often each neuron fired: of every layer a vector (n_ff,), whole numbers or floats, none below 0.

    `warnings` names files of the folder that were not read.
    """

    counts: tuple[npt.NDArray[Any], ...]
    warnings: tuple[str, ...] = ()

    @property
    def n_layer(self) -> int:
        """Number of layers."""
        return len(self.counts)

    @property
    def n_ff(self) -> int:
        """Neurons of a layer."""
        return len(self.counts[0])


@dataclass(frozen=True, slots=True, eq=False)
class PredictorFolder:
    """The predictors of a folder; `warnings` names files of it that were not read.

    `model` is the fingerprint of the model that they are for; empty where the folder does not say it.
    """

    predictor: PowerinferPredictor
    warnings: tuple[str, ...] = ()
    model: str = ""


def read_activation_folder(
    path: Path | str, *, n_layer: int | None = None, n_ff: int | None = None
) -> ActivationFolder:
    """Read `activation_0.pt`, `activation_1.pt` and so on, in the order of their numbers.

    `n_layer` and `n_ff` are those of the model that the counts are for, where it is known.

    Raises:
        ModelFormatError: layers are missing, there twice or too many; or a file holds anything but one vector of
            counts as long as those of the other layers. No code in a file is executed.
    """
    path = Path(path)
    files, warnings = layer_files(path, "activation", n_layer=n_layer)
    counts: list[Array] = []
    for file in files:
        found = _counts(file)
        wanted = n_ff if n_ff is not None else len(counts[0]) if counts else len(found)
        if len(found) != wanted:
            whose = "the model has" if n_ff is not None else "the layer before has"
            raise ModelFormatError(file, "length", f"{len(found)} neurons; {whose} {wanted}")
        counts.append(found)
    return ActivationFolder(tuple(counts), warnings)


def write_activation_folder(path: Path | str, counts: Sequence[Array]) -> None:
    """Write a new folder of counts, whole or not at all; whole numbers become int64.

    PowerInfer expects it under the name `activation` beside the model, and solves only for n_ff that are
    multiples of 256.

    Raises:
        OutputError: the folder is there and not empty, cannot be written, or the counts are none.
    """
    path = Path(path)
    lengths = {array.shape for array in counts}
    if len(lengths) != 1 or any(array.ndim != 1 or array.dtype.kind not in "iuf" for array in counts):
        raise OutputError(f"{printable(str(path))}: counts must be vectors of numbers of one length, one a layer")
    if any(not np.isfinite(array).all() or (array < 0).any() for array in counts):
        raise OutputError(f"{printable(str(path))}: counts must be finite and not below 0")
    with atomic_folder(path) as folder:
        for index, array in enumerate(counts):
            stored = array if array.dtype.kind == "f" else array.astype(np.int64)
            write_tensor_pt(folder / f"activation_{index}.pt", stored)


def read_predictor_folder(path: Path | str, *, n_layer: int | None = None) -> PredictorFolder:
    """Read `model_0.pt`, `model_1.pt` and so on, and the threshold from `config.json` if it is there.

    Use `PowerinferPredictor.check` to hold the result to a model.

    Raises:
        ModelFormatError: layers are missing, there twice or not as many as `n_layer`; a file holds anything but
            `fc1.weight` (rank, n_embd) and `fc2.weight` (n_ff, rank) in floats; or layers differ in n_embd or
            n_ff. No code in a file is executed.
        NumericalError: a weight is NaN or infinite.
    """
    path = Path(path)
    files, warnings = layer_files(path, "model", n_layer=n_layer, known=(CONFIG,))
    config = _config(path / CONFIG)
    threshold = config.number("sparse_threshold", *THRESHOLDS, 0.0)
    predictor = PowerinferPredictor(tuple(map(_predictor_layer, files)), threshold)
    first = predictor.layers[0]
    for file, layer in zip(files, predictor.layers, strict=True):
        found, wanted = (layer.fc1.columns, layer.fc2.rows), (first.fc1.columns, first.fc2.rows)
        if found != wanted:
            problem = f"goes from {found[0]} inputs to {found[1]} neurons; layer 0 from {wanted[0]} to {wanted[1]}"
            raise ModelFormatError(file, "shape", problem)
    return PredictorFolder(predictor, warnings, config.text(MODEL_KEY, "", limit=64))


def write_predictor_folder(path: Path | str, predictor: PowerinferPredictor, *, model: str = "") -> None:
    """Write a new folder that PowerInfer's converters take, whole or not at all.

    Matrices in F16 stay so; all others become float32. `model` is the fingerprint of the model that it is for.

    Raises:
        OutputError: the folder is there and not empty, or cannot be written, or the threshold is not a number.
    """
    low, high = THRESHOLDS
    if not low <= predictor.threshold <= high:
        shown = printable(str(path))
        raise OutputError(f"{shown}: a threshold of {predictor.threshold}; allowed: {low:g} to {high:g}")
    with atomic_folder(Path(path)) as folder:
        for index, layer in enumerate(predictor.layers):
            named = {"fc1.weight": _array(layer.fc1), "fc2.weight": _array(layer.fc2)}
            write_tensor_pt(folder / f"model_{index}.pt", named)
        with atomic_write(folder / CONFIG) as file:
            config = {"sparse_threshold": predictor.threshold} | ({MODEL_KEY: model} if model else {})
            file.write(json.dumps(config).encode() + b"\n")


def _counts(file: Path) -> Array:
    found = read_tensor_pt(file)
    if isinstance(found, dict):
        raise ModelFormatError(file, "content", f"holds {_listed(found)} by name; allowed: one vector of counts")
    if found.ndim != 1 or not len(found) or found.dtype.kind not in "iuf":
        problem = f"a tensor of shape {list(found.shape)} and {found.dtype}; allowed: a vector of numbers, not empty"
        raise ModelFormatError(file, "content", problem)
    if not np.isfinite(found).all() or (found < 0).any():
        worst = found[~(np.isfinite(found) & (found >= 0))][0]
        raise ModelFormatError(file, "content", f"found {worst}; allowed: finite counts from 0")
    return found


def _predictor_layer(file: Path) -> PredictorLayer:
    found = read_tensor_pt(file)
    if not isinstance(found, dict) or set(found) != _PARTS:
        shown = _listed(found) if isinstance(found, dict) else "one tensor without a name"
        raise ModelFormatError(file, "content", f"holds {shown}; allowed: fc1.weight and fc2.weight, and no others")
    fc1, fc2 = (_weight(file, name, found[name]) for name in ("fc1.weight", "fc2.weight"))
    return predictor_layer(file, "predictor", fc1, fc2)


def _weight(file: Path, name: str, array: Array) -> Weight:
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind != "f":
        problem = f"a tensor of shape {list(array.shape)} and {array.dtype}; allowed: a matrix of floats, not empty"
        raise ModelFormatError(file, name, problem)
    if array.dtype not in _FORMATS:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    rows, columns = array.shape
    data = np.ascontiguousarray(array).view(np.uint8).reshape(rows, -1)
    return Weight(name, _FORMATS[array.dtype], (rows, columns), data)


def _array(weight: Weight) -> Array:
    fmt = F16 if weight.format is F16 else F32
    data = np.ascontiguousarray(converted(weight, fmt))
    return data.view(np.float16 if fmt is F16 else np.float32)


def _config(path: Path) -> Metadata:
    return Metadata(path, parse_object(read_small(path, _MAX_CONFIG), path, "content") if path.exists() else {})


def _listed(names: Iterable[str]) -> str:
    listed = sorted(names)
    return (", ".join(printable(name, 40) for name in listed[:5]) or "nothing") + (", …" if len(listed) > 5 else "")
