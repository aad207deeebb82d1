"""A model under budgets and over devices: the same tokens, a true ledger, and clear refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thermocline import api
from thermocline.activity.statistics import Activity
from thermocline.activity.store import save_activity
from thermocline.config import DeviceKind, LoadSettings
from thermocline.errors import (
    AllocationError,
    BudgetError,
    FingerprintError,
    HardwareError,
    ModelFormatError,
    PlanError,
    ThermoclineError,
    UsageError,
)
from thermocline.files.companion import companion
from thermocline.files.open import open_model
from thermocline.files.sidecar import SidecarKind
from thermocline.hardware.machine import Corrections, Tier
from thermocline.memory import pieces
from thermocline.memory.arena import make_array
from thermocline.memory.convert import convert
from thermocline.placement.ledger import Purpose
from thermocline.placement.plan import DIGITS, Plan
from thermocline.placement.plan import plan_of as made_of
from thermocline.placement.plan_file import save_plan
from thermocline.placement.problem import LayerPlace, Placement, Problem
from thermocline.placement.solver import Method, Solution
from thermocline.placement.workload import EMULATED
from thermocline.runtime import loading
from thermocline.runtime.split import Account, measured_of, recall, remember, split_report

pytestmark = pytest.mark.usefixtures("machine_home")

VRAM, RAM = Tier.VRAM, Tier.RAM
WEIGHTS = (Purpose.ATTENTION, Purpose.FFN, Purpose.EMBEDDING, Purpose.OUTPUT, Purpose.PREDICTOR, Purpose.KV)
MODEL_BYTES = 14_224_896
"""Of all weights of the model that comes with the package."""
PROMPT = "def read(path):\n    "


def greedy(llm: api.LLM, tokens: int = 32) -> tuple[int, ...]:
    return llm.generate(PROMPT, temperature=0.0, max_tokens=tokens).tokens


def emulated(model: Path | None = None, share: float = 0.3, **more: Any) -> api.LLM:
    settings = {"device": "emulated", "vram_budget": f"{int(MODEL_BYTES * share)}b"} | more
    return api.LLM.load(model, **settings)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model, linked, with an activity beside it."""
    folder = tmp_path_factory.mktemp("profiled")
    model = folder / "model.gguf"
    model.symlink_to(api.shipped_model())
    text = folder / "text.py"
    text.write_text(Path(__file__).read_text()[:4000])
    api.profile(model, [text], companion(model, SidecarKind.ACTIVITY))
    return model


