"""Neurons on disk compute what neurons in memory compute, and faults leave nothing behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thermocline import _native
from thermocline.activity.predictor import load_predictor
from thermocline.config import CacheType, Mode
from thermocline.errors import BudgetError, HardwareError, ModelFormatError, UsageError
from thermocline.files.companion import companion
from thermocline.files.formats import F32
from thermocline.files.open import open_model
from thermocline.files.quantize import from_float
from thermocline.files.sidecar import SidecarKind
from thermocline.hardware.machine import ReadCurve, Tier
from thermocline.hardware.reader import Reader
from thermocline.memory.arena import Memory
from thermocline.memory.bundle import bundle_path, layer_matrices, read_bundle, write_bundle
from thermocline.memory.convert import convert
from thermocline.memory.disk_store import DiskStore
from thermocline.memory.first_rows import FirstRows
from thermocline.memory.kv_cache import KVCache
from thermocline.memory.loader import load_transformer
from thermocline.memory.pieces import PieceStream
from thermocline.memory.reads import Way, merged, place_of
from thermocline.memory.record_cache import RecordCache
from thermocline.model.network import Outputs, Segment, Transformer
from thermocline.ops.contract import ALL, Activation, ActiveSet, FfnKind
from thermocline.ops.cpu import CpuOps
from thermocline.ops.device import Host
from thermocline.placement.seats import LayerSeat, Seating

RAM = Tier.RAM
LAYERS, NEURONS, TOKENS, RECORD = 2, 96, 10, 2 * 68
LARGE = 1 << 24
LEVEL = [isa for isa in _native.isa_levels() if isa != "amx"][-1]
"""The best level at which a batch has the bits of single tokens."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model with its neurons as records."""
    path = tmp_path_factory.mktemp("records") / "records.gguf"
    source = open_model(tiny_model)
    convert(source, path, None, records=True)
    source.close()
    return path


class Loaded:
    """A network with `warm` neurons of each layer in RAM, the rest on disk with room for `slots`."""

    def __init__(
        self,
        path: Path,
        warm: int,
        slots: int,
        order: np.ndarray | None = None,
        mode: Mode = Mode.EXACT,
        predictor: Any = None,
        **how: Any,
    ) -> None:
        self.memory = Memory({RAM: Host(CpuOps(1, LEVEL))}, {RAM: LARGE})
        self.store = DiskStore(self.memory, slots * RECORD, Way(64), **how)
        self.source = open_model(path)
        seats = Seating(RAM, RAM, (LayerSeat(RAM, 0, warm),) * LAYERS)
        self.network, _ = load_transformer(
            self.source, self.memory, mode=mode, seats=seats, order=order, store=self.store, predictor=predictor
        )

    def close(self) -> None:
        self.store.close()
        self.source.close()
        self.memory.close()


def run(network: Transformer, splits: tuple[int, ...] = ()) -> np.ndarray:
    cache = KVCache(network.spec, network.ops, TOKENS, CacheType.F32, CacheType.F32)
    workspace = network.workspace(TOKENS)
    tokens, rows = np.arange(TOKENS, dtype=np.int32), []
    for start, stop in zip((0, *splits), (*splits, TOKENS), strict=True):
        result = network.step(tokens[start:stop], (Segment(cache, start, stop - start),), workspace, Outputs.ALL)
        rows.append(result.logits.copy())
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def plain(file: Path) -> np.ndarray:
    with open_model(file) as source:
        return run(load_transformer(source, CpuOps(1, LEVEL), mode=Mode.EXACT)[0])


def order() -> np.ndarray:
    rng = np.random.default_rng(3)
    return np.stack([rng.permutation(NEURONS) for _ in range(LAYERS)]).astype(np.int32)


@pytest.mark.parametrize("slots", [2, 7, 96, 300])
def test_all_on_disk_gives_the_same_logits(file: Path, plain: np.ndarray, slots: int) -> None:
    """One slice of all neurons and one cache that holds them: the same sum, bit for bit; else associated otherwise."""
    loaded = Loaded(file, 0, slots)
    for splits in ((), (3,), (4, 5, 6)):
        found = run(loaded.network, splits)
        if slots >= NEURONS:
            np.testing.assert_array_equal(found, plain)
        else:
            np.testing.assert_allclose(found, plain, rtol=0, atol=np.abs(plain).max() * NEURONS * 2.0**-24 * 100)
    assert loaded.store.slots == slots
    assert loaded.store.stats.requests > 0
    assert (loaded.store.hit_rate > 0.5) == (slots > NEURONS * LAYERS)
    assert loaded.memory.is_true
    loaded.close()


