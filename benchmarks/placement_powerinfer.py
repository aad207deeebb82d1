"""PowerInfer's allocation and ours, priced by the same cost model.

    python -m benchmarks.placement_powerinfer

For each published shape: what the released code of PowerInfer puts into a given VRAM budget (top neurons by count, its
budget formula, its order of tensors), and what our solver does with the same budget. Both are priced as our engine
would run them: both sides at once, one merge after the down projection. The defect of PowerInfer's exporter, which
gives most layers another layer's counts, is left out, and so is its serial execution: the difference is placement
alone. Our ledger also says how much VRAM its allocation really takes: scratch, graphs and margin included.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.published_models import FALCON_40B, LLAMA_7B, LLAMA_13B, LLAMA_70B, OPT_30B, Published, temperatures
from benchmarks.tables import print_table, write_results
from thermocline.files.formats import F16, Q4_0, BlockFormat
from thermocline.hardware.catalogue import machine
from thermocline.hardware.machine import Tier
from thermocline.placement.cost import FfnMode
from thermocline.placement.powerinfer import allocate
from thermocline.placement.problem import Problem
from thermocline.placement.solver import solve
from thermocline.placement.workload import Workload

GIB = 1 << 30
WORKLOAD = Workload(context=2048, prompt=64, output=256, ubatch=64)
DESKTOP = GIB // 2
"""VRAM that is not free on a computer with a screen."""
CASES: tuple[tuple[str, Published, BlockFormat], ...] = (
    ("pc-high", LLAMA_7B, F16),
    ("pc-high", LLAMA_13B, F16),
    ("pc-high", LLAMA_70B, Q4_0),
    ("pc-high", LLAMA_70B, F16),
    ("pc-high", FALCON_40B, Q4_0),
    ("pc-high", FALCON_40B, F16),
    ("pc-high", OPT_30B, Q4_0),
    ("pc-high", OPT_30B, F16),
    ("pc-low", LLAMA_7B, F16),
    ("pc-low", LLAMA_13B, Q4_0),
    ("pc-low", LLAMA_70B, Q4_0),
    ("pc-low", FALCON_40B, Q4_0),
    ("pc-low", OPT_30B, Q4_0),
)


def compare(computer: str, model: Published, fmt: BlockFormat) -> dict[str, object]:
    """One row of the table."""
    target = machine(computer)
    assert target.gpu is not None
    # Placement is compared, not fitting into RAM: nothing below is computed faster for it.
    roomy = replace(target, cpu=replace(target.cpu, capacity=1 << 40), disk=None)
    budget = target.gpu.capacity - DESKTOP
    problem = Problem(
        model.footprint(fmt), roomy, WORKLOAD, FfnMode.PREDICTED, temperatures(model), {Tier.VRAM: budget}
    )
    theirs = allocate(problem, budget)
    placed = theirs.placement(problem.cluster, model.n_ff)
    taken = sum(d.nbytes for d in problem.demands(placed) if d.tier is Tier.VRAM)
    ours = solve(problem)
    hot = sum(int(problem.cost.bounds[place.hot]) for place in ours.placement.layers)
    seconds = problem.seconds(placed)
    level = solve(replace(problem, budgets={Tier.VRAM: max(budget, taken)})).objective
    return {
        "computer": computer,
        "model": problem.footprint.name,
        "GB": round(problem.footprint.nbytes / 1e9, 1),
        "theirs: trunk": "whole" if theirs.complete else f"{sum(theirs.attention)} of {model.n_layer} layers",
        "theirs: hot neurons": sum(theirs.hot),
        "its formula leaves": f"{100 * (1 - theirs.capacity / theirs.fitting):.0f}%" if theirs.fitting else "-",
        "over budget, GiB": round(max(0, taken - budget) / GIB, 2),
        "theirs, ms": round(seconds * 1e3, 2),
        "ours: hot neurons": hot,
        "ours, ms": round(ours.objective * 1e3, 2),
        "gap": f"{100 * ours.gap:.2f}%",
        "faster": round(seconds / ours.objective, 2),
        "with their bytes": round(seconds / level, 2),
    }


def main() -> None:
    rows = [compare(*case) for case in CASES]
    print(__doc__)
    print_table(rows)
    print(
        "\ntrunk: attention, predictors and head; if any tensor of it does not fit, PowerInfer places no neuron at all."
        "\nover budget: what its allocation takes beyond the budget by our ledger, which counts scratch and margin."
        "\nwith their bytes: how much faster ours is if it may take as much VRAM as theirs really takes."
        "\nformula: share of the neurons that fit the bytes left, but that its formula does not allow."
    )
    write_results("placement_powerinfer", {"workload": WORKLOAD, "rows": rows})


if __name__ == "__main__":
    main()
