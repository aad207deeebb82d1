"""A model's file that is removed, replaced or cut short while it generates: the run's affair, and nobody else's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from thermocline import LLM
from thermocline.errors import HardwareError
from thermocline.files.open import open_model
from thermocline.memory.convert import convert

GREEDY = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}
VANISH = 5
"""Tokens that are generated before."""


def removed(path: Path) -> None:
    path.unlink()


def replaced(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(b"another model")
    other.replace(path)


def cut_short(path: Path) -> None:
    os.truncate(path, 4096)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.fixture(params=[{}, {"device": "emulated", "vram_budget": "64KiB"}], ids=["ram", "emulated"])
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"threads": 2, "mode": "exact", **request.param}


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """With records, so that nothing but the mapping has the weights."""
    with open_model(tiny_model) as source:
        convert(source, tmp_path / "tiny.gguf", None, records=True)
    return tmp_path / "tiny.gguf"


def generated(llm: LLM, path: Path, vanish: Callable[[Path], None]) -> tuple[int, ...]:
    tokens: list[int] = []
    with llm.stream("hello", **GREEDY) as stream:
        for item in stream:
            tokens.append(item.token)
            if len(tokens) == VANISH:
                vanish(path)
    return tuple(tokens)


@pytest.mark.parametrize("vanish", [removed, replaced])
def test_a_file_that_lost_its_name_is_read_to_the_end(
    model: Path, settings: dict[str, Any], vanish: Callable[[Path], None]
) -> None:
    with LLM.load(model, **settings) as llm:
        wanted = llm.generate("hello", **GREEDY).tokens
        assert generated(llm, model, vanish) == wanted
        assert llm.generate("hello", **GREEDY).tokens == wanted


@pytest.mark.parametrize("vanish", [cut_short, emptied])
def test_a_file_that_is_cut_short_ends_the_runs_on_it_and_no_others(
    model: Path, tmp_path: Path, settings: dict[str, Any], vanish: Callable[[Path], None]
) -> None:
    other = tmp_path / "other.gguf"
    shutil.copy(model, other)
    with LLM.load(other, **settings) as whole, LLM.load(model, **settings) as llm:
        wanted = whole.generate("hello", **GREEDY).tokens
        memory = llm._loaded.placing.memory
        account = memory.ledger.rows()
        with pytest.raises(HardwareError, match=r"tiny\.gguf: became shorter"):
            generated(llm, model, vanish)
        with pytest.raises(HardwareError, match="load it again"):
            llm.generate("hello", **GREEDY)
        assert memory.ledger.rows() == account
        assert whole.generate("hello", **GREEDY).tokens == wanted
    assert not memory.ledger.rows()
    shutil.copy(other, model)
    with LLM.load(model, **settings) as llm:
        assert llm.generate("hello", **GREEDY).tokens == wanted
