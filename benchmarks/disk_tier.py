"""A model that does not fit its RAM budget: tokens, memory, and what the disk was asked for.

    python -m benchmarks.disk_tier -m models/synthetic-1.3b.f16.records.gguf --ram-budget 1GiB

Every run is a process of its own: without a budget, and with it. Reported are the greedy tokens (they must be the
same), the peak of resident memory (VmHWM) and what of the model's files is in the page cache at the end (mincore; it
is emptied first), tokens/s, bytes and requests a token, and the rate while reads were in flight beside that of random
reads of the same mean size, measured in the same process afterwards.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables import print_table, write_results
from thermocline.config import LoadSettings
from thermocline.files.open import open_model
from thermocline.hardware.disk import random_rate
from thermocline.hardware.reader import Reader
from thermocline.memory.bundle import bundle_path
from thermocline.runtime.loading import load_model

PROMPT = 8
CONTEXT = 256
MB = 1e6


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


def measure(path: Path, budget: str | None, tokens: int, threads: int) -> dict[str, Any]:
    """Load, decode greedily, and tell."""
    files = (path, bundle_path(path))
    for file in files:
        forget(file)
    source = open_model(path)
    settings = LoadSettings(ctx_size=CONTEXT, ubatch=PROMPT, threads=threads, mode="predicted", ram_budget=budget)  # type: ignore[arg-type]
    model = load_model(source, settings)
    below, engine = model.placing.below, model.engine
    ticket = engine.begin()
    logits = engine.prefill(list(range(100, 100 + PROMPT)), reuse=False)[0]
    made: list[int] = []
    before, began = below.stats, time.perf_counter()
    for _ in range(tokens):
        made.append(int(np.argmax(logits)))
        logits = engine.step(made[-1], ticket)
    seconds = time.perf_counter() - began
    read = below.stats.since(before)
    record: dict[str, Any] = {"budget": budget, "tokens": made, "tokens_per_second": tokens / seconds, **status()}
    record["page_cache"] = sum(cached(file) for file in files)
    record["notices"] = list(model.notices)
    if model.placing.plan is not None:
        record["predicted_tokens_per_second"] = model.placing.plan.predicted.tokens_per_second
    if below.store is not None:
        record |= {
            "bytes_a_token": read.nbytes / tokens,
            "requests_a_token": read.requests / tokens,
            "rate": read.bandwidth,
            "busy_share": read.busy / seconds,
            "hit_rate": below.store.hit_rate,
        }
        size = max(4096, int(read.nbytes / max(read.requests, 1)) // 4096 * 4096)
        with Reader(files[1] if files[1].is_file() else path, depth=16, largest=size) as reader:
            record["probe_bytes"], record["probe_rate"] = size, random_rate(reader, size, 1.0)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--ram-budget", default="1GiB")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="keep no results")
    parser.add_argument("--one", choices=["with", "without"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        budget = args.ram_budget if args.one == "with" else None
        json.dump(measure(args.model, budget, args.tokens, args.threads), sys.stdout)
        return
    records = {}
    for which in ("without", "with"):
        command = [sys.executable, "-m", "benchmarks.disk_tier", *sys.argv[1:], "--one", which]
        records[which] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    with_, without = records["with"], records["without"]
    print(f"the same {args.tokens} tokens: {with_['tokens'] == without['tokens']}")
    print_table(
        [
            {
                "budget": r["budget"] or "none",
                "tokens/s": f"{r['tokens_per_second']:.2f}",
                "peak resident MB": f"{r['VmHWM'] / MB:.0f}",
                "anonymous MB": f"{r['RssAnon'] / MB:.0f}",
                "page cache MB": f"{r['page_cache'] / MB:.0f}",
                "both MB": f"{(r['RssAnon'] + r['page_cache']) / MB:.0f}",
            }
            for r in (without, with_)
        ]
    )
    if "rate" in with_:
        share, size = with_["rate"] / with_["probe_rate"], with_["probe_bytes"]
        print(
            f"{with_['bytes_a_token'] / MB:.0f} MB in {with_['requests_a_token']:.0f} reads a token at "
            f"{with_['rate'] / MB:.0f} MB/s ({with_['busy_share']:.0%} of the time), {share:.0%} of what random reads "
            f"of {size} bytes reached; hit rate {with_['hit_rate']:.1%}"
        )
    for line in with_["notices"]:
        print(f"note: {line}")
    if not args.dry:
        write_results("disk_tier", {"model": args.model.name, **records})


if __name__ == "__main__":
    main()
