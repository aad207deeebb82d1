"""Cold neurons that travel to the device for a long prompt, piece after piece, instead of being computed beside RAM.

Source of the idea: FlexGen (Sheng et al., 2023) streams weights through two buffers, so that one piece is on its way
while the one before is computed with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from thermocline.files.weight import Bytes, Weight
from thermocline.model.feed_forward import NOTHING
from thermocline.ops.contract import ActiveSet, Array, Arrays, FfnKind, FfnWork, NeuronBlock, Ops
from thermocline.ops.cuda.sizes import PIECE
from thermocline.ops.device import Device

ALIGNED = 256
"""Bytes: where an array may begin in a buffer."""
COLUMNS = 256
"""Neurons: pieces of a down projection in the standard layout are whole blocks of every format."""


class Lanes(Protocol):
    """Two buffers on the device, filled in turn."""

    def send(self, parts: Sequence[Bytes]) -> list[Array]:
        """The arrays (rows, row_bytes) on the device, for whatever is called next; good until the next but one."""

    def used(self) -> None:
        """What was called since `send` is all that needs its arrays."""


@runtime_checkable
class Sender(Protocol):
    """An implementation of ops that sends while it computes."""

    def lanes(self, arrays: Arrays, nbytes: int) -> Lanes:
        """Two buffers of `nbytes` bytes, made by `arrays`; twice as much is pinned on the host."""

    def summing(self) -> AbstractContextManager[list[FfnWork]]:
        """Within, no call waits for the device; afterwards the list holds what all of them did."""


class Copies:
    """Lanes of a device that has nothing but plain copies."""

    def __init__(self, ops: Ops, arrays: Arrays, nbytes: int) -> None:
        self._ops = ops
        self._buffers = [arrays.array((nbytes,), "uint8") for _ in range(2)]

    def send(self, parts: Sequence[Bytes]) -> list[Array]:
        """See `Lanes`."""
        self._buffers.reverse()
        found = views(self._buffers[0], parts)
        for part, out in zip(parts, found, strict=True):
            self._ops.upload(np.ascontiguousarray(part), out)
        return found

    def used(self) -> None:
        """See `Lanes`."""


def views(buffer: Array, parts: Sequence[Bytes]) -> list[Array]:
    """Where in a buffer of bytes each part goes, as an array of its shape."""
    found, at = [], 0
    for part in parts:
        found.append(buffer[at : at + part.size].reshape(part.shape))
        at += -(-part.size // ALIGNED) * ALIGNED
    return found


def lanes_for(device: Device, arrays: Arrays, sent: Sequence[SentNeurons]) -> None:
    """Give `sent`, all of one device, lanes that they share."""
    nbytes = max(neurons.largest for neurons in sent)
    ops = device.ops
    lanes = ops.lanes(arrays, nbytes) if isinstance(ops, Sender) else Copies(ops, arrays, nbytes)
    for neurons in sent:
        neurons.lanes = lanes


@dataclass(slots=True)
class SentNeurons:
    """A slice of a layer's order that lies in RAM and is computed by `device`; see `model.feed_forward.Neurons`.

    `gate` (None without one), `up` and `down` are its rows as the host has them, `down` in columns unless `records`;
    `up_bias` (stop - start) is on the device.
    """

    device: Device
    start: int
    stop: int
    gate: Weight | None
    up: Weight
    down: Weight
    records: bool
    kind: FfnKind
    up_bias: Array | None = None
    piece: int = PIECE
    lanes: Lanes | None = None

    @property
    def step(self) -> int:
        """Neurons of a piece."""
        down = self.down.nbytes // max(self.up.rows, 1)
        each = sum(m.format.row_bytes(m.columns) for m in (self.gate, self.up) if m is not None) + down
        whole = 1 if self.records else COLUMNS
        return max(whole, (self.piece - 3 * ALIGNED) // max(each, 1) // whole * whole)

    @property
    def largest(self) -> int:
        """Bytes that its largest piece takes of a lane."""
        return sum(
            -(-part.size // ALIGNED) * ALIGNED for part in self._parts(0, min(self.step, self.stop - self.start))
        )

    def announce(self, active: ActiveSet) -> None:
        """Nothing is known to be needed sooner."""

    def ffn(self, x: Array, active: ActiveSet, out: Array, *, skip_zeros: bool, hidden: Array | None = None) -> FfnWork:
        """See `Neurons.ffn`; for all neurons, and without `hidden`."""
        assert self.lanes is not None
        assert active.indices is None
        assert hidden is None
        ops, count = self.device.ops, self.stop - self.start
        with _summing(ops) as done:
            for first in range(0, count, self.step):
                last = min(first + self.step, count)
                arrays = self.lanes.send(self._parts(first, last))
                done.append(ops.ffn(x, self._block(first, last, arrays), active, out, skip_zeros=skip_zeros))
                self.lanes.used()
        total = NOTHING
        for work in done:
            total = FfnWork(*(a + b for a, b in zip(total, work, strict=True)))
        return total

    def _parts(self, first: int, last: int) -> list[Bytes]:
        rows = [matrix.data[first:last] for matrix in (self.gate, self.up) if matrix is not None]
        if self.records:
            return [*rows, self.down.data[first:last]]
        size = self.down.format.row_bytes
        return [*rows, self.down.data[:, size(first) : size(last)]]

    def _block(self, first: int, last: int, arrays: Sequence[Array]) -> NeuronBlock:
        n, place = last - first, self.device.ops.place
        *rows, down = arrays
        shape = (n, self.down.columns) if self.records else (self.down.rows, n)
        likes = [matrix for matrix in (self.gate, self.up) if matrix is not None]
        placed = [place(Weight(m.name, m.format, (n, m.columns), a)) for m, a in zip(likes, rows, strict=True)]
        return NeuronBlock(
            gate=None if self.gate is None else placed[0],
            up=placed[-1],
            down=place(Weight(self.down.name, self.down.format, shape, down)),
            records=self.records,
            kind=self.kind,
            neurons=n,
            up_bias=None if self.up_bias is None else self.up_bias[first:last],
        )


@contextmanager
def _summing(ops: Ops) -> Iterator[list[FfnWork]]:
    if isinstance(ops, Sender):
        with ops.summing() as done:
            yield done
    else:
        yield []