@pytest.mark.parametrize("ordered", [False, True])
def test_hot_neurons_in_ram_and_cold_ones_on_disk(file: Path, plain: np.ndarray, ordered: bool) -> None:
    for warm, slots in ((32, 5), (90, 100)):
        loaded = Loaded(file, warm, slots, order() if ordered else None)
        first = run(loaded.network, (1, 2, 3))
        np.testing.assert_allclose(first, plain, rtol=0, atol=np.abs(plain).max() * NEURONS * 2.0**-24 * 100)
        # What was cached, and where, is not in the result.
        np.testing.assert_array_equal(run(loaded.network, (1, 2, 3)), first)
        loaded.close()


@pytest.mark.parametrize(("warm", "slots"), [(0, 96), (0, 7), (60, 20), (80, 96)])
def test_first_rows_tell_which_records_are_needed(
    file: Path, plain: np.ndarray, warm: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of few tokens give the same logits from fewer records; the whole matrix is read, or single rows of it."""
    monkeypatch.setattr(FirstRows, "pay", lambda *_: True)  # half of this model's neurons fire
    splits, asked = tuple(range(1, TOKENS)), []
    for scanner in (None, PieceStream()):
        loaded = Loaded(file, warm, slots, order(), scanner=scanner)
        if scanner is not None:
            scanner.reserve(loaded.memory)
        found = run(loaded.network, splits)
        np.testing.assert_allclose(found, plain, rtol=0, atol=np.abs(plain).max() * NEURONS * 2.0**-24 * 100)
        first = 0 if scanner is None else scanner.stats.nbytes
        assert (first > 0) == (scanner is not None)
        asked.append(loaded.store.uses.asked)
        loaded.close()
    assert asked[1] < asked[0]


@pytest.mark.parametrize("gated", [True, False])
def test_what_first_rows_let_through_is_what_fires_there(gated: bool) -> None:
    rng = np.random.default_rng(4)
    values = rng.standard_normal((NEURONS, 64), dtype=np.float32)
    weight, ops = from_float("first", values, F32), CpuOps(1, LEVEL)
    bias = None if gated else rng.standard_normal(NEURONS).astype(np.float32)

    class Memory:
        """A matrix in memory, by pieces and by rows."""

        def matrix(self, weight: Any) -> Any:
            return weight

        def pieces(self, matrix: Any) -> Any:
            return ((start, matrix.data[start : start + 10]) for start in range(0, NEURONS, 10))

        def rows(self, matrix: Any, numbers: np.ndarray, way: Way) -> Any:
            return (matrix.data[numbers[start : start + 4]] for start in range(0, len(numbers), 4))

    kind = FfnKind(Activation.RELU, gated=gated, threshold=0.25)
    first = FirstRows(Memory(), weight, kind, Host(ops), Way(0))
    x = rng.standard_normal((2, 64), dtype=np.float32)
    for count in (NEURONS, 70, 20, 1, 0):
        numbers = rng.permutation(NEURONS)[:count]
        mine = None if bias is None else bias[numbers]
        products = x @ values[numbers].T + (0 if mine is None else mine)
        places, rows = first.let_through(x, numbers, mine)
        np.testing.assert_array_equal(places, np.flatnonzero((products > 0.25).any(axis=0)))
        np.testing.assert_array_equal(rows, weight.data[numbers[places]])
    assert first.pay(1 << 20)
    assert not first.pay(64)
    x[0, 0] = np.nan
    assert len(first.let_through(x, np.arange(NEURONS), None)[0]) == NEURONS


def test_what_does_not_fit_or_has_no_records_is_refused(file: Path, tiny_model: Path) -> None:
    with pytest.raises(BudgetError, match="ram"):
        Loaded(file, 0, 1)
    with pytest.raises(UsageError, match="convert"):
        Loaded(tiny_model, 0, 50)


class Faulty:
    """A reader whose nth request fails when it is waited for."""

    def __init__(self, path: Path, nth: int) -> None:
        self._real = Reader(path, depth=2, largest=1 << 18)
        self._nth, self._count = nth, 0
        self._bad: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def largest(self) -> int:
        return self._real.largest

    @property
    def stats(self):
        return self._real.stats

    def submit(self, requests, parts, out) -> int:
        ticket = self._real.submit(requests, parts, out)
        self._count += 1
        if self._count == self._nth:
            self._bad[ticket] = (parts, out)
        return ticket

    def wait(self, ticket: int) -> None:
        self._real.wait(ticket)
        if ticket in self._bad:
            parts, out = self._bad.pop(ticket)
            for _, size, place in parts:
                out[place : place + size] = 0xFF  # whatever a disk leaves behind
            raise HardwareError("Input/output error")

    def close(self) -> None:
        self._real.close()


@pytest.mark.parametrize("slots", [10, 96])
def test_every_nth_read_failing_ends_that_run_only(file: Path, plain: np.ndarray, slots: int) -> None:
    nth, failures = 1, 0
    while True:
        loaded = Loaded(file, 32, slots, open_reader=lambda path, nth=nth: Faulty(path, nth))
        before = loaded.memory.ledger.used(RAM)
        try:
            run(loaded.network, (3, 4))
        except HardwareError:
            failures += 1
        else:
            loaded.close()
            break
        again = run(loaded.network, (3, 4))
        np.testing.assert_allclose(again, plain, rtol=0, atol=np.abs(plain).max() * NEURONS * 2.0**-24 * 100)
        assert loaded.memory.ledger.used(RAM) == before
        loaded.close()
        nth += 1
    assert failures >= 3


@pytest.fixture
def predicted(file: Path, with_predictor: Callable[..., Path]) -> Path:
    """The model with a predictor that is always right."""
    return with_predictor(file)


def oracle(path: Path) -> Any:
    with open_model(path) as source:
        return load_predictor(companion(path, SidecarKind.PREDICTOR), source.fingerprint)


def with_oracle(path: Path, slots: int, **how: Any) -> Loaded:
    return Loaded(path, 0, slots, mode=Mode.PREDICTED, predictor=oracle(path), **how)


@pytest.mark.parametrize("slots", [2, 30, 60, 110, 300])
def test_the_next_layers_records_are_read_ahead(predicted: Path, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, with what was foreseen rightly and wrongly, however little room there is."""
    splits = tuple(range(1, TOKENS))
    with open_model(predicted) as source:
        whole, _ = load_transformer(source, CpuOps(1, LEVEL), mode=Mode.PREDICTED, predictor=oracle(predicted))
        plain = run(whole, splits)
    foreseen: list[int] = []
    real = RecordCache.claim_ahead

    def claim_ahead(cache: RecordCache, layer: int, records: np.ndarray, most: int) -> Any:
        found = real(cache, layer, records, most)
        assert len(found[0]) <= max(0, most)
        foreseen.append(len(found[0]))
        return found

    monkeypatch.setattr(RecordCache, "claim_ahead", claim_ahead)
    loaded = with_oracle(predicted, slots)
    for _ in range(2):
        found = run(loaded.network, splits)
        if slots >= NEURONS:
            np.testing.assert_array_equal(found, plain)
        else:
            np.testing.assert_allclose(found, plain, rtol=0, atol=np.abs(plain).max() * NEURONS * 2.0**-24 * 100)
        (pool,) = loaded.store._pools.values()
        held = [slot for rows in pool.cache.rows for slot in rows.tolist() if slot >= 0]
        pending = sum(len(layer._ahead.missing) for layer in loaded.store._layers if layer._ahead is not None)
        assert len(set(held)) == len(held) == slots - pool.cache.free - pending
    assert len(foreseen) == 2 * TOKENS * (LAYERS - 1)
    assert (sum(foreseen) > 0) == (slots >= 60)
    loaded.close()


def test_every_nth_read_failing_with_reads_ahead(predicted: Path) -> None:
    splits, nth, failures = tuple(range(1, TOKENS)), 1, 0
    whole = with_oracle(predicted, 60)
    plain = run(whole.network, splits)
    whole.close()
    while True:
        loaded = with_oracle(predicted, 60, open_reader=lambda path, nth=nth: Faulty(path, nth))
        try:
            run(loaded.network, splits)
        except HardwareError:
            failures += 1
        else:
            loaded.close()
            break
        np.testing.assert_allclose(
            run(loaded.network, splits), plain, rtol=0, atol=np.abs(plain).max() * NEURONS * 2.0**-24 * 100
        )
        loaded.close()
        nth += 1
    assert failures >= 3


def test_a_file_cut_short_and_mended(file: Path, plain: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(file, path)
    loaded = Loaded(path, 0, 8)
    whole = path.read_bytes()
    os.truncate(path, 5000)
    free = [len(pool.cache._free) for pool in loaded.store._pools.values()]
    with pytest.raises(HardwareError, match="ends early"):
        # Not through the network: its mapped embedding has lost its bytes too.
        loaded.network.layers[0].ffn.parts[0].ffn(
            np.zeros((1, 64), np.float32), ALL, np.zeros((1, 64), np.float32), skip_zeros=True
        )
    assert [len(pool.cache._free) for pool in loaded.store._pools.values()] == free
    with path.open("r+b") as same:
        same.write(whole)
    np.testing.assert_allclose(run(loaded.network), plain, rtol=0, atol=np.abs(plain).max() * NEURONS * 2.0**-24 * 100)
    loaded.close()


def test_a_removed_file_is_still_read(file: Path, plain: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(file, path)
    loaded = Loaded(path, 0, 96)
    path.unlink()
    np.testing.assert_array_equal(run(loaded.network), plain)
    loaded.close()


def test_a_file_replaced_while_loading_is_refused(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(file, path)
    source = open_model(path)
    weight = source.weights["blk.0.ffn_up.weight"]
    place = place_of(weight)
    assert path.read_bytes()[place.offset : place.offset + 68] == weight.data[0].tobytes()
    shutil.copy(file, tmp_path / "other")
    (tmp_path / "other").replace(path)
    with pytest.raises(HardwareError, match="replaced"):
        place_of(weight)
    source.close()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 90)), min_size=1, max_size=40),
    st.integers(0, 100),
    st.integers(10, 200),
)
def test_merged_requests_cover_all_pieces(pieces: list[tuple[int, int]], gap: int, largest: int) -> None:
    """Pieces apart from one another, in any order: covered once, near ones together, no request too long."""
    apart, end = [], 0
    for skip, size in pieces:
        apart.append((end + skip, size, end))
        end += skip + size
    order = np.random.default_rng(len(pieces)).permutation(len(apart))
    requests, parts = merged(np.array(apart, np.int64)[order], Way(gap, largest))
    assert (requests[:, 1] <= largest).all()
    assert requests[:, 2].sum() == len(parts)
    assert parts[:, 1].sum() == sum(size for _, size, _ in apart)
    at = 0
    for offset, size, count in requests:
        mine = parts[at : at + count]
        assert (mine[:, 0] >= offset).all()
        assert (mine[:, 0] + mine[:, 1] <= offset + size).all()
        assert (mine[1:, 0] - (mine[:-1, 0] + mine[:-1, 1]) <= gap).all()
        at += count
    wanted = {(o + i, p + i) for o, s, p in apart for i in range(s)}
    assert {(o + i, p + i) for o, s, p in parts.tolist() for i in range(s)} == wanted


