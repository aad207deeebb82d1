"""Which of several GPUs a process uses: the one that it lets itself see."""

from __future__ import annotations

import os
import sys
from typing import Any, Final

from thermocline.errors import HardwareError, UsageError, printable
from thermocline.hardware.gpu import find_gpus
from thermocline.hardware.gpu_amd import VARIABLE as HIP_VISIBLE
from thermocline.hardware.gpu_card import Gpu, Maker
from thermocline.hardware.gpu_nvidia import VARIABLE as CUDA_VISIBLE
from thermocline.hardware.gpu_nvidia import first_begun

VISIBLE: Final = {Maker.NVIDIA: CUDA_VISIBLE, Maker.AMD: HIP_VISIBLE}

_SEEN: dict[tuple[str, str], tuple[Gpu, ...]] = {}
"""By the variable and what was chosen by it, the GPUs that there were to choose from: numbers keep their meaning."""


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
    variable = VISIBLE[gpu.maker]
    if len(gpus) > 1 and os.environ.get(variable) != gpu.visible:
        if _uses_another(gpu):
            raise UsageError(
                f"this process has used a GPU already, so that it cannot choose {gpu.name}; choose it first, or set "
                f"{variable}={gpu.visible} before the start"
            )
        os.environ[variable] = gpu.visible
        _SEEN[variable, gpu.visible] = gpus
    return gpu.uuid


def _uses_another(gpu: Gpu) -> bool:
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return True
    begun = first_begun() if gpu.uuid.startswith("GPU-") else ""  # parts of a GPU have names of their own
    return begun not in ("", gpu.uuid)


def _choice() -> tuple[Gpu, ...]:
    chosen = (_SEEN.get((variable, os.environ.get(variable, ""))) for variable in VISIBLE.values())
    return next(filter(None, chosen), None) or find_gpus()


def _is(gpu: Gpu, wanted: str) -> bool:
    if wanted.isdecimal():
        return gpu.index == int(wanted)
    return bool(wanted) and (gpu.uuid == wanted or wanted.lower() in gpu.name.lower())
