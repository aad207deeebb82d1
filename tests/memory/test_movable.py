"""Neurons that change places while loaded: the same network, the same ledger, and nothing lost when a read fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thermocline.config import CacheType, Mode
from thermocline.errors import HardwareError, UsageError
from thermocline.files.formats import F32, Q8_0, BlockFormat
from thermocline.files.open import open_model
from thermocline.files.quantize import from_float
from thermocline.hardware.machine import Tier
from thermocline.hardware.reader import Reader
from thermocline.memory.arena import Memory
from thermocline.memory.convert import convert
from thermocline.memory.disk_store import DiskStore
from thermocline.memory.kv_cache import KVCache
from thermocline.memory.loader import load_transformer
from thermocline.memory.movable import Movable
from thermocline.memory.reads import Way
from thermocline.memory.record_cache import RecordCache
from thermocline.model.network import Outputs, Segment, Transformer
from thermocline.ops.contract import Activation, FfnKind
from thermocline.ops.cpu import CpuOps
from thermocline.ops.device import EmulatedDevice, Host
from thermocline.placement.ledger import Purpose
from thermocline.placement.seats import LayerSeat, Seating

VRAM, RAM = Tier.VRAM, Tier.RAM
RELU = FfnKind(Activation.RELU, gated=True)
RELU2 = FfnKind(Activation.RELU2, gated=False)
LAYERS, NEURONS, TOKENS = 2, 96, 12
LARGE = 1 << 30


def two_devices() -> Memory:
    return Memory({VRAM: EmulatedDevice(CpuOps(1)), RAM: Host(CpuOps(1))}, {VRAM: LARGE, RAM: LARGE})


def seating(*depths: int, warm: int = NEURONS) -> Seating:
    return Seating(RAM, RAM, tuple(LayerSeat(RAM, hot, max(hot, warm)) for hot in depths))


def run(network: Transformer) -> np.ndarray:
    cache = KVCache(network.spec, network.ops, TOKENS, CacheType.F32, CacheType.F32)
    workspace = network.workspace(TOKENS)
    rows = []
    for start, stop in ((0, 9), (9, 10), (10, 12)):
        tokens = np.arange(start, stop, dtype=np.int32)
        result = network.step(tokens, (Segment(cache, start, stop - start),), workspace, Outputs.ALL)
        rows.append(network.ops.to_host(result.logits).copy())
    return np.concatenate(rows)


def tolerance(logits: np.ndarray) -> float:
    """As in `test_hybrid`: the same activations, whose sum is associated otherwise."""
    return float(np.abs(logits).max()) * NEURONS * 2.0**-24 * 100


def order(seed: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(NEURONS) for _ in range(LAYERS)]).astype(np.int32)


def pairs(movable: Movable, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Some cold neurons, and as many hot ones, of any layers."""
    rng = np.random.default_rng(seed)
    hot = [(i, n) for i, layer in enumerate(movable.layers) for n in layer.order[: layer.hot].tolist()]
    cold = [(i, n) for i, layer in enumerate(movable.layers) for n in layer.order[layer.hot :].tolist()]
    count = min(count, len(hot), len(cold))
    return tuple(np.array([some[i] for i in rng.permutation(len(some))[:count]], np.int64) for some in (cold, hot))  # type: ignore[return-value]


def hot_sets(movable: Movable) -> list[set[int]]:
    return [set(layer.order[: layer.hot].tolist()) for layer in movable.layers]


@pytest.mark.parametrize("fmt", [F32, Q8_0], ids=lambda f: f.name)
@pytest.mark.parametrize("kind", [RELU, RELU2], ids=["relu", "relu2"])
@pytest.mark.parametrize("ordered", [True, False])
def test_exchanges_change_no_more_than_the_order_of_a_sum(
    make_source: Callable[..., Any], fmt: BlockFormat, kind: FfnKind, ordered: bool
) -> None:
    """Between layers too, so that depths change; in the standard layout, whose records exist in memory only."""
    source = make_source(fmt, kind)
    plain = run(load_transformer(source, CpuOps(1), mode=Mode.EXACT)[0])
    memory = two_devices()
    movable = Movable(memory)
    network, _ = load_transformer(
        source, memory, mode=Mode.EXACT, seats=seating(32, 64), order=order() if ordered else None, movable=movable
    )
    movable.reserve()
    account = memory.ledger.rows()
    np.testing.assert_allclose(run(network), plain, rtol=0, atol=tolerance(plain))
    depths = set()
    for seed in range(12):
        promoted, demoted = pairs(movable, 1 + 7 * seed, seed)
        wanted = hot_sets(movable)
        for (up, neuron), (down, other) in zip(promoted.tolist(), demoted.tolist(), strict=True):
            wanted[up].add(neuron)
            wanted[down].discard(other)
        moved = movable.exchange(promoted, demoted)
        assert moved == 2 * len(promoted) * movable.layers[0].record_bytes
        assert hot_sets(movable) == wanted
        for layer in movable.layers:
            assert sorted(layer.order.tolist()) == list(range(NEURONS))
        assert sum(layer.hot for layer in movable.layers) == 96
        depths.add(tuple(layer.hot for layer in movable.layers))
        np.testing.assert_allclose(run(network), plain, rtol=0, atol=tolerance(plain))
        assert memory.ledger.rows() == account
        assert memory.is_true
    assert len(depths) > 3
    assert movable.exchange(*pairs(movable, 0, 0)) == 0
    memory.close()
    assert not memory.ledger.rows()


