"""The buffered allocator: queue every tensor with the tier that shall have it, then flush.

What PowerInfer's buffered allocator does (one tensor after another into VRAM by priority, while the budget is watched,
until one does not fit) is done here under a plan. The plan decides who gets what; the allocator carries
it out and keeps the ledger true: every byte is reserved before it is allocated, a tensor that does not fit is passed
over so that the refusal can name all that is missing, and a failure frees everything.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from thermocline.errors import BudgetError, UsageError
from thermocline.files.formats import BlockFormat
from thermocline.files.weight import Bytes, PickedWeight, Weight
from thermocline.hardware.machine import Tier
from thermocline.memory.arena import Arena, Memory
from thermocline.ops.contract import Array, Matrix
from thermocline.placement.ledger import Demand, Purpose

STAGING = 8 << 20
"""Bytes of the staging buffer: many rows, and few enough to stay in a cache between two copies."""

Rows = slice | npt.NDArray[np.int32] | None
"""Which rows of a tensor: neighbours, any in an order, or all."""


@runtime_checkable
class Streamer(Protocol):
    """An implementation of ops that computes with matrices which stay in their file."""

    def stream(self, weight: Weight) -> Matrix:
        """The matrix as it is computed with."""


@runtime_checkable
class Arranger(Protocol):
    """An implementation of ops that computes faster with copies of some matrices, in formats of its own."""

    def arrangement(self, fmt: BlockFormat, columns: int, *, apart: bool = False) -> BlockFormat | None:
        """The format of such a copy, of as many bytes; None where a file's is as good. `apart`: see `Slot`."""

    def arrange(self, weight: Weight, out: Bytes, fmt: BlockFormat) -> Weight:
        """The copy, in `out` (rows, row_bytes), where the weight itself may lie."""


Progress = Callable[[int, int], None]
"""Told how many bytes of how many are in place by now."""


class Source:
    """A tensor that is made only when it is moved: `make` writes it into the array it is given (rows, row_bytes).

    It is held as long as a queued tensor still takes rows of it.
    """

    def __init__(self, like: Weight, make: Callable[[Bytes], None]) -> None:
        self.like = like
        self.make = make
        self.users = 0
        self.made: Bytes | None = None


class Room:
    """An array (rows, row_bytes) that several tensors share, made when the first of them is moved."""

    def __init__(self, row_bytes: int) -> None:
        self.row_bytes = row_bytes
        self.rows = 0
        self._array: Array | None = None

    def take(self, rows: int) -> int:
        """Have so many rows more; the first of them."""
        self.rows += rows
        return self.rows - rows

    @property
    def array(self) -> Array:
        """The array, once it is made."""
        assert self._array is not None
        return self._array

    def made_in(self, arena: Arena, purpose: Purpose) -> Array:
        """The array, made if need be."""
        if self._array is None:
            self._array = arena.array((self.rows, self.row_bytes), "uint8", purpose)
        return self._array


