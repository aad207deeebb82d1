"""NVIDIA's GPUs: what their driver says of them."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any, Final
from uuid import UUID

from thermocline.hardware.gpu_card import Gpu, names_in

VARIABLE: Final = "CUDA_VISIBLE_DEVICES"
FIELDS: Final = ("index", "name", "memory.total", "memory.free", "pcie.link.gen.max", "pcie.link.width.max",
                 "driver_version", "uuid")  # fmt: skip
MIB = 1 << 20
DRIVER: Final = "libcuda.so.1"


def find_nvidia(run: Callable[[list[str]], str] | None = None) -> tuple[Gpu, ...]:
    """The GPUs that the driver tells of: through nvidia-ml-py, else through nvidia-smi; none where neither is.

    Those that `CUDA_VISIBLE_DEVICES` leaves, in its order: the order in which torch numbers them. Where it leaves all,
    the driver's tools go by the bus, and torch is told to do so too, which would put the fastest first.
    """
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if run is None:
        found = _from_library()
        if found is not None:
            return found
        if shutil.which("nvidia-smi") is None:
            return ()
        run = _smi
    try:
        query = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
        visible = names_in(os.environ.get(VARIABLE))
        text = run(query if visible is None else [*query, f"--id={','.join(visible)}"]) if visible != () else ""
    except (OSError, subprocess.SubprocessError):
        return ()
    gpus = [gpu for line in text.splitlines() if (gpu := _parsed(line)) is not None]
    return tuple(gpus) if visible is None else tuple(replace(gpu, index=i) for i, gpu in enumerate(gpus))


def nvidia_bytes(index: int, process: int) -> int:
    """Bytes that a process holds of a GPU by the driver's account; 0 where that is not told."""
    try:
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # as in `_from_library`
        return 0
    try:
        names = names_in(os.environ.get(VARIABLE))
        handle = _handle(nvml, str(index) if names is None else names[index])
        found = [p.usedGpuMemory for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == process]
    except (nvml.NVMLError, IndexError):
        return 0
    finally:
        nvml.nvmlShutdown()
    return int(found[0] or 0) if found else 0


def first_begun() -> str:
    """UUID of the first GPU that this process has, if it has begun to use the driver (by `is_available`, say).

    From then on `CUDA_VISIBLE_DEVICES` changes nothing. "" where the driver was not begun, or is not there.
    """
    try:
        driver = ctypes.CDLL(DRIVER)
        device, found = ctypes.c_int(), (ctypes.c_ubyte * 16)()
        # Neither call begins it: both fail then.
        told = driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDeviceGetUuid(found, device)
    except (OSError, AttributeError):
        return ""
    return "" if told else f"GPU-{UUID(bytes=bytes(found))}"


def _from_library() -> tuple[Gpu, ...] | None:
    try:
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # the package has its own class for each way in which there is no driver
        return None
    try:
        visible = names_in(os.environ.get(VARIABLE))
        names = visible if visible is not None else tuple(map(str, range(nvml.nvmlDeviceGetCount())))
        return tuple(_from_handle(nvml, i, _handle(nvml, name)) for i, name in enumerate(names))
    except nvml.NVMLError:  # a name that is none of this machine's
        return ()
    finally:
        nvml.nvmlShutdown()


def _handle(nvml: Any, name: str) -> Any:
    return nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdecimal() else nvml.nvmlDeviceGetHandleByUUID(name)


def _from_handle(nvml: Any, index: int, handle: Any) -> Gpu:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)

    def text(value: Any) -> str:
        return value.decode() if isinstance(value, bytes) else str(value)

    def link(name: str) -> int:
        try:
            return int(getattr(nvml, name)(handle))
        except nvml.NVMLError:
            return 0

    return Gpu(
        index=index,
        name=text(nvml.nvmlDeviceGetName(handle)),
        total=int(memory.total),
        free=int(memory.free),
        pcie=link("nvmlDeviceGetMaxPcieLinkGeneration"),
        lanes=link("nvmlDeviceGetMaxPcieLinkWidth"),
        driver=text(nvml.nvmlSystemGetDriverVersion()),
        uuid=text(nvml.nvmlDeviceGetUUID(handle)),
        visible=text(nvml.nvmlDeviceGetUUID(handle)),
    )


def _smi(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout  # noqa: S603


def _parsed(line: str) -> Gpu | None:
    words = [word.strip() for word in line.split(",")]
    if len(words) != len(FIELDS):
        return None
    index, name, total, free, pcie, lanes, driver, uuid = words

    def number(word: str) -> int:
        return int(word) if word.isdecimal() else 0

    return Gpu(
        index=number(index),
        name=name,
        total=number(total) * MIB,
        free=number(free) * MIB,
        pcie=number(pcie),
        lanes=number(lanes),
        driver=driver,
        uuid=uuid,
        visible=uuid,
    )
