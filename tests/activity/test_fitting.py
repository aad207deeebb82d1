"""One layer's fit on data that is not as varied as it might be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thermocline.activity.capture import LayerData, pack_levels
from thermocline.config import TrainDevice, TrainSettings
from thermocline.errors import FingerprintError, HardwareError, ModelFormatError
from thermocline.files.sidecar import update_info

pytest.importorskip("torch")
import torch

from thermocline.activity import fit_state, fitting
from thermocline.activity.fit_state import FitState
from thermocline.activity.fitting import Fitter, fitters
from thermocline.activity.training_device import TrainingDevice
from thermocline.files.pace import Pace

N_EMBD, N_FF, ROWS, TOKENS = 1024, 96, 64, 4096


def test_a_text_that_repeats_itself() -> None:
    """Its streams fill few directions; the moments of all others are zero, which rounding must not make negative."""
    random = np.random.default_rng(2)
    rows = random.standard_normal((ROWS, N_EMBD)).astype(np.float16)
    first = random.standard_normal((N_FF, N_EMBD)).astype(np.float32)
    energy = np.maximum(rows.astype(np.float32) @ first.T, 0)
    places = np.arange(TOKENS) % ROWS
    data = LayerData(rows[places], pack_levels(energy)[places], rows, energy.astype(np.float16))
    fitter = Fitter(data, first, N_FF, TrainSettings(train_on="cpu", epochs=1))
    told = fitter.scores(fitter.fit(96), rows) > 0
    assert ((energy > 0) == told).mean() > 0.85


def some_data() -> tuple[LayerData, np.ndarray]:
    random = np.random.default_rng(3)
    x = random.standard_normal((256, 64)).astype(np.float16)
    first = random.standard_normal((N_FF, 64)).astype(np.float32)
    energy = np.maximum(x.astype(np.float32) @ first.T, 0)
    return LayerData(x, pack_levels(energy), x[:32], energy[:32].astype(np.float16)), first


# A fit that goes on


class KilledError(BaseException):
    """What no handler of the program catches, as a kill."""


FEW, FEW_STEPS = TrainSettings(epochs=2, batch=40, train_on="cpu"), 13


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the state of a fit is saved after every step."""
    monkeypatch.setattr(fit_state, "SAVE_SECONDS", 0.0)
    return tmp_path / "fit"


def fit(path: Path, rank: int = 32, *, first: bool = True, killed_after: int = 0) -> tuple[list[int], bytes]:
    """The tokens of each step that was made, and the matrices; empty where it was killed."""
    data, rows = some_data()
    made: list[int] = []

    def tick(tokens: int) -> None:
        made.append(tokens)
        if len(made) == killed_after:
            raise KilledError

    try:
        found = Fitter(data, rows if first else None, N_FF, FEW).fit(rank, 1.0, tick, FitState(path, "0" * 64, "m"))
    except KilledError:
        return made, b""
    return made, found.fc1.tobytes() + found.fc2.tobytes()


@pytest.mark.parametrize("first", [True, False])
def test_a_killed_fit_goes_on_to_the_same_bits(path: Path, first: bool) -> None:
    steps, wanted = fit(path.with_name("whole"), first=first)
    assert len(steps) == FEW_STEPS
    for after in (1, 2, 7, FEW_STEPS - 1):
        assert fit(path, first=first, killed_after=after) == (steps[:after], b"")
        assert fit(path, first=first) == (steps[after:], wanted)
        path.unlink()
    for _ in range(3):  # one step a start
        assert fit(path, first=first, killed_after=1)[1] == b""
    assert fit(path, first=first) == (steps[3:], wanted)


def test_what_is_kept_of_another_fit_is_not_gone_on_with(path: Path) -> None:
    whole = fit(path.with_name("whole"), 64)
    fit(path, 32, killed_after=3)
    assert fit(path, 64) == whole
    fit(path, 32, killed_after=3)
    with pytest.raises(FingerprintError):
        FitState(path, "1" * 64, "other").begin(32, FEW_STEPS)


@pytest.mark.parametrize("done", [0, FEW_STEPS, -1, True, "3", None])
def test_a_state_that_says_nothing_sensible_is_refused(path: Path, done: Any) -> None:
    fit(path, killed_after=3)
    update_info(path, {"done": done})
    with pytest.raises(ModelFormatError, match="does not tell how far"):
        fit(path)


def test_a_fit_is_saved_at_a_pace_and_never_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_state, "Pace", lambda most, **more: Pace(most, lambda: 0.0, **more))
    fit(tmp_path / "fit")  # in less than a second, by this clock
    assert not (tmp_path / "fit").exists()
    monkeypatch.setattr(fit_state, "SAVE_SECONDS", 0.0)
    fit(tmp_path / "fit")
    assert FitState(tmp_path / "fit", "0" * 64, "m").begin(32, FEW_STEPS)[0] == FEW_STEPS - 1


# Devices. "cpu:0" is the CPU by a name of its own: here it stands for a GPU.

SMALL = TrainSettings(epochs=1, batch=64)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thermocline.activity.training_device.GPU", "cpu:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Stand-in 1")


def refusing(monkeypatch: pytest.MonkeyPatch, name: str, after: int) -> None:
    """From call number `after` on, `Fitter.name` finds the stand-in's memory full."""
    real: Callable[..., Any] = getattr(Fitter, name)
    calls: list[int] = []

    def call(self: Fitter, *given: Any, **more: Any) -> Any:
        calls.append(1)
        if self._device.name == "cpu:0" and len(calls) > after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore about it")
        return real(self, *given, **more)

    monkeypatch.setattr(Fitter, name, call)


