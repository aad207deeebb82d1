"""Which mode a loaded model runs in, and what is said about it."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thermocline import LLM, audit, describe
from thermocline.activity.predictor import Predictor, save_predictor
from thermocline.config import LoadSettings
from thermocline.errors import WARNING, FingerprintError, ModelFormatError, NumericalError, UsageError
from thermocline.files.companion import companion
from thermocline.files.formats import F16, F32, Q8_0
from thermocline.files.gguf_writer import NewTensor, write_gguf
from thermocline.files.open import open_model
from thermocline.files.powerinfer import THRESHOLD_KEY, PredictorLayer
from thermocline.files.quantize import from_float, quantize, to_float
from thermocline.files.sidecar import SidecarKind, read_sidecar, update_info, write_sidecar
from thermocline.hardware.probe import probe_machine
from thermocline.model.families import family_of
from thermocline.ops.contract import ActiveSet
from thermocline.runtime import planning
from thermocline.runtime.loading import load_model
from thermocline.runtime.observed import ObservedRunner
from thermocline.runtime.prediction import VARIABLE, threshold_of_environment

pytestmark = pytest.mark.usefixtures("machine_home")

GREEDY = {"temperature": 0, "ignore_eos": True, "max_tokens": 12}
PASSED = {"audit": {"passed": True, "summary": "KL 0.004"}}
FAILED = {"audit": {"passed": False, "summary": "KL 0.4 > 0.01"}}


def notice_of(llm: LLM) -> str:
    (notice,) = [notice for notice in llm.notices if notice.removeprefix(WARNING).startswith("mode ")]
    return notice


@pytest.fixture
def audited(with_predictor: Any, tiny_model: Path) -> Path:
    return with_predictor(tiny_model, **PASSED)


def test_an_audited_predictor_beside_the_model_is_used_and_told(audited: Path) -> None:
    with LLM.load(audited, threads=1) as llm:
        assert llm.mode == "predicted"
        assert notice_of(llm) == "mode predicted by predictor tiny.predictor.safetensors: its audit passed (KL 0.004)"
        assert llm.predictor_bytes == 2 * 4 * (192 * 64 + 96 * 192)


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({}, "not audited; --mode predicted uses it all the same"),
        (FAILED, "its audit failed (KL 0.4 > 0.01); --mode predicted uses it all the same"),
        ({"audit": "yes"}, "audit it again"),
    ],
)
def test_mode_auto_computes_exactly_unless_the_audit_passed(
    with_predictor: Any, tiny_model: Path, info: dict[str, Any], words: str
) -> None:
    model = with_predictor(tiny_model, **info)
    with LLM.load(model, threads=1) as llm, LLM.load(tiny_model, threads=1) as plain:
        assert (llm.mode, llm.predictor_bytes) == ("exact", 0)
        assert notice_of(llm).startswith("mode exact")
        assert words in notice_of(llm)
        assert llm.generate("abc", **GREEDY).logprobs == plain.generate("abc", **GREEDY).logprobs


def test_mode_auto_does_not_use_what_reads_more_than_it_saves(with_predictor: Any, tiny_model: Path) -> None:
    """The oracle of a model as small as this one is larger than the matrix that it spares."""
    model = with_predictor(tiny_model, shares=0.5, **PASSED)
    with LLM.load(model) as llm:
        assert llm.mode == "exact"
        assert "it would read more bytes than it saves" in notice_of(llm)
    with LLM.load(model, mode="predicted") as llm:
        assert llm.mode == "predicted"


def test_what_was_measured_of_the_machine_says_how_long_a_batch_is_predicted(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    survey, probe = probe_machine(any_disk=False)
    thin = PredictorLayer(*(from_float("w", np.ones(shape, np.float32), F32) for shape in ((1, 64), (96, 1))))
    free = replace(probe.memory, unpacking=((1, 1e17),))
    found = []
    for share in (1.0, 0.5, 0.1):
        slower = replace(probe, flops=1e17, launch=0.0, steps=None, memory=replace(free, sparse_batch=share))
        monkeypatch.setattr(planning, "probe_machine", lambda probe=slower, **_: (survey, probe))
        with open_model(tiny_model) as source:
            path = tmp_path / "x"
            save_predictor(Predictor((thin,) * 2, (0.0,) * 2, (0.1, 1.0)), path, source.fingerprint)
            with closing(load_model(source, LoadSettings(predictor=path, mode="predicted", threads=1))) as loaded:
                found.append([layer.predictor.tokens for layer in loaded.transformer.layers])
    assert [second for _, second in found] == [1, 1, 1]
    assert found[0][0] > found[1][0] > found[2][0] == 1


def test_a_model_without_predictor_says_nothing(tiny_model: Path) -> None:
    with LLM.load(tiny_model) as llm:
        assert llm.mode == "exact"
        assert not [notice for notice in llm.notices if notice.startswith("mode ")]


def test_a_predictor_that_nobody_asked_for_and_is_unusable_is_told_of(audited: Path, tiny_plain: Path) -> None:
    shutil.copy(tiny_plain, audited)  # the model was made anew, its predictor was not
    with LLM.load(audited) as llm:
        assert llm.mode == "exact"
        assert "tiny.predictor.safetensors: belongs to the model tiny" in notice_of(llm)
    companion(audited, SidecarKind.PREDICTOR).write_bytes(b"no sidecar at all")
    with LLM.load(audited) as llm:
        assert llm.mode == "exact"
        assert "tiny.predictor.safetensors" in notice_of(llm)


def test_a_predictor_of_another_model_is_refused_where_it_was_asked_for(audited: Path, tiny_plain: Path) -> None:
    predictor = companion(audited, SidecarKind.PREDICTOR)
    for settings in ({"predictor": predictor}, {"predictor": str(predictor), "mode": "predicted"}):
        with pytest.raises(FingerprintError, match="give the predictor that was made with this model"):
            LLM.load(tiny_plain, **settings)
    shutil.copy(tiny_plain, audited)
    with pytest.raises(FingerprintError):
        LLM.load(audited, mode="predicted")


def test_a_named_predictor_comes_before_the_one_beside_the_model(audited: Path, tmp_path: Path) -> None:
    named = tmp_path / "other.safetensors"
    shutil.copy(companion(audited, SidecarKind.PREDICTOR), named)
    update_info(named, FAILED)
    with LLM.load(audited, predictor=named) as llm:
        assert llm.mode == "exact"
        assert notice_of(llm).startswith(f"{WARNING}mode exact, for predictor other.safetensors: its audit failed")
    with LLM.load(audited, predictor=named, mode="predicted") as llm:
        assert notice_of(llm) == "mode predicted by predictor other.safetensors: its audit failed (KL 0.4 > 0.01)"


def test_an_audit_says_nothing_about_other_thresholds(audited: Path) -> None:
    with LLM.load(audited, predictor_threshold=0.5) as llm:
        assert llm.mode == "exact"
        assert "with threshold 0.5: not audited" in notice_of(llm)


def test_the_threshold_decides_how_much_is_computed(audited: Path) -> None:
    shares, texts = [], []
    for threshold in (-np.inf, 1e-20, 1.0, np.inf):
        with LLM.load(audited, mode="predicted", predictor_threshold=threshold, threads=1) as llm:
            report = llm.generate("abc", **GREEDY).report
            texts.append(llm.generate("abc", **GREEDY).logprobs)
            shares.append(report.selected_share)
    assert shares[0] == 1.0 > shares[1] > shares[2] > shares[3] == 0.0
    with LLM.load(audited, mode="exact", threads=2) as llm:
        assert texts[0] == llm.generate("abc", **GREEDY).logprobs


def test_the_report_accounts_for_the_predictor(audited: Path) -> None:
    with LLM.load(audited, threads=1) as llm, LLM.load(audited, mode="exact", threads=1) as exact:
        ours, theirs = llm.generate("abc", **GREEDY).report, exact.generate("abc", **GREEDY).report
    assert (ours.mode, theirs.mode) == ("predicted", "exact")
    assert (ours.predictor_bytes, theirs.predictor_bytes) == (llm_bytes := 2 * 4 * (192 * 64 + 96 * 192), 0)
    assert theirs.selected_share == 1.0
    assert 0 < ours.active_share <= ours.selected_share < 0.8
    # An up row of 64 in Q8_0 is 68 bytes; up and down rows that are not read are all that is saved.
    spared = (theirs.selected - ours.selected) * 68 / ours.decode_tokens
    fired = (theirs.fired - ours.fired) * 68 / ours.decode_tokens
    assert ours.bytes_per_token == pytest.approx(theirs.bytes_per_token + llm_bytes - spared - fired)
    assert f"of FFN neurons active of {ours.selected_share:.1%} selected (mode predicted)" in ours.line()
    assert ours.as_dict()["selected_share"] == ours.selected_share


def test_prompts_are_computed_exactly(audited: Path) -> None:
    """With one token to generate, all that is computed is the prompt."""
    once = {**GREEDY, "max_tokens": 1}
    with (
        LLM.load(audited, mode="predicted", predictor_threshold=np.inf) as llm,
        LLM.load(audited, mode="exact") as exact,
    ):
        assert llm.generate("a prompt", **once).logprobs == exact.generate("a prompt", **once).logprobs


class Watch:
    """Which neurons were computed, and what they gave."""

    def __init__(self) -> None:
        self.seen: list[tuple[ActiveSet, np.ndarray]] = []
        self._active = ActiveSet()

    def ffn_input(self, layer: int, residual: np.ndarray, normed: np.ndarray) -> None: ...

    def ffn_active(self, layer: int, active: ActiveSet) -> None:
        self._active = active

    def ffn_hidden(self, layer: int, hidden: np.ndarray) -> None:
        kept = None if self._active.indices is None else self._active.indices.copy()
        self.seen.append((ActiveSet(kept), hidden.copy()))


def test_an_observed_run_shows_what_was_selected(audited: Path) -> None:
    """Token by token; longer steps, as profiling takes them, are exact."""
    settings = LoadSettings(mode="predicted", threads=1)
    with open_model(audited) as source:
        loaded = load_model(source, settings)
        runner = ObservedRunner(loaded.transformer, 8, settings)
        one, many = Watch(), Watch()
        runner.run(np.array([65], np.int32), one)
        runner.run(np.array([65, 66, 67], np.int32), many)
    assert len(one.seen) == len(many.seen) == 2
    for active, hidden in one.seen:
        assert active.indices is not None
        assert set(np.flatnonzero(hidden[0])) <= set(active.indices)
        assert 0 < len(active.indices) < 96
    assert all(active.indices is None for active, _ in many.seen)


def test_modes_that_predict_nothing_take_no_predictor(audited: Path, tiny_silu: Path) -> None:
    predictor = str(companion(audited, SidecarKind.PREDICTOR))
    for mode in ("dense", "exact"):
        with pytest.raises(UsageError, match=f"mode {mode} predicts nothing: leave --predictor out"):
            LLM.load(audited, mode=mode, predictor=predictor)
        with pytest.raises(UsageError, match="leave --predictor-threshold out"):
            LoadSettings(mode=mode, predictor_threshold=0.0)
    for settings in ({"mode": "predicted"}, {"predictor": predictor}, {"predictor_threshold": 0.0}):
        with pytest.raises(UsageError, match="silu gives no zeros; use --mode dense"):
            LLM.load(tiny_silu, **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "predicted"}, "has no predictor inside, and no tiny.predictor.safetensors beside it"),
        ({"predictor_threshold": 0.5}, "name one with --predictor"),
        ({"predictor_threshold": float("nan")}, "predictor-threshold is nan"),
        ({"predictor_threshold": "much"}, "predictor-threshold is 'much'"),
        ({"predictor_threshold": True}, "predictor-threshold is True"),
        ({"predictor": ""}, "predictor is ''"),
        ({"predictor": 3}, "predictor is 3"),
    ],
)
def test_what_cannot_be_predicted_is_refused(tiny_model: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        LLM.load(tiny_model, **settings)


def test_a_predictor_that_is_not_there_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"none\.safetensors"):
        LLM.load(tiny_model, predictor=tmp_path / "none.safetensors")


def powerinfer_file(path: Path, *, threshold: float = 0.25, spoil: bool = False) -> Path:
    """A gated ReLU model in PowerInfer's format, with predictors that score every neuron 1.0."""
    random = np.random.default_rng(9)
    source = open_model(path)
    family = family_of(source)
    tensors: list[Any] = []
    for name, weight in family.weights(source, family.spec(source)).items():
        if "ffn_down" not in name:
            tensors.append(weight)
            continue
        values = np.ascontiguousarray(to_float(weight).T)
        new = name.replace("ffn_down", "ffn_down_t")
        tensors.append(NewTensor(new, F16, values.shape, lambda values=values: quantize(values, F16)))
    for i in range(2):
        fc1 = np.abs(random.standard_normal((32, 64))).astype(np.float32)
        fc1[1] = -fc1[0]  # one of the two is positive for any input
        fc2 = np.zeros((96, 32), np.float32)
        fc2[:, :2] = 1e6
        fc2[:, 0] = np.nan if spoil else 1e6
        tensors += [from_float(f"blk.{i}.fc1.weight", fc1, F32), from_float(f"blk.{i}.fc2.weight", fc2, F32)]
    out = path.with_name("sparse.gguf")
    write_gguf(out, {**source.typed_metadata(), THRESHOLD_KEY: np.float32(threshold)}, tensors, powerinfer=True)
    return out


