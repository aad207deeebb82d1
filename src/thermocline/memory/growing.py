"""Memory that fills slowly from many places at once: small pages first, and huge ones for what is filled.

A KV cache has a region of every head, of which the first positions are written first. In huge pages its first token
would wait for one of every region; in small ones a long context is read slowly, as finding the next page takes a
processor a good part of its time.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thermocline.hardware.memory import find_memory
from thermocline.memory.huge_pages import HUGE_PAGE, advise, whole_pages

Places = NDArray[np.int64]

COLLAPSE = 25
"""MADV_COLLAPSE of Linux 6.1, which Python does not name: put a huge page in the place of small ones."""

ENOUGH = HUGE_PAGE // 4
"""Bytes of a huge page that are filled when it takes the place of small ones."""


class GrowingPages:
    """Arrays (regions, rows, width) whose rows are written in order, in all regions at the same pace.

    They begin in small pages, which come as they are written. A huge page takes their place once a quarter of it is
    filled; it has room for no more than the arrays themselves.
    """

    def __init__(self, arrays: Sequence[NDArray[Any]]) -> None:
        for array in arrays:
            advise(*whole_pages(array, mmap.PAGESIZE), mmap.MADV_NOHUGEPAGE)
        self._arrays = tuple(arrays)
        wanted = find_memory().huge_pages in ("always", "madvise")
        found = [due_pages(array) for array in arrays if wanted]
        due = np.concatenate([rows for rows, _ in found]) if found else np.empty(0, np.int64)
        order = np.argsort(due, kind="stable")
        self._due = due[order].tolist()
        self._pages = np.concatenate([pages for _, pages in found])[order].tolist() if found else []
        self._next = 0
        self.made = 0
        """Huge pages that the system made. It refuses some where memory is short or in pieces; they stay small ones."""

    def grow(self, rows: int, most: int) -> int:
        """Note that so many rows are filled; how many huge pages were asked for, at most `most`."""
        asked = 0
        while asked < most and self._next < len(self._due) and self._due[self._next] <= rows:
            page = self._pages[self._next]
            advise(page, HUGE_PAGE, mmap.MADV_HUGEPAGE)
            self.made += advise(page, HUGE_PAGE, COLLAPSE)
            self._next += 1
            asked += 1
        return asked


def due_pages(array: NDArray[Any]) -> tuple[Places, Places]:
    """Of each huge page that lies within the array: how many rows fill enough of it, and its address."""
    start, size = whole_pages(array, HUGE_PAGE)
    pages = np.arange(start, start + size, HUGE_PAGE, dtype=np.int64)
    offsets = pages - array.ctypes.data
    region, row = array.strides[0], array.strides[1]

    def filled(to: Places, rows: Places) -> Places:
        return to // region * rows * row + np.minimum(to % region, rows * row)

    low, high = np.zeros_like(pages), np.full_like(pages, array.shape[1])
    while (low < high).any():
        middle = (low + high) // 2
        enough = filled(offsets + HUGE_PAGE, middle) - filled(offsets, middle) >= ENOUGH
        low, high = np.where(enough, low, np.minimum(middle + 1, high)), np.where(enough, middle, high)
    return low, pages
