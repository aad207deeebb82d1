"""Writing GGUF: refusals, streaming, and what is left when something fails at any step."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thermocline.errors import OutputError
from thermocline.files.atomic import atomic_write
from thermocline.files.formats import BF16, F16, F32, GGML_TYPES, Q4_0, Q8_0, BlockFormat
from thermocline.files.gguf import GgufFile
from thermocline.files.gguf_writer import NewTensor, write_gguf
from thermocline.files.quantize import from_float

X = np.ones((2, 32), np.float32)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def new(name: str = "a", fmt: BlockFormat = F32, shape: tuple[int, ...] = (2, 32), data: Any = None) -> NewTensor:
    return NewTensor(name, fmt, shape, lambda: np.zeros(256, np.uint8) if data is None else data)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "alignment-13": (lambda p: write_gguf(p, {}, [], alignment=13), "alignment is 13; allowed: powers of two"),
    "alignment-4": (lambda p: write_gguf(p, {}, [], alignment=4), "alignment is 4"),
    "key-empty": (lambda p: write_gguf(p, {"": 1}, []), "keys take 1 to 65535 bytes"),
    "key-of-64-KiB": (lambda p: write_gguf(p, {"k" * 65536: 1}, []), "keys take 1 to 65535 bytes"),
    "list-empty": (lambda p: write_gguf(p, {"k": []}, []), "an empty list has no element type"),
    "list-mixed": (lambda p: write_gguf(p, {"k": [1, 2.0]}, []), "elements of several types: FLOAT32, UINT32"),
    "list-of-lists": (lambda p: write_gguf(p, {"k": [[1]]}, []), "cannot store a list"),
    "none": (lambda p: write_gguf(p, {"k": None}, []), "cannot store a NoneType"),
    "complex": (lambda p: write_gguf(p, {"k": np.zeros(2, np.complex64)}, []), "cannot store arrays of complex64"),
    "half": (lambda p: write_gguf(p, {"k": np.float16(1)}, []), "cannot store a float16"),
    "matrix": (lambda p: write_gguf(p, {"k": np.zeros((2, 2))}, []), "cannot store a ndarray"),
    "integer-too-large": (lambda p: write_gguf(p, {"k": 1 << 64}, []), "18446744073709551616 does not fit UINT64"),
    "integer-too-small": (lambda p: write_gguf(p, {"k": -(1 << 63) - 1}, []), "does not fit INT64"),
    "float-too-large": (lambda p: write_gguf(p, {"k": 1e39}, []), "1e+39 does not fit FLOAT32"),
    "surrogate": (lambda p: write_gguf(p, {"k": "\ud800"}, []), "is not text that UTF-8 can store"),
    "tensor-twice": (lambda p: write_gguf(p, {}, [new(), new()]), 'tensor "a" is given twice'),
    "tensor-name-empty": (lambda p: write_gguf(p, {}, [new("")]), "names take 1 to 63 bytes"),
    "tensor-name-long": (lambda p: write_gguf(p, {}, [new("ü" * 32)]), "names take 1 to 63 bytes"),
    "tensor-name-newline": (lambda p: write_gguf(p, {}, [new("a\nb")]), r'tensor "a\nb": names take'),
    "tensor-row-not-blocks": (lambda p: write_gguf(p, {}, [new(fmt=Q8_0, shape=(2, 33))]), "a multiple of 32"),
    "tensor-empty": (lambda p: write_gguf(p, {}, [new(shape=(0, 32))]), "none empty"),
    "tensor-scalar": (lambda p: write_gguf(p, {}, [new(shape=())]), "1 to 4 axes"),
    "tensor-five-axes": (lambda p: write_gguf(p, {}, [new(shape=(2, 1, 1, 1, 32))]), "1 to 4 axes"),
    "tensor-format": (lambda p: write_gguf(p, {}, [new(fmt=BlockFormat("F8", -1, 1, 1))]), "GGUF cannot store F8"),
    "bytes-too-few": (lambda p: write_gguf(p, {}, [new(data=np.zeros(255, np.uint8))]), "255 bytes of uint8 were made"),
    "bytes-of-float": (lambda p: write_gguf(p, {}, [new(data=np.zeros(64, np.float32))]), "256 bytes of float32"),
    "folder-missing": (lambda p: write_gguf(p / "no" / "x.gguf", {}, []), "cannot be written: No such file"),
    "name-too-long": (lambda p: write_gguf(p.with_name("n" * 300), {}, []), "File name too long"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_nothing_left(name: str, tmp_path: Path) -> None:
    act, decisive = REFUSED[name]
    with pytest.raises(OutputError) as caught:
        act(tmp_path / "x.gguf")
    assert decisive in str(caught.value)
    assert str(caught.value).isprintable()
    assert names(tmp_path) == []


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_every_format_under_any_name(alignment: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    weights = [
        from_float(name, rng.standard_normal((rows, 96)).astype(np.float32), fmt)
        for name, rows, fmt in (
            ("blk.0.ffn_down_t.weight", 5, Q8_0),
            ("blk.0.fc1", 1, F16),
            ("x", 3, Q4_0),
            ("y", 7, BF16),
            ("n" * 63, 2, F32),
        )
    ]
    path = tmp_path / "x.gguf"
    size = write_gguf(path, {}, weights, alignment=alignment)
    assert size == path.stat().st_size
    with GgufFile.open(path, strict=True) as file:
        for weight in weights:
            found = file.weights[weight.name]
            assert found.data.ctypes.data % alignment == 0
            np.testing.assert_array_equal(found.data, weight.data)


def test_tensors_of_formats_that_are_only_stored_and_of_more_axes(tmp_path: Path) -> None:
    q6 = np.arange(210 * 2, dtype=np.uint16).astype(np.uint8)
    cube = np.arange(24, dtype=np.float32)
    path = tmp_path / "x.gguf"
    write_gguf(
        path,
        {},
        [
            NewTensor("q6", GGML_TYPES[14], (2, 256), lambda: q6),
            NewTensor("cube", F32, (2, 3, 4), lambda: cube.view(np.uint8)),
        ],
    )
    file = GgufFile.open(path, strict=True)
    np.testing.assert_array_equal(file.tensors["q6"].data, q6)
    assert file.tensors["cube"].shape == (2, 3, 4)
    np.testing.assert_array_equal(file.tensors["cube"].data.view(np.float32), cube)


def test_one_tensor_in_memory_at_a_time(tmp_path: Path) -> None:
    size = 4 << 20
    made = []

    def produce() -> np.ndarray:
        made.append(1)
        return np.zeros(size, np.uint8)

    tensors = [NewTensor(f"t{i}", F32, (1 << 10, 1 << 10), produce) for i in range(8)]
    tracemalloc.start()
    write_gguf(tmp_path / "x.gguf", {}, tensors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(made) == 8
    assert peak < 2.5 * size


def test_a_weight_that_is_not_contiguous(tmp_path: Path) -> None:
    weight = from_float("a", np.arange(256, dtype=np.float32).reshape(8, 32), F32)
    every_other = type(weight)("a", F32, (4, 32), weight.data[::2])
    write_gguf(tmp_path / "x.gguf", {}, [every_other])
    np.testing.assert_array_equal(GgufFile.open(tmp_path / "x.gguf").weights["a"].data, weight.data[::2])


def test_metadata_types_follow_the_values(tmp_path: Path) -> None:
    values = {
        "u": 3, "i": -3, "U": 1 << 40, "I": -(1 << 40), "f": 0.5, "b": True, "list": [1, -2], "long": [1 << 40],
        "floats": [0.5, 2.0], "flags": (True, False), "general.alignment": 999,
    }  # fmt: skip
    write_gguf(tmp_path / "x.gguf", values, [])
    types = {k: type(v) for k, v in GgufFile.open(tmp_path / "x.gguf").typed_metadata().items()}
    assert types["u"] is np.uint32
    assert types["i"] is np.int32
    assert types["U"] is np.uint64
    assert types["I"] is np.int64
    assert types["f"] is np.float32
    assert types["general.alignment"] is np.uint32
    meta = GgufFile.open(tmp_path / "x.gguf").metadata
    assert meta["general.alignment"] == 32  # the writer's own, whatever the copied metadata said
    assert [meta[k].dtype.name for k in ("list", "long", "floats", "flags")] == ["int32", "int64", "float32", "bool"]


# Failing at any step


class InjectedError(Exception):
    pass


@pytest.fixture(params=["fresh", "replacing"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, bytes | None]:
    """A path to write, and the bytes of the file that is already there."""
    path = tmp_path / "model.gguf"
    if request.param == "fresh":
        return path, None
    write_gguf(path, {"old": 1}, [from_float("a", X, F32)])
    return path, path.read_bytes()


def check_untouched(path: Path, old: bytes | None) -> None:
    assert names(path.parent) == ([] if old is None else [path.name])
    assert old is None or path.read_bytes() == old


@pytest.mark.parametrize("error", [InjectedError, KeyboardInterrupt, MemoryError, OSError])
def test_failing_producer(error: type[BaseException], target: tuple[Path, bytes | None]) -> None:
    def fail() -> np.ndarray:
        raise error

    with pytest.raises(error):
        write_gguf(target[0], {}, [from_float("a", X, F32), NewTensor("b", F32, (2, 32), fail)])
    check_untouched(*target)


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "open", "fchmod", "statvfs"])
def test_system_calls_failing_one_after_another(
    call: str, target: tuple[Path, bytes | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call of each kind fails once with ENOSPC; in the end none is left to fail and the file is written."""
    owner, name = (Path, "replace") if call == "rename" else (os, call)
    real = getattr(owner, name)
    messages: list[str] = []
    for nth in range(1, 100):
        calls = 0

        def inject(*args: Any, nth: int = nth, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, inject)
            try:
                write_gguf(target[0], {"new": 1}, [from_float("a", X, F32), from_float("b", X, Q8_0)])
                if calls < nth:
                    break
            except OutputError as error:
                messages.append(str(error))
                if "may not survive a power failure" in messages[-1]:
                    continue  # the folder could not be synced after the rename: the new file is there, whole
        if calls >= nth:
            check_untouched(*target)
    assert all("No space left on device" in message for message in messages)
    assert len(messages) >= (0 if call == "fchmod" and target[1] is None else 1)
    assert names(target[0].parent) == ["model.gguf"]
    assert "new" in GgufFile.open(target[0], strict=True).metadata


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, content: real(fd, content[:7]))
    write_gguf(tmp_path / "x.gguf", {"k": "value"}, [from_float("a", X, F32)])
    monkeypatch.undo()
    with GgufFile.open(tmp_path / "x.gguf", strict=True) as file:
        np.testing.assert_array_equal(file.weights["a"].data, X.view(np.uint8))


