"""Thermocline and llama.cpp on the same weights, in turns, with the bandwidth probed between the turns.

    python -m benchmarks.side_by_side -m models/synthetic-1.3b.q8_0.gguf --llama-python llama/bin/python
    python -m benchmarks.side_by_side -m models/*.gguf --tests decode prefill context

Beside M.gguf, M.records.gguf is the same model with its down projections as neuron records, ready to map, and
M.records.predictor.safetensors its predictor: Thermocline runs on these where they are. Every model and test
is kept as a file of its own under benchmarks/results/side_by_side; `python -m benchmarks.report` makes the
README's table of them.

decode: 128 tokens after the first one, a few at a time of each engine in turns; Thermocline's tokens are drawn from
the model, as how many neurons fire depends on the text; llama.cpp's are random, as llama-bench has them. Beside
that the weights of a dense token are only read, and those of a predicted one, as many random rows of the FFN as fire,
which tells how fast the memory is where they happen to lie, and for rows that lie apart.
prefill: 512 random tokens in one batch; prompt: 4,096 of them, in batches of 512.
context: decoding after so many tokens; Thermocline's cache is filled with random numbers, which take it as long
as real ones, llama.cpp's with a real prompt.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engine import Ours, description_of, modes_of, records_of
from benchmarks.machine import Probe, facts
from benchmarks.peer import Peer, add_flag
from benchmarks.tables import add_keeping, print_table, write_results
from thermocline import _native
from thermocline.config import CacheType, Mode
from thermocline.hardware.cores import find_cores
from thermocline.memory.kv_cache import kv_bytes_per_token

PROMPT, LONG_PROMPT, COUNT, SLICE = 512, 4096, 128, 32
PAUSE = 0.02
"""Seconds before a turn, in which the other engine's threads go to sleep."""
LLAMA = "llama.cpp"
READING = "only reading"
"""What a dense token reads of the weights, where they lie, and nothing computed with it: as fast as a token can be."""
READING_ROWS = "only reading rows"
"""The same of a predicted token."""
WARM_UP = 4
"""Tokens before the first turn."""

Turn = Callable[[], tuple[float, float, float]]
"""One engine's turn: tokens, seconds, bytes read (0 where they are not counted)."""


