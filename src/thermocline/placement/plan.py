"""A placement with its times and reasons: what `plan` makes, prints and keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path

from thermocline.errors import PlanError
from thermocline.hardware.machine import Tier
from thermocline.placement.cost import FfnMode, LayerTime, Phase
from thermocline.placement.footprint import Footprint
from thermocline.placement.ledger import Demand, Ledger, Purpose
from thermocline.placement.problem import LayerPlace, Problem
from thermocline.placement.solver import Method, Solution, first_token_ms, solve
from thermocline.placement.workload import Workload

VERSION = 1
DIGITS = 6
"""Decimals of predicted milliseconds: nanoseconds."""


class Status(StrEnum):
    """Whether a plan can be carried out as it is."""

    FRESH = "fresh"
    STALE = "stale"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """Where one layer lives, and its predicted decode step.

    `home` holds attention and cache (on disk: the attention is read for every pass, the cache is in RAM);
    `predictor` is None where none is used. Neurons before `hot` are in VRAM,
    from there to `warm` in RAM, the rest on disk. `hot_share` is the share of activations above `hot`. Times
    are milliseconds; `hot_ms` and `cold_ms` overlap. `read_run` is the neurons of one disk read, 0 for none.
    `binds` names what the layer waits for longest.
    """

    home: Tier
    predictor: Tier | None
    hot: int
    warm: int
    record_bytes: int
    hot_share: float
    attention_ms: float
    predictor_ms: float
    crossing_ms: float
    hot_ms: float
    cold_ms: float
    disk_ms: float
    total_ms: float
    prefill_ms: float
    streamed: bool
    read_run: int
    binds: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """Predicted times. `token_ms` is what the solver minimised: per token of output, the prompt's share included.

    `step_ms` is one decode step of all sequences, `tokens_per_second` what all of them make together in
    decode. `prefill_ms` is one pass over up to `ubatch` prompt tokens, 0 without a prompt. `between_ms` is the part of
    a step that is spent outside of layers and head, 0 where that was not measured.
    """

    token_ms: float
    bound_ms: float
    step_ms: float
    prefill_ms: float
    first_token_ms: float
    tokens_per_second: float
    between_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Device of every tensor and cache, depths of every layer, predicted times and reasons.

    `model`, `activity` and `machine` are fingerprints; `activity` is None where temperatures were unknown.
    `budgets` are the bytes that were allowed, `demands` those that are taken.
    """

    model_name: str
    model: str
    activity: str | None
    machine_name: str
    machine: str
    mode: FfnMode
    cluster: int
    n_ff: int
    workload: Workload
    budgets: Mapping[Tier, int]
    embedding: Tier
    head: Tier
    layers: tuple[LayerPlan, ...]
    demands: tuple[tuple[Tier, Purpose, int], ...]
    predicted: Predicted
    method: Method
    notes: tuple[str, ...]

    @property
    def gap(self) -> float:
        """How far the predicted time is above the lower bound, relative to itself."""
        return max(0.0, 1 - self.predicted.bound_ms / self.predicted.token_ms)

    def bytes_of(self, tier: Tier) -> int:
        """Bytes that the plan takes of a tier."""
        return sum(size for where, _, size in self.demands if where is tier)

    def depths(self, tier: Tier) -> tuple[tuple[int, int], ...]:
        """Each layer's slice of the order that a tier holds: (start, stop) in neurons."""
        if tier is Tier.VRAM:
            return tuple((0, layer.hot) for layer in self.layers)
        if tier is Tier.RAM:
            return tuple((layer.hot, layer.warm) for layer in self.layers)
        return tuple((layer.warm, self.n_ff) for layer in self.layers)

    def ledger(self, budgets: Mapping[Tier, int] | None = None) -> Ledger:
        """An account of `budgets`, or of the plan's own, with everything reserved.

        Raises:
            BudgetError: the plan does not fit.
        """
        ledger = Ledger(self.budgets if budgets is None else budgets)
        ledger.reserve_all(Demand(tier, purpose, size) for tier, purpose, size in self.demands)
        return ledger


