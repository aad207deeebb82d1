"""Which of several GPUs a process uses: the one that it lets itself see."""

from __future__ import annotations

import os
import sys
from typing import Any

from thermocline.errors import HardwareError, UsageError, printable
from thermocline.hardware.gpu import Gpu, find_gpus


def choose_gpu(wanted: str) -> str:
    """Let this process see one GPU alone, named by its number, its UUID or a part of its name; its UUID.

    All that asks for a GPU then finds this one, as its first. Asking again for what is chosen changes nothing.

    Raises:
        HardwareError: there is no such GPU, or several; the message lists what there is.
        UsageError: this process uses another one already.
    """
    gpus = find_gpus()
    found = [gpu for gpu in gpus if _is(gpu, wanted.strip())]
    if len(found) != 1:
        there = "; ".join(f"{gpu.index}: {gpu.name} ({gpu.uuid})" for gpu in gpus) or "none that a driver tells of"
        several = "more than one GPU is" if found else "no GPU is"
        raise HardwareError(f"{several} called {printable(wanted)}; there are {there}")
    (gpu,) = found
    if len(gpus) > 1:
        torch: Any = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            raise UsageError(
                f"this process has used a GPU already, so that it cannot choose {gpu.name}; choose it first, or set "
                f"CUDA_VISIBLE_DEVICES={gpu.uuid} before the start"
            )
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu.uuid
    return gpu.uuid


def _is(gpu: Gpu, wanted: str) -> bool:
    if wanted.isdecimal():
        return gpu.index == int(wanted)
    return bool(wanted) and (gpu.uuid == wanted or wanted.lower() in gpu.name.lower())
