"""Everything about the GPU that needs one, in under nine minutes.

    python -m benchmarks.gpu          # on a machine with a GPU: writes benchmarks/results/gpu.json
    python -m benchmarks.gpu --dry    # tiny shapes in Triton's interpreter: shows that it runs, measures nothing
    python -m benchmarks.gpu --minutes 5 --models 7b --parts kernels crossings models    # where less time is lent

In order: bandwidth of copies, and of the kernels against it; what a crossing costs each way; decode and prefill of a
synthetic model of 7 billion weights at several budgets, beside our own splits by whole layers at the same budget and
beside the cost model's prediction, with device memory against the ledger; the same for 13 billion weights; the kernels
of a whole decode step by time; other tile sizes; the tests that need a GPU. Each is a process of its own with a limit
of time that leaves the later ones theirs (`TIMES`), and every row is written when it is measured (`gpu_apart`). What is
left of the time decides what is left out, and that is said. At the end stands what was to be shown beside what was
measured (`gpu_claims`).

The models are those of `benchmarks.synthetic`, drawn on the GPU: neurons fire 12 % of the time, by a power law, and
low-rank predictors know when. They lie hottest first.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.gpu_apart import Part, Results, Row, apart
from benchmarks.gpu_bench import DRY, Bench
from benchmarks.gpu_claims import claims
from benchmarks.gpu_kernels import crossings, kernels, tile_sizes
from benchmarks.gpu_models import BUDGETS, MODELS, models, profile
from benchmarks.tables import RESULTS, print_table, write_results
from thermocline.hardware.cores import find_cores
from thermocline.ops.cpu import CpuOps
from thermocline.ops.cuda.ops import CudaOps

PARTS = ("kernels", "crossings", "models", "profile", "tests", "sweep")
"""What there is to measure. Models and the profile need kernels and crossings, for their predictions."""


@dataclass(frozen=True)
class Time:
    """Seconds that are kept for a part while earlier ones run, and the most that it gets."""

    kept: float
    most: float


TIMES = {
    "kernels": Time(60, 90), "crossings": Time(20, 45), "first model": Time(120, math.inf),
    "other models": Time(70, math.inf), "profile": Time(35, 60), "tile sizes": Time(25, 90),
    "tests": Time(0, math.inf),
}  # fmt: skip
"""Seven minutes are enough for what is kept, and for the most that kernels take beside it."""
SECONDS_TO_START, END = 8.0, 2.0
"""Seconds without which no part is begun, and that one has to come to its end."""
TESTS = (*(f"tests/runtime/test_{name}.py" for name in ("gpu", "captured", "gpu_memory")), "tests/memory", "tests/ops")
WORKERS, SECONDS_A_TEST, SECONDS_OF_TESTS = 4, 120, 30.0
"""Processes on the one device; seconds of a test; and those without which no tests are begun."""


def pytest_command() -> list[str]:
    """Runs the tests that need a GPU; what compiles kernels ahead of time needs none, and all of the time."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu and not slow", "-k", "not compile", "--tb=line", "-rfE"]
    command += ["-n", str(WORKERS)] if find_spec("xdist") else []
    # One that hangs is not to end the others.
    command += ["--timeout", str(SECONDS_A_TEST)] if find_spec("pytest_timeout") else []
    return [*command, "-p", "no:cacheprovider", *TESTS]


def gpu_tests(bench: Bench) -> Row:
    """The tests that need a GPU, as many as end in time."""
    if DRY or not bench.time_for("tests on the device", SECONDS_OF_TESTS):
        return {}
    limit, passed, said = bench.left - 3, False, ""
    try:
        done = subprocess.run(pytest_command(), capture_output=True, text=True, timeout=limit, check=False)
        passed, said = done.returncode == 0, done.stdout
    except subprocess.TimeoutExpired as error:
        bench.skipped.append(f"tests on the device: not done after {limit:.0f} s")
        said = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
    return {"passed": passed, "tail": said.strip().splitlines()[-40:]}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny shapes in the interpreter, nothing written")
    parser.add_argument("--minutes", type=float, default=9.0, help="what does not fit is left out, and said")
    parser.add_argument("--models", nargs="+", default=["dry"] if DRY else ["7b", "13b"], choices=MODELS)
    parser.add_argument("--budgets", nargs="+", type=float, default=(0.5, 1.0) if DRY else BUDGETS, metavar="SHARE")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="what is measured; all, if not said")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="folder of gpu.json")
    parser.add_argument("--threads", type=int, default=find_cores().threads)
    return parser.parse_args()


