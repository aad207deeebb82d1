"""Which processors this process may use."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from thermocline.hardware.control_group import limits_of

SYSTEM = Path("/sys/devices/system/cpu")


@dataclass(frozen=True, slots=True)
class Cores:
    """Processors. `allowed` are those that affinity leaves; `quota` is the control group's share of time, in
    processors (None: no limit). `siblings` groups the allowed processors by physical core.
    """

    model: str
    logical: int
    allowed: tuple[int, ...]
    siblings: tuple[tuple[int, ...], ...]
    quota: float | None

    @property
    def physical(self) -> int:
        """Physical cores among the allowed processors."""
        return len(self.siblings)

    @property
    def threads(self) -> int:
        """How many threads to run: one per physical core, no more than the quota feeds.

        A second thread on a core adds no bandwidth, and threads beyond the quota are stopped in mid-step
        while the others wait for them.
        """
        return max(1, min(self.physical, self.usable))

    @property
    def usable(self) -> int:
        """How many threads can run at once."""
        allowed = len(self.allowed)
        return allowed if self.quota is None else min(allowed, math.ceil(self.quota))


def find_cores(system: Path = SYSTEM, cpuinfo: Path = Path("/proc/cpuinfo")) -> Cores:
    """The processors of this process."""
    allowed = tuple(sorted(os.sched_getaffinity(0)))
    cores: dict[tuple[str, str], list[int]] = {}
    for cpu in allowed:
        cores.setdefault(_place(system, cpu), []).append(cpu)
    return Cores(
        model=_model(cpuinfo),
        logical=os.cpu_count() or len(allowed),
        allowed=allowed,
        siblings=tuple(tuple(group) for group in cores.values()),
        quota=limits_of().processors,
    )


def is_guest(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether a hypervisor runs this system, as x86 processors tell."""
    try:
        with cpuinfo.open(errors="replace") as lines:
            return "hypervisor" in next((line.split() for line in lines if line.startswith("flags")), ())
    except OSError:
        return False


def _place(system: Path, cpu: int) -> tuple[str, str]:
    """Package and core of a processor; a processor that does not tell is a core of its own."""
    topology = system / f"cpu{cpu}" / "topology"
    try:
        return (topology / "physical_package_id").read_text(), (topology / "core_id").read_text()
    except OSError:
        return "unknown", str(cpu)


def _model(cpuinfo: Path) -> str:
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU implementer")))
    return next(named, "unknown processor")
