"""Mapped weights in huge pages of memory, at the addresses at which their file is mapped.

Most file systems keep files in pages of 4 KiB, of which every token needs many thousands, and to find the next one
takes a processor a good part of its time. What a model is computed with can be copied into memory of the process's own,
in huge pages, which takes the place of the file's: views stay valid, and nothing depends on the file any more.

In a virtual machine the system below has pages of its own. It gives small ones to a cache of files, which grows in
small steps, even where the guest calls them huge: such a file was read at 20 GB/s, and its copy at 29.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thermocline.errors import HardwareError
from thermocline.files.weight import Bytes
from thermocline.hardware.cores import find_cores, is_guest
from thermocline.hardware.mapping import mapping_below
from thermocline.hardware.memory import find_memory

Progress = Callable[[int, int], None]
"""Told how many bytes of how many are done."""

HUGE_PAGE = 2 << 20
PIECE = 16 * HUGE_PAGE
GIB = 1 << 30
HUGE_ENOUGH = 0.75
"""Share of the bytes in huge pages from which on a copy gains little."""
MOST_PIECES = 256
"""In which a copy is made, unless they were larger than `PIECE`: a piece for each thread is in memory twice meanwhile,
which must stay a small share of a budget.
"""
PADDING = 4096
"""Most bytes between tensors that are neighbours in a file."""
THREADS = 8
"""Most of them that copy; more only wait for the memory."""

MOVE, TO_A_PLACE = 1, 2
"""MREMAP_MAYMOVE and MREMAP_FIXED of Linux, which Python does not name."""
FAILED = ctypes.c_void_p(-1).value


def pays(views: Sequence[Bytes], aside: int = 0, *, budgeted: bool = False) -> bool:
    """Whether most of these bytes lie in small pages, and memory has room for them and for `aside` bytes more.

    Room for them twice, so that the file stays in the system's cache, from where the next start is fast; but not if a
    budget counts what is in memory.
    """
    ranges, memory = list(_ranges(views, inside=budgeted)), find_memory()
    total = sum(stop - start for start, stop in ranges)
    if not total or memory.huge_pages not in ("always", "madvise"):
        return False
    if not have_room(total, aside, beside_file=not budgeted):
        return False
    huge, held = _huge_and_held(ranges, ("AnonHugePages:",) if is_guest() else ("AnonHugePages:", "FilePmdMapped:"))
    return huge < HUGE_ENOUGH * held


def have_room(size: int, aside: int, *, beside_file: bool) -> bool:
    """Whether memory has room for a copy of so many bytes, the file's own in the system's cache, and `aside` more."""
    memory = find_memory()
    return size * (2 if beside_file else 1) + aside <= min(memory.available, memory.usable)


def copy(views: Sequence[Bytes], progress: Progress | None = None, *, budgeted: bool = False) -> int:
    """Put memory of the process's own in the place of the mapped files that these are views on; bytes copied.

    Huge pages are copied whole, with what else they hold; the beginning and the end of a file, less than one, are not.
    If a budget counts what is in memory, pages that hold something else stay the file's.
    The caller sees to it that nobody writes to the views, and that the files are whole (`sheltered`).

    Raises:
        HardwareError: memory has no room for the copy; the views are as they were.
    """
    ranges, done, memory = list(_ranges(views, inside=budgeted)), 0, find_memory()
    total = sum(stop - start for start, stop in ranges)
    size = min(PIECE, max(1, total // (MOST_PIECES * HUGE_PAGE)) * HUGE_PAGE)
    pieces = [(start, min(start + size, stop)) for first, stop in ranges for start in range(first, stop, size)]
    room = min(memory.available, memory.usable)
    if total > room:
        raise HardwareError(
            f"{total / GIB:.2f} GiB of weights cannot be copied: {room / GIB:.2f} GiB of memory are free; "
            "leave out --no-mmap"
        )
    with ThreadPoolExecutor(min(THREADS, find_cores().threads), "huge pages") as pool:
        for moved in pool.map(_replace, pieces):
            done += moved
            if progress is not None:
                progress(done, total)
    return done


def _ranges(views: Sequence[Bytes], *, inside: bool) -> Iterator[tuple[int, int]]:
    """Addresses of whole huge pages that hold bytes of the views, and only bytes of the mappings below them.

    `inside`: only those that hold nothing else but what pads neighbours.
    """
    if inside:
        yield from _inside(views)
        return
    pages = sorted(pair for view in views if (pair := _pages(view)) is not None)
    while pages:
        start, stop = pages.pop(0)
        while pages and pages[0][0] <= stop:
            stop = max(stop, pages.pop(0)[1])
        yield start, stop


def _inside(views: Sequence[Bytes]) -> Iterator[tuple[int, int]]:
    """Addresses of the huge pages that lie in a run of views on mapped files."""
    mapped = (view for view in views if view.nbytes and mapping_below(view) is not None)
    spans = sorted((view.ctypes.data, view.ctypes.data + view.nbytes) for view in mapped)
    while spans:
        begin, end = spans.pop(0)
        while spans and spans[0][0] <= end + PADDING:
            end = max(end, spans.pop(0)[1])
        start, stop = -(-begin // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
        if start < stop:
            yield start, stop


def _pages(view: Bytes) -> tuple[int, int] | None:
    """The huge pages that a view on a mapped file touches, as far as the mapping covers them; None without any."""
    mapping = mapping_below(view)
    if mapping is None or not view.nbytes:
        return None
    origin = np.frombuffer(mapping, np.uint8).ctypes.data
    first, last = -(-origin // HUGE_PAGE), (origin + len(mapping)) // HUGE_PAGE
    start = max(first, view.ctypes.data // HUGE_PAGE)
    stop = min(last, -(-(view.ctypes.data + view.nbytes) // HUGE_PAGE))
    return (start * HUGE_PAGE, stop * HUGE_PAGE) if start < stop else None


def _replace(piece: tuple[int, int]) -> int:
    """Copy a piece of the address space and put the copy in its place; bytes copied, 0 if there is no memory."""
    start, stop = piece
    size = stop - start
    libc = c_library()
    whole = libc.mmap(None, size + HUGE_PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANON, -1, 0)
    if whole == FAILED:
        return 0
    made = -(-whole // HUGE_PAGE) * HUGE_PAGE
    libc.madvise(made, size, mmap.MADV_HUGEPAGE)
    ctypes.memmove(made, start, size)
    libc.mprotect(made, size, mmap.PROT_READ)
    moved: bool = libc.mremap(made, size, size, MOVE | TO_A_PLACE, start) != FAILED
    libc.munmap(whole, made - whole)
    libc.munmap(made + size * moved, whole + HUGE_PAGE - made + size * (not moved))
    return size * moved


def _huge_and_held(
    ranges: Sequence[tuple[int, int]], kinds: Sequence[str], maps: Path = Path("/proc/self/smaps")
) -> tuple[int, int]:
    """Bytes in huge pages of these kinds, and bytes in memory, of the mappings that these addresses belong to."""
    huge, held, counts = 0, 0, False
    try:
        lines = maps.read_text(errors="replace").splitlines()
    except OSError:
        return 0, 0
    for line in lines:
        name, _, value = line.partition(" ")
        if not name.endswith(":"):  # a mapping begins: first and last address, and what it is
            first, last = (int(word, 16) for word in name.split("-"))
            counts = any(start < last and first < stop for start, stop in ranges)
        elif counts and name in kinds:
            huge += int(value.split()[0]) << 10
        elif counts and name == "Rss:":
            held += int(value.split()[0]) << 10
    return huge, held


def whole_pages(array: npt.NDArray[Any], page: int) -> tuple[int, int]:
    """Address and bytes of the pages of this size that lie within an array."""
    start = -(-array.ctypes.data // page) * page
    return start, max(0, (array.ctypes.data + array.nbytes) // page * page - start)


def advise(address: int, size: int, advice: int) -> bool:
    """Whether the system follows; where it does not, memory is only slower."""
    return bool(size) and c_library().madvise(address, size, advice) == 0


@functools.cache
def c_library() -> ctypes.CDLL:
    """The C library with the calls' true types: addresses are wider than ctypes' int."""
    libc, address, size, number = ctypes.CDLL(None), ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype, libc.mmap.argtypes = address, [address, size, number, number, number, ctypes.c_long]
    libc.mremap.restype, libc.mremap.argtypes = address, [address, size, size, number, address]
    libc.munmap.argtypes = [address, size]
    libc.mprotect.argtypes = libc.madvise.argtypes = [address, size, number]
    return libc
