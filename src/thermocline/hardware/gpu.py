"""GPUs of this machine: what the driver says of them, and what torch measures where it is installed."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import takewhile
from typing import Any

from thermocline.hardware.bandwidth import Load, together

FIELDS = ("index", "name", "memory.total", "memory.free", "pcie.link.gen.max", "pcie.link.width.max", "driver_version",
          "uuid")  # fmt: skip
MIB = 1 << 20
BUFFER = 1 << 28
ROW, SIDE = 8192, 4096
"""Bytes of a row that is copied, and rows and columns of a matrix that is multiplied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU: bytes of VRAM, generation and lanes of its PCIe link (0: unknown)."""

    index: int
    name: str
    total: int
    free: int
    pcie: int
    lanes: int
    driver: str
    uuid: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpeed:
    """Measured: bytes/s of VRAM and of the link from pinned memory, flops of half products, seconds of a launch and of
    handing a vector there and back. `one_beside_another` are bytes/s of one while another is used as fast as it goes
    too, RAM by all of the CPU's threads. `context` is bytes of VRAM that the driver keeps for a process, 0 where that
    is unknown. `sparse` is the rate at which rows that lie apart are copied, as a share of that of neighbours.
    """

    vram: float
    link: float
    vram_beside_ram: float
    ram_beside_vram: float
    link_beside_ram: float
    ram_beside_link: float
    vram_beside_link: float
    link_beside_vram: float
    flops: float
    launch: float
    crossing: float
    context: int = 0
    sparse: float = 1.0


def find_gpus(run: Callable[[list[str]], str] | None = None) -> tuple[Gpu, ...]:
    """The GPUs that the driver tells of: through nvidia-ml-py, else through nvidia-smi; none where neither is.

    Those that `CUDA_VISIBLE_DEVICES` leaves, in its order: the order in which torch numbers them. Where it leaves all,
    the driver's tools go by the bus, and torch is told to do so too, which would put the fastest first.
    """
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if run is None:
        found = _from_library()
        if found is not None:
            return found
        if shutil.which("nvidia-smi") is None:
            return ()
        run = _smi
    try:
        query = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
        visible = _visible()
        text = run(query if visible is None else [*query, f"--id={','.join(visible)}"]) if visible != () else ""
    except (OSError, subprocess.SubprocessError):
        return ()
    gpus = [gpu for line in text.splitlines() if (gpu := _parsed(line)) is not None]
    return tuple(gpus) if visible is None else tuple(replace(gpu, index=i) for i, gpu in enumerate(gpus))


def own_bytes(index: int = 0, process: int | None = None) -> int:
    """Bytes that this process, or another, holds of a GPU by the driver's account; 0 where that is not told."""
    try:
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # as in `_from_library`
        return 0
    wanted = os.getpid() if process is None else process
    try:
        names = _visible()
        handle = _handle(nvml, str(index) if names is None else names[index])
        found = [p.usedGpuMemory for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == wanted]
    except (nvml.NVMLError, IndexError):
        return 0
    finally:
        nvml.nvmlShutdown()
    return int(found[0] or 0) if found else 0


def measure_gpu(index: int, memory: Load) -> GpuSpeed | None:
    """Measure with torch; None where torch with CUDA is missing. `memory` is all of the CPU's threads reading RAM."""
    try:
        torch: Any = import_module("torch")
        if not torch.cuda.is_available():
            return None
    except (ImportError, RuntimeError):
        return None
    # What a context takes shows only before this process has one.
    before = 0 if torch.cuda.is_initialized() else next((g.free for g in find_gpus() if g.index == index), 0)
    device = torch.device("cuda", index)
    context = max(0, before - int(torch.cuda.mem_get_info(device)[0]))
    try:
        return _measured(torch, device, context, memory)
    finally:
        torch.cuda.empty_cache()  # the model is to have it
        getattr(torch._C, "_host_emptyCache", lambda: None)()  # and what was pinned


