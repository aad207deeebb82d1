"""Minimises the predicted time per token under all budgets."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from thermocline.errors import BudgetError
from thermocline.hardware.machine import Tier
from thermocline.placement.budget import setting_text
from thermocline.placement.choices import Choices, choices_of
from thermocline.placement.ledger import Demand, Purpose
from thermocline.placement.milp import solve_milp
from thermocline.placement.prices import Path, Relaxed, relax, slack
from thermocline.placement.problem import LayerPlace, Placement, Problem
from thermocline.placement.search import open_options, search

MILP_SECONDS = 25.0
MILP_GAP = 1e-5
MILP_OPTIONS = 60_000
"""Most options that HiGHS gets unreduced; beyond, those that the bound excludes are left out."""
HEAVIEST_PROMPT = 2.0**16
"""How much heavier than the workload says a prompt may weigh to meet its target."""


class Method(StrEnum):
    """How the placement is found."""

    GREEDY = "greedy"
    MILP = "milp"


@dataclass(frozen=True, slots=True)
class Solution:
    """A placement, its seconds per token of output, and a lower bound on those of any placement that fits.

    `notes` are what a person should know: assumptions, tiers that are not used, targets that are not met.
    """

    placement: Placement
    objective: float
    bound: float
    method: Method
    notes: tuple[str, ...]

    @property
    def gap(self) -> float:
        """How far above the bound the objective is, relative to the objective; 0 is proven optimal."""
        return max(0.0, self.objective - self.bound) / self.objective


def solve(problem: Problem, method: Method = Method.GREEDY) -> Solution:
    """The fastest placement that fits.

    `greedy` prices bytes, takes what saves more time than it costs, and searches what the bound leaves open;
    `milp` hands the same options to HiGHS. Both are deterministic.

    Raises:
        BudgetError: nothing fits; the message has the account and the budget that would do.
        UsageError: the method needs a package that is missing.
    """
    target = problem.workload.first_token_ms
    solution = _solve(problem, method, 1.0)
    if target is None or len(problem.cost.phases) == 1 or first_token_ms(problem, solution.placement) <= target:
        return solution
    return _within(problem, method, target)


def solve_depths(problem: Problem, placement: Placement) -> Placement:
    """The placement with the depths that are fastest for the problem; all else stays where it is.

    Raises:
        BudgetError: it does not fit.
    """
    vram = problem.machine.gpu is not None and problem.room(Tier.VRAM) > 0
    disk = any(layer.warm < problem.cost.clusters for layer in placement.layers)
    trunk = Tier.DISK in (placement.embedding, placement.head, *(layer.home for layer in placement.layers))
    tied = placement.head if problem.footprint.tied else None
    choices = choices_of(problem, disk=disk, trunk=trunk, vram=vram, tied=tied, homes_of=placement)
    found = _best(choices, Method.GREEDY)
    if found is None:
        raise _nothing_fits(problem, vram)
    return choices.placement(found[0].homes, found[0].options)


def first_token_ms(problem: Problem, placement: Placement) -> float:
    """Predicted milliseconds until the first token: the prompt's passes and one step."""
    decode, *rest = problem.cost.phases
    seconds = problem.phase_seconds(placement, decode)
    for prefill in rest:
        passes = prefill.weight * problem.workload.output
        seconds += passes * problem.phase_seconds(placement, prefill)
    return seconds * 1e3


def _within(problem: Problem, method: Method, target: float) -> Solution:
    """Weigh the prompt as lightly as its target allows; the fastest first token if none does."""
    light, heavy = 1.0, HEAVIEST_PROMPT
    best = _solve(problem, method, heavy)
    reached = first_token_ms(problem, best.placement)
    if reached > target:
        note = f"the first token takes {reached:.0f} ms at best, more than the target of {target:.0f} ms"
        return _as_stated(problem, best, note)
    for _ in range(8):
        weight = (light * heavy) ** 0.5
        candidate = _solve(problem, method, weight)
        if first_token_ms(problem, candidate.placement) <= target:
            heavy, best = weight, candidate
        else:
            light = weight
    reached = first_token_ms(problem, best.placement)
    note = f"the prompt weighs more than its share, so that the first token takes {reached:.0f} of {target:.0f} ms"
    return _as_stated(problem, best, note)


