"""Everything about the GPU that needs one, in under nine minutes.

    python benchmarks/gpu.py            # on a machine with a GPU: writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --smoke    # tiny shapes in Triton's interpreter: shows that it runs, measures nothing

In order: the ops tests on the device; bandwidth of copies, and of the kernels against it; what a crossing costs each
way; decode and prefill of synthetic models at several budgets, beside our own split by whole layers at the same budget
and beside the cost model's prediction; device memory against the ledger; the kernels of one step by time.

The models are random. The gate's rows are scaled so that neuron i exceeds the threshold with a frequency that falls by
a power law, 12 % on average, hot ones first, which is all that placement sees of a model.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import NormalDist, median
from typing import Any

import numpy as np

SMOKE = "--smoke" in sys.argv
if SMOKE:
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from benchmarks.synthetic import Shape, frequencies, metadata
from benchmarks.tables import print_table, write_results
from thermocline import _native
from thermocline.config import CrossingKind, Mode
from thermocline.files.formats import BF16, F16, F32, Q4_0, Q8_0, BlockFormat
from thermocline.files.metadata import Metadata
from thermocline.files.quantize import from_float
from thermocline.files.weight import Weight
from thermocline.hardware.machine import Machine, Processor, Tier
from thermocline.memory.arena import Memory
from thermocline.memory.kv_cache import KVCache, kv_bytes_per_token
from thermocline.memory.loader import load_transformer
from thermocline.model.families import family_of
from thermocline.model.network import Outputs, Segment, Transformer
from thermocline.model.spec import ModelSpec
from thermocline.ops.contract import ALL, Activation, ActiveSet, FfnKind, NeuronBlock
from thermocline.ops.cpu import CpuOps
from thermocline.ops.cuda.beside import CudaDevice
from thermocline.ops.cuda.ops import CudaOps
from thermocline.ops.device import Host
from thermocline.placement.cost import FfnMode
from thermocline.placement.footprint import footprint_of
from thermocline.placement.problem import LayerPlace, Placement, Problem
from thermocline.placement.seats import LayerSeat, Seating
from thermocline.placement.workload import NO_OVERHEADS, Workload
from thermocline.runtime.captured import CapturedStep

GB = 1e9
ACTIVE, THRESHOLD, CLUSTER = 0.12, 1.2, 256
SHAPES = {
    "7b": Shape(4096, 11008, 32, 32, 32),
    "13b": Shape(5120, 13824, 40, 40, 40),
    "smoke": Shape(64, 512, 2, 2, 1, 320),
}
BUDGETS = (0.10, 0.25, 0.50, 0.75, 1.00)
Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A model that is in memory only."""

    metadata: Metadata
    weights: Mapping[str, Weight]
    kind: str = "gguf"
    path: Path = field(default=Path("synthetic"))


@dataclass(frozen=True)
class Bench:
    """What all parts share."""

    gpu: CudaOps
    cpu: CpuOps
    deadline: float

    def seconds(self, call: Callable[[], Any], repeats: int = 20) -> float:
        """Median seconds of a call on the device."""
        if SMOKE:
            repeats = 1
        times = []
        for _ in range(repeats + (0 if SMOKE else 3)):
            self.wait()
            began = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - began)
        return median(times[-repeats:])

    def wait(self) -> None:
        if self.gpu.device.type == "cuda":
            torch.cuda.synchronize(self.gpu.device)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()


