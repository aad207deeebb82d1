"""What it costs to read neurons from disk, from any depth of a layer on: whole records, and first rows alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from thermocline.hardware.machine import ReadCurve

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class ReadPrices:
    """Prices by a disk's curve for layers whose clusters begin and end at `bounds` (clusters + 1).

    `scattered` says that neighbours in the order of temperatures are no neighbours in the file.
    """

    def __init__(self, curve: ReadCurve, bounds: Ints, *, scattered: bool) -> None:
        self.curve = curve
        self.n_ff = int(bounds[-1])
        self.sizes = np.diff(bounds).astype(np.float64)
        self.left = self.n_ff - bounds
        self.scattered = scattered
        self._rates: dict[int, dict[int, Floats]] = {}

    def first_rows(self, first: int) -> Floats:
        """Seconds to read the first rows, of `first` bytes, of the neurons from each depth on (clusters + 1).

        In a file that has its neurons in order they lie together. Else they are read by themselves, or all rows are.
        """
        sizes = (self.left * float(first)).tolist()
        together: Floats = np.array([size / self.curve.bandwidth(size) if size else 0.0 for size in sizes])
        if not self.scattered:
            return together
        return np.minimum(self.curve.scattered(self.left.astype(np.float64), self.n_ff, first), float(together[0]))

    def records(self, share: Floats, record: int) -> tuple[Floats, Ints]:
        """Seconds to read a `share` of each cluster's records (clusters) from each depth on (clusters + 1), and the
        neurons of one read.
        """
        if self.scattered:
            seconds = self.curve.scattered(_suffix(self.sizes * share), self.n_ff, record)
            return seconds, np.ones(len(self.left), np.int64)
        return self._by_runs(share, record)

    def _by_runs(self, share: Floats, record: int) -> tuple[Floats, Ints]:
        """A read fetches a run of neighbouring records if any is wanted: short runs fetch less, long ones faster."""
        best, runs = np.full(len(self.left), np.inf if record else 0.0), np.ones(len(self.left), np.int64)
        missed = np.log1p(-np.clip(share, 0.0, 1 - 1e-12))
        for run, rates in self._rates_of_runs(record).items() if record else ():
            hit = -np.expm1(run * missed)
            seconds = _suffix(self.sizes * hit * record) / rates
            runs = np.where(seconds < best, run, runs)
            best = np.minimum(seconds, best)
        return best, runs

    def _rates_of_runs(self, record: int) -> dict[int, Floats]:
        """Bytes/s of reads of so many neighbouring records, from each depth on: no run is longer than what is left."""
        if record not in self._rates:
            n_ff, left = self.n_ff, np.maximum(self.left, 1).tolist()
            lengths = [1 << i for i in range(n_ff.bit_length()) if 1 << i < n_ff] + [n_ff]
            self._rates[record] = {
                run: np.array([self.curve.bandwidth(min(run, rest) * record) for rest in left]) for run in lengths
            }
        return self._rates[record]


def _suffix(values: Floats) -> Floats:
    return np.append(np.cumsum(values[::-1])[::-1], 0.0)
