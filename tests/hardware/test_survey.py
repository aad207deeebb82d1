"""Memory, caches, bandwidth and what is remembered of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from thermocline.errors import OutputError
from thermocline.hardware import bandwidth as bandwidth_module
from thermocline.hardware.bandwidth import measure_bandwidth
from thermocline.hardware.cache import home, recall, remember
from thermocline.hardware.cores import is_guest
from thermocline.hardware.memory import Memory, find_caches, find_memory, own_memory
from thermocline.hardware.survey import examine
from thermocline.ops.cpu import CpuOps


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THERMOCLINE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth_module, "BUFFER", 1 << 20)
    monkeypatch.setattr(bandwidth_module, "MOST", 1 << 20)
    monkeypatch.setattr("thermocline.hardware.survey.measure_bandwidth", partial(measure_bandwidth, seconds=0.01))


def test_caches_are_read_from_the_system(tmp_path: Path) -> None:
    for index, (level, kind, size, shared) in enumerate(
        [("1", "Data", "48K", "0"), ("1", "Instruction", "32K", "0"), ("3", "Unified", "32M", "0-3,8")]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared)):
            (folder / name).write_text(text + "\n")
    (tmp_path / "index9").mkdir()
    assert [(c.name, c.size, c.shared_by) for c in find_caches(tmp_path)] == [("L1", 48 << 10, 1), ("L3", 32 << 20, 5)]
    assert find_caches(tmp_path / "none") == ()


def test_a_process_takes_its_heap_and_libraries_but_not_the_files_it_maps(tmp_path: Path) -> None:
    parts = [("[heap]", 100), ("", 20), ("/usr/lib/libm.so.6", 3), ("/usr/bin/python3.11", 4), ("/models/m.gguf", 5000)]
    lines = []
    for name, size in parts:
        lines += [
            f"55d0-55d8 r-xp 00000000 08:02 77 {name}".rstrip(),
            f"Size: {9 * size} kB",
            f"Rss: {size} kB",
            "Pss: 1 kB",
        ]
    maps = tmp_path / "smaps"
    maps.write_text("\n".join([*lines, "VmFlags: rd ex"]))
    assert own_memory(maps) == 127 << 10
    assert own_memory(tmp_path / "none") == 0
    assert own_memory() > 10 << 20


def test_memory_is_limited_by_the_control_group(tmp_path: Path) -> None:
    pages = tmp_path / "enabled"
    pages.write_text("always [madvise] never\n")
    memory = find_memory(pages)
    assert memory.huge_pages == "madvise"
    assert 0 < memory.available <= memory.total
    assert Memory(100, 50, 30, 4096, "never").usable == 30
    assert Memory(100, 50, None, 4096, "never").usable == 100
    assert find_memory(tmp_path / "none").huge_pages == "unknown"


@pytest.mark.usefixtures("small_probe")
def test_bandwidth_is_measured() -> None:
    found = measure_bandwidth(2, seconds=0.01)
    assert found.single > 0
    assert found.all > 0
    assert found.threads == 2


def test_a_measurement_is_remembered_for_this_machine_only(own_home: Path) -> None:
    assert recall("abc") is None
    assert remember("abc", {"x": 1}) == own_home / "machine.json"
    assert recall("abc") == {"fingerprint": "abc", "x": 1}
    assert recall("other") is None
    assert [path.name for path in own_home.iterdir()] == ["machine.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"fingerprint": 3}', "[" * 100_000])
def test_a_damaged_file_is_measured_again(own_home: Path, text: str) -> None:
    own_home.mkdir()
    (own_home / "machine.json").write_text(text)
    assert recall("abc") is None


def test_a_home_that_cannot_be_written_is_told(own_home: Path) -> None:
    own_home.write_text("a file")
    with pytest.raises(OutputError, match="THERMOCLINE_HOME"):
        remember("abc", {})
    assert own_home.read_text() == "a file"


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("THERMOCLINE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert home() == tmp_path / "thermocline"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert home() == tmp_path / "me" / ".cache" / "thermocline"


@pytest.mark.usefixtures("small_probe")
def test_the_survey_measures_if_asked() -> None:
    assert examine().bandwidth is None
    survey = examine(measure=True)
    assert survey.bandwidth is not None
    assert survey.bandwidth.threads == survey.cores.threads
    assert survey.isa[0] == "baseline"
    assert survey.as_dict()["kernels"] == survey.kernels
    assert CpuOps(1).name == f"cpu/{survey.kernels}"
    assert survey.fingerprint == examine().fingerprint
    one = examine(measure=True, threads=1).bandwidth
    assert one is not None
    assert one.single == one.all


def test_a_guest_is_told_by_its_processors(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: A hypervisor's dream\nflags\t\t: fpu sse2 avx\n")
    assert not is_guest(cpuinfo)
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu sse2 hypervisor avx\n")
    assert is_guest(cpuinfo)
    assert not is_guest(tmp_path / "none")
