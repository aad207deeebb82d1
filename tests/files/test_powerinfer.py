"""Predictors in PowerInfer's model files, and Q5_0, which only they use here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from thermocline.errors import ModelFormatError, NumericalError, ThermoclineError, UnsupportedModelError
from thermocline.files.formats import BF16, F16, F32, GGML_TYPES, Q4_0, Q5_0, Q8_0, BlockFormat
from thermocline.files.gguf import GgufFile
from thermocline.files.gguf_writer import NewTensor, write_gguf
from thermocline.files.open import open_model
from thermocline.files.powerinfer import THRESHOLD_KEY, read_predictor
from thermocline.files.quantize import all_finite, converted, dequantize, from_float, to_float, widened
from thermocline.files.weight import Weight

N_EMBD, N_FF, RANKS = 64, 96, (32, 64, 32)
HEADER = {
    "general.architecture": "llama",
    "llama.block_count": 3,
    "llama.embedding_length": N_EMBD,
    "llama.feed_forward_length": N_FF,
}


def matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def q5_0(x: np.ndarray) -> np.ndarray:
    return quants.quantize(x, GGMLQuantizationType.Q5_0).view(np.uint8).reshape(len(x), -1)


def encoded(name: str, x: np.ndarray, fmt: BlockFormat) -> NewTensor | Weight:
    return NewTensor(name, Q5_0, x.shape, lambda: q5_0(x)) if fmt is Q5_0 else from_float(name, x, fmt)


def predictors(fmt: BlockFormat = F16) -> dict[str, Any]:
    named = {}
    for i, rank in enumerate(RANKS):
        named[f"blk.{i}.fc1.weight"] = encoded(f"blk.{i}.fc1.weight", matrix(rank, N_EMBD, i), fmt)
        named[f"blk.{i}.fc2.weight"] = encoded(f"blk.{i}.fc2.weight", matrix(N_FF, rank, 10 + i), fmt)
    return named


def sparse_file(path: Path, named: dict[str, Any], **header: Any) -> Path:
    records = from_float("blk.0.ffn_down_t.weight", matrix(N_FF, N_EMBD), F16)
    write_gguf(path, HEADER | header, [records, *named.values()], powerinfer=True)
    return path


def read(path: Path) -> Any:
    with GgufFile.open(path, strict=True) as file:
        return read_predictor(file)


@pytest.mark.parametrize("fmt", [F32, F16, BF16, Q8_0, Q4_0, Q5_0], ids=lambda f: f.name)
def test_predictors_of_every_format(fmt: BlockFormat, tmp_path: Path) -> None:
    named = predictors(fmt)
    found = read(sparse_file(tmp_path / "m.gguf", named, **{THRESHOLD_KEY: np.float32(0.25)}))
    assert found.threshold == 0.25
    assert [layer.rank for layer in found.layers] == list(RANKS)
    for i, layer in enumerate(found.layers):
        for name, weight in (("fc1", layer.fc1), ("fc2", layer.fc2)):
            assert weight.format is (Q8_0 if fmt is Q5_0 else fmt)
            wanted = named[f"blk.{i}.{name}.weight"]
            if fmt is Q5_0:
                oracle = quants.dequantize(wanted.produce(), GGMLQuantizationType.Q5_0)
                np.testing.assert_array_equal(to_float(weight), oracle)
            else:
                np.testing.assert_array_equal(weight.data, wanted.data)


def test_opened_as_a_model(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "m.gguf", predictors())
    assert path.read_bytes()[:8] == b"PWRI\x03\0\0\0"
    with open_model(path) as model:
        assert isinstance(model, GgufFile)
        assert model.kind == "gguf"
        assert model.powerinfer
        assert model.warnings == ()
    plain = tmp_path / "plain.gguf"
    write_gguf(plain, HEADER, predictors().values())
    with GgufFile.open(plain) as model:
        assert not model.powerinfer
        assert read_predictor(model) is not None  # records and predictors may also lie in an ordinary file


def test_views_and_no_threshold(tmp_path: Path) -> None:
    file = GgufFile.open(sparse_file(tmp_path / "m.gguf", predictors()))
    found = read_predictor(file)
    assert found is not None
    assert found.threshold == 0.0
    assert np.shares_memory(found.layers[1].fc2.data, file.tensors["blk.1.fc2.weight"].data)
    assert found.nbytes == sum(w.nbytes for w in predictors().values())


def test_a_model_without_predictors(tmp_path: Path) -> None:
    assert read(sparse_file(tmp_path / "m.gguf", {})) is None


def changed(**tensors: Any) -> Callable[[], dict[str, Any]]:
    """All predictors, some of them replaced or (None) left out; `a__b` stands for `a.b`."""

    def make() -> dict[str, Any]:
        named = predictors()
        for key, x in tensors.items():
            name = f"blk.{key.replace('__', '.')}.weight".replace("blk.l", "blk.")
            named.pop(name, None)
            if x is not None:
                named[name] = encoded(name, x, F16) if isinstance(x, np.ndarray) else x(name)
        return named

    return make


def with_nan(scale: float) -> Callable[[str], Weight]:
    def make(name: str) -> Weight:
        weight = from_float(name, matrix(N_FF, 32), Q4_0)
        weight.data[3, :2] = np.array([scale], np.float16).view(np.uint8)
        return weight

    return make


def in_k_quants(name: str) -> NewTensor:
    fmt = next(f for f in GGML_TYPES.values() if f.name == "Q3_K")
    return NewTensor(name, fmt, (32, 256), lambda: np.zeros((32, fmt.block_bytes), np.uint8))


NAN = matrix(32, N_EMBD)
NAN[5, 6] = np.nan
REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], dict[str, Any], type[ThermoclineError], str]] = {
    "fc2-missing": (changed(l1__fc2=None), {}, ModelFormatError, "found 5 of 3 layers; missing: fc2 of layer 1"),
    "layer-missing": (changed(l2__fc1=None, l2__fc2=None), {}, ModelFormatError, "missing: fc1 of layer 2, fc2 of lay"),
    "layer-too-many": (
        changed(l3__fc1=matrix(32, N_EMBD), l3__fc2=matrix(N_FF, 32)),
        {},
        ModelFormatError,
        "found 8 of 3 layers",
    ),
    "another-layer-count": (changed(), {"llama.block_count": 2}, ModelFormatError, "found 6 of 2 layers"),
    "another-width": (
        changed(),
        {"llama.embedding_length": 128},
        ModelFormatError,
        "from 64 inputs to 96 neurons; the model has 128 and 96",
    ),
    "another-n-ff": (changed(), {"llama.feed_forward_length": 95}, ModelFormatError, "the model has 64 and 95"),
    "ranks-differ": (changed(l1__fc1=matrix(63, N_EMBD)), {}, ModelFormatError, "fc1 is 63 x 64 and fc2 96 x 64"),
    "nan": (changed(l0__fc1=NAN), {}, NumericalError, "predictor of layer 0: fc1 holds NaN or infinity"),
    "nan-scale": (changed(l0__fc2=with_nan(np.nan)), {}, NumericalError, "layer 0: fc2 holds NaN or infinity"),
    "infinite-scale": (changed(l2__fc2=with_nan(np.inf)), {}, NumericalError, "layer 2: fc2 holds NaN or infinity"),
    "threshold-nan": (changed(), {THRESHOLD_KEY: np.float32("nan")}, ModelFormatError, "found nan; allowed: a finite"),
    "threshold-text": (changed(), {THRESHOLD_KEY: "0"}, ModelFormatError, 'found the string "0"; allowed'),
    "format": (changed(l1__fc1=in_k_quants), {}, UnsupportedModelError, "is stored as Q3_K"),
    "three-axes": (
        changed(l1__fc1=lambda n: NewTensor(n, Q5_0, (2, 2, 32), lambda: np.zeros((4, 22), np.uint8))),
        {},
        UnsupportedModelError,
        "has shape [2, 2, 32]; readable are matrices",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    make, header, error, decisive = REFUSED[name]
    path = sparse_file(tmp_path / "m.gguf", make(), **header)
    with pytest.raises(error) as caught:
        read(path)
    assert decisive in str(caught.value)
    assert str(caught.value).isprintable()


def test_an_empty_vector_is_no_weight(make: SimpleNamespace, tmp_path: Path) -> None:
    rows = [make.Row("blk.0.ffn_down_t.weight", [0]), make.Row("a", [4], size=16)]
    path = tmp_path / "m.gguf"
    path.write_bytes(make.Gguf(rows=rows, magic=b"PWRI").bytes())
    with GgufFile.open(path) as file:
        assert file.tensors["a"].data.size == 16
        with pytest.raises(UnsupportedModelError, match=r"has shape \[0\]"):
            file.weights["blk.0.ffn_down_t.weight"]
    path.write_bytes(make.Gguf(rows=rows).bytes())
    with pytest.raises(ModelFormatError, match=r"found shape \[0\]"):
        GgufFile.open(path)


# Q5_0


def test_q5_0_is_the_gguf_packages() -> None:
    x = np.concatenate([matrix(8, 64), np.zeros((1, 64), np.float32), matrix(2, 64) * np.float32(1e4)])
    data = q5_0(x)
    oracle = quants.dequantize(data, GGMLQuantizationType.Q5_0)
    np.testing.assert_array_equal(dequantize(data, Q5_0, 64), oracle)
    wide = widened(Weight("a", Q5_0, (11, 64), data))
    assert wide.format is Q8_0
    np.testing.assert_array_equal(to_float(wide), oracle)


def test_every_bit_of_q5_0() -> None:
    data = np.random.default_rng(4).integers(0, 256, (64, 44), dtype=np.uint8)
    data[:, 1::22] &= 0x7B  # scales that are finite
    np.testing.assert_array_equal(
        to_float(widened(Weight("a", Q5_0, (64, 64), data))), quants.dequantize(data, GGMLQuantizationType.Q5_0)
    )


@pytest.mark.parametrize("fmt", [F32, F16, BF16, Q8_0, Q4_0], ids=lambda f: f.name)
def test_conversion_by_pieces_is_that_of_the_whole(fmt: BlockFormat) -> None:
    weight = from_float("a", matrix(260, 4096), F16)
    np.testing.assert_array_equal(converted(weight, fmt), from_float("a", to_float(weight), fmt).data)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("fmt", [F32, F16, BF16], ids=lambda f: f.name)
def test_one_number_that_is_not_finite_is_seen(fmt: BlockFormat, value: float) -> None:
    x = matrix(300, 4096)
    assert all_finite(from_float("a", x, fmt))
    x[299, 4095] = value
    assert not all_finite(from_float("a", x, fmt))
