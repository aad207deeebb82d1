"""The bytes of a decode step, counted from a file by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from thermocline import LLM
from thermocline.config import CacheType
from thermocline.files.open import open_model
from thermocline.model.families import family_of
from thermocline.ops.contract import FfnWork
from thermocline.runtime.traffic import Traffic, traffic_of

ROW = 64 // 32 * 34
"""Bytes of a Q8_0 row of 64."""


def traffic(path: Path, type_v: CacheType = CacheType.F16) -> Traffic:
    source = open_model(path)
    family = family_of(source)
    spec = family.spec(source)
    return traffic_of(spec, family.weights(source, spec), CacheType.F16, type_v)


def test_rows_and_trunk_are_those_of_the_file(tiny_model: Path) -> None:
    """2 layers: q and output 64 rows each, k and v 32 each; 260 rows of the head, one of the embedding, 5 norms."""
    found = traffic(tiny_model)
    assert found.trunk == 2 * (64 + 64 + 32 + 32) * ROW + 260 * ROW + ROW + 5 * 64 * 4
    assert (found.gate_row, found.up_row, found.down_row) == (0, ROW, ROW)
    assert found.neurons == 2 * 96
    assert found.kv_position == 2 * 32 * 2


def test_a_gate_and_a_standard_down_projection_are_counted(tiny_silu: Path) -> None:
    """SwiGLU keeps its down projection as it is: 64 rows of 96, spread over 96 neurons."""
    found = traffic(tiny_silu)
    assert found.gate_row == ROW
    assert found.down_row == pytest.approx(64 * (96 // 32 * 34) / 96)


def test_the_cache_is_counted_by_its_types(tiny_model: Path) -> None:
    assert traffic(tiny_model, CacheType.F32).kv_position == 32 * (2 + 4)


def test_windows_bound_how_far_back_a_layer_reads() -> None:
    found = Traffic(0, 0, 0, 0, kv_position=1.0, windows=(0, 4), neurons=1)
    nothing = FfnWork(0, 0, 0, 0)
    assert [found.step(nothing, position) for position in (0, 3, 9)] == [2, 8, 14]


def test_a_run_adds_them_up(tiny_model: Path) -> None:
    with LLM.load(tiny_model, threads=1, mode="dense") as llm:
        report = llm.generate("ab", temperature=0, max_tokens=4, ignore_eos=True).report
    found = traffic(tiny_model)
    ffn = 2 * 96 * 2 * ROW
    kv = sum(2 * (position + 1) * found.kv_position for position in (2, 3, 4))
    assert report.bytes_read == 3 * (found.trunk + ffn) + kv