def test_the_gap_follows_the_curve() -> None:
    assert Way.of(None).gap == 0
    slow = Way.of(ReadCurve(((4096, 4096 / 5e-3), (1 << 20, 150e6))))  # a turning disk: 5 ms to begin
    fast = Way.of(ReadCurve(((4096, 2e9), (1 << 20, 7e9))))
    flat = Way.of(ReadCurve(((4096, 3e8), (64 << 10, 14e8), (1 << 20, 18e8))))
    assert (slow.largest, fast.largest, flat.largest) == (256 << 10, 256 << 10, 64 << 10)
    assert slow.gap == slow.largest // 4
    assert 1000 < fast.gap < 40_000


def test_rows_are_read_alone_where_that_is_sooner_than_all_of_them() -> None:
    size, of = 4096, 1000
    quick = Way.of(ReadCurve(((4096, 2e9), (1 << 20, 4e9))))  # a read costs a microsecond to begin
    turning = Way.of(ReadCurve(((4096, 4096 / 5e-3), (1 << 20, 150e6))))
    every_tenth, most = np.arange(0, of, 10), np.flatnonzero(np.arange(of) % 20)
    assert quick.alone(every_tenth, of, size)
    assert not turning.alone(every_tenth, of, size)
    assert turning.alone(np.arange(3), of, size)
    assert not quick.alone(most, of, size)
    assert quick.alone(np.arange(700), of, size)  # together they lie
    assert Way(0).alone(np.arange(499), of, size)
    assert not Way(0).alone(np.arange(500), of, size)


