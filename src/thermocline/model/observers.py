"""Who may watch the FFNs of a step."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from thermocline.model.feed_forward import Counts
from thermocline.ops.contract import ActiveSet, Array


class Observer(Protocol):
    """Watches the FFNs of a step. Arrays are the step's own: copy what should outlive the call."""

    def ffn_input(self, layer: int, residual: Array, normed: Array) -> None:
        """Before a layer's FFN: the residual stream and its norm, both (T, n_embd)."""

    def ffn_hidden(self, layer: int, hidden: Array) -> None:
        """After it: the neurons' activations (T, n_ff), zero for those that were not computed."""


@runtime_checkable
class SelectionObserver(Observer, Protocol):
    """An observer that is also told which neurons were computed."""

    def ffn_active(self, layer: int, active: ActiveSet) -> None:
        """Between the two calls of `Observer`: the neurons that are computed, ALL where nothing was predicted."""


class Counter(Protocol):
    """Counts what fires in a step."""

    def ffn_fired(self, layer: int, fired: Counts) -> None:
        """After a layer's FFN: for how many tokens each neuron was not zero (n_ff)."""
