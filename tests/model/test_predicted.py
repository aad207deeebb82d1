"""Mode predicted: what is selected is computed, what is not costs nothing, and a step's shape decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from thermocline.activity.predictor import Predictor
from thermocline.config import CacheType, Mode
from thermocline.errors import ModelFormatError, NumericalError, UsageError
from thermocline.files.formats import F32, Q4_0, Q8_0
from thermocline.files.powerinfer import PredictorLayer
from thermocline.files.quantize import from_float
from thermocline.memory.kv_cache import KVCache
from thermocline.memory.loader import load_transformer
from thermocline.model.network import Outputs, Segment, Transformer, resolve_mode
from thermocline.model.observers import SelectionObserver
from thermocline.model.workspace import Workspace, workspace_bytes
from thermocline.ops.contract import Activation, ActiveSet, Array, FfnKind, Ops
from thermocline.ops.cpu import CpuOps
from thermocline.ops.reference import ReferenceOps

MODELS = {
    "reglu": ("Llama", {"hidden_act": "relu"}),
    "relu2": ("Arcee", {}),
}
NOBODY = 1e30
"""A threshold that no score reaches."""

Oracle = Callable[..., Predictor]


@pytest.fixture(scope="module", params=MODELS)
def source(request: pytest.FixtureRequest, tiny: Any) -> Any:
    family, changes = MODELS[request.param]
    return tiny.source_of(tiny.hugging_face(family, **changes))


def predicting(source: Any, ops: Ops, predictor: Predictor) -> Transformer:
    return load_transformer(source, ops, mode=Mode.PREDICTED, predictor=predictor)[0]


class Watch:
    """Keeps what every FFN was given, which neurons were computed, and what they gave."""

    def __init__(self) -> None:
        self.inputs: list[np.ndarray] = []
        self.active: list[np.ndarray | None] = []
        self.hidden: list[np.ndarray] = []

    def ffn_input(self, layer: int, residual: Array, normed: Array) -> None:
        self.inputs.append(residual.copy())

    def ffn_active(self, layer: int, active: ActiveSet) -> None:
        self.active.append(None if active.indices is None else active.indices.copy())

    def ffn_hidden(self, layer: int, hidden: Array) -> None:
        self.hidden.append(hidden.copy())


def decode(transformer: Transformer, tokens: np.ndarray, watch: Watch | None = None) -> tuple[np.ndarray, list[Any]]:
    """Token by token: the logits of each, and the work."""
    cache = KVCache(transformer.spec, transformer.ops, len(tokens), CacheType.F32, CacheType.F32)
    workspace = Workspace(
        transformer.spec, transformer.ops, 1, 1, observed=watch is not None, scored=transformer.scored
    )
    logits, works = [], []
    for position, token in enumerate(tokens):
        segment = Segment(cache, position, 1)
        result = transformer.step(np.array([token], np.int32), (segment,), workspace, Outputs.LAST, watch)
        logits.append(transformer.ops.to_host(result.logits)[0].copy())
        works.append(result.work)
    return np.array(logits), works


def batch(transformer: Transformer, tokens: np.ndarray, watch: Watch | None = None) -> tuple[np.ndarray, Any]:
    """All tokens in one step."""
    cache = KVCache(transformer.spec, transformer.ops, len(tokens), CacheType.F32, CacheType.F32)
    n = len(tokens)
    workspace = Workspace(transformer.spec, transformer.ops, n, observed=watch is not None, scored=transformer.scored)
    result = transformer.step(tokens, (Segment(cache, 0, n),), workspace, Outputs.ALL, watch)
    return transformer.ops.to_host(result.logits).copy(), result.work


def test_a_predictor_of_all_ones_gives_the_bits_of_exact_mode(
    source: Any, ops: Ops, oracle: Oracle, prompt: np.ndarray
) -> None:
    transformer = predicting(source, ops, oracle(source, threshold=-np.inf))
    exact = transformer.with_mode(Mode.EXACT)
    ours, work = decode(transformer, prompt[:12])
    theirs, exact_work = decode(exact, prompt[:12])
    assert ours.tobytes() == theirs.tobytes()
    assert work == exact_work
    assert batch(transformer, prompt)[0].tobytes() == batch(exact, prompt)[0].tobytes()


def test_a_predictor_that_selects_nobody_leaves_the_ffn_out(
    source: Any, ops: Ops, oracle: Oracle, prompt: np.ndarray
) -> None:
    transformer = predicting(source, ops, oracle(source, threshold=NOBODY))
    ours, work = decode(transformer, prompt[:6])
    assert set(work) == {(0, 0, 0, 0)}
    silent = {n: from_float(n, np.zeros(w.shape, np.float32), F32) for n, w in source.weights.items() if "down" in n}
    without = load_transformer(replace(source, weights={**source.weights, **silent}), ops)[0]
    np.testing.assert_array_equal(ours, decode(without, prompt[:6])[0])


def test_matrices_of_zeros_select_nobody_or_everybody(source: Any, oracle: Oracle, prompt: np.ndarray) -> None:
    """All scores are 0: below a threshold of 1 there is nobody, and at PowerInfer's 0 everybody."""
    ops = ReferenceOps()
    zero = (
        from_float("fc1", np.zeros((32, 64), np.float32), Q8_0),
        from_float("fc2", np.zeros((96, 32), np.float32), Q8_0),
    )
    for threshold, rows in ((1.0, 0), (0.0, 96)):
        predictor = Predictor((PredictorLayer(*zero),) * 3, (threshold,) * 3)
        logits, works = decode(predicting(source, ops, predictor), prompt[:3])
        assert np.isfinite(logits).all()
        assert {max(work.gate_rows, work.up_rows) for work in works} == {3 * rows}