def _as_stated(problem: Problem, solution: Solution, note: str) -> Solution:
    """Objective and bound for the workload as it was stated, not as it was weighed."""
    bound = _solve(problem, Method.GREEDY, 1.0).bound
    seconds = problem.seconds(solution.placement)
    return Solution(solution.placement, seconds, min(bound, seconds), solution.method, (*solution.notes, note))


def _solve(problem: Problem, method: Method, prompt_weight: float) -> Solution:
    f, notes = problem.footprint, []
    vram = problem.machine.gpu is not None
    if vram and problem.room(Tier.VRAM) <= 0:
        fixed = sum(d.nbytes for d in problem.fixed(Tier.VRAM))
        notes.append(
            f"VRAM is not used: scratch, staging and margin alone take {fixed:,} bytes of a budget of "
            f"{problem.limits[Tier.VRAM]:,}"
        )
        vram = False
    if not problem.cost.known and problem.mode != "dense":
        notes.append("temperatures are unknown: every neuron is taken to fire always; profile the model to improve")
    homes = (Tier.VRAM, Tier.RAM) if vram else (Tier.RAM,)
    # What does not fit leaves RAM in this order: cold neurons, then parts of the trunk.
    ways = ((False, False), (True, False), (True, True)) if problem.machine.disk is not None else ((False, False),)
    for disk, trunk in ways:
        results = []
        for tied in homes if f.tied else (None,):
            choices = choices_of(problem, disk=disk, trunk=trunk, vram=vram, prompt_weight=prompt_weight, tied=tied)
            found = _best(choices, method)
            if found is not None:
                results.append((choices, *found))
        if results:
            choices, path, _ = min(results, key=lambda r: r[1].cost)
            placement = choices.placement(path.homes, path.options)
            bound = min(r[2] for r in results)
            notes += _remarks(problem, placement)
            return Solution(placement, path.cost, min(bound, path.cost), method, tuple(notes))
    raise _nothing_fits(problem, vram)


def _best(choices: Choices, method: Method) -> tuple[Path, float] | None:
    """The best path and the bound; None if nothing fits."""
    relaxed = relax(choices)
    if relaxed is None:
        return None
    path, exact = search(choices, relaxed)
    if method is Method.MILP:
        return _highs(choices, relaxed, path)
    if path is None:
        return None
    return path, path.cost if exact else relaxed.bound


def _highs(choices: Choices, relaxed: Relaxed, known: Path | None) -> tuple[Path, float] | None:
    """HiGHS over all options, or over those that can be better than the known placement."""
    count = int(np.isfinite(choices.cost).sum())
    everything = count <= MILP_OPTIONS or known is None
    slacks, _ = slack(choices, relaxed)
    most = count if count <= MILP_OPTIONS else MILP_OPTIONS // len(slacks)
    parts, whole = open_options(choices, slacks, relaxed, None if everything else known, most=most)
    path, bound = solve_milp(choices, parts, seconds=MILP_SECONDS, gap=MILP_GAP)
    if path is None or (known is not None and known.cost < path.cost):
        path = known
    if path is None:
        return None
    # A bound over options of which some were left out is no bound.
    return path, max(relaxed.bound, bound) if whole and bound is not None else relaxed.bound


def _remarks(problem: Problem, placement: Placement) -> list[str]:
    """The plain answers: one side only, no split, whether the disk pays."""
    last, layers = problem.cost.clusters, placement.layers
    remarks = []
    sides = (
        {Tier.RAM if p.home is Tier.DISK else p.home for p in layers}
        | {Tier.VRAM for p in layers if p.hot}
        | {Tier.RAM for p in layers if p.hot < last}
    )
    if len(sides) == 1 and problem.machine.gpu is not None:
        remarks.append(f"do not split: everything computes beside {next(iter(sides)).upper()}")
    elif len(sides) > 1 and all(_whole(p, last) for p in layers):
        remarks.append("do not split layers: each is whole on one side, as crossings would cost more than they save")
    if any(p.warm < last for p in layers):
        remarks.append(_disk_remark(problem, placement))
    remarks += _trunk_remark(problem, placement)
    return remarks


