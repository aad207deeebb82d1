"""Ops on a tape compute what the ops themselves compute, with what the arrays hold when it plays."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

from thermocline.errors import HardwareError, UsageError
from thermocline.files.formats import F16, Q8_0
from thermocline.files.quantize import quantize
from thermocline.files.weight import Weight
from thermocline.ops.contract import ALL, Activation, ActiveSet, FfnKind, KVLayer, NeuronBlock
from thermocline.ops.cpu import CpuOps
from thermocline.ops.handover import ColdWorker, Mailbox
from thermocline.ops.tape import TapeOps, TapeSet

WIDTH, NEURONS, HEADS, DIM, CONTEXT, RANK = 64, 48, 4, 16, 8, 32
RELU = FfnKind(Activation.RELU, gated=True)


@pytest.fixture
def ops() -> CpuOps:
    return CpuOps(1)


class Layer:
    """The arrays of one token's way through a layer, and what is called on them."""

    def __init__(self, ops: CpuOps, fmt: Any = F16) -> None:
        rng = np.random.default_rng(1)

        def placed(rows: int, columns: int) -> Any:
            values = rng.standard_normal((rows, columns)).astype(np.float32)
            return ops.place(Weight("w", fmt, (rows, columns), quantize(values, fmt)))

        self.qkv = tuple(placed(WIDTH, WIDTH) for _ in range(3))
        self.fc1, self.fc2 = placed(RANK, WIDTH), placed(NEURONS, RANK)
        self.block = NeuronBlock(*(placed(NEURONS, WIDTH) for _ in range(3)), True, RELU, NEURONS)
        self.norm, self.bias = (rng.standard_normal(WIDTH).astype(np.float32) for _ in range(2))
        self.table = rng.standard_normal((CONTEXT, 2, DIM // 2)).astype(np.float32)
        self.cache = KVLayer(*(np.zeros((HEADS, CONTEXT, DIM), np.float16) for _ in range(2)))
        self.x, self.normed, self.mixed, self.out = (np.zeros((1, WIDTH), np.float32) for _ in range(4))
        self.heads = tuple(np.zeros((1, HEADS, DIM), np.float32) for _ in range(3))
        self.flat = tuple(head.reshape(1, WIDTH) for head in self.heads)
        self.scores, self.active = np.zeros((1, NEURONS), np.float32), np.zeros(NEURONS, np.int32)
        self.position = np.zeros(1, np.int32)

    def run(self, ops: CpuOps, start: Any, *, biased: bool) -> None:
        if biased:
            ops.layer_norm(self.x, self.norm, self.bias, 1e-5, self.normed)
        else:
            ops.rms_norm(self.x, self.norm, 1e-5, self.normed)
        ops.linear(self.normed, self.qkv, self.flat, (self.bias,) * 3 if biased else None)
        ops.rope(self.heads[:2], self.table, self.position, interleaved=biased)
        ops.attention(*self.heads, self.cache, start, 0.25, 0, self.mixed.reshape(1, HEADS, DIM))
        ops.add(self.x, self.mixed)
        ops.predict(self.x, self.fc1, self.fc2, self.scores)
        self.chosen = ops.select(self.scores, 0.5, self.active)
        self.out[...] = 0.0
        self.work = [
            ops.ffn(self.normed, self.block, active, self.out, skip_zeros=True) for active in (self.chosen, ALL)
        ]

    def begin(self, token: int) -> None:
        self.x[...] = np.random.default_rng(token).standard_normal(WIDTH)
        self.position[0] = token

    def found(self) -> list[bytes]:
        arrays = (self.x, self.mixed, self.out, self.scores, self.cache.keys, self.cache.values)
        return [array.tobytes() for array in arrays]


@pytest.mark.parametrize("fmt", [F16, Q8_0], ids=lambda f: f.name)
@pytest.mark.parametrize("biased", [False, True])
def test_a_tape_computes_what_its_ops_do(ops: CpuOps, fmt: Any, biased: bool) -> None:
    direct, taped = Layer(ops, fmt), Layer(ops, fmt)
    tape = TapeOps(ops)
    taped.run(tape, taped.position, biased=biased)
    assert not any(np.frombuffer(found, np.uint8).any() for found in taped.found())
    assert len(tape.native) == 10
    for token in (0, 1, 2):
        direct.begin(token)
        taped.begin(token)
        taped.out[...] = 0.0
        direct.run(ops, token, biased=biased)
        work = tape.play()
        assert taped.found() == direct.found()
        assert work == tuple(sum(column) for column in zip(*direct.work, strict=True))
        assert isinstance(taped.chosen, TapeSet)
        assert taped.chosen.count is not None
        assert taped.chosen.count[0] == len(direct.chosen.indices)


def test_a_tape_keeps_its_arrays(ops: CpuOps) -> None:
    layer, tape = Layer(ops), TapeOps(ops)
    layer.run(tape, layer.position, biased=True)
    layer.begin(1)
    tape.play()
    x, out, expected = layer.x, layer.out, layer.out.tobytes()
    del layer
    gc.collect()
    rubbish = [np.full(4096, 7, np.float32) for _ in range(50)]
    x[...] = np.random.default_rng(1).standard_normal(WIDTH)
    out[...] = 0.0
    tape.play()
    assert out.tobytes() == expected
    assert len(rubbish) == 50


def test_copies_take_any_shape(ops: CpuOps) -> None:
    tape, source, out = TapeOps(ops), np.arange(6, dtype=np.float32), np.zeros((2, 3), np.float32)
    tape.copy(source, out)
    assert tape.play() == (0, 0, 0, 0)
    assert out.ravel().tolist() == source.tolist()
    with pytest.raises(ValueError, match="not as long"):
        tape.copy(source, out[:1])


def test_what_no_tape_can_hold_is_refused(ops: CpuOps) -> None:
    layer, tape = Layer(ops), TapeOps(ops)
    ids = np.arange(3, dtype=np.int32)
    with pytest.raises(UsageError, match="selects itself"):
        tape.ffn(layer.x, layer.block, ActiveSet(ids), layer.out, skip_zeros=True)
    with pytest.raises(UsageError, match="keeps no activations"):
        tape.ffn(layer.x, layer.block, ALL, layer.out, skip_zeros=True, hidden=layer.scores)
    with pytest.raises(UsageError, match="in memory"):
        tape.linear(layer.x, (object(),), (layer.out,))
    with pytest.raises(UsageError, match="embeddings"):
        tape.embed(layer.fc1, ids, layer.out)
    with pytest.raises(ValueError, match="scores"):
        tape.select(layer.scores[0], 0.5, layer.active)
    assert len(tape.native) == 0


def test_a_worker_plays_a_tape_and_survives_what_it_throws(ops: CpuOps) -> None:
    layer, tape = Layer(ops), TapeOps(ops)
    layer.run(tape, layer.position, biased=False)
    worker = ColdWorker(ops, Mailbox.of(lambda shape, dtype: np.zeros(shape, dtype), WIDTH, NEURONS), 20.0)
    number = worker.add_tape(tape)

    def cross(position: int) -> None:
        layer.begin(0)
        layer.position[0] = position
        with worker.step():
            worker.post(number)
            assert worker.wait(number)

    cross(0)
    with pytest.raises(HardwareError, match="positions holds an index out of range"):
        cross(CONTEXT)
    worker.take_work()
    cross(1)
    assert worker.take_work().fired > 0
