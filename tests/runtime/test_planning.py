"""From a model's file to its plan: what is priced, what is refused, and PowerInfer's index both ways."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thermocline import api
from thermocline.activity.order import Order
from thermocline.activity.statistics import Activity
from thermocline.activity.store import save_activity
from thermocline.config import LoadSettings, Mode
from thermocline.errors import (
    BudgetError,
    FingerprintError,
    ModelFormatError,
    PlanError,
    UsageError,
)  # fmt: skip
from thermocline.files.gpuidx import read_gpu_index, write_gpu_index
from thermocline.files.open import open_model
from thermocline.hardware.gpu import GpuSpeed
from thermocline.hardware.gpu_card import Gpu
from thermocline.hardware.machine import Tier
from thermocline.hardware.probe import probe_machine
from thermocline.memory.convert import convert
from thermocline.placement.cost import FfnMode
from thermocline.placement.ledger import Purpose
from thermocline.placement.plan import Status, check_plan
from thermocline.placement.plan_file import load_plan, save_plan
from thermocline.placement.problem import LayerPlace, Placement
from thermocline.runtime.planning import ONLY_SHARES, PlanSettings, problem_of

PC = "rtx-3060+i5-12400+nvme-gen4"
TIGHT = {"machine": PC, "vram_budget": "480MiB"}


@pytest.fixture
def model(tiny_model: Path) -> Path:
    return tiny_model


@pytest.fixture
def activity(model: Path, tmp_path: Path) -> Path:
    """An activity of the tiny model whose neurons have frequencies of all kinds."""
    fired = np.random.default_rng(2).integers(0, 1000, (2, 96))
    with open_model(model) as source:
        save_activity(Activity.from_counts(source.fingerprint, "tiny", fired, 1000), tmp_path / "tiny.act.safetensors")
    return tmp_path / "tiny.act.safetensors"


def test_a_plan_is_made_of_what_is_known(model: Path, activity: Path) -> None:
    planned = api.plan(model, activity=activity, **TIGHT)
    assert planned.order is not None
    assert planned.plan.activity == planned.order.fingerprint == Order.of(api.read_activity(activity)).fingerprint
    assert planned.plan.mode is FfnMode.EXACT
    assert planned.plan.budgets[Tier.VRAM] == 480 << 20
    assert planned.problem.temperatures is not None
    assert np.allclose(planned.problem.temperatures.mean(), api.read_activity(activity).temperatures.mean())
    assert planned.plan.bytes_of(Tier.VRAM) <= 480 << 20
    without = api.plan(model, **TIGHT)
    assert without.plan.activity is None
    assert any("temperatures are unknown" in note for note in without.plan.notes)


@pytest.mark.parametrize("shares", [None, 0.125])
def test_without_an_activity_neurons_count_as_often_as_the_predictor_selects_one(
    model: Path, with_predictor: Any, shares: float | None
) -> None:
    with open_model(with_predictor(model, shares=shares)) as source:
        problem, _, notices = problem_of(source, PlanSettings(machine=PC), LoadSettings(mode=Mode.PREDICTED))
    assert (ONLY_SHARES in notices) == (shares is not None)
    if shares is None:
        assert problem.temperatures is None
        return
    assert problem.temperatures is not None
    assert set(np.unique(problem.temperatures)) == {shares}
    unknown = replace(problem, temperatures=None)
    in_ram = Placement(Tier.RAM, Tier.RAM, (LayerPlace(Tier.RAM, Tier.RAM, 0, 1),) * 2)
    assert problem.seconds(in_ram) < unknown.seconds(in_ram)


def test_a_file_in_the_order_of_its_activity_has_its_cold_neurons_together(
    model: Path, activity: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thermocline.runtime.planning.LARGEST_CLUSTER", 8)  # the model has 96 neurons
    ordered = model.with_name("ordered.gguf")
    with open_model(model) as source:
        counts = api.read_activity(activity)
        convert(source, ordered, None, records=True, order=Order.of(counts))
        mixed = problem_of(source, PlanSettings(machine=PC), LoadSettings(), activity=activity)[0]
        unknown = problem_of(source, PlanSettings(machine=PC), LoadSettings())[0]
    again = -np.sort(-counts.fired, axis=1)
    with open_model(ordered) as source:
        beside = model.with_name("ordered.activity.safetensors")
        save_activity(Activity.from_counts(source.fingerprint, "ordered", again, counts.tokens), beside)
        tidy = problem_of(source, PlanSettings(machine=PC), LoadSettings(), activity=beside)[0]
    assert [p.scattered for p in (mixed, unknown, tidy)] == [True, False, False]
    assert mixed.cost.decode.mode is tidy.cost.decode.mode


def test_the_margin_of_a_run_follows_what_its_process_takes() -> None:
    machine, load = "i5-12400", LoadSettings()
    margins = []
    for in_use in (0, 50 << 20, 80 << 20, 1 << 30):
        with open_model(api.shipped_model()) as source:
            problem = problem_of(source, PlanSettings(machine=machine, in_use=in_use), load)[0]
        margins.append(next(d.nbytes for d in problem.fixed(Tier.RAM) if d.purpose is Purpose.MARGIN) >> 20)
    assert margins == [128, 80, 112, 128]  # in whole 16 MiB, and never more than where nothing is known


def test_what_lies_beside_the_model_is_used(model: Path, activity: Path) -> None:
    beside = model.with_name(f"{model.stem}.activity.safetensors")
    activity.rename(beside)
    planned = api.plan(model, **TIGHT)
    assert planned.order is not None
    assert any(beside.name in line for line in planned.notices)
    order = model.with_name(f"{model.stem}.order.safetensors")
    api.save_order(planned.order, order)
    assert any(order.name in line for line in api.plan(model, **TIGHT).notices)
    assert api.plan(model, activity=order, **TIGHT).plan == planned.plan


@pytest.mark.parametrize("budget", ["-1", "nan", "inf", "-4GiB", "1e40", "200%", "lots", "", "9999TiB", "1GiB2"])
@pytest.mark.parametrize("name", ["vram_budget", "ram_budget"])
def test_absurd_budgets_are_refused(model: Path, name: str, budget: str) -> None:
    with pytest.raises(UsageError, match=name.replace("_", "-")):
        api.plan(model, machine=PC, **{name: budget})


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"vram_budget": "1000GiB"}, UsageError),
        ({"ram_budget": "1MiB", "vram_budget": "1MiB"}, BudgetError),
        ({"prompt": -1}, UsageError),
        ({"output": 0}, UsageError),
        ({"prompt": 10_000}, UsageError),
        ({"batch": 0}, UsageError),
        ({"latency_target": float("nan")}, UsageError),
        ({"latency_target": -5.0}, UsageError),
        ({"method": "magic"}, UsageError),
        ({"machine": "toaster"}, UsageError),
        ({"machine": "i5-12400", "vram_budget": "1GiB"}, UsageError),
        ({"device": "emulated"}, UsageError),
        ({"no_such": 1}, UsageError),
    ],
)
def test_wrong_settings_are_refused(model: Path, settings: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        api.plan(model, **({"machine": PC} | settings))


def test_another_models_activity_is_refused(model: Path, activity: Path, tmp_path: Path) -> None:
    other = Activity.from_counts("0" * 64, "other", np.ones((2, 96), np.int64), 5)
    save_activity(other, tmp_path / "other.safetensors")
    with pytest.raises(FingerprintError, match="other"):
        api.plan(model, activity=tmp_path / "other.safetensors", machine=PC)
    with pytest.raises(UsageError, match="has no activity inside"):
        api.plan(model, activity=model, machine=PC)
    with pytest.raises(ModelFormatError):
        api.plan(model, activity=__file__, machine=PC)


def test_what_lies_beside_and_is_of_no_use_is_told_and_what_is_inside_serves(
    model: Path, activity: Path, tmp_path: Path
) -> None:
    ordered = tmp_path / "ordered.gguf"
    api.convert(model, ordered, activity=activity)
    inside = api.plan(ordered, **TIGHT)
    assert inside.order is not None
    assert (inside.order.order == np.arange(inside.order.order.shape[1])).all()
    assert "temperatures from the activity inside the model" in inside.notices
    foreign = Activity.from_counts("0" * 64, "other", np.ones((2, 96), np.int64), 5)
    save_activity(foreign, tmp_path / "ordered.activity.safetensors")
    (tmp_path / "ordered.order.safetensors").write_text("no order")
    again = api.plan(ordered, **TIGHT)
    assert again.plan == inside.plan
    assert any(line.startswith("activity not used") and "belongs to the model other" in line for line in again.notices)
    assert any(line.startswith("order not used") for line in again.notices)
    # Counts of the model that it was made of serve too.
    assert api.plan(ordered, activity=activity, **TIGHT).plan == inside.plan
    assert api.plan(ordered, activity=ordered, **TIGHT).plan == inside.plan
    with pytest.raises(FingerprintError):
        api.plan(model, activity=ordered, machine=PC)


def test_a_smaller_context_shrinks_the_default_workload_only(model: Path) -> None:
    planned = api.plan(model, load=LoadSettings(ctx_size=50), machine=PC)
    assert planned.plan.workload.prompt + planned.plan.workload.output == 50
    with pytest.raises(UsageError, match="context"):
        api.plan(model, load=LoadSettings(ctx_size=50), machine=PC, prompt=60)


def test_this_machine_is_measured(model: Path, own_home: None) -> None:
    told: list[str] = []
    planned = api.plan(model, tell=told.append, ram_budget="1GiB")
    assert planned.plan.budgets == {Tier.RAM: 1 << 30}
    assert "measuring memory" in told
    told.clear()
    split = api.plan(model, tell=told.append, ram_budget="1GiB", vram_budget="200KiB", device="emulated")
    assert told == ["looking for the fastest placement"]
    assert split.problem.machine.gpu is not None
    assert split.plan.bytes_of(Tier.VRAM) <= 200 << 10
    with pytest.raises(UsageError, match="no GPU"):
        api.plan(model, vram_budget="1GiB")


def test_a_gpu_that_is_not_to_be_used_is_not_planned_with(
    model: Path, tmp_path: Path, own_home: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Gpu(index=0, name="card", total=1 << 33, free=1 << 32, pcie=4, lanes=16, driver="1")
    names = [field.name for field in fields(GpuSpeed)]
    speed = GpuSpeed(**dict.fromkeys(names, 1e12) | {"launch": 0.0, "crossing": 0.0, "context": 0, "sparse": 0.6})

    def probed(**settings: Any) -> Any:
        survey, probe = probe_machine(**settings)
        return survey, replace(probe, gpus=(card,), gpu_speeds=(speed,))

    monkeypatch.setattr("thermocline.runtime.planning.probe_machine", probed)
    monkeypatch.setattr("thermocline.runtime.planning.find_gpus", lambda: (card,))
    planned = {kind: api.plan(model, device=kind) for kind in ("auto", "cuda", "cpu", "emulated")}
    gpus = {kind: plan.problem.machine.gpu for kind, plan in planned.items()}
    assert {kind: gpu and gpu.name for kind, gpu in gpus.items()} == {
        "auto": "card",
        "cuda": "card",
        "cpu": None,
        "emulated": "emulated device",
    }
    assert planned["auto"].plan.bytes_of(Tier.VRAM)
    assert not planned["cpu"].plan.bytes_of(Tier.VRAM)
    for wrong in ({"vram_budget": "1GiB"}, {"gpu": "0"}):
        with pytest.raises(UsageError, match="--device c"):
            api.plan(model, device="cpu", **wrong)
    with pytest.raises(UsageError, match="--device is tpu; allowed: auto, cpu"):
        PlanSettings(device="tpu")  # type: ignore[arg-type]
    # What runs computes on the CPU unless a GPU is asked for, and is planned so.
    for settings in ({}, {"device": "cpu"}):
        with api.LLM.load(model, ram_budget="1GiB", **settings) as llm:
            assert llm.plan is not None
            assert list(llm.plan.budgets) == [Tier.RAM]
    save_plan(planned["auto"].plan, tmp_path / "plan.json")
    with api.LLM.load(model, plan=tmp_path / "plan.json") as llm:
        assert any("instead of plan.json: it uses a GPU: add --device cuda" in notice for notice in llm.notices)


def test_a_gpu_index_comes_in_and_goes_out(model: Path, activity: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    masks = [rng.random(96) < share for share in (0.3, 0.6)]
    write_gpu_index(tmp_path / "in.gpuidx", masks, 1000)
    planned = api.plan(model, activity=activity, gpu_index=tmp_path / "in.gpuidx", **TIGHT)
    assert planned.order is not None
    assert planned.plan.activity == planned.order.fingerprint
    for layer, mask in enumerate(masks):
        assert planned.plan.layers[layer].hot == mask.sum()
        assert set(planned.order.order[layer, : mask.sum()]) == set(np.flatnonzero(mask))
    old = api.read_activity(activity)
    share = old.fired[0][masks[0]].sum() / old.fired[0].sum()
    assert planned.plan.layers[0].hot_share == pytest.approx(share, abs=1e-5) or share < masks[0].mean()
    api.export_gpu_index(planned.plan, planned.order, tmp_path / "out.gpuidx")
    for mask, again in zip(masks, read_gpu_index(tmp_path / "out.gpuidx").masks, strict=True):
        assert np.array_equal(mask, again)
    save_plan(planned.plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == planned.plan


@pytest.mark.parametrize(("layers", "width"), [(3, 96), (2, 95), (1, 96)])
def test_a_gpu_index_of_another_shape_is_refused(model: Path, tmp_path: Path, layers: int, width: int) -> None:
    write_gpu_index(tmp_path / "x.gpuidx", [np.ones(width, bool)] * layers, 5)
    with pytest.raises(ModelFormatError):
        api.plan(model, gpu_index=tmp_path / "x.gpuidx", **TIGHT)


def test_an_index_that_does_not_fit_is_refused(model: Path, tmp_path: Path) -> None:
    write_gpu_index(tmp_path / "x.gpuidx", [np.ones(96, bool)] * 2, 5)
    fits = api.plan(model, gpu_index=tmp_path / "x.gpuidx", machine=PC)
    needed = fits.plan.bytes_of(Tier.VRAM)
    with pytest.raises(BudgetError, match="vram lacks"):
        api.plan(model, gpu_index=tmp_path / "x.gpuidx", machine=PC, vram_budget=f"{(needed - 5) // 1024}KiB")
    with pytest.raises(UsageError, match="GPU"):
        api.plan(model, gpu_index=tmp_path / "x.gpuidx", machine="i5-12400")


def test_two_hundred_wrong_pairs_are_refused(model: Path, activity: Path, tmp_path: Path) -> None:
    """Plans, models, orders and activities that do not belong together, in all ways."""
    planned = api.plan(model, activity=activity, **TIGHT)
    footprint, plan = planned.problem.footprint, planned.plan
    common = {"machine": plan.machine, "mode": plan.mode, "workload": plan.workload, "limits": plan.budgets}
    assert check_plan(plan, footprint, activity=plan.activity, **common)[0] is Status.FRESH
    refused = 0
    for i in range(70):
        for wrong, heat in (
            (replace(footprint, fingerprint=f"{i:064x}"), plan.activity),
            (footprint, f"{i:064x}"),
            (replace(footprint, fingerprint=f"{i:064x}"), None),
        ):
            with pytest.raises(PlanError):
                check_plan(plan, wrong, activity=heat, **common)
            refused += 1
    for i in range(10):
        foreign = Activity.from_counts(f"{i:064x}", "foreign", np.ones((2, 96), np.int64), 5)
        save_activity(foreign, tmp_path / "foreign.safetensors")
        with pytest.raises(FingerprintError):
            api.plan(model, activity=tmp_path / "foreign.safetensors", machine=PC)
        refused += 1
    assert refused >= 200


def test_the_picture_shows_the_cuts(model: Path, activity: Path, tmp_path: Path) -> None:
    planned = api.plan(model, activity=activity, **TIGHT)
    save_plan(planned.plan, tmp_path / "plan.json")
    written = api.report(activity, tmp_path / "page.html", pictures=tmp_path / "pictures", plan=tmp_path / "plan.json")
    assert tmp_path / "pictures" / "placement.svg" in written
    assert 'id="placement"' in (tmp_path / "page.html").read_text()
    other = Activity.from_counts("0" * 64, "other", np.ones((2, 96), np.int64), 5)
    save_activity(other, tmp_path / "other.safetensors")
    with pytest.raises(PlanError, match="model"):
        api.report(tmp_path / "other.safetensors", tmp_path / "page2.html", plan=tmp_path / "plan.json")


def test_the_picture_is_of_the_activity_that_the_plan_was_made_from(
    model: Path, activity: Path, tmp_path: Path
) -> None:
    counted, file = api.read_activity(activity), tmp_path / "plan.json"
    again = Activity.from_counts(counted.model_fingerprint, "tiny", counted.fired[:, ::-1].copy(), counted.tokens)
    save_activity(again, tmp_path / "again.safetensors")
    made = api.plan(model, activity=tmp_path / "again.safetensors", **TIGHT).plan
    for plan, words in ((made, "it was made from"), (replace(made, activity=None), "it was made without one")):
        save_plan(plan, file)
        with pytest.raises(PlanError, match=rf"plan.json: activity: {words}.*not from the one that is drawn"):
            api.report(activity, tmp_path / "page.html", plan=file)
    heavy = replace(counted, contribution=counted.fired[:, ::-1].astype(np.float64))
    save_activity(heavy, tmp_path / "heavy.safetensors")
    api.order(tmp_path / "heavy.safetensors", tmp_path / "order.safetensors", by="contribution")
    save_plan(api.plan(model, activity=tmp_path / "order.safetensors", **TIGHT).plan, file)
    api.report(tmp_path / "heavy.safetensors", tmp_path / "page.html", plan=file)


def test_a_share_of_an_emulated_device_is_of_the_weights(tiny_model: Path) -> None:
    """It has no memory of its own, and a share of the RAM would hold any model that runs."""
    whole = api.plan(tiny_model, vram_budget="100%", device="emulated")
    weights = whole.problem.footprint.nbytes
    assert whole.plan.budgets[Tier.VRAM] == weights
    half = api.plan(tiny_model, vram_budget="50%", device="emulated")
    assert half.plan.budgets[Tier.VRAM] == weights // 2
    assert half.seconds(half.problem) == pytest.approx(half.plan.predicted.token_ms / 1e3, rel=1e-3)
    assert api.plan(tiny_model, vram_budget="50%", machine="pc-low").plan.budgets[Tier.VRAM] == 11 << 29
