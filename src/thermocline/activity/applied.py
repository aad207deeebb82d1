"""The order that a model's neurons were written in, as its file tells it, and what was counted before.

A converted model numbers its neurons anew, hottest first, and has another fingerprint. Its file says in
`thermocline.neuron_order` (n_layer * n_ff, int32) which number each neuron had before, layer by layer, and in
`thermocline.neuron_order.model` the fingerprint of the model that these are numbers of.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from thermocline.activity.statistics import Activity
from thermocline.activity.store import find_activity
from thermocline.errors import ModelFormatError
from thermocline.files.metadata import Metadata
from thermocline.files.source import ModelSource
from thermocline.model.spec import ModelSpec

ORDER_KEY: Final = "thermocline.neuron_order"
MODEL_KEY: Final = "thermocline.neuron_order.model"

Numbers = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class AppliedOrder:
    """`order` (n_layer, n_ff): the numbers that each layer's neurons had in the model with fingerprint `model`."""

    model: str
    order: Numbers

    def then(self, order: Numbers) -> AppliedOrder:
        """What becomes of it where the file's neurons are put in another order once more."""
        return AppliedOrder(self.model, np.take_along_axis(self.order, order.astype(np.intp), axis=1))

    @property
    def metadata(self) -> dict[str, object]:
        """The keys of a model file that say so."""
        return {ORDER_KEY: self.order.astype(np.int32).ravel(), MODEL_KEY: self.model}

    def translated(
        self, activity: Activity, fingerprint: str, name: str = "", *, path: Path | str = "activity"
    ) -> Activity:
        """What was counted in the original model, as if it had been in the file with this `fingerprint`.

        Raises:
            FingerprintError: the activity is neither the original's nor the file's own (which is returned as it is).
        """
        if activity.model_fingerprint == fingerprint:
            return activity
        activity.require_model(self.model, name, path=path)
        again = activity.reordered(self.order)
        return replace(again, model_fingerprint=fingerprint, model_name=name or activity.model_name)


def applied_order(metadata: Metadata, spec: ModelSpec) -> AppliedOrder | None:
    """The order that the file of a network tells of; None if it tells none.

    Raises:
        ModelFormatError: it is no permutation of each layer's neurons.
    """
    shape = spec.n_layer, spec.n_ff
    stored = metadata.array(ORDER_KEY, "integer", length=shape[0] * shape[1], default=None)
    if stored is None:
        return None
    order = stored.reshape(shape)
    if not (np.sort(order, axis=1) == np.arange(spec.n_ff)).all():
        raise ModelFormatError(metadata.path, ORDER_KEY, "names a neuron twice, or one that is not there")
    return AppliedOrder(metadata.text(MODEL_KEY, limit=64), order)


def activity_for(source: ModelSource, spec: ModelSpec, path: Path | str) -> Activity:
    """The activity in `path`, of this model or of the one that it was converted from, by this one's numbers.

    Raises:
        FingerprintError: it is another model's.
        ModelFormatError, UnsupportedModelError, UsageError: as `find_activity`.
    """
    activity, applied = find_activity(path), applied_order(source.metadata, spec)
    if applied is not None:
        activity = applied.translated(activity, source.fingerprint, spec.name, path=path)
    activity.require_model(source.fingerprint, spec.name, path=path)
    return activity
