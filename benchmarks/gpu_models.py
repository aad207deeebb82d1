"""Synthetic models at every budget on this machine's GPU, the most telling case first, and the profile of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_apart import Results, Row, failure
from benchmarks.gpu_bench import ACTIVE, DRY, Bench
from benchmarks.gpu_cases import GB, Case, Lengths, Loaded, bytes_a_token, cases, problem_of, run_case, whole
from benchmarks.gpu_claims import OF_COPY
from benchmarks.synthetic_families import SHAPES, Shape
from benchmarks.synthetic_gpu import Source, synthetic
from benchmarks.tables import print_table
from thermocline import _native
from thermocline.config import Mode
from thermocline.errors import HardwareError
from thermocline.files.formats import F16
from thermocline.hardware import catalogue
from thermocline.hardware.bandwidth import memory_load
from thermocline.hardware.gpu import measure_gpu
from thermocline.hardware.machine import Machine, Processor, Shares
from thermocline.hardware.probe import SECONDS, with_link
from thermocline.hardware.rates import flops_rate, sparse_rate
from thermocline.placement.cost import FfnMode

MODELS = {"7b": SHAPES["7b"], "13b": SHAPES["13b"], "dry": Shape(64, 512, 2, 2, 1, 320)}
BUDGETS = (1.00, 0.50, 0.25, 0.10, 0.75)
"""Shares of what the whole model takes, the most telling first."""
DENSE_TOO = (0.25, 0.50)
"""Budgets at which a layer split that computes all neurons is measured too: what other engines do."""
LENGTHS = Lengths(64, 6, 2) if DRY else Lengths()
SECONDS_TO_DRAW, SECONDS_A_CASE, LONGER = 25.0, 10.0, 1.3
"""Without which no model is begun, and no case; and times that a case may take longer than others did."""
PROFILED = 5
"""Steps of the profile."""


@dataclass(frozen=True)
class Wanted:
    """A case under a budget, and how its row begins."""

    shown: Row
    budget: int
    case: Case


def models(bench: Bench, name: str, budgets: Sequence[float], results: Results, keep: Callable[[], None]) -> None:
    """Decode and prefill of one model at every budget go into `results`; what is there already is left out."""
    if not bench.time_for(f"{name}, all budgets", SECONDS_TO_DRAW + SECONDS_A_CASE):
        return
    machine, source = machine_of(bench, results), drawn(bench, name)
    rows: list[Row] = results.setdefault("models", [])
    took: list[float] = []
    for wanted in wanted_cases(bench, name, source, machine, budgets):
        shown, case = wanted.shown | {"placement": wanted.case.name}, wanted.case
        if any(shown.items() <= row.items() for row in rows):
            continue
        if not bench.time_for(", ".join(shown.values()), seconds_of_next(took)):
            continue
        began = time.monotonic()
        rows.append(shown | {"failed": "it did not come to its end"})
        keep()  # what ends this process is not tried again
        row = rows[-1] = shown | run_case(source, case, bench.cpu, str(bench.gpu.device), wanted.budget, LENGTHS)
        if "100%" in shown.values() and case.mode is Mode.EXACT and "tok/s" in row:
            row["GB/s"] = round(bytes_a_token(source) * row["tok/s"] / GB, 1)
        keep()
        print_table([row])
        took.append(time.monotonic() - began)
        if "failed" in row and bench.gpu.streams.real:
            torch.cuda.synchronize()  # an error that stays ends this process: another goes on


def seconds_of_next(took: Sequence[float]) -> float:
    """What a case may take after those that took so long; the first compiles kernels, and says nothing of others."""
    return max(SECONDS_A_CASE, LONGER * median(took[1:]) if took[1:] else 0.0)


def wanted_cases(
    bench: Bench, name: str, source: Source, machine: Machine, budgets: Sequence[float]
) -> Iterator[Wanted]:
    """Cases in the order of their value. At the whole budget a split places all as we do: that comes last."""
    last = []
    for share in budgets:
        for mode in (Mode.EXACT, Mode.PREDICTED) if share == 1.0 else (Mode.PREDICTED,):
            shown = {"model": name, "budget": f"{share:.0%}", "mode": str(mode)}
            try:
                problem = problem_of(source, machine, LENGTHS, FfnMode(str(mode)), bench.overheads)
                budget = int(share * whole(problem))
                found = [Wanted(shown, budget, case) for case in cases(problem, budget, dense=share in DENSE_TOO)]
            except Exception as error:  # other budgets have plans
                bench.skipped.append(f"{', '.join(shown.values())}: {failure(error)}")
                continue
            for wanted in found:
                if share == 1.0 and wanted.case.name != "ours":
                    last.append(wanted)
                else:
                    yield wanted
    yield from last


def drawn(bench: Bench, name: str) -> Source:
    began = time.monotonic()
    source = synthetic(MODELS[name], ACTIVE, 1, bench.gpu.device)
    if bench.gpu.streams.real:
        torch.cuda.empty_cache()
    print(f"{name}: {source.nbytes / GB:.1f} GB drawn in {time.monotonic() - began:.1f} s", flush=True)
    return source


def profile(bench: Bench, name: str, results: Results) -> list[Row]:
    """The kernels and copies of a whole decode step at half the budget by their time on the device, a step's mean."""
    if not bench.gpu.streams.real or not bench.time_for("profile of a step", SECONDS_TO_DRAW):
        return []
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    machine, source = machine_of(bench, results), drawn(bench, name)
    problem = problem_of(source, machine, LENGTHS, FfnMode.PREDICTED, bench.overheads)
    budget = whole(problem) // 2
    case = cases(problem, budget)[0]
    loaded = Loaded(source, case, bench.cpu, str(bench.gpu.device), budget, LENGTHS)
    try:
        _, token = loaded.prefill()
        _, call = loaded.stepping()
        call(token)
        with record(activities=[ProfilerActivity.CUDA]) as seen:
            began = time.perf_counter()
            for _ in range(PROFILED):
                token = int(call(token).argmax())
            wall = (time.perf_counter() - began) / PROFILED * 1e6
    finally:
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