def test_too_little_space_is_said_before_anything_is_made(
    target: tuple[Path, bytes | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(target[0].parent)
    fields = list(real)
    fields[4] = 0  # f_bavail
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(fields))
    with pytest.raises(OutputError, match=r"needs [\d,]+ bytes, 0 are free on its disk: free [\d,]+ more"):
        write_gguf(target[0], {}, [NewTensor("a", F32, (2, 32), lambda: pytest.fail("was made"))])
    check_untouched(*target)


def test_full_disk(target: tuple[Path, bytes | None]) -> None:
    """A real limit of the system, not a simulated one: files of at most 4 KiB."""
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old_limit[1]))
        with pytest.raises(OutputError, match="File too large"):
            write_gguf(target[0], {}, [from_float("a", np.ones((64, 32), np.float32), F32)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_handler)
    check_untouched(*target)


KILLED = """
import sys, time, numpy as np
from thermocline.files.formats import F32
from thermocline.files.gguf_writer import NewTensor, write_gguf
def slow():
    time.sleep(0.01)
    return np.full(4096, number, np.uint8)
number = 0
while True:
    number = (number + 1) % 200
    write_gguf(sys.argv[1], {"number": number}, [NewTensor(f"t{i}", F32, (1, 1024), slow) for i in range(4)])
    print(number, flush=True)
"""


def test_killed_at_any_time_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for delay in (0.0, 0.003, 0.011, 0.023, 0.037, 0.041):
        with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        left = [name for name in names(tmp_path) if name != path.name]
        assert len(left) <= 1
        with GgufFile.open(path, strict=True) as file:
            number = file.metadata.integer("number", 0, 200)
            assert all((tensor.data == number).all() for tensor in file.tensors.values())
    with atomic_write(path) as out:
        out.write(b"done")
    assert names(tmp_path) == [path.name]