def test_an_oracle_computes_those_that_fire_and_no_others(source: Any, oracle: Oracle, prompt: np.ndarray) -> None:
    """In float64, where nothing is rounded to the other side of zero, its bits are those of exact mode."""
    transformer = predicting(source, ReferenceOps(), oracle(source))
    exact = transformer.with_mode(Mode.EXACT)
    ours, works = decode(transformer, prompt[:8])
    theirs, exact_works = decode(exact, prompt[:8])
    assert ours.tobytes() == theirs.tobytes()
    rows = 3 * 96
    for work, full in zip(works, exact_works, strict=True):
        assert work.fired == full.fired == max(work.gate_rows, work.up_rows) < 0.7 * rows
        assert max(full.gate_rows, full.up_rows) == rows


def test_an_oracle_comes_close_in_native_arithmetic(
    tiny: Any, source: Any, ops: Ops, oracle: Oracle, prompt: np.ndarray
) -> None:
    transformer = predicting(source, ops, oracle(source))
    ours, works = decode(transformer, prompt[:8])
    assert tiny.relative_error(ours, decode(transformer.with_mode(Mode.DENSE), prompt[:8])[0]) <= 1e-5
    assert max(work.up_rows for work in works) < 0.7 * 3 * 96


@pytest.mark.parametrize("fmt", [Q8_0, Q4_0], ids=lambda f: f.name)
def test_whatever_is_selected_is_computed_as_in_exact_mode(
    source: Any, ops: Ops, oracle: Oracle, prompt: np.ndarray, fmt: Any
) -> None:
    """A coarse predictor: activations are exact mode's where it selects, and zero elsewhere."""
    transformer = predicting(source, ops, oracle(source, threshold=0.3).in_format(fmt))
    watch, whole = Watch(), Watch()
    assert isinstance(watch, SelectionObserver)
    decode(transformer, prompt[:1], watch)
    decode(transformer.with_mode(Mode.EXACT), prompt[:1], whole)
    assert whole.active == [None, None, None]
    np.testing.assert_array_equal(watch.inputs[0], whole.inputs[0])
    computed = np.zeros(96, bool)
    assert watch.active[0] is not None
    computed[watch.active[0]] = True
    assert 0 < computed.sum() < 96
    np.testing.assert_array_equal(watch.hidden[0][0, computed], whole.hidden[0][0, computed])
    assert not watch.hidden[0][0, ~computed].any()
    missed = np.count_nonzero(whole.hidden[0][0, ~computed])
    assert missed > 0


