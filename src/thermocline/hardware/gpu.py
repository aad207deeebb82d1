"""GPUs of this machine: what their drivers say of them, and what torch measures where it is installed."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from thermocline.hardware.bandwidth import Load, together
from thermocline.hardware.gpu_amd import amd_bytes, find_amd
from thermocline.hardware.gpu_card import Gpu, Maker
from thermocline.hardware.gpu_nvidia import find_nvidia, nvidia_bytes
from thermocline.hardware.gpu_software import torch_maker

BUFFER = 1 << 28
ROW, SIDE = 8192, 4096
"""Bytes of a row that is copied, and rows and columns of a matrix that is multiplied."""
LAUNCHES, PASSES = 100, 8
"""Small kernels of a graph, and passes over VRAM that are waited for once, so that their launches weigh little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpeed:
    """Measured: bytes/s of VRAM and of the link from pinned memory, flops of half products, seconds of a launch within
    a graph and of handing a vector there and back. `one_beside_another` are bytes/s of one while another is used as
    fast as it goes too, RAM by all of the CPU's threads. `context` is bytes of VRAM that the driver keeps for a
    process, 0 where that is unknown. `sparse` is the rate at which rows that lie apart are copied, as a share of that
    of neighbours.
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


def find_gpus() -> tuple[Gpu, ...]:
    """The GPUs that this process may use, in the order in which torch numbers them: of the maker torch is built for.

    Where torch is built for none, or is not there, NVIDIA's or else AMD's.
    """
    if torch_maker() is Maker.AMD:
        return find_amd()
    return find_nvidia() or find_amd()


def own_bytes(index: int = 0, process: int | None = None) -> int:
    """Bytes that this process, or another, holds of a GPU by the driver's account; 0 where that is not told."""
    wanted = os.getpid() if process is None else process
    return amd_bytes(index, wanted) if torch_maker() is Maker.AMD else nvidia_bytes(index, wanted)


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
    rows, copied = big.view(-1, ROW), there.view(-1, ROW)[: BUFFER // ROW // PASSES]
    ordered = torch.arange(len(rows), device=device).view(PASSES, -1)
    apart = torch.randperm(len(rows), device=device).view(PASSES, -1).sort(dim=1).values
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

    def load(call: Callable[[], Any], repeats: int, passes: int = 1) -> Load:
        own = torch.cuda.Stream(device)  # so that what runs beside it is not waited for
        return Load(rate=lambda: passes * BUFFER / seconds(call, repeats, own), once=lambda: seconds(call, 1, own))

    def picked(which: Any) -> float:
        def call() -> None:  # rows that no pass before had, which a cache may hold
            for part in which:
                torch.index_select(rows, 0, part, out=copied)

        return seconds(call, 10)

    def many() -> None:
        for _ in range(LAUNCHES):
            small.add_(1.0)

    def summed() -> None:
        for _ in range(PASSES):
            big.view(torch.int64).sum()

    def there_and_back() -> None:
        small.copy_(small_host, non_blocking=True)
        small_host.copy_(small, non_blocking=True)

    vram = load(summed, 10, PASSES)
    link = load(lambda: there.copy_(host, non_blocking=True), 5)
    for call in (many, there_and_back, lambda: square @ square, lambda: picked(apart), vram.once):
        seconds(call, 3)  # the first calls compile and allocate
    vram_beside_ram, ram_beside_vram = together(vram, memory)
    link_beside_ram, ram_beside_link = together(link, memory)
    vram_beside_link, link_beside_vram = together(vram, link)
    launched = _replayed(torch, alone, many)
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
        launch=seconds(launched, 20) / LAUNCHES,
        crossing=seconds(there_and_back, 200) / 2,
        context=context,
        sparse=min(1.0, picked(ordered) / picked(apart)),
    )


def _replayed(torch: Any, stream: Any, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a graph, as decode steps are; itself where it cannot be captured."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            call()
    except (AttributeError, RuntimeError):
        return call
    replay: Callable[[], Any] = graph.replay
    return replay
