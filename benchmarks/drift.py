"""Does it pay to move neurons when the text changes? The shipped model's activity is of code; it is given prose.

    python -m benchmarks.drift
    python -m benchmarks.drift -m models/synthetic-1.3b.f16.records.gguf --ram-budget 1800MiB

Held-out text is run token by token (nothing is sampled): turns of the project's tests, of its documents, and of tests
again. Three runs: plain; counting, with the placement of drift but nothing ever moved; and drift. The second device is
emulated, its arena standing where VRAM would. It is no faster than RAM, so that tokens/s show what counting and moving
cost, and the share of active neurons that were hot shows what a GPU would gain: the bytes of the cold ones over the
bandwidth of a catalogued machine's RAM.

With -m, neurons are on disk, and the activity is of another kind of text altogether: a random permutation of the
model's own. Told are the hit rate of the cache and tokens/s, turn by turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.tables import add_keeping, print_table, write_results
from thermocline.activity.statistics import Activity
from thermocline.activity.store import load_activity, save_activity
from thermocline.api import LLM, shipped_model
from thermocline.config import LoadSettings, Mode
from thermocline.files.companion import companion
from thermocline.files.sidecar import SidecarKind
from thermocline.hardware.catalogue import machine as catalogued

ROOT = Path(__file__).parent.parent
PROMPT = 8
CODE, PROSE = "code", "prose"
KINDS = [CODE] * 2 + [PROSE] * 8 + [CODE] * 6
RUNS = {"plain": None, "counting": "1B", "drift": ""}
"""What --drift is; empty for what the benchmark was asked for."""
GPU = "rtx-4090+i9-13900k"


def texts() -> dict[str, str]:
    """Text that the model has not read: the project's tests, and its documents."""
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    documents = [*sorted(ROOT.glob("*.md")), ROOT / "LICENSE", ROOT / "training" / "README.md"]
    return {
        CODE: "\n".join(path.read_text() for path in tests),
        PROSE: "\n".join(path.read_text() for path in documents),
    }


def run_turn(llm: LLM, tokens: list[int]) -> dict[str, Any]:
    """Read a turn's tokens: the first few at once, the others one by one."""
    engine = llm._loaded.engine
    below = llm._loaded.placing.below
    ticket = engine.begin()
    engine.prefill(tokens[:PROMPT], reuse=False)
    uses, began = below.uses, time.perf_counter()
    for token in tokens[PROMPT:]:
        engine.step(token, ticket)
    seconds = time.perf_counter() - began
    asked, found = below.uses.asked - uses.asked, below.uses.found - uses.found
    moved = engine.moved
    return {
        "tokens_per_second": (len(tokens) - PROMPT) / seconds,
        "hot_share": engine.account.hot_fired / max(engine.fired, 1),
        "hit_rate": found / asked if asked else None,
        "moved_bytes": 0 if moved is None else moved.nbytes,
        "moved_seconds": 0.0 if moved is None else moved.seconds,
    }


def emulated(drift: str | None, mode: str, budget: str, length: int) -> dict[str, Any]:
    """All turns on the shipped model."""
    settings = LoadSettings(
        device="emulated", vram_budget=budget, mode=Mode(mode), drift=drift, ctx_size=length, ubatch=32, threads=2  # type: ignore[arg-type]
    )  # fmt: skip
    turns, at = [], dict.fromkeys((CODE, PROSE), 0)
    with LLM.load(None, settings) as llm:
        tokens = {kind: llm.tokenize(text, add_special=False) for kind, text in texts().items()}
        for kind in KINDS:
            start = at[kind]
            at[kind] += length
            turns.append({"kind": kind, **run_turn(llm, tokens[kind][start : start + length])})
        spec, plan = llm.spec, llm.plan
        assert plan is not None
        record = statistics.fmean(layer.record_bytes for layer in plan.layers)
        share = llm._loaded.engine.fired / (llm._loaded.engine.traffic.neurons * max(1, length - PROMPT))
    return {"turns": turns, "active_bytes": share * spec.n_layer * spec.n_ff * record}


