"""Neurons that change places between a GPU and the CPU: a step that was captured before goes on being right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from thermocline.activity.predictor import Predictor
from thermocline.config import CacheType, Mode
from thermocline.files.formats import F16, Q4_0, Q8_0, BlockFormat
from thermocline.files.open import open_model
from thermocline.hardware.machine import Tier
from thermocline.memory.arena import Memory
from thermocline.memory.kv_cache import KVCache
from thermocline.memory.loader import load_transformer
from thermocline.memory.movable import Movable
from thermocline.model.network import Outputs, Segment, Transformer
from thermocline.ops.contract import Activation, FfnKind
from thermocline.ops.cpu import CpuOps
from thermocline.ops.cuda.beside import CudaDevice
from thermocline.ops.cuda.layout import arranged, rows_apart, rows_of_file
from thermocline.ops.cuda.ops import CudaOps
from thermocline.ops.device import Host
from thermocline.placement.ledger import Purpose
from thermocline.placement.seats import LayerSeat, Seating
from thermocline.runtime.captured import CapturedStep

torch = pytest.importorskip("torch")

VRAM, RAM = Tier.VRAM, Tier.RAM
RELU = FfnKind(Activation.RELU, gated=True)
LAYERS, NEURONS = 2, 96
PROMPT, STEPS = [5, 9, 2, 7], [4, 1, 8]


def loaded(
    source: Any, depths: tuple[int, ...], predictor: Predictor | None = None, scored: Tier = VRAM
) -> tuple[Transformer, Movable, Memory]:
    memory = Memory({VRAM: CudaDevice(CudaOps(tf32=False)), RAM: Host(CpuOps(1))}, {VRAM: 1 << 30, RAM: 1 << 30})
    movable = Movable(memory, within=True)
    order = np.stack([np.random.default_rng(i).permutation(NEURONS) for i in range(LAYERS)]).astype(np.int32)
    seats = Seating(RAM, VRAM, tuple(LayerSeat(VRAM, depth, NEURONS, predictor=scored) for depth in depths))
    mode = Mode.EXACT if predictor is None else Mode.PREDICTED
    transformer, _ = load_transformer(
        source, memory, seats=seats, n_ctx=32, mode=mode, predictor=predictor, order=order, movable=movable
    )
    movable.reserve()
    return transformer, movable, memory


def prompted(transformer: Transformer) -> KVCache:
    cache = KVCache(transformer.spec, [layer.device.ops for layer in transformer.layers], 32, CacheType.F16)
    prompt = np.array(PROMPT, np.int32)
    transformer.step(prompt, (Segment(cache, 0, len(prompt)),), transformer.workspace(len(prompt)), Outputs.NONE)
    return cache


def plainly(transformer: Transformer, cache: KVCache) -> np.ndarray:
    workspace, rows = transformer.workspace(1), []
    for token in STEPS:
        result = transformer.step(np.array([token], np.int32), (Segment(cache, cache.length, 1),), workspace)
        rows.append(transformer.ops.to_host(result.logits)[0].copy())
    cache.truncate(len(PROMPT))
    return np.stack(rows)


def replayed(step: CapturedStep) -> np.ndarray:
    rows = [step.run(token, len(PROMPT) + i)[0].copy() for i, token in enumerate(STEPS)]
    step.cache.truncate(len(PROMPT))
    return np.stack(rows)


def swap(movable: Movable, count: int, seed: int) -> int:
    """Exchange some neurons of every layer that is cut, all of them in one call."""
    rng, pairs = np.random.default_rng(seed), []
    for (index,) in movable.groups():
        layer = movable.layers[index]
        cold, hot = rng.permutation(layer.order[layer.hot :])[:count], rng.permutation(layer.order[: layer.hot])[:count]
        pairs += [((index, up), (index, down)) for up, down in zip(cold, hot, strict=False)]
    promoted, demoted = (np.array([pair[side] for pair in pairs], np.int64) for side in (0, 1))
    return movable.exchange(promoted, demoted)


@pytest.mark.parametrize("fmt", [F16, Q8_0, Q4_0], ids=lambda fmt: fmt.name)
def test_a_step_that_was_captured_computes_with_what_was_moved_since(
    make_source: Callable[..., Any], agree: Callable[..., None], fmt: BlockFormat
) -> None:
    source = make_source(fmt, RELU)
    plain = load_transformer(source, CpuOps(1), mode=Mode.EXACT)[0]
    wanted = plainly(plain, prompted(plain))
    transformer, movable, memory = loaded(source, (32, 64))
    cache = prompted(transformer)
    step, account = CapturedStep(transformer, cache), memory.ledger.rows()
    before = [layer.order.copy() for layer in movable.layers]
    for seed in range(2):
        agree(replayed(step), wanted, LAYERS, NEURONS, integers=fmt.block > 1)
        assert swap(movable, 3 + 24 * seed, seed) > 0
        assert [layer.hot for layer in movable.layers] == [32, 64]
        assert memory.ledger.rows() == account
        assert memory.is_true
    agree(replayed(step), wanted, LAYERS, NEURONS, integers=fmt.block > 1)
    cache = prompted(transformer)  # several tokens at once
    agree(plainly(transformer, cache), wanted, LAYERS, NEURONS, integers=fmt.block > 1)
    assert all(set(a[:32]) != set(b.order[:32]) for a, b in zip(before, movable.layers, strict=True))
    memory.close()


def test_biases_and_uncut_layers_on_a_gpu(make_opt: Callable[..., Any], agree: Callable[..., None]) -> None:
    source = make_opt()
    plain = load_transformer(source, CpuOps(1), mode=Mode.EXACT)[0]
    wanted = plainly(plain, prompted(plain))
    for depths in ((96, 40), (40, 0)):
        transformer, movable, memory = loaded(source, depths)
        assert [layer.can_move for layer in movable.layers] == [0 < depth < NEURONS for depth in depths]
        cut = sum(depth for depth in depths if 0 < depth < NEURONS)
        assert memory.ledger.used(VRAM, Purpose.GRAPHS) == 4 * cut
        step = CapturedStep(transformer, prompted(transformer))
        for seed in range(3):
            agree(replayed(step), wanted, LAYERS, NEURONS, integers=False)
            swap(movable, 17, seed)
        agree(replayed(step), wanted, LAYERS, NEURONS, integers=False)
        memory.close()


@pytest.mark.parametrize("scored", [VRAM, RAM])
def test_rows_of_the_predictor_go_along(tiny_model: Any, oracle: Any, agree: Callable[..., None], scored: Tier) -> None:
    """One that is always right: a row that is not its neuron's leaves out what fires."""
    with open_model(tiny_model) as source:
        exact, _, _ = loaded(source, (32, 64))
        wanted = plainly(exact, prompted(exact))
        transformer, movable, memory = loaded(source, (32, 64), oracle(source, shares=0.05), scored)
        step = CapturedStep(transformer, prompted(transformer))
        for seed in range(2):
            agree(replayed(step), wanted, LAYERS, NEURONS, integers=True)
            swap(movable, 25, seed)
        agree(replayed(step), wanted, LAYERS, NEURONS, integers=True)
        memory.close()


@pytest.mark.parametrize("fmt", [F16, Q8_0, Q4_0], ids=lambda fmt: fmt.name)
def test_rows_come_back_as_the_file_has_them(fmt: BlockFormat) -> None:
    ops, bytes_of = CudaOps(), np.random.default_rng(1).integers(0, 256, (6, fmt.row_bytes(64)), np.uint8)
    there = torch.from_numpy(bytes_of).to(ops.device)
    raw = there.clone()
    arranged(raw, fmt, 64)
    assert torch.equal(rows_apart(there, fmt), raw)
    assert torch.equal(rows_of_file(raw, fmt), there)
    at = np.array([4, 1], np.int32)
    np.testing.assert_array_equal(ops.rows(raw, fmt, at), bytes_of[at])
    ops.put_rows(raw, fmt, at, bytes_of[[0, 5]])
    np.testing.assert_array_equal(ops.rows(raw, fmt, np.arange(6, dtype=np.int32)), bytes_of[[0, 5, 2, 3, 0, 5]])