Work = Callable[[Bench, Results, Callable[[], None]], None]


@dataclass(frozen=True)
class Job:
    """A part that is wanted. One of `cases` goes on after what ended it, in a new process."""

    name: str
    time: Time
    work: Work
    cases: bool = False


def jobs(args: argparse.Namespace) -> list[Job]:
    """What is wanted, in order. Models want kernels and crossings, for their predictions."""
    wanted, priced = set(args.parts), set(args.parts) & {"models", "profile"}
    first, *others = args.models

    def table(name: str, call: Callable[[Bench, Results], Iterable[Row]]) -> Job:
        def work(bench: Bench, results: Results, keep: Callable[[], None]) -> None:
            rows: list[Row] = results.setdefault(name, [])
            for row in call(bench, results):
                rows.append(row)
                keep()
            if rows:
                print_table(rows)

        return Job(name, TIMES[name], work)

    def model(name: str) -> Job:
        def work(bench: Bench, results: Results, keep: Callable[[], None]) -> None:
            models(bench, name, args.budgets, results, keep)

        return Job(name, TIMES["first model" if name == first else "other models"], work, cases=True)

    def tests(bench: Bench, results: Results, keep: Callable[[], None]) -> None:
        results["tests"] = gpu_tests(bench)

    return [
        *([table("kernels", kernels)] if priced or "kernels" in wanted else []),
        *([table("crossings", crossings)] if priced or "crossings" in wanted else []),
        *([model(name) for name in (first, *others)] if "models" in wanted else []),
        *([table("profile", lambda bench, results: profile(bench, first, results))] if "profile" in wanted else []),
        *([table("tile sizes", tile_sizes)] if "sweep" in wanted else []),
        *([Job("tests", TIMES["tests"], tests)] if "tests" in wanted else []),
    ]


def seconds_for(time: Time, later: Iterable[Time], left: float) -> float:
    """Of so many that are left: later parts keep theirs, and where that cannot be, the earlier part goes first."""
    spare = left - sum(other.kept for other in later)
    return min(left, time.most, max(spare, time.kept))


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

    def keep(*, say: bool = False) -> None:  # what is measured stays measured, whatever comes
        results["seconds"] = round(time.monotonic() - began, 1)
        results["claims"] = claims(results)
        if not DRY:
            write_results("gpu", results, args.output, say=say)

    def run(job: Job, until: float) -> bool:
        """Whether the job came to no end of its own before `until`, and got on."""
        seconds, before = until - time.monotonic(), len(results.get("models", ()))
        if seconds < SECONDS_TO_START:
            results["left out"].append(f"{job.name}: {max(seconds, 0):.0f} s are left")
            print(f"left out: {results['left out'][-1]}", file=sys.stderr)
            return False
        trouble = apart(job.name, on_the_device(args, job.work, until - END), results, seconds, keep)
        if trouble is not None:
            results["left out"].append(trouble)
            print(f"failed: {trouble}", file=sys.stderr)
        return trouble is not None and job.cases and len(results.get("models", ())) > before

    wanted = jobs(args)
    for i, job in enumerate(wanted):
        until = time.monotonic() + seconds_for(
            job.time, (other.time for other in wanted[i + 1 :]), end - time.monotonic()
        )
        while run(job, until):
            keep()
        keep()
    keep(say=True)
    print_table(results["claims"])
    skipped = results["left out"]
    print(f"done in {results['seconds']} s" + (f"; left out: {'; '.join(skipped)}" if skipped else ""))


if __name__ == "__main__":
    main()
