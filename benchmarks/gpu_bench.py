"""What all parts of the GPU's benchmark share: the device, the clock, and what there was no time for."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

from thermocline.ops.cpu import CpuOps
from thermocline.ops.cuda.ops import CudaOps
from thermocline.ops.factory import interpreted
from thermocline.placement.workload import NO_OVERHEADS, Overheads

DRY = interpreted()
ACTIVE = 0.12
"""Share of the neurons that fire, in models and in kernels alone."""


@dataclass(frozen=True)
class Bench:
    """What all parts share. `skipped` says what there was no time for."""

    gpu: CudaOps
    cpu: CpuOps
    deadline: float
    context: int = 0
    skipped: list[str] = field(default_factory=list)

    @property
    def overheads(self) -> Overheads:
        """What plans set aside; the driver's own part of the device is what it held before anything was made."""
        return NO_OVERHEADS if DRY else replace(Overheads(), margin_vram=Overheads().margin_vram + self.context)

    def seconds(self, call: Callable[[], Any], repeats: int = 20, *, graph: bool = True) -> float:
        """Median seconds of a call on the device; as a graph, so that starting kernels costs nothing."""
        if DRY:
            repeats = 1
        streams, timed = self.gpu.streams, call
        with streams.aside():
            call()
        if graph and streams.real:
            timed = streams.captured(call)
        times = []
        for _ in range(repeats + (0 if DRY else 3)):
            streams.wait()
            began = time.perf_counter()
            timed()
            streams.wait()
            times.append(time.perf_counter() - began)
        return median(times[-repeats:])

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def time_for(self, what: str, seconds: float) -> bool:
        """Whether so many seconds are left; if not, that is kept and said."""
        if self.left >= seconds:
            return True
        self.skipped.append(f"{what}: {max(self.left, 0):.0f} s are left of the {seconds:.0f} it may take")
        print(f"left out: {self.skipped[-1]}", file=sys.stderr)
        return False
