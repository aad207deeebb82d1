"""A network over two devices computes what it computes on one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from thermocline.config import CacheType, Mode
from thermocline.errors import AllocationError, BudgetError, UsageError
from thermocline.files.formats import F16, F32, Q8_0, BlockFormat
from thermocline.hardware.machine import Tier
from thermocline.memory.arena import Memory
from thermocline.memory.kv_cache import KVCache
from thermocline.memory.loader import load_transformer
from thermocline.model.feed_forward import Tally
from thermocline.model.network import Outputs, Segment, Transformer
from thermocline.ops.contract import Activation, FfnKind, Ops
from thermocline.ops.cpu import CpuOps
from thermocline.ops.device import EmulatedDevice, Host
from thermocline.ops.reference import ReferenceOps
from thermocline.placement.ledger import Purpose
from thermocline.placement.seats import LayerSeat, Seating, all_in

VRAM, RAM = Tier.VRAM, Tier.RAM
SILU = FfnKind(Activation.SILU, gated=True)
RELU = FfnKind(Activation.RELU, gated=True)
RELU2 = FfnKind(Activation.RELU2, gated=False)
LAYERS, NEURONS, TOKENS = 2, 96, 12
LARGE = 1 << 30


def two_devices(ops: Callable[[], Ops] = lambda: CpuOps(1), budgets: dict[Tier, int] | None = None, **how: Any):
    return Memory({VRAM: EmulatedDevice(ops()), RAM: Host(ops())}, budgets or {VRAM: LARGE}, **how)


def seating(home: Tier, hot: int, *, embedding: Tier = RAM, head: Tier = RAM, homes: tuple[Tier, ...] = ()) -> Seating:
    return Seating(embedding, head, tuple(LayerSeat(h, hot, NEURONS) for h in homes or (home,) * LAYERS))


def random_order(seed: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(NEURONS) for _ in range(LAYERS)]).astype(np.int32)


def run(transformer: Transformer, splits: tuple[int, ...] = (), tally: Tally | None = None, arrays=None) -> np.ndarray:
    """Logits of every token, computed in pieces that end at `splits`."""
    tokens = np.arange(TOKENS, dtype=np.int32)
    makers = [device.ops for device in (layer.device for layer in transformer.layers)]
    cache = KVCache(transformer.spec, makers, TOKENS, CacheType.F32, CacheType.F32)
    workspace = transformer.workspace(TOKENS, arrays=arrays)
    rows = []
    for start, stop in zip((0, *splits), (*splits, TOKENS), strict=True):
        result = transformer.step(
            tokens[start:stop], (Segment(cache, start, stop - start),), workspace, Outputs.ALL, tally=tally
        )
        rows.append(transformer.ops.to_host(result.logits).copy())
    return np.concatenate(rows)


def tolerance(logits: np.ndarray) -> float:
    """Each neuron's activation is the same; only the sum over neurons is associated otherwise.

    That is an error of up to NEURONS eps of the sum of magnitudes, in a network of two layers whose sums stay within
    some hundred times the largest logit.
    """
    return float(np.abs(logits).max()) * NEURONS * 2.0**-24 * 100


@pytest.mark.parametrize("fmt", [F32, F16, Q8_0], ids=lambda f: f.name)
@pytest.mark.parametrize("kind", [SILU, RELU, RELU2], ids=["silu", "relu", "relu2"])
@pytest.mark.parametrize("home", [RAM, VRAM])
def test_a_split_changes_no_more_than_the_order_of_a_sum(
    make_source: Callable[..., Any], fmt: BlockFormat, kind: FfnKind, home: Tier
) -> None:
    source = make_source(fmt, kind)
    plain = run(load_transformer(source, CpuOps(1))[0])
    for hot, order in ((32, None), (64, random_order()), (32, random_order())):
        memory = two_devices()
        transformer, _ = load_transformer(source, memory, seats=seating(home, hot), order=order)
        np.testing.assert_allclose(run(transformer), plain, rtol=0, atol=tolerance(plain))
        assert memory.is_true
        memory.close()


@pytest.mark.parametrize("fmt", [F32, Q8_0], ids=lambda f: f.name)
@pytest.mark.parametrize("homes", [(VRAM, VRAM), (RAM, VRAM), (VRAM, RAM)], ids="-".join)
@pytest.mark.parametrize("ends", [(RAM, RAM), (VRAM, RAM), (RAM, VRAM), (VRAM, VRAM)], ids="-".join)
def test_whole_layers_on_either_device_give_the_same_bits(
    make_source: Callable[..., Any], fmt: BlockFormat, homes: tuple[Tier, ...], ends: tuple[Tier, Tier]
) -> None:
    """Both sides run the same kernels, and nothing is permuted where nothing is cut."""
    source = make_source(fmt)
    plain = run(load_transformer(source, CpuOps(1))[0], (5,))
    layers = tuple(LayerSeat(home, NEURONS if home is VRAM else 0, NEURONS) for home in homes)
    memory, tally = two_devices(), Tally()
    transformer, _ = load_transformer(source, memory, seats=Seating(*ends, layers), order=random_order())
    np.testing.assert_array_equal(run(transformer, (5,), tally), plain)
    path = [ends[0], *homes, ends[1]]
    assert tally.crossings == sum(a is not b for a, b in pairwise(path))
    memory.close()


def test_a_split_gives_the_same_bits_with_any_number_of_threads(make_source: Callable[..., Any]) -> None:
    source, results = make_source(Q8_0), []
    for threads in (1, 2, 3):
        memory = two_devices(lambda threads=threads: CpuOps(threads))
        transformer, _ = load_transformer(source, memory, seats=seating(VRAM, 32), order=random_order())
        results += [run(transformer), run(transformer)]
        memory.close()
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_the_depth_of_everything_is_no_split(make_source: Callable[..., Any]) -> None:
    source = make_source(F16)
    plain = run(load_transformer(source, CpuOps(1))[0])
    memory = two_devices()
    transformer, report = load_transformer(source, memory, seats=all_in(VRAM, LAYERS, NEURONS), order=random_order())
    np.testing.assert_array_equal(run(transformer), plain)
    assert report.mapped_bytes == 0
    assert memory.ledger.used(RAM) == 0
    memory.close()


def test_crossings_are_counted(make_source: Callable[..., Any]) -> None:
    """Each layer that is cut hands its input over and gets a sum back; both are as long as the residual stream."""
    memory, tally = two_devices(), Tally(timed=True)
    transformer, _ = load_transformer(make_source(F32), memory, seats=seating(RAM, 32))
    run(transformer, tally=tally)
    assert tally.crossings == 2 * LAYERS
    assert tally.crossed_bytes == 2 * LAYERS * TOKENS * 64 * 4
    assert {"attention ram", "ffn", "ffn hot", "ffn cold", "crossing", "head"} <= set(tally.seconds)
    memory.close()


def test_the_work_of_the_hot_side_is_told(make_source: Callable[..., Any]) -> None:
    memory = two_devices()
    transformer, _ = load_transformer(make_source(F32, RELU2), memory, seats=seating(RAM, 32), mode=Mode.DENSE)
    tokens = np.arange(3, dtype=np.int32)
    cache = KVCache(transformer.spec, transformer.ops, 3)
    result = transformer.step(tokens, (Segment(cache, 0, 3),), transformer.workspace(3))
    assert (result.work.up_rows, result.hot.up_rows) == (LAYERS * NEURONS, LAYERS * 32)
    assert 0 < result.hot.fired < result.work.fired
    memory.close()


class Watch:
    """Keeps what an observer is shown."""

    def __init__(self) -> None:
        self.hidden: list[np.ndarray] = []
        self.active: list[np.ndarray | None] = []

    def ffn_input(self, layer: int, residual: np.ndarray, normed: np.ndarray) -> None: ...

    def ffn_active(self, layer: int, active: Any) -> None:
        self.active.append(active.indices)

    def ffn_hidden(self, layer: int, hidden: np.ndarray) -> None:
        self.hidden.append(hidden.copy())


@pytest.mark.parametrize("kind", [SILU, RELU, RELU2], ids=["silu", "relu", "relu2"])
def test_observers_see_neurons_by_the_numbers_of_the_file(make_source: Callable[..., Any], kind: FfnKind) -> None:
    source, seen = make_source(F32, kind), []
    for cut in (False, True):
        memory = two_devices()
        seats = seating(RAM, 32 if cut else 0)
        transformer, _ = load_transformer(source, memory, seats=seats, order=random_order())
        cache = KVCache(transformer.spec, transformer.ops, 5, CacheType.F32, CacheType.F32)
        watch = Watch()
        workspace = transformer.workspace(5, observed=True)
        transformer.step(np.arange(5, dtype=np.int32), (Segment(cache, 0, 5),), workspace, observer=watch)
        seen.append(watch)
        memory.close()
    np.testing.assert_array_equal(seen[0].hidden[0], seen[1].hidden[0])  # the first layer has had the same input
    np.testing.assert_allclose(seen[0].hidden[1], seen[1].hidden[1], rtol=0, atol=tolerance(seen[0].hidden[1]))


def test_the_ledger_is_what_the_arenas_hold(make_source: Callable[..., Any]) -> None:
    memory = two_devices()
    transformer, report = load_transformer(make_source(Q8_0), memory, seats=seating(VRAM, 32, embedding=VRAM))
    arrays = memory.arrays(Purpose.ACTIVATIONS)
    workspace = transformer.workspace(TOKENS, arrays=arrays)
    assert memory.is_true
    ledger, record = memory.ledger, 3 * (64 // 32 * 34)
    assert ledger.used(VRAM, Purpose.FFN) == LAYERS * 32 * record
    assert ledger.used(RAM, Purpose.FFN) == LAYERS * (NEURONS - 32) * record
    assert ledger.used(VRAM) == memory.arenas[VRAM].held
    assert memory.arenas[VRAM].claimed == 0
    assert report.resident_bytes > 0
    del workspace
    memory.close()
    assert not ledger.rows()


def test_a_budget_that_is_too_small_is_refused_with_all_that_is_missing(make_source: Callable[..., Any]) -> None:
    memory = two_devices(budgets={VRAM: 1000})
    with pytest.raises(BudgetError) as refusal:
        load_transformer(make_source(F32), memory, seats=seating(RAM, 32))
    wanted = LAYERS * 32 * 3 * 64 * 4
    assert refusal.value.missing == wanted - 1000
    assert f"{wanted:,} bytes" in str(refusal.value)
    assert not memory.ledger.rows()


def test_every_failing_allocation_leaves_nothing_behind(make_source: Callable[..., Any]) -> None:
    """The Nth allocation fails, N from the first to the last; then the same memory loads and runs."""
    source, seats, order = make_source(Q8_0), seating(VRAM, 32, head=VRAM), random_order()
    calls = failing = 0

    def make(arrays: Any, shape: tuple[int, ...], dtype: str) -> Any:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise MemoryError
        return arrays.array(shape, dtype)

    memory = two_devices(make=make)

    def load() -> Transformer:
        transformer, _ = load_transformer(source, memory, seats=seats, order=order)
        transformer.workspace(TOKENS, arrays=memory.arrays(Purpose.ACTIVATIONS))
        return transformer

    expected = run(load())
    count = calls
    memory.close()
    assert count > 20
    for failing in range(1, count + 1):  # noqa: B007  # `make` reads it
        calls = 0
        with pytest.raises(AllocationError, match="refused"):
            load()
        memory.close()  # the workspace is its maker's to give back
        assert not memory.ledger.rows()
        assert all(arena.held == arena.claimed == 0 for arena in memory.arenas.values())
    failing = 0
    np.testing.assert_array_equal(run(load()), expected)
    memory.close()


def test_an_error_on_one_side_waits_for_the_other_and_leaves_the_engine_usable(make_source) -> None:
    class Breaking(ReferenceOps):
        broken = False

        def ffn(self, *arguments: Any, **more: Any) -> Any:
            if self.broken:
                raise UsageError("the device broke")
            return super().ffn(*arguments, **more)

    ops = [Breaking(), Breaking()]
    memory = Memory({VRAM: EmulatedDevice(ops[0]), RAM: Host(ops[1])}, {VRAM: LARGE})
    transformer, _ = load_transformer(make_source(F32), memory, seats=seating(RAM, 32))
    expected = run(transformer)
    for one in ops:
        one.broken = True
        with pytest.raises(UsageError, match="broke"):
            run(transformer)
        one.broken = False
        np.testing.assert_array_equal(run(transformer), expected)
    memory.close()


def test_cuts_inside_a_block_and_missing_tiers_are_refused(make_source: Callable[..., Any]) -> None:
    source = make_source(Q8_0, SILU)
    with pytest.raises(UsageError, match="multiples of 32"):
        load_transformer(source, two_devices(), seats=seating(RAM, 33))
    with pytest.raises(UsageError, match="no device has it"):
        load_transformer(source, CpuOps(1), seats=seating(RAM, 32))
    layers = (LayerSeat(RAM, 0, 64),) * LAYERS
    with pytest.raises(UsageError, match="no disk tier"):
        load_transformer(source, CpuOps(1), seats=Seating(RAM, RAM, layers))
    with pytest.raises(UsageError, match="does not seat"):
        load_transformer(source, CpuOps(1), seats=all_in(RAM, 3, NEURONS))
