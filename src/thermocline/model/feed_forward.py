"""A layer's FFN over the tiers that hold its neurons: each computes its part, and the sums meet once.

The neurons of a layer are in an order, hottest first where it is known, and every tier holds a slice of it. Sides that
are not the layer's home get the normed input, go all the way through down projection, and hand back a sum of
length n_embd. The home's own part goes straight into the residual stream; the others follow in the order of tiers.
So the result is the same, bit for bit, whatever the number of threads and whoever is done first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from thermocline.hardware.machine import Tier
from thermocline.model.workspace import Views, Workspace
from thermocline.ops.contract import ALL, ActiveSet, Array, FfnWork
from thermocline.ops.device import Device

Ints = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64] | npt.NDArray[np.bool_]

NOTHING = FfnWork(0, 0, 0, 0)


class Neurons(Protocol):
    """One tier's slice of one layer's order, neurons `start` to `stop`, and what computes it.

    Active sets are counted from `start`. Slices in RAM and VRAM are resident; a slice on disk answers for records that
    it must first read.
    """

    @property
    def device(self) -> Device: ...

    @property
    def start(self) -> int: ...

    @property
    def stop(self) -> int: ...

    def announce(self, active: ActiveSet) -> None:
        """What `ffn` will be asked for soon, said before any side begins: the time to start reading."""

    def ffn(self, x: Array, active: ActiveSet, out: Array, *, skip_zeros: bool, hidden: Array | None = None) -> FfnWork:
        """Add this slice's part of the FFN of `x` (T, n_embd) to `out`; see `Ops.ffn`. `hidden` is (T, stop - start).

        Raises:
            ThermoclineError: records could not be read; nothing of the slice's part may be used then.
        """


@runtime_checkable
class Foreseeing(Protocol):
    """A slice that must read its records, and can begin while the layer before is computed."""

    def foresee(self, active: ActiveSet) -> None:
        """What will probably be announced in this step, counted from the slice's start."""


class NeuronStore(Protocol):
    """One tier's neurons of every layer, as the plan cuts them."""

    def __getitem__(self, layer: int) -> Neurons | None:
        """The layer's slice, None where the tier holds nothing of it."""


@dataclass(slots=True)
class Tally:
    """What the layers of one step did: work by device, and what went from one device to another.

    With `timed`, `seconds` adds up by component; the sides' own times overlap, the FFN's is what passed on the clock.
    `busy` is how long each tier's device computed, waiting for what is read from disk included.
    """

    timed: bool = False
    work: list[tuple[Neurons, FfnWork]] = field(default_factory=list)
    crossings: int = 0
    crossed_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    busy: dict[Tier, float] = field(default_factory=dict)

    def clear(self) -> None:
        """Before a step."""
        self.work.clear()
        self.crossings = self.crossed_bytes = 0
        self.seconds.clear()
        self.busy.clear()

    def lap(self, name: str, since: float, device: Device | None = None) -> float:
        """Add the time since `since` to a component, and to what `device` computed; returns now."""
        now = time.perf_counter()
        self.spend(name, now - since, device)
        return now

    def spend(self, name: str, seconds: float, device: Device | None = None) -> None:
        """The same for seconds."""
        if name:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        if device is not None:
            self.busy[device.tier] = self.busy.get(device.tier, 0.0) + seconds

    def carry(self, source: Device, array: Array, target: Device, out: Array) -> None:
        """Copy an array of one device into an array of another."""
        target.ops.upload(source.ops.to_host(array), out)
        self.crossings += 1
        self.crossed_bytes += 4 * array.shape[0] * array.shape[1]


@dataclass(frozen=True, slots=True)
class _Side:
    """The parts that one device computes, as (index, part)."""

    device: Device
    parts: tuple[tuple[int, Neurons], ...]


