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
    assert companion(tmp_path / model, SidecarKind.PREDICTOR) == (tmp_path / name).resolve()


def test_the_kind_is_part_of_the_name(tmp_path: Path) -> None:
    assert companion(tmp_path / "m.gguf", SidecarKind.ACTIVITY).name == "m.activity.safetensors"


def test_a_folder_that_is_the_working_one_has_a_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    assert companion(".", SidecarKind.PREDICTOR) == (tmp_path / "model.predictor.safetensors").resolve()
