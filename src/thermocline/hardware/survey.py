"""Everything about this machine that matters here."""

from __future__ import annotations

import contextlib
import hashlib
import platform
from dataclasses import asdict, dataclass, replace
from typing import Any

from thermocline import _native
from thermocline.errors import OutputError
from thermocline.hardware.bandwidth import Bandwidth, measure_bandwidth, recall, remember
from thermocline.hardware.cores import Cores, find_cores
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

    @property
    def fingerprint(self) -> str:
        """Hex digits that change when measurements of this machine no longer hold."""
        parts = (self.cores.model, self.cores.allowed, self.cores.quota, self.isa, self.memory.total, self.caches)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        derived = {"threads": self.cores.threads, "physical_cores": self.cores.physical, "kernels": self.isa[-1]}
        return asdict(self) | derived | {"fingerprint": self.fingerprint}


def examine(*, measure: bool = True, threads: int = 0) -> Survey:
    """Look at this machine.

    With `measure`, read bandwidth is measured now (a second or so) with one thread and with `threads` (0: all
    cores) and remembered; without, it is what was measured before, if anything was.
    """
    cores, caches = find_cores(), find_caches()
    survey = Survey(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cores=cores,
        isa=tuple(_native.isa_levels()),
        memory=find_memory(),
        caches=caches,
        bandwidth=None,
    )
    if not measure:
        return replace(survey, bandwidth=recall(survey.fingerprint))
    last = max((cache.size for cache in caches), default=0)
    bandwidth = measure_bandwidth(threads or cores.threads, last)
    if not threads:
        with contextlib.suppress(OutputError):  # a home that cannot be written only means measuring again
            remember(survey.fingerprint, bandwidth)
    return replace(survey, bandwidth=bandwidth)
