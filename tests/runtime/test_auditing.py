"""Audits: what loses nothing passes, what loses anything is caught, and mode auto goes by it."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thermocline import LLM, audit, convert, describe
from thermocline.activity.audit import SAME_KL, AuditResult, Comparison, Distance, Gate, Generated
from thermocline.activity.calibration import Quality
from thermocline.activity.likelihood import log_probabilities
from thermocline.activity.predictor import Predictor, save_predictor
from thermocline.api import shipped_model
from thermocline.config import DeviceKind, LoadSettings, OpsKind
from thermocline.errors import OutputError, UsageError
from thermocline.files.companion import companion
from thermocline.files.formats import F32
from thermocline.files.open import open_model
from thermocline.files.powerinfer import PredictorLayer
from thermocline.files.quantize import from_float
from thermocline.files.sidecar import SidecarKind, read_sidecar, write_sidecar
from thermocline.model.families import family_of
from thermocline.runtime import auditing
from thermocline.runtime.auditing import Audited
from thermocline.runtime.prediction import find_predictor

TOKENS, WINDOW, LAYERS, NEURONS = 60, 24, 2, 96
SETTINGS = LoadSettings(ctx_size=WINDOW, threads=1)
GREEDY = {"temperature": 0, "ignore_eos": True, "max_tokens": 12}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auditing, "BATCH", 7)
    monkeypatch.setattr(auditing, "FREE_TOKENS", 8)
    monkeypatch.setattr("thermocline.activity.audit.MIN_TOKENS", TOKENS)
    monkeypatch.setattr(auditing, "MIN_TOKENS", TOKENS)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("pack my box with five dozen jugs\n" * 4)
    return tmp_path / "a.txt"


def constant(model: Path, value: float, threshold: float = 0.5) -> Path:
    """A predictor beside the model whose scores are `value` everywhere, or zero."""
    fc1 = np.ones((32, 64), np.float32)
    fc1[1::2] *= -1  # one of two neighbours is positive for any input
    fc2 = np.full((NEURONS, 32), value, np.float32)
    layer = PredictorLayer(from_float("fc1", fc1, F32), from_float("fc2", fc2, F32))
    path = companion(model, SidecarKind.PREDICTOR)
    with open_model(model) as source:
        save_predictor(Predictor((layer,) * LAYERS, (threshold,) * LAYERS), path, source.fingerprint)
    return path


@pytest.fixture
def model(with_predictor: Any, tiny_model: Path) -> Path:
    """The tiny model with its oracle predictor beside it."""
    return with_predictor(tiny_model)


def test_a_predictor_of_ones_gives_exacts_tokens_and_passes(model: Path, text: Path) -> None:
    path = constant(model, 1e9)
    found = audit(model, [text], SETTINGS, tokens=TOKENS)
    assert found.passed
    assert found.stored
    assert found.exact == found.oracle == found.predicted == Distance(0.0, 0.0, 0.0, 1.0, 1.0)
    assert all((layer.recall, layer.energy_recall, layer.selected) == (1.0, 1.0, 1.0) for layer in found.layers)
    assert found.generated[0] == found.generated[1]
    assert read_sidecar(path).info["audit"]["passed"] is True
    with LLM.load(model, threads=1) as llm, LLM.load(model, mode="exact", threads=1) as exact:
        assert llm.mode == "predicted"
        assert f"its audit passed ({found.summary})" in "".join(llm.notices)
        assert llm.generate("abc", **GREEDY).logprobs == exact.generate("abc", **GREEDY).logprobs


def test_a_predictor_of_zeros_fails_and_mode_auto_does_not_use_it(model: Path, text: Path) -> None:
    path = constant(model, 0.0)
    checksum = read_sidecar(path).checksum
    found = audit(model, [text], SETTINGS, tokens=TOKENS)
    assert not found.passed
    assert [layer.selected for layer in found.layers] == [0.0, 0.0]
    assert [layer.recall for layer in found.layers] == [0.0, 0.0]
    assert found.predicted.mean_kl > 0.1
    assert (found.exact.max_kl, found.oracle.max_kl) == (0.0, 0.0)
    assert "energy recall, mean 0 < 0.98" in found.summary
    assert read_sidecar(path).checksum == checksum
    with LLM.load(model, threads=1) as llm:
        assert llm.mode == "exact"
        assert "its audit failed (energy recall, mean 0 < 0.98" in "".join(llm.notices)


def test_the_figures_are_those_of_separate_runs(model: Path, text: Path) -> None:
    """Computed anew by engines that generate text, of which only the predicted one is given the predictor."""
    with_threshold = LoadSettings(ctx_size=WINDOW, threads=1, predictor_threshold=3.0)
    found = audit(model, [text], with_threshold, tokens=TOKENS)
    assert not found.stored
    rows: dict[str, list[np.ndarray]] = {}
    for mode, more in (("dense", {}), ("predicted", {"predictor_threshold": 3.0})):
        with LLM.load(model, threads=1, ctx_size=WINDOW, mode=mode, **more) as llm:
            tokens = llm.tokenize(text.read_text(), add_special=False)[:TOKENS]
            engine = llm._loaded.engine
            rows[mode] = []
            for start in range(0, TOKENS, WINDOW):
                part = tokens[start : start + WINDOW]
                ticket = engine.begin()
                rows[mode].append(engine.prefill(part[:1], reuse=False)[0].copy())
                rows[mode] += [engine.step(token, ticket).copy() for token in part[1:]]
    dense, predicted = (log_probabilities(np.array(rows[mode])) for mode in ("dense", "predicted"))
    kl = (np.exp(dense) * (dense - predicted)).sum(axis=1)
    assert kl.max() > 1e-3
    assert found.predicted.mean_kl == pytest.approx(kl.mean(), rel=1e-6)
    assert found.predicted.max_kl == pytest.approx(kl.max(), rel=1e-6)
    assert found.predicted.p99_kl == pytest.approx(np.quantile(kl, 0.99), rel=1e-6)
    assert found.predicted.top1 == (dense.argmax(1) == predicted.argmax(1)).mean()
    places = [i for i in range(TOKENS - 1) if (i + 1) % WINDOW]
    targets = np.array(tokens)[np.array(places) + 1]
    gap = (dense[places, targets] - predicted[places, targets]).mean()
    assert found.predicted.perplexity_ratio == pytest.approx(math.exp(gap), rel=1e-9)


def test_layers_are_counted_as_the_reference_counts_them(model: Path, text: Path) -> None:
    settings = replace(SETTINGS, predictor_threshold=2.0)
    fast = audit(model, [text], settings, tokens=TOKENS)
    slow = audit(model, [text], replace(settings, ops=OpsKind.REFERENCE), tokens=TOKENS)
    for ours, theirs in zip(fast.layers, slow.layers, strict=True):
        for name in ("recall", "energy_recall", "precision", "selected", "active"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=0.03)
        assert 0.1 < ours.recall < 1.0
        assert ours.energy_recall > ours.recall  # of the oracle's scores, the largest are the largest activations
        assert ours.precision == 1.0


def test_energy_recall_and_the_others_by_hand() -> None:
    from thermocline.activity.calibration import Counts

    counts = Counts()
    counts.add(np.array([[True, True, False, False]]), np.array([[3.0, 0.0, 1.0, 0.0]]))
    counts.add(np.array([[False, False, False, True]]), np.array([[0.0, 0.0, 0.0, 2.0]]))
    assert Quality.of(counts) == Quality(2 / 3, 5 / 6, 2 / 3, 3 / 8, 3 / 8)
    assert Quality.of(Counts()) == Quality(1.0, 1.0, 1.0, 0.0, 0.0)


GOOD = AuditResult(
    tokens=9000,
    exact=Distance(0.0, 0.0, 0.0, 1.0, 1.0),
    oracle=Distance(0.0, 0.0, 0.0, 1.0, 1.0),
    predicted=Distance(0.009, 0.1, 2.0, 0.96, 1.009),
    layers=(Quality(0.9, 0.96, 0.3, 0.3, 0.1), Quality(0.9, 1.0, 0.3, 0.3, 0.1)),
    generated=(Generated(0.2, 0.0), Generated(0.25, 0.0)),
    share=0.07,
)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "mean energy": ({"layers": (GOOD.layers[0], GOOD.layers[0])}, "energy recall, mean 0.96 < 0.98"),
    "worst energy": (
        {"layers": (Quality(0.9, 0.94, 0.3, 0.3, 0.1), *(GOOD.layers[1],) * 9)},
        "energy recall, worst layer 0.94 < 0.95",
    ),
    "divergence": ({"predicted": GOOD.predicted._replace(mean_kl=0.011)}, "KL, mean 0.011 > 0.01"),
    "top-1": ({"predicted": GOOD.predicted._replace(top1=0.94)}, "top-1 0.94 < 0.95"),
    "perplexity": ({"predicted": GOOD.predicted._replace(perplexity_ratio=1.011)}, "perplexity ratio 1.011 > 1.01"),
    "no figure": ({"predicted": GOOD.predicted._replace(mean_kl=math.nan)}, "KL, mean nan > 0.01"),
    "exact differs": ({"exact": GOOD.exact._replace(max_kl=1e-3)}, "KL of exact, largest 0.001 > 1e-06"),
    "the mask differs": ({"oracle": GOOD.exact._replace(max_kl=1e-3)}, "KL of the oracle mask, largest 0.001 > 1e-06"),
    "repetition": ({"generated": (Generated(0.2, 0.0), Generated(0.4, 0.0))}, "repetition beyond exact's 0.2 > 0.1"),
    "few tokens": ({"tokens": TOKENS - 1}, "tokens read 59 < 60"),
    "invalid": ({"generated": (Generated(0.2, 0.0), Generated(0.2, 0.1))}, "invalid text beyond exact's 0.1 > 0.01"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_each_gate_can_fail(case: str) -> None:
    changes, words = BAD[case]
    assert GOOD.passed
    bad = replace(GOOD, **changes)
    assert not bad.passed
    assert bad.summary == words
    json.dumps(bad.as_dict(), allow_nan=False)


def test_limits_themselves_pass() -> None:
    assert Gate("a", 0.98, 0.98, True).passed
    assert Gate("a", 0.01, 0.01, False).passed


def test_free_texts_that_repeat_or_break_are_told() -> None:
    assert Generated.of([[1, 2, 3, 4, 5], [1, 2, 3, 4]], ["abc"]) == Generated(0.0, 0.0)
    assert Generated.of([[1] * 7], ["a\ufffdb\ufffd"]) == Generated(0.75, 0.5)
    assert Generated.of([[1]], [""]) == Generated(0.0, 0.0)


def test_a_comparison_of_nothing_passes_no_gate() -> None:
    assert all(map(math.isnan, Comparison().result()))


def test_progress_counts_to_the_end(model: Path, text: Path) -> None:
    seen: list[Audited] = []
    audit(model, [text], SETTINGS, tokens=TOKENS, progress=seen.append)
    reading = [s for s in seen if not s.texts]
    assert [s.tokens for s in reading] == [7, 14, 21, 24, 31, 38, 45, 48, 55, 60]
    assert [s.texts for s in seen[len(reading) :]] == list(range(1, 2 * auditing.PROMPTS + 1))
    assert {s.total for s in seen} == {TOKENS}
    shares = [s.share for s in seen]
    assert shares == sorted(set(shares))
    assert shares[-1] == 1.0


def test_an_audit_of_too_few_tokens_leaves_what_was_noted(model: Path, text: Path) -> None:
    path = constant(model, 1e9)
    audit(model, [text], SETTINGS, tokens=TOKENS)
    noted = path.read_bytes()
    found = audit(model, [text], SETTINGS, tokens=TOKENS - 1)
    assert (found.whole, found.passed, found.stored, found.problem) == (False, False, False, "")
    assert path.read_bytes() == noted


def test_no_audit_that_cannot_pass_is_recommended(model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auditing, "MIN_TOKENS", 133)
    with pytest.raises(UsageError, match=r"the audit reads 10,000: give more text$"):
        audit(model, [text], SETTINGS, tokens=10_000)


@pytest.mark.parametrize(
    ("changes", "tokens", "words"),
    [
        ({}, 10_000, r"makes 132 tokens and the audit reads 10,000: .* --tokens 132"),
        ({}, 1, "2 or more"),
        ({"mode": "exact"}, TOKENS, "predicts nothing that could be audited"),
    ],
)
def test_what_cannot_be_audited_is_refused(model: Path, text: Path, changes: Any, tokens: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        audit(model, [text], replace(SETTINGS, **changes), tokens=tokens)


def test_a_model_without_predictor_is_told(tiny_model: Path, text: Path) -> None:
    with pytest.raises(UsageError, match="train one"):
        audit(tiny_model, [text], SETTINGS, tokens=TOKENS)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The model that comes with the package, linked, with copies of its activity and predictor beside it."""
    folder = tmp_path_factory.mktemp("shipped")
    model = folder / "model.gguf"
    model.symlink_to(shipped_model())
    for kind in (SidecarKind.ACTIVITY, SidecarKind.PREDICTOR):
        shutil.copy(companion(shipped_model(), kind), companion(model, kind))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THERMOCLINE_HOME", str(folder))
        yield model