class Rounds:
    """Turns of several engines, one after another, with a probe between them."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.rows: list[dict[str, Any]] = []

    def run(self, turns: dict[str, Turn], slices: int) -> None:
        """One round: `slices` turns of each engine, added up."""
        sums = {name: [0.0, 0.0, 0.0] for name in turns}
        probes: dict[str, list[float]] = {name: [] for name in turns}
        before = self._probe()
        for _ in range(slices):
            for name, turn in turns.items():
                time.sleep(PAUSE)
                sums[name] = [a + b for a, b in zip(sums[name], turn(), strict=True)]
                after = self._probe()
                probes[name] += [before, after]
                before = after
        self.rows.append(
            {
                name: {
                    "tokens": tokens,
                    "seconds": seconds,
                    "bytes": size,
                    "bandwidth": float(np.median(probes[name])),
                }
                for name, (tokens, seconds, size) in sums.items()
            }
        )

    def _probe(self) -> float:
        time.sleep(PAUSE)
        self.probe.read(2)  # wakes the threads
        return self.probe.read(3)


def decode_turn(ours: Ours, count: int) -> Turn:
    def turn() -> tuple[float, float, float]:
        before = ours.engine.bytes_read
        return count, ours.decode(count), ours.engine.bytes_read - before

    return turn


def reading_turn(ours: Ours, share: float | None = None) -> Turn:
    return lambda: (1, *ours.read_weights(share))


def peer_turn(peer: Peer, do: str, tokens: list[int], size: float = 0.0) -> Turn:
    return lambda: (len(tokens), peer.seconds(do, tokens=tokens), size)


def decode_test(path: Path, peer: Peer | None, probe: Probe, args: argparse.Namespace) -> dict[str, Any]:
    """Decoding in every mode that the model has, and by llama.cpp."""
    *others, richest = modes_of(records_of(path))
    engines = [Ours.load(records_of(path), richest, args.threads, 2 * COUNT, mmap=args.mmap)]
    engines = [engines[0].beside(mode) for mode in others] + engines
    tokens = engines[0].random_tokens(COUNT)
    if peer:
        peer.ask("load", path=str(path), n_ctx=2 * COUNT, threads=args.threads, mmap=args.mmap is not False)
    for engine in engines:
        engine.decode(WARM_UP)
    fired = engines[-1].engine.fired / (WARM_UP * engines[-1].engine.traffic.neurons)
    rounds = Rounds(probe)
    for _ in range(args.rounds):
        for engine in engines:
            engine.start(0)
        if peer:
            peer.ask("reset")
            peer.seconds("prefill", tokens=tokens[:8])
        turns: dict[str, Turn] = {str(e.engine.mode): decode_turn(e, SLICE) for e in engines}
        turns[READING] = reading_turn(engines[0])
        if engines[-1].engine.mode is Mode.PREDICTED:
            turns[READING_ROWS] = reading_turn(engines[-1], fired)
        if peer:
            turns[LLAMA] = peer_turn(peer, "decode", tokens[:SLICE], SLICE * engines[0].dense_bytes)
        rounds.run(turns, COUNT // SLICE)
    active = {str(e.engine.mode): e.engine.fired / (COUNT * e.engine.traffic.neurons) for e in engines}
    return {"count": COUNT, "active": active, "rounds": rounds.rows}


def prefill_test(
    path: Path, peer: Peer | None, probe: Probe, args: argparse.Namespace, count: int = PROMPT
) -> dict[str, Any]:
    """A prompt of so many tokens."""
    engine = Ours.load(records_of(path), Mode.AUTO, args.threads, count + 1, mmap=args.mmap)
    tokens = engine.random_tokens(count)
    engine.prefill(tokens[:PROMPT])
    if peer:
        peer.ask("load", path=str(path), n_ctx=count + 64, threads=args.threads, mmap=args.mmap is not False)
        peer.seconds("prefill", tokens=tokens[:PROMPT])
    rounds = Rounds(probe)
    for _ in range(args.rounds):
        turns: dict[str, Turn] = {"thermocline": lambda: (count, engine.prefill(tokens), 0.0)}
        if peer:
            peer.ask("reset")
            turns[LLAMA] = peer_turn(peer, "prefill", tokens)
        rounds.run(turns, 1)
    spec = engine.model.transformer.spec
    operations = 2.0 * (spec.parameters - 2 * spec.n_vocab * spec.n_embd)
    operations += 2.0 * (count + 1) * spec.n_layer * spec.n_head * spec.head_dim  # half of the keys, and values
    return {"count": count, "operations_per_token": operations, "rounds": rounds.rows}


def prompt_test(path: Path, peer: Peer | None, probe: Probe, args: argparse.Namespace) -> dict[str, Any]:
    """A long prompt, most of whose attention lies behind the first batch."""
    return prefill_test(path, peer, probe, args, LONG_PROMPT)


def context_test(path: Path, peer: Peer | None, probe: Probe, args: argparse.Namespace) -> dict[str, Any]:
    """Decoding at several depths, with each type of cache."""
    results = []
    for cache in (c for c in CacheType if c is not CacheType.F32):
        engine = Ours.load(
            records_of(path), Mode.AUTO, args.threads, max(args.depths) + 2 * COUNT, cache, mmap=args.mmap
        )
        engine.fill_cache()
        tokens = engine.random_tokens(SLICE // 2)
        for depth in args.depths:
            theirs = bool(peer) and depth <= args.peer_depth
            if peer and theirs:
                peer.ask(
                    "load",
                    path=str(path),
                    n_ctx=depth + 2 * COUNT,
                    threads=args.threads,
                    cache=str(cache),
                    mmap=args.mmap is not False,
                )
                peer.ask("prefill", tokens=engine.random_tokens(max(depth, 8)))
            rounds = Rounds(probe)
            for _ in range(args.rounds):
                engine.start(depth)
                turns: dict[str, Turn] = {"thermocline": decode_turn(engine, SLICE // 2)}
                if peer and theirs:
                    turns[LLAMA] = peer_turn(peer, "decode", tokens)
                rounds.run(turns, 1)
            spec = engine.model.transformer.spec
            cached = depth * kv_bytes_per_token(spec, cache, cache)
            results.append({"cache": str(cache), "depth": depth, "cache_bytes": cached, "rounds": rounds.rows})
        del engine, turns  # which hold its memory
        gc.collect()
    return {"count": SLICE // 2, "depths": results}


TESTS = {"decode": decode_test, "prefill": prefill_test, "prompt": prompt_test, "context": context_test}


def rates(rounds: Sequence[dict[str, Any]], name: str) -> list[float]:
    """Tokens a second of every round."""
    return [row[name]["tokens"] / row[name]["seconds"] for row in rounds]


def ratios(rounds: Sequence[dict[str, Any]], name: str) -> list[float]:
    """Of every round the rate over llama.cpp's; none without it."""
    if LLAMA not in rounds[0]:
        return []
    return [a / b for a, b in zip(rates(rounds, name), rates(rounds, LLAMA), strict=True)]