def test_the_cache_keeps_what_is_used_often_and_lately() -> None:
    cache = RecordCache(20)
    layer = cache.add_layer(100)
    often = np.arange(5, dtype=np.int32)
    rng = np.random.default_rng(0)
    for _ in range(60):
        cache.step()
        wanted = np.unique(np.concatenate([often, rng.integers(5, 100, 6)])).astype(np.int32)
        missing, slots = cache.claim(layer, wanted)
        cache.fill(layer, missing, slots)
        rows = cache.rows[layer]
        held = rows[rows >= 0]
        assert len(set(held.tolist())) == len(held)
        assert (rows[wanted] >= 0).all()
        assert len(held) + len(cache._free) == 20
    assert cache.uses.found >= 59 * 5
    for _ in range(300):  # another kind of text: what was hot grows old
        cache.step()
        missing, slots = cache.claim(layer, np.arange(50, 62, dtype=np.int32))
        cache.fill(layer, missing, slots)
    missing, slots = cache.claim(layer, np.arange(62, 75, dtype=np.int32))
    assert (cache.rows[layer][:5] < 0).all()
    cache.give_back(slots)


def test_a_record_that_is_known_to_be_hot_stays_though_it_was_seen_once() -> None:
    """Both come in together; one is expected to come again, and outlives the other."""
    left = []
    for heat in (np.zeros(12), np.where(np.arange(12) == 0, 0.9, 0.0)):
        cache = RecordCache(8)
        layer = cache.add_layer(12)
        cache.rate(layer, heat)
        for first in (0, 2, 4, 6, 8):
            cache.step()
            missing, slots = cache.claim(layer, np.array([first, first + 1], np.int32))
            cache.fill(layer, missing, slots)
        left.append((cache.rows[layer][:2] >= 0).tolist())
    assert left[0][0] is False
    assert left[1] == [True, False]