@pytest.fixture(scope="module")
def unprofiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without one."""
    model = tmp_path_factory.mktemp("unprofiled") / "model.gguf"
    model.symlink_to(api.shipped_model())
    return model


@pytest.fixture(scope="module")
def expected(profiled: Path) -> tuple[int, ...]:
    with api.LLM.load(profiled, device="cpu") as llm:
        return greedy(llm)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("known", [True, False], ids=["profiled", "unknown"])
def test_a_budget_of_vram_changes_no_token_and_the_ledger_is_true(
    profiled: Path, unprofiled: Path, expected: tuple[int, ...], share: float, known: bool
) -> None:
    with emulated(profiled if known else unprofiled, share) as llm:
        assert greedy(llm) == expected
        memory, plan = llm._loaded.placing.memory, llm.plan
        assert plan is not None
        assert any("equally hot" in notice for notice in llm.notices) != known
        assert memory.is_true
        ledger, arena = memory.ledger, memory.arenas[VRAM]
        assert 0 < ledger.used(VRAM) == arena.held <= plan.bytes_of(VRAM) <= plan.budgets[VRAM]
        assert arena.claimed == 0
        planned = {(tier, purpose): size for tier, purpose, size in plan.demands}
        for tier in (VRAM, RAM):
            for purpose in WEIGHTS:
                assert ledger.used(tier, purpose) == planned.get((tier, purpose), 0), (tier, purpose)
        sides = {layer.device.tier for layer in llm._loaded.transformer.layers}
        sides |= {part.device.tier for layer in llm._loaded.transformer.layers for part in layer.ffn.parts}
        assert sides == {VRAM, RAM}
        tables = {table.title: table for table in llm.plan_tables()}
        assert len(tables["placement by layer"].rows) == 6
    assert not memory.ledger.rows()


def test_the_scratch_of_kernels_stays_in_what_is_set_aside(profiled: Path) -> None:
    with emulated(profiled, 1.0, ubatch=64) as llm:
        llm.generate(PROMPT * 60, temperature=0.0, max_tokens=4)
        memory = llm._loaded.placing.memory
        scratch = sum(device.ops.scratch_bytes for device in memory.devices.values())  # type: ignore[attr-defined]
        least = 2 << 20  # a pool of scratch starts with a MiB
        assert scratch <= max(memory.arenas[RAM].claimed, least)


def test_a_run_tells_what_each_side_did(profiled: Path) -> None:
    with emulated(profiled, 0.6) as llm:
        report = llm.generate(PROMPT, temperature=0.0, max_tokens=24).report
    split = report.split
    assert split is not None
    assert split.steps == report.decode_tokens == 23
    assert 0 < split.hot_share < 1
    assert split.vram_bytes + split.ram_bytes == pytest.approx(report.bytes_read)
    assert min(split.vram_bytes, split.ram_bytes) > 0
    assert split.crossings > 0
    assert split.crossed_bytes == split.crossings * 384 * 4
    names = [c.name for c in split.components]
    assert names == ["step", "attention", "ffn", "predictor", "ffn hot", "ffn cold", "crossing", "rest", "between"]
    assert all(c.predicted_ms >= 0 and c.measured_ms >= 0 for c in split.components)
    assert split.step.measured_ms == pytest.approx(report.decode_seconds * 1e3 / 23)
    parts = sum(c.measured_ms for c in split.components if c.name in ("attention", "ffn", "rest"))
    assert parts <= split.step.measured_ms
    assert "of the active neurons were hot" in "\n".join(report.lines())
    assert report.as_dict()["split"]["crossings"] == split.crossings


def test_a_prediction_that_is_off_is_said_aloud(profiled: Path) -> None:
    with emulated(profiled) as llm:
        plan = llm.plan
    assert plan is not None
    account = Account(steps=10, seconds={"ffn cold": 0.1, "ffn": 0.1})
    for times, loud in ((0.7, True), (0.8, False), (1.2, False), (1.3, True)):
        seconds = times * plan.predicted.step_ms * 10 / 1e3
        report = split_report(plan, account, fired=10, bytes_read=10.0, seconds=seconds)
        assert report.off == pytest.approx(times - 1)
        warned = [line for line in report.lines() if line.startswith("WARNING")]
        assert bool(warned) == loud
        assert not loud or "--replan" in warned[0]
    few = replace(account, steps=3)
    assert split_report(plan, few, fired=1, bytes_read=1.0, seconds=9.0).off == 0.0


def test_the_last_run_is_what_replan_plans_with(profiled: Path, tmp_path: Path, monkeypatch) -> None:
    with emulated(profiled) as llm:
        plan = llm.plan
    assert plan is not None
    cold = sum(layer.cold_ms for layer in plan.layers)
    attention = sum(layer.attention_ms for layer in plan.layers if layer.home is VRAM)
    seconds = {"ffn cold": 2 * cold * 10 / 1e3, "attention vram": 3 * attention * 10 / 1e3}
    account = Account(steps=10, seconds=seconds)
    measured = measured_of(plan, account)
    assert measured is not None
    assert replace(measured, attention_vram=1.0) == Corrections(cold=pytest.approx(2.0), between=0.0)  # type: ignore[arg-type]
    assert measured.attention_vram == pytest.approx(3.0 if attention else 1.0)
    assert measured_of(plan, replace(account, steps=2)) is None
    monkeypatch.setenv("THERMOCLINE_HOME", str(tmp_path / "other"))
    assert recall(plan.machine, plan.model) is None
    with emulated(profiled, replan=True) as llm:
        assert any("no run with this model was measured" in notice for notice in llm.notices)
    remember(plan, measured)
    assert recall(plan.machine, plan.model) == measured
    with emulated(profiled, replan=True) as llm:
        assert "planned with the last run's figures" in llm.notices
        assert llm.plan is not None
        assert llm._loaded.placing.corrections == measured
        greedy(llm)
        found = measured_of(llm.plan, llm._loaded.engine.account)
    assert found is not None
    again = recall(plan.machine, plan.model)  # measured against corrected figures, kept against the machine's own
    assert again is not None
    assert again.cold == pytest.approx(2 * found.cold)
    file = next((tmp_path / "other").glob("run-*"))
    file.write_text(file.read_text().replace("{", '{"cold": 1e9,', 1).replace(f'"cold": {again.cold}', '"old": 1'))
    assert recall(plan.machine, plan.model) is None


def test_what_no_part_takes_makes_the_next_prediction_whole(profiled: Path) -> None:
    """The same placement, priced with what a run of it measured, takes as long as the run did: here each part twice as
    long as predicted, and five milliseconds between them.
    """
    with emulated(profiled, 0.6) as llm:
        plan, problem = llm.plan, llm._loaded.placing.problem
    assert plan is not None
    assert problem is not None
    account = run_of(plan, 2.0, 5e-3)
    measured = measured_of(plan, account)
    assert measured is not None
    rounding = 0.5e-3 * 10.0**-DIGITS  # seconds, of every figure of a plan
    assert measured.between == pytest.approx(5e-3, abs=16 * len(plan.layers) * rounding)
    again = replace(problem, machine=replace(problem.machine, corrections=measured))
    bounds = problem.cost.bounds.tolist()
    places = (
        LayerPlace(layer.home, layer.predictor or layer.home, bounds.index(layer.hot), bounds.index(layer.warm))
        for layer in plan.layers
    )
    priced = made_of(again, solution_of(again, Placement(plan.embedding, plan.head, tuple(places))))
    assert priced.predicted.step_ms == pytest.approx(1e3 * account.wall / account.steps, rel=0.02)
    assert priced.predicted.between_ms == pytest.approx(1e3 * measured.between, abs=1e-3)
    found = measured_of(priced, account)
    assert found is not None
    assert found.times(measured).between == pytest.approx(measured.between, rel=0.02)
    assert split_report(priced, account, fired=1, bytes_read=1.0, seconds=account.wall).off == pytest.approx(
        0, abs=0.01
    )


def run_of(plan: Plan, times: float, between: float) -> Account:
    """Ten steps whose parts each took so many times what the plan says, and so many seconds between them."""
    layers, p = plan.layers, plan.predicted
    ms = {f"attention {home}": sum(x.attention_ms for x in layers if x.home is home) for home in (VRAM, RAM)}
    ms |= {"ffn hot": sum(x.hot_ms for x in layers), "ffn cold": sum(x.cold_ms for x in layers)}
    ms |= {"predictor": sum(x.predictor_ms for x in layers), "crossing": sum(x.crossing_ms for x in layers)}
    parts = p.step_ms - p.between_ms
    ms |= {"head": parts - sum(x.total_ms for x in layers)}
    seconds = {name: times * value / 100 for name, value in ms.items()}
    return Account(steps=10, wall=10 * (times * parts / 1e3 + between), seconds=seconds)


def solution_of(problem: Problem, placement: Placement) -> Solution:
    seconds = problem.seconds(placement)
    return Solution(placement, seconds, seconds, Method.GREEDY, ())


def test_an_order_is_used_only_where_a_layer_is_cut(profiled: Path) -> None:
    with emulated(profiled, 0.6) as llm:
        for layer in llm._loaded.transformer.layers:
            assert (layer.ffn.order is not None) == (len(layer.ffn.parts) > 1)
    with api.LLM.load(profiled) as llm:
        assert llm.plan is None
        assert all(layer.ffn.order is None for layer in llm._loaded.transformer.layers)


def test_a_budget_of_ram_alone(profiled: Path, expected: tuple[int, ...]) -> None:
    with api.LLM.load(profiled, ram_budget="1GiB") as llm:
        assert greedy(llm) == expected
        memory = llm._loaded.placing.memory
        assert memory.is_true
        assert memory.ledger.used(RAM) <= 1 << 30
        assert memory.ledger.used(RAM, Purpose.MARGIN) > 0


def test_budgets_that_do_not_hold_the_trunk_are_refused_with_the_number_that_would_do(profiled: Path) -> None:
    with pytest.raises(BudgetError) as refusal:
        emulated(profiled, 0.01)
    assert refusal.value.tier == VRAM
    needed = int(MODEL_BYTES * 0.01) + refusal.value.missing
    with emulated(profiled, vram_budget=f"{needed}b") as llm:
        assert llm.plan is not None
    with pytest.raises(BudgetError) as small:
        emulated(profiled, 0.3, ram_budget="200MiB")
    assert small.value.tier == RAM
    enough = (200 << 20) + small.value.missing
    with emulated(profiled, 0.3, ram_budget=f"{enough + (1 << 20)}b") as llm:
        assert llm._loaded.placing.memory.ledger.used(RAM) <= enough + (1 << 20)


@pytest.mark.parametrize("share", [0.15, 0.4, 0.6])
def test_three_tiers_down_to_the_smallest_budget_that_is_named(
    expected: tuple[int, ...], tmp_path: Path, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What finds no room beside an emulated device is read from disk, be it every neuron or parts of the trunk too."""
    # A disk must take less of RAM than the whole model does, and this one is small.
    monkeypatch.setattr("thermocline.runtime.planning.EMULATED", replace(EMULATED, reading=2 << 20))
    monkeypatch.setattr("thermocline.runtime.below.IN_FLIGHT", 0)
    monkeypatch.setattr(pieces, "PIECE", 64 << 10)
    monkeypatch.setattr("thermocline.runtime.below.PIECES_BYTES", (pieces.BUFFERS + 1) * (64 << 10))
    model = tmp_path / "records.gguf"
    with open_model(api.shipped_model()) as source:
        convert(source, model, None, records=True)
    with pytest.raises(BudgetError) as refusal:
        emulated(model, share, ram_budget="200MiB")
    least = (200 << 20) + refusal.value.missing
    on_disk = []
    for more in (0, 1 << 20, 3 << 20, 6 << 20):
        with emulated(model, share, ram_budget=f"{least + more}b") as llm:
            assert greedy(llm) == expected
            plan, placing = llm.plan, llm._loaded.placing
            assert plan is not None
            assert placing.memory.is_true
            assert placing.memory.ledger.used(RAM) <= least + more
            neurons = sum(plan.n_ff - layer.warm for layer in plan.layers)
            trunk = [plan.head, *(layer.home for layer in plan.layers)].count(Tier.DISK)
            assert (placing.below.stats.requests > 0) == (neurons + trunk > 0)
            on_disk.append((neurons, trunk))
    assert sum(on_disk[0]) > 0
    assert on_disk == sorted(on_disk, key=lambda found: (found[1], found[0]), reverse=True)


