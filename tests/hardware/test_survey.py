"""Memory, caches, bandwidth and what is remembered of them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from thermocline.errors import OutputError
from thermocline.hardware import bandwidth as bandwidth_module
from thermocline.hardware.bandwidth import Bandwidth, home, measure_bandwidth, recall, remember
from thermocline.hardware.memory import Memory, find_caches, find_memory
from thermocline.hardware.survey import examine

FAST = Bandwidth(single=10.0, all=20.0, threads=2, measured=1.0)


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
    assert 0.1 < found.single < 10_000
    assert 0.1 < found.all < 10_000
    assert found.threads == 2


def test_a_measurement_is_remembered_for_this_machine_only(own_home: Path) -> None:
    assert recall("abc") is None
    assert remember("abc", FAST) == own_home / "machine.json"
    assert recall("abc") == FAST
    assert recall("other") is None
    assert [path.name for path in own_home.iterdir()] == ["machine.json"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"fingerprint": "abc"}', '{"fingerprint": "abc", "bandwidth": 3}',
     '{"fingerprint": "abc", "bandwidth": {"single": "x", "all": 1, "threads": 1, "measured": 1}}'],
)  # fmt: skip
def test_a_damaged_file_is_measured_again(own_home: Path, text: str) -> None:
    own_home.mkdir()
    (own_home / "machine.json").write_text(text)
    assert recall("abc") is None


def test_a_home_that_cannot_be_written_is_told(own_home: Path) -> None:
    own_home.write_text("a file")
    with pytest.raises(OutputError, match="THERMOCLINE_HOME"):
        remember("abc", FAST)
    assert own_home.read_text() == "a file"


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("THERMOCLINE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert home() == tmp_path / "thermocline"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert home() == tmp_path / "me" / ".cache" / "thermocline"


@pytest.mark.usefixtures("small_probe")
def test_the_survey_measures_and_remembers(own_home: Path) -> None:
    survey = examine()
    assert survey.bandwidth is not None
    assert survey.bandwidth.threads == survey.cores.threads
    assert survey.isa[0] == "baseline"
    assert examine(measure=False).bandwidth == survey.bandwidth
    kept = json.loads((own_home / "machine.json").read_text())
    assert kept["fingerprint"] == survey.fingerprint
    assert survey.as_dict()["kernels"] == survey.isa[-1]


@pytest.mark.usefixtures("small_probe")
def test_a_survey_with_other_threads_is_not_remembered(own_home: Path) -> None:
    assert examine(threads=1).bandwidth is not None
    assert not own_home.exists()


@pytest.mark.usefixtures("small_probe")
def test_the_survey_works_without_a_home(own_home: Path) -> None:
    own_home.write_text("a file")
    assert examine().bandwidth is not None