def test_warming_up_reads_the_hottest_and_changes_nothing(file: Path, plain: np.ndarray) -> None:
    heat = np.random.default_rng(8).random((LAYERS, NEURONS))
    loaded = Loaded(file, 0, 110)
    filled = loaded.store.warm_up(heat)
    assert 100 <= filled <= 110
    (pool,) = loaded.store._pools.values()
    coldest = min(heat[layer][rows >= 0].min() for layer, rows in enumerate(pool.cache.rows))
    assert (heat > coldest).sum() <= filled
    for layer, rows in enumerate(pool.cache.rows):
        for name, start, size in zip(("up", "down_t"), pool.starts, pool.row_bytes, strict=True):
            stored = loaded.source.weights[f"blk.{layer}.ffn_{name}.weight"].data
            for record in np.flatnonzero(rows >= 0):
                at = start + rows[record] * size
                assert pool.memory[at : at + size].tobytes() == stored[record].tobytes()
    np.testing.assert_array_equal(run(loaded.network), plain)
    loaded.close()


def test_a_bundle_gives_the_same_bits_with_fewer_reads(file: Path, plain: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(file, path)
    target = bundle_path(path)
    with open_model(path) as source:
        layers = [layer_matrices(source.weights, layer) or [] for layer in range(LAYERS)]
        seen: list[tuple[int, int]] = []
        size = write_bundle(target, source.fingerprint, layers, lambda *at: seen.append(at))
        assert seen == [(1, 2), (2, 2)]
        assert target.stat().st_size == size
        bundle = read_bundle(target, source.fingerprint, layers)
        content = target.read_bytes()
        for layer, matrices in enumerate(layers):
            places = bundle.places(layer, [w.data.shape[1] for w in matrices])
            for place, weight in zip(places, matrices, strict=True):
                for row in (0, 1, NEURONS - 1):
                    at = place.offset + row * place.stride
                    assert content[at : at + weight.data.shape[1]] == weight.data[row].tobytes()
        with pytest.raises(ModelFormatError, match="another model"):
            read_bundle(target, "0" * 64, layers)
        with pytest.raises(ModelFormatError, match="another model"):
            read_bundle(target, source.fingerprint, layers[:1])
        standard = {name: source.weights[name] for name in source.weights if "down_t" not in name}
        assert layer_matrices(standard, 0) is None
        requests = []
        for bundled in (None, bundle):
            loaded = Loaded(path, 0, 96, bundle=bundled)
            some = ActiveSet(np.array([3, 40, 77], np.int32))
            x = np.zeros((1, 64), np.float32)
            loaded.network.layers[0].ffn.parts[0].ffn(x, some, x.copy(), skip_zeros=True)
            requests.append(loaded.store.stats.requests)
            np.testing.assert_array_equal(run(loaded.network, (2, 3)), plain)
            loaded.close()
        assert requests == [6, 3]
        for damage in (content[:-1], b"{}\n", b"", b"[" * 5000, content.replace(b"strides", b"stride_")):
            target.write_bytes(damage)
            with pytest.raises(ModelFormatError, match="remove"):
                read_bundle(target, source.fingerprint, layers)
