"""The disk tier: neurons whose records are read when they are wanted, past the page cache, into a cache of our own.

A record is read from wherever its rows lie: three places in a model's file, or one in a bundle (`bundle.py`). Rows that
are near one another come with one read where that is faster than two. Reads start when the active set is known and go
on while resident neurons are computed. Records lie in slots, and kernels find them by a table: results depend neither
on what was cached nor on where.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from thermocline.errors import BudgetError, UsageError
from thermocline.files.weight import Bytes, Weight
from thermocline.hardware.machine import Tier
from thermocline.hardware.reader import Reader, ReadStats, RecordReader
from thermocline.memory.arena import Memory
from thermocline.memory.fetching import Fetch, Fetching, Known
from thermocline.memory.first_rows import FirstRows, Scanner
from thermocline.memory.neuron_store import Records
from thermocline.memory.pool import Pool
from thermocline.memory.reads import Place, Way, place_of
from thermocline.memory.record_cache import SPARE, Uses
from thermocline.model.feed_forward import NOTHING
from thermocline.ops.contract import ActiveSet, Array, FfnWork, NeuronBlock
from thermocline.ops.device import Device
from thermocline.placement.cost import SCANNED_TOKENS
from thermocline.placement.ledger import Purpose

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Open = Callable[[Path], RecordReader]
Progress = Callable[[int, int], None]

IN_FLIGHT = 16
PIECE = 2048
"""Records that are read ahead at once."""
SMALLEST_CACHE = 2
"""Slots for so many records at least: one to compute with while another one is read."""


class Bundled(Protocol):
    """A file in which records are bundled; see `memory.bundle`."""

    def places(self, layer: int, row_bytes: Sequence[int]) -> list[Place]:
        """Where a layer's matrices lie."""


