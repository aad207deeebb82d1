"""What the GPU's kernels reach alone: products, crossings, other tile sizes. Rows come one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_apart import Results, Row, attempt, failure
from benchmarks.gpu_bench import ACTIVE, DRY, Bench
from benchmarks.gpu_cases import GB, let_go
from benchmarks.gpu_sweep import sweep
from benchmarks.synthetic_families import Shape
from benchmarks.synthetic_gpu import Source, synthetic
from thermocline.config import CrossingKind
from thermocline.files.formats import BF16, F16, Q4_0, Q8_0, BlockFormat
from thermocline.files.quantize import from_float
from thermocline.files.weight import Weight
from thermocline.hardware.machine import Tier
from thermocline.memory.arena import Memory
from thermocline.memory.kv_cache import KVCache
from thermocline.memory.loader import load_transformer
from thermocline.ops.contract import Activation, ActiveSet, FfnKind, NeuronBlock
from thermocline.ops.cuda.beside import CudaDevice
from thermocline.ops.cuda.ops import CudaOps
from thermocline.ops.device import Host
from thermocline.placement.seats import LayerSeat, Seating
from thermocline.runtime.captured import CapturedStep

ROWS, COLUMNS = (64, 64) if DRY else (11008, 4096)
"""Of the matrices: those of a 7B model's FFN."""
COLD = 400_000_000
"""Bytes that kernels read before they come back to the same: some times what second caches hold."""
SECONDS_A_FORMAT, SECONDS_OF_TILES, SECONDS_TO_SPARE = 10.0, 12.0, 6.0
"""Without which no format is begun, in kernels and in tile sizes, and no more tile sizes of one."""


def copy_bandwidth(bench: Bench, results: Results) -> float:
    """Bytes/s read and written of a copy on the device."""
    data = torch.zeros((1 << 12) if DRY else (1 << 28), dtype=torch.float32, device=bench.gpu.device)
    other = torch.empty_like(data)
    copy = 2 * data.nbytes / bench.seconds(lambda: other.copy_(data))
    results["copy GB/s"] = round(copy / GB, 1)
    print(f"copies on the device: {copy / GB:.1f} GB/s")
    return copy


def kernels(bench: Bench, results: Results) -> Iterator[Row]:
    """GB/s of the kernels that read weights, cold: more matrices in turn than the device's caches hold."""
    copy = copy_bandwidth(bench, results)
    for fmt in (F16, BF16, Q8_0, Q4_0):
        if not bench.time_for(f"kernels in {fmt.name}", SECONDS_A_FORMAT):
            continue
        try:
            yield from kernels_in(fmt, bench, copy)
        except Exception as error:  # this format's matrices: the others may be made
            yield {"kernel": "all", "format": fmt.name, "failed": failure(error)}
        let_go()


def kernels_in(fmt: BlockFormat, bench: Bench, copy: float) -> Iterator[Row]:
    listed = active_set(bench)
    read = len(listed.indices) * fmt.row_bytes(COLUMNS)
    matrices, blocks = cold_weights(bench, fmt, 3 * read)
    x, out, y = (bench.gpu.array((1, n)) for n in (COLUMNS, ROWS, COLUMNS))
    x.normal_()
    counts = bench.gpu.array((4,), "int64")

    def dense() -> None:
        for matrix in matrices:
            bench.gpu.linear(x, (matrix,), (out,))

    def sparse() -> None:
        with bench.gpu.counting(counts):
            for block in blocks:
                bench.gpu.ffn(x, block, listed, y, skip_zeros=True)

    def measured(call: Callable[[], None], times: int, nbytes: int) -> Row:
        each = bench.seconds(call) / times
        rate = nbytes / each
        return {
            "µs": round(each * 1e6, 1), "MB": round(nbytes / 1e6, 2), "GB/s": round(rate / GB, 1),
            "of copy": round(rate / copy, 3),
        }  # fmt: skip

    shown: Row = {"format": fmt.name}
    yield attempt({"kernel": "matrix-vector"} | shown, measured, dense, len(matrices), matrices[0].nbytes)
    yield attempt({"kernel": "sparse FFN, 12 %"} | shown, measured, sparse, len(blocks), 3 * read)


def active_set(bench: Bench) -> Any:
    """Neurons of a block that fire, on the device."""
    active = np.sort(np.random.default_rng(1).choice(ROWS, max(1, int(ROWS * ACTIVE)), replace=False))
    return ActiveSet(torch.from_numpy(active.astype(np.int32)).to(bench.gpu.device))  # type: ignore[arg-type]