def on_disk(model: Path, budget: str, drift: str | None, turns: int, length: int) -> dict[str, Any]:
    """Random tokens on a model of which a part is on disk, warmed up by an activity that is not of this text."""
    with tempfile.TemporaryDirectory() as folder:
        wrong = Path(folder) / "wrong.activity.safetensors"
        true = load_activity(companion(model, SidecarKind.ACTIVITY))
        rng = np.random.default_rng(1)
        fired = np.stack([row[rng.permutation(len(row))] for row in true.fired])
        save_activity(Activity.from_counts(true.model_fingerprint, true.model_name, fired, true.tokens), wrong)
        settings = LoadSettings(
            ctx_size=256, ubatch=PROMPT, threads=2, mode=Mode.PREDICTED, ram_budget=budget, activity=wrong, drift=drift
        )
        with LLM.load(model, settings) as llm:
            tokens = rng.integers(0, llm.spec.n_vocab, (turns, length)).tolist()
            return {"turns": [run_turn(llm, turn) for turn in tokens]}


def mean(result: dict[str, Any], name: str, turns: slice) -> float:
    """Of some turns."""
    return statistics.fmean(turn[name] for turn in result["turns"][turns])


def show_emulated(results: dict[str, Any]) -> None:
    """For people."""
    phases = {"code": (0, 2), "prose, first 2": (2, 4), "prose, last 4": (6, 10), "code again": (12, 16)}
    rows = []
    for mode, runs in results.items():
        for name, ends in phases.items():
            turns, counting, drift = slice(*ends), runs["counting"], runs["drift"]
            cold = [(1 - mean(r, "hot_share", turns)) * r["active_bytes"] for r in (counting, drift)]
            rate = catalogued(GPU).cpu.bandwidth
            speeds = " / ".join(f"{mean(r, 'tokens_per_second', turns):.0f}" for r in runs.values())
            rows.append(
                {
                    "mode": mode,
                    "turns of": name,
                    "hot, still": f"{mean(counting, 'hot_share', turns):.1%}",
                    "hot, drift": f"{mean(drift, 'hot_share', turns):.1%}",
                    "tok/s plain / counting / drift": speeds,
                    "moved kB a turn": f"{mean(drift, 'moved_bytes', turns) / 1e3:.0f}",
                    "in ms": f"{1e3 * mean(drift, 'moved_seconds', turns):.1f}",
                    "cold us a token there": f"{cold[0] / rate * 1e6:.1f} / {cold[1] / rate * 1e6:.1f}",
                }
            )
    print_table(rows)


def show_on_disk(pair: dict[str, Any]) -> None:
    """For people."""
    print_table(
        [
            {
                "turn": number,
                "hits, still": f"{off['hit_rate']:.1%}",
                "hits, drift": f"{on['hit_rate']:.1%}",
                "tok/s, still": f"{off['tokens_per_second']:.2f}",
                "tok/s, drift": f"{on['tokens_per_second']:.2f}",
                "moved MB": f"{on['moved_bytes'] / 1e6:.0f}",
                "moved in s": f"{on['moved_seconds']:.2f}",
            }
            for number, (off, on) in enumerate(zip(pair["plain"]["turns"], pair["drift"]["turns"], strict=True))
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path)
    parser.add_argument("--vram-budget", default="10MB")
    parser.add_argument("--ram-budget", default="1800MiB")
    parser.add_argument("--drift", default="auto")
    parser.add_argument("--length", type=int, default=160, help="tokens of a turn")
    parser.add_argument("--turns", type=int, default=6, help="of the disk's")
    add_keeping(parser)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        which, mode = args.one.split(":")
        drift = args.drift if RUNS[which] == "" else RUNS[which]
        if args.model:
            result = on_disk(args.model, args.ram_budget, drift, args.turns, 24)
        else:
            result = emulated(drift, mode, args.vram_budget, args.length)
        json.dump(result, sys.stdout)
        return
    modes = ["predicted"] if args.model else ["exact", "predicted"]
    results: dict[str, Any] = {}
    for mode in modes:
        for which in RUNS if not args.model else ("plain", "drift"):
            command = [sys.executable, "-m", "benchmarks.drift", *sys.argv[1:], "--one", f"{which}:{mode}"]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results.setdefault(mode, {})[which] = json.loads(out)
    if args.model:
        show_on_disk(results["predicted"])
    else:
        show_emulated(results)
    if not args.dry:
        about = {"model": (args.model or shipped_model()).name, "drift": args.drift}
        about |= {"ram_budget": args.ram_budget} if args.model else {"vram_budget": args.vram_budget, "kinds": KINDS}
        name = "drift_disk" if args.model else "drift"
        write_results(name, {"machine": machine.facts(2), **about, **results}, args.into)


if __name__ == "__main__":
    main()