@pytest.mark.parametrize("budget", ["-1", "nan", "x", "1e99", "101%", "9PiB", "9000TiB", "", " "])
def test_absurd_budgets_are_refused(budget: str) -> None:
    with pytest.raises(UsageError, match="vram-budget"):
        api.LLM.load(device="emulated", vram_budget=budget)
    with pytest.raises(UsageError, match="ram-budget"):
        api.LLM.load(ram_budget=budget)


def test_no_vram_at_all_is_refused_with_the_number_that_little_is_refused_with() -> None:
    needed = []
    for budget in (0, 1000):
        with pytest.raises(BudgetError) as refusal:
            api.LLM.load(device="emulated", vram_budget=f"{budget}B")
        needed.append(budget + refusal.value.missing)
    assert needed[0] == needed[1]


def test_settings_that_contradict_are_refused() -> None:
    with pytest.raises(UsageError, match="cpu has no VRAM"):
        LoadSettings(device=DeviceKind.CPU, vram_budget="1GiB")
    with pytest.raises(UsageError, match="device is tpu"):
        LoadSettings(device="tpu")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="number of GiB"):
        LoadSettings(vram_budget=[1])  # type: ignore[arg-type]
    assert LoadSettings(vram_budget=8).vram_budget == "8"  # type: ignore[arg-type]
    for more in ({}, {"ram_budget": "4GiB"}):
        with pytest.raises(UsageError, match="none is used: add --device cuda"):
            api.LLM.load(vram_budget="1GiB", **more)


