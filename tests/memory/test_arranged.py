"""Loading what is computed faster in a format that only memory has: copied there, accounted for, and of no effect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.memory.test_loader import logits_of
from thermocline import _native
from thermocline.activity.predictor import Predictor, PredictorLayer
from thermocline.config import CacheType, Mode
from thermocline.errors import AllocationError, HardwareError
from thermocline.files.formats import F32, Q4_0, Q4_K, BlockFormat
from thermocline.files.mapped import map_file
from thermocline.files.quantize import from_float
from thermocline.files.weight import PickedWeight, Weight
from thermocline.hardware.machine import Tier
from thermocline.memory import huge_pages
from thermocline.memory.allocator import BufferedAllocator, Source
from thermocline.memory.arena import Memory
from thermocline.memory.kv_cache import KVCache
from thermocline.memory.loader import load_transformer
from thermocline.model.network import Segment
from thermocline.model.workspace import Workspace
from thermocline.ops.contract import Activation, FfnKind
from thermocline.ops.cpu import APART, ARRANGED, CpuOps
from thermocline.ops.device import EmulatedDevice, Host
from thermocline.placement.ledger import Purpose
from thermocline.placement.seats import LayerSeat, Seating

pytestmark = pytest.mark.skipif(_native.isa_levels() == ["baseline"], reason="the baseline arranges nothing")

SILU, RELU = (FfnKind(activation, gated=True) for activation in (Activation.SILU, Activation.RELU))
PLAIN = FfnKind(Activation.RELU, gated=False)
FFN, ATTENTION, OUTPUT = Purpose.FFN, Purpose.ATTENTION, Purpose.OUTPUT
GIB = 1 << 30


def numbers_of(transformer: Any) -> list[int]:
    """The ggml numbers of all matrices in RAM, negative for formats that only memory has."""
    found = [transformer.embedding.ggml_type]
    for layer in transformer.layers:
        found += [matrix.ggml_type for matrix in (*layer.qkv, *layer.out)]
        for part in layer.ffn.parts:
            if part.device.tier is Tier.RAM:
                found += [m.ggml_type for m in (part.block.gate, part.block.up, part.block.down) if m is not None]
    return found


@pytest.mark.parametrize("fmt", [Q4_0, Q4_K], ids=lambda f: f.name)
@pytest.mark.parametrize("records", [False, True])
def test_a_loaded_network_gives_the_same_bits(make_source: Callable[..., Any], fmt: BlockFormat, records: bool) -> None:
    """Whether rows lie in a file, are transposed on their way, or have columns that do not fit."""
    source = make_source(fmt, records=records, n_embd=512, n_ff=96)
    before = {name: weight.data.copy() for name, weight in source.weights.items()}
    plain, mapped = load_transformer(source, CpuOps(1), mapped=True)
    memory = Memory.of_host(CpuOps(1))
    arranged, copied = load_transformer(source, memory)
    np.testing.assert_array_equal(logits_of(arranged), logits_of(plain))
    assert min(numbers_of(plain)) >= 0
    assert numbers_of(arranged).count(ARRANGED[fmt].ggml_type) >= len(numbers_of(arranged)) - 2
    assert memory.is_true
    total = mapped.mapped_bytes + mapped.resident_bytes
    assert copied.mapped_bytes + copied.resident_bytes == total
    assert copied.mapped_bytes < mapped.mapped_bytes
    assert all((weight.data == before[name]).all() for name, weight in source.weights.items())
    memory.close()
    assert memory.ledger.used(Tier.RAM) == 0


def test_a_standard_down_projection_is_arranged_where_its_rows_fit(make_source: Callable[..., Any]) -> None:
    source = make_source(Q4_0, SILU, n_embd=512, n_ff=1024)
    plain, arranged = (load_transformer(source, CpuOps(1), mapped=mapped)[0] for mapped in (True, None))
    assert set(numbers_of(arranged)) == {ARRANGED[Q4_0].ggml_type}
    np.testing.assert_array_equal(logits_of(arranged), logits_of(plain))


APART_NUMBER = APART[Q4_0].ggml_type
ARRANGED_NUMBER = ARRANGED[Q4_0].ggml_type


@pytest.mark.parametrize(
    ("mode", "kind", "numbers"),
    [
        (Mode.DENSE, RELU, (ARRANGED_NUMBER, ARRANGED_NUMBER, ARRANGED_NUMBER)),
        (Mode.EXACT, RELU, (ARRANGED_NUMBER, APART_NUMBER, APART_NUMBER)),
        (Mode.EXACT, PLAIN, (None, ARRANGED_NUMBER, APART_NUMBER)),
        (Mode.PREDICTED, RELU, (APART_NUMBER, APART_NUMBER, APART_NUMBER)),
        (Mode.PREDICTED, PLAIN, (None, APART_NUMBER, APART_NUMBER)),
    ],
)
def test_neurons_lie_as_their_mode_reads_them(
    make_source: Callable[..., Any], mode: Mode, kind: FfnKind, numbers: tuple[int | None, ...]
) -> None:
    """Those that are read one here, one there, in lines that are jumped between."""
    source = make_source(Q4_0, kind, records=True, n_embd=1024, n_ff=96)
    rng = np.random.default_rng(5)
    fc1, fc2 = (
        from_float("fc", rng.standard_normal(shape).astype(np.float32), F32) for shape in ((32, 1024), (96, 32))
    )
    predictor = Predictor((PredictorLayer(fc1, fc2),) * 2, (0.0, 0.0), {})
    ops, logits = CpuOps(1, fetching="second"), []
    for mapped in (True, None):
        transformer, _ = load_transformer(source, ops, mode=mode, predictor=predictor, mapped=mapped)
        cache = KVCache(transformer.spec, ops, 1, CacheType.F32, CacheType.F32)
        workspace = Workspace(transformer.spec, ops, 1, scored=transformer.scored)
        step = transformer.step(np.array([3], np.int32), (Segment(cache, 0, 1),), workspace)
        logits.append(step.logits.copy())
    np.testing.assert_array_equal(logits[1], logits[0])
    for layer in transformer.layers:
        (block,) = (part.block for part in layer.ffn.parts)
        matrices = (block.gate, block.up, block.down)
        assert tuple(None if matrix is None else matrix.ggml_type for matrix in matrices) == numbers
        assert {matrix.ggml_type for matrix in (*layer.qkv, *layer.out)} == {ARRANGED_NUMBER}


def test_what_the_user_or_memory_forbids(make_source: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """--mmap, a budget of RAM, or no room for the copy beside the file; --no-mmap needs room for the copy alone."""
    source = make_source(Q4_0, records=True, n_embd=512)
    total = sum(weight.nbytes for weight in source.weights.values() if weight.rows > 1)

    def arranged(free: int, budgets: dict[Tier, int], mapped: bool | None, aside: int = 0) -> bool:
        monkeypatch.setattr(huge_pages, "find_memory", lambda: SimpleNamespace(
            available=free, usable=free, huge_pages="never",
        ))  # fmt: skip
        memory = Memory({Tier.RAM: Host(CpuOps(1))}, budgets)
        transformer, _ = load_transformer(source, memory, mapped=mapped, aside=aside)
        return min(numbers_of(transformer)) < 0

    assert arranged(2 * total, {}, None)
    assert not arranged(2 * total - 1, {}, None)
    assert not arranged(2 * total, {}, None, aside=1)
    assert arranged(total, {}, False)
    assert not arranged(GIB, {}, True)
    assert not arranged(GIB, {Tier.RAM: GIB}, None)


@pytest.mark.parametrize("records", [True, False])
@pytest.mark.parametrize("hot", [0, 512])
def test_neurons_that_travel_to_the_gpu_keep_the_files_bytes(
    make_source: Callable[..., Any], records: bool, hot: int
) -> None:
    source = make_source(Q4_0, RELU if records else SILU, records=records, n_embd=512, n_ff=1024)
    seats = Seating(Tier.RAM, Tier.RAM, (LayerSeat(Tier.RAM, hot, 1024),) * 2)
    for sent_from, numbers in (((0, 0), {-1}), ((4, 4), {2}), ((4, 0), {2, -1})):
        memory = Memory({Tier.VRAM: EmulatedDevice(CpuOps(1)), Tier.RAM: Host(CpuOps(1))}, {Tier.VRAM: GIB})
        transformer, _ = load_transformer(source, memory, seats=seats, sent_from=sent_from)
        cold = [part.block for layer in transformer.layers for part in layer.ffn.parts if part.device.tier is Tier.RAM]
        for kind in ("gate", "up", "down"):
            assert {getattr(block, kind).ggml_type for block in cold} == numbers
        assert [layer.ffn.sent is not None for layer in transformer.layers] == [tokens > 0 for tokens in sent_from]
        assert memory.is_true
        memory.close()


def random_weight(rows: int, columns: int = 512) -> Weight:
    data = np.random.default_rng(rows).integers(0, 256, (rows, Q4_0.row_bytes(columns)), np.uint8)
    return Weight(f"w{rows}", Q4_0, (rows, columns), data)


def rows_of(slot: Any) -> np.ndarray:
    """What was arranged, as in a file."""
    assert slot.matrix.ggml_type == ARRANGED[Q4_0].ggml_type
    groups = slot.arranged.reshape(slot.count, -1, 288)
    scales, numbers = groups[..., :32].reshape(-1, 16, 2), groups[..., 32:].reshape(-1, 16, 16)
    return np.concatenate([scales, numbers], axis=2).reshape(slot.count, -1)


def test_rows_are_those_that_were_asked_for() -> None:
    memory = Memory.of_host(CpuOps(2))
    allocator, weight, order = BufferedAllocator(memory), random_weight(9), np.array([7, 0, 3], np.int32)
    made = Source(weight, lambda out: out.__setitem__(slice(None), weight.data[::-1]))
    picked = PickedWeight("picked", weight, np.array([1, 1, 8]))
    slots = [
        allocator.queue(weight, Tier.RAM, FFN),
        allocator.queue(weight, Tier.RAM, FFN, rows=slice(2, 6)),
        allocator.queue(weight, Tier.RAM, ATTENTION, rows=order),
        allocator.queue(made, Tier.RAM, FFN),
        allocator.queue(picked, Tier.RAM, ATTENTION),
    ]
    kept = allocator.queue(weight, Tier.RAM, OUTPUT, as_stored=True)
    narrow = allocator.queue(random_weight(4, 256), Tier.RAM, OUTPUT)
    assert allocator.ram_bytes == sum(slot.nbytes for slot in (*slots, kept, narrow))
    assert allocator.arrange() == sum(slot.nbytes for slot in slots)
    done = allocator.flush()
    wanted = weight.data, weight.data[2:6], weight.data[order], weight.data[::-1], weight.data[[1, 1, 8]]
    for slot, rows in zip(slots, wanted, strict=True):
        np.testing.assert_array_equal(rows_of(slot), rows)
    assert kept.matrix.ggml_type == narrow.matrix.ggml_type == Q4_0.ggml_type
    assert kept.host is weight.data
    assert done.copied == {FFN: (9 + 4 + 9) * 288, ATTENTION: (3 + 3) * 288}
    assert done.mapped == {OUTPUT: kept.nbytes + narrow.nbytes}
    assert (
        sum(view.nbytes for view in done.host_bytes)
        == done.moved
        == memory.arenas[Tier.RAM].held + sum(done.mapped.values())
    )
    assert memory.is_true


def test_memory_that_is_refused_leaves_nothing_allocated() -> None:
    made = list[Any]()

    def refuse(arrays: Any, shape: tuple[int, ...], dtype: str) -> Any:
        if made:
            raise MemoryError
        made.append(shape)
        return arrays.array(shape, dtype)

    memory = Memory({Tier.RAM: Host(CpuOps(1))}, {}, refuse)
    allocator = BufferedAllocator(memory)
    for purpose in (FFN, ATTENTION):
        allocator.queue(random_weight(5), Tier.RAM, purpose)
    with pytest.raises(AllocationError):
        allocator.arrange()
    assert made == [(5 * 288,)]
    assert memory.ledger.used(Tier.RAM) == 0


def test_a_file_that_becomes_shorter_meanwhile_is_an_error(
    make_source: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, path = make_source(Q4_0, records=True, n_embd=512), tmp_path / "rows"
    weight = source.weights["blk.1.ffn_up.weight"]
    path.write_bytes(weight.data.tobytes())
    rows = map_file(path).view(0, weight.nbytes).reshape(weight.data.shape)
    weights = {**source.weights, weight.name: Weight(weight.name, Q4_0, weight.shape, rows)}
    monkeypatch.setattr("thermocline.memory.loader.touch", lambda *_: path.write_bytes(b""))
    memory = Memory.of_host(CpuOps(1))
    with pytest.raises(HardwareError, match="became shorter"):
        load_transformer(type(source)(source.metadata, weights), memory)
    assert memory.ledger.used(Tier.RAM) == 0


def in_memory_of(path: Path) -> int:
    """Bytes of a mapped file that count as this process's."""
    counts, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(" ")
        if not name.endswith(":"):
            counts = line.endswith(str(path))
        elif counts and name == "Rss:":
            total += int(value.split()[0]) << 10
    return total


