"""Cold neurons that travel to the device give the sums that they give at home."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from thermocline.config import CacheType
from thermocline.errors import BudgetError
from thermocline.files.formats import F16, F32, Q8_0, BlockFormat
from thermocline.hardware.machine import Tier
from thermocline.memory.arena import Memory
from thermocline.memory.kv_cache import KVCache
from thermocline.memory.loader import load_transformer
from thermocline.memory.sent import SentNeurons
from thermocline.model.network import Outputs, Segment, Transformer
from thermocline.ops.contract import Activation, FfnKind
from thermocline.ops.cpu import CpuOps
from thermocline.ops.cuda.beside import CudaDevice
from thermocline.ops.cuda.lanes import PinnedLanes
from thermocline.ops.cuda.ops import CudaOps
from thermocline.ops.cuda.streams import Streams
from thermocline.ops.device import EmulatedDevice, Host
from thermocline.placement.ledger import Purpose
from thermocline.placement.seats import LayerSeat, Seating

VRAM, RAM = Tier.VRAM, Tier.RAM
LAYERS, NEURONS, TOKENS = 2, 96, 7
SILU, RELU = FfnKind(Activation.SILU, gated=True), FfnKind(Activation.RELU, gated=True)


def memory_of(device: str, budget: int = 1 << 30) -> Memory:
    there = EmulatedDevice(CpuOps(1)) if device == "emulated" else CudaDevice(CudaOps(tf32=False))
    return Memory({VRAM: there, RAM: Host(CpuOps(1))}, {VRAM: budget})


def run(transformer: Transformer, tokens: int = TOKENS) -> tuple[np.ndarray, Any]:
    cache = KVCache(transformer.spec, [layer.device.ops for layer in transformer.layers], 16, CacheType.F16)
    ids = np.arange(tokens, dtype=np.int32)
    result = transformer.step(ids, (Segment(cache, 0, tokens),), transformer.workspace(tokens), Outputs.ALL)
    return transformer.ops.to_host(result.logits).copy(), result


def sent(transformer: Transformer) -> list[SentNeurons]:
    return [p for x in transformer.layers if x.ffn.sent for p in x.ffn.sent.parts if isinstance(p, SentNeurons)]


@pytest.mark.parametrize("device", ["emulated", "cuda"])
@pytest.mark.parametrize("home", [VRAM, RAM])
@pytest.mark.parametrize(("fmt", "kind"), [(F16, RELU), (Q8_0, RELU), (F32, SILU)])
def test_a_prompt_is_the_same_whether_its_cold_neurons_travel(
    make_source: Callable[..., Any],
    agree: Callable[..., None],
    device: str,
    home: Tier,
    fmt: BlockFormat,
    kind: FfnKind,
) -> None:
    source = make_source(fmt, kind)
    seats = Seating(RAM, home, (LayerSeat(home, 32, NEURONS), LayerSeat(home, 0, NEURONS)))
    plain, first = memory_of(device), memory_of(device)
    wanted, seen = run(load_transformer(source, first, seats=seats)[0])
    transformer, _ = load_transformer(source, plain, seats=seats, sent_from=(TOKENS, TOKENS))
    assert len(sent(transformer)) == 2
    for neurons in sent(transformer):
        neurons.piece = 3 * 256 + 40 * fmt.row_bytes(64) * 3  # a few pieces
    got, result = run(transformer)
    # Beside RAM, activations that meet integer blocks are rounded to 8 bits.
    agree(got, wanted, LAYERS, NEURONS, integers=fmt is Q8_0 and device == "cuda")
    if device == "emulated":
        assert result.work == seen.work
    assert sum(row for row in result.hot) == sum(result.work)
    again, _ = run(transformer)
    assert got.tobytes() == again.tobytes()
    shorter = load_transformer(source, first, seats=seats)[0]
    assert run(transformer, TOKENS - 1)[0].tobytes() == run(shorter, TOKENS - 1)[0].tobytes()
    assert plain.is_true
    assert plain.ledger.used(VRAM, Purpose.STAGING) > 0
    assert plain.ledger.used(RAM, Purpose.STAGING) == 0  # what is pinned counts with all that a GPU's ops pinned
    for memory in (plain, first):
        memory.close()


def test_lanes_need_room(make_source: Callable[..., Any]) -> None:
    source, seats = make_source(F16, RELU), Seating(RAM, RAM, (LayerSeat(RAM, 32, NEURONS),) * LAYERS)
    memory = memory_of("emulated")
    load_transformer(source, memory, seats=seats)
    used = memory.ledger.used(VRAM)
    memory.close()
    tight = memory_of("emulated", used + 100)
    with pytest.raises(BudgetError, match="staging"):
        load_transformer(source, tight, seats=seats, sent_from=(8, 8))
    assert tight.ledger.used(VRAM) == 0


class Events(Streams):
    """Streams that write down what waits for what."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.log: list[str] = []
        self.count = 0

    def another(self) -> str:
        return "copying"

    def mark(self) -> Any:
        self.count += 1
        return Event(self, f"used {self.count}")

    def copied(self, stream: Any, source: torch.Tensor, target: torch.Tensor, after: Any = None) -> Any:
        self.count += 1
        self.log.append(f"copy {self.count}" + ("" if after is None else f" after {after.name}"))
        target.copy_(source)
        return Event(self, f"copy {self.count}")


class Event:
    def __init__(self, streams: Events, name: str) -> None:
        self.streams, self.name = streams, name

    def synchronize(self) -> None:
        self.streams.log.append(f"host waits for {self.name}")


def test_two_buffers_take_turns() -> None:
    """A pinned one is filled when its copy is done, one of the device when it was computed with."""
    streams = Events()
    lanes = lanes_of(streams)
    parts = [[np.full((3, 70), i, np.uint8), np.full((2, 5), 100 + i, np.uint8)] for i in range(4)]
    for part in parts:
        arrays = lanes.send(part)
        assert all(np.array_equal(a.numpy(), p) for a, p in zip(arrays, part, strict=True))
        lanes.used()
    assert streams.log == [
        "copy 1",
        "copy 3",
        "host waits for copy 1",
        "copy 5 after used 2",
        "host waits for copy 3",
        "copy 7 after used 4",
    ]


def lanes_of(streams: Streams) -> PinnedLanes:
    class Tensors:
        def array(self, shape: tuple[int, ...], dtype: str = "float32") -> torch.Tensor:
            return torch.zeros(shape, dtype=getattr(torch, dtype))

    return PinnedLanes(streams, Tensors(), 4096)