def make_plan(problem: Problem, activity: str | None = None, method: Method = Method.GREEDY) -> Plan:
    """Solve a problem and write down the result. `activity` is the fingerprint of the temperatures' file.

    Raises:
        BudgetError: nothing fits.
    """
    return plan_of(problem, solve(problem, method), activity)


def plan_of(problem: Problem, solution: Solution, activity: str | None = None) -> Plan:
    """The plan that carries a solution out."""
    f, cost, placement = problem.footprint, problem.cost, solution.placement
    prefill = next((phase for phase in cost.phases if phase is not cost.decode), None)
    step = problem.phase_seconds(placement, cost.decode)
    predicted = Predicted(
        token_ms=_ms(solution.objective),
        bound_ms=_ms(solution.bound),
        step_ms=_ms(step),
        prefill_ms=0.0 if prefill is None else _ms(problem.phase_seconds(placement, prefill)),
        first_token_ms=round(first_token_ms(problem, placement), DIGITS),
        tokens_per_second=round(problem.workload.batch / step, DIGITS),
        between_ms=_ms(problem.machine.between_parts),
    )
    return Plan(
        model_name=f.name,
        model=f.fingerprint,
        activity=activity,
        machine_name=problem.machine.name,
        machine=problem.machine.fingerprint,
        mode=problem.mode,
        cluster=problem.cluster,
        n_ff=f.n_ff,
        workload=problem.workload,
        budgets=problem.limits,
        embedding=placement.embedding,
        head=placement.head,
        layers=tuple(_layer_plan(problem, prefill, layer, place) for layer, place in enumerate(placement.layers)),
        demands=_summed(problem.demands(placement)),
        predicted=predicted,
        method=solution.method,
        notes=solution.notes,
    )


def check_plan(
    plan: Plan,
    footprint: Footprint,
    *,
    activity: str | None,
    machine: str,
    mode: FfnMode,
    workload: Workload,
    limits: Mapping[Tier, int],
    source: Path | str = "",
) -> tuple[Status, tuple[str, ...]]:
    """Whether the plan serves this model, activity, machine, mode, workload and budgets; with reasons if it is stale.

    `source` is the plan's file. Stale plans are sound but made for something else: solve again, and say so. A smaller
    budget that the plan still fits leaves it fresh, as the best of more is then the best of less.

    Raises:
        PlanError: the plan belongs to another model or activity: its depths would mean other neurons.
    """
    source = source or f"plan of {plan.model_name}"
    if plan.model != footprint.fingerprint:
        raise PlanError(source, "model", f"is of {plan.model[:12]}, this model is {footprint.fingerprint[:12]}")
    if len(plan.layers) != footprint.n_layer or plan.n_ff != footprint.n_ff:
        raise PlanError(
            source,
            "layers",
            f"{len(plan.layers)} of {plan.n_ff} neurons, the model has {footprint.n_layer} of {footprint.n_ff}",
        )
    if plan.activity != activity:
        raise PlanError(source, "activity", _other_activity(plan.activity, activity))
    reasons = []
    device = _other_device(plan, limits)
    if device:
        reasons.append(device)
    elif plan.machine != machine:  # which names the device too
        reasons.append(f"it was made for another machine ({plan.machine_name})")
    if plan.mode is not mode:
        reasons.append(f"it was made for mode {plan.mode}, not {mode}")
    reasons += [
        f"its {f.name} is {getattr(plan.workload, f.name)}, now {getattr(workload, f.name)}"
        for f in fields(Workload)
        if getattr(plan.workload, f.name) != getattr(workload, f.name)
    ]
    for tier in (Tier.RAM,) if device else (Tier.VRAM, Tier.RAM):
        now, then = limits.get(tier, 0), plan.budgets.get(tier, 0)
        if now > then:
            reasons.append(f"the budget of {tier} has grown from {then:,} to {now:,} bytes")
        elif plan.bytes_of(tier) > now:
            reasons.append(f"it takes {plan.bytes_of(tier):,} bytes of {tier}, and {now:,} are left")
    return (Status.STALE if reasons else Status.FRESH), tuple(reasons)


