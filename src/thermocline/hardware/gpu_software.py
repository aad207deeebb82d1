"""What a GPU needs beside itself: a driver, torch built for it, Triton; found without importing any of them."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from thermocline.hardware.gpu_card import Maker

DRIVERS: Final = {Maker.NVIDIA: "/dev/nvidiactl", Maker.AMD: "/dev/kfd"}
"""Files that a loaded driver makes."""
EXTRA: Final = "pip install 'thermocline[gpu]'"
TORCH: Final = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/"
BUILDS: Final = {Maker.NVIDIA: "cu128", Maker.AMD: "rocm6.4"}
"""Of torch, by the last part of the index that has them."""
TRITONS: Final = ("triton", "pytorch-triton-rocm", "triton-rocm")
"""Packages that hold it."""


def torch_maker(found: Callable[[str], str | None] | None = None) -> Maker | None:
    """Whose GPUs the torch that is installed is built for; None where there is none, or one for CPUs alone.

    `found` gives the version of a package or None.
    """
    torch = (found or _version)("torch")
    if torch is None or torch.endswith("+cpu"):
        return None
    return Maker.AMD if "+rocm" in torch else Maker.NVIDIA


def gpu_lacks(
    found: Callable[[str], str | None] | None = None,
    exists: Callable[[str], bool] | None = None,
    which: Callable[[str], str | None] = shutil.which,
    allowed: Callable[[str, int], bool] = os.access,
) -> tuple[str, ...]:
    """What keeps this installation from computing on a GPU, each with its remedy; nothing if nothing does.

    `found` gives the version of a package or None, `exists` says whether a file is there, `which` where a program is,
    `allowed` whether a file may be used so.
    """
    found, exists = found or _version, exists or (lambda path: Path(path).exists())
    makers = [maker for maker, path in DRIVERS.items() if exists(path)]
    lacks = []
    if not makers:
        lacks.append("no driver of a GPU is loaded; install the card's (nvidia-smi or rocminfo then lists it)")
    if Maker.AMD in makers and not allowed(DRIVERS[Maker.AMD], os.R_OK | os.W_OK):
        lacks.append("AMD's driver does not let this user in; usermod -aG render,video USER, and log in again")
    lacks += [*_torch_lacks(found, makers), *_triton_lacks(found, exists, which)]
    if Maker.NVIDIA in makers and torch_maker(found) is not Maker.AMD and found("cuda-bindings") is None:
        lacks.append(f"cuda-bindings is not installed: crossings take a slower way; {EXTRA}")
    return tuple(lacks)


def _torch_lacks(found: Callable[[str], str | None], makers: list[Maker]) -> list[str]:
    torch, built = found("torch"), torch_maker(found)
    if built in makers or (built is not None and not makers):
        return []
    maker = makers[0] if makers else Maker.NVIDIA
    remedy = TORCH + BUILDS[maker]
    if torch is None:
        return [f"torch is not installed; {EXTRA if maker is Maker.NVIDIA else remedy}"]
    if built is None:
        return [f"torch {torch} is built for the CPU only; {remedy}"]
    return [f"torch {torch} is built for {built}'s GPUs, and the driver that is loaded is {maker}'s; {remedy}"]


def _triton_lacks(
    found: Callable[[str], str | None], exists: Callable[[str], bool], which: Callable[[str], str | None]
) -> list[str]:
    if not any(map(found, TRITONS)):
        where = "" if sys.platform == "linux" else ", which exists for Linux only"
        return [f"triton is not installed{where}; {EXTRA}"]
    if not any(map(which, filter(None, (os.environ.get("CC"), "gcc", "clang")))):
        return ["triton finds no C compiler to start its kernels with; on Debian and Ubuntu: apt install gcc"]
    if not exists(str(Path(sysconfig.get_path("include")) / "Python.h")):
        return ["triton finds no headers of this Python to start its kernels with; apt install python3-dev"]
    return []


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
