"""AMD's GPUs, from files as the kernel's driver makes them."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import pytest

from thermocline.hardware import gpu
from thermocline.hardware.gpu_amd import amd_bytes, find_amd
from thermocline.hardware.gpu_card import Maker
from thermocline.hardware.gpu_choice import choose_gpu, find_gpu

VARIABLES = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
UUIDS = [f"GPU-{number:016x}" for number in (0xABC, 0xDEF0123456789ABC)]


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def add_node(root: Path, number: int, gpu_id: int, properties: dict[str, int]) -> None:
    node = root / f"class/kfd/kfd/topology/nodes/{number}"
    put(node / "gpu_id", str(gpu_id))
    put(node / "properties", "\n".join(f"{name} {value}" for name, value in properties.items()))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A processor, two cards (as nodes 2 and 10, so that strings sort them otherwise), and one that is hidden."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    add_node(tmp_path, 0, 0, {"cpu_cores_count": 16, "simd_count": 0})
    add_node(tmp_path, 1, 77, {})
    cards = ((2, 111, 0xABC, 110000, 128, 24), (10, 222, 0xDEF0123456789ABC, 90010, 129, 64))
    for node, gpu_id, unique, target, minor, size in cards:
        told = {"simd_count": 192, "gfx_target_version": target, "drm_render_minor": minor, "unique_id": unique}
        add_node(tmp_path, node, gpu_id, told)
        device = tmp_path / f"class/drm/renderD{minor}/device"
        put(device / "mem_info_vram_total", str(size << 30))
        put(device / "mem_info_vram_used", str(1 << 30))
        put(device / "max_link_speed", "16.0 GT/s PCIe")
        put(device / "max_link_width", "16")
    put(tmp_path / "class/drm/renderD129/device/product_name", "AMD Instinct MI210")
    put(tmp_path / f"class/kfd/kfd/proc/{os.getpid()}/vram_222", str(5 << 20))
    return tmp_path


def test_cards_are_told_in_the_order_of_nodes(root: Path) -> None:
    first, second = find_amd(root)
    assert (first.index, first.name, first.total >> 30, first.free >> 30) == (0, "AMD gfx1100", 24, 23)
    assert (second.index, second.name, second.total >> 30, second.free >> 30) == (1, "AMD Instinct MI210", 64, 63)
    assert (first.pcie, first.lanes, first.maker) == (4, 16, Maker.AMD)
    assert first.driver == f"amdgpu {platform.release()}"
    assert [first.uuid, second.uuid] == UUIDS
    put(root / "module/amdgpu/version", "6.12.12")
    (root / "class/drm/renderD129/device/product_name").unlink()
    first, second = find_amd(root)
    assert (first.driver, second.name) == ("amdgpu 6.12.12", "AMD gfx90a")


@pytest.mark.parametrize(
    ("rocr", "hip", "cuda", "numbers", "visible"),
    [
        (None, None, None, [0, 1], ["0", "1"]),
        (None, "1,0", None, [1, 0], ["1", "0"]),
        (None, None, "1", [1], ["1"]),
        (None, "0", "1", [0], ["0"]),
        ("1", None, None, [1], ["0"]),
        (f"{UUIDS[1]},0", "1", None, [0], ["1"]),
        (None, "", None, [], []),
        (None, "1,-1,0", None, [1], ["1"]),
        (None, "7", None, [], []),
    ],
)
def test_variables_leave_cards_out_as_the_runtimes_do(
    root: Path, monkeypatch: pytest.MonkeyPatch, rocr: str | None, hip: str | None, cuda: str | None,
    numbers: list[int], visible: list[str],
) -> None:  # fmt: skip
    for name, value in zip(VARIABLES, (rocr, hip, cuda), strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)
    found = find_amd(root)
    assert [card.uuid for card in found] == [UUIDS[number] for number in numbers]
    assert [card.index for card in found] == list(range(len(numbers)))
    assert [card.visible for card in found] == visible


def test_what_a_process_holds(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert amd_bytes(1, os.getpid(), root) == 5 << 20
    assert amd_bytes(0, os.getpid(), root) == amd_bytes(1, 1, root) == amd_bytes(7, os.getpid(), root) == 0
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "1")
    assert amd_bytes(0, os.getpid(), root) == 5 << 20


def test_a_card_is_chosen_by_the_variable_of_its_runtime(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr("thermocline.hardware.gpu_nvidia.shutil.which", lambda _: None)
    monkeypatch.setattr(gpu, "find_amd", lambda: find_amd(root))
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "0,1")
    assert choose_gpu("mi210") == UUIDS[1]
    assert os.environ["HIP_VISIBLE_DEVICES"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert [card.name for card in gpu.find_gpus()] == ["AMD Instinct MI210"]
    assert find_gpu("0").uuid == UUIDS[0]  # numbers stay what they were
    assert choose_gpu("0") == UUIDS[0]
    assert os.environ["HIP_VISIBLE_DEVICES"] == "0"


@pytest.mark.parametrize(("built", "maker"), [(None, "NVIDIA"), (Maker.NVIDIA, "NVIDIA"), (Maker.AMD, "AMD")])
def test_where_both_makers_cards_are_torch_decides(
    root: Path, monkeypatch: pytest.MonkeyPatch, built: Maker | None, maker: str
) -> None:
    cards = find_amd(root)
    monkeypatch.setattr(gpu, "find_amd", lambda: cards)
    monkeypatch.setattr(gpu, "find_nvidia", lambda: ("NVIDIA",))
    monkeypatch.setattr(gpu, "amd_bytes", lambda index, process: "AMD")
    monkeypatch.setattr(gpu, "nvidia_bytes", lambda index, process: "NVIDIA")
    monkeypatch.setattr(gpu, "torch_maker", lambda: built)
    assert gpu.find_gpus() == (cards if maker == "AMD" else ("NVIDIA",))
    assert gpu.own_bytes() == maker


def test_there_are_none_without_a_driver(tmp_path: Path) -> None:
    assert find_amd(tmp_path) == ()
    assert amd_bytes(0, 1, tmp_path) == 0
