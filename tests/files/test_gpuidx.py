"""PowerInfer's GPU index, against files made byte by byte and read back by hand."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from thermocline.errors import ModelFormatError, OutputError
from thermocline.files.gpuidx import GpuIndex, read_gpu_index, write_gpu_index
from thermocline.files.open import open_model

MASKS = [[0, 1, 1, 0, 0, 1], [0] * 6, [1] * 6]
CAPACITY = 5_000_000_000


def by_hand(path: Path) -> tuple[dict[str, Any], list[tuple[str, list[int], int, bytes]]]:
    """Keys and tensors of a file with numbers and texts for values, read with nothing but struct."""
    raw = path.read_bytes()
    assert raw[:8] == b"PWRI\x03\0\0\0"
    n_tensors, n_keys = struct.unpack_from("<2Q", raw, 8)
    at = 24

    def text() -> str:
        nonlocal at
        (length,) = struct.unpack_from("<Q", raw, at)
        at += 8 + length
        return raw[at - length : at].decode()

    keys: dict[str, Any] = {}
    for _ in range(n_keys):
        name = text()
        (kind,) = struct.unpack_from("<I", raw, at)
        at += 4
        if kind == 8:
            keys[name] = text()
            continue
        code = {4: "<I", 10: "<Q"}[kind]
        keys[name] = (kind, *struct.unpack_from(code, raw, at))
        at += struct.calcsize(code)
    table = []
    for _ in range(n_tensors):
        name = text()
        (n_dims,) = struct.unpack_from("<I", raw, at)
        dims = list(struct.unpack_from(f"<{n_dims}Q", raw, at + 4))
        kind, offset = struct.unpack_from("<IQ", raw, at + 4 + 8 * n_dims)
        at += 16 + 8 * n_dims
        table.append((name, dims, kind, offset))
    start = at + -at % 32
    assert len(raw) % 32 == start % 32
    return keys, [(name, dims, kind, raw[start + o : start + o + 4 * dims[0]]) for name, dims, kind, o in table]


def test_what_was_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf.generated.gpuidx"
    size = write_gpu_index(path, [np.array(mask) for mask in MASKS], CAPACITY)
    assert size == path.stat().st_size
    keys, tensors = by_hand(path)
    assert keys == {
        "general.architecture": "generic.gpu_index",
        "generic.gpu_index.block_count": (4, 3),
        "split.vram_capacity": (10, CAPACITY),
    }
    wanted = []
    for i, mask in enumerate(MASKS):
        bucket = [n for n, on in enumerate(mask) if on]
        wanted += [(f"blk.{i}.gpu_idx", mask), (f"blk.{i}.gpu_bucket", bucket)]
    assert [(name, list(struct.unpack(f"<{d[0]}i", data))) for name, d, _, data in tensors] == wanted
    assert all(kind == 26 and len(dims) == 1 for _, dims, kind, _ in tensors)


@settings(max_examples=50, deadline=None)
@given(
    masks=arrays(np.bool_, st.tuples(st.integers(1, 13), st.integers(1, 40))), capacity=st.integers(0, (1 << 63) - 1)
)
def test_round_trip(masks: np.ndarray, capacity: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("gpuidx") / "m.gpuidx"
    write_gpu_index(path, list(masks), capacity)
    found = read_gpu_index(path, n_layer=len(masks), n_ff=masks.shape[1])
    assert (found.n_layer, found.n_ff, found.vram_capacity) == (*masks.shape, capacity)
    np.testing.assert_array_equal(found.masks, masks)


def test_layers_that_are_not_split_have_no_bucket() -> None:
    index = GpuIndex(tuple(np.array(mask, bool) for mask in MASKS), 0)
    bucket = index.bucket(0)
    assert bucket is not None
    assert bucket.tolist() == [1, 2, 5]
    assert bucket.dtype == np.int32
    assert index.bucket(1) is None
    assert index.bucket(2) is None


@pytest.fixture
def build(make: SimpleNamespace, tmp_path: Path) -> Callable[..., Path]:
    """A file of vectors, each given as (name, numbers[, type[, dims]])."""

    def write(vectors: list[tuple[Any, ...]], capacity: bytes | None = None, **more: Any) -> Path:
        values = [make.kv("general.architecture", make.STRING, more.pop("arch", "generic.gpu_index"))]
        values += [make.kv("generic.gpu_index.block_count", make.U32, more.pop("blocks", len(vectors) // 2))]
        values += [make.kv("split.vram_capacity", make.U64, 1000)] if capacity is None else [capacity]
        rows, data = [], b""
        for name, numbers, *rest in vectors:
            kind = rest[0] if rest else 26
            content = struct.pack(f"<{len(numbers)}i", *numbers)
            rows.append(make.Row(name, rest[1] if len(rest) > 1 else [len(numbers)], kind, size=len(content)))
            data += content + bytes(-len(content) % 32)
        head = make.Gguf(values, rows, magic=more.pop("magic", b"PWRI")).header()
        path = tmp_path / "m.gpuidx"
        path.write_bytes(head + bytes(-len(head) % 32) + data + more.pop("tail", b""))
        return path

    return write


def layer(i: int, mask: list[int], bucket: list[int]) -> list[tuple[Any, ...]]:
    return [(f"blk.{i}.gpu_idx", mask), (f"blk.{i}.gpu_bucket", bucket)]


SOUND = layer(0, [0, 1, 1], [1, 2])


def test_a_whole_layer_may_come_without_its_bucket(build: Callable[..., Path]) -> None:
    found = read_gpu_index(build(layer(0, [1, 1], []) + layer(1, [0, 0], []) + layer(2, [1, 1], [0, 1])))
    np.testing.assert_array_equal(found.masks, [[1, 1], [0, 0], [1, 1]])


def test_indices_before_the_block_count_are_read(build: Callable[..., Path]) -> None:
    assert read_gpu_index(build(SOUND), n_layer=1, n_ff=3).vram_capacity == 1000


REFUSED: dict[str, tuple[Callable[[Callable[..., Path], SimpleNamespace], object], str]] = {
    "ordinary-gguf": (lambda b, m: b(SOUND, magic=b"GGUF"), "is an ordinary GGUF file, not PowerInfer's GPU index"),
    "a-model": (lambda b, m: b(SOUND, arch="llama"), "found llama; allowed: generic.gpu_index"),
    "mixture-of-experts": (lambda b, m: b(SOUND, arch="moe.gpu_idx"), "found moe.gpu_idx; allowed"),
    "capacity-missing": (lambda b, m: b(SOUND, m.kv("x", m.U8, 1)), "split.vram_capacity: is missing"),
    "capacity-negative": (
        lambda b, m: b(SOUND, m.kv("split.vram_capacity", m.I64, -1)),
        "split.vram_capacity: found -1; allowed: a whole number in 0",
    ),
    "capacity-wrapped": (
        lambda b, m: b(SOUND, m.kv("split.vram_capacity", m.U64, (1 << 64) - 256)),
        "found 18446744073709551360; allowed",
    ),
    "no-tensors": (lambda b, m: b([]), "found 0; allowed: two for each layer"),
    "odd": (lambda b, m: b(SOUND[:1]), "found 1; allowed: two for each layer"),
    "too-few-layers": (lambda b, m: b(SOUND, blocks=1), "holds 1; its block_count is 1, the model has 2"),
    "block-count-differs": (
        lambda b, m: b(SOUND + layer(1, [0, 0, 1], [2]), blocks=3),
        "holds 2; its block_count is 3",
    ),
    "two": (
        lambda b, m: b(layer(0, [0, 2, 1], [1, 2]) + layer(1, [0] * 3, [])),
        'gpu_idx": found 2; allowed: 0, 1',
    ),
    "minus-one": (lambda b, m: b(SOUND + layer(1, [0, -1, 1], [1, 2])), "found -1; allowed: 0, 1"),
    "bucket-too-short": (lambda b, m: b(SOUND + layer(1, [0, 1, 1], [1])), "its 1 neurons are not the 2 of the mask"),
    "bucket-too-long": (lambda b, m: b(SOUND + layer(1, [0, 1, 0], [1, 2])), "its 2 neurons are not the 1 of the mask"),
    "bucket-unsorted": (lambda b, m: b(SOUND + layer(1, [0, 1, 1], [2, 1])), "are not the 2 of the mask, rising"),
    "bucket-of-others": (lambda b, m: b(SOUND + layer(1, [0, 1, 1], [0, 2])), "are not the 2 of the mask, rising"),
    "bucket-twice": (lambda b, m: b(SOUND + layer(1, [0, 1, 1], [1, 1])), "are not the 2 of the mask, rising"),
    "bucket-outside": (lambda b, m: b(SOUND + layer(1, [0, 1, 1], [1, 300])), "are not the 2 of the mask, rising"),
    "bucket-of-none": (lambda b, m: b(SOUND + layer(1, [0, 0, 0], [1])), "its 1 neurons are not the 0 of the mask"),
    "widths-differ": (lambda b, m: b(SOUND + layer(1, [0, 1], [1])), "has 2 neurons; wanted are 3"),
    "swapped": (lambda b, m: b(SOUND[::-1] + layer(1, [0] * 3, [])), "found at the place of blk.0.gpu_idx"),
    "layers-swapped": (
        lambda b, m: b(layer(1, [0, 1, 0], [1]) + SOUND),
        'tensor "blk.1.gpu_idx": found at the place of blk.0.gpu_idx, which is read by position',
    ),
    "sorted-as-texts": (
        lambda b, m: b([v for i in sorted(range(12), key=str) for v in layer(i, [0, 1, 0], [1])]),
        'tensor "blk.10.gpu_idx": found at the place of blk.2.gpu_idx',
    ),
    "floats": (
        lambda b, m: b([("blk.0.gpu_idx", [0, 0], 0), *SOUND[1:], *layer(1, [0], [])]),
        "found F32 of shape [2]",
    ),
    "matrix": (
        lambda b, m: b([("blk.0.gpu_idx", [0, 1, 1, 0], 26, [2, 2]), *SOUND[1:], *layer(1, [0], [])]),
        "found I32 of shape [2, 2]; allowed: a vector of I32",
    ),
    "tail": (lambda b, m: b(SOUND + layer(1, [0] * 3, []), tail=b"!"), "1 bytes follow the last tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, build: Callable[..., Path], make: SimpleNamespace, tmp_path: Path) -> None:
    act, decisive = REFUSED[name]
    act(build, make)
    n_layer = {"sorted-as-texts": 12}.get(name, 2)
    with pytest.raises(ModelFormatError) as caught:
        read_gpu_index(tmp_path / "m.gpuidx", n_layer=n_layer)
    assert decisive in str(caught.value)
    assert str(caught.value).isprintable()


def test_an_index_for_another_width(build: Callable[..., Path]) -> None:
    with pytest.raises(ModelFormatError, match="has 3 neurons; wanted are 4"):
        read_gpu_index(build(SOUND), n_ff=4)


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "m.gpuidx"
    write_gpu_index(path, [np.array([0, 1, 1] * 8), np.zeros(24, int)], 1)
    whole = path.read_bytes()
    data = whole.rstrip(b"\0")
    for cut in range(len(data)):
        path.write_bytes(whole[:cut])
        with pytest.raises(ModelFormatError):
            read_gpu_index(path)


def test_it_is_no_model(tmp_path: Path) -> None:
    write_gpu_index(tmp_path / "m.gpuidx", [np.array(mask) for mask in MASKS], 1)
    with pytest.raises(ModelFormatError, match="is PowerInfer's GPU index, not a model"):
        open_model(tmp_path / "m.gpuidx")


@pytest.mark.parametrize(
    ("masks", "capacity", "decisive"),
    [
        ([], 1, "vectors of 0 and 1"),
        ([np.zeros(0)], 1, "vectors of 0 and 1"),
        ([np.zeros(2), np.zeros(3)], 1, "of one length"),
        ([np.zeros((2, 2))], 1, "vectors of 0 and 1"),
        ([np.array([0, 2])], 1, "vectors of 0 and 1"),
        ([np.array([0.5])], 1, "vectors of 0 and 1"),
        ([np.array([np.nan])], 1, "vectors of 0 and 1"),
        ([np.zeros(2)], -1, "a VRAM capacity of -1 bytes"),
        ([np.zeros(2)], 1 << 63, "a VRAM capacity of 9223372036854775808 bytes"),
    ],
)
def test_not_written(masks: list[np.ndarray], capacity: int, decisive: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=decisive):
        write_gpu_index(tmp_path / "m.gpuidx", masks, capacity)
    assert list(tmp_path.iterdir()) == []