def test_what_was_copied_is_not_held_twice(make_source: Callable[..., Any], tmp_path: Path) -> None:
    """The file's own pages go, whole ones of its own; they are read again for whoever asks."""
    source, path = make_source(Q4_0, records=True, n_embd=512), tmp_path / "rows"
    names = [f"blk.{layer}.{part}.weight" for layer in (0, 1) for part in ("attn_q", "ffn_up", "ffn_down_t")]
    path.write_bytes(b"".join(source.weights[name].data.tobytes() for name in names))
    mapped, at, weights = map_file(path), 0, dict(source.weights)
    for name in names:
        like = source.weights[name]
        rows = mapped.view(at, at + like.nbytes).reshape(like.data.shape)
        weights[name], at = Weight(name, like.format, like.shape, rows), at + like.nbytes
    mapped_source, held = type(source)(source.metadata, weights, path=path), dict[bool | None, int]()
    logits = {}
    for how in (True, None):
        transformer, _ = load_transformer(mapped_source, CpuOps(1), mapped=how)
        logits[how] = logits_of(transformer)
        held[how] = in_memory_of(path)
    assert held[True] > at - 8192
    assert held[None] <= 2 * len(names) * 4096
    np.testing.assert_array_equal(logits[None], logits[True])
    assert all((weights[name].data == source.weights[name].data).all() for name in names)
