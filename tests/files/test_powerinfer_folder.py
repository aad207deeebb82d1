"""Activation and predictor folders, against torch and against folders that are nearly right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from thermocline.errors import ModelFormatError, NumericalError, OutputError, ThermoclineError
from thermocline.files import powerinfer_folder
from thermocline.files.formats import BF16, F16, F32, Q4_0, Q8_0, BlockFormat
from thermocline.files.powerinfer import PowerinferPredictor, PredictorLayer
from thermocline.files.powerinfer_folder import (
    read_activation_folder,
    read_predictor_folder,
    write_activation_folder,
    write_predictor_folder,
)
from thermocline.files.quantize import from_float, to_float

N_FF, N_EMBD = 24, 32


def layer_counts(n: int) -> list[np.ndarray]:
    """Counts that tell their layer: those of layer i are i * 100 and more."""
    return [np.arange(i * 100, i * 100 + N_FF) for i in range(n)]


def save_counts(folder: Path, n: int, **changed: Any) -> Path:
    """A folder as PowerInfer's users have it; `changed` replaces layers, None leaves one out."""
    folder.mkdir()
    for i, counts in enumerate(layer_counts(n)):
        content = changed.get(f"layer{i}", torch.from_numpy(counts))
        if content is not None:
            torch.save(content, folder / f"activation_{i}.pt")
    return folder


# Activation counts


@pytest.mark.parametrize("n", [1, 2, 11, 12, 101])
def test_layers_are_in_the_order_of_their_numbers(n: int, tmp_path: Path) -> None:
    """Sorted as texts, activation_10.pt comes before activation_2.pt."""
    found = read_activation_folder(save_counts(tmp_path / "activation", n), n_layer=n, n_ff=N_FF)
    assert found.n_layer == n
    assert found.n_ff == N_FF
    assert [int(counts[0]) for counts in found.counts] == [i * 100 for i in range(n)]
    assert found.warnings == ()


