"""Huge pages under a cache that fills: where they are due, and that nothing changes but the pages."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from thermocline.memory.growing import ENOUGH, GrowingPages, due_pages
from thermocline.memory.huge_pages import HUGE_PAGE


@pytest.mark.parametrize("shape", [(2, 9000, 256), (16, 4096, 256), (3, 30000, 136), (1, 40000, 68), (64, 700, 128)])
def test_a_page_is_due_when_enough_of_it_is_filled(shape: tuple[int, int, int]) -> None:
    array = np.zeros(shape, np.uint8)
    rows, pages = due_pages(array)
    assert len(pages) >= array.nbytes // HUGE_PAGE - 1
    for row, page in zip(rows.tolist(), pages.tolist(), strict=True):
        assert page % HUGE_PAGE == 0
        assert array.ctypes.data <= page <= array.ctypes.data + array.nbytes - HUGE_PAGE
        assert filled(array, page, row) >= ENOUGH > filled(array, page, row - 1)


def filled(array: np.ndarray, page: int, rows: int) -> int:
    """Bytes of a page that lie in the first rows of a region, counted one by one."""
    marks = np.zeros(array.shape, np.uint8)
    marks[:, :rows] = 1
    at = page - array.ctypes.data
    return int(marks.reshape(-1)[at : at + HUGE_PAGE].sum())


def test_pages_are_asked_for_once_and_no_more_than_allowed() -> None:
    array = np.zeros((4, 16384, 256), np.uint8)
    pages = GrowingPages([array, np.zeros((1, 8, 16), np.uint8)])
    rows, due = due_pages(array)
    first = int((rows <= 8000).sum())
    assert pages.grow(int(rows.min()) - 1, 100) == 0
    if not pages._due:
        return  # huge pages are switched off here
    assert pages.grow(8000, 1) == 1
    assert pages.grow(8000, 100) == first - 1
    assert pages.grow(100, 100) == 0
    assert pages.grow(16384, 100) == len(due) - first
    assert pages.grow(16384, 100) == 0


def test_what_is_written_stays_while_pages_change() -> None:
    array = np.zeros((2, 20000, 256), np.uint8)
    pages, twin = GrowingPages([array]), np.zeros_like(array)
    rng = np.random.default_rng(5)
    for start in range(0, 20000, 2500):
        part = rng.integers(0, 256, (2, 2500, 256), np.uint8)
        array[:, start : start + 2500] = part
        twin[:, start : start + 2500] = part
        pages.grow(start + 2500, 3)
        assert np.array_equal(array, twin)


def test_a_filled_cache_lies_in_huge_pages_where_the_system_makes_them() -> None:
    """Where others use the memory too, it refuses some now and then, so that there are several tries."""
    tries = [asked_made_and_found() for _ in range(5)]
    for asked, made, found in tries:
        assert made <= found <= asked  # it goes on trying by itself
    assert any(made for _, made, _ in tries) or not collapses()


def asked_made_and_found() -> tuple[int, int, int]:
    """Huge pages of a new array that is filled: asked for, made as the system answers, and there as it lists them."""
    shape = (2, 20000, 256)
    array = np.frombuffer(own_memory(int(np.prod(shape))), np.uint8).reshape(shape)
    pages = GrowingPages([array])
    array[:] = 1
    assert huge_bytes(array) == 0
    return pages.grow(20000, 100), pages.made, huge_bytes(array) // HUGE_PAGE


def own_memory(size: int) -> mmap.mmap:
    """Memory that nobody used before, and not to be shared, which has rules of its own for huge pages."""
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def collapses() -> bool:
    """Whether the system puts a huge page in the place of small ones when it is asked to."""
    with own_memory(2 * HUGE_PAGE) as memory:
        view = np.frombuffer(memory, np.uint8)
        view[:: mmap.PAGESIZE] = 1
        at = -view.ctypes.data % HUGE_PAGE
        del view
        try:
            memory.madvise(25, at, HUGE_PAGE)
        except OSError:
            return False
        return True


def huge_bytes(array: np.ndarray) -> int:
    """In the mappings that hold nothing else."""
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
        name, _, value = line.partition(" ")
        if not name.endswith(":"):
            first, last = (int(word, 16) for word in name.split("-"))
            counts = array.ctypes.data <= first and last <= array.ctypes.data + array.nbytes
        elif counts and name == "AnonHugePages:":
            total += int(value.split()[0]) << 10
    return total