@dataclass(slots=True)
class FeedForward:
    """The parts of a layer's FFN, hottest first; together they are all neurons of the order, each once.

    `home` is the device of the residual stream. `order` is the file's number of each neuron of the order, None where
    they are the same. Between two steps a layer may be cut anew.
    """

    home: Device
    parts: tuple[Neurons, ...]
    order: Ints | None
    _sides: tuple[_Side, ...]
    _bounds: Ints
    _alone: Neurons | None
    foresees: bool
    """Whether a part reads ahead."""
    sent: FeedForward | None = None
    """The same layer for long prompts, with parts that travel to the device."""
    sent_from: int = 0
    """Tokens of a step from which that is faster."""

    @classmethod
    def of(cls, home: Device, parts: Sequence[Neurons], order: Ints | None = None) -> FeedForward:
        """Devices work at once if the host, which works in the caller's thread, begins last."""
        devices = sorted({id(p.device): p.device for p in parts}.values(), key=lambda d: d.tier)
        devices.sort(key=lambda d: d.tier is Tier.RAM)
        sides = (_Side(d, tuple((i, p) for i, p in enumerate(parts) if p.device is d)) for d in devices)
        bounds = np.array([parts[0].start, *(part.stop for part in parts)], np.int32)
        alone = parts[0] if len(parts) == 1 and parts[0].device is home else None
        foresees = any(isinstance(part, Foreseeing) for part in parts)  # too slow to be asked in every step
        return cls(home, tuple(parts), order, tuple(sides), bounds, alone, foresees)

    def cut_anew(self, parts: Sequence[Neurons], order: Ints) -> None:
        """Go on with other parts, or the same neurons in another order."""
        new = FeedForward.of(self.home, parts, order)
        self.parts, self.order = new.parts, new.order
        self._sides, self._bounds, self._alone, self.foresees = new._sides, new._bounds, new._alone, new.foresees

    def foresee(self, active: ActiveSet) -> None:
        """Tell the parts what will probably be computed when this layer comes; `active` is overwritten."""
        for part, cut in zip(self.parts, self._cut(active), strict=True):
            if isinstance(part, Foreseeing):
                part.foresee(cut)

    def run(
        self,
        views: Views,
        workspace: Workspace,
        active: ActiveSet,
        *,
        skip_zeros: bool,
        tally: Tally,
        hidden: bool,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Add the FFN of `views.normed` to `views.x`, both on the home device.

        `active` is of the whole order, and what it refers to is overwritten. With `hidden` each device's own array of
        activations is filled, slice after slice; `gather` puts them together. `meanwhile` is called when reads of what
        is on disk have begun; it may overwrite `active`.
        """
        if self.sent is not None and len(views.x) >= self.sent_from and active.indices is None and not hidden:
            self.sent.run(views, workspace, active, skip_zeros=skip_zeros, tally=tally, hidden=hidden)
            return
        if self._alone is not None and not (hidden or tally.timed):  # nothing to cut, to carry or to measure
            self._alone.announce(active)
            if meanwhile is not None:
                active = ActiveSet(None if active.indices is None else active.indices.copy())
                meanwhile()
            tally.work.append((self._alone, self._alone.ffn(views.normed, active, views.x, skip_zeros=skip_zeros)))
            return
        began = time.perf_counter() if tally.timed else 0.0
        if meanwhile is not None and active.indices is not None:
            active = ActiveSet(active.indices.copy())
        cuts = self._cut(active)
        for part, cut in zip(self.parts, cuts, strict=True):
            part.announce(cut)
        if meanwhile is not None:
            meanwhile()
        if tally.timed and self.foresees:  # reads begin in the cold side's time
            began = tally.lap("ffn cold", began)
        if len(self._sides) == 1 and self._sides[0].device is self.home:
            for (_, part), cut in zip(self._sides[0].parts, cuts, strict=True):
                into = _slice(views, part) if hidden else None
                work = part.ffn(views.normed, cut, views.x, skip_zeros=skip_zeros, hidden=into)
                tally.work.append((part, work))
            if tally.timed:
                tally.lap(_name(self.home), began, self.home)
            return
        self._together(views, workspace, cuts, skip_zeros, tally, hidden)

    def gather(self, workspace: Workspace, tokens: int) -> Array:
        """The activations (tokens, n_ff) that `run` left, by the file's numbers."""
        if len(self.parts) == 1 and self.order is None:
            return workspace.on(self.parts[0].device.tier).views(tokens).hidden
        whole = np.empty((tokens, int(self._bounds[-1])), np.float32)
        for part in self.parts:
            views = workspace.on(part.device.tier).views(tokens)
            whole[:, part.start : part.stop] = part.device.ops.to_host(_slice(views, part))
        if self.order is None:
            return whole
        named = np.empty_like(whole)
        named[:, self.order] = whole
        return named

    def fired(self, workspace: Workspace, tokens: int) -> Counts:
        """For how many of the tokens each neuron was not zero (n_ff), by the file's numbers, as `run` left it."""
        one = tokens == 1
        counts: Counts = np.empty(int(self._bounds[-1]), bool if one else np.int64)
        for part in self.parts:
            hidden = part.device.ops.to_host(_slice(workspace.on(part.device.tier).views(tokens), part))
            if one:  # in every decode step
                np.not_equal(hidden[0], 0.0, out=counts[part.start : part.stop])
            else:
                counts[part.start : part.stop] = np.count_nonzero(hidden, axis=0)
        if self.order is None:
            return counts
        named = np.empty_like(counts)
        named[self.order] = counts
        return named

    def named(self, active: ActiveSet) -> ActiveSet:
        """An active set of the host by the file's numbers, as a copy."""
        if active.indices is None:
            return active
        return ActiveSet(active.indices.copy() if self.order is None else np.sort(self.order[active.indices]))

    def _cut(self, active: ActiveSet) -> tuple[ActiveSet, ...]:
        """The active set of each part, counted from its start."""
        if active.indices is None:
            return (ALL,) * len(self.parts)
        if len(self.parts) == 1:
            return (active,)
        at = np.searchsorted(active.indices, self._bounds)
        cuts = []
        for part, begin, end in zip(self.parts, at, at[1:], strict=False):
            cut = active.indices[begin:end]
            if part.start:
                cut -= part.start
            cuts.append(ActiveSet(cut))
        return tuple(cuts)

    def _together(
        self,
        views: Views,
        workspace: Workspace,
        cuts: Sequence[ActiveSet],
        skip_zeros: bool,
        tally: Tally,
        hidden: bool,
    ) -> None:
        tokens, home = len(views.x), self.home
        spaces = [views if s.device is home else workspace.on(s.device.tier).views(tokens) for s in self._sides]
        began = time.perf_counter()
        for side, space in zip(self._sides, spaces, strict=True):
            if side.device is not home:
                tally.carry(home, views.normed, side.device, space.normed)
                space.x[...] = 0.0
        copying = time.perf_counter() - began

        def work_of(side: _Side, space: Views) -> FfnWork:
            total = NOTHING
            for index, part in side.parts:
                into = _slice(space, part) if hidden else None
                work = part.ffn(space.normed, cuts[index], space.x, skip_zeros=skip_zeros, hidden=into)
                tally.work.append((part, work))
                total = FfnWork(*(a + b for a, b in zip(total, work, strict=True)))
            return total

        begun: list[Device] = []
        errors: list[BaseException] = []
        try:
            for side, space in zip(self._sides, spaces, strict=True):
                side.device.begin(lambda side=side, space=space: work_of(side, space))  # type: ignore[misc]
                begun.append(side.device)
        finally:
            for device in begun:
                try:
                    device.end()
                except BaseException as error:  # all sides must have ended before any error leaves
                    errors.append(error)
        if errors:
            raise errors[0]
        merging = time.perf_counter()
        for side, space in sorted(zip(self._sides, spaces, strict=True), key=lambda pair: pair[0].parts[0][0]):
            if side.device is not home:
                tally.carry(side.device, space.x, home, views.normed)
                home.ops.add(views.x, views.normed)
        copying += time.perf_counter() - merging
        if tally.timed:
            for side in self._sides:
                tally.spend(_name(side.device), side.device.seconds, side.device)
            # What both did not spend computing was spent waiting for one another, and copying.
            longest = max(side.device.seconds for side in self._sides)
            tally.spend("crossing", time.perf_counter() - began - longest if longest else copying)


def _name(device: Device) -> str:
    return "ffn hot" if device.tier is Tier.VRAM else "ffn cold"


def _slice(views: Views, part: Neurons) -> Array:
    """A part's own piece of the array of activations, contiguous."""
    tokens = len(views.x)
    flat = views.hidden.reshape(-1)
    return flat[tokens * part.start : tokens * part.stop].reshape(tokens, part.stop - part.start)
