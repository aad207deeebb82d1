"""What this machine can do, measured once and kept: memory, disk, GPU, and what it costs to hand work over."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from thermocline.errors import HardwareError, OutputError, UsageError, printable
from thermocline.hardware.bandwidth import Buffer, Load, best_rate, memory_load, read_buffer, together
from thermocline.hardware.cache import home, recall, remember
from thermocline.hardware.disk import DiskSpeed, find_disk, measure_disk, random_rate
from thermocline.hardware.gpu import GpuSpeed, find_gpus, measure_gpu
from thermocline.hardware.gpu_card import Gpu, Maker
from thermocline.hardware.machine import Calls, Machine, Processor, Shares
from thermocline.hardware.rates import (
    Q4_0_BYTES,
    flops_rate,
    handover_seconds,
    launch_seconds,
    sparse_rate,
    unpacking_rate,
)
from thermocline.hardware.reader import Reader
from thermocline.hardware.survey import Survey, examine

SECONDS = 0.1
"""How long memory is read for one figure, each time."""
BESIDE_SIZE = 64 << 10
"""Bytes of the reads that run beside memory's."""
FEW_TOKENS = 4
"""What stands for a small batch."""
UNDISTURBED = 0.8
"""Share of the processors' time that measuring must get: with less, something else is running."""
TURNS, RETRY = 2, 600.0
"""How often a disturbed measurement is repeated at once, and the seconds after which it is tried again."""
CONTRADICTION = 1.5
"""Times that figures may differ of which none can be larger than the other."""
ROUNDS = 2
"""Times that memory is measured, one after another; the best of each figure counts."""
VERSION = 6

Curve = tuple[tuple[int, float], ...]
"""Pairs of threads and a rate, by rising threads, all of them last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySpeed:
    """Bytes/s of reading RAM: (threads, bytes/s) alone, and `beside_device` with one half of the threads (at least one)
    while as many others read too, as an emulated device does. `unpacking` is how many numbers of weights in Q4_0 a
    second are multiplied with one token's, (threads, numbers/s). `sparse` is the share of `best` that the FFN's kernels
    reach where a tenth of the neurons fires, and `sparse_batch` what they reach so for a few tokens, of what they
    reach for as many over neighbours.
    """

    by_threads: Curve
    unpacking: Curve
    beside_device: float
    sparse: float
    sparse_batch: float

    @property
    def best(self) -> float:
        """With all threads."""
        return self.by_threads[-1][1]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """What decode steps of the engine take beside what they read: calls of the `host`, and with `half` of its threads;
    seconds of a `crossing` to an emulated device, of a layer's `meeting` where both work, and `between` those of a step
    outside of the network.
    """

    host: Calls
    half: Calls
    crossing: float
    meeting: float
    between: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What was measured here, at Unix time `measured`.

    `undisturbed` is the share of the processors' time that was got for it. `flops` of products over many tokens.
    `launch` is the seconds to hand an op to the pool of threads and get it back; `handover` to wake another thread with
    work and hear from it. `steps` is None where only a part was asked for.
    `disks` go by device. `unmeasured` says in words what could not be measured.
    """

    measured: float
    undisturbed: float
    memory: MemorySpeed
    flops: float
    launch: float
    handover: float
    steps: StepCosts | None
    disks: tuple[DiskSpeed, ...]
    gpus: tuple[Gpu, ...]
    gpu_speeds: tuple[GpuSpeed | None, ...]
    unmeasured: tuple[str, ...]

    @property
    def doubt(self) -> str:
        """Why these figures are not to be relied on, in words; "" where nothing speaks against them."""
        if self.undisturbed < UNDISTURBED:
            return f"other programs took {1 - self.undisturbed:.0%} of the processors meanwhile"
        memory = self.memory
        best, packed = memory.best, memory.unpacking[-1][1] * Q4_0_BYTES
        for who, rate in (("one thread reads", memory.by_threads[0][1]), ("kernels read", packed)):
            if rate > best * CONTRADICTION:
                return f"{who} {rate / 1e9:.1f} GB/s of memory, and all threads {best / 1e9:.1f}"
        if len(memory.by_threads) > 1 and best > 2 * memory.beside_device * CONTRADICTION:
            return f"all threads read {best / 1e9:.1f} GB/s of memory, half of them {memory.beside_device / 1e9:.1f}"
        return ""

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)

    def disk_of(self, path: Path) -> DiskSpeed | None:
        """What was measured of the disk that `path` lies on."""
        device = find_disk(path).device
        return next((disk for disk in self.disks if disk.device == device), None)


Steps = Callable[[Survey, Probe], StepCosts]
"""Measures steps, by what was measured without them."""


