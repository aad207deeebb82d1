"""What is known of a GPU without using it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from itertools import takewhile


class Maker(StrEnum):
    """Who made a GPU, by the name of its driver."""

    NVIDIA = "NVIDIA"
    AMD = "AMD"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU: bytes of VRAM, generation and lanes of its PCIe link (0: unknown).

    `visible` is what its runtime's variable (CUDA_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES) is to hold for a process to see
    this GPU alone.
    """

    index: int
    name: str
    total: int
    free: int
    pcie: int
    lanes: int
    driver: str
    uuid: str = ""
    maker: Maker = Maker.NVIDIA
    visible: str = ""


def names_in(text: str | None) -> tuple[str, ...] | None:
    """The GPUs that a runtime's variable names, up to the first that is no name; None where it is not set."""
    if text is None:
        return None
    names = (name.strip() for name in text.split(","))
    return tuple(takewhile(lambda name: name.isdecimal() or name.startswith(("GPU-", "MIG-")), names))
