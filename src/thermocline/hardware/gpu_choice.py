"""Which of several GPUs a process uses: the one that it lets itself see."""

from __future__ import annotations

import os
import sys
from typing import Any, Final

from thermocline.errors import HardwareError, UsageError, printable
from thermocline.hardware.gpu import Gpu, find_gpus

VISIBLE: Final = "CUDA_VISIBLE_DEVICES"

_SEEN: dict[str, tuple[Gpu, ...]] = {}
"""By the UUID that was chosen, the GPUs that there were to choose from: numbers keep their meaning."""


def find_gpu(wanted: str) -> Gpu:
    """The GPU of this number, UUID or part of a name, among those that this process could see at first.

    Raises:
        HardwareError: there is no such GPU, or several; the message lists what there is.
    """
    gpus = _choice()
    found = [gpu for gpu in gpus if _is(gpu, wanted.strip())]
    if len(found) != 1:
        there = "; ".join(f"{gpu.index}: {gpu.name} ({gpu.uuid})" for gpu in gpus) or "none that a driver tells of"
        several = "more than one GPU is" if found else "no GPU is"
        raise HardwareError(f"{several} called {printable(wanted)}; there are {there}")
    return found[0]


def choose_gpu(wanted: str) -> str:
    """Let this process see one GPU alone (see `find_gpu`); its UUID.

    All that asks for a GPU then finds this one, as its first. Asking again for what is chosen changes nothing.

    Raises:
        HardwareError: there is no such GPU, or several; the message lists what there is.
        UsageError: this process uses another one already.
    """
    gpus, gpu = _choice(), find_gpu(wanted)
    if len(gpus) > 1 and os.environ.get(VISIBLE) != gpu.uuid:
        torch: Any = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            raise UsageError(
                f"this process has used a GPU already, so that it cannot choose {gpu.name}; choose it first, or set "
                f"{VISIBLE}={gpu.uuid} before the start"
            )
        os.environ[VISIBLE] = gpu.uuid
        _SEEN[gpu.uuid] = gpus
    return gpu.uuid


def _choice() -> tuple[Gpu, ...]:
    return _SEEN.get(os.environ.get(VISIBLE, "")) or find_gpus()


def _is(gpu: Gpu, wanted: str) -> bool:
    if wanted.isdecimal():
        return gpu.index == int(wanted)
    return bool(wanted) and (gpu.uuid == wanted or wanted.lower() in gpu.name.lower())
