"""What placement needs of a machine: its memories, what computes beside each, and what lies between them."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from dataclasses import dataclass, field, fields
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from thermocline.errors import HardwareError


class Tier(StrEnum):
    """A memory with a budget and a bandwidth, fastest first."""

    VRAM = "vram"
    RAM = "ram"
    DISK = "disk"


ATTENTION_KERNELS = 7
"""Two norms, projections, rotation, cache and attention, output projection, residual."""
FFN_KERNELS = 3
"""Gate and up, activation, down; on each side that works."""
PREDICTOR_KERNELS = 3
"""Two products and the selection of the active set."""
HEAD_KERNELS = 2
"""Norm and product."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """Seconds that parts of a step take beside what they read and compute: of a layer's attention, with all that is
    between the layer's parts, of its predictor, of its FFN on a side that works, and of embedding and output head.

    Raises:
        HardwareError: a figure is not a number of seconds.
    """

    attention: float
    predictor: float
    ffn: float
    head: float

    def __post_init__(self) -> None:
        for f in fields(self):
            _seconds("calls", f.name, getattr(self, f.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """A memory and what computes beside it.

    `capacity` in bytes. `bandwidth` in bytes/s that kernels reach while the other side is idle,
    `bandwidth_busy` while that reads its own memory. `flops` in floating-point operations/s of matrix products over
    many tokens. `launch` in seconds to start one kernel. `sparse` is the share of the bandwidth that kernels reach over
    rows that lie apart, as those of the few neurons that fire; `sparse_batch` is that share where a row meets several
    tokens, None for the same. `unpacking` is how many numbers of packed weights a second are made ready to be
    multiplied, None where memory is always slower. `calls` are what parts of a step take beside that, None where
    they are launches of kernels.

    Raises:
        HardwareError: a figure is not a positive number, the busy bandwidth exceeds the idle one, or a share exceeds 1.
    """

    name: str
    capacity: int
    bandwidth: float
    bandwidth_busy: float
    flops: float
    launch: float
    sparse: float = 1.0
    sparse_batch: float | None = None
    unpacking: float | None = None
    calls: Calls | None = None

    def __post_init__(self) -> None:
        for name in ("capacity", "bandwidth", "bandwidth_busy", "flops"):
            _positive(self.name, name, getattr(self, name))
        if self.unpacking is not None:
            _positive(self.name, "unpacking", self.unpacking)
        for name, share in (("sparse", self.sparse), ("sparse_batch", self.apart(2))):
            _positive(self.name, name, share)
            if share > 1:
                raise HardwareError(f"{self.name}: {name} is {share}; wanted is a share, from 0 to 1")
        _seconds(self.name, "launch", self.launch)
        if self.bandwidth_busy > self.bandwidth:
            raise HardwareError(
                f"{self.name}: {self.bandwidth_busy:.3g} bytes/s beside a busy neighbour are more than "
                f"{self.bandwidth:.3g} alone; measure again"
            )

    @property
    def started(self) -> Calls:
        """What parts take to be called: as it was measured, or their kernels' launches."""
        return self.calls or Calls(
            attention=ATTENTION_KERNELS * self.launch,
            predictor=PREDICTOR_KERNELS * self.launch,
            ffn=FFN_KERNELS * self.launch,
            head=HEAD_KERNELS * self.launch,
        )

    def seconds(self, nbytes: float, numbers: float, flops: float) -> float:
        """To read `nbytes`, which are so many `numbers`, and compute so much with them: the longest of the three."""
        unpacked = 0.0 if self.unpacking is None else numbers / self.unpacking
        return max(nbytes / self.bandwidth, unpacked, flops / self.flops)

    def apart(self, tokens: int) -> float:
        """Share of the bandwidth that a step of `tokens` tokens reaches over rows that lie apart."""
        return self.sparse if tokens == 1 or self.sparse_batch is None else self.sparse_batch


