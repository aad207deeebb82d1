"""Sidecars: what is written comes back, and nothing that is damaged or hostile does."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from thermocline.errors import (
    FingerprintError,
    ModelFormatError,
    NumericalError,
    OutputError,
    UnsupportedModelError,
)
from thermocline.files.formats import BY_NAME, F32, Q4_0, Q5_0, Q8_0
from thermocline.files.quantize import from_float
from thermocline.files.sidecar import SidecarKind, read_sidecar, require_finite, update_info, write_sidecar
from thermocline.files.weight import Weight

MODEL, OTHER = "ab" * 32, "cd" * 32
KIND = SidecarKind.PREDICTOR


def tensors() -> dict[str, object]:
    random = np.random.default_rng(1)
    matrix = random.normal(size=(5, 256)).astype(np.float32)
    arrays = {
        "counts": np.arange(12, dtype=np.int64).reshape(3, 4),
        "odd": np.arange(3, dtype=np.uint8),
        "flags": np.array([True, False, True]),
        "scalar": np.array(2.5, np.float32),
        "none": np.zeros((0, 4), np.float64),
        "transposed": np.arange(6, dtype=np.int32).reshape(2, 3).T,
        "half": np.ones(3, np.float16),
    }
    return arrays | {f"w.{name}": from_float(f"w.{name}", matrix, fmt) for name, fmt in BY_NAME.items()}


def write(path: Path, **changes: object) -> str:
    values = {"model_fingerprint": MODEL, "info": {"a": 1, "ü": [1.5, None]}, "tensors": tensors()} | changes
    return write_sidecar(path, KIND, **values, model_name="tiny")


def rewrite(path: Path, change) -> None:
    """Change the header and nothing else."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "x.predictor.safetensors"
    checksum = write(path)
    sidecar = read_sidecar(path, KIND)
    assert (sidecar.model_fingerprint, sidecar.model_name, sidecar.checksum) == (MODEL, "tiny", checksum)
    assert sidecar.info == {"a": 1, "ü": [1.5, None]}
    for name, wanted in tensors().items():
        if isinstance(wanted, Weight):
            found = sidecar.weights[name]
            assert (found.name, found.format, found.shape) == (name, wanted.format, wanted.shape)
            assert np.array_equal(found.data, wanted.data)
        else:
            found = sidecar.arrays[name]
            assert found.dtype == wanted.dtype
            assert np.array_equal(found, wanted)
            assert found.flags.aligned
            assert not found.flags.writeable
    assert len(sidecar.arrays) + len(sidecar.weights) == len(tensors())


def test_safetensors_itself_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    wanted = {n: t for n, t in tensors().items() if not n.startswith("w.")}
    write(path, tensors=wanted)
    found = load_file(path)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_the_checksum_is_of_the_content_and_not_of_the_info(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b", info={"other": True})
    assert first == second
    changed = tensors()
    changed["odd"] = np.array([0, 1, 3], np.uint8)
    assert len({first, write(tmp_path / "c", tensors=changed), write(tmp_path / "d", model_fingerprint=OTHER)}) == 3


def test_update_info_changes_keys_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "x"
    checksum = write(path)
    updated = update_info(path, {"audit": {"kl": 0.01}, "a": None})
    assert updated.info == {"ü": [1.5, None], "audit": {"kl": 0.01}}
    again = read_sidecar(path, KIND)
    assert (again.info, again.checksum, again.model_name) == (updated.info, checksum, "tiny")
    assert again.weights.keys() == {n for n in tensors() if n.startswith("w.")}


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "x")
    sidecar = read_sidecar(tmp_path / "x")
    sidecar.require_model(MODEL)
    with pytest.raises(FingerprintError, match=r"belongs to the model tiny .abab.*not to big .cdcd"):
        sidecar.require_model(OTHER, "big")


@pytest.mark.parametrize("place", ["header", "first", "last"])
def test_one_flipped_bit_is_found(tmp_path: Path, place: str) -> None:
    path = tmp_path / "x"
    write(path)
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    position = {"header": raw.index(b'info":"{') + 12, "first": 8 + length, "last": len(raw) - 1}[place]
    raw[position] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ModelFormatError):
        read_sidecar(path, KIND)


def test_without_verify_the_notes_are_still_held_to_their_seal(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write(path)
    rewrite(path, lambda h: h["__metadata__"].update({"thermocline.model": OTHER}))
    with pytest.raises(ModelFormatError, match="seal"):
        read_sidecar(path, KIND, verify=False)


def test_a_folder_is_told_how_to_become_one(tmp_path: Path) -> None:
    for kind in (SidecarKind.ACTIVITY, SidecarKind.PREDICTOR):
        with pytest.raises(ModelFormatError, match=rf"is a folder; .* `thermocline {kind} import`"):
            read_sidecar(tmp_path, kind)
    with pytest.raises(ModelFormatError, match=r"is a folder; needed is one file$"):
        read_sidecar(tmp_path, SidecarKind.ORDER)


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 100, -1])
def test_a_cut_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "x"
    write(path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ModelFormatError):
        read_sidecar(path)