def _trunk_remark(problem: Problem, placement: Placement) -> list[str]:
    """What of the trunk stays on disk."""
    f = problem.footprint
    streamed = [layer for layer, place in enumerate(placement.layers) if place.home is Tier.DISK]
    head = placement.head is Tier.DISK
    if not streamed and not head:
        return []
    size = sum(f.attention[layer] for layer in streamed) + head * f.head
    what = [f"the attention of {len(streamed)} layers"] * bool(streamed) + ["the output head"] * head
    return [f"{' and '.join(what)} stay on disk and are read for every token: {size / 1e6:.0f} MB"]


def _whole(place: LayerPlace, last: int) -> bool:
    return place.hot == (last if place.home is Tier.VRAM else 0)


def _disk_remark(problem: Problem, placement: Placement) -> str:
    """Whether reading what is active beats reading all of it, as the whole cold part in one go."""
    cost, decode, disk = problem.cost, problem.cost.decode, problem.machine.disk
    waited = whole = 0.0
    runs = set()
    for layer, place in enumerate(placement.layers):
        time = cost.layer(decode, layer, *place)
        size = cost.record_bytes[layer] * int(cost.bounds[-1] - cost.bounds[place.warm])
        if disk is not None and size:
            whole += size / disk.curve.bandwidth(size)
            waited += float(time.disk)
            runs.add(int(time.run))
    sizes = f"{min(runs)} to {max(runs)}" if len(runs) > 1 else f"{min(runs)}"
    if waited > 0.8 * whole:
        return (
            f"the disk tier does not pay: reading what is active takes {waited * 1e3:.0f} ms a step, reading all of it "
            f"{whole * 1e3:.0f} ms; raise --ram-budget or use a smaller format"
        )
    return (
        f"cold records are read from disk in runs of {sizes} neurons: {waited * 1e3:.0f} ms a step "
        f"instead of {whole * 1e3:.0f} ms for all of them"
    )


def _nothing_fits(problem: Problem, vram: bool) -> BudgetError:
    """The refusal, with the account and the smallest budget of RAM that holds what neither VRAM nor the disk can."""
    needed, disk, demands = min(_least(problem, vram, disk) for disk in {False, problem.machine.disk is not None})
    missing = max(1, needed - problem.limits[Tier.RAM])
    total = problem.limits[Tier.RAM] + missing
    ways = [f"raise --ram-budget to about {setting_text(total)} ({total:,} bytes)"]
    if problem.machine.gpu is not None:
        more = problem.limits[Tier.VRAM] + missing
        ways.append(f"--vram-budget to about {setting_text(more)} ({more:,} bytes)")
    kv = next((d for d in demands if d.purpose is Purpose.KV and d.step), None)
    if kv is not None and missing < kv.nbytes:
        ways.append(f"lower --ctx-size from {kv.count} to {kv.count - -(-missing // kv.step)}")
    if problem.no_disk:
        ways.append(problem.no_disk)
    what = "rest that must be in memory" if disk else "model"
    table = problem.ledger().table(Tier.RAM, demands)
    return BudgetError(Tier.RAM, missing, f"the {what} does not fit; " + ", or ".join(ways), table)


def _least(problem: Problem, vram: bool, disk: bool) -> tuple[int, bool, list[Demand]]:
    """The least that RAM must hold, of all of the model or beside what can be on `disk`; what of, and for what."""
    f = problem.footprint
    trunk = Tier.DISK if disk and not f.tied else Tier.RAM
    place = LayerPlace(Tier.DISK if disk else Tier.RAM, Tier.RAM, 0, 0 if disk else problem.cost.clusters)
    demands = problem.demands(Placement(trunk, trunk, (place,) * f.n_layer))
    # With a disk, what VRAM could take is left out: a layer's cache goes there only together with its attention.
    spared = max(0, problem.room(Tier.VRAM)) if vram and problem.machine.disk is None else 0
    return sum(d.nbytes for d in demands) - spared, disk, demands
