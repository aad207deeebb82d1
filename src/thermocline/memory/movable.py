"""Neurons that change places while their model is loaded.

Every record has a slot: those of a tier lie in arrays that layers of one shape share, and kernels find them by a table.
So a record of any layer can be exchanged with any other one of its shape, in place: nothing is allocated, and the
ledger stays true. What is cold on disk needs no slot; there a record is copied up and the other one let go. Biases are
found by a neuron's place and not by its slot: they are written anew after every exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from thermocline.files.quantize import to_float
from thermocline.files.weight import Bytes, Weight
from thermocline.hardware.machine import Tier
from thermocline.memory.allocator import Room
from thermocline.memory.arena import Arena, Memory
from thermocline.memory.disk_store import DiskNeurons
from thermocline.memory.neuron_store import ResidentNeurons
from thermocline.model.feed_forward import FeedForward, Neurons
from thermocline.ops.contract import Array, FfnKind, Matrix, NeuronBlock
from thermocline.ops.device import Device
from thermocline.placement.ledger import Purpose
from thermocline.placement.problem import MOVING_BYTES

Ints = npt.NDArray[np.int32]
Named = npt.NDArray[np.int64]
"""Neurons (n, 2): layer, and number by the file."""
Shape = tuple[tuple[str, int], ...]
"""Format and columns of each matrix of a record."""


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

    @property
    def bytes_of_rows(self) -> list[Bytes]:
        """Of each matrix the rows in all slots, as the host sees them."""
        return [self.device.ops.to_host(room.array) for room in self.rooms]

    def block(self, kind: FfnKind, at: Ints, up_bias: Array | None) -> NeuronBlock:
        """The neurons in the slots `at`, with biases (neurons) in that order."""
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


@dataclass(slots=True)
class LayerBiases:
    """One layer's biases: as the file has them, and of its hot and its cold neurons in the layer's order."""

    of_file: Weight
    hot: Biases
    cold: Biases
    parts: tuple[Array | None, Array | None] = (None, None)

    def lay(self, order: Ints, depth: int, at: tuple[int, int]) -> tuple[int, int]:
        """Write them from `at` on, hot and cold; where the next layer's begin."""
        values = to_float(self.of_file)[0][order]
        self.parts = self.hot.put(at[0], values[:depth]), self.cold.put(at[1], values[depth:])
        return at[0] + depth, at[1] + len(values) - depth


@dataclass(slots=True)
class MovableLayer:
    """One layer's neurons: `order` (n_ff) are their numbers by place, `at` (n_ff) their slots, as far as they have any.

    Places before `hot` are in `fast`; the rest is in `slow`, or where that is None on disk, `cold` (None where nothing
    can be). `scored` are the predictor's rows, as the file has them and as they are placed.
    """

    kind: FfnKind
    order: Ints
    hot: int
    at: Ints
    fast: Slots
    slow: Slots | None
    cold: DiskNeurons | None
    ffn: FeedForward | None = None
    scored: tuple[Weight, Array] | None = None
    biases: LayerBiases | None = None

    @property
    def record_bytes(self) -> int:
        """Bytes of one neuron."""
        return sum(like.format.row_bytes(like.columns) for like in self.fast.likes)

    @property
    def can_move(self) -> bool:
        """Whether there is another place for its neurons."""
        return self.fast.count > 0 and (self.slow is not None or self.cold is not None)

    def parts(self) -> list[Neurons]:
        """The slices that the tiers compute."""
        found: list[Neurons] = []
        hot_bias, cold_bias = (None, None) if self.biases is None else self.biases.parts
        if self.hot:
            block = self.fast.block(self.kind, self.at[: self.hot], hot_bias)
            found.append(ResidentNeurons(self.fast.device, 0, self.hot, block))
        if self.hot < len(self.order):
            if self.slow is None:
                assert self.cold is not None
                self.cold.take_biases(cold_bias)
                found.append(self.cold)
            else:
                block = self.slow.block(self.kind, self.at[self.hot :], cold_bias)
                found.append(ResidentNeurons(self.slow.device, self.hot, len(self.order), block))
        return found

    def take(self, promoted: Ints, slots: Ints, demoted: Ints, left: Ints) -> int:
        """Neurons have become hot and lie in fast `slots`, others cold and lie in slow ones, `left`.

        As few places change as can be; `settle` comes next. Returns the bytes of the predictor's rows that were moved.
        """
        before = self.order
        leaves = np.isin(before[: self.hot], demoted)
        arrives = np.isin(before[self.hot :], promoted)
        upper = _replaced(before[: self.hot], self.at[: self.hot], leaves, promoted, slots)
        lower = _replaced(before[self.hot :], self.at[self.hot :], arrives, demoted, left)
        self.order, self.at = (np.concatenate(both) for both in zip(upper, lower, strict=True))
        self.hot = len(upper[0])
        if self.cold is not None and self.slow is None:
            self.cold.cut_anew(self.hot, lower[0])
        if self.scored is None:
            return 0
        weight, array = self.scored
        changed = np.flatnonzero(self.order != before)
        array[changed] = weight.data[self.order[changed]]
        return len(changed) * int(weight.data.shape[1])

    def settle(self) -> None:
        """Compute with the neurons where they are by now."""
        assert self.ffn is not None
        self.ffn.cut_anew(self.parts(), self.order)


