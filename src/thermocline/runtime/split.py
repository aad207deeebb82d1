"""What a run over several devices did, beside what its plan predicted; and what of it the next plan may use."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from thermocline.errors import WARNING, OutputError
from thermocline.files.atomic import atomic_write
from thermocline.hardware.cache import home
from thermocline.hardware.machine import Corrections, ReadCurve, Tier
from thermocline.hardware.reader import ReadStats
from thermocline.memory.record_cache import Uses
from thermocline.model.feed_forward import Tally
from thermocline.ops.contract import FfnWork
from thermocline.placement.budget import size_text
from thermocline.placement.plan import LayerPlan, Plan

LOUD = 0.25
"""The cost model is off by so much of its prediction: that is said aloud."""
FEWEST_STEPS = 8
"""Fewer steps tell more of the first touch of memory than of the machine."""
FURTHEST = 20.0
"""Times that a measured figure may differ from the machine's own; beyond, something else was measured."""
LONGEST_BETWEEN = 10.0
"""Seconds of a step, likewise."""
LARGEST = 1 << 16


@dataclass(slots=True)
class DiskAccount:
    """What decode steps read from disk, and the records that they asked for."""

    read: ReadStats = field(default_factory=ReadStats)
    asked: int = 0
    found: int = 0
    _start: tuple[ReadStats, Uses] = field(default_factory=lambda: (ReadStats(), Uses()))

    def begin(self, stats: ReadStats, uses: Uses) -> None:
        """Before a step."""
        self._start = stats, uses

    def end(self, stats: ReadStats, uses: Uses) -> None:
        """After it."""
        self.read += stats.since(self._start[0])
        self.asked += uses.asked - self._start[1].asked
        self.found += uses.found - self._start[1].found


@dataclass(slots=True)
class Account:
    """Sums over the decode steps of one generation. `wall` is their seconds, with those that made tokens and text."""

    steps: int = 0
    wall: float = 0.0
    hot_fired: int = 0
    hot_bytes: float = 0.0
    crossings: int = 0
    crossed_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    busy: dict[Tier, float] = field(default_factory=dict)
    disk: DiskAccount = field(default_factory=DiskAccount)

    def add(self, tally: Tally, hot: FfnWork, hot_bytes: float) -> None:
        """One step more."""
        self.steps += 1
        self.hot_fired += hot.fired
        self.hot_bytes += hot_bytes
        self.crossings += tally.crossings
        self.crossed_bytes += tally.crossed_bytes
        for name, seconds in tally.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        for tier, seconds in tally.busy.items():
            self.busy[tier] = self.busy.get(tier, 0.0) + seconds

    def mean_ms(self, *names: str) -> float:
        """Milliseconds of a step that components took together."""
        return sum(self.seconds.get(name, 0.0) for name in names) * 1e3 / max(self.steps, 1)


