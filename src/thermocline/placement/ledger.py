"""The account of every byte reserved in a budgeted tier."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

from thermocline.errors import BudgetError, UsageError
from thermocline.hardware.machine import Tier
from thermocline.placement.budget import setting_text, size_text


class Purpose(StrEnum):
    """What bytes are reserved for."""

    ATTENTION = "attention weights"
    FFN = "ffn weights"
    EMBEDDING = "embedding"
    OUTPUT = "output head"
    PREDICTOR = "predictor"
    KV = "kv cache"
    ACTIVATIONS = "activations and scratch"
    STAGING = "staging"
    GRAPHS = "graph pools"
    MARGIN = "margin"


@dataclass(frozen=True, slots=True)
class Demand:
    """Bytes wanted of a tier.

    Where a setting decides the size, `setting` is its flag, `count` its value, and `step` the bytes that one
    more of it costs: the refusal can then name the largest value that fits.
    """

    tier: Tier
    purpose: Purpose
    nbytes: int
    setting: str = ""
    count: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        for name in ("nbytes", "count", "step"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise UsageError(
                    f"{name} of a reservation for {self.purpose} is {value!r}; allowed: whole numbers >= 0"
                )


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a ledger has granted; give it back with `Ledger.release`."""

    ticket: int
    tier: Tier
    purpose: Purpose
    nbytes: int


class Ledger:
    """Reserves and releases bytes of budgeted tiers; refuses what does not fit.

    A tier without a budget is counted, but never refused. Sums are exact integers. One thread uses a ledger at
    a time.

    Raises:
        UsageError: a budget is not a whole number of bytes.
    """

    def __init__(self, budgets: Mapping[Tier, int]) -> None:
        for tier, budget in budgets.items():
            if not isinstance(budget, int) or isinstance(budget, bool) or budget < 0:
                raise UsageError(f"the budget of {tier} is {budget!r} bytes; allowed: whole numbers >= 0")
        self.budgets = dict(budgets)
        self._open: dict[int, Reservation] = {}
        self._sums: dict[tuple[Tier, Purpose], int] = {}
        self._next = 0

    def reserve(self, demand: Demand) -> Reservation:
        """Set bytes aside.

        Raises:
            BudgetError: they do not fit; nothing was reserved.
        """
        return self.reserve_all((demand,))[0]

    def reserve_all(self, demands: Iterable[Demand]) -> tuple[Reservation, ...]:
        """Set bytes aside for all of `demands` or for none.

        Raises:
            BudgetError: they do not fit; nothing was reserved.
        """
        wanted = tuple(demands)
        for tier, budget in self.budgets.items():
            missing = self.used(tier) + sum(d.nbytes for d in wanted if d.tier is tier) - budget
            if missing > 0:
                raise BudgetError(tier, missing, self._remedy(tier, missing, wanted), self.table(tier, wanted))
        granted = []
        for demand in wanted:
            reservation = Reservation(self._next, demand.tier, demand.purpose, demand.nbytes)
            self._open[self._next] = reservation
            self._next += 1
            self._sums[demand.tier, demand.purpose] = self.used(demand.tier, demand.purpose) + demand.nbytes
            granted.append(reservation)
        return tuple(granted)

    def release(self, reservation: Reservation) -> None:
        """Give bytes back.

        Raises:
            UsageError: they were given back before, or come from another ledger.
        """
        if self._open.get(reservation.ticket) is not reservation:
            raise UsageError(f"{reservation.nbytes:,} bytes for {reservation.purpose} are not reserved here")
        self._close(reservation)

    @contextmanager
    def transaction(self) -> Iterator[Ledger]:
        """Whatever is reserved inside is given back if the block fails, and kept if it ends well."""
        start = self._next
        try:
            yield self
        except BaseException:
            for reservation in [r for ticket, r in self._open.items() if ticket >= start]:
                self._close(reservation)
            raise

    def used(self, tier: Tier, purpose: Purpose | None = None) -> int:
        """Bytes reserved in a tier, for one purpose or for all."""
        if purpose is not None:
            return self._sums.get((tier, purpose), 0)
        return sum(size for (where, _), size in self._sums.items() if where is tier)

    def free(self, tier: Tier) -> int:
        """Bytes that can still be reserved.

        Raises:
            UsageError: the tier has no budget.
        """
        if tier not in self.budgets:
            raise UsageError(f"{tier} has no budget; budgeted are {', '.join(self.budgets) or 'no tiers'}")
        return self.budgets[tier] - self.used(tier)

    def rows(self) -> list[tuple[Tier, Purpose, int]]:
        """Tier, purpose and bytes of everything that is reserved, in the order of tiers and purposes."""
        totals = {(t, p): self.used(t, p) for t in Tier for p in Purpose}
        return [(tier, purpose, size) for (tier, purpose), size in totals.items() if size]

    def table(self, tier: Tier, wanted: Iterable[Demand] = ()) -> str:
        """A tier's account as text: bytes by purpose, `wanted` included, then their sum and the budget."""
        totals = {p: self.used(tier, p) + sum(d.nbytes for d in wanted if (d.tier, d.purpose) == (tier, p))
                  for p in Purpose}  # fmt: skip
        lines = [(purpose.value, size) for purpose, size in totals.items() if size]
        lines.append(("sum", sum(totals.values())))
        if tier in self.budgets:
            lines.append(("budget", self.budgets[tier]))
        return "\n".join(f"  {tier:<5}{name:<26}{size:>20,}  {size_text(size):>12}" for name, size in lines)

    def __str__(self) -> str:
        return "\n".join(self.table(tier) for tier in Tier if tier in self.budgets or self.used(tier))

    def _close(self, reservation: Reservation) -> None:
        del self._open[reservation.ticket]
        self._sums[reservation.tier, reservation.purpose] -= reservation.nbytes

    def _remedy(self, tier: Tier, missing: int, wanted: tuple[Demand, ...]) -> str:
        """The budget that would do, and the settings that fit this one."""
        whole = self.budgets[tier] + missing
        ways = [f"raise --{tier}-budget to {setting_text(whole)} or more ({whole:,} bytes)"]
        for d in wanted:
            steps = -(-missing // d.step) if d.tier is tier and d.step else d.count
            if steps < d.count:
                ways.append(f"lower {d.setting} from {d.count} to {d.count - steps}")
        return ", or ".join(ways)
