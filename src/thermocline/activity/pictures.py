"""The pictures of a report: what an activity and a predictor look like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from thermocline.activity.drawing import (
    AMBER,
    COLD,
    COLOURS,
    MUTED,
    TEAL,
    WARM,
    Axis,
    Plot,
    layer_axis,
    layer_marks,
    mixed,
    percent,
    percents,
    share_axis,
)
from thermocline.activity.statistics import SIZE_BINS, Activity, Floats

CURVE_POINTS: Final = 160
HEAT_COLUMNS: Final = 150
QUALITIES: Final = {"energy_recall": "energy recall", "recall": "recall", "precision": "precision"}
"""What a predictor's maker may have measured in each layer, and how it is called."""


class Picture(NamedTuple):
    """A picture with the name of its file and what to read in it."""

    name: str
    svg: str
    caption: str


def activity_pictures(activity: Activity) -> list[Picture]:
    """All that can be drawn of an activity."""
    pictures = [_ranked(activity), _heat(activity), _active(activity), _coverage(activity)]
    if activity.sizes.any():
        pictures.append(_sizes(activity))
    if activity.token_overlap.total.any():
        pictures.append(_locality(activity))
    return pictures


def predictor_pictures(info: Mapping[str, Any]) -> list[Picture]:
    """What can be drawn of a predictor's info: qualities and ranks, where its `layers` tell them."""
    layers = info.get("layers")
    if not isinstance(layers, list) or not layers or not all(isinstance(layer, Mapping) for layer in layers):
        return []
    audit = info.get("audit")
    audited = audit.get("layers") if isinstance(audit, Mapping) else None
    pictures = [
        _qualities("predictor", "How well the predictor does", layers, "Measured while training."),
        _qualities("predictor_audit", "The predictor in the audit", audited, "Measured while decoding, on other text."),
        _sizes_of_predictor(layers),
        _curves(layers),
    ]
    return [picture for picture in pictures if picture is not None]


def _qualities(name: str, title: str, layers: Any, when: str) -> Picture | None:
    if not isinstance(layers, list) or not layers or not all(isinstance(layer, Mapping) for layer in layers):
        return None
    qualities = {word: _column(layers, key) for key, word in QUALITIES.items()}
    qualities = {word: values for word, values in qualities.items() if not np.isnan(values).all()}
    if not qualities:
        return None
    lowest = min(float(np.nanmin(values)) for values in qualities.values())
    low = max(0.0, np.floor((lowest - 0.02) * 10) / 10)
    plot = Plot(title, layer_axis(len(layers)), Axis(low, 1.0, "share", percents(low, 1.0)))
    for (word, values), colour in zip(qualities.items(), COLOURS, strict=False):
        plot.line(range(len(layers)), values, colour, name=word, dots=True)
    caption = (
        f"{when} Recall: share of the firing neurons that are selected. Energy recall: share of |activation| x norm of "
        "the down row that these carry. Precision: share of the selected neurons that fire."
    )
    return Picture(name, plot.svg(), caption)


def _sizes_of_predictor(layers: list[Mapping[str, Any]]) -> Picture | None:
    ranks = _column(layers, "rank")
    if np.isnan(ranks).all():
        return None
    high = float(np.nanmax(ranks)) * 1.08
    marks = tuple((value, f"{value:.0f}") for value in _round_marks(high))
    plot = Plot("Size of the predictor", layer_axis(len(layers)), Axis(0, high, "hidden size (rank)", marks))
    plot.bars(ranks, (TEAL,))
    return Picture("predictor_rank", plot.svg(), "Each layer's predictor is as large as pays.")


