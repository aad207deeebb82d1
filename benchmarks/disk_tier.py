"""A model that does not fit its RAM budget: tokens, memory, and what the disk was asked for; beside llama.cpp's map.

    python -m benchmarks.disk_tier -m models/synthetic-1.3b.f16.records.gguf --ram-budget 1GiB \\
        --llama-python llama/bin/python --llama-model models/synthetic-1.3b.f16.gguf

Every run is a process of its own: without a budget, with it, and llama.cpp with its memory map, from which nothing is
copied into the order of other kernels (in memory of its own that would not fit). The last two run under
the same limit of memory, page cache included, of the budget and a twentieth more: a control group below our own. Where
none can be made, the result says so. Reported are the greedy tokens (they must be the same), the peak of resident
memory (VmHWM), the most that the group was charged, what of the model's files is in the page cache at the end (mincore;
it is emptied first), tokens/s, and what was read: bytes and requests a token, and the time that random reads as large
would take alone, as many in flight, measured in the same process in turns with decoding (a disk that others use is not
as fast now as it was), beside the time that something was in flight.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.memory_limit import MemoryLimit
from benchmarks.peer import Peer, PeerError
from benchmarks.tables import add_keeping, print_table, write_results
from thermocline.config import LoadSettings, Mode
from thermocline.files.open import open_model
from thermocline.hardware.disk import random_rate
from thermocline.hardware.reader import Reader, ReadStats
from thermocline.memory import disk_store, pieces
from thermocline.memory.bundle import bundle_path
from thermocline.placement.budget import parse_budget
from thermocline.runtime.below import Below
from thermocline.runtime.loading import load_model

PROMPT = 8
CONTEXT = 256
MB = 1e6
TURN, PROBE_SECONDS = 4, 0.25
"""Tokens between two probes of the disk, and how long each takes."""
ALLOWANCE = 1.05
"""Memory that the processes get, as a multiple of the budget."""


@dataclass(frozen=True)
class Part:
    """Some tokens: their seconds, and of each kind what was read and the bytes/s that reads alone reached then."""

    seconds: float
    reads: dict[str, tuple[ReadStats, float]]


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    if path.is_file():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def cached(path: Path) -> int:
    """Bytes of a file that are in the page cache."""
    if not path.is_file():
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        size = len(mapping)
        pages = -(-size // mmap.PAGESIZE)
        flags = (ctypes.c_ubyte * pages)()
        address = np.frombuffer(mapping, np.uint8).ctypes.data
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), flags):
            raise OSError(ctypes.get_errno(), "mincore")
        return sum(flag & 1 for flag in flags) * mmap.PAGESIZE


def status() -> dict[str, int]:
    """Bytes of the process: peak, anonymous, of files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon", "RssFile")}


def measure(path: Path, budget: str | None, tokens: int, threads: int, mode: str) -> dict[str, Any]:
    """Load, decode greedily, and tell."""
    files = (path, bundle_path(path))
    source = open_model(path)
    settings = LoadSettings(ctx_size=CONTEXT, ubatch=PROMPT, threads=threads, mode=Mode(mode), ram_budget=budget)
    model = load_model(source, settings)
    below, engine = model.placing.below, model.engine
    ticket = engine.begin()
    logits = engine.prefill(list(range(100, 100 + PROMPT)), reuse=False)[0]
    made: list[int] = []
    parts: list[Part] = []
    uses = below.uses
    while len(made) < tokens:
        before, began = stats(below), time.perf_counter()
        for _ in range(min(TURN, tokens - len(made))):
            made.append(int(np.argmax(logits)))
            logits = engine.step(made[-1], ticket)
        seconds = time.perf_counter() - began
        read = {name: found.since(before[name]) for name, found in stats(below).items()}
        parts.append(Part(seconds, {name: (r, probed(name, r, files)) for name, r in read.items() if r.requests}))
    seconds = sum(part.seconds for part in parts)
    record: dict[str, Any] = {"budget": budget, "tokens": made, "tokens_per_second": tokens / seconds, **status()}
    record["page_cache"] = sum(cached(file) for file in files)
    record["notices"] = list(model.notices)
    record["predictor_bytes"] = model.report.predictor_bytes
    if model.placing.plan is not None:
        record["predicted_tokens_per_second"] = model.placing.plan.predicted.tokens_per_second
    if below.reads:
        asked, found = below.uses.asked - uses.asked, below.uses.found - uses.found
        record["seconds"], record["hit_rate"] = seconds, found / max(asked, 1)
        kinds = dict.fromkeys(kind for part in parts for kind in part.reads)
        record["reads"] = {kind: kind_of_read(kind, parts, tokens) for kind in kinds}
        alone = sum(read["seconds_alone"] for read in record["reads"].values())
        record["of_allowed"] = alone / seconds  # of all the time, computing included; reads of both kinds overlap
    return record


