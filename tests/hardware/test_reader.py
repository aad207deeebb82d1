"""Reads past the page cache: what arrives, what is refused, and what fails."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thermocline.errors import HardwareError
from thermocline.hardware.reader import Reader

SIZE = 300_001
"""No whole number of disk blocks: the last one is cut off."""


@pytest.fixture(scope="module")
def content() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, SIZE, np.uint8)


@pytest.fixture(scope="module")
def file(content: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "file"
    path.write_bytes(content.tobytes())
    return path


def table(*rows: tuple[int, int, int]) -> np.ndarray:
    return np.array(rows, np.int64).reshape(-1, 3)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("depth", [1, 3])
def test_parts_arrive_where_they_are_wanted(file: Path, content: np.ndarray, direct: bool, depth: int) -> None:
    ranges = [(0, SIZE), (1, 5), (4095, 2), (4096, 4096), (SIZE - 1, 1), (SIZE, 0), (SIZE - 5000, 5000)]
    with Reader(file, depth=depth, largest=SIZE, direct=direct) as reader:
        assert direct or not reader.direct
        assert reader.size == SIZE
        for offset, size in ranges:
            out = np.zeros(size + 7, np.uint8)
            reader.wait(reader.submit(table((offset, size, 1)), table((offset, size, 3)), out))
            assert np.array_equal(out[3 : 3 + size], content[offset : offset + size])
            assert not out[:3].any()
            assert not out[3 + size :].any()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, 20_000)), max_size=20), st.integers(0, 2**32))
def test_any_scattering_of_parts(file: Path, content: np.ndarray, ranges: list[tuple[int, int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    requests, parts, wanted, place = [], [], [], 0
    for offset, length in ranges:
        size = min(length, SIZE - offset)
        inside = int(rng.integers(0, 4))
        for _ in range(inside):
            start = int(rng.integers(0, size + 1))
            count = int(rng.integers(0, size - start + 1))
            parts.append((offset + start, count, place))
            wanted.append(content[offset + start : offset + start + count])
            place += count
        requests.append((offset, size, inside))
    out = np.zeros(place, np.uint8)
    with Reader(file, depth=4, largest=20_000) as reader:
        reader.wait(reader.submit(table(*requests), table(*parts), out))
    assert np.array_equal(out, np.concatenate([np.empty(0, np.uint8), *wanted]))


def test_several_tickets_in_any_order(file: Path, content: np.ndarray) -> None:
    outs = [np.zeros(1000, np.uint8) for _ in range(30)]
    with Reader(file, depth=4) as reader:
        tickets = [reader.submit(table((i * 999, 1000, 1)), table((i * 999, 1000, 0)), o) for i, o in enumerate(outs)]
        for i in reversed(range(30)):
            reader.wait(tickets[i])
            assert np.array_equal(outs[i], content[i * 999 : i * 999 + 1000])
        stats = reader.stats
        assert stats.requests == 30
        assert stats.nbytes >= 30_000
        assert stats.busy > 0
        assert stats.since(stats).bandwidth == 0
        with pytest.raises(ValueError, match="ticket"):
            reader.wait(tickets[0])


@pytest.mark.parametrize(
    ("requests", "parts", "message"),
    [
        (table((-1, 5, 0)), table(), "begin beyond"),
        (table((SIZE + 1, 0, 0)), table(), "begin beyond"),
        (table((0, 5000, 0)), table(), "larger"),
        (table((0, -5, 0)), table(), "larger"),
        (table((SIZE - 10, 20, 0)), table(), "end beyond"),
        (table((0, 10, 1)), table(), "more parts"),
        (table((0, 10, -1)), table(), "more parts"),
        (table((0, 10, 0)), table((0, 1, 0)), "fewer parts"),
        (table((5, 10, 1)), table((4, 1, 0)), "outside"),
        (table((5, 10, 1)), table((5, 11, 0)), "outside"),
        (table((5, 10, 1)), table((15, 1, 0)), "outside"),
        (table((5, 10, 1)), table((5, -1, 0)), "outside"),
        (table((0, 10, 1)), table((0, 10, -1)), "beyond out"),
        (table((0, 10, 1)), table((0, 10, 91)), "beyond out"),
        (table((0, 10, 0)).astype(np.int32), table(), "int64"),
        (table((0, 10, 0))[:, :2], table(), "n, 3"),
        (np.asfortranarray(table((0, 10, 0), (0, 10, 0))), table(), "contiguous"),
    ],
)
def test_what_lies_outside_is_refused(file: Path, requests: np.ndarray, parts: np.ndarray, message: str) -> None:
    with Reader(file, depth=1, largest=4096) as reader:
        with pytest.raises(ValueError, match=message):
            reader.submit(requests, parts, np.zeros(100, np.uint8))
        assert reader.stats.requests == 0


def test_a_file_that_ends_early_is_an_error_once(tmp_path: Path, content: np.ndarray) -> None:
    path = tmp_path / "shrinking"
    path.write_bytes(content.tobytes())
    with Reader(path, depth=2) as reader:
        os.truncate(path, 100_000)
        out = np.zeros(1000, np.uint8)
        ticket = reader.submit(table((0, 1000, 1), (200_000, 1000, 1)), table((0, 1000, 0), (200_000, 1000, 0)), out)
        with pytest.raises(HardwareError, match="ends early"):
            reader.wait(ticket)
        reader.wait(reader.submit(table((500, 1000, 1)), table((500, 1000, 0)), out))
        assert np.array_equal(out, content[500:1500])


def test_a_removed_file_is_read_to_the_end(tmp_path: Path, content: np.ndarray) -> None:
    path = tmp_path / "vanishing"
    path.write_bytes(content.tobytes())
    with Reader(path) as reader:
        path.unlink()
        out = np.zeros(SIZE, np.uint8)
        reader.wait(reader.submit(table((0, SIZE, 1)), table((0, SIZE, 0)), out))
        assert np.array_equal(out, content)


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(HardwareError, match="No such file"):
        Reader(tmp_path / "none")
    with pytest.raises(HardwareError, match="cannot be read"):
        Reader(tmp_path)
    with pytest.raises(ValueError, match="depth"):
        Reader(tmp_path, depth=0)
    with pytest.raises(ValueError, match="largest"):
        Reader(tmp_path, largest=0)


def test_closing_waits_and_leaves_no_thread_and_no_descriptor(file: Path) -> None:
    def held() -> tuple[int, int]:
        return len(list(Path("/proc/self/task").iterdir())), len(list(Path("/proc/self/fd").iterdir()))

    before = held()
    for _ in range(5):
        reader = Reader(file, depth=8)
        reader.submit(table(*[(0, 100_000, 0)] * 50), table(), np.zeros(0, np.uint8))
        reader.close()
        reader.close()
        with pytest.raises(HardwareError, match="closed"):
            reader.submit(table(), table(), np.zeros(0, np.uint8))
    assert held() == before
