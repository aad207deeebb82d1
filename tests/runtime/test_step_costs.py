"""What a step takes beside what it reads, measured with the engine."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from thermocline.hardware.machine import Calls
from thermocline.runtime import step_costs
from thermocline.runtime.step_costs import SELECTED, measure_steps, probe_machine


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, own_home: None) -> None:
    monkeypatch.setattr(step_costs, "STEPS", 4)
    monkeypatch.setattr(step_costs, "FIRST", 2)


def test_every_way_of_a_step_is_measured() -> None:
    """Bytes and numbers that cost nothing leave all of the time to the calls, on a busy machine too."""
    survey, found = probe_machine(any_disk=False)
    memory = replace(found.memory, by_threads=((1, 1e17),), unpacking=((1, 1e17),), beside_device=1e17)
    steps = measure_steps(survey, replace(found, flops=1e17, launch=0.0, memory=memory))
    for calls in (steps.host, steps.half):
        assert all(0 <= getattr(calls, f.name) < 1 for f in fields(Calls))
        assert calls.attention > 0
    assert 0 < steps.between < 1
    assert min(steps.crossing, steps.meeting) >= 0
    assert found.steps is not None
    assert probe_machine(any_disk=False)[1].steps == found.steps


def test_the_network_selects_what_its_prices_assume(monkeypatch: pytest.MonkeyPatch) -> None:
    selected: list[int] = []
    real = step_costs.CpuOps.select

    def select(self, scores, threshold, out):
        active = real(self, scores, threshold, out)
        selected.append(len(active.indices))
        return active

    monkeypatch.setattr(step_costs.CpuOps, "select", select)
    probe_machine(any_disk=False)
    assert set(selected) == {step_costs.NEURONS // SELECTED}
