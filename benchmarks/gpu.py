"""Everything about the GPU that needs one, in under nine minutes.

    python -m benchmarks.gpu          # on a machine with a GPU: writes benchmarks/results/gpu.json
    python -m benchmarks.gpu --dry    # tiny shapes in Triton's interpreter: shows that it runs, measures nothing
    python -m benchmarks.gpu --minutes 5 --models 7b --parts kernels crossings models    # where less time is lent

In order: bandwidth of copies, and of the kernels against it; what a crossing costs each way; decode and prefill of a
synthetic model of 7 billion weights at several budgets, beside our own splits by whole layers at the same budget and
beside the cost model's prediction, with device memory against the ledger; the tests that need a GPU; the same for 13
billion weights; the kernels of a whole decode step by time; other tile sizes. Each is a process of its own with a limit
of time, and what is measured is written at once (`gpu_apart`). What is left of the time decides what is left out, and
that is said. At the end stands what was to be shown beside what was measured (`gpu_claims`).

The models are those of `benchmarks.synthetic`, drawn on the GPU: neurons fire 12 % of the time, by a power law, and
low-rank predictors know when. They lie hottest first.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from benchmarks.gpu_apart import Part, Results, apart
from benchmarks.gpu_cases import GB, Lengths, Loaded, Row, bytes_a_token, cases, problem_of, run_case, whole
from benchmarks.gpu_claims import claims
from benchmarks.gpu_sweep import sweep
from benchmarks.synthetic_families import SHAPES, Shape
from benchmarks.synthetic_gpu import Source, synthetic
from benchmarks.tables import RESULTS, print_table, write_results
from thermocline import _native
from thermocline.config import CrossingKind, Mode
from thermocline.errors import HardwareError, ThermoclineError
from thermocline.files.formats import BF16, F16, Q4_0, Q8_0, BlockFormat
from thermocline.files.quantize import from_float
from thermocline.files.weight import Weight
from thermocline.hardware import catalogue
from thermocline.hardware.bandwidth import memory_load
from thermocline.hardware.gpu import measure_gpu
from thermocline.hardware.machine import Machine, Processor, Shares, Tier
from thermocline.hardware.probe import SECONDS, with_link
from thermocline.hardware.rates import flops_rate, sparse_rate
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
DENSE_TOO = (0.25, 0.50)
"""Budgets at which a layer split that computes all neurons is measured too: what other engines do."""
PARTS = ("kernels", "crossings", "models", "profile", "tests", "sweep")
"""What there is to measure, the most telling first. Models need kernels and crossings, for their predictions."""
SECONDS_A_CASE, SECONDS_OF_TESTS = 30.0, 150.0
LIMITS = {"kernels": 90.0, "crossings": 60.0, "profile": 60.0, "tests": SECONDS_OF_TESTS, "tile sizes": 90.0}
"""Seconds of a part; models take what is left, and the first of them what the tests leave."""
RUNTIME_TESTS = tuple(f"runtime/test_{name}.py" for name in ("gpu", "captured", "gpu_memory"))
SECONDS_TO_START, END = 8.0, 2.0
"""Seconds without which no part is begun, and that one has to come to its end."""
LENGTHS = Lengths(64, 6, 2) if DRY else Lengths()
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
    folders = [f"tests/{name}" for name in (*RUNTIME_TESTS, "memory", "ops")]
    more = ["-n", "12"] if find_spec("xdist") else []
    more += ["--timeout", "60"] if find_spec("pytest_timeout") else []  # one that hangs is not to end the others
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--tb=line", "-rfE", "-p", "no:cacheprovider", *more]
    limit, passed, said = bench.left - 3, False, ""
    try:
        done = subprocess.run([*command, *folders], capture_output=True, text=True, timeout=limit, check=False)
        passed, said = done.returncode == 0, done.stdout
    except subprocess.TimeoutExpired as error:
        bench.skipped.append(f"tests on the device: not done after {limit:.0f} s")
        said = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
    return {"passed": passed, "tail": said.strip().splitlines()[-40:]}


def copy_bandwidth(bench: Bench, results: Results) -> float:
    """Bytes/s read and written of a copy on the device."""
    data = torch.zeros((1 << 12) if DRY else (1 << 28), dtype=torch.float32, device=bench.gpu.device)
    other = torch.empty_like(data)
    copy = 2 * data.nbytes / bench.seconds(lambda: other.copy_(data))
    results["copy GB/s"] = round(copy / GB, 1)
    print(f"copies on the device: {copy / GB:.1f} GB/s")
    return copy


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
            bench.skipped.append(f"crossing by {way}: {error}")
            print(bench.skipped[-1], file=sys.stderr)
            continue
        seconds[name] = bench.seconds(partial(step.run, 1, 0), 50, graph=False)
        memory.close()
    base = seconds.pop("none")
    return [
        {"crossing": name, "layers": shape.n_layer, "µs a layer": round((t - base) / shape.n_layer * 1e6, 1)}
        for name, t in seconds.items()
    ]


def models(bench: Bench, name: str, args: argparse.Namespace, results: Results, keep: Callable[[], None]) -> None:
    """Decode and prefill of one model at every budget go into `results`."""
    if not bench.time_for(f"{name}, all budgets", 1.5 * SECONDS_A_CASE):
        return
    machine = results["machine"] = machine_of(bench, results["kernels"], results.get("crossings", []))
    source = drawn(bench, name)
    lengths = LENGTHS
    rows: list[Row] = results.setdefault("models", [])
    longest = 0.0
    for share in args.budgets:
        for mode in (Mode.PREDICTED, Mode.EXACT) if share == 1.0 else (Mode.PREDICTED,):
            problem = problem_of(source, machine, lengths, FfnMode(str(mode)), bench.overheads)
            budget = int(share * whole(problem))
            for case in cases(problem, budget, dense=share in DENSE_TOO):
                if not bench.time_for(
                    f"{name}, {share:.0%}, {mode}, {case.name}", max(SECONDS_A_CASE / 3, 1.3 * longest)
                ):
                    continue
                began = time.monotonic()
                shown = {"model": name, "budget": f"{share:.0%}", "mode": str(mode)}
                rows.append(shown | run_case(source, case, bench.cpu, str(bench.gpu.device), budget, lengths))
                longest = max(longest, time.monotonic() - began)
                print_table(rows[-1:])
                if share == 1.0 and mode is Mode.EXACT and "tok/s" in rows[-1]:
                    rows[-1]["GB/s"] = round(bytes_a_token(source) * rows[-1]["tok/s"] / GB, 1)
                keep()


def drawn(bench: Bench, name: str) -> Source:
    began = time.monotonic()
    source = synthetic(MODELS[name], ACTIVE, 1, bench.gpu.device)
    if bench.gpu.streams.real:
        torch.cuda.empty_cache()
    print(f"{name}: {source.nbytes / GB:.1f} GB drawn in {time.monotonic() - began:.1f} s", flush=True)
    return source


def profile(bench: Bench, name: str, results: Results) -> list[Row]:
    """The kernels and copies of a whole decode step at half the budget by their time on the device, a step's mean."""
    if not bench.gpu.streams.real or not bench.time_for("profile of a step", SECONDS_A_CASE):
        return []
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    machine, source = machine_of(bench, results["kernels"], results.get("crossings", [])), drawn(bench, name)
    problem = problem_of(source, machine, LENGTHS, FfnMode.PREDICTED, bench.overheads)
    budget = whole(problem) // 2
    case = cases(problem, budget)[0]
    loaded = Loaded(source, case, bench.cpu, str(bench.gpu.device), budget, LENGTHS)
    _, token = loaded.prefill()
    _, call = loaded.stepping()
    call(token)
    with record(activities=[ProfilerActivity.CUDA]) as seen:
        began = time.perf_counter()
        for _ in range(PROFILED):
            token = int(call(token).argmax())
        wall = (time.perf_counter() - began) / PROFILED * 1e6
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
    if DRY:
        return catalogue.machine("t4+i5-12400")  # on which a GPU is of use
    # The model counts both ways of a crossing, there and back.
    crossing = min((row["µs a layer"] for row in crossings), default=30.0) * 0.5e-6
    buffer = np.ones(1 << 30, np.uint8)
    ram = max(_native.read_bandwidth(bench.cpu.context, buffer) for _ in range(3))
    fast = measure_gpu(bench.gpu.device.index or 0, memory_load(buffer, bench.cpu.threads, SECONDS))
    if fast is None:
        raise HardwareError("torch sees no GPU that can be measured")
    capacity = torch.cuda.get_device_properties(bench.gpu.device).total_memory
    halves = {str(row["kernel"])[:6]: row["GB/s"] * GB for row in rows if row["format"] == F16.name}
    vram, apart = (max(halves[name], 1.0) for name in ("matrix", "sparse"))
    gpu = Processor(
        name=bench.gpu.name, capacity=capacity, bandwidth=vram,
        bandwidth_busy=vram * min(1.0, fast.vram_beside_ram / fast.vram), flops=fast.flops, launch=2e-6,
        sparse=min(1.0, apart / vram),
    )  # fmt: skip
    cpu = Processor(
        name="cpu", capacity=1 << 37, bandwidth=ram, bandwidth_busy=min(ram, fast.ram_beside_vram),
        flops=flops_rate(bench.cpu.threads), launch=2e-6,
        sparse=min(1.0, sparse_rate(buffer, bench.cpu.threads, SECONDS) / ram),
    )  # fmt: skip
    shares = with_link(Shares(), fast, ram)
    return Machine(
        name="this machine", cpu=cpu, gpu=gpu, link=fast.link, crossing=max(crossing, 0.0), shares=shares
    )  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny shapes in the interpreter, nothing written")
    parser.add_argument("--minutes", type=float, default=9.0, help="what does not fit is left out, and said")
    parser.add_argument("--models", nargs="+", default=["dry"] if DRY else ["7b", "13b"], choices=MODELS)
    parser.add_argument("--budgets", nargs="+", type=float, default=(0.5, 1.0) if DRY else BUDGETS, metavar="SHARE")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="what is measured; all, if not said")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="folder of gpu.json")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    return parser.parse_args()