@pytest.mark.parametrize("dtype", ["int64", "int32", "int16", "float32", "float64", "float16"])
def test_counts_of_any_type(dtype: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    counts = torch.arange(N_FF).to(getattr(torch, dtype))
    torch.save(counts, tmp_path / "a" / "activation_0.pt")
    (found,) = read_activation_folder(tmp_path / "a").counts
    assert found.dtype.name == dtype
    np.testing.assert_array_equal(found, counts.numpy())


@pytest.mark.parametrize("dtype", ["int64", "uint32", "uint8", "float32", "float64"])
def test_written_counts_are_torchs_and_come_back(dtype: str, tmp_path: Path) -> None:
    counts = [c.astype(np.float64).astype(dtype) for c in layer_counts(12)]
    write_activation_folder(tmp_path / "activation", counts)
    kept = dtype if dtype.startswith("float") else "int64"
    for i, wanted in enumerate(counts):
        found = torch.load(tmp_path / "activation" / f"activation_{i}.pt", weights_only=True)
        assert found.dtype == getattr(torch, kept)
        np.testing.assert_array_equal(found.numpy(), wanted)
    for found, wanted in zip(read_activation_folder(tmp_path / "activation").counts, counts, strict=True):
        assert found.dtype.name == kept
        np.testing.assert_array_equal(found, wanted)


def test_the_solvers_steps_work_on_written_counts(tmp_path: Path) -> None:
    """What PowerInfer's solver does to a file: sorts, makes the counts negative, sums blocks."""
    write_activation_folder(tmp_path / "activation", [np.arange(512)])
    counts = torch.load(tmp_path / "activation" / "activation_0.pt")
    blocks = (torch.sort(counts, descending=True)[0] * -1.0).view(-1, 256).sum(dim=1)
    assert blocks.tolist() == [-sum(range(256, 512)), -sum(range(256))]


def test_other_files_are_named(tmp_path: Path) -> None:
    folder = save_counts(tmp_path / "a", 2)
    (folder / "README.md").write_text("counts")
    (folder / ".DS_Store").write_bytes(b"")
    (warning,) = read_activation_folder(folder).warnings
    assert warning.endswith("a: not read: .DS_Store, README.md")


def rename(old: str, new: str) -> Callable[[Path], object]:
    return lambda folder: (folder / old).rename(folder / new)


def copy(old: str, new: str) -> Callable[[Path], object]:
    return lambda folder: (folder / new).write_bytes((folder / old).read_bytes())


def store(name: str, content: Any) -> Callable[[Path], object]:
    return lambda folder: torch.save(content, folder / name)


COUNTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "gap": (lambda f: (f / "activation_7.pt").unlink(), "1 of 12 layers are missing: activation_7.pt"),
    "gap-at-the-start": (lambda f: (f / "activation_0.pt").unlink(), "layers are missing: activation_0.pt"),
    "too-few": (lambda f: (f / "activation_11.pt").unlink(), "11 layers; the model has 12"),
    "too-many": (copy("activation_0.pt", "activation_12.pt"), "13 layers; the model has 12"),
    "twice": (copy("activation_1.pt", "activation_01.pt"), "activation_01.pt and activation_1.pt are both layer 1"),
    "leading-zero": (rename("activation_1.pt", "activation_01.pt"), "found activation_01.pt; allowed: activation_0.pt"),
    "all-with-leading-zeros": (
        lambda f: [rename(f"activation_{i}.pt", f"activation_{i:02}.pt")(f) for i in range(10)],
        "activation_03.pt, activation_04.pt, …; allowed: activation_0.pt",
    ),
    "copy-of-a-browser": (copy("activation_1.pt", "activation_1 (1).pt"), "found activation_1 (1).pt; allowed"),
    "other-tensor-file": (copy("activation_1.pt", "total.pt"), "found total.pt; allowed: activation_0.pt"),
    "negative-number": (copy("activation_1.pt", "activation_-1.pt"), "found activation_-1.pt; allowed"),
    "foreign-digits": (rename("activation_1.pt", "activation_١.pt"), "found activation_١.pt; allowed"),
    "far-away": (copy("activation_1.pt", "activation_99999999.pt"), "holds layer 99999999; allowed: at most 4095"),
    "empty-folder": (lambda f: [p.unlink() for p in f.iterdir()], "has no activation_0.pt"),
    "no-folder": (lambda f: f.rename(f.with_name("b")), "folder: does not exist"),
    "a-file": (lambda f: (f.rename(f.with_name("b")), f.write_bytes(b"")), "cannot be listed: Not a directory"),
    "length-of-one-layer": (store("activation_3.pt", torch.arange(N_FF + 1)), "25 neurons; the model has 24"),
    "length-of-the-first-layer": (store("activation_0.pt", torch.arange(8)), "8 neurons; the model has 24"),
    "matrix": (store("activation_3.pt", torch.zeros(2, N_FF)), "a tensor of shape [2, 24] and float32"),
    "scalar": (store("activation_3.pt", torch.tensor(3)), "a tensor of shape [] and int64"),
    "no-neurons": (store("activation_3.pt", torch.zeros(0)), "allowed: a vector of numbers, not empty"),
    "booleans": (store("activation_3.pt", torch.ones(N_FF, dtype=torch.bool)), "a tensor of shape [24] and bool"),
    "nan": (store("activation_3.pt", torch.full((N_FF,), float("nan"))), "found nan; allowed: finite counts from 0"),
    "infinity": (store("activation_3.pt", torch.full((N_FF,), float("inf"))), "found inf; allowed"),
    "below-zero": (store("activation_3.pt", torch.arange(N_FF) - 5), "found -5; allowed"),
    "dictionary": (store("activation_3.pt", {"counts": torch.arange(N_FF)}), "holds counts by name"),
    "list": (store("activation_3.pt", [1, 2, 3]), "opcode EMPTY_LIST is refused"),
    "module": (store("activation_3.pt", torch.nn.Linear(2, 2)), "it names torch.nn.modules.linear.Linear"),
    "truncated": (
        lambda f: (f / "activation_3.pt").write_bytes((f / "activation_3.pt").read_bytes()[:500]),
        "activation_3.pt: zip at byte 500: has no end record",
    ),
    "pipe": (lambda f: ((f / "activation_3.pt").unlink(), (f / "activation_3.pt").mkdir()), "is a folder"),
}