def test_powerinfers_flags_are_taken_with_a_notice() -> None:
    with api.LLM.load(reset_gpu_index=True, disable_gpu_index=True) as llm:
        said = "\n".join(llm.notices)
    assert "--reset-gpu-index" in said
    assert "--disable-gpu-index" in said


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def plan_of(profiled: Path, tmp_path: Path) -> Callable[..., tuple[Plan, Path]]:
    def make(**more: Any) -> tuple[Plan, Path]:
        with emulated(profiled, **more) as llm:
            plan = llm.plan
        assert plan is not None
        save_plan(plan, tmp_path / "plan.json")
        return plan, tmp_path / "plan.json"

    return make


def test_a_plan_that_serves_is_carried_out(profiled: Path, expected: tuple[int, ...], plan_of: Any) -> None:
    plan, file = plan_of()
    with api.LLM.load(profiled, device="emulated", plan=file) as llm:
        assert llm.plan == plan
        assert greedy(llm) == expected
        assert not any("new plan" in notice for notice in llm.notices)


def test_a_plan_for_something_else_is_made_anew_and_says_why(profiled: Path, plan_of: Any, tmp_path: Path) -> None:
    plan, file = plan_of()
    cases = {
        "budget of vram has grown": {"vram_budget": f"{plan.budgets[VRAM] + 1000}b"},
        "its context is": {"ctx_size": 512},
        "made for mode exact": {"mode": "dense"},
    }
    for reason, more in cases.items():
        with api.LLM.load(profiled, **({"device": "emulated", "plan": file} | more)) as llm:
            assert any(reason in notice and "new plan was made" in notice for notice in llm.notices), reason
            assert llm.plan != plan
    save_plan(replace(plan, machine="0" * 64, machine_name="another"), file)
    with api.LLM.load(profiled, device="emulated", plan=file) as llm:
        assert any("another machine" in notice for notice in llm.notices)


