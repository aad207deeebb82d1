"""The CPU's decode step written down once: the same bits as the calls it was written from, and the same refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thermocline.config import LoadSettings, Mode
from thermocline.errors import ContextError, UsageError
from thermocline.files.open import open_model
from thermocline.memory.kv_cache import KVCache
from thermocline.memory.loader import load_transformer
from thermocline.model.network import Outputs, Segment, Transformer
from thermocline.ops.cpu import CpuOps
from thermocline.runtime.counting import FiringCounts
from thermocline.runtime.loading import load_model
from thermocline.runtime.sequence import TransformerSequence

TOKENS = [5, 3, 9, 2, 2, 7, 11, 4, 6]


def both(transformer: Transformer, tokens: list[int]) -> list[tuple[bytes, Any, bytes, Any]]:
    """Logits and work of a sequence, which takes its steps from a tape, and of the network itself."""
    n_ctx = len(tokens)
    cache, workspace = KVCache(transformer.spec, transformer.ops, n_ctx), transformer.workspace(4, 1)
    sequence = TransformerSequence(transformer, KVCache(transformer.spec, transformer.ops, n_ctx), 4)
    assert sequence._taped is not None
    found, start = [], 0
    for count in (3, *(1 for _ in tokens[3:])):
        part = np.array(tokens[start : start + count], np.int32)
        taped = sequence.step(part, start, logits=True)
        plain = transformer.step(part, (Segment(cache, start, count),), workspace, Outputs.LAST)
        assert taped.logits is not None
        found.append((taped.logits.tobytes(), taped.work, plain.logits[0].tobytes(), plain.work))
        start += count
    return found


@pytest.mark.parametrize("mode", [Mode.DENSE, Mode.EXACT, Mode.PREDICTED])
def test_a_tape_makes_the_same_bits(tiny_model: Path, with_predictor: Callable[..., Path], mode: Mode) -> None:
    path = with_predictor(tiny_model) if mode is Mode.PREDICTED else tiny_model
    with open_model(path) as source:
        model = load_model(source, LoadSettings(mode=mode, threads=2))
        for taped, work, plain, wanted in both(model.transformer, TOKENS):
            assert taped == plain
            assert work == wanted
        model.close()


def test_a_family_with_positions_and_biases(make_opt: Callable[[], Any]) -> None:
    transformer, _ = load_transformer(make_opt(), CpuOps(2), n_ctx=32)
    for taped, work, plain, wanted in both(transformer, TOKENS):
        assert taped == plain
        assert work == wanted


def test_what_does_not_fit_is_refused_before_it_plays(tiny_model: Path) -> None:
    with open_model(tiny_model) as source:
        model = load_model(source, LoadSettings(mode=Mode.EXACT, threads=1))
        transformer = model.transformer
        sequence = TransformerSequence(transformer, KVCache(transformer.spec, transformer.ops, 2), 4)
        sequence.step(np.array([5, 3], np.int32), 0, logits=True)
        with pytest.raises(ContextError):
            sequence.step(np.array([1], np.int32), 2, logits=True)
        with pytest.raises(UsageError, match="vocabulary"):
            sequence.step(np.array([transformer.spec.n_vocab], np.int32), 1, logits=True)
        model.close()


def test_other_devices_and_counting_take_the_plain_way(tiny_model: Path) -> None:
    with open_model(tiny_model) as source:
        settings = LoadSettings(device="emulated", vram_budget="90KB", threads=1)
        model = load_model(source, settings)
        assert model.engine._sequence._taped is None  # type: ignore[attr-defined]
        model.close()
        transformer, _ = load_transformer(source, CpuOps(1), n_ctx=32)
        cache = KVCache(transformer.spec, transformer.ops, 8)
        counter = FiringCounts(transformer.spec.n_layer, transformer.spec.n_ff)
        assert TransformerSequence(transformer, cache, 4, counter=counter)._taped is None