def _curves(layers: list[Mapping[str, Any]]) -> Picture | None:
    """Energy recall over the share of selected neurons, a line for each layer that tells it."""
    curves = [(number, _points(layer.get("curve"))) for number, layer in enumerate(layers)]
    curves = [(number, points) for number, points in curves if len(points)]
    if not curves:
        return None
    low = float(np.floor(min(points[:, 0].min() for _, points in curves) * 10) / 10)
    axis = share_axis([points[:, 1].max() for _, points in curves], "share of neurons selected")
    plot = Plot("What more neurons bring", axis, Axis(low, 1.0, "energy recall", percents(low, 1.0)))
    for number, points in curves:
        plot.line(points[:, 1], points[:, 0], _depth_colour(number, len(layers)), width=1.4, dots=True)
    plot.legend = [("first layer", _depth_colour(0, 2)), ("last layer", _depth_colour(1, 2))]
    caption = "Other thresholds select more neurons or fewer. The predictor's own was set for the wanted energy recall."
    return Picture("predictor_curve", plot.svg(), caption)


def _points(curve: Any) -> Floats:
    """Pairs of shares as (n, 2); none where the note is not what it should be."""
    try:
        points = np.array(curve if isinstance(curve, list) else [], np.float64).reshape(-1, 2)
    except (TypeError, ValueError):
        return np.zeros((0, 2))
    fits = bool(((points >= 0) & (points <= 1)).all())
    return points if fits else np.zeros((0, 2))


def _ranked(activity: Activity) -> Picture:
    share = Axis(0, 1, "share of neurons, hottest first", percents(0, 1))
    plot = Plot("Activations over ranked neurons", share, Axis(0, 1, "share of activations", percents(0, 1)))
    for layer, counts in enumerate(activity.fired):
        colour = _depth_colour(layer, activity.n_layer)
        plot.line(*_cumulative(counts), colour, width=1.1, opacity=0.75)
    plot.line(*_cumulative(activity.fired.reshape(-1)), WARM, width=3.2)
    _, whole = activity.coverage(0.8)
    plot.legend = [("whole model", WARM), ("first layer", _depth_colour(0, 2)), ("last layer", _depth_colour(1, 2))]
    if activity.fired.any():
        plot.guide(whole, 0.8, f"{100 * whole:.0f} % of the neurons give 80 %", WARM)
    caption = (
        f"Neurons ranked by how often they fire. {percent(whole)} of the model's neurons give 80 % of its activations. "
        "By the same count PowerInfer's paper finds 17 % in OPT-30B (ReLU), 26 % in a ReGLU Llama of 70 B and 75 % in "
        "a SwiGLU one."
    )
    return Picture("ranked", plot.svg(), caption)


def _heat(activity: Activity) -> Picture:
    values = np.sqrt(heat_columns(activity.sorted_temperatures))
    n_layer = activity.n_layer
    rank = Axis(0, 1, "rank in the layer, hottest first", percents(0, 1))
    plot = Plot("Temperature", rank, Axis(n_layer - 0.5, -0.5, "layer", layer_marks(n_layer)), right=86)
    plot.heat(values, 0, 1)
    marks = [(float(np.sqrt(p)), f"{100 * p:.0f} %") for p in (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1)]
    plot.colour_bar(marks, "fires for this share of tokens")
    caption = (
        "Each row is a layer, its neurons in order of temperature: a placement cuts every row once, hot on the left "
        "into fast memory, cold on the right below. The scale is the square root of the frequency."
    )
    return Picture("heat", plot.svg(), caption)


def _active(activity: Activity) -> Picture:
    low, high = activity.size_quantile(0.01), activity.size_quantile(0.99)
    mean = activity.active_share
    plot = Plot(
        "How many neurons are active",
        layer_axis(activity.n_layer),
        share_axis([*mean, *high], "share of the layer's neurons"),
    )
    plot.bars(mean, (mixed(COLD, "#ffffff", 0.25),), name="mean")
    plot.ranges(low, high, AMBER, name="from the 1st to the 99th percentile of tokens")
    caption = f"Of all neurons {percent(mean.mean())} are active for a token; the others are zero."
    return Picture("active", plot.svg(), caption)