@dataclass(slots=True)
class Slot:
    """A queued tensor. `matrix` is where the device computes with it, once it is flushed.

    In a `room` its rows begin at `start`. `array` is what was made for it, None where it stays in the file's mapping;
    `host` its rows as bytes of the file's format, if they are in RAM. `as_stored`: no other format may take its place;
    `arranged` is where its copy in another format, `better`, shall be. `apart`: few of its rows are read at a time.
    """

    source: Weight | Source
    rows: Rows
    tier: Tier
    purpose: Purpose
    priority: int
    room: Room | None = None
    start: int = 0
    as_stored: bool = False
    apart: bool = False
    better: BlockFormat | None = None
    arranged: Bytes | None = field(default=None, repr=False)
    array: Array | None = field(default=None, repr=False)
    host: Bytes | None = field(default=None, repr=False)
    _matrix: Matrix | None = field(default=None, repr=False)

    @property
    def matrix(self) -> Matrix:
        """The placed tensor."""
        assert self._matrix is not None
        return self._matrix

    @property
    def like(self) -> Weight:
        """Name, format and columns; its rows may be more than are placed."""
        return self.source.like if isinstance(self.source, Source) else self.source

    @property
    def count(self) -> int:
        """Rows that are placed."""
        if self.rows is None:
            return self.like.rows
        return self.rows.stop - self.rows.start if isinstance(self.rows, slice) else len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes that are placed."""
        return self.count * self.like.format.row_bytes(self.like.columns)


@dataclass(slots=True)
class Flushed:
    """What a flush did: bytes by purpose that stay in the file's mapping, and those that were made anew; the time.

    `host_bytes` are the matrices that are in RAM, `left` the bytes of files in whose place copies are computed with.
    """

    mapped: dict[Purpose, int] = field(default_factory=dict)
    copied: dict[Purpose, int] = field(default_factory=dict)
    host_bytes: list[Bytes] = field(default_factory=list)
    left: list[Bytes] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def moved(self) -> int:
        """Bytes that are in place."""
        return sum(self.mapped.values()) + sum(self.copied.values())


class BufferedAllocator:
    """Moves queued tensors to their tiers, through a staging buffer, in the order of their priorities.

    On the host, rows that lie together in the mapped file stay there and are only claimed, unless `arrange` had them
    copied as the host computes fastest with them.
    """

    def __init__(self, memory: Memory, staging: int = STAGING) -> None:
        self._memory = memory
        self._staging = staging
        self._queue: list[Slot] = []

    def queue(
        self,
        source: Weight | Source,
        tier: Tier,
        purpose: Purpose,
        *,
        rows: Rows = None,
        priority: int = 0,
        room: Room | None = None,
        as_stored: bool = False,
        apart: bool = False,
    ) -> Slot:
        """Say where a tensor, or rows of it, shall be; low priorities are moved first.

        With `room`, which belongs to the tier, it gets a part of that and no array of its own. `as_stored` keeps it in
        the file's format, for those who read its bytes. `apart`: few of its rows are read at a time.
        """
        if isinstance(source, Source):
            source.users += 1
        slot = Slot(source, rows, tier, purpose, priority, room, as_stored=as_stored, apart=apart)
        if room is not None:
            slot.start = room.take(slot.count)
        self._queue.append(slot)
        return slot

    @property
    def ram_bytes(self) -> int:
        """Bytes that are queued for RAM."""
        return sum(slot.nbytes for slot in self._queue if slot.tier is Tier.RAM)

    def arrange(self) -> int:
        """Have what is queued for RAM copied as its ops compute fastest with it; the bytes of which that is true.

        Copies of one purpose share an array, which is large enough for huge pages.

        Raises:
            BudgetError, AllocationError: there is no room for them; the whole memory is closed.
        """
        arena, ops = self._memory.arenas[Tier.RAM], self._memory.host.ops
        if not isinstance(ops, Arranger):
            return 0
        arranged: dict[Purpose, list[Slot]] = {}
        for slot in self._queue:
            kept = slot.as_stored or slot.room is not None or slot.tier is not Tier.RAM
            if not kept:
                slot.better = ops.arrangement(slot.like.format, slot.like.columns, apart=slot.apart)
            if slot.better is not None:
                arranged.setdefault(slot.purpose, []).append(slot)
        total = 0
        try:
            for purpose, slots in arranged.items():
                made = ops.to_host(arena.array((sum(slot.nbytes for slot in slots),), "uint8", purpose))
                at = 0
                for slot in slots:
                    slot.arranged = made[at : at + slot.nbytes].reshape(slot.count, -1)
                    at += slot.nbytes
                total += at
        except BaseException:
            self._memory.close()
            raise
        return total

    def flush(self, progress: Progress | None = None) -> Flushed:
        """Move everything that is queued.

        Raises:
            BudgetError: a budget does not hold its tensors; the message counts all that is missing.
            AllocationError: a memory refused what its budget allows.
            ThermoclineError: a tensor could not be made.

        After any exception the whole memory is closed: nothing is allocated and the ledger is empty.
        """
        queue, self._queue = sorted(self._queue, key=lambda slot: slot.priority), []
        began = time.perf_counter()
        done, total = Flushed(), sum(slot.nbytes for slot in queue)
        passed: list[Slot] = []
        staging = _Staging(self._memory, self._staging)
        try:
            for slot in queue:
                try:
                    self._move(slot, staging, done)
                except BudgetError:
                    passed.append(slot)
                if progress is not None:
                    progress(done.moved, total)
            if passed:
                raise self._refusal(passed)
            staging.close()
        except BaseException:
            self._memory.close()
            raise
        done.seconds = time.perf_counter() - began
        return done

    def _move(self, slot: Slot, staging: _Staging, done: Flushed) -> None:
        if slot.tier is Tier.DISK:
            slot._matrix = self._streamed(slot)
            return
        arena, ops = self._memory.arenas[slot.tier], self._memory.devices[slot.tier].ops
        like, mapped = slot.like, self._mapped(slot)
        if slot.better is not None and slot.arranged is not None:
            self._move_arranged(slot, slot.better, slot.arranged, mapped, staging, done)
            return
        if mapped is not None:
            arena.claim(slot.nbytes, slot.purpose)
            slot._matrix, slot.host = ops.place(mapped), mapped.data
            done.host_bytes.append(slot.host)
            done.mapped[slot.purpose] = done.mapped.get(slot.purpose, 0) + slot.nbytes
            return
        if slot.room is None:
            out = arena.array((slot.count, like.format.row_bytes(like.columns)), "uint8", slot.purpose)
        else:
            out = slot.room.made_in(arena, slot.purpose)[slot.start : slot.start + slot.count]
        slot.array = out
        self._fill(slot, out, staging)
        if slot.room is None:  # a room is placed as a whole, once it is full
            slot._matrix = ops.place(Weight(like.name, like.format, (slot.count, like.columns), out))
        if slot.tier is Tier.RAM:
            slot.host = ops.to_host(out)
            done.host_bytes.append(slot.host)
        done.copied[slot.purpose] = done.copied.get(slot.purpose, 0) + slot.nbytes

    def _mapped(self, slot: Slot) -> Weight | None:
        """What the host can compute with where it lies: neighbouring rows, whole ones."""
        source, rows, like = slot.source, slot.rows, slot.like
        if not isinstance(source, Weight) or slot.tier is not Tier.RAM or isinstance(rows, np.ndarray) or slot.room:
            return None
        data = source.data if rows is None else source.data[rows]
        if not data.flags.c_contiguous:
            return None
        whole = rows is None and not isinstance(source, PickedWeight)
        return source if whole else Weight(like.name, like.format, (slot.count, like.columns), data)

    def _fill(self, slot: Slot, out: Array, staging: _Staging) -> None:
        """Write the slot's rows as the file has them."""
        source = slot.source
        if isinstance(source, Source) and slot.rows is None and slot.tier is Tier.RAM and source.users == 1:
            source.make(out)
        else:
            staging.copy(self._bytes_of(source), slot.rows, out, self._memory.arenas[slot.tier])
        if isinstance(source, Source):
            self._used(source)

    def _move_arranged(
        self, slot: Slot, fmt: BlockFormat, out: Bytes, mapped: Weight | None, staging: _Staging, done: Flushed
    ) -> None:
        ops, like = self._memory.host.ops, slot.like
        assert isinstance(ops, Arranger)
        if mapped is None:
            self._fill(slot, out, staging)
        else:
            done.left.append(mapped.data)
        stored = mapped or Weight(like.name, like.format, (slot.count, like.columns), out)
        slot._matrix = self._memory.host.ops.place(ops.arrange(stored, out, fmt))
        done.host_bytes.append(out)
        done.copied[slot.purpose] = done.copied.get(slot.purpose, 0) + slot.nbytes

    def _streamed(self, slot: Slot) -> Matrix:
        """A matrix that the host reads anew for every pass."""
        ops = self._memory.host.ops
        if not isinstance(ops, Streamer) or not isinstance(slot.source, Weight) or slot.rows is not None:
            raise UsageError(f"{slot.like.name} cannot be left on disk: raise --ram-budget so that it is in RAM")
        return ops.stream(slot.source)

    def _bytes_of(self, source: Weight | Source) -> Bytes:
        if isinstance(source, Weight):
            return source.data
        if source.made is None:
            like = source.like
            shape = (like.rows, like.format.row_bytes(like.columns))
            host = self._memory.arenas[Tier.RAM]
            made = host.array(shape, "uint8", Purpose.STAGING)
            source.make(self._memory.host.ops.to_host(made))
            source.made = made
        return source.made

    def _used(self, source: Source) -> None:
        source.users -= 1
        if not source.users and source.made is not None:
            self._memory.arenas[Tier.RAM].free(source.made)
            source.made = None

    def _refusal(self, passed: list[Slot]) -> BudgetError:
        """One error for all that was passed over, tier by tier; the first tier that lacks something speaks."""
        tier = min((slot.tier for slot in passed), key=list(Tier).index)
        sums: dict[Purpose, int] = {}
        for slot in passed:
            if slot.tier is tier:
                sums[slot.purpose] = sums.get(slot.purpose, 0) + slot.nbytes
        ledger = self._memory.ledger
        try:
            ledger.reserve_all(Demand(tier, purpose, size) for purpose, size in sums.items())
        except BudgetError as error:
            return error
        # All that was passed over fits together: what made a tensor lack room was let go meanwhile (a source).
        missing = max(slot.nbytes for slot in passed if slot.tier is tier)
        return BudgetError(tier, missing, f"raise --{tier}-budget by as much", ledger.table(tier))