def test_the_observed_scores_select_what_is_told(
    source: Any, usual_ops: Ops, oracle: Oracle, prompt: np.ndarray
) -> None:
    predictor = oracle(source, threshold=0.2)
    transformer = predicting(source, usual_ops, predictor)
    watch = Watch()
    decode(transformer, prompt[:2], watch)
    for i in range(6):
        layer = predictor.layers[i % 3]
        scores, out = np.empty((1, 96), np.float32), np.empty(96, np.int32)
        usual_ops.predict(watch.inputs[i], usual_ops.place(layer.fc1), usual_ops.place(layer.fc2), scores)
        np.testing.assert_array_equal(watch.active[i], usual_ops.select(scores, 0.2, out).indices)


def with_tokens(transformer: Transformer, tokens: int) -> Transformer:
    """The same, predicting in steps of up to `tokens` tokens."""
    layers = []
    for layer in transformer.layers:
        assert layer.predictor is not None
        layers.append(replace(layer, predictor=replace(layer.predictor, tokens=tokens)))
    return replace(transformer, layers=tuple(layers))


def test_short_batches_compute_the_union_and_long_ones_everything(
    source: Any, usual_ops: Ops, oracle: Oracle, prompt: np.ndarray
) -> None:
    transformer = with_tokens(predicting(source, usual_ops, oracle(source, threshold=0.4)), 5)
    short, long = Watch(), Watch()
    batch(transformer, prompt[:5], short)
    scores, out = np.empty((5, 96), np.float32), np.empty(96, np.int32)
    for layer, residual, active in zip(transformer.layers, short.inputs, short.active, strict=True):
        assert layer.predictor is not None
        assert active is not None
        usual_ops.predict(residual, layer.predictor.fc1, layer.predictor.fc2, scores)
        np.testing.assert_array_equal(active, np.flatnonzero((scores >= 0.4).any(axis=0)))
        alone = usual_ops.select(scores[:1], 0.4, out).indices
        assert alone is not None
        assert set(alone) < set(active)
    ours, _ = batch(transformer, prompt[:6], long)
    assert long.active == [None, None, None]
    assert ours.tobytes() == batch(transformer.with_mode(Mode.EXACT), prompt[:6])[0].tobytes()


def test_how_long_a_batch_may_be_is_said_for_each_layer(source: Any, oracle: Oracle) -> None:
    sizes = (5, 2, 1)
    transformer, _ = load_transformer(
        source, ReferenceOps(), mode=Mode.PREDICTED, predictor=oracle(source), predicted_up_to=sizes
    )
    assert tuple(layer.predictor.tokens for layer in transformer.layers if layer.predictor is not None) == sizes
    assert transformer.scored == 5


def test_a_single_token_is_predicted_even_where_nothing_was_measured(source: Any, oracle: Oracle) -> None:
    transformer = predicting(source, ReferenceOps(), oracle(source))
    assert transformer.scored == 1
    assert transformer.with_mode(Mode.EXACT).scored == 0
    assert transformer.with_mode(Mode.PREDICTED).mode is Mode.PREDICTED


def test_threads_and_repetition_do_not_change_the_bits(source: Any, oracle: Oracle, prompt: np.ndarray) -> None:
    predictor = oracle(source, threshold=0.3).in_format(Q8_0)
    results = set()
    for threads in (1, 2, 3, 2):
        results.add(decode(predicting(source, CpuOps(threads), predictor), prompt[:6])[0].tobytes())
    assert len(results) == 1


