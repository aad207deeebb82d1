"""One step, whatever its shape: batches, mixtures, outputs, refusals, and no allocation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from thermocline.config import CacheType, Mode
from thermocline.errors import ContextError, UsageError
from thermocline.memory.kv_cache import KVCache
from thermocline.memory.loader import load_transformer
from thermocline.model.network import Outputs, Segment, Transformer, resolve_mode
from thermocline.model.workspace import Workspace, workspace_bytes
from thermocline.ops.contract import Activation, Array, FfnKind, Ops
from thermocline.ops.reference import ReferenceOps

RELU = FfnKind(Activation.RELU, gated=True)
SILU = FfnKind(Activation.SILU, gated=True)


@pytest.fixture(scope="module", params=["Llama", "OPT", "Falcon"])
def transformer(request: pytest.FixtureRequest, tiny: Any, usual_ops: Ops) -> Transformer:
    changes = {"Llama": {"hidden_act": "relu"}, "OPT": {}, "Falcon": {"activation": "relu"}}[request.param]
    return tiny.load(tiny.hugging_face(request.param, **changes), usual_ops)


def cache_of(transformer: Transformer, n_ctx: int = 40) -> KVCache:
    return KVCache(transformer.spec, transformer.ops, n_ctx, CacheType.F32, CacheType.F32)


def test_a_batch_of_prompts_gives_what_each_gives_alone(
    tiny: Any, transformer: Transformer, prompt: np.ndarray
) -> None:
    prompts = [prompt[:5], prompt[5:6], prompt[6:20]]
    workspace = Workspace(transformer.spec, transformer.ops, 20)
    segments = [Segment(cache_of(transformer), 0, len(p)) for p in prompts]
    batch = transformer.step(np.concatenate(prompts), segments, workspace, Outputs.ALL).logits
    alone = np.concatenate([tiny.logits_of(transformer, p) for p in prompts])
    assert tiny.relative_error(batch, alone) <= 1e-6


def test_prompts_and_single_tokens_share_a_step(tiny: Any, transformer: Transformer, prompt: np.ndarray) -> None:
    """One sequence decodes its tenth token while another starts."""
    workspace = Workspace(transformer.spec, transformer.ops, 10)
    running, starting = cache_of(transformer), cache_of(transformer)
    transformer.step(prompt[:9], (Segment(running, 0, 9),), workspace, Outputs.NONE)
    tokens = np.concatenate([prompt[9:10], prompt[20:24]])
    logits = transformer.step(tokens, (Segment(running, 9, 1), Segment(starting, 0, 4)), workspace).logits
    assert logits.shape == (2, transformer.spec.n_vocab)
    assert tiny.relative_error(logits[0], tiny.logits_of(transformer, prompt[:10])[-1]) <= 1e-6
    assert tiny.relative_error(logits[1], tiny.logits_of(transformer, prompt[20:24])[-1]) <= 1e-6
    assert (running.length, starting.length) == (10, 4)


def test_outputs_choose_the_rows(tiny: Any, transformer: Transformer, prompt: np.ndarray) -> None:
    whole = tiny.logits_of(transformer, prompt[:6])
    for outputs, rows in ((Outputs.ALL, whole), (Outputs.LAST, whole[-1:]), (Outputs.NONE, whole[:0])):
        workspace = Workspace(transformer.spec, transformer.ops, 6)
        result = transformer.step(prompt[:6], (Segment(cache_of(transformer), 0, 6),), workspace, outputs)
        np.testing.assert_array_equal(result.logits, rows)


def test_a_cut_cache_goes_on_as_if_nothing_had_followed(
    tiny: Any, transformer: Transformer, prompt: np.ndarray
) -> None:
    workspace, cache = Workspace(transformer.spec, transformer.ops, 12), cache_of(transformer)
    transformer.step(prompt[:12], (Segment(cache, 0, 12),), workspace)
    cache.truncate(5)
    logits = transformer.step(prompt[20:23], (Segment(cache, 5, 3),), workspace, Outputs.ALL).logits
    expected = tiny.logits_of(transformer, np.concatenate([prompt[:5], prompt[20:23]]))[5:]
    assert tiny.relative_error(logits, expected) <= 1e-6


def test_a_step_may_start_before_the_end_of_its_cache(tiny: Any, transformer: Transformer, prompt: np.ndarray) -> None:
    """What lay behind is overwritten and forgotten."""
    workspace, cache = Workspace(transformer.spec, transformer.ops, 12), cache_of(transformer)
    transformer.step(prompt[:12], (Segment(cache, 0, 12),), workspace)
    logits = transformer.step(prompt[20:23], (Segment(cache, 5, 3),), workspace).logits
    assert cache.length == 8
    expected = tiny.logits_of(transformer, np.concatenate([prompt[:5], prompt[20:23]]))[-1:]
    assert tiny.relative_error(logits, expected) <= 1e-6


class Recorder:
    """An observer that keeps everything."""

    def __init__(self) -> None:
        self.inputs: list[tuple[int, np.ndarray, np.ndarray]] = []
        self.hidden: list[tuple[int, np.ndarray]] = []

    def ffn_input(self, layer: int, residual: Array, normed: Array) -> None:
        self.inputs.append((layer, residual.copy(), normed.copy()))

    def ffn_hidden(self, layer: int, hidden: Array) -> None:
        self.hidden.append((layer, hidden.copy()))


def test_an_observer_sees_every_ffn_and_changes_nothing(tiny: Any, usual_ops: Ops, prompt: np.ndarray) -> None:
    model = tiny.hugging_face("Llama", hidden_act="relu")
    seen: list[np.ndarray] = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0][0].numpy()))
    theirs = tiny.expected_logits(model, prompt[:9])
    transformer = tiny.load(model, usual_ops)
    workspace = Workspace(transformer.spec, transformer.ops, 9, observed=True)
    recorder = Recorder()
    segment = Segment(cache_of(transformer), 0, 9)
    result = transformer.step(prompt[:9], (segment,), workspace, Outputs.ALL, recorder)
    assert tiny.relative_error(result.logits, theirs) <= 1e-4
    np.testing.assert_array_equal(result.logits, tiny.logits_of(transformer, prompt[:9]))
    assert [layer for layer, _ in recorder.hidden] == [layer for layer, *_ in recorder.inputs] == [0, 1, 2]
    for (_, ours), hidden in zip(recorder.hidden, seen, strict=True):
        assert tiny.relative_error(ours, hidden) <= 1e-4
    assert result.work.fired == sum(np.count_nonzero(hidden) for _, hidden in recorder.hidden)


SCORED = {"Llama": "model.layers.{}.post_attention_layernorm", "OPT": "model.decoder.layers.{}.final_layer_norm",
          "Falcon": "transformer.h.{}.ln_attn"}  # fmt: skip
"""Modules that are given what predictors score: the residual stream before the FFN's norm, in Falcon the input."""