class _Staging:
    """The buffer that rows pass through on their way from the file; made when it is first needed."""

    def __init__(self, memory: Memory, size: int) -> None:
        self._arena: Arena = memory.arenas[Tier.RAM]
        self._size = size

    @cached_property
    def _buffer(self) -> Array:
        return self._arena.array((self._size,), "uint8", Purpose.STAGING)

    def copy(self, data: Bytes, rows: Rows, out: Array, arena: Arena) -> None:
        """Copy rows of `data` into `out`, as many at a time as the buffer holds."""
        row_bytes = data.shape[1]
        step = max(1, self._size // max(1, row_bytes))
        ops, host = arena.device.ops, self._arena.device.ops
        for start in range(0, len(out), step):
            stop = min(start + step, len(out))
            if arena is self._arena:
                host.to_host(out)[start:stop] = data[_some(rows, start, stop)]
                continue
            if row_bytes > self._size:  # a row longer than the buffer goes as it is
                ops.upload(np.ascontiguousarray(data[_some(rows, start, stop)]), out[start:stop])
                continue
            piece = host.to_host(self._buffer)[: (stop - start) * row_bytes].reshape(stop - start, row_bytes)
            np.copyto(piece, data[_some(rows, start, stop)])
            ops.upload(piece, out[start:stop])

    def close(self) -> None:
        """Let go of the buffer."""
        if "_buffer" in self.__dict__:
            self._arena.free(self._buffer)


def _some(rows: Rows, start: int, stop: int) -> slice | npt.NDArray[np.int32]:
    if rows is None:
        return slice(start, stop)
    return slice(rows.start + start, rows.start + stop) if isinstance(rows, slice) else rows[start:stop]
