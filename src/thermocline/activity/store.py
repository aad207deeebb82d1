"""Activities on disk: sidecars named X.activity.safetensors, and inside model files.

A model file has one in its metadata, for the numbers that its neurons have there, so that both appear at once:
`thermocline.activity.info` (JSON: layers, tokens, sequences, threshold, runs, and tokens_known where it is false) and
the sidecar's arrays but the order, each flat: `thermocline.activity.fired` and so on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from thermocline.activity.statistics import SIZE_BINS, Activity, Overlap
from thermocline.errors import ModelFormatError, UsageError, printable
from thermocline.files.gguf import GgufFile
from thermocline.files.gguf_types import MAGICS
from thermocline.files.mapped import open_regular
from thermocline.files.sidecar import Sidecar, SidecarKind, read_sidecar, write_sidecar
from thermocline.files.strict_json import parse_object
from thermocline.files.weight import Weight

MAX_TOKENS: Final = 1 << 48
"""Larger counts are refused, and never written."""
MAX_RUNS: Final = 1 << 16
MAX_THRESHOLD: Final = 1e30
MAX_INFO: Final = 1 << 26
"""Characters of a model file's info on its activity."""
PREFIX: Final = "thermocline.activity."
INFO_KEY: Final = f"{PREFIX}info"


def save_activity(
    activity: Activity,
    path: Path | str,
    *,
    kind: SidecarKind = SidecarKind.ACTIVITY,
    more: Mapping[str, Any] | None = None,
) -> str:
    """Write an activity, whole or not at all; returns the file's checksum. `more` joins its info.

    Raises:
        OutputError: it could not be written; the old file, if any, is untouched.
    """
    info = {**_info(activity), **(more or {})}
    tensors: dict[str, npt.NDArray[Any] | Weight] = {**_arrays(activity), "order": activity.order}
    return write_sidecar(path, kind, activity.model_fingerprint, info, tensors, model_name=activity.model_name)


def _info(activity: Activity) -> dict[str, Any]:
    return {
        "tokens": activity.tokens,
        "sequences": activity.sequences,
        "threshold": activity.threshold,
        "runs": [dict(run) for run in activity.runs],
        **({} if activity.tokens_known else {"tokens_known": False}),
    }


def _arrays(activity: Activity) -> dict[str, npt.NDArray[Any]]:
    return {
        "fired": activity.fired,
        "contribution": activity.contribution,
        "sizes": activity.sizes,
        "token_overlap": np.stack([activity.token_overlap.shared, activity.token_overlap.total]),
        "layer_overlap": np.stack([activity.layer_overlap.shared, activity.layer_overlap.total]),
    }


def activity_metadata(activity: Activity) -> dict[str, object]:
    """Keys of the model file that this activity is of."""
    arrays = {f"{PREFIX}{name}": array.reshape(-1) for name, array in _arrays(activity).items()}
    return {INFO_KEY: json.dumps({"layers": activity.n_layer, **_info(activity)}), **arrays}


def activity_inside(file: GgufFile) -> Activity | None:
    """The activity in a model file; None if it has none.

    Raises:
        ModelFormatError: it is damaged, or contradicts itself.
    """
    text = file.metadata.text(INFO_KEY, None, limit=MAX_INFO)
    if text is None:
        return None
    info = dict(parse_object(text.encode(), file.path, INFO_KEY))
    layers = info.get("layers")
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, kind in (("fired", "integer"), ("contribution", "float"), ("sizes", "integer"),
                       ("token_overlap", "integer"), ("layer_overlap", "integer")):  # fmt: skip
        flat = file.metadata.array(f"{PREFIX}{name}", kind)  # type: ignore[call-overload]
        rows = 2 if name.endswith("overlap") else layers
        if type(rows) is not int or rows < 1 or len(flat) % rows:
            raise ModelFormatError(file.path, f"{PREFIX}{name}", f"are {len(flat)} numbers, which {rows} rows are not")
        arrays[name] = flat.reshape(rows, -1)
    arrays["order"] = np.argsort(-arrays["fired"], axis=1, kind="stable").astype(np.int32)
    name = file.metadata.text("general.name", "")
    return activity_of(Sidecar(file.path, SidecarKind.ACTIVITY, file.fingerprint, name, info, arrays, {}, ""))


def find_activity(path: Path | str) -> Activity:
    """The activity in a sidecar, or inside a model file.

    Raises:
        UsageError: it is a model without one.
        ModelFormatError, UnsupportedModelError: as `load_activity`.
    """
    path = Path(path)
    if not is_gguf(path):
        return load_activity(path)
    with GgufFile.open(path) as file:
        found = activity_inside(file)
    if found is None:
        raise UsageError(f"{printable(str(path))} has no activity inside; make one with `thermocline profile`")
    return found


