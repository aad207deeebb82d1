"""Neurons that follow the text on a GPU, whose steps go on being replayed; by what prompts fire."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from thermocline import LLM
from thermocline.activity.store import load_activity
from thermocline.errors import HardwareError
from thermocline.hardware.machine import Tier
from thermocline.placement.plan import plan_of
from thermocline.placement.plan_file import save_plan
from thermocline.placement.problem import LayerPlace, Placement
from thermocline.placement.solver import Method, Solution
from thermocline.runtime import drift

pytestmark = [
    pytest.mark.usefixtures("machine_home"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="budgets are of a tiny model"),
]

VRAM = Tier.VRAM
TEXT = "the cat sat on the mat and the other cat sat on the other mat"
ENDS = ("", ".", "!")
SETTINGS: dict[str, Any] = {"device": "cuda", "threads": 1, "ctx_size": 128, "ubatch": 16, "mode": "exact"}


@pytest.fixture(autouse=True)
def a_night_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(0, 1_000_000, 100))
    monkeypatch.setattr(drift, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    monkeypatch.setattr("thermocline.runtime.planning.LARGEST_CLUSTER", 32)


@pytest.fixture
def cut(tiny_model: Path, tmp_path: Path) -> Path:
    """A plan with attention on the GPU and each layer's neurons on both sides."""
    with LLM.load(tiny_model, vram_budget="400KB", drift="1GiB", **SETTINGS) as llm:
        problem = llm._loaded.placing.problem
    assert problem is not None
    placement = Placement(Tier.RAM, VRAM, tuple(LayerPlace(VRAM, VRAM, depth, 3) for depth in (1, 2)))
    seconds = problem.seconds(placement)
    save_plan(plan_of(problem, Solution(placement, seconds, seconds, Method.GREEDY, ())), tmp_path / "plan.json")
    return tmp_path / "plan.json"


def answers(llm: LLM) -> list[Any]:
    return [llm.generate(TEXT + end, temperature=0.0, max_tokens=3, ignore_eos=True) for end in ENDS]


def test_neurons_follow_the_prompts_and_the_tokens_stay(tiny_model: Path, cut: Path, tmp_path: Path) -> None:
    with LLM.load(tiny_model, plan=cut, **SETTINGS) as llm:
        expected = [answer.tokens for answer in answers(llm)]
    counted = tmp_path / "counts.safetensors"
    with LLM.load(tiny_model, plan=cut, drift="1GiB", count_activity=counted, **SETTINGS) as llm:
        loaded = llm._loaded
        assert loaded.engine._sequence.captured is not None  # type: ignore[attr-defined]
        assert any("counted in prompts alone" in notice for notice in llm.notices)
        account, plan = loaded.placing.memory.ledger.rows(), llm.plan
        assert plan is not None
        assert [layer.hot for layer in plan.layers] == [32, 64]
        found = answers(llm)
        assert loaded.placing.memory.ledger.rows() == account
        assert loaded.placing.memory.is_true
        prompts = sum(len(llm.tokenize(TEXT + end)) for end in ENDS)
    assert [answer.tokens for answer in found] == expected
    moved = [answer.report.moved for answer in found]
    assert moved[0] is None
    assert moved[1] is not None
    assert moved[1].hot_after > moved[1].hot_before
    assert 0 < load_activity(counted).tokens <= prompts  # what the cache holds is not run again


def test_a_side_that_is_still_busy_ends_the_moving_and_not_the_request(tiny_model: Path, cut: Path) -> None:
    with LLM.load(tiny_model, plan=cut, drift="1GiB", **SETTINGS) as llm:
        watch = llm._loaded.engine.watch
        assert watch is not None
        assert watch.drift is not None

        def busy() -> None:
            raise HardwareError("still computing")

        watch.drift.rest = busy
        assert [answer.report.moved for answer in answers(llm)] == [None] * len(ENDS)
        assert watch.drift.failed == "still computing"
