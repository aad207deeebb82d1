"""Public figures of common GPUs, CPUs, memories and disks, to plan for a machine that one does not have.

Peak figures are the makers': NVIDIA's architecture whitepapers (Turing TU102, Ampere GA102, Ada AD102, Blackwell
GB202) and data sheets (T4, A100, H100, H200), AMD's product page of the RX 7900 XTX, JEDEC's transfer rates times
two channels of 8 bytes, PCI-SIG's rates of 16 lanes, Samsung's data sheets of the 860 EVO, 970 EVO Plus and 980 PRO.
`pc-high` and `pc-low` are the computers of PowerInfer's paper (arXiv 2312.12456, section 8.1).

What software reaches of a peak is stated once for all machines, in `REACHED`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from thermocline.errors import UsageError, printable
from thermocline.hardware.machine import Disk, Machine, Processor, ReadCurve, Shares

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Reached:
    """Shares of a peak that good kernels reach, and the seconds of a launch and of a crossing."""

    vram: float = 0.80
    """Of VRAM's bandwidth by matrix-vector kernels; whole decode steps of llama.cpp reach about 0.56 to 0.8."""
    ram: float = 0.80
    """Of RAM's; pinned threads with repacked weights have been seen to reach 0.88."""
    ram_busy: float = 0.95
    """Of the CPU's own rate while the GPU works: transfers and polling take a little."""
    sparse_vram: float = 0.85
    """Of the kernels' own rate, over rows that lie apart: of 2 KiB or more, but few are on their way at once."""
    sparse_ram: float = 0.75
    """The same for RAM: of two threads of an EPYC the rows of a tenth of the neurons took 0.74 in F16, 0.67 in Q8_0."""
    sparse_batch_ram: float = 0.9
    """And for a few tokens: of two threads of a Xeon 0.83 to 0.97 in F16, which arithmetic keeps busy meanwhile."""
    gemm_gpu: float = 0.5
    """Of the tensor cores' rate, by products of a few hundred rows over packed weights."""
    gemm_cpu: float = 0.6
    """Of the vector units' rate."""
    link: float = 0.8
    """Of PCIe, through pinned memory."""
    disk: float = 0.8
    """Of a disk's data sheet, by direct reads with several in flight."""
    launch_gpu: float = 3e-6
    """A kernel inside a captured graph."""
    launch_cpu: float = 3e-6
    """A call to a pool of threads that spin."""
    crossing: float = 30e-6
    """Handing a vector over, waiting included; 30 to 50 µs were published for host callbacks in graphs."""


REACHED = Reached()


@dataclass(frozen=True, slots=True)
class Gpu:
    """GiB of VRAM, its GB/s, dense FP16 TFLOP/s with FP32 sums, and the link's generation and lanes."""

    name: str
    vram: int
    bandwidth: float
    tflops: float
    pcie: int
    lanes: int = 16


@dataclass(frozen=True, slots=True)
class Cpu:
    """Cores that compute, their GHz under vector load, FP32 operations a cycle and core, its usual memory."""

    name: str
    cores: int
    ghz: float
    memory: str
    per_cycle: int = 32


GPUS = {
    "rtx-5090": Gpu("NVIDIA GeForce RTX 5090", 32, 1792.0, 209.5, 5),
    "rtx-4090": Gpu("NVIDIA GeForce RTX 4090", 24, 1008.0, 165.2, 4),
    "rtx-4080": Gpu("NVIDIA GeForce RTX 4080", 16, 716.8, 97.5, 4),
    "rtx-4070": Gpu("NVIDIA GeForce RTX 4070", 12, 504.2, 58.3, 4),
    "rtx-4060-ti": Gpu("NVIDIA GeForce RTX 4060 Ti", 8, 288.0, 44.1, 4, 8),
    "rtx-4060": Gpu("NVIDIA GeForce RTX 4060", 8, 272.0, 30.2, 4, 8),
    "rtx-3090": Gpu("NVIDIA GeForce RTX 3090", 24, 936.2, 71.0, 4),
    "rtx-3080": Gpu("NVIDIA GeForce RTX 3080", 10, 760.3, 59.5, 4),
    "rtx-3060": Gpu("NVIDIA GeForce RTX 3060", 12, 360.0, 25.5, 4),
    "rtx-2080-ti": Gpu("NVIDIA GeForce RTX 2080 Ti", 11, 616.0, 53.8, 3),
    "rx-7900-xtx": Gpu("AMD Radeon RX 7900 XTX", 24, 960.0, 122.8, 4),
    "t4": Gpu("NVIDIA T4", 16, 320.0, 65.0, 3),
    "a100": Gpu("NVIDIA A100 80GB", 80, 2039.0, 312.0, 4),
    "h100": Gpu("NVIDIA H100 SXM", 80, 3350.0, 989.0, 5),
    "h200": Gpu("NVIDIA H200 SXM", 141, 4800.0, 989.0, 5),
}