@pytest.fixture(scope="module")
def sparse(tiny_silu: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("sparse") / "silu.gguf"
    shutil.copy(tiny_silu, copy)
    return powerinfer_file(copy)


def test_powerinfers_files_bring_their_predictor_and_threshold(sparse: Path) -> None:
    with LLM.load(sparse) as llm:
        assert llm.mode == "exact"
        assert "the predictor inside the model: not audited" in notice_of(llm)
    with LLM.load(sparse, mode="predicted", threads=1) as llm, LLM.load(sparse, mode="exact", threads=1) as exact:
        assert notice_of(llm) == "mode predicted by the predictor inside the model: not audited"
        ours, theirs = llm.generate("abc", **GREEDY), exact.generate("abc", **GREEDY)
    assert ours.logprobs == theirs.logprobs
    assert ours.report.selected_share == 1.0
    assert ours.report.predictor_bytes == 2 * 4 * (32 * 64 + 96 * 32)


def test_powerinfers_variable_sets_the_threshold_of_its_files_only(
    sparse: Path, audited: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "1e12")
    with LLM.load(sparse, mode="predicted") as llm:
        assert f"with threshold 1e+12 from {VARIABLE}" in notice_of(llm)
        assert llm.generate("abc", **GREEDY).report.selected_share == 0.0
    with LLM.load(sparse, mode="predicted", predictor_threshold=0.0) as llm:  # our own setting comes first
        assert llm.generate("abc", **GREEDY).report.selected_share == 1.0
    with LLM.load(audited) as llm:
        assert VARIABLE not in notice_of(llm)
        assert llm.mode == "predicted"
    text = sparse.with_name("text.txt")
    text.write_text("pack my box with five dozen jugs\n" * 4)
    assert not audit(sparse, [text], LoadSettings(ctx_size=24), tokens=24).stored  # it is of another threshold
    monkeypatch.setenv(VARIABLE, "5")
    with LLM.load(sparse) as llm:
        assert notice_of(llm).startswith(
            f"mode exact, for the predictor inside the model with threshold 5 from {VARIABLE}: not audited"
        )
    monkeypatch.setenv(VARIABLE, "much")
    with pytest.raises(UsageError, match="allowed: a number"):
        LLM.load(sparse)
    with pytest.raises(UsageError, match=f"{VARIABLE} is much; allowed: a number"):
        LLM.load(sparse, mode="predicted")


def test_values_of_the_variable() -> None:
    assert threshold_of_environment({}) is None
    assert threshold_of_environment({VARIABLE: " -0.5 "}) == -0.5
    for text in ("", "nan", "0,5"):
        with pytest.raises(UsageError, match="allowed: a number, or unset"):
            threshold_of_environment({VARIABLE: text})


def test_nan_inside_a_model_is_refused(tiny_silu: Path, tmp_path: Path) -> None:
    copy = tmp_path / "silu.gguf"
    shutil.copy(tiny_silu, copy)
    bad = powerinfer_file(copy, spoil=True)
    with pytest.raises(NumericalError, match="predictor of layer 0: fc2 holds NaN"):
        LLM.load(bad, mode="predicted")
    with LLM.load(bad) as llm:  # which does not use it, nor reads it
        assert llm.mode == "exact"


@pytest.mark.parametrize("mode", ["auto", "predicted"])
def test_nan_in_a_sidecar_is_refused(with_predictor: Any, tiny_model: Path, mode: str) -> None:
    """Written by somebody else's program, for ours refuses to."""
    model = with_predictor(tiny_model)
    path = companion(model, SidecarKind.PREDICTOR)
    good = read_sidecar(path)
    values = to_float(good.weights["blk.1.fc1.weight"]).copy()
    values[3, 4] = np.nan
    bad = {"blk.1.fc1.weight": from_float("fc1", values, F32)}
    tensors = {**good.arrays, **good.weights, **bad}
    write_sidecar(path, SidecarKind.PREDICTOR, good.model_fingerprint, {**good.info, **PASSED}, tensors)
    with pytest.raises(NumericalError, match="predictor of layer 1, fc1 holds NaN or infinity"):
        LLM.load(model, mode=mode)


def test_describe_tells_of_the_predictor(audited: Path, sparse: Path, tiny_model: Path, tiny_plain: Path) -> None:
    found = describe(audited).predictor
    assert found is not None
    assert (Path(found.path).name, found.ranks) == ("tiny.predictor.safetensors", (192, 192))
    assert (found.passed, found.audit) == (True, "KL 0.004")
    assert found.bytes == 2 * 4 * (192 * 64 + 96 * 192)
    assert found.share == pytest.approx(found.bytes / 4 / 82752)
    inside = describe(sparse).predictor
    assert inside is not None
    assert (inside.path, inside.passed) == (str(sparse), None)
    assert describe(tiny_model).predictor is None
    shutil.copy(tiny_plain, audited)
    stale = describe(audited)
    assert stale.predictor is None
    assert "belongs to the model tiny" in stale.warnings[-1]


def test_quantised_predictors_run(audited: Path, oracle: Any) -> None:
    with open_model(audited) as source:
        small = oracle(source, threshold=0.0).in_format(Q8_0)
        save_predictor(small, companion(audited, SidecarKind.PREDICTOR), source.fingerprint)
    with LLM.load(audited, mode="predicted", threads=1) as llm:
        report = llm.generate("abc", **GREEDY).report
    assert report.predictor_bytes == small.nbytes == 2 * (192 * 64 + 96 * 192) // 32 * 34
    assert 0.2 < report.selected_share <= 1.0


def test_predictors_have_layers_of_one_network(audited: Path) -> None:
    """A sidecar with the right fingerprint and the wrong sizes was written by a mistaken program."""
    wrong = PredictorLayer(
        from_float("a", np.ones((4, 64), np.float32), F32), from_float("b", np.ones((95, 4), np.float32), F32)
    )
    with open_model(audited) as source:
        path = companion(audited, SidecarKind.PREDICTOR)
        save_predictor(Predictor((wrong, wrong), (0.0, 0.0)), path, source.fingerprint)
    with pytest.raises(ModelFormatError, match=r"tiny\.predictor\.safetensors.*goes from 64 inputs to 95 neurons"):
        LLM.load(audited, mode="predicted")