def test_a_layer_may_become_whole_and_be_cut_again(make_source: Callable[..., Any]) -> None:
    source, memory = make_source(F32, RELU), two_devices()
    plain = run(load_transformer(source, CpuOps(1))[0])
    movable = Movable(memory)
    network, _ = load_transformer(source, memory, seats=seating(48, 48), movable=movable)
    movable.reserve()
    first, second = movable.layers
    cold = np.array([(0, n) for n in first.order[48:]], np.int64)
    hot = np.array([(1, n) for n in second.order[:48]], np.int64)
    movable.exchange(cold, hot)
    assert [len(layer.ffn.parts) for layer in network.layers] == [1, 1]
    assert [layer.ffn.parts[0].device.tier for layer in network.layers] == [VRAM, RAM]
    np.testing.assert_allclose(run(network), plain, rtol=0, atol=tolerance(plain))
    movable.exchange(hot[:10], cold[5:15])
    assert [layer.hot for layer in movable.layers] == [86, 10]
    np.testing.assert_allclose(run(network), plain, rtol=0, atol=tolerance(plain))
    memory.close()


def test_observers_and_counters_see_the_files_numbers(make_source: Callable[..., Any]) -> None:
    source, memory = make_source(F32, RELU), two_devices()
    movable = Movable(memory)
    network, _ = load_transformer(source, memory, seats=seating(32, 64), order=order(), movable=movable)
    movable.reserve()
    plain, _ = load_transformer(source, CpuOps(1))

    class Counts:
        def __init__(self) -> None:
            self.fired = np.zeros((LAYERS, NEURONS), np.int64)

        def ffn_fired(self, layer: int, fired: np.ndarray) -> None:
            self.fired[layer] += fired

    def counted(of: Transformer) -> np.ndarray:
        cache, counts = KVCache(of.spec, of.ops, 8, CacheType.F32, CacheType.F32), Counts()
        of.step(
            np.arange(8, dtype=np.int32),
            (Segment(cache, 0, 8),),
            of.workspace(8, observed=True),
            counter=counts,
        )
        return counts.fired

    expected = counted(plain)
    assert 0 < expected.sum() < expected.size * 8
    for seed in range(4):
        np.testing.assert_array_equal(counted(network), expected)
        movable.exchange(*pairs(movable, 20, seed))
    cache = KVCache(plain.spec, plain.ops, 8)
    with pytest.raises(UsageError, match="observed"):
        plain.step(np.arange(2, dtype=np.int32), (Segment(cache, 0, 2),), plain.workspace(8), counter=Counts())
    memory.close()


# --- with neurons on disk ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    path = tmp_path_factory.mktemp("records") / "records.gguf"
    with open_model(tiny_model) as source:
        convert(source, path, None, records=True)
    return path


class Failing:
    """A reader whose reads fail from the nth on, until it is mended."""

    left = 1 << 30

    def __init__(self, path: Path) -> None:
        self._real = Reader(path, depth=2, largest=1 << 18)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def wait(self, ticket: int) -> None:
        self._real.wait(ticket)
        Failing.left -= 1
        if Failing.left < 0:
            raise HardwareError("Input/output error")


@pytest.mark.parametrize("slots", [8, 60])
def test_hot_neurons_and_those_on_disk_change_places(file: Path, slots: int) -> None:
    with open_model(file) as source:
        plain = run(load_transformer(source, CpuOps(1), mode=Mode.EXACT)[0])
        memory = two_devices()
        record = sum(
            w.data.shape[1] for name, w in source.weights.items() if name.startswith("blk.0.ffn_") and w.rows > 1
        )
        store = DiskStore(memory, slots * record, Way(64), open_reader=Failing)
        movable = Movable(memory)
        network, _ = load_transformer(
            source, memory, mode=Mode.EXACT, seats=seating(32, 64, warm=0), order=order(), store=store, movable=movable
        )
        movable.reserve()
        account = memory.ledger.rows()
        np.testing.assert_allclose(run(network), plain, rtol=0, atol=tolerance(plain))
        failed = 0
        for seed in range(12):
            Failing.left = seed // 4 if seed % 2 else 1 << 30
            before = [layer.order.copy() for layer in movable.layers]
            try:
                movable.exchange(*pairs(movable, 5 + 6 * seed, seed))
            except HardwareError:
                failed += 1
                assert all(np.array_equal(a, layer.order) for a, layer in zip(before, movable.layers, strict=True))
            Failing.left = 1 << 30
            assert memory.ledger.rows() == account
            np.testing.assert_allclose(run(network), plain, rtol=0, atol=tolerance(plain))
        assert failed
        held = [slot for layer in store._layers for slot in layer.pool.cache.rows[layer._layer] if slot >= 0]
        assert len(set(held)) == len(held)
        assert len(held) + store._layers[0].pool.cache.free == store.slots
        store.close()
        memory.close()


