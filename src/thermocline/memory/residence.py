"""Weights in memory before they are needed: the first touch, in the file's order, and locks."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from thermocline.errors import HardwareError, ModelFormatError
from thermocline.files.weight import Bytes, Weight
from thermocline.hardware.mapping import mapping_below, mappings_below
from thermocline.hardware.memory import find_memory
from thermocline.memory.huge_pages import HUGE_PAGE, PIECE, Progress, advise, whole_pages

POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux 5.14, which Python does not name: map the pages, and read them where they are not."""
GIB = 1 << 30


def touch(path: Path, weights: Iterable[Weight], progress: Progress | None = None) -> None:
    """Read the mapped weights in the order they have in their files, unless memory cannot hold them all.

    One call for many pages reads a file many times faster than the page faults of the first token, and lets the
    system map it in huge pages where the file system has them.

    Raises:
        ModelFormatError: the file cannot be read; without this, the process would die when it meets the bytes.
    """
    views = [
        data for weight in weights if mapping_below(data := weight.data) is not None
    ]  # others may be gathered anew
    ranges = [
        (mapping, *_extent(mapping, [view for view in views if mapping_below(view) is mapping]))
        for mapping in mappings_below(views)
    ]
    total, done = sum(stop - start for _, start, stop in ranges), 0
    if total > find_memory().available:
        return
    for mapping, start, stop in ranges:
        _advise_huge_pages(mapping)
        for at in range(start, stop, PIECE):
            size = min(PIECE, stop - at)
            _populate(path, mapping, at, size)
            done += size
            if progress is not None:
                progress(done, total)


def settle(path: Path, arrays: Iterable[Bytes]) -> None:
    """Have these bytes in memory, and let the system forget what else of the file it read with them.

    Under a budget that is what the file takes of the page cache: pages that are mapped stay.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for array in arrays:
        start = array.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
        size = array.ctypes.data + array.nbytes - start
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), POPULATE_READ)  # where it fails, pages come later
    if path.is_file():
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def release(arrays: Iterable[Bytes]) -> None:
    """Take what these bytes have of mapped files out of the process's memory; the system's cache keeps it."""
    for array in arrays:
        if mapping_below(array) is not None:
            advise(*whole_pages(array, mmap.PAGESIZE), mmap.MADV_DONTNEED)


def lock(arrays: Iterable[Bytes]) -> None:
    """Forbid the system to drop or swap these bytes; it ends with their memory.

    Raises:
        HardwareError: the system does not allow it; the message has the limit.
    """
    held = list(arrays)
    libc = ctypes.CDLL(None, use_errno=True)
    for array in held:
        if libc.mlock(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)) != 0:
            size = sum(a.nbytes for a in held) / GIB
            limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            allowed = "no limit is set" if limit == resource.RLIM_INFINITY else f"the limit is {limit / GIB:.3f} GiB"
            raise HardwareError(
                f"{size:.2f} GiB of weights cannot be locked in memory: {os.strerror(ctypes.get_errno())} ({allowed}); "
                "raise it with `ulimit -l`, or leave out --mlock"
            )


def _extent(mapping: mmap.mmap, views: list[Bytes]) -> tuple[int, int]:
    """From the first byte of the views to their last, in whole huge pages as far as the mapping goes."""
    origin = np.frombuffer(mapping, np.uint8).ctypes.data
    first = min(view.ctypes.data for view in views) - origin
    last = max(view.ctypes.data + view.nbytes for view in views) - origin
    return first // HUGE_PAGE * HUGE_PAGE, min(-(-last // HUGE_PAGE) * HUGE_PAGE, len(mapping))


def _advise_huge_pages(mapping: mmap.mmap) -> None:
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return


def _populate(path: Path, mapping: mmap.mmap, start: int, size: int) -> None:
    try:
        mapping.madvise(POPULATE_READ, start, size)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise ModelFormatError(path, "data", f"cannot be read: {error.strerror}", offset=start) from error
        np.frombuffer(mapping, np.uint8, size, start)[:: mmap.PAGESIZE].max()  # a kernel before 5.14
