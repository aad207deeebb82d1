"""A network on the GPU's kernels, alone and beside the CPU's, computes what it computes on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from thermocline.config import CacheType
from thermocline.files.formats import F16, F32, Q4_0, Q8_0, BlockFormat
from thermocline.hardware.machine import Tier
from thermocline.memory.arena import Memory
from thermocline.memory.kv_cache import KVCache
from thermocline.memory.loader import load_transformer
from thermocline.model.network import Outputs, Segment, Transformer
from thermocline.ops.contract import Activation, FfnKind
from thermocline.ops.cpu import CpuOps
from thermocline.ops.cuda.beside import CudaDevice
from thermocline.ops.cuda.ops import CudaOps
from thermocline.ops.device import Host
from thermocline.placement.seats import LayerSeat, Seating, all_in

VRAM, RAM = Tier.VRAM, Tier.RAM
SILU = FfnKind(Activation.SILU, gated=True)
RELU = FfnKind(Activation.RELU, gated=True)
LAYERS, NEURONS = 2, 96
SPLITS = (5, 6, 7)
"""A prompt in one batch, then two tokens one by one."""


def run(transformer: Transformer) -> np.ndarray:
    tokens = np.arange(SPLITS[-1], dtype=np.int32)
    cache = KVCache(transformer.spec, [layer.device.ops for layer in transformer.layers], 16, CacheType.F16)
    workspace = transformer.workspace(len(tokens))
    rows = []
    for start, stop in zip((0, *SPLITS), SPLITS, strict=False):
        result = transformer.step(tokens[start:stop], (Segment(cache, start, stop - start),), workspace, Outputs.ALL)
        rows.append(transformer.ops.to_host(result.logits).copy())
    return np.concatenate(rows)


def loaded(source: Any, seats: Seating) -> tuple[Transformer, Memory]:
    memory = Memory({VRAM: CudaDevice(CudaOps(tf32=False)), RAM: Host(CpuOps(1))}, {VRAM: 1 << 30})
    return load_transformer(source, memory, seats=seats)[0], memory


@pytest.mark.parametrize(("fmt", "kind"), [(F32, SILU), (F16, RELU), (Q8_0, SILU), (Q8_0, RELU), (Q4_0, RELU)])
def test_a_whole_network_on_the_gpu(
    make_source: Callable[..., Any], agree: Callable[..., None], fmt: BlockFormat, kind: FfnKind
) -> None:
    source = make_source(fmt, kind)
    transformer, memory = loaded(source, all_in(VRAM, LAYERS, NEURONS))
    plain = run(load_transformer(source, CpuOps(1))[0])
    agree(run(transformer), plain, LAYERS, NEURONS, integers=fmt.block > 1)
    assert memory.is_true
    memory.close()


@pytest.mark.parametrize(("home", "fmt"), [(RAM, F16), (VRAM, F16), (VRAM, Q8_0)])
def test_hot_neurons_on_the_gpu_and_cold_ones_beside_it(
    make_source: Callable[..., Any], agree: Callable[..., None], fmt: BlockFormat, home: Tier
) -> None:
    source = make_source(fmt, RELU)
    plain = run(load_transformer(source, CpuOps(1))[0])
    transformer, memory = loaded(source, Seating(RAM, home, (LayerSeat(home, 32, NEURONS),) * LAYERS))
    results = [run(transformer) for _ in range(2)]
    agree(results[0], plain, LAYERS, NEURONS, integers=fmt.block > 1)
    assert results[0].tobytes() == results[1].tobytes()
    assert memory.is_true
    memory.close()
