"""Neuron records of the disk tier that are in memory: which, where, and which of them go first.

The cache is a fixed number of slots. What goes first is decided by recency and frequency together, as in LRFU (Lee et
al., IEEE Transactions on Computers 50, 2001): every use adds a weight that doubles each HALF_LIFE steps, so that a
record's score is the sum of its uses, older ones counting less. A record that comes in begins with a part of what its
uses are expected to sum up to, where it is known how hot it is: else it would go before it has shown that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]

HALF_LIFE = 24.0
"""Steps after which a use counts half as much."""
TRUST = 0.5
"""Part of a score that is believed before it is seen. On a recorded text of a network with known temperatures 63 % of
the records were there: 59 % if nothing is believed, 70 % at most, if the future were known. With temperatures that are
other neurons' it was 30 % instead of 13 %.
"""
HIGHEST = 1e100
"""Scores are scaled down before they get here."""
SPARE = 1 / 64
"""Share of the slots that are made free at once: finding the lowest scores takes a look at all of them."""


@dataclass(slots=True)
class Uses:
    """Records asked for, and those of them that were there."""

    asked: int = 0
    found: int = 0

    @property
    def share(self) -> float:
        """Share of what was asked for that was there, 0 where nothing was asked for."""
        return self.found / self.asked if self.asked else 0.0


class RecordCache:
    """Slots that hold records of several layers. `rows[layer]` (int32) is each record's slot, -1 for none."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.uses = Uses()
        self.rows: list[Ints] = []
        self._expected: list[npt.NDArray[np.float64]] = []
        self._layer = np.full(slots, -1, np.int32)
        self._record = np.zeros(slots, np.int32)
        self._score = np.zeros(slots)
        self._free = list(range(slots - 1, -1, -1))
        self._weight = 1.0
        self._in_use = np.empty(0, np.int32)

    def add_layer(self, records: int) -> int:
        """The number of a new layer of so many records, none of which is in memory."""
        self.rows.append(np.full(records, -1, np.int32))
        self._expected.append(np.zeros(records))
        return len(self.rows) - 1

    def renumber(self, layer: int, new: Ints, records: int) -> None:
        """A layer has other `records`: `new` is the number that each old one has from now on, -1 where it is gone."""
        old = self.rows[layer]
        held = np.flatnonzero(old >= 0)
        gone, kept = held[new[held] < 0], held[new[held] >= 0]
        self._layer[old[gone]] = -1
        self._free.extend(old[gone].tolist())
        self.rows[layer], expected = np.full(records, -1, np.int32), np.zeros(records)
        expected[new[new >= 0]] = self._expected[layer][new >= 0]
        self._expected[layer] = expected
        self.rows[layer][new[kept]] = old[kept]
        self._record[old[kept]] = new[kept]

    def rate(self, layer: int, heat: npt.NDArray[np.float64]) -> None:
        """Expect a layer's records to be used as often as `heat` says, and forget how often they were."""
        expected = self._expected[layer] = TRUST * heat / (1 - 2.0 ** (-1 / HALF_LIFE))
        rows = self.rows[layer]
        held = np.flatnonzero(rows >= 0)
        self._score[rows[held]] = self._weight * expected[held]

    def step(self) -> None:
        """A token later: uses from now on count more than those before."""
        self._weight *= 2.0 ** (1 / HALF_LIFE)
        if self._weight > HIGHEST:
            self._score /= self._weight
            self._weight = 1.0

    def claim(self, layer: int, records: Ints) -> tuple[Ints, Ints]:
        """Use records: those that must be read, and a slot for each of them. The rest stays where it is.

        The slots belong to nobody until `fill` or `give_back`. `records` are at most as many as there are slots.
        """
        slots = self.rows[layer][records]
        present = slots >= 0
        self._score[slots[present]] += self._weight
        self._in_use = slots[present]
        missing = records[~present]
        self.uses.asked += len(records)
        self.uses.found += len(records) - len(missing)
        return missing, self._take(len(missing))

    def claim_ahead(self, layer: int, records: Ints, most: int) -> tuple[Ints, Ints]:
        """At most so many of the records that are not in memory, which may be used next, and slots for them.

        What the last `claim` uses stays where it is.
        """
        missing = records[self.rows[layer][records] < 0][:most]
        return missing, self._take(len(missing))

    def _take(self, count: int) -> Ints:
        if count > len(self._free):
            self._evict(count - len(self._free), keep=self._in_use)
        left = len(self._free) - count
        taken = np.array(self._free[left:][::-1], np.int32)
        del self._free[left:]
        return taken

    def fill(self, layer: int, records: Ints, slots: Ints) -> None:
        """Slots that `claim` gave hold these records now, which are used for the first time."""
        self.rows[layer][records] = slots
        self._layer[slots], self._record[slots] = layer, records
        self._score[slots] = self._weight * (1 + self._expected[layer][records])

    @property
    def free(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    def give_back(self, slots: Ints) -> None:
        """Slots that `claim` gave hold nothing after all."""
        self._free.extend(slots.tolist())

    def _evict(self, count: int, keep: Ints) -> None:
        """Free at least `count` slots, lowest scores first, of those that hold a record and are not to be kept."""
        held = self._layer >= 0
        held[keep] = False
        candidates = np.flatnonzero(held)
        count = min(len(candidates), max(count, int(self.slots * SPARE)))
        scores = self._score[candidates]
        gone = candidates[np.argpartition(scores, count - 1)[:count]] if count < len(candidates) else candidates
        gone = gone[np.argsort(self._layer[gone], kind="stable")]
        layers = self._layer[gone]
        for mine in np.split(gone, np.flatnonzero(layers[1:] != layers[:-1]) + 1):
            self.rows[self._layer[mine[0]]][self._record[mine]] = -1
        self._layer[gone] = -1
        self._free.extend(gone.tolist())
