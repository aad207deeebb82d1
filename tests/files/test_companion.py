"""Where sidecars lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from thermocline.files.companion import companion
from thermocline.files.sidecar import SidecarKind


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("m.gguf", "m.predictor.safetensors"),
        ("epilimnion.q8_0.gguf", "epilimnion.q8_0.predictor.safetensors"),
        ("big-00001-of-00003.gguf", "big.predictor.safetensors"),
        ("big-00001-of-00003", "big-00001-of-00003.predictor.safetensors"),
        ("folder", "folder.predictor.safetensors"),
        ("folder.v1.5", "folder.v1.5.predictor.safetensors"),
        ("no-extension.bin", "no-extension.bin.predictor.safetensors"),
    ],
)
def test_a_sidecar_has_the_name_of_its_model(tmp_path: Path, model: str, name: str) -> None:
    assert companion(tmp_path / model, SidecarKind.PREDICTOR) == tmp_path / name
    assert companion(str(tmp_path / model), SidecarKind.PREDICTOR) == tmp_path / name


def test_the_kind_is_part_of_the_name(tmp_path: Path) -> None:
    assert companion(tmp_path / "m.gguf", SidecarKind.ACTIVITY).name == "m.activity.safetensors"


def test_a_folder_that_is_the_working_one_has_a_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "model")
    wanted = tmp_path / "model.predictor.safetensors"
    assert companion(".", SidecarKind.PREDICTOR) == wanted.resolve()
    assert companion("../model", SidecarKind.PREDICTOR).resolve() == wanted.resolve()
    monkeypatch.chdir("inner")
    assert companion("..", SidecarKind.PREDICTOR) == wanted.resolve()


def test_a_link_counts_by_its_own_name(tmp_path: Path) -> None:
    """Caches of downloads name files by their digest and link to them."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0123abcd").touch()
    (tmp_path / "m.gguf").symlink_to(tmp_path / "blobs" / "0123abcd")
    assert companion(tmp_path / "m.gguf", SidecarKind.PREDICTOR) == tmp_path / "m.predictor.safetensors"