def test_another_kind_and_another_version_and_no_sidecar_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write(path)
    with pytest.raises(ModelFormatError, match="of kind predictor; needed is one of kind activity"):
        read_sidecar(path, SidecarKind.ACTIVITY)
    rewrite(path, lambda h: h["__metadata__"].update({"thermocline.sidecar": "2"}))
    with pytest.raises(UnsupportedModelError, match="version 2"):
        read_sidecar(path)
    rewrite(path, lambda h: h.pop("__metadata__"))
    with pytest.raises(ModelFormatError, match="no sidecar"):
        read_sidecar(path)


HOSTILE_NOTES = [
    ({"format": "Q9", "shape": [5, 256]}, "unknown format"),
    ({"format": "Q8_0", "shape": [5, 65]}, "multiple of 32"),
    ({"format": "Q8_0", "shape": [5, 1 << 62]}, "two counts"),
    ({"format": "Q8_0", "shape": [5, 96]}, "is stored as"),
    ({"format": "Q8_0", "shape": [True, 256]}, "two counts"),
    ({"format": "Q8_0", "shape": [0, 256]}, "two counts"),
    ({"format": "F32", "shape": [5, 17]}, "is stored as"),
    ({"format": ["Q8_0"], "shape": [5, 256]}, "unknown format"),
    ({"format": "Q8_0"}, "needs format and shape"),
    ([], "needs format and shape"),
]


@pytest.mark.parametrize(("note", "problem"), HOSTILE_NOTES)
def test_hostile_notes_are_refused_even_when_sealed(tmp_path: Path, note: object, problem: str) -> None:
    from thermocline.files import sidecar

    path = tmp_path / "x"
    write(path, tensors={"w": tensors()["w.Q8_0"]})

    def change(header) -> None:
        notes = header["__metadata__"]
        notes["thermocline.weights"] = json.dumps({"w": note})
        notes["thermocline.seal"] = sidecar._seal(notes)

    rewrite(path, change)
    with pytest.raises(ModelFormatError, match=problem):
        read_sidecar(path, verify=False)


def test_a_note_about_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    from thermocline.files import sidecar

    path = tmp_path / "x"
    write(path, tensors={})

    def change(header) -> None:
        notes = header["__metadata__"]
        notes["thermocline.weights"] = json.dumps({"w": {"format": "Q8_0", "shape": [1, 32]}})
        notes["thermocline.seal"] = sidecar._seal(notes)

    rewrite(path, change)
    with pytest.raises(ModelFormatError, match="is not in the file"):
        read_sidecar(path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"tensors": {"x": np.array(["text"])}}, "cannot be stored"),
        ({"tensors": {"x": np.zeros(2, np.complex64)}}, "cannot be stored"),
        ({"tensors": {"": np.zeros(2)}}, "printable"),
        ({"tensors": {"x": Weight("x", Q5_0, (1, 32), np.zeros((1, 22), np.uint8))}}, "Q5_0 cannot be stored"),
        ({"tensors": {"x": Weight("x", Q8_0, (0, 32), np.zeros((0, 34), np.uint8))}}, "empty"),
        ({"info": {"x": float("nan")}}, "not JSON"),
        ({"info": {"x": object()}}, "not JSON"),
        ({"info": {"x": "\ud800"}}, "UTF-8"),
        ({"model_fingerprint": "abc"}, "fingerprint"),
    ],
)
def test_what_the_format_does_not_take_is_refused_and_the_old_file_stays(tmp_path: Path, changes, problem) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(OutputError, match=problem):
        write(path, **changes)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_nan_is_refused_before_and_after(tmp_path: Path) -> None:
    spoiled = from_float("w", np.ones((2, 64), np.float32), Q4_0)
    spoiled.data[1, :2] = np.array([np.nan], np.float16).view(np.uint8)
    plain = from_float("v", np.array([[1, np.inf]], np.float32), F32)
    for tensor in (spoiled, plain, np.array([np.nan])):
        with pytest.raises(NumericalError, match='tensor "w" holds NaN'):
            require_finite("x", {"fine": np.arange(3), "w": tensor})
        write(tmp_path / "x", tensors={"fine": np.arange(3), "w": tensor})
        with pytest.raises(NumericalError, match='tensor "w" holds NaN'):
            read_sidecar(tmp_path / "x").require_finite()
    require_finite("x", tensors())
    write(tmp_path / "x")
    read_sidecar(tmp_path / "x").require_finite()
