"""The script for a machine with a GPU runs from end to end without one, at tiny sizes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
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
    assert "rows 4, block 1024, warps 4" in said
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