def test_a_caches_records_keep_their_slots_under_other_numbers() -> None:
    cache = RecordCache(10)
    layer = cache.add_layer(6)
    missing, slots = cache.claim(layer, np.array([0, 2, 5], np.int32))
    cache.fill(layer, missing, slots)
    cache.renumber(layer, np.array([3, 0, -1, 1, 2, 4], np.int32), 5)
    assert cache.rows[layer].tolist() == [-1, -1, -1, slots[0], slots[2]]
    assert cache.free == 8
    cache.rate(layer, np.array([0, 0, 0, 0.01, 0.9]))
    missing, more = cache.claim(layer, np.array([0, 1, 2], np.int32))
    cache.fill(layer, missing, more)
    other = cache.add_layer(9)
    missing, more = cache.claim(other, np.arange(6, dtype=np.int32))
    assert cache.rows[layer][3] == -1  # the coldest goes first
    assert cache.rows[layer][4] == slots[2]


def test_what_is_expected_of_records_goes_with_them_under_other_numbers() -> None:
    cache = RecordCache(4)
    layer = cache.add_layer(3)
    cache.rate(layer, np.array([0.9, 0.0, 0.0]))
    cache.renumber(layer, np.array([2, 0, -1], np.int32), 3)
    for records in ([2], [0], [1]):
        cache.step()
        missing, slots = cache.claim(layer, np.array(records, np.int32))
        cache.fill(layer, missing, slots)
    other = cache.add_layer(3)
    missing, slots = cache.claim(other, np.arange(3, dtype=np.int32))
    assert (cache.rows[layer] >= 0).tolist() == [False, False, True]


# --- with biases ------------------------------------------------------------------------------------------------------


def of_biases(source: Any) -> Any:
    """The source with biases that matter: without one's own a neuron says something else."""
    values = np.linspace(-2, 2, NEURONS, dtype=np.float32)
    new = {f"blk.{i}.ffn_up.bias": np.roll(values, 37 * i) for i in range(LAYERS)}
    return replace(source, weights={**source.weights, **{n: from_float(n, v[None], F32) for n, v in new.items()}})


def test_biases_follow_their_neurons(make_opt: Callable[..., Any]) -> None:
    """Between layers too, so that each tier's biases are cut elsewhere, down to none of a layer."""
    source, memory = of_biases(make_opt()), two_devices()
    plain = run(load_transformer(source, CpuOps(1), mode=Mode.EXACT)[0])
    movable = Movable(memory)
    network, _ = load_transformer(
        source, memory, mode=Mode.EXACT, seats=seating(32, 64), order=order(), movable=movable
    )
    movable.reserve()
    account = memory.ledger.rows()
    assert memory.ledger.used(VRAM, Purpose.FFN) == 96 * (movable.layers[0].record_bytes + 4)
    np.testing.assert_allclose(run(network), plain, rtol=0, atol=tolerance(plain))
    depths = set()
    for seed in range(8):
        movable.exchange(*pairs(movable, 1 + 9 * seed, seed))
        depths.add(tuple(layer.hot for layer in movable.layers))
        np.testing.assert_allclose(run(network), plain, rtol=0, atol=tolerance(plain))
        assert memory.ledger.rows() == account
        assert memory.is_true
    assert len(depths) > 3
    whole = np.array([(1, n) for n in movable.layers[1].order[: movable.layers[1].hot]], np.int64)
    movable.exchange(np.array([(0, n) for n in movable.layers[0].order[movable.layers[0].hot :]], np.int64), whole)
    assert [layer.hot for layer in movable.layers] == [96, 0]
    np.testing.assert_allclose(run(network), plain, rtol=0, atol=tolerance(plain))
    memory.close()


def test_biases_of_neurons_on_disk_stay_in_memory(make_opt: Callable[..., Any], tmp_path: Path) -> None:
    convert(of_biases(make_opt()), tmp_path / "opt.gguf", None, records=True)
    with open_model(tmp_path / "opt.gguf") as source:
        plain = run(load_transformer(source, CpuOps(1), mode=Mode.EXACT)[0])
        memory = two_devices()
        store = DiskStore(memory, 20_000, Way(64))
        movable = Movable(memory)
        network, _ = load_transformer(
            source, memory, mode=Mode.EXACT, seats=seating(32, 64, warm=0), order=order(), store=store, movable=movable
        )
        movable.reserve()
        account = memory.ledger.rows()
        for seed in range(8):
            np.testing.assert_allclose(run(network), plain, rtol=0, atol=tolerance(plain))
            movable.exchange(*pairs(movable, 1 + 6 * seed, seed))
            assert memory.ledger.rows() == account
        np.testing.assert_allclose(run(network), plain, rtol=0, atol=tolerance(plain))
        store.close()
        memory.close()
