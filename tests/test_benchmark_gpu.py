"""The script for a machine with a GPU runs from end to end without one, at tiny sizes."""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from thermocline.config import Mode
from thermocline.hardware.machine import Tier
from thermocline.memory.kv_cache import KVCache
from thermocline.memory.loader import load_transformer
from thermocline.model.network import Segment
from thermocline.ops.cpu import CpuOps

ROOT = Path(__file__).parent.parent
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tiny sizes are the interpreter's")


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_it_runs_from_end_to_end() -> None:
    said = run()
    assert "matrix-vector" in said
    assert "a layer" in said
    for placement in ("ours", "layer split"):
        assert placement in said
    assert "failed" not in said
    assert "left out" not in said
    for tiles in ("rows 4, block 1024, warps 4", "rows 2, block 512, warps 1", "columns 512, warps 1"):
        assert tiles in said
    assert "times the layer split" in said


def test_parts_are_chosen() -> None:
    said = run("--parts", "kernels")
    assert "matrix-vector" in said
    assert "ours" not in said
    assert "warps 4" not in said


def test_what_there_is_no_time_for_is_said() -> None:
    said = run("--minutes", "0")
    assert "left out: dry: 0 s are left" in said
    assert "ours" not in said


# --- what fails costs its own row ------------------------------------------------------------------------------------


class CompilationError(Exception):
    """As Triton's, which is no RuntimeError."""


def fails(*_: Any, **__: Any) -> Any:
    raise CompilationError("at 3:14\nin many lines")


def failing_capture() -> None:
    raise RuntimeError("capture was invalidated")


FAILED = "CompilationError: at 3:14"


def bench(seconds: float = 100.0) -> Any:
    from benchmarks.gpu_bench import Bench
    from thermocline.ops.cuda.ops import CudaOps

    return Bench(CudaOps(), CpuOps(1), time.monotonic() + seconds)


def job(name: str) -> Callable[..., None]:
    """The work of a part, as the script has it."""
    from benchmarks.gpu import PARTS, jobs

    args = argparse.Namespace(parts=PARTS, models=["dry"], budgets=(0.5, 1.0))
    return next(job.work for job in jobs(args) if job.name == name)


@interpreted
def test_kernels_that_fail_cost_their_own_rows_and_all_are_kept_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gpu_kernels
    from benchmarks.gpu_claims import claims
    from benchmarks.gpu_models import vram_rates

    made, timed, cold, seconds = [], [], gpu_kernels.cold_weights, gpu_kernels.Bench.seconds

    def cold_weights(bench: Any, fmt: Any, read: int) -> Any:
        assert all(numbers() is None for numbers in made)  # one format's matrices at a time
        if fmt.name == "BF16":
            fails()
        found = cold(bench, fmt, read)
        made.extend(weakref.ref(matrix.numbers) for matrix in found[0])
        return found

    def timing(bench: Any, call: Any, *more: Any) -> float:
        timed.append(1)
        return fails() if len(timed) == 2 else seconds(bench, call, *more)  # the first call is a copy

    monkeypatch.setattr(gpu_kernels, "cold_weights", cold_weights)
    monkeypatch.setattr(gpu_kernels.Bench, "seconds", timing)
    results: dict[str, Any] = {}
    kept: list[int] = []
    job("kernels")(bench(), results, lambda: kept.append(len(results["kernels"])))
    assert [(row["format"], row["kernel"][:6], row.get("failed")) for row in results["kernels"]] == [
        ("F16", "matrix", FAILED), ("F16", "sparse", None), ("BF16", "all", FAILED), ("Q8_0", "matrix", None),
        ("Q8_0", "sparse", None), ("Q4_0", "matrix", None), ("Q4_0", "sparse", None),
    ]  # fmt: skip
    assert kept == [1, 2, 3, 4, 5, 6, 7]
    assert not any(row["met"] for row in claims(results))
    results["kernels"][1]["GB/s"] = 900.0
    assert vram_rates(results | {"copy GB/s": 2000.0}, 1e12) == (1500e9, 900e9)
    assert vram_rates({}, 1e12) == (750e9, 750e9)


