"""Whether an engine at rest uses the processor, whether two engines in one process are in each other's way, and what
becomes of one where another program is busy.

    python -m benchmarks.pool -m models/synthetic-1.3b.q4_0.gguf

idle: processor time of the process in the second that begins 50 ms after the last token.
in turns: two engines of all threads each decode by turns, a few tokens each, beside one alone.
at once: both decode in threads of their own; what is compared is the sum of their rates.
beside a busy program: one engine decodes while another process keeps a core busy.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from pathlib import Path

from benchmarks.engine import Ours, description_of, records_of
from benchmarks.machine import facts
from benchmarks.tables import add_keeping, print_table, write_results
from thermocline.config import Mode
from thermocline.hardware.cores import find_cores

COUNT, TURN = 64, 8
REST = 0.05
"""Seconds after the last token from which on nothing may be used."""


def idle(engine: Ours) -> float:
    """Processor seconds of this process in one second of rest."""
    engine.decode(TURN)
    time.sleep(REST)
    before = time.process_time()
    time.sleep(1.0)
    return time.process_time() - before


def alone(engine: Ours) -> float:
    """Tokens a second of one engine."""
    engine.start(0)
    return COUNT / engine.decode(COUNT)


def in_turns(engines: tuple[Ours, Ours]) -> float:
    """Tokens a second of two engines that take turns."""
    for engine in engines:
        engine.start(0)
    seconds = sum(engine.decode(TURN) for _ in range(COUNT // TURN // 2) for engine in engines)
    return COUNT / seconds


def at_once(engines: tuple[Ours, Ours]) -> float:
    """Tokens a second of two engines together, from the first token to the last."""
    for engine in engines:
        engine.start(0)
    threads = [threading.Thread(target=engine.decode, args=(COUNT // 2,)) for engine in engines]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return COUNT / (time.perf_counter() - began)


def beside_busy(engine: Ours) -> float:
    """Tokens a second of one engine while another process computes."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as program:
        try:
            return alone(engine)
        finally:
            program.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("-r", "--rounds", type=int, default=3)
    parser.add_argument("-t", "--threads", type=int, default=find_cores().threads)
    add_keeping(parser)
    args = parser.parse_args()
    path = records_of(args.model)
    one, two = (Ours.load(path, Mode.EXACT, args.threads, 2 * COUNT) for _ in range(2))
    rest = idle(one)
    rounds = [
        {
            "alone": alone(one),
            "in turns": in_turns((one, two)),
            "at once": at_once((one, two)),
            "beside a busy program": beside_busy(one),
        }
        for _ in range(args.rounds)
    ]
    print(f"idle: {rest * 1000:.2f} ms of processor time in a second, from {REST * 1000:.0f} ms after the last token")
    print_table([{name: f"{rate:.1f} tok/s" for name, rate in row.items()} for row in rounds])
    if not args.dry:
        model = args.model.name.removesuffix(".gguf")
        about = {"machine": facts(args.threads), "model": model, **description_of(path)}
        write_results("pool", {**about, "idle_seconds": rest, "rounds": rounds}, args.into)


if __name__ == "__main__":
    main()