@dataclass(slots=True)
class Movable:
    """Every layer's neurons in slots of `memory`."""

    memory: Memory
    layers: list[MovableLayer] = field(default_factory=list)
    _slots: dict[tuple[Tier, Shape], Slots] = field(default_factory=dict)
    _biases: dict[tuple[Tier, Shape], Biases] = field(default_factory=dict)
    _stage: Bytes | None = None

    def slots(self, tier: Tier, likes: Sequence[Weight]) -> Slots:
        """A tier's slots for records like these matrices."""
        shape = _shape(likes)
        if (tier, shape) not in self._slots:
            rooms = tuple(Room(like.format.row_bytes(like.columns)) for like in likes)
            self._slots[tier, shape] = Slots(self.memory.devices[tier], tuple(likes), rooms)
        return self._slots[tier, shape]

    def biases(self, tier: Tier, likes: Sequence[Weight], purpose: Purpose) -> Biases:
        """The biases of a tier's neurons with records like these matrices; of those on disk they are in RAM."""
        return self._biases.setdefault((tier, _shape(likes)), Biases(self.memory.arenas[tier], purpose))

    def reserve(self) -> None:
        """Take the buffer that records pass through.

        Raises:
            BudgetError: the budget has no room for it.
        """
        array = self.memory.arenas[Tier.RAM].array((MOVING_BYTES,), "uint8", Purpose.STAGING)
        self._stage = self.memory.host.ops.to_host(array)

    def groups(self) -> list[list[int]]:
        """The layers whose neurons can be exchanged with one another."""
        found: dict[int, list[int]] = {}
        for index, layer in enumerate(self.layers):
            if layer.can_move:
                found.setdefault(id(layer.fast), []).append(index)
        return list(found.values())

    def exchange(self, promoted: Named, demoted: Named) -> int:
        """Exchange each cold neuron of `promoted` with the hot one of `demoted`, both of one group; bytes moved.

        Raises:
            HardwareError: a record could not be read; those before it have moved, and the rest is as it was.
        """
        if not len(promoted):
            return 0
        moved, done = 0, 0
        fast, up = self._where(demoted), self._where(promoted)
        try:
            step = max(1, self._half // self.layers[promoted[0, 0]].record_bytes)
            while done < len(promoted):
                part = slice(done, done + step)
                moved += self._copy(promoted[part], fast[part], up[part])
                done += len(promoted[part])
        finally:
            moved += self._enter(promoted[:done], fast[:done], demoted[:done], up[:done])
        return moved

    @property
    def _half(self) -> int:
        return MOVING_BYTES // 2

    def _where(self, named: Named) -> Ints:
        """The slots of neurons; -1 for those on disk."""
        found = np.full(len(named), -1, np.int32)
        for index in np.unique(named[:, 0]):
            layer, mine = self.layers[index], named[:, 0] == index
            places = np.argsort(layer.order)
            found[mine] = layer.at[places[named[mine, 1]]]
        return found

    def _copy(self, promoted: Named, fast: Ints, slow: Ints) -> int:
        """Bring cold records to the slots `fast`, and what lay there to the slots `slow`."""
        layer = self.layers[promoted[0, 0]]
        if layer.slow is None:
            return self._copy_from_disk(promoted, fast)
        assert self._stage is not None
        for up, down in zip(layer.fast.bytes_of_rows, layer.slow.bytes_of_rows, strict=True):
            shape, size = (len(fast), up.shape[1]), len(fast) * up.shape[1]
            hot = np.take(up, fast, axis=0, out=self._stage[:size].reshape(shape))
            cold = np.take(down, slow, axis=0, out=self._stage[self._half : self._half + size].reshape(shape))
            up[fast], down[slow] = cold, hot
        return int(2 * len(fast) * layer.record_bytes)

    def _copy_from_disk(self, promoted: Named, fast: Ints) -> int:
        """All of them are read before any takes the place of another neuron, which then is lost."""
        first, count = self.layers[promoted[0, 0]], len(fast)
        assert self._stage is not None
        sizes = [room.row_bytes for room in first.fast.rooms]
        ends = [count * end for end in np.cumsum([0, *sizes]).tolist()]
        staged = [
            self._stage[begin:end].reshape(count, size) for begin, end, size in zip(ends, ends[1:], sizes, strict=False)
        ]
        for index in np.unique(promoted[:, 0]):
            layer, mine = self.layers[index], np.flatnonzero(promoted[:, 0] == index)
            assert layer.cold is not None
            places = np.argsort(layer.order)[promoted[mine, 1]] - layer.hot
            room = layer.cold.pool.cache.slots
            for start in range(0, len(mine), room):
                records = layer.cold.rows_of(places[start : start + room].astype(np.int32))
                for rows, found in zip(staged, records, strict=True):
                    rows[mine[start : start + room]] = found
        for up, rows in zip(first.fast.bytes_of_rows, staged, strict=True):
            up[fast] = rows
        return int(count * first.record_bytes)

    def _enter(self, promoted: Named, fast: Ints, demoted: Named, slow: Ints) -> int:
        """Tell the layers who is where by now."""
        moved, touched = 0, list[MovableLayer]()
        for index in np.union1d(promoted[:, 0], demoted[:, 0]):
            comes, goes = promoted[:, 0] == index, demoted[:, 0] == index
            up, down = (named[mine, 1].astype(np.int32) for named, mine in ((promoted, comes), (demoted, goes)))
            moved += self.layers[index].take(up, fast[comes], down, slow[goes])
            touched.append(self.layers[index])
        for layer in self._with_biases(touched[0]) if touched and touched[0].biases is not None else touched:
            layer.settle()
        return moved

    def _with_biases(self, one: MovableLayer) -> list[MovableLayer]:
        """The layers whose biases lie beside those of `one`, all written anew."""
        found, at = [layer for layer in self.layers if layer.fast is one.fast], (0, 0)
        for layer in found:
            assert layer.biases is not None
            at = layer.biases.lay(layer.order, layer.hot, at)
        return found


def _shape(likes: Sequence[Weight]) -> Shape:
    return tuple((like.format.name, like.columns) for like in likes)


def _replaced(numbers: Ints, at: Ints, gone: npt.NDArray[np.bool_], new: Ints, slots: Ints) -> tuple[Ints, Ints]:
    """Numbers and slots of a slice after some have gone and others come: into their places first, then at the end."""
    places = np.flatnonzero(gone)
    same = min(len(places), len(new))
    numbers, at = numbers.copy(), at.copy()
    numbers[places[:same]], at[places[:same]] = new[:same], slots[:same]
    rest = places[same:]
    return (
        np.concatenate([np.delete(numbers, rest), new[same:]]).astype(np.int32),
        np.concatenate([np.delete(at, rest), slots[same:]]).astype(np.int32),
    )