def cold_weights(bench: Bench, fmt: BlockFormat, read: int) -> tuple[list[Any], list[NeuronBlock]]:
    """Matrices, and blocks of three of them each, of which `read` bytes are read, that no cache holds all."""
    kind = FfnKind(Activation.SILU, gated=True)  # every neuron of the list is computed to its end
    weight = random_weight(fmt)
    matrices = [bench.gpu.place(weight) for _ in range(3 * (1 if DRY else -(-COLD // read)))]
    thirds = zip(matrices[::3], matrices[1::3], matrices[2::3], strict=True)
    return matrices, [NeuronBlock(gate, up, down, True, kind, ROWS) for gate, up, down in thirds]


def random_weight(fmt: BlockFormat) -> Weight:
    rng = np.random.default_rng(ROWS)
    piece = from_float("w", rng.standard_normal((min(ROWS, 64), COLUMNS), dtype=np.float32), fmt)
    return Weight("w", fmt, (ROWS, COLUMNS), np.resize(piece.data, (ROWS, piece.data.shape[1])))


def tile_sizes(bench: Bench, results: Results) -> Iterator[Row]:
    """The kernels with other tile sizes, at a 7B model's shapes."""
    for fmt in (F16, Q8_0, Q4_0)[: 1 if DRY else 3]:
        if not bench.time_for(f"tile sizes in {fmt.name}", SECONDS_OF_TILES):
            continue
        try:
            yield from tile_sizes_in(fmt, bench)
        except Exception as error:  # as in `kernels`
            yield {"kernel": "all", "format": fmt.name, "failed": failure(error)}
        let_go()


def tile_sizes_in(fmt: BlockFormat, bench: Bench) -> list[Row]:
    listed, failed = active_set(bench), list[str]()

    def seconds(call: Callable[[], Any]) -> float:
        try:
            return bench.seconds(call)
        except Exception as error:  # sizes that a card has no room for do not compile
            failed.append(failure(error))
            return math.nan

    weights = cold_weights(bench, fmt, 3 * len(listed.indices) * fmt.row_bytes(COLUMNS))
    rows = sweep(bench.gpu, *weights, listed, seconds, lambda: bench.left > SECONDS_TO_SPARE)
    why = iter(failed)
    return [row | {"µs": None, "failed": next(why)} if math.isnan(row["µs"]) else row for row in rows]


def crossings(bench: Bench, results: Results) -> Iterator[Row]:
    """Seconds that one empty crossing adds to a captured step: a model all of whose neurons but one are hot."""
    shape = Shape(64, 512, 2 if DRY else 32, 2, 1, 320)
    source = synthetic(shape, ACTIVE, 1, bench.gpu.device)
    ways = (CrossingKind.MEMORY, CrossingKind.CALLS, CrossingKind.PLAIN)
    taken = [(str(way), shape.n_ff - 1, way) for way in (ways if bench.gpu.streams.real else ways[2:])]
    base: float | None = None
    for name, depth, way in [("none", shape.n_ff, CrossingKind.AUTO), *taken]:
        row = attempt({"crossing": name, "layers": shape.n_layer}, partial(stepped, bench, source, depth, way))
        if name == "none":
            base = row.get("µs a step")
        elif base is not None and "µs a step" in row:
            row["µs a layer"] = round((row["µs a step"] - base) / shape.n_layer, 1)
        yield row


def stepped(bench: Bench, source: Source, depth: int, way: CrossingKind) -> Row:
    """A captured step whose layers have so many neurons on the GPU."""
    memory = Memory({Tier.VRAM: CudaDevice(CudaOps(str(bench.gpu.device))), Tier.RAM: Host(bench.cpu)}, {})
    try:
        n_layer, n_ff = source.heat.shape
        seats = Seating(Tier.VRAM, Tier.VRAM, (LayerSeat(Tier.VRAM, depth, n_ff),) * n_layer)
        transformer, _ = load_transformer(source, memory, n_ctx=64, seats=seats)
        cache = KVCache(transformer.spec, [layer.device.ops for layer in transformer.layers], 64)
        step = CapturedStep(transformer, cache, way=way)
        return {"µs a step": round(bench.seconds(partial(step.run, 1, 0), 50, graph=False) * 1e6, 1)}
    finally:
        memory.close()