def test_a_plan_that_needs_a_device_is_refused_without(profiled: Path, plan_of: Any) -> None:
    plan, file = plan_of()
    save_plan(replace(plan, machine="0" * 64), file)
    with api.LLM.load(profiled, plan=file) as llm:  # of another machine: solved again, for what there is
        assert llm.plan is not None
        assert llm.plan.bytes_of(VRAM) == 0


def other_fingerprints(count: int) -> list[str]:
    rng = np.random.default_rng(7)
    return [rng.bytes(32).hex() for _ in range(count)]


@pytest.mark.parametrize("fingerprint", other_fingerprints(70))
def test_plans_of_other_models_are_refused(profiled: Path, plan_of: Any, fingerprint: str, shipped_plan: Plan) -> None:
    file = profiled.parent / "foreign.json"
    save_plan(replace(shipped_plan, model=fingerprint), file)
    with pytest.raises(PlanError, match="model"):
        api.LLM.load(profiled, device="emulated", plan=file)


@pytest.mark.parametrize("fingerprint", other_fingerprints(70))
def test_plans_of_other_activities_are_refused(profiled: Path, fingerprint: str, shipped_plan: Plan) -> None:
    file = profiled.parent / "foreign.json"
    save_plan(replace(shipped_plan, activity=fingerprint), file)
    with pytest.raises(PlanError, match="activity"):
        api.LLM.load(profiled, device="emulated", plan=file)


@pytest.mark.parametrize("fingerprint", other_fingerprints(30))
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_activities_of_other_models_are_refused(profiled: Path, fingerprint: str, device: str) -> None:
    file = profiled.parent / "foreign.activity.safetensors"
    counts = np.arange(6 * 2048, dtype=np.int64).reshape(6, 2048)
    save_activity(Activity.from_counts(fingerprint, "other", counts, 1 << 20), file)
    with pytest.raises(FingerprintError, match="belongs to"):
        api.LLM.load(profiled, device=device, activity=file)