def _measured(torch: Any, device: Any, context: int, memory: Load) -> GpuSpeed:
    big = torch.ones(BUFFER, dtype=torch.uint8, device=device)
    host, there = torch.ones(BUFFER, dtype=torch.uint8).pin_memory(), torch.empty_like(big)
    rows, copied = big.view(-1, ROW), there.view(-1, ROW)[: BUFFER // ROW // 8]
    ordered = torch.arange(len(copied), device=device)
    apart = torch.randperm(len(rows), device=device)[: len(copied)].sort().values
    square = torch.ones((SIDE, SIDE), dtype=torch.float16, device=device)
    small, small_host = torch.ones(4096, device=device), torch.ones(4096).pin_memory()
    torch.cuda.synchronize(device)
    alone = torch.cuda.Stream(device)

    def seconds(call: Callable[[], Any], repeats: int, stream: Any = alone) -> float:
        times = []
        with torch.cuda.stream(stream):
            for _ in range(repeats):
                began = time.perf_counter()
                call()
                stream.synchronize()
                times.append(time.perf_counter() - began)
        return min(times) if repeats < 50 else statistics.median(times)

    def load(call: Callable[[], Any], repeats: int) -> Load:
        own = torch.cuda.Stream(device)  # so that what runs beside it is not waited for
        return Load(rate=lambda: BUFFER / seconds(call, repeats, own), once=lambda: seconds(call, 1, own))

    def picked(which: Any) -> float:
        return seconds(lambda: torch.index_select(rows, 0, which, out=copied), 10)

    def many() -> None:
        for _ in range(100):
            small.add_(1.0)

    def there_and_back() -> None:
        small.copy_(small_host, non_blocking=True)
        small_host.copy_(small, non_blocking=True)

    vram = load(lambda: big.view(torch.int64).sum(), 10)
    link = load(lambda: there.copy_(host, non_blocking=True), 5)
    for call in (many, there_and_back, lambda: square @ square, lambda: picked(apart), vram.once):
        seconds(call, 3)  # the first calls compile and allocate
    vram_beside_ram, ram_beside_vram = together(vram, memory)
    link_beside_ram, ram_beside_link = together(link, memory)
    vram_beside_link, link_beside_vram = together(vram, link)
    return GpuSpeed(
        vram=vram.rate(),
        link=link.rate(),
        vram_beside_ram=vram_beside_ram,
        ram_beside_vram=ram_beside_vram,
        link_beside_ram=link_beside_ram,
        ram_beside_link=ram_beside_link,
        vram_beside_link=vram_beside_link,
        link_beside_vram=link_beside_vram,
        flops=2 * SIDE**3 / seconds(lambda: square @ square, 10),
        launch=seconds(many, 20) / 100,
        crossing=seconds(there_and_back, 200) / 2,
        context=context,
        sparse=min(1.0, picked(ordered) / picked(apart)),
    )


def _from_library() -> tuple[Gpu, ...] | None:
    try:
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # the package has its own class for each way in which there is no driver
        return None
    try:
        visible = _visible()
        names = visible if visible is not None else tuple(map(str, range(nvml.nvmlDeviceGetCount())))
        return tuple(_from_handle(nvml, i, _handle(nvml, name)) for i, name in enumerate(names))
    except nvml.NVMLError:  # a name that is none of this machine's
        return ()
    finally:
        nvml.nvmlShutdown()


def _visible() -> tuple[str, ...] | None:
    """What `CUDA_VISIBLE_DEVICES` names, up to the first that is no name; None where it is not set."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return None
    names = (name.strip() for name in text.split(","))
    return tuple(takewhile(lambda name: name.isdecimal() or name.startswith(("GPU-", "MIG-")), names))


def _handle(nvml: Any, name: str) -> Any:
    return nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdecimal() else nvml.nvmlDeviceGetHandleByUUID(name)


def _from_handle(nvml: Any, index: int, handle: Any) -> Gpu:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)

    def text(value: Any) -> str:
        return value.decode() if isinstance(value, bytes) else str(value)

    def link(name: str) -> int:
        try:
            return int(getattr(nvml, name)(handle))
        except nvml.NVMLError:
            return 0

    return Gpu(
        index=index,
        name=text(nvml.nvmlDeviceGetName(handle)),
        total=int(memory.total),
        free=int(memory.free),
        pcie=link("nvmlDeviceGetMaxPcieLinkGeneration"),
        lanes=link("nvmlDeviceGetMaxPcieLinkWidth"),
        driver=text(nvml.nvmlSystemGetDriverVersion()),
        uuid=text(nvml.nvmlDeviceGetUUID(handle)),
    )


def _smi(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout  # noqa: S603


def _parsed(line: str) -> Gpu | None:
    words = [word.strip() for word in line.split(",")]
    if len(words) != len(FIELDS):
        return None
    index, name, total, free, pcie, lanes, driver, uuid = words

    def number(word: str) -> int:
        return int(word) if word.isdecimal() else 0

    return Gpu(
        index=number(index),
        name=name,
        total=number(total) * MIB,
        free=number(free) * MIB,
        pcie=number(pcie),
        lanes=number(lanes),
        driver=driver,
        uuid=uuid,
    )