@pytest.fixture(scope="module")
def source_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "a.py"
    file.write_text(Path(__file__).read_text()[:1500])
    return file


@pytest.fixture(scope="module")
def whole(shipped: Path, source_text: Path) -> AuditResult:
    """The audit of the shipped model where one device has all."""
    return audit(shipped, [source_text], SPLIT, tokens=TOKENS)


SPLIT = LoadSettings(ctx_size=WINDOW, threads=1)


def same_audit(found: AuditResult, whole: AuditResult) -> None:
    """Adding up in another order moves figures a little; counting the wrong neurons moves them far."""
    assert max(found.exact.max_kl, found.oracle.max_kl) < SAME_KL
    assert found.predicted.mean_kl == pytest.approx(whole.predicted.mean_kl, rel=0.3)
    for ours, theirs in zip(found.layers, whole.layers, strict=True):
        assert ours.as_dict() == pytest.approx(theirs.as_dict(), abs=0.002)
    assert min(layer.active for layer in found.layers) > 0


def test_a_split_model_in_another_order_is_audited_alike(shipped: Path, source_text: Path, whole: AuditResult) -> None:
    """The plan cuts layers, whose neurons are put in the order of the activity."""
    budget = f"{int(shipped.stat().st_size * 0.5)}b"
    split = replace(SPLIT, device=DeviceKind.EMULATED, vram_budget=budget)
    with LLM.load(shipped, split) as llm:
        layers = llm._loaded.transformer.layers
        assert any(len(layer.ffn.parts) == 2 and layer.ffn.order is not None for layer in layers)
    same_audit(audit(shipped, [source_text], split, tokens=TOKENS), whole)
    assert not [thread for thread in threading.enumerate() if thread.name == "emulated-device"]


