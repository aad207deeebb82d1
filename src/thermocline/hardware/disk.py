"""The disk that a file lies on, and how fast it is read: by size of a read and by how many are in flight."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from thermocline.errors import HardwareError, printable
from thermocline.hardware.machine import Disk, ReadCurve
from thermocline.hardware.reader import Reader

SIZES = (4 << 10, 12 << 10, 64 << 10, 256 << 10, 1 << 20)
DEPTHS = (1, 4, 16)
SEQUENTIAL = 1 << 20
"""Bytes of one read when the file is read from end to end."""
SECONDS = 0.05
"""How long each pair of size and depth is read, each time."""
ROUNDS = 2
"""Times that the pairs are gone through; the best of each counts, as others use a disk too."""
SCRATCH = 128 << 20
"""Bytes of the file that is written to be read where none is named."""
SMALLEST = 32 << 20
"""A file below this says nothing about its disk."""
ALIGN = 4096

Beside = Callable[[Reader], tuple[float, float]]
"""Bytes/s of a disk while memory is read, and of memory meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskInfo:
    """Where a path lies. `device` is the system's number of it, such as 259:1; `rotational` is None if unknown."""

    device: str
    name: str
    filesystem: str
    rotational: bool | None
    free: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpeed:
    """Bytes/s of uncached reads. `random` holds (bytes of a read, reads in flight, bytes/s).

    `beside_ram` is the rate of random reads of 64 KiB while all threads read memory, `ram_beside` what these threads
    read of memory meanwhile; both are 0 if that was not measured. `direct` is false where the file system allows no
    direct reads: they then go through the page cache, and may be served from it.
    """

    device: str
    name: str
    filesystem: str
    direct: bool
    sequential: float
    random: tuple[tuple[int, int, float], ...]
    beside_ram: float
    ram_beside: float

    @property
    def disk(self) -> Disk:
        """What placement needs: of every size the rate at the best depth."""
        sizes = sorted({size for size, _, _ in self.random})
        points = tuple((size, max(rate for s, _, rate in self.random if s == size)) for size in sizes)
        return Disk(name=f"{self.name} ({self.filesystem})", curve=ReadCurve(points))


def find_disk(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> DiskInfo:
    """The disk of the nearest part of `path` that exists.

    Raises:
        HardwareError: nothing of it can be looked at.
    """
    place = next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))
    try:
        number, room = place.stat().st_dev, os.statvfs(place)
    except OSError as error:
        raise HardwareError(f"{printable(str(path))}: cannot be looked at: {error.strerror}") from error
    device = f"{os.major(number)}:{os.minor(number)}"
    filesystem, source = _mount(mounts, device)
    return DiskInfo(
        device=device,
        name=source,
        filesystem=filesystem,
        rotational=_rotational(device),
        free=room.f_bavail * room.f_frsize,
    )


def measure_disk(path: Path, *, seconds: float = SECONDS, beside: Beside | None = None) -> DiskSpeed:
    """Read `path`, a file; or, in a folder, a file that is written there and removed again.

    A file that was just written may lie in caches that the system does not know of, a disk's own or those of the
    machine that a virtual one runs on: name a model's file to know how fast that is read. `beside` measures disk and
    memory at once.

    Raises:
        HardwareError: it cannot be read or written, is too small, or there is no room.
    """
    info = find_disk(path)
    if path.is_dir():
        with _scratch(path, info) as file:
            return _measured(file, info, seconds, beside)
    if path.is_file() and path.stat().st_size < SMALLEST:
        raise HardwareError(
            f"{printable(str(path))}: {path.stat().st_size:,} bytes tell nothing about its disk; name a folder, or a "
            f"file of {SMALLEST >> 20} MiB or more"
        )
    return _measured(path, info, seconds, beside)