@pytest.mark.parametrize("family", SCORED)
def test_predictors_are_given_what_the_family_says(tiny: Any, usual_ops: Ops, prompt: np.ndarray, family: str) -> None:
    changes = {"new_decoder_architecture": True, "num_kv_heads": 2} if family == "Falcon" else {}
    model = tiny.hugging_face(family, **changes)
    seen: list[np.ndarray] = []
    for layer in range(3):
        module = model.get_submodule(SCORED[family].format(layer))
        module.register_forward_pre_hook(lambda _, x: seen.append(x[0].reshape(9, -1).numpy()))
    tiny.expected_logits(model, prompt[:9])
    transformer = tiny.load(model, usual_ops)
    recorder, segment = Recorder(), Segment(cache_of(transformer), 0, 9)
    transformer.step(
        prompt[:9],
        (segment,),
        Workspace(transformer.spec, transformer.ops, 9, observed=True),
        Outputs.ALL,
        recorder,
    )
    for (_, residual, _), theirs in zip(recorder.inputs, seen, strict=True):
        assert tiny.relative_error(residual, theirs) <= 1e-4


def test_learned_positions_end(tiny: Any) -> None:
    source = tiny.source_of(tiny.hugging_face("OPT"))
    assert load_transformer(source, ReferenceOps(), n_ctx=64)[0].n_ctx == 64
    with pytest.raises(UsageError, match="tiny has learned positions for 64 tokens only"):
        load_transformer(source, ReferenceOps(), n_ctx=65)


def test_work_is_summed_over_layers(transformer: Transformer, prompt: np.ndarray) -> None:
    workspace = Workspace(transformer.spec, transformer.ops, 1)
    rows = transformer.spec.n_layer * transformer.spec.n_ff
    exact = transformer.step(prompt[:1], (Segment(cache_of(transformer), 0, 1),), workspace).work
    dense = transformer.with_mode(Mode.DENSE)
    full = dense.step(prompt[:1], (Segment(cache_of(transformer), 0, 1),), workspace).work
    gated = transformer.spec.ffn.gated
    assert (full.gate_rows, full.up_rows, full.down_rows) == (rows * gated, rows, rows)
    assert exact.gate_rows == rows * gated
    assert 0 < exact.fired == full.fired <= exact.down_rows < 0.7 * rows
    assert exact.up_rows == (exact.down_rows if gated else rows)