Work = Callable[[Bench, Results, Callable[[], None]], None]


def jobs(args: argparse.Namespace) -> dict[str, tuple[float, Work]]:
    """Most seconds and work of every part that is wanted, in order. Models want kernels, for their predictions."""
    wanted, priced = set(args.parts), set(args.parts) & {"models", "profile"}

    def table(name: str, call: Callable[[Bench, Results], list[Row] | Row]) -> tuple[float, Work]:
        def work(bench: Bench, results: Results, keep: Callable[[], None]) -> None:
            rows = results[name] = call(bench, results)
            if isinstance(rows, list) and rows:
                print_table(rows)

        return LIMITS[name], work

    def model(name: str) -> tuple[float, Work]:
        return math.inf, lambda bench, results, keep: models(bench, name, args, results, keep)

    first, *others = args.models
    found: dict[str, tuple[float, Work]] = {}
    if priced or "kernels" in wanted:
        found["kernels"] = table("kernels", lambda bench, results: kernels(bench, copy_bandwidth(bench, results)))
    if priced or "crossings" in wanted:
        found["crossings"] = table("crossings", lambda bench, _: crossings(bench))
    if "models" in wanted:
        found[first] = model(first)
    if "tests" in wanted:
        found["tests"] = table("tests", lambda bench, _: gpu_tests(bench))
    if "models" in wanted:
        found |= {name: model(name) for name in others}
    if "profile" in wanted:
        found["profile"] = table("profile", lambda bench, results: profile(bench, first, results))
    if "sweep" in wanted:
        found["tile sizes"] = table("tile sizes", lambda bench, _: tile_sizes(bench))
    return found