CPUS = {
    "i9-13900k": Cpu("Intel Core i9-13900K, 8 P-cores", 8, 5.0, "ddr5-5600"),
    "i7-12700k": Cpu("Intel Core i7-12700K, 8 P-cores", 8, 4.7, "ddr4-3200"),
    "i5-12400": Cpu("Intel Core i5-12400", 6, 4.0, "ddr4-3200"),
    "ryzen-9-9950x": Cpu("AMD Ryzen 9 9950X", 16, 5.0, "ddr5-5600", 64),
    "ryzen-9-7950x": Cpu("AMD Ryzen 9 7950X", 16, 4.8, "ddr5-5200"),
    "ryzen-7-5800x": Cpu("AMD Ryzen 7 5800X", 8, 4.5, "ddr4-3200"),
    "ryzen-5-3600": Cpu("AMD Ryzen 5 3600", 6, 4.0, "ddr4-3200"),
}

MEMORIES = {
    f"ddr{generation}-{rate}": rate * 16 / 1000
    for generation, rate in (
        (4, 2133), (4, 2400), (4, 2666), (4, 3200), (4, 3600),
        (5, 4200), (5, 4800), (5, 5200), (5, 5600), (5, 6000), (5, 6400),
    )
}  # fmt: skip
"""GB/s of two channels: million transfers/s times 16 bytes."""

PCIE_LANE = {3: 0.985, 4: 1.969, 5: 3.938}
"""GB/s of one lane and direction by generation."""

DISKS = {
    "sata": ("SATA SSD (860 EVO)", 98_000, 0.55),
    "nvme-gen3": ("NVMe SSD, PCIe 3 (970 EVO Plus)", 600_000, 3.5),
    "nvme-gen4": ("NVMe SSD, PCIe 4 (980 PRO)", 1_000_000, 7.0),
}
"""Name, random reads of 4 KiB a second with deep queues, GB/s of sequential reads."""
RANDOM_READ, SEQUENTIAL_READ = 4 << 10, 128 << 10
"""Bytes of one read in these two figures."""

COMPUTERS = {
    "pc-high": "rtx-4090+i9-13900k+ddr5-4200+192gib+nvme-gen4",
    "pc-low": "rtx-2080-ti+i7-12700k+ddr4-2400+64gib+nvme-gen3",
}
"""PowerInfer's PC-High (67.2 GB/s of RAM) and PC-Low (38.4 GB/s)."""

DEFAULT_RAM = 64 * GIB


def machine(name: str) -> Machine:
    """A machine from the catalogue: `pc-high`, or parts joined by `+`, such as `rtx-4090+i9-13900k+ddr5-6000+32gib`.

    Parts are a CPU and at most one GPU, memory, size of memory in GiB (64 if none is named) and disk, in any order.

    Raises:
        UsageError: a part is unknown, named twice, or the CPU is missing; the message lists what there is.
    """
    wanted = name.strip().lower()
    parts: dict[str, str] = {}
    for part in COMPUTERS.get(wanted, wanted).split("+"):
        kind = _kind(part.strip(), name)
        if kind in parts:
            raise UsageError(f"machine {printable(name)} names two parts of the kind {kind}: {parts[kind]} and {part}")
        parts[kind] = part.strip()
    if "cpu" not in parts:
        raise UsageError(f"machine {printable(name)} names no CPU; there are {', '.join(CPUS)}")
    cpu = CPUS[parts["cpu"]]
    gpu = GPUS[parts["gpu"]] if "gpu" in parts else None
    memory = parts.get("memory", cpu.memory)
    capacity = int(parts["size"].removesuffix("gib")) * GIB if "size" in parts else DEFAULT_RAM
    ram = _cpu(cpu, memory, capacity)
    card = None if gpu is None else _gpu(gpu)
    disk = _disk(*DISKS[parts["disk"]]) if "disk" in parts else None
    link = PCIE_LANE[gpu.pcie] * gpu.lanes * 1e9 * REACHED.link if gpu else 1.0
    return Machine(
        name=wanted,
        cpu=ram,
        gpu=card,
        disk=disk,
        link=link,
        crossing=REACHED.crossing if gpu else 0.0,
        shares=_shares(ram, card, disk, link),
        source="public figures of the catalogue",
    )


