"""Where everything of a model lives, in neurons: what the memory room carries out, whoever decided it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from thermocline.hardware.machine import Tier


class LayerSeats(Protocol):
    """Where one layer lives: `home` of attention and cache, the predictor's tier (None: at home), and depths.

    Neurons of the order before `hot` are in VRAM, from there to `warm` in RAM, the rest on disk.
    """

    @property
    def home(self) -> Tier: ...

    @property
    def predictor(self) -> Tier | None: ...

    @property
    def hot(self) -> int: ...

    @property
    def warm(self) -> int: ...


class Seats(Protocol):
    """Where everything lives; a `Plan` is one."""

    @property
    def embedding(self) -> Tier: ...

    @property
    def head(self) -> Tier: ...

    @property
    def layers(self) -> Sequence[LayerSeats]: ...


@dataclass(frozen=True, slots=True)
class LayerSeat:
    """See `LayerSeats`."""

    home: Tier
    hot: int
    warm: int
    predictor: Tier | None = None


@dataclass(frozen=True, slots=True)
class Seating:
    """See `Seats`."""

    embedding: Tier
    head: Tier
    layers: tuple[LayerSeat, ...]


def all_in(tier: Tier, n_layer: int, n_ff: int) -> Seating:
    """Everything in one memory: the plan of a machine with one tier."""
    seat = LayerSeat(tier, n_ff if tier is Tier.VRAM else 0, n_ff)
    return Seating(tier, tier, (seat,) * n_layer)


def slices(seat: LayerSeats, n_ff: int) -> list[tuple[Tier, int, int]]:
    """The tiers that hold neurons of a layer, hottest first, with the slice of the order that each has."""
    cuts = ((Tier.VRAM, 0, seat.hot), (Tier.RAM, seat.hot, seat.warm), (Tier.DISK, seat.warm, n_ff))
    return [(tier, start, stop) for tier, start, stop in cuts if stop > start]