def _coverage(activity: Activity) -> Picture:
    layers, whole = activity.coverage(0.8)
    axis = share_axis([*layers, whole], "share of the layer's neurons")
    plot = Plot("Neurons that give 80 % of the activations", layer_axis(activity.n_layer), axis)
    plot.bars(layers, (mixed(TEAL, "#ffffff", 0.2),), name="of the layer")
    plot.line([-0.6, activity.n_layer - 0.4], [whole, whole], WARM, dashes="6 5", width=2, name="of the whole model")
    caption = "The smaller the share, the more a small fast memory holds of what is computed."
    return Picture("coverage", plot.svg(), caption)


def _sizes(activity: Activity) -> Picture:
    sizes = activity.sizes / np.maximum(activity.sizes.sum(axis=1, keepdims=True), 1)
    last = int(np.flatnonzero(activity.sizes.any(axis=0))[-1]) + 1
    used = sizes[:, :last]
    high, n_layer = last / SIZE_BINS, activity.n_layer
    share = Axis(0, high, "size of the active set, as a share of the layer's neurons", percents(0, high))
    plot = Plot("Sizes of active sets", share, Axis(n_layer - 0.5, -0.5, "layer", layer_marks(n_layer)), right=86)
    top = max(float(used.max()), 1e-12)
    plot.heat(np.sqrt(used / top), 0, high)
    plot.colour_bar([(0.0, "0 %"), (0.5, percent(top / 4)), (1.0, percent(top))], "share of tokens")
    caption = "How often a token's active set has which size: what a kernel has to be ready for."
    return Picture("sizes", plot.svg(), caption)


def _locality(activity: Activity) -> Picture:
    token, layer, chance = activity.token_overlap, activity.layer_overlap, activity.chance_overlap
    shares = [*token.share, *layer.share, *chance]
    plot = Plot("What repeats", layer_axis(activity.n_layer), share_axis(shares, "share of the active set"))
    places = range(activity.n_layer)
    plot.line(places, token.share, WARM, name="active at the token before", dots=True)
    plot.line(places, layer.share, COLD, name="foreseen by the layer below", dots=True)
    plot.line(places, chance, MUTED, name="by chance", width=1.8, dashes="5 5")
    caption = (
        f"Token to token: {percent(token.mean)} of an active set was active at the token before. Layer to layer: "
        "take the earlier token whose active set one layer below is most alike; this share of the active set was "
        "active there. By chance: if neurons of these temperatures knew nothing of each other."
    )
    return Picture("locality", plot.svg(), caption)


def _cumulative(counts: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Share of neurons, and of the activations that the hottest of them give."""
    reached = np.concatenate([[0.0], np.cumsum(-np.sort(-counts))])
    places = np.unique(np.rint(np.linspace(0, 1, CURVE_POINTS) ** 2 * len(counts)).astype(int))
    return places / len(counts), reached[places] / max(reached[-1], 1)


def heat_columns(ordered: Floats) -> Floats:
    """Rows averaged to at most HEAT_COLUMNS columns."""
    count = min(ordered.shape[1], HEAT_COLUMNS)
    edges = np.arange(count + 1) * ordered.shape[1] // count
    sums: Floats = np.add.reduceat(ordered, edges[:-1], axis=1) / np.diff(edges)
    return sums


def _column(layers: list[Mapping[str, Any]], key: str) -> Floats:
    """One number of each layer, NaN where it is not told or makes no sense."""
    found = [layer.get(key) for layer in layers]
    numbers = [
        float(v) if isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < 1e12 else np.nan for v in found
    ]
    return np.array(numbers)


def _round_marks(high: float) -> list[float]:
    step = max(1.0, float(10 ** np.floor(np.log10(max(high, 1)))))
    step = step / 2 if high / step < 3 and step > 1 else step
    return [float(v) for v in np.arange(0, high, step)]


def _depth_colour(layer: int, count: int) -> str:
    """Shallow layers light, deep ones dark."""
    return mixed("#7fc8d8", "#12335e", layer / max(count - 1, 1))
