"""GGUF files that lie: each is refused with one typed error that names what is wrong, fast, and leaves nothing."""

from __future__ import annotations

import os
import random
import socket
import struct
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from thermocline.errors import ModelFormatError, ThermoclineError, UnsupportedModelError
from thermocline.files.gguf import GgufFile
from thermocline.files.open import open_model

RUNAWAY = 30.0  # seconds of CPU: far above what a bounded reader takes on any machine

Case = Callable[[SimpleNamespace], bytes]
BIG = (1 << 64) - 1


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def open_files() -> int:
    return len(names(Path("/proc/self/fd")))


def with_value(entry: Callable[[SimpleNamespace], bytes]) -> Case:
    return lambda m: m.Gguf(values=[entry(m)]).bytes()


def with_rows(*rows: dict[str, object]) -> Case:
    return lambda m: m.Gguf(rows=[m.Row(**row) for row in rows]).bytes()


A = {"name": "a", "dims": [32], "size": 128}

CASES: dict[str, tuple[Case, str]] = {
    # L1: what it looks like instead
    "empty": (lambda m: b"", "0 bytes; at least 4 needed"),
    "three-bytes": (lambda m: b"GGU", "3 bytes; at least 4 needed"),
    "only-magic": (lambda m: b"GGUF", "incomplete download? have 4 bytes, need at least 8"),
    "zeros": (lambda m: bytes(100), "begins with zeros"),
    "random-magic": (lambda m: b"\xde\xad\xbe\xef" + bytes(60), "begins with the bytes de ad be ef"),
    "ggml-magic": (lambda m: b"lmgg" + bytes(60), "GGML file of before 2023-08"),
    "ggmf-magic": (lambda m: b"fmgg" + bytes(60), "GGMF file of before 2023-08"),
    "ggjt-magic": (lambda m: b"tjgg\3\0\0\0" + bytes(60), "GGJT file of before 2023-08"),
    "ggla-magic": (lambda m: b"algg" + bytes(60), "GGLA adapter"),
    "powerinfer-without-records": (lambda m: m.Gguf(magic=b"PWRI").bytes(), "blk.0.ffn_down_t.weight is missing"),
    "powerinfer-index": (
        lambda m: m.Gguf([m.kv("general.architecture", m.STRING, "generic.gpu_index")], magic=b"PWRI").bytes(),
        "is PowerInfer's GPU index, not a model",
    ),
    "powerinfer-empty-matrix": (lambda m: m.Gguf(magic=b"PWRI", rows=[m.Row("a", [0, 4])]).bytes(), "no axis of 0"),
    "zip": (lambda m: b"PK\3\4" + bytes(60), "zip or PyTorch archive, which is never opened"),
    "pickle": (lambda m: b"\x80\x02ccollections\nOrderedDict\n", "pickle, which is never opened"),
    "gzip": (lambda m: b"\x1f\x8b\x08" + bytes(60), "gzip archive"),
    "lfs-pointer": (lambda m: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "web-page": (lambda m: b"<!DOCTYPE html><html>", "web page"),
    "text": (lambda m: b"# a readme\n\nwith words\n", "looks like a text file"),
    "safetensors": (lambda m: m.safetensors({"a": m.tensor()}, bytes(16)), "name the folder"),
    # L2: version
    "version-0": (lambda m: m.Gguf(version=0).bytes(), "version at byte 4: found 0; allowed: 3"),
    "version-1": (lambda m: m.Gguf(version=1).bytes(), "found 1; allowed: 3"),
    "version-2": (lambda m: m.Gguf(version=2).bytes(), "found 2; allowed: 3"),
    "version-4": (lambda m: m.Gguf(version=4).bytes(), "found 4; allowed: 3"),
    "big-endian": (lambda m: m.Gguf(version=0x03000000).bytes(), "found 50331648 (a big-endian file?)"),
    "big-endian-magic": (lambda m: m.Gguf(magic=b"FUGG").bytes(), "big-endian GGUF"),
    # L3: counts
    "tensor-count-2^64-1": (lambda m: m.Gguf(n_rows=BIG).bytes(), f"tensor count at byte 8: found {BIG}"),
    "tensor-count-10^9": (lambda m: m.Gguf(n_rows=10**9).bytes(), "found 1000000000; allowed: at most 65536"),
    "tensor-count-over-remaining": (lambda m: m.Gguf(n_rows=1000).bytes(), "tensor count 1000"),
    "key-count-2^64-1": (lambda m: m.Gguf(n_values=BIG).bytes(), f"key count at byte 16: found {BIG}"),
    "key-count-10^9": (lambda m: m.Gguf(n_values=10**9).bytes(), "found 1000000000; allowed: at most 65536"),
    "key-count-over-remaining": (lambda m: m.Gguf(n_values=1000).bytes(), "key count 1000"),
    "key-count-one-too-many": (lambda m: m.Gguf(n_values=2).bytes(), "found 1125899906842624; allowed: at most 63"),
    # L4: lengths of keys and strings
    "key-length-2^63": (with_value(lambda m: struct.pack("<QI", 1 << 63, 4)), "found 9223372036854775808; allowed"),
    "key-length-2^32": (
        with_value(lambda m: struct.pack("<QI", 1 << 32, 4)),
        "found 4294967296; allowed: at most 65535",
    ),
    "key-of-64-KiB": (with_value(lambda m: m.kv("k" * 65536, m.U8, 1)), "found 65536; allowed: at most 65535"),
    "key-length-over-remaining": (with_value(lambda m: struct.pack("<QI", 60000, 4)), "need at least 600"),
    "string-length-2^63": (
        with_value(lambda m: m.kv("k", m.STRING, struct.pack("<Q", 1 << 63))),
        "length of k at byte 37: found 9223372036854775808",
    ),
    "string-length-2^64-1": (with_value(lambda m: m.kv("k", m.STRING, struct.pack("<Q", BIG))), f"found {BIG}"),
    "string-length-remaining-plus-1": (
        lambda m: m.Gguf(values=[m.kv("k", m.STRING, struct.pack("<Q", 6) + b"hello")], rows=[]).bytes()[:50],
        "have 50 bytes, need at least 51",
    ),
    # L5: lengths of arrays
    "array-of-10^8-on-64-bytes": (
        with_value(lambda m: m.array("k", m.U32, [1], count=10**8)),
        "k of 100000000 elements at byte 49: incomplete download?",
    ),
    "array-of-2^62": (
        with_value(lambda m: m.array("k", m.U64, [1], count=1 << 62)),
        "k of 4611686018427387904 elements",
    ),
    "array-of-2^64-1-strings": (with_value(lambda m: m.array("k", m.STRING, ["a"], count=BIG)), f"k of {BIG} elements"),
    "array-of-2^61-wrapping-in-bytes": (
        with_value(lambda m: m.array("k", m.F64, [1], count=1 << 61)),
        "k of 2305843009213693952 elements",
    ),
    "string-array-one-too-long": (
        with_value(lambda m: m.kv("k", m.ARRAY, struct.pack("<IQQ", m.STRING, 1, 10**6) + b"x")),
        "k[0]",
    ),
    "string-array-entry-2^63": (
        with_value(
            lambda m: m.kv("k", m.ARRAY, struct.pack("<IQ", m.STRING, 2) + m.string("a") + struct.pack("<Q", 1 << 63))
        ),
        "k[1]",
    ),
    "string-array-entry-2^64-8": (
        with_value(lambda m: m.kv("k", m.ARRAY, struct.pack("<IQQ", m.STRING, 3, BIG - 7) + bytes(64))),
        "k[0]",
    ),
    # L6, L7: nesting and types
    "array-of-arrays": (
        with_value(lambda m: m.kv("k", m.ARRAY, struct.pack("<IQIQI", m.ARRAY, 1, m.U32, 1, 7))),
        "arrays in arrays are not allowed",
    ),
    "array-nested-5000-deep": (
        with_value(lambda m: m.kv("k", m.ARRAY, struct.pack("<IQ", m.ARRAY, 1) * 5000)),
        "arrays in arrays are not allowed",
    ),
    "type-13": (with_value(lambda m: m.kv("k", 13, b"\0" * 8)), "type of k at byte 33: found 13; allowed: 0 to 12"),
    "type-2^31-1": (with_value(lambda m: m.kv("k", 0x7FFFFFFF, b"\0" * 8)), "found 2147483647"),
    "element-type-99": (with_value(lambda m: m.kv("k", m.ARRAY, struct.pack("<IQ", 99, 1))), "elements of k"),
    "boolean-2": (with_value(lambda m: m.kv("k", m.BOOL, 2)), "found boolean 2; allowed: 0, 1"),
    "booleans-of-255": (with_value(lambda m: m.array("k", m.BOOL, [0, 1, 255])), "booleans other than 0 and 1"),
    # L8: keys
    "key-twice": (lambda m: m.Gguf(values=[m.kv("k", m.U8, 1)] * 2).bytes(), 'key "k" at byte 38: is given twice'),
    "key-empty": (with_value(lambda m: m.kv("", m.U8, 1)), 'key "" at byte 24: is empty'),
    "key-not-utf8": (with_value(lambda m: m.kv(b"\xff\xfe", m.U8, 1)), "key at byte 32: is not UTF-8"),
    "value-not-utf8": (with_value(lambda m: m.kv("k", m.STRING, m.string(b"ab\xc3("))), "is not UTF-8 (byte 2 of 4)"),
    # L10: alignment
    **{
        f"alignment-{n}": (
            with_value(lambda m, n=n: m.kv("general.alignment", m.U32, n)),
            f"found {n}; allowed: powers",
        )
        for n in (0, 1, 4, 13, 48, 1 << 21, 1 << 31)
    },
    "alignment-of-type-u64": (
        with_value(lambda m: m.kv("general.alignment", m.U64, 32)),
        "found type UINT64; allowed: UINT32",
    ),
    "alignment-of-type-string": (with_value(lambda m: m.kv("general.alignment", m.STRING, "32")), "found type STRING"),
    # L11, L12: dimensions
    "dimensions-0": (with_rows({"name": "a", "dims": []}), "found 0 dimensions; allowed: 1 to 4"),
    "dimensions-5": (with_rows({"name": "a", "dims": [1] * 5, "size": 4}), "found 5 dimensions; allowed: 1 to 4"),
    "dimensions-2^32-1": (with_rows({**A, "n_dims": 0xFFFFFFFF}), "found 4294967295 dimensions"),
    "dimension-of-0": (with_rows({"name": "a", "dims": [4, 0]}), "found shape [0, 4]"),
    "dimension-of-minus-1": (with_rows({"name": "a", "dims": [BIG]}), f"found shape [{BIG}]"),
    "dimensions-2^32-by-2^32": (
        with_rows({"name": "a", "dims": [1 << 32] * 2}),
        "found shape [4294967296, 4294967296]",
    ),
    "dimension-of-2^62": (with_rows({"name": "a", "dims": [1 << 62]}), "need 18446744073709551"),
    "dimension-that-wraps-padding": (with_rows({"name": "a", "dims": [(1 << 62) - 1]}), "need 18446744073709551"),
    "dimension-2^40": (with_rows({"name": "a", "dims": [1 << 40]}), "need 4398046511"),
    # L13, L14: formats
    "row-not-whole-blocks": (
        with_rows({"name": "a", "dims": [33], "kind": 8}),
        "33 elements; Q8_0 needs a multiple of 32",
    ),
    "rows-whole-blocks-only-together": (with_rows({"name": "a", "dims": [16, 2], "kind": 2, "size": 18}), "rows of 16"),
    "tensor-type-minus-1": (with_rows({**A, "kind": 0xFFFFFFFF}), "found tensor type 4294967295"),
    "tensor-type-9999": (with_rows({**A, "kind": 9999}), "found tensor type 9999"),
    **{f"tensor-type-removed-{n}": (with_rows({**A, "kind": n}), f"tensor type {n}") for n in (4, 5, 31, 36, 38)},
    # L15: offsets
    "offset-past-end": (with_rows({**A, "offset": 1 << 20}), "found data offset 1048576; allowed: 0"),
    "offset-wraps-into-header": (with_rows({**A, "offset": (1 << 64) - 32}), "found data offset 18446744073709551584"),
    "offset-unaligned": (with_rows({**A, "offset": 4}), "found data offset 4; allowed: 0"),
    "offset-overlapping": (with_rows(A, {**A, "name": "b", "offset": 64}), "found data offset 64; allowed: 128"),
    "offset-same": (with_rows(A, {**A, "name": "b", "offset": 0}), "found data offset 0; allowed: 128"),
    "offset-leaves-hole": (with_rows(A, {**A, "name": "b", "offset": 160}), "found data offset 160; allowed: 128"),
    "offset-out-of-order": (
        with_rows({**A, "offset": 128}, {**A, "name": "b", "offset": 0}),
        "found data offset 128; allowed: 0",
    ),
    # L16: data cut
    "data-missing": (with_rows({"name": "a", "dims": [32]}), "incomplete download? have"),
    "data-one-byte-short": (
        lambda m: m.Gguf(rows=[m.Row("a", [32], size=128)]).bytes()[:-1],
        "have 255 bytes, need 256",
    ),
    # L18: names
    "tensor-twice": (with_rows(A, A), 'tensor "a" at byte 102: is given twice'),
    "tensor-name-empty": (with_rows({**A, "name": ""}), "is empty"),
    "tensor-name-64-bytes": (with_rows({**A, "name": "n" * 64}), "found 64; allowed: at most 63"),
    "tensor-name-100-kB": (with_rows({**A, "name": "n" * 100_000}), "found 100000; allowed: at most 63"),
    "tensor-name-nul": (with_rows({**A, "name": "a\0b"}), r'tensor "a\x00b"'),
    "tensor-name-newline": (with_rows({**A, "name": "a\nb"}), r'tensor "a\nb"'),
    "tensor-name-escape-sequence": (with_rows({**A, "name": "\x1b[2J"}), r'tensor "\x1b[2J"'),
    "tensor-name-bidi": (with_rows({**A, "name": "a\u202eb"}), r"a\u202eb"),
    "tensor-name-not-utf8": (with_rows({**A, "name": b"\x80"}), "tensor name at byte"),
    # L26: a part alone
    "split-count-65535": (with_value(lambda m: m.kv("split.count", m.U16, 65535)), "found 65535; allowed"),
    "split-but-named-otherwise": (with_value(lambda m: m.kv("split.count", m.U16, 3)), "NAME-00001-of-00003.gguf"),
    "split-count-negative": (with_value(lambda m: m.kv("split.count", m.I32, -1)), "found -1"),
    "split-count-text": (with_value(lambda m: m.kv("split.count", m.STRING, "../../x")), "split.count"),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, make: SimpleNamespace, tmp_path: Path) -> None:
    build, decisive = CASES[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(build(make))
    descriptors = open_files()
    start = time.process_time()
    with pytest.raises(ModelFormatError) as caught:
        open_model(path)
    assert time.process_time() - start < RUNAWAY
    message = str(caught.value)
    assert decisive in message
    assert message.startswith(str(path))
    assert message.isprintable()  # one line, no control characters
    assert len(message) < 700
    del caught
    assert names(tmp_path) == ["model.gguf"]
    assert open_files() <= descriptors


def test_truncation_at_every_byte(make: SimpleNamespace, tmp_path: Path) -> None:
    values = [
        make.kv("general.architecture", make.STRING, "llama"),
        make.kv("n", make.U32, 7),
        make.array("s", make.STRING, ["one", "", "three"]),
        make.array("f", make.F32, [1.0, 2.0]),
    ]
    whole = make.Gguf(values, [make.Row("a", [32, 2], 8, size=68), make.Row("b", [16], size=64)]).bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole)
    with GgufFile.open(path) as file:
        assert len(file.weights) == 2
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(ModelFormatError) as caught:
            GgufFile.open(path)
        message = str(caught.value)
        assert "incomplete download?" in message
        assert str(cut) in message


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("tail", [b"\0", b"PK\3\4" + bytes(60)], ids=["one-byte", "zip-appended"])
def test_trailing_bytes_are_a_warning_or_refused(
    tail: bytes, strict: bool, make: SimpleNamespace, tmp_path: Path
) -> None:
    path = tmp_path / "tail.gguf"
    path.write_bytes(make.Gguf(tail=tail).bytes())
    expected = f"{len(tail)} bytes follow the last tensor"
    if strict:
        with pytest.raises(ModelFormatError, match=expected):
            open_model(path, strict=True)
    else:
        (warning,) = open_model(path).warnings
        assert expected in warning


def exhaust(path: Path) -> None:
    """Open a file and touch all that it holds."""
    with GgufFile.open(path) as file:
        for value in file.metadata.values():
            if not isinstance(value, str | int | float):
                list(value)
        for tensor in file.tensors.values():
            assert tensor.data.size <= file.nbytes
            tensor.data.sum()
        assert len(file.fingerprint) == 64
        for name in file.weights:
            with suppress(UnsupportedModelError):
                weight = file.weights[name]
                assert weight.data.shape == (weight.rows, weight.format.row_bytes(weight.columns))


def mutate(content: bytes, rng: random.Random) -> bytes:
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(out))
        match rng.randrange(6):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.choice((0, 1, 127, 128, 255))
            case 2:
                number = rng.choice((0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1, len(out), rng.randrange(256)))
                out[at : at + 8] = struct.pack("<Q", number)
            case 3:
                out[at : at + 4] = struct.pack("<I", rng.randrange(1 << rng.choice((4, 8, 32))))
            case 4:
                del out[at : at + rng.randrange(1, 9)]
            case 5:
                out[at:at] = out[at : at + rng.randrange(1, 65)]
    return bytes(out)


