"""Orders: hottest first, of one model, and whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thermocline.activity.order import By, Order, load_order, save_order
from thermocline.activity.statistics import Activity
from thermocline.errors import FingerprintError, ModelFormatError, UsageError
from thermocline.files.sidecar import SidecarKind, write_sidecar

MODEL = "ab" * 32
FIRED = np.array([[3, 9, 3, 0], [1, 2, 3, 4]])


@pytest.fixture
def activity() -> Activity:
    counted = Activity.from_counts(MODEL, "tiny", FIRED, 10)
    return replace(counted, contribution=np.array([[0.5, 0.1, 2.0, 0.0], [4.0, 3.0, 2.0, 1.0]]))


def test_the_hottest_comes_first(activity: Activity) -> None:
    order = Order.of(activity)
    assert order.order.tolist() == [[1, 0, 2, 3], [3, 2, 1, 0]]
    assert order.temperature.tolist() == [[0.9, 0.3, 0.3, 0.0], [0.4, 0.3, 0.2, 0.1]]
    assert np.array_equal(order.order, activity.order)
    assert np.array_equal(np.take_along_axis(order.places, order.order, 1), [range(4), range(4)])


def test_contribution_is_another_heat(activity: Activity) -> None:
    order = Order.of(activity, By.CONTRIBUTION)
    assert order.order.tolist() == [[2, 0, 1, 3], [0, 1, 2, 3]]
    assert order.temperature.tolist() == [[0.3, 0.3, 0.9, 0.0], [0.1, 0.2, 0.3, 0.4]]


def test_what_was_not_counted_orders_nothing(activity: Activity) -> None:
    with pytest.raises(UsageError, match="counted no token"):
        Order.of(replace(activity, tokens=0))
    with pytest.raises(UsageError, match="knows no contribution"):
        Order.of(Activity.from_counts(MODEL, "tiny", FIRED, 10), By.CONTRIBUTION)


def test_it_comes_back(activity: Activity, tmp_path: Path) -> None:
    order = Order.of(activity, By.CONTRIBUTION)
    save_order(order, tmp_path / "x")
    found = load_order(tmp_path / "x")
    assert np.array_equal(found.order, order.order)
    assert np.array_equal(found.temperature, order.temperature)
    assert (found.by, found.tokens, found.model_name) == (By.CONTRIBUTION, 10, "tiny")
    found.require_model(MODEL)
    with pytest.raises(FingerprintError, match=r"belongs to the model tiny \(abababababab\), not to other \("):
        found.require_model("cd" * 32, "other")


BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a neuron twice": ({"order": np.array([[1, 0, 2, 2], [3, 2, 1, 0]], np.int32)}, {}, "names a neuron twice"),
    "a neuron too many": ({"order": np.array([[1, 0, 2, 4], [3, 2, 1, 0]], np.int32)}, {}, "one that is not there"),
    "in int64": ({"order": np.array([[1, 0, 2, 3], [3, 2, 1, 0]])}, {}, "order: is int64"),
    "temperature of another shape": ({"temperature": np.zeros((2, 3))}, {}, r"needed: float64 \[2, 4\]"),
    "temperature above one": ({"temperature": np.full((2, 4), 1.5)}, {}, "from 0 to 1"),
    "temperature NaN": ({"temperature": np.full((2, 4), np.nan)}, {}, "from 0 to 1"),
    "no temperature": ({"temperature": None}, {}, "temperature: is missing"),
    "by magic": ({}, {"by": "magic"}, "how the order was made"),
    "of no tokens": ({}, {"tokens": 0}, "from how many tokens"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_order_is_refused(activity: Activity, tmp_path: Path, case: str) -> None:
    tensors, info, words = BROKEN[case]
    good = Order.of(activity)
    tensors = {"order": good.order, "temperature": good.temperature, **tensors}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    write_sidecar(tmp_path / "x", SidecarKind.ORDER, MODEL, {"by": "frequency", "tokens": 10, **info}, kept)
    with pytest.raises(ModelFormatError, match=words):
        load_order(tmp_path / "x")


def test_an_activity_is_no_order(activity: Activity, tmp_path: Path) -> None:
    write_sidecar(tmp_path / "x", SidecarKind.ACTIVITY, MODEL, {}, {"order": activity.order})
    with pytest.raises(ModelFormatError, match="needed is one of kind order"):
        load_order(tmp_path / "x")
