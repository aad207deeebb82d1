"""Neuron stores: the slices of every layer's order that one tier holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from thermocline.errors import UsageError
from thermocline.files.weight import Weight
from thermocline.model.feed_forward import Neurons
from thermocline.ops.contract import ActiveSet, Array, FfnKind, FfnWork, NeuronBlock
from thermocline.ops.device import Device

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class ResidentNeurons:
    """A slice whose records are where its device computes; see `model.feed_forward.Neurons`."""

    device: Device
    start: int
    stop: int
    block: NeuronBlock

    def announce(self, active: ActiveSet) -> None:
        """Nothing has to be fetched."""

    def ffn(self, x: Array, active: ActiveSet, out: Array, *, skip_zeros: bool, hidden: Array | None = None) -> FfnWork:
        """See `Neurons.ffn`."""
        return self.device.ops.ffn(x, self.block, active, out, skip_zeros=skip_zeros, hidden=hidden)


@dataclass(frozen=True, slots=True)
class Records:
    """A layer's FFN as its file has it, of which a tier below RAM takes neurons `start` to `stop` of the order.

    `gate` (None without one) and `up` have a row for each neuron by the file's numbers. `down` has too, if
    `transposed`; otherwise it is the standard layout, n_embd rows of n_ff. `order` is the file's number of each neuron
    of the order, None where they are the same. `up_bias` (stop - start) is on the host, in the slice's order.
    """

    layer: int
    gate: Weight | None
    up: Weight
    down: Weight
    transposed: bool
    kind: FfnKind
    order: Ints | None
    start: int
    stop: int
    up_bias: Array | None = None


class NeuronStore(Protocol):
    """Neurons that are in no device's memory, but answer all the same: those of the tier below RAM.

    It hands out a slice for each layer that leaves neurons there.
    """

    def neurons(self, records: Records, device: Device) -> Neurons:
        """The slice, computed by `device`, the host. What it keeps in memory is reserved before this returns."""


def require_store(store: NeuronStore | None, records: int) -> NeuronStore:
    """The store of the tier below RAM.

    Raises:
        UsageError: there is none, but the plan leaves neurons to it.
    """
    if store is None:
        raise UsageError(f"the plan leaves {records} neurons of a layer on disk, and no disk tier was set up")
    return store
