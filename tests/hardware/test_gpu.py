"""What the driver tells of a GPU, from a library that is not the driver's."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from thermocline.hardware.gpu import find_gpus, own_bytes


class Library(SimpleNamespace):
    """Two GPUs; this process and another on the second."""

    class NVMLError(Exception):
        pass

    opened = 0
    told: Any = 700 << 20

    def nvmlInit(self) -> None:  # noqa: N802
        self.opened += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index > 1:
            raise self.NVMLError
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(total=24 << 30, free=(20 + handle) << 30)

    def nvmlDeviceGetName(self, handle: int) -> bytes:  # noqa: N802
        return b"card %d" % handle

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.1"

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: int) -> int:  # noqa: N802
        raise self.NVMLError

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: int) -> int:  # noqa: N802
        return 16

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:  # noqa: N802
        if handle == 0:
            raise self.NVMLError
        return [SimpleNamespace(pid=1, usedGpuMemory=5), SimpleNamespace(pid=os.getpid(), usedGpuMemory=self.told)]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return library


def test_gpus_are_told_in_torchs_order(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [(g.name, g.free >> 30, g.pcie, g.lanes) for g in find_gpus()] == [
        ("card 0", 20, 0, 16),
        ("card 1", 21, 0, 16),
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [g.name for g in find_gpus()] == ["card 1"]
    assert library.opened == 0


def test_what_this_process_holds(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_bytes(1) == 700 << 20
    assert own_bytes(1, process=1) == 5
    assert own_bytes(1, process=2) == 0  # of a container, say, whose numbers are others
    assert own_bytes(0) == own_bytes(2) == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert own_bytes(0) == 700 << 20
    library.told = None  # where processes are not told apart
    assert own_bytes(0) == 0
    assert library.opened == 0


def test_nothing_is_known_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert own_bytes() == 0