def shares(rounds: Sequence[dict[str, Any]], name: str) -> list[float]:
    """Of every round the bytes a second over what the probe read beside it."""
    return [row[name]["bytes"] / row[name]["seconds"] / 1e9 / row[name]["bandwidth"] for row in rounds]


def lines(title: str, rounds: Sequence[dict[str, Any]]) -> list[dict[str, object]]:
    """A table's lines: medians, and ratios of the same round with their spread."""
    made: list[dict[str, object]] = []
    for name in rounds[0]:
        share, ratio = shares(rounds, name), ratios(rounds, name)
        made.append(
            {
                "test": title,
                "engine": name,
                "tok/s": f"{np.median(rates(rounds, name)):.1f}",
                "read GB/s": f"{np.median([row[name]['bandwidth'] for row in rounds]):.1f}",
                "share": f"{np.median(share):.0%}" if any(share) else "",
                "ratio": f"{np.median(ratio):.2f}" if ratio else "",
                "spread": f"{min(ratio):.2f} to {max(ratio):.2f}" if ratio else "",
            }
        )
    return made


def lines_of(test: str, result: dict[str, Any]) -> list[dict[str, object]]:
    """The table of one model and test."""
    if test != "context":
        return lines(f"{result['model']} {test}", result["rounds"])
    return [
        line
        for part in result["depths"]
        for line in lines(f"{result['model']} at {part['depth']}, cache {part['cache']}", part["rounds"])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, nargs="+", required=True, help="GGUF files in the standard layout")
    parser.add_argument("--tests", nargs="+", choices=TESTS, default=["decode", "prefill"])
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("-t", "--threads", type=int, default=find_cores().threads)
    parser.add_argument(
        "--depths", type=int, nargs="+", default=[0, 8192, 32768], help="of the context test, in tokens"
    )
    parser.add_argument("--peer-depth", type=int, default=8192, help="deepest context that llama.cpp is given")
    parser.add_argument("--alone", action="store_true", help="without llama.cpp")
    parser.add_argument(
        "--mmap",
        action=argparse.BooleanOptionalAction,
        help="both engines on the mapped file, or on weights in memory of their own; without, each as it is by default",
    )
    add_keeping(parser)
    add_flag(parser)
    args = parser.parse_args()
    probe = Probe(_native.Context(args.threads, "auto"))
    with nullcontext() if args.alone else Peer(args.llama_python) as peer:
        about = {"machine": facts(args.threads), "peer": peer.about if peer else None}
        for path, test in itertools.product(args.model, args.tests):
            model = path.name.removesuffix(".gguf")
            result = {"model": model, "test": test, **description_of(path), **about}
            result |= TESTS[test](path, peer, probe, args)
            print_table(lines_of(test, result))
            gc.collect()
            if not args.dry:
                write_results(f"side_by_side/{model}-{test}", result, args.into)


if __name__ == "__main__":
    main()