def _other_activity(planned: str | None, used: str | None) -> str:
    """How the activity that a plan was made from differs from the one that is used, and what to do."""
    if planned is None:
        return f"it was made without one, and {(used or '')[:12]} is used"
    now = f"{used[:12]} is used" if used else "none is used"
    return f"it was made from {planned[:12]}, and {now}; name its file with --activity"


def _other_device(plan: Plan, limits: Mapping[Tier, int]) -> str:
    """How the devices that a plan was made for differ from those that there are, and what to do; empty where not."""
    if (Tier.VRAM in plan.budgets) == (Tier.VRAM in limits):
        return ""
    if Tier.VRAM in limits:
        return "it was made for the CPU alone: leave --device out"
    if not plan.bytes_of(Tier.VRAM):
        return "it was made beside a GPU or an emulated device: add --device cuda or --device emulated"
    graphs = any((tier, purpose) == (Tier.VRAM, Purpose.GRAPHS) for tier, purpose, _ in plan.demands)
    return "it uses a GPU: add --device cuda" if graphs else "it uses an emulated device: add --device emulated"


def _layer_plan(problem: Problem, prefill: Phase | None, layer: int, place: LayerPlace) -> LayerPlan:
    cost = problem.cost
    time = cost.layer(cost.decode, layer, *place)
    filled = None if prefill is None else cost.layer(prefill, layer, *place)
    return LayerPlan(
        home=place.home,
        predictor=place.predictor if problem.mode is FfnMode.PREDICTED else None,
        hot=int(cost.bounds[place.hot]),
        warm=int(cost.bounds[place.warm]),
        record_bytes=cost.record_bytes[layer],
        hot_share=round(cost.hot_share(layer, place.hot), DIGITS),
        attention_ms=_ms(time.attention),
        predictor_ms=_ms(time.predictor),
        crossing_ms=_ms(float(time.crossing)),
        hot_ms=_ms(float(time.hot)),
        cold_ms=_ms(float(time.cold)),
        disk_ms=_ms(float(time.disk)),
        total_ms=_ms(float(time.total)),
        prefill_ms=0.0 if filled is None else _ms(float(filled.total)),
        streamed=filled is not None and bool(filled.streamed),
        read_run=int(time.run) if place.warm < cost.clusters else 0,
        binds=_binding(place, time),
    )


def _binding(place: LayerPlace, time: LayerTime) -> str:
    """What a layer waits for longest."""
    # Computing and reading slow each other: the longer of them takes more than a half of both.
    cold = "disk" if 2 * float(time.disk) > float(time.cold) else "ram"
    side = cold if float(time.cold) > float(time.hot) else "vram"
    waits = {
        f"ffn in {side}": max(float(time.hot), float(time.cold)),
        f"attention in {place.home}": time.attention,
        f"predictor in {place.predictor}": time.predictor,
        "crossing": float(time.crossing),
    }
    return max(waits, key=lambda name: waits[name])


def _summed(demands: list[Demand]) -> tuple[tuple[Tier, Purpose, int], ...]:
    sums: dict[tuple[Tier, Purpose], int] = {}
    for d in demands:
        sums[d.tier, d.purpose] = sums.get((d.tier, d.purpose), 0) + d.nbytes
    tiers, purposes = list(Tier), list(Purpose)
    order = sorted(sums, key=lambda key: (tiers.index(key[0]), purposes.index(key[1])))
    return tuple((tier, purpose, sums[tier, purpose]) for tier, purpose in order if sums[tier, purpose])


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, DIGITS)
