"""Everything about this machine that matters here."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import asdict, dataclass
from typing import Any

from thermocline import _native
from thermocline.hardware.bandwidth import Bandwidth, measure_bandwidth
from thermocline.hardware.cores import Cores, find_cores
from thermocline.hardware.gpu_software import gpu_lacks
from thermocline.hardware.memory import Cache, Memory, find_caches, find_memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What was found on this machine. `isa` are the levels of native kernels that it can run, the best one last."""

    system: str
    cores: Cores
    isa: tuple[str, ...]
    memory: Memory
    caches: tuple[Cache, ...]
    bandwidth: Bandwidth | None
    gpu_lacks: tuple[str, ...] = ()
    """What keeps this installation from computing on a GPU, each with its remedy."""

    @property
    def kernels(self) -> str:
        """The level that is taken unless another is asked for."""
        return self.isa[-1]

    @property
    def fingerprint(self) -> str:
        """Hex digits that change when measurements of this machine no longer hold."""
        parts = (self.cores.model, self.cores.allowed, self.cores.quota, self.isa, self.memory.total, self.caches)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        derived = {"threads": self.cores.threads, "physical_cores": self.cores.physical, "kernels": self.kernels}
        return asdict(self) | derived | {"fingerprint": self.fingerprint}


def examine(*, measure: bool = False, threads: int = 0) -> Survey:
    """Look at this machine.

    With `measure`, read bandwidth is measured now (half a second) with one thread and with `threads` (0: all cores).
    """
    cores, caches = find_cores(), find_caches()
    last = max((cache.size for cache in caches), default=0)
    return Survey(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cores=cores,
        isa=tuple(_native.isa_levels()),
        memory=find_memory(),
        caches=caches,
        bandwidth=measure_bandwidth(threads or cores.threads, last) if measure else None,
        gpu_lacks=gpu_lacks(),
    )
