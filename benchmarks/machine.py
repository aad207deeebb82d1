"""The machine that a benchmark ran on, and the rates that bound it, measured in the same run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from thermocline import __version__, _native
from thermocline.hardware.bandwidth import BUFFER
from thermocline.hardware.survey import examine

ROOT = Path(__file__).parent.parent


def facts(threads: int) -> dict[str, object]:
    """What a reader needs to place a result: processor, caches, memory, versions, commit and time."""
    survey = examine(measure=False)
    return {
        "processor": survey.cores.model,
        "cores": survey.cores.physical,
        "threads": threads,
        "kernels": survey.kernels,
        "caches": [f"{c.name} {c.size >> 10} KiB" for c in survey.caches],
        "memory_gib": round(survey.memory.total / (1 << 30), 1),
        "system": survey.system,
        "python": platform.python_version(),
        "numpy": importlib.metadata.version("numpy"),
        "thermocline": __version__,
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@dataclass(slots=True)
class Probe:
    """Reads of a buffer that no cache holds, in between what is measured. It shares its threads with what is
    measured, because two pools would spin against each other."""

    context: _native.Context
    rates: list[float] = field(default_factory=list)
    """Every pass, in 10⁹ bytes a second."""
    buffer: np.ndarray[tuple[int], np.dtype[np.uint8]] = field(default_factory=lambda: np.ones(BUFFER, np.uint8))

    def read(self, passes: int = 1) -> float:
        """Some passes; the median of them."""
        new = [_native.read_bandwidth(self.context, self.buffer) / 1e9 for _ in range(passes)]
        self.rates += new
        return statistics.median(new)


PEAKS = """
import json, sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
def best(call, operations, seconds=0.7):
    top, end = 0.0, time.perf_counter() + seconds
    call()
    while time.perf_counter() < end:
        began = time.perf_counter()
        call()
        top = max(top, operations / (time.perf_counter() - began))
    return top / 1e9
n = 2048
a, b = torch.randn(n, n), torch.randn(n, n)
c, d = a.bfloat16(), b.bfloat16()
e, f = (torch.randint(-127, 127, (n, n), dtype=torch.int8) for _ in range(2))
with torch.inference_mode():
    rates = {"int8": best(lambda: torch._int_mm(e, f), 2 * n**3), "bf16": best(lambda: c @ d, 2 * n**3),
             "f32": best(lambda: a @ b, 2 * n**3)}
print(json.dumps({"source": "torch " + torch.__version__ + ", products of 2048 x 2048 matrices", **rates}))
"""


TILE_PASSES = 200
"""Of some tenths of a millisecond each."""


def arithmetic_peaks(threads: int) -> dict[str, object] | None:
    """The best rates that torch reaches here in int8, bf16 and float32, in 10⁹ operations a second.

    A product and its addition are two operations. Measured in a process of its own; None without torch. Where AMX's
    tiles alone, which then read no memory, are faster still, theirs.
    """
    if importlib.util.find_spec("torch") is None:
        return None
    command = [sys.executable, "-c", PEAKS, str(threads)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    peaks: dict[str, object] = json.loads(result.stdout)
    context = _native.Context(threads)
    for name in ("int8", "bf16"):
        rate, own = max(_native.tile_rate(context, name == "int8") for _ in range(TILE_PASSES)) / 1e9, peaks[name]
        if rate > float(str(own)):
            peaks |= {name: rate, "source": f"{peaks['source']}; {name}: AMX's tiles alone, torch reaches {own:.0f}"}
    return peaks
