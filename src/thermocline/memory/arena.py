"""The memory of a tier: every array is in the ledger before it is made, and counted until it is let go."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from thermocline.errors import AllocationError
from thermocline.hardware.machine import Tier
from thermocline.ops.contract import Array, Arrays, Ops
from thermocline.ops.device import Device, Host
from thermocline.placement.ledger import Demand, Ledger, Purpose, Reservation

Make = Callable[[Arrays, tuple[int, ...], str], Array]
"""Makes an array of a shape and dtype with an implementation's `array`."""


def make_array(arrays: Arrays, shape: tuple[int, ...], dtype: str) -> Array:
    """The usual way."""
    return arrays.array(shape, dtype)


class Arena:
    """The arrays of one tier, with their account.

    `held` are bytes of arrays made here, `claimed` bytes that somebody else holds in this tier: the mapping of the
    model's file, or scratch memory of the kernels. Both together are what the ledger has for the arena.
    """

    def __init__(self, device: Device, ledger: Ledger, make: Make = make_array) -> None:
        self.device = device
        self.tier = device.tier
        self._ledger = ledger
        self._make = make
        self._held: dict[int, tuple[Array, Reservation]] = {}
        self._claims: list[Reservation] = []

    @property
    def held(self) -> int:
        """Bytes of the arrays that were made and not let go."""
        return sum(reservation.nbytes for _, reservation in self._held.values())

    @property
    def claimed(self) -> int:
        """Bytes of this tier that others hold for us."""
        return sum(reservation.nbytes for reservation in self._claims)

    def array(self, shape: tuple[int, ...], dtype: str, purpose: Purpose) -> Array:
        """A zeroed array of the device, reserved first.

        Raises:
            BudgetError: the budget has no room for it; nothing was reserved.
            AllocationError: the budget has, the memory has not; nothing stays reserved.
        """
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        reservation = self._ledger.reserve(Demand(self.tier, purpose, nbytes))
        try:
            array = self._make(self.device.ops, shape, dtype)
        except MemoryError as error:
            table = self._ledger.table(self.tier)
            self._ledger.release(reservation)
            raise AllocationError(self.tier, nbytes, purpose, table) from error
        except BaseException:
            self._ledger.release(reservation)
            raise
        self._held[id(array)] = (array, reservation)
        return array

    def claim(self, nbytes: int, purpose: Purpose) -> None:
        """Account for bytes that somebody else holds.

        Raises:
            BudgetError: the budget has no room for them.
        """
        self._claims.append(self._ledger.reserve(Demand(self.tier, purpose, nbytes)))

    def free(self, array: Array) -> None:
        """Let go of an array made here, which nobody may use afterwards."""
        _, reservation = self._held.pop(id(array))
        self._ledger.release(reservation)

    def for_purpose(self, purpose: Purpose) -> Arrays:
        """What makes arrays here for one purpose."""
        return _Purposed(self, purpose)

    def close(self) -> None:
        """Let go of everything; the ledger has nothing left of this arena."""
        for _, reservation in self._held.values():
            self._ledger.release(reservation)
        for reservation in self._claims:
            self._ledger.release(reservation)
        self._held.clear()
        self._claims.clear()


@dataclass(frozen=True, slots=True)
class _Purposed:
    arena: Arena
    purpose: Purpose

    def array(self, shape: tuple[int, ...], dtype: str = "float32") -> Array:
        """See `Arrays`."""
        return self.arena.array(shape, dtype, self.purpose)


class Memory:
    """The devices of an engine with their arenas, and the ledger of all of them.

    Raises:
        UsageError: a budget is not a whole number of bytes.
    """

    def __init__(self, devices: Mapping[Tier, Device], budgets: Mapping[Tier, int], make: Make = make_array) -> None:
        self.devices = dict(devices)
        self.ledger = Ledger(budgets)
        self.arenas = {tier: Arena(device, self.ledger, make) for tier, device in self.devices.items()}

    @classmethod
    def of_host(cls, ops: Ops) -> Memory:
        """RAM alone, as much as there is."""
        return cls({Tier.RAM: Host(ops)}, {})

    @property
    def host(self) -> Device:
        """The device that reads the files."""
        return self.devices[Tier.RAM]

    @property
    def is_true(self) -> bool:
        """Whether the ledger says of every tier what its arena has."""
        return all(self.ledger.used(tier) == arena.held + arena.claimed for tier, arena in self.arenas.items())

    def arrays(self, purpose: Purpose) -> dict[Tier, Arrays]:
        """What makes arrays for a purpose, by tier."""
        return {tier: arena.for_purpose(purpose) for tier, arena in self.arenas.items()}

    def close(self) -> None:
        """Let go of all arrays and devices; twice does no harm."""
        for arena in self.arenas.values():
            arena.close()
        for device in self.devices.values():
            device.close()
