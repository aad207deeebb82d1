"""What a step takes beside what it reads, measured with the engine."""

from __future__ import annotations

from dataclasses import fields

import pytest

from thermocline.hardware.machine import Calls
from thermocline.runtime import step_costs
from thermocline.runtime.step_costs import SELECTED, probe_machine


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, own_home: None) -> None:
    monkeypatch.setattr(step_costs, "STEPS", 4)
    monkeypatch.setattr(step_costs, "FIRST", 2)


def test_every_way_of_a_step_is_measured() -> None:
    survey, found = probe_machine(any_disk=False)
    steps = found.steps
    assert steps is not None
    for calls in (steps.host, steps.half):
        assert all(0 <= getattr(calls, f.name) < 1 for f in fields(Calls))
        assert calls.attention > 0
    assert 0 < steps.between < 1
    assert min(steps.crossing, steps.meeting) >= 0
    assert probe_machine(any_disk=False)[1].steps == steps
    assert survey.cores.threads >= 1


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