@pytest.mark.parametrize("name", COUNTS)
def test_activation_folders_refused(name: str, tmp_path: Path) -> None:
    change, decisive = COUNTS[name]
    folder = save_counts(tmp_path / "a", 12)
    change(folder)
    with pytest.raises(ModelFormatError) as caught:
        read_activation_folder(folder, n_layer=12, n_ff=N_FF)
    assert decisive in str(caught.value)
    assert str(caught.value).isprintable()


def test_lengths_are_compared_without_a_model_too(tmp_path: Path) -> None:
    folder = save_counts(tmp_path / "a", 3, layer2=torch.arange(7))
    with pytest.raises(ModelFormatError, match=r"activation_2\.pt: length: 7 neurons; the layer before has 24"):
        read_activation_folder(folder)


@pytest.mark.parametrize(
    ("counts", "decisive"),
    [
        ([], "vectors of numbers of one length"),
        ([np.arange(3), np.arange(4)], "of one length"),
        ([np.ones((2, 2))], "vectors"),
        ([np.array([True])], "vectors of numbers"),
        ([np.array([np.nan])], "finite and not below 0"),
        ([np.array([-1])], "finite and not below 0"),
    ],
)
def test_counts_not_written(counts: list[np.ndarray], decisive: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=decisive):
        write_activation_folder(tmp_path / "a", counts)
    assert list(tmp_path.iterdir()) == []


# Predictors


def predictor(n: int, ranks: list[int] | None = None, fmt: BlockFormat = F32) -> PowerinferPredictor:
    rng = np.random.default_rng(3)
    layers = []
    for i in range(n):
        rank = (ranks or [32, 64])[i % 2]
        fc1 = from_float("fc1.weight", rng.standard_normal((rank, N_EMBD)).astype(np.float32) + i, fmt)
        fc2 = from_float("fc2.weight", rng.standard_normal((N_FF, rank)).astype(np.float32), fmt)
        layers.append(PredictorLayer(fc1, fc2))
    return PowerinferPredictor(tuple(layers), 0.25)


