"""The GPU as a device that works while the host works."""

from __future__ import annotations

import torch

from thermocline.hardware.machine import Tier
from thermocline.ops.contract import FfnWork, Ops
from thermocline.ops.cuda.ops import CudaOps
from thermocline.ops.device import EmulatedDevice, Work


class CudaDevice:
    """VRAM with its kernels, launched and waited for by a thread of its own.

    This is the plain way: each piece of work costs a wake-up and one wait. A captured step (`runtime.captured`) has
    neither.
    """

    tier = Tier.VRAM

    def __init__(self, ops: CudaOps) -> None:
        self.ops: Ops = ops
        self.seconds = 0.0
        self._thread = EmulatedDevice(ops)
        if ops.device.type == "cpu":
            self._thread.begin(_settle)
            self._thread.end()

    def begin(self, work: Work) -> None:
        """See the protocol."""
        self._thread.begin(work)

    def end(self) -> FfnWork:
        """See the protocol."""
        try:
            return self._thread.end()
        finally:
            self.seconds = self._thread.seconds

    def close(self) -> None:
        """End the thread."""
        self._thread.close()


def _settle() -> FfnWork:
    """Where kernels are interpreted torch computes on the CPU, and each thread learns of the number of threads late.

    Its first product of matrices would be cut otherwise than the next, and differ in the last bits.
    """
    torch.set_num_threads(torch.get_num_threads())
    return FfnWork(0, 0, 0, 0)
