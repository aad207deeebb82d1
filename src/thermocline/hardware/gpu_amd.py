"""AMD's GPUs: what the kernel's driver says of them.

Formats: the Linux kernel's amdgpu and amdkfd, which tell of themselves below /sys. HIP numbers GPUs by the nodes of
kfd's topology, after ROCR_VISIBLE_DEVICES, and then HIP_VISIBLE_DEVICES (else CUDA_VISIBLE_DEVICES), left some out.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from thermocline.hardware.gpu_card import Gpu, Maker, names_in

VARIABLE: Final = "HIP_VISIBLE_DEVICES"
SYS: Final = Path("/sys")
GENERATIONS: Final = {"2.5": 1, "5.0": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}
"""Of PCIe, by the billions of transfers a second of a lane."""


def find_amd(sys: Path = SYS) -> tuple[Gpu, ...]:
    """The GPUs that the driver lets this process use, as HIP numbers them; none where there is no driver."""
    rocr = names_in(os.environ.get("ROCR_VISIBLE_DEVICES"))
    hip = names_in(os.environ.get(VARIABLE, os.environ.get("CUDA_VISIBLE_DEVICES")))
    there = [_gpu(sys, node) for node in _nodes(sys)]
    left = there if rocr is None else [gpu for name in rocr if (gpu := _named(there, name)) is not None]
    left = [replace(gpu, visible=str(i)) for i, gpu in enumerate(left)]
    if hip is not None:
        left = [gpu for name in hip if (gpu := _named(left, name)) is not None]
    return tuple(replace(gpu, index=i) for i, gpu in enumerate(left))


def amd_bytes(index: int, process: int, sys: Path = SYS) -> int:
    """Bytes that a process holds of a GPU by the driver's account; 0 where that is not told."""
    wanted = [gpu.uuid for gpu in find_amd(sys)[index : index + 1]]
    for node in _nodes(sys):
        if [_uuid(node)] == wanted:
            return _number(sys / f"class/kfd/kfd/proc/{process}/vram_{_text(node / 'gpu_id')}")
    return 0


def _nodes(sys: Path) -> Iterator[Path]:
    """Nodes of the topology that compute, which a node that is hidden from this process does not tell."""
    folder = sys / "class/kfd/kfd/topology/nodes"
    numbers = sorted(int(node.name) for node in folder.glob("*") if node.name.isdecimal())
    for number in numbers:
        node = folder / str(number)
        if _text(node / "gpu_id") not in ("", "0") and _properties(node).get("simd_count", 0) > 0:
            yield node


def _gpu(sys: Path, node: Path) -> Gpu:
    told = _properties(node)
    device = sys / f"class/drm/renderD{told.get('drm_render_minor', 0)}/device"
    total = _number(device / "mem_info_vram_total")
    speed, _, _ = _text(device / "max_link_speed").partition(" ")
    return Gpu(
        index=0,
        name=_text(device / "product_name") or f"AMD {_target(told.get('gfx_target_version', 0))}",
        total=total,
        free=max(0, total - _number(device / "mem_info_vram_used")),
        pcie=GENERATIONS.get(speed, 0),
        lanes=_number(device / "max_link_width"),
        driver=f"amdgpu {_text(sys / 'module/amdgpu/version') or platform.release()}",
        uuid=_uuid(node),
        maker=Maker.AMD,
    )


def _named(gpus: list[Gpu], name: str) -> Gpu | None:
    if name.isdecimal():
        return gpus[int(name)] if int(name) < len(gpus) else None
    return next((gpu for gpu in gpus if gpu.uuid == name), None)


def _uuid(node: Path) -> str:
    """As ROCr writes it; of a GPU without a number of its own, its node."""
    number = _properties(node).get("unique_id", 0)
    return f"GPU-{number:016x}" if number else f"GPU-{_text(node / 'gpu_id')}"


def _target(version: int) -> str:
    """`gfx90a` of 90010: two digits each of the version, what it is revised to and the step, which is hexadecimal."""
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def _properties(node: Path) -> dict[str, int]:
    words = (line.split() for line in _text(node / "properties").splitlines())
    return {pair[0]: int(pair[1]) for pair in words if len(pair) == 2 and pair[1].isdecimal()}


def _number(path: Path) -> int:
    text = _text(path)
    return int(text) if text.isdecimal() else 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