def test_a_file_that_was_written_in_another_order_is_audited_alike(
    shipped: Path, source_text: Path, whole: AuditResult, tmp_path: Path
) -> None:
    activity, predictor = (companion(shipped, kind) for kind in (SidecarKind.ACTIVITY, SidecarKind.PREDICTOR))
    ordered = tmp_path / "ordered.gguf"
    convert(shipped, ordered, activity=activity, predictor=predictor)
    same_audit(audit(ordered, [source_text], SPLIT, tokens=TOKENS), whole)


@pytest.fixture
def inside(model: Path, tmp_path: Path) -> Path:
    """A model with the oracle inside, and nothing beside it."""
    path = tmp_path / "inside.gguf"
    convert(model, path, predictor=companion(model, SidecarKind.PREDICTOR))
    return path


def test_a_predictor_inside_a_model_is_used_once_it_was_audited(inside: Path, text: Path) -> None:
    with LLM.load(inside, threads=1) as llm:
        assert llm.mode == "exact"
        assert "mode exact, for the predictor inside the model: not audited" in "".join(llm.notices)
        exact = llm.generate("abc", **GREEDY).logprobs
    found = audit(inside, [text], SETTINGS, tokens=TOKENS)
    assert found.passed
    assert found.stored
    told = describe(inside).predictor
    assert told is not None
    assert (told.passed, told.audit) == (True, found.summary)
    with LLM.load(inside, threads=1, mode="predicted") as llm:
        assert f"its audit passed ({found.summary})" in "".join(llm.notices)
        assert llm.generate("abc", **GREEDY).logprobs == exact
    # The oracle of a model as small as this one is larger than what it spares; that is known from the audit.
    with LLM.load(inside, threads=1) as llm:
        assert llm.mode == "exact"
        assert "it would read more bytes than it saves" in "".join(llm.notices)