class CountingOps(ReferenceOps):
    """ReferenceOps that counts the arrays it hands out."""

    def __init__(self) -> None:
        self.bytes = 0

    def array(self, shape: tuple[int, ...], dtype: str = "float32") -> Array:
        array = super().array(shape, dtype)
        self.bytes += array.nbytes
        return array


def test_scores_are_made_once_and_their_size_is_foretold(source: Any, oracle: Oracle, prompt: np.ndarray) -> None:
    ops = CountingOps()
    transformer = predicting(source, ops, oracle(source))
    for tokens, scored in ((8, 3), (8, 64), (1, 1), (8, 0)):
        before = ops.bytes
        Workspace(transformer.spec, ops, tokens, 2, observed=True, scored=scored)
        wanted = workspace_bytes(transformer.spec, tokens, 2, observed=True, scored=scored)
        assert ops.bytes - before == wanted
    plain = workspace_bytes(transformer.spec, 8, 2)
    assert workspace_bytes(transformer.spec, 8, 2, scored=1) == plain + 4 * 2 * 96
    workspace = Workspace(transformer.spec, ops, 8, 1, scored=1)
    cache = KVCache(transformer.spec, ops, 30, CacheType.F32, CacheType.F32)
    before = ops.bytes
    transformer.step(prompt[:8], (Segment(cache, 0, 8),), workspace)
    transformer.step(prompt[8:9], (Segment(cache, 8, 1),), workspace)
    assert ops.bytes == before


def test_a_workspace_without_scores_is_refused(source: Any, oracle: Oracle, prompt: np.ndarray) -> None:
    transformer = predicting(source, ReferenceOps(), oracle(source))
    workspace = Workspace(transformer.spec, transformer.ops, 4, 1)
    cache = KVCache(transformer.spec, transformer.ops, 8, CacheType.F32, CacheType.F32)
    with pytest.raises(UsageError, match="made with scored=1"):
        transformer.step(prompt[:1], (Segment(cache, 0, 1),), workspace)
    transformer.step(prompt[:4], (Segment(cache, 0, 4),), workspace)  # nothing is predicted in so long a step


def test_modes_need_what_they_need(source: Any, oracle: Oracle) -> None:
    relu, silu = FfnKind(Activation.RELU, gated=True), FfnKind(Activation.SILU, gated=True)
    assert resolve_mode(Mode.PREDICTED, relu, predictor=True) is Mode.PREDICTED
    assert resolve_mode(Mode.AUTO, relu, predictor=True) is Mode.EXACT
    with pytest.raises(UsageError, match="needs a predictor, and none was loaded"):
        resolve_mode(Mode.PREDICTED, relu)
    with pytest.raises(UsageError, match="mode predicted skips neurons that are zero, but silu gives none"):
        resolve_mode(Mode.PREDICTED, silu, predictor=True)
    plain, report = load_transformer(source, ReferenceOps())
    assert not plain.has_predictor
    assert report.predictor_bytes == 0
    with pytest.raises(UsageError, match="none was loaded"):
        plain.with_mode(Mode.PREDICTED)
    predictor = oracle(source)
    _, report = load_transformer(source, ReferenceOps(), predictor=predictor)
    assert report.predictor_bytes == predictor.nbytes == 3 * 4 * (192 * 64 + 96 * 192)


def test_predictors_that_are_not_finite_or_of_another_network_are_refused(
    source: Any, usual_ops: Ops, oracle: Oracle
) -> None:
    predictor = oracle(source)
    for part in ("fc1", "fc2"):
        good = predictor.layers[1]
        weight = getattr(good, part)
        values = np.zeros(weight.shape, np.float32)
        values[3, 5] = np.nan
        bad = replace(good, **{part: from_float(part, values, F32)})
        with pytest.raises(NumericalError, match=f"predictor of layer 1, {part} holds NaN or infinity"):
            predicting(source, usual_ops, replace(predictor, layers=(good, bad, good)))
    with pytest.raises(ModelFormatError, match="found 2; the model has 3"):
        predicting(source, usual_ops, Predictor(predictor.layers[:2], predictor.thresholds[:2]))