def test_mutants_are_read_or_refused_never_worse(make: SimpleNamespace, tmp_path: Path) -> None:
    rng = random.Random(20240607)
    values = [
        make.kv("general.architecture", make.STRING, "llama"),
        make.kv("general.alignment", make.U32, 32),
        make.kv("b", make.BOOL, 1),
        make.kv("d", make.F64, 1.5),
        make.array("tokens", make.STRING, ["a", "bc", "", "def"]),
        make.array("scores", make.F32, [1.0, 2.0, 3.0, 4.0]),
        make.array("flags", make.BOOL, [1, 0]),
    ]
    rows = [make.Row("a", [32, 2], 8, size=68), make.Row("b", [16], size=64), make.Row("c", [4, 2, 2], 1, size=32)]
    whole = make.Gguf(values, rows).bytes()
    header = len(make.Gguf(values, rows).header())
    path = tmp_path / "mutant.gguf"
    outcomes = {"read": 0, "refused": 0}
    for _ in range(3000):
        mutant = mutate(whole[:header], rng) + whole[header:]
        path.write_bytes(mutant)
        start = time.process_time()
        try:
            exhaust(path)
            outcomes["read"] += 1
        except ThermoclineError as error:
            assert str(error).isprintable()  # noqa: PT017 - either outcome is right
            outcomes["refused"] += 1
        assert time.process_time() - start < RUNAWAY, mutant
    assert outcomes["refused"] > 1500
    assert outcomes["read"] > 50
    assert names(tmp_path) == ["mutant.gguf"]


