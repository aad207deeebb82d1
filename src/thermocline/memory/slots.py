"""Where neurons lie that may change places: arrays that layers of one shape share, a slot for every record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from thermocline.files.formats import BlockFormat
from thermocline.files.weight import Bytes, Weight
from thermocline.memory.allocator import Room
from thermocline.memory.arena import Arena
from thermocline.ops.contract import Array, FfnKind, Matrix, NeuronBlock
from thermocline.ops.device import Device
from thermocline.placement.ledger import Purpose

Ints = npt.NDArray[np.int32]


@runtime_checkable
class RowKeeper(Protocol):
    """An implementation of ops whose arrays the host cannot reach."""

    def rows(self, array: Array, fmt: BlockFormat, at: Ints) -> Bytes:
        """Copies of a placed matrix's rows `at` (n, row_bytes), as a file has them."""

    def put_rows(self, array: Array, fmt: BlockFormat, at: Ints, rows: Bytes) -> None:
        """Write rows of a file over a placed matrix's rows `at`; all are there for whatever is called next."""


def put_rows(device: Device, array: Array, fmt: BlockFormat, at: Ints, rows: Bytes) -> None:
    """Write rows of a file over rows of a device's matrix, whose bytes are `array`."""
    if isinstance(device.ops, RowKeeper):
        device.ops.put_rows(array, fmt, at, rows)
    else:
        device.ops.to_host(array)[at] = rows


@dataclass(slots=True)
class Slots:
    """One tier's slots for records of one shape: a room for each of its matrices."""

    device: Device
    likes: tuple[Weight, ...]
    rooms: tuple[Room, ...]
    _matrices: tuple[Matrix, ...] = ()

    @property
    def count(self) -> int:
        """Records that there is room for."""
        return self.rooms[0].rows

    def read(self, matrix: int, at: Ints, out: Bytes) -> None:
        """Copy one matrix's rows in the slots `at` into `out` (n, row_bytes)."""
        array, ops = self.rooms[matrix].array, self.device.ops
        if isinstance(ops, RowKeeper):
            out[...] = ops.rows(array, self.likes[matrix].format, at)
        else:
            np.take(ops.to_host(array), at, axis=0, out=out)

    def write(self, matrix: int, at: Ints, rows: Bytes) -> None:
        """Copy rows into the slots `at`."""
        put_rows(self.device, self.rooms[matrix].array, self.likes[matrix].format, at, rows)

    def block(self, kind: FfnKind, at: Array, up_bias: Array | None) -> NeuronBlock:
        """The neurons in the slots `at`, with biases (neurons) in that order, both where the device reads them."""
        if not self._matrices:
            shapes = ((like.name, like.format, (self.count, like.columns)) for like in self.likes)
            pairs = zip(shapes, self.rooms, strict=True)
            self._matrices = tuple(self.device.ops.place(Weight(*shape, room.array)) for shape, room in pairs)
        gate = self._matrices[0] if len(self._matrices) == 3 else None
        up, down = self._matrices[-2:]
        return NeuronBlock(gate, up, down, records=True, kind=kind, neurons=len(at), up_bias=up_bias, rows=at)


@dataclass(slots=True)
class Biases:
    """The biases of all neurons that one tier's device computes, layer after layer, float32 (count)."""

    arena: Arena
    purpose: Purpose
    count: int = 0
    _array: Array | None = None

    def take(self, neurons: int) -> int:
        """Have room for so many more; the first of them."""
        self.count += neurons
        return self.count - neurons

    def put(self, start: int, values: npt.NDArray[np.float32]) -> Array | None:
        """Write values (n) from `start` on; where they are, None if there are none."""
        if not len(values):
            return None
        if self._array is None:
            self._array = self.arena.array((self.count,), "float32", self.purpose)
        part = self._array[start : start + len(values)]
        self.arena.device.ops.upload(values, part)
        return part
