"""Machines from the catalogue."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermocline.errors import HardwareError, UsageError
from thermocline.hardware.catalogue import COMPUTERS, CPUS, DISKS, GPUS, MEMORIES, REACHED, machine
from thermocline.hardware.machine import Machine, Processor, ReadCurve, Shares


def test_the_papers_computers_have_the_papers_bandwidths() -> None:
    high, low = machine("pc-high"), machine("PC-Low")
    assert high.cpu.bandwidth == pytest.approx(67.2e9 * REACHED.ram)
    assert low.cpu.bandwidth == pytest.approx(38.4e9 * REACHED.ram)
    assert (high.cpu.capacity >> 30, low.cpu.capacity >> 30) == (192, 64)
    assert high.gpu is not None
    assert low.gpu is not None
    assert (high.gpu.capacity >> 30, low.gpu.capacity >> 30) == (24, 11)
    assert high.gpu.bandwidth == pytest.approx(1008e9 * REACHED.vram)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("cpu", CPUS)
def test_every_pair_makes_a_machine(gpu: str, cpu: str) -> None:
    found = machine(f"{gpu}+{cpu}")
    assert found.gpu is not None
    assert found.gpu.bandwidth > found.cpu.bandwidth > 0
    assert 1e9 < found.link < 64e9
    shares = found.shares
    drawn = found.cpu.bandwidth * shares.ram_beside_link + found.link * shares.link_beside_ram
    assert drawn == pytest.approx(found.cpu.bandwidth)  # all that the memory has
    assert shares.ram_beside_link < shares.vram_beside_link < 1
    assert "public" in found.source


@pytest.mark.parametrize("part", [*MEMORIES, *DISKS, "48gib"])
def test_every_part_can_be_named(part: str) -> None:
    machine(f"i5-12400+{part}")


def test_parts_in_any_order_and_no_gpu() -> None:
    found = machine("32gib+nvme-gen3+ryzen-7-5800x+ddr4-3600")
    assert found.gpu is None
    assert found.disk is not None
    assert found.cpu.capacity == 32 << 30
    assert found.cpu.bandwidth == pytest.approx(57.6e9 * REACHED.ram)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rtx-4091+i9-13900k", "did you mean rtx-4090"), ("rtx-4090", "names no CPU"), ("", "not in the catalogue"),
        ("i9-13900k+i5-12400", "two parts of the kind cpu"), ("i9-13900k+0gib", "not in"), ("i9-13900k+", "not in"),
        ("i9-13900k+\x1b[31m", "not in"),
    ],
)  # fmt: skip
def test_unknown_parts_are_refused(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as refusal:
        machine(name)
    assert "\x1b" not in str(refusal.value)


def test_fingerprints_tell_machines_apart_but_not_measurements() -> None:
    names = [machine(name).fingerprint for name in (*COMPUTERS, "i5-12400", "i5-12400+32gib", "t4+i5-12400")]
    assert len(set(names)) == len(names)
    one = machine("i5-12400")
    slower = Machine(
        name="x",
        cpu=Processor(
            name=one.cpu.name, capacity=one.cpu.capacity, bandwidth=1e9, bandwidth_busy=1e9, flops=1e9, launch=0.0
        ),
    )
    assert slower.fingerprint == one.fingerprint


@given(st.floats(1, 1e8), st.floats(1, 1e8))
def test_longer_reads_take_longer_but_run_faster(a: float, b: float) -> None:
    curve = ReadCurve(((4096, 1e8), (65536, 6e8), (1 << 20, 2e9)))
    a, b = sorted((a, b))
    assert curve.bandwidth(a) <= curve.bandwidth(b) * (1 + 1e-12)
    assert a / curve.bandwidth(a) <= b / curve.bandwidth(b) * (1 + 1e-12)
    for size, rate in curve.points:
        assert curve.bandwidth(size) == pytest.approx(rate)


@pytest.mark.parametrize(
    "points", [(), ((0, 1.0),), ((4, 0.0),), ((4, math.nan),), ((8, 1.0), (4, 2.0)), ((4, 1.0),) * 2]
)
def test_impossible_curves_are_refused(points: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(HardwareError):
        ReadCurve(points)


@pytest.mark.parametrize(
    "change",
    [
        {"bandwidth": 0.0},
        {"bandwidth_busy": 2e9},
        {"flops": math.inf},
        {"launch": -1.0},
        {"sparse": 0.0},
        {"sparse": 1.1},
    ],
)
def test_impossible_processors_are_refused(change: dict[str, float]) -> None:
    sound = {"name": "p", "capacity": 1, "bandwidth": 1e9, "bandwidth_busy": 1e9, "flops": 1e9, "launch": 0.0}
    Processor(**sound)  # type: ignore[arg-type]
    with pytest.raises(HardwareError):
        Processor(**(sound | change))  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, math.nan])
def test_impossible_shares_are_refused(share: float) -> None:
    with pytest.raises(HardwareError, match="ram_beside_link"):
        Shares(ram_beside_link=share)
