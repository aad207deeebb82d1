"""What this machine can do, measured once and kept: memory, disk, GPU, and what it costs to hand work over."""

from __future__ import annotations

import queue
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from thermocline import _native
from thermocline.errors import HardwareError, OutputError, UsageError, printable
from thermocline.hardware.bandwidth import Load, best_rate, memory_load, read_buffer, together
from thermocline.hardware.cache import home, recall, remember
from thermocline.hardware.disk import DiskSpeed, find_disk, measure_disk, random_rate
from thermocline.hardware.gpu import Gpu, GpuSpeed, find_gpus, measure_gpu
from thermocline.hardware.machine import Machine, Processor, Shares
from thermocline.hardware.reader import Reader
from thermocline.hardware.survey import Survey, examine

SECONDS = 0.2
"""How long memory is read for one figure."""
F16, RELU = 1, 1
"""ggml's number of the format, and the kernels' of the activation."""
GEMM_TOKENS, GEMM_SIZE = 256, 1024
BESIDE_SIZE = 64 << 10
"""Bytes of the reads that run beside memory's."""
SPARSE_ROW, SPARSE_SETS = 4096, 10
"""Elements of a row, in half precision, and how many sets of neurons share a layer's: one fires at a time."""
FEW_TOKENS = 4
"""What stands for a small batch."""
VERSION = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySpeed:
    """Bytes/s of reading RAM: (threads, bytes/s) alone, and `beside_device` with one half of the threads (at least one)
    while as many others read too, as an emulated device does. `sparse` is the share of `best` that the FFN's kernels
    reach where a tenth of the neurons fires, and `sparse_batch` what they reach so for a few tokens, of what they
    reach for as many over neighbours.
    """

    by_threads: tuple[tuple[int, float], ...]
    beside_device: float
    sparse: float
    sparse_batch: float

    @property
    def best(self) -> float:
        """With all threads."""
        return self.by_threads[-1][1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What was measured here, at Unix time `measured`.

    `flops` of products over many tokens. `launch` is the seconds to hand an op to the pool of threads and get it
    back; `handover` to wake another thread with work and hear from it, which is the crossing to an emulated device.
    `disks` go by device. `unmeasured` says in words what could not be measured.
    """

    measured: float
    memory: MemorySpeed
    flops: float
    launch: float
    handover: float
    disks: tuple[DiskSpeed, ...]
    gpus: tuple[Gpu, ...]
    gpu_speeds: tuple[GpuSpeed | None, ...]
    unmeasured: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)

    def disk_of(self, path: Path) -> DiskSpeed | None:
        """What was measured of the disk that `path` lies on."""
        device = find_disk(path).device
        return next((disk for disk in self.disks if disk.device == device), None)


def probe_machine(
    *,
    refresh: bool = False,
    disk: Path | None = None,
    any_disk: bool = True,
    tell: Callable[[str], None] | None = None,
) -> tuple[Survey, Probe]:
    """Look at this machine; what was measured on it before is taken as it is, unless `refresh`.

    `disk` is a file or folder whose disk to measure; without, it is that of the folder where measurements are kept.
    A disk that is not yet known is measured and added, unless no disk is asked for (`any_disk`). `tell` hears what is
    measured next.

    Raises:
        UsageError: `disk` does not exist.
    """
    if disk is not None and not disk.exists():
        raise UsageError(f"{printable(str(disk))} does not exist; name a file or a folder on the disk to measure")
    survey = examine()
    say = tell or (lambda _: None)
    place = home() if disk is None else disk
    kept = None if refresh else _restored(recall(survey.fingerprint))
    probe = kept
    if probe is None or probe.gpus != _without_free(find_gpus()):
        probe = _measured(survey, say)
    if any_disk and probe.disk_of(place) is None:
        probe = _with_disk(probe, survey, place, say)
    if probe != kept:
        try:
            remember(survey.fingerprint, {"version": VERSION, "probe": probe.as_dict()})
        except OutputError as error:
            say(f"these measurements cannot be kept: {error}")
    return survey, probe


def machine_of(survey: Survey, probe: Probe, disk: Path | None = None) -> Machine:
    """This machine as placement sees it; with the disk of the path `disk`, if that was measured."""
    memory, speed = probe.memory, None if disk is None else probe.disk_of(disk)
    gpu, link, crossing, busy, shares = None, 1.0, 0.0, memory.best, Shares()
    if speed is not None and speed.beside_ram and speed.ram_beside:
        shares = Shares(
            ram_beside_disk=_share(speed.ram_beside, memory.best),
            disk_beside_ram=_share(speed.beside_ram, speed.disk.curve.bandwidth(BESIDE_SIZE)),
        )
    if probe.gpus and (fast := probe.gpu_speeds[0]) is not None:
        card = probe.gpus[0]
        gpu = Processor(
            name=card.name,
            capacity=card.total,
            bandwidth=fast.vram,
            bandwidth_busy=min(fast.vram_beside_ram, fast.vram),
            flops=fast.flops,
            launch=fast.launch,
            sparse=fast.sparse,
        )
        link, crossing, busy = fast.link, fast.crossing, fast.ram_beside_vram
        shares = replace(
            shares,
            ram_beside_link=_share(fast.ram_beside_link, memory.best),
            link_beside_ram=_share(fast.link_beside_ram, fast.link),
            vram_beside_link=_share(fast.vram_beside_link, fast.vram),
            link_beside_vram=_share(fast.link_beside_vram, fast.link),
        )
    return Machine(
        name=survey.cores.model,
        cpu=Processor(
            name=f"{survey.cores.model}, {survey.cores.threads} threads",
            capacity=survey.memory.usable,
            bandwidth=memory.best,
            bandwidth_busy=min(busy, memory.best),
            flops=probe.flops,
            launch=probe.launch,
            sparse=memory.sparse,
            sparse_batch=memory.sparse_batch,
        ),
        gpu=gpu,
        disk=None if speed is None else speed.disk,
        link=link,
        crossing=crossing,
        shares=shares,
    )


def emulated(machine: Machine, probe: Probe, capacity: int) -> Machine:
    """The same machine with a device that is emulated by half of its threads, with `capacity` bytes of arena."""
    half, alone = probe.memory.beside_device, probe.memory.by_threads[0][1]
    device = Processor(
        name="emulated device",
        capacity=capacity,
        bandwidth=max(half, alone),
        bandwidth_busy=half,
        flops=machine.cpu.flops / 2,
        launch=probe.launch,
        sparse=machine.cpu.sparse,
        sparse_batch=machine.cpu.sparse_batch,
    )
    cpu = replace(machine.cpu, bandwidth_busy=min(half, machine.cpu.bandwidth))
    return replace(machine, cpu=cpu, gpu=device, link=machine.cpu.bandwidth, crossing=probe.handover)


def _share(beside: float, alone: float) -> float:
    """What is left of a bandwidth; more than all of it is noise."""
    return min(beside / alone, 1.0)


def _measured(survey: Survey, say: Callable[[str], None]) -> Probe:
    threads = survey.cores.threads
    say("measuring memory")
    buffer = read_buffer(max((cache.size for cache in survey.caches), default=0))
    counts = sorted({1, *(1 << i for i in range(1, threads.bit_length()) if 1 << i < threads), threads})
    by_threads = tuple((count, best_rate(buffer, count, SECONDS)) for count in counts)
    half = max(1, threads // 2)
    beside, _ = together(memory_load(buffer, half, SECONDS), memory_load(buffer, half, SECONDS))
    sparse = min(1.0, sparse_rate(buffer, threads) / by_threads[-1][1])
    few, line = (sparse_rate(buffer, threads, FEW_TOKENS, neighbours=side) for side in (False, True))
    say("measuring arithmetic and hand-overs")
    gpus = _without_free(find_gpus())
    if gpus:
        say("measuring the GPU")
    speeds = tuple(measure_gpu(gpu.index, memory_load(buffer, threads, SECONDS)) for gpu in gpus)
    slow = [gpu.name for gpu, speed in zip(gpus, speeds, strict=True) if speed is None]
    return Probe(
        measured=time.time(),
        memory=MemorySpeed(
            by_threads=by_threads, beside_device=beside, sparse=sparse, sparse_batch=min(1.0, few / line)
        ),
        flops=_flops(threads),
        launch=_launch(threads),
        handover=_handover(),
        disks=(),
        gpus=gpus,
        gpu_speeds=speeds,
        unmeasured=tuple(f"{name}: nothing is measured without torch and CUDA" for name in slow),
    )


def _with_disk(probe: Probe, survey: Survey, place: Path, say: Callable[[str], None]) -> Probe:
    """The probe with one more disk, or with the reason why it could not be measured."""
    threads = survey.cores.threads

    def beside(reader: Reader) -> tuple[float, float]:
        disk = Load(
            rate=lambda: random_rate(reader, BESIDE_SIZE, SECONDS), once=lambda: random_rate(reader, BESIDE_SIZE, 0.02)
        )
        return together(disk, memory_load(read_buffer(0), threads, SECONDS))

    say(f"measuring the disk of {place}")
    try:
        if place == home():
            place.mkdir(parents=True, exist_ok=True)
        speed = measure_disk(place, beside=beside)
    except (HardwareError, OSError) as error:
        return replace(probe, unmeasured=tuple(dict.fromkeys((*probe.unmeasured, f"disk: {error}"))))
    return replace(probe, disks=(*probe.disks, speed))


def sparse_rate(
    buffer: np.ndarray[Any, np.dtype[np.uint8]], threads: int, tokens: int = 1, *, neighbours: bool = False
) -> float:
    """Bytes/s of the FFN's kernels over the rows of a tenth of the neurons, at best; each call takes another set.

    They lie apart, unless it is to be of `neighbours`.
    """
    neurons = len(buffer) // (6 * SPARSE_ROW)
    rows = buffer[: 6 * SPARSE_ROW * neurons].reshape(3, neurons, 2 * SPARSE_ROW)
    gate, up, down = (_native.Matrix(part, F16, neurons, SPARSE_ROW) for part in rows)
    context, order = _native.Context(threads, "auto"), np.arange(neurons, dtype=np.int32)
    if not neighbours:
        np.random.default_rng(0).shuffle(order)
    sets = [np.sort(part) for part in np.array_split(order, min(SPARSE_SETS, neurons))]
    x, out = np.ones((tokens, SPARSE_ROW), np.float32), np.zeros((tokens, SPARSE_ROW), np.float32)
    best, end, turn = 0.0, time.perf_counter() + SECONDS, 0
    while not best or time.perf_counter() < end:
        active = sets[turn % len(sets)]
        began = time.perf_counter()
        context.ffn(x, gate, up, down, True, RELU, False, 0.0, None, None, active, out, True, None)
        best = max(best, 6 * SPARSE_ROW * len(active) / (time.perf_counter() - began))
        turn += 1
    return best


def _flops(threads: int) -> float:
    """Operations/s of a product of 256 tokens with a half-precision matrix."""
    context = _native.Context(threads, "auto")
    weights = np.ones((GEMM_SIZE, GEMM_SIZE), np.float16).view(np.uint8)
    matrix = _native.Matrix(weights, F16, GEMM_SIZE, GEMM_SIZE)
    x, out = np.ones((GEMM_TOKENS, GEMM_SIZE), np.float32), np.zeros((GEMM_TOKENS, GEMM_SIZE), np.float32)
    seconds = _median(lambda: context.linear(x, (matrix,), (out,), None, False), 9)
    return 2.0 * GEMM_TOKENS * GEMM_SIZE * GEMM_SIZE / seconds


def _launch(threads: int) -> float:
    context, byte = _native.Context(threads, "auto"), np.ones(1, np.uint8)
    return _median(lambda: _native.read_bandwidth(context, byte), 2000)


def _handover() -> float:
    """Half of the way there and back through a waiting thread."""
    there: queue.SimpleQueue[int] = queue.SimpleQueue()
    back: queue.SimpleQueue[int] = queue.SimpleQueue()

    def serve() -> None:
        while there.get():
            back.put(1)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()

    def call() -> None:
        there.put(1)
        back.get()

    seconds = _median(call, 500)
    there.put(0)
    thread.join()
    return seconds / 2


def _median(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return max(statistics.median(times), 1e-9)


def _without_free(gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """Free memory changes by the second and is no property of the machine."""
    return tuple(replace(gpu, free=0) for gpu in gpus)


def _restored(kept: dict[str, Any] | None) -> Probe | None:
    """The probe that was kept; None if it is not ours to trust."""
    try:
        if kept is None or kept["version"] != VERSION:
            return None
        found = kept["probe"]
        memory = found["memory"]
        probe = Probe(
            measured=float(found["measured"]),
            memory=MemorySpeed(
                by_threads=tuple((int(n), float(rate)) for n, rate in memory["by_threads"]),
                beside_device=float(memory["beside_device"]),
                sparse=float(memory["sparse"]),
                sparse_batch=float(memory["sparse_batch"]),
            ),
            flops=float(found["flops"]),
            launch=float(found["launch"]),
            handover=float(found["handover"]),
            disks=tuple(_disk(d) for d in found["disks"]),
            gpus=tuple(Gpu(**g) for g in found["gpus"]),
            gpu_speeds=tuple(None if s is None else GpuSpeed(**s) for s in found["gpu_speeds"]),
            unmeasured=tuple(str(reason) for reason in found["unmeasured"]),
        )
        rates = [rate for _, rate in probe.memory.by_threads]
        rates += [probe.flops, probe.memory.beside_device, probe.memory.sparse, probe.memory.sparse_batch]
        rates += [rate for s in probe.gpu_speeds if s is not None for rate in asdict(replace(s, context=1)).values()]
        usable = (
            len(probe.gpus) == len(probe.gpu_speeds) and memory["by_threads"] and all(0 < rate < 1e18 for rate in rates)
        )
        return probe if usable and all(disk.disk for disk in probe.disks) else None
    except (HardwareError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _disk(found: dict[str, Any]) -> DiskSpeed:
    random = tuple((int(size), int(depth), float(rate)) for size, depth, rate in found["random"])
    return DiskSpeed(**(found | {"random": random}))