LARGE: dict[str, Case] = {
    "65536-tiny-keys": lambda m: m.Gguf([m.kv(f"{i:x}", m.U8, 1) for i in range(65536)], []).bytes(),
    "30000-tiny-tensors": lambda m: m.Gguf(rows=[m.Row(f"{i:x}", [1], 24, offset=0) for i in range(25000)]).bytes(),
    "120000-empty-strings": lambda m: m.Gguf([m.array("k", m.STRING, [""] * 120_000)], []).bytes(),
    "one-string-of-1-MB": lambda m: m.Gguf([m.kv("k", m.STRING, "x" * 1_000_000)], []).bytes(),
    "20000-string-arrays": lambda m: m.Gguf([m.array(f"{i:x}", m.STRING, [""]) for i in range(20_000)], []).bytes(),
    "dims-of-a-TB": with_rows({"name": "a", "dims": [1 << 38]}),
}


@pytest.mark.parametrize("name", LARGE)
def test_files_of_a_megabyte_cost_a_second_and_64_megabytes_at_most(
    name: str, make: SimpleNamespace, tmp_path: Path
) -> None:
    path = tmp_path / "large.gguf"
    path.write_bytes(LARGE[name](make))
    size = path.stat().st_size
    assert size <= 1_500_000
    start = time.process_time()
    with suppress(ModelFormatError):
        GgufFile.open(path).close()
    assert time.process_time() - start < RUNAWAY
    tracemalloc.start()
    with suppress(ModelFormatError):
        GgufFile.open(path).close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= (64 << 20) + 2 * size


