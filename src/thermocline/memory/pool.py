"""The memory that records of the disk tier are read into."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from thermocline.files.weight import Bytes, Weight
from thermocline.memory.record_cache import RecordCache
from thermocline.ops.contract import Matrix
from thermocline.ops.device import Device

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Pool:
    """Slots for records of one shape: the cache's account, its bytes, and the matrices that kernels see.

    `starts` are where each matrix begins in `memory`, `row_bytes` the bytes of its rows.
    """

    cache: RecordCache
    memory: Bytes
    starts: tuple[int, ...]
    row_bytes: tuple[int, ...]
    matrices: tuple[Matrix, ...]

    @classmethod
    def of(cls, like: list[Weight], slots: int, memory: Bytes, device: Device) -> Pool:
        """Slots laid out matrix after matrix in `memory`."""
        sizes = tuple(w.format.row_bytes(w.columns) for w in like)
        starts, placed = [], []
        at = 0
        for weight, size in zip(like, sizes, strict=True):
            view = memory[at : at + slots * size].reshape(slots, size)
            placed.append(device.ops.place(Weight(weight.name, weight.format, (slots, weight.columns), view)))
            starts.append(at)
            at += slots * size
        return cls(RecordCache(slots), memory, tuple(starts), sizes, tuple(placed))

    def rows(self, matrix: int) -> Bytes:
        """The rows of a matrix in all slots."""
        start, size = self.starts[matrix], self.row_bytes[matrix]
        return self.memory[start : start + self.cache.slots * size].reshape(-1, size)

    def targets(self, slots: Ints) -> list[Longs]:
        """Of each matrix, the places in `memory` of the rows in these slots."""
        wide = slots.astype(np.int64)
        return [start + wide * size for start, size in zip(self.starts, self.row_bytes, strict=True)]