def on_the_device(args: argparse.Namespace, work: Work, until: float) -> Part:
    """The work as a part, which first gets hold of the device."""

    def part(results: Results, tell: Callable[[], None]) -> None:
        gpu = CudaOps()
        bench = Bench(gpu, CpuOps(1 if DRY else args.threads), until, gpu.held_bytes(), results["left out"])
        results["device"] = gpu.name
        work(bench, results, tell)

    return part


def main() -> None:
    args = arguments()
    began = time.monotonic()
    end = began + 60 * args.minutes
    results: Results = {"torch": torch.__version__, "threads": args.threads, "left out": []}

    def keep() -> None:  # what is measured stays measured, whatever comes
        results["seconds"] = round(time.monotonic() - began, 1)
        results["claims"] = claims(results)
        if not DRY:
            write_results("gpu", results, args.output)

    wanted = jobs(args)
    reserved = SECONDS_OF_TESTS if len(wanted) > 3 and "tests" in wanted else 0.0
    for name, (limit, work) in wanted.items():
        reserved = 0.0 if name == "tests" else reserved
        seconds = min(limit, end - reserved - time.monotonic())
        if seconds < SECONDS_TO_START:
            results["left out"].append(f"{name}: {max(seconds, 0):.0f} s are left")
            print(f"left out: {results['left out'][-1]}", file=sys.stderr)
            continue
        until = time.monotonic() + seconds - END
        trouble = apart(name, on_the_device(args, work, until), results, seconds, keep)
        if trouble is not None:
            results["left out"].append(trouble)
            print(f"failed: {trouble}", file=sys.stderr)
        keep()
    keep()
    print_table(results["claims"])
    skipped = results["left out"]
    print(f"done in {results['seconds']} s" + (f"; left out: {'; '.join(skipped)}" if skipped else ""))


if __name__ == "__main__":
    main()
