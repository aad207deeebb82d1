"""Memory budgets as people write them: `8GiB`, `80%`, `auto`, or a bare number of GiB."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

from thermocline.errors import UsageError, printable

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

LARGEST = 1 << 50
"""A pebibyte: larger budgets are typing errors."""

UNITS = {
    "b": 1, "k": KIB, "m": MIB, "g": GIB, "t": 1 << 40,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": 1 << 40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
"""Bytes of each unit; a bare letter is binary."""

ALLOWED = "8GiB, 8192MiB, 80%, auto, or a bare number of GiB"

_PATTERN = re.compile(r"(\d{1,20}(?:\.\d{0,20})?|\.\d{1,20}) *(%|[a-z]{1,3})?", re.ASCII)


class BudgetKind(StrEnum):
    """How a budget is stated."""

    BYTES = "bytes"
    SHARE = "share"
    AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Budget:
    """A budget as stated. `amount` is bytes, a share of the whole memory from 0 to 1, or 0 for `auto`."""

    kind: BudgetKind
    amount: Fraction = Fraction(0)

    def resolve(self, name: str, total: int, free: int, margin: int = 0) -> int:
        """Bytes that may be used of a memory of `total` bytes, `free` of them unused.

        `auto` takes what is free less `margin`, never less than nothing. A share is of `total`.

        Raises:
            UsageError: more is asked for than the memory has.
        """
        if self.kind is BudgetKind.AUTO:
            return spare(min(free, total), margin)
        size = int(self.amount * total) if self.kind is BudgetKind.SHARE else int(self.amount)
        if size > total:
            raise UsageError(
                f"{name} of {size:,} bytes is more than the {total:,} ({total / GIB:.2f} GiB) that there are; "
                f"allowed: up to {total / GIB:.2f}GiB, 100% or auto"
            )
        return size


def parse_budget(value: str | float, name: str = "budget") -> Budget:
    """Read a budget; numbers, and strings without a unit, are GiB.

    Raises:
        UsageError: not a budget, negative, not finite, above 100 % or above a pebibyte.
    """
    text = str(value).strip().lower()
    if text == "auto":
        return Budget(BudgetKind.AUTO)
    match = None if isinstance(value, bool) else _PATTERN.fullmatch(_plain(value, text))
    unit = match[2] if match else None
    if match is None or (unit not in (None, "%") and unit not in UNITS):
        raise UsageError(f"{name} is {printable(repr(value))}; allowed: {ALLOWED}")
    number = Fraction(match[1])
    if unit == "%":
        if number > 100:
            raise UsageError(f"{name} is {printable(repr(value))}; allowed: 0% to 100%")
        return Budget(BudgetKind.SHARE, number / 100)
    size = number * UNITS[unit or "gib"]
    if size > LARGEST:
        raise UsageError(f"{name} is {printable(repr(value))}; allowed: up to {LARGEST // (1 << 40)}TiB")
    return Budget(BudgetKind.BYTES, Fraction(int(size)))


def spare(available: int, reserved: int) -> int:
    """What is left of `available` bytes after `reserved`, never less than nothing."""
    return max(0, available - reserved)


def size_text(size: float) -> str:
    """Bytes for people: three digits and a binary unit."""
    for unit, name in ((1 << 40, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size) >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size:.0f} B"


def setting_text(size: int) -> str:
    """Bytes as a budget that can be typed and holds them: hundredths of a binary unit, rounded up."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            hundredths = -(-100 * size // unit)
            return f"{hundredths // 100}.{hundredths % 100:02}{name}"
    return f"{size}B"


def _plain(value: str | float, text: str) -> str:
    """Numbers without an exponent: 1e-05 is how Python writes a small one."""
    return f"{value:.20f}" if isinstance(value, float) and "e" in text else text