@pytest.fixture(scope="module")
def shipped_plan(profiled: Path) -> Plan:
    with emulated(profiled) as llm:
        assert llm.plan is not None
        return llm.plan


def test_files_that_are_no_plan_or_activity_are_refused(profiled: Path, tmp_path: Path) -> None:
    nonsense = tmp_path / "x.json"
    nonsense.write_text("{}")
    for file in (nonsense, tmp_path / "absent.json"):
        with pytest.raises(PlanError):
            api.LLM.load(profiled, device="emulated", plan=file)
    with pytest.raises((ModelFormatError, UsageError)):
        api.LLM.load(profiled, device="emulated", activity=nonsense)


# --- faults -----------------------------------------------------------------------------------------------------------


def test_every_allocation_of_an_engine_may_fail(tiny_model: Path) -> None:
    """N from the first to the last: an error with the account, nothing held, and the next load runs."""
    calls = failing = 0

    def make(arrays: Any, shape: tuple[int, ...], dtype: str) -> Any:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise MemoryError
        return make_array(arrays, shape, dtype)

    settings = LoadSettings(device=DeviceKind.EMULATED, vram_budget="100KiB", ctx_size=64)
    with open_model(tiny_model) as source:

        def load() -> Any:
            return loading.load_model(source, settings, make=make)

        whole = load()
        total = calls
        whole.close()
        assert not whole.placing.memory.ledger.rows()
        assert total > 20
        for failing in range(1, total + 1):  # noqa: B007  # `make` reads it
            calls = 0
            with pytest.raises(AllocationError, match="refused"):
                load()
        failing = 0
        load().close()


def test_an_engine_is_usable_after_an_error(profiled: Path, expected: tuple[int, ...]) -> None:
    with emulated(profiled, 0.6) as llm:
        before = llm._loaded.placing.memory.ledger.rows()
        device = llm._loaded.placing.memory.devices[VRAM]
        real, calls = device.ops, 0

        class Breaking:
            def __getattr__(self, name: str) -> Any:
                nonlocal calls
                calls += 1
                if calls == 40:
                    raise HardwareError("the device broke")
                return getattr(real, name)

        device.ops = Breaking()  # type: ignore[assignment]
        with pytest.raises(ThermoclineError, match="broke"):
            greedy(llm)
        device.ops = real
        assert greedy(llm) == expected
        assert llm._loaded.placing.memory.ledger.rows() == before


def test_the_worker_of_a_device_ends_with_the_model(profiled: Path) -> None:
    import threading

    def workers() -> int:
        return sum(thread.name == "emulated-device" for thread in threading.enumerate())

    before = workers()
    with emulated(profiled, 0.6) as llm:
        greedy(llm, 4)
        assert workers() == before + 1
    assert workers() == before


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_tokens_do_not_depend_on_threads(profiled: Path, expected: tuple[int, ...], threads: int) -> None:
    with emulated(profiled, 0.3, threads=threads) as llm:
        assert greedy(llm) == expected


def test_predicted_mode_over_two_devices(with_predictor: Callable[..., Path], tiny_model: Path, tmp_path: Path) -> None:
    """The predictor's neurons are in the order of the cut, wherever the predictor is."""
    model = with_predictor(tiny_model)
    rng = np.random.default_rng(2)
    with open_model(model) as source:
        counts = rng.integers(0, 1000, (2, 96)).astype(np.int64)
        activity = Activity.from_counts(source.fingerprint, "tiny", counts, 1000)
    save_activity(activity, companion(model, SidecarKind.ACTIVITY))
    tokens = []
    for more in ({"device": "cpu"}, {"device": "emulated", "vram_budget": "60KiB"}):
        with api.LLM.load(model, mode="predicted", ctx_size=64, **more) as llm:
            tokens.append(llm.generate("hello", temperature=0.0, max_tokens=20, ignore_eos=True).tokens)
    assert tokens[0] == tokens[1]
