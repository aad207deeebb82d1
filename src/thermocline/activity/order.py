"""The order of each layer's neurons, hottest first, and its file.

On disk it is a sidecar X.order.safetensors with `order` (n_layer, n_ff) int32, each row a permutation of the layer's
neurons as the model's file numbers them, and `temperature` (n_layer, n_ff) float64, how often each neuron fires, in
that order. Its info says `by` and `tokens`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thermocline.activity.statistics import Activity, Floats
from thermocline.errors import FingerprintError, ModelFormatError, UsageError
from thermocline.files.atomic import require_kind
from thermocline.files.sidecar import Sidecar, SidecarKind, is_sidecar, named, read_sidecar, write_sidecar
from thermocline.files.weight import Weight

Order32 = npt.NDArray[np.int32]


class By(StrEnum):
    """What makes a neuron hot: how often it fires, or how much it adds (|activation| x norm of its down row)."""

    FREQUENCY = "frequency"
    CONTRIBUTION = "contribution"


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """Each layer's neurons, hottest first: `order` (n_layer, n_ff), and their `temperature` (0 to 1) in that order."""

    model_fingerprint: str
    model_name: str
    by: By
    tokens: int
    order: Order32
    temperature: Floats

    @classmethod
    def of(cls, activity: Activity, by: By = By.FREQUENCY) -> Order:
        """The order that an activity shows; of equals the lower number comes first.

        Raises:
            UsageError: nothing was counted.
        """
        if not activity.tokens:
            raise UsageError("the activity has counted no token, so that no neuron is hotter than another")
        heat = activity.fired if by is By.FREQUENCY else activity.contribution
        if not heat.any():
            raise UsageError(f"the activity knows no {by} of its neurons; profile the model with `thermocline profile`")
        order = np.argsort(-heat, axis=1, kind="stable").astype(np.int32)
        temperature = np.take_along_axis(activity.temperatures, order.astype(np.intp), axis=1)
        return cls(activity.model_fingerprint, activity.model_name, by, activity.tokens, order, temperature)

    @property
    def fingerprint(self) -> str:
        """64 hex digits of the model and the order: what the depths of a plan count along."""
        digest = hashlib.sha256(self.model_fingerprint.encode())
        digest.update(np.ascontiguousarray(self.order, "<i4").data)
        return digest.hexdigest()

    @property
    def places(self) -> Order32:
        """The inverse: `places[layer, neuron]` is the neuron's place in the order, 0 the hottest (n_layer, n_ff)."""
        return np.argsort(self.order, axis=1).astype(np.int32)

    @property
    def by_number(self) -> Floats:
        """How often each neuron fires, by the numbers of the model's file (n_layer, n_ff)."""
        heat = np.empty_like(self.temperature)
        np.put_along_axis(heat, self.order.astype(np.intp), self.temperature, axis=1)
        return heat

    def require_model(self, fingerprint: str, name: str = "", *, path: Path | str = "order") -> None:
        """Refuse to be used with another model; `path` is where it came from.

        Raises:
            FingerprintError: `fingerprint` is another model's.
        """
        if fingerprint != self.model_fingerprint:
            mine, other = named(self.model_name, self.model_fingerprint), named(name, fingerprint)
            raise FingerprintError(path, mine, other, "make it from an activity of this model")


def save_order(order: Order, path: Path | str) -> str:
    """Write an order, whole or not at all; returns the file's checksum.

    Raises:
        UsageError: what is there is no order.
        OutputError: it could not be written; the old file, if any, is untouched.
    """
    require_kind(path, "order", partial(is_sidecar, kind=SidecarKind.ORDER))
    info = {"by": order.by.value, "tokens": order.tokens}
    tensors: dict[str, npt.NDArray[Any] | Weight] = {"order": order.order, "temperature": order.temperature}
    return write_sidecar(path, SidecarKind.ORDER, order.model_fingerprint, info, tensors, model_name=order.model_name)


def load_order(path: Path | str) -> Order:
    """Read what `save_order` wrote.

    Raises:
        ModelFormatError: it is no order, or damaged, or no permutation.
        UnsupportedModelError: it is of a version that this program cannot read.
    """
    sidecar = read_sidecar(path, SidecarKind.ORDER)
    order = _matrix(sidecar, "order", np.int32)
    temperature = _matrix(sidecar, "temperature", np.float64, order.shape)
    if not (np.sort(order, axis=1) == np.arange(order.shape[1])).all():
        raise ModelFormatError(sidecar.path, "order", "names a neuron twice, or one that is not there")
    if not ((temperature >= 0) & (temperature <= 1)).all():
        raise ModelFormatError(sidecar.path, "temperature", "is not everywhere from 0 to 1")
    by, tokens = sidecar.info.get("by"), sidecar.info.get("tokens")
    if by not in list(By) or type(tokens) is not int or tokens < 1:
        raise ModelFormatError(sidecar.path, "info", "does not tell how the order was made, from how many tokens")
    return Order(sidecar.model_fingerprint, sidecar.model_name, By(by), tokens, order, temperature)


def _matrix(sidecar: Sidecar, name: str, dtype: Any, shape: tuple[int, ...] | None = None) -> npt.NDArray[Any]:
    matrix = sidecar.arrays.get(name)
    if matrix is None:
        raise ModelFormatError(sidecar.path, name, "is missing")
    if matrix.dtype != dtype or matrix.ndim != 2 or 0 in matrix.shape or shape not in (None, matrix.shape):
        wanted = f"{np.dtype(dtype)} {'[n_layer, n_ff]' if shape is None else list(shape)}"
        raise ModelFormatError(sidecar.path, name, f"is {matrix.dtype} {list(matrix.shape)}; needed: {wanted}")
    return matrix