def probe_machine(
    *,
    refresh: bool = False,
    disk: Path | None = None,
    any_disk: bool = True,
    steps: Steps | None = None,
    tell: Callable[[str], None] | None = None,
) -> tuple[Survey, Probe]:
    """Look at this machine; what was measured on it before is taken as it is, unless `refresh`, or there is doubt about
    it and it is `RETRY` seconds old.

    `disk` is a file or folder whose disk to measure; without, it is that of the folder where measurements are kept.
    A disk that is not yet known is measured and added, unless no disk is asked for (`any_disk`); so are `steps`, where
    they are given. `tell` hears what is measured next.

    Raises:
        UsageError: `disk` does not exist.
    """
    if disk is not None and not disk.exists():
        raise UsageError(f"{printable(str(disk))} does not exist; name a file or a folder on the disk to measure")
    survey = examine()
    say = tell or (lambda _: None)
    place = home() if disk is None else disk
    kept = None if refresh else _restored(recall(survey.fingerprint))
    probe, gpus = kept, _without_free(find_gpus())
    if probe is None or probe.gpus != gpus:
        probe = _with_gpus(_settled(survey, say), survey, gpus, say)
    elif probe.doubt and abs(time.time() - probe.measured) > RETRY:
        again, old = _settled(survey, say), probe
        probe = replace(again, disks=old.disks, gpus=gpus, gpu_speeds=old.gpu_speeds, unmeasured=old.unmeasured)
    if steps is not None and probe.steps is None:
        say("measuring steps")
        probe = replace(probe, steps=steps(survey, probe))
    if any_disk and probe.disk_of(place) is None:
        probe = _with_disk(probe, survey, place, say)
    if probe != kept:
        try:
            remember(survey.fingerprint, {"version": VERSION, "probe": probe.as_dict()})
        except OutputError as error:
            say(f"these measurements cannot be kept: {error}")
    if probe.doubt:
        say(f"this machine's figures are in doubt ({probe.doubt}): when it is idle, `thermocline doctor --refresh`")
    return survey, probe


def machine_of(survey: Survey, probe: Probe, disk: Path | None = None) -> Machine:
    """This machine as placement sees it; with the disk of the path `disk`, if that was measured."""
    memory, speed = probe.memory, None if disk is None else probe.disk_of(disk)
    gpu, link, crossing, busy, shares = None, 1.0, 0.0, memory.best, Shares()
    steps = None if probe.gpus else probe.steps  # beside a GPU, steps are replayed without Python
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
        shares = with_link(shares, fast, memory.best)
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
            unpacking=memory.unpacking[-1][1],
            calls=None if steps is None else steps.host,
        ),
        gpu=gpu,
        disk=None if speed is None else speed.disk,
        link=link,
        crossing=crossing,
        between=0.0 if steps is None else steps.between,
        shares=shares,
    )


