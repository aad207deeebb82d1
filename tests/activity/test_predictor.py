"""Predictors and their files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from thermocline.activity.inside import for_powerinfer
from thermocline.activity.predictor import (
    Audit,
    Predictor,
    load_predictor,
    predictor_of,
    save_predictor,
)
from thermocline.errors import (
    FingerprintError,
    ModelFormatError,
    NumericalError,
    ThermoclineError,
    UnsupportedModelError,
    UsageError,
)
from thermocline.files.formats import BF16, F16, F32, Q4_0, Q8_0, BlockFormat
from thermocline.files.open import open_model
from thermocline.files.powerinfer import PowerinferPredictor, PredictorLayer
from thermocline.files.quantize import from_float, to_float
from thermocline.files.sidecar import SidecarKind, read_sidecar, update_info, write_sidecar
from thermocline.model.families import family_of
from thermocline.ops.reference import ReferenceOps

MINE, OTHER = "a" * 64, "b" * 64
N_EMBD, N_FF = 64, 96
RANKS = (32, 64)


def matrix(rows: int, columns: int, fmt: BlockFormat = F32, seed: int = 0) -> Any:
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    return from_float("w", values, fmt)


def layer(rank: int, fmt: BlockFormat = F32, seed: int = 0) -> PredictorLayer:
    return PredictorLayer(matrix(rank, N_EMBD, fmt, seed), matrix(N_FF, rank, fmt, seed + 1))


def predictor(fmt: BlockFormat = F32, **changes: Any) -> Predictor:
    layers = tuple(layer(rank, fmt, 2 * i) for i, rank in enumerate(RANKS))
    return replace(Predictor(layers, (0.5, -0.25), (0.125, 0.5), {"note": {"words": ["1"]}}), **changes)


@pytest.mark.parametrize("fmt", [F32, F16, BF16, Q8_0, Q4_0], ids=lambda f: f.name)
def test_what_was_saved_is_loaded(tmp_path: Path, fmt: BlockFormat) -> None:
    saved = predictor(fmt)
    path = tmp_path / "x.predictor.safetensors"
    checksum = save_predictor(saved, path, MINE, model_name="tiny")
    for verify in (False, True):
        loaded = load_predictor(path, MINE, verify=verify)
        assert (loaded.thresholds, loaded.active_shares) == (saved.thresholds, saved.active_shares)
        assert loaded.info == {"note": {"words": ["1"]}, "input": "residual"}
        assert loaded.ranks == RANKS
        for ours, theirs in zip(loaded.layers, saved.layers, strict=True):
            for part in ("fc1", "fc2"):
                a, b = getattr(ours, part), getattr(theirs, part)
                assert (a.format, a.shape, a.data.tobytes()) == (b.format, b.shape, b.data.tobytes())
    assert read_sidecar(path).checksum == checksum


def test_infinite_thresholds_are_kept(tmp_path: Path) -> None:
    """-inf computes all neurons of a layer, inf none."""
    save_predictor(predictor(thresholds=(-math.inf, math.inf)), tmp_path / "x", MINE)
    assert load_predictor(tmp_path / "x", MINE, verify=True).thresholds == (-math.inf, math.inf)


def test_shares_may_be_unknown(tmp_path: Path) -> None:
    save_predictor(predictor(active_shares=None), tmp_path / "x", MINE)
    assert load_predictor(tmp_path / "x", MINE).active_shares is None


def test_a_predictor_of_another_model_is_refused_with_both_names(tmp_path: Path) -> None:
    path = tmp_path / "x.predictor.safetensors"
    save_predictor(predictor(), path, MINE, model_name="mine")
    with pytest.raises(FingerprintError, match=r"mine \(aaaaaaaaaaaa\), not to other \(bbbbbbbbbbbb\)"):
        load_predictor(path, OTHER, model_name="other")


def test_another_kind_of_sidecar_is_refused(tmp_path: Path) -> None:
    write_sidecar(tmp_path / "x", SidecarKind.ACTIVITY, MINE, {}, {"a": np.zeros(3)})
    with pytest.raises(ModelFormatError, match="file of kind activity; needed is one of kind predictor"):
        load_predictor(tmp_path / "x", MINE)


def test_a_flipped_bit_is_found_when_it_is_looked_for(tmp_path: Path) -> None:
    path = tmp_path / "x"
    save_predictor(predictor(), path, MINE)
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    with pytest.raises(ModelFormatError, match="checksum"):
        load_predictor(path, MINE, verify=True)


def vector(*values: float) -> Any:
    return np.array(values, np.float32)


STRANGE: dict[str, tuple[dict[str, Any], type[ThermoclineError], str]] = {
    "matrix missing": ({"blk.1.fc2.weight": None}, ModelFormatError, "blk.1.fc2.weight: is missing"),
    "layer too many": ({"blk.2.fc1.weight": matrix(32, 64)}, ModelFormatError, "blk.2.fc1.weight: belongs to none of"),
    "ranks differ": ({"blk.0.fc2.weight": matrix(N_FF, 31)}, ModelFormatError, "fc1 is 32 x 64 and fc2 96 x 31"),
    "no thresholds": ({"threshold": None}, ModelFormatError, "threshold: is missing"),
    "thresholds empty": ({"threshold": vector()}, ModelFormatError, "threshold: is empty"),
    "thresholds in float64": ({"threshold": np.zeros(2)}, ModelFormatError, "threshold: is float64"),
    "thresholds as a table": ({"threshold": vector(0, 0)[None]}, ModelFormatError, "threshold: is float32"),
    "threshold NaN": ({"threshold": vector(0, np.nan)}, NumericalError, "threshold: holds NaN"),
    "share NaN": ({"active_share": vector(0.5, np.nan)}, NumericalError, "active_share: holds NaN"),
    "share infinite": ({"active_share": vector(0.5, np.inf)}, ModelFormatError, "is not everywhere from 0 to 1"),
    "fewer thresholds than layers": ({"threshold": vector(0)}, ModelFormatError, "belongs to none of 1 layers"),
    "more thresholds than layers": ({"threshold": vector(0, 0, 0)}, ModelFormatError, "blk.2.fc1.weight: is missing"),
    "shares too few": ({"active_share": vector(0.5)}, ModelFormatError, r"active_share: is float32 \[1\]; needed: .*2"),
    "share above 1": ({"active_share": vector(0.5, 1.5)}, ModelFormatError, "is not everywhere from 0 to 1"),
    "share below 0": ({"active_share": vector(-1, 0.5)}, ModelFormatError, "is not everywhere from 0 to 1"),
    "another input": ({"input": "router"}, UnsupportedModelError, "made of 'router'; implemented is 'residual'"),
    "no input": ({"input": None}, UnsupportedModelError, "made of None"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_files_that_contradict_themselves_are_refused(tmp_path: Path, case: str) -> None:
    changes, error, words = STRANGE[case]
    good = predictor()
    tensors: dict[str, Any] = {
        "input": "residual",
        "threshold": np.zeros(2, np.float32),
        **{f"blk.{i}.{part}.weight": getattr(good.layers[i], part) for i in (0, 1) for part in ("fc1", "fc2")},
    }
    tensors = {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}
    info = {"input": tensors.pop("input", None)}
    write_sidecar(tmp_path / "x", SidecarKind.PREDICTOR, MINE, info, tensors)
    with pytest.raises(error, match=words):
        load_predictor(tmp_path / "x", MINE)


@pytest.mark.parametrize("part", ["fc1", "fc2"])
def test_nan_is_not_written_and_the_old_file_stays(tmp_path: Path, part: str) -> None:
    path = tmp_path / "x"
    save_predictor(predictor(), path, MINE)
    before = path.read_bytes()
    good = predictor()
    weight = getattr(good.layers[1], part)
    values = to_float(weight).copy()
    values[2, 3] = np.nan
    bad = replace(good.layers[1], **{part: from_float(part, values, F32)})
    with pytest.raises(NumericalError, match=f"blk.1.{part}.weight"):
        save_predictor(replace(good, layers=(good.layers[0], bad)), path, MINE)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": ()}, "a predictor of 0 layers"),
        ({"thresholds": (0.0,)}, "2 layers has 1 thresholds"),
        ({"active_shares": (0.1, 0.2, 0.3)}, "2 thresholds and 3 shares"),
        ({"thresholds": (0.0, math.nan)}, "a threshold is nan"),
        ({"active_shares": (0.1, math.nan)}, "outside 0 to 1"),
        ({"active_shares": (0.1, 1.1)}, "outside 0 to 1"),
    ],
)
def test_what_cannot_be_a_predictor_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        predictor(**changes)


def test_sizes_add_up(tiny_model: Path) -> None:
    small = predictor(Q8_0)
    numbers = sum(rank * (N_EMBD + N_FF) for rank in RANKS)
    assert small.parameters == numbers
    assert small.nbytes == numbers // 32 * 34
    with open_model(tiny_model) as source:
        spec = family_of(source).spec(source)
    assert small.share(spec) == numbers / 82752
    small.require_fits("x", spec)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"n_layer": 3, "windows": (0, 0, 0)}, "found 2; the model has 3"),
        ({"n_ff": 128}, "goes from 64 inputs to 96 neurons; the model has 64 and 128"),
        ({"n_embd": 96}, "goes from 64 inputs to 96 neurons; the model has 96 and 96"),
    ],
)
def test_another_network_is_refused(tiny_model: Path, wrong: dict[str, Any], words: str) -> None:
    with open_model(tiny_model) as source:
        spec = replace(family_of(source).spec(source), **wrong)
    with pytest.raises(ModelFormatError, match=words):
        predictor().require_fits("x.safetensors", spec)


def scores_of(one: PredictorLayer, x: np.ndarray) -> np.ndarray:
    scores = np.empty((len(x), N_FF), np.float32)
    ReferenceOps().predict(x, one.fc1, one.fc2, scores)
    return scores


def test_ranks_are_filled_up_to_whole_blocks_without_changing_a_score() -> None:
    """Whole numbers up to 127 with 127 in every block survive Q8_0, so that padding is all that could show."""
    whole = np.random.default_rng(1).integers(-9, 10, (45, N_EMBD)).astype(np.float32)
    back = np.random.default_rng(2).integers(-9, 10, (N_FF, 45)).astype(np.float32)
    whole[:, ::32] = 127
    back[:, ::32] = 127
    odd = PredictorLayer(from_float("fc1", whole, F32), from_float("fc2", back, F32))
    given = Predictor((odd,), (1.0,), (0.5,), {"audit": {"passed": True, "summary": "x"}, "rank": 45})
    packed = given.in_format(Q8_0)
    assert packed.ranks == (64,)
    assert {packed.layers[0].fc1.format, packed.layers[0].fc2.format} == {Q8_0}
    x = np.random.default_rng(3).standard_normal((5, N_EMBD)).astype(np.float32)
    np.testing.assert_array_equal(scores_of(packed.layers[0], x), scores_of(odd, x))
    assert packed.thresholds == (1.0,)
    assert (packed.active_shares, packed.info) == (None, {"rank": 45})
    assert given.in_format(F16).ranks == (64,)


def test_inputs_that_are_no_whole_blocks_stay_in_half_precision() -> None:
    odd = PredictorLayer(matrix(32, 50), matrix(N_FF, 32))
    packed = Predictor((odd,), (0.0,)).in_format(Q4_0).layers[0]
    assert (packed.fc1.format, packed.fc2.format) == (F16, Q4_0)


def test_a_threshold_for_all_layers_forgets_what_was_measured_with_others() -> None:
    given = predictor(info={"audit": {"passed": True, "summary": "good"}, "seed": 1})
    changed = given.with_threshold(-math.inf)
    assert changed.thresholds == (-math.inf, -math.inf)
    assert changed.active_shares is None
    assert changed.info == {"seed": 1}
    with pytest.raises(UsageError, match="nan"):
        given.with_threshold(math.nan)


def test_an_audit_is_kept_with_the_predictor(tmp_path: Path) -> None:
    path = tmp_path / "x"
    save_predictor(predictor(), path, MINE)
    assert load_predictor(path, MINE).audit is None
    update_info(path, {"audit": {"passed": True, "summary": "KL 0.004", "tokens": 9000}})
    assert load_predictor(path, MINE).audit == Audit(True, "KL 0.004")
    hostile = update_info(path, {"audit": {"passed": False, "summary": "\x1b]0;boom\x07"}})
    audit = predictor_of(hostile).audit
    assert audit is not None
    assert not audit.passed
    assert "\x1b" not in audit.summary


@pytest.mark.parametrize(
    "note", [True, {}, {"passed": "yes"}, {"passed": 1, "summary": ""}, {"passed": True, "summary": 3}]
)
def test_a_damaged_audit_passes_nothing(note: Any) -> None:
    with pytest.raises(UsageError, match="audit it again"):
        assert predictor(info={"audit": note}).audit


def test_powerinfer_has_one_threshold_for_all_layers() -> None:
    layers = (layer(8), layer(16))
    ours = Predictor.of_powerinfer(PowerinferPredictor(layers, 0.75))
    assert (ours.layers, ours.thresholds, ours.active_shares) == (layers, (0.75, 0.75), None)


def zeros(rank: int) -> PredictorLayer:
    made = layer(rank)
    return PredictorLayer(made.fc1, from_float("fc2", np.zeros((N_FF, rank), np.float32), F32))


def selected(layers: tuple[PredictorLayer, ...], thresholds: tuple[float, ...]) -> list[npt.NDArray[np.bool_]]:
    x = np.random.default_rng(0).standard_normal((20, N_EMBD), np.float32)
    scores = [np.maximum(x @ to_float(layer.fc1).T, 0) @ to_float(layer.fc2).T for layer in layers]
    return [score >= threshold for score, threshold in zip(scores, thresholds, strict=True)]


@pytest.mark.parametrize(
    ("thresholds", "silent", "one"),
    [
        ((-0.5, 0.0, -2.0), (1,), -0.5),
        ((0.0, -0.5, -2.0), (0,), -0.5),
        ((0.0, -0.5, -math.inf), (0, 2), -0.5),
        ((0.5, 2.0, 0.25), (), 0.5),
        ((math.inf, 0.5, 0.25), (0,), 0.5),
        ((-1.0, 0.0, -math.inf), (0, 1, 2), 0.0),
        ((math.inf, 2.0, 1.0), (0, 1, 2), 1.0),
    ],
)
def test_a_layer_without_scores_goes_with_any_threshold_on_its_side_of_zero(
    thresholds: tuple[float, ...], silent: tuple[int, ...], one: float
) -> None:
    ours = Predictor(tuple(zeros(8) if i in silent else layer(8, seed=i) for i in range(3)), thresholds)
    theirs = for_powerinfer(ours)
    assert theirs.threshold == one
    for a, b in zip(selected(ours.layers, thresholds), selected(theirs.layers, (one,) * 3), strict=True):
        assert np.array_equal(a, b)
    assert all(theirs.layers[i] is ours.layers[i] for i in silent)


@pytest.mark.parametrize(
    ("thresholds", "silent", "number"),
    [
        ((0.5, 0.0), (1,), 1),
        ((1.0, -0.5), (0,), 0),
        ((-0.5, 0.0), (), 1),
        ((-0.5, 0.5), (), 1),
        ((-math.inf, 0.5), (), 0),
        ((0.0, 1.0), (0, 1), 1),
    ],
)
def test_what_one_threshold_cannot_say_is_refused(
    thresholds: tuple[float, ...], silent: tuple[int, ...], number: int
) -> None:
    ours = Predictor(tuple(zeros(8) if i in silent else layer(8) for i in range(2)), thresholds)
    with pytest.raises(UsageError, match=rf"no scale makes one: layer {number}, .*--predictor-threshold gives all"):
        for_powerinfer(ours)


def test_whether_a_token_reads_less() -> None:
    given = predictor()
    cost = given.nbytes
    first = (2 * cost, 2 * cost)  # 0.125 and 0.5 of it are selected: 2.25 of 4 costs are read
    assert given.saves(first)
    assert not given.saves((cost // 2, cost // 2))
    assert not replace(given, active_shares=(1.0, 1.0)).saves(first)
    assert replace(given, active_shares=None).saves((1, 1))