def test_an_audit_of_another_model_or_a_damaged_one_is_told_of(inside: Path, text: Path, tiny_plain: Path) -> None:
    audit(inside, [text], SETTINGS, tokens=TOKENS)
    path = companion(inside, SidecarKind.AUDIT)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with LLM.load(inside, threads=1) as llm:
        assert llm.mode == "exact"
        assert "its audit failed (inside.audit.safetensors is of no use: " in "".join(llm.notices)
    path.write_bytes(whole)
    with open_model(tiny_plain) as source:
        write_sidecar(path, SidecarKind.AUDIT, source.fingerprint, read_sidecar(path).info, read_sidecar(path).arrays)
    with LLM.load(inside, threads=1, mode="predicted") as llm:
        assert "is of no use: " in "".join(llm.notices)


def test_an_audit_with_another_threshold_is_not_noted(inside: Path, text: Path) -> None:
    assert not audit(inside, [text], replace(SETTINGS, predictor_threshold=0.1), tokens=TOKENS).stored
    assert not companion(inside, SidecarKind.AUDIT).exists()
    with open_model(inside) as source:
        found = find_predictor(source, family_of(source).spec(source))
    assert found is not None
    (own,) = set(found.predictor.thresholds)
    assert audit(inside, [text], replace(SETTINGS, predictor_threshold=own), tokens=TOKENS).stored


