"""A plan over the heat map of the activity it was made from."""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from thermocline.activity.drawing import AMBER, COLD, WARM, Axis, Plot, layer_marks, percents
from thermocline.activity.order import By, Order
from thermocline.activity.pictures import Picture, heat_columns
from thermocline.activity.statistics import Activity
from thermocline.errors import PlanError, UsageError
from thermocline.hardware.machine import Tier
from thermocline.placement.plan import Plan

NAMES = {Tier.VRAM: "VRAM", Tier.RAM: "RAM", Tier.DISK: "disk"}


def placement_picture(plan: Plan, activity: Activity, source: str = "plan") -> Picture:
    """Every layer's neurons in order of temperature, cut at the plan's depths.

    Raises:
        PlanError: the plan is of another model than the activity, or was not made from it.
    """
    if plan.model != activity.model_fingerprint:
        raise PlanError(source, "model", f"is of {plan.model[:12]}, the activity of {activity.model_fingerprint[:12]}")
    if (len(plan.layers), plan.n_ff) != (activity.n_layer, activity.n_ff):
        raise PlanError(source, "layers", f"{len(plan.layers)} of {plan.n_ff} neurons do not fit the activity")
    if plan.activity not in _orders(activity):
        made = f"from {plan.activity[:12]}" if plan.activity else "without one"
        raise PlanError(source, "activity", f"it was made {made}, not from the one that is drawn")
    n_layer = activity.n_layer
    rank = Axis(0, 1, "rank in the layer, hottest first", percents(0, 1))
    plot = Plot("Placement", rank, Axis(n_layer - 0.5, -0.5, "layer", layer_marks(n_layer)), right=86)
    plot.heat(np.sqrt(heat_columns(activity.sorted_temperatures)), 0, 1)
    marks = [(float(np.sqrt(p)), f"{100 * p:.0f} %") for p in (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1)]
    plot.colour_bar(marks, "fires for this share of tokens")
    vram = any(layer.hot for layer in plan.layers)
    disk = any(layer.warm < plan.n_ff for layer in plan.layers)
    if vram:
        _cut(plot, [layer.hot / plan.n_ff for layer in plan.layers], WARM, "VRAM ends")
    if disk:
        _cut(plot, [layer.warm / plan.n_ff for layer in plan.layers], AMBER, "RAM ends")
    if not vram and not disk:
        plot.legend = [("all neurons in RAM", COLD)]
    return Picture("placement", plot.svg(), _caption(plan))


def _orders(activity: Activity) -> set[str]:
    """What a plan that was made from an activity names it by: its fingerprint as an order, by either measure."""
    found = set()
    for by in By:
        with suppress(UsageError):  # an activity may know one of them only
            found.add(Order.of(activity, by).fingerprint)
    return found


def _cut(plot: Plot, depths: list[float], colour: str, name: str) -> None:
    """A staircase through the depths, one step a layer."""
    across = [depth for depth in depths for _ in (0, 1)]
    down = [row + side for row in range(len(depths)) for side in (-0.5, 0.5)]
    plot.line(across, down, colour, name=name, width=2.6)


def _caption(plan: Plan) -> str:
    shares = []
    for tier in Tier:
        cuts = plan.depths(tier)
        share = sum(stop - start for start, stop in cuts) / (plan.n_ff * len(cuts))
        if share:
            shares.append(f"{100 * share:.0f} % of the neurons in {NAMES[tier]}")
    hot = sum(layer.hot_share for layer in plan.layers) / len(plan.layers)
    return (
        f"Where the plan puts every layer's neurons: {', '.join(shares)}. "
        + (f"Those in VRAM give {100 * hot:.0f} % of the activations. " if any(la.hot for la in plan.layers) else "")
        + f"Predicted are {plan.predicted.tokens_per_second:.1f} tokens/s on {plan.machine_name}."
    )
