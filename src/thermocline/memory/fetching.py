"""Records of one layer on their way from disk into slots: begun, and then settled or abandoned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from thermocline.errors import HardwareError
from thermocline.files.weight import Bytes
from thermocline.hardware.reader import RecordReader
from thermocline.memory.pool import Pool
from thermocline.memory.reads import Place, Way, merged, triples

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]


@dataclass(slots=True)
class Fetch:
    """Reads that were started: tickets by reader, and the slots that they fill with what is `missing` of `wanted`."""

    wanted: Ints
    missing: Ints
    slots: Ints
    tickets: list[tuple[RecordReader, int]]


@dataclass(frozen=True, slots=True)
class Known:
    """First rows of records, by place in the slice, that were read already."""

    places: Ints
    rows: Bytes


@dataclass(slots=True)
class Fetching:
    """Reads of one layer's records into the slots of `pool`, where the layer is number `layer`.

    `places` are where its matrices lie, `numbers` the file's number of each record; `reader` gives the open file of a
    path. Of records whose first rows are `known` the other rows are read.
    """

    pool: Pool
    layer: int
    places: list[Place]
    numbers: Longs
    reader: Callable[[Path], RecordReader]
    way: Way
    known: Known | None = None

    def start(self, wanted: Ints, missing: Ints, slots: Ints) -> Fetch:
        """Begin to read what is missing.

        Raises:
            HardwareError: it cannot be begun; the slots are free again.
        """
        fetch = Fetch(wanted, missing, slots, [])
        try:
            if len(missing):
                self._submit(fetch)
        except BaseException:
            self.abandon(fetch)
            raise
        return fetch

    def settle(self, fetch: Fetch) -> None:
        """Wait for reads, and enter what they brought.

        Raises:
            HardwareError: one failed; the slots are free again.
        """
        try:
            failed = _wait(fetch.tickets)
        except BaseException:
            self.pool.cache.give_back(fetch.slots)
            raise
        if failed is not None:
            self.pool.cache.give_back(fetch.slots)
            raise failed
        self.pool.cache.fill(self.layer, fetch.missing, fetch.slots)

    def abandon(self, fetch: Fetch) -> None:
        """Wait for reads, and forget what they brought."""
        _wait(fetch.tickets)
        self.pool.cache.give_back(fetch.slots)

    def _submit(self, fetch: Fetch) -> None:
        numbers, pool, unread = self.numbers[fetch.missing], self.pool, self._fill_known(fetch)
        for path in dict.fromkeys(place.path for place in self.places):
            pieces = []
            for i, (place, size, to) in enumerate(
                zip(self.places, pool.row_bytes, pool.targets(fetch.slots), strict=True)
            ):
                if place.path == path:
                    wanted = unread if i == 0 else slice(None)
                    offsets = place.offset + numbers[wanted] * place.stride
                    pieces.append(triples(offsets, size, to[wanted]))
            if not sum(map(len, pieces)):
                continue
            requests, parts = merged(np.concatenate(pieces), self.way)
            reader = self.reader(path)
            fetch.tickets.append((reader, reader.submit(requests, parts, pool.memory)))

    def _fill_known(self, fetch: Fetch) -> npt.NDArray[np.bool_]:
        """Copy the first rows that were read already; of which of the missing records they were not."""
        known = self.known
        if known is None or not len(known.places):
            return np.ones(len(fetch.missing), bool)
        at = np.minimum(np.searchsorted(known.places, fetch.missing), len(known.places) - 1)
        found = known.places[at] == fetch.missing
        self.pool.rows(0)[fetch.slots[found]] = known.rows[at[found]]
        unread: npt.NDArray[np.bool_] = ~found
        return unread


def _wait(tickets: list[tuple[RecordReader, int]]) -> HardwareError | None:
    """Wait for all, whatever fails: nothing may still be written when the slots are given to others."""
    failed = None
    while tickets:
        reader, ticket = tickets.pop()
        try:
            reader.wait(ticket)
        except HardwareError as error:
            failed = error
    return failed