REFUSED = {
    "no tokens": ([], [], "a step of 0 tokens"),
    "too many tokens": ([1] * 9, [(0, 9)], "a step of 9 tokens does not fit a workspace of 1 to 8"),
    "segments too short": ([1, 2, 3], [(0, 2)], "do not divide a step of 3"),
    "empty segment": ([1], [(0, 1), (0, 0)], "do not divide"),
    "negative token": ([1, -1], [(0, 2)], "token -1 is not in the vocabulary of 160"),
    "token beyond": ([1, 160], [(0, 2)], "token 160 is not in the vocabulary"),
    "hole in the cache": ([1], [(1, 1)], "starts at 1, but its cache is filled up to 0"),
    "negative start": ([1], [(-1, 1)], "starts at -1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_steps_that_cannot_be_run_are_refused(transformer: Transformer, case: str) -> None:
    tokens, segments, message = REFUSED[case]
    workspace = Workspace(transformer.spec, transformer.ops, 8)
    with pytest.raises(UsageError, match=message):
        transformer.step(
            np.array(tokens, dtype=np.int32), [Segment(cache_of(transformer), *s) for s in segments], workspace
        )


def test_a_full_context_is_refused_and_the_cache_unharmed(transformer: Transformer) -> None:
    cache = cache_of(transformer, 4)
    workspace = Workspace(transformer.spec, transformer.ops, 8)
    transformer.step(np.arange(3, dtype=np.int32), (Segment(cache, 0, 3),), workspace)
    with pytest.raises(ContextError, match="5 tokens do not fit a context of 4"):
        transformer.step(np.arange(2, dtype=np.int32), (Segment(cache, 3, 2),), workspace)
    assert cache.length == 3


def test_outputs_and_observers_need_room(transformer: Transformer) -> None:
    workspace = Workspace(transformer.spec, transformer.ops, 8, 1)
    segment = Segment(cache_of(transformer), 0, 3)
    with pytest.raises(UsageError, match="3 rows of logits do not fit a workspace of 1"):
        transformer.step(np.arange(3, dtype=np.int32), (segment,), workspace, Outputs.ALL)
    with pytest.raises(UsageError, match="observed=True"):
        transformer.step(np.arange(3, dtype=np.int32), (segment,), workspace, observer=Recorder())
    with pytest.raises(UsageError, match="a workspace of 0 tokens"):
        Workspace(transformer.spec, transformer.ops, 0)


@pytest.mark.parametrize(
    ("mode", "kind", "resolved"),
    [
        (Mode.AUTO, RELU, Mode.EXACT),
        (Mode.AUTO, SILU, Mode.DENSE),
        (Mode.DENSE, RELU, Mode.DENSE),
        (Mode.EXACT, RELU, Mode.EXACT),
    ],
)
def test_auto_mode(mode: Mode, kind: FfnKind, resolved: Mode) -> None:
    assert resolve_mode(mode, kind) is resolved


def test_exact_mode_needs_zeros() -> None:
    with pytest.raises(UsageError, match="silu gives none; use --mode dense"):
        resolve_mode(Mode.EXACT, SILU)


class CountingOps(ReferenceOps):
    """ReferenceOps that counts the arrays it hands out."""

    def __init__(self) -> None:
        self.bytes = 0

    def array(self, shape: tuple[int, ...], dtype: str = "float32") -> Array:
        array = super().array(shape, dtype)
        self.bytes += array.nbytes
        return array


def test_a_step_asks_for_no_arrays_and_sizes_are_foretold(tiny: Any, prompt: np.ndarray) -> None:
    ops = CountingOps()
    transformer, _ = load_transformer(tiny.source_of(tiny.hugging_face("Qwen3", head_dim=32)), ops)
    before = ops.bytes
    workspace = Workspace(transformer.spec, ops, 8, 2, observed=True)
    assert ops.bytes - before == workspace_bytes(transformer.spec, 8, 2, observed=True)
    before = ops.bytes
    cache = KVCache(transformer.spec, ops, 30, CacheType.F16, CacheType.F32)
    assert ops.bytes - before == cache.nbytes
    before = ops.bytes
    transformer.step(prompt[:8], (Segment(cache, 0, 8),), workspace)
    transformer.step(prompt[8:9], (Segment(cache, 8, 1),), workspace)
    assert ops.bytes == before
    assert workspace.views(1) is workspace.views(1)