@pytest.mark.parametrize("fmt", [F32, F16, BF16, Q8_0, Q4_0], ids=lambda f: f.name)
def test_written_predictors_are_torchs_and_come_back(fmt: BlockFormat, tmp_path: Path) -> None:
    wanted = predictor(12, fmt=fmt)
    write_predictor_folder(tmp_path / "p", wanted)
    assert json.loads((tmp_path / "p" / "config.json").read_text()) == {"sparse_threshold": 0.25}
    assert read_predictor_folder(tmp_path / "p").model == ""
    write_predictor_folder(tmp_path / "q", wanted, model="1f" * 32)
    assert read_predictor_folder(tmp_path / "q").model == "1f" * 32
    found = read_predictor_folder(tmp_path / "p", n_layer=12).predictor
    assert found.threshold == 0.25
    assert [layer.rank for layer in found.layers] == [32, 64] * 6
    for i, (a, b) in enumerate(zip(found.layers, wanted.layers, strict=True)):
        state = torch.load(tmp_path / "p" / f"model_{i}.pt", weights_only=True)
        assert list(state) == ["fc1.weight", "fc2.weight"]
        for name, ours, theirs in (("fc1.weight", a.fc1, b.fc1), ("fc2.weight", a.fc2, b.fc2)):
            assert ours.format is (F16 if fmt is F16 else F32)
            np.testing.assert_array_equal(to_float(ours), to_float(theirs))
            np.testing.assert_array_equal(state[name].float().numpy(), to_float(theirs))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_predictors_that_torch_wrote(dtype: str, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for i in range(11):
        network = torch.nn.Sequential()
        network.add_module("fc1", torch.nn.Linear(N_EMBD, 8, bias=False))
        network.add_module("fc2", torch.nn.Linear(8, N_FF, bias=False))
        torch.nn.init.constant_(network.fc1.weight, i)
        torch.save(network.to(getattr(torch, dtype)).state_dict(), tmp_path / "p" / f"model_{i}.pt")
    found = read_predictor_folder(tmp_path / "p")
    assert found.warnings == ()
    assert found.predictor.threshold == 0.0
    found.predictor.check("p", n_layer=11, n_embd=N_EMBD, n_ff=N_FF)
    assert [to_float(layer.fc1)[0, 0] for layer in found.predictor.layers] == list(range(11))
    np.testing.assert_array_equal(to_float(found.predictor.layers[-1].fc2), network.fc2.weight.detach().float().numpy())


def state(rank: int = 8, n_embd: int = N_EMBD, n_ff: int = N_FF, **more: Any) -> dict[str, Any]:
    named = {"fc1.weight": torch.ones(rank, n_embd), "fc2.weight": torch.ones(n_ff, rank)}
    return named | {name.replace("_", "."): value for name, value in more.items()}


def with_one(value: float, part: str) -> dict[str, Any]:
    named = state()
    named[f"{part}.weight"][3, 5] = value
    return named


def config(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(text)


PREDICTORS: dict[str, tuple[Callable[[Path], object], str]] = {
    "gap": (lambda f: (f / "model_7.pt").unlink(), "1 of 12 layers are missing: model_7.pt"),
    "too-few": (lambda f: (f / "model_11.pt").unlink(), "11 layers; the model has 12"),
    "twice": (copy("model_1.pt", "model_001.pt"), "model_001.pt and model_1.pt are both layer 1"),
    "nan-in-fc1": (store("model_3.pt", with_one(float("nan"), "fc1")), "predictor: fc1 holds NaN or infinity"),
    "nan-in-fc2": (store("model_3.pt", with_one(float("nan"), "fc2")), "predictor: fc2 holds NaN or infinity"),
    "infinity": (store("model_3.pt", with_one(float("-inf"), "fc2")), "fc2 holds NaN or infinity"),
    "double-beyond-float": (
        store("model_3.pt", {n: t.double() * 1e300 for n, t in state().items()}),
        "fc1 holds NaN or infinity",
    ),
    "bias": (store("model_3.pt", state(fc1_bias=torch.ones(8))), "holds fc1.bias, fc1.weight, fc2.weight; allowed"),
    "fc2-missing": (store("model_3.pt", {"fc1.weight": torch.ones(8, N_EMBD)}), "holds fc1.weight; allowed"),
    "empty": (store("model_3.pt", {}), "holds nothing; allowed"),
    "one-tensor": (store("model_3.pt", torch.ones(3)), "holds one tensor without a name"),
    "nested": (store("model_3.pt", {"state_dict": state()}), 'entry "state_dict": is a dict; allowed: tensors'),
    "whole-numbers": (store("model_3.pt", state(fc1_weight=torch.ones(8, N_EMBD).int())), "and int32; allowed"),
    "vector": (store("model_3.pt", state(fc1_weight=torch.ones(8))), "shape [8] and float32; allowed: a matrix"),
    "no-rank": (store("model_3.pt", state(rank=0)), "shape [0, 32] and float32; allowed"),
    "ranks-differ": (store("model_3.pt", state(fc2_weight=torch.ones(N_FF, 9))), "fc1 is 8 x 32 and fc2 24 x 9"),
    "transposed": (store("model_3.pt", state(fc1_weight=torch.ones(N_EMBD, 8))), "fc1 is 32 x 8 and fc2 24 x 8"),
    "other-width": (store("model_3.pt", state(n_embd=16)), "from 16 inputs to 24 neurons; layer 0 from 32 to 24"),
    "other-neurons": (store("model_3.pt", state(n_ff=48)), "from 32 inputs to 48 neurons; layer 0"),
    "module": (store("model_3.pt", torch.nn.Linear(2, 2)), "it names torch.nn.modules.linear.Linear"),
    "threshold-text": (config('{"sparse_threshold": "0.5"}'), 'sparse_threshold: found the string "0.5"'),
    "threshold-nan": (config('{"sparse_threshold": NaN}'), "found NaN, which is not JSON"),
    "threshold-far": (config('{"sparse_threshold": 1e9}'), "allowed: a finite number in -1e+06 to 1e+06"),
    "model-number": (config('{"thermocline.model": 7}'), "thermocline.model: found 7"),
    "config-list": (config("[]"), "is a JSON list"),
}


@pytest.mark.parametrize("name", PREDICTORS)
def test_predictor_folders_refused(name: str, tmp_path: Path) -> None:
    change, decisive = PREDICTORS[name]
    folder = tmp_path / "p"
    folder.mkdir()
    for i in range(12):
        torch.save(state(), folder / f"model_{i}.pt")
    change(folder)
    with pytest.raises(ThermoclineError) as caught:
        read_predictor_folder(folder, n_layer=12)
    assert isinstance(caught.value, NumericalError if "holds NaN" in decisive else ModelFormatError)
    assert decisive in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("sizes", "decisive"),
    [
        ({"n_layer": 3}, "layers of the predictor: found 2; the model has 3"),
        ({"n_embd": 64}, "from 32 inputs to 24 neurons; the model has 64 and 24"),
        ({"n_ff": 23}, "the model has 32 and 23"),
    ],
)
def test_a_predictor_of_another_model(sizes: dict[str, int], decisive: str) -> None:
    with pytest.raises(ModelFormatError, match=decisive):
        predictor(2).check("p", **({"n_layer": 2, "n_embd": N_EMBD, "n_ff": N_FF} | sizes))


@pytest.mark.parametrize("threshold", [float("nan"), float("inf"), -1e7])
def test_a_threshold_not_written(threshold: float, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="a threshold of"):
        write_predictor_folder(tmp_path / "p", PowerinferPredictor(predictor(1).layers, threshold))
    assert list(tmp_path.iterdir()) == []


# Folders appear whole or not at all


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    folder = save_counts(tmp_path / "a", 2)
    with pytest.raises(OutputError, match="is there already: remove it, or name a new folder"):
        write_activation_folder(folder, layer_counts(3))
    assert sorted(p.name for p in folder.iterdir()) == ["activation_0.pt", "activation_1.pt"]
    empty = tmp_path / "b"
    empty.mkdir()
    write_activation_folder(empty, layer_counts(3))
    assert len(list(empty.iterdir())) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_failure_at_any_layer_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    real = powerinfer_folder.write_tensor_pt

    def failing(path: Path, tensors: Any) -> None:
        if len(written) == 2:
            raise OutputError("full")
        written.append(path)
        real(path, tensors)

    monkeypatch.setattr(powerinfer_folder, "write_tensor_pt", failing)
    with pytest.raises(OutputError, match="full"):
        write_activation_folder(tmp_path / "a", layer_counts(3))
    assert len(written) == 2
    assert list(tmp_path.iterdir()) == []


def test_leavings_of_a_killed_writer_go(tmp_path: Path) -> None:
    left = tmp_path / ".a.0123456789ab.partial"
    left.mkdir()
    (left / "activation_0.pt").write_bytes(b"half")
    write_activation_folder(tmp_path / "a", layer_counts(1))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
