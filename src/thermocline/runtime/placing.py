"""Which devices run a model, and what each of them gets: from the settings to memory and seats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from thermocline.activity.order import Order
from thermocline.config import DeviceKind, LoadSettings, OpsKind
from thermocline.errors import WARNING, UsageError
from thermocline.files.source import ModelSource
from thermocline.hardware.machine import UNCORRECTED, Corrections, Tier
from thermocline.hardware.memory import own_memory
from thermocline.memory.arena import Make, Memory, make_array
from thermocline.memory.streamed import StreamingOps
from thermocline.ops.device import Device, EmulatedDevice, Host
from thermocline.ops.factory import interpreted, make_gpu, make_ops
from thermocline.placement.ledger import Demand, Purpose
from thermocline.placement.plan import Plan, Status, check_plan, make_plan
from thermocline.placement.plan_file import load_plan
from thermocline.placement.problem import MOVING_BYTES, Problem
from thermocline.placement.sending import sent_from
from thermocline.runtime.below import Below, below, streams
from thermocline.runtime.planning import AUTO, ONLY_SHARES, PlanSettings, find_order, problem_of, stand_in
from thermocline.runtime.split import recall

ACTIVITY_UNUSED = "the activity is not needed: everything is in RAM, and nothing is split"
KERNELS = (Purpose.ACTIVATIONS, Purpose.STAGING, Purpose.GRAPHS, Purpose.MARGIN)
"""What a plan sets aside for memory that no array of ours shows: scratch of kernels, drivers, the interpreter."""
NOTHING_MOVES = f"{WARNING}--drift does nothing: every layer's neurons are in one memory, and none has a better place"


@dataclass(frozen=True, slots=True)
class Placing:
    """The devices with their memory, and the plan that fills it; None where everything is in RAM, unbudgeted.

    `problem` is what the plan solves; `stands_in` says that its device is part of RAM. `corrections` are those that the
    plan is priced with.
    """

    memory: Memory
    plan: Plan | None
    order: Order | None
    notices: tuple[str, ...]
    below: Below
    problem: Problem | None = None
    stands_in: bool = False
    corrections: Corrections = UNCORRECTED

    def close(self) -> None:
        """Give the memory back and let go of devices and files; twice does no harm."""
        self.below.close()
        self.memory.close()

    def claim_scratch(self) -> None:
        """Put into the ledger what the plan sets aside for memory that is in use, but in no arena.

        An emulated device computes with the host's kernels, so that their scratch is the host's, where it is planned.

        Raises:
            BudgetError: a budget has no room for it.
        """
        for tier, purpose, left in self._set_aside():
            if not isinstance(self.memory.devices.get(tier), EmulatedDevice):
                self.memory.arenas[tier].claim(left, purpose)

    @property
    def sent_from(self) -> tuple[int, ...]:
        """Tokens of a step from which each layer's neurons in RAM are sent to the GPU; 0 for never.

        They are not where the plan sets aside no buffers for them, as for a device that is emulated.
        """
        plan = self.plan
        if plan is None or self.problem is None or (Tier.VRAM, Purpose.STAGING) not in {d[:2] for d in plan.demands}:
            return ()
        return sent_from(self.problem, plan.layers)

    def unclaimed(self, tier: Tier) -> int:
        """Bytes that `claim_scratch` will claim of a tier."""
        return sum(left for where, _, left in self._set_aside() if where is tier)

    def _set_aside(self) -> Iterator[tuple[Tier, Purpose, int]]:
        """What is not yet in the ledger, by its account at the time of asking."""
        for tier, purpose, size in () if self.plan is None else self.plan.demands:
            left = size - self.memory.ledger.used(tier, purpose)
            if purpose in KERNELS and left > 0:
                yield tier, purpose, left


def place(
    source: ModelSource,
    settings: LoadSettings,
    threads: int,
    *,
    make: Make = make_array,
    tell: Callable[[str], None] | None = None,
) -> Placing:
    """Decide where everything of a model lives, and make the devices.

    Raises:
        BudgetError: nothing fits, or a budget of VRAM is too small to be of use.
        PlanError, FingerprintError: the plan or the activity that was named belongs to something else.
        HardwareError: the device that was asked for is not there.
        UsageError: settings contradict one another, or say something of a device that is not there.
    """
    kind, notices = _device(settings), _powerinfer(settings)
    if kind is DeviceKind.CPU and settings.vram_budget is not None:
        raise UsageError(
            "--vram-budget says how much of a GPU to use, and none is used: add --device cuda, or --device emulated"
        )
    if kind is DeviceKind.CPU and settings.ram_budget is None and settings.plan is None:
        if settings.activity is not None:
            find_order(source, settings.activity)
            notices.append(ACTIVITY_UNUSED)
        if settings.replan:
            notices.append(f"{WARNING}--replan does nothing: everything is in RAM, and there is no plan")
        if settings.drift is not None:
            notices.append(NOTHING_MOVES)
        host = Host(make_ops(settings.ops, threads, settings.isa))
        return Placing(Memory({Tier.RAM: host}, {}, make), None, None, tuple(notices), Below(None))
    wanted = load_plan(settings.plan) if settings.plan is not None else None
    problem, order, more = _problem(source, settings, kind, wanted, tell)
    plan, why, corrections = _plan(problem, order, settings, wanted, kind)
    if order is None and kind is not DeviceKind.CPU and ONLY_SHARES not in more:
        notices.append(
            "which neurons are hot is not known, so all count as equally hot: `thermocline profile` finds out"
        )
    budgets = {
        tier: size for tier, size in plan.budgets.items() if tier is Tier.VRAM or settings.ram_budget is not None
    }
    memory = Memory(_devices(kind, settings, threads, plan), budgets, make)
    try:
        moving = MOVING_BYTES if settings.watched else 0
        lower = below(source, plan, memory, problem.machine.disk, tell, moving)
    except BaseException:
        memory.close()
        raise
    return Placing(
        memory, plan, order, (*notices, *more, *why, *lower.notices), lower, problem, _stands_in(kind), corrections
    )


def _device(settings: LoadSettings) -> DeviceKind:
    return DeviceKind.CPU if settings.device is DeviceKind.AUTO else settings.device


def _stands_in(kind: DeviceKind) -> bool:
    """Whether the device is part of this machine's RAM: the emulated one, and the interpreter's."""
    return kind is DeviceKind.EMULATED or (kind is DeviceKind.CUDA and interpreted())


def _powerinfer(settings: LoadSettings) -> list[str]:
    notices = []
    if settings.reset_gpu_index:
        notices.append("--reset-gpu-index: plans are made anew with every start, so there is nothing to reset")
    if settings.disable_gpu_index:
        notices.append("--disable-gpu-index: no GPU index is used in any case; a plan says what the GPU holds")
    return notices


def _devices(kind: DeviceKind, settings: LoadSettings, threads: int, plan: Plan) -> dict[Tier, Device]:
    """The host, and the GPU, or an emulated device that has half of the threads."""
    if kind is DeviceKind.CPU:
        return {Tier.RAM: _host(settings, threads, plan)}
    if kind is DeviceKind.CUDA:
        return {Tier.VRAM: make_gpu(), Tier.RAM: _host(settings, threads, plan)}
    half = max(1, threads // 2)
    return {
        Tier.VRAM: EmulatedDevice(make_ops(settings.ops, half, settings.isa)),
        Tier.RAM: _host(settings, max(1, threads - half), plan),
    }


def _host(settings: LoadSettings, threads: int, plan: Plan) -> Host:
    """The CPU; with ops that read matrices from disk where the plan leaves some there."""
    if not streams(plan):
        return Host(make_ops(settings.ops, threads, settings.isa))
    if settings.ops is not OpsKind.CPU:
        raise UsageError(f"--ops {settings.ops} cannot compute with what stays on disk; raise --ram-budget")
    return Host(StreamingOps(threads, settings.isa))


def _problem(
    source: ModelSource,
    settings: LoadSettings,
    kind: DeviceKind,
    wanted: Plan | None,
    tell: Callable[[str], None] | None,
) -> tuple[Problem, Order | None, tuple[str, ...]]:
    """What is to be placed, under the budgets that were stated, else those of the plan, else what there is."""
    plan_settings = PlanSettings(
        device=DeviceKind.EMULATED if _stands_in(kind) else kind,
        vram_budget=AUTO if settings.vram_budget is None else settings.vram_budget,
        ram_budget=AUTO if settings.ram_budget is None else settings.ram_budget,
        in_use=own_memory(),
    )
    load = settings
    if wanted is not None:
        load = replace(settings, ctx_size=settings.ctx_size or wanted.workload.context)
    problem, order, notices = problem_of(source, plan_settings, load, activity=settings.activity, tell=tell)
    budgets = dict(problem.limits)
    if settings.ram_budget is None:
        # Without a budget, weights stay mapped and may be more than memory holds: the system drops what it must.
        whole = problem.footprint.nbytes + sum(d.nbytes for d in problem.fixed(Tier.RAM))
        cache = problem.footprint.kv_layer(problem.workload.context) * problem.footprint.n_layer
        budgets[Tier.RAM] = max(problem.machine.cpu.capacity, whole + cache)
    if wanted is not None:
        stated = {Tier.VRAM: settings.vram_budget, Tier.RAM: settings.ram_budget}
        budgets |= {t: size for t, size in wanted.budgets.items() if t in budgets and stated[t] is None}
        tokens = min(wanted.workload.ubatch, settings.ubatch)
        work = replace(wanted.workload, context=problem.workload.context, ubatch=tokens)
        problem = replace(problem, workload=work)
    problem = replace(problem, budgets=budgets)
    if settings.vram_budget not in (None, AUTO):
        least = Demand(Tier.VRAM, Purpose.FFN, max(problem.cost.record_bytes) * int(problem.cost.bounds[1]))
        problem.ledger().reserve_all([*problem.fixed(Tier.VRAM), least])
    return problem, order, notices


def _plan(
    problem: Problem, order: Order | None, settings: LoadSettings, wanted: Plan | None, kind: DeviceKind
) -> tuple[Plan, tuple[str, ...], Corrections]:
    """The plan that was named if it serves, else a new one; with the reasons, and what it is priced with."""
    fingerprint = None if order is None else order.fingerprint
    machine = problem.machine.fingerprint
    why: tuple[str, ...] = ()
    if wanted is not None:
        status, reasons = check_plan(
            wanted,
            problem.footprint,
            activity=fingerprint,
            machine=machine,
            mode=problem.mode,
            workload=problem.workload,
            limits=problem.limits,
            source=str(settings.plan),
        )
        if status is Status.FRESH and not settings.replan:
            return wanted, (), UNCORRECTED
        name = Path(str(settings.plan)).name
        warning = "" if settings.replan else WARNING
        why = (f"{warning}a new plan was made instead of {name}: {'; '.join(reasons) or '--replan asks for it'}",)
    make = stand_in if _stands_in(kind) else make_plan
    if settings.replan:
        measured = recall(machine, problem.footprint.fingerprint)
        if measured is not None:
            corrected = replace(problem.machine, corrections=measured, source="the last run")
            plan = make_plan(replace(problem, machine=corrected), fingerprint)
            return replace(plan, machine=machine), (*why, "planned with the last run's figures"), measured
        why = (*why, "--replan: no run with this model was measured on this machine yet")
    return replace(make(problem, fingerprint), machine=machine), why, UNCORRECTED


def require_device(plan: Plan, memory: Memory) -> None:
    """Refuse a plan for a device that is not there.

    Raises:
        UsageError: the plan uses VRAM, and no device has it.
    """
    if plan.bytes_of(Tier.VRAM) and Tier.VRAM not in memory.devices:
        raise UsageError("the plan uses VRAM, and no device has it; add --device emulated, or make a plan without")
