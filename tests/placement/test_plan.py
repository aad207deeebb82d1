"""Plans: round trip, refusals, staleness, tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thermocline.errors import BudgetError, PlanError, UsageError
from thermocline.files.formats import Q8_0
from thermocline.hardware.catalogue import machine
from thermocline.hardware.machine import Tier
from thermocline.placement.cost import FfnMode
from thermocline.placement.explain import (
    gain_table,
    layer_table,
    plan_diff,
    sensitivities,
    speed_table,
    tier_table,
)
from thermocline.placement.footprint import Footprint
from thermocline.placement.ledger import Purpose
from thermocline.placement.plan import Plan, Status, check_plan, make_plan
from thermocline.placement.plan_file import _checksum, load_plan, parse_plan, plan_text, save_plan
from thermocline.placement.problem import Problem
from thermocline.placement.workload import Workload

ACTIVITY = "a1" * 32


def problem(vram: int = 3, ram: int = 30, mode: FfnMode = FfnMode.PREDICTED, name: str = "seven") -> Problem:
    footprint = Footprint.of_sizes(
        name, n_layer=32, n_embd=4096, n_ff=11008, n_vocab=32000, n_head=32, n_head_kv=32, head_dim=128, gated=True,
        fmt=Q8_0, predictor_rank=512,
    )  # fmt: skip
    p = -np.sort(-np.random.default_rng(1).beta(0.3, 2, (32, 11008)), axis=1)
    computer = machine("rtx-3060+ryzen-7-5800x+nvme-gen3")
    return Problem(footprint, computer, Workload(), mode, p, {Tier.VRAM: vram << 30, Tier.RAM: ram << 30})


@cache
def plan(vram: int = 3, ram: int = 30, mode: FfnMode = FfnMode.PREDICTED) -> Plan:
    return make_plan(problem(vram, ram, mode), ACTIVITY)


def checked(made: Plan, asked: Problem, activity: str | None = ACTIVITY, computer: str | None = None, source: str = ""):
    return check_plan(
        made,
        asked.footprint,
        activity=activity,
        machine=computer or asked.machine.fingerprint,
        mode=asked.mode,
        workload=asked.workload,
        limits=asked.limits,
        source=source,
    )


def signed(document: dict) -> bytes:
    document.pop("checksum", None)
    document["checksum"] = _checksum(document)
    return json.dumps(document).encode()


@pytest.mark.parametrize(("vram", "ram"), [(3, 30), (2, 5)])
def test_round_trip(tmp_path: Path, vram: int, ram: int) -> None:
    save_plan(plan(vram, ram), tmp_path / "a.plan.json")
    assert load_plan(tmp_path / "a.plan.json") == plan(vram, ram)
    assert [p.name for p in tmp_path.iterdir()] == ["a.plan.json"]


def test_the_file_is_readable_and_diffable() -> None:
    lines = plan_text(plan()).splitlines()
    layers = [line for line in lines if line.startswith('    {"home"')]
    assert len(layers) == 32
    assert plan_text(plan()) == plan_text(make_plan(problem(), ACTIVITY))
    assert max(map(len, lines)) < 600


def test_the_ledger_equals_the_plan() -> None:
    made = plan()
    ledger = made.ledger()
    assert ledger.used(Tier.VRAM) == made.bytes_of(Tier.VRAM) <= 3 << 30
    held = sum(layer.hot * layer.record_bytes for layer in made.layers)
    assert ledger.used(Tier.VRAM, Purpose.FFN) == held > 0
    with pytest.raises(BudgetError, match="vram"):
        made.ledger({Tier.VRAM: made.bytes_of(Tier.VRAM) - 1})
    for layer, (a, b, c) in zip(made.layers, zip(*(made.depths(t) for t in Tier), strict=True), strict=True):
        assert (a, b, c) == ((0, layer.hot), (layer.hot, layer.warm), (layer.warm, 11008))


def leaves(value, path=()):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from leaves(inner, (*path, i))
    else:
        yield path


def flipped(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return "x" if value is None else f"{value}x"


def changed(document: dict, path: tuple, value: object) -> dict:
    copy = json.loads(json.dumps(document))
    at = copy
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return copy


def test_every_flipped_field_is_refused() -> None:
    document = json.loads(plan_text(plan()))
    paths = list(leaves(document))
    assert len(paths) > 500
    for path in paths:
        at = document
        for key in path:
            at = at[key]
        with pytest.raises(PlanError):
            parse_plan(json.dumps(changed(document, path, flipped(at))).encode())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("layers", 0, "hot"), 11009), (("layers", 0, "hot"), -1), (("layers", 0, "hot"), 1.0),
        (("layers", 0, "hot"), True), (("layers", 3, "warm"), 11009), (("layers", 3, "warm"), 0),
        (("layers", 0, "home"), "tape"), (("layers", 0, "home"), "gpu"), (("layers", 0, "predictor"), 3),
        (("layers", 0, "hot_share"), 1.5), (("layers", 0, "total_ms"), -1), (("layers", 0, "total_ms"), "1"),
        (("layers", 0, "extra"), 1), (("layers",), []), (("layers",), "none"), (("layers", 0), 5), (("extra",), 1),
        (("n_ff",), 0), (("n_ff",), 100), (("version",), 2), (("format",), "other"),
        (("model", "fingerprint"), "zz" * 32), (("model", "fingerprint"), ""), (("model",), None),
        (("mode",), "auto"), (("cluster",), 0), (("cluster",), 257), (("workload", "batch"), 0),
        (("workload", "prompt"), 9**9), (("workload", "first_token_ms"), -1), (("budgets", "disk"), 5),
        (("budgets", "vram"), 5), (("budgets", "vram"), -5), (("embedding",), "tape"), (("bytes", 1, "bytes"), 1),
        (("bytes", 0, "purpose"), "fun"), (("bytes", 0, "tier"), "disk"), (("predicted", "token_ms"), 0),
        (("predicted", "bound_ms"), 1e9), (("predicted", "x"), 1), (("method",), "magic"), (("notes",), [5]),
        (("activity",), 7), (("machine", "name"), None),
    ],
)  # fmt: skip
def test_impossible_values_are_refused_even_with_a_sound_checksum(path: tuple, value: object) -> None:
    document = json.loads(plan_text(plan()))
    parse_plan(signed(document))
    with pytest.raises(PlanError, match="make a new plan"):
        parse_plan(signed(changed(document, path, value)))


@pytest.mark.parametrize("key", ["format", "version", "model", "layers", "budgets", "predicted", "n_ff", "notes"])
def test_missing_fields_are_refused(key: str) -> None:
    document = json.loads(plan_text(plan()))
    del document[key]
    with pytest.raises(PlanError):
        parse_plan(signed(document))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damaged_bytes_are_refused(data: st.DataObject) -> None:
    raw = bytearray(plan_text(plan()).encode())
    at = data.draw(st.integers(0, len(raw) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda b: b != raw[at]))
    raw[at] = byte
    try:
        found = parse_plan(bytes(raw))
    except PlanError:
        return
    assert found == plan()  # white space between tokens, or 1E-06 for 1e-06, is no damage


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b"null", b"{" * 100000, b'{"a":NaN}', b"\xff", b'{"a":1,"a":1}'])
def test_other_files_are_refused(raw: bytes) -> None:
    with pytest.raises(PlanError):
        parse_plan(raw)


def test_missing_and_huge_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        load_plan(tmp_path / "none")
    (tmp_path / "huge").write_bytes(b" " * (5 << 20))
    with pytest.raises(PlanError, match="larger"):
        load_plan(tmp_path / "huge")


@pytest.mark.parametrize("call", ["load_plan({0!r})", "compare_plans({0!r}, {0!r})"])
def test_a_pipe_is_refused_and_not_waited_for(call: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    source = "from thermocline.api import compare_plans\nfrom thermocline.placement.plan_file import load_plan\n"
    source += call.format(str(tmp_path / "pipe"))
    ran = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)
    assert "PlanError" in ran.stderr
    assert "pipe: file: cannot be read: is a pipe; a regular file is needed; make a new plan" in ran.stderr


def test_another_model_or_activity_is_refused() -> None:
    with pytest.raises(PlanError, match="model"):
        checked(plan(), problem(name="another"))
    with pytest.raises(PlanError, match="name its file with --activity"):
        checked(plan(), problem(), activity="b2" * 32)
    with pytest.raises(PlanError, match="activity"):
        checked(plan(), problem(), activity=None)
    same_print = replace(problem().footprint, n_ff=10752)
    with pytest.raises(PlanError, match="layers"):
        checked(plan(), replace(problem(), footprint=same_print, temperatures=None))


@pytest.mark.parametrize(
    ("planned", "used", "words"),
    [
        ("a1" * 32, "b2" * 32, "it was made from (a1){6}, and (b2){6} is used; name its file with --activity"),
        ("a1" * 32, None, "it was made from (a1){6}, and none is used; name its file with --activity"),
        (None, "b2" * 32, "it was made without one, and (b2){6} is used; make a new plan"),
    ],
)
def test_another_activity_is_told_with_the_plans_file(planned: str | None, used: str | None, words: str) -> None:
    with pytest.raises(PlanError, match=f"^a/p.json: activity: {words}"):
        checked(replace(plan(), activity=planned), problem(), activity=used, source="a/p.json")


def test_a_missing_device_is_the_reason_and_no_other_machine() -> None:
    asked = problem()
    alone = replace(asked, machine=replace(asked.machine, gpu=None), budgets={Tier.RAM: 30 << 30})
    gpu = plan()
    emulated = replace(gpu, demands=tuple(row for row in gpu.demands if row[1] is not Purpose.GRAPHS))
    unused = replace(gpu, demands=tuple(row for row in gpu.demands if row[0] is not Tier.VRAM))
    for made, words in (
        (gpu, "it uses a GPU: add --device cuda"),
        (emulated, "it uses an emulated device: add --device emulated"),
        (unused, "it was made beside a GPU or an emulated device: add --device cuda or --device emulated"),
    ):
        assert checked(made, alone) == (Status.STALE, (words,))
    assert checked(make_plan(alone, ACTIVITY), asked) == (
        Status.STALE,
        ("it was made for the CPU alone: leave --device out",),
    )


def test_200_wrong_pairings_are_refused() -> None:
    made, asked = plan(), problem()
    for i in range(100):
        with pytest.raises(PlanError):
            checked(replace(made, model=f"{i:064x}"), asked)
        with pytest.raises(PlanError):
            checked(made, asked, activity=f"{i:064x}")


def test_stale_plans_say_why() -> None:
    made = plan()
    assert checked(made, problem()) == (Status.FRESH, ())
    status, reasons = checked(made, problem(), computer="c3" * 32)
    assert status is Status.STALE
    assert "another machine" in reasons[0]
    status, reasons = checked(made, problem(vram=4))
    assert status is Status.STALE
    assert "has grown" in reasons[0]
    status, reasons = checked(made, problem(vram=2))
    assert status is Status.STALE
    assert "are left" in reasons[0]
    other = replace(problem(), workload=Workload(context=8192), mode=FfnMode.EXACT)
    _, reasons = checked(made, other)
    assert any("context" in r for r in reasons)
    assert any("mode" in r for r in reasons)
    slack = {Tier.VRAM: (3 << 30) - 1, Tier.RAM: 30 << 30}
    if made.bytes_of(Tier.VRAM) < 3 << 30:
        assert checked(made, replace(problem(), budgets=slack))[0] is Status.FRESH


def test_tables() -> None:
    made = plan(2, 5)
    table = layer_table(made)
    assert len(table.rows) == 32
    assert all(len(row) == len(table.columns) for row in table.rows)
    binds = table.columns.index("binds")
    assert {str(row[binds]).split(" in ")[0] for row in table.rows} <= {"ffn", "attention", "predictor", "crossing"}
    tiers = {(row[0], row[1]): row[2] for row in tier_table(made).rows}
    assert tiers[Tier.VRAM, "sum"] == made.bytes_of(Tier.VRAM)
    assert (Tier.DISK, "ffn weights") in tiers
    speeds = dict(speed_table(made).rows)
    assert speeds["tokens per second, decode"] == pytest.approx(1e3 / made.predicted.step_ms, rel=1e-4)


def test_the_predicted_step_is_the_sum_of_its_layers() -> None:
    made = plan()
    layers = sum(layer.total_ms for layer in made.layers)
    assert layers < made.predicted.step_ms < layers * 1.2
    for layer in made.layers:
        parts = layer.attention_ms + layer.predictor_ms + layer.crossing_ms + max(layer.hot_ms, layer.cold_ms)
        assert layer.total_ms == pytest.approx(parts, abs=1e-5)


def test_more_memory_and_bandwidth_help() -> None:
    gains = sensitivities(problem(mode=FfnMode.EXACT))
    assert [g.change for g in gains[:3]] == ["1 GiB more RAM", "1 GiB more VRAM", "10 GB/s more RAM bandwidth"]
    assert gains[0].speedup == pytest.approx(1.0, abs=1e-3)
    assert gains[1].speedup > 1.05
    assert gains[2].speedup > 1.05
    assert len(gain_table(gains).rows) == len(gains)


def test_a_shorter_context_helps_where_caches_take_what_neurons_need() -> None:
    long = problem(mode=FfnMode.EXACT)
    long = replace(long, workload=replace(long.workload, context=8 * long.workload.context))
    gain, work = sensitivities(long)[-1], long.workload
    assert gain.change == f"a context of {work.prompt + work.output} tokens, not {work.context}"
    assert gain.speedup > 1.05
    full = replace(long, workload=replace(work, context=work.prompt + work.output))
    assert not any("context" in g.change for g in sensitivities(full))


def test_gains_are_priced_as_the_plan_is() -> None:
    gains = sensitivities(problem(), lambda changed: 2.0 if changed.limits[Tier.VRAM] > 3 << 30 else 3.0)
    assert {g.change: g.speedup for g in gains}["1 GiB more VRAM"] == 1.5
    assert {g.before_ms for g in gains} == {3000.0}


def test_a_layer_that_waits_for_the_disk_says_so() -> None:
    made = plan(2, 5)
    waits = [layer for layer in made.layers if layer.disk_ms > max(layer.attention_ms, layer.hot_ms)]
    assert waits
    assert all(layer.binds == "ffn in disk" for layer in waits if 2 * layer.disk_ms > layer.cold_ms)


def test_diff() -> None:
    assert plan_diff(plan(), plan()).rows == ()
    rows = {row[0]: row[1:] for row in plan_diff(plan(), plan(4, 30)).rows}
    assert rows["budget of vram"] == (3 << 30, 4 << 30)
    assert any(str(name).startswith("layer ") and str(name).endswith(" hot") for name in rows)
    assert "predicted.token_ms" in rows
    with pytest.raises(UsageError, match="cannot be compared"):
        plan_diff(plan(), replace(plan(), n_ff=5))
