"""GPUs of this machine: what the driver says of them, and what torch measures where it is installed."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

FIELDS = ("index", "name", "memory.total", "memory.free", "pcie.link.gen.max", "pcie.link.width.max", "driver_version")
MIB = 1 << 20
BUFFER = 1 << 28


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


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpeed:
    """Measured: bytes/s of VRAM and of the link from pinned memory, flops of half products, seconds of a launch and of
    handing a vector there and back. `link_busy` is the link while the CPU reads memory.
    """

    vram: float
    link: float
    link_busy: float
    flops: float
    launch: float
    crossing: float


def find_gpus(run: Callable[[list[str]], str] | None = None) -> tuple[Gpu, ...]:
    """The GPUs that the driver tells of: through nvidia-ml-py, else through nvidia-smi; none where neither is."""
    if run is None:
        found = _from_library()
        if found is not None:
            return found
        if shutil.which("nvidia-smi") is None:
            return ()
        run = _smi
    try:
        text = run(["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"])
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(gpu for line in text.splitlines() if (gpu := _parsed(line)) is not None)


def measure_gpu(index: int, beside: Callable[[Callable[[], float]], float]) -> GpuSpeed | None:
    """Measure with torch; None where torch with CUDA is missing. `beside` runs a measurement while the CPU reads."""
    try:
        torch: Any = import_module("torch")
        if not torch.cuda.is_available():
            return None
    except (ImportError, RuntimeError):
        return None
    device = torch.device("cuda", index)
    big = torch.ones(BUFFER, dtype=torch.uint8, device=device)
    host = torch.ones(BUFFER, dtype=torch.uint8).pin_memory()
    square = torch.ones((4096, 4096), dtype=torch.float16, device=device)
    small, small_host = torch.ones(4096, device=device), torch.ones(4096).pin_memory()

    def seconds(call: Callable[[], Any], repeats: int) -> float:
        times = []
        for _ in range(repeats):
            torch.cuda.synchronize(device)
            began = time.perf_counter()
            call()
            torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
        return min(times) if repeats < 50 else statistics.median(times)

    def link() -> float:
        return BUFFER / seconds(lambda: big.copy_(host, non_blocking=True), 5)

    def many() -> None:
        for _ in range(100):
            small.add_(1.0)

    def there_and_back() -> None:
        small.copy_(small_host, non_blocking=True)
        small_host.copy_(small, non_blocking=True)

    for call in (many, there_and_back, lambda: square @ square):
        seconds(call, 3)  # the first calls compile and allocate
    return GpuSpeed(
        vram=BUFFER / seconds(lambda: big.view(torch.int64).sum(), 10),
        link=link(),
        link_busy=beside(link),
        flops=2 * 4096**3 / seconds(lambda: square @ square, 10),
        launch=seconds(many, 20) / 100,
        crossing=seconds(there_and_back, 200) / 2,
    )


def _from_library() -> tuple[Gpu, ...] | None:
    try:
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # the package has its own class for each way in which there is no driver
        return None
    try:
        return tuple(_from_handle(nvml, i) for i in range(nvml.nvmlDeviceGetCount()))
    finally:
        nvml.nvmlShutdown()


def _from_handle(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
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
    )


def _smi(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout  # noqa: S603


def _parsed(line: str) -> Gpu | None:
    words = [word.strip() for word in line.split(",")]
    if len(words) != len(FIELDS):
        return None
    index, name, total, free, pcie, lanes, driver = words

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
    )
