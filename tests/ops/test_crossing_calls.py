"""The calls of the driver, as cuda-bindings and ctypes make them: a driver that is none gets what is meant."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from thermocline.config import CrossingKind
from thermocline.errors import HardwareError
from thermocline.ops.cuda import crossing
from thermocline.ops.cuda.crossing import HIP, Captures, HostDriver

FAKE = Path(__file__).parent / "fake_driver"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a libcuda that keeps what a stream is given, and does it for every launch."""
    folder = tmp_path_factory.mktemp("driver")
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(folder / "libcuda.so.1"), str(FAKE / "libcuda.c"), "-ldl"]
    subprocess.run(command, check=True, timeout=60)
    return folder


@pytest.mark.parametrize(
    ("way", "kept"),
    [
        pytest.param("memory", 9, marks=pytest.mark.skipif(find_spec("cuda") is None, reason="needs cuda-bindings")),
        ("calls", 6),
    ],
)
def test_what_a_stream_was_given_works_in_every_launch(library: Path, way: str, kept: int) -> None:
    command = [sys.executable, str(FAKE / "cross.py"), way]
    environment = os.environ | {"LD_LIBRARY_PATH": str(library)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["20", str(kept), "True"]


def test_what_is_captured_is_launched_and_let_go(library: Path) -> None:
    path, stream, seen = str(library / "libcuda.so.1"), 0x7ABC, []
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(seen.append)
    function = ctypes.cast(call, ctypes.c_void_p).value or 0
    driver, fake, captures = HostDriver(path), ctypes.CDLL(path), Captures(path)
    with captures.captured(stream, lambda: driver.cuLaunchHostFunc(stream, function, 5)) as launch:
        assert not seen
        launch()
        launch()
        assert fake.graphs() == 2
    assert seen == [5, 5]
    with pytest.raises(HardwareError, match="901"), captures.captured(stream, fake.spoil):
        pass
    with pytest.raises(ZeroDivisionError), captures.captured(stream, lambda: 1 // 0):  # type: ignore[arg-type, return-value]
        pass
    with pytest.raises(HardwareError, match=r"\(1\)"), captures.captured(stream + 1, fake.spoil):
        pass
    assert fake.graphs() == 0
    with captures.captured(stream, lambda: None):
        assert fake.graphs() == 2


def test_without_a_driver_there_are_no_calls_of_the_host() -> None:
    for kind in (HostDriver, Captures):
        with pytest.raises(OSError, match="no driver"):
            kind("no driver.so.1")


def test_a_torch_for_rocm_brings_the_driver_of_its_streams(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    (library / "lib").mkdir()
    source = library / "hip.c"
    source.write_text("int hipLaunchHostFunc(void* a, void* b, void* c) { return a == b && b == c ? 0 : 7; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library / HIP), str(source)], check=True, timeout=60)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch, "__file__", str(library / "__init__.py"))
    driver = crossing._driver(CrossingKind.CALLS)
    assert driver.cuLaunchHostFunc(1, 1, 1) == (0,)
    assert driver.cuLaunchHostFunc(1, 2, 3) == (7,)
    with pytest.raises(HardwareError, match="built for ROCm"):
        crossing._driver(CrossingKind.MEMORY)