@pytest.mark.parametrize(("name", "after"), [("_directions", 0), ("_initial", 0), ("_batch", 2), ("_scores", 0)])
def test_where_a_gpu_has_not_the_memory_the_cpu_goes_on(
    gpu: None, monkeypatch: pytest.MonkeyPatch, name: str, after: int
) -> None:
    data, first = some_data()
    alone = Fitter(data, first, N_FF, TrainSettings(epochs=1, batch=64, train_on="cpu"))
    wanted = alone.fit(32)
    told: list[str] = []
    refusing(monkeypatch, name, after)
    make = fitters(SMALL, told.append)
    fitter = make(data, first, N_FF, SMALL)
    found = fitter.fit(32)
    assert (fitter.scores(found, data.check) == alone.scores(wanted, data.check)).all()
    assert (found.fc1 == wanted.fc1).all()
    assert told[0] == "predictors are trained on Stand-in 1; --train-on cpu takes the CPU"
    lacks = "CUDA out of memory. Tried to allocate 2.00 GiB."
    assert told[1:] == [f"the GPU has not the memory to train this model's predictors ({lacks}): the CPU goes on"]
    make(data, first, N_FF, SMALL).fit(32)
    assert len(told) == 2  # the next layer is not tried on the GPU again


def test_who_insists_on_a_gpu_is_told_what_it_lacks(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, "_batch", 0)
    settings = TrainSettings(epochs=1, batch=64, train_on="cuda")
    data, first = some_data()
    fitter = fitters(settings, None)(data, first, N_FF, settings)
    with pytest.raises(HardwareError, match=r"Tried to allocate 2\.00 GiB.*use --train-on cpu, or a smaller --batch"):
        fitter.fit(32)


def test_a_gpu_that_runs_no_kernel_is_none(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*given: Any, **more: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch, "ones", none)
    assert TrainingDevice(TrainDevice.AUTO).name == "cpu"
    with pytest.raises(HardwareError, match=r"no kernel image .*use --train-on cpu"):
        TrainingDevice(TrainDevice.CUDA)


def test_without_a_gpu_the_cpu_trains_and_asking_for_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert TrainingDevice(TrainDevice.AUTO).name == "cpu"
    with pytest.raises(HardwareError, match="torch finds no GPU that it can use; use --train-on cpu"):
        TrainingDevice(TrainDevice.CUDA)


def test_ram_that_does_not_do_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory")

    data, first = some_data()
    fitter = Fitter(data, first, N_FF, TrainSettings(train_on="cpu"))
    monkeypatch.setattr(Fitter, "_batch", full)
    with pytest.raises(HardwareError, match=r"RAM has not the memory .*use a smaller --batch or --rank"):
        fitter.fit(32)


def test_a_step_stays_on_its_device() -> None:
    """Torch refuses to mix devices, of which meta is one: whatever a step makes must be where its inputs are."""
    device = TrainingDevice(TrainDevice.CPU)
    data, first = some_data()
    fitter = Fitter(data, first, N_FF, SMALL, device)
    device.name = "meta"
    random = np.random.default_rng(1)
    fc1, fc2 = fitter._initial(96, random)
    optimizer = torch.optim.AdamW([fc1, fc2])
    fitter._step(fc1, fc2, optimizer, *fitter._batch(random, 64))
    assert {fc1.device.type, fc2.device.type, fc1.grad.device.type, fc2.grad.device.type} == {"meta"}
    assert fitting._moments(torch.ones(8, 4, device="meta")).device.type == "meta"


@pytest.mark.parametrize("n_ff", [N_FF, N_FF - 1])
@pytest.mark.parametrize("firing", ["some", "none", "all"])
def test_the_gradient_is_that_of_the_balanced_loss(n_ff: int, firing: str) -> None:
    """Written with torch's own cross-entropy in float64; the rest is rounding of float32."""
    random = np.random.default_rng(5)
    x = random.standard_normal((64, 64)).astype(np.float16)
    energy = {"none": np.zeros, "all": np.ones}.get(firing, random.standard_normal)((64, n_ff)).clip(0)
    level = pack_levels(energy.astype(np.float32))
    settings = TrainSettings(epochs=1, batch=64, train_on="cpu")
    fitter = Fitter(LayerData(x, level, x, x), None, n_ff, settings)
    fc1, fc2 = fitter._initial(32, random)
    inputs, weights = fitter._batch(np.random.default_rng(1), 64)
    rows = (fitter._starts(np.random.default_rng(1), 64)[:, None] + np.arange(fitting.RUN)).reshape(-1)
    wide = np.stack([level & 15, level >> 4], 2).reshape(64, -1)[rows, :n_ff]
    fired, energy = torch.from_numpy(wide > 0), torch.from_numpy(2.0 ** ((wide - 15.0) / 2))
    a, b = (matrix.double().requires_grad_() for matrix in (fc1, fc2))
    scores = torch.relu(inputs.double() @ a.T) @ b.T
    loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, fired.double(), reduction="none")
    sides = [(loss * side * w).sum() / (side * w).sum().clamp_min(1e-9) for side, w in ((fired, energy), (~fired, 1))]
    (sum(sides) / 2).backward()
    fitter._step(fc1, fc2, torch.optim.SGD([fc1, fc2], 0.0), inputs, weights)
    for found, wanted in ((fc1.grad, a.grad), (fc2.grad, b.grad)):
        assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
