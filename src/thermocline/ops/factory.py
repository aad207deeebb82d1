"""Which implementation of the arithmetic runs a model?"""

from __future__ import annotations

import os
from importlib import import_module

from thermocline.config import OpsKind
from thermocline.errors import HardwareError, UsageError, printable
from thermocline.hardware.gpu_software import gpu_lacks
from thermocline.ops.contract import Ops
from thermocline.ops.cpu import CpuOps
from thermocline.ops.device import Device
from thermocline.ops.reference import ReferenceOps


def make_ops(kind: OpsKind, threads: int, isa: str = "auto") -> Ops:
    """The ops of that kind; `threads` (from 1) and `isa` concern the CPU kernels only.

    Raises:
        UsageError: `threads` or `isa` is out of range, or an `isa` was named for the reference, which has none.
        HardwareError: this CPU lacks `isa`.
    """
    if kind is OpsKind.REFERENCE:
        if isa != "auto":
            raise UsageError(
                f"isa is {printable(isa)}, and the reference has no kernels: leave --isa out, or --ops reference"
            )
        return ReferenceOps()
    return CpuOps(threads, isa)


def make_gpu() -> Device:
    """The first GPU as a device; in Triton's interpreter, CPU tensors in its place.

    Raises:
        HardwareError: there is none, or software for it is missing; the message names the remedy.
    """
    try:
        ops, beside = (import_module(f"thermocline.ops.cuda.{name}") for name in ("ops", "beside"))
    except ImportError as error:
        raise HardwareError("no GPU can be used: " + ". ".join(gpu_lacks() or (str(error),))) from error
    device: Device = beside.CudaDevice(ops.CudaOps())
    return device


def interpreted() -> bool:
    """Whether the GPU's kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
