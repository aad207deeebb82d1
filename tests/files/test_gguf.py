"""Reading GGUF: against the `gguf` package, in parts, large vocabularies, what stays valid when."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from thermocline.errors import ModelFormatError, UnsupportedModelError
from thermocline.files.formats import BY_NAME, F32, Q8_0
from thermocline.files.gguf import GgufFile
from thermocline.files.gguf_writer import write_gguf
from thermocline.files.open import open_model
from thermocline.files.quantize import from_float, to_float
from thermocline.files.strings import StringArray

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NUMBERS = [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64, np.float32, np.float64]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda key: key not in {"general.alignment", "split.count"} and not key.startswith("GGUF.")
)

RUNAWAY = 30.0  # seconds of CPU: far above what a bounded reader takes on any machine


def scalars() -> st.SearchStrategy[object]:
    numbers = [arrays(dtype, ()).map(lambda a: a[()]) for dtype in NUMBERS]
    return st.one_of(st.booleans(), TEXTS, *numbers)


def lists() -> st.SearchStrategy[object]:
    numbers = [arrays(dtype, st.integers(0, 5)) for dtype in [*NUMBERS, np.bool_]]
    return st.one_of(st.lists(TEXTS, min_size=1, max_size=5), *numbers)


def same(a: object, b: object) -> bool:
    """Equal, where NaN equals NaN."""
    a, b = (np.asarray(list(x) if isinstance(x, StringArray) else x) for x in (a, b))
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def tensors() -> st.SearchStrategy[list[tuple[str, str, tuple[int, int], int]]]:
    def of_format(name: str) -> st.SearchStrategy[tuple[str, str, tuple[int, int], int]]:
        block = max(BY_NAME[name].block, 32)
        shape = st.tuples(st.integers(1, 4), st.sampled_from([block, 2 * block]))
        return st.tuples(st.text("abc.0_", min_size=1, max_size=63), st.just(name), shape, st.integers(0, 1000))

    one = st.sampled_from(sorted(BY_NAME)).flatmap(of_format)
    return st.lists(one, max_size=5, unique_by=lambda t: t[0])


def built(plan: list[tuple[str, str, tuple[int, int], int]]) -> list:
    return [
        from_float(name, np.random.default_rng(seed).standard_normal(shape).astype(np.float32), BY_NAME[fmt])
        for name, fmt, shape, seed in plan
    ]


@QUICK
@given(values=st.dictionaries(KEYS, st.one_of(scalars(), lists()), max_size=8), plan=tensors())
def test_what_is_written_is_read(values: dict[str, object], plan: list, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    weights = built(plan)
    size = write_gguf(path, values, weights)
    assert path.stat().st_size == size
    with GgufFile.open(path, strict=True) as file:
        assert file.metadata.keys() == values.keys()
        for key, value in values.items():
            assert same(file.metadata[key], value), key
        typed = file.typed_metadata()
        assert list(file.weights) == [w.name for w in weights]
        for weight in weights:
            found = file.weights[weight.name]
            assert (found.format, found.shape) == (weight.format, weight.shape)
            np.testing.assert_array_equal(found.data, weight.data)
        again = tmp_path / "y.gguf"
        write_gguf(again, typed, list(file.weights.values()))
    assert again.read_bytes() == path.read_bytes()


@QUICK
@given(values=st.dictionaries(KEYS, st.one_of(scalars(), lists()), max_size=8), plan=tensors())
def test_what_is_written_is_read_by_the_gguf_package(values: dict[str, object], plan: list, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    weights = built(plan)
    write_gguf(path, values, weights)
    reader = gguf.GGUFReader(path)
    for key, value in values.items():
        field = reader.fields[key]
        if isinstance(value, np.ndarray) and not len(value):
            continue  # it drops the element type of empty arrays
        assert same(field.contents(), value), key
        if isinstance(value, np.generic | np.ndarray):
            assert field.types[-1].name == {"f": "FLOAT", "i": "INT", "u": "UINT", "b": "BOOL"}[value.dtype.kind] + (
                str(value.dtype.itemsize * 8) if value.dtype.kind != "b" else ""
            )
    assert [t.name for t in reader.tensors] == [w.name for w in weights]
    for theirs, weight in zip(reader.tensors, weights, strict=True):
        assert theirs.tensor_type.name == weight.format.name
        assert theirs.shape.tolist()[::-1] == [n for i, n in enumerate(weight.shape) if i or n > 1]
        np.testing.assert_array_equal(theirs.data.view(np.uint8).reshape(-1), weight.data.reshape(-1))


def written_by_the_package(path: Path, *, alignment: int | None = None) -> dict[str, np.ndarray]:
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -30000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_uint64("u64", 1 << 63)
    writer.add_int64("i64", -1 << 62)
    writer.add_float32("f32", 0.1)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "Größe\n\0")
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.5, 1.5])
    writer.add_array("flags", [True, False])
    writer.add_array("texts", ["a", "", "ü"])
    rng = np.random.default_rng(5)
    data = {
        "matrix": rng.standard_normal((3, 64)).astype(np.float32),
        "vector": rng.standard_normal(5).astype(np.float32),
        "half": rng.standard_normal((2, 7)).astype(np.float16),
        "cube": rng.standard_normal((2, 3, 4)).astype(np.float32),
    }
    for name, array in data.items():
        writer.add_tensor(name, array)
    packed = gguf.quants.quantize(data["matrix"], gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    other = gguf.quants.quantize(data["matrix"], gguf.GGMLQuantizationType.Q5_1)
    writer.add_tensor("other", other, raw_dtype=gguf.GGMLQuantizationType.Q5_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return data | {"packed": packed, "other": other}


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
def test_what_the_gguf_package_writes_is_read(alignment: int | None, tmp_path: Path) -> None:
    path = tmp_path / "theirs.gguf"
    data = written_by_the_package(path, alignment=alignment)
    file = GgufFile.open(path, strict=True)
    meta = file.metadata
    assert meta.text("text") == "Größe\n\0"
    assert meta.text("general.architecture") == "llama"
    assert [meta[k] for k in ("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64", "yes")] == [
        200, -100, 60000, -30000, 4_000_000_000, -2_000_000_000, 1 << 63, -1 << 62, True,
    ]  # fmt: skip
    assert meta.number("f32", 0, 1) == np.float32(0.1)
    assert meta.number("f64", 0, 1) == 0.1
    assert meta.array("ints", "integer", length=3).tolist() == [1, -2, 3]
    assert meta.array("floats", "float").tolist() == [0.5, 1.5]
    assert list(meta.strings("texts")) == ["a", "", "ü"]
    np.testing.assert_array_equal(to_float(file.weights["matrix"]), data["matrix"])
    np.testing.assert_array_equal(to_float(file.weights["vector"]), data["vector"][None])
    np.testing.assert_array_equal(to_float(file.weights["half"]), data["half"].astype(np.float32))
    assert file.weights["packed"].format is Q8_0
    np.testing.assert_array_equal(file.weights["packed"].data, data["packed"])
    for start in (t.data.ctypes.data for t in file.tensors.values()):
        assert start % (alignment or 32) == 0


def test_what_cannot_be_computed_with_is_still_listed(tmp_path: Path) -> None:
    path = tmp_path / "theirs.gguf"
    data = written_by_the_package(path)
    file = GgufFile.open(path)
    assert file.tensors["cube"].shape == (2, 3, 4)
    assert file.tensors["other"].format.name == "Q5_1"
    assert file.tensors["other"].data.nbytes == data["other"].nbytes
    assert "cube" in file.weights
    with pytest.raises(UnsupportedModelError, match=r"tensor cube has shape \[2, 3, 4\]"):
        file.weights["cube"]
    with pytest.raises(UnsupportedModelError, match="tensor other is stored as Q5_1; readable are F32"):
        file.weights["other"]
    with pytest.raises(KeyError):
        file.weights["absent"]


def test_leading_axes_of_one_are_dropped(make: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(make.Gguf(rows=[make.Row("a", [4, 2, 1, 1], size=32)]).bytes())
    assert GgufFile.open(path).weights["a"].shape == (2, 4)


def test_views_are_read_only_copies_of_nothing_and_outlive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    x = np.arange(64, dtype=np.float32).reshape(2, 32)
    write_gguf(path, {"k": np.arange(3, dtype=np.int32), "s": ["a", "b"]}, [from_float("a", x, F32)])
    with GgufFile.open(path) as file:
        weight, numbers, words = file.weights["a"], file.metadata["k"], file.metadata["s"]
        assert weight.data.base is not None
        assert not weight.data.flags.writeable
    path.unlink()
    np.testing.assert_array_equal(to_float(weight), x)
    assert numbers.tolist() == [0, 1, 2]
    assert words[1] == "b"
    assert not file.weights


def test_replacing_the_file_does_not_change_what_is_open(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    x = np.ones((2, 32), np.float32)
    write_gguf(path, {}, [from_float("a", x, F32)])
    file = GgufFile.open(path)
    write_gguf(path, {}, [from_float("a", x * 2, F32)])
    np.testing.assert_array_equal(to_float(file.weights["a"]), x)
    np.testing.assert_array_equal(to_float(GgufFile.open(path).weights["a"]), x * 2)


def test_a_large_vocabulary_opens_in_under_half_a_second(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    tokens = [f"token-{i}" for i in range(128_000)]
    merges = [f"left{i} right{i}" for i in range(280_000)]
    scores = np.zeros(128_000, np.float32)
    write_gguf(path, {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges, "scores": scores}, [])
    start = time.process_time()
    file = GgufFile.open(path)
    assert time.process_time() - start < RUNAWAY
    assert list(file.metadata.strings("tokenizer.ggml.tokens", length=128_000)) == tokens
    assert file.metadata["tokenizer.ggml.merges"][279_999] == merges[-1]


def test_strings_that_are_not_utf8_stay_bytes(make: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(make.Gguf([make.array("t", make.STRING, ["ok", b"\xe2\x96", "", "end"])]).bytes())
    words = GgufFile.open(path).metadata.strings("t")
    assert isinstance(words, StringArray)
    assert list(words.iter_raw()) == [b"ok", b"\xe2\x96", b"", b"end"]
    assert (words.raw(1), words.raw(-1)) == (b"\xe2\x96", b"end")
    assert (words[0], words[-1], words[2:]) == ("ok", "end", ["", "end"])
    for access in (lambda: words[1], lambda: words[-3], lambda: list(words)):
        with pytest.raises(ModelFormatError, match=r"t\[1\] at byte \d+: is not UTF-8"):
            access()
    with pytest.raises(IndexError):
        words[4]
    again = tmp_path / "y.gguf"
    write_gguf(again, {"t": words}, [])
    assert GgufFile.open(again).metadata["t"].raw(1) == b"\xe2\x96"


def test_fingerprints_tell_models_apart(tmp_path: Path) -> None:
    def fingerprint(name: str, values: dict[str, object], x: np.ndarray) -> str:
        write_gguf(tmp_path / name, values, [from_float("a", x, F32)])
        return GgufFile.open(tmp_path / name).fingerprint

    x = np.zeros((64, 1024), np.float32)
    base = fingerprint("a.gguf", {"k": 1}, x)
    assert len(base) == 64
    assert fingerprint("b.gguf", {"k": 1}, x) == base  # the name does not matter
    assert fingerprint("c.gguf", {"k": 2}, x) != base
    for place in (0, x.size // 2, x.size - 1):
        changed = x.copy()
        changed.flat[place] = 1
        assert fingerprint("d.gguf", {"k": 1}, changed) != base
    assert fingerprint("e.gguf", {"k": 1}, x[:, :512]) != base


# Parts


def parts(root: Path, count: int = 3, **changes: dict[str, object]) -> Path:
    """A model of `count` parts; `changes` gives other metadata to some, by number."""
    for i in range(count):
        values: dict[str, object] = {"general.architecture": "llama", "general.name": "m", "n": 7} if i == 0 else {}
        values |= {"split.no": np.uint16(i), "split.count": np.uint16(count), "split.tensors.count": np.int32(count)}
        values |= changes.get(f"part{i}", {})
        name = str(values.pop("tensor", f"t{i}"))
        x = np.full((1, 32), i, np.float32)
        write_gguf(root / f"m-{i + 1:05}-of-{count:05}.gguf", values, [from_float(name, x, F32)])
    return root / f"m-00001-of-{count:05}.gguf"


def test_parts_are_one_model(tmp_path: Path) -> None:
    file = open_model(parts(tmp_path))
    assert list(file.weights) == ["t0", "t1", "t2"]
    assert [to_float(w)[0, 0] for w in file.weights.values()] == [0, 1, 2]
    assert file.metadata["n"] == 7
    assert file.nbytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert file.fingerprint != open_model(parts(tmp_path, 2)).fingerprint


def test_parts_written_by_the_gguf_package(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    for i in range(5):
        writer.add_tensor(f"t{i}", np.full((2, 4), i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_model(tmp_path / "m-00001-of-00003.gguf")
    assert sorted(file.weights) == [f"t{i}" for i in range(5)]


HOSTILE_PARTS: dict[str, tuple[dict[str, dict[str, object]], str]] = {
    "number-wrong": ({"part1": {"split.no": np.uint16(2)}}, "split.no: found 2; allowed: a whole number in 1 to 1"),
    "number-missing": ({"part1": {"split.no": "x"}}, "split.no: found"),
    "count-differs": ({"part2": {"split.count": np.uint16(4)}}, "split.count: found 4"),
    "count-over-name": ({"part0": {"split.count": np.uint16(5)}}, "found 5; allowed: 3, as its name says"),
    "count-65535": ({"part0": {"split.count": np.uint16(65535)}}, "found 65535"),
    "tensor-in-two": ({"part2": {"tensor": "t0"}}, 'tensor "t0": is also in m-00001-of-00003.gguf'),
    "tensor-total": ({"part0": {"split.tensors.count": np.int32(9)}}, "found 9; the parts hold 3 tensors"),
    "other-model": ({"part1": {"general.name": "other"}}, "is it a part of another model?"),
    "other-architecture": ({"part2": {"general.architecture": "qwen2"}}, "is it a part of another model?"),
}


@pytest.mark.parametrize("name", HOSTILE_PARTS)
def test_parts_that_do_not_belong_together(name: str, tmp_path: Path) -> None:
    changes, decisive = HOSTILE_PARTS[name]
    path = parts(tmp_path, **changes)
    with pytest.raises(ModelFormatError) as caught:
        open_model(path)
    assert decisive in str(caught.value)


def test_parts_missing_truncated_or_opened_in_the_middle(tmp_path: Path) -> None:
    path = parts(tmp_path)
    with pytest.raises(ModelFormatError, match=r"is part 2 of 3; open the first: m-00001-of-00003.gguf"):
        open_model(tmp_path / "m-00002-of-00003.gguf")
    last = tmp_path / "m-00003-of-00003.gguf"
    whole = last.read_bytes()
    last.write_bytes(whole[:-1])
    with pytest.raises(ModelFormatError, match=rf"00003-of-00003.gguf.*have {len(whole) - 1} bytes, need {len(whole)}"):
        open_model(path)
    last.unlink()
    with pytest.raises(ModelFormatError, match=r"1 of 3 parts are missing: m-00003-of-00003.gguf"):
        open_model(path)
    last.mkdir()
    with pytest.raises(ModelFormatError, match="is a folder"):
        open_model(path)
