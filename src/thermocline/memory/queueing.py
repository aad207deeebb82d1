"""The account kept while a model is loaded: what was queued, and the small arrays that are made at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from thermocline.errors import UsageError
from thermocline.files.quantize import to_float
from thermocline.files.weight import Weight
from thermocline.hardware.machine import Tier
from thermocline.memory.allocator import BufferedAllocator, Rows, Slot
from thermocline.memory.arena import Memory
from thermocline.memory.reblock import not_finite
from thermocline.model.layer import Norm
from thermocline.model.spec import ModelSpec
from thermocline.ops.contract import Array
from thermocline.ops.device import Device
from thermocline.placement.ledger import Purpose
from thermocline.placement.seats import Seats

Orders = npt.NDArray[np.int32]
Built = TypeVar("Built")
Later = Callable[[], Built]
"""What a queued tensor will be part of, to be called once it is flushed."""

TRUNK, NEURONS = 0, 1
"""Priorities: without the trunk nothing runs."""


def held(tier: Tier) -> Tier:
    """Where small things of a tier are: what stays on disk is computed in RAM."""
    return Tier.RAM if tier is Tier.DISK else tier


@dataclass(slots=True)
class Account:
    """A model's weights by canonical names, with the tiers that shall have them; `vector_bytes` were made of them."""

    spec: ModelSpec
    memory: Memory
    weights: Mapping[str, Weight]
    seats: Seats
    vector_bytes: int = 0
    allocator: BufferedAllocator = field(init=False)

    def __post_init__(self) -> None:
        self.allocator = BufferedAllocator(self.memory)
        if len(self.seats.layers) != self.spec.n_layer:
            raise UsageError(f"a plan of {len(self.seats.layers)} layers does not seat {self.spec.n_layer}")

    def device(self, tier: Tier) -> Device:
        """What computes beside a tier; neurons on disk are the host's.

        Raises:
            UsageError: this engine has no such tier.
        """
        device = self.memory.devices.get(Tier.RAM if tier is Tier.DISK else tier)
        if device is None:
            raise UsageError(f"the plan puts tensors in {tier}, but no device has it; use --device emulated or cuda")
        return device

    def queue(self, name: str, tier: Tier, purpose: Purpose) -> Slot:
        """Queue a matrix of the trunk."""
        return self.allocator.queue(self.weights[name], tier, purpose, priority=TRUNK)

    def norm(self, name: str, tier: Tier, purpose: Purpose) -> Norm:
        """A norm by the name of its tensors."""
        bias = self.vector(name + ".bias", tier, purpose) if self.spec.layer_norm else None
        return Norm(self.vector(name + ".weight", tier, purpose), bias)

    def vector(self, name: str, tier: Tier, purpose: Purpose, rows: Rows = None) -> Array:
        """A norm or a bias, or some elements of it, as float32."""
        values = self.elements(name) if rows is None else self.elements(name)[rows]
        self.vector_bytes += values.nbytes
        return self.made(values, tier, purpose)

    def elements(self, name: str) -> npt.NDArray[np.float32]:
        """All elements of a vector of the file, looked at for NaN and infinity."""
        values: npt.NDArray[np.float32] = to_float(self.weights[name])[0]
        if not np.isfinite(values).all():
            raise not_finite(name)
        return values

    def made(self, values: npt.NDArray[np.float32], tier: Tier, purpose: Purpose) -> Array:
        """An array of a tier with these values."""
        array = self.memory.arenas[held(tier)].array(values.shape, "float32", purpose)
        self.device(tier).ops.upload(values, array)
        return array