@dataclass(frozen=True, slots=True)
class Component:
    """Milliseconds of a decode step, predicted and measured."""

    name: str
    predicted_ms: float
    measured_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskReport:
    """What `steps` decode steps, which took `seconds`, read from disk: requests, bytes, and seconds of waiting for any.

    `found` of `asked` records of the disk tier were in memory. `fastest` is the bytes/s that random reads as large as
    these reach alone, by what was measured of the disk; 0 where nothing was.
    """

    steps: int
    seconds: float
    requests: int
    nbytes: int
    busy: float
    asked: int
    found: int
    fastest: float

    @property
    def rate(self) -> float:
        """Bytes/s while something was in flight."""
        return self.nbytes / self.busy if self.busy else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__} | {"rate": self.rate}

    def line(self) -> str:
        """For people."""
        line = (
            f"disk {self.nbytes / self.steps / 1e6:.1f} MB a token in {self.requests / self.steps:,.0f} reads at "
            f"{self.rate / 1e6:,.0f} MB/s, in flight {self.busy / self.seconds:.0%} of the time"
        )
        if self.fastest:
            line += f" · random reads as large as these reach {self.fastest / 1e6:,.0f} MB/s here"
        if self.asked:
            line += f" · {self.found / self.asked:.1%} of the wanted neurons of the disk tier were in memory"
        return line


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitReport:
    """A generation over several devices. Bytes are sums over its `steps` decode steps, as are crossings.

    `hot_fired` of `fired` neurons were computed beside VRAM. The component "ffn" holds the predictor, both sides,
    which overlap, and the crossing; "between" is what none of the others takes.
    `vram_busy` and `ram_busy` are seconds that the two sides computed, 0 where that was not measured; RAM's hold the
    waiting for the disk. `disk` is None where nothing is there. `over` is bytes that
    a GPU held beyond its budget in the first prompt.
    """

    steps: int
    fired: int
    hot_fired: int
    vram_bytes: float
    ram_bytes: float
    vram_busy: float
    ram_busy: float
    seconds: float
    crossings: int
    crossed_bytes: int
    components: tuple[Component, ...]
    disk: DiskReport | None = None
    over: int = 0

    @property
    def hot_share(self) -> float:
        """Share of the neurons that fired which were hot."""
        return self.hot_fired / self.fired if self.fired else 0.0

    @property
    def step(self) -> Component:
        """The whole step."""
        return self.components[0]

    @property
    def off(self) -> float:
        """How far measured is from predicted, relative to predicted; 0 where nothing was measured."""
        if self.steps < FEWEST_STEPS or not self.step.predicted_ms:
            return 0.0
        return self.step.measured_ms / self.step.predicted_ms - 1

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        names = ("steps", "hot_share", "vram_bytes", "ram_bytes", "vram_busy", "ram_busy", "crossings",
                 "crossed_bytes", "off", "over")  # fmt: skip
        return {name: getattr(self, name) for name in names} | {
            "disk": None if self.disk is None else self.disk.as_dict(),
            "components": [
                {"name": c.name, "predicted_ms": c.predicted_ms, "measured_ms": c.measured_ms} for c in self.components
            ],
        }

    def lines(self) -> list[str]:
        """For people: what each tier did, the components, and a warning where the cost model was off."""
        if not self.steps:
            return []
        tiers = [("VRAM", self.vram_bytes, self.vram_busy), ("RAM", self.ram_bytes, self.ram_busy)]
        reads = ", ".join(
            f"{name} {size / self.steps / 1e6:.1f} MB a token at {size / (busy or self.seconds) / 1e9:.1f} GB/s"
            + (f" in {busy / self.seconds:.0%} of the time" if busy else "")
            for name, size, busy in tiers
            if size
        )
        crossed = f"{self.crossings / self.steps:.0f} crossings a token ({self.crossed_bytes / self.steps:,.0f} bytes)"
        shown = ", ".join(f"{c.name} {c.predicted_ms:.3g} / {c.measured_ms:.3g}" for c in self.components)
        lines = [f"{self.hot_share:.1%} of the active neurons were hot · {reads} · {crossed}"]
        if not self.vram_bytes:
            lines = [reads]
        if self.disk is not None:
            lines.append(self.disk.line())
        lines.append(f"ms a token, predicted / measured: {shown}")
        if self.over:
            lines.append(
                f"{WARNING}the GPU held {size_text(self.over)} more than its budget in the first prompt; the next one "
                "gets a plan that is smaller by as much, if there is one, or lower --vram-budget"
            )
        if abs(self.off) > LOUD:
            faster = "slower" if self.off > 0 else "faster"
            lines.append(
                f"{WARNING}decoding was {abs(self.off):.0%} {faster} than the plan predicted; "
                "--replan plans with what was measured"
            )
        return lines


def split_report(
    plan: Plan,
    account: Account,
    *,
    fired: int,
    bytes_read: float,
    seconds: float,
    curve: ReadCurve | None = None,
    over: int = 0,
) -> SplitReport:
    """The report of a generation whose decode steps took `seconds` and read `bytes_read`; `curve` is the disk's."""
    layers, off = plan.layers, _measured(plan, account)
    attention = sum(layer.attention_ms for layer in layers)
    total = sum(layer.total_ms for layer in layers)
    components = (
        Component("step", plan.predicted.step_ms, seconds * 1e3 / max(account.steps, 1)),
        Component("attention", attention, account.mean_ms(*(f"attention {tier}" for tier in Tier))),
        Component("ffn", total - attention, account.mean_ms("ffn")),
        Component("predictor", sum(layer.predictor_ms for layer in layers), account.mean_ms("predictor")),
        Component("ffn hot", sum(layer.hot_ms for layer in layers), account.mean_ms("ffn hot")),
        Component("ffn cold", sum(layer.cold_ms for layer in layers), account.mean_ms("ffn cold")),
        Component("crossing", sum(layer.crossing_ms for layer in layers), account.mean_ms("crossing")),
        Component("rest", _rest(plan), account.mean_ms("head")),
        Component("between", plan.predicted.between_ms, 1e3 * (off.between or 0.0)),
    )
    return SplitReport(
        steps=account.steps,
        fired=fired,
        hot_fired=account.hot_fired,
        vram_bytes=account.hot_bytes,
        ram_bytes=bytes_read - account.hot_bytes,
        vram_busy=account.busy.get(Tier.VRAM, 0.0),
        ram_busy=account.busy.get(Tier.RAM, 0.0),
        seconds=seconds,
        crossings=account.crossings,
        crossed_bytes=account.crossed_bytes,
        components=components,
        disk=_disk_report(account, seconds, curve),
        over=over,
    )


