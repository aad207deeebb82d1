"""Everything about the GPU that needs one, in under nine minutes.

    python -m benchmarks.gpu          # on a machine with a GPU: writes benchmarks/results/gpu.json
    python -m benchmarks.gpu --dry    # tiny shapes in Triton's interpreter: shows that it runs, measures nothing
    python -m benchmarks.gpu --minutes 5 --models 7b --parts kernels crossings models    # where less time is lent

In order: bandwidth of copies, and of the kernels against it; what a crossing costs each way; decode and prefill of
synthetic models of 7 and 13 billion weights at several budgets, beside our own split by whole layers at the same budget
and beside the cost model's prediction, with device memory against the ledger; the kernels of a whole decode step by
time; the tests that need a GPU; other tile sizes. What is left of the time decides what is left out, and that is said.
At the end stands what was to be shown beside what was measured (`gpu_claims`).

The models are those of `benchmarks.synthetic`, drawn on the GPU: neurons fire 12 % of the time, by a power law, and
low-rank predictors know when. They lie hottest first.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any

import numpy as np

DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from benchmarks.gpu_cases import GB, Case, Lengths, Loaded, Row, bytes_a_token, cases, problem_of, run_case, whole
from benchmarks.gpu_claims import claims
from benchmarks.gpu_sweep import sweep
from benchmarks.synthetic import SHAPES, Shape
from benchmarks.synthetic_gpu import Source, synthetic
from benchmarks.tables import print_table, write_results
from thermocline import _native
from thermocline.config import CrossingKind, Mode
from thermocline.errors import ThermoclineError
from thermocline.files.formats import BF16, F16, Q4_0, Q8_0, BlockFormat
from thermocline.files.quantize import from_float
from thermocline.files.weight import Weight
from thermocline.hardware import catalogue
from thermocline.hardware.machine import Machine, Processor, Tier
from thermocline.memory.arena import Memory
from thermocline.memory.kv_cache import KVCache
from thermocline.memory.loader import load_transformer
from thermocline.ops.contract import Activation, ActiveSet, FfnKind, NeuronBlock
from thermocline.ops.cpu import CpuOps
from thermocline.ops.cuda.beside import CudaDevice
from thermocline.ops.cuda.ops import CudaOps
from thermocline.ops.device import Host
from thermocline.placement.cost import FfnMode
from thermocline.placement.seats import LayerSeat, Seating
from thermocline.placement.workload import NO_OVERHEADS, Overheads
from thermocline.runtime.captured import CapturedStep

ACTIVE = 0.12
MODELS = {"7b": SHAPES["7b"], "13b": SHAPES["13b"], "dry": Shape(64, 512, 2, 2, 1, 320)}
BUDGETS = (0.25, 0.50, 1.00, 0.10, 0.75)
"""Shares of what the whole model takes, the most telling first."""
PARTS = ("kernels", "crossings", "models", "profile", "tests", "sweep")
"""What there is to measure, the most telling first. Models need kernels and crossings, for their predictions."""
SECONDS_A_CASE, SECONDS_OF_TESTS = 30.0, 150.0
COLD = 400_000_000
"""Bytes that kernels read before they come back to the same: some times what second caches hold."""
PROFILED = 5
"""Steps of the profile."""


@dataclass(frozen=True)
class Bench:
    """What all parts share. `skipped` says what there was no time for."""

    gpu: CudaOps
    cpu: CpuOps
    deadline: float
    context: int = 0
    skipped: list[str] = field(default_factory=list)

    @property
    def overheads(self) -> Overheads:
        """What plans set aside; the driver's own part of the device is what it held before anything was made."""
        return NO_OVERHEADS if DRY else replace(Overheads(), margin_vram=Overheads().margin_vram + self.context)

    def seconds(self, call: Callable[[], Any], repeats: int = 20, *, graph: bool = True) -> float:
        """Median seconds of a call on the device; as a graph, so that starting kernels costs nothing."""
        if DRY:
            repeats = 1
        streams, timed = self.gpu.streams, call
        with streams.aside():
            call()
        if graph and streams.real:
            timed = streams.captured(call)
        times = []
        for _ in range(repeats + (0 if DRY else 3)):
            streams.wait()
            began = time.perf_counter()
            timed()
            streams.wait()
            times.append(time.perf_counter() - began)
        return median(times[-repeats:])

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def time_for(self, what: str, seconds: float) -> bool:
        """Whether so many seconds are left; if not, that is kept and said."""
        if self.left >= seconds:
            return True
        self.skipped.append(f"{what}: {max(self.left, 0):.0f} s are left of the {seconds:.0f} it may take")
        print(f"left out: {self.skipped[-1]}", file=sys.stderr)
        return False