def random_rate(reader: Reader, size: int, seconds: float) -> float:
    """Bytes/s of random reads of `size` bytes, as many in flight as the reader has threads."""
    rng = np.random.default_rng(size * 1009 + reader.depth)
    out, nothing = np.empty(size, np.uint8), np.empty((0, 3), np.int64)
    batch, places = 4 * reader.depth, (reader.size - size) // ALIGN + 1

    def submit() -> int:
        offsets = rng.integers(0, places, batch) * ALIGN
        return reader.submit(np.stack([offsets, np.full(batch, size), np.zeros(batch, np.int64)], axis=1), nothing, out)

    # Two batches in flight: the threads never run dry between them.
    reads, began, ticket = 0, time.perf_counter(), submit()
    while True:
        following = submit()
        reader.wait(ticket)
        reads, ticket = reads + batch, following
        spent = time.perf_counter() - began
        if spent >= seconds:
            reader.wait(ticket)
            return reads * size / spent


def _measured(file: Path, info: DiskInfo, seconds: float, beside: Beside | None) -> DiskSpeed:
    best, deepest = dict.fromkeys(((size, depth) for size in SIZES for depth in DEPTHS), 0.0), max(DEPTHS)
    for depth in DEPTHS * ROUNDS:
        with Reader(file, depth=depth, largest=max(SIZES)) as reader:
            for size in SIZES:
                best[size, depth] = max(best[size, depth], random_rate(reader, size, seconds))
    with Reader(file, depth=deepest, largest=SEQUENTIAL) as reader:
        sequential = _sequential(reader, 3 * seconds)
        busy, ram = (0.0, 0.0) if beside is None else beside(reader)
        return DiskSpeed(
            device=info.device,
            name=info.name,
            filesystem=info.filesystem,
            direct=reader.direct,
            sequential=sequential,
            random=tuple((size, depth, rate) for (size, depth), rate in best.items()),
            beside_ram=busy,
            ram_beside=ram,
        )


def _sequential(reader: Reader, seconds: float) -> float:
    count = min(reader.size // SEQUENTIAL, 512)
    out = np.empty(SEQUENTIAL, np.uint8)
    offsets = np.arange(count, dtype=np.int64) * SEQUENTIAL
    requests = np.stack([offsets, np.full(count, SEQUENTIAL), np.zeros(count, np.int64)], axis=1)
    nothing = np.empty((0, 3), np.int64)
    began, done = time.perf_counter(), 0
    while True:
        for start in range(0, count, 32):
            part = np.ascontiguousarray(requests[start : start + 32])
            reader.wait(reader.submit(part, nothing, out))
            done += len(part) * SEQUENTIAL
            spent = time.perf_counter() - began
            if spent >= seconds:
                return done / spent


@contextmanager
def _scratch(folder: Path, info: DiskInfo) -> Iterator[Path]:
    if info.free < 4 * SCRATCH:
        raise HardwareError(
            f"{printable(str(folder))}: {info.free:,} bytes are free, and measuring takes a file of {SCRATCH:,}"
        )
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".thermocline-disk-") as file:
            # Random bytes: some disks compress, and answer for zeros without reading.
            piece = np.random.default_rng().bytes(SCRATCH >> 3)
            for i in range(8):
                file.write(piece[i:] + piece[:i])
            file.flush()
            os.fsync(file.fileno())
            yield Path(file.name)
    except OSError as error:
        raise HardwareError(f"{printable(str(folder))}: cannot be written: {error.strerror}") from error


def _mount(mounts: Path, device: str) -> tuple[str, str]:
    """File system and source of a device number, from lines such as `36 35 98:0 / /mnt rw - ext4 /dev/sda1 rw`."""
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        before, _, after = line.partition(" - ")
        words, kind = before.split(), after.split()
        if len(words) > 2 and words[2] == device and len(kind) > 1:
            return kind[0], kind[1]
    return "unknown", device


def _rotational(device: str) -> bool | None:
    for folder in (Path("/sys/dev/block") / device, Path("/sys/dev/block") / device / ".."):
        try:
            return (folder / "queue" / "rotational").read_text().strip() == "1"
        except OSError:
            continue
    return None