def _disk_report(account: Account, seconds: float, curve: ReadCurve | None) -> DiskReport | None:
    disk, steps = account.disk, account.steps
    if not steps or not (disk.read.requests or disk.asked):
        return None
    size = disk.read.nbytes / max(disk.read.requests, 1)
    return DiskReport(
        steps=steps,
        seconds=seconds,
        requests=disk.read.requests,
        nbytes=disk.read.nbytes,
        busy=disk.read.busy,
        asked=disk.asked,
        found=disk.found,
        fastest=0.0 if curve is None or not size else curve.bandwidth(size),
    )


def measured_of(plan: Plan, account: Account) -> Corrections | None:
    """What a generation says of the figures that its plan was priced with; None if it saw too little."""
    return None if account.steps < FEWEST_STEPS else _measured(plan, account)


def _measured(plan: Plan, account: Account) -> Corrections:
    layers = plan.layers

    def ratio(predicted: float, *names: str) -> float:
        return _ratio(Component("", predicted, account.mean_ms(*names)))

    def attention(tier: Tier) -> float:
        return ratio(sum(layer.attention_ms for layer in layers if layer.home is tier), f"attention {tier}")

    found = Corrections(
        attention_vram=attention(Tier.VRAM),
        attention_ram=attention(Tier.RAM),
        attention_disk=attention(Tier.DISK),
        predictor=ratio(sum(layer.predictor_ms for layer in layers), "predictor"),
        hot=ratio(sum(layer.hot_ms for layer in layers), "ffn hot"),
        cold=ratio(sum(layer.cold_ms for layer in layers), "ffn cold"),
        crossing=ratio(sum(layer.crossing_ms for layer in layers), "crossing"),
        rest=ratio(_rest(plan), "head"),
    )
    parts = _rest(plan) * found.rest + sum(_corrected(layer, found) for layer in layers)
    return replace(found, between=max(0.0, account.wall / max(account.steps, 1) - parts / 1e3))


def _rest(plan: Plan) -> float:
    """Milliseconds that are predicted for embedding and head."""
    return max(0.0, plan.predicted.step_ms - plan.predicted.between_ms - sum(layer.total_ms for layer in plan.layers))


def _corrected(layer: LayerPlan, off: Corrections) -> float:
    """Milliseconds of a layer by the plan, corrected."""
    sides = max(layer.hot_ms * off.hot, layer.cold_ms * off.cold)
    apart = layer.predictor_ms * off.predictor + layer.crossing_ms * off.crossing
    return layer.attention_ms * off.attention(layer.home) + apart + sides


def remember(plan: Plan, measured: Corrections) -> None:
    """Keep what a run of this plan's model on its machine measured, relative to the machine's own figures.

    Raises:
        OutputError: the folder cannot be written.
    """
    path = _path(plan.machine, plan.model)
    content = json.dumps(asdict(measured), indent=2).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path.parent} cannot be made: {error.strerror}; set THERMOCLINE_HOME") from error
    with atomic_write(path, size=len(content)) as file:
        file.write(content)


def recall(machine: str, model: str) -> Corrections | None:
    """What was measured before on the machine and model with these fingerprints; None if nothing usable was."""
    try:
        with _path(machine, model).open("rb") as file:
            kept: Mapping[str, Any] = json.loads(file.read(LARGEST))
        found = {f.name: float(kept[f.name]) for f in fields(Corrections)}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    ratios = [value for name, value in found.items() if name != "between"]
    usable = all(1 / FURTHEST <= ratio <= FURTHEST for ratio in ratios) and 0 <= found["between"] <= LONGEST_BETWEEN
    return Corrections(**found) if usable else None


def _path(machine: str, model: str) -> Path:
    return home() / f"run-{machine[:16]}-{model[:16]}.json"


def _ratio(component: Component) -> float:
    if component.predicted_ms <= 0 or component.measured_ms <= 0:
        return 1.0
    ratio = component.measured_ms / component.predicted_ms
    return min(FURTHEST, max(1 / FURTHEST, ratio)) if math.isfinite(ratio) else 1.0
