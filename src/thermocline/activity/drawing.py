"""Plots as SVG text: axes, lines, bars and heat maps, without any library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

INK, MUTED, GRID, PAPER = "#1f2a37", "#66727f", "#e4e9ef", "#ffffff"
WARM, COLD, TEAL, AMBER, VIOLET = "#d1495b", "#1d4e89", "#2a9d8f", "#e09f3e", "#7b5ea7"
COLOURS: Final = (WARM, COLD, TEAL, AMBER, VIOLET)
SCALE: Final = ("#0b1f3f", "#143f73", "#1f6f9f", "#3fa0ad", "#8ccab2", "#f0e3b2", "#f2b05e", "#e0703f", "#b5263a")
"""Cold to hot."""
NAMESPACE: Final = 'xmlns="http://www.w3.org/2000/svg"'
"""What an SVG file needs and a page does not."""
LEVELS: Final = 48
FONT: Final = "system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',Helvetica,Arial,sans-serif"

Points = Sequence[float] | npt.NDArray[np.floating]
Map = Callable[[float], float]


@dataclass(frozen=True, slots=True)
class Axis:
    """Values from `low` to `high`, a label, and where the marks are with what they say."""

    low: float
    high: float
    label: str
    marks: tuple[tuple[float, str], ...]


@dataclass(slots=True)
class Plot:
    """One picture: a title, a frame with two axes, and what is drawn into it, in the units of the axes.

    The vertical axis points up; give it `low` above `high` to turn it.
    """

    title: str
    x: Axis
    y: Axis
    width: int = 680
    height: int = 400
    right: int = 28
    legend: list[tuple[str, str]] = field(default_factory=list)
    _parts: list[str] = field(default_factory=list)

    LEFT = 62
    TOP = 62
    BOTTOM = 54

    def across(self, value: float) -> float:
        """Pixels from the left."""
        return self.LEFT + (value - self.x.low) / (self.x.high - self.x.low) * self.inner_width

    def down(self, value: float) -> float:
        """Pixels from the top."""
        return self.TOP + (self.y.high - value) / (self.y.high - self.y.low) * self.inner_height

    @property
    def inner_width(self) -> float:
        """Pixels of the frame."""
        return self.width - self.LEFT - self.right

    @property
    def inner_height(self) -> float:
        """Pixels of the frame."""
        return self.height - self.TOP - self.BOTTOM

    def line(
        self, xs: Points, ys: Points, colour: str, *, name: str = "", width: float = 2.2, opacity: float = 1.0,
        dashes: str = "", dots: bool = False,
    ) -> None:  # fmt: skip
        """A line through points; NaN breaks it."""
        path, pen = [], "M"
        for x, y in zip(xs, ys, strict=True):
            if np.isnan(y):
                pen = "M"
                continue
            path.append(f"{pen}{self.across(x):.1f} {self.down(y):.1f}")
            pen = "L"
            if dots:
                self._parts.append(
                    f'<circle cx="{self.across(x):.1f}" cy="{self.down(y):.1f}" r="{width + 0.6:.1f}" fill="{colour}"/>'
                )
        style = f' stroke-dasharray="{dashes}"' if dashes else ""
        faint = f' opacity="{opacity:g}"' if opacity < 1 else ""
        self._parts.append(
            f'<path d="{"".join(path)}" fill="none" stroke="{colour}" stroke-width="{width:g}" '
            f'stroke-linejoin="round" stroke-linecap="round"{style}{faint}/>'
        )
        if name:
            self.legend.append((name, colour))

    def bars(self, heights: Points, colours: Sequence[str], *, name: str = "", width: float = 0.72) -> None:
        """A bar at each whole number from 0, up from the foot of the frame."""
        foot = self.down(self.y.low)
        for i, value in enumerate(heights):
            if np.isnan(value):
                continue
            left, top = self.across(i - width / 2), self.down(min(value, self.y.high))
            wide = max(self.across(i + width / 2) - left, 0.5)
            self._parts.append(
                f'<rect x="{left:.2f}" y="{top:.2f}" width="{wide:.2f}" height="{max(foot - top, 0):.2f}" '
                f'fill="{colours[i % len(colours)]}"/>'
            )
        if name:
            self.legend.append((name, colours[0]))

    def ranges(self, lows: Points, highs: Points, colour: str, *, name: str = "") -> None:
        """A thin upright stroke at each whole number from 0."""
        for i, (low, high) in enumerate(zip(lows, highs, strict=True)):
            if not np.isnan(low + high):
                x = f"{self.across(i):.1f}"
                self._parts.append(
                    f'<line x1="{x}" x2="{x}" y1="{self.down(low):.1f}" y2="{self.down(high):.1f}" '
                    f'stroke="{colour}" stroke-width="2" stroke-linecap="round"/>'
                )
        if name:
            self.legend.append((name, colour))

    def heat(self, values: npt.NDArray[np.floating], left: float, right: float) -> None:
        """Rows of values from 0 (cold) to 1 (hot), row i around i on the vertical axis, spread from left to right.

        Neighbours of one colour are drawn as one, and all of one colour as one path.
        """
        levels = np.clip(np.rint(values * (LEVELS - 1)), 0, LEVELS - 1).astype(int)
        columns = levels.shape[1]
        edges = [self.across(left + (right - left) * c / columns) for c in range(columns + 1)]
        paths: dict[int, list[str]] = {}
        for row, line in enumerate(levels):
            top, foot = self.down(row - 0.5), self.down(row + 0.5)
            starts = [0, *(np.flatnonzero(np.diff(line)) + 1), columns]
            for start, stop in pairwise(starts):
                box = f"M{edges[start]:.1f} {top:.2f}H{edges[stop]:.1f}V{foot:.2f}H{edges[start]:.1f}Z"
                paths.setdefault(int(line[start]), []).append(box)
        for level, boxes in sorted(paths.items()):
            self._parts.append(
                f'<path d="{"".join(boxes)}" fill="{heat_colour(level / (LEVELS - 1))}" shape-rendering="crispEdges"/>'
            )

    def colour_bar(self, marks: Sequence[tuple[float, str]], label: str) -> None:
        """The scale of a heat map, at the right of the frame."""
        left, wide = self.width - self.right + 16, 12
        step = self.inner_height / LEVELS
        for level in range(LEVELS):
            top = self.TOP + self.inner_height - (level + 1) * step
            self._parts.append(
                f'<rect x="{left}" y="{top:.2f}" width="{wide}" height="{step + 0.4:.2f}" '
                f'fill="{heat_colour(level / (LEVELS - 1))}" shape-rendering="crispEdges"/>'
            )
        for place, text in marks:
            top = self.TOP + self.inner_height * (1 - place)
            self._parts.append(_text(left + wide + 5, top + 3.5, text, size=11, colour=MUTED))
        middle, x = self.TOP + self.inner_height / 2, self.width - 8
        self._parts.append(_text(x, middle, label, size=11, colour=MUTED, anchor="middle", turned=True))

    def guide(self, x: float, y: float, note: str, colour: str = INK) -> None:
        """A marked point, with dashes to both axes and a note beside it."""
        at_x, at_y = self.across(x), self.down(y)
        self._parts.append(
            f'<path d="M{self.LEFT} {at_y:.1f}H{at_x:.1f}V{self.down(self.y.low):.1f}" fill="none" stroke="{colour}" '
            f'stroke-width="1.2" stroke-dasharray="3 4"/><circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="5" '
            f'fill="{PAPER}" stroke="{colour}" stroke-width="2.4"/>'
        )
        late = x > self.x.low + 0.6 * (self.x.high - self.x.low)
        shift, anchor = (-12, "end") if late else (12, "start")
        self._parts.append(_text(at_x + shift, at_y + 20, note, size=13, colour=INK, anchor=anchor, bold=True))

    def svg(self) -> str:
        """The picture."""
        parts = [
            f'<svg {NAMESPACE} viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{escape(self.title)}" font-family="{FONT}">',
            f"<title>{escape(self.title)}</title>",
            f'<rect width="{self.width}" height="{self.height}" rx="8" fill="{PAPER}"/>',
            _text(self.LEFT, 26, self.title, size=16, bold=True),
            *self._frame(),
            *self._parts,
            *self._legend(),
            "</svg>",
        ]
        return "\n".join(parts)

    def _frame(self) -> Iterable[str]:
        foot, right = self.TOP + self.inner_height, self.LEFT + self.inner_width
        for value, text in self.y.marks:
            y = self.down(value)
            yield f'<line x1="{self.LEFT}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}"/>'
            yield _text(self.LEFT - 8, y + 4, text, size=12, colour=MUTED, anchor="end")
        for value, text in self.x.marks:
            x = self.across(value)
            yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{foot:.1f}" y2="{foot + 5:.1f}" stroke="{MUTED}"/>'
            yield _text(x, foot + 20, text, size=12, colour=MUTED, anchor="middle")
        yield f'<line x1="{self.LEFT}" x2="{right:.1f}" y1="{foot:.1f}" y2="{foot:.1f}" stroke="{MUTED}"/>'
        yield _text(self.LEFT + self.inner_width / 2, self.height - 14, self.x.label, size=13, anchor="middle")
        yield _text(14, self.TOP + self.inner_height / 2, self.y.label, size=13, anchor="middle", turned=True)

    def _legend(self) -> Iterable[str]:
        left = float(self.LEFT)
        for name, colour in self.legend:
            yield f'<rect x="{left:.1f}" y="38" width="16" height="5" rx="2.5" fill="{colour}"/>'
            yield _text(left + 22, 45, name, size=12, colour=MUTED)
            left += 22 + 6.6 * len(name) + 18


def percents(low: float, high: float, steps: int = 5) -> tuple[tuple[float, str], ...]:
    """Marks of an axis of shares, at round percents."""
    wanted = (high - low) / steps
    size = 10.0 ** np.floor(np.log10(wanted))
    step = next(size * k for k in (1, 2, 2.5, 5, 10) if size * k >= wanted * 0.999)
    first = int(np.ceil(low / step - 1e-9))
    return tuple((k * step, f"{k * step * 100:.4g} %") for k in range(first, int(high / step + 1e-9) + 1))


def percent(share: float) -> str:
    """A share for people."""
    return f"{100 * share:.1f} %"


def layer_marks(count: int, most: int = 12) -> tuple[tuple[float, str], ...]:
    """Marks of an axis of layers: all of them, or every second, fifth, tenth and so on."""
    step = next(s for s in (1, 2, 4, 5, 8, 10, 16, 20, 50, 100, 1000) if count <= most * s or s == 1000)
    return tuple((float(i), str(i)) for i in range(0, count, step))


def layer_axis(count: int) -> Axis:
    """A horizontal axis with a place for each layer."""
    return Axis(-0.6, count - 0.4, "layer", layer_marks(count))


def share_axis(values: Iterable[float], label: str, *, most: float = 1.0) -> Axis:
    """An upright axis from 0 to a little above the largest value, never above `most`."""
    known = [v for v in values if not np.isnan(v)]
    high = min(most, max([*known, 0.01]) * 1.08)
    marks = percents(0, high)
    if high < most and len(marks) > 1:  # end at a mark, so that the frame looks whole
        step = marks[1][0] - marks[0][0]
        high = min(most, step * np.ceil(high / step - 1e-9))
        marks = percents(0, high)
    return Axis(0.0, float(high), label, marks)


def heat_colour(value: float) -> str:
    """The colour of 0 (cold) to 1 (hot)."""
    place = min(max(value, 0.0), 1.0) * (len(SCALE) - 1)
    low = min(int(place), len(SCALE) - 2)
    return mixed(SCALE[low], SCALE[low + 1], place - low)


def mixed(first: str, second: str, share: float) -> str:
    """A colour between two."""
    pairs = ((int(first[i : i + 2], 16), int(second[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def _text(
    x: float, y: float, text: str, *, size: int, colour: str = INK, anchor: str = "start", bold: bool = False,
    turned: bool = False,
) -> str:  # fmt: skip
    weight = ' font-weight="600"' if bold else ""
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}{turn}>'
        f"{escape(text)}</text>"
    )
