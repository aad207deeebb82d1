"""Which implementation of the arithmetic runs a model?"""

from __future__ import annotations

from thermocline.config import OpsKind
from thermocline.ops.contract import Ops
from thermocline.ops.cpu import CpuOps
from thermocline.ops.reference import ReferenceOps


def make_ops(kind: OpsKind, threads: int, isa: str = "auto") -> Ops:
    """The ops of that kind; `threads` (from 1) and `isa` concern the CPU kernels only.

    Raises:
        UsageError: `threads` or `isa` is out of range.
        HardwareError: this CPU lacks `isa`.
    """
    if kind is OpsKind.REFERENCE:
        return ReferenceOps()
    return CpuOps(threads, isa)
