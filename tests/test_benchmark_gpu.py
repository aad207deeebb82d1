"""The script for a machine with a GPU runs from end to end without one, at tiny sizes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from thermocline.config import Mode
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
    assert "left out: dry, all budgets" in said
    assert "ours" not in said


def test_drawn_models_are_as_sparse_as_asked_and_their_predictors_know() -> None:
    from benchmarks.synthetic import Shape
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
            case | memory | {"placement": "ours", "tok/s": 50.0},
            case | {"placement": "layer split", "tok/s": 20.0},
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
    assert found["7b, 50% (planned 1.00): times the layer split"] == (2.5, True)
    assert found["7b, 50%: off the prediction"] == (0.111, True)
    assert found["7b, 25%: times the layer split"] == ("-", False)
    assert found["memory held beyond the budget, GB"] == (0.1, False)
    assert found["torch's peak off the ledger"] == (0.014, True)
    assert found["tests on the device"] == (True, True)
    assert not any(row["met"] for row in claims({}))


def test_what_was_measured_becomes_a_table() -> None:
    from benchmarks.report import gpu_part

    row = {"model": "7b", "budget": "50%", "mode": "predicted", "predicted": 45.0, "prompt tok/s": 900.0}
    kept = {
        "device": "cuda/a card",
        "copy GB/s": 3000.0,
        "models": [
            row | {"placement": "ours", "tok/s": 40.0, "held GB": 7.1, "budget GB": 7.2},
            row | {"placement": "layer split", "tok/s": 10.0},
            row | {"placement": "ours", "budget": "10%", "failed": "vram lacks bytes"},
        ],
    }
    lines = gpu_part(kept).splitlines()
    assert lines[0].startswith("On cuda/a card")
    assert lines[-1] == "| 7b, predicted, 50% | 40.0 | 45.0 | 10.0 | 4.00 | 900 | 7.1 of 7.2 |"
    assert gpu_part(kept | {"models": kept["models"][2:]}) == ""
