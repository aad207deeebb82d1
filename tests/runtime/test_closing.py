"""What loads a model for itself lets go of it: its memory, its devices and their threads, also where it fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from thermocline import audit, perplexity, profile, train_predictor
from thermocline.config import DeviceKind, LoadSettings, TrainSettings
from thermocline.runtime import auditing, loading, profiling, training
from thermocline.runtime import perplexity as measuring
from thermocline.runtime.loading import LoadedModel

MODULES = {"profile": profiling, "perplexity": measuring, "train": training, "audit": auditing}
SETTINGS = LoadSettings(ctx_size=24, threads=2, device=DeviceKind.EMULATED, vram_budget="200KiB")


class StopError(Exception):
    """What a listener raises."""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    for i in range(8):
        (tmp_path / "text" / f"{i}.txt").write_text(f"pack my box with {i} dozen jugs\n" * 4)
    return tmp_path / "text"


def run(verb: str, model: Path, text: Path, folder: Path, told: Callable[[Any], None]) -> None:
    if verb == "profile":
        profile(model, [text], folder / "a.safetensors", SETTINGS, progress=told)
    elif verb == "perplexity":
        perplexity(model, [text], SETTINGS, progress=told)
    elif verb == "train":
        pytest.importorskip("torch")
        settings = TrainSettings(train_on="cpu", rank=32, max_share=0, epochs=1)
        train_predictor(model, [text], folder / "p.safetensors", SETTINGS, settings, progress=told)
    else:
        audit(model, [text], SETTINGS, tokens=24, progress=told)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("verb", MODULES)
def test_everything_is_let_go_of(
    verb: str, fails: bool, with_predictor: Any, tiny_model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[LoadedModel] = []

    def load(*arguments: Any, **named: Any) -> LoadedModel:
        loaded.append(loading.load_model(*arguments, **named))
        return loaded[-1]

    monkeypatch.setattr(MODULES[verb], "load_model", load)
    monkeypatch.setattr(auditing, "FREE_TOKENS", 2)
    held: list[bool] = []
    others = set(threading.enumerate())  # of devices that tests before this one have not let go of yet

    def told(_: Any) -> None:
        held.append(bool(list(loaded[0].placing.memory.ledger.rows())))
        if fails:
            raise StopError

    model = with_predictor(tiny_model)
    if fails:
        with pytest.raises(StopError):
            run(verb, model, text, model.parent, told)
    else:
        run(verb, model, text, model.parent, told)
    assert held
    assert all(held)
    assert list(loaded[0].placing.memory.ledger.rows()) == []
    assert not any(thread.name == "emulated-device" for thread in set(threading.enumerate()) - others)
