"""What is measured once and kept."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from thermocline.errors import HardwareError
from thermocline.hardware import bandwidth, disk, gpu_nvidia, probe
from thermocline.hardware.cache import recall, remember
from thermocline.hardware.disk import DiskSpeed, find_disk, measure_disk
from thermocline.hardware.gpu import GpuSpeed
from thermocline.hardware.gpu_card import Gpu
from thermocline.hardware.gpu_nvidia import find_nvidia
from thermocline.hardware.machine import Calls
from thermocline.hardware.probe import MemorySpeed, Probe, StepCosts, emulated, machine_of, probe_machine
from thermocline.hardware.survey import examine

CARD = Gpu(index=0, name="card", total=1 << 33, free=0, pcie=4, lanes=16, driver="1")
FAST = GpuSpeed(
    vram=1e12, link=2e10, vram_beside_ram=9e11, ram_beside_vram=9e9, link_beside_ram=1e10, ram_beside_link=7e9,
    vram_beside_link=8e11, link_beside_vram=2.1e10, flops=1e14, launch=3e-6, crossing=1e-5, sparse=0.6,
)  # fmt: skip


CALLS = Calls(attention=1e-5, predictor=2e-6, ffn=3e-6, head=4e-6)


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THERMOCLINE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(bandwidth, "BUFFER", 1 << 20)
    monkeypatch.setattr(bandwidth, "LARGE_CACHES", 0)
    monkeypatch.setattr(probe, "SECONDS", 0.005)
    monkeypatch.setattr(probe, "UNDISTURBED", 0.0)  # tests run beside others
    monkeypatch.setattr(probe, "CONTRADICTION", 1e9)
    monkeypatch.setattr(disk, "SCRATCH", 2 << 20)
    monkeypatch.setattr(disk, "SMALLEST", 2 << 20)
    monkeypatch.setattr(measure_disk, "__kwdefaults__", {"seconds": 0.002, "beside": None})
    return tmp_path / "home"


@pytest.fixture(scope="module")
def known() -> Probe:
    """A probe of this machine, as if it had been measured."""
    speed = DiskSpeed(
        device=find_disk(Path.cwd()).device, name="d", filesystem="f", direct=True, sequential=1e9,
        random=((4096, 1, 1e8), (4096, 4, 2e8), (65536, 1, 5e8)), beside_ram=1e8, ram_beside=1e9,
    )  # fmt: skip
    return Probe(
        measured=1.0, undisturbed=0.99, flops=1e11, launch=1e-6,
        memory=MemorySpeed(
            by_threads=((1, 1e10), (2, 2e10)), unpacking=((1, 2e10), (2, 4e10)), beside_device=8e9, sparse=0.7,
            sparse_batch=0.9,
        ),
        steps=StepCosts(host=CALLS, half=replace(CALLS, ffn=5e-6), crossing=1e-5, meeting=1e-4, between=5e-5),
        handover=1e-5, disks=(speed, replace(speed, device=find_disk(Path("/tmp")).device)), gpus=(CARD,),
        gpu_speeds=(FAST,), unmeasured=("x",),
    )  # fmt: skip


def test_everything_is_measured_once(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    survey, first = probe_machine(tell=told.append)
    assert len(told) == 3
    assert [n for n, _ in first.memory.by_threads][-1] == survey.cores.threads
    assert first.memory.best > 0
    assert min(first.flops, first.launch, first.handover, first.memory.beside_device) > 0
    (found,) = first.disks
    assert found.beside_ram > 0
    assert found.ram_beside > 0
    assert 0 < first.memory.sparse <= 1
    assert 0 < first.memory.sparse_batch <= 1
    assert {size for size, _, _ in found.random} == set(disk.SIZES)
    assert sorted(path.name for path in quick.iterdir()) == ["machine.json"]
    monkeypatch.setattr(probe, "_measured", None)  # what is kept is not measured again
    told.clear()
    again, kept = probe_machine(tell=told.append)
    here, _ = probe_machine()
    assert (kept, again.fingerprint) == (first, here.fingerprint)
    assert replace(again, memory=here.memory) == here  # but for what is free at the moment
    assert not told


def test_refresh_measures_again(monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = probe_machine()
    monkeypatch.setattr(probe, "flops_rate", lambda _: 123.0)
    assert probe_machine()[1].flops == first.flops
    assert probe_machine(refresh=True)[1].flops == 123.0
    assert probe_machine()[1].flops == 123.0


def test_another_machine_measures_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    survey, first = probe_machine()
    content = recall(survey.fingerprint)
    assert content is not None
    remember("another", {key: value for key, value in content.items() if key != "fingerprint"})
    monkeypatch.setattr(probe, "flops_rate", lambda _: 5.0)
    assert probe_machine()[1].flops == 5.0 != first.flops


@pytest.mark.parametrize(
    "damage",
    [
        lambda k: k.update(version=99),
        lambda k: k.pop("probe"),
        lambda k: k["probe"].pop("memory"),
        lambda k: k["probe"].update(flops="many"),
        lambda k: k["probe"].update(flops=float("nan")),
        lambda k: k["probe"].update(flops=-1),
        lambda k: k["probe"]["memory"].update(by_threads=[]),
        lambda k: k["probe"]["memory"].update(unpacking=[[1, 0.0], [2, 1.0]]),
        lambda k: k["probe"].pop("undisturbed"),
        lambda k: k["probe"]["steps"]["half"].update(ffn=-1.0),
        lambda k: k["probe"]["steps"].pop("meeting"),
        lambda k: k["probe"]["memory"].pop("sparse"),
        lambda k: k["probe"]["memory"].update(sparse_batch=0.0),
        lambda k: k["probe"]["disks"][0].update(random=[[4096, 1, 0.0]]),
        lambda k: k["probe"]["disks"][0].update(random=[]),
        lambda k: k["probe"].update(disks=3),
        lambda k: k["probe"].update(gpus=[{"index": 0}]),
        lambda k: k["probe"]["gpu_speeds"][0].update(ram_beside_link=0.0),
        lambda k: k["probe"]["gpu_speeds"][0].pop("vram_beside_ram"),
    ],
)
def test_a_damaged_file_is_not_trusted(quick: Path, monkeypatch: pytest.MonkeyPatch, known, damage) -> None:
    monkeypatch.setattr(probe, "_measured", lambda *_: replace(known, measured=known.measured + 1))
    monkeypatch.setattr(probe, "find_gpus", lambda: (CARD,))
    remember(examine().fingerprint, {"version": probe.VERSION, "probe": known.as_dict()})
    assert probe_machine()[1] == known
    kept = json.loads((quick / "machine.json").read_text())
    damage(kept)
    (quick / "machine.json").write_text(json.dumps(kept))
    assert probe_machine()[1].measured == known.measured + 1
    assert probe_machine()[1].measured == known.measured + 1


def test_no_disk_is_measured_where_none_is_asked_for() -> None:
    _, first = probe_machine(any_disk=False)
    assert not first.disks
    _, second = probe_machine()
    assert len(second.disks) == 1
    assert (second.memory, second.measured) == (first.memory, first.measured)


def test_a_new_disk_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = probe_machine()
    other = tmp_path / "model"
    other.write_bytes(np.random.default_rng(0).bytes(3 << 20))
    monkeypatch.setattr(disk, "_mount", lambda *_: ("otherfs", "/dev/other"))
    real = disk.find_disk
    monkeypatch.setattr(disk, "find_disk", lambda path: replace(real(path), device="9:9"))
    monkeypatch.setattr(probe, "find_disk", disk.find_disk)
    both = probe_machine(disk=other)[1]
    assert [d.device for d in both.disks] == [first.disks[0].device, "9:9"]
    assert both.memory == first.memory
    assert probe_machine(disk=other)[1] == both


def test_what_cannot_be_measured_is_said(quick: Path, tmp_path: Path) -> None:
    quick.write_text("a file, where a folder should be")
    told: list[str] = []
    _, found = probe_machine(tell=told.append)
    assert not found.disks
    assert "disk" in found.unmeasured[0]
    assert "THERMOCLINE_HOME" in told[-1]
    small = tmp_path / "small"
    small.write_bytes(b"x")
    with pytest.raises(HardwareError, match="tell nothing"):
        measure_disk(small)


def test_machines_for_placement(tmp_path: Path) -> None:
    survey, found = probe_machine()
    plain = machine_of(survey, found)
    assert plain.disk is None
    assert plain.gpu is None
    here = machine_of(survey, found, tmp_path)
    assert here.disk is not None
    assert here.disk.curve.bandwidth(4096) > 0
    assert machine_of(survey, found).fingerprint == plain.fingerprint
    split = emulated(plain, found, 1 << 20)
    assert split.gpu is not None
    assert split.gpu.capacity == 1 << 20
    assert split.meeting == 2 * found.handover
    assert split.gpu.sparse == plain.cpu.sparse == found.memory.sparse
    best = found.memory.best
    fast = replace(FAST, ram_beside_vram=0.9 * best, ram_beside_link=0.7 * best)
    with_gpu = machine_of(survey, replace(found, gpus=(CARD,), gpu_speeds=(fast,)), tmp_path)
    assert with_gpu.gpu is not None
    assert (with_gpu.gpu.bandwidth, with_gpu.gpu.bandwidth_busy, with_gpu.gpu.sparse) == (1e12, 9e11, 0.6)
    assert with_gpu.cpu.bandwidth_busy == 0.9 * best
    shares = with_gpu.shares
    assert shares.ram_beside_link == pytest.approx(0.7)
    assert (shares.link_beside_ram, shares.vram_beside_link, shares.link_beside_vram) == (0.5, 0.8, 1.0)
    assert (shares.ram_beside_disk, shares.disk_beside_ram) == (
        here.shares.ram_beside_disk,
        here.shares.disk_beside_ram,
    )
    (reads,) = found.disks
    alone = here.disk.curve.bandwidth(64 << 10)
    assert shares.disk_beside_ram == min(1.0, reads.beside_ram / alone)
    assert machine_of(survey, replace(found, gpus=(CARD,), gpu_speeds=(None,))).gpu is None


def test_an_emulated_device_and_its_host_have_half_of_the_threads_each(known: Probe) -> None:
    survey = examine()
    alone = replace(known, gpus=(), gpu_speeds=())
    plain = machine_of(survey, alone)
    assert (plain.cpu.bandwidth, plain.cpu.unpacking, plain.cpu.calls) == (2e10, 4e10, CALLS)
    split = emulated(plain, alone, 1 << 20)
    assert split.gpu is not None
    for side in (split.cpu, split.gpu):
        assert (side.bandwidth, side.bandwidth_busy, side.unpacking, side.flops) == (1e10, 8e9, 2e10, 5e10)
        assert side.calls == replace(CALLS, ffn=5e-6)
    assert (split.crossing, split.meeting, split.between) == (1e-5, 1e-4, 5e-5)
    assert machine_of(survey, known).cpu.calls is None  # a GPU's steps are replayed


def test_steps_are_measured_once_where_they_are_asked_for() -> None:
    costs = StepCosts(host=CALLS, half=CALLS, crossing=1e-5, meeting=1e-4, between=5e-5)
    _, first = probe_machine(any_disk=False)
    assert first.steps is None
    seen: list[Probe] = []

    def measure(_, found: Probe) -> StepCosts:
        seen.append(found)
        return costs

    _, second = probe_machine(any_disk=False, steps=measure)
    assert second == replace(first, steps=costs)
    assert probe_machine(any_disk=False, steps=measure)[1] == second
    assert seen == [first]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"undisturbed": 0.6}, "other programs took 40% of the processors"),
        ({"beside_device": 1.3e8}, "all threads read 20.0 GB/s of memory, half of them 0.1"),
        ({"by_threads": ((1, 4e10), (2, 2e10))}, "one thread reads 40.0 GB/s of memory, and all threads 20.0"),
        ({"unpacking": ((1, 2e10), (2, 8e10))}, "kernels read 45.0 GB/s of memory, and all threads 20.0"),
        ({}, ""),
    ],
)
def test_figures_that_contradict_one_another_are_doubted(monkeypatch: pytest.MonkeyPatch, known, change, words) -> None:
    monkeypatch.undo()
    memory = {key: value for key, value in change.items() if key != "undisturbed"}
    rest = {key: value for key, value in change.items() if key == "undisturbed"}
    assert replace(known, memory=replace(known.memory, **memory), **rest).doubt.startswith(words)
    assert bool(words) == bool(replace(known, memory=replace(known.memory, **memory), **rest).doubt)


def test_what_is_in_doubt_is_measured_again(monkeypatch: pytest.MonkeyPatch, known: Probe) -> None:
    monkeypatch.setattr(probe, "UNDISTURBED", 0.8)
    monkeypatch.setattr(probe, "find_gpus", tuple)
    shares = iter((0.5, 0.7, 0.6, 0.95))

    def measured(*_) -> Probe:
        return replace(known, measured=time.time(), undisturbed=next(shares), disks=(), gpus=(), gpu_speeds=())

    monkeypatch.setattr(probe, "_measured", measured)
    told: list[str] = []
    _, first = probe_machine(any_disk=False, tell=told.append)
    assert first.undisturbed == 0.7  # the better one of two turns, both of them disturbed
    assert "measuring again: other programs took 50%" in told[0]
    assert "doctor --refresh" in told[-1]
    assert probe_machine(any_disk=False)[1] == first
    monkeypatch.setattr(probe, "RETRY", -1.0)
    assert probe_machine(any_disk=False)[1].undisturbed == 0.95
    assert probe_machine(any_disk=False)[1].undisturbed == 0.95  # which nothing speaks against


def test_disks_are_found_by_their_mounts(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    device = find_disk(tmp_path).device
    mounts.write_text(f"1 2 {device} / / rw shared:1 - ext4 /dev/thing rw\nodd line\n")
    found = find_disk(tmp_path / "not" / "yet" / "there", mounts)
    assert (found.filesystem, found.name) == ("ext4", "/dev/thing")
    assert found.free > 0
    assert find_disk(tmp_path, tmp_path / "none").filesystem == "unknown"


def test_gpus_are_read_from_the_drivers_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_nvidia, "_from_library", lambda: None)
    text = "0, NVIDIA GeForce RTX 4090, 24564, 24000, 4, 16, 550.54, GPU-1\n"
    text += "1, Odd, [N/A], [N/A], [N/A], [N/A], x, GPU-2\nbroken\n"
    first, second = find_nvidia(lambda _: text)
    assert first == Gpu(
        index=0, name="NVIDIA GeForce RTX 4090", total=24564 << 20, free=24000 << 20, pcie=4, lanes=16, driver="550.54",
        uuid="GPU-1", visible="GPU-1",
    )  # fmt: skip
    assert second.total == second.pcie == 0

    def failing(_: list[str]) -> str:
        raise OSError("no driver")

    assert find_nvidia(failing) == ()
