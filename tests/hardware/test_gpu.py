"""What the driver tells of a GPU, from a library that is not the driver's."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest

import thermocline
from thermocline.config import DeviceKind, LoadSettings, TrainDevice, TrainSettings
from thermocline.errors import HardwareError, UsageError
from thermocline.hardware import gpu as measuring
from thermocline.hardware.bandwidth import Load
from thermocline.hardware.gpu import GpuSpeed, find_gpus, measure_gpu, own_bytes
from thermocline.hardware.gpu_choice import choose_gpu
from thermocline.hardware.gpu_nvidia import first_begun
from thermocline.runtime.training import one_gpu


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

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return f"GPU-{handle}abc"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        return int(uuid[4])

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
    monkeypatch.setattr("thermocline.hardware.gpu_nvidia.DRIVER", "libnone.so")  # this machine's may have been begun
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


@pytest.mark.parametrize("wanted", ["1", "GPU-1abc", "card 1", "CARD 1"])
def test_a_gpu_is_chosen_by_number_uuid_or_name(library: Library, monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert choose_gpu(wanted) == "GPU-1abc"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-1abc"
    assert [(g.index, g.name) for g in find_gpus()] == [(0, "card 1")]
    assert own_bytes(0) == 700 << 20
    assert choose_gpu("GPU-1abc") == "GPU-1abc"  # once more
    assert choose_gpu("1") == "GPU-1abc"  # numbers stay what they were
    assert choose_gpu("0") == "GPU-0abc"
    assert [g.name for g in find_gpus()] == ["card 0"]


@pytest.mark.parametrize(("wanted", "words"), [("2", "no GPU"), ("card", "more than one"), ("GPU-", "no GPU")])
def test_a_gpu_that_is_not_there_is_refused_with_what_is(library: Library, wanted: str, words: str) -> None:
    with pytest.raises(HardwareError, match=rf"{words}.*0: card 0 \(GPU-0abc\); 1: card 1"):
        choose_gpu(wanted)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_a_process_that_uses_a_gpu_chooses_no_other(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True))
    monkeypatch.setitem(sys.modules, "torch", torch)
    with pytest.raises(UsageError, match="CUDA_VISIBLE_DEVICES=GPU-1abc before the start"):
        choose_gpu("1")


class Cuda:
    """The driver of a process: the first of its GPUs, or what it answers where it was not begun."""

    uuid = bytes.fromhex("0a0b0c0d000102030405060708090a0b")

    def __init__(self, answer: int = 0) -> None:
        self.answer = answer

    def cuDeviceGet(self, device: Any, number: int) -> int:  # noqa: N802
        return self.answer

    def cuDeviceGetUuid(self, found: Any, device: Any) -> int:  # noqa: N802
        found[:] = self.uuid
        return 0


def test_a_driver_that_was_begun_keeps_its_gpu(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torch has only been asked whether there is one."""
    torch = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr("thermocline.hardware.gpu_nvidia.ctypes.CDLL", lambda name: Cuda())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    for wanted in ("0", "1"):
        with pytest.raises(UsageError, match=f"CUDA_VISIBLE_DEVICES=GPU-{wanted}abc before the start"):
            choose_gpu(wanted)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    first = "GPU-0a0b0c0d-0001-0203-0405-060708090a0b"
    assert first_begun() == first
    monkeypatch.setattr(Library, "nvmlDeviceGetUUID", lambda *_: first)
    assert choose_gpu("0") == first


@pytest.mark.parametrize("driver", [Cuda(3), None])
def test_a_driver_that_was_not_begun_takes_any(monkeypatch: pytest.MonkeyPatch, driver: Cuda | None) -> None:
    def load(name: str) -> Cuda:
        if driver is None:
            raise OSError(f"{name}: cannot open shared object file")
        return driver

    monkeypatch.setattr("thermocline.hardware.gpu_nvidia.ctypes.CDLL", load)
    assert first_begun() == ""


def test_a_model_is_loaded_for_the_gpu_of_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LoadSettings(device="cuda:1") == LoadSettings(device=DeviceKind.CUDA, gpu="1")  # type: ignore[arg-type]
    for device, gpu in (("cpu", "1"), ("cuda", " "), ("cuda:", None), ("cuda:1", "1"), ("cpu:1", None)):
        with pytest.raises(UsageError, match=r"gpu|device is cpu:1; allowed: .*cuda:1"):
            LoadSettings(device=device, gpu=gpu)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr("thermocline.hardware.gpu_nvidia.shutil.which", lambda _: None)
    with pytest.raises(HardwareError, match="no GPU is called 1; there are none"):
        thermocline.LLM.load(device="cuda:1")