class DiskStore:
    """Neurons that lie on disk, of all layers; see `memory.neuron_store.NeuronStore`.

    `nbytes` of `memory`'s RAM are taken for slots as soon as the first layer is told of, and reads beside that take
    `IN_FLIGHT` times the largest one. Records are read from `bundle` if there is one, else from the model's own file.
    With a `scanner`, short steps that are not predicted find out by the first matrix which records they need.
    `open_reader` is there for tests.
    """

    def __init__(
        self,
        memory: Memory,
        nbytes: int,
        way: Way,
        open_reader: Open | None = None,
        bundle: Bundled | None = None,
        scanner: Scanner | None = None,
    ) -> None:
        self._memory = memory
        self.scanner = scanner
        self._nbytes = nbytes
        self._bundle = bundle
        self._way = way
        self._open = open_reader or (lambda path: Reader(path, depth=IN_FLIGHT, largest=way.largest))
        self._readers: dict[Path, RecordReader] = {}
        self._pools: dict[tuple[tuple[str, int], ...], Pool] = {}
        self._layers: list[DiskNeurons] = []
        self._entered = -1
        self.in_use = 0
        """Slots that the layer at hand takes."""

    def neurons(self, records: Records, device: Device) -> DiskNeurons:
        """A layer's slice.

        Raises:
            UsageError: the layer has no neuron records, or its rows lie in no file.
            BudgetError: the budget has no room for slots.
        """
        if not records.transposed:
            raise UsageError(
                "neurons can be left on disk only in files with neuron records; `thermocline convert` writes such a "
                "file, or raise --ram-budget so that all of them are in RAM"
            )
        matrices = [w for w in (records.gate, records.up, records.down) if w is not None]
        if self._bundle is None:
            places = [place_of(weight) for weight in matrices]
        else:
            places = self._bundle.places(records.layer, [w.format.row_bytes(w.columns) for w in matrices])
        for place in places:
            if place.path not in self._readers:
                self._readers[place.path] = self._open(place.path)
        layer = DiskNeurons(self, self._pool(matrices, device), records, places, device)
        self._layers.append(layer)
        return layer

    def warm_up(self, heat: npt.NDArray[np.floating], progress: Progress | None = None) -> int:
        """Fill the slots with the records that are used most; how many. `heat` (n_layer, n_ff) is how often each is, by
        the numbers of the file.

        Raises:
            HardwareError: the file cannot be read.
        """
        filled = 0
        for pool in self._pools.values():
            layers = [layer for layer in self._layers if layer.pool is pool]
            hot = [layer.heat(heat) for layer in layers]
            every = np.concatenate(hot)
            # A part stays free: the first tokens would have to evict before they read.
            count = min(len(every), int(pool.cache.slots * (1 - SPARE)))
            least = np.partition(every, len(every) - count)[len(every) - count] if count else np.inf
            for done, (layer, mine) in enumerate(zip(layers, hot, strict=True)):
                room = min(count, pool.cache.free)
                chosen = np.flatnonzero(mine >= least)[:room].astype(np.int32)
                layer.rate(mine)
                layer.read_ahead(chosen)
                count -= len(chosen)
                filled += len(chosen)
                if progress is not None:
                    progress(done + 1, len(layers))
        return filled

    def read_hottest(self, heat: npt.NDArray[np.floating], nbytes: int) -> tuple[int, int]:
        """Read the hottest records that are not in memory, at most `nbytes` of them, in the place of the coldest.

        `heat` is as for `warm_up`. Returns records and bytes.

        Raises:
            HardwareError: the file cannot be read.
        """
        records = size = 0
        for pool in self._pools.values():
            layers = [layer for layer in self._layers if layer.pool is pool]
            hot = [layer.heat(heat) for layer in layers]
            every, held = np.concatenate(hot), np.concatenate([layer.held for layer in layers])
            count = min(len(every), int(pool.cache.slots * (1 - SPARE)))
            best = np.argsort(-every, kind="stable")[:count]
            missing = best[~held[best]][: max(0, nbytes - size) // sum(pool.row_bytes)]
            ends = np.cumsum([len(mine) for mine in hot])
            for layer, mine, end in zip(layers, hot, ends, strict=True):
                layer.rate(mine)
                chosen = missing[(missing < end) & (missing >= end - len(mine))] - (end - len(mine))
                layer.read_ahead(np.sort(chosen).astype(np.int32))
            records, size = records + len(missing), size + len(missing) * sum(pool.row_bytes)
        return records, size

    def in_memory(self, counts: npt.NDArray[np.integer]) -> int:
        """The sum of counts (n_layer, n_ff; by the numbers of the file) over the records that are in memory."""
        return sum(int(layer.heat(counts)[layer.held].sum()) for layer in self._layers)

    @property
    def stats(self) -> ReadStats:
        """What was read so far, of all files."""
        each = [reader.stats for reader in self._readers.values()]
        return ReadStats(sum(s.requests for s in each), sum(s.nbytes for s in each), sum(s.busy for s in each))

    @property
    def uses(self) -> Uses:
        """Records asked for, and those of them that were in memory, so far."""
        each = [pool.cache.uses for pool in self._pools.values()]
        return Uses(sum(u.asked for u in each), sum(u.found for u in each))

    @property
    def hit_rate(self) -> float:
        """Share of the wanted records that were in memory."""
        return self.uses.share

    @property
    def slots(self) -> int:
        """Records that there is room for."""
        return sum(pool.cache.slots for pool in self._pools.values())

    def close(self) -> None:
        """Let go of the files; the slots are the memory's to let go."""
        for reader in self._readers.values():
            reader.close()

    def reader(self, path: Path) -> RecordReader:
        """The open file."""
        return self._readers[path]

    def enter(self, layer: int) -> None:
        """A layer begins; a lower one than before begins the next token."""
        if layer <= self._entered:
            for pool in self._pools.values():
                pool.cache.step()
            for other in self._layers:  # a step that failed has left what it had begun
                other.let_go()
        self._entered = layer

    @property
    def way(self) -> Way:
        """How records are read."""
        return self._way

    def _pool(self, matrices: list[Weight], device: Device) -> Pool:
        """The slots of records of this shape. The first shape gets all the room; layers of another one share it."""
        shape = tuple((w.format.name, w.columns) for w in matrices)
        if shape not in self._pools:
            row_bytes = [w.format.row_bytes(w.columns) for w in matrices]
            share = self._nbytes if not self._pools else self._nbytes // 4
            slots = share // sum(row_bytes)
            if slots < SMALLEST_CACHE:
                raise BudgetError(
                    "ram", SMALLEST_CACHE * sum(row_bytes) - share, "raise --ram-budget: no neuron has room to be read"
                )
            size = slots * sum(row_bytes)
            arena = self._memory.arenas[Tier.RAM].array((size,), "uint8", Purpose.STAGING)
            self._pools[shape] = Pool.of(matrices, slots, device.ops.to_host(arena), device)
        return self._pools[shape]


class DiskNeurons:
    """One layer's slice on disk; see `model.feed_forward.Neurons`."""

    def __init__(self, store: DiskStore, pool: Pool, records: Records, places: list[Place], device: Device) -> None:
        self.device = device
        self.start = records.start
        self.stop = records.stop
        self._number = records.layer
        self._store = store
        self.pool = pool
        self._layer = pool.cache.add_layer(self.stop - self.start)
        order = np.arange(self.start, self.stop) if records.order is None else records.order[self.start : self.stop]
        self._reads = Fetching(pool, self._layer, places, order.astype(np.int64), store.reader, store.way)
        self._block = NeuronBlock(
            gate=pool.matrices[0] if records.gate is not None else None,
            up=pool.matrices[-2],
            down=pool.matrices[-1],
            records=True,
            kind=records.kind,
            neurons=self.stop - self.start,
            up_bias=records.up_bias,
            rows=pool.cache.rows[self._layer],
        )
        self._begun: Fetch | None = None
        self._ahead: Fetch | None = None
        self._first: FirstRows | None = None
        if store.scanner is not None and records.kind.sparse:
            first = records.gate if records.gate is not None else records.up
            self._first = FirstRows(store.scanner, first, records.kind, device, store.way)

    def cut_anew(self, start: int, numbers: Ints) -> None:
        """Be the slice from `start` of neurons with these numbers, between two steps. What is in memory of them stays.

        Those with biases take them anew.
        """
        self.let_go()
        places = np.full(max(int(self._reads.numbers.max(initial=-1)), int(numbers.max(initial=-1))) + 1, -1, np.int32)
        places[numbers] = np.arange(len(numbers), dtype=np.int32)
        self.pool.cache.renumber(self._layer, places[self._reads.numbers], len(numbers))
        self.start, self._reads.numbers = start, numbers.astype(np.int64)
        rows = self.pool.cache.rows[self._layer]
        self._block = replace(self._block, neurons=len(numbers), rows=rows)

    def take_biases(self, up_bias: Array | None) -> None:
        """Biases (stop - start) of the slice as it is cut by now."""
        self._block = replace(self._block, up_bias=up_bias)

    def rows_of(self, records: Ints) -> list[Bytes]:
        """The bytes of some records, matrix by matrix (n, row_bytes), read unless they are in memory.

        Raises:
            HardwareError: a read failed.
        """
        self.let_go()
        self._reads.settle(self._fetch(records))
        slots = self.pool.cache.rows[self._layer][records]
        return [self.pool.rows(matrix)[slots] for matrix in range(len(self.pool.row_bytes))]

    def heat(self, of_file: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """How often each record of the slice is used."""
        return np.asarray(of_file[self._number, self._reads.numbers], np.float64)

    @property
    def held(self) -> npt.NDArray[np.bool_]:
        """Which records are in memory."""
        held: npt.NDArray[np.bool_] = self.pool.cache.rows[self._layer] >= 0
        return held

    def rate(self, heat: npt.NDArray[np.float64]) -> None:
        """Let records go by how often they are expected to be used, and no longer by when they were."""
        self.pool.cache.rate(self._layer, heat)

    def read_ahead(self, records: Ints) -> None:
        """Have records in memory before anybody asks for them.

        Raises:
            HardwareError: a read failed.
        """
        self.let_go()
        for start in range(0, len(records), PIECE):
            self._reads.settle(self._fetch(records[start : start + PIECE]))

    def announce(self, active: ActiveSet) -> None:
        """Start reading what is missing of the active set, or of its first part if there is no room for all."""
        self._drop()
        self._store.enter(self._number)
        if active.indices is None and self._first is not None:
            return  # what is wanted will be known when the first matrix is read
        wanted = self._wanted(active)
        coming = 0 if self._ahead is None else len(self._ahead.missing)
        if len(wanted) + coming > self._room:
            self._settle_ahead()
        self._begun = self._fetch(wanted[: self._room])
        self._store.in_use = min(len(wanted) + coming, self._room)

    def foresee(self, active: ActiveSet) -> None:
        """Start reading what is missing of a set that is probably the next layer's, which this is.

        What is read in vain stays in memory until its place is needed.
        """
        self._settle_ahead()
        room = (self._room - self._store.in_use) // 2
        missing, slots = self.pool.cache.claim_ahead(self._layer, self._wanted(active), max(0, room))
        self._ahead = self._reads.start(missing, missing, slots)

    def ffn(self, x: Array, active: ActiveSet, out: Array, *, skip_zeros: bool, hidden: Array | None = None) -> FfnWork:
        """See `Neurons.ffn`.

        Raises:
            HardwareError: a read failed; what it was to fill is free again.
        """
        first, scanned = self._first, 0
        short = active.indices is None and skip_zeros and len(x) <= SCANNED_TOKENS
        if short and first is not None and first.pay(sum(self.pool.row_bytes)):
            active, scanned = self._needed(x, first), self.stop - self.start
        else:
            self._reads.known = None
        wanted, room = self._wanted(active), self._room
        total, part = NOTHING, hidden
        if hidden is not None:
            hidden[...] = 0.0
            part = np.empty_like(hidden) if len(wanted) > room else hidden
        for start in range(0, len(wanted), room):
            piece = wanted[start : start + room]
            self._finish(piece)
            work = self.device.ops.ffn(x, self._block, ActiveSet(piece), out, skip_zeros=skip_zeros, hidden=part)
            total = FfnWork(*(a + b for a, b in zip(total, work, strict=True)))
            if hidden is not None and part is not hidden:
                hidden += part
        if scanned:
            total = total._replace(**{"up_rows" if self._block.gate is None else "gate_rows": scanned})
        return total

    def _needed(self, x: Array, first: FirstRows) -> ActiveSet:
        """The neurons that are in memory, and those whose first row lets any token through."""
        wanted = self.held.copy()
        missing = np.flatnonzero(~wanted)
        bias = None
        if self._block.gate is None and self._block.up_bias is not None:
            bias = self.device.ops.to_host(self._block.up_bias)[missing]
        places, rows = first.let_through(x, self._reads.numbers[missing], bias)
        wanted[missing[places]] = True
        self._reads.known = Known(missing[places].astype(np.int32), rows)
        return ActiveSet(np.flatnonzero(wanted).astype(np.int32))

    @property
    def _room(self) -> int:
        """Records that are computed with at once."""
        return self.pool.cache.slots

    def _wanted(self, active: ActiveSet) -> Ints:
        if active.indices is None:
            return np.arange(self.stop - self.start, dtype=np.int32)
        indices: Ints = np.asarray(active.indices, np.int32)
        return indices

    def _finish(self, piece: Ints) -> None:
        """Have `piece` in its slots."""
        self._settle_ahead()
        fetch, self._begun = self._begun, None
        if fetch is not None and not np.array_equal(fetch.wanted, piece):
            self._reads.abandon(fetch)
            fetch = None
        if fetch is None:
            fetch = self._fetch(piece)
        self._reads.settle(fetch)

    def let_go(self) -> None:
        """Forget all that was begun."""
        self._drop()
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            self._reads.abandon(ahead)

    def _settle_ahead(self) -> None:
        """Have in memory what was foreseen."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            self._reads.settle(ahead)

    def _drop(self) -> None:
        """Forget what a step before has read, or had begun to when it failed."""
        begun, self._begun, self._reads.known = self._begun, None, None
        if begun is not None:
            self._reads.abandon(begun)

    def _fetch(self, wanted: Ints) -> Fetch:
        """Start reads of the records that are not in memory, nor on their way."""
        cache, wanted = self.pool.cache, wanted.copy()
        if self._ahead is not None and len(self._ahead.missing):
            ahead = np.zeros(self.stop - self.start, bool)
            ahead[self._ahead.missing] = True
            coming = ahead[wanted]
            cache.uses.asked += int(np.count_nonzero(coming))
            missing, slots = cache.claim(self._layer, wanted[~coming])
        else:
            missing, slots = cache.claim(self._layer, wanted)
        return self._reads.start(wanted, missing, slots)
