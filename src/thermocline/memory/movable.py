"""Neurons that change places while their model is loaded.

Every record has a slot: those of a tier lie in arrays that layers of one shape share, and kernels find them by a table.
So a record of any layer can be exchanged with any other one of its shape, in place: nothing is allocated, and the
ledger stays true. What is cold on disk needs no slot; there a record is copied up and the other one let go. Biases are
found by a neuron's place and not by its slot: they are written anew after every exchange.

On a GPU, whose steps are replayed as they were captured, every layer keeps its depth: neurons are exchanged within a
layer, and the tables, biases and predictor rows that the recorded kernels read are overwritten where they lie.
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
from thermocline.memory.arena import Memory
from thermocline.memory.disk_store import DiskNeurons
from thermocline.memory.neuron_store import ResidentNeurons
from thermocline.memory.slots import Biases, RowKeeper, Slots, put_rows
from thermocline.model.feed_forward import FeedForward, Neurons
from thermocline.ops.contract import Array, FfnKind
from thermocline.ops.device import Device
from thermocline.placement.ledger import Purpose
from thermocline.placement.problem import MOVING_BYTES

Ints = npt.NDArray[np.int32]
Named = npt.NDArray[np.int64]
"""Neurons (n, 2): layer, and number by the file."""
Shape = tuple[tuple[str, int], ...]
"""Format and columns of each matrix of a record."""


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
    can be). `scored` are the predictor's rows, as the file has them, as they are placed, and by which device. `still`
    neurons stay where they are. `table` (hot) is `at` for a device that cannot reach the host's.
    """

    kind: FfnKind
    order: Ints
    hot: int
    at: Ints
    fast: Slots
    slow: Slots | None
    cold: DiskNeurons | None
    ffn: FeedForward | None = None
    scored: tuple[Weight, Array, Device] | None = None
    biases: LayerBiases | None = None
    still: bool = False
    table: Array | None = None

    @property
    def record_bytes(self) -> int:
        """Bytes of one neuron."""
        return sum(like.format.row_bytes(like.columns) for like in self.fast.likes)

    @property
    def can_move(self) -> bool:
        """Whether there is another place for its neurons."""
        return not self.still and self.fast.count > 0 and (self.slow is not None or self.cold is not None)

    def parts(self) -> list[Neurons]:
        """The slices that the tiers compute."""
        found: list[Neurons] = []
        hot_bias, cold_bias = (None, None) if self.biases is None else self.biases.parts
        if self.hot:
            at = self.at[: self.hot] if self.table is None else self.table
            block = self.fast.block(self.kind, at, hot_bias)
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
        self.order, self.at[...] = (np.concatenate(both) for both in zip(upper, lower, strict=True))
        self.hot = len(upper[0])
        if self.cold is not None and self.slow is None:
            self.cold.cut_anew(self.hot, lower[0])
        if self.scored is None:
            return 0
        weight, array, device = self.scored
        changed = np.flatnonzero(self.order != before).astype(np.int32)
        put_rows(device, array, weight.format, changed, weight.data[self.order[changed]])
        return len(changed) * int(weight.data.shape[1])

    def settle(self) -> None:
        """Compute with the neurons where they are by now."""
        assert self.ffn is not None
        if self.table is not None:
            self.fast.device.ops.upload(self.at[: self.hot], self.table)
        self.ffn.cut_anew(self.parts(), self.order)


@dataclass(slots=True)
class Movable:
    """Every layer's neurons in slots of `memory`.

    With `within` every layer keeps its depth, and neurons of layers that are not cut stay where they are.
    """

    memory: Memory
    within: bool = False
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

    def add_still(self, kind: FfnKind, n_ff: int, hot: int) -> None:
        """The next layer's neurons stay where they are, in the file's order."""
        nowhere = Slots(self.memory.devices[Tier.VRAM], (), ())
        order, at = np.arange(n_ff, dtype=np.int32), np.full(n_ff, -1, np.int32)
        self.layers.append(MovableLayer(kind, order, hot, at, nowhere, None, None, still=True))

    def biases(self, tier: Tier, likes: Sequence[Weight], purpose: Purpose) -> Biases:
        """The biases of a tier's neurons with records like these matrices; of those on disk they are in RAM."""
        return self._biases.setdefault((tier, _shape(likes)), Biases(self.memory.arenas[tier], purpose))

    def table(self, at: Ints) -> Array | None:
        """A copy of hot neurons' slots where their device reads it; None where that reads the host's memory."""
        ops = self.memory.devices[Tier.VRAM].ops
        if not isinstance(ops, RowKeeper) or not len(at):
            return None
        table = self.memory.arenas[Tier.VRAM].array(at.shape, "int32", Purpose.GRAPHS)
        ops.upload(at, table)
        return table

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
                found.setdefault(index if self.within else id(layer.fast), []).append(index)
        return list(found.values())

    def exchange(self, promoted: Named, demoted: Named) -> int:
        """Exchange each cold neuron of `promoted` with the hot one of `demoted`, both of one group; bytes moved.

        Groups of layers that share their slots can be taken together.

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
        for matrix, room in enumerate(layer.fast.rooms):
            shape, size = (len(fast), room.row_bytes), len(fast) * room.row_bytes
            hot = self._stage[:size].reshape(shape)
            cold = self._stage[self._half : self._half + size].reshape(shape)
            layer.fast.read(matrix, fast, hot)
            layer.slow.read(matrix, slow, cold)
            layer.fast.write(matrix, fast, cold)
            layer.slow.write(matrix, slow, hot)
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
        for matrix, rows in enumerate(staged):
            first.fast.write(matrix, fast, rows)
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
        found, at = [layer for layer in self.layers if layer.fast is one.fast and layer.biases is not None], (0, 0)
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
