"""Models on a GPU at several budgets: our plan beside a split by whole layers, and both beside predictions."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_apart import Row, attempt, failure
from benchmarks.synthetic_gpu import Source
from thermocline.config import Mode, SamplingSettings
from thermocline.errors import BudgetError, UsageError
from thermocline.hardware.machine import Machine, Tier
from thermocline.memory.arena import Memory
from thermocline.memory.kv_cache import KVCache, kv_bytes_per_token
from thermocline.memory.loader import load_transformer
from thermocline.model.families import family_of
from thermocline.model.network import Outputs, Segment, Transformer
from thermocline.ops.cpu import CpuOps
from thermocline.ops.cuda.beside import CudaDevice
from thermocline.ops.cuda.ops import CudaOps
from thermocline.ops.device import Host
from thermocline.placement.cost import FfnMode
from thermocline.placement.footprint import footprint_of
from thermocline.placement.ledger import Purpose
from thermocline.placement.plan import make_plan
from thermocline.placement.problem import LayerPlace, Placement, Problem
from thermocline.placement.seats import LayerSeat, Seating, Seats
from thermocline.placement.sending import sent_from
from thermocline.placement.workload import Overheads, Workload
from thermocline.runtime.captured import CapturedStep
from thermocline.runtime.sampler import Sampler

GB = 1e9


@dataclass(frozen=True)
class Lengths:
    """Tokens of a case: context, prompt, and decoded ones."""

    context: int = 1024
    prompt: int = 256
    steps: int = 32


@dataclass(frozen=True)
class Case:
    """One placement of a model under a budget, and what the cost model says of it.

    `bound` is seconds a token below which no placement comes: the least bytes that RAM is read for, at its rate.
    """

    name: str
    mode: Mode
    seats: Seats
    decode: float
    prefill: float
    sent: tuple[int, ...]
    bound: float = 0.0


def problem_of(source: Source, machine: Machine, lengths: Lengths, mode: FfnMode, overheads: Overheads) -> Problem:
    """The placement problem of a model in memory."""
    spec = family_of(source).spec(source)
    predictor = [p.fc1.nbytes + p.fc2.nbytes for p in source.predictor.layers]
    footprint = footprint_of(
        spec, source.weights, "0" * 64, kv_token=kv_bytes_per_token(spec) // spec.n_layer,
        predictor=predictor if mode is FfnMode.PREDICTED else None,
    )  # fmt: skip
    work = Workload(context=lengths.context, prompt=lengths.prompt, output=lengths.steps, ubatch=lengths.prompt)
    return Problem(footprint, machine, work, mode, source.heat, {}, overheads)


def whole(problem: Problem) -> int:
    """Bytes of VRAM that the model takes if all of it is there."""
    n = problem.footprint.n_layer
    last = problem.cost.clusters
    placement = Placement(Tier.RAM, Tier.VRAM, (LayerPlace(Tier.VRAM, Tier.VRAM, last, last),) * n)
    return sum(d.nbytes for d in problem.demands(placement) if d.tier is Tier.VRAM)


def cases(problem: Problem, budget: int, *, dense: bool = False) -> list[Case]:
    """Our plan for the budget, and as many whole layers as fit: with our kernels, and if `dense` with all neurons."""
    problem = replace(problem, budgets={Tier.VRAM: budget})
    found = []
    try:
        plan = make_plan(problem)
        seconds, sent = plan.predicted, sent_from(problem, plan.layers)
        decode, prefill = seconds.step_ms / 1e3, seconds.prefill_ms / 1e3
        found.append(Case("ours", Mode(str(problem.mode)), plan, decode, prefill, sent, least_seconds(problem)))
    except BudgetError as error:
        print(f"no plan for {budget / GB:.2f} GB: {str(error).splitlines()[0]}")
    splits = [layer_split("layer split", problem, budget)]
    if dense:
        splits.append(layer_split("layer split, dense", replace(problem, mode=FfnMode.DENSE), budget))
    return found + [split for split in splits if split is not None]


def layer_split(name: str, problem: Problem, budget: int) -> Case | None:
    """The first layers in VRAM with all that is theirs, the others in RAM; None where not even one fits."""
    f, last = problem.footprint, problem.cost.clusters
    n_layer, n_ff = f.n_layer, f.n_ff
    for count in range(n_layer, 0, -1):
        head = Tier.VRAM if count == n_layer else Tier.RAM
        hot, cold = LayerPlace(Tier.VRAM, Tier.VRAM, last, last), LayerPlace(Tier.RAM, Tier.RAM, 0, last)
        placement = Placement(Tier.RAM, head, (hot,) * count + (cold,) * (n_layer - count))
        if sum(d.nbytes for d in problem.demands(placement) if d.tier is Tier.VRAM) <= budget:
            there, here = LayerSeat(Tier.VRAM, n_ff, n_ff), LayerSeat(Tier.RAM, 0, n_ff)
            seats = Seating(Tier.RAM, head, (there,) * count + (here,) * (n_layer - count))
            decode = problem.phase_seconds(placement, problem.cost.decode)
            prefill = problem.phase_seconds(placement, problem.cost.phases[1])
            return Case(name, Mode(str(problem.mode)), seats, decode, prefill, ())
    return None


def least_seconds(problem: Problem) -> float:
    """Seconds of a token in which RAM is read for what the budget of VRAM cannot hold, however it is filled.

    The VRAM takes what is read most for its size. Nothing else of a token is counted.
    """
    f, cost, position = problem.footprint, problem.cost, problem.workload.position
    rows = cost.expected_rows(cost.decode)  # (layers, clusters, 3)
    pieces = [(float(f.head), float(f.head))]
    for layer, record in enumerate(f.records):
        cached = f.kv_token * position, f.kv_layer(problem.workload.context)
        pieces.append((f.attention[layer] + cached[0], f.attention[layer] + cached[1]))
        if problem.mode is FfnMode.PREDICTED:
            pieces.append((f.predictor[layer], f.predictor[layer]))
        sizes = np.diff(cost.bounds) * sum(record)
        pieces += zip((rows[layer] @ np.asarray(record, np.float64)).tolist(), sizes.tolist(), strict=True)
    left, missing = float(problem.room(Tier.VRAM)), 0.0
    for read, size in sorted(pieces, key=lambda piece: -piece[0] / max(piece[1], 1)):
        held = min(max(left, 0.0), size) / size if size else 1.0
        left -= size
        missing += read * (1 - held)
    return missing / problem.machine.cpu.bandwidth


def let_go() -> None:
    """Give the device what nobody uses any more, also where it hangs in a cycle."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Loaded:
    """A case on its devices, all of it in the ledger as the engine has it."""

    def __init__(self, source: Source, case: Case, cpu: CpuOps, device: str, budget: int, lengths: Lengths) -> None:
        let_go()
        self.before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0  # of others in this process
        self.gpu = CudaOps(device)
        self.memory = Memory({Tier.VRAM: CudaDevice(self.gpu), Tier.RAM: Host(cpu)}, {Tier.VRAM: budget})
        self.lengths = lengths
        try:
            self._load(source, case)
        except BaseException:
            self.close()
            raise

    def _load(self, source: Source, case: Case) -> None:
        lengths = self.lengths
        self.transformer, _ = load_transformer(
            source, self.memory, n_ctx=lengths.context, seats=case.seats, mode=case.mode,
            predictor=source.predictor if case.mode is Mode.PREDICTED else None, sent_from=case.sent,
        )  # fmt: skip
        caches, self.scratch = self.memory.arrays(Purpose.KV), self.memory.arrays(Purpose.ACTIVATIONS)
        homes = [caches[layer.device.tier] for layer in self.transformer.layers]
        self.cache = KVCache(self.transformer.spec, homes, lengths.context)
        self.workspace = self.transformer.workspace(lengths.prompt, 1, arrays=self.scratch)
        self.transformer.rehearse(Tier.VRAM, lengths.prompt, 0, self.cache, self.workspace)

    def prefill(self) -> tuple[float, int]:
        """Seconds of the prompt, and the token that follows."""
        n = self.lengths.prompt
        tokens = np.random.default_rng(2).integers(0, self.transformer.spec.n_vocab, n).astype(np.int32)
        self.cache.clear()
        self.gpu.streams.wait()
        began = time.perf_counter()
        result = self.transformer.step(tokens, (Segment(self.cache, 0, n),), self.workspace, Outputs.LAST)
        best = int(self.transformer.ops.to_host(result.logits)[0].argmax())
        return time.perf_counter() - began, best

    def stepping(self) -> tuple[str, Callable[[int], Any]]:
        """How the sides cross, and a call that takes a token and gives the next one's logits."""
        try:
            step = CapturedStep(self.transformer, self.cache, arrays=self.scratch)
        except UsageError:
            return "plain", self._plain()
        except RuntimeError as error:  # as the engine does
            return f"plain ({failure(error)})", self._plain()
        way = f"{step.way or 'none'}{', graph' if step.captured else ''}"
        way += f" ({step.notice})" if step.notice else ""
        return way, lambda token: step.run(token, self.cache.length)[0]

    def _plain(self) -> Callable[[int], Any]:
        transformer: Transformer = self.transformer

        def call(token: int) -> Any:
            segment = (Segment(self.cache, self.cache.length, 1),)
            result = transformer.step(np.array([token], np.int32), segment, self.workspace)
            return transformer.ops.to_host(result.logits)[0]

        return call

    def decode(self, token: int) -> tuple[str, float, float]:
        """How the sides crossed, seconds a token, and seconds that the sampler had the logits."""
        way, call = self.stepping()
        sampler = Sampler(SamplingSettings(temperature=0.0), self.transformer.spec.n_vocab, self.lengths.context)
        times, choosing = [], []
        for _ in range(self.lengths.steps):
            began = time.perf_counter()
            logits = call(token)
            middle = time.perf_counter()
            token = sampler.sample(logits).token
            end = time.perf_counter()
            times.append(end - began)
            choosing.append(end - middle)
        return way, median(times), median(choosing)

    def close(self) -> None:
        """Let go of the memory."""
        self.memory.close()