def test_mode_auto_predicts_by_an_audited_predictor_inside(shipped: Path, source_text: Path, tmp_path: Path) -> None:
    path = tmp_path / "inside.gguf"
    convert(shipped, path, predictor=companion(shipped, SidecarKind.PREDICTOR))
    found = audit(path, [source_text], SPLIT, tokens=TOKENS)
    note, shares = companion(path, SidecarKind.AUDIT), [layer.selected for layer in found.layers]
    kept = read_sidecar(note)
    assert kept.arrays["active_share"].tolist() == pytest.approx(shares)
    with LLM.load(path, threads=1) as llm:
        assert llm.mode == ("predicted" if found.passed else "exact")
    # So few tokens may fail a gate by chance; what is noted decides.
    for passed, mode in ((True, "predicted"), (False, "exact")):
        info = {"audit": {**kept.info["audit"], "passed": passed}}
        write_sidecar(note, SidecarKind.AUDIT, kept.model_fingerprint, info, kept.arrays)
        with LLM.load(path, threads=1) as llm:
            assert llm.mode == mode
            assert f"its audit {'passed' if passed else 'failed'}" in "".join(llm.notices)


def test_an_audit_that_cannot_be_noted_is_told_all_the_same(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise OutputError("m.predictor.safetensors: needs 5 bytes, 0 are free on its disk: free 5 more")

    monkeypatch.setattr("thermocline.runtime.auditing.keep_audit", full)
    found = audit(model, [text], SETTINGS, tokens=100)
    assert (found.tokens, found.stored, found.whole) == (100, False, True)
    assert found.problem.endswith("free 5 more")
