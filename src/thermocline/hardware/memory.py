"""Memory and caches of this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from thermocline.hardware.control_group import limits_of

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. `limit` is the control group's (None: no limit); `huge_pages` the kernel's mode of transparent ones."""

    total: int
    available: int
    limit: int | None
    page: int
    huge_pages: str

    @property
    def usable(self) -> int:
        """What may be used in all."""
        return self.total if self.limit is None else min(self.total, self.limit)


@dataclass(frozen=True, slots=True)
class Cache:
    """One cache of the first processor: `name` such as L2, bytes, and how many processors share it."""

    name: str
    size: int
    shared_by: int


def find_memory(huge_pages: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled")) -> Memory:
    """The machine's memory as it is now."""
    now = psutil.virtual_memory()
    try:
        # The file lists all modes, the chosen one in brackets: "always [madvise] never".
        mode = huge_pages.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        mode = ""
    return Memory(now.total, now.available, limits_of().memory, os.sysconf("SC_PAGE_SIZE"), mode or "unknown")


def own_memory(maps: Path = Path("/proc/self/smaps")) -> int:
    """Bytes of this process in memory that are in no model's file: its heap, its libraries; 0 where nobody tells."""
    total, counts = 0, True
    try:
        lines = maps.read_text(errors="replace").splitlines()
    except OSError:
        return 0
    for line in lines:
        name, _, value = line.partition(" ")
        if not name.endswith(":"):  # a mapping begins: addresses, access, offset, device, inode, and the file's path
            words = line.split(None, 5)
            counts = len(words) < 6 or words[5].startswith("[") or ".so" in words[5] or "python" in words[5]
        elif name == "Rss:" and counts:
            total += int(value.split()[0]) << 10
    return total


def find_caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> tuple[Cache, ...]:
    """Data and unified caches, smallest level first; none where the system does not tell."""
    found = []
    for index in sorted(folder.glob("index*")):
        try:
            level, kind, size, shared = (
                (index / name).read_text().strip() for name in ("level", "type", "size", "shared_cpu_list")
            )
        except OSError:
            continue
        if kind != "Instruction":
            found.append(Cache(f"L{level}", _bytes(size), _count(shared)))
    return tuple(found)


def _bytes(size: str) -> int:
    return int(size[:-1]) * UNITS[size[-1]] if size[-1:] in UNITS else int(size)


def _count(cpus: str) -> int:
    """Processors in a list such as 0-3,8."""
    ends = (part.partition("-") for part in cpus.split(","))
    return sum(int(last or first) - int(first) + 1 for first, _, last in ends)