@dataclass(frozen=True, slots=True)
class ReadCurve:
    """Bandwidth against the size of one read: pairs (bytes, bytes/s) with several reads in flight, by rising size.

    Raises:
        HardwareError: no pair, a figure is not positive, or the sizes do not rise.
    """

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        if not self.points:
            raise HardwareError("a read curve needs at least one pair of size and bandwidth")
        for size, rate in self.points:
            _positive("read curve", "size", size)
            _positive("read curve", "bandwidth", rate)
        sizes = [size for size, _ in self.points]
        if sorted(set(sizes)) != sizes:
            raise HardwareError(f"the sizes of a read curve must rise: {sizes}")

    def bandwidth(self, size: float) -> float:
        """Bytes/s of reads of `size` bytes: a straight line between the logarithms, flat beyond the last point.

        Below the first point a read takes as long as that point's: devices answer whole pages.
        """
        first, last = self.points[0], self.points[-1]
        if size <= first[0]:
            return first[1] * size / first[0]
        if size >= last[0]:
            return last[1]
        right = bisect_right(self.points, size, key=lambda point: point[0])
        (a, low), (b, high) = self.points[right - 1], self.points[right]
        share = math.log(size / a) / math.log(b / a)
        return low * math.exp(share * math.log(high / low))

    @property
    def gap(self) -> int:
        """Bytes that are read on in the time that another read takes to begin."""
        (size, rate), fastest = self.points[0], max(rate for _, rate in self.points)
        return int(max(0.0, size / rate - size / fastest) * fastest)

    def scattered(self, wanted: npt.NDArray[np.float64], of: int, size: int) -> npt.NDArray[np.float64]:
        """Seconds to read `wanted` (n, expected numbers) of `of` neighbouring pieces of `size` bytes, which are any.

        Pieces with no more than `gap` between them share a read: how many unwanted ones lie before the next wanted one
        is geometric, and those that are read over are counted.
        """
        if not size:
            return np.zeros(len(wanted))
        share = np.minimum(wanted / of, 1 - 1e-12)[:, None]
        over = np.arange(min(of, 1 + self.gap // size))
        near = share * (1 - share) ** over
        before_another = np.maximum(wanted - 1, 0.0)
        reads = np.maximum(1.0, wanted - before_another * near.sum(axis=1))
        nbytes = (wanted + before_another * (near * over).sum(axis=1)) * size
        rates = [self.bandwidth(mean) if mean else 1.0 for mean in (nbytes / reads).tolist()]
        return np.asarray(nbytes / rates)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk that holds the model's file, and what its uncached reads reach."""

    name: str
    curve: ReadCurve


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """What is left of a bandwidth while something else moves bytes as fast as it goes, from 0 to 1: `ram_beside_link`
    is RAM's while the link is full. 1 where nothing was measured.

    Raises:
        HardwareError: not above 0, or more than 1.
    """

    ram_beside_link: float = 1.0
    link_beside_ram: float = 1.0
    vram_beside_link: float = 1.0
    link_beside_vram: float = 1.0
    ram_beside_disk: float = 1.0
    disk_beside_ram: float = 1.0

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            _positive("shares", f.name, value)
            if value > 1:
                raise HardwareError(f"shares: {f.name} is {value}; wanted is a share, from 0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrections:
    """How many times longer parts of a decode step took than the machine's figures say; 1 where nothing was measured.

    `hot` and `cold` are the FFN's two sides, `rest` is embedding and output head. `attention_disk` is of layers whose
    attention is read from disk for every pass. `between` is seconds of a step that none of the parts takes: what calls
    them, and makes a token of the logits; None stands for the machine's own figure.
    """

    attention_vram: float = 1.0
    attention_ram: float = 1.0
    attention_disk: float = 1.0
    predictor: float = 1.0
    hot: float = 1.0
    cold: float = 1.0
    crossing: float = 1.0
    rest: float = 1.0
    between: float | None = None

    def attention(self, home: Tier) -> float:
        """Of attention whose weights are on `home`."""
        return {Tier.VRAM: self.attention_vram, Tier.RAM: self.attention_ram, Tier.DISK: self.attention_disk}[home]

    def times(self, other: Corrections) -> Corrections:
        """What was measured against figures that were corrected already, `other`, against the figures themselves."""
        names = [f.name for f in fields(self) if f.name != "between"]
        return Corrections(**{n: getattr(self, n) * getattr(other, n) for n in names}, between=self.between)


UNCORRECTED = Corrections()


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One computer. `gpu` may be an emulated device; None means that everything runs on the CPU.

    `link` is bytes/s from RAM to VRAM through pinned memory; `crossing` is the seconds that handing a small
    vector to the other side costs, waiting included; `meeting` what it takes besides where the other side is woken to
    work on a layer and waited for, and `between` the seconds of a step outside of the network. `shares` are what is
    left of bandwidths beside others. `source` says where the figures come from, `corrections` how far off a run found
    what they predict.

    Raises:
        HardwareError: a figure is not a usable number.
    """

    name: str
    cpu: Processor
    gpu: Processor | None = None
    disk: Disk | None = None
    link: float = 1.0
    crossing: float = 0.0
    meeting: float = 0.0
    between: float = 0.0
    source: str = "measured"
    shares: Shares = field(default_factory=Shares)
    corrections: Corrections = UNCORRECTED

    def __post_init__(self) -> None:
        _positive(self.name, "link", self.link)
        for name in ("crossing", "meeting", "between"):
            _seconds(self.name, name, getattr(self, name))

    @property
    def between_parts(self) -> float:
        """Seconds of a step that none of its parts takes: as a run has measured them, if one did."""
        measured = self.corrections.between
        return self.between if measured is None else measured

    def processor(self, tier: Tier) -> Processor:
        """What computes beside a tier; neurons on disk are computed by the CPU.

        Raises:
            HardwareError: there is no GPU.
        """
        if tier is not Tier.VRAM:
            return self.cpu
        if self.gpu is None:
            raise HardwareError(f"{self.name} has no GPU; plan with RAM and disk, or use --device emulated")
        return self.gpu

    @property
    def fingerprint(self) -> str:
        """Names and capacities as a hash: the same computer keeps it, however noisy its bandwidths are."""
        gpu = (self.gpu.name, self.gpu.capacity) if self.gpu else None
        identity = repr((self.cpu.name, self.cpu.capacity, gpu, self.disk.name if self.disk else None))
        return hashlib.sha256(identity.encode()).hexdigest()


def _positive(owner: str, name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise HardwareError(f"{owner}: {name} is {value}; wanted is a positive number")


def _seconds(owner: str, name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise HardwareError(f"{owner}: {name} is {value}; wanted is a number of seconds, 0 or more")