def test_what_trains_is_chosen_alike(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TrainSettings(train_on="cuda:1")  # type: ignore[arg-type]
    assert settings == TrainSettings(train_on=TrainDevice.CUDA, train_gpu="1")
    for wrong in (
        {"train_on": "cpu", "train_gpu": "1"},
        {"train_on": "cuda:1", "train_gpu": "1"},
        {"train_on": "tpu:1"},
    ):
        with pytest.raises(UsageError, match="train-"):
            TrainSettings(**wrong)  # type: ignore[arg-type]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    cuda = LoadSettings(device=DeviceKind.CUDA)
    with pytest.raises(UsageError, match="0 is to compute and 1 to train"):
        one_gpu(replace(cuda, gpu="0"), settings)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert one_gpu(replace(cuda, gpu="card 1"), settings).gpu == "GPU-1abc"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-1abc"
    assert one_gpu(cuda, settings) is cuda
    with pytest.raises(HardwareError, match="no GPU is called 7; there are 0: card 0"):
        one_gpu(cuda, TrainSettings(train_on="cuda:7"))  # type: ignore[arg-type]


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


# --- what is measured -------------------------------------------------------------------------------------------------


class Stream:
    """A stream of a device that is the host: it notes which loads run in it."""

    def __init__(self, _: Any) -> None:
        self.waited = 0

    def synchronize(self) -> None:
        self.waited += 1


class Graph:
    """What was called while it was captured, once more."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


class Torch:
    """torch, as if the host were a GPU; it has graphs if `captures` says whether calls can be captured."""

    def __init__(self, captures: bool | None = None) -> None:
        self.real = pytest.importorskip("torch")
        self.captures, self.graphs = captures, list[Graph]()
        self.cuda = SimpleNamespace(
            is_available=lambda: True, is_initialized=lambda: True, mem_get_info=lambda _: (1 << 30, 1 << 31),
            synchronize=lambda _: None, empty_cache=lambda: None, Stream=Stream, stream=self.within,
        )  # fmt: skip
        if captures is not None:
            self.cuda.CUDAGraph, self.cuda.graph = Graph, self.graph

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def device(self, *_: Any) -> Any:
        return self.real.device("cpu")

    @contextmanager
    def within(self, stream: Stream) -> Iterator[None]:
        yield

    @contextmanager
    def graph(self, graph: Graph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        self.graphs.append(graph)
        yield
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")

    def ones(self, *size: Any, **more: Any) -> Any:
        array = self.real.ones(*size, **more)
        array.pin_memory = lambda: array
        return array


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("BUFFER", 1 << 19), ("ROW", 1 << 10), ("SIDE", 32)):
        monkeypatch.setattr(measuring, name, value)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("captures", [True, False])
def test_launches_are_those_of_a_graph_where_there_is_one(monkeypatch: pytest.MonkeyPatch, captures: bool) -> None:
    torch = Torch(captures)
    monkeypatch.setitem(sys.modules, "torch", torch)
    found = measure_gpu(0, Load(rate=lambda: 5e9, once=lambda: 5e9))
    assert found is not None
    assert found.launch > 0
    assert [graph.replays > 10 for graph in torch.graphs] == [captures]


@pytest.mark.usefixtures("small")
def test_passes_over_vram_are_waited_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    torch, calls = Torch(), list[str]()
    real, wait = torch.real.Tensor.sum, Stream.synchronize
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(torch.real.Tensor, "sum", lambda *a: real(*a) if calls.append("sum") is None else None)
    monkeypatch.setattr(Stream, "synchronize", lambda stream: wait(stream) if calls.append("wait") is None else None)
    assert measure_gpu(0, Load(rate=lambda: 5e9, once=lambda: 5e9)) is not None
    at = [i for i, name in enumerate(calls) if name == "sum"]
    last = max(at)
    assert calls[last - 7 : last + 2] == ["sum"] * 8 + ["wait"]


@pytest.mark.usefixtures("small")
def test_every_two_that_work_at_once_are_measured_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", Torch())
    calls = {"rate": 0, "once": 0}

    def count(name: str) -> float:
        calls[name] += 1
        return 5e9

    found = measure_gpu(0, Load(rate=lambda: count("rate"), once=lambda: count("once")))
    assert found is not None
    assert found.ram_beside_vram == found.ram_beside_link == 5e9
    assert calls["rate"] == 2  # beside VRAM and beside the link
    assert calls["once"] >= 2  # and these beside RAM
    assert all(value > 0 for name, value in asdict(found).items() if name != "context")
    assert found.sparse <= 1
    assert GpuSpeed(**asdict(found)) == found
