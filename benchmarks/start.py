"""How long one waits before anything happens: help, opening a large vocabulary, start to first token.

    python -m benchmarks.start [-m MODEL.gguf ...]

Every figure is the median of fresh processes with the files in the page cache.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import facts
from benchmarks.tables import add_keeping, print_table, write_results
from thermocline.api import shipped_model
from thermocline.files.gguf_writer import write_gguf
from thermocline.hardware.cores import find_cores

TOKENS, MERGES = 128_000, 280_000
OPEN = "from thermocline.files.gguf import GgufFile; import time; t = time.perf_counter(); GgufFile.open({path!r}); "


def seconds(command: list[str], rounds: int) -> float:
    """Median wall time of a process, interpreter included; the first run only warms the caches."""
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def open_seconds(path: Path, rounds: int) -> float:
    """Median time of opening a file in a fresh process, without the imports."""
    code = OPEN.format(path=str(path)) + "print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True) for _ in range(rounds)]
    return statistics.median(float(run.stdout) for run in runs)


def write_vocabulary(path: Path) -> None:
    """A file with as many tokens and merges as Llama 3 has, and no tensors."""
    tokens = [f"token{i}" for i in range(TOKENS)]
    merges = [f"tok{i} en{i}" for i in range(MERGES)]
    write_gguf(
        path, {"general.architecture": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges}, []
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, nargs="*", default=[], help="more models to start")
    parser.add_argument("-r", "--rounds", type=int, default=5)
    add_keeping(parser)
    args = parser.parse_args()
    program = [sys.executable, "-m", "thermocline"]
    waits = {"--help": seconds([*program, "--help"], args.rounds)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        write_vocabulary(path)
        waits[f"open {TOKENS} tokens, {MERGES} merges"] = open_seconds(path, args.rounds)
    for model in [shipped_model(), *args.model]:
        command = [*program, "run", "-m", str(model), "-p", "def", "-n", "1"]
        size = model.stat().st_size / 1e9
        waits[f"start to first token, {model.name} ({size:.2f} GB)"] = seconds(command, args.rounds)
    print_table([{"what": what, "seconds": f"{wait:.2f}"} for what, wait in waits.items()])
    if not args.dry:
        write_results("start", {"machine": facts(find_cores().threads), "seconds": waits}, args.into)


if __name__ == "__main__":
    main()
