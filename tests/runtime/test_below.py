"""A model under a budget of RAM that it does not fit: the same tokens, within the budget, and refusals in words."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from thermocline import LLM, plan
from thermocline.errors import BudgetError
from thermocline.files.open import open_model
from thermocline.hardware.machine import Tier
from thermocline.hardware.probe import MemorySpeed
from thermocline.memory import pieces
from thermocline.memory.bundle import bundle_path
from thermocline.memory.convert import convert
from thermocline.placement.ledger import Purpose
from thermocline.placement.workload import Overheads
from thermocline.runtime import planning
from thermocline.runtime.split import measured_of

GREEDY = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}
RAM = Tier.RAM


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, own_home: None) -> None:
    """What a run needs beside the model, in the scale of tiny models."""
    bare = Overheads(staging=20_000, reading=0, graphs=0, margin_vram=0, margin_ram=0)
    monkeypatch.setattr("thermocline.runtime.planning.Overheads", lambda: bare)
    monkeypatch.setattr(pieces, "PIECE", 3 << 10)
    monkeypatch.setattr("thermocline.runtime.below.PIECES_BYTES", 5 * (3 << 10))
    monkeypatch.setattr("thermocline.runtime.below.IN_FLIGHT", 0)


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch, small: None, tmp_path: Path) -> None:
    """A machine whose figures do not depend on what else it does while it is measured."""
    survey, probe = planning.probe_machine(disk=tmp_path)
    reads = ((4096, 4, 1e8), (65536, 4, 1.3e9), (1 << 20, 4, 1.8e9))
    disks = tuple(
        replace(disk, sequential=1.8e9, random=reads, beside_ram=1.7e9, ram_beside=2.2e10) for disk in probe.disks
    )
    memory = MemorySpeed(
        by_threads=((1, 1.5e10), (2, 3e10)),
        unpacking=((1, 3e10), (2, 6e10)),
        beside_device=8e9,
        sparse=0.6,
        sparse_batch=0.85,
    )
    known = replace(probe, memory=memory, flops=2e11, launch=1e-6, handover=1e-5, steps=None, disks=disks)
    monkeypatch.setattr(planning, "probe_machine", lambda **_: (survey, known))


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    with open_model(tiny_model) as source:
        convert(source, tmp_path / "tiny.gguf", None, records=True)
    return tmp_path / "tiny.gguf"


@pytest.mark.usefixtures("steady")
def test_the_tokens_are_those_without_a_budget(model: Path) -> None:
    with LLM.load(model, threads=1) as llm:
        wanted = llm.generate("hello", **GREEDY).tokens
    whole = plan(model, ram_budget="2GiB").plan.bytes_of(RAM)
    seen = set()
    for less in (1_000, 30_000, 60_000):
        budget = f"{whole - less}B"
        with LLM.load(model, threads=1, ram_budget=budget) as llm:
            assert llm.generate("hello", **GREEDY).tokens == wanted
            placed = llm.plan
            assert placed is not None
            loaded = llm._loaded
            assert loaded.placing.memory.is_true
            assert loaded.placing.memory.ledger.used(RAM) <= whole - less
            cut = any(layer.warm < placed.n_ff for layer in placed.layers)
            seen.add((cut, Tier.DISK in (layer.home for layer in placed.layers)))
            assert loaded.placing.below.stats.requests > 0
            seconds, homes = loaded.engine.account.seconds, {layer.home for layer in placed.layers}
            assert {name for name in seconds if name.startswith("attention")} == {f"attention {home}" for home in homes}
            measured = measured_of(placed, loaded.engine.account)
            assert measured is not None
            assert (measured.attention_disk != 1.0) == (Tier.DISK in homes)
    assert {disk for _, disk in seen} == {False, True}
    assert (True, False) in seen
    assert bundle_path(model).is_file()


def test_where_all_fits_nothing_is_set_aside_for_the_disk(model: Path) -> None:
    whole = plan(model, ram_budget="2GiB").plan
    with LLM.load(model, threads=1, ram_budget=f"{whole.bytes_of(RAM)}B") as llm:
        llm.generate("hello", **GREEDY)
        memory = llm._loaded.placing.memory
        assert not llm._loaded.placing.below.reads
        assert memory.is_true
        assert memory.ledger.used(RAM) <= whole.bytes_of(RAM)
        assert memory.ledger.used(RAM, Purpose.STAGING) == 0


def test_too_little_for_anything_names_what_would_do(model: Path) -> None:
    with pytest.raises(BudgetError, match="ram-budget"):
        LLM.load(model, threads=1, ram_budget="20KiB")


def test_the_standard_layout_has_no_disk_tier(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "standard.gguf"
    shutil.copy(tiny_model, path)
    planned = plan(path, ram_budget="2GiB")
    assert any("convert" in line for line in planned.notices)
    with pytest.raises(BudgetError, match="ram-budget") as refusal:
        LLM.load(path, threads=1, ram_budget=f"{planned.plan.bytes_of(RAM) - 1}B")
    assert "a file with neuron records, which `thermocline convert` writes" in refusal.value.remedy


def test_biases_of_what_is_on_disk_are_in_the_budget(tiny_opt: Path) -> None:
    with LLM.load(tiny_opt, threads=1) as llm:
        wanted = llm.generate("hello", **GREEDY).tokens
    whole = plan(tiny_opt, ram_budget="2GiB").plan.bytes_of(RAM)
    for less in (1_000, 30_000, 50_000):
        with LLM.load(tiny_opt, threads=1, ram_budget=f"{whole - less}B") as llm:
            assert llm._loaded.placing.below.store is not None
            assert llm._loaded.placing.memory.is_true
            assert llm._loaded.placing.memory.ledger.used(RAM) <= llm.plan.bytes_of(RAM) <= whole - less
            assert llm.generate("hello", **GREEDY).tokens == wanted
