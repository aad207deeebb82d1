"""From a model's file, what is known of it and of a machine to a placement problem, and to its plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from thermocline.activity.applied import activity_for
from thermocline.activity.order import Order, load_order
from thermocline.activity.predictor import Predictor
from thermocline.activity.store import activity_inside
from thermocline.config import NO_VRAM, NUMBERED, DeviceKind, LoadSettings, device_and_gpu
from thermocline.errors import HardwareError, ModelFormatError, ThermoclineError, UsageError, printable
from thermocline.files.companion import companion
from thermocline.files.gguf import GgufFile
from thermocline.files.sidecar import SidecarKind
from thermocline.files.source import ModelSource
from thermocline.files.weight import Weight
from thermocline.hardware import catalogue
from thermocline.hardware.disk import SMALLEST
from thermocline.hardware.gpu import find_gpus
from thermocline.hardware.gpu_choice import choose_gpu
from thermocline.hardware.gpu_software import gpu_lacks
from thermocline.hardware.machine import Machine, Tier
from thermocline.hardware.probe import Probe, emulated, machine_of
from thermocline.memory.checks import first_bytes
from thermocline.memory.kv_cache import kv_bytes_per_token
from thermocline.model.families import family_of
from thermocline.model.spec import ModelSpec
from thermocline.model.tensors import has_records
from thermocline.placement.budget import Budget, BudgetKind, parse_budget, size_text
from thermocline.placement.cost import LARGEST_CLUSTER, CostModel, FfnMode, ffn_mode
from thermocline.placement.footprint import Footprint, footprint_of
from thermocline.placement.ledger import Purpose
from thermocline.placement.plan import Plan, make_plan, plan_of
from thermocline.placement.plan_file import plan_text
from thermocline.placement.predicting import predicted_up_to
from thermocline.placement.problem import Problem
from thermocline.placement.solver import Method, Solution, solve
from thermocline.placement.workload import EMULATED, Overheads, Workload
from thermocline.runtime.prediction import choose_prediction
from thermocline.runtime.step_costs import probe_machine

AUTO = "auto"
LIKE_A_GPU = 8
"""Times that the memory of the GPU, for which an emulated device stands, is as fast as RAM."""
FEWEST_TOKENS = 16
"""Passes of a prompt are not made shorter than this to leave VRAM for weights."""
SCRATCH_SHARE = 4
"""Scratch may take one part in so many of VRAM's budget, unless passes would be too short."""
HOST_MARGIN = 128 << 20
"""Of RAM without a GPU: the interpreter, its libraries and the tokenizer take some 60 to 100 MB."""
GROWTH = 24 << 20
"""What a process that has read its model's header and tokenizer takes on beside weights and arrays: twice as seen."""
MARGIN_STEP = 16 << 20
"""Margins of a run are whole multiples, so that the same run is planned alike again."""
NO_RECORDS = "leave cold neurons on disk: that takes a file with neuron records, which `thermocline convert` writes"
ONLY_SHARES = (
    "which neurons are hot is not known: each counts as often as the predictor selects one of its layer on average; "
    "`thermocline profile` finds out"
)
CONTEXT = 4096
"""Tokens that a plan is made for where nobody says, if the model was trained on as many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """What a plan is made for. Budgets are as people write them; `machine` is `auto`, this one, or of the catalogue.

    `device` is what computes beside the CPU: auto is the GPU where this machine has one, cpu nothing, cuda insists on a
    GPU, of which `gpu` names one of several. `in_use` is what the process that will carry it out takes already, 0 for
    unknown.
    """

    machine: str = AUTO
    device: DeviceKind = DeviceKind.AUTO
    gpu: str | None = None
    vram_budget: str = AUTO
    ram_budget: str = AUTO
    prompt: int = 256
    output: int = 256
    batch: int = 1
    latency_target: float | None = None
    method: Method = Method.GREEDY
    in_use: int = 0

    def __post_init__(self) -> None:
        if self.method not in list(Method):
            raise UsageError(f"method is {printable(str(self.method))}; allowed: {', '.join(Method)}")
        object.__setattr__(self, "method", Method(self.method))
        device, gpu = device_and_gpu(self.device, self.gpu)
        if device not in list(DeviceKind):
            allowed = ", ".join(DeviceKind) + NUMBERED
            raise UsageError(f"--device is {printable(str(device))}; allowed: {allowed}")
        object.__setattr__(self, "device", DeviceKind(device))
        object.__setattr__(self, "gpu", gpu)
        if self.gpu is not None and self.device not in (DeviceKind.AUTO, DeviceKind.CUDA):
            raise UsageError("--gpu chooses one of several: leave it out, or use --device cuda")


@dataclass(frozen=True, slots=True, eq=False)
class Planned:
    """A plan with the problem that it solves, the order that its depths count along (None: the file's own), and what
    there is to say, one line each. `stands_in`: placed as for a GPU; see `stand_in`.
    """

    plan: Plan
    problem: Problem
    order: Order | None
    notices: tuple[str, ...]
    stands_in: bool = False

    def seconds(self, problem: Problem) -> float:
        """Per token of output, of the plan that would be made for another problem."""
        found = solve(as_for_a_gpu(problem) if self.stands_in else problem)
        return problem.seconds(found.placement)

    def as_dict(self) -> dict[str, Any]:
        """The plan's file and the notices, for JSON."""
        document: dict[str, Any] = json.loads(plan_text(self.plan))
        return {"plan": document, "notices": list(self.notices)}


def plan_model(
    source: ModelSource,
    settings: PlanSettings,
    load: LoadSettings,
    *,
    activity: str | Path | None = None,
    tell: Callable[[str], None] | None = None,
) -> Planned:
    """Find the fastest placement that fits.

    `activity` is what `profile` wrote, or an order made from it; without, what is beside or inside the model is used.

    Raises:
        BudgetError: nothing fits.
        FingerprintError: the activity is another model's.
        HardwareError, UsageError: the machine or a setting is not usable.
    """
    problem, order, notices = problem_of(source, settings, load, activity=activity, tell=tell)
    if tell is not None:
        tell("looking for the fastest placement")
    fingerprint = None if order is None else order.fingerprint
    stands_in = settings.device is DeviceKind.EMULATED
    make = stand_in if stands_in else make_plan
    return Planned(make(problem, fingerprint, settings.method), problem, order, notices, stands_in)


def stand_in(problem: Problem, activity: str | None, method: Method = Method.GREEDY) -> Plan:
    """The plan for an emulated device: placed as for a GPU, priced as what it is.

    For itself, a device that shares the CPU's memory would be worth few neurons or none, and there would be nothing to
    try: so the solver is told of a memory some times as fast as RAM, beside which the CPU has all of its own, and of
    crossings that cost nothing.
    """
    found = solve(as_for_a_gpu(problem), method)
    seconds = problem.seconds(found.placement)
    note = (
        f"placed as for a device {LIKE_A_GPU} times as fast as RAM, of which the bound and the gap are; the times are "
        "those of the emulated one"
    )
    # What bounds the faster machine bounds this one.
    bound = min(found.bound, seconds)
    return plan_of(problem, Solution(found.placement, seconds, bound, found.method, (*found.notes, note)), activity)


def as_for_a_gpu(problem: Problem) -> Problem:
    """The problem with the memory of a GPU in the place of the emulated device's; see `stand_in`."""
    machine = problem.machine
    if machine.gpu is None:
        raise UsageError(f"{machine.name} has no emulated device")
    rate = LIKE_A_GPU * machine.cpu.bandwidth
    gpu = replace(
        machine.gpu,
        bandwidth=rate,
        bandwidth_busy=rate,
        flops=LIKE_A_GPU * machine.cpu.flops,
        launch=0.0,
        unpacking=None,
        calls=None,
    )
    cpu = replace(machine.cpu, bandwidth_busy=machine.cpu.bandwidth)  # a GPU leaves the CPU its memory
    return replace(problem, machine=replace(machine, cpu=cpu, gpu=gpu, crossing=0.0, meeting=0.0, link=rate))


def problem_of(
    source: ModelSource,
    settings: PlanSettings,
    load: LoadSettings,
    *,
    activity: str | Path | None = None,
    tell: Callable[[str], None] | None = None,
) -> tuple[Problem, Order | None, tuple[str, ...]]:
    """The placement problem of a model; see `plan_model`."""
    family = family_of(source)
    spec = family.spec(source)
    weights = family.weights(source, spec)
    prediction = choose_prediction(source, spec, first_bytes(spec, weights), load)
    mode = ffn_mode(prediction.mode)
    footprint = footprint_of(
        spec,
        weights,
        source.fingerprint,
        kv_token=kv_bytes_per_token(spec, load.cache_type_k, load.cache_type_v) // spec.n_layer,
        predictor=None if prediction.predictor is None else _predictor_bytes(prediction.predictor),
    )
    order, notices = find_order(source, activity)
    if order is None and _selected(mode, prediction.predictor) is not None:
        notices = (*notices, ONLY_SHARES)
    machine, budgets, overheads = machine_and_budgets(settings, source.path, footprint.nbytes, tell)
    no_disk = ""
    if machine.disk is not None and not has_records(weights):
        machine, no_disk = replace(machine, disk=None), NO_RECORDS
        if settings.ram_budget != AUTO:
            notices = (
                *notices,
                "no neuron can stay on disk: that takes a file with neuron records, which `convert` writes",
            )
    problem = Problem(
        footprint,
        machine,
        _workload(settings, load, spec.n_ctx_train),
        mode,
        _temperatures(order, footprint, mode, prediction.predictor),
        budgets,
        overheads,
        cluster=LARGEST_CLUSTER,
        watched=load.watched,
        scattered=order is not None and not _as_in_file(order),
        no_disk=no_disk,
    )
    problem, shorter = _with_short_passes(problem)
    return problem, order, (*prediction.notices, *notices, *shorter)


def _with_short_passes(problem: Problem) -> tuple[Problem, tuple[str, ...]]:
    """The same with passes short enough that a small VRAM budget is not spent on scratch, and what to say about it."""
    asked = tokens = problem.workload.ubatch
    budget = problem.limits.get(Tier.VRAM)
    if budget is None:
        return problem, ()
    while tokens > FEWEST_TOKENS and SCRATCH_SHARE * _scratch(problem) > budget:
        tokens = max(FEWEST_TOKENS, tokens // 2)
        problem = replace(problem, workload=replace(problem.workload, ubatch=tokens))
    if tokens == asked:
        return problem, ()
    return problem, (f"prompts run in passes of {tokens} tokens instead of {asked}: a VRAM budget of "
                     f"{size_text(budget)} has no room for the scratch of longer ones",)  # fmt: skip


def _scratch(problem: Problem) -> int:
    return sum(d.nbytes for d in problem.fixed(Tier.VRAM) if d.purpose is Purpose.ACTIVATIONS)


def find_order(source: ModelSource, path: str | Path | None) -> tuple[Order | None, tuple[str, ...]]:
    """The order in `path`, an order or an activity; without, of what lies beside the model, else of the activity
    inside it; None if there is nothing. What nobody asked for and is of no use is told of.

    Raises:
        FingerprintError: what `path` names is another model's.
        ModelFormatError: it is neither.
    """
    if path is not None:
        return _read_order(Path(path), source), ()
    doubts: tuple[str, ...] = ()
    for kind in (SidecarKind.ORDER, SidecarKind.ACTIVITY):
        beside = companion(source.path, kind)
        if beside.is_file():
            try:
                return _read_order(beside, source), (*doubts, f"temperatures from {printable(beside.name, 80)}")
            except ThermoclineError as error:
                doubts = (*doubts, f"{kind} not used: {error}")
    inside = activity_inside(source) if isinstance(source, GgufFile) else None
    if inside is None:
        return None, doubts
    return Order.of(inside), (*doubts, "temperatures from the activity inside the model")


def machine_and_budgets(
    settings: PlanSettings, model: Path, weights: int, tell: Callable[[str], None] | None = None
) -> tuple[Machine, dict[Tier, int], Overheads]:
    """The machine to plan for, the bytes that may be used of each tier, and what each side needs beside them.

    A share of VRAM is of the GPU's; an emulated device has none of its own, so there it is of the bytes of the model's
    `weights`.
    """
    vram = parse_budget(settings.vram_budget, "vram-budget")
    ram = parse_budget(settings.ram_budget, "ram-budget")
    stated = settings.vram_budget != AUTO
    if settings.machine != AUTO:
        if settings.device is not DeviceKind.AUTO or settings.gpu is not None:
            raise UsageError(
                "a machine of the catalogue has its own GPU or none; --device and --gpu are of this machine"
            )
        machine = catalogue.machine(settings.machine)
        free = {Tier.RAM: machine.cpu.capacity, Tier.VRAM: machine.gpu.capacity if machine.gpu else 0}
        overheads = Overheads()
    else:
        if settings.gpu is not None:
            choose_gpu(settings.gpu)
        survey, probe = probe_machine(disk=_to_measure(model), tell=tell)
        if settings.device in (DeviceKind.CPU, DeviceKind.EMULATED):
            probe = replace(probe, gpus=(), gpu_speeds=())
        machine = machine_of(survey, probe, model)
        if settings.device is DeviceKind.EMULATED:
            machine = emulated(machine, probe, survey.memory.usable)
        # What is free now, other processes counted, only the driver knows; the probe keeps what lasts.
        cards = find_gpus() if probe.gpus else ()
        overheads = EMULATED if settings.device is DeviceKind.EMULATED else _overheads(probe)
        free = {Tier.RAM: survey.memory.available, Tier.VRAM: cards[0].free if cards else survey.memory.available // 2}
    if machine.gpu is None and settings.device is DeviceKind.CUDA:
        lacks = gpu_lacks() or ("no GPU was found that can be measured",)
        raise HardwareError(f"{'. '.join(lacks)}; --machine plans for a GPU of the catalogue")
    if stated and settings.device is DeviceKind.CPU:
        raise UsageError(NO_VRAM)
    if machine.gpu is None and stated:
        raise UsageError(
            f"{machine.name} has no GPU, and --vram-budget says how much of one to use; leave it out, plan for "
            "--device emulated, or for a --machine with a GPU"
        )
    if machine.gpu is None:  # nor a driver that takes memory of the host
        overheads = replace(overheads, margin_ram=min(overheads.margin_ram, _host_margin(settings.in_use)))
    budgets = {Tier.RAM: _resolved(ram, "ram-budget", machine.cpu.capacity, free[Tier.RAM])}
    if machine.gpu is not None:
        shared = settings.device is DeviceKind.EMULATED and vram.kind is BudgetKind.SHARE
        whole = min(weights, machine.gpu.capacity) if shared else machine.gpu.capacity
        budgets[Tier.VRAM] = _resolved(vram, "vram-budget", whole, free[Tier.VRAM])
    return machine, budgets, overheads


def _host_margin(in_use: int) -> int:
    """Of RAM without a GPU: for a process that takes so much already, 0 for one of which nothing is known."""
    return min(HOST_MARGIN, -(-(in_use + GROWTH) // MARGIN_STEP) * MARGIN_STEP) if in_use else HOST_MARGIN


def _overheads(probe: Probe) -> Overheads:
    """What the driver was seen to keep for a process comes on top of the margin."""
    contexts = [speed.context for speed in probe.gpu_speeds[:1] if speed is not None]
    plain = Overheads()
    return replace(plain, margin_vram=plain.margin_vram + sum(contexts))


def _to_measure(model: Path) -> Path | None:
    """The model's largest file, if it is large enough to say something about its disk."""
    files = [model] if model.is_file() else [file for file in model.glob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size, default=None)
    return largest if largest is not None and largest.stat().st_size >= SMALLEST else None


def _read_order(path: Path, source: ModelSource) -> Order:
    try:
        order = load_order(path)
    except ModelFormatError:
        order = Order.of(activity_for(source, family_of(source).spec(source), path))
    order.require_model(source.fingerprint, source.path.name, path=path)
    return order


def _temperatures(order: Order | None, footprint: Footprint, mode: FfnMode, predictor: Predictor | None) -> Any:
    """How often each neuron is computed, hottest first (n_layer, n_ff).

    A predictor selects more than what fires: where its share is known, temperatures are raised to it. Where nothing
    else is known, all neurons of a layer have that share; None if that is not known either.
    """
    wanted = (footprint.n_layer, footprint.n_ff)
    if order is None:
        shares = _selected(mode, predictor)
        return None if shares is None else np.broadcast_to(np.asarray(shares, np.float64)[:, None], wanted)
    if order.order.shape != wanted:
        raise UsageError(f"an activity of {order.order.shape} (layers, neurons) does not fit a model of {wanted}")
    return computed(order.temperature, mode, predictor)


def computed(temperatures: Any, mode: FfnMode, predictor: Predictor | None) -> Any:
    """How often neurons that fire so often are computed, hottest first (n_layer, n_ff); see `_temperatures`."""
    heat, shares = -np.sort(-temperatures, axis=1), _selected(mode, predictor)
    if shares is None:
        return heat
    mean = heat.mean(axis=1)
    factor = np.divide(np.asarray(shares), mean, out=np.ones_like(mean), where=mean > 0)
    return np.clip(heat * np.maximum(factor, 1.0)[:, None], 0.0, 1.0)


def _selected(mode: FfnMode, predictor: Predictor | None) -> tuple[float, ...] | None:
    """Share of each layer's neurons that the predictor selects; None where none does, or it was not measured."""
    return predictor.active_shares if mode is FfnMode.PREDICTED and predictor is not None else None


def _as_in_file(order: Order) -> bool:
    """Whether the file has its neurons hottest first, but for neighbours."""
    moved = np.abs(order.order - np.arange(order.order.shape[1]))
    return float(moved.mean()) < LARGEST_CLUSTER


def predicted_batches(
    source: ModelSource,
    spec: ModelSpec,
    weights: Mapping[str, Weight],
    predictor: Predictor,
    tell: Callable[[str], None] | None = None,
) -> tuple[int, ...]:
    """For each layer, up to how many tokens of a step prediction is faster on this machine; see `predicted_up_to`.

    What has not been measured of the machine is measured first, if the predictor's shares are known.
    """
    shares = _selected(FfnMode.PREDICTED, predictor)
    if shares is None:
        return (1,) * spec.n_layer
    sizes = _predictor_bytes(predictor)
    footprint = footprint_of(spec, weights, source.fingerprint, kv_token=0, predictor=sizes)
    machine = machine_of(*probe_machine(any_disk=False, tell=tell))
    heat = _temperatures(None, footprint, FfnMode.PREDICTED, predictor)
    return predicted_up_to(CostModel(footprint, machine, Workload(), FfnMode.PREDICTED, heat))


def _predictor_bytes(predictor: Predictor) -> tuple[int, ...]:
    return tuple(layer.fc1.nbytes + layer.fc2.nbytes for layer in predictor.layers)


def _workload(settings: PlanSettings, load: LoadSettings, trained: int) -> Workload:
    """The stated workload; the default lengths shrink to fit a small context."""
    context = load.ctx_size or min(trained, CONTEXT)
    prompt, output = settings.prompt, settings.output
    default = PlanSettings()
    if (prompt, output) == (default.prompt, default.output) and prompt + output > context:
        prompt, output = context // 2, max(1, context - context // 2)
    return Workload(
        context=context,
        prompt=prompt,
        output=output,
        batch=settings.batch,
        ubatch=load.ubatch,
        first_token_ms=settings.latency_target,
    )


def _resolved(budget: Budget, name: str, total: int, free: int) -> int:
    return budget.resolve(f"--{name}", total, free)