def stats(below: Below) -> dict[str, ReadStats]:
    """What was read so far, by kind."""
    parts = {"neurons": below.store, "matrices": below.streaming or below.scanner}
    return {name: part.stats for name, part in parts.items() if part is not None}


def probed(kind: str, read: ReadStats, files: tuple[Path, Path]) -> float:
    """Bytes/s that random reads as large as these on average reach alone."""
    size = max(4096, round(read.nbytes / read.requests / 4096) * 4096)
    depth = disk_store.IN_FLIGHT if kind == "neurons" else pieces.IN_FLIGHT
    with Reader(files[kind == "neurons" and files[1].is_file()], depth=depth, largest=size) as reader:
        return random_rate(reader, size, PROBE_SECONDS)


def kind_of_read(kind: str, parts: list[Part], tokens: int) -> dict[str, float]:
    """What was read, and what random reads of that mean size reach alone."""
    found = [part.reads[kind] for part in parts if kind in part.reads]
    read = sum((read for read, _ in found), ReadStats())
    alone = sum(read.nbytes / rate for read, rate in found)
    return {
        "megabytes_a_token": read.nbytes / tokens / MB,
        "requests_a_token": read.requests / tokens,
        "bytes_of_a_read": read.nbytes / read.requests,
        "busy_seconds": read.busy,
        "rate": read.bandwidth / MB,
        "probe_rate": read.nbytes / alone / MB,
        "of_probe": read.bandwidth / (read.nbytes / alone),
        "seconds_alone": alone,
    }


