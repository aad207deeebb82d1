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