def machine_of(bench: Bench, results: Results) -> Machine:
    """This machine as the cost model wants it, from what was measured in this run."""
    if "machine" not in results:
        # A T4's machine where nothing is measured: a GPU is of use there.
        results["machine"] = catalogue.machine("t4+i5-12400") if DRY else measured_machine(bench, results)
    machine: Machine = results["machine"]
    return machine


def measured_machine(bench: Bench, results: Results) -> Machine:
    buffer = np.ones(1 << 30, np.uint8)
    ram = max(_native.read_bandwidth(bench.cpu.context, buffer) for _ in range(3))
    fast = measure_gpu(bench.gpu.device.index or 0, memory_load(buffer, bench.cpu.threads, SECONDS))
    if fast is None:
        raise HardwareError("torch sees no GPU that can be measured")
    capacity = torch.cuda.get_device_properties(bench.gpu.device).total_memory
    vram, apart = vram_rates(results, fast.vram)
    gpu = Processor(
        name=bench.gpu.name, capacity=capacity, bandwidth=vram,
        bandwidth_busy=vram * min(1.0, fast.vram_beside_ram / fast.vram), flops=fast.flops, launch=fast.launch,
        sparse=min(1.0, apart / vram),
    )  # fmt: skip
    cpu = Processor(
        name="cpu", capacity=1 << 37, bandwidth=ram, bandwidth_busy=min(ram, fast.ram_beside_vram),
        flops=flops_rate(bench.cpu.threads), launch=2e-6,
        sparse=min(1.0, sparse_rate(buffer, bench.cpu.threads, SECONDS) / ram),
    )  # fmt: skip
    # The model counts both ways of a crossing, there and back.
    crossing = min((row["µs a layer"] for row in results.get("crossings", ()) if "µs a layer" in row), default=30.0)
    return Machine(
        name="this machine", cpu=cpu, gpu=gpu, link=fast.link, crossing=max(crossing * 0.5e-6, 0.0),
        shares=with_link(Shares(), fast, ram),
    )  # fmt: skip


def vram_rates(results: Results, read: float) -> tuple[float, float]:
    """Bytes/s at which kernels get through whole matrices, and through neurons that lie apart.

    Where that was not measured, what they are to reach of the rate of copies, or else of the rate `read`.
    """
    rows: list[dict[str, Any]] = results.get("kernels", [])
    halves = {row["kernel"][:6]: row["GB/s"] * GB for row in rows if row["format"] == F16.name and "GB/s" in row}
    neighbours = halves.get("matrix", OF_COPY * results.get("copy GB/s", read / GB) * GB)
    apart = halves.get("sparse", neighbours)
    return max(neighbours, 1.0), max(apart, 1.0)
