"""PowerInfer's GPU index as a plan, and a plan as one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from thermocline.activity.order import Order
from thermocline.errors import UsageError, printable
from thermocline.files.atomic import require_kind
from thermocline.files.gpuidx import is_gpu_index, read_gpu_index, write_gpu_index
from thermocline.hardware.machine import Tier
from thermocline.placement.cost import LARGEST_CLUSTER
from thermocline.placement.plan import Plan, plan_of
from thermocline.placement.powerinfer import from_gpu_index, to_gpu_index
from thermocline.placement.problem import LayerPlace, Placement
from thermocline.placement.solver import Solution
from thermocline.runtime.planning import Planned


def import_gpu_index(planned: Planned, path: str | Path) -> Planned:
    """The plan that PowerInfer's GPU index stands for, priced for the same problem.

    Attention, caches and the rest go where the solver has them; of each layer the neurons of the index go to VRAM. The
    order is new: hot neurons first, as hot as before among themselves.

    Raises:
        ModelFormatError: the file is no GPU index of such a model.
        BudgetError: it does not fit.
        UsageError: there is no GPU to place on.
    """
    problem, f = planned.problem, planned.problem.footprint
    if problem.machine.gpu is None:
        raise UsageError("a GPU index places neurons on a GPU; add --device emulated, or --machine with a GPU")
    index = read_gpu_index(path, n_layer=f.n_layer, n_ff=f.n_ff)
    old = planned.order
    order, depths = np.empty((f.n_layer, f.n_ff), np.int32), []
    for layer, mask in enumerate(index.masks):
        known = None if old is None else old.order[layer]
        bucket = index.bucket(layer)
        empty = np.empty(0, np.int32)
        order[layer], depth = from_gpu_index(
            mask.astype(np.int32), empty if bucket is None else bucket, known, str(path)
        )
        depths.append(depth)
    heat = np.zeros(order.shape) if old is None else np.take_along_axis(old.by_number, order.astype(np.intp), axis=1)
    new = Order(f.fingerprint, f.name, old.by, old.tokens, order, heat) if old is not None else None
    # Depths of an index are no whole clusters: price it in single steps that all of them are multiples of.
    step = int(np.gcd.reduce([*depths, LARGEST_CLUSTER])) or LARGEST_CLUSTER
    exact = replace(problem, cluster=step, temperatures=None if old is None else _in_two(heat, depths))
    last = exact.cost.clusters
    layers = tuple(
        LayerPlace(layer.home, layer.predictor or layer.home, -(-depth // step), last)
        for layer, depth in zip(planned.plan.layers, depths, strict=True)
    )
    placement = Placement(planned.plan.embedding, planned.plan.head, layers)
    exact.ledger().reserve_all(exact.demands(placement))
    seconds = exact.seconds(placement)
    note = f"depths of PowerInfer's GPU index {printable(Path(path).name, 80)}, not the solver's"
    solution = Solution(
        placement, seconds, min(seconds, planned.plan.predicted.bound_ms / 1e3), planned.plan.method, (note,)
    )
    plan = plan_of(exact, solution, None if new is None else new.fingerprint)
    return Planned(plan, exact, new, planned.notices, planned.stands_in)


def export_gpu_index(plan: Plan, order: Order | None, path: str | Path) -> int:
    """Write the neurons that a plan places in VRAM as PowerInfer's GPU index; the file's size in bytes.

    Raises:
        UsageError: what is there is no GPU index.
        OutputError: it could not be written.
    """
    require_kind(path, "GPU index", is_gpu_index, "--export-gpuidx")
    masks = []
    for layer, (_, hot) in enumerate(plan.depths(Tier.VRAM)):
        ids = np.arange(plan.n_ff, dtype=np.int32) if order is None else order.order[layer]
        masks.append(to_gpu_index(ids, hot)[0])
    held = sum(layer.hot * layer.record_bytes for layer in plan.layers)
    return write_gpu_index(path, masks, held)


def _in_two(heat: Any, depths: list[int]) -> Any:
    """Temperatures that fall along an order that does not: both sides of each depth at their mean, which keeps the
    sums that decode is priced by.
    """
    level = np.empty_like(heat)
    for row, line, depth in zip(level, heat, depths, strict=True):
        hot, cold = (part.mean() if part.size else 0.0 for part in (line[:depth], line[depth:]))
        row[:depth], row[depth:] = (hot, cold) if hot >= cold or not depth else (line.mean(), line.mean())
    return level
