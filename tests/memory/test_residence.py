"""The first touch of mapped weights, and locks."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from thermocline.errors import HardwareError, ModelFormatError
from thermocline.files.formats import F32
from thermocline.files.mapped import map_file
from thermocline.files.weight import Weight
from thermocline.memory import residence
from thermocline.memory.loader import load_transformer
from thermocline.ops.reference import ReferenceOps

PIECES = 3
SIZE = PIECES * residence.PIECE - 4096
ROWS = SIZE // 4096


def mapped_weights(path: Path) -> list[Weight]:
    """Two weights, given against the order of the file, which is one page short of three pieces."""
    with path.open("wb") as file:
        file.truncate(SIZE)
    mapping = map_file(path)
    half = ROWS // 2 * 4096
    parts = [(half, SIZE), (0, half)]
    return [
        Weight(f"w{start}", F32, ((stop - start) // 4096, 1024), mapping.view(start, stop).reshape(-1, 4096))
        for start, stop in parts
    ]


def resident_bytes(path: Path) -> int:
    """How much of the mapping of `path` this process holds, as the kernel counts it."""
    maps = Path("/proc/self/smaps").read_text()
    return 1024 * int(re.search(r"Rss: +(\d+)", maps[maps.index(str(path)) :])[1])  # type: ignore[index]


def test_weights_are_read_in_order_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "model"
    weights, told = mapped_weights(path), list[tuple[int, int]]()
    assert resident_bytes(path) < SIZE / 2
    residence.touch(path, weights, lambda done, total: told.append((done, total)))
    assert told == [(min((i + 1) * residence.PIECE, SIZE), SIZE) for i in range(PIECES)]
    assert resident_bytes(path) == SIZE


def test_kernels_without_the_advice_are_served_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    weights = mapped_weights(path)
    monkeypatch.setattr(residence, "POPULATE_READ", 12345)
    residence.touch(path, weights)
    assert resident_bytes(path) == SIZE


def test_what_memory_cannot_hold_is_left_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    weights = mapped_weights(path)
    monkeypatch.setattr(residence, "find_memory", lambda: SimpleNamespace(available=SIZE - 1))
    residence.touch(path, weights, lambda done, total: pytest.fail("nothing is to be read"))
    assert resident_bytes(path) < SIZE / 2


def test_weights_in_memory_are_not_read_again(make_source: Callable[..., Any]) -> None:
    source = make_source()
    residence.touch(source.path, source.weights.values(), lambda done, total: pytest.fail("nothing is to be read"))


def test_a_file_that_shrank_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "model"
    weights = mapped_weights(path)
    os.truncate(path, 4096)
    with pytest.raises(ModelFormatError, match="cannot be read"):
        residence.touch(path, weights)


def test_locked_memory_is_counted_by_the_kernel() -> None:
    def locked() -> int:
        return 1024 * int(re.search(r"VmLck:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]

    before, array = locked(), np.zeros(8192, np.uint8)
    residence.lock([array])
    assert locked() - before >= array.nbytes
    ctypes.CDLL(None).munlock(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes))


def test_a_lock_that_is_refused_names_size_and_limit(
    make_source: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def refuse(_: ctypes.c_void_p, size: ctypes.c_size_t) -> int:
        asked.append(size.value)
        ctypes.set_errno(12)
        return -1

    monkeypatch.setattr(residence.ctypes, "CDLL", lambda *_, **__: SimpleNamespace(mlock=refuse))
    source = make_source()
    load_transformer(source, ReferenceOps())
    assert not asked
    with pytest.raises(HardwareError, match=r"cannot be locked in memory: .*; raise it with `ulimit -l`"):
        load_transformer(source, ReferenceOps(), mlock=True)
    assert asked


def test_all_matrices_are_locked_once(make_source: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With records made anew for the down projections, whose originals are of no more use."""
    held: list[int] = []
    monkeypatch.setattr("thermocline.memory.loader.lock", lambda arrays: held.extend(a.nbytes for a in arrays))
    source = make_source()
    load_transformer(source, ReferenceOps(), mlock=True)
    assert sum(held) == sum(w.nbytes for w in source.weights.values() if w.rows > 1)