def emulated(machine: Machine, probe: Probe, capacity: int) -> Machine:
    """The same machine with a device that is emulated by half of its threads, with `capacity` bytes of arena.

    The host is left with the other half.
    """
    memory, steps = probe.memory, probe.steps
    threads = memory.by_threads[-1][0]
    half = max(1, threads // 2)
    alone = max(memory.beside_device, _at(memory.by_threads, half))
    halved = replace(
        machine.cpu,
        bandwidth=alone,
        bandwidth_busy=memory.beside_device,
        flops=machine.cpu.flops * half / threads,
        unpacking=_at(memory.unpacking, half),
        calls=None if steps is None else steps.half,
    )
    return replace(
        machine,
        cpu=halved,
        gpu=replace(halved, name="emulated device", capacity=capacity),
        link=machine.cpu.bandwidth,
        crossing=0.0 if steps is None else steps.crossing,
        meeting=2 * probe.handover if steps is None else steps.meeting,
        between=0.0 if steps is None else steps.between,
    )


def _at(curve: Curve, threads: int) -> float:
    """The rate with so many threads, between those that were measured."""
    counts, rates = zip(*curve, strict=True)
    return float(np.interp(threads, np.array(counts), np.array(rates)))


def with_link(shares: Shares, fast: GpuSpeed, ram: float) -> Shares:
    """The shares with those of a GPU's link, and of what is used beside it, where `ram` is RAM's bandwidth alone."""
    return replace(
        shares,
        ram_beside_link=_share(fast.ram_beside_link, ram),
        link_beside_ram=_share(fast.link_beside_ram, fast.link),
        vram_beside_link=_share(fast.vram_beside_link, fast.vram),
        link_beside_vram=_share(fast.link_beside_vram, fast.link),
    )


def _share(beside: float, alone: float) -> float:
    """What is left of a bandwidth; more than all of it is noise."""
    return min(beside / alone, 1.0)


def _settled(survey: Survey, say: Callable[[str], None]) -> Probe:
    """What was measured undisturbed, or else the least disturbed of some turns; without steps, disks and GPUs."""
    found = [_measured(survey, say)]
    while found[-1].doubt and len(found) < TURNS:
        say(f"measuring again: {found[-1].doubt}")
        found.append(_measured(survey, say))
    return max(found, key=lambda probe: (not probe.doubt, probe.undisturbed))


def _measured(survey: Survey, say: Callable[[str], None]) -> Probe:
    threads = survey.cores.threads
    say("measuring memory")
    buffer = read_buffer(max((cache.size for cache in survey.caches), default=0))
    used, began = time.process_time(), time.perf_counter()
    best_rate(buffer, threads, SECONDS)
    undisturbed = (time.process_time() - used) / (threads * (time.perf_counter() - began))
    memory = _memory_speed(buffer, threads)
    say("measuring arithmetic and hand-overs")
    return Probe(
        measured=time.time(),
        undisturbed=min(1.0, undisturbed),
        memory=memory,
        flops=flops_rate(threads),
        launch=launch_seconds(threads),
        handover=handover_seconds(),
        steps=None,
        disks=(),
        gpus=(),
        gpu_speeds=(),
        unmeasured=(),
    )


def _memory_speed(buffer: Buffer, threads: int) -> MemorySpeed:
    counts = sorted({1, *(1 << i for i in range(1, threads.bit_length()) if 1 << i < threads), threads})
    half = memory_load(buffer, max(1, threads // 2), SECONDS)
    reading, unpacking = dict.fromkeys(counts, 0.0), dict.fromkeys(counts, 0.0)
    beside = sparse = few = line = 0.0
    for _ in range(ROUNDS):
        for count in counts:
            reading[count] = max(reading[count], best_rate(buffer, count, SECONDS))
            unpacking[count] = max(unpacking[count], unpacking_rate(buffer, count, SECONDS))
        beside = max(beside, together(half, half)[0])
        sparse = max(sparse, sparse_rate(buffer, threads, SECONDS))
        few = max(few, sparse_rate(buffer, threads, SECONDS, FEW_TOKENS))
        line = max(line, sparse_rate(buffer, threads, SECONDS, FEW_TOKENS, neighbours=True))
    return MemorySpeed(
        by_threads=tuple(reading.items()),
        unpacking=tuple(unpacking.items()),
        beside_device=beside,
        sparse=min(1.0, sparse / reading[threads]),
        sparse_batch=min(1.0, few / line),
    )


def _with_gpus(probe: Probe, survey: Survey, gpus: tuple[Gpu, ...], say: Callable[[str], None]) -> Probe:
    """The probe with what was measured of the GPUs."""
    if not gpus:
        return probe
    say("measuring the GPU")
    buffer = read_buffer(max((cache.size for cache in survey.caches), default=0))
    load = memory_load(buffer, survey.cores.threads, SECONDS)
    speeds = tuple(measure_gpu(gpu.index, load) for gpu in gpus)
    slow = (gpu.name for gpu, speed in zip(gpus, speeds, strict=True) if speed is None)
    words = tuple(f"{name}: nothing is measured without torch and CUDA" for name in slow)
    return replace(probe, gpus=gpus, gpu_speeds=speeds, unmeasured=words)


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
            undisturbed=float(found["undisturbed"]),
            memory=MemorySpeed(
                by_threads=_curve(memory["by_threads"]),
                unpacking=_curve(memory["unpacking"]),
                beside_device=float(memory["beside_device"]),
                sparse=float(memory["sparse"]),
                sparse_batch=float(memory["sparse_batch"]),
            ),
            flops=float(found["flops"]),
            launch=float(found["launch"]),
            handover=float(found["handover"]),
            steps=None if (steps := found["steps"]) is None else _steps(steps),
            disks=tuple(_disk(d) for d in found["disks"]),
            gpus=tuple(Gpu(**g | {"maker": Maker(g["maker"])}) for g in found["gpus"]),
            gpu_speeds=tuple(None if s is None else GpuSpeed(**s) for s in found["gpu_speeds"]),
            unmeasured=tuple(str(reason) for reason in found["unmeasured"]),
        )
        rates = [rate for _, rate in (*probe.memory.by_threads, *probe.memory.unpacking)]
        rates += [probe.flops, probe.memory.beside_device, probe.memory.sparse, probe.memory.sparse_batch]
        rates += [rate for s in probe.gpu_speeds if s is not None for rate in asdict(replace(s, context=1)).values()]
        usable = (
            len(probe.gpus) == len(probe.gpu_speeds)
            and len(probe.memory.by_threads) == len(probe.memory.unpacking) > 0
            and all(0 < rate < 1e18 for rate in rates)
        )
        return probe if usable and all(disk.disk for disk in probe.disks) else None
    except (HardwareError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _curve(pairs: Any) -> Curve:
    return tuple((int(n), float(rate)) for n, rate in pairs)


def _steps(found: dict[str, Any]) -> StepCosts:
    host, half = (Calls(**{k: float(v) for k, v in found[name].items()}) for name in ("host", "half"))
    crossing, meeting, between = (float(found[name]) for name in ("crossing", "meeting", "between"))
    return StepCosts(host=host, half=half, crossing=crossing, meeting=meeting, between=between)


def _disk(found: dict[str, Any]) -> DiskSpeed:
    random = tuple((int(size), int(depth), float(rate)) for size, depth, rate in found["random"])
    return DiskSpeed(**(found | {"random": random}))