@pytest.mark.parametrize(
    "kind", ["pipe", "folder", "zero-device", "socket", "link-to-pipe", "missing", "dangling-link"]
)
def test_only_regular_files_are_opened(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "odd"
    expected = {"missing": "does not exist", "dangling-link": "does not exist"}.get(kind, f"is a {kind.split('-')[-1]}")
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "zero-device":
            path = Path("/dev/zero")
        case "socket":
            monkeypatch.chdir(tmp_path)  # a socket's path has room for 107 bytes
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path.name)
        case "link-to-pipe":
            os.mkfifo(tmp_path / "pipe")
            path.symlink_to("pipe")
        case "dangling-link":
            path.symlink_to("nowhere")
    with pytest.raises(ModelFormatError, match=expected):
        GgufFile.open(path)


@pytest.mark.parametrize("path", ["a\0b", "n" * 5000, "\ud800"], ids=["nul", "too-long", "surrogate"])
def test_impossible_names(path: str) -> None:
    with pytest.raises(ModelFormatError) as caught:
        open_model(path)
    assert str(caught.value).isprintable()


def test_permission_denied(make: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.gguf"
    path.write_bytes(make.Gguf().bytes())
    path.chmod(0)
    if os.geteuid() == 0:  # root may read everything

        def denied(*_: object) -> int:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "open", denied)
    with pytest.raises(ModelFormatError, match="permission denied"):
        open_model(path)


@pytest.mark.parametrize("content", ["zeros", "valid"])
def test_sparse_terabyte(content: str, make: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    path.write_bytes(b"" if content == "zeros" else make.Gguf().bytes())
    os.truncate(path, 1 << 40)
    start = time.process_time()
    if content == "zeros":
        with pytest.raises(ModelFormatError, match="begins with zeros"):
            open_model(path)
    else:
        assert "bytes follow the last tensor" in open_model(path).warnings[0]
    assert time.process_time() - start < RUNAWAY


def test_sparse_terabyte_of_empty_strings(make: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    path.write_bytes(make.Gguf([make.array("k", make.STRING, [], count=1 << 24)], []).bytes())
    os.truncate(path, 1 << 40)
    with pytest.raises(ModelFormatError, match="16777216 strings; allowed: at most 8388608"):
        open_model(path)


def test_sparse_terabyte_of_header(make: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    path.write_bytes(make.Gguf([make.kv("k", make.STRING, struct.pack("<Q", (1 << 29) - 1))], []).bytes())
    os.truncate(path, 1 << 40)
    with pytest.raises(ModelFormatError, match="allowed: at most 536870912"):
        open_model(path)