def gpu_tests(bench: Bench) -> Row:
    """The tests that need a GPU, as many as end in time."""
    if DRY or not bench.time_for("tests on the device", SECONDS_OF_TESTS / 3):
        return {}
    folders = [f"tests/{name}" for name in ("runtime/test_gpu.py", "runtime/test_captured.py", "memory", "ops")]
    spread = ["-n", "12"] if find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *spread, "-p", "no:cacheprovider", *folders]
    limit = min(SECONDS_OF_TESTS, bench.left - 5)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        bench.skipped.append(f"tests on the device: not done after {limit:.0f} s")
        return {}
    return {"passed": done.returncode == 0, "tail": done.stdout.strip().splitlines()[-12:]}


def copy_bandwidth(bench: Bench) -> float:
    """Bytes/s read and written of a copy on the device."""
    data = torch.zeros((1 << 12) if DRY else (1 << 28), dtype=torch.float32, device=bench.gpu.device)
    other = torch.empty_like(data)
    return 2 * data.nbytes / bench.seconds(lambda: other.copy_(data))


def random_weight(rows: int, columns: int, fmt: BlockFormat) -> Weight:
    rng = np.random.default_rng(rows)
    piece = from_float("w", rng.standard_normal((min(rows, 64), columns), dtype=np.float32), fmt)
    return Weight("w", fmt, (rows, columns), np.resize(piece.data, (rows, piece.data.shape[1])))


def kernels(bench: Bench, copy: float) -> list[Row]:
    """GB/s of the kernels that read weights, cold: more matrices in turn than the device's caches hold."""
    rows, columns = (64, 64) if DRY else (11008, 4096)
    active = np.sort(np.random.default_rng(1).choice(rows, max(1, int(rows * ACTIVE)), replace=False))
    listed: Any = ActiveSet(torch.from_numpy(active.astype(np.int32)).to(bench.gpu.device))  # type: ignore[arg-type]
    result: list[Row] = []
    for fmt in (F16, BF16, Q8_0, Q4_0):
        if result and not bench.time_for(f"kernels in {fmt.name}", 10):  # predictions need the first
            continue
        read = len(active) * fmt.row_bytes(columns)
        matrices, blocks = cold_weights(bench, rows, columns, fmt, 3 * read)
        turns = len(blocks)
        x, out, y = (bench.gpu.array((1, n)) for n in (columns, rows, columns))
        x.normal_()
        counts = bench.gpu.array((4,), "int64")

        def dense(matrices: Any = matrices, x: Any = x, out: Any = out) -> None:
            for matrix in matrices:
                bench.gpu.linear(x, (matrix,), (out,))

        def sparse(blocks: Any = blocks, counts: Any = counts, x: Any = x, y: Any = y) -> None:
            with bench.gpu.counting(counts):
                for block in blocks:
                    bench.gpu.ffn(x, block, listed, y, skip_zeros=True)

        for name, call, times, nbytes in (
            ("matrix-vector", dense, len(matrices), matrices[0].nbytes),
            ("sparse FFN, 12 %", sparse, turns, 3 * read),
        ):
            each = bench.seconds(call) / times
            rate = nbytes / each
            result.append({
                "kernel": name, "format": fmt.name, "µs": round(each * 1e6, 1),
                "MB": round(nbytes / 1e6, 2), "GB/s": round(rate / GB, 1), "of copy": round(rate / copy, 3),
            })  # fmt: skip
    return result