def machine_names() -> dict[str, tuple[str, ...]]:
    """What `machine` knows, by kind."""
    kinds: dict[str, tuple[str, ...]] = {"computers": tuple(COMPUTERS), "GPUs": tuple(GPUS), "CPUs": tuple(CPUS)}
    return kinds | {
        "memories": tuple(MEMORIES),
        "sizes": ("16gib", "32gib", "64gib", "any other"),
        "disks": tuple(DISKS),
    }


def _kind(part: str, name: str) -> str:
    if re.fullmatch(r"[1-9]\d{0,3}gib", part):
        return "size"
    kinds: tuple[tuple[str, dict[str, object]], ...] = (
        ("gpu", dict(GPUS)), ("cpu", dict(CPUS)), ("memory", dict(MEMORIES)), ("disk", dict(DISKS)),
    )  # fmt: skip
    for kind, table in kinds:
        if part in table:
            return kind
    known = [*COMPUTERS, *GPUS, *CPUS, *MEMORIES, *DISKS]
    near = get_close_matches(part, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}, and sizes such as 32gib"
    raise UsageError(f"machine {printable(name)}: {printable(part)} is not in the catalogue; {hint}")


def _cpu(cpu: Cpu, memory: str, capacity: int) -> Processor:
    rate = MEMORIES[memory] * 1e9 * REACHED.ram
    return Processor(
        name=f"{cpu.name}, {memory} x2",
        capacity=capacity,
        bandwidth=rate,
        bandwidth_busy=rate * REACHED.ram_busy,
        flops=cpu.cores * cpu.ghz * 1e9 * cpu.per_cycle * REACHED.gemm_cpu,
        launch=REACHED.launch_cpu,
        sparse=REACHED.sparse_ram,
        sparse_batch=REACHED.sparse_batch_ram,
    )


def _gpu(gpu: Gpu) -> Processor:
    rate = gpu.bandwidth * 1e9 * REACHED.vram
    return Processor(
        name=gpu.name,
        capacity=gpu.vram * GIB,
        bandwidth=rate,
        bandwidth_busy=rate,
        flops=gpu.tflops * 1e12 * REACHED.gemm_gpu,
        launch=REACHED.launch_gpu,
        sparse=REACHED.sparse_vram,
    )


def _shares(cpu: Processor, gpu: Processor | None, disk: Disk | None, link: float) -> Shares:
    """What draws on one memory at once is taken to get as much of it as it asks for in proportion."""

    def beside(other: float, memory: float) -> float:
        return memory / (memory + other)

    ram_link, vram_link, ram_disk = 1.0, 1.0, 1.0
    if gpu is not None:
        ram_link, vram_link = beside(link, cpu.bandwidth), beside(link, gpu.bandwidth)
    if disk is not None:
        ram_disk = beside(disk.curve.points[-1][1], cpu.bandwidth)
    return Shares(
        ram_beside_link=ram_link,
        link_beside_ram=ram_link,
        vram_beside_link=vram_link,
        link_beside_vram=vram_link,
        ram_beside_disk=ram_disk,
        disk_beside_ram=ram_disk,
    )


def _disk(name: str, operations: int, sequential: float) -> Disk:
    points = ((RANDOM_READ, operations * RANDOM_READ), (SEQUENTIAL_READ, sequential * 1e9))
    return Disk(name=name, curve=ReadCurve(tuple((size, rate * REACHED.disk) for size, rate in points)))