def run_case(source: Source, case: Case, cpu: CpuOps, device: str, budget: int, lengths: Lengths) -> Row:
    """Load, prefill and decode one placement, beside the predictions and the ledger; or how that failed."""

    def measure() -> Row:
        loaded = Loaded(source, case, cpu, device, budget, lengths)
        try:
            return measured(loaded, case, budget, lengths)
        finally:
            loaded.close()

    return attempt({"placement": case.name}, measure)


def measured(loaded: Loaded, case: Case, budget: int, lengths: Lengths) -> Row:
    prefill, token = loaded.prefill()
    way, decode, sampler = loaded.decode(token)
    row: Row = {
        "tok/s": round(1 / decode, 2),
        "predicted": round(1 / case.decode, 2),
        "bytes allow": round(1 / case.bound, 2) if case.bound else 0.0,
        "prompt tok/s": round(lengths.prompt / prefill, 1),
        "predicted prompt": round(lengths.prompt / case.prefill, 1) if case.prefill else 0.0,
        "sent from": min((t for t in case.sent if t), default=0),
        "crossing": way,
        "sampler µs": round(sampler * 1e6, 1),
    }
    if loaded.gpu.streams.real:
        ledger = loaded.memory.ledger.used(Tier.VRAM) + loaded.gpu.scratch.nbytes
        row |= {
            "budget GB": round(budget / GB, 3), "ledger GB": round(ledger / GB, 3),
            "torch peak GB": round((torch.cuda.max_memory_allocated() - loaded.before) / GB, 3),
            "held GB": round(loaded.gpu.held_bytes() / GB, 3),
        }  # fmt: skip
    return row


def bytes_a_token(source: Source) -> int:
    """What a token reads in mode exact, but for the cache: all gates, and the other rows of those that fire."""
    table = source.weights["token_embd.weight"].nbytes
    layers = sum(w.nbytes for name, w in source.weights.items() if name.startswith("blk."))
    idle = sum(
        w.nbytes * (1 - float(source.heat.mean()))
        for name, w in source.weights.items()
        if name.endswith(("ffn_up.weight", "ffn_down_t.weight"))
    )
    return int(layers - idle + table)