def is_gguf(path: Path) -> bool:
    """Whether a file is a GGUF one, by its first bytes."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            return file.read(4) in MAGICS
    except (OSError, ModelFormatError):
        return False


def load_activity(path: Path | str) -> Activity:
    """Read the sidecar that `save_activity` wrote.

    Raises:
        ModelFormatError: it is no activity, or damaged, or contradicts itself.
        UnsupportedModelError: it is of a version that this program cannot read.
    """
    return activity_of(read_sidecar(path, SidecarKind.ACTIVITY))


def activity_of(sidecar: Sidecar) -> Activity:
    """The activity in an opened sidecar; raises as `load_activity`."""
    fired = _tensor(sidecar, "fired", np.int64, 2)
    n_layer, n_ff = fired.shape
    activity = Activity(
        model_fingerprint=sidecar.model_fingerprint,
        model_name=sidecar.model_name,
        tokens=_count(sidecar, "tokens"),
        sequences=_count(sidecar, "sequences"),
        threshold=_threshold(sidecar),
        fired=fired,
        contribution=_tensor(sidecar, "contribution", np.float64, 2, (n_layer, n_ff)),
        sizes=_tensor(sidecar, "sizes", np.int64, 2, (n_layer, SIZE_BINS)),
        token_overlap=_overlap(sidecar, "token_overlap", n_layer),
        layer_overlap=_overlap(sidecar, "layer_overlap", n_layer),
        runs=_runs(sidecar),
        tokens_known=_flag(sidecar, "tokens_known"),
    )
    order = _tensor(sidecar, "order", np.int32, 2, (n_layer, n_ff))
    _check(sidecar, activity, order)
    return activity


def _check(sidecar: Sidecar, activity: Activity, order: npt.NDArray[np.int32]) -> None:
    """Refuse what no run can have counted."""
    if activity.fired.size == 0:
        raise ModelFormatError(sidecar.path, "fired", "has no neurons")
    if activity.fired.max() > activity.tokens:
        raise ModelFormatError(
            sidecar.path, "fired", f"counts {activity.fired.max()} firings in {activity.tokens} tokens"
        )
    if not np.array_equal(order, activity.order):
        raise ModelFormatError(sidecar.path, "order", "is not the order of the counts, hottest first")
    if activity.sizes.sum(axis=1).max() > activity.tokens:
        raise ModelFormatError(sidecar.path, "sizes", f"counts more active sets than {activity.tokens} tokens")
    if not (np.isfinite(activity.contribution).all() and activity.contribution.min() >= 0):
        raise ModelFormatError(sidecar.path, "contribution", "is not everywhere a finite number from 0")
    totals = activity.fired.sum(axis=1)
    for name, overlap in (("token_overlap", activity.token_overlap), ("layer_overlap", activity.layer_overlap)):
        if (overlap.shared > overlap.total).any() or (overlap.total > totals).any():
            raise ModelFormatError(sidecar.path, name, "counts more than what fired")


def _tensor(
    sidecar: Sidecar, name: str, dtype: type[np.generic], axes: int, shape: tuple[int, ...] | None = None
) -> npt.NDArray[Any]:
    array = sidecar.arrays.get(name)
    if array is None:
        raise ModelFormatError(sidecar.path, name, "is missing")
    wanted = f"{np.dtype(dtype).name} {list(shape) if shape else f'of {axes} axes'}"
    if array.dtype != dtype or array.ndim != axes or (shape is not None and array.shape != shape):
        raise ModelFormatError(sidecar.path, name, f"is {array.dtype} {list(array.shape)}; needed: {wanted}")
    if array.dtype.kind == "i" and array.size and not 0 <= array.min() <= array.max() <= MAX_TOKENS:
        raise ModelFormatError(sidecar.path, name, f"holds counts outside 0 to {MAX_TOKENS}")
    return array


def _overlap(sidecar: Sidecar, name: str, n_layer: int) -> Overlap:
    both = _tensor(sidecar, name, np.int64, 2, (2, n_layer))
    return Overlap(both[0], both[1])


def _count(sidecar: Sidecar, name: str) -> int:
    value = sidecar.info.get(name)
    if type(value) is not int or not 0 <= value <= MAX_TOKENS:
        raise ModelFormatError(sidecar.path, f"info.{name}", f"is not a whole number of 0 to {MAX_TOKENS}")
    return value


def _flag(sidecar: Sidecar, name: str) -> bool:
    value = sidecar.info.get(name, True)
    if type(value) is not bool:
        raise ModelFormatError(sidecar.path, f"info.{name}", "is neither true nor false")
    return value


def _threshold(sidecar: Sidecar) -> float:
    value = sidecar.info.get("threshold")
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= MAX_THRESHOLD:
        raise ModelFormatError(sidecar.path, "info.threshold", f"is not a number from 0 to {MAX_THRESHOLD:g}")
    return float(value)


def _runs(sidecar: Sidecar) -> tuple[Mapping[str, Any], ...]:
    runs = sidecar.info.get("runs")
    if not isinstance(runs, list) or len(runs) > MAX_RUNS or not all(isinstance(run, dict) for run in runs):
        raise ModelFormatError(sidecar.path, "info.runs", f"is not a list of at most {MAX_RUNS} objects")
    if not all(isinstance(run.get("id", ""), str) for run in runs):
        raise ModelFormatError(sidecar.path, "info.runs", "has an id that is no text")
    return tuple(runs)