def cold_weights(
    bench: Bench, rows: int, columns: int, fmt: BlockFormat, read: int
) -> tuple[list[Any], list[NeuronBlock]]:
    """Matrices, and blocks of three of them each, of which `read` bytes are read, that no cache holds all."""
    kind = FfnKind(Activation.SILU, gated=True)  # every neuron of the list is computed to its end
    weight = random_weight(rows, columns, fmt)
    matrices = [bench.gpu.place(weight) for _ in range(3 * (1 if DRY else -(-COLD // read)))]
    thirds = zip(matrices[::3], matrices[1::3], matrices[2::3], strict=True)
    return matrices, [NeuronBlock(gate, up, down, True, kind, rows) for gate, up, down in thirds]


def tile_sizes(bench: Bench) -> list[Row]:
    """The kernels with other tile sizes, at a 7B model's shapes."""
    rows, columns = (64, 64) if DRY else (11008, 4096)
    active = np.sort(np.random.default_rng(1).choice(rows, max(1, int(rows * ACTIVE)), replace=False))
    listed: Any = ActiveSet(torch.from_numpy(active.astype(np.int32)).to(bench.gpu.device))  # type: ignore[arg-type]
    result: list[Row] = []
    for fmt in (F16, Q8_0, Q4_0)[: 1 if DRY else 3]:
        if bench.time_for(f"tile sizes in {fmt.name}", 15):
            weights = cold_weights(bench, rows, columns, fmt, 3 * len(active) * fmt.row_bytes(columns))
            result += sweep(bench.gpu, *weights, listed, bench.seconds, lambda: bench.left > 8)
    return result


def crossings(bench: Bench) -> list[Row]:
    """Seconds that one empty crossing adds to a captured step: a model all of whose neurons but one are hot."""
    shape = Shape(64, 512, 2 if DRY else 32, 2, 1, 320)
    source = synthetic(shape, ACTIVE, 1, bench.gpu.device)
    ways = (
        [CrossingKind.MEMORY, CrossingKind.CALLS, CrossingKind.PLAIN]
        if bench.gpu.streams.real
        else [CrossingKind.PLAIN]
    )
    seconds: dict[str, float] = {}
    for name, depth, way in [("none", 512, CrossingKind.AUTO), *((str(w), 511, w) for w in ways)]:
        memory = Memory({Tier.VRAM: CudaDevice(CudaOps(str(bench.gpu.device))), Tier.RAM: Host(bench.cpu)}, {})
        seats = Seating(Tier.VRAM, Tier.VRAM, (LayerSeat(Tier.VRAM, depth, 512),) * shape.n_layer)
        transformer, _ = load_transformer(source, memory, n_ctx=64, seats=seats)
        cache = KVCache(transformer.spec, [layer.device.ops for layer in transformer.layers], 64)
        try:
            step = CapturedStep(transformer, cache, way=way)
        except ThermoclineError as error:
            print(f"crossing by {way}: {error}", file=sys.stderr)
            continue
        seconds[name] = bench.seconds(partial(step.run, 1, 0), 50, graph=False)
        memory.close()
    base = seconds.pop("none")
    return [
        {"crossing": name, "layers": shape.n_layer, "µs a layer": round((t - base) / shape.n_layer * 1e6, 1)}
        for name, t in seconds.items()
    ]


def models(bench: Bench, machine: Machine, name: str, args: argparse.Namespace, results: dict[str, Any]) -> list[Row]:
    """Decode and prefill of one model at every budget go into `results`; returns the kernels of a step by time."""
    if not bench.time_for(f"{name}, all budgets", 1.5 * SECONDS_A_CASE):
        return []
    began = time.monotonic()
    source = synthetic(MODELS[name], ACTIVE, 1, bench.gpu.device)
    if bench.gpu.streams.real:
        torch.cuda.empty_cache()
    print(f"{name}: {source.nbytes / GB:.1f} GB drawn in {time.monotonic() - began:.1f} s", flush=True)
    lengths = Lengths(64, 6, 2) if DRY else Lengths()
    rows: list[Row] = results["models"]
    steps: list[Row] = results["profile"]
    longest = 0.0
    for share in args.budgets:
        for mode in (Mode.PREDICTED, Mode.EXACT) if share == 1.0 else (Mode.PREDICTED,):
            problem = problem_of(source, machine, lengths, FfnMode(str(mode)), bench.overheads)
            budget = int(share * whole(problem))
            for case in cases(problem, budget):
                if not bench.time_for(
                    f"{name}, {share:.0%}, {mode}, {case.name}", max(SECONDS_A_CASE / 3, 1.3 * longest)
                ):
                    continue
                began = time.monotonic()
                shown = {"model": name, "budget": f"{share:.0%}", "mode": str(mode)}
                rows.append(shown | run_case(source, case, bench.cpu, str(bench.gpu.device), budget, lengths, mode))
                longest = max(longest, time.monotonic() - began)
                print_table(rows[-1:])
                if share == 1.0 and mode is Mode.EXACT and "tok/s" in rows[-1]:
                    rows[-1]["GB/s"] = round(bytes_a_token(source) * rows[-1]["tok/s"] / GB, 1)
                if "profile" in args.parts and share == 0.5 and case.name == "ours" and not steps:
                    steps += profile(bench, source, case, budget, lengths)
    return steps


def profile(bench: Bench, source: Source, case: Case, budget: int, lengths: Lengths) -> list[Row]:
    """The kernels and copies of a whole decode step by their time on the device, a step's mean."""
    if not bench.gpu.streams.real or not bench.time_for("profile of a step", SECONDS_A_CASE / 2):
        return []
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    try:
        loaded = Loaded(source, case, bench.cpu, str(bench.gpu.device), budget, lengths, Mode.PREDICTED)
        _, token = loaded.prefill()
        _, call = loaded.stepping()
        call(token)
        with record(activities=[ProfilerActivity.CUDA]) as seen:
            began = time.perf_counter()
            for _ in range(PROFILED):
                token = int(call(token).argmax())
            wall = (time.perf_counter() - began) / PROFILED * 1e6
    except (ThermoclineError, RuntimeError) as error:
        bench.skipped.append(f"profile of a step: {error}")
        return []
    loaded.close()
    rows: list[Row] = []
    for event in sorted(seen.key_averages(), key=lambda e: -float(e.self_device_time_total)):
        each = float(event.self_device_time_total) / PROFILED
        if each:
            share = f"{each / wall:.1%}"
            rows.append(
                {"kernel": event.key[:60], "calls": event.count / PROFILED, "µs": round(each, 1), "of step": share}
            )
    return [{"kernel": "the step on the clock", "calls": 1.0, "µs": round(wall, 1), "of step": "100.0%"}, *rows]


def machine_of(bench: Bench, rows: list[Row], crossings: list[Row]) -> Machine:
    """This machine as the cost model wants it, from what was measured in this run."""
    crossing = min((row["µs a layer"] for row in crossings), default=30.0) * 1e-6
    buffer = np.ones((1 << 22) if DRY else (1 << 30), np.uint8)
    ram = max(_native.read_bandwidth(bench.cpu.context, buffer) for _ in range(3))
    real = bench.gpu.streams.real
    capacity = torch.cuda.get_device_properties(bench.gpu.device).total_memory if real else 1 << 30
    vram = max(row["GB/s"] * GB for row in rows if row["format"] == F16.name and row["kernel"] == "matrix-vector")
    side = 256 if DRY else 4096
    square = torch.ones((side, side), device=bench.gpu.device)

    def product() -> Any:
        with bench.gpu.precision():
            return square @ square

    gpu = Processor(
        name=bench.gpu.name, capacity=capacity, bandwidth=max(vram, 1.0), bandwidth_busy=max(vram, 1.0),
        flops=2 * side**3 / bench.seconds(product), launch=2e-6,
    )  # fmt: skip
    cpu = Processor(
        name="cpu", capacity=1 << 37, bandwidth=ram, bandwidth_busy=ram, flops=cpu_flops(bench.cpu), launch=2e-6
    )
    host = bench.gpu.streams.pinned((1 << (20 if DRY else 28),), torch.uint8)
    there = torch.zeros_like(host, device=bench.gpu.device)
    link = len(host) / bench.seconds(lambda: there.copy_(host, non_blocking=True))
    return Machine(name="this machine", cpu=cpu, gpu=gpu, link=link, crossing=max(crossing, 0.0))


def cpu_flops(cpu: CpuOps) -> float:
    """Operations/s of products over a prompt's tokens."""
    tokens, side = (8, 64) if DRY else (256, 2048)
    matrix = cpu.place(random_weight(side, side, F16))
    x, out = np.ones((tokens, side), np.float32), np.zeros((tokens, side), np.float32)
    times = []
    for _ in range(7):
        began = time.perf_counter()
        cpu.linear(x, (matrix,), (out,))
        times.append(time.perf_counter() - began)
    return 2.0 * tokens * side * side / median(times)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny shapes in the interpreter, nothing written")
    parser.add_argument("--minutes", type=float, default=9.0, help="what does not fit is left out, and said")
    parser.add_argument("--models", nargs="+", default=["dry"] if DRY else ["7b", "13b"], choices=MODELS)
    parser.add_argument("--budgets", nargs="+", type=float, default=(0.5, 1.0) if DRY else BUDGETS, metavar="SHARE")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="what is measured; all, if not said")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    return parser.parse_args()


def measure(bench: Bench, args: argparse.Namespace, results: dict[str, Any], keep: Callable[[], None]) -> None:
    """Fill in `results`, part after part, whatever fails; `keep` writes them down."""
    parts = set(args.parts)
    copy = copy_bandwidth(bench)
    results["copy GB/s"] = round(copy / GB, 1)
    print(f"copies on the device: {copy / GB:.1f} GB/s")

    def attempt(name: str, call: Callable[[], list[Row] | Row]) -> None:
        try:
            results[name] = call()
        except (ThermoclineError, RuntimeError) as error:
            bench.skipped.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            print(f"failed: {bench.skipped[-1]}", file=sys.stderr)
            results[name] = []
        if isinstance(results[name], list) and results[name]:
            print_table(results[name])
        keep()

    if parts & {"kernels", "models"}:
        attempt("kernels", lambda: kernels(bench, copy))
    if parts & {"crossings", "models"}:
        attempt("crossings", lambda: crossings(bench))
    if "models" in parts and results["kernels"]:
        machine = machine_of(bench, results["kernels"], results["crossings"])
        if DRY:
            machine = catalogue.machine("t4+i5-12400")  # on which a GPU is of use
        results |= {"machine": machine, "models": [], "profile": []}
        for name in args.models:
            attempt(name, lambda name=name: models(bench, machine, name, args, results))  # type: ignore[misc]
            results.pop(name)
    if "tests" in parts:
        attempt("tests", lambda: gpu_tests(bench))
    if "sweep" in parts:
        attempt("tile sizes", lambda: tile_sizes(bench))


def main() -> None:
    args = arguments()
    began = time.monotonic()
    gpu = CudaOps()
    bench = Bench(gpu, CpuOps(1 if DRY else args.threads), began + 60 * args.minutes, gpu.held_bytes())
    results: dict[str, Any] = {"device": bench.gpu.name, "torch": torch.__version__, "threads": args.threads}

    def keep() -> None:  # what is measured stays measured, whatever comes
        results["left out"], results["seconds"] = bench.skipped, round(time.monotonic() - began, 1)
        if not DRY:
            write_results("gpu", results)

    try:
        measure(bench, args, results, keep)
    finally:
        results["claims"] = claims(results)
        keep()
        print_table(results["claims"])
    print(f"done in {results['seconds']} s" + (f"; left out: {'; '.join(bench.skipped)}" if bench.skipped else ""))


if __name__ == "__main__":
    main()