def peer(python: str, path: Path, tokens: int, threads: int) -> dict[str, Any]:
    """llama.cpp with its memory map: decode the same number of tokens."""
    with Peer(python) as llama:
        llama.ask("load", path=str(path), n_ctx=CONTEXT, threads=threads, batch=PROMPT, mapped=True)
        llama.ask("prefill", tokens=list(range(100, 100 + PROMPT)))
        seconds = [llama.seconds("decode", tokens=[300 + i]) for i in range(tokens)]
        return {
            **llama.about,
            "tokens_per_second": tokens / sum(seconds),
            "seconds": seconds,
            "page_cache": cached(path),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--ram-budget", default="1GiB")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mode", default="predicted", choices=["predicted", "exact"])
    parser.add_argument("--llama-python", help="interpreter of an environment with llama-cpp-python")
    parser.add_argument("--llama-model", type=Path, help="the model in the layout that llama.cpp reads")
    parser.add_argument("--llama-tokens", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="turns of the limited runs")
    parser.add_argument("--rest", type=float, default=0.0, help="seconds of pause before each limited run")
    add_keeping(parser)
    parser.add_argument("--one", choices=["with", "without", "llama"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one == "llama":
        json.dump(peer(args.llama_python, args.llama_model, args.llama_tokens, args.threads), sys.stdout)
    elif args.one:
        budget = args.ram_budget if args.one == "with" else None
        json.dump(measure(args.model, budget, args.tokens, args.threads, args.mode), sys.stdout)
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Run all of them, and print and keep what they say."""
    which = ["without", "with"] + ["llama"] * bool(args.llama_python and args.llama_model)
    limit = MemoryLimit(int(parse_budget(args.ram_budget).amount * ALLOWANCE))
    print(limit.means or f"memory is not limited but by the budget: no control group could be made ({limit.why})")
    records: dict[str, Any] = {}
    rates: dict[str, list[float]] = {}
    allowed: list[float] = []
    with limit:
        for name in which[:1] + which[1:] * args.rounds:
            for file in (args.model, bundle_path(args.model), args.llama_model):
                if file is not None:
                    forget(file)
            command = [sys.executable, "-m", "benchmarks.disk_tier", *sys.argv[1:], "--one", name]
            if name != "without":
                time.sleep(args.rest)
            try:
                if name == "without":
                    out, charged = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout, 0
                else:
                    out, charged = limit.run(command)
            except (subprocess.CalledProcessError, PeerError) as error:
                print(f"{name}: {error}")
                records[name] = {"error": str(error)}
                continue
            records[name] = json.loads(out) | {"most_charged": charged}
            rates.setdefault(name, []).append(records[name]["tokens_per_second"])
            if "of_allowed" in records[name]:
                allowed.append(records[name]["of_allowed"])
    for name, found in rates.items():
        records[name]["rates"] = found
        records[name]["tokens_per_second"] = statistics.median(found)
    if allowed:
        records["with"] |= {"of_allowed": statistics.median(allowed), "all_of_allowed": allowed}
    show(records, args)
    if not args.dry:
        about = {"model": args.model.name, "mode": args.mode, "limited_by": limit.means or limit.why, "rest": args.rest}
        write_results("disk_tier", {"machine": machine.facts(args.threads), **about, **records}, args.into)


def show(records: dict[str, Any], args: argparse.Namespace) -> None:
    """For people."""
    with_, without = records["with"], records["without"]
    if "tokens" in with_:
        print(f"the same {args.tokens} tokens: {with_['tokens'] == without['tokens']}")
    print_table(
        [
            {
                "run": {"without": "no budget", "with": f"budget {args.ram_budget}"}.get(name, "llama.cpp, mapped"),
                "tokens/s": f"{r['tokens_per_second']:.2f}",
                "peak resident MB": f"{r['VmHWM'] / MB:.0f}" if "VmHWM" in r else "",
                "most charged MB": f"{r['most_charged'] / MB:.0f}" if r["most_charged"] else "",
                "page cache MB": f"{r['page_cache'] / MB:.0f}",
            }
            for name, r in records.items()
            if "error" not in r
        ]
    )
    for kind, read in with_.get("reads", {}).items():
        if read:
            print(
                f"{kind}: {read['megabytes_a_token']:.0f} MB in {read['requests_a_token']:.0f} reads a token at "
                f"{read['rate']:.0f} MB/s while in flight, {read['of_probe']:.0%} of what random reads of "
                f"{read['bytes_of_a_read'] / 1024:.0f} KiB reach alone; in flight "
                f"{read['busy_seconds'] / with_['seconds']:.0%} of the time"
            )
    if "of_allowed" in with_:
        print(f"one after another at those rates, the reads alone would take {with_['of_allowed']:.0%} of the time")
    if "hit_rate" in with_:
        print(f"{with_['hit_rate']:.1%} of the wanted neurons were in memory")
    if "rates" in records.get("llama", {}) and "rates" in with_:
        times = [a / b for a, b in zip(with_["rates"], records["llama"]["rates"], strict=True)]
        print(
            f"{statistics.median(times):.1f} times as fast as llama.cpp (median of {len(times)} rounds, "
            f"{min(times):.1f} to {max(times):.1f})"
        )
    for line in with_.get("notices", ()):
        print(f"note: {line}")


if __name__ == "__main__":
    main()
