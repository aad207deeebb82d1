"""Small random placement problems."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from thermocline.hardware.machine import Disk, Machine, Processor, ReadCurve, Shares, Tier
from thermocline.placement.cost import FfnMode
from thermocline.placement.footprint import Footprint
from thermocline.placement.problem import Problem
from thermocline.placement.workload import NO_OVERHEADS, Workload

NAMES = [f.name for f in fields(Shares)]


def small_problem(seed: int, *, disk: bool = False, vram_share: float | None = None) -> Problem:
    """A random model of 1 to 3 layers and 2 to 4 clusters on a random machine, with a budget that binds."""
    rng = np.random.default_rng(seed)
    n_layer, clusters, cluster = int(rng.integers(1, 4)), int(rng.integers(2, 4 if disk else 5)), 8
    n_ff = clusters * cluster - int(rng.integers(0, 2)) * 3
    row = int(rng.integers(1, 9)) * 1024
    gate = row * int(rng.integers(0, 2))
    mode = list(FfnMode)[int(rng.integers(0, 3))]
    predicted = mode is FfnMode.PREDICTED
    footprint = Footprint(
        name=f"small-{seed}",
        fingerprint=f"{seed:064x}",
        n_embd=row,
        n_ff=n_ff,
        n_vocab=100,
        n_q=row,
        attention=tuple(int(x) for x in rng.integers(1, 60, n_layer) * row),
        attention_params=int(rng.integers(1, 60)) * row,
        records=((gate, row, row),) * n_layer,
        predictor=tuple(int(x) for x in rng.integers(1, 6, n_layer) * row) if predicted else (0,) * n_layer,
        embedding=20 * row,
        head=20 * row,
        tied=bool(rng.integers(0, 2)),
        kv_token=int(rng.integers(1, 40)) * 64,
        windows=(0,) * n_layer,
    )
    ram = 10 ** rng.uniform(9, 11)
    vram = ram * 10 ** rng.uniform(0, 1.5)
    machine = Machine(
        name="random",
        cpu=processor("cpu", ram, rng),
        gpu=processor("gpu", vram, rng),
        disk=Disk(name="disk", curve=ReadCurve(((4096, 1e8), (1 << 20, 2e9)))) if disk else None,
        link=ram / 2,
        crossing=float(rng.choice([0.0, 1e-6, 1e-5, 1e-4])),
    )
    temperatures = -np.sort(-rng.beta(0.4, 2, (n_layer, n_ff)), axis=1)
    workload = Workload(context=64, prompt=int(rng.choice([0, 16])), output=16, batch=int(rng.choice([1, 4])), ubatch=8)
    problem = Problem(
        footprint, machine, workload, mode, temperatures, overheads=NO_OVERHEADS, cluster=cluster, budgets={}
    )
    whole = footprint.nbytes + footprint.kv_layer(64, workload.batch) * n_layer
    share = float(rng.uniform(0.05, 1.1)) if vram_share is None else vram_share
    budgets = {Tier.VRAM: int(whole * share) + fixed(problem, Tier.VRAM)}
    if disk:
        budgets[Tier.RAM] = int(whole * rng.uniform(0.2, 0.9)) + fixed(problem, Tier.RAM)
    left = rng.uniform(0.3, 1.0, len(NAMES)).tolist()
    problem = replace(problem, machine=replace(machine, shares=Shares(**dict(zip(NAMES, left, strict=True)))))
    return with_budgets(problem, budgets)


def processor(name: str, bandwidth: float, rng: np.random.Generator) -> Processor:
    return Processor(
        name=name,
        capacity=1 << 34,
        bandwidth=bandwidth,
        bandwidth_busy=bandwidth * float(rng.uniform(0.6, 1.0)),
        flops=bandwidth * float(rng.uniform(2, 100)),
        launch=float(rng.choice([0.0, 1e-6, 5e-6])),
    )


def fixed(problem: Problem, tier: Tier) -> int:
    return sum(d.nbytes for d in problem.fixed(tier))


def with_budgets(problem: Problem, budgets: dict[Tier, int]) -> Problem:
    return Problem(
        problem.footprint, problem.machine, problem.workload, problem.mode, problem.temperatures, budgets,
        problem.overheads, problem.cluster,
    )  # fmt: skip


@pytest.fixture(scope="session")
def make_problem():
    return small_problem
