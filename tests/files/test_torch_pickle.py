"""Tensor files of PyTorch, both ways: torch reads what is written here, and the other way round."""

from __future__ import annotations

import collections
import io
import pickletools
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from thermocline.errors import OutputError
from thermocline.files.torch_pickle import read_tensor_pt, write_tensor_pt

DTYPES = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]


# Round trips


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5), (2, 0, 3), (2, 3, 4, 5)], ids=str)
def test_torch_reads_what_was_written(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 2 if dtype == "bool" else 100, shape).astype(dtype)
    write_tensor_pt(tmp_path / "a.pt", values)
    found = torch.load(tmp_path / "a.pt", weights_only=True).numpy()
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)
    again = read_tensor_pt(tmp_path / "a.pt")
    assert isinstance(again, np.ndarray)
    assert again.dtype == values.dtype
    assert again.shape == shape
    np.testing.assert_array_equal(again, values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_torch_wrote_is_read(dtype: str, tmp_path: Path) -> None:
    values = torch.arange(-4, 26).reshape(5, 6).to(getattr(torch, dtype))
    torch.save({"a": values, "b": values[0].clone()}, tmp_path / "a.pt")
    found = read_tensor_pt(tmp_path / "a.pt")
    assert isinstance(found, dict)
    assert list(found) == ["a", "b"]
    for name, wanted in (("a", values), ("b", values[0])):
        assert found[name].dtype == wanted.numpy().dtype
        np.testing.assert_array_equal(found[name], wanted.numpy())


@settings(max_examples=40, deadline=None)
@given(values=arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(0, 5)), elements=st.floats(width=32)))
def test_any_bits_survive(values: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("bits") / "a.pt"
    write_tensor_pt(path, {"fc1.weight": values})
    found = read_tensor_pt(path)
    assert isinstance(found, dict)
    np.testing.assert_array_equal(found["fc1.weight"].view(np.uint32), values.view(np.uint32))


def test_a_state_dict_with_its_metadata(tmp_path: Path) -> None:
    network = torch.nn.Sequential(
        collections.OrderedDict(fc1=torch.nn.Linear(8, 4, bias=False), fc2=torch.nn.Linear(4, 6, bias=False))
    )
    torch.save(network.state_dict(), tmp_path / "model_0.pt")
    found = read_tensor_pt(tmp_path / "model_0.pt")
    assert isinstance(found, dict)
    assert {name: array.shape for name, array in found.items()} == {"fc1.weight": (4, 8), "fc2.weight": (6, 4)}
    np.testing.assert_array_equal(found["fc1.weight"], network.fc1.weight.detach().numpy())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_that_torch_can_be_told_to_use(protocol: int, tmp_path: Path) -> None:
    named = collections.OrderedDict((f"t{i}", torch.arange(i + 3)) for i in range(300))  # beyond one byte of memo
    torch.save(named, tmp_path / "a.pt", pickle_protocol=protocol)
    found = read_tensor_pt(tmp_path / "a.pt")
    assert isinstance(found, dict)
    for name, tensor in named.items():
        np.testing.assert_array_equal(found[name], tensor.numpy())


def test_views_transposes_and_shared_storages(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    named = {"t": base.T, "row": base[2], "column": base[:, 3], "every": base[::2, 1::2], "all": base}
    torch.save(named, tmp_path / "a.pt")
    found = read_tensor_pt(tmp_path / "a.pt")
    assert isinstance(found, dict)
    for name, tensor in named.items():
        np.testing.assert_array_equal(found[name], tensor.numpy())


def test_bfloat16_becomes_float32(tmp_path: Path) -> None:
    values = torch.tensor([1.5, -0.0, float("inf"), float("nan"), 3e38, 1e-40]).to(torch.bfloat16)
    torch.save(values, tmp_path / "a.pt")
    found = read_tensor_pt(tmp_path / "a.pt")
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found.view(np.uint32), values.float().numpy().view(np.uint32))


def test_arrays_are_read_only_views(tmp_path: Path) -> None:
    write_tensor_pt(tmp_path / "a.pt", np.zeros(1 << 20, np.float32))
    tracemalloc.start()
    found = read_tensor_pt(tmp_path / "a.pt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(found, np.ndarray)
    assert not found.flags.writeable
    assert peak < 1 << 20
    assert found.ctypes.data % 64 == 0


def test_written_archives_are_sound_zips(tmp_path: Path) -> None:
    write_tensor_pt(tmp_path / "a.pt", {"a": np.arange(5), "b": np.ones((2, 2), np.float16)})
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        program = archive.read("archive/data.pkl")
    pickletools.dis(program, io.StringIO())


@pytest.mark.parametrize(
    ("tensors", "decisive"),
    [
        (np.zeros(2, np.complex64), "of 1 axes of complex64"),
        (np.zeros(2, np.uint16), "of 1 axes of uint16"),
        (np.array(["a"]), "of 1 axes of <U1"),
        (np.array([None]), "of 1 axes of object"),
        (np.zeros((1,) * 9), "of 9 axes of float64"),
        ({"n" * 600_000: np.zeros(1), "m" * 600_000: np.zeros(1)}, "take more than 1048576 bytes to describe"),
    ],
)
def test_not_written(tensors: Any, decisive: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught:
        write_tensor_pt(tmp_path / "a.pt", tensors)
    assert decisive in str(caught.value)
    assert list(tmp_path.iterdir()) == []
