"""Synthetic models of every family: the engine fires as the generator foresaw, and the predictor is exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import synthetic
from benchmarks.synthetic import Generator, unfit, write_models
from benchmarks.synthetic_families import KINDS, Shape
from thermocline import _native
from thermocline.config import CacheType, Mode
from thermocline.files.companion import companion
from thermocline.files.open import open_model
from thermocline.files.quantize import to_float
from thermocline.files.sidecar import SidecarKind
from thermocline.memory.kv_cache import KVCache
from thermocline.memory.loader import load_transformer
from thermocline.model.network import Outputs, Segment
from thermocline.ops.cpu import CpuOps

SHAPE = Shape(n_embd=320, n_ff=448, n_layer=3, n_head=4, n_head_kv=2, n_vocab=400)
TOKENS = 128


@pytest.mark.parametrize("family", KINDS)
def test_every_family_fires_as_foreseen(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "CALIBRATION_TOKENS", TOKENS)
    shape = replace(SHAPE, n_head_kv=SHAPE.n_head) if KINDS[family].learned else SHAPE
    generator = Generator(shape, 0.12, 1, family)
    write_models(generator, list(generator.tensors()), "f32", "synthetic-x", tmp_path)
    assert np.mean(generator.measured) == pytest.approx(0.12, abs=0.02)
    for predictor, x, fired in generator.predictions:
        scores = np.maximum(x @ to_float(predictor.fc1).T, 0) @ to_float(predictor.fc2).T
        clear = np.abs(scores) > 1e-3 * np.abs(scores).max()  # offsets are those of a token, which then is at 0
        assert clear.mean() > 0.9
        assert ((scores > 0) != fired)[clear].mean() < 1e-3
    for layout in ("", ".records"):
        path = tmp_path / f"synthetic-x.f32{layout}.gguf"
        assert companion(path, SidecarKind.PREDICTOR).is_file()
        with open_model(path) as source:
            ops = CpuOps(2, _native.isa_levels()[-1])
            network, _ = load_transformer(source, ops, n_ctx=TOKENS, mode=Mode.EXACT)
            cache = KVCache(network.spec, ops, TOKENS, CacheType.F32, CacheType.F32)
            tokens = generator.tokens.astype(np.int32)
            result = network.step(tokens, (Segment(cache, 0, TOKENS),), network.workspace(TOKENS), Outputs.LAST)
        share = result.work.fired / (TOKENS * shape.n_ff * shape.n_layer)
        assert share == pytest.approx(np.mean(generator.measured), abs=0.5 / TOKENS)
        assert np.isfinite(result.logits).all()


@pytest.mark.parametrize(
    ("changes", "outtype", "problem"),
    [
        ({"n_layer": 0}, "f16", "n_layer is 0"),
        ({"n_embd": 256}, "f16", "n_embd is 256; allowed: even multiples of 4 heads above 257"),
        ({"n_head_kv": 3}, "f16", "n_head_kv is 3; allowed: divisors of 4 heads"),
        ({"n_vocab": 259}, "f16", "n_vocab is 259"),
        ({}, "q4_k_m", "q4_k_m has blocks of 256"),
        ({"n_ff": 450}, "q8_0", "q8_0 has blocks of 32"),
        ({}, "q8_0", ""),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, int], outtype: str, problem: str) -> None:
    sizes = {name: getattr(SHAPE, name) for name in SHAPE.__slots__} | changes
    found = unfit(Shape(**sizes), [outtype])
    assert found.startswith(problem)
    assert bool(found) == bool(problem)