@interpreted
@pytest.mark.parametrize("failing", ["none", "plain"])
def test_a_way_to_cross_that_fails_costs_its_own_row(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    from benchmarks import gpu_kernels
    from benchmarks.gpu_claims import claims

    closed, close, stepped = [], gpu_kernels.Memory.close, gpu_kernels.CapturedStep
    which = iter(["none", "plain"])
    monkeypatch.setattr(
        gpu_kernels, "CapturedStep", lambda *a, **b: fails() if next(which) == failing else stepped(*a, **b)
    )
    monkeypatch.setattr(gpu_kernels.Memory, "close", lambda memory: closed.append(close(memory)))
    results: dict[str, Any] = {}
    job("crossings")(bench(), results, lambda: None)
    rows = {row["crossing"]: row for row in results["crossings"]}
    assert rows[failing]["failed"] == FAILED
    assert [name for name, row in rows.items() if "µs a step" in row] == [n for n in ("none", "plain") if n != failing]
    assert not any("µs a layer" in row for row in rows.values())
    assert len(closed) == 2
    assert not any(row["met"] for row in claims(results))


@interpreted
def test_a_tuning_that_does_not_compile_costs_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gpu_kernels

    times = iter([CompilationError("at 3:14"), *range(1, 50)])

    def seconds(*_: Any) -> float:
        taken = next(times)
        if isinstance(taken, Exception):
            raise taken
        return taken

    monkeypatch.setattr(gpu_kernels.Bench, "seconds", seconds)
    results: dict[str, Any] = {}
    job("tile sizes")(bench(), results, lambda: None)
    first, *others = results["tile sizes"]
    assert (first["µs"], first["failed"]) == (None, FAILED)
    assert len(others) == 17
    assert all(row["µs"] for row in others)


@interpreted
def test_a_model_goes_on_after_the_case_that_ended_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gpu_models

    class Killed(BaseException):
        pass

    tried: list[str] = []

    def run_case(source: Any, case: Any, *_: Any) -> dict[str, Any]:
        tried.append(case.name)
        if len(tried) == 2:
            raise Killed
        return {"failed": FAILED} if len(tried) == 3 else {"tok/s": 5.0}

    monkeypatch.setattr(gpu_models, "run_case", run_case)
    monkeypatch.setattr(gpu_models, "print_table", lambda rows: None)
    results: dict[str, Any] = {}
    with pytest.raises(Killed):
        job("dry")(bench(), results, lambda: None)
    job("dry")(bench(), results, lambda: None)
    rows = [(r["budget"], r["mode"], r["placement"], r.get("tok/s", r.get("failed"))) for r in results["models"]]
    assert rows == [
        ("50%", "predicted", "ours", 5.0),
        ("100%", "exact", "ours", "it did not come to its end"),
        ("100%", "predicted", "ours", FAILED),
        ("100%", "exact", "layer split", 5.0),
        ("100%", "predicted", "layer split", 5.0),
    ]
    assert len(tried) == 5


@interpreted
def test_a_model_is_begun_again_as_long_as_it_gets_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gpu

    begun, rows = [], iter([1, 2, 2])

    def apart(name: str, part: Any, results: dict[str, Any], seconds: float, keep: Any) -> str | None:
        begun.append(name)
        if name == "dry":
            results["models"] = [{"placement": "ours", "mode": "exact", "failed": "so"}] * next(rows)
        return f"{name}: its process ended with -11"

    monkeypatch.setattr(gpu, "apart", apart)
    monkeypatch.setattr(sys, "argv", ["gpu", "--parts", "models", "profile"])
    gpu.main()
    assert begun == ["kernels", "crossings", "dry", "dry", "dry", "profile"]


def test_time_is_shared_so_that_all_parts_get_a_turn_in_seven_minutes() -> None:
    from benchmarks.gpu import TIMES, Time, seconds_for
    from benchmarks.gpu_models import BUDGETS, seconds_of_next

    names = list(TIMES)
    left, got = 7 * 60.0, {}
    for i, name in enumerate(names):
        got[name] = seconds_for(TIMES[name], [TIMES[other] for other in names[i + 1 :]], left)
        left -= got[name]
        assert got[name] >= TIMES[name].kept
    assert got["kernels"] == 90
    assert got["first model"] >= 120
    left = 60.0  # of which the first part gets what it is kept, and no more
    assert seconds_for(Time(40, 90), [Time(50, 90)], left) == 40
    assert seconds_for(Time(80, 90), [Time(50, 90)], left) == 60
    assert set(BUDGETS[:3]) == {1.0, 0.5, 0.25}
    assert seconds_of_next([]) == seconds_of_next([80.0]) == 10.0
    assert seconds_of_next([80.0, 20.0, 10.0, 30.0]) == 26.0


def test_tests_on_the_device_are_those_that_need_one() -> None:
    from benchmarks.gpu import pytest_command

    told = {**os.environ, "TRITON_INTERPRET": "0"}
    shown = subprocess.run(
        [*pytest_command(), "--collect-only", "-q"], capture_output=True, text=True, cwd=ROOT, env=told, check=False
    ).stdout
    for file in (
        "ops/test_gpu_kernels",
        "memory/test_movable_gpu",
        "memory/test_hybrid_gpu",
        "runtime/test_gpu_memory",
    ):
        assert f"tests/{file}.py" in shown
    assert "compile" not in shown


# --- models -----------------------------------------------------------------------------------------------------------


@interpreted
def test_all_that_a_case_holds_is_in_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gpu_cases, gpu_models
    from benchmarks.gpu_bench import Bench
    from thermocline.placement.ledger import Purpose

    class Cycle:
        pass

    run: Bench = bench()
    source = gpu_models.drawn(run, "dry")
    machine = gpu_models.machine_of(run, {})
    wanted = next(w for w in gpu_models.wanted_cases(run, "dry", source, machine, [1.0]) if w.case.name != "ours")
    left = Cycle()
    left.itself, seen = left, weakref.ref(left)  # type: ignore[attr-defined]
    gc.disable()
    try:
        del left
        loaded = gpu_cases.Loaded(source, wanted.case, run.cpu, "auto", wanted.budget, gpu_models.LENGTHS)
    finally:
        gc.enable()
    assert seen() is None  # what the last case left in a cycle
    _, call = loaded.stepping()
    used = loaded.memory.ledger.used
    shape, context = gpu_models.MODELS["dry"], gpu_models.LENGTHS.context
    assert used(Tier.VRAM, Purpose.KV) == shape.n_layer * context * 2 * shape.n_head_kv * shape.head_dim * 2
    before = used(Tier.VRAM, Purpose.ACTIVATIONS)
    assert before > 4 * shape.n_embd * gpu_models.LENGTHS.prompt
    call(1)
    assert used(Tier.VRAM, Purpose.ACTIVATIONS) == before
    with monkeypatch.context() as patch:
        patch.setattr(gpu_cases, "CapturedStep", lambda *_, **__: failing_capture())
        way, call = loaded.stepping()
    assert way == "plain (RuntimeError: capture was invalidated)"
    assert len(call(1)) == 320
    loaded.close()
    assert loaded.memory.ledger.used(Tier.VRAM) == 0
    memory: list[Any] = []
    monkeypatch.setattr(gpu_cases, "load_transformer", lambda source, m, **_: fails(memory.append(m)))
    row = gpu_cases.run_case(source, wanted.case, run.cpu, "auto", wanted.budget, gpu_models.LENGTHS)
    assert row == {"placement": "layer split", "failed": FAILED}
    assert memory[0].ledger.used(Tier.VRAM) == 0


def test_drawn_weights_lie_in_memory_that_numpy_made() -> None:
    """Its pages are huge, as those are that bandwidth is measured on; torch's are not."""
    from benchmarks.synthetic_gpu import _weight

    value = torch.arange(12.0).view(3, 4)
    for drawn in (value, value.half(), value.T.half()):
        weight = _weight("w", drawn)
        data: Any = weight.data
        while data.base is not None:
            data = data.base
        assert isinstance(data, np.ndarray)
        assert data.flags.owndata
        kept = weight.data.view(np.float32 if drawn.dtype is torch.float32 else np.float16)
        np.testing.assert_array_equal(kept, drawn.numpy())


def test_drawn_models_are_as_sparse_as_asked_and_their_predictors_know() -> None:
    from benchmarks.synthetic_families import Shape
    from benchmarks.synthetic_gpu import synthetic

    shape = Shape(128, 512, 3, 4, 2, 320)
    source = synthetic(shape, 0.12, 1, torch.device("cpu"))
    assert (np.diff(source.heat, axis=1) <= 0).all()
    fired, rows = {}, {}
    for mode in (Mode.EXACT, Mode.PREDICTED):
        transformer, _ = load_transformer(source, CpuOps(1), n_ctx=32, mode=mode, predictor=source.predictor)
        cache, workspace = KVCache(transformer.spec, transformer.ops, 32), transformer.workspace(1)
        fired[mode], rows[mode] = 0, 0
        for i in range(20):
            work = transformer.step(np.array([7 * i], np.int32), (Segment(cache, i, 1),), workspace).work
            fired[mode] += work.fired
            rows[mode] += work.gate_rows
    assert 0.10 < fired[Mode.EXACT] / (20 * 3 * 512) < 0.14
    assert fired[Mode.PREDICTED] >= 0.98 * fired[Mode.EXACT]
    assert rows[Mode.PREDICTED] < 0.2 * rows[Mode.EXACT]


def test_claims_stand_beside_what_was_measured() -> None:
    from benchmarks.gpu_claims import claims

    case = {"model": "7b", "budget": "50%", "mode": "predicted", "predicted": 45.0, "sampler µs": 60.0}
    memory = {"held GB": 7.3, "budget GB": 7.2, "ledger GB": 7.0, "torch peak GB": 6.9}
    results = {
        "copy GB/s": 4000.0,
        "kernels": [{"kernel": "matrix-vector", "format": "F16", "of copy": 0.8}],
        "crossings": [{"crossing": "calls", "µs a layer": 40.0}, {"crossing": "memory", "µs a layer": 12.0}],
        "models": [
            case | memory | {"placement": "ours", "tok/s": 50.0, "bytes allow": 80.0},
            case | {"placement": "layer split", "tok/s": 20.0},
            case | {"placement": "layer split, dense", "tok/s": 10.0, "predicted": 9.0},
            case | {"placement": "ours", "mode": "exact", "budget": "100%", "tok/s": 200.0, "GB/s": 2700.0},
            case | {"placement": "ours", "budget": "25%", "failed": "vram lacks bytes"},
        ],
        "tests": {"passed": True},
    }
    found = {row["claim"]: (row["measured"], row["met"]) for row in claims(results)}
    assert found["matrix-vector, F16, of copies"] == (0.8, True)
    assert found["7b resident, exact, of copies"] == (0.675, False)
    assert found["crossing, µs a layer"] == (12.0, True)
    assert found["sampler, µs"] == (60.0, True)
    assert found["7b, 50%: times the layer split (planned 1.00, RAM's bytes allow 4.00)"] == (2.5, True)
    assert found["7b, 50%: times a dense layer split (planned 5.00, RAM's bytes allow 8.00)"] == (5.0, True)
    assert found["7b, 50%: off the prediction"] == (0.111, True)
    assert found["7b, 25%: times the layer split"] == ("-", False)
    assert found["memory held beyond the budget, GB"] == (0.1, False)
    assert found["torch's peak off the ledger"] == (0.014, True)
    assert found["tests on the device"] == (True, True)
    assert not any(row["met"] for row in claims({}))


def test_a_part_that_fails_hangs_or_dies_takes_no_other_with_it() -> None:
    from benchmarks.gpu_apart import apart

    def told(results: dict[str, Any], tell: Any) -> None:
        results["told"] = 1
        tell()
        results["more"] = results["told"] + 1

    def fails(results: dict[str, Any], tell: Any) -> None:
        results["before"] = True
        raise RuntimeError("an illegal memory access\nin many lines")

    def hangs(results: dict[str, Any], tell: Any) -> None:
        results["kept"] = True
        tell()
        results["lost"] = True
        time.sleep(600)

    results: dict[str, Any] = {}
    kept: list[dict[str, Any]] = []

    def keep() -> None:
        kept.append(dict(results))

    assert apart("told", told, results, 60, keep) is None
    assert kept == [{"told": 1}, {"told": 1, "more": 2}]
    assert apart("fails", fails, results, 60, keep) == "fails: RuntimeError: an illegal memory access"
    assert results["before"]
    began = time.monotonic()
    assert apart("hangs", hangs, results, 2, keep) == "hangs: not done after 2 s"
    assert time.monotonic() - began < 300
    assert results["kept"]
    assert "lost" not in results
    assert apart("dies", lambda *_: os._exit(3), results, 60, keep) == "dies: its process ended with 3"


def test_a_part_that_is_done_and_stays_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gpu_apart

    def stays(results: dict[str, Any], tell: Any) -> None:
        threading.Thread(target=time.sleep, args=(600,)).start()
        results["process"] = os.getpid()

    results: dict[str, Any] = {}
    monkeypatch.setattr(gpu_apart, "SECONDS_TO_EXIT", 2.0)
    assert gpu_apart.apart("stays", stays, results, 60, lambda: None) is None
    with pytest.raises(ProcessLookupError):
        os.kill(results["process"], 0)


def test_no_placement_reads_less_of_ram_than_the_bound() -> None:
    from benchmarks.gpu_cases import Lengths, cases, problem_of, whole
    from benchmarks.synthetic_families import Shape
    from benchmarks.synthetic_gpu import synthetic
    from thermocline.hardware import catalogue
    from thermocline.placement.cost import FfnMode
    from thermocline.placement.workload import NO_OVERHEADS

    source = synthetic(Shape(128, 1024, 3, 4, 2, 320), 0.12, 1, torch.device("cpu"))
    machine = catalogue.machine("t4+i5-12400")
    problem = problem_of(source, machine, Lengths(64, 6, 2), FfnMode.PREDICTED, NO_OVERHEADS)
    fixed = sum(demand.nbytes for demand in problem.fixed(Tier.VRAM))
    for share in (0.4, 0.6, 0.8):
        ours, split, dense = cases(problem, fixed + int(share * (whole(problem) - fixed)), dense=True)
        assert (split.name, dense.name) == ("layer split", "layer split, dense")
        assert dense.mode is Mode.DENSE
        assert 0 < ours.bound < min(ours.decode, split.decode)


def test_what_was_measured_becomes_a_table() -> None:
    from benchmarks.report import gpu_part

    row = {"model": "7b", "budget": "50%", "mode": "predicted", "predicted": 45.0, "prompt tok/s": 900.0}
    kept = {
        "device": "cuda/a card",
        "copy GB/s": 3000.0,
        "models": [
            row | {"placement": "ours", "tok/s": 40.0, "held GB": 7.1, "budget GB": 7.2},
            row | {"placement": "layer split", "tok/s": 10.0},
            row | {"placement": "layer split, dense", "tok/s": 5.0},
            row | {"placement": "ours", "budget": "10%", "failed": "vram lacks bytes"},
        ],
    }
    lines = gpu_part(kept).splitlines()
    assert lines[0].startswith("On cuda/a card")
    assert lines[-1] == "| 7b, predicted, 50% | 40.0 | 45.0 | 10.0 | 4.00 | 8.00 | 900 | 7.1 of 7.2 |"
    assert gpu_part(kept | {"models": kept["models"][3:]}) == ""
    assert gpu_part({"device": "cuda/a card"}) == ""
