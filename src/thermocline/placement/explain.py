"""Plans as tables: per layer, per tier, what would help, and how two plans differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from thermocline.errors import UsageError
from thermocline.hardware.machine import Machine, Tier
from thermocline.placement.budget import GIB
from thermocline.placement.plan import LayerPlan, Plan
from thermocline.placement.problem import Problem
from thermocline.placement.solver import solve

Cell = str | int | float
TEN_GB = 10e9


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under headings, for whoever prints them."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True)
class Gain:
    """What a change of the machine or budget would buy: predicted ms per token before and after."""

    change: str
    before_ms: float
    after_ms: float

    @property
    def speedup(self) -> float:
        """Times faster."""
        return self.before_ms / self.after_ms


def layer_table(plan: Plan) -> Table:
    """One row a layer: devices, depths, bytes, share of the activations that are hot, times, and what binds."""
    columns = (
        "layer", "attention", "predictor", "hot", "warm", "cold", "hot bytes", "warm bytes", "hot share",
        "attention ms", "predictor ms", "hot ms", "cold ms", "crossing ms", "total ms", "binds",
    )  # fmt: skip
    rows = tuple(
        (
            i, layer.home, layer.predictor or "none", layer.hot, layer.warm - layer.hot, plan.n_ff - layer.warm,
            layer.hot * layer.record_bytes, (layer.warm - layer.hot) * layer.record_bytes, layer.hot_share,
            layer.attention_ms, layer.predictor_ms, layer.hot_ms, layer.cold_ms, layer.crossing_ms, layer.total_ms,
            layer.binds,
        )
        for i, layer in enumerate(plan.layers)
    )  # fmt: skip
    return Table("placement by layer", columns, rows)


def tier_table(plan: Plan) -> Table:
    """Bytes by tier and purpose, each tier's sum and budget."""
    rows: list[tuple[Cell, ...]] = []
    for tier in (Tier.VRAM, Tier.RAM):
        rows += [(tier, purpose, size) for where, purpose, size in plan.demands if where is tier]
        if tier in plan.budgets:
            rows += [(tier, "sum", plan.bytes_of(tier)), (tier, "budget", plan.budgets[tier])]
    cold = sum((plan.n_ff - layer.warm) * layer.record_bytes for layer in plan.layers)
    if cold:
        rows.append((Tier.DISK, "ffn weights", cold))
    return Table("bytes by tier", ("tier", "purpose", "bytes"), tuple(rows))


def speed_table(plan: Plan) -> Table:
    """Predicted speeds, the bound and the gap."""
    p = plan.predicted
    rows: tuple[tuple[Cell, ...], ...] = (
        ("tokens per second, decode", p.tokens_per_second),
        ("ms per step, decode", p.step_ms),
        ("ms per pass of the prompt", p.prefill_ms),
        ("ms to the first token", p.first_token_ms),
        ("ms per token of output, its share of the prompt included", p.token_ms),
        ("lower bound of the same", p.bound_ms),
        ("gap, %", 100 * plan.gap),
    )
    return Table("predicted speed", ("what", "value"), rows)


def sensitivities(problem: Problem, seconds: Callable[[Problem], float] | None = None) -> tuple[Gain, ...]:
    """What one more GiB of VRAM or RAM, 10 GB/s more RAM bandwidth, or caches no longer than prompt and answer would
    buy: each solved anew, or priced by `seconds`, per token of output.
    """
    price = seconds or (lambda changed: solve(changed).objective)
    work, before = problem.workload, price(problem) * 1e3
    changes: list[tuple[str, Problem]] = []
    for tier, limit in problem.limits.items():
        budgets = {**problem.limits, tier: limit + GIB}
        changes.append((f"1 GiB more {tier.upper()}", replace(problem, budgets=budgets)))
    changes.append(("10 GB/s more RAM bandwidth", replace(problem, machine=_faster_ram(problem.machine))))
    needed = work.prompt + work.output
    if needed < work.context:
        shorter = replace(problem, workload=replace(work, context=needed))
        changes.append((f"a context of {needed} tokens, not {work.context}", shorter))
    return tuple(Gain(name, before, price(changed) * 1e3) for name, changed in changes)


def gain_table(gains: tuple[Gain, ...]) -> Table:
    """The gains as rows."""
    rows = tuple((g.change, g.before_ms, g.after_ms, g.speedup) for g in gains)
    return Table("what would help", ("change", "ms per token", "then", "times faster"), rows)


def plan_diff(a: Plan, b: Plan) -> Table:
    """What differs between two plans of one model: fields, layers, bytes and times; no rows if they are equal.

    Raises:
        UsageError: the plans are of models that cannot be compared layer by layer.
    """
    if len(a.layers) != len(b.layers) or a.n_ff != b.n_ff:
        raise UsageError(
            f"plans of {len(a.layers)} layers of {a.n_ff} neurons and {len(b.layers)} of {b.n_ff} "
            "cannot be compared; name two plans of one model"
        )
    rows: list[tuple[Cell, ...]] = []

    def compare(name: str, left: object, right: object) -> None:
        if left != right:
            rows.append((name, _cell(left), _cell(right)))

    for f in fields(Plan):
        if f.name not in ("layers", "demands", "predicted", "workload", "budgets"):
            compare(f.name, getattr(a, f.name), getattr(b, f.name))
    for part in ("workload", "predicted"):
        left, right = getattr(a, part), getattr(b, part)
        for f in fields(left):
            compare(f"{part}.{f.name}", getattr(left, f.name), getattr(right, f.name))
    for tier in (Tier.VRAM, Tier.RAM):
        compare(f"budget of {tier}", a.budgets.get(tier), b.budgets.get(tier))
        compare(f"bytes of {tier}", a.bytes_of(tier), b.bytes_of(tier))
    for i, (one, two) in enumerate(zip(a.layers, b.layers, strict=True)):
        for f in fields(LayerPlan):
            if f.name in ("home", "predictor", "hot", "warm", "record_bytes", "streamed", "read_run"):
                compare(f"layer {i} {f.name}", getattr(one, f.name), getattr(two, f.name))
    return Table("difference", ("what", "first", "second"), tuple(rows))


def _cell(value: object) -> Cell:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return "; ".join(map(str, value))
    return value if isinstance(value, str | int | float) else str(value)


def _faster_ram(machine: Machine) -> Machine:
    cpu = machine.cpu
    share = cpu.bandwidth_busy / cpu.bandwidth
    faster = cpu.bandwidth + TEN_GB
    return replace(machine, cpu=replace(cpu, bandwidth=faster, bandwidth_busy=faster * share))