def ops_tests() -> Row:
    """The parametrised ops tests on the device."""
    if SMOKE:
        return {"skipped": "smoke"}
    command = [sys.executable, "-m", "pytest", "-q", "tests/ops", "-k", "gpu", "-n", "8", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    return {"passed": done.returncode == 0, "tail": done.stdout.strip().splitlines()[-12:]}


def copy_bandwidth(bench: Bench) -> float:
    """Bytes/s read and written of a copy on the device."""
    data = torch.zeros((1 << 12) if SMOKE else (1 << 28), dtype=torch.float32, device=bench.gpu.device)
    other = torch.empty_like(data)
    return 2 * data.nbytes / bench.seconds(lambda: other.copy_(data))


def random_matrix(ops: Any, rows: int, columns: int, fmt: BlockFormat) -> Any:
    rng = np.random.default_rng(rows)
    piece = from_float("w", rng.standard_normal((min(rows, 64), columns), dtype=np.float32), fmt)
    return ops.place(Weight("w", fmt, (rows, columns), np.resize(piece.data, (rows, piece.data.shape[1]))))


def kernels(bench: Bench, copy: float) -> list[Row]:
    """GB/s of the kernels that read weights, cold: more matrices in turn than the device's caches hold."""
    rows, columns = (64, 64) if SMOKE else (11008, 4096)
    result = []
    for fmt in (F16, BF16, Q8_0, Q4_0):
        turns = 1 if SMOKE else max(2, 300_000_000 // (rows * fmt.row_bytes(columns)))
        matrices = [random_matrix(bench.gpu, rows, columns, fmt) for _ in range(turns)]
        x, out = bench.gpu.array((1, columns)), bench.gpu.array((1, rows))
        x.normal_()

        def dense(matrices: list[Any] = matrices, x: Any = x, out: Any = out) -> None:
            for matrix in matrices:
                bench.gpu.linear(x, (matrix,), (out,))

        active = np.sort(np.random.default_rng(1).choice(rows, max(1, int(rows * ACTIVE)), replace=False))
        ids = torch.from_numpy(active.astype(np.int32)).to(bench.gpu.device)
        kind = FfnKind(Activation.SILU, gated=True)  # every neuron of the list is computed to its end
        counts, y = bench.gpu.array((4,), "int64"), bench.gpu.array((1, columns))

        listed = ActiveSet(ids)  # type: ignore[arg-type]
        blocks = [NeuronBlock(m, m, m, True, kind, rows) for m in matrices]

        def sparse(blocks: Any = blocks, counts: Any = counts, listed: Any = listed, x: Any = x, y: Any = y) -> None:
            with bench.gpu.counting(counts):
                for block in blocks:
                    bench.gpu.ffn(x, block, listed, y, skip_zeros=True)

        for name, call, nbytes in (
            ("matrix-vector", dense, turns * matrices[0].nbytes),
            ("sparse FFN, 12 %", sparse, turns * 3 * len(active) * fmt.row_bytes(columns)),
        ):
            seconds = bench.seconds(call)
            rate = nbytes / seconds
            result.append({
                "kernel": name, "format": fmt.name, "µs": round(seconds / turns * 1e6, 1),
                "MB": round(nbytes / turns / 1e6, 2), "GB/s": round(rate / GB, 1), "of copy": round(rate / copy, 3),
            })  # fmt: skip
    return result


def synthetic(shape: Shape, fmt: BlockFormat) -> tuple[Source, np.ndarray]:
    """A model whose neurons lie hottest first, and their frequencies (n_ff), the same in every layer."""
    rng = np.random.default_rng(5)
    wanted = np.minimum(np.sort(frequencies(shape.n_ff, ACTIVE * 1.15, rng))[::-1], 0.48)
    scale = np.array([THRESHOLD / NormalDist().inv_cdf(1 - f) for f in wanted], np.float32)

    def matrix(name: str, rows: int, columns: int, by: Any = 1.0) -> Weight:
        few = min(rows, 256)
        base = rng.standard_normal((few, columns), dtype=np.float32) / np.float32(np.sqrt(columns))
        if np.ndim(by):
            parts = [
                from_float(name, base[: min(few, rows - i)] * by[i : i + few, None], fmt).data
                for i in range(0, rows, few)
            ]
            return Weight(name, fmt, (rows, columns), np.concatenate(parts))
        piece = from_float(name, base * np.float32(by), fmt).data
        return Weight(name, fmt, (rows, columns), np.resize(piece, (rows, piece.shape[1])))

    n, kv = shape.n_embd, shape.n_head_kv * shape.head_dim
    share = 0.25 / np.sqrt(shape.n_layer)
    weights = {}

    def add(name: str, weight: Weight) -> None:
        weights[name] = Weight(name, weight.format, weight.shape, weight.data)

    ones = from_float("ones", np.ones((1, n), np.float32), F32)
    add("token_embd.weight", matrix("e", shape.n_vocab, n, np.sqrt(n)))
    add("output.weight", matrix("o", shape.n_vocab, n))
    add("output_norm.weight", ones)
    for layer in range(shape.n_layer):
        blk = f"blk.{layer}."
        for name in ("attn_norm", "ffn_norm"):
            add(f"{blk}{name}.weight", ones)
        for name, rows in (("attn_q", n), ("attn_k", kv), ("attn_v", kv)):
            add(f"{blk}{name}.weight", matrix(name, rows, n))
        add(f"{blk}attn_output.weight", matrix("o", n, n, share))
        add(f"{blk}ffn_gate.weight", matrix("g", shape.n_ff, n, scale))
        add(f"{blk}ffn_up.weight", matrix("u", shape.n_ff, n))
        add(f"{blk}ffn_down_t.weight", matrix("d", shape.n_ff, n, share))
    header = metadata("synthetic", shape, ACTIVE) | {
        "llama.hidden_activation": "fatrelu", "llama.hidden_activation_threshold": np.float32(THRESHOLD)
    }  # fmt: skip
    plain: Any = {k: v.item() if isinstance(v, np.generic) else v for k, v in header.items()}
    return Source(Metadata("synthetic", plain), weights), wanted


@dataclass(frozen=True)
class Case:
    """One placement of a model."""

    name: str
    seats: Seating
    placement: Placement


def cases(spec: ModelSpec, record: int, trunk: int, layer: int, budget: int) -> list[Case]:
    """Ours, which puts all attention and as many hot neurons as fit in VRAM; and whole layers in VRAM."""
    vram, ram, n = Tier.VRAM, Tier.RAM, spec.n_ff
    depth = max(0, min(n, (budget - trunk) // (record * spec.n_layer) // CLUSTER * CLUSTER))
    whole = max(0, min(spec.n_layer, budget // layer))
    found = []
    last = -(-n // CLUSTER)
    if budget >= trunk:
        seat, place = LayerSeat(vram, depth, n), LayerPlace(vram, vram, depth // CLUSTER, last)
        found.append(Case("hybrid", Seating(ram, vram, (seat,) * spec.n_layer),
                          Placement(ram, vram, (place,) * spec.n_layer)))  # fmt: skip
    hot, cold = LayerSeat(vram, n, n), LayerSeat(ram, 0, n)
    there, here = LayerPlace(vram, vram, last, last), LayerPlace(ram, ram, 0, last)
    seats = (hot,) * whole + (cold,) * (spec.n_layer - whole)
    places = (there,) * whole + (here,) * (spec.n_layer - whole)
    head = vram if whole == spec.n_layer else ram
    found.append(Case("layer split", Seating(ram, head, seats), Placement(ram, head, places)))
    return found


def models(bench: Bench, machine: Machine, name: str, fmt: BlockFormat) -> list[Row]:
    """Decode and prefill of one model at every budget."""
    source, heat = synthetic(SHAPES[name], fmt)
    spec = family_of(source).spec(source)
    total = sum(w.nbytes for w in source.weights.values())
    record = 3 * fmt.row_bytes(spec.n_embd)
    layer = sum(w.nbytes for key, w in source.weights.items() if key.startswith("blk.0."))
    trunk = total - source.weights["token_embd.weight"].nbytes - record * spec.n_ff * spec.n_layer
    rows = []
    for share in (0.5, 1.0) if SMOKE else BUDGETS:
        for case in cases(spec, record, trunk, layer, int(share * total)):
            if bench.left < 25:
                print(f"no time left for {name} {fmt.name} {share:.0%} {case.name}", file=sys.stderr)
                continue
            problem = Problem(
                footprint_of(spec, source.weights, "0" * 64, kv_token=kv_bytes_per_token(spec) // spec.n_layer),
                machine, Workload(context=1024, prompt=16, output=64), FfnMode.EXACT,
                np.tile(heat, (spec.n_layer, 1)), {}, NO_OVERHEADS, CLUSTER,
            )  # fmt: skip
            predicted = problem.phase_seconds(case.placement, problem.cost.decode)
            rows.append({"model": name, "format": fmt.name, "budget": f"{share:.0%}", "placement": case.name}
                        | run_case(bench, source, case, int(share * total), predicted))  # fmt: skip
            print_table(rows[-1:])
    return rows


def run_case(bench: Bench, source: Source, case: Case, budget: int, predicted: float) -> Row:
    """Load, prefill and decode one placement, and hold device memory to the ledger."""
    cuda = bench.gpu.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.gpu.device)
    before = torch.cuda.mem_get_info(bench.gpu.device)[0] if cuda else 0
    ops = CudaOps(str(bench.gpu.device))
    memory = Memory({Tier.VRAM: CudaDevice(ops), Tier.RAM: Host(bench.cpu)}, {Tier.VRAM: 1 << 40})
    context, prompt, steps = (64, 6, 2) if SMOKE else (1024, 256, 32)
    transformer, _ = load_transformer(source, memory, n_ctx=context, seats=case.seats, mode=Mode.EXACT)
    cache = KVCache(transformer.spec, [layer.device.ops for layer in transformer.layers], context)
    tokens = np.random.default_rng(2).integers(0, transformer.spec.n_vocab, prompt).astype(np.int32)
    workspace = transformer.workspace(prompt, 1)
    segment = (Segment(cache, 0, prompt),)
    transformer.step(tokens, segment, workspace, Outputs.LAST)  # compiles
    began = time.perf_counter()
    cache.clear()
    logits = transformer.ops.to_host(transformer.step(tokens, segment, workspace, Outputs.LAST).logits)
    prefill = time.perf_counter() - began
    way, decode, sampler = _decode(transformer, cache, int(logits[0].argmax()), steps)
    row: Row = {
        "decode tok/s": round(1 / decode, 2),
        "predicted tok/s": round(1 / predicted, 2),
        "prefill tok/s": round(prompt / prefill, 1),
        "crossing": way,
        "sampler µs": round(sampler * 1e6, 1),
    }
    if cuda:
        peak, ledger = torch.cuda.max_memory_allocated(bench.gpu.device), memory.ledger.used(Tier.VRAM)
        row |= {
            "ledger GB": round(ledger / GB, 3), "torch peak GB": round(peak / GB, 3),
            "driver GB": round((before - torch.cuda.mem_get_info(bench.gpu.device)[0]) / GB, 3),
            "budget GB": round(budget / GB, 3),
        }  # fmt: skip
    memory.close()
    return row


def _decode(transformer: Transformer, cache: KVCache, token: int, steps: int) -> tuple[str, float, float]:
    """How the sides crossed, seconds a token, and seconds that Python had the logits."""
    choosing: list[float] = []

    def chosen(logits: Any) -> int:
        began = time.perf_counter()
        best = int(logits.argmax())
        choosing.append(time.perf_counter() - began)
        return best

    homes = {layer.device.tier for layer in transformer.layers} | {transformer.exit.tier}
    times = []
    if homes == {Tier.VRAM}:
        step = CapturedStep(transformer, cache)
        way = f"{step.way or 'none'}{', graph' if step.captured else ''}"
        for _ in range(steps):
            began = time.perf_counter()
            token = chosen(step.run(token, cache.length)[0])
            times.append(time.perf_counter() - began)
    else:
        way, workspace = "plain", transformer.workspace(1, 1)
        for _ in range(steps):
            began = time.perf_counter()
            segment = (Segment(cache, cache.length, 1),)
            result = transformer.step(np.array([token], np.int32), segment, workspace)
            token = chosen(transformer.ops.to_host(result.logits)[0])
            times.append(time.perf_counter() - began)
    return way, median(times), median(choosing)


def crossings(bench: Bench) -> list[Row]:
    """Seconds that one empty crossing adds to a captured step: a model all of whose neurons but a cluster are hot."""
    shape = Shape(64, 512, 2 if SMOKE else 32, 2, 1, 320)
    source, _ = synthetic(shape, F16)
    ways = (
        [CrossingKind.PLAIN]
        if bench.gpu.device.type != "cuda"
        else [CrossingKind.MEMORY, CrossingKind.CALLS, CrossingKind.PLAIN]
    )
    seconds: dict[str, float] = {}
    for name, depth, way in [("none", 512, CrossingKind.AUTO), *((str(w), 511, w) for w in ways)]:
        ops = CudaOps(str(bench.gpu.device))
        memory = Memory({Tier.VRAM: CudaDevice(ops), Tier.RAM: Host(bench.cpu)}, {Tier.VRAM: 1 << 40})
        seats = Seating(Tier.VRAM, Tier.VRAM, (LayerSeat(Tier.VRAM, depth, 512),) * shape.n_layer)
        transformer, _ = load_transformer(source, memory, n_ctx=64, seats=seats)
        cache = KVCache(transformer.spec, [layer.device.ops for layer in transformer.layers], 64)
        try:
            step = CapturedStep(transformer, cache, way=way)
        except Exception as error:
            print(f"crossing by {way}: {error}", file=sys.stderr)
            continue
        seconds[name] = bench.seconds(partial(step.run, 1, 0), 50)
        memory.close()
    base = seconds.pop("none")
    return [
        {"crossing": name, "layers": shape.n_layer, "µs a layer": round((t - base) / shape.n_layer * 1e6, 1)}
        for name, t in seconds.items()
    ]


def profile(bench: Bench) -> list[Row]:
    """The kernels of one captured-size step by their time on the device."""
    if bench.gpu.device.type != "cuda":
        return []
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    matrix, x = random_matrix(bench.gpu, 11008, 4096, F16), bench.gpu.array((1, 4096))
    block = NeuronBlock(matrix, matrix, matrix, True, FfnKind(Activation.RELU, gated=True), 11008)
    with record(activities=[ProfilerActivity.CUDA]) as seen:
        bench.gpu.rms_norm(x, bench.gpu.array((4096,)), 1e-5, x)
        bench.gpu.linear(x, (matrix,), (bench.gpu.array((1, 11008)),))
        bench.gpu.ffn(x, block, ALL, bench.gpu.array((1, 4096)), skip_zeros=True)
        bench.wait()
    return [
        {"kernel": e.key[:60], "calls": e.count, "µs": round(e.self_device_time_total, 1)} for e in seen.key_averages()
    ]


def machine_of(bench: Bench, copy: float, crossing: float) -> Machine:
    """This machine as the cost model wants it, from what was measured in this run."""
    buffer = np.ones((1 << 22) if SMOKE else (1 << 30), np.uint8)
    ram = max(_native.read_bandwidth(bench.cpu.context, buffer) for _ in range(3))
    cuda = bench.gpu.device.type == "cuda"
    capacity = torch.cuda.get_device_properties(bench.gpu.device).total_memory if cuda else 1 << 30
    side = min(256 if SMOKE else 4096, 4096)
    square = torch.ones((side, side), device=bench.gpu.device)

    def product() -> Any:
        with bench.gpu.precision():
            return square @ square

    gpu = Processor(
        name=bench.gpu.name, capacity=capacity, bandwidth=copy, bandwidth_busy=copy,
        flops=2 * side**3 / bench.seconds(product), launch=2e-6,
    )  # fmt: skip
    cpu = Processor(name="cpu", capacity=1 << 37, bandwidth=ram, bandwidth_busy=ram, flops=1e12, launch=2e-6)
    host = torch.zeros(1 << (20 if SMOKE else 28), dtype=torch.uint8, pin_memory=cuda)
    there = torch.zeros_like(host, device=bench.gpu.device)
    link = len(host) / bench.seconds(lambda: there.copy_(host, non_blocking=True))
    return Machine(name="this machine", cpu=cpu, gpu=gpu, link=link, crossing=max(crossing, 0.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes in the interpreter, nothing written")
    parser.add_argument("--minutes", type=float, default=9.0, help="what does not fit is left out, and said")
    parser.add_argument("--models", nargs="+", default=["smoke"] if SMOKE else ["7b", "13b"], choices=SHAPES)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    args = parser.parse_args()
    began = time.monotonic()
    bench = Bench(CudaOps(), CpuOps(1 if SMOKE else args.threads), began + 60 * args.minutes)
    results: dict[str, Any] = {"device": bench.gpu.name, "torch": torch.__version__, "threads": args.threads}
    results["ops tests"] = ops_tests()
    print(results["ops tests"])
    copy = copy_bandwidth(bench)
    results["copy GB/s"] = round(copy / GB, 1)
    print(f"copies on the device: {copy / GB:.1f} GB/s")
    results["kernels"] = kernels(bench, copy)
    print_table(results["kernels"])
    results["crossings"] = crossings(bench)
    print_table(results["crossings"])
    machine = machine_of(bench, copy, min(row["µs a layer"] for row in results["crossings"]) * 1e-6)
    results["machine"] = machine
    results["models"] = [row for name in args.models for row in models(bench, machine, name, F16)]
    results["profile"] = profile(bench)
    results["seconds"] = round(time.monotonic() - began, 1)
    if not SMOKE:
        write_results("gpu", results)
    print(f"done in {results['seconds']} s")


if __name__ == "__main__":
    main()
