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

DRIVERS: Final = {"/dev/nvidiactl": "NVIDIA", "/dev/kfd": "AMD"}
"""Files that a loaded driver makes."""
EXTRA: Final = "pip install 'thermocline[gpu]'"
TORCH_GPU: Final = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"


def gpu_lacks(
    found: Callable[[str], str | None] | None = None,
    exists: Callable[[str], bool] | None = None,
    which: Callable[[str], str | None] = shutil.which,
) -> tuple[str, ...]:
    """What keeps this installation from computing on a GPU, each with its remedy; nothing if nothing does.

    `found` gives the version of a package or None, `exists` says whether a file is there, `which` where a program is.
    """
    found, exists = found or _version, exists or (lambda path: Path(path).exists())
    lacks = []
    if not any(map(exists, DRIVERS)):
        lacks.append("no driver of a GPU is loaded; install the card's (nvidia-smi then lists it)")
    torch = found("torch")
    if torch is None:
        lacks.append(f"torch is not installed; {EXTRA}")
    elif torch.endswith("+cpu"):
        lacks.append(f"torch {torch} is built for the CPU only; {TORCH_GPU}")
    if found("triton") is None and found("pytorch-triton-rocm") is None:
        where = "" if sys.platform == "linux" else ", which exists for Linux only"
        lacks.append(f"triton is not installed{where}; {EXTRA}")
    elif not any(map(which, filter(None, (os.environ.get("CC"), "gcc", "clang")))):
        lacks.append("triton finds no C compiler to start its kernels with; on Debian and Ubuntu: apt install gcc")
    elif not exists(str(Path(sysconfig.get_path("include")) / "Python.h")):
        lacks.append("triton finds no headers of this Python to start its kernels with; apt install python3-dev")
    if exists("/dev/nvidiactl") and found("cuda-bindings") is None:
        lacks.append(f"cuda-bindings is not installed: crossings take a slower way; {EXTRA}")
    return tuple(lacks)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
