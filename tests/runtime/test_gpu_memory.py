"""What a model takes of a GPU: plans shrink where it is more than the budget; requests that run out end alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from thermocline.api import LLM
from thermocline.config import Mode
from thermocline.errors import BudgetError, HardwareError, UsageError
from thermocline.hardware.machine import Tier
from thermocline.model.network import Transformer
from thermocline.ops.cuda.ops import CudaOps
from thermocline.placement.budget import parse_budget, size_text
from thermocline.placement.ledger import Purpose
from thermocline.placement.plan_file import save_plan
from thermocline.runtime.captured import CapturedStep

pytestmark = pytest.mark.usefixtures("machine_home", "worth_a_gpu")

VRAM, RAM = Tier.VRAM, Tier.RAM
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="a fake GPU needs interpreted kernels")
BUDGET = "10MiB" if INTERPRETED else "3GiB"


def test_a_gpu_that_holds_more_than_its_budget_gets_a_smaller_plan(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = int(parse_budget(BUDGET).amount)
    held = iter([whole + 4096, 0])
    monkeypatch.setattr(CudaOps, "held_bytes", lambda ops: next(held))
    with LLM.load(tiny_model, ctx_size=32, threads=1, device="cuda", vram_budget=BUDGET) as llm:
        assert llm._loaded.placing.memory.ledger.budgets[VRAM] == whole - 4096
        assert any("planned again" in notice for notice in llm.notices)


def test_a_plan_that_was_named_is_carried_out(tiny_model: Any, tmp_path: Path) -> None:
    said, plans = [], []
    settings: dict[str, Any] = {"ctx_size": 32, "threads": 1, "device": "cuda"}
    for more in ({"vram_budget": BUDGET}, {"plan": tmp_path / "plan.json"}):
        with LLM.load(tiny_model, **settings, **more) as llm:
            assert llm.plan is not None
            assert {layer.home for layer in llm.plan.layers} == {VRAM}
            assert not any("new plan" in notice for notice in llm.notices)
            plans.append(llm.plan)
            save_plan(llm.plan, tmp_path / "plan.json")
            said.append(llm.generate([5, 9, 2], max_tokens=3, temperature=0.0).text)
    assert said[0] == said[1]
    assert plans[0] == plans[1]


def test_a_gpu_that_always_holds_more_is_refused(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaOps, "held_bytes", lambda ops: 1 << 50)
    with pytest.raises(BudgetError, match="vram"):
        LLM.load(tiny_model, ctx_size=32, threads=1, device="cuda", vram_budget=BUDGET)


def first_prompt_over(monkeypatch: pytest.MonkeyPatch, llm: LLM, over: int) -> list[bool]:
    """The next look finds so many bytes beyond the budget, others find none; a list that every look makes longer."""
    whole, asked = llm._loaded.placing.memory.ledger.budgets[VRAM], list[bool]()

    def held(ops: CudaOps) -> int:
        asked.append(True)
        return whole + over if len(asked) == 1 else 0

    monkeypatch.setattr(CudaOps, "held_bytes", held)
    return asked


@interpreted
def test_what_the_first_prompt_takes_beyond_the_budget_shrinks_the_next_plan(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = 1 << 16
    with LLM.load(tiny_model, ctx_size=32, threads=1, device="cuda", vram_budget=BUDGET) as llm:
        whole = llm._loaded.placing.memory.ledger.budgets[VRAM]
        first_prompt_over(monkeypatch, llm, over)
        left = llm.stream([5, 9, 2], max_tokens=4)
        texts = [llm.generate([5, 9, 2], max_tokens=2, temperature=0.0)]
        split = texts[0].report.split
        assert split is not None
        assert split.over == over
        assert any(f"{size_text(over)} more than its budget in the first prompt" in line for line in split.lines())
        assert not any("planned again" in notice for notice in llm.notices)
        for _ in range(2):
            texts.append(llm.generate([5, 9, 2], max_tokens=2, temperature=0.0))
            split = texts[-1].report.split
            assert split is not None
            assert split.over == 0
            assert llm._loaded.placing.memory.ledger.budgets[VRAM] == whole - over
            assert sum("planned again" in notice for notice in llm.notices) == 1
        assert len({text.text for text in texts}) == 1
        with pytest.raises(UsageError, match="loaded anew"):
            next(left)


@interpreted
def test_where_no_smaller_plan_exists_the_model_goes_on(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM.load(tiny_model, ctx_size=32, threads=1, device="cuda", vram_budget=BUDGET) as llm:
        whole = llm._loaded.placing.memory.ledger.budgets[VRAM]
        asked = first_prompt_over(monkeypatch, llm, whole)
        monkeypatch.setattr("thermocline.runtime.loading.make_plan", no_plan)
        for _ in range(2):
            split = llm.generate([5, 9, 2], max_tokens=2).report.split
            assert split is not None
            assert split.over == whole
        assert len(asked) == 1
        assert llm._loaded.placing.memory.ledger.budgets[VRAM] == whole


def no_plan(*_: Any) -> None:
    raise BudgetError(VRAM, 1, "there is none")


@pytest.mark.parametrize("mode", [Mode.EXACT, Mode.PREDICTED])
def test_scratch_of_the_longest_prompt_is_in_the_ledger(tiny_model: Any, with_predictor: Any, mode: Mode) -> None:
    """Prompts and their answers take no more than loading has shown."""
    model = with_predictor(tiny_model, shares=0.05)
    with LLM.load(model, ctx_size=64, threads=1, device="cuda", vram_budget=BUDGET, mode=mode) as llm:
        memory = llm._loaded.placing.memory
        scratch = memory.devices[VRAM].ops.scratch
        before, claimed = scratch.nbytes, memory.arenas[VRAM].claimed
        assert 0 < before <= claimed
        pinned = memory.devices[VRAM].ops.streams.pinned_bytes
        assert 4 * (64 + 2 * 64 + 96) < pinned <= memory.ledger.used(RAM, Purpose.STAGING)
        for prompt in (range(5, 60), range(5, 8)):
            llm.generate(list(prompt), max_tokens=2)
        assert (scratch.nbytes, memory.arenas[VRAM].claimed) == (before, claimed)
        assert memory.is_true


def test_what_has_kernels_of_its_own_is_rehearsed(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsed = list[int]()
    monkeypatch.setattr("thermocline.runtime.on_gpu.interpreted", lambda: False)
    monkeypatch.setattr(Transformer, "rehearse", lambda _, tier, tokens, *rest: rehearsed.append(tokens))
    for ubatch in (8, 3):
        with LLM.load(tiny_model, ctx_size=32, threads=1, device="cuda", vram_budget=BUDGET, ubatch=ubatch):
            pass
    assert rehearsed == [8, 4, 3, 2, 1, 3, 2, 1]


def test_memory_that_runs_out_at_loading_is_one_error(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaOps, "rms_norm", full)
    with pytest.raises(BudgetError, match="--ubatch-size"):
        LLM.load(tiny_model, ctx_size=32, threads=1, device="cuda", vram_budget=BUDGET)


def test_memory_that_runs_out_ends_one_request(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM.load(tiny_model, ctx_size=32, threads=1, device="cuda", vram_budget=BUDGET) as llm:
        with monkeypatch.context() as patch:
            patch.setattr(CudaOps, "rms_norm", full)
            with pytest.raises(BudgetError, match="ran out of it"):
                llm.generate([5, 9], max_tokens=1)
        assert llm.generate([5, 9], max_tokens=1).text is not None


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        ("Triton Error [CUDA]: an illegal memory access\nmore", HardwareError, "memory access;"),
        ("Triton Error [HIP]: Code: 2, out of memory", BudgetError, "ran out of it"),
        ("shapes do not match", RuntimeError, "do not match"),
    ],
)
def test_what_triton_says_of_the_device_is_an_error_of_ours(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, said: str, kind: type[Exception], words: str
) -> None:
    """It raises nothing but RuntimeError, wherever a kernel is launched."""
    with LLM.load(tiny_model, ctx_size=32, threads=1, device="cuda", vram_budget=BUDGET) as llm:
        monkeypatch.setattr(CudaOps, "rms_norm", lambda *_: failing(said))
        with pytest.raises(kind, match=words):
            llm.generate([5, 9], max_tokens=1)
    if kind is not RuntimeError:
        with pytest.raises(kind):
            LLM.load(tiny_model, ctx_size=32, threads=1, device="cuda", vram_budget=BUDGET)


def test_a_step_that_cannot_be_captured_takes_the_plain_way(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"ctx_size": 32, "threads": 1, "device": "cuda", "vram_budget": BUDGET}
    with LLM.load(tiny_model, **settings) as llm:
        wanted = llm.generate([5, 9, 2], max_tokens=3, temperature=0.0).text
    monkeypatch.setattr(CapturedStep, "_rehearse", lambda _: failing("capture was invalidated\nand more"))
    with LLM.load(tiny_model, **settings) as llm:
        assert any(notice.endswith("cannot be captured here: capture was invalidated") for notice in llm.notices)
        assert llm.generate([5, 9, 2], max_tokens=3, temperature=0.0).text == wanted
    with pytest.raises(UsageError, match="capture was invalidated; use --crossing auto"):
        LLM.load(tiny_model, **settings, crossing="plain")


def full(*_: Any) -> None:
    raise torch.OutOfMemoryError("none left")


def failing(said: str) -> None:
    raise RuntimeError(said)
